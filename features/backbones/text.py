"""Text towers: from texts to the joint space that a model's image tower puts images into.

A text tower is read from the file that the image tower of a store came from, and from no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from features.backbones import BACKBONES, KNOWN, Backbone, Fit, load_backbone
from features.backbones.base import tensors_digest
from features.backbones.configuration import configuration_digest
from features.backbones.from_known import route_of
from features.errors import BackboneError

BATCH = 64  # texts of a pass
LOADERS = {  # "module:function" taking (name, weights), by library or by the module of a loader
    "openclip": "features.backbones.text_open_clip:load_any",
    "hf": "features.backbones.text_transformers:load_any",
    "features.backbones.from_open_clip": "features.backbones.text_open_clip:load_study",
}
HAVE = (
    "openclip:NAME/TAG, hf:ORG/NAME of a model with an image and a text tower (CLIP, SigLIP), "
    "names that stand for one of these (biomedclip, medsiglip, ...), and the study's openclip"
)


@dataclass(frozen=True)
class TextTower:
    """A model's text tower, and how the cosine c of an image and a text becomes a logit.

    The logit is scale * c + bias. bias is None where the model was trained by a softmax over texts
    (CLIP), a number where by a sigmoid of each pair (SigLIP). digest: of all that embeddings and
    logits depend on but the texts' tokens (digest_of).
    """

    embed: Callable[[Sequence[str]], Tensor]  # texts -> (T, D), not normalised
    too_long: Callable[[Sequence[str]], list[str]]  # the texts whose end the tower doesn't read
    tokens: Callable[[str], list[int]]  # of a text, as the tower is given them
    features: tuple[str, ...]  # the names of the images' embeddings in the same space
    digest: str
    scale: float
    bias: float | None = None

    def tokens_digest(self, texts: Sequence[str]) -> str:
        """Return a hash of the tokens of texts, in their order, 16 hexadecimal digits."""
        tokens = [self.tokens(text) for text in texts]
        return hashlib.sha256(repr(tokens).encode()).hexdigest()[:16]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of texts, (T, D), each of length 1, float32.

        Source: open_clip and transformers normalise both sides by their Euclidean length. Raises
        BackboneError where the model can't take what its tokenizer gives.
        """
        starts = range(0, len(texts), BATCH)
        try:
            parts = [self.embed(texts[i : i + BATCH]).float() for i in starts]
        except Exception as error:  # libraries and tokenizers raise whatever they meet
            reason = " ".join(str(error).split())[:300]
            raise BackboneError(
                f"texts can't be encoded ({type(error).__name__}: {reason}): the tokenizer may "
                "be of another model than the weights"
            ) from error
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


def load_text(
    name: str, weights: str | None, *, made: Mapping[str, Any], image_size: int, fit: Fit
) -> TextTower:
    """Load the text tower of a model; name and weights are as load_backbone takes them.

    made, image_size and fit are of the image tower that the text is to go with: what a store's
    fingerprint says of its backbone, and how its images were made. Raises BackboneError for a model
    without a text tower, or whose weights or configuration are of another image tower.
    """
    known = KNOWN.get(name.partition("@")[0])
    library, _, rest = (known.route if known else name).partition(":")
    spec = BACKBONES.get(name)
    loader = LOADERS.get(spec.loader.partition(":")[0] if spec else library if rest else "")
    if loader is None:
        raise BackboneError(f"{name} has no text tower: those that have one are {HAVE}")
    if weights and (Path(weights) / "run.json").is_file():
        raise BackboneError(
            f"{weights} holds a tuned image tower alone: its images are no longer in the space of "
            "texts; take features of the published weights"
        )
    _check_image_tower(load_backbone(name, weights, image_size, fit), made)
    if known:
        route, weights = route_of(known, name.partition("@")[2], weights)
        rest = route.partition(":")[2]
    module, _, function = loader.partition(":")
    tower: TextTower = getattr(import_module(module), function)(rest or name, weights)
    return tower


def _check_image_tower(image: Backbone, made: Mapping[str, Any]) -> None:
    """Raise BackboneError for an image tower that isn't the one of a store's fingerprint."""
    name, want, found = image.spec.name, made["weights_digest"], image.weights_digest
    if found != want:
        raise BackboneError(
            f"{name}: these weights hold another image tower ({found[:8]}..., want "
            f"{want[:8]}...; SHA-256), and so perhaps another text tower: name the file that the "
            "features were made with, by --weights"
        )
    want, found = made.get("configuration"), image.configuration  # older stores have none
    if want and found != want:
        raise BackboneError(
            f"{name}: its configuration is no longer that of the features ({found[:8]}..., want "
            f"{want[:8]}...): the folder, or the version of its library, has changed; put it back, "
            "or extract anew"
        )


def digest_of(
    parts: Mapping[str, Module], tensors: Mapping[str, Tensor], scale: float, bias: float | None
) -> str:
    """Return a hash of a text tower, 16 hexadecimal digits.

    parts are its modules, of which the configuration counts; tensors are its weights, by name.
    """
    digest = hashlib.sha256(f"{scale:.6g} {bias if bias is None else f'{bias:.6g}'}\n".encode())
    for name, part in sorted(parts.items()):
        digest.update(f"{name} {configuration_digest(part)}\n".encode())
    digest.update(tensors_digest(tensors).encode())
    return digest.hexdigest()[:16]


def without_text(name: str) -> BackboneError:
    """Return the error for weights, or a model, that hold no text tower."""
    return BackboneError(f"{name} hold no text tower: those that have one are {HAVE}")


def check_vocabulary(tokenizer: Any, name: str, remedy: str) -> None:
    """Raise BackboneError for a tokenizer of transformers that knows no words.

    Without a tokenizer's files transformers 5 makes an empty one of some classes.
    """
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if not words:
        raise BackboneError(f"{name} has a tokenizer without words. {remedy}")


def tokenizer_remedy(where: str) -> str:
    """Return what to do where a tokenizer can't be had; where says the folder it may lie in."""
    return (
        "That was its tokenizer, which is fetched apart from the weights: fetch it once where the "
        f"hub can be reached, or put its files (tokenizer.json, tokenizer_config.json) {where}"
    )
