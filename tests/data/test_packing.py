"""Packing: every sample once, never over the budget, the same counts everywhere, and no step that differs from the unpacked one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.collate import collate, collate_packed
from data.dataset import MultimodalDataset
from data.loader import BatchPlan, LoadOptions, MicroBatch, train_batches, validation_batches
from data.order.packing import deal_packed
from data.order.sampler import Sampler
from model.batch import IGNORE_INDEX
from model.build import assemble
from model.card import make_card
from model.config import LlmConfig, LoraConfig, ModelConfig, VisionConfig, VisionProjectorConfig
from model.llm.causal_lm import VocabularyLayout
from tests.support.config import MINIMAL, problems
from tests.support.ranks import run_ranks
from tests.support.runs import merged, start
from tests.support.tiny_data import WIDTH, dataset, grey, level, talk
from tools.bench_sampler import efficiency, llava_like_mix, our_steps
from trainer.memory.sample_cost import sample_costs
from trainer.runfile.load import parse_config
from trainer.runfile.schema import to_tables

PAD = 0


@settings(deadline=None, max_examples=300)
@given(
    num=st.integers(0, 80),
    world_size=st.integers(1, 9),
    longest=st.integers(1, 60),
    room=st.sampled_from([1.0, 1.1, 2.0, 9.0]),
    seed=st.integers(0, 99),
    costly=st.booleans(),
    repeat=st.booleans(),
)
def test_any_step_is_dealt_whole_within_the_budget_and_evenly(
    num: int, world_size: int, longest: int, room: float, seed: int, costly: bool, repeat: bool
) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, 200).astype(np.int32)
    costs = lengths + random.integers(0, 3, 200) * 50.0 if costly else None
    ids, budget = random.choice(200, num, replace=repeat), int(longest * room)
    dealt = deal_packed(ids, lengths, world_size, budget, costs)
    assert sorted(i for rank in dealt for part in rank for i in part) == sorted(ids)
    assert len(dealt) == world_size and len({len(rank) for rank in dealt}) == 1
    assert all(lengths[part].sum() <= budget for rank in dealt for part in rank)
    num_parts = world_size * len(dealt[0])
    assert sum(len(part) > 0 for rank in dealt for part in rank) == min(num, num_parts)
    # Best fit gives up on fewer micro-batches only when all of those are more than half full.
    assert len(dealt[0]) <= max(1, -(-2 * int(lengths[ids].sum()) // (budget * world_size)))
    again = deal_packed(random.permutation(ids), lengths, world_size, budget, costs)
    assert [[part.tolist() for part in rank] for rank in again] == [[part.tolist() for part in rank] for rank in dealt]


def test_a_full_step_needs_no_micro_batch_more_than_its_tokens() -> None:
    """Lengths that only fit as 6 + 4 and 5 + 5, where the lightest first would leave no room for the last."""
    lengths = np.array([6, 5, 5, 4, 6, 4])
    dealt = deal_packed(np.arange(6), lengths, 3, 10)
    assert [[sorted(lengths[part].tolist()) for part in rank] for rank in dealt] == [[[4, 6]], [[4, 6]], [[5, 5]]]


def test_ranks_of_a_micro_batch_are_level_in_work() -> None:
    """Samples with a picture cost three times their tokens here: ranks get equal work, which takes unequal tokens."""
    lengths, costs = np.array([100] * 6 + [20] * 30), np.array([300.0] * 6 + [20.0] * 30)
    dealt = deal_packed(np.arange(36), lengths, 4, 400, costs)
    assert [[int(costs[part].sum()) for part in rank] for rank in dealt] == [[600]] * 4
    assert sorted(int(lengths[rank[0]].sum()) for rank in dealt) == [200, 200, 400, 400]
    with pytest.raises(ValueError, match="sample 3 has 100 tokens, the budget is 90"):
        deal_packed(np.array([9, 3, 10]), lengths, 2, 90)


@pytest.mark.parametrize(("world_size", "order"), [(8, "modality_length"), (8, "random"), (64, "modality_length")])
def test_the_slowest_rank_computes_no_more_than_a_hundredth_more_than_needed(world_size: int, order: str) -> None:
    lengths, modalities = llava_like_mix(0.05)
    found = efficiency(our_steps(lengths, modalities, world_size, 16, 8192, order), lengths, is_packed=True)
    assert found.per_rank == 1.0 and found.slowest_rank > 0.99


@pytest.fixture
def data(tmp_path: Path) -> MultimodalDataset:
    for shade in (10, 20, 30):
        grey(tmp_path, shade)
    turns = [("word " * (i % 7), f"{i} times") for i in range(11)]
    images = [[], ["10.png"], ["20.png", "30.png"]]
    records = [talk("<image>" * len(images[i % 3]) + turn[0] + ".", turn[1], images=images[i % 3]) for i, turn in enumerate(turns)]
    found = dataset(tmp_path, [*records, talk("<image>", "a", images=["missing.png"])])
    found.lengths[:11] = [found.measure(i) for i in range(11)]  # as a check of the data makes them
    return found


def samples_of(data: MultimodalDataset, ids: list[int]) -> list[Any]:
    return [data[i] for i in ids]


def test_a_packed_row_is_its_samples_without_padding(data: MultimodalDataset) -> None:
    """Against the padded batch of the same samples, position by position; blank rows take the same form."""
    samples = samples_of(data, [2, 0, 4, 5])
    packed, padded = collate_packed(samples, PAD), collate(samples, PAD)
    real = padded.attention_mask.bool()  # type: ignore[union-attr]
    assert packed.attention_mask is None and packed.input_ids.shape == (1, sum(packed.lengths))
    for key in ("input_ids", "labels", "position_ids"):
        assert getattr(packed, key)[0].tolist() == getattr(padded, key)[real].tolist()
    assert packed.segment_lengths == packed.lengths == padded.lengths
    assert packed.segment_borders is not None and packed.segment_borders.dtype == torch.int32
    assert packed.segment_borders.tolist() == np.cumsum([0, *packed.lengths]).tolist()
    assert packed.labels[0, packed.segment_borders[1:].long() - 1].tolist() == [IGNORE_INDEX] * 4
    assert packed.owners.tolist() == padded.owners.tolist() and packed.sample_ids.tolist() == [2, 0, 4, 5]
    assert packed.supervised.tolist() == torch.where(packed.labels[0] != IGNORE_INDEX)[0].tolist()
    media = packed.media["image"]
    assert [level(row) for row in media.values] == [20, 30, 10, 20, 30]
    placeholder = int(samples[0].input_ids[samples[0].media["image"][0].start])
    assert media.slots.tolist() == torch.where(packed.input_ids[0] == placeholder)[0].tolist()
    assert media.ends is not None and media.ends.tolist() == media.slots.tolist()[WIDTH - 1 :: WIDTH]
    blank = collate_packed([], PAD)
    assert (blank.input_ids.tolist(), blank.segment_lengths, blank.num_supervised) == ([[PAD]], (1,), 0)
    assert blank.sample_ids.tolist() == [-1] and blank.segment_borders.tolist() == [0, 1]  # type: ignore[union-attr]


def steps(data: MultimodalDataset, rank: int = 0, world_size: int = 1, budget: int = 70, **options: Any) -> list[list[MicroBatch]]:
    sampler = Sampler(data.lengths, data.modalities, 5, 0, "random")
    last = 2 * sampler.steps_per_epoch
    first, costs = options.pop("first_step", 0), options.pop("costs", None)
    how = LoadOptions(**{"pad_id": PAD, "rank": rank, "workers": 0, **options})
    return list(train_batches(data, sampler, BatchPlan(world_size, 4, budget), how, range(first, last), costs))


def ids_of(step: list[MicroBatch]) -> list[int]:
    trained = [i for micro in step for i in micro.batch.sample_ids.tolist() if i >= 0]
    return trained + [r.sample_id for micro in step for r in micro.rejected]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_holds_what_the_sampler_says_on_any_ranks_with_any_workers_and_budget(
    data: MultimodalDataset, world_size: int
) -> None:
    sampler = Sampler(data.lengths, data.modalities, 5, 0, "random")
    counts = set()
    for budget in (int(data.lengths.max()), 90, 500):
        ranks = [steps(data, rank, world_size, budget) for rank in range(world_size)]
        for number, parts in enumerate(zip(*ranks, strict=True)):
            assert sorted(i for part in parts for i in ids_of(part)) == sorted(sampler.step(number))
            assert len({len(part) for part in parts}) == 1
            assert all(micro.batch.num_real_tokens <= budget for part in parts for micro in part)
            counts.add(len(parts[0]))
        rest = steps(data, 0, world_size, budget, first_step=2, workers=2)
        assert [ids_of(step) for step in rest] == [ids_of(step) for step in ranks[0][2:]]
    assert len(counts) > 1  # steps of one run differ in their number of micro-batches


def test_validation_is_packed_and_whole(data: MultimodalDataset) -> None:
    for world_size in (1, 3):
        plan = BatchPlan(world_size, 4, 70)
        ranks = [list(validation_batches(data, plan, LoadOptions(pad_id=PAD, rank=r, workers=0), 0)) for r in range(world_size)]
        assert len({len(rank) for rank in ranks}) == 1
        assert sorted(i for rank in ranks for i in ids_of(rank)) == list(range(12))
        assert all(micro.batch.segment_lengths is not None for rank in ranks for micro in rank)


def test_a_sample_longer_than_planned_is_named_and_left_out_on_any_number_of_ranks(data: MultimodalDataset) -> None:
    real = int(data.lengths[5])
    data.lengths[5] = real - 3
    found = {}
    for world_size in (1, 2):
        rejected = [r for rank in range(world_size) for step in steps(data, rank, world_size) for m in step for r in m.rejected]
        found[world_size] = sorted((r.sample_id, r.where, r.reason) for r in rejected if r.sample_id == 5)
    assert found[1] == found[2] and len(found[1]) == 2  # once in each of the two epochs
    assert found[1][0][1] == "mix.jsonl:6"
    assert found[1][0][2].startswith(f"length: {real} tokens, {real - 3} were planned: ") and "tools.check_data" in found[1][0][2]


def test_a_sample_costs_its_tokens_and_what_its_media_cost_their_encoder(parts: Path, data: MultimodalDataset) -> None:
    """Operations per weight and token: frozen tower two, frozen language model, through which gradients pass, four, tuned six."""
    tunings: list[tuple[Any, float]] = [(("full", "frozen"), 2 / 6), (("frozen", "full"), 6 / 4), (("lora", "lora"), 4 / 4)]
    for tunes, passes in tunings:
        llm, vision = LlmConfig(str(parts / "llm"), tunes[0]), VisionConfig(str(parts / "vision"), tunes[1])
        config = ModelConfig(llm, vision, VisionProjectorConfig(), dtype="float32")
        model: Any = assemble(make_card(config, LoraConfig(rank=2), VocabularyLayout()), torch.float32)
        tower, decoder = (
            sum(p.numel() for p in part.parameters()) for part in (model.vision.tower.encoder.layers, model.llm.model.layers)
        )
        rows = WIDTH + 1  # the tower computes on its CLS row too
        expected = [data.lengths[i] + rows * (i % 3) * passes * tower / decoder for i in range(11)]
        np.testing.assert_allclose(sample_costs(model, config, data)[:11], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("data", "batch", "attention", "expected"),
    [
        ({"packing": True}, {}, "sdpa", "batch.micro_batch_tokens = 0 is less than data.max_length = 2048"),
        (
            {"packing": True, "max_length": 99},
            {"micro_batch_tokens": 98},
            "varlen",
            "tokens = 98 is less than data.max_length = 99",
        ),
        ({"packing": True}, {"micro_batch_tokens": -1}, "sdpa", "batch.micro_batch_tokens = -1 is negative"),
        ({}, {"micro_batch_tokens": 4096}, "sdpa", "batch.micro_batch_tokens = 4096 has no effect with data.packing = false"),
        ({}, {}, "varlen", "model.attention = 'varlen' is for packed samples"),
        (
            {"packing": True},
            {"micro_batch_tokens": 4096, "micro_batch_size": 8},
            "sdpa",
            "batch.micro_batch_size = 8 has no effect",
        ),
        ({"packing": True}, {"micro_batch_tokens": 4096}, "eager", "'eager' with data.packing = true: packed samples would attend"),
    ],
)
def test_contradictions_are_refused(data: dict[str, Any], batch: dict[str, Any], attention: str, expected: str) -> None:
    assert expected in problems(data=data, batch=batch, model={"attention": attention})


def test_a_packed_configuration_is_accepted_again() -> None:
    """Resolved, it names micro_batch_size too; the default of that may be more than a small step holds."""
    sections = {"data": {"packing": True}, "batch": {"micro_batch_tokens": 2048, "global_batch_size": 2}}
    config = parse_config(merged(MINIMAL, {**sections, "model": {"attention": "varlen"}}), "x")
    assert parse_config(to_tables(config), "x") == config


def run_of(parts: Path, output_dir: Path, size: int, steps: int, packing: bool, strategy: str = "ddp") -> list[dict[str, Any]]:
    """The metrics of a run, packed or padded, on `size` ranks, with recomputation under FSDP2."""
    held_out = [{"path": str(parts / "train.json"), "media_root": str(parts / "images")}]
    parallel = {"strategy": strategy, "activation_checkpointing": "full" if strategy == "fsdp" else "none"}
    sections: dict[str, Any] = {
        "data": {"max_length": 64, "validation": held_out, "packing": packing},
        "batch": {"micro_batch_size": None, "micro_batch_tokens": 64} if packing else {},
        "validation": {"every": 2},
        "train": {"max_steps": steps},
        "optim": {"lr": 1e-3, "schedule": "constant"},
        "parallel": parallel,
    }
    assert {s.code for s in run_ranks(start, size, parts, output_dir, sections)} == {0}
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def assert_same_lines(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected] and len(expected) > 4
    for one, other in zip(found, expected):
        for key in ("train/loss", "train/grad_norm", "val/loss", "train/tokens", "train/supervised_tokens"):
            assert (key in one) == (key in other)
            assert key not in one or one[key] == pytest.approx(other[key], rel=3e-6)


def test_a_packed_run_is_the_unpacked_one(parts: Path, tmp_path: Path) -> None:
    """From records to losses, on two ranks against one."""
    expected = run_of(parts, tmp_path / "padded", 1, 4, packing=False)
    assert_same_lines(run_of(parts, tmp_path / "packed", 2, 4, packing=True), expected)


@pytest.mark.long
@pytest.mark.parametrize(("size", "strategy"), [(1, "ddp"), (2, "fsdp"), (3, "fsdp"), (4, "ddp")])
def test_it_is_so_on_any_ranks_and_after_a_resume_with_others(parts: Path, tmp_path: Path, size: int, strategy: str) -> None:
    """Two steps on one number of ranks, two more on another."""
    expected = run_of(parts, tmp_path / "padded", 1, 4, packing=False)
    run_of(parts, tmp_path / "packed", size, 2, packing=True, strategy=strategy)
    assert_same_lines(run_of(parts, tmp_path / "packed", 3 - min(size, 2), 4, packing=True), expected)
