"""What a JSON value must look like, said by type hints: those of dataclasses and of TypedDicts.

Files that were edited, cut or made by someone else are checked by this where they are read, so that
nothing behind the door meets a value of another kind. Hints: str, int, float, bool, None, Any,
Literal, X | Y, list[X], tuple[X, ...], dict[str, X], Annotated[X, a rule], TypedDicts, dataclasses.
Names that a TypedDict hasn't got are let through, but checked as Any; a dataclass has no others.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from features.files import read_regular

LARGEST = 256 << 20  # bytes of a file
DEEPEST = 32  # values within values
WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
WORDS |= {dict: "an object", list: "a list", type(None): "null"}

Rule = Callable[[Any], str]  # what is wrong with a value, "" where nothing is


def parse(text: str | bytes) -> Any:
    """Return a JSON value. Raises ValueError for what is none: also NaN, and too deep nesting."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no number of JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} values") from None


def read_json(path: Path, hint: Any) -> Any:
    """Return what a JSON file says. Raises OSError, and ValueError where it isn't as the hint says.

    Only a regular file is opened: others may never end.
    """
    value = parse(read_regular(path, LARGEST)[0])
    check(value, hint)
    return value


def check(value: Any, hint: Any, name: str = "") -> None:
    """Raise ValueError for a value that isn't as its hint says: which, what was found, wanted."""
    _check(value, hint, name, 0)


def least(lowest: float) -> Rule:
    """Return the rule that a number is no less."""
    return lambda value: f"at least {lowest:g}" if value < lowest else ""


def above(lowest: float) -> Rule:
    """Return the rule that a number is more."""
    return lambda value: f"more than {lowest:g}" if value <= lowest else ""


def within(low: float, high: float) -> Rule:
    """Return the rule that a number lies between two others."""
    return lambda value: "" if low <= value <= high else f"{low:g} to {high:g}"


def filled(value: Any) -> str:
    """Want something in a list, an object or a text."""
    return "" if value else "something in it"


def distinct(value: list[str]) -> str:
    """Want no name twice in a list."""
    return "" if len(set(value)) == len(value) else "names that differ"


def one_path(value: str) -> str:
    """Want a text that an operating system takes for a path."""
    parts = value.replace("\\", "/").split("/")
    long = len(value.encode("utf-8", "surrogateescape")) > 4000 or max(map(len, parts)) > 255
    return "a path" if "\0" in value or long else ""


def inside(value: str) -> str:
    """Want a path that leads nowhere else than below the folder it is relative to."""
    parts = value.replace("\\", "/").split("/")
    away = value.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]
    return one_path(value) or ("a path within the folder" if away else "")


def fault(name: str, found: Any, wanted: str) -> ValueError:
    """Return the error of a value that isn't what was wanted."""
    shown = repr(found) if isinstance(found, str | int | float | None) else type_name(found)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return ValueError(f"{name or 'it'} is {shown}, want {wanted}")


def type_name(value: Any) -> str:
    """Return what a value is, in words."""
    return WORDS.get(type(value), type(value).__name__)


def _check(value: Any, hint: Any, name: str, depth: int) -> None:
    if depth > DEEPEST:
        raise ValueError(f"{name} is nested deeper than {DEEPEST} values")
    origin = get_origin(hint)
    if origin is NotRequired:
        _check(value, get_args(hint)[0], name, depth)
    elif origin is Annotated:
        _check(value, hint.__origin__, name, depth)
        for rule in hint.__metadata__:
            if value is not None and (wanted := rule(value)):
                raise fault(name, value, wanted)
    elif hint is Any:
        _any(value, name, depth)
    elif origin is Literal:
        if not any(value == one and type(value) is type(one) for one in get_args(hint)):
            raise fault(name, value, " or ".join(map(repr, get_args(hint))))
    elif origin in (Union, types.UnionType):
        _one_of(value, get_args(hint), name, depth)
    elif is_typeddict(hint) or is_dataclass(hint):
        _object(value, hint, name, depth)
    elif origin in (dict, Mapping) or hint is dict:
        if not isinstance(value, dict):
            raise fault(name, value, "an object")
        inner = (get_args(hint) or (str, Any))[1]
        for key, item in value.items():
            _check(key, str, f"a name in {name}", depth)
            _check(item, inner, f"{name}.{key[:40]}", depth + 1)
    elif origin in (list, tuple) or hint in (list, tuple):
        if not isinstance(value, list):
            raise fault(name, value, "a list")
        inner = (get_args(hint) or (Any,))[0]
        for k, item in enumerate(value):
            _check(item, inner, f"{name}[{k}]", depth + 1)
    else:
        _plain(value, type(None) if hint is None else hint, name)


def _plain(value: Any, hint: Any, name: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = number if hint is float else type(value) is hint
    if fits and hint in (int, float):
        fits = math.isfinite(value) if isinstance(value, float) else abs(value) < 1 << 63
    if not fits:
        large = hint is int and type(value) is int
        raise fault(name, value, "a whole number below 2^63" if large else WORDS[hint])
    if hint is str:
        try:
            value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise fault(name, ascii(value), "text of whole characters") from None


def _any(value: Any, name: str, depth: int) -> None:
    """Check what may be of any kind: numbers are finite, texts whole, nothing too deep."""
    if isinstance(value, dict):
        _check(value, dict[str, Any], name, depth)
    elif isinstance(value, list):
        _check(value, list[Any], name, depth)
    else:
        _plain(value, type(value), name)


def _one_of(value: Any, hints: tuple[Any, ...], name: str, depth: int) -> None:
    if value is None and type(None) in hints:
        return None
    rest = [hint for hint in hints if hint is not type(None)]
    if len(rest) == 1:
        return _check(value, rest[0], name, depth)
    for hint in rest:
        with suppress(ValueError):
            return _check(value, hint, name, depth)
    raise fault(name, value, " or ".join(WORDS.get(hint, str(hint)) for hint in hints))


@cache
def hints_of(record: Any) -> dict[str, Any]:
    """Return the hints of a dataclass or a TypedDict, evaluated."""
    return get_type_hints(record, include_extras=True)


def _object(value: Any, record: Any, name: str, depth: int) -> None:
    if not isinstance(value, dict):
        raise fault(name, value, "an object")
    hints = hints_of(record)
    if is_dataclass(record):
        wanted = {
            f.name for f in fields(record) if f.default is MISSING and f.default_factory is MISSING
        }
        if more := sorted(set(value) - set(hints)):
            raise ValueError(f"{name or 'it'} has {more[0][:40]!a}, which nothing reads")
    else:
        wanted = {key for key, hint in hints.items() if get_origin(hint) is not NotRequired}
    if gone := sorted(wanted - set(value)):
        raise ValueError(f"{name or 'it'} has no {gone[0]}")
    for key, item in value.items():
        _check(key, str, f"a name in {name or 'it'}", depth)
        _check(item, hints.get(key, Any), f"{name}.{key[:40]}" if name else key[:40], depth + 1)
