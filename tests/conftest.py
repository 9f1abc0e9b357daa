import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from features.manifest import Manifest
from features.store import FeatureStore

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("MEDPROBE_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Keep the tests out of the user's cache."""
    os.environ["MEDPROBE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real medical images."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"real medical images are not at {SHARED / 'data'}; set MEDPROBE_SHARED")
    return SHARED / "data"


@pytest.fixture(scope="session")
def backbone():
    """The embedded backbone with its published weights."""
    from features.backbones import load_backbone

    return load_backbone("efficientnet_lite0")


@pytest.fixture
def image_folder(tmp_path):
    """40 images in two classes under tmp_path/images, of odd sizes and in four formats."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    for i in range(40):
        name = ("cat", "dog")[i % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        shape = (int(rng.integers(30, 300)), int(rng.integers(30, 300)), 3)
        pixels = rng.integers(0, 128, shape, dtype=np.uint8) + np.uint8(100 * (i % 2))
        suffix = ("png", "jpg", "bmp", "webp")[i % 4]
        Image.fromarray(pixels).save(folder / name / f"{i:02d}.{suffix}")
    return folder


@pytest.fixture
def one_thread():
    """The last bits of a pass depend on how many threads it has."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def images(image_folder):
    """40 images: three copies of the first, in its batch, another batch and the last; one bad."""
    from features.datasets import open_dataset

    for name in ("cat/04.png", "dog/21.jpg", "dog/39.webp"):
        (image_folder / name).unlink()
        shutil.copy(image_folder / "cat" / "00.png", image_folder / name)
    (image_folder / "dog" / "27.webp").write_bytes(b"not an image")
    return open_dataset(f"folder:{image_folder}")


def make_manifest(y, *, split=None, subject=None, classes=None, dataset="made", ids=None):
    """A manifest of images that need not exist."""
    n = len(y)
    y = np.asarray(y, dtype=np.int32)
    ids = np.array([f"{i:05d}.png" for i in range(n)] if ids is None else ids)
    K = y.shape[1] if y.ndim == 2 else int(y.max()) + 1
    return Manifest(
        dataset=dataset,
        root=Path("/nowhere"),
        id=ids,
        path=ids,
        subject=ids if subject is None else np.asarray(subject),
        split=np.where(np.arange(n) % 4 == 0, "test", "train")
        if split is None
        else np.asarray(split),
        label=y,
        classes=tuple(classes or (f"class {k}" for k in range(K))),
        split_from="given",
    )


def children(pid):
    """Return the processes that a process has started and that still run."""
    found = [p.read_text().split() for p in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for some in found for child in some]


FINGERPRINT = {
    "backbone": {
        "name": "made",
        "architecture": "made",
        "weights": "published",
        "weights_digest": "0",
    },
    "manifest": {"images": 0},
}


def make_store(path, X, manifest, *, bad=None, batch=64, fingerprint=FINGERPRINT):
    """A complete store of given features, one or several by name; bad maps row to reason."""
    named = X if isinstance(X, dict) else {"final/mean": X}
    named = {name: np.asarray(x, dtype=np.float32) for name, x in named.items()}
    FeatureStore.create(
        path,
        manifest,
        {name: x.shape[1:] for name, x in named.items()},
        fingerprint=fingerprint,
        default_feature=list(named)[-1],
        batch_size=batch,
    )
    bad = bad or {}
    with FeatureStore.open(path, write=True) as store:
        for start in range(0, len(manifest), batch):
            rows = np.arange(start, min(start + batch, len(manifest)))
            source = {
                "hash": [f"{i:064x}" for i in rows],
                "size": [1] * len(rows),
                "mtime_ns": [1] * len(rows),
            }
            reasons = {int(i): bad[i] for i in rows if i in bad}
            store.commit(rows, {name: x[rows] for name, x in named.items()}, source, reasons)
    return path
