"""Where to compute, and in which precision."""

from __future__ import annotations

import torch

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str) -> str:
    """Return what "auto" means here."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def multiplies_bfloat16(device: str) -> bool:
    """Say whether bfloat16 is faster than float32 there: a GPU that has it, AMX, AVX-512 BF16.

    On an AVX-512 BF16 processor without AMX all backbones ran 1.9 to 4.1 times faster so
    (benchmarks/README.md); where the instructions are missing it is emulated, and slower.
    """
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def resolve_precision(precision: str, device: str, *, bfloat16: bool = True) -> str:
    """Return what "auto" means here.

    That is bfloat16 where the hardware multiplies it, unless it harms the backbone (then bfloat16
    is False): that gets float16 on a GPU. Else float32.
    """
    if precision != "auto":
        return precision
    if bfloat16 and multiplies_bfloat16(device):
        return "bfloat16"
    return "float16" if device.startswith("cuda") else "float32"
