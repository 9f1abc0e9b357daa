"""Backbones by the names that people use: a table of how each one's authors load it.

A row says by which library and from where it is loaded, and what its authors say beside what is in
its repository. The facts are from the code and pages that `source` names. What only code of the
authors' own can load is not here; docs/backbones.md says which these are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MODALITIES = ("general", "xray", "fundus", "derm", "histology", "ct")
LIBRARIES = {
    "timm": "features.backbones.any_timm",
    "openclip": "features.backbones.any_open_clip",
    "hf": "features.backbones.from_transformers",
}
ROUTES = LIBRARIES | {"conch": "features.backbones.from_conch"}  # of rows of this table alone
HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class Build:
    """How authors build a timm model beside what its configuration says.

    options: of timm.create_model, classes by where they are. Of a file's tensors those are left out
    that begin with one of `drop`; those that begin with one of `initial` are not in it, and keep
    the values of a new norm, ones and zeros.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    initial: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shape:
    """What tells a folder of one model from another's: its feature, blocks or stages, and patch.

    width: of the default feature. patch: the side in pixels; 0 where the library doesn't say it.
    kind: how the names of its classes begin in transformers.
    """

    width: int
    layers: int
    patch: int = 0
    kind: str = ""


@dataclass(frozen=True)
class Known:
    """A backbone by a name that people use.

    route: as any other model is named. modality: what it was trained on, of MODALITIES. feature:
    what its authors evaluate, "" where that is the default of the route. file: where weights are
    that are a file only, a URL of the hub or the page to get it from. pixels: fields of Transform
    in which its authors' preparation is another than the route's, at the route's own size. shape:
    of models that come with their configuration, which a folder may not have; a file is loaded into
    an architecture that is fixed. note: what is not as with its authors.
    """

    name: str
    route: str
    modality: tuple[str, ...]
    licence: str
    source: str
    gated: bool = False
    feature: str = ""
    file: str = ""
    build: Build = Build()
    pixels: Mapping[str, Any] = field(default_factory=dict)
    shape: Shape | None = None
    note: str = ""

    @property
    def repository(self) -> str:
        """Return ORG/NAME of the hub where its weights are, or "" where they are elsewhere."""
        if self.file:
            place = self.file.removeprefix(HUB) if self.file.startswith(HUB) else ""
            return "/".join(place.split("/")[:2]) if place else ""
        return self.route.rpartition(":")[2]

    @property
    def access(self) -> str:
        """Return how its weights are had: "asked for" on their page, "open", or by a "file"."""
        return "asked for" if self.gated else "open" if self.repository else "file"

    @property
    def page(self) -> str:
        """Return the page to get its weights from, where access is asked for if it is gated."""
        return HUB + self.repository if self.repository else self.file


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SWIGLU = {"mlp_layer": "timm.layers.SwiGLUPacked", "act_layer": "torch.nn.SiLU"}
EVERY = ("xray", "fundus", "derm", "histology", "ct")
EVA_X = {"patch_size": 16, "ref_feat_shape": (14, 14)}
EVA_X_PIXELS = {"mean": (0.49185243,) * 3, "std": (0.28509309,) * 3, "resize": 256}
EVA_X_SOURCE = "github.com/hustvl/EVA-X: eva_x.py, classification/utils/datasets.py"
MAE = Build({"global_pool": "avg"}, drop=("decoder_", "mask_token", "norm."), initial=("fc_norm.",))
RETFOUND = "github.com/rmaphoh/RETFound_MAE: models_vit.py (global_pool), util/datasets.py"
DINOV3 = "github.com/facebookresearch/dinov3"
TIMM, HF, CLIP = "timm:hf-hub:", "hf:", "openclip:hf-hub:"

