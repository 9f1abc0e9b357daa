"""The command line.

The commands are in features/ (commands.py, inspection.py) and probe/commands/: each parses, calls
one function and prints; heavy imports happen inside.
Results go to standard output, messages and progress to standard error. Exit codes: 0 done, 1 the
work found a fault, 2 the call was wrong, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import signal
from typing import Any

import click

import features.commands
import features.inspection
from features.console import Failure, FaultFound, echo
from features.errors import MedprobeError, MissingImagesError
from features.files import reason
from probe.commands.analyze import analyze
from probe.commands.audit import audit
from probe.commands.compare import compare
from probe.commands.finetune import finetune
from probe.commands.predict import predict
from probe.commands.probe import probe
from probe.commands.report import report
from probe.commands.run import run
from probe.commands.test import test

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOTDIR)
STAYS = "Nothing was changed."
STOPPED = {  # what is true of each command where Ctrl-C stops it
    "backbones": STAYS,
    "datasets": STAYS,
    "doctor": STAYS,
    "extract": "What is stored stays; the same command goes on from here.",
    "inspect": STAYS,
    "verify": STAYS,
    "audit": STAYS,
    "probe": "Results that were written stay; the same command begins anew, and replaces them.",
    "finetune": "Features and epochs that are done stay; the same command goes on from them.",
    "run": "Cells that are done stay; the same command goes on with the others.",
    "predict": "No predictions were written; features that were computed stay.",
    "test": "Nothing was added to the results; features that were computed stay.",
    "compare": STAYS,
    "analyze": "Files that were written stay; the same command begins anew.",
    "report": "A former report stays as it was; the same command begins anew.",
}


def said_of(error: OSError) -> str:
    """Return what the system said of a file, in a line: which, why, and what to do about it."""
    hint = ". Make room, or choose another place" if error.errno in UNWRITABLE else ""
    return f"{error.filename}: {reason(error)}{hint}" if error.filename else str(error)


class Commands(click.Group):
    """A group whose errors are one or two lines, and whose commands stand in order of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands as they were added."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; turn errors into messages and exit codes."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            echo(f"Stopped. {STOPPED.get(ctx.invoked_subcommand or '', STAYS)}", err=True)
            ctx.exit(130)
        except Exception as error:
            if os.environ.get("MEDPROBE_DEBUG") == "1":
                raise
            message = said_of(error) if isinstance(error, OSError) else str(error)
            if not isinstance(error, (MedprobeError, OSError)):
                message = (
                    f"{type(error).__name__}: {message} "
                    "(a fault of the program; MEDPROBE_DEBUG=1 shows where)"
                )
            kind = FaultFound if isinstance(error, MissingImagesError) else Failure
            raise kind(message) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="medprobe")
def cli() -> None:
    """Extract features once, probe many heads quickly, believe the numbers.

    \b
    medprobe extract folder:images -m efficientnet_lite0
    medprobe probe features/images/efficientnet_lite0.h5
    medprobe report results
    """


def main() -> None:
    """Run the program; SIGTERM stops it as Ctrl-C does."""
    import warnings

    def say(message: Warning | str, *_: Any, **__: Any) -> None:
        echo(f"Warning: {message}", err=True)

    warnings.showwarning = say
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cli()


# In order of use.
MAKING = (*features.commands.COMMANDS, *features.inspection.COMMANDS)
USING = (audit, probe, finetune, run, predict, test, compare, analyze, report)
for command in (*MAKING, *USING):
    cli.add_command(command)


if __name__ == "__main__":
    main()
