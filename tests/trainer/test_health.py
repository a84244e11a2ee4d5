"""A bad number anywhere: all ranks skip the same update, the culprit is written down, and nothing of it reaches a checkpoint."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.equivalence import step_batches
from tests.support.health import start_planted
from tests.support.ranks import run_ranks
from tests.support.resume import LORA, cut, weights
from tests.support.runs import Start, merged, start, start_alone
from tests.support.trainable import ALONE
from tools.bench_step import Counter, hidden_syncs
from trainer import step as step_module
from trainer.distributed.world import World
from trainer.health.deferred_read import DeferredRead
from trainer.health.loss_monitor import Health, scalars_to_read, split_scalars
from trainer.health.spike_detector import ENOUGH, WINDOW, SpikeDetector
from trainer.records.sample_log import read_step
from trainer.step import StepResult

QUIET: dict[str, Any] = {**LORA, "log": {"every": 50}}


def start_with_bad_gradient(world: World, parts: Path, folder: Path, sections: dict[str, Any], rank: int, name: str) -> Start:
    """One start in which one parameter's gradient has one NaN, on one rank, in the third step; the loss is as it was.

    Before the ranks sum it up where each has a whole one; in the rank's own shard else.
    """
    original, steps, init = step_module.gradient_norm, iter(range(999)), Health.__init__
    chosen: list[torch.nn.Parameter] = []

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        if loop_step[0] == 2:
            gradient.view(-1)[0] = math.nan
        return gradient

    def norm(parameters: Any) -> Any:
        if world.rank == rank and hasattr(chosen[0].grad, "to_local"):
            poison(chosen[0].grad.to_local())  # type: ignore[union-attr]
        loop_step[0] = next(steps) + 1
        return original(parameters)

    def choosing(self: Health, setup: Any, totals: Any) -> None:
        init(self, setup, totals)
        chosen.append(setup.trained.parameters[name])
        if world.rank == rank and not hasattr(chosen[0], "to_local"):
            chosen[0].register_hook(lambda gradient: poison(gradient.clone()))

    loop_step = [0]
    Health.__init__, step_module.gradient_norm = choosing, norm  # type: ignore[method-assign]
    return start(world, parts, folder, sections)


def faults(folder: Path) -> list[dict[str, Any]]:
    path = folder / "faults.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def shards(folder: Path, step: int) -> dict[str, bytes]:
    """Weights and moments."""
    return {path.name: path.read_bytes() for path in (folder / f"checkpoint-{step}").glob("*.safetensors")}


@pytest.mark.parametrize(
    ("size", "strategy", "value", "place"),
    [
        (2, "ddp", math.nan, -1),
        pytest.param(2, "fsdp", math.inf, 0, marks=pytest.mark.long),
        pytest.param(4, "fsdp", math.nan, -1, marks=pytest.mark.long),
        pytest.param(4, "ddp", -math.inf, 2, marks=pytest.mark.long),
        pytest.param(1, "ddp", math.nan, 3, marks=pytest.mark.long),
    ],
)
def test_a_loss_that_is_not_finite_on_one_rank_skips_one_update_on_all(
    parts: Path, plain: Start, tmp_path: Path, size: int, strategy: str, value: float, place: int
) -> None:
    """Whatever the rank and micro-batch of the sample. Its gradients are finite."""
    sections, folder = merged(QUIET, {"parallel": {"strategy": strategy}, "train": {"max_steps": 4}}), tmp_path / "run"
    sample = plain.seen[2][place]
    answers = run_ranks(start_planted, size, parts, folder, sections, value, ((2, sample),))
    assert {(answer.code, len(answer.seen)) for answer in answers} == {(0, 4)}
    (row,) = faults(folder)
    (rank,) = [r for r, answer in enumerate(answers) if sample in answer.seen[2]]
    assert (row["kind"], row["step"], row["samples"], row["rank"]) == ("nonfinite", 3, [sample], rank)
    assert row["loss"] == str(value) and row["grad_norm"] == "nan"
    assert row["records"][0].startswith("train.json:") and row["records"][0].endswith(f" r{sample}")
    assert row["parameter"].startswith(row["part"] + ".")
    for done in range(2, 5):
        assert (shards(folder, done) == shards(folder, done - 1)) == (done == 3)
    assert f"step 3: loss {value}" in answers[0].said


@pytest.mark.parametrize(
    ("size", "strategy", "rank"),
    [(2, "fsdp", 1), pytest.param(2, "ddp", 1, marks=pytest.mark.long), pytest.param(4, "ddp", 0, marks=pytest.mark.long)],
)
def test_a_gradient_that_is_not_finite_is_named(parts: Path, tmp_path: Path, size: int, strategy: str, rank: int) -> None:
    """Of one parameter, on one rank: the others learn of it from the sum or from the norm."""
    name, folder = "vision_projector.2.bias", tmp_path / "run"
    sections = merged(QUIET, {"parallel": {"strategy": strategy}, "train": {"max_steps": 4}})
    answers = run_ranks(start_with_bad_gradient, size, parts, folder, sections, rank, name)
    assert {answer.code for answer in answers} == {0}
    (row,) = faults(folder)
    assert (row["step"], row["part"], row["parameter"], row["rank"]) == (3, "vision_projector", name, None)
    assert row["samples"] == sorted(read_step(folder, 2)) and isinstance(row["loss"], float)
    assert shards(folder, 3) == shards(folder, 2) and shards(folder, 4) != shards(folder, 3)


def test_too_many_in_a_row_stop_the_run_before_the_next_save(parts: Path, plain: Start, tmp_path: Path) -> None:
    """A step after the last of them, not at the next line of the log, and with the checkpoint before them intact."""
    sections = merged(QUIET, {"checkpoint": {"every": 3}, "faults": {"max_nonfinite": 2}, "train": {"max_steps": 9}})
    run, samples = tmp_path / "run", [plain.seen[3][0], plain.seen[4][0]]
    answers = run_ranks(start_planted, 2, parts, run, sections, math.nan, ((3, samples[0]), (4, samples[1])))
    assert {(answer.code, len(answer.seen)) for answer in answers} == {(70, 6)}
    reason = json.loads((run / "exit.json").read_text())["reason"]
    assert "2 steps in a row" in reason and "steps 4 to 5" in reason and f"samples {samples[1]}" in reason
    assert [row["step"] for row in faults(run)] == [4, 5]
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-3"]
    assert {answer.code for answer in run_ranks(start, 2, parts, run, sections)} == {0}
    assert faults(run) == []  # those steps were run again, without


@pytest.mark.long
def test_a_save_waits_for_the_numbers_of_its_step(parts: Path, plain: Start, tmp_path: Path) -> None:
    sections = merged(QUIET, {"faults": {"max_nonfinite": 1}})
    answers = run_ranks(start_planted, 1, parts, tmp_path / "run", sections, math.nan, ((2, plain.seen[2][0]),))
    assert {(answer.code, len(answer.seen)) for answer in answers} == {(70, 3)}
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


@pytest.fixture(scope="module")
def plain(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """A run without a fault, in one process."""
    sections = merged(QUIET, {"train": {"max_steps": 10}, "checkpoint": {"every": 99}})
    return start_alone(parts, tmp_path_factory.mktemp("plain") / "run", sections)


def test_killed_between_bad_steps_it_ends_with_the_same_bytes_and_faults(parts: Path, plain: Start, tmp_path: Path) -> None:
    """One of a row before the checkpoint, one after; three are too many wherever the run was killed."""
    three = tuple((step, plain.seen[step][-1]) for step in (1, 2, 3))
    whole = tmp_path / "whole"
    assert run_ranks(start_planted, 2, parts, whole, QUIET, math.nan, three[:2])[0].code == 0
    again = cut(whole, tmp_path / "again", 2)
    assert run_ranks(start_planted, 2, parts, again, QUIET, math.nan, three[:2])[0].code == 0
    assert weights(again) == weights(whole) and shards(again, 6) == shards(whole, 6)
    assert faults(again) == faults(whole) and [row["step"] for row in faults(again)] == [2, 3]
    again = cut(whole, tmp_path / "three", 3)
    answers = run_ranks(start_planted, 2, parts, again, QUIET, math.nan, three)
    assert {(answer.code, len(answer.seen)) for answer in answers} == {(70, 1)}
    assert "steps 2 to 4" in json.loads((again / "exit.json").read_text())["reason"]


def test_a_spike_is_noted_with_its_samples_and_the_window_survives(parts: Path, plain: Start, tmp_path: Path) -> None:
    """Stopped before it: the losses before the checkpoint count as those after it."""
    sections = merged(QUIET, {"train": {"max_steps": 10}, "checkpoint": {"every": 7}})
    run, sample = tmp_path / "run", plain.seen[8][1]
    answers = run_ranks(start_planted, 2, parts, run, sections, 60.0, ((8, sample),))
    assert {answer.code for answer in answers} == {0}
    (row,) = faults(run)
    assert (row["kind"], row["step"], row["samples"]) == ("spike", 9, list(read_step(run, 8)))
    assert row["loss"] > 2 * row["usual"] > 0 and "step 9: loss" in answers[0].said
    assert [ranked[0]["sample"] for ranked in row["highest"]].count(sample) == 1
    assert row["records"][0].endswith(f" r{sample}")
    again = cut(run, tmp_path / "again", 7)
    assert {answer.code for answer in run_ranks(start_planted, 2, parts, again, sections, 60.0, ((8, sample),))} == {0}
    assert faults(again) == [row]


@pytest.mark.parametrize("noise", [pytest.param(0.05, marks=pytest.mark.long), 0.1])
def test_ordinary_noise_is_no_spike_and_three_times_as_much_is_one(noise: float) -> None:
    draw = random.Random(0)
    for seen in ("steady", "falling", "two kinds"):
        judge, found = SpikeDetector().judge, []
        for step in range(10_000):
            level = (
                1 + 9 * math.exp(-step / 500) if seen == "falling" else 2.5 if seen == "two kinds" and draw.random() < 0.3 else 1.0
            )
            planted = 3.0 if step and step % 2_500 == 0 and seen != "two kinds" else 1.0
            found += [step] if judge(level * planted * draw.lognormvariate(0, noise)) is not None else []
        assert found == ([2_500, 5_000, 7_500] if seen != "two kinds" else [])


def test_the_first_losses_and_a_new_level_are_told_apart() -> None:
    window = SpikeDetector()
    assert all(window.judge(1.0) is None for _ in range(ENOUGH - 1)) and window.judge(100.0) is None  # too early to tell
    window = SpikeDetector([1.0] * WINDOW)
    assert window.judge(3.0) == pytest.approx(1.0)
    assert [window.judge(3.0) for _ in range(200)] == [None] * 200
    assert SpikeDetector(window.losses).losses == window.losses and len(window.losses) == WINDOW
    assert SpikeDetector([0.0] * WINDOW).judge(0.5) is not None


def test_judging_a_step_never_waits_for_the_device() -> None:
    """But when there is something to tell."""
    prepared: Any = SimpleNamespace(
        world=ALONE, stage=None, config=SimpleNamespace(faults=SimpleNamespace(max_nonfinite=3)), trained=None
    )
    health, deferred, batches = Health(prepared, None), DeferredRead(torch.device("cpu")), step_batches(0, ALONE, 3, 4)
    addends = [torch.ones(batch.num_supervised) for batch in batches]
    for step in range(4):
        with Counter() as counter, hidden_syncs(counter):
            shared = health.shared_loss()
            extra_sums = torch.stack([torch.zeros(()), torch.as_tensor(shared)])
            losses = torch.full((len(batches),), 1.0 + step)
            result = StepResult(addends, torch.ones(()), torch.zeros(()), [], losses, torch.ones(5), extra_sums)
            notes = scalars_to_read(result)
            health.add(step, batches, result)
        assert counter.num_syncs == 0
        health.unjudged.pop()
        values = deferred.swap(notes)  # looks at the numbers of the step before, which is over
        if values is not None:
            (_, loss), own = split_scalars(values, 2)
            health.observe(loss, *own)
        health.add(step, batches, result)
    assert health.spikes.losses == [len(batches) * (1.0 + step) for step in range(2)]
    values = deferred.flush()
    assert values is not None
    health.observe(values[1], *values[2:])
    health.drain()
    assert health.spikes.losses == [len(batches) * (1.0 + step) for step in range(4)] and health.shared_loss() == 0.0
