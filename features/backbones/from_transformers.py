"""Any image model of Hugging Face's transformers, as `hf:ORG/NAME` or `hf:FOLDER`.

Only safetensors are read and no code of a repository is run. The embedding is get_image_features of
models with a text tower, else the class's own pooler_output; layers are its hidden_states.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from features.backbones import base, network, processors
from features.backbones.base import Backbone, Spec
from features.backbones.families import default_feature
from features.backbones.network import Network, Parts, leaves
from features.backbones.processors import Followed
from features.backbones.weights import load_strictly, read_state_dict
from features.errors import BackboneError
from features.images import Transform

RANDOM_SEED = 0
COLLECTING = "transformers.utils.output_capturing"
PREFIX = 64  # tokens before those of patches at most: a class token and registers
FILES = "config.json, preprocessor_config.json and model.safetensors"
REMEDY = (
    f"Offline, give a folder that has {FILES}, "
    "as hf:FOLDER. Where access must be asked for on {page}, set the variable HF_TOKEN to your "
    "token"
)
OF_A_FOLDER = f"Want a folder that has {FILES} as transformers saves them"
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Model:
    """A model as transformers loads it. missing: weights that its file hasn't got, so random."""

    config: Any
    processor: Any
    module: Any
    missing: tuple[str, ...] = ()

    @property
    def vision(self) -> Any:
        """Return the configuration of its image tower."""
        return getattr(self.config, "vision_config", None) or self.config

    @property
    def patch(self) -> int:
        """Return the side of a patch in pixels; 1 where it has none."""
        side = getattr(self.vision, "patch_size", 1)
        side = side[0] if isinstance(side, list | tuple) and side else side
        return side if isinstance(side, int) else 1


def load_any(name: str, weights: str | None, image_size: int | None) -> Backbone:
    """Load a vision model, or the image tower of a model with two.

    Raises BackboneError for one that can't be fetched or takes no images, whatever transformers
    raises. One whose processor can't be followed exactly has a transform that only --fit mends.
    """
    with base.loading(f"hf:{name}", _remedy(name)), quiet():
        model = fetch(name, published=weights is None)
        if base.origin_of(weights) == "file":
            what = f"hf:{name}'s weights {weights}"
            load_strictly(model.module, read_state_dict(Path(str(weights))), what)
        followed = processors.follow(model.processor)
        own = followed.transform if isinstance(followed, Followed) else _unknown(model, followed)
        size = image_size or own.size
        tower = Tower(model, size, flipped=isinstance(followed, Followed) and followed.flipped)
        found = tower.network(f"hf:{name}")
        spec = _spec_of(name, model, found, own, tower.patch)
        spec.transform(size)  # raises for a size that the patches don't fill
        transform = processors.resized(own, size)
        library = tower.library(own, found) if isinstance(followed, Followed) else None
        origin = base.origin_of(weights)
        return Backbone.of(spec, model.module, found, transform, origin, library)


def _remedy(name: str) -> str:
    """Return what to do where a model can't be loaded."""
    place, _ = place_of(name)
    page = f"https://huggingface.co/{place}"
    return OF_A_FOLDER if Path(place).is_dir() else REMEDY.format(page=page)


@contextmanager
def quiet() -> Iterator[None]:
    """Have transformers print no warnings, and no progress off a terminal."""
    from transformers.utils import logging as library

    logging: Any = library
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def place_of(name: str) -> tuple[str, str | None]:
    """Return the folder or repository of a name, and the revision that may follow it after @.

    Raises BackboneError for a revision of a folder, which transformers would pass over.
    """
    if Path(name).is_dir():
        return name, None
    place, _, revision = name.partition("@")
    if revision and Path(place).is_dir():
        raise BackboneError(f"hf:{name}: a folder has no revisions: leave @{revision} out")
    return place, revision or None


def fetch(name: str, *, published: bool) -> Model:
    """Return a model, its weights random, the same every time, if not `published`.

    Raises BackboneError for one that needs code of its repository, an adapter, and misshapen
    weights; whatever else transformers raises.
    """
    try:
        return _fetched(name, published=published)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise BackboneError(
            f"hf:{name} needs code that lies in its repository, which is never run: want a model "
            "of a class that transformers has itself"
        ) from None


