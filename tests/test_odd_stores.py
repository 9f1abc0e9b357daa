"""Stores that someone else made, or that were edited: one line of an error, and never more."""

import json
import random
import warnings

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import FINGERPRINT, make_manifest, make_store

from cli import cli
from features.errors import StoreError
from features.store import FeatureStore

N = 40
Y = np.arange(N) % 2
X = np.random.default_rng(0).standard_normal((N, 4)).astype(np.float32)


def call(*words):
    """Run a command; what it says must never be a traceback, nor more than a few lines."""
    found = CliRunner().invoke(cli, [str(word) for word in words])
    said = f"{found.output}\n{found.exception!r}"
    assert found.exit_code in (0, 1, 2), said
    assert "fault of the program" not in said, said
    assert found.exception is None or isinstance(found.exception, SystemExit), said
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "s.h5"
    return make_store(path, X, make_manifest(Y), bad={4: "file is empty"}).read_bytes()


def put(file, name, value=None, **how):
    """Replace a dataset, or an attribute (`manifest@classes`)."""
    place, _, attribute = name.partition("@")
    if attribute:
        item = file[place or "/"]
        del item.attrs[attribute]
        if value is not None:
            item.attrs[attribute] = value
        return
    if name in file:
        del file[name]
    if how.get("shape") or isinstance(value, np.ndarray):
        file.create_dataset(name, data=value, **how)
    elif value is not None:
        file[name] = value


TEXTS = h5py.string_dtype()
EDITS = {
    "no fingerprint": (lambda f: put(f, "@fingerprint"), "it has no fingerprint"),
    "a fingerprint of a list": (lambda f: put(f, "@fingerprint", "[1]"), "want an object"),
    "a fingerprint that is no JSON": (lambda f: put(f, "@fingerprint", "{"), "not a whole store"),
    "a deep fingerprint": (lambda f: put(f, "@fingerprint", "[" * 60000), "nested deeper"),
    "a backbone of a number": (
        lambda f: put(f, "@fingerprint", '{"backbone": 5}'),
        "fingerprint.backbone is 5, want an object",
    ),
    "weights of nobody": (
        lambda f: put(f, "@fingerprint", '{"backbone": {"name": "a", "weights": "mine"}}'),
        "fingerprint.backbone.weights is 'mine', want 'published' or 'file' or 'random'",
    ),
    "a batch of -1": (lambda f: put(f, "@batch_size", -1), "batch_size is -1, want at least 1"),
    "a default of nothing": (lambda f: put(f, "@default_feature", "a/b"), "want one of final/mean"),
    "classes of a number": (lambda f: put(f, "manifest@classes", 5), "want text"),
    "classes that are no texts": (lambda f: put(f, "manifest@classes", "[1, 2]"), "classes[0]"),
    "two classes of one name": (lambda f: put(f, "manifest@classes", '["a", "a"]'), "that differ"),
    "classes of an array": (lambda f: put(f, "manifest@classes", np.arange(3)), "want text"),
    "a task of its own": (lambda f: put(f, "manifest@task", "other"), "task is 'other'"),
    "no root": (lambda f: put(f, "manifest@root"), "it has no root"),
    "no dataset": (lambda f: put(f, "manifest@dataset"), "it has no dataset"),
    "an external link": (
        lambda f: put(f, "manifest/path", h5py.ExternalLink("other.h5", "/manifest/path")),
        "/manifest/path of its own",
    ),
    "a manifest elsewhere": (
        lambda f: put(f, "manifest", h5py.ExternalLink("other.h5", "/manifest")),
        "no /manifest of its own",
    ),
    "external storage": (
        lambda f: put(
            f, "manifest/path", shape=(N,), dtype="S9", external=[("/etc/passwd", 0, N * 9)]
        ),
        "not contiguous",
    ),
    "strings of any length": (
        lambda f: put(f, "manifest/subject", np.array(["x"] * N, dtype=object), dtype=TEXTS),
        "/manifest/subject is object",
    ),
    "features of texts": (
        lambda f: put(f, "features/final/mean", np.array(["x"] * N, dtype=object), dtype=TEXTS),
        "/features/final/mean is object",
    ),
    "features of integers": (
        lambda f: put(f, "features/final/mean", np.ones((N, 4), "<i4")),
        "/features/final/mean is int32",
    ),
    "marks of floats": (lambda f: put(f, "done", np.ones(N)), "/done is float64"),
    "no marks": (lambda f: put(f, "done"), "it has no /done"),
    "few labels": (lambda f: put(f, "manifest/label", np.zeros(9, "<i4")), "of shape (9,)"),
    "labels out of range": (
        lambda f: put(f, "manifest/label", np.full(N, 77, "<i4")),
        "label 77 is none of -1 to 1",
    ),
    "labels of a matrix": (
        lambda f: put(f, "manifest/label", np.zeros((N, 2), "<i4")),
        "for a multiclass task",
    ),
    "splits of another kind": (
        lambda f: put(f, "manifest/split", np.array([b"mine"] * N)),
        "split 'mine' is none of",
    ),
    "reasons of two parts": (
        lambda f: put(f, "reason", np.zeros(N, dtype=[("a", "<i4"), ("b", "<f8")])),
        "/reason is",
    ),
    "features without checksums": (
        lambda f: put(f, "checksums/features/final/mean"),
        "it has no /checksums/features/final/mean",
    ),
    "chunks": (
        lambda f: put(f, "features/final/mean", X, chunks=(4, 4)),
        "/features/final/mean is not contiguous",
    ),
}


