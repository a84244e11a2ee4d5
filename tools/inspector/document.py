"""Documents out of HTML files, which load nothing from a network and run nothing but their own script."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from string import Template


def page_file(package: str, name: str) -> str:
    """Return the text of a file of a page: HTML, style or script."""
    return files(package).joinpath(name).read_text(encoding="utf-8")


def policy_rules(style: str, script: str, *others: str) -> str:
    """Return a content security policy that allows this style and script alone, by digest, and what `others` say.

    So even a mistake in escaping could load nothing and run nothing.
    """
    of_style, of_script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    allowed = (f"style-src 'sha256-{of_style}'", f"script-src 'sha256-{of_script}'")
    return "; ".join(("default-src 'none'", *others, *allowed, "base-uri 'none'"))


def document(page: str, policy: str = "", **values: str) -> str:
    """Return the HTML `page` with a value, which is escaped already, in the place of each $name; $head names the `policy`."""
    head = Template(page_file(__package__, "head.html")).substitute(policy=policy)
    return Template(page).substitute(values, policy=policy, head=head.rstrip("\n"))
