"""The page of runs: one document that loads nothing from a network and runs nothing that came with a run."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files

from model.files.untrusted import Json
from tools.watcher.run_view import RunView

STYLE, SCRIPT = (files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "page.js"))
MOST_POINTS, LEAST_POINTS = 600, 60
"""Points of a curve: more than a chart has columns of pixels, and what is left of them where there are very many curves."""
MOST_BYTES = 2 << 20
"""Bytes of the values of a page, which is to open at once."""
POLICY = "default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; connect-src {connect}; base-uri 'none'"


def values_text(runs: list[RunView], *, live: bool) -> str:
    """Return the values of all runs as JSON of at most about MOST_BYTES: curves get fewer points until they fit."""
    points = MOST_POINTS
    while True:
        found: list[Json] = [run.values(points, with_samples=not live) for run in runs]
        text = json.dumps({"runs": found}, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=str)
        if len(text.encode()) <= MOST_BYTES or points <= LEAST_POINTS:
            return text
        points //= 2


def policy(*, live: bool) -> str:
    """Return a content security policy that allows our style and script alone, by digest, and questions to our server if `live`."""
    style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (STYLE, SCRIPT))
    return POLICY.format(style=style, script=script, connect="'self'" if live else "'none'")


def run_page(values: str, title: str, *, live: bool) -> str:
    """Return the whole document. `values`: of `values_text`."""
    safe = values.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")  # no value can end the element
    return (
        f"<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        f'<meta http-equiv=Content-Security-Policy content="{policy(live=live)}">\n'
        "<meta name=viewport content='width=device-width, initial-scale=1'>\n"
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body data-live={'yes' if live else 'no'}>\n<header id=head></header>\n"
        "<div class=tools><div role=search>\n"
        "<label>Smoothing <input id=smooth type=range min=0 max=0.98 step=0.02 value=0.6></label>\n"
        "<label><input id=log type=checkbox> Logarithmic</label>\n"
        "<label>From step <input id=from type=number min=0 placeholder=0 inputmode=numeric></label>\n"
        "<span id=state role=status></span>\n</div></div>\n"
        "<main>\n<div id=charts></div>\n<div id=facts></div>\n</main>\n"
        f"<script id=values type=application/json>{safe}</script>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
