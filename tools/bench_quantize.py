"""Compare LoRA beside a base in 16, 8 and 4 bits: bytes of the base's matrices and of all parameters on each rank, seconds to load,
seconds per step, and the loss after the same steps. The baseline is LoRA on the unquantised base. One process, or several:

    torchrun --nproc_per_node=2 -m tools.bench_quantize --strategy fsdp

The base learns a random chain of tokens first; the adapters learn another one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from data.collate import collate
from data.sample import Sample
from model.batch import Batch
from model.build import DTYPES, assemble
from model.card import make_card
from model.config import LlmConfig, LoraConfig, ModelConfig, QuantizeConfig
from model.llm.causal_lm import VocabularyLayout
from model.llm.quantized_linear import matrices
from model.multimodal import MultimodalLM
from model.weights.materialise import materialise
from model.weights.origins import weight_layers
from tools.cli import command_parser
from trainer.config import OptimConfig, ParallelConfig
from trainer.distributed.parallelize import replicate
from trainer.distributed.shards import shard
from trainer.distributed.world import World, start_world, stop_world
from trainer.optim import build_optimizer, set_learning_rates
from trainer.step import StepOptions, train_step

VOCAB, LENGTH, GLOBAL_BATCH = 512, 32, 16
SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
KINDS = {
    "LoRA": QuantizeConfig(),
    "8 bits": QuantizeConfig(8),
    "4 bits, nf4": QuantizeConfig(4, double=False),
    "4 bits, nf4, double": QuantizeConfig(4),
    "4 bits, fp4, double": QuantizeConfig(4, "fp4"),
}


def batches(world: World, task: int, steps: int) -> Iterator[list[Batch]]:
    """Yield this rank's share of each step: chains of tokens in which one token in ten is random."""
    rng = np.random.default_rng(task)
    following = rng.permutation(VOCAB)
    for _ in range(steps):
        ids = rng.integers(0, VOCAB, (GLOBAL_BATCH, LENGTH))
        for t in range(1, LENGTH):
            ids[:, t] = np.where(rng.random(GLOBAL_BATCH) < 0.9, following[ids[:, t - 1]], ids[:, t])
        rows = [Sample(i, 0, row, np.append(row[1:], -100), {}) for i, row in enumerate(ids)]
        yield [collate(rows[world.rank :: world.size], 0).to(world.device)]


def train_adapter(wrapped: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[list[Batch]], world: World) -> list[float]:
    """Train on the batches of each of `steps`, and return the loss of every step. `wrapped`: the sharded or replicated model."""
    wrapped.train()
    found = []
    for step, batch in enumerate(steps):
        set_learning_rates(optimizer, 1.0)
        result = train_step(wrapped, optimizer, batch, world, StepOptions(seed=0, step=step, clip_norm=1.0))
        sums = torch.stack([torch.cat(result.addends).sum(), torch.tensor(float(batch[0].num_supervised), device=world.device)])
        total, count = world.sum(sums).tolist()
        found.append(total / count)
    return found


def build_quantized(config: ModelConfig, quantize: QuantizeConfig, world: World, sharded: bool) -> MultimodalLM:
    card = make_card(config, LoraConfig(rank=16, dropout=0.0), VocabularyLayout(), quantize=quantize)
    model = assemble(card, DTYPES[config.dtype])
    if sharded:
        shard(model, ParallelConfig(), world)
    materialise(model, weight_layers(card, model, 0), frozen_dtype=model.dtype, device=world.device)
    return model


def make_base(folder: Path, world: World, steps: int) -> None:
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCAB, tie_word_embeddings=True, **SIZES)).save_pretrained(folder)
    config, alone = ModelConfig(LlmConfig(str(folder), "full"), dtype="float32"), World(0, 0, 1, world.device)
    model = build_quantized(config, QuantizeConfig(), alone, False)
    optimizer = build_optimizer(model, config, OptimConfig(lr=1e-3))
    losses = train_adapter(replicate(model, alone), optimizer, batches(alone, 1, steps), alone)
    model.llm.save_pretrained(folder)
    print(f"base: {sum(p.numel() for p in model.parameters()):,} parameters; loss {losses[0]:.3f} -> {losses[-1]:.3f}", flush=True)


def bytes_on_rank(model: MultimodalLM) -> tuple[int, int]:
    """Return the bytes on this rank: of the matrices that can be quantised, without adapters, and of all parameters."""

    def size(tensors: Iterator[torch.Tensor]) -> int:
        local = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
        return sum(t.numel() * t.itemsize for t in local)

    layers = [linear for _, linear in matrices(model.llm)]
    stored = [t for layer in layers for t in (*layer.parameters(), *layer.buffers()) if t.dim() != 1 and not t.requires_grad]
    return size(iter(stored)), size(p for p in model.parameters())


def measure(name: str, config: ModelConfig, world: World, sharded: bool, steps: int) -> str:
    start = time.perf_counter()
    model = build_quantized(config, KINDS[name], world, sharded)
    loading = time.perf_counter() - start
    of_matrices, of_all = bytes_on_rank(model)
    start = time.perf_counter()
    optimizer = build_optimizer(model, config, OptimConfig(lr=2e-3))
    losses = train_adapter(model if sharded else replicate(model, world), optimizer, batches(world, 2, steps), world)
    per_step = (time.perf_counter() - start) / steps
    tail = losses[-10:]
    ends = f"{losses[0]:.3f} -> {sum(tail) / len(tail):.4f}"
    return f"{name:<22}{of_matrices:>12,}{of_all:>12,}{loading:>10.2f}{per_step * 1000:>10.0f}   {ends}"


def main() -> int:
    parser = command_parser("bench_quantize", __doc__)
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--steps", type=int, default=150, help="of the base, and of each adapter")
    given = parser.parse_args()
    world = start_world()
    sharded = given.strategy == "fsdp" and world.size > 1
    with tempfile.TemporaryDirectory() if world.is_main else nullcontext("") as folder:
        folder = world.broadcast_json(folder)
        if world.is_main:
            make_base(Path(folder), world, given.steps)
        world.barrier()
        config = ModelConfig(LlmConfig(folder, "lora"), dtype=given.dtype)
        if world.is_main:
            print(f"{world.size} rank(s), {given.strategy}, {given.dtype}; bytes are those of one rank")
            print(f"{'base':<22}{'matrices':>12}{'all':>12}{'load s':>10}{'step ms':>10}   loss")
        for name in KINDS:
            line = measure(name, config, world, sharded, given.steps)
            if world.is_main:
                print(line, flush=True)
        world.barrier()
    stop_world()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
