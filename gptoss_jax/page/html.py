"""A page as one HTML file: its markup, styles, programs and data, none of which needs a network."""

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

from .packing import Packed

ASSETS = files(__package__) / "assets"
# Both of Observable, under the ISC licence, which the page quotes; plot.js needs d3 before it.
LIBRARIES = ("d3.min.js", "plot.umd.min.js")
PROGRAMS = (
    *("data.js", "address.js", "elements.js", "figure.js"),
    *("overview.js", "expert.js", "tradeoff.js", "compare.js", "answers.js", "main.js"),
)


def page(title: str, said: Mapping[str, Any], packed: Packed) -> str:
    """The file's content. Nothing of `said` is ever markup: the programs write it as text."""
    programs = [_asset(name) for name in LIBRARIES] + ['"use strict";\n' + "\n".join(map(_asset, PROGRAMS))]
    hashes = " ".join(f"'sha256-{_hash(program)}'" for program in programs)
    # No program but these runs, and nothing is fetched; pictures are drawn from what is on the page.
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'"
    )
    parts = {
        "policy": policy,
        "title": escape(title),
        "styles": _asset("page.css"),
        "licences": escape(_asset("LICENSES.txt")),
        "said": _in_script(json.dumps(said, allow_nan=False, separators=(",", ":"))),
        "arrays": packed.text(),
        "programs": "\n".join(f"<script>{program}</script>" for program in programs),
    }
    text = _asset("page.html")
    for name, part in parts.items():  # no part holds a later one's place: "<" is written otherwise in all that is given
        text = text.replace(f"<!--{name}-->", part)
    return text


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _in_script(text: str) -> str:
    """JSON that cannot end the element that it stands in."""
    return text.replace("<", "\\u003c")
