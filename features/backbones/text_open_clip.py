"""Text towers of open_clip: its own transformers and those it takes from transformers.

They are built and loaded as open_clip does it; the tokenizer is the one that it gives the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from features.backbones import BACKBONES, any_open_clip, base
from features.backbones.any_open_clip import REMEDY, Model
from features.backbones.download import fetch
from features.backbones.text import (
    TextTower,
    check_vocabulary,
    digest_of,
    tokenizer_remedy,
    without_text,
)
from features.backbones.text_transformers import no_remote_code
from features.backbones.weights import load_strictly, misfit, read_state_dict
from features.backbones.wrappers import unwrapped
from features.errors import BackboneError

RANDOM_SEED = 0
CONTEXT = 77  # tokens, where text_cfg doesn't say: open_clip's DEFAULT_CONTEXT_LENGTH


def load_any(name: str, weights: str | None) -> TextTower:
    """Load the text tower of a model as open_clip names it. Raises BackboneError, as its loader."""
    with base.loading(f"openclip:{name}", REMEDY):
        model = any_open_clip.find(name, weights)
        file = Path(weights) if weights else any_open_clip.published(model)
        names = ("final/pooled", "final/proj")
        return _load(model, f"openclip:{name}", None if weights == "random" else file, names)


def load_study(name: str, weights: str | None) -> TextTower:
    """Load the text tower of the study's OpenCLIP from its official file, or one like it."""
    import open_clip

    spec = BACKBONES[name]
    with base.loading(name, REMEDY):
        config = open_clip.get_model_config(spec.architecture)
        file = fetch(spec.source, spec.name) if weights is None else Path(weights)
        model = Model(spec.architecture, config, {})
        return _load(model, name, None if weights == "random" else file, ("final/proj",))


def _load(model: Model, name: str, file: Path | None, features: tuple[str, ...]) -> TextTower:
    """Return the text tower of a file, of random weights where there is none."""
    text = dict(model.config["text_cfg"])
    whole = _build(model, name, text)
    with _as_open_clip():
        tokenizer = _tokenizer(model, name, text)
    bias = model.config.get("init_logit_bias")
    scale = float(model.config.get("init_logit_scale") or whole.logit_scale)
    if file is not None:
        logit = _load_weights(whole, file, f"{name}'s weights {file}")
        scale = logit["logit_scale"]
        bias = logit.get("logit_bias", None if bias is None else 0.0)  # 0 as open_clip has it
    tower = whole.text.eval()
    length = int(text.get("context_length", CONTEXT))

    def embed(texts: Sequence[str]) -> Tensor:
        out = tower(tokenizer(list(texts)))
        embedding: Tensor = out[0] if isinstance(out, tuple) else out
        return embedding

    def too_long(texts: Sequence[str]) -> list[str]:
        if text.get("tokenizer_mode") or getattr(tokenizer, "reduction_fn", None):
            return []  # cut by rules of their own
        ends = tokenizer(list(texts), 2 * length)[:, length:]  # all padding, of one that fits
        return [one for one, end in zip(texts, ends, strict=True) if (end != end[-1]).any()]

    def tokens(one: str) -> list[int]:
        ids: list[int] = tokenizer([one])[0].tolist()
        return ids

    scale = math.exp(scale)
    digest = digest_of({"text": tower}, tower.state_dict(), scale, bias)
    return TextTower(embed, too_long, tokens, features, digest, scale, bias)


def _build(model: Model, name: str, text: dict[str, Any]) -> Any:
    """Build a model with its own text tower; all weights are random."""
    inner = text.get("hf_model_name")
    if inner:
        text = {**text, "hf_model_pretrained": False}  # all of it is in the model's own file
    remedy = f"Its text tower's configuration is of {inner}: fetch it once where the hub can be "
    remedy += "reached, or name a folder that has it as hf_model_name in open_clip_config.json"
    size = any_open_clip.side(model.config["vision_cfg"].get("image_size", 224))
    with base.loading(name, remedy if inner else REMEDY), _as_open_clip():
        return any_open_clip.build(model, size, text).requires_grad_(False)


@contextmanager
def _as_open_clip() -> Iterator[None]:
    """Have open_clip build what it builds: quietly, the same each time, no code of others run."""
    with torch.random.fork_rng(), base.quiet(), no_remote_code():
        torch.manual_seed(RANDOM_SEED)
        yield


def _tokenizer(model: Model, name: str, text: dict[str, Any]) -> Any:
    """Return the tokenizer that open_clip.get_tokenizer gives, without a say in running code."""
    import open_clip
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    options = dict(text.get("tokenizer_kwargs") or {})
    length = int(text.get("context_length", CONTEXT))
    remedy = tokenizer_remedy("beside open_clip_config.json, as openclip:local-dir:FOLDER")
    with base.loading(name, remedy):
        if source := text.get("hf_tokenizer_name"):
            options |= {"trust_remote_code": False}
            mode = text.get("tokenizer_mode")
            place = str(model.folder or source)  # a folder holds its tokenizer
            found = HFTokenizer(place, context_length=length, tokenizer_mode=mode, **options)
            check_vocabulary(found.tokenizer, name, remedy)
            return found
        if model.folder or model.name.startswith("hf-hub:"):
            return SimpleTokenizer(context_length=length, **options)
        return open_clip.get_tokenizer(model.name.partition("/")[0])


def _load_weights(whole: Any, file: Path, what: str) -> dict[str, float]:
    """Load a text tower; return the logit's scale and bias as the file has them.

    As open_clip.factory.load_checkpoint does, which renames the towers of older files.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_text_pos_embed

    try:
        state = convert_state_dict(whole, read_state_dict(file))
        state = unwrapped(state, [*whole.state_dict(), *_older(whole)], what)
        if "positional_embedding" in state:
            state = convert_to_custom_text_state_dict(state)
        mine = {k.removeprefix("text."): v for k, v in state.items() if k.startswith("text.")}
        if not mine or "logit_scale" not in state:
            raise without_text(what)
        if "transformer.embeddings.position_ids" not in whole.text.state_dict():
            mine.pop("transformer.embeddings.position_ids", None)  # of older transformers
        resize_text_pos_embed(resized := {f"text.{k}": v for k, v in mine.items()}, whole)
    except (RuntimeError, KeyError, AttributeError, AssertionError) as error:
        raise BackboneError(misfit(what, error)) from None
    load_strictly(whole.text, {k.removeprefix("text."): v for k, v in resized.items()}, what)
    return {k: float(v) for k, v in state.items() if k in ("logit_scale", "logit_bias")}


def _older(whole: Any) -> list[str]:
    """Return the names that a text tower has in files of open_clip's CLIP, beside the images'."""
    return [name.removeprefix("text.") for name in whole.state_dict() if name.startswith("text.")]
