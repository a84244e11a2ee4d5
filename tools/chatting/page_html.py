"""The chat page: one document that loads nothing from a network; what it shows of media comes from the browser's own memory."""

from __future__ import annotations

import html

from tools.inspector.document import document, page_file, policy_rules

PAGE, STYLE, SCRIPT = (page_file(__package__, name) for name in ("page.html", "style.css", "page.js"))
POLICY = policy_rules(STYLE, SCRIPT, "connect-src 'self'", "img-src blob:", "media-src blob:", "form-action 'none'")


def chat_page(title: str) -> str:
    """Return the whole document."""
    return document(PAGE, title=html.escape(title), style=STYLE, script=SCRIPT)
