"""Where the weights of a model of timm are: its list, a repository of the hub, or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from features.backbones import base
from features.backbones.weights import read_state_dict
from features.errors import BackboneError


def classifiers(name: str) -> tuple[str, ...]:
    """Return what a model's classifiers are called."""
    found = _config(name).get("classifier") or ()
    return (found,) if isinstance(found, str) else tuple(found)


def _config(name: str) -> dict[str, Any]:
    """Return what timm knows of a model's weights: where they are, and their classifier."""
    import timm
    from timm.models import load_model_config_from_hf
    from timm.models._hub import load_model_config_from_path

    source, _, rest = name.partition(":")
    if source in ("hf-hub", "hf_hub"):
        return dict(load_model_config_from_hf(rest)[0])
    if source == "local-dir":
        return dict(load_model_config_from_path(rest)[0])
    config: Any = timm.get_pretrained_cfg(name)
    return dict(config.to_dict()) if config else {}


def published(name: str) -> dict[str, Tensor]:
    """Return published weights from the hub, which is cached, or a folder's; else what to get."""
    from timm.models import load_state_dict_from_hf

    source, _, rest = name.partition(":")
    if source == "local-dir":
        return read_state_dict(file_in(Path(rest)))
    where = rest if source in ("hf-hub", "hf_hub") else None
    try:
        with base.quiet():  # the hub's client logs every retry; the error says it once
            config = _config(name)
            where = where or config.get("hf_hub_id")
            if where is None:
                raise BackboneError(f"timm publishes no weights of {name}: give a --weights FILE")
            file = config.get("hf_hub_filename")
            named = {"filename": str(file)} if file else {}
            return dict(load_state_dict_from_hf(where, weights_only=True, **named))
    except BackboneError:
        raise
    # The hub's client raises its own errors, those of the library it fetches with, and OSError.
    except Exception as error:
        raise BackboneError(
            f"timm:{name}: the published weights can't be fetched ({type(error).__name__}). Get "
            f"them from https://huggingface.co/{where} and give the file with --weights FILE, or "
            "its folder as timm:local-dir:DIR. Where access must be asked for on that page, set "
            "the variable HF_TOKEN to your token"
        ) from None


def file_in(folder: Path) -> Path:
    """Return the file of weights in a folder: timm's own order of names."""
    from timm.models._hub import _PREFERRED_FILES

    found = [folder / name for name in _PREFERRED_FILES if (folder / name).is_file()]
    found += sorted(
        file for kind in ("safetensors", "pth", "bin") for file in folder.glob(f"*.{kind}")
    )
    if not found:
        raise BackboneError(
            f"{folder}: want config.json and a file of weights such as model.safetensors beside it"
        )
    return found[0]
