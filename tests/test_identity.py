"""Results that differ in anything have files of their own, which are those of their rows."""

import csv
import errno
import json
import os
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import FINGERPRINT, make_manifest, make_store
from sklearn.metrics import accuracy_score

from cli import cli
from features.errors import ProbeError
from probe import results
from probe.compare import compare_results
from probe.identity import data_names, model_names
from probe.results import Predictions, load, read_predictions, write_predictions
from probe.sweep import ProbeOptions, probe

rng = np.random.default_rng(0)
N = 160
Y = rng.integers(0, 2, N)
SKILLED = rng.standard_normal((N, 4)) + 1.5 * Y[:, None]
USELESS = rng.standard_normal((N, 4))
MANIFEST = make_manifest(Y)
HOW = {"C": (0.1,), "folds": 2, "bootstrap": 100, "metric": "accuracy"}
RANDOM = FINGERPRINT | {"backbone": FINGERPRINT["backbone"] | {"weights": "random"}}
LARGER = FINGERPRINT | {"image": {"size": 448}}


def run(folder, X=SKILLED, manifest=MANIFEST, made=FINGERPRINT, **given):
    """Probe a store of its own into folder/results."""
    number = len(list(folder.glob("*/b.h5")))
    path = make_store(folder / str(number) / "b.h5", X, manifest, fingerprint=made)
    return probe(path, out=folder / "results", settings=ProbeOptions(**(HOW | given)))


@pytest.mark.parametrize(
    "other",
    [
        {"made": RANDOM},
        {"made": LARGER},
        {"manifest": replace(MANIFEST, split=np.roll(MANIFEST.split, 1))},
        {"manifest": replace(MANIFEST, label=1 - MANIFEST.label)},
        {"manifest": replace(MANIFEST, classes=("healthy", "ill"))},
        {"manifest": MANIFEST.head(120), "X": SKILLED[:120]},
        {"C": (10.0,)},
        {"folds": 3},
        {"metric": "auroc"},
        {"seed": 1},
        {"shots": (8,)},
        {"head": "knn", "C": None},
        {"aggregate": "mean"},
    ],
    ids=lambda other: "-".join(other),
)
def test_two_results_that_differ_in_anything_keep_their_files(tmp_path, other):
    first = run(tmp_path)
    before = (tmp_path / "results" / first.predictions).read_bytes()
    second = run(tmp_path, **other)
    assert load(tmp_path / "results") == [first, second]
    assert (tmp_path / "results" / first.predictions).read_bytes() == before
    assert first.predictions != second.predictions and first.heads != second.heads
    names = [
        f"{data} {model}"
        for data, model in zip(
            data_names([first.identity, second.identity]),
            model_names([first.identity, second.identity]),
            strict=True,
        )
    ]
    assert names[0] != names[1] or first.metric != second.metric or first.seed != second.seed


def test_two_sets_of_labels_are_named_by_their_columns_where_these_tell_them_apart(tmp_path):
    one = probe(
        make_store(tmp_path / "a.h5", SKILLED, MANIFEST), out=tmp_path, settings=ProbeOptions(**HOW)
    )
    other = replace(one.identity, labels_digest="9" * 64)
    both = [one.identity, other]
    assert data_names(both, ["grade", "risk"]) == ["made (labels grade)", "made (labels risk)"]
    by_digest = data_names(both)
    assert by_digest[1] == "made (labels 999999)" and by_digest[0] != by_digest[1]
    for columns in (["grade", "grade"], ["grade", ""]):  # relabelled within one, or not known
        assert data_names(both, columns) == by_digest
    assert data_names([one.identity] * 2, ["grade", "risk"]) == ["made", "made"]


@pytest.mark.parametrize(
    "same",
    [
        {"bootstrap": 200},
        {"by": ("subject",)},
        {"control": "shuffle"},
        {"interval": "bca"},
        {"threshold": "f1"},
    ],
    ids=lambda same: "".join(same),
)
def test_a_score_that_is_shown_in_another_way_replaces_the_former(tmp_path, same):
    first, second = run(tmp_path), run(tmp_path, **same)
    assert load(tmp_path / "results") == [second]
    assert len(list((tmp_path / "results").rglob("predictions.csv"))) == 1
    assert second.value == first.value


