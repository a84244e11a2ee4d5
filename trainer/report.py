"""Plan of a run as text, printed before it starts, and what notes of the start are written: run.toml and start.json."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from data.check.measured_lengths import EXACT
from model.files.tensor_files import dump_json
from model.files.untrusted import Json
from model.llm.causal_lm import positions_note
from model.llm.experts import fused_parameters
from model.llm.quantized_linear import quantised
from model.trainable import part_table
from trainer.checkpoint.resume import StageStart
from trainer.config import ParallelConfig
from trainer.distributed.compute_copies import keeps_copies
from trainer.distributed.parallelize import is_sharded
from trainer.distributed.world import World
from trainer.machine.atomic_files import replace_text
from trainer.machine.memory_info import usage
from trainer.optim import learning_rates
from trainer.optim_state import rules_of
from trainer.records.freeze_lengths import available_cpus
from trainer.runfile.schema import to_tables
from trainer.runfile.toml_files import to_toml
from trainer.schedule import describe_schedule
from trainer.setup import PreparedRun

NAME = "start.json"


def write_plan(prepared: PreparedRun, start: StageStart, first_step: int, chosen: str) -> None:
    """Print the plan of a stage that goes on behind `first_step` steps of its own; write run.toml and start.json. For rank 0.

    `chosen`: a line about what was chosen at the start, which run.toml holds as a comment.
    """
    stage = prepared.stage
    plan = describe_run(prepared, start.checkpoint if start.state else None, start.notes)
    comment = f"# {chosen}\n" if chosen else ""
    replace_text(stage.run_folder / "run.toml", to_toml(to_tables(stage.root)) + comment)
    write_start(prepared, first_step, plan)
    print(plan, flush=True)


def write_start(prepared: PreparedRun, first_step: int, plan: str) -> None:
    """Write start.json of a run or stage that goes on behind `first_step` steps of its own. For rank 0.

    `plan`: as it was printed.
    """
    stage, config = prepared.stage, prepared.config
    rates = learning_rates(config.model, config.optim)
    parts = [
        {**asdict(row), "lr": rates.get(row.part) if row.num_trainable else None}
        for row in part_table(prepared.model, config.model)
    ]
    note = {
        "at": round(time.time(), 3),  # seconds since 1970
        "stage": stage.name,
        "number": stage.number,
        "count": stage.count,
        "step": stage.first_step + first_step,
        "last_step": stage.first_step + prepared.total_steps,
        "parts": parts,
        "machine": describe_machine(prepared.world),
        "plan": plan,
    }
    replace_text(Path(stage.run_folder, NAME), dump_json(note))


def describe_machine(world: World) -> Json:
    """Describe where a run computes, without a name of the machine or of a person."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine()
    return {
        "device": f"{world.size} x {device}" if world.device.type == "cuda" else f"{world.size} process(es) on {device}",
        "memory_gib": round(usage(world.device).total / 2**30, 1),
        "cores": os.cpu_count() or 0,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }


def describe_run(prepared: PreparedRun, resume: Path | None, damaged: Sequence[str]) -> str:
    """Describe parts, batch arithmetic, sharding, data and the resume point, for people."""
    stage, origin = prepared.stage, prepared.config.model.init_from or "the bases"
    lines = ["", f"{stage}, from {origin}"] if stage.name else []
    lines += [*_parts(prepared), "", *_batches(prepared)]
    lines += [f"data      {line}" for line in prepared.data.certificates]
    lines += [f"aside     {text}" for text in damaged]
    lines.append(f"start     {'from ' + str(resume) if resume else 'fresh'}, writing to {stage.folder}")
    return "\n".join(lines)


def _parts(prepared: PreparedRun) -> list[str]:
    config = prepared.config
    rates = learning_rates(config.model, config.optim)
    head = f"{'part':<18}{'parameters':>15}{'trainable':>15}  {'tune':<10}{'lr':>10}{'weight decay':>14}"
    rows = [head]
    for row in part_table(prepared.model, config.model):
        lr, decay = ("-", "-") if row.num_trainable == 0 else (f"{rates[row.part]:.3g}", f"{config.optim.weight_decay:g}")
        rows.append(f"{row.part:<18}{row.num_parameters:>15,}{row.num_trainable:>15,}  {row.tune:<10}{lr:>10}{decay:>14}")
    experts = fused_parameters(prepared.model.llm)
    if experts and config.model.llm.tune == "lora":  # where a person looks for the parts that learn
        text = f"LoRA reaches linear layers, not the {len(experts)} fused parameters as llm.{experts[0]}"
        rows.append(f"experts   stay as they are: {text}")
    return rows


