"""Rounds of a conversation, and how many of them can fit at all, found without writing or tokenising the others."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerFast

from data.records.placeholders import kinds_in
from data.records.record import Record, RecordError, Turn
from data.text.abilities import Abilities, Message

_CHARACTERS = 16
"""Characters per allowed token: a conversation with no more of them is simply tokenised, and not examined before."""


class TooLongError(RecordError):
    """Not even the first round of a record fits."""

    whole = 0  # tokens of all rounds; 0 where they were not counted


def round_starts(roles: Sequence[str]) -> list[int]:
    """Return the turns that begin a round: the first turn, and each user's turn but the first.

    A call and its results are one round.
    """
    return [0, *[i for i, role in enumerate(roles) if role == "user"][1:]]


def rounds_that_may_fit(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    tools: Sequence[object],
    abilities: Abilities,
    tags: re.Pattern[str],
    limit: int,
) -> int | None:
    """Return how many of the first rounds can have up to `limit` tokens; None means all, as the conversation is not long.

    Words are tokenised until they have twice `limit` tokens, or until all words were: no way in which a template joins words halves
    their number of tokens. Reasoning does not count, because a template may leave it out.
    """
    starts = round_starts([message["role"] for message in messages])
    enough = _CHARACTERS * limit
    if len(starts) <= limit and sum(len(m["content"] or "") + 1 for m in messages) <= enough:
        return None
    rounds = zip(starts, [*starts[1:], len(messages)])
    buffer, size = [json.dumps(list(tools), ensure_ascii=False)] if tools else [], 0
    for k, (low, high) in enumerate(rounds):
        if k == limit:
            return k  # each round takes a token or more
        for message in messages[low:high]:
            text = _kept(message, abilities, tags)
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


def _kept(message: Message, abilities: Abilities, tags: re.Pattern[str]) -> str:
    """Return the part of a message's words that the template writes: of an answer, the words behind its last tag."""
    content, role = str(message["content"] or ""), message["role"]
    if role == "assistant":
        content = content[max((match.end() for match in tags.finditer(content)), default=0) :]
    content = content if role in abilities.leads else content.lstrip()
    return content if role in abilities.trails else content.rstrip()


def _count(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def first_rounds(record: Record, kept: int | None, whole: bool = True) -> Record:
    """Return the first `kept` rounds of the record, with a short round in place of those that follow; None keeps all rounds.

    The short round stands in because a template may write the last round differently. It is left out if `whole` is false.
    """
    starts = round_starts([turn.role for turn in record.turns])
    if kept is None or kept == len(starts):
        return record
    turns = record.turns[: starts[kept]]
    media = record.media[: sum(len(kinds_in(turn.content)) for turn in turns)]
    last = (Turn("user", "x"), Turn("assistant", "x")) if whole else ()
    return replace(record, turns=(*turns, *last), media=media, interrupted=False)


def shortened_turn(turn: Turn, tags: re.Pattern[str]) -> Turn:
    """Return an answer with the tags of `turn` and a placeholder word in place of each stretch of words."""
    parts = re.split(f"({tags.pattern})", turn.content)
    parts[::2] = [re.sub(r"\S(?:.*\S)?", "x", part, flags=re.DOTALL) for part in parts[::2]]
    extra = {key: "x" if isinstance(value, str) and value.strip() else value for key, value in turn.extra.items()}
    return Turn("assistant", "".join(parts), extra=extra)


THOUGHTFUL = Turn("assistant", "<think>\nx\n</think>\n\nx")
"""Answer that begins with a thought, for `Template.prompt`."""
