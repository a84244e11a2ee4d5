"""Runs whose weights are made up: built by the trainer itself, from a shape, on any device."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn

from data.config import DataConfig
from data.processor import Processor
from model.card import ModelCard, make_card
from model.config import LlmConfig, LoraConfig, ModelConfig, QuantizeConfig, VisionConfig, VisionProjectorConfig
from model.files.tensor_files import LazyTensor, Tensors
from model.llm.causal_lm import VocabularyLayout
from model.weights.initial_values import seed_of
from model.weights.materialise import Layer, owners
from tools.devicechecks.outcome import Context
from tools.devicechecks.shapes import ModelShape
from trainer import setup
from trainer.config import BatchConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from trainer.distributed.world import World
from trainer.records.run_data import RunData
from trainer.runfile.stages import Stage
from trainer.setup import PreparedRun, build_run

SPREAD = 0.1
"""Deviation of biases, and of the weights of norms from 1: a program that forgets one gives other numbers."""
PLAIN = ParallelConfig(strategy="ddp")
LARGE_EPS = OptimConfig(lr=0.1, eps=1.0)
"""A large eps keeps Adam from turning rounding into signs."""


@dataclass(frozen=True)
class Recipe:
    """Choice of what a run learns, and how it computes."""

    llm: Literal["frozen", "lora", "full"] = "full"
    vision: Literal["frozen", "lora", "full"] = "frozen"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    packing: bool = False
    rank: int = 8
    dropout: float = 0.0
    parallel: ParallelConfig = PLAIN
    optim: OptimConfig = LARGE_EPS


def run_config(shape: ModelShape, recipe: Recipe, context: Context) -> RunConfig:
    """Return the settings of a run; writes the JSON files of its parts."""
    folder = shape.write(context.folder / shape.name)
    llm = LlmConfig(str(folder / "llm"), recipe.llm)
    vision = VisionConfig(str(folder / "vision"), recipe.vision)
    model = ModelConfig(llm, vision, VisionProjectorConfig(), dtype=recipe.dtype)
    return RunConfig(
        output_dir=str(context.folder / "run"),
        model=model,
        data=DataConfig(packing=recipe.packing, max_length=8192),
        lora=LoraConfig(rank=recipe.rank, dropout=recipe.dropout),
        batch=BatchConfig(micro_batch_tokens=8192 if recipe.packing else 0),
        optim=recipe.optim,
        train=TrainConfig(max_steps=1_000_000),
        parallel=recipe.parallel,
    )


def card_of(config: RunConfig) -> ModelCard:
    return make_card(config.model, config.lora, VocabularyLayout(), quantize=config.quantize)


def build(shape: ModelShape, recipe: Recipe, context: Context, *, made_on: torch.device | None = None) -> PreparedRun:
    """Build a run on the device of `context`. `made_on`: where its random values are drawn, by default on the CPU, so that runs on
    several devices have the same.
    """
    config = run_config(shape, recipe, context)
    return build_from(config, context.world, random_values(made_on or torch.device("cpu")))


def build_from(config: RunConfig, world: World, values: Callable[[nn.Module], Tensors], *, sharded: bool = False) -> PreparedRun:
    """Build a run with `trainer.setup.build_run`, whose weights are `values` instead of files.

    `sharded`: by FSDP2, although there is one rank.
    """
    data = RunData(card_of(config), cast(Processor, None), None, None, None)

    def layers(card: ModelCard, model: nn.Module, seed: int) -> list[Layer]:
        return [Layer("made up", lambda: values(model))]

    with ExitStack() as stack:
        stack.enter_context(patch.object(setup, "weight_layers", layers))
        if sharded:
            stack.enter_context(patch.object(setup, "is_sharded", lambda config, world: True))
        return build_run(Stage(config, config), data, world)


def random_values(device: str | torch.device) -> Callable[[nn.Module], Tensors]:
    """Return a function that gives every parameter of a model random values, drawn on `device` and the same at every call."""

    def values(model: nn.Module) -> Tensors:
        named = {name: tuple(owner.shape) for owner, names in owners(model).items() for name in names[:1]}
        return {name: _random(name, shape, device) for name, shape in named.items()}

    return values


def _random(name: str, shape: tuple[int, ...], device: str | torch.device) -> LazyTensor:
    """Return matrices whose products keep the size of what they read, norms about 1 and biases about 0."""

    def read(start: int, stop: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed_of(name))
        drawn = torch.empty(shape, device=device).normal_(generator=generator)[start:stop]
        if len(shape) > 1:
            return drawn.mul_(1 / math.sqrt(math.prod(shape[1:])))
        return drawn.mul_(SPREAD).add_(1.0 if name.endswith(".weight") else 0.0)

    return LazyTensor(shape, read)


def on_cpu(context: Context) -> Context:
    """Return the same context for the CPU, which numbers of the device are compared with."""
    return replace(context, world=replace(context.world, device=torch.device("cpu")))


QUANTISED = {"8 bits": QuantizeConfig(8), "nf4": QuantizeConfig(4), "nf4 plain": QuantizeConfig(4, double=False)}
