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
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from model.batch import Batch
from model.build import DTYPES, assemble
from model.card import ModelCard, make_card
from model.config import LlmConfig, LoraConfig, ModelConfig, VisionConfig, VisionProjectorConfig
from model.llm.causal_lm import VocabularyLayout, blocks
from model.multimodal import MultimodalLM
from model.weights.materialise import materialise
from model.weights.origins import weight_layers
from tools.bench_step import make_batches, our_loop
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


def bare_loop(wrapped: nn.Module, batches: list[Batch], world: World) -> Run:
    """Return the shortest loop around a wrapped model: the library's clipping, fused AdamW and a scheduler."""
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-4, fused=True)

    def run(steps: int) -> None:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (steps + 1))
        for step in range(steps):
            term = wrapped(batches[step % len(batches)].to(world.device))["text"]
            (term.sum / term.num_addends).backward()
            torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)

    return run


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
            runs[name] = bare_loop(replicated if name.endswith("ddp") else model, batches, world)
    return runs


def seconds_per_step(run: Run, steps: int, world: World) -> float:
    """Return the CPU seconds per step of this rank; the ranks begin together."""
    world.barrier()
    start = time.process_time()
    run(steps)
    return (time.process_time() - start) / steps


def print_ratios(runs: dict[str, Run], options: argparse.Namespace, world: World) -> None:
    counts: dict[str, dict[str, int]] = {}
    for name, run in runs.items():
        run(3)  # lazy initialisation, buckets, moments
        with warnings.catch_warnings(), CommDebugMode() as seen:
            warnings.simplefilter("ignore")  # about hooks of that mode on outputs that are no tensors
            run(1)
        counts[name] = {str(kind).rpartition(".")[2].strip("_"): count for kind, count in seen.get_comm_counts().items()}
    rounds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            own = seconds_per_step(run, options.steps, world)
            rounds[name].append(statistics.mean(world.gather_json(own)))
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
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_shards", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
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
