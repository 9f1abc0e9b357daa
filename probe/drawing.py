"""Hold a figure three times: as an SVG file, as a PNG file, and as SVG to be put into a page.

Words: the ink of a figure is its colours; on the page they become the page's own CSS colours, so
that a figure is readable on light and on dark. The same figure gives the same bytes.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design" (2008); CELL is their blue, deep enough for white numbers.
INK, MUTED, RULE, FOLD = "#1b1f24", "#5d6773", "#d9dde2", "#a3abb5"
BLUE, VERMILLION, CELL = "#0072b2", "#d55e00", "#00619a"
ON_PAGE = {INK: "ink", MUTED: "muted", RULE: "rule", FOLD: "fold", BLUE: "blue", VERMILLION: "mark"}

STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a class named "$x_1$" is a name, not a formula
    "svg.fonttype": "none",  # text stays text: searchable, and the browser shapes every script
    "svg.hashsalt": "medprobe",
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": FOLD,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FOLD,
    "ytick.color": FOLD,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "figure.dpi": 72,  # one SVG unit is one point
    "savefig.dpi": 220,
}

UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\u202a-\u202e\u2066-\u2069]"
)

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Drawing:
    """One figure: two files, its form for the page, and what it says in words."""

    svg: bytes
    png: bytes
    inline: str  # an <svg> element, safe to put into HTML
    alt: str
    width: float  # points


def printable(text: str) -> str:
    """Return `text` with spaces for line breaks, and a mark for what can't or mustn't be shown.

    That is what neither XML nor UTF-8 can hold, and the controls that turn the reading direction of
    what follows; right-to-left scripts need none of them.
    """
    return UNPRINTABLE.sub("\ufffd", re.sub(r"\s", " ", text))


@contextmanager
def style() -> Iterator[None]:
    """Draw by our own settings, whatever the user's matplotlibrc says, and put theirs back."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        # DejaVu Sans has no emoji; the PNG shows a box for one, the SVG shows it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def render(figure: Figure, key: str, alt: str) -> Drawing:
    """Save a figure; `key` keeps its ids apart from those of other figures on the page."""
    png, raw = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    figure.savefig(raw, format="svg")
    width = float(figure.get_figwidth()) * 72
    alt = printable(alt)
    svg = _tidy(raw.getvalue(), key, alt)
    file = b"<?xml version='1.0' encoding='utf-8'?>\n" + ElementTree.tostring(svg, encoding="utf-8")
    # Inlined, size and colours become the page's, the white ground goes, and so does the
    # stylesheet, which would reach out to the whole page.
    del svg.attrib["width"], svg.attrib["height"]
    next(svg.iter(f"{{{SVG}}}path")).set("style", "fill: none")
    for parent in list(svg.iter()):
        for sheet in parent.findall(f"{{{SVG}}}style"):
            parent.remove(sheet)
        if look := parent.get("style"):
            for colour, name in ON_PAGE.items():
                look = look.replace(colour, f"var(--{name})")
            parent.set("style", look)
    return Drawing(file, png.getvalue(), ElementTree.tostring(svg, encoding="unicode"), alt, width)


def _tidy(raw: bytes, key: str, alt: str) -> ElementTree.Element:
    """Name the picture, drop metadata and idle ids, and put `key` before the ids that are used."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    svg = ElementTree.fromstring(raw)
    for metadata in svg.findall(f"{{{SVG}}}metadata"):
        svg.remove(metadata)
    svg.set("role", "img")
    svg.set("aria-label", alt)
    used = set()
    for element in svg.iter():
        for name, value in element.attrib.items():
            if name == f"{{{XLINK}}}href":
                used.add(value.removeprefix("#"))
                element.set(name, f"#{key}-{value.removeprefix('#')}")
            elif name in ("clip-path", "style"):
                used.update(re.findall(r"url\(#([^)]+)\)", value))
                element.set(name, re.sub(r"url\(#", f"url(#{key}-", value))
    for element in svg.iter():
        if (identity := element.attrib.pop("id", None)) in used:
            element.set("id", f"{key}-{identity}")
    return svg
