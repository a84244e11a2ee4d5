"""Rendering of a conversation as text, and the place of every turn in that text.

Answers are never searched for in the text, where repeats and role names mislead. The chat template renders the conversation once as
it is, and once with marks inside the words (`data.text.marks`). Without the marks both renderings must be the same text, so the
places of the marks are the places of the words. Where a conversation of the same shape was rendered before, the texts between the
words are known, and the first rendering alone is held to them (`data.text.layouts`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

from transformers import PreTrainedTokenizerFast

from data.text.abilities import Abilities, Message, probe_call
from data.text.layouts import Rendering, Span, TextLayouts
from data.text.marks import CALL, CLOSE, CONTENT, OPEN, REASONING, TOOLS, MarkedPiece, Marker, Read, read_marks

# Names of the template variables that choose between an answer with and without a thought, where the caller may choose.
_SWITCHES = ("enable_thinking", "thinking")
_LONG_TAIL = 1000  # characters


class RenderError(Exception):
    """The template or the tokenizer cannot express this conversation faithfully. `field` names the field of the record at fault."""

    def __init__(self, reason: str, field: str = "conversations") -> None:
        super().__init__(reason)
        self.field = field


@dataclass(frozen=True)
class TemplateInputs:
    """Inputs of a template beside the messages."""

    kinds: Sequence[str] = ()  # of media: the template's variable `media_kinds`
    tools: Sequence[Any] = ()
    ask: bool = False  # adds the generation prompt
    switches: Mapping[str, bool] = field(default_factory=dict)  # further variables of the template


def apply(
    tokenizer: PreTrainedTokenizerFast, source: str, messages: Sequence[Message], inputs: TemplateInputs = TemplateInputs()
) -> str:
    """Render the messages with the tokenizer's own chat-template code.

    Raises `RenderError` with the template's words if the template refuses.
    """
    given: dict[str, Any] = {"tools": list(inputs.tools)} if inputs.tools else {}
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            chat_template=source,
            tokenize=False,
            add_generation_prompt=inputs.ask,
            media_kinds=list(inputs.kinds),
            **given,
            **inputs.switches,
        )
    except Exception as error:  # a template is foreign code and may raise anything
        raise RenderError(f"the template refuses the conversation: {error}") from error


@dataclass(frozen=True)
class Renderer:
    """One chat template of one tokenizer, with the patterns that find the ends of turns."""

    tokenizer: PreTrainedTokenizerFast
    source: str  # Jinja
    ends: re.Pattern[str]  # its first match after an answer ends the turn
    closes: re.Pattern[str]  # after tool calls, its first match ends the turn, if there is one
    written: re.Pattern[str]  # control tokens that a person may not write, or, as group "ours", wrapped placeholders
    tags: re.Pattern[str]

    @cached_property
    def layouts(self) -> TextLayouts:
        return TextLayouts(self.written, self.tags)

    def render(
        self,
        messages: Sequence[Message],
        learn: Sequence[bool],
        kinds: Sequence[str] = (),
        tools: Sequence[object] = (),
        late: frozenset[int] = frozenset(),
    ) -> Rendering:
        """Render the conversation and find where every turn stands in the text.

        The conversation is rendered twice at most, however many rounds it has. The generated part of an answer starts after the
        template's generation prompt, the longest one that the template has; it is learned where `learn` says so. The answers in
        `late` are learned from their own words on. Raises `RenderError` if the template drops, reorders or rewrites contents or
        ends a turn with nothing.
        """
        given = TemplateInputs(kinds, tools)
        text = apply(self.tokenizer, self.source, messages, given)
        shape = None if late else self.layouts.shape(messages, kinds, tools)
        found = self.layouts.place(shape, text, messages, learn)
        if found is None:
            found = self._marked(text, messages, learn, given, late)
            self.layouts.remember(shape, found, messages)
        return found

    def _marked(
        self, text: str, messages: Sequence[Message], learn: Sequence[bool], given: TemplateInputs, late: frozenset[int]
    ) -> Rendering:
        """Render the conversation with marks, and find every turn in the rendering without marks, `text`. Raises as `render`."""
        marker = Marker(self.written, self.tags)
        tools = marker.tree(-1, TOOLS, list(given.tools))
        marked = [marker.message(i, message) for i, message in enumerate(messages)]
        read = read_marks(apply(self.tokenizer, self.source, marked, replace(given, tools=tools)))
        if read.text != text:
            raise RenderError("the template rewrites a content of this conversation")
        found, removed = _places(messages, marker.pieces, read)
        guards = {place - 1 for place in read.guards}
        spans = []
        for i, message in enumerate(messages):
            span = _span(message["role"], found[i], text, learn[i], i in late)
            if span.role == "assistant":
                limit = next((found[j][0][0] for j in range(i + 1, len(messages)) if messages[j]["role"] != "system"), len(text))
                end = self._end(text, span.stop, limit, guards, bool(message.get("tool_calls")))
                known = None if i in late or i == 0 else self._prompt(text, messages[i - 1], found[i - 1], found[i], span.start)
                span = replace(span, prompt=span.start if known is None else known, end=end)
            spans.append(span)
        written = [self.written.match(text, start) for start in sorted(guards)]
        apart = _apart(messages, marker.pieces, read, spans)
        return Rendering(text, spans, [match.span() for match in written if match], removed, apart)

    def _end(self, text: str, stop: int, limit: int, guards: set[int], calls: bool) -> int:
        """Return where the turn ends after an answer's last word. Raises `RenderError` if no token ends it."""
        for pattern in (self.closes, self.ends) if calls else (self.ends,):
            for match in pattern.finditer(text, stop, limit):
                if match.start() not in guards:
                    return match.end()
        raise RenderError("no token ends the assistant's turn")

    def _prompt(
        self, text: str, before: Message, asked: list[tuple[int, MarkedPiece]], found: list[tuple[int, MarkedPiece]], start: int
    ) -> int | None:
        """Return where the generation prompt between the turn `before` and an answer ends; None if there is none."""
        place, piece = asked[-1]
        if before["role"] == "assistant":
            return None
        tail = piece.tail
        ask = openings.__wrapped__ if len(tail) > _LONG_TAIL else openings
        for opening, is_prompt in ask(self.tokenizer, self.source, before["role"], tail):
            end = place + len(opening)
            if text.startswith(opening, place) and end <= found[0][0] and (is_prompt or text[end:start].isspace()):
                return end
        return None


