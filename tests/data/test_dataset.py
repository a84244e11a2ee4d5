"""A record becomes a sample exactly, or a located reason; never another record."""

import errno
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.config import DataConfig
from data.dataset import Rejected, open_dataset
from data.media.blob import Blob
from data.records.record import RecordError, parse
from model.batch import IGNORE_INDEX
from model.errors import ConfigError
from tests.support.tiny_data import SPECS, WIDTH, dataset, datasets, grey, image_id, level, sample, source, talk, template


def rejected(item: object) -> Rejected:
    assert isinstance(item, Rejected), item
    return item


def test_labels_are_the_next_supervised_token(tmp_path: Path) -> None:
    record = talk("Hi there.", "Good day.", "And now?", "Bye.")
    found = sample(dataset(tmp_path, [record]), 0)
    encoded = template().encode(parse(record, "mix.jsonl:1"))
    assert found.input_ids.tolist() == encoded.input_ids
    expected = [i if s else IGNORE_INDEX for i, s in zip(encoded.input_ids, encoded.supervised)][1:] + [IGNORE_INDEX]
    assert found.labels.tolist() == expected
    assert sum(label != IGNORE_INDEX for label in found.labels) == sum(encoded.supervised) > 0


def test_placeholders_take_their_tokens_and_their_pictures(tmp_path: Path) -> None:
    images = [grey(tmp_path, 10), grey(tmp_path, 20)]
    record = talk("<image> and <image>?", "Two.", images=images)
    found = sample(dataset(tmp_path, [record]), 0)
    encoded = template().encode(parse(record, "mix.jsonl:1"))
    expected: list[int] = []
    for token in encoded.input_ids:
        expected += [token] * (WIDTH if token == image_id() else 1)
    assert found.input_ids.tolist() == expected
    assert [level(medium.values[0]) for medium in found.media["image"]] == [10, 20]
    for medium in found.media["image"]:
        assert medium.length == WIDTH
        assert (found.input_ids[medium.start : medium.start + WIDTH] == image_id()).all()
    taken = [range(medium.start, medium.start + WIDTH) for medium in found.media["image"]]
    assert sorted(p for r in taken for p in r) == np.flatnonzero(found.input_ids == image_id()).tolist()
    answer = [label for label in found.labels if label != IGNORE_INDEX]
    assert answer == [i for i, s in zip(encoded.input_ids, encoded.supervised) if s]


def test_adjacent_placeholders_keep_their_borders(tmp_path: Path) -> None:
    record = talk("<image><image>", "Two.", images=[grey(tmp_path, 10), grey(tmp_path, 20)])
    first, second = sample(dataset(tmp_path, [record]), 0).media["image"]
    assert second.start == first.start + WIDTH
    assert (level(first.values[0]), level(second.values[0])) == (10, 20)


def test_whole_rounds_are_dropped_with_their_pictures(tmp_path: Path) -> None:
    grey(tmp_path, 10)
    rounds = ["<image> one?", "One.", "<image> two?", "Two."]
    first = sample(dataset(tmp_path, [talk(*rounds[:2], images=["10.png"])]), 0)
    # The second picture does not exist: what is dropped is not opened.
    records = [talk(*rounds, images=["10.png", "missing.png"])]
    room = len(first.input_ids)
    kept = sample(dataset(tmp_path, records, max_length=room), 0)
    assert kept.input_ids.tolist() == first.input_ids.tolist() and kept.labels.tolist() == first.labels.tolist()
    assert [level(medium.values[0]) for medium in kept.media["image"]] == [10]
    refused = rejected(dataset(tmp_path, records, max_length=room - 1)[0])
    assert refused.too_long and f"takes {room} tokens, data.max_length is {room - 1}" in refused.reason
    assert not rejected(dataset(tmp_path, records)[0]).too_long


def test_a_sample_of_just_the_limit_is_whole(tmp_path: Path) -> None:
    records = [talk("One?", "One.", "Two?", "Two.")]
    length = len(sample(dataset(tmp_path, records), 0).input_ids)
    assert len(sample(dataset(tmp_path, records, max_length=length), 0).input_ids) == length
    assert len(sample(dataset(tmp_path, records, max_length=length - 1), 0).input_ids) < length


def test_too_long_never_stops_a_run(tmp_path: Path) -> None:
    data = dataset(tmp_path, [talk("word " * 50, "Yes.")], max_length=20, on_bad_sample="error")
    assert rejected(data[0]).too_long


