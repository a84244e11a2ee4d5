"""Records and media that occur more than once in the data, exactly or nearly; and what validation shares with training.

All comparisons are of 64-bit keys of the whole dataset at once, in numpy; no file is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from data.check.found import Found
from data.index.table import KINDS

MAX_DISTANCE = 3
"""Bits of 64 that may differ in pictures that look alike; copies of one picture in other sizes and qualities differ by 0 to 2."""
_TELLING = 6
"""Fewest bits of either value that a picture's hash needs to tell anything: the hashes of blank pages are all alike."""
_BANDS = ((0, 11), (11, 11), (22, 11), (33, 11), (44, 10), (54, 10))  # first bit, bits


@dataclass(frozen=True)
class Match:
    """A record that repeats an earlier one, or holds a medium that an earlier one has; numbers are over all sources."""

    kind: str  # duplicate | leak | shared_medium; with the prefix near_ where the two are not equal to the bit
    record: int
    other: int  # the first record like it; one of training, if any is


@dataclass(frozen=True)
class _Data:
    """Columns of all sources, one after the other: training first."""

    num_train: int
    texts: np.ndarray  # (N,)
    words: np.ndarray  # (N,)
    owners: np.ndarray  # (M,) record of each medium, ascending
    contents: np.ndarray  # (M,)
    pictures: np.ndarray  # (M,)

    @property
    def sound(self) -> np.ndarray:
        """Return the mask (N,) of the records that could be read, with all of their media."""
        sound = self.texts != 0
        sound[self.owners[self.contents == 0]] = False
        return sound


def find_duplicates(train: Sequence[Found], validation: Sequence[Found], *, near: bool = False) -> list[Match]:
    """Find every record and medium that occurs again, in the order of the records that repeat. Sources count in their order.

    Training comes first. A record repeats another one if its turns are the same and its media have the same bytes (their size,
    start, middle and end). It nearly repeats another one, which is searched for if `near`, if its words and the look of its
    pictures are the same.
    """
    data = _data([*train, *validation], sum(len(found["texts"]) for found in train))
    exact = fold_media_keys(data.texts, data.owners, data.contents)
    matches = _repeated(data, exact, "")
    matches += [Match("shared_medium", *pair) for pair in _shared(data, data.contents, data.contents != 0)]
    if near:
        matches += _near(data, exact)
    return sorted(matches, key=lambda match: (match.record, match.kind))


