"""SEEM's Focal-T in plain torch, under the official names of its parameters.

Written from the published architecture (UX-Decoder's focal_dw.py and its configuration) without
timm, for test_seem.py to judge by. Everything is channels-last, (B, H, W, C), between layers.
"""

import torch
from torch import nn
from torch.nn import functional as F

LEVELS = 3


def over_grid(layer, x):
    """Apply a layer that wants (B, C, H, W)."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def depthwise(C, kernel, *, bias):
    return nn.Conv2d(C, C, kernel, padding=kernel // 2, groups=C, bias=bias)


class Embedding(nn.Module):
    def __init__(self, C_in, C_out, *, kernel, stride):
        super().__init__()
        self.proj = nn.Conv2d(C_in, C_out, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(C_out)

    def forward(self, x):
        # The original first fills the grid up with zeros to a multiple of the stride.
        stride = self.proj.stride[0]
        x = F.pad(x, (0, 0, 0, -x.shape[2] % stride, 0, -x.shape[1] % stride))
        return self.norm(over_grid(self.proj, x))


class Modulation(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.f = nn.Linear(C, 2 * C + LEVELS + 1)
        self.focal_layers = nn.ModuleList(
            nn.Sequential(depthwise(C, 3 + 2 * k, bias=False), nn.GELU()) for k in range(LEVELS)
        )
        self.h = nn.Conv2d(C, C, 1)
        self.proj = nn.Linear(C, C)

    def forward(self, x):
        C = x.shape[-1]
        query, context, gates = self.f(x).split((C, C, LEVELS + 1), dim=-1)
        contexts = []
        for layer in self.focal_layers:
            context = over_grid(layer, context)
            contexts.append(context)
        contexts.append(F.gelu(context.mean((1, 2), keepdim=True)).expand_as(context))
        gathered = torch.einsum("lbhwc,bhwl->bhwc", torch.stack(contexts), gates) / (LEVELS + 1)
        return self.proj(query * over_grid(self.h, gathered))


class Mlp(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.fc1 = nn.Linear(C, 4 * C)
        self.fc2 = nn.Linear(4 * C, C)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.dw1 = depthwise(C, 3, bias=True)
        self.modulation = Modulation(C)
        self.gamma_1 = nn.Parameter(torch.full((C,), 1e-4))
        self.norm1 = nn.LayerNorm(C)
        self.dw2 = depthwise(C, 3, bias=True)
        self.mlp = Mlp(C)
        self.gamma_2 = nn.Parameter(torch.full((C,), 1e-4))
        self.norm2 = nn.LayerNorm(C)

    def forward(self, x):
        x = x + over_grid(self.dw1, x)
        x = self.norm1(x + self.gamma_1 * self.modulation(x))
        x = x + over_grid(self.dw2, x)
        return self.norm2(x + self.gamma_2 * self.mlp(x))


class Stage(nn.Module):
    def __init__(self, C, depth, *, last):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(C) for _ in range(depth)))
        self.downsample = None if last else Embedding(C, 2 * C, kernel=3, stride=2)


class Reference(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = Embedding(3, 96, kernel=7, stride=4)
        depths = (2, 2, 6, 2)
        self.layers = nn.ModuleList(
            Stage(96 * 2**i, depth, last=i == 3) for i, depth in enumerate(depths)
        )
        for i in range(4):
            self.add_module(f"norm{i}", nn.LayerNorm(96 * 2**i))

    def forward(self, pixels):
        """Return res2..res5, each (B, C, H, W), of pixels (B, 3, H, W)."""
        x = self.patch_embed(pixels.permute(0, 2, 3, 1))
        outputs = []
        for i, stage in enumerate(self.layers):
            x = stage.blocks(x)
            outputs.append(self.get_submodule(f"norm{i}")(x).permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return outputs
