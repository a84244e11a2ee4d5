"""The heaviest micro-batch is found, runs before the first step, leaves no trace, and says what would fit when it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.loader import BatchPlan
from data.order.sampler import Sampler
from model.media_spec import AudioSpec, ImageSpec
from model.multimodal import MultimodalLM
from model.vision.tower import VisionTower
from tests.support.ranks import run_ranks
from tests.support.resume import LORA, weights
from tests.support.runs import Start, start, start_alone
from trainer import run
from trainer.distributed.world import World
from trainer.machine.memory_info import CLEAR, Usage, cgroup_limit, reset_peak, usage
from trainer.memory import rehearsal
from trainer.memory.heaviest_batch import cost_of, find_heaviest
from trainer.memory.sample_cost import encoder_positions, used_weights

CPU = torch.device("cpu")
REHEARSED = {"rehearsal": "always"}


@given(
    seed=st.integers(0, 999),
    count=st.integers(1, 60),
    batch=st.integers(1, 13),
    ranks=st.integers(1, 5),
    micro=st.integers(1, 4),
    order=st.sampled_from(["modality_length", "random", "sequential"]),
    first=st.integers(0, 100),
    packed=st.booleans(),
)
def test_no_micro_batch_of_what_is_left_of_the_epoch_is_heavier(
    seed: int, count: int, batch: int, ranks: int, micro: int, order: str, first: int, packed: bool
) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 50, count).astype(np.int32)
    media = (rng.integers(0, 3, count) * rng.integers(1, 90)).astype(np.float32)
    sampler = Sampler(lengths, (media > 0).astype(np.int8), batch, seed, order)
    plan = BatchPlan(ranks, micro, 64 if packed else 0)
    last = first + 1 + seed % 40
    found = find_heaviest(sampler, plan, media, None, first, last)
    end = min(last, (first // sampler.steps_per_epoch + 1) * sampler.steps_per_epoch)
    steps = {step: plan.deal(sampler.step(step), lengths) for step in range(first, end)}
    costs = [cost_of(ids, lengths, plan, media) for dealt in steps.values() for rank in dealt for ids in rank]
    assert found.cost == max(costs) == cost_of(found.ids, lengths, plan, media)
    assert any(ids.tolist() == found.ids.tolist() for rank in steps[found.step] for ids in rank)
    assert found.num_micro_batches == len(steps[found.step][0])


def test_a_micro_batch_costs_its_padding_and_the_encoders_of_its_media() -> None:
    lengths, media = np.array([10, 4, 7]), np.array([0.0, 2.5, 1.0], dtype=np.float32)
    assert cost_of(np.array([0, 1]), lengths, BatchPlan(1, 2), media) == 2 * 10 + 2.5
    assert cost_of(np.array([0, 1]), lengths, BatchPlan(1, 2, 99), media) == 10 + 4 + 2.5
    assert cost_of(np.array([], dtype=np.int64), lengths, BatchPlan(1, 2), media) == 0


class Mixture(torch.nn.Module):
    """A layer and four experts, as transformers fuses them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(5, 4, bias=False)
        self.experts = torch.nn.Module()
        self.experts.down_proj = torch.nn.Parameter(torch.zeros(4, 3, 7))


def test_a_position_meets_the_experts_it_is_sent_to_and_no_others() -> None:
    assert used_weights(Mixture(), 2) == 5 * 4 + 2 * 3 * 7
    assert used_weights(Mixture(), 9) == 5 * 4 + 4 * 3 * 7


