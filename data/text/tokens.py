"""Tokenising of a rendered conversation: control tokens that a person wrote stay text, and learned ids are flagged."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from transformers import PreTrainedTokenizerFast

from data.text.layouts import Span


@dataclass(frozen=True)
class Tokens:
    """Token ids and the characters that they stand for, in order."""

    ids: list[int]
    offsets: list[tuple[int, int]]  # first character, one past the last; as the tokenizer gives them, for few of them are looked at

    def between(self, low: int, high: int) -> slice:
        """Return the slice of tokens that overlap text[low:high].

        Overlap counts, because the bytes of one emoji are several tokens of equal offsets.
        """
        return slice(self._ending_by(low), self.starting_before(high))

    def inside(self, low: int, high: int) -> list[int]:
        """Return the ids of the tokens that stand wholly in text[low:high]."""
        return self.ids[self.starting_before(low) : self._ending_by(high)]

    def starting_before(self, at: int) -> int:
        """Return how many tokens start before a character."""
        return bisect_left(self.offsets, (at,))  # a pair that starts there is more than (at,), as it is longer

    def _ending_by(self, at: int) -> int:
        return bisect_right(self.offsets, at, key=itemgetter(1))

    def moved(self, characters: int) -> Tokens:
        """Return the tokens of the same text, where it begins `characters` later."""
        if not characters:
            return self
        return Tokens(self.ids, [(low + characters, high + characters) for low, high in self.offsets])

    def after(self, count: int, characters: int) -> Tokens:
        """Return the tokens but the first `count`, which stand for the first `characters` of the text, in the rest of the text."""
        return Tokens(self.ids[count:], self.offsets[count:]).moved(-characters)


def tokenize(tokenizer: PreTrainedTokenizerFast, text: str, written: Sequence[tuple[int, int]], first: int = 0) -> Tokens:
    """Tokenise text[first:]. Each border pair of `written` is a control token that a person wrote, which stays plain text.

    Equals `apply_chat_template(sanitize_control_tokens=True)` of transformers 5.23, which older versions do not have.
    """
    if not written:
        return _call(tokenizer, text[first:]).moved(first)
    cuts = [cut for pair in written for cut in pair]
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for k, (low, high) in enumerate(zip([first, *cuts], [*cuts, len(text)])):
        if low == high:
            continue
        if k % 2:
            plain = _plain_ids(tokenizer, text[low:high])
            found = Tokens(plain, [(low, high)] * len(plain))
        else:
            found = (_after_newline if k else _call)(tokenizer, text[low:high]).moved(low)
        ids.extend(found.ids)
        offsets.extend(found.offsets)
    return Tokens(ids, offsets)


def _call(tokenizer: PreTrainedTokenizerFast, text: str) -> Tokens:
    """Tokenise a text as `tokenizer(text, add_special_tokens=False)` does.

    A class of the library that does not change that call is passed by: for a short text it costs half as much as tokenising does.
    """
    if not text:
        return Tokens([], [])
    if _is_plain(type(tokenizer)):
        backend = tokenizer.backend_tokenizer
        # What the call sets before it tokenises, and what an earlier call may have left behind.
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if backend.encode_special_tokens != tokenizer.split_special_tokens:
            backend.encode_special_tokens = tokenizer.split_special_tokens
        encoding = backend.encode(text, add_special_tokens=False)
        return Tokens(encoding.ids, encoding.offsets)
    # verbose=False: transformers would warn of texts longer than its own limit; data.max_length is ours.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return Tokens(list(encoded["input_ids"]), list(encoded["offset_mapping"]))


def _is_plain(kind: type[PreTrainedTokenizerFast]) -> bool:
    """Return whether a class of tokenizers calls its backend as the library's own class does."""
    own = PreTrainedTokenizerFast
    return kind.__call__ is own.__call__ and kind._encode_plus is own._encode_plus


def _after_newline(tokenizer: PreTrainedTokenizerFast, piece: str) -> Tokens:
    """Tokenise a piece from the middle of a text: a newline before it keeps SentencePiece from adding its prefix space.

    If the newline and the piece merge into one token, the newline cannot be removed again; such tokenizers add no prefix space.
    """
    newline = _call(tokenizer, "\n").ids
    found = _call(tokenizer, "\n" + piece)
    return found.after(len(newline), 1) if found.ids[: len(newline)] == newline else _call(tokenizer, piece)


def _plain_ids(tokenizer: PreTrainedTokenizerFast, piece: str) -> list[int]:
    """Return the ids of a control token from the middle of a text that stays plain text; see `_after_newline`."""
    newline = _call(tokenizer, "\n").ids
    ids = _without_added_tokens(tokenizer, "\n" + piece)
    return ids[len(newline) :] if ids[: len(newline)] == newline else _without_added_tokens(tokenizer, piece)


def _without_added_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Tokenise with the bare model, which knows no added token."""
    backend = tokenizer.backend_tokenizer
    text = backend.normalizer.normalize_str(text) if backend.normalizer else text
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
    return [token.id for piece in pieces for token in backend.model.tokenize(piece)]


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
        while first < found.stop and tokens.offsets[first][0] < span.prompt:
            if tokens.ids[first] not in control_ids:
                glued.add(i)
            first += 1
        supervised[first : found.stop] = [True] * (found.stop - first)
    return supervised, glued
