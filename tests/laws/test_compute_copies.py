"""Copies of the masters that are made once per update give what casting in every forward gives, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.support.equivalence import GLOBAL_BATCH, TUNES, WHOLE, config_of, take_steps
from tests.support.ranks import run_ranks
from tests.support.tiny import save_llm, save_tower
from trainer.config import ParallelConfig
from trainer.distributed.casting import cast_for_compute
from trainer.distributed.compute_copies import copies_of
from trainer.distributed.world import World

Way = tuple[str, bool | str]  # what is tuned, and whether blocks are recomputed
Taken = tuple[list[float], dict[str, Tensor], int]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    save_llm(folder / "llm", "qwen2_tied")
    save_tower(folder / "vision", "clip")
    return folder


def steps_with(world: World, folder: Path, ways: list[Way], micro_batch_size: int) -> list[tuple[Taken, Taken]]:
    """Five steps of every way to train: with casts in forward, and with copies."""
    found = []
    for tune, again in ways:
        pair = []
        for how in ("never", "always"):
            parallel = ParallelConfig("ddp", compute_copies=how)  # type: ignore[arg-type]
            config, rest = config_of(folder, tune), (again, micro_batch_size, "bfloat16", 1.0, WHOLE, 0.5)
            numbers, model = take_steps(world, config, parallel, *rest)
            pair.append((numbers, {name: p.detach() for name, p in model.named_parameters()}, len(copies_of(model))))
        found.append((pair[0], pair[1]))
    return found


WAYS: list[Way] = [(tune, again) for tune in TUNES for again in (False, "full")]


@pytest.mark.parametrize(
    ("size", "ways", "micro_batch_size"),
    [
        (1, [("full", "full")], 3),
        (2, [("full", False), ("lora", "full")], 2),
        pytest.param(1, WAYS, GLOBAL_BATCH, marks=pytest.mark.long),
        pytest.param(1, WAYS, 3, marks=pytest.mark.long),
        pytest.param(3, WAYS, 2, marks=pytest.mark.long),
    ],
)
def test_copies_are_casts_to_the_bit(parts: Path, size: int, ways: list[Way], micro_batch_size: int) -> None:
    """Losses, norms and final weights, with several micro-batches in a step, dropout and a tied embedding."""
    for casts, copies in run_ranks(steps_with, size, parts, ways, micro_batch_size, seconds=300)[0]:
        assert casts[0] == copies[0]
        assert all(torch.equal(casts[1][name], value) for name, value in copies[1].items())
        assert casts[2] == 0 and copies[2] > 0


class Twice(nn.Module):
    """One layer used twice, by a recomputed function or not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        once = checkpoint(self.layer, x, use_reentrant=False)
        return self.layer(once.tanh()).square().sum()


def test_a_layer_used_twice_adds_its_gradients_as_casts_do() -> None:
    """The two are summed in float32 before they are added to what earlier micro-batches left."""
    models = [Twice(), Twice()]
    for model, copies in zip(models, (False, True)):
        cast_for_compute(model, torch.bfloat16, copies=copies)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            for size in (1.0, 0.037, 0.0011, 3.3e-5, 0.29, 7e-4):  # so that float32 has to round
                model(torch.randn(5, 6, generator=generator).bfloat16()).mul(size).backward()
            optimizer.step()
    for one, other in zip(*(model.parameters() for model in models)):
        assert torch.equal(one, other) and torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_a_copy_follows_whatever_changes_its_master() -> None:
    layer = nn.Linear(4, 4)
    cast_for_compute(layer, torch.bfloat16, copies=True)
    x = torch.eye(4).bfloat16()

    def fresh() -> bool:
        return torch.equal(layer(x), nn.functional.linear(x, layer.weight.bfloat16(), layer.bias.bfloat16()))

    assert fresh()
    layer(x).sum().backward()
    torch.optim.AdamW(layer.parameters(), lr=0.5, fused=True).step()
    assert fresh()
    layer.weight.detach().copy_(torch.randn(4, 4))  # as a checkpoint is restored
    assert fresh()
    with torch.no_grad():
        layer.bias.add_(1)
    assert fresh()
