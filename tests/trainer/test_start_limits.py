"""One record blocks no start: its size, rounds and media are judged before any work, and whatever it holds is looked at once."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from data.check import duplicates
from data.check.certificate import certify
from data.check.duplicates import fold_media_keys
from data.config import DataConfig, SourceConfig
from data.dataset import Rejected, open_dataset
from data.index import reader as rows
from data.index.record_index import RecordIndex
from data.index.table import Table
from data.media.record_media import RecordMedia
from data.records import media_refs, turns
from data.records.media_refs import MediaRef
from data.records.record import RecordError, parse
from model.files.tensor_files import LazyTensor
from model.weights.materialise import Layer, materialise, parameters_on_meta
from tests.support.tiny_data import SPECS, dataset, grey, talk, template
from trainer.distributed.world import World
from trainer.machine import processes
from trainer.records import freeze_lengths as plan_lengths

MANY = 50


def test_rounds_are_counted_before_a_turn_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "MAX_TURNS", 4)
    assert len(parse(talk("a", "b", "c", "d"), "m.json:1").turns) == 4
    with pytest.raises(RecordError, match=r"m.json:1 x: conversations: has 6 turns; at most 4 are read: make several records"):
        parse({"id": "x", "conversations": [0] * 6}, "m.json:1")


def test_media_are_counted_before_a_path_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_refs, "MAX_MEDIA", 3)
    assert len(parse(talk("<image>" * 3, "b", images=["a.png"] * 3), "m.json:1").media) == 3
    with pytest.raises(RecordError, match=r"m.json:1 x: image: names 4 image files; at most 3 are read: make several records"):
        parse(talk("<image>" * 4, "b", id="x") | {"image": [0] * 4}, "m.json:1")
    parts = [{"type": "image", "path": "a.png"}] * 4
    inline = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(RecordError, match="names 4 image files; at most 3"):
        parse(inline, "m.json:1")


def test_brackets_are_counted_before_the_text_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_RECORD_BRACKETS", 5)
    assert rows.decode_json(b'[{}, {}, {}, "]"]') == [{}, {}, {}, "]"]
    monkeypatch.setattr(rows, "parse_json", lambda text: pytest.fail("parsed"))
    with pytest.raises(rows.RowError, match="has 6 opening brackets; at most 5 are read"):
        rows.decode_json(b"[{}, {}, {}, {}, {}]")


def test_a_record_over_a_limit_is_quarantined_and_its_neighbours_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "MAX_TURNS", 4)
    data = dataset(tmp_path, [talk("Hi", "Hello."), talk(*["a", "b"] * 3), talk("Hi", "Hello.")])
    items = [data[i] for i in range(3)]
    assert [isinstance(item, Rejected) for item in items] == [False, True, False]
    assert isinstance(items[1], Rejected) and items[1].where == "mix.jsonl:2" and not items[1].too_long


class Counted(tuple[MediaRef, ...]):
    """Counts how often its media are gone through."""

    walks = 0

    def __iter__(self) -> Iterator[MediaRef]:
        Counted.walks += 1
        return super().__iter__()


def test_media_of_a_record_are_counted_once(tmp_path: Path) -> None:
    name = grey(tmp_path, 7)
    data = dataset(tmp_path, [talk("<image>" * MANY, "b", images=[name] * MANY)])
    record = data.record(0)
    media: RecordMedia = data.media(0, record)
    object.__setattr__(record, "media", Counted(record.media))
    Counted.walks = 0
    assert len([media.measure(ref) for ref in tuple.__iter__(record.media)]) == MANY
    assert Counted.walks == 1


def archive(path: Path, picture: bytes) -> None:
    names = [f"k.{i}.png" for i in range(MANY)]
    text = json.dumps(talk("<image>" * MANY, "b", images=names)).encode()
    with tarfile.open(path, "w") as tar:
        for name, content in [("k.json", text), *((name, picture) for name in names)]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_members_of_an_archive_are_listed_once_per_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive(tmp_path / "m.tar", (tmp_path / grey(tmp_path, 7)).read_bytes())
    index = RecordIndex.open(SourceConfig(str(tmp_path / "m.tar")), tmp_path / "index", SPECS)
    listed: list[str] = []
    members_of = Table.members_of

    def listing(self: Table, i: int) -> Iterator[tuple[str, int, int]]:
        for member in members_of(self, i):
            listed.append(member[0])
            yield member

    monkeypatch.setattr(Table, "members_of", listing)
    record = parse(index.raw(0), index.where(0), index.name(0))
    assert all(index.blob(0, ref) is not None for ref in record.media) and len(record.media) == MANY
    assert len(listed) < 3 * MANY


def test_bytes_of_a_row_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    from data.index.parquet import ParquetRows

    row = talk("<image>" * MANY, "b") | {"images": [{"bytes": bytes([i]), "path": f"{i}.png"} for i in range(MANY)]}
    parquet.write_table(pyarrow.Table.from_pylist([row, row]), tmp_path / "m.parquet")
    index = RecordIndex.open(SourceConfig(str(tmp_path / "m.parquet")), tmp_path / "index", SPECS)
    decoded: list[str] = []
    original = ParquetRows._row
    monkeypatch.setattr(ParquetRows, "_row", lambda self, i, column: decoded.append(column) or original(self, i, column))
    for i in (0, 1):
        record = parse(index.raw(i), index.where(i), index.name(i))
        found = [index.blob(i, ref) for ref in record.media]
        assert [blob.data for blob in found if blob is not None] == [bytes([k]) for k in range(MANY)]
    assert decoded == 2 * ["", "image", "images"]


def test_folding_looks_at_each_medium_once(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    owners = np.sort(random.integers(0, 20, 300))
    keys, parts = (random.integers(0, 2**63, n, dtype=np.uint64) for n in (20, 300))
    expected = duplicates._mixed(keys)
    for owner, part in zip(owners, parts):  # one after the other
        expected[owner : owner + 1] = duplicates._mixed(expected[owner : owner + 1] ^ part)
    sizes: list[int] = []
    mixed = duplicates._mixed
    monkeypatch.setattr(duplicates, "_mixed", lambda keys: sizes.append(len(keys)) or mixed(keys))
    assert np.array_equal(fold_media_keys(keys, owners, parts), expected)
    assert sum(sizes) == 20 + 300


def test_what_takes_long_at_a_start_tells_where_it_is(tmp_path: Path) -> None:
    told: list[str] = []
    good = [json.dumps(talk("Hi", "Hello."))] * 3
    (tmp_path / "mix.jsonl").write_text("\n".join(good))
    sources = (SourceConfig(str(tmp_path / "mix.jsonl")),)
    data = open_dataset(sources, DataConfig(), template(), SPECS, tmp_path / "index", on_progress=told.append)
    assert told == ["mix.jsonl"]
    certify(data.template, data.indexes[0], "mix", on_progress=told.append)
    assert sorted(told[1:]) == ["mix.jsonl:1", "mix.jsonl:2", "mix.jsonl:3"]
    with parameters_on_meta():
        model = nn.Linear(2, 2)
    values = {name: LazyTensor((2,) * p.ndim, lambda a, b, p=p: torch.ones(p.shape)[a:b]) for name, p in model.named_parameters()}
    materialise(model, [Layer("", lambda: values)], frozen_dtype=torch.float32, device=torch.device("cpu"), on_progress=told.append)
    assert told[4:] == ["weight", "bias"]


def test_a_long_index_is_told_to_the_ranks_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    turns_of_wait: list[bool] = []
    monkeypatch.setattr(plan_lengths, "_sum_done", lambda world, done: turns_of_wait.append(done))
    clock = iter(range(0, 1000, 25))
    monkeypatch.setattr(plan_lengths.time, "monotonic", lambda: float(next(clock)))
    signs = plan_lengths.MainRankProgress(World(0, 0, 2, torch.device("cpu")), told.append)
    for k in range(8):
        signs(str(k))
    assert told == [str(k) for k in range(8)] and turns_of_wait == [False, False]


def test_bytes_that_pass_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = processes.traffic()
    (tmp_path / "big").write_bytes(bytes(2 * processes.STEP))
    between = processes.traffic()
    (tmp_path / "big").read_bytes()
    assert between - before in (2, 3) and processes.traffic() - between in (2, 3)
    monkeypatch.setattr(processes, "COUNTERS", tmp_path / "missing")
    monkeypatch.setattr(processes.time, "monotonic", lambda: 17.5)
    assert processes.traffic() == 17  # nothing is known, and nobody is blamed
