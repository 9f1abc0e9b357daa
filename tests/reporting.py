"""Results, stores and pages for the tests of the report: made here, read by html.parser."""

import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder

import numpy as np
from PIL import Image

from features.manifest import Manifest
from features.store import FeatureStore
from probe.identity import data_of
from probe.results import Predictions, Result, append, write_predictions
from probe.score.metrics import METRICS, evaluate

SVG = "{http://www.w3.org/2000/svg}"
GRADES = ["no DR", "mild", "moderate", "severe", "proliferative"]
HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(2)'>",
    "</style><svg onload=alert(3)>",
    "שלום עולם",
    "\U0001f480 $x_1$ {{ 7 * 7 }}",
    "=HYPERLINK(1)",
    "a|b`c`_d_ & \\e",
    "bell\x07 turn\u202egnp.exe",
    "x" * 200,
]


def add(
    folder,
    *,
    classes=GRADES,
    many=False,
    N=60,
    seed=0,
    missing=False,
    predictions=None,
    **changes,
):
    """Append a result with predictions to `folder`; return (labels, probabilities)."""
    rng = np.random.default_rng(seed)
    K = len(classes)
    if many:
        labels = (rng.random((N, K)) < 0.3).astype(float)
        labels[rng.random((N, K)) < 0.1] = np.nan
        p = np.clip(np.nan_to_num(labels) * 0.2 + rng.random((N, K)) * 0.7, 0, 1)
    else:
        labels = rng.integers(0, K, N)
        p = rng.dirichlet(np.ones(K), N)
    if "labels" in changes:
        labels = changes.pop("labels")(labels)
    p = np.round(p, 6)  # what predictions.csv keeps
    number = len(list(folder.glob("*.csv")))
    ids = [f"{i}.png" for i in range(N)]
    predictions = predictions or Predictions(ids, ids, labels, p, classes)
    N = len(predictions.ids)
    if not missing:
        write_predictions(folder / f"{number}.csv", predictions)
    row = {
        "dataset": "idrid",
        "backbone": "dinov2",
        "weights": "published",
        "scenario": "frozen-linear",
        "head": "linear",
        "feature": "final/cls",
        "protocol": "paper",
        "metric": "quadratic_kappa",
        "value": 0.61234567,
        "ci_low": 0.512,
        "ci_high": 0.701,
        "metrics": {"accuracy": {"value": 0.5, "ci_low": 0.4, "ci_high": None}},
        "C": 0.01,
        "folds": {
            "kind": "5 folds",
            "C": [1e-4, 1e-2, 1.0, 1e2],
            "scores": [[0.1, 0.3], [0.5, 0.7], [None, 0.2], [0.3, 0.35]],
            "converged": [[True, True], [True, True], [False, True], [False, False]],
            "gap": [[0.0, 0.0]] * 4,
        },
        "task": "multilabel" if many else "multiclass",
        "classes": list(classes),
        "n_train": 413,
        "n_test": N,
        "n_bad": 0,
        "n_subjects_test": N,
        "seed": 0,
        "split_digest": "5p117",
        "store": "features/idrid/dinov2.h5",
        "store_fingerprint": "f1n6e7",
        "predictions": f"{number}.csv",
        "heads": "heads.safetensors",
        "converged": True,
        "seconds": 1.5,
        "command": "medprobe probe features/idrid/dinov2.h5",
        "versions": {"numpy": "2.0"},
        "created": "2026-11-24T00:00:00Z",
    }
    row |= changes
    metric = METRICS.get((row["task"], row["metric"]))
    if metric and "value" not in changes:  # as the row of a real result says it
        row["value"] = float(evaluate(metric, predictions.labels, predictions.probabilities)[0])
        row["ci_low"], row["ci_high"] = row["value"] - 0.05, row["value"] + 0.05
        row |= {k: v for k, v in changes.items() if k in row}
    append(folder, Result(**row))
    return labels, p


