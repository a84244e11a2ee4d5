"""Token ids as readable pieces of text: whole characters, each marked as learned, read or passed over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

MAX_CHARACTER_TOKENS = 8
"""Most tokens that are joined to complete one character: its four bytes, and what a decoder may put around them."""
BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens that form whole characters: nearly always one token."""

    ids: tuple[int, ...]
    tokens: tuple[str, ...]  # as the tokenizer spells them
    text: str
    learned: bool
    special: bool  # a control token of the tokenizer
    passed_over: bool = False  # part of an answer that its turn excludes from the loss


def token_pieces(
    tokenizer: PreTrainedTokenizerFast,
    ids: list[int],
    learned: list[bool],
    before: list[int] | None = None,
    answers: list[bool] | None = None,
) -> Iterator[Piece]:
    """Yield every id once, in pieces whose texts together are the text of all ids. `before`: ids in front of them; `answers`: which
    ids belong to answers, learned or not.

    A token is decoded behind its predecessor: alone, tokenizers of the sentencepiece family would lose its leading space.
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
