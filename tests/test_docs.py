"""The README's commands are run and print what it shows; every command stands in the docs."""

import doctest
import re
import shlex

import pytest
from click.testing import CliRunner
from conftest import ROOT

from cli import cli

README = (ROOT / "README.md").read_text()
CONSOLE = "".join(re.findall(r"```console\n(.*?)```", README, re.DOTALL))


def test_readme_commands_print_what_the_readme_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    same = doctest.OutputChecker().check_output
    blocks = re.findall(r"\$ medprobe (.*)\n((?:(?!\$ ).*\n)*)", CONSOLE)
    assert len(blocks) >= 5
    for command, shown in blocks:
        result = CliRunner().invoke(cli, shlex.split(command), prog_name="medprobe")
        assert result.exit_code == 0, result.output
        assert same(shown, result.output, doctest.ELLIPSIS), (
            f"$ medprobe {command}\n{result.output}"
        )


@pytest.mark.parametrize("name", cli.commands)
def test_every_command_has_help_that_ends_in_a_line_to_paste(name):
    assert f"$ medprobe {name}" in (ROOT / "docs" / "cli.md").read_text()
    last = cli.commands[name].help.strip().split("\b\n")[-1].replace("\\\n", " ")
    assert shlex.split(last)[:2] == ["medprobe", name]


def test_links_between_documents_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_promise_of_security_names_a_test_that_there_is():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text()))
    there = "".join(file.read_text() for file in ROOT.glob("tests/test_*.py"))
    assert len(named) > 40
    assert [name for name in sorted(named) if f"def {name}(" not in there] == []
