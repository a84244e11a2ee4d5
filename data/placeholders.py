"""Where placeholders of media stand in a turn's text."""

from __future__ import annotations

import re

from model.batch import PLACEHOLDERS

_PLACEHOLDER = re.compile("|".join(map(re.escape, PLACEHOLDERS.values())))


def placeholders_first(content: str) -> str:
    """Placeholders moved before the turn's words, each on a line of its own (LLaVA `preprocess_multimodal`, VITA)."""
    found = _PLACEHOLDER.findall(content)
    return ("".join(token + "\n" for token in found) + _PLACEHOLDER.sub("", content).strip()).strip() if found else content


def only_placeholders(content: str) -> str:
    """The placeholders without the words around them."""
    return "".join(_PLACEHOLDER.findall(content))


def wrap(content: str, media_wrap: tuple[str, ...]) -> str:
    """Every placeholder between the pair `media_wrap`, or the content as it is if there is no pair."""
    if not media_wrap:
        return content
    before, after = media_wrap
    return _PLACEHOLDER.sub(lambda found: before + found[0] + after, content)


def wrapped_pattern(media_wrap: tuple[str, ...]) -> str:
    """Finds what `wrap` writes."""
    before, after = map(re.escape, media_wrap or ("", ""))
    return f"{before}(?:{_PLACEHOLDER.pattern}){after}"