@lru_cache(maxsize=512)
def openings(tokenizer: PreTrainedTokenizerFast, source: str, role: str, tail: str) -> tuple[tuple[str, bool], ...]:
    """Return all texts that the template may write from the end of a turn's words, which `tail` follows, to the start of an answer.

    The longest text comes first; there are several where the template has switches for thoughts. The flag of a text is False where
    the template has no generation prompt: the text then ends the turn before.
    """
    mark = f"{OPEN}{CLOSE}"
    turn = {"role": role, "content": f"x{mark}{tail}"}
    question = {"role": "user", "content": "x"}
    found: dict[str, bool] = {}
    forms = [Abilities(null_content=null, text_arguments=text) for text in (False, True) for null in (False, True)]
    for form in forms if role == "tool" else forms[:1]:
        call = probe_call(form.null_content, form.text_arguments)
        linked = {**turn, "tool_call_id": call["tool_calls"][0]["id"], "name": "qzname"}
        messages = [question, call, linked] if role == "tool" else [turn]
        for switch in ({}, dict.fromkeys(_SWITCHES, False), dict.fromkeys(_SWITCHES, True)):
            try:
                prompt, plain = (
                    apply(tokenizer, source, messages, TemplateInputs(ask=asked, switches=switch)) for asked in (True, False)
                )
            except RenderError:
                continue
            if mark in prompt:
                after = prompt.rpartition(mark)[2]
                found[after] = found.get(after, False) or prompt != plain
    return tuple(sorted(found.items(), key=lambda pair: len(pair[0]), reverse=True))


