"""The environment of Python processes that this one starts.

They import what this process does, and never what happens to lie in the current folder: `python -c`
looks there first, so a folder called features/ (where stores are kept), or a json.py that came with
somebody's data, would be taken for a package.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # where features and probe are


def environment() -> dict[str, str]:
    """Return the environment variables with which a Python process imports as this one does.

    ROOT comes last: a package there is found before a mere folder of its name elsewhere, which
    an editable install (a finder after all others) doesn't see to.
    """
    current = Path.cwd()
    parts = [part for part in sys.path if part and Path(part).absolute() != current]
    path = os.pathsep.join([*parts, str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


@contextmanager
def inherited() -> Iterator[None]:
    """Have it as this process's environment, for libraries that start processes themselves."""
    before = dict(os.environ)
    os.environ.update(environment())
    try:
        yield
    finally:
        for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
            del os.environ[name]
            if name in before:
                os.environ[name] = before[name]


def elsewhere() -> str:
    """Return a PYTHONPATH for processes on other machines that have this one's folders.

    Installed packages are theirs; a checkout is this one.
    """
    given = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    installed = ROOT in {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    parts = [str(Path(part).absolute()) for part in given]
    return os.pathsep.join(parts if installed else [*parts, str(ROOT)])