def _fetched(name: str, *, published: bool) -> Model:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    said = f"hf:{name}"
    name, revision = place_of(name)
    if published and (Path(name) / ADAPTER).is_file():  # would be passed over, or its base taken
        raise BackboneError(
            f"{said} has an {ADAPTER}: merge the adapter into the weights (merge_and_unload) and "
            "save them to a folder of their own"
        )
    given: dict[str, Any] = {"trust_remote_code": False}  # else it asks, and may be told yes
    given |= {"revision": revision} if revision else {}
    config: Any = AutoConfig.from_pretrained(name, **given)
    for one in filter(None, (config, getattr(config, "vision_config", None))):
        if hasattr(one, "mask_ratio"):
            one.mask_ratio = 0.0  # masked autoencoders leave out patches at random in training
        if isinstance(native := getattr(one, "image_size", None), int):
            base.check_side(said, native)
    processor: Any = _processor(AutoImageProcessor, name, given)
    models: Any = AutoModel
    with torch.random.fork_rng():
        torch.manual_seed(RANDOM_SEED)
        if not published:
            whole = models.from_config(config, trust_remote_code=False)
            return Model(config, processor, whole.eval())
        module, info = models.from_pretrained(
            name,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # which are an error below, with their names
            **given,
        )
    if misshapen := sorted(info["mismatched_keys"]):
        key, have, want = misshapen[0]
        raise BackboneError(
            f"{said}'s weights don't fit its config.json: {len(misshapen)} misshapen, the first "
            f"{key} is {tuple(have)}, want {tuple(want)}"
        )
    _check_depth(said, module, info["unexpected_keys"])
    return Model(config, processor, module.eval().float(), tuple(sorted(info["missing_keys"])))


def _check_depth(said: str, module: Any, unexpected: Iterable[str]) -> None:
    """Raise BackboneError where a file has numbered blocks beyond those that the model is built of.

    Other names that the model hasn't got are of heads and decoders, which is as it should be.
    """
    last: dict[tuple[str, str], int] = {}  # the largest number of a name, by what is around it
    for key in module.state_dict():
        for around, number in _numbers(key):
            last[around] = max(number, last.get(around, 0))
    for key in sorted(unexpected):
        bare = key.removeprefix(f"{module.base_model_prefix}.")
        for around, number in [*_numbers(key), *_numbers(bare)]:
            if number > last.get(around, number):
                raise BackboneError(
                    f"{said}: its file goes on after block {last[around]} with {key}, of which its "
                    "config.json says nothing: set the number of layers there (num_hidden_layers, "
                    "depths) to the file's"
                )


def _numbers(key: str) -> Iterator[tuple[tuple[str, str], int]]:
    """Yield the numbers in a tensor's name, each with what is before and after it."""
    for found in re.finditer(r"(?<=\.)\d+(?=\.)", f".{key}"):
        yield (key[: found.start() - 1], key[found.end() - 1 :]), int(found.group())


def _processor(processors_: Any, name: str, given: dict[str, Any]) -> Any:
    """Return the image processor that works with Pillow, as ours; else the only one there is."""
    try:
        return processors_.from_pretrained(name, backend="pil", **given)
    except (ValueError, ImportError, TypeError):
        return processors_.from_pretrained(name, **given)


def _unknown(model: Model, reason: str) -> Transform:
    """Return a transform without a fit: what is known of one that can't be followed."""
    fields = model.processor.to_dict()
    side = getattr(model.vision, "image_size", 224)
    side = int(side[0] if isinstance(side, list | tuple) else side)
    mean, std = (tuple(fields.get(k) or (0.5,) * 3) for k in ("image_mean", "image_std"))
    return Transform(side, side, "bicubic", mean, std, fit=reason)


