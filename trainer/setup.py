"""Parts of a run in the order in which they are built: structure, sharding, weights, proof of gradients, optimizer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from data.collate import collate
from data.dataset import MultimodalDataset
from data.loader import BatchPlan, LoadOptions
from data.workers import Reading, describe_sample
from model.build import DTYPES, assemble, resolve_dtype
from model.errors import ConfigError
from model.files.shards import local
from model.multimodal import MultimodalLM
from model.preference.tuning import PreferenceTuning
from model.weights.materialise import Devices, materialise
from model.weights.origins import weight_layers
from trainer.config import RunConfig
from trainer.distributed.blocks import prepare_blocks
from trainer.distributed.compile_environment import prepare_compiling
from trainer.distributed.main_rank import say
from trainer.distributed.parallelize import check_sharing, is_sharded, replicate
from trainer.distributed.shards import shard
from trainer.distributed.world import World
from trainer.faults.phase_tracker import PhaseTracker
from trainer.faults.signals import launcher_lines
from trainer.isolation import prove_answers_apart, prove_isolation
from trainer.loss_scale import LossScale
from trainer.optim import Trained, build_optimizer
from trainer.records.hub_look_ups import share_look_ups
from trainer.records.look_beside import LookBeside
from trainer.records.run_data import RunData
from trainer.runfile.stages import Stage, check_stages, describe_stages, list_stages
from trainer.schedule import check_schedule
from trainer.scores.text_metrics import check_metrics


@dataclass(frozen=True)
class PreparedRun:
    """Configuration, data, model and optimizer of a run that is ready to step."""

    config: RunConfig
    world: World
    data: RunData
    model: MultimodalLM  # the model itself, for names and modes
    wrapped: nn.Module  # the module to call: the model, its FSDP2 form, or DDP around it
    trained: Trained | None  # None when nothing learns
    total_steps: int
    stage: Stage

    @property
    def batch_plan(self) -> BatchPlan:
        """Return the plan by which steps and validation become micro-batches, on this number of ranks."""
        batch = self.config.batch
        return BatchPlan(self.world.size, batch.micro_batch_size, batch.micro_batch_tokens)

    def load_options(self, dataset: MultimodalDataset, split: str, tracker: PhaseTracker) -> LoadOptions:
        """Return how this rank reads `dataset`, whose data workers `tracker` watches from now on."""
        workers = self.config.data.workers
        reading = tracker.watch_workers(Reading(workers), partial(describe_sample, dataset), split)
        return LoadOptions(pad_id=self.data.pad_id, rank=self.world.rank, workers=workers, reading=reading)


def resolve_config(config: RunConfig, world: World) -> RunConfig:
    """Return the configuration with the settings that depend on the machine filled in.

    Raises `ConfigError` when the configuration does not suit the number of ranks.
    """
    check_sharing(config.parallel, world.size)
    return replace(config, model=replace(config.model, dtype=resolve_dtype(config.model.dtype, world.device)))


def resolve_stages(root: RunConfig, world: World) -> list[Stage]:
    """Return the stages of a run with the settings that depend on the machine filled in, checked together, and say what they are.

    Collective. Raises `ConfigError` for what can be known before data are opened.
    """
    stages = [replace(stage, config=resolve_config(stage.config, world)) for stage in list_stages(root)]
    check_stages(stages)
    for stage in stages:
        check_metrics(stage.config.validation.metrics, "validation.metrics")
    share_look_ups((stage.config for stage in stages), world)
    say(world, *describe_stages(stages), *launcher_lines(root.faults.grace_seconds))
    for line in dict.fromkeys(prepare_compiling(stage.config.parallel, world.device) for stage in stages):
        if line:
            say(world, f"compile   {line}")
    return stages


def set_arithmetic(config: RunConfig) -> None:
    """Set how torch multiplies float32 matrices, and whether all kernels must repeat exactly."""
    torch.set_float32_matmul_precision(config.train.matmul_precision)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def num_steps(config: RunConfig, data: RunData) -> int:
    """Return the number of optimizer steps of the whole run or stage that `config` describes."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    steps = data.sampler.steps_per_epoch if data.sampler else 0
    return math.ceil((config.train.epochs or 0) * steps)


def build_beside_check(stage: Stage, data: RunData, world: World, tracker: PhaseTracker) -> tuple[PreparedRun, list[str]]:
    """Build and load the model while rank 0 looks at the data; return it, and lines for people. Collective.

    What is wrong with the data is told first, whichever of the two is found first.
    """
    tracker.mark("load")
    with LookBeside(data, stage.config, world) as beside:

        def progress(at: str) -> None:
            tracker.report_progress(at)
            beside.stop_early()

        try:
            prepared = build_run(stage, data, world, progress)
        except ConfigError:
            beside.precede()
            raise
        tracker.mark("check")
        return prepared, [f"data      {line}" for line in beside.finish(tracker.report_progress)]


def build_run(stage: Stage, data: RunData, world: World, on_progress: Callable[[str], object] = lambda at: None) -> PreparedRun:
    """Build the model and optimizer: structure on meta, sharding, then this rank's own rows of the weights. Collective.

    `on_progress` is called with the weights that are being read. Raises `ConfigError` when a proof fails.
    """
    config = stage.config
    model = assemble(data.card, DTYPES[config.model.dtype])
    if config.preference.is_on:
        model.preference = PreferenceTuning(config.preference)
    prepare_blocks(model, config.parallel)
    sharded = is_sharded(config.parallel, world)
    if sharded:
        shard(model, config.parallel, world)
    layers = weight_layers(data.card, model, config.seed)
    materialise(model, layers, frozen_dtype=model.dtype, device=place(model, config, world), on_progress=on_progress)
    learns = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = num_steps(config, data)
    check_schedule(config.optim, total)
    if not learns or total == 0:
        return PreparedRun(config, world, data, model, model, None, total, stage)
    wrapped = model if sharded else replicate(model, world, config.parallel)
    model.train()
    prove_gradients(wrapped, model, data.pad_id, world)
    if config.data.packing:
        prove_isolation(model, data.pad_id, world)
        if model.preference is not None:
            prove_answers_apart(model, data.pad_id, world)
    optimizer = build_optimizer(model, config.model, config.optim)
    masters = local(next(iter(learns.values()))).device  # with parallel.cpu_offload the host
    scaling = LossScale(config.loss_scale, masters) if model.dtype == torch.float16 else None
    return PreparedRun(config, world, data, model, wrapped, Trained(dict(learns), optimizer, scaling), total, stage)


def place(model: MultimodalLM, config: RunConfig, world: World) -> Devices:
    """Return where the tensors of `model` are kept, and tell the model where it computes.

    With parallel.cpu_offload trained weights are in host memory. FSDP2 wants all weights there: it gathers units from it.
    """
    model.compute_device = world.device
    host = torch.device("cpu") if config.parallel.cpu_offload else world.device
    return Devices(host, host if is_sharded(config.parallel, world) else world.device, world.device)


def prove_gradients(wrapped: nn.Module, model: MultimodalLM, pad_id: int, world: World) -> None:
    """Run one throw-away backward on a blank batch and raise `ConfigError` unless every trainable parameter gets a gradient.

    It also makes DDP fix its buckets before weights are restored, so that a resumed run sums in the same order. Collective.
    """
    terms = wrapped(collate([], pad_id).to(world.device))
    torch.stack([term.sum for term in terms.values()]).sum().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    for p in model.parameters():
        p.grad = None
    if without:
        raise ConfigError(
            f"{len(without)} trainable parameters cannot be reached by the loss, for example {without[0]}: "
            "set the tune of their part to 'frozen'"
        )