def test_features_that_are_added_to_a_store_make_no_second_result(tmp_path):
    made = FINGERPRINT | {"features": ["final/mean"]}
    first = run(tmp_path, made=made)
    more = {"final/cls": USELESS, "final/mean": SKILLED}
    second = run(tmp_path, more, made=made | {"features": ["final/cls", "final/mean"]})
    assert first.store_fingerprint != second.store_fingerprint
    assert load(tmp_path / "results") == [second]


def test_trained_and_random_weights_in_one_folder_are_compared_with_each_other(tmp_path):
    run(tmp_path)
    run(tmp_path, USELESS, made=RANDOM)
    for row in load(tmp_path / "results"):
        said = read_predictions(tmp_path / "results" / row.predictions)
        assert row.value == accuracy_score(said.labels, said.probabilities.argmax(1))
    [pair] = compare_results([tmp_path / "results"], n=500).pairs
    assert {pair.a, pair.b} == {"made · published weights", "made · random weights"}
    assert abs(pair.difference.value) > 0.2 and pair.difference.p < 0.05


def test_models_are_told_apart_by_what_differs_between_them(tmp_path):
    run(tmp_path)
    run(tmp_path, made=LARGER)
    run(tmp_path, C=(10.0,))
    found = compare_results([tmp_path / "results"], n=100)
    assert sorted(found.models) == sorted(
        [
            "made · C 0.1, image.size None",
            "made · C 0.1, image.size 448",
            "made · C 10, image.size None",
        ]
    )


def test_every_part_of_a_name_says_what_it_is_of(tmp_path):
    one = replace(run(tmp_path).identity, backbone="dinov2")
    others = [
        replace(one, protocol="dinov2-logreg", scenario="frozen-linear"),
        replace(one, protocol="study", scenario="frozen-linear"),
        replace(one, protocol="study", scenario="unfrozen-linear"),
    ]
    assert model_names(others) == [
        "dinov2 · frozen, linear · protocol dinov2-logreg",
        "dinov2 · frozen, linear · protocol study",
        "dinov2 · unfrozen, linear · protocol study",
    ]
    assert model_names(others[:1]) == ["dinov2"]


def test_results_of_other_splits_and_labels_are_other_data(tmp_path):
    run(tmp_path)
    run(tmp_path, made=RANDOM)
    moved = replace(MANIFEST, split=np.roll(MANIFEST.split, 1))
    run(tmp_path, manifest=moved)
    found = compare_results([tmp_path / "results"], n=100)
    assert len({score.dataset for score in found.scores}) == 2
    assert all(score.dataset.startswith("made (split ") for score in found.scores)
    assert [pair.why_not for pair in found.pairs] == [""]


def test_predictions_of_another_result_are_refused(tmp_path):
    first, second = run(tmp_path), run(tmp_path, USELESS, made=RANDOM)
    folder = tmp_path / "results"
    (folder / first.predictions).write_bytes((folder / second.predictions).read_bytes())
    compared = compare_results([folder], n=100)
    [pair] = compared.pairs
    assert pair.difference is None
    assert [score.model for score in compared.scores] == [pair.a]  # its value stands nowhere
    assert any(note.startswith(f"made: {pair.b} is left out: ") for note in compared.notes)
    assert "is not what its row in results.jsonl says (accuracy" in pair.why_not
    with pytest.warns(UserWarning, match="left out: .* are not what its row in results.jsonl says"):
        done = CliRunner().invoke(cli, ["report", str(folder), "-o", str(tmp_path / "report")])
    assert done.exit_code == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "are not what its row in results.jsonl says" in page
    assert "1 result on 1 data set" in page


