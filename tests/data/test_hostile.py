"""Five per cent of the data is hostile: nothing crashes, every bad record is named, the others are trained on in their order."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.check.check_record import Depth, check_record
from data.config import DataConfig, SourceConfig
from data.dataset import Rejected, open_dataset
from data.sample import Sample
from model.media_spec import AudioSpec, MediaSpec
from tests.support.hostile import clip, hostile, record, sound_kinds
from tests.support.ranks import run_ranks
from tests.support.resume import cut, weights
from tests.support.runs import Start, start
from tests.support.tiny_data import SPECS, hearing_template, template
from trainer.distributed.world import World
from trainer.records import quick_check
from trainer.records.sample_log import read_step

SHARE = 20  # one record of so many is hostile
STEPS = 6
HEARD: dict[str, MediaSpec] = {**SPECS, "audio": AudioSpec(8, 3000, False, (2,))}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """mix.jsonl, its pictures, and of every line that is bad what must be said of it."""
    folder = tmp_path_factory.mktemp("corpus")
    root = folder / "media"
    root.mkdir()
    kinds = hostile(root)
    lines: list[bytes] = []
    expected: dict[int, tuple[str, str]] = {}  # by sample id: kind, words of the reason
    for name, (line, words) in kinds.items():
        expected[len(lines)] = name, words
        lines.append(line)
        lines += [record("sound.png" if i % 10 == 0 else None, answer=f"It is cat {i}.") for i in range(SHARE - 1)]
    path = folder / "mix.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return {"path": path, "root": root, "expected": expected, "size": len(lines)}


def sections(corpus: dict[str, Any]) -> dict[str, Any]:
    return {
        "data": {
            "sources": [{"path": str(corpus["path"]), "media_root": str(corpus["root"])}],
            **{"max_bad_fraction": 0.1, "max_images": 4, "max_length": 400},
        },
        "batch": {"global_batch_size": -(-corpus["size"] // STEPS), "micro_batch_size": 32},
        "train": {"max_steps": STEPS},
    }


def test_there_are_at_least_forty_kinds_and_each_is_named_with_its_place(corpus: dict[str, Any], tmp_path: Path) -> None:
    source = SourceConfig(str(corpus["path"]), media_root=str(corpus["root"]))
    dataset = open_dataset((source,), DataConfig(max_images=4, max_length=400), template(), SPECS, tmp_path / "index")
    expected = corpus["expected"]
    assert len(expected) >= 40 and len(dataset) == len(expected) * SHARE
    for i in range(len(dataset)):
        item = dataset[i]
        assert isinstance(item, Rejected) == (i in expected), item
        if isinstance(item, Rejected):
            kind, words = expected[i]
            assert item.where == f"mix.jsonl:{i + 1}" and words in item.reason, (kind, item.reason)


def test_every_kind_of_bad_clip_is_named_and_the_clips_between_them_are_read(tmp_path: Path) -> None:
    root = tmp_path / "media"
    root.mkdir()
    kinds = sound_kinds(root)
    path = tmp_path / "clips.jsonl"
    path.write_bytes(b"\n".join(line for bad, _ in kinds.values() for line in (clip("sound.wav"), bad)))
    source = SourceConfig(str(path), media_root=str(root))
    dataset = open_dataset((source,), DataConfig(max_seconds=3.0), hearing_template(), HEARD, tmp_path / "index")
    assert len(dataset) == 2 * len(kinds)
    for place, (name, (_, words)) in enumerate(kinds.items()):
        (sound,) = good(dataset[2 * place]).media["audio"]
        assert (sound.frames, sound.length) == ((10,), 5)  # 0.1 s in hops of 10 ms, halved once
        item = dataset[2 * place + 1]
        assert isinstance(item, Rejected) and item.where == f"clips.jsonl:{2 * place + 2}", name
        assert item.reason.startswith("audio: ") and words in item.reason, (name, item.reason)
        checked = check_record(dataset, 2 * place + 1, Depth(decode=True))
        assert [f"{problem.field}: {problem.reason}" for problem in checked.problems] == [item.reason]
        assert not check_record(dataset, 2 * place, Depth(decode=True)).problems


def good(item: Sample | Rejected) -> Sample:
    assert isinstance(item, Sample), item
    return item


def start_at_once(world: World, *args: Any) -> Start:
    """A start that looks at fewer records before it trains: what that look says has laws of its own."""
    quick_check.MAX_RECORDS = 100
    return start(world, *args)


def run(corpus: dict[str, Any], size: int, parts: Path, folder: Path) -> list[list[int]]:
    """Sample ids of each step that this start ran, in the order of ids."""
    answers: list[Start] = run_ranks(start_at_once, size, parts, folder, sections(corpus), seconds=300)
    assert {answer.code for answer in answers} == {0}, answers[0].said[-2000:]
    return [sorted(i for _, seen, _ in answers for i in seen[step]) for step in range(len(answers[0].seen))]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_the_clean_remainder_is_trained_in_its_order_on_any_number_of_ranks_and_after_a_stop(
    corpus: dict[str, Any], parts: Path, tmp_path: Path
) -> None:
    bad, size = set(corpus["expected"]), corpus["size"]
    one = run(corpus, 1, parts, tmp_path / "one")
    planned = [read_step(tmp_path / "one", step) for step in range(STEPS)]
    assert sorted(np.concatenate(planned).tolist()) == list(range(size))
    assert one == [sorted(set(ids.tolist()) - bad) for ids in planned]
    found = rows(tmp_path / "one")
    assert {row["sample_id"] for row in found} == bad and len(found) == len(bad)
    for row in found:
        assert row["where"] == f"mix.jsonl:{row['sample_id'] + 1}" and corpus["expected"][row["sample_id"]][1] in row["reason"]
    check_ledger(tmp_path / "one", corpus, found)
    assert run(corpus, 4, parts, tmp_path / "four") == one
    assert sorted(map(json.dumps, rows(tmp_path / "four"))) == sorted(map(json.dumps, found))
    check_ledger(tmp_path / "four", corpus, found)
    stopped = cut(tmp_path / "one", tmp_path / "stopped", 4)
    shutil.copy(tmp_path / "one" / "quarantine.jsonl", stopped)
    assert run(corpus, 1, parts, stopped) == one[4:]
    assert rows(stopped) == found and weights(stopped) == weights(tmp_path / "one")
    check_ledger(stopped, corpus, found)


def check_ledger(folder: Path, corpus: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """Every record stands under one heading."""
    (counts,) = json.loads((folder / "ledger.json").read_text())["sources"]
    too_long = sum(row["too_long"] for row in found)
    assert counts["size"] == corpus["size"]
    assert (counts["too_long"], counts["quarantined"]) == (too_long, len(found) - too_long)
    assert counts["trained"] == counts["samples"] - len(found) == corpus["size"] - len(found)
