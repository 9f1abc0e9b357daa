"""Families whose authors evaluate features otherwise than by what their library returns: a table.

Of every other model the default feature is `final/pooled`, the embedding that its library returns;
of one that has none, the class token, or the mean over the positions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from features.backbones.network import Network


@dataclass(frozen=True)
class Family:
    """pattern is searched in what a model calls its architecture and repository, in lower case."""

    pattern: str
    feature: str
    source: str


FAMILIES = (
    Family(
        r"dinov2|dinov3",
        "final/cls",
        "DINOv2 (arXiv:2304.07193) and DINOv3 (arXiv:2508.10104): k-NN and linear evaluation take"
        " the class token; --pool cls+mean is that of their larger linear evaluation",
    ),
    Family(
        r"\bvirchow",
        "final/cls+mean",
        "huggingface.co/paige-ai/Virchow2: class token and mean of the patch tokens, side by side",
    ),
)


def default_feature(network: Network, *names: str) -> str:
    """Return the feature that stands for an image, by what a model calls itself."""
    text = " ".join(names).lower()
    authors = [family.feature for family in FAMILIES if re.search(family.pattern, text)]
    tried = [*authors, "final/pooled", "final/cls", "final/mean"]
    return next(name for name in tried if name in network.features)
