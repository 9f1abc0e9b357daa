"""`sample`: scikit-learn's handwritten digits as image files, to try the program on.

Not medical.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from features.datasets import from_folder
from features.datasets.options import Options
from features.manifest import Manifest

NOTE = (
    "not medical: 1,797 handwritten digits of 8x8 pixels from scikit-learn (Alpaydin & Kaynak 1998)"
)

MARGIN = 1  # pixels of background: the 8x8 digit fills its frame, and a centre crop would cut it


def cache_folder() -> Path:
    """Return where what is made once is kept: $MEDPROBE_CACHE, or medprobe in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MEDPROBE_CACHE") or Path(base, "medprobe"))


def read(_: Path, options: Options) -> Manifest:
    """Return the manifest, after writing the images into the cache the first time."""
    folder = cache_folder() / "sample-digits"
    if not folder.is_dir():
        _write(folder)
    return from_folder.read(folder, options, dataset="sample", note=NOTE)


def _write(folder: Path) -> None:
    """Write class/number.png for every digit, all or nothing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent))
    for number, (pixels, name) in enumerate(zip(digits.images, digits.target, strict=True)):
        (draft / str(name)).mkdir(exist_ok=True)
        grey = np.rint(np.pad(pixels, MARGIN) * (255 / 16)).astype(np.uint8)
        Image.fromarray(grey).save(draft / str(name) / f"{number:04d}.png")
    draft.chmod(0o755)
    try:
        draft.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(draft)