def edited(path, data, edit):
    """Write a store with an edit; its manifest keeps a checksum that fits."""
    path.write_bytes(data)
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        edit(file)
    from features import layout
    from features.columns import Column

    try:
        places = layout.read(path).extents
        with path.open("rb") as opened:
            columns = {n: Column(opened.fileno(), *place) for n, place in places.items()}
            found = layout.manifest_checksum(columns)
    except (StoreError, LookupError, TypeError, ValueError):
        return path
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        if "manifest" in file and "checksum" in file["manifest"].attrs:
            file["manifest"].attrs["checksum"] = found
    return path


def fault(path):
    with pytest.raises(StoreError) as error, FeatureStore.open(path) as store:
        store.manifest()
    return str(error.value)


@pytest.mark.parametrize("name", EDITS)
def test_an_odd_store_is_refused_in_one_line_that_names_what_is_odd(tmp_path, whole, name):
    edit, words = EDITS[name]
    path = edited(tmp_path / "s.h5", whole, edit)
    said = fault(path)
    assert words in said
    assert str(path) in said
    assert "\n" not in said
    for command in ("inspect", "verify", "probe"):
        assert call(
            command, path, *(["-o", tmp_path / "out"] if command == "probe" else [])
        ).exit_code in (1, 2)
    assert not list(tmp_path.glob("out/**/*.csv"))


def test_a_soft_link_to_nowhere_and_a_loop_are_no_features(tmp_path, whole):
    def links(file):
        file["features/a"] = h5py.SoftLink("/features/b")
        file["features/b"] = h5py.SoftLink("/features/a")
        file["features/self"] = file["/features"]
        file["features/far"] = h5py.ExternalLink("/etc/passwd", "/x")

    with FeatureStore.open(edited(tmp_path / "s.h5", whole, links)) as store:
        assert list(store.features) == ["final/mean"]


