"""Tokenising of a rendered conversation: control tokens that a person wrote stay text, and learned ids are flagged."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from data.text.render import Span


@dataclass(frozen=True)
class Tokens:
    """Token ids and the characters that they stand for, in order."""

    ids: list[int]
    starts: list[int]
    stops: list[int]

    def between(self, low: int, high: int) -> slice:
        """Return the slice of tokens that overlap text[low:high].

        Overlap counts, because the bytes of one emoji are several tokens of equal offsets.
        """
        return slice(bisect_right(self.stops, low), bisect_left(self.starts, high))

    def inside(self, low: int, high: int) -> list[int]:
        """Return the ids of the tokens that stand wholly in text[low:high]."""
        return self.ids[bisect_left(self.starts, low) : bisect_right(self.stops, high)]


def tokenize(tokenizer: PreTrainedTokenizerFast, text: str, written: Sequence[tuple[int, int]], first: int = 0) -> Tokens:
    """Tokenise text[first:]. Each border pair of `written` is a control token that a person wrote, which stays plain text.

    Equals `apply_chat_template(sanitize_control_tokens=True)` of transformers 5.23, which older versions do not have.
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
    # verbose=False: transformers would warn of texts longer than its own limit; data.max_length is ours.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])


def _after_newline(tokenizer: PreTrainedTokenizerFast, piece: str, plain: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenise a piece from the middle of a text: a newline before it keeps SentencePiece from adding its prefix space.

    If the newline and the piece merge into one token, the newline cannot be removed again; such tokenizers add no prefix space.
    """
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for before in ("\n", ""):
        ids, offsets = _without_added_tokens(tokenizer, before + piece) if plain else _call(tokenizer, before + piece)
        skip = len(newline) if before else 0
        if not before or ids[:skip] == newline:
            break
    return ids[skip:], [(a - len(before), b - len(before)) for a, b in offsets[skip:]]


def _without_added_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenise with the bare model, which knows no added token; offsets are not needed and are empty."""
    backend = tokenizer.backend_tokenizer
    text = backend.normalizer.normalize_str(text) if backend.normalizer else text
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
    return [token.id for piece in pieces for token in backend.model.tokenize(piece)], []


def supervise(spans: Sequence[Span], tokens: Tokens, control_ids: frozenset[int]) -> tuple[list[bool], set[int]]:
    """Return which tokens are learned, and the turns whose start lies inside a token.

    Learned are answers, with what the template writes for them. A newline of the prompt and one of the answer may merge into one
    token: the prompt's ids are then no prefix of the row's. A control token that swallows the white space after it (Phi-3) does no
    such harm; it is not learned.
    """
    supervised, glued = [False] * len(tokens.ids), set()
    for i, span in enumerate(spans):
        if not span.learn:
            continue
        found = tokens.between(span.prompt, span.end)
        first = found.start
        while first < found.stop and tokens.starts[first] < span.prompt:
            if tokens.ids[first] not in control_ids:
                glued.add(i)
            first += 1
        supervised[first : found.stop] = [True] * (found.stop - first)
    return supervised, glued
