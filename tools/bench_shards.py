"""Measure what sharing weights among ranks costs: our step under DDP and FSDP2 beside bare loops of both, on the demo's model.

`torchrun --nproc_per_node=2 -m tools.bench_shards`. CPU seconds are user and system time of a rank, all its threads, per step in a
steady state: medians of interleaved rounds, means over ranks. Collectives are counted by kind, per step.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from model.build import DTYPES, assemble
from model.card import ModelCard, make_card
from model.config import LlmConfig, LoraConfig, ModelConfig, VisionConfig, VisionProjectorConfig
from model.llm.causal_lm import VocabularyLayout, blocks
from model.multimodal import MultimodalLM
from model.weights.materialise import materialise
from model.weights.origins import weight_layers
from tools.bench_step import bare_loop, make_batches, our_loop
from tools.benches.turns import cpu_time, in_turns
from tools.cli import command_parser
from tools.make_demo import CORPUS, VOCAB, train_tokenizer, write_parts
from trainer.config import ParallelConfig
from trainer.distributed.blocks import block_owner, has_blocks
from trainer.distributed.parallelize import replicate
from trainer.distributed.shards import Options, shard
from trainer.distributed.world import World, start_world, stop_world

Run = Callable[[int], None]


def bench_card(folder: str, dtype: Literal["float32", "bfloat16"]) -> ModelCard:
    llm, vision = LlmConfig(f"{folder}/llm", "full"), VisionConfig(f"{folder}/vision", "full")
    return make_card(ModelConfig(llm, vision, VisionProjectorConfig(), dtype=dtype), LoraConfig(), VocabularyLayout())


def build_model_of(card: ModelCard, world: World, wrap: Callable[[MultimodalLM], None] | None = None) -> MultimodalLM:
    """Build the model; `wrap` shards it while it is on meta."""
    model = assemble(card, DTYPES[card.model.dtype])
    if wrap:
        wrap(model)
    materialise(model, weight_layers(card, model, 7), frozen_dtype=model.dtype, device=world.device)
    return model.train()


def bare_shard(model: MultimodalLM, world: World) -> None:
    """Shard a model as the manual of FSDP2 does: every block, then the rest."""
    dtype = None if model.dtype == torch.float32 else model.dtype
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options: Options = {"mesh": world.mesh(), "mp_policy": policy, "offload_policy": OffloadPolicy()}
    for name in [name for name, _ in model.named_children() if has_blocks(model, name)]:
        for block in blocks(block_owner(model, name)):
            fully_shard(block, **options)
    fully_shard(model, **options)


def loops(folder: str, options: argparse.Namespace, world: World) -> dict[str, Run]:
    """Return the loops to be compared, by the name of their row; each has a model and an optimizer of its own."""
    card = bench_card(folder, options.dtype)
    sharded, copied = ParallelConfig("fsdp"), ParallelConfig("ddp")
    models = {
        "ours, ddp": build_model_of(card, world),
        "ours, fsdp": build_model_of(card, world, lambda model: shard(model, sharded, world)),
        "bare, ddp": build_model_of(card, world),
        "bare, fsdp": build_model_of(card, world, lambda model: bare_shard(model, world)),
    }
    batches = make_batches(models["ours, ddp"], 4, options.batch)
    runs: dict[str, Run] = {}
    for name, model in models.items():
        if name.startswith("ours"):
            wrapped = replicate(model, world, copied) if name.endswith("ddp") else model
            runs[name] = our_loop(model, card.model, batches, world, wrapped)
        else:
            replicated: nn.Module = DistributedDataParallel(model, gradient_as_bucket_view=True, init_sync=False)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            runs[name] = bare_loop(replicated if name.endswith("ddp") else model, optimizer, batches, world)
    return runs


def seconds_per_step(run: Run, steps: int, world: World) -> float:
    """Return the CPU seconds per step, the mean over the ranks, which begin together. Collective."""
    world.barrier()
    return statistics.mean(world.gather_json(cpu_time(lambda: run(steps)) / steps))


def print_ratios(runs: dict[str, Run], options: argparse.Namespace, world: World) -> None:
    counts: dict[str, dict[str, int]] = {}
    for name, run in runs.items():
        run(3)  # lazy initialisation, buckets, moments
        with warnings.catch_warnings(), CommDebugMode() as seen:
            warnings.simplefilter("ignore")  # about hooks of that mode on outputs that are no tensors
            run(1)
        counts[name] = {str(kind).rpartition(".")[2].strip("_"): count for kind, count in seen.get_comm_counts().items()}
    cases = {name: partial(seconds_per_step, run, options.steps, world) for name, run in runs.items()}
    rounds = in_turns(cases, options.rounds)
    if not world.is_main:
        return
    medians = {name: 1e3 * statistics.median(found) for name, found in rounds.items()}
    print(f"{platform.machine()}, torch {torch.__version__}, {world.size} ranks, one thread each, {options.dtype}")
    print(f"{'per step and rank':<19}{'CPU ms':>9}{'/ ours, ddp':>13}{'/ bare, fsdp':>14}  collectives")
    for name, ms in medians.items():
        ratios = [statistics.median(a / b for a, b in zip(rounds[name], rounds[other])) for other in ("ours, ddp", "bare, fsdp")]
        sent = ", ".join(f"{count} {kind}" for kind, count in sorted(counts[name].items()))
        print(f"{name:<19}{ms:>9.2f}{ratios[0]:>13.3f}{ratios[1]:>14.3f}  {sent}")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("bench_shards", __doc__)
    parser.add_argument("--batch", type=int, default=16, help="samples per rank and step (16)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (5)")
    parser.add_argument("--steps", type=int, default=20, help="steps of each in a round (20)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    world = start_world()
    with tempfile.TemporaryDirectory() as folder:
        if world.is_main:
            write_parts(Path(folder), train_tokenizer(CORPUS, VOCAB), VOCAB)
        print_ratios(loops(str(world.broadcast_json(folder)), options, world), options, world)
        world.barrier()
    stop_world()
    return 0


if __name__ == "__main__":
    sys.exit(main())
