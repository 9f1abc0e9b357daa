"""CONCH's image tower: timm's trunk, and a pooler that its authors' own code puts on it.

Source: github.com/mahmoodlab/CONCH, conch/open_clip_custom: coca_model.py (_build_vision_tower),
vision_tower.py (VisualModel.forward_no_head, as encode_image with proj_contrast=False calls it) and
transformer.py (AttentionalPooler). The projection into the space of texts, and the second pooler,
for captions, are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from features.backbones import any_timm, base
from features.backbones.base import Backbone
from features.backbones.network import Network
from features.backbones.weights import load_strictly, read_state_dict, resample_positions
from features.images import Transform

SIZE, PATCH, WIDTH, POOLED, HEADS = 448, 16, 768, 512, 8
LAYERS, TRUNK_HEADS = 12, 12
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NOT_WANTED = ("proj_contrast", "attn_pool_caption.", "ln_caption.")
REMEDY = "Want pytorch_model.bin of huggingface.co/MahmoodLab/conch"


class AttentionalPooler(nn.Module):
    """One learned query that attends to all tokens: (B, T, WIDTH) to (B, POOLED)."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, POOLED))
        self.attn = nn.MultiheadAttention(POOLED, HEADS, kdim=WIDTH, vdim=WIDTH, batch_first=True)
        self.ln_q, self.ln_k = nn.LayerNorm(POOLED), nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return what the query gathers."""
        keys = self.ln_k(tokens)
        query = self.ln_q(self.query).expand(len(tokens), -1, -1)  # (B, 1, POOLED)
        out: Tensor = self.attn(query, keys, keys, need_weights=False)[0]
        return out[:, 0]


class Tower(nn.Module):
    """The image tower without projection, by the names of its file."""

    def __init__(self, size: int) -> None:
        super().__init__()
        options: dict[str, Any] = {"img_size": size, "depth": LAYERS, "num_heads": TRUNK_HEADS}
        options |= {"embed_dim": WIDTH, "patch_size": PATCH, "global_pool": ""}
        self.trunk = any_timm.created("vit_base_patch16_224", options)
        self.attn_pool_contrast = AttentionalPooler()
        self.ln_contrast = nn.LayerNorm(POOLED)

    def pool(self, tokens: Tensor) -> Tensor:
        """Return the embedding (B, POOLED) of the trunk's tokens, the class token among them."""
        embedding: Tensor = self.ln_contrast(self.attn_pool_contrast(tokens))
        return embedding


def load_any(name: str, weights: str | None, image_size: int | None) -> Backbone:
    """Load CONCH with weights of a file, or random ones. Raises BackboneError for others."""
    with base.loading(f"conch:{name}", REMEDY):
        size = image_size or SIZE
        with torch.random.fork_rng():
            torch.manual_seed(any_timm.RANDOM_SEED)
            tower = Tower(size)
        if weights != "random":
            file = Path(str(weights))
            state = base.own(read_state_dict(file), ["visual."], NOT_WANTED)
            if (table := state.get("trunk.pos_embed")) is not None:
                grid = resample_positions(table, size // PATCH, prefix=1, antialias=True)
                state["trunk.pos_embed"] = grid
            load_strictly(tower, state, f"conch's weights {file}")
        run, count, blocks = any_timm.intermediates(tower.trunk, size, tower.pool)
        found = Network(run, count=count, blocks=blocks, size=size, module=tower)
        own = Transform(SIZE, SIZE, "bicubic", MEAN, STD)
        spec = base.described(
            found,
            own,
            "final/pooled",
            name=f"conch:{name}",
            family="CONCH",
            architecture="ViT-B/16",
            params=base.count_params(tower),
            params_counts="the image tower without its projection",
            patch=PATCH,
            source="huggingface.co/MahmoodLab/conch",
            loader="features.backbones.from_conch:load_any",
        )
        return Backbone.of(spec, tower, found, spec.transform(size), base.origin_of(weights))