def test_the_value_of_an_edited_row_is_reported_nowhere(tmp_path):
    result = run(tmp_path)
    lines = tmp_path / "results" / "results.jsonl"
    row = json.loads(lines.read_text())
    lines.write_text(json.dumps(row | {"value": 0.98765, "ci_high": 0.99}) + "\n")
    done = CliRunner().invoke(cli, ["report", str(lines), "-o", str(tmp_path / "report")])
    assert done.exit_code == 2 and "no result is left to report" in done.stderr
    run(tmp_path, USELESS, made=RANDOM)
    with pytest.warns(UserWarning, match=rf"{result.value:.6g}, in the row 0.98765"):
        CliRunner().invoke(cli, ["report", str(lines), "-o", str(tmp_path / "report")])
    for file in (tmp_path / "report").rglob("*"):
        if file.suffix == ".csv":
            assert "0.98765" not in file.read_text()
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("0.98765") == 1 and ".988" not in page.split("<script")[0]


def test_a_disk_that_fills_leaves_the_former_result_whole(tmp_path, monkeypatch):
    first = run(tmp_path)
    folder = tmp_path / "results"

    def state():
        return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"}

    before = state()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_, **__):
        raise full

    for name in ("write_predictions", "append_line", "sync"):
        with monkeypatch.context() as patch:
            patch.setattr(results, name, fail)
            with pytest.raises(ProbeError, match="can't be written .No space left"):
                run(tmp_path, bootstrap=200)
        assert state() == before
    again = run(tmp_path, bootstrap=200)
    assert load(folder) == [again] and again.value == first.value


def test_half_a_line_of_a_stopped_run_costs_no_other_line(tmp_path):
    first = run(tmp_path)
    file = tmp_path / "results" / "results.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:40])
    with pytest.warns(UserWarning, match="ends in half a line"):
        assert load(tmp_path / "results") == [first]
    with pytest.warns(UserWarning, match="it was removed"):
        second = run(tmp_path, C=(10.0,))
    assert load(tmp_path / "results") == [first, second]
    assert [json.loads(line)["C"] for line in file.read_text().splitlines()] == [0.1, 10.0]


def test_a_line_that_can_t_be_written_whole_is_not_written_at_all(tmp_path):
    """On a real file system of 16 kB, where root may mount one."""
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        from features.files import append_line

        path = disk / "lines"
        with pytest.raises(OSError, match="No space left"):
            for _ in range(100):
                append_line(path, "x" * 999)
        lines = path.read_text().splitlines()
        assert lines and set(lines) == {"x" * 999}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    "hostile", ["../../x", "/abs/x", "..", "", "a/b\\c", "x" * 300, "é\udcff\x00"]
)
def test_no_name_leads_out_of_the_results(tmp_path, hostile):
    made = FINGERPRINT | {"backbone": FINGERPRINT["backbone"] | {"name": hostile}}
    result = run(tmp_path, manifest=replace(MANIFEST, dataset=hostile), made=made)
    for name in (result.predictions, result.heads):
        file = (tmp_path / "results" / name).resolve()
        assert file.is_file()
        assert file.is_relative_to(tmp_path / "results")
        assert len(file.relative_to(tmp_path / "results").parts) == 4


HOSTILE = [
    "=cmd|' /C calc'!A0",
    "+1",
    "-x",
    "@sum",
    "\tx",
    "'quoted",
    "''",
    "plain",
    "=",
    "\uff1d1",
]


def test_no_cell_is_a_formula_and_every_text_is_read_back(tmp_path):
    N = len(HOSTILE)
    said = Predictions(HOSTILE, HOSTILE[::-1], np.arange(N), np.eye(N), HOSTILE)
    write_predictions(tmp_path / "p.csv", said)
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    numbers = [cell for cell in cells if cell.startswith("-")]
    assert all(np.isfinite(float(cell)) or float(cell) == -np.inf for cell in numbers)
    assert not [cell for cell in cells if cell.startswith(tuple("=+@\t\uff1d"))]
    back = read_predictions(tmp_path / "p.csv")
    assert (back.ids, back.subjects, back.classes) == (HOSTILE, HOSTILE[::-1], HOSTILE)
    assert (back.labels == said.labels).all()
