"""The reference implementations of the study's backbones, each with its official file's layout.

`REFERENCES[name](size)` gives a function from pixels to {"default", "tokens"}, and what
`torch.save` is to write as the published file would be. Weights are random, every one of them moved
from its initial value, so that no difference hides behind zeros and ones.
"""

from functools import partial

import timm
import torch
from seem_reference import Reference as Seem
from torch import nn


def stirred(module, seed=0):
    """Give every tensor of a module a random part; running variances stay positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor += 0.3 * noise.abs() if name.endswith("running_var") else 0.02 * noise
    return module.eval()


def listening(module, layer, found):
    """Run a module and keep what a layer gave."""
    layer.register_forward_hook(lambda _module, _inputs, output: found.append(output))

    def run(x):
        found.clear()
        return module(x)

    return run


def sam(size):
    from segment_anything.modeling import ImageEncoderViT

    def encoder(side):
        return ImageEncoderViT(
            img_size=side, depth=12, embed_dim=768, num_heads=12, patch_size=16, out_chans=256,
            norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=14,
            global_attn_indexes=(2, 5, 8, 11),
        )  # fmt: skip

    native = stirred(encoder(1024))
    reference = native
    if size != 1024:  # segment-anything has no rule for other sizes: Medprobe's is timm's
        reference = encoder(size).eval()
        state = native.state_dict()
        table = state["pos_embed"].permute(0, 3, 1, 2)
        table = nn.functional.interpolate(table, size=size // 16, mode="bicubic", antialias=True)
        state["pos_embed"] = table.permute(0, 2, 3, 1)
        for name, tensor in state.items():  # its relative positions it resamples as it runs
            owner, _, leaf = name.rpartition(".")
            getattr(reference.get_submodule(owner), leaf).data = tensor
    found = []
    run = listening(reference, reference.blocks[-1], found)

    def features(x):
        run(x)
        return {"default": found[0].mean((1, 2)), "tokens": found[0].flatten(1, 2)}

    official = {f"image_encoder.{k}": v for k, v in native.state_dict().items()}
    beside = {"prompt_encoder.no_mask_embed.weight": torch.zeros(1, 256)}
    return features, official | beside | {"mask_decoder.iou_token.weight": torch.zeros(1, 256)}


def seem(size):
    reference = stirred(Seem())

    def features(x):
        last = reference(x)[-1]
        last = last if last.shape[1] == 768 else last.permute(0, 3, 1, 2)
        return {"default": last.mean((2, 3)), "tokens": last.flatten(2).transpose(1, 2)}

    official = {f"backbone.{k}": v for k, v in reference.state_dict().items()}
    return features, official | {"sem_seg_head.predictor.query_feat.weight": torch.zeros(2, 2)}


def dinov2(size):
    from transformers import Dinov2Config, Dinov2Model

    reference = stirred(Dinov2Model(Dinov2Config(image_size=518, patch_size=14)))
    found = []
    run = listening(reference, reference.encoder.layer[-1], found)

    def features(x):
        pooled = run(x).pooler_output
        block = found[0][0] if isinstance(found[0], tuple) else found[0]
        return {"default": pooled, "tokens": block[:, 1:]}

    words = {
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.cls_token": "cls_token",
        "embeddings.mask_token": "mask_token",
        "encoder.layer.": "blocks.",
        "attention.o_proj": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "layernorm": "norm",
    }
    return features, joined_qkv(renamed(reference.state_dict(), words))


def joined_qkv(state):
    """Join query, key and value to one tensor, as ViTs of the DINO family keep them."""
    out = {}
    for name, tensor in state.items():
        for part in ("q", "k", "v"):
            mark = f"attention.{part}_proj"
            if mark in name:
                if part == "q":
                    both = [state[name.replace(mark, f"attention.{p}_proj")] for p in "qkv"]
                    out[name.replace(mark, "attn.qkv")] = torch.cat(both)
                break
        else:
            out[name] = tensor
    return out


def renamed(state, words):
    out = {}
    for name, tensor in state.items():
        new = name
        for a, b in words.items():
            new = new.replace(a, b)
        out[new] = tensor
    return out


def openclip(size):
    import open_clip

    def clip(side):
        return open_clip.create_model("ViT-B-16", load_weights=False, force_image_size=side)

    model = stirred(clip(224))
    reference = model
    if size != 224:
        reference = clip(size).eval()
        state = model.state_dict()
        open_clip.model.resize_pos_embed(state, reference)
        reference.load_state_dict(state)
    reference.visual.output_tokens = True

    def features(x):
        pooled, tokens = reference.visual(x)
        return {"default": pooled, "tokens": tokens}

    return features, model.state_dict()


def blip(size):
    from transformers import BlipVisionConfig, BlipVisionModel

    # eps is that of BLIP's own vit.py; the conversions to transformers keep its default, 1e-5.
    reference = stirred(BlipVisionModel(BlipVisionConfig(image_size=224, layer_norm_eps=1e-6)))

    def features(x):
        whole = reference(x, interpolate_pos_encoding=True).last_hidden_state
        return {"default": whole[:, 0], "tokens": whole[:, 1:]}

    words = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "encoder.layers.": "blocks.",
        "self_attn.qkv": "attn.qkv",
        "self_attn.projection": "attn.proj",
        "layer_norm": "norm",
        "post_layernorm": "norm",
    }
    state = renamed(reference.state_dict(), words)
    official = {f"visual_encoder.{k}": v for k, v in state.items()}
    return features, {"model": official | {"text_decoder.cls.predictions.bias": torch.zeros(3)}}


def timm_vit(size, wrap):
    """ViT-B/16 as timm has it, which takes other sizes by its own rule."""
    reference = stirred(timm.create_model("vit_base_patch16_224", dynamic_img_size=True))

    def features(x):
        whole = reference.forward_features(x)
        return {"default": whole[:, 0], "tokens": whole[:, 1:]}

    return features, wrap(reference.state_dict())


def deit(size):
    return timm_vit(size, lambda state: {"model": state})


def dino(size):
    def wrap(state):
        trunk = {k: v for k, v in state.items() if not k.startswith("head.")}
        head = {"module.head.mlp.0.weight": torch.zeros(2, 2)}
        teacher = {f"module.backbone.{k}": v for k, v in trunk.items()} | head
        student = {k: torch.zeros_like(v) for k, v in teacher.items()}
        return {"student": student, "teacher": teacher, "epoch": 100}

    return timm_vit(size, wrap)


def resnet152(size):
    from torchvision.models import resnet152 as build

    reference = stirred(build(weights=None))
    found = []
    run = listening(reference, reference.layer4, found)

    def features(x):
        run(x)
        return {"default": found[0].mean((2, 3)), "tokens": found[0].flatten(2).transpose(1, 2)}

    return features, reference.state_dict()


REFERENCES = {f.__name__: f for f in (sam, seem, dinov2, openclip, blip, deit, dino, resnet152)}