BAD: list[tuple[Any, str]] = [
    ('{"id": ', "json: "),
    ([1], "record: "),
    (talk("Hi", id="x"), "conversations: "),
    (talk("Hi", "", id="x"), "conversations"),
    (talk("Hi <image>", "a", id="x"), "image: "),
    (talk("Hi", "a", images=["missing.png"], id="x"), "image: .*missing.png' does not exist"),
    (talk("Hi", "a", images=["../up.png"], id="x"), "image: '../up.png' leaves media_root"),
    (talk("Hi", "a", images=["/etc/hostname"], id="x"), "image: '/etc/hostname' is absolute"),
    (talk("Hi", "a", images=["broken.png"], id="x"), "image: .*broken.png' cannot be decoded"),
    (talk("Hi", "a", images=["text.png"], id="x"), "image: .*text.png' is none of JPEG"),
    (talk("Hi", "a", images=["large.png"], id="x"), "image: .*data.max_pixels allows 1000"),
    (talk("Hi", "a", images=["1.png"] * 3, id="x"), "image: 3 images; data.max_images allows 2"),
]


@pytest.mark.parametrize("bad,reason", BAD)
def test_every_error_is_located(tmp_path: Path, bad: Any, reason: str) -> None:
    grey(tmp_path, 1)
    (tmp_path / "broken.png").write_bytes((tmp_path / "1.png").read_bytes()[:50])
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (40, 40)).save(tmp_path / "large.png")
    records, limits = [talk("Hi", "a"), bad, talk("Hi", "b")], {"max_pixels": 1000, "max_images": 2}
    name = "x" if isinstance(bad, dict) and "id" in bad else "2"
    found = rejected(dataset(tmp_path, records, **limits)[1])
    assert (found.sample_id, found.source, found.where, found.id, found.too_long) == (1, "mix", "mix.jsonl:2", name, False)
    with pytest.raises(RecordError, match=f"^mix.jsonl:2 {name}: {reason}") as caught:
        dataset(tmp_path, records, on_bad_sample="error", **limits)[1]
    assert str(caught.value) == f"mix.jsonl:2 {name}: {found.reason}"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert sample(dataset(tmp_path, records, **limits), 2).sample_id == 2


def test_a_picture_without_a_vision_part_is_named(tmp_path: Path) -> None:
    data = dataset(tmp_path, [talk("Hi", "a", images=[grey(tmp_path, 1)])])
    without = type(data)(data.indexes, data.sources, template(), {}, data.config)
    assert "no part that reads it" in rejected(without[0]).reason and "image" in SPECS


def test_sources_are_numbered_one_after_the_other(tmp_path: Path) -> None:
    grey(tmp_path, 7)
    named = {"a": [talk("1?", "1"), talk("2?", "2")], "b": [talk("3?", "3", images="7.png")]}
    data = datasets(tmp_path, named, frozenset({1}), max_length=60)
    assert len(data) == 3 and data.source_names == ["a", "b"] and data.source_ids.tolist() == [0, 0, 1]
    assert data.modalities.tolist() == [0, 0, 1]
    last = sample(data, 2)
    assert (last.sample_id, last.source_id) == (2, 1)
    out = rejected(data[1])
    assert (out.sample_id, out.source, out.where) == (1, "a", "a.jsonl:2") and "quarantined by an earlier start" in out.reason
    for beyond in (3, -1):
        with pytest.raises(IndexError, match=f"sample {beyond}"):
            data[beyond]


def test_planned_lengths_know_that_too_long_is_cut(tmp_path: Path) -> None:
    data = dataset(tmp_path, [talk("Hi", "a" * 4000), talk("Hi", "b")], max_length=100)
    assert data.lengths.dtype == np.int32
    assert data.lengths[0] == 100 > data.lengths[1] > 0


@pytest.mark.parametrize("per_modality", [False, True])
def test_a_media_root_that_is_not_there_is_one_error_and_not_one_per_picture(tmp_path: Path, per_modality: bool) -> None:
    gone = str(tmp_path / "gone")
    made = replace(source(tmp_path, [talk("Hi", "a")]), media_root={"image": gone} if per_modality else gone)
    key = "media_root.image" if per_modality else "media_root"
    with pytest.raises(ConfigError, match=rf"data\.sources 'mix': {key} = '.*gone' is no folder"):
        open_dataset((made,), DataConfig(), template(), SPECS, tmp_path / "index")


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_disk_that_fails_costs_a_record_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    (tmp_path / "frames").mkdir()
    name = grey(tmp_path, 3) if kind == "image" else "frames"
    data = dataset(tmp_path, [talk(f"<{kind}>", "A cat.") | {kind: name}])

    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Blob if kind == "image" else os, "open" if kind == "image" else "listdir", fails)
    item = data[0]
    assert isinstance(item, Rejected) and (item.where, item.id) == ("mix.jsonl:1", "1")
    assert item.reason.startswith(f"{kind}: ") and name in item.reason and item.reason.endswith("Input/output error")