KNOWN = {
    row.name: row
    for row in (
        *(
            Known(name, f"{HF}facebook/{name}-pretrain-lvd1689m", ("general",), "DINOv3 License",
                  DINOV3, gated=True, shape=shape)
            for name, shape in (
                ("dinov3-vits16", Shape(384, 12, 16, "DINOv3ViT")),
                ("dinov3-vitb16", Shape(768, 12, 16, "DINOv3ViT")),
                ("dinov3-vitl16", Shape(1024, 24, 16, "DINOv3ViT")),
                ("dinov3-convnext-tiny", Shape(768, 4, kind="DINOv3ConvNext")),
                ("dinov3-convnext-base", Shape(1024, 4, kind="DINOv3ConvNext")),
            )
        ),
        *(
            Known(name, f"{HF}google/{repository}", ("general",), "Apache-2.0",
                  "arXiv:2502.14786; huggingface.co/docs/transformers, SigLIP2", shape=shape)
            for name, repository, shape in (
                ("siglip2-base", "siglip2-base-patch16-224", Shape(768, 12, 16, "Siglip")),
                ("siglip2-so400m", "siglip2-so400m-patch14-384", Shape(1152, 27, 14, "Siglip")),
            )
        ),
        Known("biomedclip", f"{CLIP}microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
              EVERY, "MIT", "arXiv:2303.00915; its model card", shape=Shape(512, 12, 16)),
        Known("medsiglip", f"{HF}google/medsiglip-448", EVERY,
              "Health AI Developer Foundations", "github.com/Google-Health/medsiglip", gated=True,
              shape=Shape(1152, 27, 14, "Siglip"),
              note="images are resized by its processor; its authors' own evaluation resized them "
                   "by tf.image.resize without antialiasing"),
        Known("medsam", "timm:samvit_base_patch16", EVERY, "Apache-2.0",
              "github.com/bowang-lab/MedSAM: MedSAM_Inference.py",
              file="https://github.com/bowang-lab/MedSAM",
              pixels={"mean": (0.0,) * 3, "std": (1.0,) * 3, "fit": "squash", "resize": 1024,
                      "interpolation": "bicubic"},
              note="images are scaled by 255, not from their own least to their largest value; "
                   "the embedding is the mean over the encoder's map"),
        Known("rad-dino", f"{HF}microsoft/rad-dino", ("xray",), "MIT",
              "arXiv:2401.10815; its model card (pooler_output)",
              shape=Shape(768, 12, 14, "Dinov2")),
        *(
            Known(f"eva-x-{size}", f"timm:eva02_{size}_patch14_224", ("xray",), "MIT",
                  EVA_X_SOURCE, build=Build(EVA_X), pixels=EVA_X_PIXELS,
                  file=f"{HUB}MapleF/eva_x/resolve/main/eva_x_{size}_patch16_merged520k_mim.pt")
            for size in ("tiny", "small", "base")
        ),
        Known("chexzero", "openclip:ViT-B-32-quickgelu", ("xray",), "MIT",
              "github.com/rajpurkarlab/CheXzero: zero_shot.py, data_process.py",
              file="https://github.com/rajpurkarlab/CheXzero",
              pixels={"mean": (101.48761 / 255,) * 3, "std": (83.43944 / 255,) * 3, "fit": "pad",
                      "resize": 224},
              note="images are padded and resized to 224 pixels at once, not by way of 320"),
        *(
            Known(name, "timm:vit_large_patch16_224", ("fundus",), "CC-BY-NC-4.0", RETFOUND,
                  gated=True, build=MAE, pixels={**IMAGENET, "resize": 256, "fit": "crop"},
                  file=f"{HUB}YukunZhou/{file}/resolve/main/{file}.pth")
            for name, file in (("retfound", "RETFound_mae_natureCFP"),
                               ("retfound-oct", "RETFound_mae_natureOCT"))
        ),
        Known("uni", f"{TIMM}MahmoodLab/UNI", ("histology",), "CC-BY-NC-ND-4.0",
              "github.com/mahmoodlab/UNI: README.md", gated=True,
              build=Build({"init_values": 1e-5, "dynamic_img_size": True}),
              shape=Shape(1024, 24, 16)),
        Known("uni2-h", f"{TIMM}MahmoodLab/UNI2-h", ("histology",), "CC-BY-NC-ND-4.0",
              "github.com/mahmoodlab/UNI: README.md", gated=True,
              build=Build({"img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24,
                           "init_values": 1e-5, "embed_dim": 1536, "mlp_ratio": 2.66667 * 2,
                           "no_embed_class": True, "reg_tokens": 8, "dynamic_img_size": True,
                           **SWIGLU}), shape=Shape(1536, 24, 14)),
        Known("virchow", f"{TIMM}paige-ai/Virchow", ("histology",), "Apache-2.0",
              "huggingface.co/paige-ai/Virchow", gated=True, feature="final/cls+mean",
              build=Build(SWIGLU), shape=Shape(2560, 32, 14)),
        Known("virchow2", f"{TIMM}paige-ai/Virchow2", ("histology",), "CC-BY-NC-ND-4.0",
              "huggingface.co/paige-ai/Virchow2", gated=True, feature="final/cls+mean",
              build=Build(SWIGLU), shape=Shape(2560, 32, 14)),
        Known("prov-gigapath", f"{TIMM}prov-gigapath/prov-gigapath", ("histology",), "Apache-2.0",
              "github.com/prov-gigapath/prov-gigapath: README.md", gated=True,
              feature="final/pooled", shape=Shape(1536, 40, 16),
              pixels={**IMAGENET, "resize": 256, "interpolation": "bicubic", "fit": "crop"}),
        Known("h-optimus-0", f"{TIMM}bioptimus/H-optimus-0", ("histology",), "Apache-2.0",
              "huggingface.co/bioptimus/H-optimus-0", gated=True, feature="final/pooled",
              shape=Shape(1536, 40, 14),
              build=Build({"init_values": 1e-5, "dynamic_img_size": False}),
              pixels={"mean": (0.707223, 0.578729, 0.703617),
                      "std": (0.211883, 0.230117, 0.177517), "resize": 224, "fit": "crop"},
              note="other images than of 224 pixels are resized and cropped first"),
        Known("phikon", f"{HF}owkin/phikon", ("histology",), "Owkin non-commercial",
              "github.com/owkin/HistoSSLscaling", feature="final/cls",
              shape=Shape(768, 12, 16, "ViT")),
        Known("phikon-v2", f"{HF}owkin/phikon-v2", ("histology",), "Owkin non-commercial",
              "arXiv:2409.09173; its model card (class token)", feature="final/cls",
              shape=Shape(1024, 24, 16, "Dinov2")),
        Known("conch", "conch:ViT-B-16", ("histology",), "CC-BY-NC-ND-4.0",
              "github.com/mahmoodlab/CONCH: README.md (proj_contrast=False)", gated=True,
              file=f"{HUB}MahmoodLab/conch/resolve/main/pytorch_model.bin"),
        Known("plip", f"{HF}vinid/plip", ("histology",), "see the model's card",
              "github.com/PathologyFoundation/plip: README.md", shape=Shape(512, 12, 32, "CLIP")),
        Known("dermlip", f"{CLIP}redlessone/DermLIP_ViT-B-16", ("derm",), "CC-BY-NC-4.0",
              "github.com/SiyuanYan1/Derm1M: README.md", shape=Shape(512, 12, 16)),
        Known("monet", f"{HF}chanwkim/monet", ("derm",), "CC-BY-NC-SA-4.0",
              "github.com/suinleelab/MONET: README.md", shape=Shape(768, 24, 14, "CLIP")),
    )
}  # fmt: skip
