"""Laws 7 and 8: the number of ranks and the strategy may change at every start; samples, their order and the losses do not."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.ranks import kill_ranks_when, run_ranks
from tests.support.resume import metrics
from tests.support.runs import merged, start
from trainer import loop
from trainer.distributed.world import World
from trainer.records.sample_log import read_step

BAD = 5
"""The record whose picture is missing."""
STEADY: dict[str, Any] = {"optim": {"lr": 1e-2, "eps": 1.0, "schedule": "constant"}, "checkpoint": {"every": 1, "keep": 3}}
"""A large eps keeps Adam from turning rounding into signs."""
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "hsdp": {"strategy": "hsdp", "shard_size": 2},
}


class Leg(NamedTuple):
    """One start: so many ranks until so many steps are done; by SIGKILL as soon as they are saved, or in good order."""

    size: int
    strategy: str
    until: int
    killed: bool = False


def start_noting(world: World, parts: Path, output_dir: Path, sections: dict[str, Any], notes: Path) -> int:
    """A start that leaves the sample ids of every step on disk, where SIGKILL does not reach them."""
    original = loop.train_step

    def noting(wrapped: Any, optimizer: Any, batches: Any, *args: Any, **kwargs: Any) -> Any:
        ids = [i for batch in batches for i in batch.sample_ids.tolist() if i >= 0]
        with (notes / f"{world.rank}.jsonl").open("a") as out:
            out.write(json.dumps([args[1].step, ids]) + "\n")
        return original(wrapped, optimizer, batches, *args, **kwargs)

    loop.train_step = noting
    return start(world, parts, output_dir, sections).code


def noted(notes: Path, size: int) -> Iterator[tuple[int, list[int]]]:
    """Steps that every rank of a start began, with the sample ids of all of them, sorted."""
    ranks = [dict(map(json.loads, path.read_text().splitlines())) for path in notes.iterdir()]
    for step in sorted(set.intersection(*map(set, ranks))) if len(ranks) == size else []:
        yield step, sorted(i for rank in ranks for i in rank[step])


def walk(parts: Path, folder: Path, sections: dict[str, Any], legs: list[Leg]) -> None:
    """The same run once in one process and once by `legs`: all that is seen, written and lost must be alike."""
    sections = merged(STEADY, sections)
    whole, walked = folder / "whole", folder / "walked"
    total = legs[-1].until
    assert run_ranks(start, 1, parts, whole, {**sections, "train": {"max_steps": total}}, seconds=300)[0].code == 0
    begun = set()
    for number, leg in enumerate(legs):
        notes = folder / f"notes{number}"
        notes.mkdir()
        steps = total if leg.killed else leg.until
        chosen = {**sections, "train": {"max_steps": steps}, "parallel": STRATEGIES[leg.strategy]}
        arguments = (start_noting, leg.size, parts, walked, chosen, notes)
        if leg.killed:
            kill_ranks_when((walked / f"checkpoint-{leg.until}" / "manifest.json").exists, *arguments, seconds=300)
        else:
            assert set(run_ranks(*arguments, seconds=300)) == {0}
        for step, ids in noted(notes, leg.size):
            assert ids == sorted(i for i in read_step(whole, step).tolist() if i != BAD), (leg, step)
            begun.add(step)
    assert begun == set(range(total))
    for (step, loss), (same_step, other) in zip(metrics(walked), metrics(whole), strict=True):
        assert step == same_step
        assert loss == pytest.approx(other, rel=1e-6)
    for name in ("samples.bin", "samples.json", "ledger.json", "quarantine.jsonl"):
        assert (walked / name).read_bytes() == (whole / name).read_bytes(), name


def one_is_missing(parts: Path, folder: Path) -> dict[str, Any]:
    """The source of the tiny run, one of whose pictures is gone."""
    records = json.loads((parts / "train.json").read_text())
    records[BAD]["image"] = "gone.png"
    path = folder / "train.json"
    path.write_text(json.dumps(records))
    return {"path": str(path), "media_root": str(parts / "images")}


def test_ranks_and_strategies_change_in_the_middle_of_an_epoch(parts: Path, tmp_path: Path) -> None:
    """Four steps to an epoch; micro-batches of one, so that steps accumulate."""
    sections = {"data": {"sources": [one_is_missing(parts, tmp_path)]}, "batch": {"micro_batch_size": 1}}
    legs = [Leg(1, "ddp", 1), Leg(2, "fsdp", 2), Leg(4, "hsdp", 3), Leg(3, "ddp", 5), Leg(1, "ddp", 6)]
    walk(parts, tmp_path, sections, legs)
    epoch = Counter(i for step in range(4) for i in read_step(tmp_path / "walked", step).tolist())
    assert epoch == Counter(range(22))


CASES: dict[str, dict[str, Any]] = {
    "accumulating, with workers": {"data": {"workers": 2}, "batch": {"micro_batch_size": 1}},
    "packed": {
        "data": {"packing": True, "max_length": 64, "workers": 1},
        "batch": {"micro_batch_size": None, "micro_batch_tokens": 64},
    },
    "adapters, at random": {
        "data": {"order": "random"},
        "batch": {"global_batch_size": 5},
        "model": {"llm": {"tune": "lora"}, "vision": {"tune": "frozen"}},
        "lora": {"rank": 2, "dropout": 0.0},
    },
}


@pytest.mark.long
@pytest.mark.parametrize("killed", [False, True], ids=["in good order", "by SIGKILL"])
@pytest.mark.parametrize("case", CASES)
def test_walks_of_three_epochs(parts: Path, tmp_path: Path, case: str, killed: bool) -> None:
    """1, 2, 4, 3, 1 ... ranks, each start with a strategy drawn for it, until a step drawn for it."""
    draw = random.Random(case + str(killed))
    legs: list[Leg] = []
    done = 0
    while done < 12:
        size = (1, 2, 4, 3)[len(legs) % 4]
        done = min(12, done + draw.randint(1, 3))
        legs.append(Leg(size, draw.choice(["ddp", "fsdp", *["hsdp"] * (2 * (size == 4))]), done, killed and done < 12))
    sections = merged(CASES[case], {"data": {"sources": [one_is_missing(parts, tmp_path)]}})
    walk(parts, tmp_path, sections, legs)
