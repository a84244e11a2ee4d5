"""Law 8: stopped after any step and started again, a run ends with the same bytes; what is damaged is never used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks
from tests.support.resume import LORA, cut, metrics, weights
from tests.support.runs import failure_of, start, start_alone


@pytest.mark.parametrize(
    ("size", "strategy", "stops"),
    [
        (1, "ddp", (1, 3, 5)),
        (2, "ddp", (1, 4)),
        (2, "fsdp", (3,)),
        (3, "ddp", (4,)),
        pytest.param(4, "ddp", (2,), marks=pytest.mark.long),
        (4, "fsdp", (3,)),
    ],
)
def test_stopped_anywhere_ends_with_the_same_bytes(
    parts: Path, tmp_path: Path, size: int, strategy: str, stops: tuple[int, ...]
) -> None:
    workers = 1 if (size, strategy) == (2, "fsdp") else 0
    whole = {**LORA, "parallel": {"strategy": strategy}, "data": {"workers": workers}}
    assert {code for code, _, _ in run_ranks(start, size, parts, tmp_path / "whole", whole)} == {0}
    for step in stops:
        again = cut(tmp_path / "whole", tmp_path / f"stopped{step}", step)
        (again / "metrics.jsonl").write_text((tmp_path / "whole" / "metrics.jsonl").read_text() + '{"step": 9')
        answers = run_ranks(start, size, parts, again, whole)
        assert {code for code, _, _ in answers} == {0}
        assert all(len(seen) == 6 - step for _, seen, _ in answers)
        assert weights(again) == weights(tmp_path / "whole")
        lines, expected = (metrics(folder) for folder in (again, tmp_path / "whole"))
        assert lines == expected


@pytest.fixture(scope="module")
def finished(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert start_alone(parts, folder, LORA)[0] == 0
    return folder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "flipped": lambda folder: flip(folder / "rank-00000-of-00001.safetensors"),
    "torn": lambda folder: (folder / "state.json").write_text('{"step": 4'),
    "missing": lambda folder: (folder / "model.json").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "edited manifest": lambda folder: (folder / "manifest.json").write_text(
        (folder / "manifest.json").read_text().replace("4", "5")
    ),
    "stale": lambda folder: (shutil.rmtree(folder), shutil.copytree(folder.with_name("checkpoint-3"), folder)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(parts: Path, finished: Path, tmp_path: Path, damage: str) -> None:
    again = cut(finished, tmp_path / "again", 4)
    DAMAGE[damage](again / "checkpoint-4")
    code, seen, said = start_alone(parts, again, LORA)
    assert (code, len(seen)) == (0, 3)  # from step 3
    assert (again / "damaged-checkpoint-4").is_dir()
    assert weights(again) == weights(finished)
    assert "checkpoint-4" in said and "moved to damaged-checkpoint-4" in said


def test_none_sound_is_never_a_fresh_start(parts: Path, finished: Path, tmp_path: Path) -> None:
    again = cut(finished, tmp_path / "again", 2)
    for path in again.glob("checkpoint-*"):
        flip(path / "model.json")
    code, reason = failure_of(parts, again, LORA)
    assert code == 70 and "none is sound" in reason
    assert failure_of(parts, again, LORA)[0] == 70  # nor at the next start


def test_another_run_is_refused_with_every_difference(parts: Path, finished: Path, tmp_path: Path) -> None:
    again = cut(finished, tmp_path / "again", 4)
    code, reason = failure_of(parts, again, {**LORA, "seed": 1, "optim": {"lr": 5e-3}})
    assert code == 2
    assert "seed: 42 in the checkpoint, 1 now" in reason and "optim.lr: 0.01 in the checkpoint, 0.005 now" in reason
    code, reason = failure_of(parts, again, {**LORA, "checkpoint": {"resume": "none"}})
    assert code == 2 and "resume = 'auto'" in reason
    other = {**LORA, "lora": {"rank": 3}, "checkpoint": {"resume": str(finished / "checkpoint-6")}}
    code, reason = failure_of(parts, tmp_path / "other", other)
    assert code == 2 and "lora.rank" in reason


def test_a_finished_run_has_nothing_left_to_do(parts: Path, finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    before = {p.name: p.stat().st_mtime_ns for p in (again / "final").iterdir()}
    code, seen, said = start_alone(parts, again, LORA)
    assert (code, seen) == (0, []) and "nothing left to do" in said
    assert {p.name: p.stat().st_mtime_ns for p in (again / "final").iterdir()} == before


def test_keeps_the_newest_only(parts: Path, tmp_path: Path) -> None:
    assert start_alone(parts, tmp_path / "run", {**LORA, "checkpoint": {"every": 1, "keep": 2}})[0] == 0
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


def test_records_that_were_edited_in_their_places_are_noticed(parts: Path, tmp_path: Path) -> None:
    """As many records as before, and lengths that were frozen at the first start."""
    records = json.loads((parts / "train.json").read_text())
    path, output_dir = tmp_path / "train.json", tmp_path / "run"
    sections: dict[str, Any] = {
        "data": {"sources": [{"path": str(path), "media_root": str(parts / "images")}]},
        "train": {"max_steps": 2},
    }
    path.write_text(json.dumps(records))
    assert start_alone(parts, output_dir, sections).code == 0
    planned = output_dir / "planned_lengths.npz"
    whole = planned.read_bytes()
    planned.write_bytes(whole[:100])
    code, reason = failure_of(parts, output_dir, {**sections, "train": {"max_steps": 4}})
    assert code == 2 and f"{planned}, which this run is planned by, is damaged" in reason
    planned.write_bytes(whole)
    records[3]["conversations"][1]["value"] += ", and a dog that is much longer than it was before"
    path.write_text(json.dumps(records))
    code, reason = failure_of(parts, output_dir, {**sections, "train": {"max_steps": 4}})
    assert code == 2 and "the data of this run has changed since" in reason