def test_an_encoder_computes_on_more_positions_than_it_gives_tokens() -> None:
    tower: Any = VisionTower.__new__(VisionTower)
    torch.nn.Module.__init__(tower)
    tower.sizes, tower.blank_length, tower.num_prefix = (16,), 4, 1
    spec = ImageSpec(16, 8, 1, "patch", "exact", (0.5,), (0.5,))
    assert encoder_positions(tower, spec, 3 * 4) == 3 * 5  # three views of four patches and a CLS row
    tower.sizes = (16, 32)
    assert encoder_positions(tower, spec, 4) == 5 * 5  # a small square, and four of the larger size
    shrunk = ImageSpec(16, 8, 1, "patch", "exact", (0.5,), (0.5,), shrink=2)
    tower.sizes = (16,)
    assert encoder_positions(tower, shrunk, 2) == 2 * 5  # one token of each view
    asked = ImageSpec(16, 8, 1, "patch", "exact", (0.5,), (0.5,), queries=3)
    assert encoder_positions(tower, asked, 3) == 5
    hears = AudioSpec(10, 3000, True, (2, 2))
    assert encoder_positions(torch.nn.Identity(), hears, 250) == 1500  # a third of a window is a whole one, half its frames
    assert encoder_positions(torch.nn.Identity(), AudioSpec(10, 3000, False, (2, 2)), 250) == 500


def started(world: World, folder: Path, output_dir: Path, sections: dict[str, Any], rehearses: bool) -> Start:
    if not rehearses:
        run.rehearse = lambda setup, first_step: ""  # type: ignore[assignment]
    return start(world, folder, output_dir, sections)


