"""SEEM's image backbone, Focal-T (`focal_dw`): timm's FocalNet with what SEEM changed.

Weights: the keys `backbone.*` of `seem_focalt_v0.pt` at xdecoder/SEEM. Network and settings:
demo_code/xdecoder/backbone/focal_dw.py and configs/seem/focalt_unicl_lang_v0.yaml of
UX-Decoder/Segment-Everything-Everywhere-All-At-Once.

Shapes: B images, stage i of 0..3 gives SEEM's res(i+2), (B, C_i, H_i, W_i): C_i = 96 * 2^i, and
H_i = H / (4 * 2^i) rounded up, so that an image may have any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.layers.norm import LayerNorm2d
from timm.models.focalnet import FocalNet, FocalNetBlock
from torch import Tensor, nn

WIDTHS = (96, 192, 384, 768)
DEPTHS = (2, 2, 6, 2)  # blocks per stage


class Block(nn.Module):
    """The parts of timm's block in SEEM's order.

    SEEM has a depth-wise residual before each half, and normalises after the residual sum;
    timm has none, and its post-norm normalises the branch alone.
    """

    def __init__(self, parts: FocalNetBlock) -> None:
        super().__init__()
        self.dw1 = nn.Conv2d(parts.dim, parts.dim, 3, padding=1, groups=parts.dim)
        self.modulation = parts.modulation
        self.ls1 = parts.ls1
        self.drop_path1 = parts.drop_path1
        self.norm1 = parts.norm1_post
        self.dw2 = nn.Conv2d(parts.dim, parts.dim, 3, padding=1, groups=parts.dim)
        self.mlp = parts.mlp
        self.ls2 = parts.ls2
        self.drop_path2 = parts.drop_path2
        self.norm2 = parts.norm2_post

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) for (B, C, H, W)."""
        x = x + self.dw1(x)
        x = self.norm1(x + self.drop_path1(self.ls1(self.modulation(x))))
        x = x + self.dw2(x)
        return self.norm2(x + self.drop_path2(self.ls2(self.mlp(x))))  # type: ignore[no-any-return]


class Seem(FocalNet):
    """Focal-T with a norm for each stage's output: norm0, norm1, norm2, and timm's norm."""

    def __init__(self) -> None:
        super().__init__(
            num_classes=0,
            embed_dim=WIDTHS[0],
            depths=DEPTHS,
            focal_levels=(3, 3, 3, 3),
            focal_windows=(3, 3, 3, 3),  # and + 2 per level: kernels 3, 5, 7
            use_overlap_down=True,
            use_post_norm=True,
            normalize_modulator=True,
            layerscale_value=1e-4,
            drop_path_rate=0.3,  # SEEM's own; without effect in eval mode
        )
        # timm pads by 2: other values, and one row fewer where H % 4 is 1 or 2. SEEM also adds
        # zeros at the right and bottom of sizes that don't divide, but fewer than this padding
        # reaches, so nothing stands for them here.
        self.stem.proj.padding = (3, 3)
        stages: Any = self.layers
        for stage in stages:
            stage.blocks = nn.ModuleList(Block(parts) for parts in stage.blocks)
        self.norm0, self.norm1, self.norm2 = (LayerNorm2d(C, eps=1e-5) for C in WIDTHS[:3])

    def forward_stages(self, pixels: Tensor) -> list[Tensor]:
        """Return res2..res5 of normalised pixels (B, 3, H, W).

        Each goes out normalised and into the next stage as it was.
        """
        norms = (self.norm0, self.norm1, self.norm2, self.norm)
        x = self.stem(pixels)
        outputs = []
        for stage, norm in zip(self.layers, norms, strict=True):
            x = stage(x)
            outputs.append(norm(x))
        return outputs


def build() -> Seem:
    """Return the network with random weights: 29,922,288 parameters."""
    return Seem()


_EMBEDDING = ("proj.weight", "proj.bias", "norm.weight", "norm.bias")

RENAMED = {
    **{f"patch_embed.{leaf}": f"stem.{leaf}" for leaf in _EMBEDDING},
    # SEEM shrinks the grid at the end of a stage, timm at the start of the next.
    **{
        f"layers.{i}.downsample.{leaf}": f"layers.{i + 1}.downsample.{leaf}"
        for i in range(3)
        for leaf in _EMBEDDING
    },
    **{
        f"layers.{i}.blocks.{j}.gamma_{k}": f"layers.{i}.blocks.{j}.ls{k}.gamma"
        for i, depth in enumerate(DEPTHS)
        for j in range(depth)
        for k in (1, 2)
    },
    **{f"norm3.{leaf}": f"norm.{leaf}" for leaf in ("weight", "bias")},
}

# Linear layers in SEEM, 1x1 convolutions in timm.
LINEAR = ("modulation.f.weight", "modulation.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return SEEM's tensors, `backbone.` stripped from their names, as Seem names and shapes them.

    Names that aren't SEEM's stay, for the loader to report. Where two would become one, the
    names are Seem's already, or of both kinds, and everything stays as it is.
    """
    names = {name: RENAMED.get(name, name) for name in state}
    if len(set(names.values())) < len(names):
        return dict(state)
    return {
        names[name]: tensor[:, :, None, None]  # (o, i) -> (o, i, 1, 1)
        if name.endswith(LINEAR) and tensor.ndim == 2
        else tensor
        for name, tensor in state.items()
    }
