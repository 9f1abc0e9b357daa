"""What a model's own library makes of images, beside what we make of their files.

Weights are random, each moved from its initial value; images are oblong files. Each of `timm_`,
`openclip` and `hf` writes what its library writes and gives the name to load it by, the weights
option, and the library's own two functions: from images to the embedding, and to a layer.
"""

import io
import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from references import stirred
from safetensors.torch import save_file

from features.backbones import load_backbone
from features.images import picture
from features.workers import ImageRecipe, crops

IMAGES = [picture(203, 297), picture(251, 170), picture(96, 130)]


@dataclass
class Case:
    """A model as its library has it."""

    name: str  # to load it by
    weights: str | None
    embed: Any  # of images, (N, D)
    layer: Any  # of normalised pixels and a number, (N, T, C) without prefix tokens
    image_size: int | None = None


def files():
    found = []
    for image in IMAGES:
        data = io.BytesIO()
        image.save(data, "PNG")
        found.append(data.getvalue())
    return found


def tokens(x):
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x


def apart(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def compared(case, pool=None):
    """Return how far our default feature, and a layer, are from the library's, and its number."""
    backbone = load_backbone(case.name, case.weights, case.image_size)
    recipe = ImageRecipe((backbone.transform,), exact=True)
    pixels = torch.stack([torch.from_numpy(np.array(crops(f, recipe)[0])) for f in files()])
    pixels = backbone.normalise(pixels, torch.float32)
    count = len(backbone.network.layers) - 1
    k = count // 2
    wanted = [pool or backbone.spec.default_feature]
    wanted += [f"block{k:02d}/tokens"] if count and case.layer else []
    with torch.inference_mode():
        found = backbone.network(pixels, wanted)
        both = [apart(found[wanted[0]], case.embed(IMAGES))]
        if len(wanted) > 1:
            both.append(apart(found[wanted[1]], case.layer(pixels, k)))
    return backbone, both


def timm_(name, size, folder, pool=None):
    """A model of timm by its file of weights, at another size if one is given."""
    import timm
    from timm.data import create_transform, resolve_model_data_config

    options = {}
    if size:
        with suppress(TypeError):
            timm.create_model(name, num_classes=0, img_size=size)
            options = {"img_size": size}
    torch.manual_seed(0)
    model = stirred(timm.create_model(name, num_classes=0, **options))
    save_file({k: v.clone() for k, v in model.state_dict().items()}, folder / "w.safetensors")
    config = resolve_model_data_config(model)
    if size:
        config["input_size"] = (3, size, size)
    transform = create_transform(**config, is_training=False)

    def pixels(images):
        return torch.stack([transform(image) for image in images])

    def embed(images):
        if pool == "cls":
            return model.forward_features(pixels(images))[:, 0]
        return model.forward_head(model.forward_features(pixels(images)), pre_logits=True)

    def layer(x, k):
        found = model.forward_intermediates(x, indices=[k], intermediates_only=True)
        return tokens(found[0])

    return Case(f"timm:{name}", str(folder / "w.safetensors"), embed, layer, size)


TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}


def openclip(vision, preprocess, folder, **config):
    """A folder as open_clip writes it, with a small configuration."""
    import open_clip

    whole = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": dict(TEXT), **config}
    made = {"model_cfg": whole, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(made))
    create = open_clip.create_model_and_transforms
    name = f"local-dir:{folder}"
    torch.manual_seed(0)
    model = stirred(open_clip.create_model(name, load_weights=False))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    model, _, transform = create(name)
    model.eval()

    def pixels(images):
        return torch.stack([transform(image) for image in images])

    def layer(x, k):
        return tokens(model.visual.forward_intermediates(x)["image_intermediates"][k])

    return Case(
        f"openclip:{name}",
        None,
        lambda images: model.encode_image(pixels(images), normalize=False),
        layer,
    )


def hf(kind, config, processor, folder, *, backend=None, first=True, flipped=False, **fields):
    """A folder as transformers writes it, of a small configuration and a processor's fields.

    backend "pil" has the library prepare images by Pillow, as we do, where its processor can. Of a
    class without a pooler the embedding is its class token if it comes first, else the mean.
    """
    import transformers

    made = getattr(transformers, f"{kind}Config")(**config)
    torch.manual_seed(0)
    stirred(getattr(transformers, f"{kind}Model")(made)).save_pretrained(folder)
    getattr(transformers, processor)(**fields).save_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    options = {"backend": backend} if backend else {}
    prepare = transformers.AutoImageProcessor.from_pretrained(folder, **options)

    masked = hasattr(made, "mask_ratio")
    if masked:
        model.config.mask_ratio = 0.0

    def run(pixels, **more):
        if masked:
            patches = torch.arange((pixels.shape[-1] // made.patch_size) ** 2)
            more["noise"] = patches.expand(len(pixels), -1).float()
        return getattr(model, "get_image_features", model)(pixel_values=pixels, **more)

    def embed(images):
        pixels = [prepare(image, return_tensors="pt")["pixel_values"] for image in images]
        out = run(torch.cat([x.as_subclass(torch.Tensor) for x in pixels]))
        if isinstance(out, torch.Tensor):
            return out
        found, last = getattr(out, "pooler_output", None), out.last_hidden_state
        if found is not None:
            return found.flatten(1)
        return last.mean((2, 3)) if last.ndim == 4 else last[:, 0] if first else last.mean(1)

    def layer(x, k):
        out = run(x.flip(1) if flipped else x, output_hidden_states=True)
        states = getattr(out, "reshaped_hidden_states", None) or out.hidden_states
        stages = getattr(made, "depths", None)
        found = states[k + (stages is None or len(stages) != len(states))]
        if found.ndim == 4:
            return tokens(found)
        patch = getattr(getattr(made, "vision_config", made), "patch_size", None)
        grid = (x.shape[-1] // patch) ** 2 if isinstance(patch, int) else found.shape[1]
        return found[:, max(0, states[0].shape[1] - grid) :]

    return Case(f"hf:{folder}", None, embed, layer)