@pytest.mark.parametrize("name", ["../../x", "/abs/x", "..", "a\\b", "\x1b]0;t\x07\x1b[2J", "=1+1"])
def test_hostile_names_in_a_store_write_nothing_elsewhere_and_reach_no_terminal(tmp_path, name):
    made = FINGERPRINT | {"backbone": FINGERPRINT["backbone"] | {"name": name}}
    ids = [f"{name} {i}" for i in range(N)]
    manifest = make_manifest(Y, classes=[name, f"{name} 2"], dataset=name, ids=ids)
    room = tmp_path / "a" / "b" / "c"
    room.mkdir(parents=True)
    path = make_store(room / "s.h5", X, manifest, bad={4: name}, fingerprint=made)
    before = {p for p in tmp_path.rglob("*") if room not in p.parents}
    said = [
        call("inspect", path), call("verify", path), call("audit", path),
        call("probe", path, "-o", room / "out", "--C", "1", "--folds", "2"),
        call("report", room / "out", "-o", room / "report"),
    ]  # fmt: skip
    [row] = [json.loads(r) for r in (room / "out" / "results.jsonl").read_text().splitlines()]
    said.append(call("predict", room / "out" / row["heads"], path, "-o", room / "said.csv"))
    assert not any(c in one.output for one in said for c in "\x1b\x07")
    assert {p for p in tmp_path.rglob("*") if room not in p.parents} == before
    assert {p.name for p in room.iterdir()} == {"s.h5", "out", "report", "said.csv"}
    verified = said[1]
    if set(name) & set("/\\") or name == "..":
        assert verified.exit_code == 1
        assert "which is a path" in verified.output
    else:
        assert verified.exit_code == 0


# --- fuzz -----------------------------------------------------------------------------------------


def mutated(path, whole, draw):
    """Change a store: some bytes, or by HDF5's own library an attribute or a dataset."""
    path.write_bytes(whole)
    if draw.random() < 0.3:
        data = bytearray(whole)
        for _ in range(draw.choice([1, 5, 50])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data[: len(data) if draw.random() < 0.8 else draw.randrange(len(data))])
        return

    def edit(file):
        names = []
        file.visit(names.append)
        for _ in range(draw.choice([1, 1, 2, 4])):
            name = draw.choice([n for n in names if n in file])
            if draw.random() < 0.5:
                item = file[draw.choice(["/", "manifest"])] if "manifest" in file else file
                key = draw.choice(list(item.attrs) or ["x"])
                value = draw.choice(
                    [
                        None, 0, -1, 1 << 62, 0.5, np.nan, "", "x", "[]", "{}", "[[[]]]",
                        "../../x", '{"backbone": {"name": "x"}}', "NaN", b"\xff\xfe", True,
                        np.arange(3), np.zeros((2, 2)), "x" * 5000, "[" * 9000, '["a", "a"]',
                        json.dumps(FINGERPRINT | {"image": draw.choice([{}, [], None, "x"])}),
                    ]
                )  # fmt: skip
                item.attrs.pop(key, None)
                if value is not None:
                    item.attrs[key] = value
            elif isinstance(file[name], h5py.Dataset):
                n = draw.choice([N, N, 0, 1, 7])
                kind = draw.choice(["<f4", ">f4", "<i4", "u1", "<u4", "S8", "<f8", "<i8", TEXTS])
                shape = draw.choice([(n,), (n, 3), (n, 2, 2), ()])
                values = None if kind == TEXTS else np.full(shape, draw.choice([0, 1, 255]), kind)
                del file[name]
                if draw.random() < 0.8:
                    file.create_dataset(name, shape, kind, data=values)
            else:
                del file[name]

    edited(path, whole, edit)


def fuzz(tmp_path, whole, seeds):
    warnings.simplefilter("ignore")  # few images, a class of which is gone
    done = tmp_path / "done"
    path = tmp_path / "s.h5"
    path.write_bytes(whole)
    assert call("probe", path, "-o", done, "--C", "1", "--folds", "2").exit_code == 0
    head = next(done.glob("**/heads.json"))
    refused = 0
    for seed in seeds:
        draw = random.Random(seed)
        mutated(path, whole, draw)
        codes = [call(command, path).exit_code for command in ("inspect", "verify")]
        codes.append(call("predict", head, path).exit_code)
        codes.append(
            call(
                "probe", path, "-o", tmp_path / "out", "--C", "1", "--folds", "2",
                "--bootstrap", "100",
            ).exit_code
        )  # fmt: skip
        refused += any(codes)
    assert refused > 0.6 * len(seeds)


def test_thirty_mutated_stores_give_no_fault_of_the_program(tmp_path, whole):
    fuzz(tmp_path, whole, range(30))


@pytest.mark.slow
def test_three_hundred_mutated_stores_give_no_fault_of_the_program(tmp_path, whole):
    fuzz(tmp_path, whole, range(30, 330))
