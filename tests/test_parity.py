"""The default feature of any model is its library's own embedding, on oblong images; layers too.

The models are a table; the code knows none of them by name. parity.py says what is compared.
"""

import warnings

import pytest
from parity import compared, hf, openclip, timm_

WITHIN = 2e-3  # of the largest value
# Models of timm, and the side of the images if not their own.
TIMM = dict.fromkeys(
    [
        "test_vit",
        "test_vit2",
        "test_vit3",
        "test_vit4",
        "test_vit_relpos",
        "test_resnet",
        "test_byobnet",
        "test_efficientnet",
        "test_efficientnet_ln",
        "test_efficientnet_evos",
        "test_convnext",
        "test_convnext2",
        "test_convnext3",
        "test_nfnet",
        "test_mambaout",
        "crossvit_tiny_240",
        "pit_ti_224",
        "efficientvit_m0",
        "efficientformer_l1",
        "coat_lite_tiny",
    ]
)
TIMM |= dict.fromkeys(
    [
        "deit3_small_patch16_224",
        "xcit_nano_12_p16_224",
        "cait_xxs24_224",
        "mobilenetv3_small_050",
        "regnetx_002",
        "resnet18",
        "ghostnet_050",
        "repghostnet_050",
        "mobilevit_xxs",
        "starnet_s050",
        "mobileone_s0",
        "efficientvit_b0",
        "tinynet_e",
        "hardcorenas_a",
        "poolformerv2_s12",
        "pvt_v2_b0",
    ],
    64,
)
TIMM |= dict.fromkeys(
    ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "edgenext_xx_small", "fastvit_t8"],
    96,
)
TIMM |= {"eva02_tiny_patch14_224": 70}
SLOW_TIMM = dict.fromkeys(
    [
        "swin_tiny_patch4_window7_224",
        "swinv2_tiny_window8_256",
        "maxvit_tiny_tf_224",
        "hiera_tiny_224",
        "mvitv2_tiny",
        "volo_d1_224",
        "samvit_base_patch16_224",
        "tiny_vit_5m_224",
        "levit_128s",
        "gcvit_xxtiny",
        "nest_tiny",
        "convit_tiny",
        "tnt_s_legacy_patch16_224",
        "vitamin_small_224",
    ]
)
SLOW_TIMM |= dict.fromkeys(
    [
        "vit_base_patch16_siglip_224",
        "beit_base_patch16_224",
        "convnext_tiny",
        "caformer_s18",
        "densenet121",
        "resnet18d",
        "tf_efficientnet_lite0",
        "davit_tiny",
        "focalnet_tiny_srf",
        "twins_svt_small",
        "vgg11",
        "inception_next_atto",
        "sequencer2d_s",
        "vit_medium_patch16_reg4_gap_256",
    ],
    64,
)
SLOW_TIMM |= {"vit_small_patch14_dinov2": 70, "vit_small_patch16_dinov3": 64}

