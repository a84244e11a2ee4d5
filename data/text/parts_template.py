"""Chat templates that read contents as lists of parts: a prelude turns the strings of records into the parts that they take.

Templates of published multimodal models write a medium's placeholder themselves, for a part `{"type": "image"}`, and most of them
drop a content that is a string.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerFast

from data.text.chat_formats import FORMATS, freeze_date, jinja_file, with_answer_end
from data.text.render import RenderError, apply
from model.errors import ConfigError
from model.media_spec import PLACEHOLDERS

_WORD = "qzword"
# A placeholder stands on a line of its own in records; the line breaks beside it belong to it, and the template writes its own.
PRELUDE = jinja_file(__package__, "parts_prelude.jinja")
_STRING = "message['content'] is string"
_ELSE = "{%- else -%}{%- set flat.messages"
USER_PRELUDE = PRELUDE.replace(_STRING, f"{_STRING} and message['role'] == 'user'").replace(
    _ELSE,
    "{%- elif message['content'] is not string and message['role'] != 'user' and message['content'] -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=message['content'] | map(attribute='text') | join)] -%}"
    + _ELSE,
)
"""For a template that takes parts of users alone, and prints a list that anyone else's content is (GLM-4.1V)."""


def named_source(
    name: str,
    lead: str,
    tokenizer: PreTrainedTokenizerFast,
    tokens: Mapping[str, str],
    media_wrap: Sequence[str] = (),
    end: str = "",
) -> str:
    """Return the Jinja source of template `name`: a format of ours behind the token `lead`, or the tokenizer's own template.

    The token `end` ends the last answer of the latter. Raises `ConfigError` for one that the tokenizer does not have.
    """
    if name in FORMATS:
        return ("{{ bos_token }}" if lead else "") + FORMATS[name].source
    if end and end not in tokenizer.get_vocab():
        raise ConfigError(f"data.answer_end = {end!r} is no token of the tokenizer: name one that ends an answer")
    return with_answer_end(own_source(tokenizer, tokens, media_wrap), end)


def own_source(tokenizer: PreTrainedTokenizerFast, tokens: Mapping[str, str], media_wrap: Sequence[str] = ()) -> str:
    """Return the tokenizer's own template, which takes contents that are strings, without today's date.

    One that writes the sign of a picture alone, for a processor to put the rest around it, writes all of it.
    """
    try:
        source: str = tokenizer.get_chat_template()
    except ValueError:
        raise ConfigError(f"data.template = 'auto': the tokenizer has no chat template; name one: {', '.join(FORMATS)}") from None
    if takes_parts(source):  # a run wrote it, or an export for a class of transformers
        return with_whole_pictures(source, tokens["image"], media_wrap)
    found = with_parts(tokenizer, with_whole_pictures(freeze_date(source), tokens["image"], media_wrap), tokens)
    if (sign := sign_of(media_wrap)) and sign in source and not takes_parts(found):
        raise ConfigError(
            f"data.template = 'auto': the chat template holds {sign!r}, and not as the text that it writes for a picture: "
            f"data.media_wrap = {list(media_wrap)} cannot be written in its place"
        )
    return found


def sign_of(media_wrap: Sequence[str]) -> str:
    """Return the token that a template writes for a picture where its processor writes `media_wrap` around features (Gemma 3)."""
    return media_wrap[0].strip() if media_wrap else ""


def with_whole_pictures(source: str, token: str, media_wrap: Sequence[str]) -> str:
    """Return the template `source` with all that stands for a picture in place of its sign: `media_wrap` around `token`.

    A template that writes the token itself, or no such sign, is returned as it is.
    """
    sign = sign_of(media_wrap)
    if not sign or token in source:
        return source
    return re.sub(rf"(['\"]){re.escape(sign)}\1", lambda _: _literal(token, media_wrap), source)


def with_signs_alone(source: str, token: str, media_wrap: Sequence[str]) -> str:
    """Return the template from which `with_whole_pictures` made `source`, its signs in single quotes."""
    return source.replace(_literal(token, media_wrap), f"'{sign_of(media_wrap)}'")


def _literal(token: str, media_wrap: Sequence[str]) -> str:
    """Return what stands for a picture as a string of Jinja."""
    whole = media_wrap[0] + token + media_wrap[1]
    return "'" + whole.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def with_parts(tokenizer: PreTrainedTokenizerFast, source: str, tokens: Mapping[str, str]) -> str:
    """Return the template `source` so that it takes contents that are strings with placeholders.

    A template that writes such strings as it writes the parts they stand for is returned as it is, and so is one that knows no
    parts and prints the list. `tokens`: the token that the template would write for a medium of each modality.
    """
    for modality in (None, *tokens):
        parts = [{"type": "text", "text": _WORD}]
        string, needed = _WORD, [_WORD]
        if modality is not None:
            parts = [{"type": modality, modality: ""}, *parts]
            string, needed = f"{tokens[modality]}\n{_WORD}", [_WORD, tokens[modality]]
        as_parts, as_string = _rendered(tokenizer, source, parts), _rendered(tokenizer, source, string)
        if all(word in as_parts for word in needed) and as_parts != as_string and "'type'" not in as_parts:
            lists = "'type'" in _rendered(tokenizer, source, _WORD, [{"type": "text", "text": _WORD}])
            return (USER_PRELUDE if lists else PRELUDE) + source
    return source


def _rendered(tokenizer: PreTrainedTokenizerFast, source: str, content: object, answer: object = None) -> str:
    """Render one question, with its answer if there is one; return an empty string if the template fails."""
    question = {"role": "user", "content": content}
    try:
        return apply(tokenizer, source, [question, {"role": "assistant", "content": answer}] if answer else [question])
    except RenderError:
        return ""


def takes_parts(source: str) -> bool:
    """Tell whether `with_parts` has put a prelude before the template."""
    return PRELUDE in source or USER_PRELUDE in source


def template_tokens(tokens: Mapping[str, str], written: Mapping[str, str], media_wrap: Sequence[str]) -> set[str]:
    """Return the placeholder tokens that stand for no medium where a person writes them, and are text like any other.

    Those that the template writes itself, and a model's own that is one only between the pair `media_wrap`.
    """
    wrapped = {written["image"]} - {*PLACEHOLDERS.values()} if media_wrap else set()
    return {*tokens.values()} - {*written.values()} | wrapped


def content_tokens(source: str, tokens: Mapping[str, str], media_wrap: Sequence[str] = ()) -> dict[str, str]:
    """Return what stands for a medium in the contents that the template gets, by modality: as in records, if it takes parts.

    Raises `ConfigError` for a `media_wrap` around placeholders that the template writes itself, without it.
    """
    if media_wrap and takes_parts(source) and _literal(tokens["image"], media_wrap) not in source:
        raise ConfigError(f"data.media_wrap = {list(media_wrap)}: the chat template writes placeholders itself; remove it")
    return {modality: PLACEHOLDERS[modality] if takes_parts(source) else token for modality, token in tokens.items()}
