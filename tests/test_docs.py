"""The README's commands are run and print what it shows; every command stands in the docs."""

import doctest
import re
import shlex

import click
import numpy as np
import pytest
import sklearn
from click.testing import CliRunner
from conftest import ROOT, make_manifest, make_store
from sklearn.linear_model import LogisticRegression

from cli import cli
from probe.protocols import PROTOCOLS

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


def test_readme_python_runs_block_after_block(tmp_path, monkeypatch):
    """On a small store where the README's is, of three images per subject."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    y = np.arange(300) // 3 % 4
    X = (rng.standard_normal((300, 8)) + 3 * np.eye(8)[y]).astype(np.float32)
    subject = np.array([f"s{i // 3}" for i in range(300)])
    split = np.where(np.arange(300) // 3 % 5, "train", "test")
    manifest = make_manifest(y, subject=subject, split=split, dataset="sample")
    store = make_store(tmp_path / "features" / "sample" / "efficientnet_lite0.h5", X, manifest)
    probed = CliRunner().invoke(cli, ["probe", str(store), "--C", "1", "--bootstrap", "100"])
    assert probed.exit_code == 0, probed.output
    names = {}
    with sklearn.config_context():
        for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
            exec(compile(block, "README.md", "exec"), names)
    test = split == "test"
    for p in (names["p"].numpy(), names["sweep"].predict_proba(X[test])):
        theirs = LogisticRegression(C=names["sweep"].C_, tol=1e-8, max_iter=1000)
        theirs.fit(X[~test], y[~test])
        assert (p.argmax(1) == y[test]).mean() >= theirs.score(X[test], y[test]) - 0.05
    assert names["grouped"].score(X[test], y[test]) > 0.9


def options(command):
    yield from (p for p in command.params if isinstance(p, click.Option))
    for one in getattr(command, "commands", {}).values():
        yield from options(one)


@pytest.mark.parametrize("name", cli.commands)
def test_the_help_of_every_option_is_sentences(name):
    for option in options(cli.commands[name]):
        said = option.help or ""
        assert len(said.split()) >= 3 and said[0].isupper() and said.endswith("."), option.opts
        assert not said.startswith(("Of ", "For ", "Such ")), option.opts


def test_every_protocol_has_its_row_in_the_docs():
    page = (ROOT / "docs" / "protocols.md").read_text()
    for name, protocol in PROTOCOLS.items():
        assert f"| `{name}` | {protocol.head} |" in page


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
