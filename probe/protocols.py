"""Named presets of probing: a table. Each row says where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from features.errors import ProbeError


@dataclass(frozen=True)
class Protocol:
    """The strengths C that are tried, and the folds that choose among them."""

    name: str
    C: tuple[float, ...]
    folds: int
    source: str


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="dinov2-logreg",
            C=tuple(float(c) for c in 10 ** np.linspace(-6, 5, 45)),
            folds=5,
            source="facebookresearch/dinov2, dinov2/eval/log_regression.py: no scaling, "
            "these 45 values of C; "
            "there a random 10 % of train chooses, here stratified folds by subject",
        ),
        Protocol(
            name="clip-readme",
            C=(0.316,),
            folds=5,
            source="openai/CLIP, README.md: C = 0.316 (the folds only report)",
        ),
    )
}


def find(name: str) -> Protocol:
    """Return a protocol by name. Raises ProbeError for an unknown one."""
    if name not in PROTOCOLS:
        raise ProbeError(f"unknown protocol {name!r}: want one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
