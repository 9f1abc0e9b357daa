"""What depends on a field of settings, said where the field is declared.

Settings are frozen dataclasses, and the numbers of a result depend on most of their fields. With
these fields a cell of `medprobe run` and a trained head are told from others; the fingerprint of a
store is made by fingerprint.py.

Fields declared by `without_effect` say where and how fast something is done. Those declared by
`of_run` change numbers, but are not part of what identifies a trained head's settings: how long it
is trained, which may be changed when a run goes on, and the seed, which an Identity has itself.
"""

from __future__ import annotations

from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Any

EFFECT = "effect"  # the key of a field's metadata
NONE, RUN = "none", "run"


def without_effect(default: Any) -> Any:
    """Declare a field that no number depends on."""
    return field(default=default, metadata={EFFECT: NONE})


def of_run(default: Any) -> Any:
    """Declare a field that changes numbers, but does not identify a trained head's settings."""
    return field(default=default, metadata={EFFECT: RUN})


def with_effect(settings: Any, *, leave_out: tuple[str, ...] = (NONE,)) -> dict[str, Any]:
    """Return the fields of settings on which numbers depend, as JSON values; nested ones too.

    leave_out: with (NONE, RUN) what is left identifies a trained head's settings.
    """
    kept = [one for one in fields(settings) if one.metadata.get(EFFECT) not in leave_out]
    return {one.name: _json(getattr(settings, one.name), leave_out) for one in kept}


def _json(value: Any, leave_out: tuple[str, ...]) -> Any:
    if is_dataclass(value):
        return with_effect(value, leave_out=leave_out)
    return str(value) if isinstance(value, Path) else value
