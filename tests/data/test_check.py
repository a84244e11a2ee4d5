"""A check finds what a run would reject, counts it exactly, goes on where it was stopped and does nothing twice."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
import tarfile
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from transformers import AddedToken

from data.check import check_dataset as check_run
from data.check import check_record as check
from data.check.check_dataset import SourceFound, check_dataset, parts_of, remove_stale
from data.check.check_record import TOO_LONG, Depth, check_record, check_records
from data.check.found import read_part
from data.check.measured_lengths import source_identities
from data.check.report import percentiles, summarise_source, summary_lines
from data.config import DataConfig, SourceConfig
from data.dataset import MultimodalDataset, Rejected, open_dataset
from data.media.record_media import RecordMedia
from data.records.record import Record, Turn
from data.sample import Sample
from data.text.template import load_template
from model.media_spec import AudioSpec
from tests.support.hostile import hostile, record
from tests.support.tiny_data import SPECS, datasets, grey, talk, template
from tests.support.tiny_media import tone, wav
from tests.support.tiny_tokenizers import tiny_tokenizer

CLEAN = 2  # records after each hostile one
AUDIO = AudioSpec(num_mels=80, window_frames=3000, full_window=False, strides=(1, 2))


class Corpus(NamedTuple):
    """Records of every hostile kind with clean ones between them, what a run makes of each, and what a full check found."""

    dataset: MultimodalDataset
    items: list[Sample | Rejected]
    bad: dict[int, Rejected]
    found: SourceFound


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "media").mkdir()
    lines = []
    for line, _ in hostile(folder / "media").values():
        lines += [line, *(record("sound.png" if k else None, answer=f"Cat {len(lines)} {k}.") for k in range(CLEAN))]
    (folder / "mix.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    source = SourceConfig(str(folder / "mix.jsonl"), media_root=str(folder / "media"))
    dataset = open_dataset((source,), DataConfig(max_images=4, max_length=400), template(), SPECS, folder / "index")
    items = [dataset[i] for i in range(len(dataset))]
    bad = {i: item for i, item in enumerate(items) if isinstance(item, Rejected)}
    assert list(bad) == list(range(0, len(dataset), CLEAN + 1)) and len(bad) >= 40
    (found,) = check_dataset(dataset, folder / "index", depth=Depth(decode=True))
    return Corpus(dataset, items, bad, found)


def test_what_a_run_would_reject_is_found_and_nothing_else(corpus: Corpus) -> None:
    problems = dict(corpus.found.found.problems)
    assert len(problems) == len(corpus.found.found.problems)  # one each
    assert list(problems) == list(corpus.bad)
    for i, item in corpus.bad.items():
        one = problems[i]
        assert item.reason.startswith(f"{one.field}: ")
        assert (one.where, one.id, one.kind == TOO_LONG) == (item.where, item.id, item.too_long)


@pytest.mark.parametrize(("together", "characters"), [(1, 1 << 20), (7, 1 << 20), (1 << 20, 100), (1 << 20, 1 << 30)])
def test_records_are_found_together_as_each_by_itself(
    corpus: Corpus, together: int, characters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cold() -> MultimodalDataset:
        data = corpus.dataset
        return MultimodalDataset(data.indexes, data.sources, dataclasses.replace(data.template), data.specs, data.config)

    monkeypatch.setattr(check, "TOGETHER", together)
    monkeypatch.setattr(check, "TOGETHER_CHARACTERS", characters)
    alone = [check_record(cold(), i, Depth(near=True)) for i in range(len(corpus.dataset))]
    assert [*check_records(cold(), range(len(corpus.dataset)), Depth(near=True))] == alone
    assert sum(len(one.problems) for one in alone) >= 40 and not all(one.problems for one in alone)


def test_few_large_records_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "TOGETHER_CHARACTERS", 50)
    data = datasets(tmp_path, {"mix": [talk("Hi", "Hello " * size) for size in (1, 9, 1, 1, 9, 9)]})
    taken: list[int] = []
    found = check_records(data, (taken.append(i) or i for i in range(6)))
    assert [(one.problems, len(taken)) for one in found] == [((), size) for size in (2, 2, 5, 5, 5, 6)]


LONG = "x" * 60
LARGE = {
    "a turn": Record("a", (Turn("user", LONG),), (), "mix:1"),
    "the answer that is not preferred": Record("a", (Turn("user", "Hi"),), (), "mix:1", rejected=(Turn("assistant", LONG),)),
    "a thought": Record("a", (Turn("assistant", "Hi", extra={"reasoning_content": LONG}),), (), "mix:1"),
    "a tool": Record("a", (Turn("user", "Hi"),), (), "mix:1", tools=({"description": LONG},)),
}


@pytest.mark.parametrize("what", LARGE)
def test_all_text_of_a_record_makes_it_large(what: str) -> None:
    assert 60 <= check._size(LARGE[what]) < 100


def test_media_of_records_that_wait_are_not_held(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their bytes may be in memory, as those of a parquet file are: 64 records of videos would be many."""
    made: list[weakref.ref[RecordMedia]] = []
    plain = MultimodalDataset.media

    def media(self: MultimodalDataset, i: int, record: Record) -> RecordMedia:
        found = plain(self, i, record)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(MultimodalDataset, "media", media)
    held: list[int] = []
    found = check_records(
        corpus.dataset, range(len(corpus.dataset)), on_media=lambda _: held.append(sum(one() is not None for one in made))
    )
    assert len([*found]) == len(corpus.dataset) and len(made) > 100 and max(held) == 0


