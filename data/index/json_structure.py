"""The structural bytes of JSON, found for a whole window at once: quotes, brackets, backslashes and line ends.

Everything after the first pass costs by the number of such bytes, about one in twelve, not by the size of the window.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

_QUOTE, _BACKSLASH, _NEWLINE, _COLON = b'"\\\n:'
_MAX_BLANKS = 64  # between a key, its colon and its value: more are legal, but only an estimate is at stake


@dataclass(frozen=True)
class Events:
    """Structural bytes of a window, in order (E,)."""

    at: np.ndarray  # (E,) int64 place in the window
    byte: np.ndarray  # (E,) uint8
    quote: np.ndarray  # (E,) bool: opens or closes a string
    escaped: np.ndarray  # (E,) bool: a quote after a backslash that is not escaped itself
    saved: np.ndarray  # (E,) int32 running total of the bytes by which escapes are longer than the text they encode

    def __getitem__(self, chosen: slice | np.ndarray) -> Events:
        return Events(*(getattr(self, f.name)[chosen] for f in fields(Events)))


def find_events(window: np.ndarray) -> Events:
    """Return the structural bytes of a window (n,) of uint8 that begins outside strings.

    A quote counts as escaped by the backslashes before it.
    """
    at = np.flatnonzero(_is_structural(window))
    byte = window[at]
    quote = byte == _QUOTE
    escaped, saved = np.zeros(len(at), dtype=bool), np.zeros(len(at), dtype=np.int32)
    backslashes = np.flatnonzero(byte == _BACKSLASH)
    if len(backslashes):
        _mark_escapes(window, at, byte, backslashes, escaped, saved)
        quote &= ~escaped
    return Events(at, byte, quote, escaped, saved)


def _is_structural(window: np.ndarray) -> np.ndarray:
    """Return a mask (n,) of the bytes that are events.

    Computed in place, because allocating fresh memory costs more than the comparisons.
    """
    scratch, found = np.empty((2, len(window)), dtype=np.uint8)
    np.bitwise_or(window, 0x20, out=scratch)  # brackets become braces, which differ by 2
    np.subtract(scratch, ord("{"), out=scratch)
    np.bitwise_and(scratch, 0xFD, out=scratch)
    found, same = found.view(bool), scratch.view(bool)
    np.equal(scratch, 0, out=found)
    for byte in (_QUOTE, _BACKSLASH, _NEWLINE):
        np.equal(window, byte, out=same)
        np.logical_or(found, same, out=found)
    return found


def _mark_escapes(
    window: np.ndarray, at: np.ndarray, byte: np.ndarray, backslashes: np.ndarray, escaped: np.ndarray, saved: np.ndarray
) -> None:
    """Fill `escaped` and `saved` in place. In a run of backslashes each second one is escaped by the one before it."""
    places = at[backslashes]
    firsts = np.flatnonzero(np.diff(places, prepend=-2) != 1)
    lengths = np.diff(firsts, append=len(places))
    odd = lengths % 2 == 1
    last = backslashes[firsts + lengths - 1]
    after = np.minimum(last + 1, len(at) - 1)
    escaped[after[odd & (byte[after] == _QUOTE) & (at[after] == at[last] + 1)]] = True
    extra = lengths // 2 + odd
    unicode = np.flatnonzero(odd & (window[np.minimum(at[last] + 1, len(window) - 1)] == ord("u")))
    extra[unicode] += 5 - _utf8_bytes(window, at[last[unicode]] + 2)
    saved[backslashes[firsts]] = extra
    np.cumsum(saved, out=saved)


def _utf8_bytes(window: np.ndarray, digits: np.ndarray) -> np.ndarray:
    """Return the UTF-8 sizes of the characters whose four hexadecimal digits begin at `digits`.

    Each half of a surrogate pair counts two.
    """
    first, second, third = (window[np.minimum(digits + k, len(window) - 1)] for k in range(3))
    zero = first == ord("0")
    short = zero & (second <= ord("7"))
    ascii_ = zero & (second == ord("0")) & (third <= ord("7"))
    pair = ((first | 0x20) == ord("d")) & (second >= ord("8"))
    return 3 - short.astype(np.int64) - ascii_ - pair


def nesting(events: Events) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return three arrays (E,): whether each event is inside a string, its opening quote included; +1 or -1 for a bracket outside
    strings, else 0; and the number of open brackets after the event, int32.
    """
    inside = np.bitwise_xor.accumulate(events.quote)
    byte = events.byte
    is_bracket = (byte > _QUOTE) & (byte != _BACKSLASH) & ~inside
    shift = (byte & 2).view(np.int8) - 1  # opening brackets have this bit, closing ones have not
    shift *= is_bracket
    return inside, shift, np.cumsum(shift, dtype=np.int32)


def after_colon(window: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for strings whose closing quotes are at `ends` (k,), whether each is a key (k,) and where its value begins (k,)."""
    colon = _past_blanks(window, ends + 1)
    is_key = window[colon] == _COLON
    return is_key, _past_blanks(window, np.minimum(colon + 1, len(window) - 1))


def _past_blanks(window: np.ndarray, places: np.ndarray) -> np.ndarray:
    places = np.minimum(places, len(window) - 1)
    for _ in range(_MAX_BLANKS):
        blank = window[places] <= 0x20
        if not blank.any():
            break
        places = np.minimum(places + blank, len(window) - 1)
    return places


def spelling(window: np.ndarray, starts: np.ndarray, word: bytes) -> np.ndarray:
    """Return the indices, in order, of the entries of `starts` (k,) at which `word` begins."""
    chosen = np.flatnonzero(window[starts] == word[0])
    places = starts[chosen]
    same = np.ones(len(places), dtype=bool)
    for k in range(1, len(word)):
        same &= window[np.minimum(places + k, len(window) - 1)] == word[k]
    return chosen[same]
