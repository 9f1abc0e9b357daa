"""What a model is beside its weights: the same tensors may run with another activation or pooling.

Two folders of one name may hold equal weights and unlike configurations, whose features differ. No
library says what of its configuration counts, so the modules that it built are asked.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

from torch import nn

# How it is computed and not what, where it lies, and what is said of it.
IDLE = {
    "architectures", "dtype", "fused_attn", "fused_attention", "grad_checkpointing",
    "gradient_checkpointing", "label2id", "id2label", "name_or_path", "output_attentions",
    "output_hidden_states", "problem_type", "return_dict", "torch_dtype", "training",
    "transformers_version", "use_cache",
}  # fmt: skip


def configuration_digest(module: nn.Module) -> str:
    """Return a hash of how a module is built, 16 hexadecimal digits: classes and plain values.

    Plain are numbers, texts, functions and sequences of them, of each part and of the configuration
    that transformers keeps. Weights are not in it (base.weights_digest).
    """
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        digest.update(f"{name} {type(part).__qualname__}\n".encode("utf-8", "surrogateescape"))
        for key, value in sorted({**_config(part), **vars(part)}.items()):
            said = None if key.startswith("_") or key in IDLE else _plain(value)
            if said is not None:
                digest.update(f"{key}={said}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _config(part: nn.Module) -> dict[str, Any]:
    """Return the configuration that a part reads as it runs: transformers', of the image tower."""
    config = getattr(part, "config", None)
    config = getattr(config, "vision_config", None) or config
    return dict(vars(config)) if hasattr(config, "to_dict") else {}


def _plain(value: Any) -> str | None:
    """Return a value as text where it is plain, and the same on every machine; else None."""
    if isinstance(value, float):
        return f"{value:.6g}"  # powers differ in their last digits from machine to machine
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    if isinstance(value, list | tuple):
        found = [_plain(one) for one in value]
        return None if None in found else f"[{', '.join(filter(None, found))}]"
    if isinstance(value, functools.partial):
        return f"{_plain(value.func)} {'; '.join(_keywords(value))}"
    name = getattr(value, "__qualname__", None)
    return name if callable(value) and isinstance(name, str) else None


def _keywords(value: functools.partial[Any]) -> Iterator[str]:
    for key, given in sorted(value.keywords.items()):
        yield f"{key}={_plain(given)}"
