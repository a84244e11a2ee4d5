"""Compiled blocks: the same numbers as without, one graph for blocks that are alike, whatever the lengths of a batch.

The last block, which computes supervised rows alone, has a graph of its own.
"""

from __future__ import annotations

import os
import sysconfig
from dataclasses import replace
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
from model.errors import ConfigError
from model.llm.causal_lm import blocks
from model.multimodal import MultimodalLM
from tests.support.ranks import run_ranks
from tests.support.resume import LORA, cut, metrics
from tests.support.router import save_mixture
from tests.support.runs import merged, start
from tests.support.tiny import FAMILIES, save_llm
from tests.support.trainable import ALONE
from trainer.config import ParallelConfig
from trainer.distributed import compiled_blocks
from trainer.distributed.blocks import prepare_blocks
from trainer.distributed.compile_environment import CACHE_VARIABLE, cache_folder, missing_compiler, prepare_compiling
from trainer.distributed.compiled_blocks import CompiledForward
from trainer.distributed.compute_copies import keeps_copies
from trainer.distributed.parallelize import replicate
from trainer.distributed.world import World
from trainer.runfile.load import parse_config

LONG = pytest.mark.long
LENGTHS = ((90, 60, 70), (80, 84), (50, 30, 61, 47), (99, 99))
CPU = torch.device("cpu")


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, differentiated and cut into forward and backward as inductor does it, without its kernels: they take a minute."""
    monkeypatch.setattr(compiled_blocks, "compile_graph", compiled_blocks.partition_graph)


def build(folder: Path, tune: Any, parallel: ParallelConfig, dtype: Any = "float32", **options: Any) -> MultimodalLM:
    """A model whose embeddings have a gradient, as where pictures are spliced in."""
    torch._dynamo.reset()
    model = build_model(ModelConfig(LlmConfig(str(folder), tune), dtype=dtype, **options), LoraConfig(rank=2, dropout=0.3)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    model.llm.get_input_embeddings().register_forward_hook(lambda module, inputs, rows: rows.requires_grad_())
    names = list(model.state_dict())
    prepare_blocks(model, parallel)
    replicate(model, ALONE, parallel)
    assert list(model.state_dict()) == names
    return model


def batches(packed: bool) -> list[Batch]:
    made = []
    for lengths in LENGTHS:
        ids = [torch.arange(length).add(7 * length).remainder(300).numpy() for length in lengths]
        samples = [Sample(i, 0, row, [IGNORE_INDEX, *row[1:]], {}) for i, row in enumerate(ids)]  # type: ignore[arg-type]
        made.append((collate_packed if packed else collate)(samples, 0))
    return made


def graphs_of(model: MultimodalLM) -> int:
    """The graphs that were compiled for a model; 0 where its blocks are not compiled."""
    first = blocks(model.llm.get_decoder())[0].forward
    queue = [first]
    while queue:
        if isinstance(found := queue.pop(), CompiledForward):
            return found.compiler.num_graphs
        queue += [arg for arg in getattr(found, "args", ()) if callable(arg)]
    return 0


def steps(model: MultimodalLM, packed: bool) -> tuple[list[dict[str, Tensor]], list[int]]:
    """Loss and gradients of a micro-batch of each shape, and the graphs that there were after each."""
    found, counts = [], []
    for seed, batch in enumerate(batches(packed)):
        torch.manual_seed(seed)
        total = torch.stack([term.sum for term in model(batch).values()]).sum()
        total.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": total.detach(), **gradients})
        model.zero_grad()
        counts.append(graphs_of(model))
    return found, counts


def distance(found: list[dict[str, Tensor]], right: list[dict[str, Tensor]]) -> float:
    """The largest change of a loss or of a gradient, relative to the largest gradient."""
    assert [step.keys() for step in found] == [step.keys() for step in right]
    largest = max(float(value.abs().max()) for step in right for name, value in step.items() if name != "loss")
    scale = {"loss": max(float(step["loss"].abs()) for step in right)}
    return max(
        float((a[name] - b[name]).abs().max()) / scale.get(name, largest) for a, b in zip(found, right, strict=True) for name in b
    )


def moved_by_rounding(model: MultimodalLM) -> MultimodalLM:
    """The model after each weight was moved by half a unit of its last place: how far a correct program may be."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 2**-24 * torch.randn(parameter.shape, generator=generator))
    return model


CASES = {
    "lora packed": ("lora", "none", True),
    "full": ("full", "none", False),
    "lora": ("lora", "none", False),
    "lora recomputed": ("lora", "full", True),
    "lora selective": ("lora", "selective", True),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "lora packed" else LONG) for name in CASES])
def test_two_graphs_compute_all_blocks_and_lengths_with_the_masks_of_eager(quickly: None, tmp_path: Path, name: str) -> None:
    tune, kind, packed = CASES[name]
    save_llm(tmp_path, "qwen2", num_hidden_layers=3)
    kinds: dict[str, Any] = {"activation_checkpointing": kind}
    eager, none = steps(build(tmp_path, tune, ParallelConfig(**kinds)), packed)
    rounded, _ = steps(moved_by_rounding(build(tmp_path, tune, ParallelConfig(**kinds))), packed)
    found, counts = steps(build(tmp_path, tune, ParallelConfig(compile=True, **kinds)), packed)
    assert distance(found, eager) < 2 * distance(rounded, eager) < 3e-5 and none == [0] * len(LENGTHS)
    assert counts == [2] * len(LENGTHS)