def with_a_bad_record(parts: Path, folder: Path) -> Path:
    """The sources of `parts`, where the longest record names a picture that is not there."""
    records = json.loads((parts / "train.json").read_text())
    longest = max((r for r in records if isinstance(r.get("image"), list)), key=lambda r: len(r["conversations"][0]["value"]))
    longest["image"] = [longest["image"][0], "missing.png"]
    path = folder / "train.json"
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize(
    ("size", "strategy"),
    [(1, "ddp"), pytest.param(2, "fsdp", marks=pytest.mark.long), pytest.param(3, "ddp", marks=pytest.mark.long)],
)
def test_it_leaves_no_trace(parts: Path, tmp_path: Path, size: int, strategy: str) -> None:
    """Dropout, a bad record in the very micro-batch: weights, losses and quarantine are those of a run without it, to the byte."""
    source = {"path": str(with_a_bad_record(parts, tmp_path)), "media_root": str(parts / "images")}
    sections = {
        **LORA,
        "train": REHEARSED,
        "data": {"sources": [source], "max_bad_fraction": 0.5},
        "parallel": {"strategy": strategy},
    }
    for name, rehearses in (("with", True), ("without", False)):
        answers = run_ranks(started, size, parts, tmp_path / name, sections, rehearses)
        assert {answer.code for answer in answers} == {0}
        assert ("memory    peak" in answers[0].said) == rehearses
    assert weights(tmp_path / "with") == weights(tmp_path / "without")
    told = [(tmp_path / name / "quarantine.jsonl").read_text() for name in ("with", "without")]
    assert told[0] == told[1] and "missing.png" in told[0]
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def losses(run: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def short_of_memory(
    world: World, folder: Path, output_dir: Path, sections: dict[str, Any], limit: int, runs_on_meta: bool = True
) -> Start:
    """A start on a device where decoding more than `limit` positions runs out of memory."""
    decode = MultimodalLM.decode

    def limited(self: MultimodalLM, batch: Any, rows: Any = None) -> Any:
        if batch.input_ids.is_meta and not runs_on_meta:
            raise RuntimeError("it looks at values")
        if not batch.input_ids.is_meta and batch.input_ids.numel() > limit:
            raise torch.OutOfMemoryError("planted")
        return decode(self, batch, rows)

    MultimodalLM.decode = limited  # type: ignore[method-assign]
    return start(world, folder, output_dir, sections)


def test_out_of_memory_names_the_batch_and_a_micro_batch_that_fits(parts: Path, tmp_path: Path) -> None:
    """The run ends before its first step; with what the message says it fits."""
    answer = run_ranks(short_of_memory, 1, parts, tmp_path / "run", {"train": {"max_steps": 2, **REHEARSED}}, 60)[0]
    written = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert answer.code == written["code"] == 2 and not answer.seen
    reason = written["reason"]
    assert reason.startswith("out of memory on rank 0 in the heaviest micro-batch of the epoch (2 samples, 2 x 5")
    assert "What fits: batch.micro_batch_size = 1 (" in reason and "parallel.activation_checkpointing = 'full'" in reason
    smaller = {"train": {"max_steps": 2, **REHEARSED}, "batch": {"micro_batch_size": 1}}
    assert run_ranks(short_of_memory, 1, parts, tmp_path / "run", smaller, 60)[0].code == 0
    assert (
        run_ranks(short_of_memory, 1, parts, tmp_path / "other", {"train": {"max_steps": 2, **REHEARSED}}, 60, False)[0].code == 2
    )
    reason = json.loads((tmp_path / "other" / "exit.json").read_text())["reason"]
    assert reason.startswith("out of memory on rank 0") and "cannot be told without running it (it looks at values)" in reason


def less_left(world: World, folder: Path, output_dir: Path, sections: dict[str, Any], free: int) -> Start:
    """A start on a machine that has room for the micro-batch, and `free` bytes for what comes later."""
    rehearsal.usage = lambda device: Usage(now=1000, peak=1000, free=free, total=2_000_000)
    return start(world, folder, output_dir, sections)


def test_moments_that_will_not_fit_beside_are_counted_before_there_are_any(parts: Path, tmp_path: Path) -> None:
    """45,600 parameters learn, with two float32 moments each, in 67 tensors, with a count of updates each.

    One byte too little ends the run.
    """
    moments = (13_760 + 1_856 + 29_984) * 8 + 67 * 4
    sections = {"train": {"max_steps": 1, **REHEARSED}}
    assert run_ranks(less_left, 1, parts, tmp_path / "run", sections, moments - 1)[0].code == 2
    reason = json.loads((tmp_path / "run" / "exit.json").read_text())["reason"]
    assert "it does not fit" in reason and "batch.micro_batch_size = 1" in reason
    assert run_ranks(less_left, 1, parts, tmp_path / "run", sections, moments)[0].code == 0


def test_ranks_of_one_machine_share_its_memory_and_gpus_do_not() -> None:
    rows = [
        {"host": "a", "free": 100, "peak": 30, "now": 20, "optimizer": 5},
        {"host": "a", "free": 100, "peak": 70, "now": 20, "optimizer": 5},
        {"host": "b", "free": 100, "peak": 20, "now": 20, "optimizer": 5},
    ]
    assert [rehearsal._headroom(row, rows, CPU) for row in rows] == [100 - 15 - 55, 100 - 15 - 55, 95]
    assert [rehearsal._headroom(row, rows, torch.device("cuda", 0)) for row in rows] == [85, 45, 95]


def test_nothing_is_rehearsed_where_nothing_is_trained(parts: Path, tmp_path: Path) -> None:
    built = start_alone(parts, tmp_path / "built", {"train": {"max_steps": 0}})
    assert built.code == 0 and "memory    peak" not in built.said


def test_the_peak_is_that_since_it_was_reset() -> None:
    if not CLEAR.exists():
        pytest.skip("no /proc")
    reset_peak(CPU)
    before = usage(CPU)
    block = torch.ones(16 * 2**20)  # 64 MiB
    del block
    after = usage(CPU)
    assert after.peak - before.peak > 60 * 2**20
    reset_peak(CPU)
    assert usage(CPU).peak < after.peak - 30 * 2**20 or usage(CPU).now > after.peak - 30 * 2**20
    assert 0 < after.free <= after.total


def test_a_containers_limit_counts_and_its_cached_files_do_not(tmp_path: Path) -> None:
    assert cgroup_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert cgroup_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 250\nactive_file 100\n")
    assert cgroup_limit(tmp_path) == (650, 1000)
    (tmp_path / "old" / "memory").mkdir(parents=True)
    for name, text in (("limit_in_bytes", "900"), ("usage_in_bytes", "800"), ("stat", "cache 200\ninactive_file 150\n")):
        (tmp_path / "old" / "memory" / f"memory.{name}").write_text(text)
    assert cgroup_limit(tmp_path / "old") == (250, 900)
