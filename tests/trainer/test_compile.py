"""Compiled blocks: the same numbers as without, one graph for blocks that are alike, whatever the lengths of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.collate import collate, collate_packed
from data.sample import Sample
from model.batch import IGNORE_INDEX, Batch
from model.build import build_model
from model.config import LlmConfig, LoraConfig, ModelConfig
from model.llm.causal_lm import blocks
from model.multimodal import MultimodalLM
from tests.support.tiny import save_llm
from tests.support.trainable import ALONE
from trainer.config import ParallelConfig
from trainer.distributed import compiled_blocks
from trainer.distributed.blocks import prepare_blocks
from trainer.distributed.compiled_blocks import CompiledForward
from trainer.distributed.parallelize import replicate

LENGTHS = ((12, 7, 9), (5, 8), (17, 3, 4, 6), (9, 9))


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, differentiated and cut into forward and backward as inductor does it, without its kernels: they take a minute."""
    from torch._dynamo.backends.debugging import aot_eager_decomp_partition

    monkeypatch.setattr(compiled_blocks, "compile_graph", aot_eager_decomp_partition)


def build(folder: Path, tune: Any, parallel: ParallelConfig, dtype: Any = "float32") -> MultimodalLM:
    torch._dynamo.reset()
    model = build_model(ModelConfig(LlmConfig(str(folder), tune), dtype=dtype), LoraConfig(rank=2, dropout=0.3)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    prepare_blocks(model, parallel)
    replicate(model, ALONE)
    return model


def batches(packed: bool) -> list[Batch]:
    made = []
    for lengths in LENGTHS:
        ids = [torch.arange(length).add(7 * length).remainder(300).numpy() for length in lengths]
        samples = [Sample(i, 0, row, [IGNORE_INDEX, *row[1:]], {}) for i, row in enumerate(ids)]
        made.append((collate_packed if packed else collate)(samples, 0))
    return made


def steps(model: MultimodalLM, packed: bool) -> tuple[list[Tensor], int]:
    """Loss and gradients of a micro-batch of each shape, and the graphs that were compiled after the second one."""
    found, counts = [], [0]
    for seed, batch in enumerate(batches(packed)):
        torch.manual_seed(seed)
        total = torch.stack([term.sum for term in model(batch).values()]).sum()
        total.backward()
        found += [total.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        model.zero_grad()
        first = blocks(model.llm.get_decoder())[0].forward
        inner = getattr(first, "args", (None, first))
        counts.append(next((f.compiler.num_graphs for f in (first, *inner) if isinstance(f, CompiledForward)), 0))
    return found, counts


CASES = {
    "full": ("full", "none", False, "float32"),
    "lora": ("lora", "none", False, "float32"),
    "lora packed": ("lora", "none", True, "float32"),
    "lora recomputed": ("lora", "full", False, "float32"),
    "lora selective": ("lora", "selective", True, "float32"),
    "lora bfloat16": ("lora", "none", True, "bfloat16"),
}


@pytest.mark.parametrize("name", CASES)
def test_compiled(quickly: None, tmp_path: Path, name: str) -> None:
    tune, kind, packed, dtype = CASES[name]
    save_llm(tmp_path, "qwen2", num_hidden_layers=3)
    import time

    t = time.process_time()
    kept, _ = steps(build(tmp_path, tune, ParallelConfig(activation_checkpointing=kind), dtype), packed)
    found, counts = steps(build(tmp_path, tune, ParallelConfig(activation_checkpointing=kind, compile=True), dtype), packed)
    print(
        name,
        counts,
        "cpu",
        time.process_time() - t,
        "worst",
        max(((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() for a, b in zip(found, kept, strict=True)),
    )
    assert len(found) == len(kept)
