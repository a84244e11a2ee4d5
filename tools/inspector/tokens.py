"""Ids as pieces of text that a person can read: whole characters, each with what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

MAX_CHARACTER_TOKENS = 8
"""Tokens that are awaited to make one character whole: four bytes of it, and what a decoder may put around them."""
BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens that make whole characters: nearly always one."""

    ids: tuple[int, ...]
    tokens: tuple[str, ...]  # as the tokenizer spells them
    text: str
    learned: bool
    special: bool  # a control token of the tokenizer
    passed_over: bool = False  # of an answer whose turn says that it is not learned


def token_pieces(
    tokenizer: PreTrainedTokenizerFast,
    ids: list[int],
    learned: list[bool],
    before: list[int] | None = None,
    answers: list[bool] | None = None,
) -> Iterator[Piece]:
    """Every id once, in pieces whose texts together are the text of all ids. `before`: ids that stand in front of them;
    `answers`: which are of answers, learned or not.

    A token is decoded behind its forerunner: alone, tokenizers of the sentencepiece family would lose its leading space.
    """
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}

    def text_of(of: list[int]) -> str:
        return str(tokenizer.decode(of, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    answers = answers or learned
    context: list[int] = before or []
    group: list[int] = []
    for t, id in enumerate(ids):
        group.append(id)
        known, text = text_of(context), text_of([*context, *group])
        ends = (
            t + 1 == len(ids) or (learned[t + 1], answers[t + 1]) != (learned[t], answers[t]) or len(group) == MAX_CHARACTER_TOKENS
        )
        if text.endswith(BROKEN) and not ends:
            continue  # the rest of the character is in the next token
        fresh = text[len(known) :] if text.startswith(known) else text_of(group)
        spelt = tuple(tokenizer.convert_ids_to_tokens(group))
        is_control = id in special and len(group) == 1
        yield Piece(tuple(group), spelt, fresh, learned[t], is_control, answers[t] and not learned[t])
        context, group = group, []
