"""Texts that a template writes around the words of a conversation, remembered by the conversation's shape.

Most conversations differ from one before them in their words alone. What the template writes between the words is then known, and
the places of the words need no marks (`data.text.marks`): they are proven by putting both together and comparing with the
template's own text, to the character.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from data.records.turns import MARKS
from data.text.abilities import Message

MAX_SHAPES, MAX_TURNS = 256, 1 << 10
"""Shapes that are remembered, and turns of the longest one."""
Shape = tuple[tuple[str, ...], tuple[str, ...]]
"""Roles of the turns, and kinds of the media."""


@dataclass(frozen=True)
class Span:
    """Character positions of one turn in the text."""

    role: str
    prompt: int  # in an assistant's turn, the generated text starts here
    start: int  # the turn's words are text[start:stop], with whatever the template writes between them
    stop: int
    end: int  # after the token that ends an assistant's turn
    learn: bool  # whether text[prompt:end] is learned


@dataclass(frozen=True)
class Rendering:
    """Text of a conversation, and where turns and control tokens stand in it."""

    text: str
    spans: list[Span]
    written: list[tuple[int, int]]  # borders of the control tokens that a person wrote
    removed: int  # number of answers that the template shortened
    first_round_apart: bool  # tools and the system's words all stand before the first answer
    layout: TextLayout | None = None  # the remembered layout that the text was held to


@dataclass(frozen=True)
class TextLayout:
    """A rendering without its words."""

    between: tuple[str, ...]  # texts before the first words, between words, and behind the last words
    reach: tuple[tuple[int, int], ...]  # characters of each turn's span before its words and behind them
    first_round_apart: bool

    def place(self, text: str, messages: Sequence[Message], learn: Sequence[bool]) -> Rendering | None:
        """Return the rendering `text` of the messages, or None if it is not exactly this layout with their words."""
        whole = [self.between[0]] * (2 * len(messages) + 1)
        whole[::2] = self.between
        whole[1::2] = words = [message["content"] for message in messages]
        if "".join(whole) != text:
            return None
        spans, at = [], 0
        for before, word, (ahead, behind), message, learned in zip(self.between, words, self.reach, messages, learn):
            start = at + len(before)
            at, role = start + len(word), message["role"]
            spans.append(Span(role, start - ahead, start, at, at + behind, learned and role == "assistant"))
        return Rendering(text, spans, [], 0, self.first_round_apart, self)


def layout_of(found: Rendering, messages: Sequence[Message]) -> TextLayout | None:
    """Return the layout of a rendering in which all words stand unchanged and in their order; None for others."""
    text, spans = found.text, found.spans
    edges = [0, *(edge for span in spans for edge in (span.start, span.stop)), len(text)]
    unchanged = all(text[span.start : span.stop] == message["content"] for span, message in zip(spans, messages))
    if found.removed or not unchanged or edges != sorted(edges):
        return None
    between = tuple(sys.intern(text[low:high]) for low, high in zip(edges[::2], edges[1::2]))
    reach = tuple((span.start - span.prompt, span.end - span.stop) for span in spans)
    return TextLayout(between, reach, found.first_round_apart)


@dataclass(frozen=True)
class Anchor:
    """Place of a layout's last control token before its last answer, from where on a prompt is tokenised on its own."""

    place: int  # number of the text between words that holds the token
    start: int  # its first character in that text

    def position(self, rendering: Rendering) -> int:
        """Return the character at which the token begins in a rendering of the layout."""
        before = rendering.spans[self.place - 1].stop if self.place else 0
        return before + self.start


@dataclass(frozen=True)
class TextLayouts:
    """Layouts of one template by shape, the latest of each shape."""

    written: re.Pattern[str]  # control tokens that a person may not write, or, as group "ours", wrapped placeholders
    tags: re.Pattern[str]
    _known: dict[Shape, TextLayout] = field(default_factory=dict)
    proven: dict[TextLayout, Anchor | None] = field(default_factory=dict)
    """Layouts of which a row was proven in full (`data.check.layout_proof`)."""

    def shape(self, messages: Sequence[Message], kinds: Sequence[str], tools: Sequence[object]) -> Shape | None:
        """Return the shape of a conversation whose contents are words alone; None for others, which need marks.

        Words have no white space around them and hold no tag that the template names and no control token.
        """
        if tools or len(messages) > MAX_TURNS:
            return None
        contents = [message["content"] for message in messages if len(message) == 2]
        if len(contents) < len(messages) or any(not text or text[0].isspace() or text[-1].isspace() for text in contents):
            return None
        said = MARKS[0].join(contents)  # at once: a search for each content costs more than the searching
        if self.tags.search(said) or any(match["ours"] is None for match in self.written.finditer(said)):
            return None
        return tuple([message["role"] for message in messages]), tuple(kinds)

    def place(self, shape: Shape | None, text: str, messages: Sequence[Message], learn: Sequence[bool]) -> Rendering | None:
        """Return the rendering `text` of messages of this shape if the shape's layout is known and is that of the text."""
        layout = None if shape is None else self._known.get(shape)
        return None if layout is None else layout.place(text, messages, learn)

    def remember(self, shape: Shape | None, found: Rendering, messages: Sequence[Message]) -> None:
        """Remember the layout of a rendering whose places were found by marks."""
        if shape is None or (layout := layout_of(found, messages)) is None:
            return
        if shape not in self._known and len(self._known) >= MAX_SHAPES:
            self._known.pop(next(iter(self._known)), None)
        self._known[shape] = layout