class Tower:
    """A module of transformers as a function from pixels (B, 3, size, size) to parts."""

    def __init__(self, model: Model, size: int, *, flipped: bool) -> None:
        self.model, self.module, self.flipped = model, model.module, flipped
        self.size, self.prefix = size, 0
        self.absent: set[str] = set()
        self.start, self.patch = 1, 1
        taken = inspect.signature(getattr(self.call, "forward", self.call)).parameters
        native = getattr(model.vision, "image_size", size)
        native = native[0] if isinstance(native, list | tuple) else native
        self.options: dict[str, Any] = {}
        if "interpolate_pos_encoding" in taken and size != native:
            self.options["interpolate_pos_encoding"] = True
        self.ordered = "noise" in taken and hasattr(model.vision, "mask_ratio")

    @property
    def call(self) -> Any:
        """Return what gives the features of images: of two towers a method, else the module."""
        return getattr(self.module, "get_image_features", self.module)

    def network(self, name: str) -> Network:
        """Return the network; of a model with two towers only what images pass stays."""
        noise = torch.randn(1, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            self._drop_what_is_not_run(noise)
            states = self._states(self._outputs(noise, hidden=True))
            self.prefix = self._prefix(states[0]) if states else 0
            self._check(name, noise)
        stages = getattr(self.model.vision, "depths", None)
        # The first state is that of the embeddings, but where there are only stages.
        self.start = 0 if stages is not None and len(states) == len(stages) else 1
        count = max(0, len(states) - self.start)
        self.absent = self._absent(name, noise)
        blocks = self._blocks(count)
        found = Network(self.run, count=count, blocks=blocks, size=self.size, module=self.module)
        self._take_off_hooks()
        return found

    def library(self, transform: Transform, found: Network) -> base.Library | None:
        """Return the processor and the forward of transformers, as they are called there."""
        pooled = "final/pooled" in found.features
        if not pooled and "final/cls" not in found.features:
            return None

        def pixels(image: Any) -> Tensor:
            values: Tensor = self.model.processor(image, return_tensors="pt")["pixel_values"][0]
            x = values.as_subclass(Tensor)
            return x.flip(0) if self.flipped else x

        def embed(x: Tensor) -> Tensor:
            out = self._outputs(x, hidden=False)
            if not pooled:
                last: Tensor = out.last_hidden_state
                return last[:, 0]
            given: Tensor = out if isinstance(out, Tensor) else out.pooler_output
            return given.flatten(1)

        return base.Library(transform, "final/pooled" if pooled else "final/cls", pixels, embed)

    def _take_off_hooks(self) -> None:
        """Take off what transformers puts on a model to collect its states, and again when needed.

        A model that has it can't be sent to another process.
        """
        for part in self.module.modules():
            for key, hook in list(part._forward_hooks.items()):
                if getattr(hook, "__module__", "") == COLLECTING:
                    del part._forward_hooks[key]
            if hasattr(part, "_output_capturing_hooks_installed"):
                part._output_capturing_hooks_installed = False

    def run(self, pixels: Tensor, layers: AbstractSet[str]) -> dict[str, Parts]:
        """Return the parts of layers; block i is the state after it, as transformers counts."""
        inner = layers - {"final"}
        out = self._outputs(pixels, hidden=bool(inner))
        states = self._states(out) if inner else []
        parts = {
            layer: self._split(states[self.start + int(layer.removeprefix("block"))])
            for layer in inner
        }
        if "final" in layers:
            final = self._final(out)
            parts["final"] = {k: v for k, v in final.items() if k not in self.absent}
        return parts

    def _outputs(self, pixels: Tensor, *, hidden: bool) -> Any:
        options = dict(self.options)
        if self.ordered:  # patches are sorted by this noise
            patches = torch.arange((self.size // self.model.patch) ** 2, device=pixels.device)
            options["noise"] = patches.expand(len(pixels), -1).float()
        pixels = pixels.flip(1) if self.flipped else pixels
        if hidden:
            options["output_hidden_states"] = True
        return self.call(pixel_values=pixels, **options)

    def _states(self, out: Any) -> list[Tensor]:
        found = getattr(out, "reshaped_hidden_states", None) or getattr(out, "hidden_states", None)
        return list(found or ())

    def _final(self, out: Any) -> Parts:
        embedding = out if isinstance(out, Tensor) else getattr(out, "pooler_output", None)
        parts = {"pooled": embedding.flatten(1)} if isinstance(embedding, Tensor) else {}
        last = getattr(out, "last_hidden_state", None)
        return parts | (self._split(last) if isinstance(last, Tensor) else {})

    def _split(self, x: Tensor) -> Parts:
        if x.ndim == 4:  # squares of positions: where two neighbouring sides are equal
            last = x.shape[1] == x.shape[2] != x.shape[3]
            return network.channels_last(x) if last else network.channels_first(x)
        if x.ndim != 3:
            return {"pooled": x.flatten(1)}
        return network.sequence(self.prefix if x.shape[1] > self.prefix else 0)(x)

    def _prefix(self, embedded: Tensor) -> int:
        """Return how many tokens come before those of patches, as the embeddings have them."""
        if embedded.ndim != 3:
            return 0
        prefix = embedded.shape[1] - (self.size // self.model.patch) ** 2
        if not 0 <= prefix <= PREFIX:  # patches overlap, or are merged
            return 0
        self.patch = self.model.patch
        return int(prefix)

    def _drop_what_is_not_run(self, pixels: Tensor) -> None:
        """Leave out the text tower, and whatever else images don't pass."""
        if self.call is self.module:
            return
        run: set[str] = set()
        children = dict(self.module.named_children())
        hooks = [
            part.register_forward_hook(lambda _m, _i, _o, name=name: run.add(name))
            for name, part in children.items()
        ]
        self._outputs(pixels, hidden=False)
        for hook in hooks:
            hook.remove()
        for name in children.keys() - run:
            delattr(self.module, name)

    def _check(self, name: str, pixels: Tensor) -> None:
        """Raise BackboneError for a model whose features are drawn anew each time."""
        found = []
        for seed in (0, 1):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                found.append(self._final(self._outputs(pixels, hidden=False)))
        if not found[0]:
            raise BackboneError(f"{name} gives no embedding or states of an image")
        if not all(v.isfinite().all() for v in found[0].values()):
            whole = self.module.named_parameters()
            bad = next((key for key, p in whole if not p.isfinite().all()), None)
            why = (
                f"its weights hold NaN or infinity, first in {bad}" if bad else "of finite weights"
            )
            raise BackboneError(f"{name} gives features that are not finite: {why}")
        if any(not torch.allclose(v, found[1][k], 1e-3, 1e-4) for k, v in found[0].items()):
            raise BackboneError(f"{name} gives other features of the same image each time")

    def _absent(self, name: str, pixels: Tensor) -> set[str]:
        """Return the parts that depend on weights which the model's file hasn't got."""
        known = dict(self.module.named_parameters())
        missing = {id(known[one]): one for one in self.model.missing if one in known}
        if not missing:
            return set()
        self.module.requires_grad_(True)
        with torch.enable_grad():
            parts = self._final(self._outputs(pixels, hidden=False))
        reached = {k: [missing[id(x)] for x in leaves([v], set()) if id(x) in missing]
                   for k, v in parts.items()}  # fmt: skip
        self.module.requires_grad_(False)
        if all(reached.values()):
            first = sorted(name for names in reached.values() for name in names)[0]
            raise BackboneError(
                f"{name}: its file has no {first}, on which every feature depends: "
                "want the weights of the whole image tower"
            )
        absent = {part for part, names in reached.items() if names}
        if absent:
            lost = sorted({one for names in reached.values() for one in names})
            warnings.warn(
                f"{name}: its file has no {lost[0]}, so that {', '.join(sorted(absent))} would be "
                "random and is left out",
                stacklevel=2,
            )
        return absent

    def _blocks(self, count: int) -> list[Any]:
        """Return the modules of the layers: of all lists of modules the one with as many."""
        lists = [m for m in self.module.modules() if isinstance(m, torch.nn.ModuleList)]
        found = next((m for m in lists if len(m) == count), None)
        return list(found) if found is not None else []


def _spec_of(name: str, model: Model, found: Network, own: Transform, patch: int) -> Spec:
    kind = type(model.module).__name__
    default = default_feature(found, str(getattr(model.config, "model_type", "")), name)
    native = getattr(model.vision, "image_size", own.size)
    return base.described(
        found,
        own,
        default,
        name=f"hf:{name}",
        family=kind,
        architecture=kind,
        params=base.count_params(model.module),
        params_counts="the vision model",
        native_size=int(native[0] if isinstance(native, list | tuple) else native),
        patch=patch,
        source=f"huggingface.co/{name}",
        loader="features.backbones.from_transformers:load_any",
    )
