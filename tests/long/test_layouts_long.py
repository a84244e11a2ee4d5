"""Law 3 at length: whoever has a picture, a sound, both or nothing, in any layout over four ranks, nobody waits for anybody."""

from __future__ import annotations

import math
import random
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from data.collate import collate
from data.sample import Sample, SampleMedia
from model.batch import Batch
from model.build import assemble
from model.card import make_card
from model.config import (
    AudioConfig,
    AudioProjectorConfig,
    LlmConfig,
    LoraConfig,
    ModelConfig,
    VisionConfig,
    VisionProjectorConfig,
)
from model.llm.causal_lm import VocabularyLayout
from model.media_spec import MediaMeta, num_tokens, row_width, token_rows
from model.multimodal import MultimodalLM
from model.weights.materialise import materialise
from model.weights.origins import weight_layers
from tests.support.ranks import run_ranks
from tests.support.runs import save_parts
from tests.support.tiny_audio import save_whisper
from trainer.config import OptimConfig, ParallelConfig
from trainer.distributed.parallelize import is_sharded, replicate
from trainer.distributed.shards import shard
from trainer.distributed.world import World
from trainer.optim import build_optimizer, set_learning_rates
from trainer.step import StepOptions, train_step

SIZE = 4
LAYOUTS = list(product(((), ("image",), ("audio",), ("image", "audio")), repeat=SIZE))
ROUNDS = 4  # of all 256 layouts, for each strategy


def batch_of(model: MultimodalLM, kinds: tuple[str, ...], seed: int) -> Batch:
    """One sample with a medium of each kind; every third one supervises nothing."""
    rng, media, start = torch.Generator().manual_seed(seed), {}, 1
    for kind in kinds:
        spec = model.specs[kind]
        frames = 20 + seed % 40
        shape = (1, 3, 16, 16) if kind == "image" else (1, spec.num_mels, frames)  # type: ignore[union-attr]
        meta = MediaMeta() if kind == "image" else MediaMeta(num_frames=frames)
        count = num_tokens(spec, meta)
        width = count if kind == "image" else row_width(spec, frames)  # type: ignore[arg-type]
        rows = np.arange(count) if kind == "image" else token_rows(spec, meta, width)  # type: ignore[arg-type]
        lengths = () if kind == "image" else (frames,)
        media[kind] = [SampleMedia(kind, torch.randn(shape, generator=rng), start, count, rows, width, lengths)]
        start += count + 1
    ids = np.arange(start + 5) % 300
    labels = np.where((np.arange(len(ids)) >= start) & (seed % 3 > 0), (ids + 1) % 300, -100)
    return collate([Sample(seed, 0, ids, labels, media)], 0)


def step_through(world: World, folder: Path, strategy: str, tune: str) -> list[float]:
    """The gradient norm of every step, over ROUNDS of all layouts in another order each."""
    config = ModelConfig(
        LlmConfig(str(folder / "llm"), "full"),
        VisionConfig(str(folder / "vision"), tune),  # type: ignore[arg-type]
        VisionProjectorConfig(),
        AudioConfig(str(folder / "audio"), tune, "clip"),  # type: ignore[arg-type]
        AudioProjectorConfig("conv_mlp"),
        dtype="float32",
    )
    card = make_card(config, LoraConfig(rank=2, dropout=0.0), VocabularyLayout(321, 320, (320,)))
    model = assemble(card, torch.float32)
    parallel = ParallelConfig(strategy)  # type: ignore[arg-type]
    sharded = is_sharded(parallel, world)
    if sharded:
        shard(model, parallel, world)
    materialise(model, weight_layers(card, model, 7), frozen_dtype=model.dtype, device=world.device)
    wrapped = model if sharded else replicate(model, world)
    optimizer = build_optimizer(model, config, OptimConfig(lr=1e-3))
    set_learning_rates(optimizer, 1.0)
    model.train()
    norms = []
    for turn in range(ROUNDS):
        order = random.Random(turn).sample(LAYOUTS, len(LAYOUTS))
        for i, layout in enumerate(order):
            batches = [batch_of(model, layout[world.rank], SIZE * i + world.rank)]
            result = train_step(wrapped, optimizer, batches, world, StepOptions(seed=0, step=turn * len(order) + i, clip_norm=1.0))
            norms.append(result.grad_norm.item())
    return norms


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "tune"), [("ddp", "frozen"), ("fsdp", "full")])
def test_every_layout_of_media_over_four_ranks_steps(tmp_path: Path, strategy: str, tune: str) -> None:
    save_parts(tmp_path)
    save_whisper(tmp_path / "audio", seconds=1)
    answers = run_ranks(step_through, SIZE, tmp_path, strategy, tune, seconds=3000)
    assert len(answers[0]) == ROUNDS * len(LAYOUTS) == 1024
    assert all(answer == answers[0] for answer in answers)
    assert all(math.isfinite(norm) for norm in answers[0]) and min(answers[0]) > 0