class Page(HTMLParser):
    """A page as an ElementTree; it fails where an element is closed that isn't open."""

    def __init__(self, path: Path):
        super().__init__()
        self.builder, self.open = TreeBuilder(), []
        self.text = path.read_text(encoding="utf-8")
        self.builder.start("page", {})
        self.feed(self.text)
        self.close()
        assert self.open == []
        self.root: Element = self.builder.end("page")

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names)
        self.builder.start(tag, {name: value or "" for name, value in attrs})
        if tag in ("meta", "link"):
            self.builder.end(tag)
        else:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.builder.end(tag)

    def handle_data(self, data):
        self.builder.data(data)

    @property
    def data(self):
        """Return what the page's script draws."""
        (element,) = [e for e in self.root.iter("script") if e.get("id") == "data"]
        return json.loads(element.text)

    def find(self, tag, name):
        """Return the elements of one tag that have the class `name`."""
        return [e for e in self.root.iter(tag) if name in e.get("class", "").split()]

    def rows(self, name):
        """Return the body of the first table of class `name` as lists of text."""
        body = self.find("table", name)[0].find("tbody")
        return [[said(cell) for cell in row] for row in body]


def said(element):
    return " ".join("".join(element.itertext()).split())


def stored(folder, *, names=None, seed=0, N=48, suffix=".png", pixels=None, **changes):
    """Append a result whose store and images exist; return the manifest."""
    rng = np.random.default_rng(seed)
    classes = names or ["healthy", "ill"]
    y = np.arange(N) % len(classes)
    root = folder / "ward seven"
    root.mkdir(parents=True, exist_ok=True)
    paths, data = [f"scan-{4000 + i}{suffix}" for i in range(N)], []
    for i, path in enumerate(paths):
        if not (root / path).exists():
            picture = rng.integers(0, 120, (40, 56, 3), dtype=np.uint8)
            picture[:, :, y[i] % 3] += 100
            if pixels:
                (root / path).write_bytes(pixels(i))
            else:
                Image.fromarray(picture).save(root / path)
        data.append((root / path).read_bytes())
    manifest = Manifest(
        dataset="ward",
        root=root,
        id=np.array([f"id-{path}" for path in paths]),
        path=np.array(paths),
        subject=np.array([f"MRN-77{i // 2:03}" for i in range(N)]),
        split=np.where(np.arange(N) // 2 % 2, "test", "train"),
        label=y.astype(np.int32),
        classes=tuple(classes),
        split_from="given",
    )
    backbone = changes.get("backbone", "dinov2")
    path = folder / f"{backbone}.h5"
    if not path.exists():
        _fill(path, manifest, rng.normal(size=(N, 8)) + y[:, None], data)
    test = np.flatnonzero(manifest.split == "test")
    p = rng.dirichlet(np.ones(len(classes)), len(test)) * 0.6
    p[np.arange(len(test)), y[test]] += 0.4 * (rng.random(len(test)) < 0.8)
    p /= p.sum(1, keepdims=True)
    said = Predictions(
        manifest.id[test].tolist(), manifest.subject[test].tolist(), y[test], p, classes
    )
    with FeatureStore.open(path) as store:
        known = data_of(store, manifest, "zeros")
        names = ("split_digest", "labels_digest", "extraction")
        facts = {"store_fingerprint": store.fingerprint_digest} | {n: known[n] for n in names}
    facts |= {"dataset": "ward", "store": str(path)}
    facts |= {"feature": "final/mean", "command": f"medprobe probe {path}", "metric": "accuracy"}
    add(folder, classes=classes, predictions=said, **(facts | changes))
    return manifest


def _fill(path, manifest, X, data):
    """Make a store; its last training image is a bad one."""
    dicom = {"dicom": {"window": "header", "frame": "middle"}}
    made = {"name": path.stem, "weights": "published"}
    FeatureStore.create(
        path,
        manifest,
        {"final/mean": (X.shape[1],)},
        fingerprint={"backbone": made, "image": dicom},
        default_feature="final/mean",
        batch_size=len(X),
    )
    source = {
        "hash": [hashlib.sha256(d).hexdigest() for d in data],
        "size": [len(d) for d in data],
        "mtime_ns": [1] * len(data),
    }
    bad = int(np.flatnonzero(manifest.split == "train")[-1])
    with FeatureStore.open(path, write=True) as store:
        rows = np.arange(len(X))
        X = X.astype(np.float32)
        store.commit(rows, {"final/mean": X}, source, {bad: f"can't read {manifest.path[bad]}"})
