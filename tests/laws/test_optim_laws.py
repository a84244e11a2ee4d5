"""Laws 1, 6 and 8 for every optimizer: the same steps however it is run, and the same state whoever wrote it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from model.files.shards import write_shard
from tests.support.equivalence import GLOBAL_BATCH, WHOLE, config_of, take_steps
from tests.support.ranks import run_ranks
from tests.support.resume import cut, metrics, weights
from tests.support.runs import save_parts, save_records, start
from tests.support.tiny import save_llm, save_tower
from trainer.adamw8bit import AdamW8bit
from trainer.checkpoint import checkpointer
from trainer.checkpoint.restore import restore
from trainer.config import OptimConfig
from trainer.distributed.world import World
from trainer.machine.disk_space import checkpoint_bytes
from trainer.muon import Muon
from trainer.optim import Trained, clipped_update
from trainer.sgd import SGD

KINDS = ("muon", "sgd")
LONG_RESUMES = (("adamw8bit", "ddp"), ("muon", "fsdp"), ("muon", "ddp"), ("sgd", "fsdp"))
WAYS = {1: [("ddp", GLOBAL_BATCH)], 2: [("ddp", 2), ("fsdp", 3)], 4: [("hsdp", 1), ("fsdp", 2)]}


def steps(world: World, folder: Path, tune: str, size: int) -> dict[tuple[str, str], tuple[list[float], float]]:
    """Losses and norms of five steps of every kind and way of `size` ranks, and the norm of all weights after them."""
    found = {}
    for kind in KINDS:
        for strategy, micro in WAYS[size]:
            optim = OptimConfig(lr=0.05, kind=kind, eps=1.0, weight_decay=0.1)  # type: ignore[arg-type]
            numbers, model = take_steps(world, config_of(folder, tune), strategy, False, micro, "float32", 1.0, WHOLE, optim=optim)
            whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters() if p.requires_grad]
            total = torch.stack([p.detach().double().norm() for p in whole]).norm().item()
            found[kind, strategy] = (numbers, total)
    return found


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("optim_laws")
    save_llm(folder / "llm", "qwen2_tied")
    save_tower(folder / "vision", "clip")
    return folder


@pytest.mark.parametrize(
    ("tune", "size"),
    [("full", 2), pytest.param("lora", 2, marks=pytest.mark.long), pytest.param("full", 4, marks=pytest.mark.long)],
)
def test_ranks_step_as_one_process_with_every_kind(parts: Path, tune: str, size: int) -> None:
    alone, ranks = run_ranks(steps, 1, parts, tune, 1)[0], run_ranks(steps, size, parts, tune, size)
    assert all(rank == ranks[0] for rank in ranks)
    for (kind, strategy), (numbers, total) in ranks[0].items():
        expected, expected_total = alone[kind, "ddp"]
        torch.testing.assert_close(torch.tensor(numbers), torch.tensor(expected), rtol=1e-6, atol=1e-6, msg=f"{kind} {strategy}")
        assert total == pytest.approx(expected_total, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "strategy"), [("adamw8bit", "fsdp"), *(pytest.param(*way, marks=pytest.mark.long) for way in LONG_RESUMES)]
)
def test_a_run_stopped_and_started_again_ends_with_the_same_bytes(tmp_path: Path, kind: str, strategy: str) -> None:
    save_parts(tmp_path, hidden_size=256, intermediate_size=256)
    save_records(tmp_path)
    sections = {"optim": {"kind": kind, "weight_decay": 0.1}, "parallel": {"strategy": strategy}}
    for answer in run_ranks(start, 2, tmp_path, tmp_path / "whole", sections):
        assert answer.code == 0
    again = cut(tmp_path / "whole", tmp_path / "again", 3)
    for answer in run_ranks(start, 2, tmp_path, again, sections):
        assert answer.code == 0 and len(answer.seen) == 3
    assert weights(again) == weights(tmp_path / "whole")
    assert metrics(again) == metrics(tmp_path / "whole")
    assert f"optimizer {kind}" in run_ranks(start, 1, tmp_path, again, sections)[0].said


OPTIMIZERS: dict[str, Any] = {"muon": partial(Muon, dtype=torch.bfloat16), "adamw8bit": AdamW8bit, "sgd": SGD}


def toy(world: World, kind: str, strategy: str, updates: int) -> Trained:
    """Rows that no number of ranks divides, fewer rows than ranks, and rows that are no whole blocks of 8 bits."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(256, 7), nn.Linear(7, 512, bias=False), nn.Linear(512, 2))
    if strategy == "fsdp":
        fully_shard(model, mesh=world.mesh(0))
    parameters = dict(model.named_parameters())
    by_rule: dict[str, list[nn.Parameter]] = {}
    for p in parameters.values():
        fits = p.dim() == 2 and (kind != "adamw8bit" or p.shape[1] % 256 == 0)
        by_rule.setdefault(kind if fits or kind == "sgd" else "adamw", []).append(p)
    groups = [{"params": chosen, "rule": rule, "lr": 0.01, "weight_decay": 0.1} for rule, chosen in by_rule.items()]
    trained = Trained(dict(parameters), OPTIMIZERS[kind](groups, OptimConfig(kind=kind)))  # type: ignore[arg-type]
    for step in range(updates):
        update(trained, step)
    return trained


