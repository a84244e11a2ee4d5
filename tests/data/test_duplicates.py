"""What stands in the data twice is found, to the bit or nearly, within a split and across; and nothing else is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.check.check_dataset import check_dataset
from data.check.check_record import Depth
from data.check.duplicates import MAX_DISTANCE, Match, close_pairs, find_duplicates, fold_media_keys
from data.check.found import Found
from tests.support.tiny_data import datasets, talk

HASHES = st.lists(st.integers(0, 2**64 - 1), max_size=12)
FLIPS = st.lists(st.tuples(st.integers(0, 11), st.lists(st.integers(0, 63), max_size=5)), max_size=12)


@given(hashes=HASHES, flips=FLIPS)
def test_close_pairs_are_those_that_comparing_all_finds(hashes: list[int], flips: list[tuple[int, list[int]]]) -> None:
    for place, bits in flips:
        if place < len(hashes):
            changed = hashes[place]
            for bit in bits:
                changed ^= 1 << bit
            hashes = [*hashes, changed]
    distinct = np.unique(np.array(hashes, dtype=np.uint64))
    every = [(a, b) for b in range(len(distinct)) for a in range(b)]
    expected = [(a, b) for a, b in every if (int(distinct[a]) ^ int(distinct[b])).bit_count() <= MAX_DISTANCE]
    assert sorted(map(tuple, close_pairs(distinct).tolist())) == sorted(expected)


def test_a_hundred_thousand_hashes_are_compared_without_comparing_all() -> None:
    """5e9 pairs would not end; that this does, and finds what was hidden, is the proof."""
    hashes = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    hashes[1000:2000] = hashes[:1000] ^ np.uint64(0b1000_0001_0000_0001)
    distinct = np.unique(hashes)
    pairs = close_pairs(distinct)
    assert len(pairs) == 1000
    assert (np.bitwise_count(distinct[pairs[:, 0]] ^ distinct[pairs[:, 1]]) == MAX_DISTANCE).all()


def test_keys_depend_on_the_media_and_on_their_order() -> None:
    texts = np.array([7, 7, 7, 7, 8], dtype=np.uint64)
    owners = np.array([1, 2, 2, 3, 3, 4, 4])
    media = np.array([5, 5, 6, 6, 5, 5, 6], dtype=np.uint64)
    assert len(set(fold_media_keys(texts, owners, media).tolist())) == 5
    assert fold_media_keys(texts[:2], owners[:1], media[:1])[0] == fold_media_keys(texts, owners, media)[0]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a, b, c, d: scenes of their own; copy: the bytes of a; small: a at half its size as JPEG; blank and pale: of one grey."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(3)
    for name in "abcd":
        cells = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8))
        cells.resize((320, 240), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    shutil.copy(folder / "a.png", folder / "copy.png")
    Image.open(folder / "a.png").resize((160, 120)).save(folder / "small.jpg", quality=80)
    Image.new("RGB", (32, 32), "white").save(folder / "blank.png")
    Image.new("RGB", (48, 32), "silver").save(folder / "pale.png")
    return folder


def checked(folder: Path, pictures: Path, train: list[Any], validation: list[Any], near: bool) -> tuple[list[Found], list[Found]]:
    for path in pictures.iterdir():
        shutil.copy(path, folder)
    return tuple(  # type: ignore[return-value]
        [one.found for one in check_dataset(datasets(folder, {name: records}), folder / "index", depth=Depth(near=near))]
        for name, records in (("train", train), ("validation", validation))
    )


def seen(name: str, answer: str = "A cat.") -> dict[str, Any]:
    return talk("<image>\nWhat is this?", answer, images=name)


TRAIN = [
    talk("Hi", "Hello."),  # 0
    seen("a.png"),
    talk("Hi", "Hello."),  # 2: repeats 0
    seen("copy.png"),  # 3: repeats 1 from another file
    seen("b.png"),
    seen("a.png", "Another answer."),  # 5: its picture may stand there again
    talk("hi!", "HELLO"),  # 6: nearly 0
    seen("small.jpg"),  # 7: nearly 1
    seen("blank.png"),
    seen("pale.png"),  # 9: as empty as 8, which tells nothing
    seen("gone.png"),
    seen("gone.png"),  # 11: both are bad, and not compared
    "{",
    "{",
]
VALIDATION = [
    talk("Hi", "Hello."),  # 14: repeats 0
    seen("c.png"),
    seen("b.png", "Something else."),  # 16: its picture is in training
    seen("c.png"),  # 17: repeats 15
    seen("small.jpg", "A question of its own."),  # 18: its picture is in training, to the bit and in another size
    seen("d.png"),
]


def test_what_is_equal_is_found_within_and_across(tmp_path: Path, pictures: Path) -> None:
    train, validation = checked(tmp_path, pictures, TRAIN, VALIDATION, near=False)
    assert find_duplicates(train, validation) == [
        Match("duplicate", 2, 0),
        Match("duplicate", 3, 1),
        Match("leak", 14, 0),
        Match("shared_medium", 16, 4),
        Match("duplicate", 17, 15),
        Match("shared_medium", 18, 7),
    ]


def test_what_is_alike_is_found_once_more(tmp_path: Path, pictures: Path) -> None:
    alike = [seen("small.jpg", "a CAT"), seen("pale.png", "Yes.")]
    train, validation = checked(tmp_path, pictures, [record for record in TRAIN if record != seen("small.jpg")], alike, near=True)
    exact = find_duplicates(train, validation)
    assert [match for match in find_duplicates(train, validation, near=True) if match not in exact] == [
        Match("near_duplicate", 6, 0),
        Match("near_leak", 13, 1),
        Match("near_shared_medium", 13, 1),
    ]
    assert exact == [Match("duplicate", 2, 0), Match("duplicate", 3, 1), Match("shared_medium", 14, 8)]


def test_a_copy_in_another_size_is_told_beside_one_to_the_bit(tmp_path: Path, pictures: Path) -> None:
    train, validation = checked(
        tmp_path, pictures, [seen("a.png")], [seen("copy.png", "One."), seen("small.jpg", "Two.")], near=True
    )
    assert find_duplicates(train, validation, near=True) == [Match("shared_medium", 1, 0), Match("near_shared_medium", 2, 0)]


def test_the_order_of_media_and_who_speaks_are_part_of_a_record(tmp_path: Path, pictures: Path) -> None:
    two = "<image><image> Which?"
    records = [
        talk(two, "One.", images=["a.png", "b.png"]),
        talk(two, "One.", images=["b.png", "a.png"]),
        talk("One.", "Two."),
        talk("Two.", "One."),
    ]
    train, validation = checked(tmp_path, pictures, records, [talk("Other?", "Yes.")], near=True)
    assert find_duplicates(train, validation, near=True) == []


def test_without_validation_there_are_no_leaks(tmp_path: Path, pictures: Path) -> None:
    train, _ = checked(tmp_path, pictures, TRAIN, VALIDATION, near=False)
    assert find_duplicates(train, []) == [Match("duplicate", 2, 0), Match("duplicate", 3, 1)]
