"""FSDP2's units, its optimizer on local rows, and gradients that are summed in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from model.build import assemble
from model.card import ModelCard, make_card
from model.config import LoraConfig
from model.files.shards import local
from model.llm.causal_lm import VocabularyLayout
from tests.support.equivalence import WHOLE, config_of, run_steps, take_steps
from tests.support.ranks import run_ranks
from tests.support.tiny import save_llm, save_tower
from trainer.config import ParallelConfig
from trainer.distributed.shards import shard, units_of, whole_bytes
from trainer.distributed.world import World
from trainer.sharded_adamw import ShardedAdamW


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    save_llm(folder / "llm", "qwen2_tied", num_hidden_layers=5)
    save_tower(folder / "vision", "clip")
    return folder


def card_of(folder: Path) -> ModelCard:
    return make_card(config_of(folder, "full"), LoraConfig(), VocabularyLayout(321, 320, (320,)))


def of_mib(size: float) -> ParallelConfig:
    return ParallelConfig("fsdp", unit_mib=size)  # type: ignore[arg-type]  # a test's blocks are smaller than a MiB


def test_neighbours_are_gathered_together_up_to_a_size(parts: Path) -> None:
    model = assemble(card_of(parts), torch.float32)
    layers = list(model.llm.get_decoder().layers)
    one = whole_bytes([layers[0]], torch.float32)
    assert one == sum(p.numel() * 4 for p in layers[0].parameters())
    assert units_of(model, "llm", of_mib(0)) == [[layer] for layer in layers]
    assert units_of(model, "llm", of_mib(2 * one / 2**20)) == [layers[:2], layers[2:]]
    assert units_of(model, "llm", of_mib(1.5 * one / 2**20)) == [layers[:2], layers[2:]]
    assert units_of(model, "llm", of_mib(3 * one / 2**20)) == [layers]
    assert units_of(model, "llm", ParallelConfig("fsdp")) == []


def sharded_in(world: World, folder: Path, sizes: list[float], dtype: str) -> list[tuple[int, list[float]]]:
    """By the least size of a unit: how many there are, and losses and norms of five steps."""
    found = []
    for size in sizes:
        model = assemble(card_of(folder), torch.float32)
        shard(model, of_mib(size), world)
        states = {id(m._get_fsdp_state()) for m in model.modules() if isinstance(m, FSDPModule)}
        numbers = run_steps(world, config_of(folder, "full"), of_mib(size), True, 2, dtype)
        found.append((len(states), numbers))
    return found


def test_units_of_any_size_take_the_same_steps(parts: Path) -> None:
    """Five blocks and two of the tower, the tower, the rest; neighbours together; nothing but the rest."""
    found = run_ranks(sharded_in, 2, parts, [0, 0.05, 64], "bfloat16")[0]
    assert [count for count, _ in found] == [9, 5, 1]
    assert found[0][1][::2] == found[1][1][::2] == found[2][1][::2]
    torch.testing.assert_close(torch.tensor(found[0][1]), torch.tensor(found[2][1]), rtol=1e-6, atol=0)


def updated(world: World, folder: Path) -> list[dict[str, Tensor]]:
    """Weights and moments after five steps, by our optimizer and by torch's."""
    found = []
    for step in (ShardedAdamW.step, torch.optim.AdamW.step):
        ShardedAdamW.step, before = step, ShardedAdamW.step  # type: ignore[method-assign]
        try:
            _, model = take_steps(world, config_of(folder, "full"), "fsdp", False, 2, "float32", 0.1, WHOLE)
        finally:
            ShardedAdamW.step = before  # type: ignore[method-assign]
        found.append({name: local(p).detach().clone() for name, p in model.named_parameters()})
    return found


def test_the_optimizer_on_local_rows_is_torchs_to_the_bit(parts: Path) -> None:
    """On three ranks, some of which hold no row of small weights."""
    for ours, theirs in run_ranks(updated, 3, parts):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def gradients(world: World, folder: Path, strategy: Any) -> dict[str, dict[str, Tensor]]:
    """The change of every weight in one step of plain descent, whole, by the type of the sum."""
    return {
        kind: _changes(world, folder, ParallelConfig(strategy, reduce_dtype=kind))  # type: ignore[arg-type]
        for kind in ("float32", "bfloat16")
    }


def _changes(world: World, folder: Path, parallel: ParallelConfig) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def keep(self: ShardedAdamW, closure: Any = None) -> None:
        if not seen:
            names = {id(p): name for name, p in enumerate(p for group in self.param_groups for p in group["params"])}
            for group in self.param_groups:
                for p in group["params"]:
                    seen[str(names[id(p)])] = (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()

    before, ShardedAdamW.step = ShardedAdamW.step, keep  # type: ignore[method-assign, assignment]
    try:
        take_steps(world, config_of(folder, "full"), parallel, False, 2, "bfloat16", 0.0, WHOLE)
    finally:
        ShardedAdamW.step = before  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize(
    ("size", "strategy"), [(2, "ddp"), (2, "fsdp"), *(pytest.param(4, s, marks=pytest.mark.long) for s in ("ddp", "fsdp"))]
)
def test_a_sum_in_bfloat16_is_off_by_what_the_docs_say(parts: Path, size: int, strategy: str) -> None:
    """Relative error of the whole gradient: a few roundings of 2^-9 each, more with more ranks; never none."""
    for rank in run_ranks(gradients, size, parts, strategy):
        exact, rounded = (torch.cat([g.flatten() for g in rank[kind].values()]) for kind in ("float32", "bfloat16"))
        error = ((rounded - exact).norm() / exact.norm()).item()
        print(f"{strategy}, {size} ranks: {error:.2e}")
        assert 1e-4 < error < 2**-8 * size**0.5
