"""The page of runs: one document that loads nothing from a network and runs nothing that came with a run."""

from __future__ import annotations

import html
import json

from model.files.untrusted import Json
from tools.inspector.document import document, page_file, policy_rules
from tools.watcher.run_view import RunView

PAGE, STYLE, SCRIPT = (page_file(__package__, name) for name in ("page.html", "style.css", "page.js"))
MOST_POINTS, LEAST_POINTS = 600, 60
"""Points of a curve: more than a chart has columns of pixels, and what is left of them where there are very many curves."""
MOST_BYTES = 2 << 20
"""Bytes of the values of a page, which is to open at once."""


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
    return policy_rules(STYLE, SCRIPT, "connect-src 'self'" if live else "connect-src 'none'")


def run_page(values: str, title: str, *, live: bool) -> str:
    """Return the whole document. `values`: of `values_text`."""
    safe = values.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")  # no value can end the element
    rules, name = policy(live=live), html.escape(title)
    return document(PAGE, policy=rules, title=name, style=STYLE, script=SCRIPT, live="yes" if live else "no", values=safe)
