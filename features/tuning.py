"""The batch size by measurement, kept per machine so that the same command gives the same bytes.

A float's last bits depend on the batch size. So what was measured once for a backbone on a machine
is kept in the cache folder, and a store remembers the size it was begun with.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from features.backbones import Backbone
from features.datasets.sample import cache_folder
from features.manifest import digest

SIZES = {"cpu": (8, 16, 32, 64), "cuda": (64, 128, 256, 512)}
DEFAULT = {"cpu": 16, "cuda": 256}
WORTHWHILE = 4000  # images: for fewer, measuring takes longer than a better size saves
SECONDS = 6.0  # after so long no larger size is tried
CLOSE = 0.97  # of the best speed is good enough for a smaller size: less memory, finer commits


def batch_size(backbone: Backbone, device: str, dtype: torch.dtype, images: int) -> int:
    """Return images per batch; the backbone is on its device, in its dtype."""
    device_type = device.partition(":")[0]
    if images < WORTHWHILE:
        return DEFAULT[device_type]
    key = digest(
        [
            platform.node(),
            torch.cuda.get_device_name() if device_type == "cuda" else os.cpu_count(),
            torch.__version__,
            backbone.spec.name,
            backbone.transform.size,
            str(dtype),
        ]
    )
    file = cache_folder() / "batch-sizes.json"
    known = _read(file)
    if key not in known:
        known[key] = _measured(backbone, device, dtype, SIZES[device_type])
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(known))
        draft.replace(file)
    return int(known[key])


def _read(file: Path) -> dict[str, Any]:
    try:
        sizes = json.loads(file.read_text())
    except (OSError, ValueError):  # none yet, or not ours: measured again
        return {}
    return sizes if isinstance(sizes, dict) else {}


def _measured(backbone: Backbone, device: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> int:
    start = time.perf_counter()
    speeds: dict[int, float] = {}  # images per second
    for size in sizes:
        if speeds and time.perf_counter() - start > SECONDS:
            break
        try:
            speeds[size] = 1 / seconds_per_image(backbone, device, dtype, size)
        except torch.OutOfMemoryError:
            break
    best = max(speeds.values(), default=0)
    return next((s for s, v in speeds.items() if v >= CLOSE * best), sizes[0])


@torch.inference_mode()
def seconds_per_image(backbone: Backbone, device: str, dtype: torch.dtype, size: int) -> float:
    """Time the forward pass of the default feature on noise, the better of two after a warm-up."""
    side = backbone.transform.size
    pixels = torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8, device=device)
    times = []
    for _ in range(3):
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        start = time.perf_counter()
        images = backbone.normalise(pixels, dtype)
        backbone.network(images, [backbone.spec.default_feature])
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:]) / size
