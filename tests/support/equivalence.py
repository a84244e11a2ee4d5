"""Helpers of tests/laws/test_equivalence.py that other tests share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.collate import collate
from data.order.sampler import deal
from data.sample import Sample, SampleMedia
from model.batch import IGNORE_INDEX, Batch
from model.build import assemble
from model.card import make_card
from model.config import LlmConfig, LoraConfig, ModelConfig, QuantizeConfig, VisionConfig, VisionProjectorConfig
from model.llm.causal_lm import VocabularyLayout
from model.media_spec import MediaMeta, num_tokens
from model.multimodal import MultimodalLM
from model.weights.materialise import materialise
from model.weights.origins import weight_layers
from trainer.config import OptimConfig, ParallelConfig
from trainer.distributed import compiled_blocks
from trainer.distributed.blocks import prepare_blocks
from trainer.distributed.parallelize import is_sharded, replicate
from trainer.distributed.shards import shard
from trainer.distributed.world import World
from trainer.optim import build_optimizer, set_learning_rates
from trainer.step import StepOptions, train_step

NUM_STEPS, GLOBAL_BATCH = 5, 10


WHOLE = QuantizeConfig()


TUNES: dict[str, dict[str, Any]] = {
    "full": {"llm": "full", "vision": "full", "vision_projector": "full"},
    "projector": {"llm": "frozen", "vision": "frozen", "vision_projector": "full"},
    "lora": {"llm": "lora", "vision": "lora", "vision_projector": "full"},
}


def config_of(folder: Path, tune: str) -> ModelConfig:
    chosen = TUNES[tune]
    return ModelConfig(
        LlmConfig(str(folder / "llm"), chosen["llm"]),
        VisionConfig(str(folder / "vision"), chosen["vision"]),
        VisionProjectorConfig(tune=chosen["vision_projector"]),
        dtype="float32",
    )


def noise(rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal((1, 3, 16, 16))).float()


def make_sample(index: int, width: int, rng: np.random.Generator) -> Sample:
    """Text only, one picture or two; every fifth one supervises nothing."""
    num_images = index % 3
    length = int(rng.integers(6, 12)) + num_images * width
    ids = rng.integers(0, 300, length)
    labels = np.full(length, IGNORE_INDEX)
    if index % 5:
        labels[-4:-1] = ids[-3:]
    pictures = [SampleMedia("image", noise(rng), 1 + k * (width + 1), width, np.arange(width), width) for k in range(num_images)]
    return Sample(index, 0, ids, labels, {"image": pictures} if pictures else {})


def step_batches(step: int, world: World, micro_batch_size: int, width: int) -> list[Batch]:
    """This rank's micro-batches of a step; samples and steps are the same for every world."""
    rng = np.random.default_rng(step)
    samples = [make_sample(i, width, rng) for i in range(GLOBAL_BATCH if step < NUM_STEPS - 1 else 2)]
    lengths = np.array([len(s.input_ids) for s in samples])
    dealt = deal(np.arange(len(samples)), lengths, world.size, micro_batch_size)
    return [collate([samples[i] for i in ids], 0) for ids in dealt[world.rank]]


def parallel_of(strategy: str | ParallelConfig) -> ParallelConfig:
    """hsdp: two ranks to a copy. Every block is a unit, as those of large models are."""
    if isinstance(strategy, ParallelConfig):
        return strategy
    return ParallelConfig(strategy, 2 if strategy == "hsdp" else 0, unit_mib=0)  # type: ignore[arg-type]


def _blocks_of(recompute: bool | str) -> dict[str, Any]:
    """Settings of [parallel] for whether and how blocks are recomputed; "compiled ..." compiles them too, without kernels."""
    kind = recompute if isinstance(recompute, str) else "full" if recompute else "none"
    if not kind.startswith("compiled "):
        return {"activation_checkpointing": kind}
    compiled_blocks.compile_graph = compiled_blocks.partition_graph  # this process ends with its cases
    return {"activation_checkpointing": kind.removeprefix("compiled "), "compile": True}


def run_steps(
    world: World,
    config: ModelConfig,
    strategy: str | ParallelConfig,
    recompute: bool | str,
    micro_batch_size: int,
    dtype: str = "float32",
    clip_norm: float = 1.0,
    quantize: QuantizeConfig = WHOLE,
    dropout: float = 0.0,
) -> list[float]:
    """The same, of any model whose pictures are 16 pixels wide."""
    return take_steps(world, config, strategy, recompute, micro_batch_size, dtype, clip_norm, quantize, dropout)[0]


def take_steps(
    world: World,
    config: ModelConfig,
    strategy: str | ParallelConfig,
    recompute: bool | str,
    micro_batch_size: int,
    dtype: str,
    clip_norm: float,
    quantize: QuantizeConfig,
    dropout: float = 0.0,
    optim: OptimConfig | None = None,
) -> tuple[list[float], MultimodalLM]:
    """Loss and gradient norm of five steps, and the model they leave."""
    lora = LoraConfig(rank=2, dropout=dropout)
    card = make_card(config, lora, VocabularyLayout(321, 320, (320,)), quantize=quantize)
    model = assemble(card, getattr(torch, dtype))
    parallel = replace(parallel_of(strategy), **_blocks_of(recompute))
    prepare_blocks(model, parallel)
    sharded = is_sharded(parallel, world)
    if sharded:
        shard(model, parallel, world)
    materialise(model, weight_layers(card, model, 7), frozen_dtype=model.dtype, device=world.device)
    wrapped = model if sharded else replicate(model, world, parallel)
    # A large eps keeps Adam from turning rounding into signs, a modest rate from amplifying it step by step.
    optim = optim or OptimConfig(lr=0.1, eps=1.0, clip_norm=clip_norm)
    optimizer = build_optimizer(model, config, optim)
    set_learning_rates(optimizer, 1.0)
    width = num_tokens(model.specs["image"], MediaMeta())
    found: list[float] = []
    for step in range(NUM_STEPS):
        batches = step_batches(step, world, micro_batch_size, width)
        count = world.sum(torch.tensor(float(sum(b.num_supervised for b in batches))))
        result = train_step(wrapped, optimizer, batches, world, StepOptions(seed=0, step=step, clip_norm=optim.clip_norm))
        total = world.sum(torch.cat(result.addends).sum())
        found += [(total / count.clamp(min=1)).item(), result.grad_norm.item()]
    return found, model
