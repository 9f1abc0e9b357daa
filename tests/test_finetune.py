"""Training: from the probe's score, whole after any stop, and used like any other backbone."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

from cli import cli
from features.backbones import load_backbone
from features.datasets import open_dataset
from features.errors import BackboneError, ProbeError
from features.extract import extract
from features.manifest import NO_SPLIT
from features.plan import ExtractionSettings
from features.store import FeatureStore
from probe import results
from probe.train import checkpoints, training
from probe.train.feeds import Images, recipe_of
from probe.train.finetune import TrainSettings, finetune, train_on_store

NAME = "timm:test_vit"
FAST = {"epochs": 2, "batch_size": 16, "lr": 1e-3, "warmup": 0, "augment": True}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of 120 small images in three classes that texture tells apart, and its store."""
    root = tmp_path_factory.mktemp("tune")
    rng = np.random.default_rng(0)
    for i in range(120):
        kind = i % 3
        folder = root / "images" / "abc"[kind]
        folder.mkdir(parents=True, exist_ok=True)
        x, y = np.meshgrid(np.arange(96), np.arange(96))
        wave = np.sin((x if kind == 0 else y if kind == 1 else x + y) / 3 + rng.uniform(0, 6))
        pixels = 128 + 40 * wave[..., None] + 60 * rng.standard_normal((96, 96, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
    manifest = open_dataset(f"folder:{root / 'images'}")
    backbone = load_backbone(NAME, "random", 96)
    [report] = extract(
        manifest,
        [backbone],
        out=root / "features",
        settings=ExtractionSettings(tokens=True, precision="float32", views=1, workers=1),
    )
    return root, report.store


def settings(head="linear", **given):
    loop = {k: given.pop(k) for k in list(given) if k in training.Training.__dataclass_fields__}
    loop = training.Training(**(FAST | loop))
    return TrainSettings(
        head=head,
        head_size="deit-tiny",
        head_weights="random",
        training=loop,
        bootstrap=100,
        **given,
    )


def tune(made, out, **given):
    return finetune(made[1], load_backbone(NAME, "random", 96), out=out, settings=settings(**given))


# Asked for 1e-8, lbfgs may find no lower point for rounding (status 2); other failures stay errors.
@pytest.mark.filterwarnings(
    r"ignore:lbfgs failed to converge after \d+ .*status=2:sklearn.exceptions.ConvergenceWarning"
)
def test_training_starts_at_the_probe_s_score(made, tmp_path):
    result = tune(made, tmp_path, epochs=1)
    with FeatureStore.open(made[1]) as store:
        manifest, X = store.manifest(), store.read(store.default_feature)
    folds = training_rows(manifest)
    best = 0.0
    for C in 10 ** np.linspace(-6, 5, 45):
        model = LogisticRegression(C=C, tol=1e-8, max_iter=5000)
        model.fit(X[folds[0]], manifest.label[folds[0]])
        best = max(best, model.score(X[folds[1]], manifest.label[folds[1]]))
    assert result.history[0]["value"] == pytest.approx(best, abs=1 / len(folds[1]) + 1e-9)
    assert result.scenario == "unfrozen-linear"
    assert results.load(tmp_path)[0] == result


def training_rows(manifest):
    from probe import splits

    train = np.flatnonzero((manifest.split != "test") & (manifest.split != NO_SPLIT))
    val = splits.folds(manifest, train, k=5, seed=0).held_out[0]
    return train[~val], train[val]


def test_a_frozen_backbone_stays_as_it_was_and_the_score_gets_better(made, tmp_path):
    backbone = load_backbone(NAME, "random", 96)
    before = {k: v.clone() for k, v in backbone.module.state_dict().items()}
    how = settings(unfreeze="none", init="random", epochs=6, lr=1e-2, augment=False)
    result = finetune(made[1], backbone, out=tmp_path, settings=how)
    for name, value in backbone.module.state_dict().items():
        assert torch.equal(value, before[name]), name
    losses = [record["train_loss"] for record in result.history[1:]]
    assert losses[-1] < losses[0]
    assert result.scenario == "frozen-linear"


def test_an_appended_deit_is_trained_on_stored_tokens(made, tmp_path):
    result = train_on_store(made[1], out=tmp_path, settings=settings("deit", epochs=3))
    assert result.scenario == "frozen-deit"
    losses = [record["train_loss"] for record in result.history[1:]]
    assert losses[-1] < losses[0]
    assert tune(made, tmp_path, head="deit", epochs=1).scenario == "unfrozen-deit"


def test_the_study_s_linear_head_is_trained_on_stored_vectors_and_their_views(made, tmp_path):
    how = settings(protocol="study", epochs=8, lr=1e-2)
    result = train_on_store(made[1], out=tmp_path, settings=how)
    assert (result.scenario, result.protocol) == ("frozen-linear", "study")
    assert result.tuned["init"] == "random"
    losses = [record["train_loss"] for record in result.history[1:]]
    assert losses[-1] < losses[0]
    with pytest.raises(ProbeError, match="holds no block00/cls"):
        train_on_store(made[1], feature="block00/cls", out=tmp_path, settings=how)


def test_scalars_of_every_epoch_are_written_for_tensorboard(made, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    where = tmp_path / "board"
    result = tune(made, tmp_path / "out", epochs=2, tensorboard=str(where))
    [events] = where.rglob("events.*")
    found = EventAccumulator(str(events)).Reload()
    assert [e.step for e in found.Scalars("loss/train")] == [1, 2]
    assert [e.value for e in found.Scalars("accuracy/validation")] == pytest.approx(
        [record["value"] for record in result.history]
    )


def test_a_full_disk_leaves_the_last_good_checkpoint(made, tmp_path, monkeypatch):
    undisturbed = tune(made, tmp_path / "whole", epochs=3)
    real, calls = checkpoints.write_whole, []

    def full(path, data):
        calls.append(path.name)
        if any(name.startswith("last-0002") for name in calls):
            (path.with_name(path.name + ".part")).write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, data)

    monkeypatch.setattr(checkpoints, "write_whole", full)
    with pytest.raises(ProbeError, match="epoch 2 can't be written .No space left"):
        tune(made, tmp_path / "full", epochs=3)
    monkeypatch.setattr(checkpoints, "write_whole", real)
    [state] = (tmp_path / "full").rglob("state.json")
    assert json.loads(state.read_text())["epoch"] == 1
    resumed = tune(made, tmp_path / "full", epochs=3)
    assert [r["train_loss"] for r in resumed.history] == [
        r["train_loss"] for r in undisturbed.history
    ]


def test_the_first_ctrl_c_ends_training_and_the_same_command_goes_on(made, tmp_path):
    command = [sys.executable, "-c", RUN, made[1], tmp_path / "stopped"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a runner may ignore it
    )
    deadline = time.monotonic() + 120
    while not (states := list((tmp_path / "stopped").rglob("state.json"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate()[1]
    before = json.loads(states[0].read_text())["history"]
    resumed = tune(made, tmp_path / "stopped", epochs=4)
    assert resumed.history[: len(before)] == before
    assert len(resumed.history) == 5


def test_a_batch_in_pieces_gives_the_same_step(made, tmp_path):
    whole = tune(made, tmp_path / "a", epochs=1)
    pieces = tune(made, tmp_path / "b", epochs=1, accumulate=3)
    assert pieces.history[1]["train_loss"] == pytest.approx(
        whole.history[1]["train_loss"], rel=1e-4
    )


RUN = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
import test_finetune as t
t.tune((None, Path(sys.argv[1])), Path(sys.argv[2]), epochs=4)
"""


def test_a_killed_run_goes_on_to_the_same_losses(made, tmp_path):
    undisturbed = tune(made, tmp_path / "whole", epochs=4)
    command = [sys.executable, "-c", RUN, made[1], tmp_path / "killed"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (states := list((tmp_path / "killed").rglob("state.json"))) or (
        json.loads(states[0].read_text())["epoch"] < 2
    ):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not list((tmp_path / "killed").rglob("run.json")):
        assert len(json.loads(states[0].read_text())["history"]) < 5
    resumed = tune(made, tmp_path / "killed", epochs=4)

    def losses(result):
        return [(record["train_loss"], record["value"]) for record in result.history]

    assert losses(resumed) == losses(undisturbed)  # to the last bit
    assert resumed.value == undisturbed.value
    with pytest.raises(ProbeError, match="after 4 epochs, more than --epochs 2"):
        tune(made, tmp_path / "killed", epochs=2)
    other = tune(made, tmp_path / "killed", epochs=1, lr=5e-3)  # begins anew, beside it
    assert Path(other.heads).parent != Path(resumed.heads).parent
    assert results.load(tmp_path / "killed") == [resumed, other]
    # A checkpoint of another run, moved to where this one would go on, is refused.
    mine, theirs = (tmp_path / "killed" / Path(r.heads).parent for r in (other, resumed))
    shutil.rmtree(mine)
    shutil.copytree(theirs, mine)
    with pytest.raises(ProbeError, match=r"holds another run \(.*lr: 0.001, now 0.005"):
        tune(made, tmp_path / "killed", epochs=1, lr=5e-3)


def test_a_tuned_backbone_is_extracted_and_probed_like_any_other(made, tmp_path):
    result = tune(made, tmp_path, init="random", epochs=4, augment=False)
    assert result.folds["epoch"] > 0
    run = (tmp_path / result.heads).parent
    tuned = load_backbone(NAME, str(run), 96)
    assert tuned.weights == "random"  # it began at random
    assert tuned.weights_digest != load_backbone(NAME, "random", 96).weights_digest
    manifest = open_dataset(f"folder:{made[0] / 'images'}")
    [report] = extract(
        manifest,
        [tuned],
        out=tmp_path / "features",
        settings=ExtractionSettings(precision="float32"),
    )
    saved = load_file(run / "checkpoints" / "best.safetensors")
    said = results.read_predictions(tmp_path / result.predictions)
    with FeatureStore.open(report.store) as store:
        test = np.flatnonzero(store.manifest().split == "test")
        X = torch.from_numpy(store.read(store.default_feature, test))
    p = (X @ saved["head.weight"].T + saved["head.bias"]).softmax(1).numpy()
    np.testing.assert_allclose(p, said.probabilities, atol=1e-4)
    with pytest.raises(BackboneError, match="want one that trained efficientnet_lite0"):
        load_backbone("efficientnet_lite0", str(run))


def test_an_image_s_view_depends_on_seed_content_and_epoch_only(made):
    manifest = open_dataset(f"folder:{made[0] / 'images'}")
    with FeatureStore.open(made[1]) as store:
        recipe = recipe_of(store, load_backbone(NAME, "random", 96).transform)
    feed = Images(manifest, recipe, seed=3)
    rows = np.arange(5)
    once, again = (torch.cat(list(feed.batches([rows[:2], rows[2:]], 1))) for _ in range(2))
    assert torch.equal(once, again)
    alone = next(feed.batches([rows[3:4]], 1))
    assert torch.equal(once[3:4], alone)
    assert not torch.equal(once, next(feed.batches([rows], 2)))
    assert not torch.equal(once, next(feed.batches([rows], None)))
    fresh = Images(manifest, recipe, seed=3, room=0)  # keeps nothing
    assert torch.equal(once, next(fresh.batches([rows], 1)))
    assert torch.equal(once, next(fresh.batches([rows], 1)))


@pytest.mark.parametrize("scenario", ["unfrozen-linear", "unfrozen-deit", "frozen-deit"])
def test_a_run_predicts_images_as_it_did_its_test_split(made, tmp_path, scenario):
    if scenario == "frozen-deit":
        result = train_on_store(made[1], out=tmp_path, settings=settings("deit", epochs=2))
    else:
        head = scenario.split("-")[1]
        result = tune(made, tmp_path, head=head, init="random", epochs=2, augment=False)
    assert result.scenario == scenario
    flat = tmp_path / "flat"  # new images have no labels
    flat.mkdir()
    for path in (made[0] / "images").rglob("*.png"):
        shutil.copy(path, flat)
    command = ["predict", str(tmp_path / result.heads), f"folder:{flat}"]
    done = CliRunner().invoke(cli, [*command, "--features", str(tmp_path / "features")])
    assert done.exit_code == 0, done.output
    rows = {row["id"]: row for row in csv.DictReader(done.stdout.splitlines())}
    assert len(rows) == 120
    said = results.read_predictions(tmp_path / result.predictions)
    ours = [[float(rows[id_.split("/")[-1]][f"p:{c}"]) for c in "abc"] for id_ in said.ids]
    np.testing.assert_allclose(ours, said.probabilities, atol=2e-3)  # tokens are stored as float16


TOGETHER = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
import test_finetune as t
t.tune((None, Path(sys.argv[1])), Path(sys.argv[2]), epochs=1, batch_size=8, lr=1e-4)
"""


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(made, tmp_path):
    alone = tune(made, tmp_path / "one", epochs=1, batch_size=16, lr=1e-4)
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    # accelerate's own launcher starts several processes on a CPU by MPI only.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), str(made[1]), str(tmp_path / "two")],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [together] = results.load(tmp_path / "two")
    lines = (tmp_path / "two" / "results.jsonl").read_text().splitlines()
    assert len(lines) == 1
    assert together.history[1]["train_loss"] == pytest.approx(
        alone.history[1]["train_loss"], rel=1e-4
    )
