"""The command line as scripts meet it: output, exit codes, errors of one or two lines."""

import json
import os
import subprocess
import sys
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
    assert said.stdout.startswith("id,predicted,p:class 0,p:class 1,p:class 2,reason\n")
    assert said.stdout.count("\n") == 121
    assert said.stdout.splitlines()[5] == "00004.png,,,,,file is empty"
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
        (["probe", "{store}", "--metric", "auc"], "no metric 'auc' for a multiclass task"),
        (["inspect", "README.md"], "README.md can't be opened as HDF5"),
        (["report", "nowhere"], "no results at nowhere"),
        (["predict", "none.json", "{store}"], "none.json is not a saved head"),
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
