"""Measure what `parallel.compile` changes: CPU seconds of a step, activations kept for backward, and what compiling takes.

One model with random weights, eager and compiled in turns on the same packed batches of unequal lengths; medians over the rounds.
On a CPU inductor's kernels are C++; what a GPU gains is not measured here.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from data.collate import collate_packed
from data.sample import Sample
from model.batch import IGNORE_INDEX, Batch
from model.build import build_model
from model.config import LlmConfig, LoraConfig, ModelConfig
from model.errors import ConfigError
from model.multimodal import MultimodalLM
from tools.cli import command_parser, run_command
from trainer.config import ParallelConfig
from trainer.distributed.blocks import prepare_blocks
from trainer.distributed.parallelize import replicate
from trainer.distributed.world import World

SHAPE = {"hidden_size": 320, "intermediate_size": 864, "num_attention_heads": 5, "num_key_value_heads": 5, "vocab_size": 4096}
WAYS = {"eager": ("none", False), "compiled": ("none", True), "compiled selective": ("selective", True)}


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of the compilers that it has waited for."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def trained_way(folder: Path, options: argparse.Namespace, way: str) -> MultimodalLM:
    """Return the model that trains `way`."""
    kind, compiles = WAYS[way]
    config = ModelConfig(LlmConfig(str(folder), options.tune), dtype=options.dtype)
    model = build_model(config, LoraConfig(rank=16, dropout=0.05)).train()
    prepare_blocks(model, ParallelConfig(activation_checkpointing=kind, compile=compiles))  # type: ignore[arg-type]
    replicate(model, World(0, 0, 1, torch.device("cpu")))
    return model


def packed_batch(step: int, num_tokens: int) -> Batch:
    """Return a packed batch of about `num_tokens` tokens, whose samples have other lengths in every step."""
    generator = torch.Generator().manual_seed(step)
    samples: list[Sample] = []
    while (left := num_tokens - sum(len(sample.input_ids) for sample in samples)) > 16:
        length = min(int(torch.randint(16, 400, (), generator=generator)), left)
        ids = torch.randint(0, SHAPE["vocab_size"], (length,), generator=generator).numpy()
        labels = ids.copy()
        labels[: length // 2] = IGNORE_INDEX
        samples.append(Sample(len(samples), 0, ids, labels, {}))
    return collate_packed(samples, 0)


def kept_bytes(model: MultimodalLM, batch: Batch) -> int:
    """Return the bytes that a forward keeps for backward, weights left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = model(batch)
    del terms
    return sum(kept.values())


def timed_step(model: MultimodalLM, batch: Batch) -> tuple[float, float]:
    """Return the loss of a forward and backward, and its CPU seconds."""
    torch.manual_seed(1)
    before = cpu_seconds()
    loss = model(batch)["text"].sum
    loss.backward()
    spent = cpu_seconds() - before
    model.zero_grad()
    return loss.item() / batch.num_supervised, spent


def compare_ways(options: argparse.Namespace) -> None:
    if options.rounds < 1 or options.layers < 1 or options.tokens < 64:
        raise ConfigError("--rounds and --layers are positive, --tokens is 64 or more")
    with tempfile.TemporaryDirectory() as name:
        Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_hidden_layers=options.layers)).save_pretrained(name)
        models = {way: trained_way(Path(name), options, way) for way in WAYS}
    first: dict[str, float] = {}
    spent: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, list[float]] = {way: [] for way in WAYS}
    for way, model in models.items():
        first[way] = timed_step(model, packed_batch(0, options.tokens))[1]
    for n in range(1, options.rounds + 1):
        for way, model in models.items():
            loss, seconds = timed_step(model, packed_batch(n, options.tokens))
            spent[way].append(seconds)
            losses[way].append(loss)
    print(f"{options.layers} layers, {options.tune}, {options.dtype}, {options.tokens} packed tokens, {options.rounds} rounds")
    print(f"{'':<20}{'CPU s/step':>12}{'/ eager':>9}{'kept MiB':>10}{'/ eager':>9}{'first step':>12}{'largest change of loss':>24}")
    kept = {way: kept_bytes(model, packed_batch(1, options.tokens)) for way, model in models.items()}
    base = statistics.median(spent["eager"]), kept["eager"]
    for way in WAYS:
        seconds = statistics.median(spent[way])
        change = max(abs(a - b) for a, b in zip(losses[way], losses["eager"], strict=True))
        sizes = f"{kept[way] / 2**20:>10.1f}{kept[way] / base[1]:>9.2f}"
        print(f"{way:<20}{seconds:>12.3f}{seconds / base[0]:>9.2f}{sizes}{first[way]:>12.1f}{change:>24.1e}")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("bench_compile", __doc__)
    parser.add_argument("--tune", choices=("full", "lora"), default="lora")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=1024, help="of a packed micro-batch (1024)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    return run_command("bench_compile", lambda: compare_ways(options))


if __name__ == "__main__":
    raise SystemExit(main())
