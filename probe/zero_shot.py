"""Zero-shot heads: linear heads whose weights are a text tower's embeddings of prompts.

Shapes: N images, D features, K classes, T texts. e_t (D,) is the embedding of a text, |e_t| = 1.
A class's weights are w_k = m_k / |m_k|, m_k the mean of e_t over its texts: prompts x templates.
The logit of an image x is s * cos(x, w_k) + b, s the model's logit scale, b its logit bias (0 where
it has none). Source: open_clip's build_zero_shot_classifier, and the forward pass of its models.

One class per image: p is the softmax of the logits. Of a model that was trained by a sigmoid of
each pair (SigLIP) this is what its sigmoids say given that one class is there and no other: with
independent p_k = expit(l_k), P(only k) is proportional to p_k prod_{j != k} (1 - p_j), and so to
exp(l_k). Several findings per image: a finding's p is the softmax of its positive prompt against
its negative one, expit(s * (cos(x, w+) - cos(x, w-))), as CheXzero has it; without a negative
prompt expit(s * cos(x, w) + b), which needs a model with a bias.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save as to_bytes
from torch import Tensor

from features.backbones.text import TextTower, load_text
from features.errors import ProbeError
from features.files import write_whole
from features.fingerprint import transform_of
from features.manifest import Manifest
from features.store import FeatureStore
from probe.choose import Selection, TrainingSet
from probe.data import Features
from probe.heads import Head
from probe.prompts import Prompts, Texts, read_prompts
from probe.splits import Folds

HEAD = "zero-shot"
OUTSIDE = "the images outside the test split, on none of which anything was trained"


@dataclass(frozen=True)
class Asked:
    """The file of prompts; the backbone's weights, as `extract` took them; None: published ones."""

    prompts: Path
    weights: str | None = None


@dataclass(frozen=True)
class ZeroShot:
    """A head made of prompts, the feature it reads, and its texts' embeddings e (T, D).

    tower and tokens are hashes of the text tower and of the texts' tokens.
    """

    head: Head
    feature: str
    prompts: Prompts
    embeddings: Tensor
    scale: float
    bias: float | None
    tower: str
    tokens: str
    too_long: Texts = ()

    def settings(self) -> dict[str, Any]:
        """Return what identifies it beside the store: prompts, text tower, tokens. All digests."""
        return {"prompts": self.prompts.digest, "text_tower": self.tower, "tokens": self.tokens}

    def training_set(self, seed: int) -> TrainingSet:
        """Return the training set: no row."""
        none = np.empty((0, 0), dtype=bool)
        return TrainingSet(np.empty(0, dtype=np.int64), Folds(OUTSIDE, none), seed)

    def taught(self) -> NDArray[np.int64]:
        """Return labels (n,) or (n, L) that show all there is: no label is unknown to prompts."""
        K = len(self.prompts.classes)
        findings = self.head.kind == "sigmoid"
        return np.stack([np.zeros(K), np.ones(K)]).astype(np.int64) if findings else np.arange(K)

    def selection(self, features: Features, y: NDArray[Any]) -> Selection:
        """Return it as what was chosen; rows outside the test split, y (n,) or (n, L), held out."""

        def held_out() -> tuple[NDArray[Any], NDArray[np.float64]]:
            parts = [self.head.log_odds(X).cpu().numpy() for X in features.chunks()]
            return y, np.concatenate(parts)

        return Selection(
            log_odds=self.head.log_odds,
            head=self.head,
            C=None,
            folds={},
            converged=True,
            note=self._note(),
            held_out=held_out,
        )

    def _note(self) -> str:
        """Say which texts it is made of, and which are longer than the text tower reads."""
        texts = self.prompts.texts()
        long = len(self.too_long)
        cut = (
            f"; of {long} the text tower doesn't read the end, {self.too_long[0]!r}" if long else ""
        )
        return f"nothing trained: {len(texts)} texts, the first {texts[0]!r}{cut}"

    def save(self, folder: Path) -> None:
        """Write prompts.json and prompts.safetensors: texts by class, and embeddings (T, D)."""
        sides = {"positive": self.prompts.positive, "negative": self.prompts.negative}
        about = {
            "classes": self.prompts.classes,
            **{name: side for name, side in sides.items() if side},
            "texts": self.prompts.texts(),  # in the order of the embeddings
            "digest": self.prompts.digest,
            "text_tower": self.tower,
            "tokens": self.tokens,
            "logit_scale": self.scale,
            "logit_bias": self.bias,
        }
        text = json.dumps(about, indent=2, ensure_ascii=False)
        write_whole(folder / "prompts.json", f"{text}\n".encode())
        tensors = {"embeddings": self.embeddings.contiguous()}
        write_whole(folder / "prompts.safetensors", to_bytes(tensors))


