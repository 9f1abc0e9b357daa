"""Files of a results folder that were edited, cut or made by others: one line, and never more."""

import copy
import csv
import json
import os
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_manifest, make_store
from reporting import add
from safetensors.torch import load_file, save_file
from test_odd_stores import call

from features.errors import MedprobeError, ProbeError
from features.store import FeatureStore
from probe import grid
from probe.heads import Head
from probe.predict import predict
from probe.results import load, read_predictions
from probe.sweep import ProbeOptions, probe_all
from probe.train import checkpoints, finetune
from probe.train.training import Training

N = 80
Y = np.arange(N) % 2
X = (np.random.default_rng(0).standard_normal((N, 4)) + Y[:, None]).astype(np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store, results of a sweep at two strengths and of a training run."""
    folder = tmp_path_factory.mktemp("made")
    path = make_store(folder / "s.h5", X, make_manifest(Y))
    for C in ((0.1, 1.0), (10.0,)):
        probe_all(path, out=folder / "results", settings=ProbeOptions(C=C, folds=2, bootstrap=100))
    training = Training(epochs=1, batch_size=32)
    settings = finetune.TrainSettings(init="random", bootstrap=100, training=training)
    finetune.train_on_store(path, out=folder / "trained", settings=settings)
    return folder


@pytest.fixture
def room(made, tmp_path):
    """A copy of it; `results` is the sweep's folder."""
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


def first(folder, name):
    return next(iter(sorted(folder.glob(f"**/{name}"))))


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def changed(**fields):
    return lambda row: json.dumps(row | fields)


def bare(name):
    """A field's value without quotes, as JSON of other programs has it."""
    return lambda text: lambda row: json.dumps(row | {name: "@"}).replace('"@"', text)


ODD = {
    "deep": (lambda row: "[" * 200_000 + "]" * 200_000, "nested deeper than 32"),
    "deep objects": (lambda row: '{"a":' * 50_000 + "1" + "}" * 50_000, "nested deeper than 32"),
    "a deep field": (changed(settings=json.loads('{"a":' * 40 + "1" + "}" * 40)), "nested deeper"),
    "a list": (lambda row: "[1, 2]", "want an object"),
    "no JSON": (lambda row: "nonsense", "is not a result"),
    "too long a number": (bare("value")("9" * 5000), "is not a result"),
    "infinite": (bare("value")("1e999"), "value is inf, want a number"),
    "no number": (bare("value")("NaN"), "NaN is no number of JSON"),
    "a text for a number": (changed(value="x"), "value is 'x', want a number"),
    "null for a number": (changed(value=None), "value is None, want a number"),
    "true for a count": (changed(n_test=True), "n_test is True, want a whole number"),
    "a list for a text": (changed(dataset=["a"]), "dataset is a list, want text"),
    "half a character": (changed(dataset="\ud800"), "want text of whole characters"),
    "a number for classes": (changed(classes=5), "classes is 5, want a list"),
    "no classes": (changed(classes=[]), "want something in it"),
    "no metrics": (changed(metrics=None), "metrics is None, want an object"),
    "metrics of texts": (changed(metrics={"auroc": "x"}), "metrics.auroc is 'x', want an object"),
    "odd folds": (changed(folds={"C": [1], "scores": "no"}), "folds.scores is 'no', want a list"),
    "few scores": (changed(folds={"C": [1, 2], "scores": [[0.5]]}), "folds.C is a list, want 1 of"),
    "ragged scores": (changed(folds={"C": [1, 2], "scores": [[0.5], [0.5, 0.6]]}), "several len"),
    "a strength of 0": (changed(folds={"C": [0], "scores": [[1]]}), "want more than 0"),
    "a history of texts": (changed(history=[{"epoch": "x"}]), "has no value"),
    "a date of a number": (changed(created=5), "created is 5, want text"),
    "an unknown field": (changed(foo=1), "has 'foo', which nothing reads"),
    "predictions elsewhere": (changed(predictions="/etc/passwd"), "a path within the folder"),
    "predictions above": (changed(predictions="../../x.csv"), "a path within the folder"),
    "a zero byte": (changed(store="a\0b"), "want a path"),
    "too long a path": (changed(store="x" * 5000), "want a path"),
    "weights of nobody": (changed(weights="mine"), "weights is 'mine', want 'published' or"),
    "a task of its own": (changed(task="x"), "task is 'x', want 'multiclass' or"),
    "a layer of its own": (changed(feature="x"), "feature is 'x', want LAYER/POOL"),
    "bins of nothing": (
        changed(reliability=[{"low": 0, "high": 1, "images": 0, "confidence": 0, "frequency": 0}]),
        "reliability[0].images is 0, want 1 to",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_an_odd_line_of_results_is_named_with_what_is_odd(room, name):
    edit, words = ODD[name]
    file = room / "results" / "results.jsonl"
    rows = rows_of(file)
    file.write_text(json.dumps(rows[0]) + "\n" + edit(rows[1]) + "\n")
    with pytest.raises(ProbeError) as error:
        load(room / "results")
    said = str(error.value)
    assert words in said
    assert f"{file}, line 2 is not a result" in said
    assert "remove that line" in said
    assert "\n" not in said
    assert len(said) < 500


def test_what_earlier_versions_left_out_has_its_default(room):
    file = room / "results" / "results.jsonl"
    later = ("labels_digest", "settings", "extraction", "outputs", "few", "interval", "history")
    row = {k: v for k, v in rows_of(file)[0].items() if k not in later}
    row["metrics"] = {"auroc": {"value": 1, "ci_low": None, "ci_high": None}}
    file.write_text(json.dumps(row) + "\n")
    assert load(room / "results")[0].settings == {}


def test_predictions_that_are_a_pipe_do_not_stop_a_report_for_ever(room):
    file = first(room / "results", "predictions.csv")
    file.unlink()
    os.mkfifo(file)
    said = call("compare", room / "results")
    assert said.exit_code == 0
    assert "holds no predictions (a device, pipe or socket, not a file" in said.output
    head = first(room / "results", "heads.json")
    head.unlink()
    os.mkfifo(head)
    assert "a device, pipe or socket, not a file" in call("predict", head, room / "s.h5").output


HEADS = {
    "no format": (lambda a: a.pop("format"), "it has no format"),
    "a format of its own": (lambda a: a.update(format="x"), "format is 'x'"),
    "no classes": (lambda a: a.update(classes=[]), "want something in it"),
    "one class twice": (lambda a: a.update(classes=["a", "a"]), "want names that differ"),
    "three classes": (lambda a: a.update(classes=["a", "b", "c"]), "3 classes, want 2"),
    "one class": (lambda a: a.update(classes=["a"]), "1 classes, want 2"),
    "another kind": (lambda a: a.update(kind="softmax"), "of shapes ((1, 4), (1,))"),
    "a kind of its own": (lambda a: a.update(kind="x"), "kind is 'x'"),
    "no feature": (lambda a: a.pop("feature"), "it has no feature"),
    "a feature of a number": (lambda a: a.update(feature=3), "feature is 3"),
    "a backbone of a list": (lambda a: a.update(backbone=[]), "backbone is a list"),
    "C of a text": (lambda a: a.update(C="x"), "C is 'x'"),
    "a task of its own": (lambda a: a.update(task="x"), "task is 'x'"),
}


@pytest.mark.parametrize("name", HEADS)
def test_an_odd_head_is_refused_with_what_is_odd(room, name):
    edit, words = HEADS[name]
    file = first(room / "results", "heads.json")
    about = json.loads(file.read_text())
    edit(about)
    file.write_text(json.dumps(about))
    said = call("predict", file, room / "s.h5")
    assert said.exit_code == 2
    assert words in said.output
    assert "is not a saved head" in said.output


def test_tensors_that_are_cut_or_of_another_shape_are_refused(room):
    head = first(room / "results", "heads.json")
    tensors = head.with_suffix(".safetensors")
    whole = tensors.read_bytes()
    for data in (whole[:-3], whole[:20], b"", b"\xff" * 100):
        tensors.write_bytes(data)
        with pytest.raises(ProbeError, match="is not a saved head"):
            Head.load(head)
    for coef in (torch.zeros(3, 4), torch.zeros(4), torch.full((1, 4), torch.nan)):
        save_file({"coef": coef, "intercept": torch.zeros(1)}, tensors)
        with pytest.raises(ProbeError, match="is not a saved head"):
            Head.load(head)
    save_file({"coef": torch.zeros(1, 9), "intercept": torch.zeros(1)}, tensors)
    with pytest.raises(ProbeError, match="takes 9 numbers of final/mean"):
        predict(head, room / "s.h5")
    run = first(room / "trained", "run.json")
    best = run.parent / "checkpoints" / "best.safetensors"
    whole = best.read_bytes()
    best.write_bytes(whole[: len(whole) // 2])
    assert "best.safetensors can't be read" in call("predict", run, room / "s.h5").output
    best.write_bytes(whole)
    save_file({k: v[:1] for k, v in load_file(best).items()}, best)
    assert "doesn't fit its checkpoint" in call("predict", run, room / "s.h5").output


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda state: "{", "JSONDecodeError"),
        (lambda state: "[" * 90_000, "nested deeper"),
        (lambda state: json.dumps(state | {"epoch": "x"}), "epoch is 'x'"),
        (lambda state: json.dumps(state | {"epoch": 9}), "not that of its epochs"),
        (lambda state: json.dumps(state | {"history": None}), "history is None"),
    ],
)
def test_an_odd_checkpoint_is_refused_with_what_is_odd(room, edit, words):
    folder = first(room / "trained", "state.json").parent
    file = folder / "state.json"
    file.write_text(edit(json.loads(file.read_text())))
    with pytest.raises(ProbeError, match="can't be read") as error:
        checkpoints.load(folder)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[" * 90_000, "nested deeper"),
        ("[]", "want an object"),
        ('{"status": "done"}', "it has no fingerprint"),
        ('{"fingerprint": "a", "status": "done", "results": [[]]}', "results[0] is a list"),
    ],
)
def test_an_odd_line_of_the_log_of_cells_is_named(tmp_path, line, words):
    (tmp_path / grid.LOG).write_text(line + "\n")
    with pytest.raises(ProbeError, match="line 1 is not a cell") as error:
        grid.read_log(tmp_path)
    assert words in str(error.value)


# --- fuzz -----------------------------------------------------------------------------------------

VALUES = [
    None, True, 0, -1, 2, 1 << 70, 0.5, 1e308, -1e308, "", "x", "../..", "\0", "\ud800", "=1+1",
    "\x1b[2J", "a/b", "x" * 3000, [], [1], [[1], [2, 3]], [None], {}, {"a": 1}, {"": {"": []}},
    [{"epoch": 0, "value": None}], [{"epoch": 0, "value": 1e8}, {"epoch": 5, "value": -1}],
    {"C": [1], "scores": [[None]]}, {"C": [1e-300, 1e29], "scores": [[1], [0]]},
    {"auroc": {"value": 1e8, "ci_low": None, "ci_high": -1}},
]  # fmt: skip


def places(value, at=()):
    """Every place within a JSON value."""
    inner = dict(enumerate(value)) if isinstance(value, list) else value
    for key, item in inner.items() if isinstance(inner, dict) else ():
        yield (*at, key)
        yield from places(item, (*at, key))


def mutated(text, draw):
    """Change a JSON text: some characters, or some values in it."""
    if draw.random() < 0.25:
        data = list(text)
        for _ in range(draw.choice([1, 3, 30])):
            data[draw.randrange(len(data))] = draw.choice('{}[]",:0-9eE\\\x00é')
        return "".join(data[: len(data) if draw.random() < 0.7 else draw.randrange(len(data))])
    value = copy.deepcopy(json.loads(text))
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.choice(list(places(value)) or [()])
        if not at:
            break
        item = value
        for key in at[:-1]:
            item = item[key]
        if draw.random() < 0.2:
            del item[at[-1]]
        else:
            item[at[-1]] = copy.deepcopy(draw.choice(VALUES))
    return json.dumps(value)


def fuzz_results(room, seeds, *, every):
    """Compare each; report one of `every` that can be read, for it takes seconds."""
    warnings.simplefilter("ignore")
    file = room / "results" / "results.jsonl"
    whole = file.read_text().splitlines()
    read = 0
    for seed in seeds:
        draw = random.Random(seed)
        k = draw.randrange(len(whole))
        lines = [mutated(line, draw) if i == k else line for i, line in enumerate(whole)]
        file.write_text("\n".join(lines).replace("\0", " ") + "\n", errors="replace")
        call("compare", room / "results")
        try:
            load(room / "results")
        except MedprobeError:
            assert call("report", room / "results", "-o", room / "report").exit_code == 2
            continue
        read += 1
        if read % every == 0:
            call("report", room / "results", "-o", room / "report")
    assert read


def fuzz_heads(room, name, seeds):
    warnings.simplefilter("ignore")
    file = first(room, name)
    whole = file.read_text()
    for seed in seeds:
        file.write_text(mutated(whole, random.Random(seed)), errors="replace")
        said = call("predict", file, room / "s.h5")
        if said.exit_code == 0:
            rows = list(csv.reader(said.stdout.splitlines()))
            assert len(rows) >= N


def test_mutated_results_give_no_fault_of_the_program(room):
    fuzz_results(room, range(25), every=5)


@pytest.mark.parametrize("name", ["heads.json", "run.json"])
def test_mutated_heads_give_no_fault_of_the_program(room, name):
    fuzz_heads(room, name, range(60))


@pytest.mark.slow
def test_three_hundred_mutated_results_give_no_fault_of_the_program(room):
    fuzz_results(room, range(100, 400), every=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heads.json", "run.json"])
def test_three_hundred_mutated_heads_give_no_fault_of_the_program(room, name):
    fuzz_heads(room, name, range(100, 400))


@pytest.mark.slow
def test_results_of_a_store_that_is_gone_odd_are_reported_without_it(room):
    """The report takes from the store what it can, and nothing from another."""
    with (room / "s.h5").open("r+b") as file:
        file.seek(3000)
        file.write(b"\xff" * 64)
    with pytest.raises(MedprobeError), FeatureStore.open(room / "s.h5") as store:
        list(store.verify())
    assert call("report", room / "results", "-o", room / "report").exit_code == 0
    assert Path(room / "report" / "index.html").is_file()


def test_predictions_that_are_another_file_are_said_in_words(tmp_path):
    add(tmp_path)
    path = tmp_path / "results.jsonl"
    row = json.loads(path.read_text())
    other = tmp_path / "0.csv"
    for name, text, words in (
        ("results.jsonl", None, "results.jsonl holds no predictions (no column p:<class>)"),
        ("a.csv", "id,subject,label,predicted,p:x\n", "(no rows)"),
        ("b.csv", other.read_text().replace(",mild,", ",odd,"), "('odd' is no class of its"),
    ):
        if text:
            (tmp_path / name).write_text(text)
        else:
            path.write_text("x,y\n1,2\n")  # nothing of it is a prediction
        with pytest.raises(ProbeError) as error:
            read_predictions(tmp_path / name)
        assert words in str(error.value)
    path.write_text(json.dumps(row | {"seed": 10**30}) + "\n")
    with pytest.raises(
        ProbeError, match=r"seed is 10{30}, want a whole number below 2\^63; remove"
    ):
        load(tmp_path)