def _batches(prepared: PreparedRun) -> list[str]:
    config, world, sampler = prepared.config, prepared.world, prepared.data.sampler
    per_rank = -(-config.batch.global_batch_size // world.size)
    strategy = describe_sharing(config.parallel, world.size)
    if config.data.packing:
        shared = f"packed into micro-batches of up to {config.batch.micro_batch_tokens:,} tokens, as many as each step needs"
    else:
        accumulated = -(-per_rank // config.batch.micro_batch_size)
        shared = f"up to {per_rank} per rank in {accumulated} micro-batch(es) of {config.batch.micro_batch_size}"
    lines = [
        f"batch     {config.batch.global_batch_size} samples per step on {world.size} rank(s): {shared}",
        f"parallel  {strategy} on {world.device.type}, computing in {config.model.dtype}, "
        f"activation checkpointing {config.parallel.activation_checkpointing}"
        f"{', blocks compiled at their first use' if config.parallel.compile else ''}",
        *(f"          {note}" for note in describe_storage(config.parallel, prepared.model.dtype, world)),
        *_quantised(prepared),
        *_optimizer(prepared),
        *describe_workers(config.data.workers, available_cpus()),
    ]
    if sampler is not None:
        lines.append(
            f"steps     {prepared.total_steps} in all, {sampler.steps_per_epoch} per epoch of {sampler.samples_per_epoch:,} "
            f"samples, {describe_schedule(config.optim, prepared.total_steps)}"
        )
        hint = "" if prepared.data.lengths_kind == EXACT else "; before a first start, python -m tools.check_data makes them exact"
        lines.append(f"lengths   {prepared.data.lengths_kind}, for the whole run{hint}")
        if note := positions_note(prepared.data.card.hugging_face["llm"], config.data.max_length):
            lines.append(f"positions {note}")
        lines += [f"mix       {text}" for pool in prepared.data.pools if (text := str(pool))]
    return lines


def _optimizer(prepared: PreparedRun) -> list[str]:
    """Describe the optimizer, and the share of the trained numbers that it updates by its own rule."""
    if prepared.trained is None:
        return []
    optim, scaling, sizes = prepared.config.optim, prepared.trained.loss_scale, dict[str, int]()
    for p, rule in rules_of(prepared.trained.optimizer).items():
        sizes[rule] = sizes.get(rule, 0) + p.numel()
    text: str = optim.kind
    if optim.kind in ("muon", "adamw8bit"):
        text += f" for {sizes[optim.kind] / sum(sizes.values()):.1%} of the trained numbers, adamw for the others"
    if scaling is not None:
        scale = prepared.config.loss_scale
        text += f"; loss scale {scaling.scale.item():g}, doubled after {scale.growth_interval} updates in a row"
    return [f"optimizer {text}"]


def describe_workers(num_workers: int, num_cpus: int) -> list[str]:
    """Describe the data workers of a rank where they are more than the processors that it may use."""
    if num_workers <= num_cpus:
        return []
    told = f"data.workers = {num_workers} per rank, and rank 0 may use {num_cpus} processor(s): workers beyond those take turns"
    return [f"workers   {told}"]


def describe_sharing(config: ParallelConfig, num_ranks: int) -> str:
    """Describe which ranks hold which weights."""
    if num_ranks == 1:
        return "one process"
    if config.strategy == "hsdp":
        return f"hsdp: {num_ranks // config.shard_size} copies of {config.shard_size} ranks"
    return config.strategy


def describe_storage(config: ParallelConfig, dtype: torch.dtype, world: World) -> list[str]:
    """Describe where masters are, how they become what is computed with, and how gradients are summed, as far as it is unusual."""
    notes = []
    sharded = is_sharded(config, world)
    if config.cpu_offload:
        what = "all weights" if sharded else "trained weights"
        here = "; here that is the device's memory as well, so nothing is saved" if world.device.type == "cpu" else ""
        notes.append(f"cpu_offload: {what}, their gradients and moments are in the host's memory{here}")
    elif not sharded and dtype != torch.float32 and keeps_copies(config):
        notes.append("float32 weights are cast once per update (compute_copies)")
    if config.reduce_dtype != "float32" and world.size > 1:
        notes.append(f"gradients are summed over ranks in {config.reduce_dtype}, which rounds them (reduce_dtype)")
    return notes


def _quantised(prepared: PreparedRun) -> list[str]:
    """Describe the memory of the quantised matrices of the language model, and their memory in the dtype of the computation."""
    config, layers = prepared.config.quantize, [layer for _, layer in quantised(prepared.model)]
    if not layers:
        return []
    taken = sum(p.numel() for layer in layers for p in (layer.codes, layer.scales))
    whole = sum(layer.in_features * layer.out_features for layer in layers) * prepared.model.dtype.itemsize
    kind = f" ({config.type}{', double' if config.double else ''})" if config.bits == 4 else ""
    return [
        f"quantised {len(layers)} matrices of llm in {config.bits} bits{kind}: {taken / 2**20:,.1f} MiB in place of "
        f"{whole / 2**20:,.1f} in {prepared.config.model.dtype}; head, embeddings and norms stay as they are"
    ]
