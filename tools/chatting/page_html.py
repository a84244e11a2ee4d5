"""The chat page: one document that loads nothing from a network; what it shows of media comes from the browser's own memory."""

from __future__ import annotations

import base64
import hashlib
import html
from importlib.resources import files

STYLE, SCRIPT = (files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "page.js"))


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; style-src {_digest(STYLE)}; script-src {_digest(SCRIPT)}; connect-src 'self'; img-src blob:; "
    "media-src blob:; base-uri 'none'; form-action 'none'"
)


def chat_page(title: str) -> str:
    """Return the whole document."""
    return (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        "<meta name=viewport content='width=device-width, initial-scale=1'>\n"
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{html.escape(title)}</h1><button id=new type=button>New conversation</button></header>\n"
        "<main id=rounds aria-live=polite></main>\n"
        "<form id=form><div id=attached></div>\n"
        "<textarea id=words rows=2 placeholder='Ask; drop or paste pictures, clips and videos' aria-label='Question'></textarea>\n"
        "<div class=buttons><label class=button>Attach<input id=files type=file multiple"
        " accept='image/*,audio/*,video/*'></label>\n"
        "<button id=record type=button>Record</button><span id=state role=status></span>\n"
        "<button id=send>Ask</button></div></form>\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
