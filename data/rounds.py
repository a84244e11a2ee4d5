"""Rounds of a conversation, and how many of them can fit at all: found out without writing or tokenising the others."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from data.abilities import Message
from data.record import RecordError

_CHARACTERS = 16
"""As many characters per allowed token are never looked at twice: what is shorter is simply tokenised."""


class TooLongError(RecordError):
    """Not even the first round of a record fits."""


def round_starts(roles: Sequence[str]) -> list[int]:
    """Turns that begin a round: the user's. The first round begins with the conversation; a tool call and its answer are of one round."""
    return [0, *[i for i, role in enumerate(roles) if role == "user"][1:]]


def rounds_that_may_fit(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], tools: Sequence[Any], tags: re.Pattern[str], limit: int
) -> int | None:
    """How many of the first rounds can have up to `limit` tokens; None: all of them, as the conversation is not long.

    Words are tokenised until they have twice as many, or all were: no way in which a template joins them halves their number. Reasoning
    does not count, because a template may leave it out.
    """
    starts = round_starts([message["role"] for message in messages])
    enough = _CHARACTERS * limit
    if len(starts) <= limit and sum(len(m["content"] or "") + 1 for m in messages) <= enough:
        return None
    rounds = zip(starts, [*starts[1:], len(messages)])
    buffer, size = [json.dumps(list(tools), ensure_ascii=False)] if tools else [], 0
    for k, (low, high) in enumerate(rounds):
        if k == limit:
            return k  # each takes a token or more
        for message in messages[low:high]:
            text = _kept(message, tags)
            while text:
                buffer.append(text[: enough - size])
                size += len(buffer[-1])
                text = text[len(buffer[-1]) :]
                if size < enough:
                    break
                buffer = ["\n".join(buffer)]
                if _count(tokenizer, buffer[0]) >= 2 * limit:
                    return k
                enough *= 2
    return len(starts)


def _kept(message: Message, tags: re.Pattern[str]) -> str:
    """The part of a message's words that every template writes: of an answer, what stands behind its last tag."""
    content = message["content"] or ""
    if message["role"] != "assistant":
        return str(content.strip())
    end = max((match.end() for match in tags.finditer(content)), default=0)
    return str(content[end:].strip())


def _count(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