def test_headers_and_ends_tell_all_but_damage_in_the_middle(corpus: Corpus) -> None:
    unseen = [item.reason for i, item in corpus.bad.items() if not item.too_long and not check_record(corpus.dataset, i).problems]
    # Of a BMP no end is looked for, and frames of a folder are not opened.
    names = ("cut.bmp", "damaged.png", "bad_frame/1.png")
    assert len(unseen) == len(names) and all(any(name in reason for reason in unseen) for name in names)


def test_counts_are_exact_and_lengths_those_of_the_samples(corpus: Corpus) -> None:
    dataset, found = corpus.dataset, corpus.found.found
    for i, made in enumerate(corpus.items):
        if isinstance(made, Sample):
            assert found["lengths"][i] == len(made.input_ids) == dataset.measure(i)
            assert found["supervised"][i] == int((made.labels != -100).sum())
            assert found["media_tokens"][i] == sum(medium.length for medium in made.media.get("image", []))
    counts, too_long = summarise_source(found), [i for i, item in corpus.bad.items() if item.too_long]
    assert counts["records"] == len(dataset) and counts["too_long"] == len(too_long) == 1
    assert counts["bad"] == len(corpus.bad) - 1 and counts["ok"] == len(dataset) - len(corpus.bad)
    fields = Counter(re.split(r"[:.\[]", item.reason)[0] for item in corpus.bad.values() if not item.too_long)
    assert counts["bad_by_field"] == dict(fields)
    assert corpus.found.measurement().bad.tolist() == sorted(set(corpus.bad) - set(too_long))
    assert counts["tokens"] == found["lengths"].sum() and counts["images"] > len(corpus.bad)


