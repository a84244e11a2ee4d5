"""Placeholders of media in a turn's text: finding, moving, removing and wrapping them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from model.media_spec import PLACEHOLDERS, READ_BY

KINDS = {token: kind for kind, token in PLACEHOLDERS.items()}
"""Kind of medium that each placeholder stands for."""

_PLACEHOLDER = re.compile("|".join(map(re.escape, KINDS)))


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


def with_tokens(content: str, tokens: Mapping[str, str], media_wrap: tuple[str, ...]) -> str:
    """Replace every placeholder by the token of the modality that reads its medium: both `<video>` and `<image>` are pictures.

    That of a picture or a video stands between the pair `media_wrap`, as LLaVA writes it, if there is one.
    """
    before, after = media_wrap or ("", "")

    def token(found: re.Match[str]) -> str:
        modality = READ_BY[KINDS[found[0]]]
        return before + tokens[modality] + after if modality == "image" else tokens[modality]

    return _PLACEHOLDER.sub(token, content)


def wrapped_pattern(tokens: Mapping[str, str], media_wrap: tuple[str, ...]) -> str:
    """Return a pattern that finds what `with_tokens` writes of pictures and videos."""
    before, after = media_wrap or ("", "")
    return re.escape(before + tokens["image"] + after)
