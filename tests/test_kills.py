"""kill -9 at any moment of a command: given again, it ends as if nothing had happened.

The commands are processes of their own, forked from one that has imported what they need and done
nothing with it, so that moments are spread over the work and not over imports.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from features.store import FeatureStore
from probe import grid
from probe.results import Result, load, read_predictions

NAME = "timm:test_vit"
FORK = """
import json, os, sys
import accelerate, matplotlib.pyplot, sklearn.linear_model, timm, torch, torchvision
import cli, features.extract, probe.compare, probe.train.finetune, probe.grid, probe.predict
import probe.report
import probe.sweep, probe.draw.figures, probe.report.panels, probe.report.stores, probe.report.files
for line in iter(sys.stdin.readline, ""):
    words, said = json.loads(line)
    if not (pid := os.fork()):
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = ["medprobe", *words]
        cli.main()
    print(pid, flush=True)
    sys.stdin.readline()  # until then its id stays its own
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forks:
    """Runs commands, one after the other."""

    def __init__(self, log):
        self.log = log
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORK], cwd=ROOT, env=environment, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self, *words):
        line = json.dumps([[str(word) for word in words], str(self.log)])
        self.process.stdin.write(line + "\n")
        return int(self.process.stdout.readline())

    def end(self):
        self.process.stdin.write("\n")
        return int(self.process.stdout.readline())

    def run(self, *words):
        """Return how long a whole run takes."""
        self.log.write_text("")
        begun = time.monotonic()
        self.start(*words)
        code = self.end()
        assert code == 0, self.log.read_text()
        assert "Traceback" not in self.log.read_text()
        return time.monotonic() - begun

    def kill(self, after, *words):
        """Kill a run after some seconds; return whether it was still there."""
        pid = self.start(*words)
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)  # a process that has ended is there until it is waited for
        return self.end() == -signal.SIGKILL


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    found = Forks(tmp_path_factory.mktemp("said") / "log")
    yield found
    found.process.stdin.close()
    found.process.stdout.close()
    found.process.wait()


def write_images(top):
    """36 images in three classes."""
    rng = np.random.default_rng(0)
    for i in range(36):
        folder = top / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 150, (64, 64, 3), dtype=np.uint8) + np.uint8(40 * (i % 3))
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory, forks):
    """36 images in three classes, their store, and results of a probe."""
    root = tmp_path_factory.mktemp("made")
    write_images(root / "images")
    forks.run("extract", f"folder:{root / 'images'}", "-m", NAME, *SMALL, "-o", root / "features")
    [store] = root.glob("features/images/*.h5")
    forks.run("probe", store, "-o", root / "results", *PROBE)
    return root


SMALL = ("--weights", "random", "--image-size", "64")
PROBE = ("--C", "0.1,1,10", "--folds", "2", "--bootstrap", "100", "--shots", "2,4,all")
LOOP = ("--epochs", "3", "--batch-size", "8", "--warmup", "0", "--bootstrap", "100")


def store_of(made):
    return next(made.glob("features/images/*.h5"))


def head_of(made):
    return next(iter(sorted(made.glob("results/**/heads.json"))))


COMMANDS = {
    "probe": lambda made, out: ("probe", store_of(made), "-o", out, *PROBE),
    "finetune": lambda made, out: (
        "finetune", f"folder:{made / 'images'}", "-m", NAME, *SMALL, *LOOP,
        "--features", out / "features", "-o", out,
    ),
    "run": lambda made, out: (
        "run", "-d", f"folder:{made / 'images'}", "-m", NAME, *SMALL, *LOOP, "--C", "0.1,1",
        "--folds", "2", "--scenario", "frozen-linear", "--scenario", "unfrozen-linear",
        "--features", out / "features", "-o", out,
    ),
    "report": lambda made, out: ("report", made / "results", "-o", out),
    "predict": lambda made, out: (
        "predict", head_of(made), f"folder:{made / 'images'}", "--features", out / "features",
        "-o", out / "said.csv",
    ),
}  # fmt: skip

