"""A file of prompts: what each class of a data set, or each finding, is called in words.

As text, UTF-8, one line each, in any order; lines that are empty or begin with # don't count:

    a chest radiograph of {}.             a template, known by its {}; there may be several, or none
    healthy: healthy lungs | no finding   class: prompt, or several with | between them
    pneumonia: pneumonia

Every prompt goes into every template. Of findings (several labels per image) a line is `finding:
positive | negative`, such as `edema: pulmonary edema | no pulmonary edema`. As JSON (.json) the
same is {"templates": [...], "healthy": ["healthy lungs", "no finding"], "pneumonia": "pneumonia"}.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.errors import ProbeError
from features.files import read_regular
from features.manifest import digest

SLOT = "{}"
MOST = 1 << 22  # bytes of a file
TEMPLATES = "templates"  # the key of them in JSON
PREFIX = re.compile(r"templates?\s*:\s*", re.IGNORECASE)  # may stand before a template
UNTEXT = re.compile("[\0\ud800-\udfff]")  # what JSON can write and no text file can
QUOTES = ('""', "''")
Texts = tuple[str, ...]


@dataclass(frozen=True)
class Prompts:
    """Texts of each class, prompts within templates; negative is of findings, empty where none."""

    classes: Texts
    positive: tuple[Texts, ...]
    negative: tuple[Texts, ...] = ()

    @property
    def digest(self) -> str:
        """Return a hash of all texts, 16 hexadecimal digits, whatever the order of the file."""
        sides = (self.positive, self.negative)
        return digest([[sorted(texts) for texts in side] for side in sides])

    def texts(self) -> Texts:
        """Return every text once."""
        every = (text for side in (self.positive, self.negative) for one in side for text in one)
        return tuple(dict.fromkeys(every))


@dataclass(frozen=True)
class _Entry:
    """A line of a class: where it stands, and the prompts after its colon."""

    where: str
    name: str
    prompts: Texts


def read_prompts(path: Path, classes: Sequence[str], *, findings: bool) -> Prompts:
    """Return the prompts of a data set's classes, or findings, in their order.

    Raises ProbeError for a file that can't be read or isn't of this form, and names the classes
    that it misses, has twice, or that the data set hasn't got.
    """
    text = _text(path)
    try:
        parse = _from_json if path.suffix.lower() == ".json" else _from_lines
        templates, entries = parse(text, classes)
        _check_templates(templates)
        named = _by_class(entries, classes)
        if findings:
            return _of_findings(named, classes, templates)
        filled = tuple(_filled(named[name].prompts, templates) for name in classes)
        _check_apart(classes, filled)
        return Prompts(tuple(classes), filled)
    except ValueError as error:
        raise ProbeError(f"{path}: {error}") from None


def _text(path: Path) -> str:
    try:
        data = read_regular(path, MOST)[0]
    except OSError as error:
        raise ProbeError(
            f"{path}: the prompts can't be read ({error.strerror or error}); want a text file with "
            "a line `class: prompt` for every class"
        ) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ProbeError(
            f"{path}, line {line} is not UTF-8: save the file in that encoding"
        ) from None
    if "\0" in text:
        raise ProbeError(f"{path} is not UTF-8 text, it has zero bytes: save it in that encoding")
    return text


def _from_lines(text: str, classes: Sequence[str]) -> tuple[list[str], list[_Entry]]:
    """Return templates and classes' lines. A class's own name may hold colons."""
    templates, entries = [], []
    for number, line in enumerate(text.splitlines(), 1):
        line, where = line.strip(), f"line {number}"
        if not line or line.startswith("#"):
            continue
        own = [name for name in classes if re.match(re.escape(name) + r"\s*:", line)]
        if SLOT in line:
            if own:
                raise ValueError(
                    f"{where} has {SLOT} in the prompt of {own[0]}: a template is of all classes "
                    f"and stands on a line of its own; of one that begins like this, write "
                    f"`template: {line}`"
                )
            templates.append(_unquoted(PREFIX.sub("", line, count=1)))
            continue
        name = max(own, key=len) if own else line.partition(":")[0].strip()
        name, rest = (name, line[len(name) :].lstrip()[1:]) if own else (_unquoted(name), line)
        if not own:
            if ":" not in line:
                raise ValueError(
                    f"{where} is {line[:60]!r}: want `class: prompt`, or a template with {SLOT}"
                )
            rest = line.partition(":")[2]
        entries.append(_Entry(where, name, _parts(rest, where)))
    return templates, entries


def _from_json(text: str, classes: Sequence[str]) -> tuple[list[str], list[_Entry]]:
    def pairs(found: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        return found  # a dict would lose what stands twice

    try:
        found = json.loads(text, object_pairs_hook=pairs) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from None
    if not text.lstrip().startswith("{") and text.strip():
        raise ValueError('want an object, such as {"templates": [...], "class": "prompt"}')
    templates: list[str] = []
    entries = []
    for name, value in found:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
            raise ValueError(f"{name}: want a text or a list of texts")
        if odd := next((one for one in (name, *texts) if UNTEXT.search(one)), None):
            raise ValueError(f"{odd!a} has zeros or halves of characters: want words")
        if name == TEMPLATES and TEMPLATES not in classes:
            templates += [one.strip() for one in texts]
            continue
        where = json.dumps(name, ensure_ascii=False)
        prompts = _parts(value, where) if isinstance(value, str) else tuple(map(str.strip, texts))
        if not prompts or not all(prompts):
            raise ValueError(f"{where} has an empty prompt: want words")
        entries.append(_Entry(where, name, prompts))
    return templates, entries


def _parts(text: str, where: str) -> Texts:
    """Return the prompts of a line, which | parts."""
    found = tuple(_unquoted(part.strip()) for part in text.split("|"))
    if not all(found):
        raise ValueError(f"{where} has an empty prompt: want words after the colon and each |")
    return found


def _unquoted(text: str) -> str:
    """Return a text without the quotes around it, as one may have written them."""
    return text[1:-1].strip() if len(text) > 1 and text[0] + text[-1] in QUOTES else text


def _check_templates(templates: Sequence[str]) -> None:
    for template in templates:
        if template.count(SLOT) != 1:
            raise ValueError(f"template {template!r} has {template.count(SLOT)} {SLOT}, want one")
    if twice := _twice(templates):
        raise ValueError(f"template {twice!r} is there twice: take one out")


def _by_class(entries: Sequence[_Entry], classes: Sequence[str]) -> dict[str, _Entry]:
    """Return each class's entry. Raises ValueError, which names all that are missing or unknown."""
    if not entries:
        raise ValueError(f"it has no prompts: want `class: prompt` for {_some(classes)}")
    named: dict[str, _Entry] = {}
    for one in entries:
        if one.name in named:
            raise ValueError(
                f"{one.name} stands twice ({named[one.name].where} and {one.where}): want its "
                "prompts on one line, with | between them"
            )
        named[one.name] = one
        if twice := _twice(one.prompts):
            raise ValueError(f"{one.where} has the prompt {twice!r} twice: take one out")
        if brace := next((p for p in one.prompts if SLOT in p or re.search(r"\{\w*\}", p)), ""):
            raise ValueError(
                f"{one.where} has braces in {brace!r}: a template is written with {SLOT}, and "
                "stands by itself"
            )
    unknown = [name for name in named if name not in classes]
    missing = [name for name in classes if name not in named]
    if unknown or missing:
        said = [f"no class of this data set is called {_some(unknown)}"] if unknown else []
        said += [f"no prompt for {_some(missing)}"] if missing else []
        close = [difflib.get_close_matches(name, missing, 1, cutoff=0.7) for name in unknown]
        hint = "; ".join(f"{u} may be {c[0]}" for u, c in zip(unknown, close, strict=True) if c)
        raise ValueError("; ".join([*said, *filter(None, [hint])]) + f". Want {_some(classes)}")
    return named


