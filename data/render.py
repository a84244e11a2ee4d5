"""A conversation as text, as ids, and which ids are learned, in one pass.

Answers are never searched for in text or ids, where repeats and role names mislead. The chat template is rendered with
private-use marks in place of the contents; what it does to them is read off, the text is rebuilt with the real contents,
and must equal the template's own rendering of them.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from data.turns import MARKS

Message = dict[str, str]  # role, content

# White space that no template writes, on both sides of a mark: gone where a template strips contents.
_EDGE = "\u2003"


class RenderError(Exception):
    """The template or the tokenizer cannot express this conversation faithfully."""


@dataclass(frozen=True)
class Span:
    """Where one turn stands in the text."""

    role: str
    prompt: int  # generation of this turn would start here
    start: int  # its content is text[start:stop]
    stop: int
    end: int  # after the token that ends an assistant's turn


@dataclass(frozen=True)
class Tokens:
    """Ids and the characters they stand for, in order."""

    ids: list[int]
    starts: list[int]
    stops: list[int]

    def between(self, low: int, high: int) -> slice:
        """Tokens that overlap text[low:high]. Overlap, because the bytes of one emoji are several tokens of equal offsets."""
        return slice(bisect_right(self.stops, low), bisect_left(self.starts, high))

    def inside(self, low: int, high: int) -> list[int]:
        """Ids of the tokens that stand wholly in text[low:high]."""
        return self.ids[bisect_left(self.starts, low) : bisect_right(self.stops, high)]


def apply(
    tokenizer: PreTrainedTokenizerFast, source: str, messages: Sequence[Message], kinds: Sequence[str] = (), ask: bool = False
) -> str:
    """The template's own rendering; `kinds` of media are its variable `media_kinds`.

    Raises `RenderError` with the template's words if it refuses.
    """
    try:
        return tokenizer.apply_chat_template(
            list(messages), chat_template=source, tokenize=False, add_generation_prompt=ask, media_kinds=list(kinds)
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise RenderError(f"the template refuses the conversation: {error}") from error


def render(
    tokenizer: PreTrainedTokenizerFast,
    source: str,
    messages: Sequence[Message],
    ends: re.Pattern[str],
    kinds: Sequence[str] = (),
) -> tuple[str, list[Span]]:
    """The conversation's text and where every turn stands in it.

    The first match of `ends` after an answer ends its turn. What stands between the generation prompt and the answer, if
    only white space, belongs to the answer: Llama 2 and Mistral write a space there, and some tokenizers give it a token
    that generation has to produce.
    Raises `RenderError` if the template drops, reorders or rewrites contents or ends a turn with nothing.
    """
    text, contents = _rebuild(tokenizer, source, messages, kinds)
    if text != apply(tokenizer, source, messages, kinds):
        raise RenderError("the template rewrites a content of this conversation")
    spans = []
    for i, (message, (start, stop)) in enumerate(zip(messages, contents)):
        prompt = after = start
        if message["role"] == "assistant":
            limit = contents[i + 1][0] if i + 1 < len(contents) else len(text)
            if (found := ends.search(text, stop, limit)) is None:
                raise RenderError("no token ends the assistant's turn")
            asked = apply(tokenizer, source, messages[:i], kinds, ask=True)
            prompt = len(asked) if text.startswith(asked) and text[len(asked) : start].isspace() else start
            after = found.end()
        spans.append(Span(message["role"], prompt, start, stop, after))
    return text, spans


def _rebuild(
    tokenizer: PreTrainedTokenizerFast, source: str, messages: Sequence[Message], kinds: Sequence[str]
) -> tuple[str, list[tuple[int, int]]]:
    """The text made of the template's literals and the contents, and the contents' borders."""
    opening, closing = MARKS
    marked = [{**m, "content": f"{_EDGE}{opening}{i}{closing}{_EDGE}"} for i, m in enumerate(messages)]
    parts = re.split(f"({_EDGE}?){opening}(\\d+){closing}({_EDGE}?)", apply(tokenizer, source, marked, kinds))
    if [int(i) for i in parts[2::4]] != list(range(len(messages))):
        raise RenderError("the template drops, repeats or reorders messages")
    text, borders = parts[0], []
    for message, lead, trail, literal in zip(messages, parts[1::4], parts[3::4], parts[4::4]):
        content = message["content"] if lead else message["content"].lstrip()
        content = content if trail else content.rstrip()
        borders.append((len(text), len(text) + len(content)))
        text += content + literal
    return text, borders


def tokenize(tokenizer: PreTrainedTokenizerFast, text: str, written: Sequence[tuple[int, int]], first: int = 0) -> Tokens:
    """Ids of text[first:]. Each border pair of `written` is a control token that a person wrote: it stays plain text.

    Equals `apply_chat_template(sanitize_control_tokens=True)` of transformers 5.23, which older versions have not.
    """
    cuts = [cut for pair in written for cut in pair]
    tokens = Tokens([], [], [])
    for k, (low, high) in enumerate(zip([first, *cuts], [*cuts, len(text)])):
        if low == high:
            continue
        if k % 2:
            ids = _after_newline(tokenizer, text[low:high], plain=True)[0]
            offsets = [(low, high)] * len(ids)
        elif k:
            ids, offsets = _after_newline(tokenizer, text[low:high], plain=False)
            offsets = [(a + low, b + low) for a, b in offsets]
        else:
            ids, offsets = _call(tokenizer, text[low:high])
            offsets = [(a + low, b + low) for a, b in offsets]
        tokens.ids.extend(ids)
        tokens.starts.extend(a for a, _ in offsets)
        tokens.stops.extend(b for _, b in offsets)
    return tokens


def _call(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    # verbose: else transformers warns of texts longer than its own limit; data.max_length is ours.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])


def _after_newline(tokenizer: PreTrainedTokenizerFast, piece: str, plain: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a piece from the middle of a text: a newline before it keeps SentencePiece from adding its prefix space.

    If the newline grows together with the piece it cannot be taken off again; such tokenizers add no prefix space.
    """
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for before in ("\n", ""):
        ids, offsets = _without_added_tokens(tokenizer, before + piece) if plain else _call(tokenizer, before + piece)
        skip = len(newline) if before else 0
        if not before or ids[:skip] == newline:
            break
    return ids[skip:], [(a - len(before), b - len(before)) for a, b in offsets[skip:]]


def _without_added_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids by the bare model, which knows no added token; offsets are not needed and are empty."""
    backend = tokenizer.backend_tokenizer
    text = backend.normalizer.normalize_str(text) if backend.normalizer else text
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
    return [token.id for piece in pieces for token in backend.model.tokenize(piece)], []


def supervise(spans: Sequence[Span], tokens: Tokens, control_ids: frozenset[int]) -> tuple[list[bool], list[int]]:
    """Which tokens are learned: those of the answers and of what ends them; and the turns whose start is inside a token.

    A newline of the prompt and one of the answer may grow together: the prompt's ids are then no prefix of the row's. A
    control token that swallows the white space after it (Phi-3) does no such harm; it is not learned.
    """
    supervised, glued = [False] * len(tokens.ids), []
    for i, span in enumerate(spans):
        if span.role != "assistant":
            continue
        found = tokens.between(span.prompt, span.end)
        first = found.start
        while first < found.stop and tokens.starts[first] < span.prompt:
            if tokens.ids[first] not in control_ids and i not in glued:
                glued.append(i)
            first += 1
        supervised[first : found.stop] = [True] * (found.stop - first)
    return supervised, glued