TIMES = {"seconds", "created"}
NUMBER = re.compile(r"-\d+(?=/|$)")  # of a folder whose name was taken: NAME-2
OURS = (".lock", ".holder")  # of locks; and drafts, names that begin with a dot


def timeless(value, out):
    """A JSON value without times, and without where it lies."""
    if isinstance(value, dict):
        return {k: timeless(v, out) for k, v in value.items() if k not in TIMES}
    if isinstance(value, list):
        return [timeless(v, out) for v in value]
    return value.replace(str(out), "OUT") if isinstance(value, str) else value


def outcome(out):
    """All that a command has made, but for times, locks and drafts."""
    found = {}
    for file in sorted(p for p in out.rglob("*") if p.is_file()):
        name = file.relative_to(out)
        if file.suffix in OURS or any(part.startswith(".") for part in name.parts):
            continue
        if file.suffix == ".h5":
            with FeatureStore.open(file) as store:
                assert not any(rows.size for _, rows in store.verify())
                found[str(name)] = {n: store.read(n).tobytes() for n in store.features}
                found[str(name)] |= {"done": store.done.tobytes()}
        elif file.suffix == ".jsonl":
            lines = [timeless(json.loads(line), out) for line in file.read_text().splitlines()]
            found[str(name)] = {key_of(line): without_place(line) for line in lines}
        else:
            text = file.suffix == ".json"
            data = timeless(json.loads(file.read_text()), out) if text else file.read_bytes()
            key = NUMBER.sub("", str(name.parent)) + "/" + name.name
            assert key not in found, "files of a result that was replaced"
            found[key] = data
    return found


def key_of(line):
    """What a line is of: the last one of several stands."""
    return line.get("fingerprint") or Result(**line | {"seconds": 0, "created": ""}).identity.digest


def without_place(line):
    return {k: NUMBER.sub("", v) if k in ("predictions", "heads") else v for k, v in line.items()}


def whole(out, before):
    """Whatever is there while a command is unfinished can be read, and is right or as before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # half a line, of a run that was stopped
        grid.done_in(out)
        if (out / "results.jsonl").is_file():
            for result in load(out):
                assert len(read_predictions(out / result.predictions).ids)
                assert (out / result.heads).is_file()
    for name, data in before.items():
        assert not (out / name).exists() or (out / name).read_bytes() in data, name


def attack(forks, made, tmp_path, name, *, kills, rounds, seed=0):
    """Kill a command some times in a row, then let it end; several rounds, each from nothing."""
    calm, out = tmp_path / "calm", tmp_path / "out"
    lasts = forks.run(*COMMANDS[name](made, calm))
    wanted = outcome(calm)
    assert wanted
    draw = random.Random(seed)
    killed = 0
    for _ in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        former = {}
        if name == "report":
            forks.run("report", "--no-images", made / "results", "-o", out)
            former["index.html"] = [(p / "index.html").read_bytes() for p in (out, calm)]
        if name == "predict":
            former["said.csv"] = [(calm / "said.csv").read_bytes()]
        for _ in range(kills):
            killed += forks.kill(draw.uniform(0, lasts), *COMMANDS[name](made, out))
            whole(out, former)
        forks.run(*COMMANDS[name](made, out))
        found = outcome(out)
        assert found.keys() == wanted.keys()
        assert [k for k in found if found[k] != wanted[k]] == []
    return killed


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_thirty_kills_at_random_moments_change_nothing(tmp_path, forks, made, name):
    assert attack(forks, made, tmp_path, name, kills=3, rounds=10) > 15


@pytest.mark.parametrize("name", COMMANDS)
def test_kills_at_two_moments_change_nothing(tmp_path, forks, made, name):
    attack(forks, made, tmp_path, name, kills=2, rounds=1, seed=1)
