"""A backbone and a head as one model to train: which parameters, and at which rate.

Blocks are a backbone's own (the blocks of a transformer, the stages of SEEM and of convolutional
networks), counted from 0 as its layers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from features.backbones import Backbone
from features.errors import ProbeError


class Tuned(nn.Module):
    """Logits (B, K) of pixels uint8 (B, H, W, 3)."""

    def __init__(self, backbone: Backbone, feature: str, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = backbone.module, head
        self.backbone, self.feature = backbone, feature
        self.train(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (B, K)."""
        x = self.backbone.normalise(pixels, torch.float32)
        logits: Tensor = self.head(self.backbone.network(x, [self.feature])[self.feature].float())
        return logits

    def train(self, mode: bool = True) -> Tuned:
        """Set training mode where something is trained.

        Batch norms keep the statistics they were pre-trained with: those of small batches move the
        features away from the head that starts on them (EfficientNet-Lite0 on the sample: accuracy
        0.97 before, 0.14 after an epoch with statistics of batches of 32).
        """
        super().train(mode)
        for module in self.trunk.modules():
            own = [*module.parameters()]
            frozen = own and not any(p.requires_grad for p in own)
            if frozen or isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(False)
        return self


def feature_of(backbone: Backbone, *, tokens: bool, drop_last: int) -> str:
    """Return the name of what the head reads, after the last drop_last blocks were dropped.

    Raises ProbeError where so many can't be dropped, BackboneError for a backbone without tokens.
    """
    layer = "final"
    if drop_last:
        blocks = len(backbone.network.layers) - 1
        if drop_last >= blocks:
            raise ProbeError(
                f"{backbone.spec.name} has {blocks} blocks: --drop-last {drop_last} leaves none"
            )
        layer = f"block{blocks - 1 - drop_last:02d}"
    if not tokens and layer == "final":
        return backbone.spec.default_feature
    return backbone.select(layer, ("tokens",) if tokens else (), False)[0]


def unfreeze(backbone: Backbone, which: str) -> None:
    """Set what is trained of a backbone: all, none, or last:K blocks and what comes after them.

    Raises ProbeError for another word, or more blocks than there are.
    """
    module, blocks = backbone.module, len(backbone.network.layers) - 1
    module.requires_grad_(which == "all")
    if which in ("all", "none"):
        return
    word, _, count = which.partition(":")
    if word != "last" or not count.isdigit() or not 0 < int(count) <= blocks:
        raise ProbeError(
            f"--unfreeze {which}: want all, none, or last:K with K from 1 to {blocks} blocks"
        )
    first = blocks - int(count)
    for name, depth in backbone.network.depths().items():
        if depth > first:
            module.get_parameter(name).requires_grad_(True)


def recompute(blocks: Sequence[nn.Module]) -> None:
    """Have blocks keep no activations in training, and compute them again for their gradients.

    Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174): memory of one block instead of
    all, for a third more time.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Return AdamW's groups of what is trained: no decay for biases, norms and 1-d parameters.

    The head learns at lr, each layer of the backbone below it at layer_decay times the rate of the
    one above (ELECTRA, Clark et al. 2020, arXiv:2003.10555).
    """
    below: dict[str, int] = {}
    if isinstance(model, Tuned):
        deep = model.backbone.network.depths()
        top = len(model.backbone.network.layers) + 1
        below = {f"trunk.{name}": top - depth for name, depth in deep.items()}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        flat = parameter.squeeze().ndim <= 1
        steps = below.get(name, 0)
        rate = lr * layer_decay**steps
        group = groups.setdefault(
            (steps, flat),
            {"params": [], "lr": rate, "peak": rate, "weight_decay": 0 if flat else weight_decay},
        )
        group["params"].append(parameter)
    if not groups:
        raise ProbeError("nothing is left to train")
    return list(groups.values())
