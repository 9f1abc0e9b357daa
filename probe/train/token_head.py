"""The appended DeiT classifier: a transformer on the tokens of a backbone.

Tokens (B, T, C) -> Linear(C, D) + LayerNorm -> DeiT's class token, positions and blocks -> logits
(B, K). The blocks, class token and position table start from ImageNet weights; the table is
resampled (bicubic) to the token grid, and DeiT's patch embedding is not used. With deit-base,
768-d tokens and 5 classes 85,804,037 parameters are trained. The study's classifier (joanaapa/
Foundation-Medical); DeiT: Touvron et al. 2021, arXiv:2012.12877.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from features.backbones import load_backbone
from features.backbones.weights import resample_positions
from features.errors import ProbeError

SIZES = {
    "deit-tiny": "timm:deit_tiny_patch16_224.fb_in1k",
    "deit-small": "timm:deit_small_patch16_224.fb_in1k",
    "deit-base": "deit",
}


class TokenHead(nn.Module):
    """See the module. `deit` is a vision transformer with one class token; its parts are taken."""

    def __init__(self, deit: nn.Module, *, width: int, tokens: int, outputs: int) -> None:
        super().__init__()
        table: Tensor = deit.pos_embed.detach()  # type: ignore[operator]
        size = table.shape[2]
        self.projector = nn.Sequential(nn.Linear(width, size), nn.LayerNorm(size))
        self.cls_token = nn.Parameter(deit.cls_token.detach().clone())  # type: ignore[operator]
        self.pos_embed = nn.Parameter(
            resample_positions(table, grid_of(tokens), prefix=1, antialias=True).clone()
        )
        self.blocks, self.norm = deit.blocks, deit.norm
        self.head = nn.Linear(size, outputs)
        self.requires_grad_(True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, K) of tokens (B, T, C)."""
        x = self.projector(tokens)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:  # type: ignore[union-attr]
            x = block(x)
        return self.head(self.norm(x)[:, 0])  # type: ignore[operator, no-any-return]


def token_head(
    size: str, weights: str | None, *, shape: tuple[int, int], outputs: int, seed: int
) -> TokenHead:
    """Build a head of a size of SIZES on tokens of a shape (T, C).

    weights: None for ImageNet's, "random", or a file of DeiT in the official layout. What is new
    (projector and classifier) is drawn by the seed. Raises BackboneError for weights that can't be
    had or don't fit, ProbeError for tokens that are no square grid.
    """
    if size not in SIZES:
        raise ProbeError(f"unknown head size {size!r}: want one of {', '.join(SIZES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        deit = load_backbone(SIZES[size], weights).module
        return TokenHead(deit, width=shape[1], tokens=shape[0], outputs=outputs)


def grid_of(tokens: int) -> int:
    """Return the side of a square grid. Raises ProbeError where there is none."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ProbeError(
            f"{tokens} tokens are no square grid, as the appended DeiT's positions want: "
            "found none of 49, 196, 256, ...; choose another --image-size"
        )
    return side
