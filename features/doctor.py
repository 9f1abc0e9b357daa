"""What will happen on this machine: device, precision, memory, hub, disk."""

from __future__ import annotations

import os
import shutil
import socket
from typing import Any

import torch

from features.datasets.sample import cache_folder
from features.devices import multiplies_bfloat16, resolve_device, resolve_precision
from features.memory import COPIES, available

HUB = "huggingface.co"


def examine() -> dict[str, Any]:
    """Return a dict of what was found, in the order to be read."""
    device = resolve_device("auto")
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "precision": resolve_precision("auto", device),
        "precision_why": _why(device),
        "sweep": _sweep(device),
        "hub": (
            f"{HUB} is reachable"
            if _reachable(HUB)
            else f"{HUB} is not reachable: give weights with --weights FILE"
        ),
        "cache": str(cache_folder()),
        "disk_free_gb": round(shutil.disk_usage(".").free / 1e9, 1),
    }


def _sweep(device: str) -> str:
    """Say how a sweep of heads will hold its features."""
    fit = min(available(device), available()) / COPIES / 1e9
    where = "the GPU's memory" if device == "cuda" else "memory"
    return (
        f"on {device}; features up to {fit:.1f} GB in {where}, more block by block from the store"
    )


def _why(device: str) -> str:
    if device == "cuda":
        return (
            "the GPU multiplies bfloat16; backbones that it harms take float16"
            if multiplies_bfloat16(device)
            else "the GPU has no bfloat16"
        )
    if multiplies_bfloat16(device):
        return "the processor multiplies bfloat16; backbones that it harms take float32"
    return "no GPU, and a processor without AMX or AVX-512 BF16"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        return names[0]
    except (OSError, IndexError):
        import platform

        return platform.processor() or platform.machine()


def _reachable(host: str) -> bool:
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        return False
    return True