def _places(
    messages: Sequence[Message], pieces: Sequence[MarkedPiece], read: Read
) -> tuple[list[list[tuple[int, MarkedPiece]]], int]:
    """Return for each turn the pieces of its words that the template wrote, in order; and how many answers the template shortened.

    Raises `RenderError` for contents that the template drops, repeats, reorders or rewrites.
    """
    found: list[list[tuple[int, MarkedPiece]]] = [[] for _ in messages]
    removed: set[int] = set()
    last = {piece.turn: k for k, piece in enumerate(pieces) if piece.kind == CONTENT}
    for k, piece in enumerate(pieces):
        start, stop = read.at.get(2 * k), read.at.get(2 * k + 1)
        if start is None or stop is None:
            _check_removable(messages, piece, k == last.get(piece.turn))
            removed.add(piece.turn)
        elif piece.kind in (CONTENT, REASONING) and not _is_unchanged(read.text[start:stop], piece, messages):
            raise RenderError("the template rewrites a content of this conversation")
        elif piece.kind == CONTENT and 2 * k in read.repeated:
            raise RenderError("the template drops, repeats or reorders messages")
        elif piece.kind != TOOLS:
            found[piece.turn] += [(start, piece), (stop, piece)]
    place = 0
    for message, turn in zip(messages, found):
        turn.sort(key=lambda pair: pair[0])
        if not turn or (message["role"] != "system" and turn[0][0] < place):
            raise RenderError("the template drops, repeats or reorders messages")
        if message["role"] != "system":
            place = turn[-1][0]
    return found, len(removed)


def _is_unchanged(written: str, piece: MarkedPiece, messages: Sequence[Message]) -> bool:
    """Return whether the words were written unchanged; the words of a tool may also be written as JSON (gpt-oss)."""
    is_tool = messages[piece.turn]["role"] == "tool"
    return written == piece.text or (is_tool and written == json.dumps(piece.text, ensure_ascii=False)[1:-1])


def _check_removable(messages: Sequence[Message], piece: MarkedPiece, is_answer: bool) -> None:
    """Raise `RenderError` unless a template may leave the piece out: reasoning, and what stands before an answer's last tag."""
    if piece.kind in (TOOLS, CALL):
        raise RenderError("the chat template does not render them; remove them or take another template", piece.kind)
    if piece.kind == CONTENT and (is_answer or messages[piece.turn]["role"] != "assistant"):
        if messages[piece.turn].get("tool_calls"):
            raise RenderError("the chat template drops the text that stands beside them; remove it", CALL)
        raise RenderError("the template drops, repeats or reorders messages")


def _span(role: str, found: list[tuple[int, MarkedPiece]], text: str, learn: bool, late: bool) -> Span:
    """Return the span of a turn from its first to its last word.

    The span includes the white space and the tags of the content around its words, as far as the text holds them. Where the
    template leaves out what stands before the last tag, the white space behind the tag still belongs to the turn.
    """
    (start, first), (stop, last) = found[0], found[-1]
    if first.kind != CALL:
        behind = "" if late else first.head[len(first.head.rstrip()) :]
        start -= next(len(head) for head in (first.head, first.head.lstrip(), behind, "") if text.endswith(head, 0, start))
    if last.kind != CALL:
        stop += next(len(tail) for tail in (last.tail, last.tail.rstrip(), "") if text.startswith(tail, stop))
    return Span(role, start, start, stop, stop, learn and role == "assistant")


def _apart(messages: Sequence[Message], pieces: Sequence[MarkedPiece], read: Read, spans: Sequence[Span]) -> bool:
    """Return whether tools and the system's words stand before the first answer; if not, no round can be dropped without them."""
    first = next((span.stop for span in spans if span.role == "assistant"), len(read.text))
    early = [k for k, piece in enumerate(pieces) if piece.turn < 0 or messages[piece.turn]["role"] == "system"]
    return all(read.at[2 * k] <= first for k in early)
