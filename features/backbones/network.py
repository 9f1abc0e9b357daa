"""A network: from pixels to the features of any of its layers, in one pass.

A feature is named LAYER/POOL. Layers are `final` and `block00`, `block01`, ... (the blocks of a
transformer, the stages of a convolutional network; of other libraries' models what the library
itself calls intermediate). Pools are `pooled` (the embedding that the model's own library returns),
`cls` (the class token), `mean` (over the positions), `cls+mean` (the two side by side), `proj`
(projected into the space of a text encoder) and `tokens` (all positions).

Two ways lead to a Network: `hooked` listens to modules that are named, `Network` itself takes a
function that asks the model's own library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

POOLS = ("pooled", "cls", "mean", "cls+mean", "proj", "tokens")

# pooled (B, D), cls (B, C), tokens (B, T, C), proj (B, P), and mean where it isn't of the tokens
Parts = dict[str, Tensor]
Forward = Callable[[Tensor, AbstractSet[str]], dict[str, Parts]]


class Network:
    """A module as a function from pixels to features.

    run(pixels, layers) gives the parts of the layers asked for, and may give those of `final`
    beside them. count: blocks there are. blocks: modules that may be computed again for their
    gradients; what the first of them, or `first`, is given comes before all blocks.
    """

    def __init__(
        self,
        run: Forward,
        *,
        count: int,
        blocks: Sequence[nn.Module],
        size: int,
        module: nn.Module,
        first: nn.Module | None = None,
    ) -> None:
        self.run, self.blocks, self.module = run, list(blocks), module
        self.layers = [*(f"block{i:02d}" for i in range(count)), "final"]
        self.size, self._first = size, first or next(iter(self.blocks), None)
        module.eval()  # before any pass: batch norms count what they see in training
        with torch.no_grad():
            found = self.run(self._noise(), frozenset(self.layers))
        self.features = {
            f"{layer}/{pool}": tuple(pooled(parts, pool).shape[1:])
            for layer, parts in found.items()
            for pool in POOLS
            if _has(parts, pool)
        }

    def __call__(self, pixels: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Return the wanted features of normalised pixels (B, 3, H, W)."""
        pairs = {name: name.split("/") for name in wanted}
        parts = self.run(pixels, frozenset(layer for layer, _ in pairs.values()))
        return {name: pooled(parts[layer], pool) for name, (layer, pool) in pairs.items()}

    def depths(self) -> dict[str, int]:
        """Return how deep each parameter lies: 0 before the blocks, 1 + i in block i, then more.

        A parameter lies in the first block whose output depends on it, which autograd's graph of
        one pass tells; those that nothing depends on count as before the blocks.
        """
        module = self.module
        wanted = {name: p.requires_grad for name, p in module.named_parameters()}
        modes = {part: part.training for part in module.modules()}
        module.requires_grad_(True).eval()
        before: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            before.extend(x for x in (*args, *given.values()) if isinstance(x, Tensor))

        hook = (
            self._first.register_forward_pre_hook(keep, with_kwargs=True) if self._first else None
        )
        try:
            with torch.enable_grad():
                parts = self.run(self._noise(), frozenset(self.layers))
        finally:
            if hook:
                hook.remove()
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(wanted[name])
            for part, mode in modes.items():
                part.training = mode
        seen: set[Any] = set()
        depth: dict[int, int] = {}
        for level, tensors in enumerate(
            [before, *(parts[layer].values() for layer in self.layers)]
        ):
            for leaf in leaves(tensors, seen):
                depth.setdefault(id(leaf), level)
        return {name: depth.get(id(p), 0) for name, p in module.named_parameters()}

    def _noise(self) -> Tensor:
        like = next(self.module.parameters())
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, 3, self.size, self.size, generator=generator)
        return noise.to(like.device, like.dtype)


class _Hooked(Network):
    """A network whose shapes come from a pass that computes nothing."""

    def _noise(self) -> Tensor:
        like = next(self.module.parameters())
        return torch.zeros(1, 3, self.size, self.size, dtype=like.dtype, device=like.device)


def hooked(
    *,
    final: Callable[[Tensor], Parts],
    blocks: Sequence[nn.Module],
    split: Callable[[Tensor], Parts],
    size: int,
    module: nn.Module,
    first: nn.Module | None = None,
) -> Network:
    """Return a network of a module whose blocks are known.

    final(pixels) gives the parts of the last layer; `split` those of a block's output. Blocks are
    listened to by hooks, which are there during a pass only.
    """

    def run(pixels: Tensor, layers: AbstractSet[str]) -> dict[str, Parts]:
        found: dict[str, Parts] = {}

        def listen(layer: str) -> Callable[[Any, Any, Tensor], None]:
            return lambda _module, _inputs, output: found.update({layer: split(output)})

        hooks = [
            block.register_forward_hook(listen(f"block{i:02d}"))
            for i, block in enumerate(blocks)
            if f"block{i:02d}" in layers
        ]
        try:
            last = final(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        return found | {"final": last}

    with FakeTensorMode(allow_non_fake_inputs=True):
        return _Hooked(run, count=len(blocks), blocks=blocks, size=size, module=module, first=first)


def _has(parts: Parts, pool: str) -> bool:
    return all(one in parts or (one == "mean" and "tokens" in parts) for one in pool.split("+"))


def pooled(parts: Parts, pool: str) -> Tensor:
    """Return a pool of the parts of a layer, (B, D); `tokens` is (B, T, C)."""
    found = [parts[one] if one in parts else parts["tokens"].mean(1) for one in pool.split("+")]
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def leaves(tensors: Iterable[Tensor], seen: set[Any]) -> list[Tensor]:
    """Return the leaves that tensors depend on; nodes of the graph in `seen` are passed over."""
    todo = [x.grad_fn for x in tensors if x.grad_fn is not None]
    found = []
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of the nodes that accumulate gradients
        if leaf is not None:
            found.append(leaf)
        todo += [before for before, _ in node.next_functions if before is not None]
    return found


def sequence(prefix: int) -> Callable[[Tensor], Parts]:
    """Return how to split (B, prefix + T, C), the class token first if there is any prefix."""

    def split(x: Tensor) -> Parts:
        return ({"cls": x[:, 0]} if prefix else {}) | {"tokens": x[:, prefix:]}

    return split


def channels_first(x: Tensor) -> Parts:
    """Split a map (B, C, H, W)."""
    return {"tokens": x.flatten(2).transpose(1, 2)}


def channels_last(x: Tensor) -> Parts:
    """Split a map (B, H, W, C)."""
    return {"tokens": x.flatten(1, 2)}
