"""Hold a figure twice, as an SVG and as a PNG file. The same figure gives the same bytes."""

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
# In this order two neighbours differ for every kind of colour vision; the page has the same.
PALETTE = (BLUE, "#e69f00", "#009e73", "#cc79a7", VERMILLION, "#56b4e9", "#7a6a00", "#4b3c8f")

STYLE: dict[Any, Any] = {
    "text.hinting": "none",  # text is as wide in one file as in the other
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
    "savefig.dpi": 180,
}

UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\u202a-\u202e\u2066-\u2069]"
)

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Drawing:
    """One figure as two files, and what it says in words."""

    svg: bytes
    png: bytes
    alt: str


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


def render(figure: Figure, alt: str) -> Drawing:
    """Save a figure; it is laid out once, with the PNG, for both files."""
    png, raw = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None}, pil_kwargs={"compress_level": 4})
    figure.set_layout_engine(None)  # "none" would stand for one, and draw everything twice
    figure.savefig(raw, format="svg")
    alt = printable(alt)
    svg = ElementTree.tostring(_tidy(raw.getvalue(), alt), encoding="utf-8")
    return Drawing(b"<?xml version='1.0' encoding='utf-8'?>\n" + svg, png.getvalue(), alt)


def _tidy(raw: bytes, alt: str) -> ElementTree.Element:
    """Name the picture, and drop metadata and idle ids."""
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
            elif name in ("clip-path", "style", "fill"):
                used.update(re.findall(r"url\(#([^)]+)\)", value))
    for element in svg.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
    return svg
