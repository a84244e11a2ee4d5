"""Samples of preferences made of random ids, and their losses as the papers write them, on full logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from data.order.packing import deal_packed
from data.order.sampler import deal
from data.preference.collate import collate_answers, collate_answers_packed
from data.preference.sample import PreferenceSample, Role, SampleAnswer
from data.sample import SampleMedia
from model.batch import IGNORE_INDEX, Batch
from model.build import assemble
from model.card import make_card
from model.config import LlmConfig, LoraConfig, ModelConfig, VisionConfig, VisionProjectorConfig
from model.llm.causal_lm import VocabularyLayout
from model.multimodal import MultimodalLM
from model.preference.config import PreferenceConfig
from model.preference.shift import ShiftState
from model.preference.tuning import PreferenceTuning
from model.weights.materialise import materialise
from model.weights.origins import weight_layers
from trainer.config import OptimConfig, ParallelConfig
from trainer.distributed.blocks import prepare_blocks
from trainer.distributed.parallelize import is_sharded, replicate
from trainer.distributed.shards import shard
from trainer.distributed.world import World
from trainer.optim import build_optimizer, set_learning_rates
from trainer.step import StepOptions, train_step

PAIR: tuple[Role, ...] = ("chosen", "rejected")


def made_sample(
    index: int, rng: np.random.Generator, roles: tuple[Role, ...] = PAIR, num_images: int = 0, width: int = 4
) -> PreferenceSample:
    """A prompt with pictures of 16 pixels, and answers of 2 to 6 tokens of which some are not counted now and then."""
    prompt = int(rng.integers(3, 7)) + num_images * (width + 1)
    ids = [rng.integers(1, 300, prompt)]
    answers = []
    at = prompt
    for role in roles:
        length = int(rng.integers(2, 7))
        ids.append(rng.integers(1, 300, length))
        counted = np.ones(length, dtype=bool)
        counted[: index % 2] = False
        answers.append(SampleAnswer(role, at, at + length, counted))
        at += length
    flat = np.concatenate(ids)
    labels = np.full(len(flat), IGNORE_INDEX)
    if roles[0] in ("chosen", "desirable"):
        first = answers[0]
        where = first.start - 1 + np.flatnonzero(first.counted)
        labels[where] = flat[where + 1]
    pictures = [SampleMedia("image", noise_of(rng), 1 + k * (width + 1), width, np.arange(width), width) for k in range(num_images)]
    return PreferenceSample(
        index, index % 2, flat, labels, {"image": pictures} if pictures else {}, prompt=prompt, answers=tuple(answers)
    )


def noise_of(rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal((1, 3, 16, 16))).float()


class PairCase(NamedTuple):
    """How a model learns from preferences, on however many ranks."""

    kind: str
    tune: str = "full"  # full, with a stored reference, or lora, with the adapters switched off
    strategy: str = "ddp"
    recompute: bool = False
    micro_batch: int = 10  # samples, or, packed, tokens
    packed: bool = False


NUM_PAIR_STEPS, PAIRS_PER_STEP = 3, 10
TUNED = {"full": "full", "lora": "frozen"}


def pair_steps(world: World, folder: Path, case: PairCase) -> list[float]:
    """Every term's mean and the gradient norm of a few steps; the samples are the same for every world."""
    model, wrapped, config = _prepared(world, folder, case)
    optim = OptimConfig(lr=0.1, eps=1.0)
    optimizer = build_optimizer(model, config, optim)
    set_learning_rates(optimizer, 1.0)
    found: list[float] = []
    for step in range(NUM_PAIR_STEPS):
        batches = _pair_batches(step, world, case)
        assert model.preference is not None
        model.preference.shift.restore(shift_before(step, case))
        result = train_step(wrapped, optimizer, batches, world, StepOptions(seed=0, step=step, clip_norm=1.0))
        total = world.sum(result.losses.sum())
        margins = torch.stack([ratios["preference_margin"].sum(1) for ratios in result.ratios]).sum(0)
        found += [total.item(), result.grad_norm.item(), *world.sum(margins).tolist()]
    return found


def shift_before(step: int, case: PairCase) -> ShiftState:
    """Sums that a run would have at `step`, the same for every world."""
    return ShiftState(0.3 * step, float(step))


def _prepared(world: World, folder: Path, case: PairCase) -> tuple[MultimodalLM, torch.nn.Module, ModelConfig]:
    tune = "lora" if case.tune == "lora" else "full"
    config = ModelConfig(
        LlmConfig(str(folder / "llm"), tune),  # type: ignore[arg-type]
        VisionConfig(str(folder / "vision"), TUNED[case.tune]),  # type: ignore[arg-type]
        VisionProjectorConfig(tune="full"),
        dtype="float32",
    )
    card = make_card(config, LoraConfig(rank=2, dropout=0.0), VocabularyLayout(321, 320, (320,)))
    model = assemble(card, torch.float32)
    if case.tune == "lora":
        model.vision_projector.requires_grad_(False)
        model.trainable_parts = frozenset({"llm"})
    tuning = model.preference = PreferenceTuning(PreferenceConfig(case.kind, sft_weight=0.5))  # type: ignore[arg-type]
    tuning.adapters_off = case.tune == "lora"
    parallel = ParallelConfig(
        case.strategy,  # type: ignore[arg-type]
        shard_size=2 if case.strategy == "hsdp" else 0,
        unit_mib=0,
        activation_checkpointing="full" if case.recompute else "none",
    )
    prepare_blocks(model, parallel)
    sharded = is_sharded(parallel, world)
    if sharded:
        shard(model, parallel, world)
    materialise(model, weight_layers(card, model, 7), frozen_dtype=torch.float32, device=world.device)
    return model, model if sharded else replicate(model, world, parallel), config


def _pair_batches(step: int, world: World, case: PairCase) -> list[Batch]:
    """This rank's micro-batches of a step; the last step has fewer samples than there are ranks."""
    rng = np.random.default_rng(step)
    roles: tuple[tuple[Role, ...], ...] = (PAIR, PAIR)
    if case.kind == "kto":
        roles = (("desirable", "other"), ("undesirable", "other"), ("chosen", "rejected", "other"))
    number = PAIRS_PER_STEP if step < NUM_PAIR_STEPS - 1 else 3
    samples = [made_sample(i, rng, roles[i % len(roles)], num_images=i % 3) for i in range(number)]
    if case.tune == "full":
        samples = [replace(s, reference=tuple(-25.0 - 0.7 * i - k for k in range(len(s.answers)))) for i, s in enumerate(samples)]
    lengths = np.array([len(s.input_ids) for s in samples])
    if case.packed:
        dealt = deal_packed(np.arange(number), lengths, world.size, case.micro_batch)
    else:
        dealt = deal(np.arange(number), lengths, world.size, case.micro_batch)
    join = collate_answers_packed if case.packed else collate_answers
    return [join([samples[i] for i in ids], 0) for ids in dealt[world.rank]]


def save_pairs(folder: Path, num_records: int = 22) -> None:
    """folder/train.json and folder/images: pairs of answers to text alone, one picture, two pictures, in turn."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(num_records):
        names = [f"{i}_{k}.png" for k in range(i % 3)]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / "images" / name)
        asked = "<image>\n" * len(names) + "What is this? " + "red " * (i % 5)
        turns = [{"from": "human", "value": asked}]
        record = {"id": f"r{i}", "conversations": turns, "chosen": f"{i} cats on a mat", "rejected": "no " * (i % 4) + f"{i} dogs"}
        records.append(record | ({"image": names} if names else {}))
    (folder / "train.json").write_text(json.dumps(records))