def fold_media_keys(keys: np.ndarray, owners: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Return each record's key, (N,) uint64, with the keys of its media mixed in, in their order."""
    mixed = _mixed(keys)
    places = np.arange(len(owners)) - np.searchsorted(owners, owners)
    order, borders = np.argsort(places, kind="stable"), np.cumsum(np.bincount(places))
    for at in np.split(order, borders[:-1]):  # all first media, then all second ones: each medium is mixed in once
        mixed[owners[at]] = _mixed(mixed[owners[at]] ^ parts[at])
    return mixed


def close_pairs(hashes: np.ndarray) -> np.ndarray:
    """Return the places (P, 2) of all pairs among distinct `hashes` (H,) uint64 that differ by 1 to MAX_DISTANCE bits.

    Three differences leave three of six bands untouched: pairs are searched for among hashes that agree in three bands.
    """
    bands = [(hashes >> np.uint64(first)) & np.uint64((1 << bits) - 1) for first, bits in _BANDS]
    found = [np.empty((0, 2), dtype=np.int64)]
    for three in combinations(bands, len(_BANDS) - MAX_DISTANCE):
        key = three[0] | (three[1] << np.uint64(11)) | (three[2] << np.uint64(22))
        found.append(_among_equal(key, hashes))
    return np.unique(np.concatenate(found), axis=0)


def _among_equal(key: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Return close pairs of hashes with equal keys: in the order of keys, each hash is compared with later ones of its group."""
    order = np.argsort(key, kind="stable")
    ends = np.searchsorted(key[order], key[order], side="right")
    at, found = np.arange(len(order)), [np.empty((0, 2), dtype=np.int64)]
    for step in range(1, len(order)):
        at = at[at + step < ends[at]]
        if not len(at):
            break
        one, other = order[at], order[at + step]
        close = np.bitwise_count(hashes[one] ^ hashes[other]) <= MAX_DISTANCE
        found.append(np.sort(np.stack([one[close], other[close]], axis=1), axis=1))
    return np.concatenate(found)


def _data(sources: Sequence[Found], num_train: int) -> _Data:
    """Concatenate the columns of all sources; hashes of media that are no picture, or a blank one, become 0."""
    starts = np.cumsum([0, *(len(found["texts"]) for found in sources)])
    owners = [found["owners"] + start for found, start in zip(sources, starts)]
    columns = {
        name: np.concatenate([found[name] for found in sources]) for name in ("texts", "words", "contents", "pictures", "kinds")
    }
    telling = np.bitwise_count(columns["pictures"])
    blind = (columns.pop("kinds") != KINDS.index("image")) | (telling < _TELLING) | (telling > 64 - _TELLING)
    columns["pictures"] = np.where(blind, np.uint64(0), columns["pictures"])
    return _Data(num_train, owners=np.concatenate(owners), **columns)


def _repeated(data: _Data, keys: np.ndarray, prefix: str, different: np.ndarray | None = None) -> list[Match]:
    """Find valid records with the key of an earlier one; where `different` (N,) is given, only those that differ in it."""
    places = np.flatnonzero(data.sound)
    _, first, group = np.unique(keys[places], return_index=True, return_inverse=True)
    others = places[first[group]]
    again = places != others
    if different is not None:
        again &= different[places] != different[others]
    leak = (places >= data.num_train) & (others < data.num_train)
    return [
        Match(prefix + ("leak" if is_leak else "duplicate"), int(one), int(other))
        for one, other, is_leak in zip(places[again], others[again], leak[again])
    ]


def _shared(data: _Data, keys: np.ndarray, known: np.ndarray) -> list[tuple[int, int]]:
    """Return (validation record, training record) for every key that media of both have: the first record of each."""
    held_out = data.owners >= data.num_train
    trained, first_trained = np.unique(keys[known & ~held_out], return_index=True)
    tested, first_tested = np.unique(keys[known & held_out], return_index=True)
    _, at, there = np.intersect1d(tested, trained, return_indices=True)
    one = data.owners[known & held_out][first_tested[at]]
    other = data.owners[known & ~held_out][first_trained[there]]
    return sorted(zip(one.tolist(), other.tolist()))


def _near(data: _Data, exact: np.ndarray) -> list[Match]:
    """Find records and shared media that are alike and not equal. Pictures are alike if a chain of close hashes connects them."""
    known = data.pictures != 0
    hashes, inverse = np.unique(data.pictures[known], return_inverse=True)
    looks = data.contents.copy()  # media that are no picture, or a blank one, are only like equal media
    looks[known] = _components(len(hashes), close_pairs(hashes)).astype(np.uint64)[inverse]
    held_out = data.owners >= data.num_train
    equal = held_out & np.isin(data.contents, data.contents[~held_out])
    return [
        *_repeated(data, fold_media_keys(data.words, data.owners, looks), "near_", exact),
        *(Match("near_shared_medium", *pair) for pair in _shared(data, looks, known & ~equal)),
    ]


def _components(count: int, pairs: np.ndarray) -> np.ndarray:
    """Return the smallest place that each place is connected with by pairs, (count,)."""
    labels = np.arange(count)
    while len(pairs):
        least = np.minimum(labels[pairs[:, 0]], labels[pairs[:, 1]])
        before = labels.copy()
        np.minimum.at(labels, pairs[:, 0], least)
        np.minimum.at(labels, pairs[:, 1], least)
        labels = labels[labels]
        if (labels == before).all():
            break
    return labels


def _mixed(keys: np.ndarray) -> np.ndarray:
    """Mix the bits of each key (the finaliser of SplitMix64), so that mixing in another key is not undone by a third."""
    keys = keys + np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))