def update(trained: Trained, step: int) -> None:
    for i, p in enumerate(trained.parameters.values()):
        full = torch.sin(torch.arange(p.numel(), dtype=torch.float32) + i + step).view(p.shape)
        p.grad = distribute_tensor(full, p.device_mesh, p.placements) if isinstance(p, DTensor) else full
    clipped_update(trained.optimizer, torch.tensor(2.0), 1.0)


def values(trained: Trained) -> dict[str, Tensor]:
    found = {}
    for name, p in trained.parameters.items():
        for key, tensor in {"weight": p.data, **trained.optimizer.state[p]}.items():
            found[f"{name}/{key}"] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
    return found


def written(world: World, folder: Path, strategy: str) -> dict[str, dict[str, Tensor]]:
    """By kind: everything after two updates, which is also in `folder`/kind."""
    found = {}
    for kind in OPTIMIZERS:
        trained = toy(world, kind, strategy, 2)
        write_shard(folder / kind, world.rank, world.size, checkpointer._tensors(trained, world))
        found[kind] = values(trained)
        total, _ = checkpoint_bytes(trained.saved(), world)
        assert total == sum(path.stat().st_size for path in (folder / kind).glob("rank-*")), kind
    return found


def resumed(world: World, folders: list[Path], strategy: str) -> dict[tuple[Path, str], list[dict[str, Tensor]]]:
    """By folder and kind: what was restored, and what one more update made of it."""
    found = {}
    for folder in folders:
        for kind in OPTIMIZERS:
            trained = toy(world, kind, strategy, 0)
            restore(folder / kind, trained, dict.fromkeys(trained.parameters, 2.0))
            before = values(trained)
            update(trained, 2)
            found[folder, kind] = [before, values(trained)]
    return found


@pytest.mark.parametrize("size", [3, pytest.param(4, marks=pytest.mark.long)])
def test_state_is_written_by_any_ranks_and_read_by_any_others_to_the_bit(tmp_path: Path, size: int) -> None:
    """Sharded ranks and one process make the same numbers, and each goes on from what the other wrote."""
    folders = [tmp_path / "alone", tmp_path / "sharded"]
    for folder in folders:
        for kind in OPTIMIZERS:
            (folder / kind).mkdir(parents=True)
    (alone,) = run_ranks(written, 1, folders[0], "ddp")
    sharded = run_ranks(written, size, folders[1], "fsdp")
    for found in sharded:
        for kind, expected in alone.items():
            assert_same(found[kind], expected)
    (one,) = run_ranks(resumed, 1, folders, "ddp")
    for rank in [one, *run_ranks(resumed, size, folders, "fsdp")]:
        for (folder, kind), (before, after) in rank.items():
            expected = (alone if folder == folders[0] else sharded[0])[kind]
            assert all(torch.equal(before[name], value) for name, value in expected.items()), (folder, kind)
            assert_same(after, one[folders[0], kind][1])


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to the bit, but for what torch's fused kernels make: they round the last few numbers of a tensor otherwise."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        is_fused = not name.endswith(("_codes", "_absmax")) and value.dtype == torch.float32
        torch.testing.assert_close(found[name], value, rtol=1e-6 if is_fused else 0, atol=1e-8 if is_fused else 0, msg=name)