def mixed(folder: Path, num: int = 40, **config: Any) -> MultimodalDataset:
    """Records r0 to r39: text, a picture, a missing picture and a broken line, in turn."""
    for level in range(10):
        grey(folder, level)
    kinds: list[Any] = []
    for i in range(num):
        picture = talk("<image>\nWhat?", f"This {i}.", images=f"{i // 4}.png" if i % 4 == 1 else f"gone{i}.png", id=f"r{i}")
        kinds.append([talk("Hi", f"Yes {i}.", id=f"r{i}"), picture, picture, '{"id":'][i % 4])
    return datasets(folder, {"mix": kinds}, **config)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sample ids that are really checked, in parts of 8 records."""
    seen: list[int] = []

    def counted(dataset: MultimodalDataset, ids: Iterable[int], *options: Any) -> Any:
        def told() -> Iterator[int]:
            for i in ids:
                seen.append(i)
                yield i

        return check_records(dataset, told(), *options)

    monkeypatch.setattr(check_run, "check_records", counted)
    monkeypatch.setattr(check_run, "PART", 8)
    return seen


def outcome(found: list[SourceFound]) -> Any:
    """Everything that was found, comparable."""
    return [
        ({name: column.tolist() for name, column in one.found.columns.items()}, one.found.problems, one.found.files)
        for one in found
    ]


def test_a_summary_counts_every_kind(tmp_path: Path, calls: list[int]) -> None:
    (found,) = check_dataset(mixed(tmp_path), tmp_path / "index")
    counts = summarise_source(found.found)
    expected = {"records": 40, "ok": 20, "bad": 20, "too_long": 0, "images": 20, "videos": 0, "audios": 0, "missing_files": 10}
    assert {key: counts[key] for key in expected} == expected
    assert counts["bad_by_field"] == {"image": 10, "json": 10}
    assert counts["image_width"] == counts["image_height"] == [20] * 5 and counts["image_aspect"] == [1.0] * 5
    assert calls == list(range(40)) and (found.num_parts, found.num_cached) == (5, 0)


def test_a_check_that_was_killed_goes_on(tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    data = mixed(tmp_path)
    whole = outcome(check_dataset(data, tmp_path / "whole"))
    counted = check_run.check_records

    def deadly(dataset: MultimodalDataset, ids: Iterable[int], *options: Any) -> Any:
        for i in ids:
            if i == 20:
                raise KeyboardInterrupt
            yield from counted(dataset, [i], *options)

    monkeypatch.setattr(check_run, "check_records", deadly)
    with pytest.raises(KeyboardInterrupt):
        check_dataset(data, tmp_path / "index")
    calls.clear()
    monkeypatch.setattr(check_run, "check_records", counted)
    found = check_dataset(data, tmp_path / "index")
    assert calls == list(range(16, 40)) and found[0].num_cached == 2
    assert outcome(found) == whole


def test_processes_find_the_same_and_one_that_dies_is_told(
    tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = mixed(tmp_path)
    alone = outcome(check_dataset(data, tmp_path / "alone"))
    assert outcome(check_dataset(data, tmp_path / "two", workers=2)) == alone
    assert len(calls) == 40  # the processes counted for themselves
    counted, own = check_run.check_records, os.getpid()

    def deadly(dataset: MultimodalDataset, ids: Iterable[int], *options: Any) -> Any:
        for i in ids:
            if i == 35 and os.getpid() != own:
                os.kill(os.getpid(), signal.SIGKILL)
            yield from counted(dataset, [i], *options)

    monkeypatch.setattr(check_run, "check_records", deadly)
    with pytest.raises(RuntimeError, match="a process of the check died"):
        check_dataset(data, tmp_path / "index", workers=2)
    assert outcome(check_dataset(data, tmp_path / "index")) == alone


def test_nothing_is_checked_twice_but_what_changed(tmp_path: Path, calls: list[int]) -> None:
    data = mixed(tmp_path)
    index = tmp_path / "index"
    first = check_dataset(data, index)
    calls.clear()
    second = check_dataset(data, index)
    assert calls == [] and outcome(second) == outcome(first) and second[0].num_cached == 5
    grey(tmp_path, 5)  # record 21, in the third part: the same bytes, written later
    os.utime(tmp_path / "5.png", ns=(1, 1))
    Image.new("RGB", (30, 20)).save(tmp_path / "gone38.png")  # in the fifth part: it was missing
    third = check_dataset(data, index)
    assert calls == [*range(16, 24), *range(32, 40)]
    assert [row for row, _ in third[0].found.problems] == [row for row, _ in first[0].found.problems if row != 38]
    calls.clear()
    (next((index / "check").rglob("000000008.npz"))).write_bytes(b"torn by a crash")
    assert outcome(check_dataset(data, index)) == outcome(third) and calls == list(range(8, 16))


def test_a_deeper_check_and_other_settings_look_again(tmp_path: Path, calls: list[int]) -> None:
    data = mixed(tmp_path)
    index = tmp_path / "index"
    check_dataset(data, index)
    for depth, num in ((Depth(near=True), 40), (Depth(), 0), (Depth(decode=True), 40), (Depth(), 0)):
        calls.clear()
        check_dataset(data, index, depth=depth)
        assert len(calls) == num, depth
    for options in ({"max_length": 99}, {"max_pixels": 1000}, {"template": "chatml"}):
        calls.clear()
        made = mixed(tmp_path, **options)
        os.utime(tmp_path / "mix.jsonl", ns=(2, 2))
        check_dataset(made, index)
        assert len(calls) == 40, options
    calls.clear()
    os.utime(tmp_path / "mix.jsonl", ns=(3, 3))
    check_dataset(made, index)
    assert len(calls) == 40
    assert len(list((index / "check").iterdir())) == 5 and len(list(index.glob("exact-*"))) == 5
    remove_stale(index, [made])
    assert len(list((index / "check").iterdir())) == len(list(index.glob("exact-*"))) == 1


def test_settings_that_change_no_record_change_nothing(tmp_path: Path, calls: list[int]) -> None:
    data = mixed(tmp_path)
    check_dataset(data, tmp_path / "index")
    calls.clear()
    other = DataConfig(workers=9, order="random", max_bad_fraction=0.5, on_bad_sample="error")
    check_dataset(MultimodalDataset(data.indexes, data.sources, data.template, SPECS, other), tmp_path / "index")
    assert calls == []


def test_sounds_are_measured_in_seconds_and_cut_ones_are_found(tmp_path: Path) -> None:
    (tmp_path / "two.wav").write_bytes(wav(tone(2, 16_000), 16_000))
    (tmp_path / "cut.wav").write_bytes(wav(tone(1, 16_000), 16_000)[:-4000])
    (tmp_path / "five.wav").write_bytes(wav(tone(5, 8_000), 8_000, size=0xFFFFFFFF))  # from a pipe
    spoken = [talk("<audio>", "Hello.") | {"audio": name} for name in ("two.wav", "five.wav", "cut.wav", "gone.wav")]
    (tmp_path / "mix.jsonl").write_text("\n".join(map(json.dumps, spoken)))
    source = SourceConfig(str(tmp_path / "mix.jsonl"), media_root=str(tmp_path))
    tokenizer = tiny_tokenizer("qwen")
    tokenizer.add_tokens([AddedToken("<audio>", special=True, normalized=False)], special_tokens=True)
    made = load_template("auto", tokenizer)
    data = open_dataset((source,), DataConfig(), made, {**SPECS, "audio": AUDIO}, tmp_path / "index")
    (found,) = check_dataset(data, tmp_path / "index")
    counts = summarise_source(found.found)
    assert (counts["audios"], counts["ok"], counts["bad"], counts["missing_files"]) == (4, 2, 2, 1)
    assert counts["seconds_per_clip"] == [2.0, 2.0, 5.0, 5.0, 5.0] and counts["audios_without_size"] == 1
    assert any("1 of them WAV files without a size, which are read to their end" in line for line in summary_lines(counts))
    assert [row for row, _ in found.found.problems] == [2, 3] and "cut.wav" in found.found.problems[0][1].reason
    assert found.found["media_tokens"][:2].tolist() == [100, 250]


def test_media_in_archives_are_checked_where_they_lie(tmp_path: Path, calls: list[int]) -> None:
    for level in (1, 2):
        grey(tmp_path, level)
    picture, line = (tmp_path / "1.png").read_bytes(), json.dumps(talk("<image>What?", "This.", images="1.png"))
    packed: dict[str, bytes] = {}
    for i in range(32):
        packed |= {f"{i:02}.json": line.replace("1.png", f"{i:02}.png").encode(), f"{i:02}.png": picture[: 60 if i == 5 else None]}
    packed["77.json"] = line.encode()  # its picture is in no member
    with tarfile.open(tmp_path / "mix.tar", "w") as archive:
        for name, content in packed.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    rows = [json.loads(line) | {"image": {"bytes": picture[: 60 if i == 5 else None], "path": "1.png"}} for i in range(32)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=8)
    for name, bad in (("mix.tar", [5, 32]), ("rows.parquet", [5])):
        data = open_dataset((SourceConfig(str(tmp_path / name)),), DataConfig(), template(), SPECS, tmp_path / "index")
        data.measure(0)  # whatever a process opens lazily is open when it is forked
        (found,) = check_dataset(data, tmp_path / "index", workers=2)
        assert [row for row, _ in found.found.problems] == bad and found.found.files == {}
        assert summarise_source(found.found)["images"] == len(data) and (found.found["contents"] != 0).sum() == len(data) - len(bad)
    assert calls == []


def test_percentiles_are_values_that_occur() -> None:
    assert percentiles(np.arange(1, 101)) == [1, 50, 90, 99, 100]
    assert percentiles(np.array([7])) == [7] * 5 and percentiles(np.array([])) == []


def test_a_fault_of_a_reader_is_a_problem_of_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = mixed(tmp_path)
    monkeypatch.setattr(type(data.template), "encoding", lambda *_: 1 / 0)
    (problem,) = check_record(data, 4).problems
    assert str(problem) == "mix.jsonl:5 5: record: cannot be used: ZeroDivisionError: division by zero"


def test_of_all_files_only_the_missing_ones_are_held(tmp_path: Path) -> None:
    """Millions of paths and their states would be gigabytes; each part keeps its own on disk, to tell when it is stale."""
    records = [talk("<image>", "A.", images=grey(tmp_path, 7)), talk("<image>", "A.", images="gone.png"), talk("Hi", "Hello.")]
    data = datasets(tmp_path, {"mix": records})
    (found,) = check_dataset(data, tmp_path / "index")
    assert found.found.files == found.found.missing == {str(tmp_path / "gone.png"): (-1, -1)}
    (part,) = parts_of(data, 0, tmp_path / "index", source_identities(data)[0])
    kept = read_part(part.path)
    assert kept is not None and sorted(kept.files) == [str(tmp_path / "7.png"), str(tmp_path / "gone.png")]


def test_every_record_and_every_part_that_is_done_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_run, "PART", 2)
    data = datasets(tmp_path, {name: [talk("Hi", "Hello.")] * 5 for name in ("a", "b")})
    told: list[str] = []
    check_dataset(data, tmp_path / "index", on_progress=told.append)
    assert set(told) == {f"{name}.jsonl:{line}" for name in ("a", "b") for line in range(1, 6)} and len(told) == 10 + 6
    told.clear()
    check_dataset(data, tmp_path / "index", workers=2, on_progress=told.append)
    assert sorted(told) == [f"{name}.jsonl:{line}" for name in ("a", "b") for line in (1, 3, 5)]  # found on disk, part by part
    told.clear()
    check_dataset(data, tmp_path / "anew", workers=2, on_progress=told.append)
    assert len(told) >= 6 + 1 and {place.partition(":")[0] for place in told} == {"a.jsonl", "b.jsonl"}
