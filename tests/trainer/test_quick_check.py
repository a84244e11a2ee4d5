"""The look at the data when a run starts: bounded, spread, knows what a check found, and stops only for sure reasons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.check.check_dataset import check_dataset
from model.errors import DataError
from tests.support.runs import config_of, start_alone
from trainer.config import RunConfig
from trainer.distributed.world import World
from trainer.records import quick_check as looking
from trainer.records.quick_check import bad_record_reasons, plan_checks, quick_check, run_checks
from trainer.records.run_data import RunData, open_data

WORLD = World(0, 0, 1, None)  # type: ignore[arg-type]


def records(num: int, bad: set[int]) -> list[Any]:
    return [
        {
            "id": f"r{i}",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "" if i in bad else f"Yes {i}."}],
        }
        for i in range(num)
    ]


def opened(parts: Path, folder: Path, sources: dict[str, list[Any]], **data: Any) -> tuple[RunData, RunConfig]:
    described = []
    for name, found in sources.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)) + "\n")
        described.append({"path": str(folder / f"{name}.jsonl")})
    sections = {"output_dir": str(folder / "run"), "data": {"sources": described, **data}}
    config = config_of(parts, **{**sections, "model": {"vision": None, "vision_projector": None}})
    return open_data(config, WORLD), config


def test_all_of_a_small_source_is_looked_at(parts: Path, tmp_path: Path) -> None:
    data, config = opened(parts, tmp_path, {"a": records(50, {3, 4}), "b": records(20, set())})
    first, second = quick_check(data, config, WORLD)
    head, *examples = first.splitlines()
    assert head == "train a: looked at 50 of 50 records: 2 bad"
    assert sorted(examples) == [f"          a.jsonl:{i + 1} r{i}: conversations[1].value: is an empty answer" for i in (3, 4)]
    assert second == "train b: looked at 20 of 20 records: 0 bad"


def test_a_large_source_is_looked_at_in_parts_that_are_spread(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "MAX_RECORDS", 40)
    data, _ = opened(parts, tmp_path, {"large": records(900, set()), "small": records(20, set())})
    checks = plan_checks(data, tmp_path / "run" / "index")
    assert [len(check.drawn) for check in checks] == [39, 16]
    assert np.diff(np.sort(checks[0].drawn)).max() <= 24 and checks[1].drawn.min() >= 900
    assert np.diff(np.sort(checks[0].drawn[:10])).max() < 400  # what comes first is spread as well
    run_checks(checks, 0.0)
    assert sum(check.num_checked for check in checks) == 1  # no time: one record all the same


def test_what_a_check_found_is_looked_at_first_and_judged_as_it_is_now(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "MAX_RECORDS", 1)
    data, _ = opened(parts, tmp_path, {"a": records(3000, {1000, 2999}), "b": records(9, {8})})
    assert data.train is not None
    check_dataset(data.train, tmp_path / "run" / "index")
    checks = plan_checks(data, tmp_path / "run" / "index")
    assert [check.known.tolist() for check in checks] == [[1000, 2999], [3008]]
    assert not set(checks[0].drawn.tolist()) & {1000, 2999}
    run_checks(checks, 60.0)
    assert [[problem.where for problem in check.bad] for check in checks] == [["a.jsonl:1001"], ["b.jsonl:9"]]
    assert "of them 2 that tools.check_data found bad" in str(checks[0])


def judged(parts: Path, folder: Path, sources: dict[str, list[Any]], **data: Any) -> str:
    """Why a run of these would not start."""
    opened_, config = opened(parts, folder, sources, **data)
    checks = plan_checks(opened_, folder / "run" / "index")
    run_checks(checks, 60.0)
    return "; ".join(bad_record_reasons(checks, config))


def test_the_limit_is_that_of_the_run(parts: Path, tmp_path: Path) -> None:
    assert judged(parts, tmp_path, {"a": records(100, set(range(8)))}) == ""
    said = judged(parts, tmp_path, {"a": records(100, set(range(9)))})
    assert said.startswith("at least 9 of 100 train records are bad, data.max_bad_fraction allows 8; worst source: 'a' with 9")
    assert judged(parts, tmp_path, {"a": records(100, set(range(20)))}, max_bad_fraction=0.2) == ""
    assert "allows 20" in judged(parts, tmp_path, {"a": records(100, set(range(21)))}, max_bad_fraction=0.2)
    assert judged(parts, tmp_path, {"a": records(9, {2, 5})}, on_bad_sample="error").endswith("(and 1 more bad records)")
    too_long = [{"conversations": [{"from": "human", "value": "word " * 500}, {"from": "gpt", "value": "No."}]}]
    assert judged(parts, tmp_path, {"a": [*records(9, set()), *too_long]}, on_bad_sample="error", max_length=100) == ""


def test_a_part_stands_for_the_whole_only_where_chance_cannot_explain_it(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "MAX_RECORDS", 200)
    every_second, few = set(range(0, 2000, 2)), set(range(0, 2000, 200))
    said = judged(parts, tmp_path, {"a": records(2000, every_second)}, max_bad_fraction=0.1)
    assert "at least" in said and "allows 200" in said
    assert judged(parts, tmp_path, {"a": records(2000, few)}, max_bad_fraction=0.01) == ""  # 10 of 2000, 20 are allowed
    # A small source that is all bad is no more than it is.
    assert judged(parts, tmp_path, {"a": records(2000, set()), "b": records(16, set(range(16)))}, max_bad_fraction=0.01) == ""


def test_every_rank_gets_the_same_answer_and_a_run_without_steps_asks_nothing(parts: Path, tmp_path: Path) -> None:
    data, config = opened(parts, tmp_path, {"a": records(40, set(range(12)))})
    with pytest.raises(DataError, match="at least 12 of 40"):
        quick_check(data, config, WORLD)
    built = config_of(parts, train={"max_steps": 0})
    assert quick_check(data, built, WORLD) == []


def test_a_start_tells_what_it_looked_at(parts: Path, tmp_path: Path) -> None:
    done = start_alone(parts, tmp_path / "run", {"train": {"max_steps": 1}})
    assert done.code == 0 and "data      train train: looked at 22 of 22 records: 0 bad\n" in done.said
