"""Bytes made wrong: a sound file changed in a few places, as hostile or broken ones are."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
"""Where sizes, signs and products overflow."""


def mutated(draw: random.Random, seeds: Sequence[bytes], words: Sequence[bytes] = ()) -> bytes:
    """One of `seeds` with one to six changes. `words`: what means something in this format."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
        kind = draw.choice(WAYS if not words else (*WAYS, *(WORDS * 3)))
        kind(draw, data, seeds, words)
    return bytes(data)


Way = Callable[[random.Random, bytearray, Sequence[bytes], Sequence[bytes]], None]


def _place(draw: random.Random, data: bytearray) -> int:
    """Headers stand at both ends; what lies between is mostly contents."""
    size = len(data)
    return draw.randrange(size + 1) if draw.random() < 0.5 else draw.choice((draw.randrange(min(size, 64) + 1), max(0, size - 40)))


def _flip(draw: random.Random, data: bytearray, seeds: Sequence[bytes], words: Sequence[bytes]) -> None:
    if data:
        data[min(_place(draw, data), len(data) - 1)] ^= 1 << draw.randrange(8)


def _byte(draw: random.Random, data: bytearray, seeds: Sequence[bytes], words: Sequence[bytes]) -> None:
    at = _place(draw, data)
    data[at : at + 1] = bytes([draw.randrange(256)])


def _number(draw: random.Random, data: bytearray, seeds: Sequence[bytes], words: Sequence[bytes]) -> None:
    at, width = _place(draw, data), draw.choice((1, 2, 4, 8))
    data[at : at + width] = (draw.choice(NUMBERS) % 256**width).to_bytes(width, draw.choice(("little", "big")))


def _cut(draw: random.Random, data: bytearray, seeds: Sequence[bytes], words: Sequence[bytes]) -> None:
    del data[_place(draw, data) :]


def _remove(draw: random.Random, data: bytearray, seeds: Sequence[bytes], words: Sequence[bytes]) -> None:
    at = _place(draw, data)
    del data[at : at + draw.choice((1, 2, 4, 8, 40))]


def _repeat(draw: random.Random, data: bytearray, seeds: Sequence[bytes], words: Sequence[bytes]) -> None:
    at, size = _place(draw, data), draw.choice((1, 4, 40))
    data[at:at] = bytes(data[at : at + size]) * draw.choice((1, 2, 50))


def _splice(draw: random.Random, data: bytearray, seeds: Sequence[bytes], words: Sequence[bytes]) -> None:
    other = draw.choice(seeds)
    data[_place(draw, data) :] = other[draw.randrange(len(other) + 1) :]


def _noise(draw: random.Random, data: bytearray, seeds: Sequence[bytes], words: Sequence[bytes]) -> None:
    at = _place(draw, data)
    data[at:at] = draw.randbytes(draw.choice((1, 3, 16)))


def _word(draw: random.Random, data: bytearray, seeds: Sequence[bytes], words: Sequence[bytes]) -> None:
    at, word = _place(draw, data), draw.choice(words)
    data[at : at + draw.choice((0, 0, len(word)))] = word


def _number_in_text(draw: random.Random, data: bytearray, seeds: Sequence[bytes], words: Sequence[bytes]) -> None:
    """A run of digits becomes another number."""
    starts = [i for i in range(len(data)) if 48 <= data[i] < 58 and (i == 0 or not 48 <= data[i - 1] < 58)]
    if starts:
        first = last = draw.choice(starts)
        while last < len(data) and 48 <= data[last] < 58:
            last += 1
        data[first:last] = draw.choice((b"-1", b"1e999", b"null", b"9" * 30, b"1" * 5000, str(draw.choice(NUMBERS)).encode()))


WAYS: tuple[Way, ...] = (_flip, _flip, _byte, _number, _cut, _remove, _repeat, _splice, _noise)
WORDS: tuple[Way, ...] = (_word, _number_in_text)
