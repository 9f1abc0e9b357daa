"""Time `medprobe report` on 8 backbones x 4 data sets of 5,000 test images each, with their stores.

Features are random clusters and there are no image files, so thumbnails are not in the time.
Imports stand where they are used: the report's processes import this file anew.
"""

import argparse
import datetime
import os
import tempfile
import time
from pathlib import Path

import numpy as np

CLASSES = 8


def store(folder, dataset, backbone, test, rng):
    """Write a store of random clusters: as many training images as test images."""
    from features.manifest import Manifest
    from features.store import FeatureStore

    N = 2 * test
    y = rng.integers(0, CLASSES, N).astype(np.int32)
    ids = np.array([f"{i:06d}.png" for i in range(N)])
    X = rng.standard_normal((CLASSES, 64))[y] + rng.uniform(2, 4) * rng.standard_normal((N, 64))
    manifest = Manifest(
        dataset=dataset,
        root=Path("/nowhere"),
        id=ids,
        path=ids,
        subject=np.array([f"s{i // 2}" for i in range(N)]),
        split=np.where(np.arange(N) < test, "test", "train"),
        label=y,
        classes=tuple(f"class {k}" for k in range(CLASSES)),
        split_from="given",
        columns={"sex": np.where(rng.random(N) < 0.5, "F", "M")},
    )
    about = {"name": backbone, "architecture": "x", "weights": "file", "weights_digest": "0"}
    path = folder / dataset / f"{backbone}.h5"
    FeatureStore.create(
        path,
        manifest,
        {"final/cls": (64,)},
        fingerprint={"backbone": about, "manifest": {"images": N}},
        default_feature="final/cls",
        batch_size=N,
    )
    with FeatureStore.open(path, write=True) as opened:
        source = {"hash": [f"{i:064x}" for i in range(N)], "size": [1] * N, "mtime_ns": [1] * N}
        opened.commit(np.arange(N), {"final/cls": X.astype(np.float32)}, source, {})
    return path


def main():
    """Print what the report took."""
    from probe.report import write_report
    from probe.sweep import ProbeOptions, probe

    parser = argparse.ArgumentParser()
    parser.add_argument("--test", type=int, default=5000)
    parser.add_argument("--backbones", type=int, default=8)
    parser.add_argument("--datasets", type=int, default=4)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        for d in range(given.datasets):
            for b in range(given.backbones):
                path = store(folder / "features", f"set{d}", f"backbone{b}", given.test, rng)
                settings = ProbeOptions(C=(0.1,), by=("sex",), bootstrap=200)
                probe(path, out=folder / "results", settings=settings)
        start = time.perf_counter()
        index = write_report([folder / "results"], folder / "report")
        took = time.perf_counter() - start
        print(f"{datetime.date.today()}, {os.cpu_count()} cores")
        print(f"{given.backbones * given.datasets} cells x {given.test} test images: {took:.1f} s,")
        print(f"index.html {index.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
