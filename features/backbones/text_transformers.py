"""Text towers of transformers: get_text_features of models with an image and a text tower.

As in from_transformers only safetensors are read and no code of a repository is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from features.backbones import base
from features.backbones.from_transformers import fetch, place_of, quiet
from features.backbones.network import leaves
from features.backbones.text import (
    TextTower,
    check_vocabulary,
    digest_of,
    tokenizer_remedy,
    without_text,
)
from features.backbones.weights import load_strictly, read_state_dict
from features.errors import BackboneError

REMEDY = (
    "Offline, give a folder that has the whole model, its image processor and its tokenizer, as "
    "hf:FOLDER"
)
NEEDED = ("get_image_features", "get_text_features", "logit_scale")


def load_any(name: str, weights: str | None) -> TextTower:
    """Load a text tower with its tokenizer. Raises BackboneError, whatever transformers raises."""
    with base.loading(f"hf:{name}", REMEDY), quiet():
        model = fetch(name, published=weights is None)
        module = model.module
        if not all(hasattr(module, one) for one in NEEDED):
            raise without_text(f"the weights of hf:{name} ({type(module).__name__})")
        if base.origin_of(weights) == "file":
            what = f"hf:{name}'s weights {weights}"
            load_strictly(module, read_state_dict(Path(str(weights))), what)
        module.requires_grad_(False)
        bias = getattr(module, "logit_bias", None)
        text = _Text(module, _tokenizer(name), _length(model.config), padded=bias is not None)
        used = _used(module, text)
        _check(f"hf:{name}", module, used, model.missing)
        scale, bias = float(module.logit_scale.exp()), None if bias is None else float(bias)
        heads = {key.partition(".")[0] for key in used}
        parts = {k: v for k, v in module.named_children() if k in heads}
        digest = digest_of(parts, used, scale, bias)
        return TextTower(
            text.embed, text.too_long, text.tokens, ("final/pooled",), digest, scale, bias
        )


@contextmanager
def no_remote_code() -> Iterator[None]:
    """Have transformers refuse code of a repository, where a library gives us no say in it.

    Left to itself it asks on the terminal, for this many seconds.
    """
    from transformers import dynamic_module_utils as library

    module: Any = library
    before = module.TIME_OUT_REMOTE_CODE
    module.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        module.TIME_OUT_REMOTE_CODE = before


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    tokenizers: Any = AutoTokenizer
    place, revision = place_of(name)
    given = {"revision": revision} if revision else {}
    remedy = tokenizer_remedy("beside config.json, as hf:FOLDER")
    with base.loading(f"hf:{name}", remedy):
        found = tokenizers.from_pretrained(place, trust_remote_code=False, **given)
        check_vocabulary(found, f"hf:{name}", remedy)
        return found


def _length(config: Any) -> int:
    """Return how many tokens the text tower has positions for."""
    text = getattr(config, "text_config", config)
    return int(getattr(text, "max_position_embeddings", 512))


class _Text:
    """A module's get_text_features with its tokenizer.

    padded: texts are padded to the full length, as SigLIP was trained (its model card and the
    example of get_text_features), and not to the longest, as CLIP's example does.
    """

    def __init__(self, module: Any, tokenizer: Any, length: int, *, padded: bool) -> None:
        self.module, self.tokenizer = module, tokenizer
        self.length = min(length, int(tokenizer.model_max_length))
        self.padding = "max_length" if padded else True

    def embed(self, texts: Sequence[str]) -> Tensor:
        out = self.module.get_text_features(**self._given(texts))
        found: Tensor = out if isinstance(out, Tensor) else out.pooler_output
        return found

    def tokens(self, one: str) -> list[int]:
        ids: list[int] = self._given([one])["input_ids"][0].tolist()
        return ids

    def _given(self, texts: Sequence[str]) -> Any:
        return self.tokenizer(
            list(texts),
            padding=self.padding,
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )

    def too_long(self, texts: Sequence[str]) -> list[str]:
        tokens = self.tokenizer(list(texts))["input_ids"]
        return [text for text, ids in zip(texts, tokens, strict=True) if len(ids) > self.length]


def _used(module: Any, text: _Text) -> dict[str, Tensor]:
    """Return the weights that the texts' logits depend on, by name."""
    module.requires_grad_(True)
    with torch.enable_grad():
        reached = leaves([text.embed(["a"])], set())
    module.requires_grad_(False)
    found = {id(one) for one in reached}
    found |= {id(module.logit_scale), id(getattr(module, "logit_bias", None))}
    return {name: p for name, p in module.named_parameters() if id(p) in found}


def _check(name: str, module: Any, used: Mapping[str, Tensor], missing: Sequence[str]) -> None:
    """Raise BackboneError where the file has not all weights that the texts' logits depend on."""
    known = dict(module.named_parameters())
    lost = {id(known[one]) for one in missing if one in known}
    absent = sorted(key for key, one in used.items() if id(one) in lost)
    if absent:
        raise BackboneError(
            f"{name}: its file has no {absent[0]}, on which the embeddings of texts depend: want "
            "the weights of the whole model"
        )
