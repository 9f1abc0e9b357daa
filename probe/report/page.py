"""Make the page: templates, the charts as data, and plotly, in one file that needs no other.

Scripts run by their hashes only (Content-Security-Policy), so nothing that a result says can
become one. plotly.js is embedded once, compressed: 1.5 MB instead of 4.8; every browser since 2023
unpacks it.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from probe.draw.tables import in_markdown, in_text, in_words, interval, p_value, power, score

TEMPLATES = Path(__file__).parent / "templates"


def page(template: str, **context: Any) -> str:
    """Render a template; HTML is escaped."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.policies["json.dumps_kwargs"] = {"ensure_ascii": True, "separators": (",", ":")}
    made.filters |= {
        "score": score,
        "power": power,
        "words": in_words,
        "md": in_markdown,
        "cell": in_text,
        "p": p_value,
    }
    made.globals |= {"interval": interval, "place": _place}
    return made.get_template(template).render(**context)


def scripts() -> dict[str, Any]:
    """Return the page's own script, plotly packed, and the policy that allows no other."""
    own = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    plotly, packed = _plotly()
    hashes = " ".join(f"'sha256-{_sha256(text)}'" for text in (own, plotly))
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"
    )
    return {"script": Markup(own), "plotly": packed, "policy": policy}


@cache
def _plotly() -> tuple[str, str]:
    """Return plotly.js and its gzip in base64."""
    from plotly.offline import get_plotlyjs

    text = get_plotlyjs()
    packed = gzip.compress(text.encode(), 9, mtime=0)
    return text, base64.b64encode(packed).decode()


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _place(value: float, lowest: float) -> str:
    """Return where a score stands between `lowest` and 1, in hundredths of the way."""
    return f"{np.interp(value, [lowest, 1.0], [2.0, 98.0]):.2f}"
