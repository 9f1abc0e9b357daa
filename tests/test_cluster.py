"""A real Ray cluster of two nodes on this machine, judged by what one process does."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, make_manifest, make_store
from test_parts import contents

from cli import cli
from features import parts
from features.datasets import open_dataset
from features.errors import ClusterError, ProbeError, StoreError
from features.extract import extract
from features.plan import ExtractionSettings
from features.store import FeatureStore

ray = pytest.importorskip("ray")

SETTINGS = ExtractionSettings(batch_size=4, workers=1)


@pytest.fixture(scope="module")
def nodes():
    """Two nodes of one core each, and this process connected to the first."""
    from ray.cluster_utils import Cluster

    sys.modules.setdefault("test_cluster", sys.modules[__name__])
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        started.add_node(num_cpus=1)
        ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
        yield started
        ray.shutdown()
        started.shutdown()


@pytest.fixture
def cluster(nodes, monkeypatch):
    from features.cluster import Cluster

    monkeypatch.setattr(parts, "MIN_IMAGES", 8)
    monkeypatch.setattr(parts, "PARTS", 100)
    with Cluster(None) as connected:
        yield connected


def engine_of(cluster):
    from features.distributed import fill_by

    return partial(fill_by, cluster.pool)


class Small(torch.nn.Module):
    """A network without a library of models, that notes each pass and may act in one of them."""

    def __init__(self, notes, act):
        super().__init__()
        self._notes, self._act = notes, act
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.filters = torch.nn.Conv2d(3, 16, 5, 3)

    def forward(self, x):
        if x.device.type == "cpu" and not isinstance(x, torch._subclasses.FakeTensor):
            with self._notes.open("a") as file:
                file.write(f"{len(x)} {float(x.double().sum()):.4f}\n")
            self._act(x, len(self._notes.read_text().splitlines()))
        return self.filters(x).relu()


def small(notes, act=lambda *_: None):
    from features.backbones import BACKBONES
    from features.backbones.base import Backbone
    from features.backbones.network import channels_first, hooked
    from features.images import Transform

    spec = dataclasses.replace(BACKBONES["efficientnet_lite0"], name="small", feature_dim=16)
    module = Small(notes, act)
    network = hooked(
        final=lambda x: channels_first(module(x)),
        blocks=[],
        split=channels_first,
        size=32,
        module=module,
    )
    transform = Transform(32, 36, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return Backbone.of(spec, module, network, transform, "random")


def test_two_nodes_make_the_store_of_one_process_though_a_worker_dies(
    tmp_path, images, cluster, one_thread
):
    def die_once(_, count):
        if count == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    whole, notes = tmp_path / "whole", tmp_path / "notes"
    [here] = extract(images, [small(whole)], out=tmp_path / "here", settings=SETTINGS)
    [there] = extract(
        images, [small(notes, die_once)], out=tmp_path / "there",
        settings=cluster.settle(SETTINGS), engine=engine_of(cluster),
    )  # fmt: skip
    assert contents(here.store) == contents(there.store)
    once, passes = (file.read_text().splitlines() for file in (whole, notes))
    # Computed twice is what the dead worker had in hand: a batch, and at most two being committed.
    assert set(passes) == set(once)
    assert len(once) < len(passes) <= len(once) + 3


def test_the_command_adds_to_a_store_what_one_process_would(
    tmp_path, image_folder, cluster, one_thread
):
    def run(out, *more):
        words = ["extract", f"folder:{image_folder}", "-m", "efficientnet_lite0", "--batch-size", 4]
        words = [*words, "--workers", 1, "-o", tmp_path / out, "--json", *more]
        result = CliRunner().invoke(cli, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)[0]

    run("here", "--layers", "3,final")
    run("there")
    more = run("there", "--engine", "ray", "--layers", "3,final")
    assert (more["added"], more["computed"]) == (["block03/mean"], 40)
    assert run("there", "--engine", "ray")["computed"] == 0
    here, there = (tmp_path / out / "images" / "efficientnet_lite0.h5" for out in ("here", "there"))
    assert contents(here) == contents(there)


@pytest.mark.parametrize("how", ["raise", pytest.param("die", marks=pytest.mark.slow)])
def test_an_error_of_a_worker_is_a_line_that_names_the_row(tmp_path, image_folder, cluster, how):
    manifest = open_dataset(f"folder:{image_folder}")

    def fail(x, _):
        if f"{float(x.double().sum()):.4f}" == bad:
            if how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("no room on the device\nand a page of traces")

    extract(manifest, [small(tmp_path / "once")], out=tmp_path / "whole", settings=SETTINGS)
    bad = (tmp_path / "once").read_text().splitlines()[6].split()[1]
    with pytest.raises(ClusterError) as caught:
        extract(
            manifest, [small(tmp_path / "notes", fail)], out=tmp_path / "out",
            settings=cluster.settle(SETTINGS), engine=engine_of(cluster),
        )  # fmt: skip
    words = str(caught.value)
    assert re.search(r"rows 24 to 27, from \S+/dog/09\.jpg on", words), words
    assert len(words.splitlines()) == 1
    assert ("no room on the device" if how == "raise" else "3 workers were lost") in words
    # What was computed stays: only what is missing is computed now.
    [report] = extract(
        manifest, [small(tmp_path / "again")], out=tmp_path / "out", settings=SETTINGS
    )
    assert report.computed < 40


# --- probing --------------------------------------------------------------------------------------

rng = np.random.default_rng(0)
N, D, K = 4000, 24, 4
X = (rng.standard_normal((N, D)) * rng.uniform(0.2, 3, D) + 5).astype(np.float32)
Y = (X[:, :K] - 5 + 1.5 * rng.standard_normal((N, K))).argmax(1)
Y[(Y == 3) & (rng.random(N) < 0.95)] = 0  # a rare class, whose heads get inverses of their own
X[Y == 3, 0] += 4  # and nearly separable


def test_heads_over_rows_of_two_workers_are_those_of_one_process(tmp_path, cluster):
    from probe.cluster import RowWorkers
    from probe.heads import fit_heads
    from probe.solve.sources import FromStore

    store = FeatureStore.open(make_store(tmp_path / "made" / "b.h5", X, make_manifest(Y)))
    stored = FromStore(partial(store.read, "final/mean"), np.arange(N), D, free_bytes=1 << 40)
    findings = torch.nn.functional.one_hot(torch.from_numpy(Y)).double()
    findings[:50, 1] = torch.nan
    weights = torch.from_numpy(np.random.default_rng(1).integers(0, 3, (2, N))).float()
    # The last C separates the rare class, and then says little of its coefficients.
    settings = {
        "C": [1e-3, 1e-1, 1e1, 1e3, 1e5],
        "weights": weights,
        "tol": 1e-12,
    }
    whole = torch.from_numpy(X)
    with store, RowWorkers(cluster) as team:
        for source, y in ((whole, torch.from_numpy(Y)), (stored, findings)):
            here = fit_heads(whole, y, **settings)
            there = team.fit_heads(source, y, **settings)
            assert len(team._workers) == 2
            assert there.converged.all()
            torch.testing.assert_close(there.value, here.value, rtol=1e-10, atol=1e-13)
            for g in range(2):
                p, q = (heads.probabilities(whole, g)[:-1] for heads in (here, there))
                torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
        wrong = whole.clone()
        wrong[N - 1, 2] = torch.nan
        with pytest.raises(ProbeError, match="the features hold NaN or infinity"):
            team.fit_heads(wrong, torch.from_numpy(Y), C=[1.0])


def test_the_command_probes_with_the_same_answer(tmp_path, cluster):
    path = make_store(tmp_path / "made" / "b.h5", X, make_manifest(Y))

    def probe(*more):
        words = [
            "probe",
            path,
            "--C",
            "1e-3,1e-1,1,10",
            "--folds",
            3,
            "--json",
            "-o",
            tmp_path / "r",
        ]
        result = CliRunner().invoke(cli, [str(word) for word in (*words, *more)])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)[0]

    here, there = probe(), probe("--engine", "ray")
    assert here["C"] == there["C"]
    assert there["converged"]
    for name, score in here["metrics"].items():
        # An image next to the edge of a bin may be on either side of it.
        near = 2 / here["n_test"] if name == "ece" else 1e-5
        assert there["metrics"][name]["value"] == pytest.approx(score["value"], abs=near), name
    np.testing.assert_allclose(there["folds"]["scores"], here["folds"]["scores"], atol=1e-5)


@pytest.mark.slow
def test_a_fit_begins_again_where_a_worker_is_lost(cluster):
    from probe.cluster import RowWorkers
    from probe.heads import fit_heads

    seen, data = [], (torch.from_numpy(X), torch.from_numpy(Y))
    with RowWorkers(cluster) as team:

        def lose(*_):
            seen.append(1)
            if len(seen) == 2:
                ray.kill(team._workers[1])

        with pytest.warns(UserWarning, match="a worker was lost, and the rows it held: ") as caught:
            there = team.fit_heads(*data, C=[1, 10, 100], progress=lose)
    here = fit_heads(*data, C=[1, 10, 100])
    assert len(str(caught[0].message).splitlines()) == 1
    torch.testing.assert_close(there.value, here.value, rtol=1e-5, atol=0)


# --- the grid -------------------------------------------------------------------------------------


def test_the_grid_has_the_results_of_one_process_and_the_same_failures(
    tmp_path, image_folder, cluster, one_thread
):
    from probe import results

    def run(out, *more):
        words = ["run", "-d", f"folder:{image_folder}", "-m", "efficientnet_lite0"]
        words += ["-m", "timm:no_such_model", "--scenario", "frozen-linear", "--C", "0.01,1"]
        words += ["--folds", "2", "-o", tmp_path / out, "--features", tmp_path / out / "f", *more]
        return CliRunner().invoke(cli, [str(word) for word in words])

    here, there = run("here"), run("there", "--engine", "ray")
    assert here.exit_code == there.exit_code == 1
    assert "1 of 2 cells failed (images x timm:no_such_model, frozen-linear)" in there.stderr
    said = [sorted(re.sub(r" \(.*\)", "", r.stdout).splitlines()) for r in (here, there)]
    assert [len(lines) for lines in said] == [2, 2]
    assert sum("FAILED: timm has no model 'no_such_model'" in line for line in said[1]) == 1
    [a], [b] = (results.load(tmp_path / out) for out in ("here", "there"))
    assert (a.value, a.C, a.folds, a.metrics) == (b.value, b.C, b.folds, b.metrics)
    again = run("there", "--engine", "ray")
    assert again.stdout.count("done before") == 1


# --- the command line -----------------------------------------------------------------------------


def test_nothing_of_ray_is_imported_without_the_option(tmp_path, image_folder):
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from cli import cli\n"
        f"out, store = '{tmp_path}', '{tmp_path}/images/efficientnet_lite0.h5'\n"
        f"extract = ['extract', 'folder:{image_folder}', '-m', 'efficientnet_lite0', '-o', out]\n"
        "for words in (extract, ['probe', store, '--folds', '2', '--C', '1', '-o', out]):\n"
        "    result = CliRunner().invoke(cli, words)\n"
        "    assert result.exit_code == 0, result.output\n"
        "assert 'ray' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--address", "auto"], "--address and --num-...-per-worker go with --engine ray"),
        (["--engine", "ray", "--dry-run"], "--dry-run measures this machine"),
        (["--engine", "ray", "-o", "s3://b/f"], "want a folder on a disk, local or shared"),
        (["--engine", "ray", "--num-cpus-per-worker", "64"], "no machine of the cluster has room"),
    ],
)
def test_a_wrong_call_says_what_is_wanted(tmp_path, image_folder, cluster, words, said):
    call = ["extract", f"folder:{image_folder}", "-m", "efficientnet_lite0", "-o", str(tmp_path)]
    result = CliRunner().invoke(cli, [*call, *words])
    assert result.exit_code == 2
    assert said in result.stderr


# --- long ones ------------------------------------------------------------------------------------


@contextmanager
def started(address, folder, out):
    """The command as a process of its own, extracting many layers in small batches."""
    words = [
        sys.executable, ROOT / "cli.py", "extract", f"folder:{folder}", "-m", "efficientnet_lite0",
        "--batch-size", "2", "--layers", "all", "--workers", "1", "--engine", "ray",
        "--address", address, "-o", out,
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (
        Path(f"{out}.stdout").open("w") as said,
        Path(f"{out}.stderr").open("w") as errors,
        subprocess.Popen(words, cwd=ROOT, stdout=said, stderr=errors, env=env) as run,
    ):
        yield run
        run.kill()


def done_of(out):
    """How many rows are committed in the store and its parts."""
    total = 0
    for path in [*out.glob("images/*.h5"), *out.glob("images/*.parts/*.h5")]:
        try:
            with FeatureStore.open(path) as store:
                total += int((store.done == 1).sum())
        except (StoreError, OSError):  # in the making, or gone meanwhile
            continue
    return total


def wait_for(run, out, count):
    end = time.monotonic() + 120
    while done_of(out) < count:
        assert run.poll() is None, Path(f"{out}.stderr").read_text()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def many(image_folder):
    """400 images."""
    for file in list(image_folder.rglob("*.*")):
        for k in range(9):
            copy = file.with_stem(f"{file.stem}-{k}")
            copy.write_bytes(file.read_bytes() + bytes([k]))
    return image_folder


@pytest.mark.slow
def test_a_driver_that_is_killed_and_a_node_that_is_removed_lose_nothing(
    tmp_path,
    many,
    backbone,
    nodes,
    one_thread,
):
    store = Path("images", "efficientnet_lite0.h5")
    manifest = open_dataset(f"folder:{many}")
    settings = ExtractionSettings(batch_size=2, workers=1, layers="all")
    extract(manifest, [backbone], out=tmp_path / "here", settings=settings)
    out = tmp_path / "there"
    for goal in (40, 150):  # the driver, twice
        with started(nodes.address, many, out) as run:
            wait_for(run, out, goal)
            run.send_signal(signal.SIGKILL)
        assert done_of(out) >= goal
    before = done_of(out)
    with started(nodes.address, many, out) as run:
        wait_for(run, out, 250)
        nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
        run.wait(timeout=400)
    said, errors = (Path(f"{out}.{name}").read_text() for name in ("stdout", "stderr"))
    assert run.returncode == 0, errors
    line = re.fullmatch(r"\S+: (\d+) images computed, (\d+) already there, 0 bad\n", said)
    assert line, said
    which = "  positive class: dog, the second of cat, dog; --classes dog,cat turns them round\n"
    assert errors == which
    assert int(line[2]) >= before  # what was there before the last start was not computed again
    nodes.add_node(num_cpus=1)
    here, there = contents(tmp_path / "here" / store), contents(out / store)
    # The command that gave the labels: of the process itself there is none.
    assert here.pop("/manifest@labelled_by") == "b''"
    assert f"medprobe extract folder:{many}" in there.pop("/manifest@labelled_by")
    assert here == there
    assert not (out / "images" / "efficientnet_lite0.h5.parts").exists()
