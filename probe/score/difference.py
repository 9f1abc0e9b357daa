"""The difference of two scores on two independent samples of subjects, with its interval.

The method of variance estimates recovery (MOVER; Zou & Donner 2008, Construction of confidence
limits about effect measures: a general approach; Newcombe 1998 for two proportions). The interval
of a difference is made of the two scores' own intervals, each of which resamples the subjects of
its sample, and so keeps what they know of bounds, few subjects and perfect scores:

    L = (a - b) - sqrt((a - a_low)^2 + (b_high - b)^2)
    U = (a - b) + sqrt((a_high - a)^2 + (b - b_low)^2)
"""

from __future__ import annotations

from collections.abc import Mapping
from math import hypot

METHOD = (
    "MOVER (Zou & Donner 2008) of both scores' intervals, each by resampling its own subjects; "
    "the two samples are taken as independent"
)


def independent_difference(
    a: Mapping[str, float | None], b: Mapping[str, float | None]
) -> dict[str, float | None]:
    """Return a - b: {"value", "ci_low", "ci_high"} of two such scores; None where not defined."""
    one, low_a, high_a = (a.get(key) for key in ("value", "ci_low", "ci_high"))
    two, low_b, high_b = (b.get(key) for key in ("value", "ci_low", "ci_high"))
    found: dict[str, float | None] = dict.fromkeys(("value", "ci_low", "ci_high"))
    if one is None or two is None:
        return found
    found["value"] = one - two
    if low_a is not None and high_a is not None and low_b is not None and high_b is not None:
        found["ci_low"] = one - two - hypot(one - low_a, high_b - two)
        found["ci_high"] = one - two + hypot(high_a - one, two - low_b)
    return found
