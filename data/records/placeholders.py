"""Placeholders of media in a turn's text: finding, moving, removing and wrapping them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from model.media_spec import PLACEHOLDERS, READ_BY

KINDS = {token: kind for kind, token in PLACEHOLDERS.items()}
"""Kind of medium that each placeholder stands for."""

_PLACEHOLDER = re.compile("|".join(map(re.escape, KINDS)))
_SEEN = re.compile("|".join(re.escape(token) for kind, token in PLACEHOLDERS.items() if READ_BY[kind] == "image"))


def kinds_in(content: str) -> list[str]:
    """Return the kinds of media that the placeholders of `content` stand for, in reading order."""
    return [KINDS[token] for token in _PLACEHOLDER.findall(content)]


def leading_placeholders(kinds: Iterable[str]) -> str:
    """Return placeholders as they stand before a turn's words: seen media on lines of their own, heard ones without (VITA)."""
    return "".join(PLACEHOLDERS[kind] + ("\n" if READ_BY[kind] == "image" else "") for kind in kinds)


def placeholders_first(content: str) -> str:
    """Move placeholders of every kind before the turn's words, in their order (LLaVA `preprocess_multimodal`, VITA)."""
    found = kinds_in(content)
    return (leading_placeholders(found) + _PLACEHOLDER.sub("", content).strip()).strip() if found else content


def without_placeholders(content: str) -> str:
    """Return the words, with a space in place of each placeholder."""
    return _PLACEHOLDER.sub(" ", content)


def only_placeholders(content: str) -> str:
    """Return the placeholders without the words around them."""
    return "".join(_PLACEHOLDER.findall(content))


def by_modality(content: str) -> str:
    """Replace every placeholder by that of the modality that reads its medium: `<video>` becomes `<image>`."""
    return _PLACEHOLDER.sub(lambda found: PLACEHOLDERS[READ_BY[KINDS[found[0]]]], content)


def wrap(content: str, media_wrap: tuple[str, ...]) -> str:
    """Put every placeholder of a picture or a video between the pair `media_wrap`, as LLaVA does; without a pair, do nothing."""
    if not media_wrap:
        return content
    before, after = media_wrap
    return _SEEN.sub(lambda found: before + found[0] + after, content)


def wrapped_placeholders(media_wrap: tuple[str, ...]) -> list[str]:
    """Return the texts that `wrap` writes for placeholders."""
    before, after = media_wrap or ("", "")
    return [before + token + after for kind, token in PLACEHOLDERS.items() if READ_BY[kind] == "image"]