@pytest.mark.long
@pytest.mark.parametrize("kind", [*FAMILIES, "mixtral"])
def test_every_class_of_language_model_is_compiled(quickly: None, tmp_path: Path, kind: str) -> None:
    """Windows, capped scores, layers of two kinds and experts: two graphs at most, the same for all lengths after the first."""
    (save_mixture if kind == "mixtral" else save_llm)(tmp_path, kind)
    eager, _ = steps(build(tmp_path, "full", ParallelConfig()), True)
    found, counts = steps(build(tmp_path, "full", ParallelConfig(compile=True)), True)
    assert distance(found, eager) < 1e-5 and counts[-1] == counts[1] <= 4


@pytest.mark.long
def test_inductor_rounds_as_eager_does(tmp_path: Path) -> None:
    """Its kernels, in both types: no further from float32 than eager is in bfloat16, which rounds between operators."""
    if prepare_compiling(ParallelConfig(compile="or_eager"), CPU).count(";"):
        pytest.skip("no compiler")
    save_llm(tmp_path, "qwen2")
    right, _ = steps(build(tmp_path, "lora", ParallelConfig()), True)
    found, _ = steps(build(tmp_path, "lora", ParallelConfig(compile=True)), True)
    assert distance(found, right) < 1e-5
    half, _ = steps(build(tmp_path, "lora", ParallelConfig(), "bfloat16"), True)
    found, _ = steps(build(tmp_path, "lora", ParallelConfig(compile=True), "bfloat16"), True)
    assert distance(found, right) < 1.5 * distance(half, right)


def starts(world: World, parts: Path, folder: Path) -> list[list[tuple[int, float]]]:
    """Steps and losses of four runs of LoRA with dropout: eager, compiled, and each resumed half-way with the other setting."""
    os.environ[CACHE_VARIABLE] = str(folder / "cache")  # this process ends with its runs
    compiled_blocks.compile_graph = compiled_blocks.partition_graph

    def run(name: str, compiles: bool) -> list[tuple[int, float]]:
        sections = merged(LORA, {"parallel": {"compile": compiles}, "train": {"max_steps": 4}})
        assert start(world, parts, folder / name, sections).code == 0
        return metrics(folder / name)

    found = [run("eager", False), run("compiled", True)]
    for name, compiles in (("eager", True), ("compiled", False)):
        cut(folder / name, folder / f"{name}, then not", 2)
        found.append(run(f"{name}, then not", compiles))
    return found


@pytest.mark.long
def test_a_run_goes_on_with_the_other_setting(parts: Path, tmp_path: Path) -> None:
    if missing_compiler(CPU):
        pytest.skip("no compiler")
    eager, *others = run_ranks(starts, 1, parts, tmp_path, seconds=600)[0]
    assert [step for step, _ in eager] == [1, 2, 3, 4]
    for found in others:
        assert [step for step, _ in found] == [1, 2, 3, 4]
        assert [loss for _, loss in found] == pytest.approx([loss for _, loss in eager], rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("offloads", [False, True])
def test_masters_are_cast_before_the_graph(quickly: None, tmp_path: Path, offloads: bool) -> None:
    """In bfloat16, masters cast in every forward, or kept on the host: no further from float32 than eager is."""
    save_llm(tmp_path, "qwen2")
    right, _ = steps(build(tmp_path, "full", ParallelConfig()), True)
    kept = ParallelConfig(cpu_offload=offloads)
    eager, _ = steps(build(tmp_path, "full", kept, "bfloat16"), True)
    found, counts = steps(build(tmp_path, "full", replace(kept, compile=True), "bfloat16"), True)
    assert distance(found, right) < 1.5 * distance(eager, right) and counts == [2] * len(LENGTHS)


def test_copies_of_masters_and_compiled_blocks_exclude_each_other() -> None:
    assert not keeps_copies(ParallelConfig(compile=True)) and keeps_copies(ParallelConfig())
    run: dict[str, Any] = {"output_dir": "x", "model": {"llm": {"path": "x"}}, "train": {"max_steps": 0}}
    with pytest.raises(ConfigError, match=r"parallel\.compute_copies = 'always' with parallel\.compile = True: .*; use 'auto'"):
        parse_config({**run, "parallel": {"compile": True, "compute_copies": "always"}}, "x")


def test_a_block_that_cannot_be_compiled_is_named_or_runs_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(graph: object, inputs: object) -> None:
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(compiled_blocks, "compile_graph", refuse)
    save_llm(tmp_path, "qwen2")
    with pytest.raises(
        ConfigError, match=r"llm\.blocks\.0 \(.*Qwen2DecoderLayer\) cannot be compiled: .*no such kernel.*'or_eager'"
    ):
        steps(build(tmp_path, "lora", ParallelConfig(compile=True)), False)
    eager, _ = steps(build(tmp_path, "lora", ParallelConfig()), False)
    found, _ = steps(build(tmp_path, "lora", ParallelConfig(compile="or_eager")), False)
    assert distance(found, eager) == 0
    assert caplog.text.count("blocks of this class run as they are") == 1


def test_a_machine_without_a_compiler_is_told_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert prepare_compiling(ParallelConfig(), CPU) == ""
    with pytest.raises(ConfigError, match=r"no compiler 'no-such-compiler' is on the PATH .CXX may name another.; install it"):
        prepare_compiling(ParallelConfig(compile=True), CPU)
    assert "no-such-compiler" in prepare_compiling(ParallelConfig(compile="or_eager"), CPU)
    monkeypatch.setenv("CXX", os.fspath(Path("/bin/sh")))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"Python\.h of Python's development files is missing"):
        prepare_compiling(ParallelConfig(compile=True), CPU)


def test_compiled_code_is_read_only_from_a_folder_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_folder()
    assert folder.is_relative_to(tmp_path) and folder.stat().st_mode & 0o077 == 0 and os.environ[CACHE_VARIABLE] == str(folder)
    monkeypatch.delenv(CACHE_VARIABLE)
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="others may write to"):
        cache_folder()
