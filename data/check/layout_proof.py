"""Proof of a row by what was proven of another row of the same layout, so that a check renders and tokenises a record once.

A row whose layout is remembered is its layout with the record's words in between, to the character (`data.text.layouts`). Of the
layout one row was proven in full: what the template writes before the last answer does not depend on that answer, and the ids are
the tokenizer's own for the text. What is left for each row is whether its answer merges with the end of the prompt into one token.
A tokenizer splits a text at its control tokens before it does anything else, so only the prompt from its last control token on has
to be tokenised on its own.
"""

from __future__ import annotations

from functools import lru_cache

from transformers import PreTrainedTokenizerFast

from data.records.record import Record
from data.text.encoded import Encoded
from data.text.layouts import MAX_SHAPES, Anchor, Rendering, TextLayout
from data.text.template import Template
from data.text.tokens import tokenize

_SHORT = 200
"""Characters of a text whose ids are remembered: what a template writes between two turns, seldom a question."""


def layout_in_force(record: Record, encoded: Encoded) -> TextLayout | None:
    """Return the layout of a row; None if it was placed by marks, or if it is not the record's words that stand in it."""
    stripped = any(turn.role == "assistant" and turn.content[:1].isspace() for turn in record.turns)
    return None if record.interrupted or stripped or encoded.rendering is None else encoded.rendering.layout


def remember_proof(template: Template, layout: TextLayout, answered: Rendering) -> None:
    """Remember that a row of `layout` was proven, unless `answered`, its prompt behind another answer, has another layout."""
    if answered.layout != layout:
        return
    proven = template.layouts.proven
    if len(proven) >= MAX_SHAPES:
        proven.clear()
    proven[layout] = _anchor(template, layout)


def begins_as_prompt(template: Template, encoded: Encoded, start: int) -> bool:
    """Return whether the ids before `start`, where a row's last answer begins, are those of its prompt; its layout is proven."""
    rendering, ids = encoded.rendering, encoded.input_ids
    if rendering is None or rendering.layout is None:
        return False
    anchor = template.layouts.proven[rendering.layout]
    if anchor is None:
        return template.prompt_of(rendering).ids == ids[:start]
    text = rendering.text[anchor.position(rendering) : rendering.spans[-1].prompt]
    tail = (_ids_of if len(text) <= _SHORT else _ids_of.__wrapped__)(template.tokenizer, text)
    is_apart = tail[0] in template.control_ids and template.control_ids.isdisjoint(tail[1:])
    return is_apart and ids[max(0, start - len(tail)) : start] == tail


@lru_cache(maxsize=512)
def _ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenize(tokenizer, text, []).ids


def _anchor(template: Template, layout: TextLayout) -> Anchor | None:
    """Return the last control token that the layout has before its last answer, other than the tokenizer's own BOS."""
    for place in reversed(range(len(layout.reach))):
        text = layout.between[place]
        if place == len(layout.reach) - 1:
            text = text[: len(text) - layout.reach[place][0]]
        first = 0 if place else len(template.lead)
        if found := [match.start() for match in template.written.finditer(text, first) if match["ours"] is None]:
            return Anchor(place, found[-1])
    return None