def zero_shot(
    store: FeatureStore, manifest: Manifest, asked: Asked, feature: str | None
) -> ZeroShot:
    """Make the head of a store's classes: read the prompts, and encode them by its own model.

    feature: None is the one that the image tower puts into the joint space. Raises ProbeError for
    prompts that don't fit the classes and features that aren't in that space, BackboneError where
    the model has no text tower, or its weights aren't the store's.
    """
    findings = manifest.task == "multilabel"
    prompts = read_prompts(asked.prompts, manifest.classes, findings=findings)
    tower = _tower(store, asked.weights)
    feature = _feature(store, tower, feature)
    texts = prompts.texts()
    embeddings = tower.encode(texts)
    if embeddings.shape[1:] != store.features[feature]:
        raise ProbeError(
            f"texts have {embeddings.shape[1]} numbers and {feature} of {store.path} "
            f"{store.features[feature]}: want the feature that images have in the same space"
        )
    head = _head(prompts, dict(zip(texts, embeddings.double(), strict=True)), tower, findings)
    too_long = tuple(tower.too_long(texts))
    return ZeroShot(
        head=head,
        feature=feature,
        prompts=prompts,
        embeddings=embeddings,
        scale=tower.scale,
        bias=tower.bias,
        tower=tower.digest,
        tokens=tower.tokens_digest(sorted(set(texts))),  # their order doesn't count
        too_long=too_long,
    )


def _tower(store: FeatureStore, weights: str | None) -> TextTower:
    """Load the text tower of the weights that the store's features were made with."""
    made = store.fingerprint
    name, kind = made["backbone"]["name"], made["backbone"]["weights"]
    if weights is None and kind == "file":
        raise ProbeError(
            f"{store.path} was made with weights of a file: name it by --weights, its text tower "
            "is read from there"
        )
    transform = transform_of(made)
    return load_text(
        name,
        weights or ("random" if kind == "random" else None),
        made=made["backbone"],
        image_size=transform.size,
        fit=(transform.fit, transform.resize),
    )


def _feature(store: FeatureStore, tower: TextTower, asked: str | None) -> str:
    """Return the feature in the joint space. Raises ProbeError for another, and where none is."""
    there = next((name for name in tower.features if name in store.features), None)
    wanted = " or ".join(tower.features)
    if asked is not None and asked not in tower.features:
        raise ProbeError(
            f"a zero-shot head compares texts with {wanted}, which the image tower puts into the "
            f"same space, not with {asked}: leave --feature out"
        )
    found = asked or there
    if found is None or found not in store.features:
        pool = tower.features[0].partition("/")[2]
        raise ProbeError(
            f"{store.path} has no {found or wanted}, which texts are compared with: found "
            f"{', '.join(store.features)}; run `medprobe extract` with --pool {pool}"
        )
    return found


def _head(prompts: Prompts, embedded: dict[str, Tensor], tower: TextTower, findings: bool) -> Head:
    """Return the head of texts' embeddings (D,), each of length 1, in float64."""

    def mean(texts: Texts) -> Tensor:
        m = torch.stack([embedded[text] for text in texts]).mean(0)
        return torch.nn.functional.normalize(m, dim=0)

    classes, s, b = prompts.classes, tower.scale, tower.bias or 0.0
    if not findings:
        W = torch.stack([mean(texts) for texts in prompts.positive])  # (K, D)
        bias = torch.full((len(W),), b, dtype=torch.float64)
        return Head(s * W, bias, classes, "softmax", None, unit=True)
    alone = [name for name, texts in zip(classes, prompts.negative, strict=True) if not texts]
    if alone and tower.bias is None:
        raise ProbeError(
            f"{', '.join(alone)}: want `finding: positive | negative` of this model, which was "
            "trained by a softmax over texts and says nothing of a text alone"
        )
    pairs = list(zip(prompts.positive, prompts.negative, strict=True))
    W = torch.stack([mean(pos) - (mean(neg) if neg else 0) for pos, neg in pairs])
    bias = torch.tensor([0.0 if neg else b for _, neg in pairs], dtype=torch.float64)
    return Head(s * W, bias, classes, "sigmoid", None, unit=True)
