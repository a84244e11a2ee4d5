"""Ends of assistant's turns: which tokens end an answer and a call of tools, and which answers can be cut off."""

from __future__ import annotations

import re
from collections.abc import Collection

from data.text.abilities import Abilities, Message, probe_call
from data.text.render import Renderer, RenderError
from data.text.tokens import supervise, tokenize


def check_cut(message: Message, tags: re.Pattern[str]) -> None:
    """Raise `RenderError` for an interrupted answer without words at its end, where the template's own words would be cut."""
    content = message["content"] or ""
    words = content[max((match.end() for match in tags.finditer(content)), default=0) :].strip()
    if message.get("tool_calls") or not words:
        what = "calls of tools" if message.get("tool_calls") else "a tag of the template"
        raise RenderError(f"is false, but the last answer ends with {what}, and only words can be cut off: remove it", "end_tag")


_QUESTION: Message = {"role": "user", "content": "a"}


def last_id(renderer: Renderer, lead: str, control_ids: Collection[int]) -> int | None:
    """Return the last id that is learned in a short conversation; None if none is."""
    rendering = renderer.render([_QUESTION, {"role": "assistant", "content": "b"}], [True, True])
    tokens = tokenize(renderer.tokenizer, rendering.text, [], len(lead))
    supervised, _ = supervise(rendering.spans, tokens, frozenset(control_ids))
    return next((id for id, learned in zip(reversed(tokens.ids), reversed(supervised)) if learned), None)


def closing_id(renderer: Renderer, abilities: Abilities) -> int | None:
    """Return the id that ends a turn with calls: what ends other answers, or the last control token behind the calls.

    Not the first one, which may be a quotation mark of an argument (Gemma 4). None for a template that writes no calls, or refuses
    them: records with calls are refused for this later, each with the reason.
    """
    if not abilities.calls:
        return None
    try:
        rendering = renderer.render([_QUESTION, probe_call(abilities.null_content, abilities.text_arguments)], [True, True])
    except RenderError:
        return None
    behind = rendering.text[rendering.spans[-1].stop :]
    *_, closing = renderer.closes.findall(behind)[:1] or renderer.ends.findall(behind)
    return int(renderer.tokenizer.convert_tokens_to_ids(closing))