def _of_findings(
    named: dict[str, _Entry], classes: Sequence[str], templates: Sequence[str]
) -> Prompts:
    """Return the prompts of findings: each has a positive one and, after |, its negative."""
    for name, one in named.items():
        if len(one.prompts) > 2:
            raise ValueError(
                f"{one.where} has {len(one.prompts)} prompts of {name}: images have several "
                "findings, want `finding: positive | negative`; several wordings go into templates"
            )
    sides = [
        tuple(_filled(named[name].prompts[k : k + 1], templates) for name in classes)
        for k in (0, 1)
    ]
    return Prompts(tuple(classes), *sides)


def _filled(prompts: Iterable[str], templates: Sequence[str]) -> Texts:
    return tuple(t.replace(SLOT, prompt) for prompt in prompts for t in templates or (SLOT,))


def _check_apart(classes: Sequence[str], filled: Sequence[Texts]) -> None:
    known: dict[tuple[str, ...], str] = {}
    for name, texts in zip(classes, filled, strict=True):
        same = known.setdefault(tuple(sorted(texts)), name)
        if same != name:
            raise ValueError(
                f"{same} and {name} have the same prompts: nothing would tell them apart"
            )


def _twice(texts: Sequence[str]) -> str:
    return next((text for i, text in enumerate(texts) if text in texts[:i]), "")


def _some(names: Sequence[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
