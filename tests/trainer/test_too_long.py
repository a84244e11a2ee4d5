"""Records that do not fit: told with what would hold them, and the end of a start where they are too many of a source."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.check.check_dataset import check_dataset
from model.errors import DataError
from tests.support.config import problems
from tests.support.runs import config_of, failure_of
from trainer.checkpoint.resume import MAY_CHANGE
from trainer.config import RunConfig
from trainer.distributed.world import World
from trainer.records import quick_check as looking
from trainer.records.quick_check import plan_checks, quick_check, run_checks, too_long_reasons
from trainer.records.run_data import RunData, open_data
from trainer.records.too_long import LengthStatistics

WORLD = World(0, 0, 1, None)  # type: ignore[arg-type]
BLIND = {"vision": None, "vision_projector": None}


def record(num_words: int, num_rounds: int = 1) -> dict[str, Any]:
    """`num_words` in the first question, one in every other turn."""
    turns = [{"from": "human", "value": "word " * num_words}, {"from": "gpt", "value": "Yes."}]
    return {"conversations": turns + [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "No."}] * (num_rounds - 1)}


def opened(parts: Path, folder: Path, sources: dict[str, list[Any]], take: str = "all", **data: Any) -> tuple[RunData, RunConfig]:
    described = []
    for name, found in sources.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)) + "\n")
        described.append({"path": str(folder / f"{name}.jsonl"), "take": take})
    sections = {"output_dir": str(folder / "run"), "data": {"sources": described, "max_length": 60, **data}, "model": BLIND}
    config = config_of(parts, **sections)
    return open_data(config, WORLD), config


def reasons(data: RunData, config: RunConfig) -> list[str]:
    checks = plan_checks(data, Path(config.output_dir) / "index")
    run_checks(checks, 60.0)
    return too_long_reasons(checks, config)


def lengths_of(data: RunData, config: RunConfig) -> list[int]:
    """Tokens of all records, measured without a limit."""
    assert data.train is not None
    dataset = open_data(config_of_length(config, 10**6), WORLD).train
    assert dataset is not None
    return sorted(dataset.measure(i) for i in range(len(dataset)))


def config_of_length(config: RunConfig, max_length: int) -> RunConfig:
    return replace(config, data=replace(config.data, max_length=max_length))


def test_what_is_too_long_to_be_counted_is_told_about_as_long_as_it_is(parts: Path, tmp_path: Path) -> None:
    data, config = opened(parts, tmp_path, {"long": [*[record(1)] * 8, *[record(300_000)] * 2]})
    (reason,) = reasons(data, config)
    few, more = lengths_of(*opened(parts, tmp_path, {"few": [record(100), record(300)]}))
    true = few + (300_000 - 100) * (more - few) / 200
    told = re.search(r"the longest ([\d,]+) \(those above 32,768 are extrapolated\)", reason)
    assert told and int(told[1].replace(",", "")) == pytest.approx(true, rel=0.01)


def test_the_reason_names_counts_percentiles_and_the_length_that_would_do(parts: Path, tmp_path: Path) -> None:
    data, config = opened(parts, tmp_path, {"short": [record(1)] * 50, "long": [*[record(1)] * 80, *map(record, range(100, 120))]})
    (reason,) = reasons(data, config)
    lengths = lengths_of(*opened(parts, tmp_path, {"long": [*[record(1)] * 80, *map(record, range(100, 120))]}))
    p99 = lengths[-1]  # of a hundred records 99 are no longer than the second longest, and "at most" asks for the next one up
    assert reason == (
        "train source 'long': 20 of 100 records cannot fit data.max_length = 60: not even their first round does, and they would "
        "be left out, which data.max_too_long_fraction = 0.1 allows for 10; tokens per record: "
        f"50 % {lengths[50]}, 90 % {lengths[90]}, 99 % {p99}, the longest {p99}; data.max_length = {p99} would hold 99 % of them"
    )
    again, longer = opened(parts, tmp_path, {"long": [*[record(1)] * 80, *map(record, range(100, 120))]}, max_length=p99)
    assert reasons(again, longer) == []


def test_the_fraction_is_what_is_allowed_and_no_more(parts: Path, tmp_path: Path) -> None:
    found = [*[record(1)] * 90, *[record(200)] * 10]
    assert reasons(*opened(parts, tmp_path, {"a": found})) == []
    assert "11 of 101 records" in reasons(*opened(parts, tmp_path, {"a": [*found, record(200)]}))[0]
    assert reasons(*opened(parts, tmp_path, {"a": [*found, record(200)]}, max_too_long_fraction=0.11)) == []
    assert "1 of 101 records" not in "".join(reasons(*opened(parts, tmp_path, {"a": found}, take="first:90")))
    assert "allows for 0" in reasons(*opened(parts, tmp_path, {"a": found}, max_too_long_fraction=0.0))[0]
    assert reasons(*opened(parts, tmp_path, {"a": [record(200)] * 9}, max_too_long_fraction=1.0)) == []


def test_long_estimates_of_records_that_fit_stop_nothing(parts: Path, tmp_path: Path) -> None:
    """Four bytes are planned as a token; these words are one token of nine bytes each."""
    wide = [{"conversations": [{"from": "human", "value": "assistant" * 40}, {"from": "gpt", "value": "Yes."}]}] * 30
    data, config = opened(parts, tmp_path, {"a": wide}, max_length=10**4)
    assert data.train is not None
    exact, estimated = data.train.measure(0), int(data.train.indexes[0].lengths[0])
    data, config = opened(parts, tmp_path, {"a": wide}, max_length=max(exact, 1))
    assert reasons(data, config) == [] and estimated != exact


def test_a_part_stands_for_the_whole_where_chance_cannot_explain_it(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "MAX_RECORDS", 200)
    (reason,) = reasons(*opened(parts, tmp_path, {"a": [record(1), record(1), record(200)] * 667}))
    assert "train source 'a': at least " in reason and " of 2,001 records cannot fit" in reason
    few = [record(200 if i % 7 == 0 else 1) for i in range(2000)]  # more than a tenth, but 29 of 200 may be chance
    data, config = opened(parts, tmp_path, {"a": few})
    assert reasons(data, config) == []
    check_dataset(data.train, tmp_path / "run" / "index")  # type: ignore[arg-type]
    assert "286 of 2,000 records" in reasons(data, config)[0]


def test_records_that_lose_most_of_their_rounds_are_worth_a_line(parts: Path, tmp_path: Path) -> None:
    (said,) = quick_check(*opened(parts, tmp_path, {"a": [record(1, 9)] * 20}), WORLD)
    head, line = said.splitlines()
    assert head == "train a: looked at 20 of 20 records: 0 bad"
    assert "20 of 20 lose rounds at their end to data.max_length = 60" in line and "would hold 99 % of them" in line
    assert LengthStatistics(2, 0, 1, [100, 90], 185).note(95) == ""  # little is lost


def refused(config: RunConfig) -> str:
    with pytest.raises(DataError) as error:
        quick_check(open_data(config, WORLD), config, WORLD)
    return str(error.value)


def test_pictures_that_are_larger_than_a_sample_are_what_is_told(parts: Path, tmp_path: Path) -> None:
    reason = refused(config_of(parts, output_dir=str(tmp_path), data={"max_length": 4}))
    assert reason.startswith("train source 'train': ") and "(one image takes at least 4 tokens, and 14 records hold one)" in reason
    # Where that is allowed, there is nothing left for the tower to see.
    reason = refused(config_of(parts, output_dir=str(tmp_path), data={"max_length": 4, "max_too_long_fraction": 1.0}))
    assert reason.startswith(
        "[model.vision] can never be fed: one image takes at least 4 tokens, and 14 records hold one, more than"
    )


def test_sources_of_validation_are_judged_too(parts: Path, tmp_path: Path) -> None:
    _, config = opened(parts, tmp_path, {"good": [record(1)] * 30, "long": [record(200)] * 30})
    good, long = config.data.sources
    held_out = replace(config, data=replace(config.data, sources=(good,), validation=(long,)))
    assert refused(held_out).startswith("validation source 'long': 30 of 30 records cannot fit data.max_length = 60")


def test_a_run_of_records_that_are_too_long_ends_before_a_weight_is_read(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps(record(200)) for _ in range(30)))
    sections = {"data": {"sources": [{"path": str(tmp_path / "long.jsonl")}], "max_length": 60}, "model": BLIND}
    code, reason = failure_of(parts, tmp_path / "run", sections)
    assert code == 65 and reason.startswith("train source 'long': 30 of 30 records cannot fit data.max_length = 60")
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not (tmp_path / "run" / "metrics.jsonl").exists()
    assert "data.max_too_long_fraction" in MAY_CHANGE  # on resume


def test_what_is_no_fraction_is_refused() -> None:
    assert "data.max_too_long_fraction = 1.5 is not in [0, 1]; 1 allows any number" in problems(data={"max_too_long_fraction": 1.5})
