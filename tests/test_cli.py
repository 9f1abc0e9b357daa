"""The command line as scripts meet it: output, exit codes, errors of one or two lines."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT, make_manifest, make_store

from cli import cli

rng = np.random.default_rng(0)
X = rng.standard_normal((120, 6)).astype(np.float32)
Y = (X[:, :3] + rng.standard_normal((120, 3))).argmax(1)


def call(*words):
    return CliRunner().invoke(cli, [str(w) for w in words])


def run(*words, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "cli.py", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=environment.get("PWD", ROOT),
    )


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "made" / "b.h5", X, make_manifest(Y), bad={4: "file is empty"})


def test_help_costs_little_more_than_to_import_click():
    # 0.2 s are promised; how long that is depends on the machine, so its own import is the measure.
    def cost(*words):
        code = (
            "import resource, subprocess, sys\n"
            f"subprocess.run([sys.executable, *{words!r}], stdout=subprocess.DEVNULL, check=True)\n"
            "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
            "print(used.ru_utime + used.ru_stime)\n"
        )
        call = [sys.executable, "-c", code]
        return min(float(subprocess.check_output(call, cwd=ROOT)) for _ in range(3))

    bare = cost("-c", "import click")
    for words in ([], ["extract"], ["probe"], ["run"]):
        assert cost("cli.py", *words, "--help") < 4 * bare


def test_help_imports_no_heavy_library():
    code = (
        "import sys; sys.argv = ['medprobe', '--help']\nimport cli\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'h5py', 'timm', 'sklearn', 'rich', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("command", ["backbones", "datasets", "doctor"])
def test_json_is_one_document_on_standard_output(command):
    result = run(command, "--json")
    assert result.returncode == 0
    assert result.stderr == ""
    assert json.loads(result.stdout)


def test_backbones_json_has_the_fields_that_scripts_read():
    fields = (
        "name family params input_size feature_dim tokens layers mean std source licence "
        "pretraining_data"
    )
    for row in json.loads(call("backbones", "--json").output):
        assert set(fields.split()) <= set(row)


def test_inspect_and_verify_say_what_is_there(store):
    found = json.loads(call("inspect", store, "--json").output)
    assert (found["images"], found["done"], found["bad"]) == (
        120,
        119,
        {"00004.png": "file is empty"},
    )
    assert "bad: 00004.png: file is empty" in call("inspect", store).output
    assert call("verify", store).exit_code == 0
    import h5py

    with h5py.File(store, "r+") as file:
        file["features/final/mean"][7, 2] += 1
    result = call("verify", store)
    assert result.exit_code == 1
    assert "final/mean: 1 of 119 rows are damaged: [7]" in result.output
    assert json.loads(run("verify", store, "--json").stdout)["damaged"] == {
        "done": [],
        "final/mean": [7],
        "source": [],
    }
    store.write_bytes(store.read_bytes()[:3000])
    result = call("verify", store)
    assert result.exit_code == 1
    assert "can't be opened as HDF5" in result.output


def test_probe_predict_report_from_one_to_the_next(store, tmp_path):
    out = tmp_path / "results"
    result = run("probe", store, "-o", out, "--C", "0.01,1", "--folds", "3", "--json")
    assert result.stderr == ""
    [row] = json.loads(result.stdout)
    assert row["command"].startswith("medprobe probe ")
    assert row["versions"]["torch"]
    said = call("predict", out / row["heads"], store)
    classes = [f"{what}:class {k}" for what in ("p", "log_odds") for k in range(3)]
    assert said.stdout.startswith(f"id,predicted,{','.join(classes)},reason\n")
    assert said.stdout.count("\n") == 121
    assert said.stdout.splitlines()[5] == "00004.png,,,,,,,,file is empty"
    assert "Warning: 1 of 120 images have no answer: file is empty (1)" in said.stderr
    page = call("report", out, "-o", tmp_path / "report")
    assert page.output.strip() == str(tmp_path / "report" / "index.html")
    assert "made" in Path(page.output.strip()).read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["extract", "imagenet", "-m", "efficientnet_lite0"], "unknown dataset 'imagenet'"),
        (["extract", "sample", "-m", "resnet"], "unknown backbone 'resnet'"),
        (["extract", "sample"], "Missing option '-m'"),
        (["probe", "none.h5"], "there is no store none.h5: make it with `medprobe extract`"),
        (["probe", "{store}", "--C", "1,-2"], "'1,-2': want positive numbers"),
        (["probe", "{store}", "--C", "0.1", "1", "10"], "no spaces: write --C 0.1,1,10"),
        (["probe", "--C", "0.1,", "1,", "10", "{store}"], "no spaces: write --C 0.1,1,10"),
        (["probe", "{store}", "--shots", "1", "2", "4"], "no spaces: write --shots 1,2,4"),
        (["probe", "{store}", "--C", "0.1 1 10"], "want positive numbers with commas"),
        (["run", "-m", "b", "-d", "d", "--C", "0.1", "1"], "no spaces, such as --C 0.1,1,10"),
        (["extract", "sample", "-m", "a", "-m", "b", "--weights", "f"], "write BACKBONE=f, BACK"),
        (["extract", "sample", "-m", "a=f", "--weights", "a=g"], "a is given f and g: want one"),
        (["probe", "{store}", "--metric", "aucc"], "no metric 'aucc' for a multiclass task: did"),
        (["inspect", "README.md"], "README.md can't be opened as HDF5"),
        (["report", "nowhere"], "no results at nowhere"),
        (["predict", "none.json", "{store}"], "there is no none.json: want a saved head"),
        (["frobnicate"], "No such command 'frobnicate'"),
    ],
)
def test_a_wrong_call_exits_2_with_one_or_two_lines_and_no_traceback(words, said, store):
    result = run(*(w.format(store=store) for w in words))
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    message = result.stderr[result.stderr.index("Error: ") :]
    assert len(message.strip().splitlines()) <= 2


def test_debug_shows_the_traceback():
    assert "Traceback" in run("probe", "none.h5", MEDPROBE_DEBUG="1").stderr


def test_ctrl_c_says_how_to_go_on(tmp_path, image_folder):
    import signal
    import time

    words = ["extract", f"folder:{image_folder}", "-m", "efficientnet_lite0", "--batch-size", "1"]
    with subprocess.Popen(
        [sys.executable, ROOT / "cli.py", *words, "-o", tmp_path / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as run:
        store = tmp_path / "out" / "images" / "efficientnet_lite0.h5"
        while not store.exists() and run.poll() is None:
            time.sleep(0.01)
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "the same command goes on from here" in said
    assert "Traceback" not in said
    assert call(*words, "-o", tmp_path / "out").exit_code == 0
    assert call("verify", store).exit_code == 0


def test_each_command_says_what_is_true_of_it_where_it_is_stopped(monkeypatch):
    import click

    from cli import STOPPED

    assert STOPPED.keys() == cli.commands.keys()

    def stop():
        raise KeyboardInterrupt

    for name, line in STOPPED.items():
        monkeypatch.setitem(cli.commands, name, click.Command(name, callback=stop))
        result = call(name)
        assert (result.exit_code, result.output) == (130, f"Stopped. {line}\n")


def test_results_of_stores_before_the_one_that_was_stopped_stay(store, tmp_path, monkeypatch):
    from probe import results, sweep

    probe_all = sweep.probe_all

    def stopped(path, **given):
        if path.name == "c.h5":
            raise KeyboardInterrupt
        return probe_all(path, **given)

    monkeypatch.setattr(sweep, "probe_all", stopped)
    second = make_store(tmp_path / "made" / "c.h5", X, make_manifest(Y))
    result = call("probe", store, second, "-o", tmp_path / "out", "--C", "1")
    assert result.exit_code == 130
    assert "Results that were written stay" in result.output
    assert [r.backbone for r in results.load(tmp_path / "out")] == ["made"]


def test_a_folder_that_holds_results_is_said_to_be_added_to(store, tmp_path):
    words = ["probe", store, "-o", tmp_path / "out", "--folds", "3"]
    assert "holds 1" not in call(*words, "--C", "1").output
    again = call(*words, "--C", "0.1,1", "--json")
    assert f"{tmp_path / 'out'} holds 1 result. It stays" in again.stderr
    assert json.loads(again.stdout)
    assert "holds 2 results" in call(*words, "--C", "0.1,1").stderr
    assert "holds 2 results" in call(*words, "--C", "0.1,1").stderr  # three lines, two results
    with (tmp_path / "out" / "results.jsonl").open("a") as file:
        file.write("{}\n")
    assert "line 5 is not a result" in call(*words, "--C", "0.1,1").stderr


def test_lists_with_spaces_are_refused_before_any_work(store, tmp_path):
    result = call("probe", store, "-o", tmp_path / "out", "--C", "0.1", "1", "10")
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_weights_of_a_name_and_random_ones_of_all_are_said(tmp_path, image_folder):
    import torch

    words = ["extract", f"folder:{image_folder}", "--limit", 6, "-o", tmp_path]
    both = ["-m", "timm:test_vit", "-m", "timm:resnet10t"]
    result = call(*words, *both, "--weights", "random", "--image-size", 64, "--batch-size", 4)
    assert result.exit_code == 0, result.output
    said = "random weights, not the published ones: timm:test_vit, timm:resnet10t\n"
    assert said in result.stderr
    import timm

    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "w.pth")
    found = {}
    for how in (
        ["-m", f"timm:test_vit={tmp_path / 'w.pth'}"],
        ["-m", "timm:test_vit", "--weights", f"timm:test_vit={tmp_path / 'w.pth'}"],
        ["-m", "timm:test_vit", "--weights", tmp_path / "w.pth"],
    ):
        out = tmp_path / str(len(found))
        result = call(*words[:-1], out, *how)
        assert result.exit_code == 0, result.output
        about = json.loads(call("inspect", next(out.rglob("*.h5")), "--json").stdout)
        found[out] = about["fingerprint"]["backbone"]
    assert {made["weights"] for made in found.values()} == {"file"}
    assert len({made["weights_digest"] for made in found.values()}) == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_works_as_documented(shell):
    line = f"_MEDPROBE_COMPLETE={shell}_source medprobe"
    assert line in (ROOT / "docs" / "cli.md").read_text()
    code = "import sys; sys.argv = ['medprobe']; import cli; cli.main()"

    def asked(what, **words):
        environment = os.environ | words | {"_MEDPROBE_COMPLETE": f"{shell}_{what}"}
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
        ).stdout

    assert "_MEDPROBE_COMPLETE" in asked("source")
    place = {"COMP_CWORD": "extr" if shell == "fish" else "1", "COMP_WORDS": "medprobe extr"}
    assert "extract" in asked("complete", **place)
    place = {"COMP_CWORD": "--lim" if shell == "fish" else "3"}
    assert "--limit" in asked("complete", **place, COMP_WORDS="medprobe extract sample --lim")


def test_control_characters_in_names_reach_no_terminal(tmp_path):
    """ESC would be run by a terminal, the others hide or turn what follows, \\udcff is a byte."""
    hostile = "\x1b[31mred\x07\u202e\x9b\udcff\nnext"
    y = np.arange(80) % 2
    X = np.random.default_rng(0).standard_normal((80, 4)) + y[:, None]
    ids = [f"{i}{hostile}" for i in range(80)]
    manifest = replace(
        make_manifest(y, ids=ids, classes=(hostile, "ill"), dataset=hostile),
        columns={"site": np.array([hostile, "b"] * 40)},
    )
    store = str(make_store(tmp_path / "b.h5", X, manifest, bad={3: f"a reason {hostile}"}))
    out = ["-o", str(tmp_path / "out")]
    head = [*out, "--C", "1", "--folds", "2", "--bootstrap", "100", "--by", "site"]
    commands = [
        ["inspect", store],
        ["inspect", store, "--json"],
        ["verify", store],
        ["audit", store],
        ["probe", store, *head],
        ["probe", store, *head, "--json", "--seed", "1"],
        ["probe", store, *head, "--by", "none"],
        ["probe", store, *head, "--head", "knn"],
        ["compare", str(tmp_path / "out")],
        ["compare", str(tmp_path / "out"), "--json"],
        ["report", str(tmp_path / "out"), "-o", str(tmp_path / "report")],
    ]
    for words in commands:
        done = CliRunner().invoke(cli, words)
        assert "a fault of the program" not in done.output, words
        assert not set(done.output) & set("\x1b\x07\u202e\x9b\udcff"), words
    for file in (tmp_path / "report").rglob("*.*"):
        if file.suffix in (".html", ".csv", ".md", ".tex", ".svg"):
            assert not set(file.read_text(encoding="utf-8")) & set("\x1b\x07\u202e\x9b"), file


def test_options_that_do_nothing_or_can_t_be_followed_are_refused_before_any_fit(
    tmp_path, monkeypatch
):
    from probe.problem import Problem

    y = np.arange(80) % 2
    subject = np.array([f"p{i // 4}" for i in range(80)])  # of both classes each
    manifest = make_manifest(
        y, subject=subject, split=np.where(np.arange(80) // 4 % 4, "train", "test")
    )
    store = str(make_store(tmp_path / "b.h5", rng.standard_normal((80, 4)), manifest))
    monkeypatch.setattr(Problem, "choose", lambda *_, **__: pytest.fail("heads were fitted"))
    for words, said in (
        (["--by", "nosuch"], "has no column 'nosuch'"),
        (["--aggregate", "max"], "have different classes"),
        (["--unit", "sex"], "--unit sex joins nothing"),
        (["--head", "knn", "--C", "1"], "no strengths"),
        (["--k", "3"], "are of --head knn"),
        (["--seed", "-3"], "-3 is not in the range"),
    ):
        done = CliRunner().invoke(cli, ["probe", store, "-o", str(tmp_path / "out"), *words])
        assert done.exit_code == 2 and said in done.stderr, (words, done.output)


def test_compare_takes_the_results_of_one_metric(tmp_path):
    y = np.arange(80) // 4 % 2
    X = rng.standard_normal((80, 4)) + y[:, None]
    out = ["-o", str(tmp_path / "out"), "--folds", "2", "--bootstrap", "100"]
    store = str(make_store(tmp_path / "b.h5", X, make_manifest(y)))
    for words in (["--C", "1"], ["--C", "0.01"], ["--C", "1", "--metric", "auc"]):
        done = CliRunner().invoke(cli, ["probe", store, *out, *words])
        assert done.exit_code == 0, done.output
    both = CliRunner().invoke(cli, ["compare", str(tmp_path / "out")])
    assert "name one by --metric" in both.stderr
    one = CliRunner().invoke(cli, ["compare", str(tmp_path / "out"), "--metric", "acc"])
    assert one.exit_code == 0 and "made · C 0.01" in one.stdout
    none = CliRunner().invoke(cli, ["compare", str(tmp_path / "out"), "--metric", "kappa"])
    assert "no result by kappa: found accuracy, auroc" in none.stderr