VIT = {"layers": 3, "width": 48, "head_width": 16, "patch_size": 16, "image_size": 64}
SIGLIP = {"interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}


def trunk(name, pool="avg", proj="linear", size=64):
    return {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": size}


WORD = {"width": 32, "heads": 2, "layers": 1, "context_length": 8, "vocab_size": 50}
COCA = {"multimodal_cfg": WORD, "text_cfg": WORD | {"embed_cls": True, "output_tokens": True}}
COCA |= {"custom_text": True}
OPENCLIP = {  # image tower, preprocessing, more of the model's configuration
    "ViT": (VIT, {}, {}),
    "ViT, QuickGELU": (VIT, {}, {"quick_gelu": True}),
    "ViT, mean of tokens": ({**VIT, "pool_type": "avg"}, {"resize_mode": "longest"}, {}),
    "ViT, norm after pool": ({**VIT, "final_ln_after_pool": True, "pool_type": "avg"}, {}, {}),
    "ViT, attentional pool": ({**VIT, "attentional_pool": True, "attn_pooler_queries": 4,
                               "attn_pooler_heads": 4, "output_tokens": True}, {}, COCA),
    "ViT, no projection of text": (VIT, {"resize_mode": "squash"}, {"custom_text": True}),
    "RN50": ({"layers": [1, 1, 1, 1], "width": 16, "image_size": 64, "patch_size": None}, {}, {}),
    "SigLIP": (trunk("vit_tiny_patch16_224", "map", "none", 224),
               {**SIGLIP, "resize_mode": "squash"}, {}),
    "MobileCLIP": (trunk("fastvit_t8"), {"mean": [0] * 3, "std": [1] * 3}, {}),
    "EVA02": (trunk("eva02_tiny_patch14_224", "token", size=224), {}, {"custom_text": True}),
    "ConvNeXt": (trunk("test_convnext", "", "mlp"), {"interpolation": "bilinear"}, {}),
    "ResNet, rotary pool": (trunk("test_nfnet", "rot_attn", ""), {}, {}),
}  # fmt: skip

SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
SMALL |= {"intermediate_size": 96, "image_size": 64, "patch_size": 16}
WORDS = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "vocab_size": 60}
WORDS |= {"intermediate_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TWO = {"vision_config": SMALL, "text_config": WORDS}
MAPS = {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 2, 1], "image_size": 64}
HEADS = {"num_attention_heads": [1, 2, 5, 8]}
WINDOWS = {"image_size": 64, "embed_dim": 24, "depths": [1, 1, 2], "num_heads": [1, 2, 4]}
WINDOWS |= {"window_size": 4}


def both(side):
    return {"size": {"height": side, "width": side}}


def short(side, crop=None):
    return {"size": {"shortest_edge": side}} | (
        {"crop_size": {"height": crop, "width": crop}} if crop else {}
    )


VIT_PROCESSOR, CLIP_PROCESSOR = "ViTImageProcessor", "CLIPImageProcessor"
HF = {  # a class's configuration, processor, and the processor's fields
    "ViT": (SMALL, VIT_PROCESSOR, both(64)),
    "DeiT": (SMALL, "DeiTImageProcessor", both(72) | {"crop_size": both(64)["size"]}),
    "Dinov2": ({**SMALL, "patch_size": 14, "image_size": 70}, "BitImageProcessor", short(71, 56)),
    "Dinov2WithRegisters": ({**SMALL, "patch_size": 14, "image_size": 70}, "BitImageProcessor",
                            short(64, 56)),
    "DINOv3ViT": ({**SMALL, "image_size": 224, "num_register_tokens": 4},
                  "DINOv3ViTImageProcessor", both(224)),
    "Pixio": (SMALL, "BitImageProcessor", short(64, 64)),
    "Tipsv2Vision": ({**SMALL, "patch_size": 14, "image_size": 56}, "Tipsv2ImageProcessor",
                     both(56)),
    "SiglipVision": (SMALL, "SiglipImageProcessor", both(64)),
    "Siglip": (TWO, "SiglipImageProcessor", both(64)),
    "CLIPVision": (SMALL, CLIP_PROCESSOR, short(64, 64)),
    "CLIP": ({**TWO, "projection_dim": 40}, CLIP_PROCESSOR, short(64, 64)),
    "MetaClip2": ({**TWO, "projection_dim": 40}, CLIP_PROCESSOR, short(64, 64)),
    "ChineseCLIP": ({**TWO, "projection_dim": 40}, "ChineseCLIPImageProcessor", short(64, 64)),
    "Blip": ({**TWO, "projection_dim": 40, "image_text_hidden_size": 40}, "BlipImageProcessor",
             both(64)),
    "Beit": (SMALL, "BeitImageProcessor", both(64)),
    "Data2VecVision": (SMALL, "BeitImageProcessor", both(64)),
    "ViTMAE": (SMALL, VIT_PROCESSOR, both(64)),
    "ViTMSN": (SMALL, VIT_PROCESSOR, both(64)),
    "IJepa": (SMALL, VIT_PROCESSOR, both(64)),
    "Swin": (WINDOWS, VIT_PROCESSOR, both(64)),
    "Swinv2": (WINDOWS, VIT_PROCESSOR, both(64)),
    "ConvNext": (MAPS, "ConvNextImageProcessor", short(64)),
    "ConvNextV2": (MAPS, "ConvNextImageProcessor", {**short(64), "crop_pct": 0.95}),
    "ResNet": ({**MAPS, "embedding_size": 16}, "ConvNextImageProcessor", short(64)),
    "RegNet": ({**MAPS, "embedding_size": 16, "groups_width": 8}, "ConvNextImageProcessor",
               short(400)),
    "PoolFormer": (MAPS, "PoolFormerImageProcessor", short(64, 64)),
    "PvtV2": ({**MAPS, **HEADS}, "PvtImageProcessor", both(64)),
    "Segformer": ({**MAPS, **HEADS}, "SegformerImageProcessor", both(64)),
    "FocalNet": ({"image_size": 64, "embed_dim": 24, "depths": [1, 1, 1, 1]}, "BitImageProcessor",
                 short(64, 64)),
    "MobileNetV2": ({"image_size": 64, "depth_multiplier": 0.35}, "MobileNetV2ImageProcessor",
                    short(72, 64)),
    "MobileViT": ({"image_size": 64, "hidden_sizes": [24, 32, 40],
                   "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64]},
                  "MobileViTImageProcessor", short(72, 64)),
    "EfficientNet": ({"image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 0.5,
                      "hidden_dim": 640}, "EfficientNetImageProcessor",
                     {**both(64), "rescale_offset": True, "rescale_factor": 1 / 127.5}),
    "Levit": ({"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4],
               "depths": [1, 1, 1], "key_dim": [8, 8, 8]}, "LevitImageProcessor", short(64, 64)),
}  # fmt: skip
FLOATS = ("DINOv3ViT", "Tipsv2Vision")  # processors that resize floats: there is none by Pillow


def check(case):
    backbone, errors = compared(case)
    assert len(errors) == 2
    assert max(errors) < WITHIN, f"{backbone.spec.default_feature}: {errors}"
    return backbone


@pytest.mark.parametrize(
    "name", [*TIMM, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_TIMM)]
)
def test_models_of_timm(name, tmp_path):
    size = (TIMM | SLOW_TIMM)[name]
    pool = "cls" if "dinov" in name else None
    backbone = check(timm_(name, size, tmp_path, pool))
    assert backbone.spec.default_feature == ("final/cls" if pool else "final/pooled")


@pytest.mark.parametrize("name", OPENCLIP)
def test_image_towers_of_open_clip(name, tmp_path):
    vision, preprocess, more = OPENCLIP[name]
    backbone = check(openclip(vision, preprocess, tmp_path, **more))
    assert backbone.spec.default_feature == "final/pooled"


@pytest.mark.parametrize("kind", HF)
def test_models_of_transformers(kind, tmp_path):
    config, processor, fields = HF[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, as it builds and saves
        check(
            hf(
                kind,
                config,
                processor,
                tmp_path,
                backend=None if kind in FLOATS else "pil",
                first=kind != "IJepa",
                flipped=kind == "MobileViT",
                **fields,
            )
        )
