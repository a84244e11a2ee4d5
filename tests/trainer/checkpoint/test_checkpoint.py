"""Checkpoints across strategies and ranks, gather hooks, and saves that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from model.files.manifest import UnsoundCheckpoint, verify, write_manifest
from model.files.shards import checkpoint_tensors, write_shard
from model.files.tensor_files import Entry, write_safetensors
from tests.support.checkpoint import CARD, Nothing, toy
from tests.support.ranks import run_ranks
from tests.support.runs import start, start_alone
from trainer.checkpoint import checkpointer as module
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.restore import restore
from trainer.checkpoint.retention import newest_sound
from trainer.distributed.gather import gather_hooks
from trainer.distributed.world import World
from trainer.errors import ProofError, SaveError, code_of
from trainer.optim import Trained


def values(trained: Trained) -> dict[str, torch.Tensor]:
    found = {}
    for name, p in trained.parameters.items():
        for key, tensor in {"weight": p.data, **trained.optimizer.state[p]}.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            found[f"{name}/{key}"] = whole.detach().clone()
    return found


def write(world: World, folders: dict[str, Path]) -> dict[str, dict[str, torch.Tensor]]:
    """Under every strategy that `folders` names; by strategy what was written."""
    found = {}
    for strategy, folder in folders.items():
        trained = toy(world, strategy)
        write_shard(folder, world.rank, world.size, module._tensors(trained, world))
        found[strategy] = values(trained)
    return found


def read(world: World, folders: list[Path], strategies: list[str]) -> dict[tuple[Path, str], dict[str, torch.Tensor]]:
    """Every folder under every strategy."""
    return {(folder, strategy): read_one(world, folder, strategy) for strategy in strategies for folder in folders}


def read_one(world: World, folder: Path, strategy: str) -> dict[str, torch.Tensor]:
    trained = toy(world, strategy)
    for p in trained.parameters.values():
        p.data.zero_()
    trained.optimizer.state.clear()
    restore(folder, trained, dict.fromkeys(trained.parameters, 2.0))
    return values(trained)


READERS: dict[int, list[str]] = {4: ["fsdp", "hsdp"], 2: ["fsdp", "ddp"], 1: ["ddp"]}


@pytest.mark.parametrize(
    "writers",
    [{4: ["fsdp", "hsdp"], 2: ["ddp"]}, pytest.param({3: ["fsdp"], 1: ["ddp"]}, marks=pytest.mark.long)],
    ids=["4 and 2 ranks", "3 and 1 ranks"],
)
def test_written_under_one_strategy_and_read_under_any_other(tmp_path: Path, writers: dict[int, list[str]]) -> None:
    """Ranks write and read under all strategies of their number, one after the other: starting them takes longest."""
    expected: dict[Path, dict[str, torch.Tensor]] = {}
    for size, strategies in writers.items():
        folders = {strategy: tmp_path / f"{strategy}-{size}" for strategy in strategies}
        for folder in folders.values():
            folder.mkdir()
        written = run_ranks(write, size, folders)[0]
        expected |= {folders[strategy]: written[strategy] for strategy in strategies}
    for size, strategies in READERS.items():
        for rank in run_ranks(read, size, list(expected), strategies):
            assert rank.keys() == {(folder, strategy) for folder in expected for strategy in strategies}
            for (folder, strategy), found in rank.items():
                assert found.keys() == expected[folder].keys(), (folder, size, strategy)
                assert all(torch.equal(found[name], value) for name, value in expected[folder].items()), (folder, size, strategy)


def test_missing_rows_are_noticed(tmp_path: Path) -> None:
    run_ranks(write, 3, {"fsdp": tmp_path})
    for path in tmp_path.glob("rank-00001-*"):
        path.unlink()
    with pytest.raises(UnsoundCheckpoint, match=r"do not fit together|are missing") as caught:
        checkpoint_tensors(tmp_path)
    assert code_of(caught.value) == 70
    (tmp_path / "rank-00000-of-00003.safetensors").write_bytes(b"short")
    with pytest.raises(UnsoundCheckpoint, match="is cut short"):
        checkpoint_tensors(tmp_path)


@pytest.mark.parametrize(
    ("left_out", "steps", "reason"),
    [
        ("exp_avg_sq/", 1.0, "exp_avg_sq/.* has no values in the checkpoint"),
        ("", None, "state.json does not say how many updates"),
    ],
)
def test_what_a_checkpoint_does_not_say_is_named(tmp_path: Path, left_out: str, steps: float | None, reason: str) -> None:
    world = World(0, 0, 1, torch.device("cpu"))
    trained = toy(world, "ddp")
    tensors = {name: t for name, t in module._tensors(trained, world).items() if not left_out or not name.startswith(left_out)}
    write_shard(tmp_path, 0, 1, tensors)
    with pytest.raises(ProofError, match=reason):
        restore(tmp_path, trained, {} if steps is None else dict.fromkeys(trained.parameters, steps))


def gather_all(world: World, strategies: list[str]) -> list[Any]:
    found: list[Any] = []
    for strategy in strategies:
        trained = toy(world, strategy)
        hooks = gather_hooks({name: p.data for name, p in trained.parameters.items()})
        found += [(hook(), p.full_tensor()) for hook, p in zip(hooks.values(), trained.parameters.values())]  # type: ignore[attr-defined]
    return found


def test_gather_hooks_make_parameters_whole_on_rank_0_alone() -> None:
    first, *others = run_ranks(gather_all, 4, ["fsdp", "hsdp"])
    assert all(torch.equal(ours, whole) for ours, whole in first)
    assert all(ours is None for rank in others for ours, _ in rank)


def test_the_streamed_file_has_the_bytes_of_the_library_s(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 4),
        "a.é": torch.randn(2).bfloat16(),
        "c": torch.arange(5),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
    }
    with (tmp_path / "ours").open("wb") as out:
        entries = {n: Entry(t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()}  # type: ignore[misc]
        write_safetensors(out, entries)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_checkpoint_holds_no_frozen_weight_and_no_pickle(parts: Path, tmp_path: Path) -> None:
    sections = {"model": {"llm": {"tune": "lora"}, "vision": {"tune": "frozen"}}, "lora": {"rank": 2}, "train": {"max_steps": 1}}
    assert start_alone(parts, tmp_path / "run", sections).code == 0
    folder = tmp_path / "run" / "checkpoint-1"
    verify(folder)
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    names = {n for p in folder.glob("*.safetensors") for n in load_file(p)}
    assert names and all("lora_" in n or "/vision_projector." in n for n in names)


def save_into_failing(world: World, folder: Path, failing: int) -> str:
    original = module.write_planned

    def broken(*args: Any) -> Any:
        if world.rank == failing:
            raise OSError(28, "No space left on device", "shard")
        return original(*args)

    module.write_planned = broken  # type: ignore[assignment]
    try:
        checkpointer = Checkpointer(folder, 2, world)
        checkpointer.save(7, toy(world, "fsdp"), {}, CARD, Nothing())  # type: ignore[arg-type]
        checkpointer.wait()
        return "saved"
    except SaveError as error:
        return str(error)
    finally:
        module.write_planned = original


@pytest.mark.parametrize("failing", [0, 1])
def test_a_save_that_fails_on_one_rank_fails_on_all_and_leaves_older_ones_alone(tmp_path: Path, failing: int) -> None:
    old = tmp_path / "checkpoint-3"
    old.mkdir()
    (old / "x.json").write_text("{}")
    write_manifest(old, {"step": 3, "run_id": "r"})
    for text in run_ranks(save_into_failing, 2, tmp_path, failing):
        assert f"rank {failing}: No space left on device: shard" in text and "Earlier checkpoints are intact" in text
    assert newest_sound(tmp_path) == (old, [])


def start_where_nothing_can_be_written(world: World, parts: Path, output_dir: Path) -> int:
    """A run folder that turns read-only once the run is under way."""

    def make_folder(path: Path) -> None:
        raise OSError(30, "Read-only file system", str(path))

    module.make_folder = make_folder
    return start(world, parts, output_dir, {"checkpoint": {"every": 2, "keep": 2}}).code


def test_an_unwritable_run_folder_ends_with_73(parts: Path, tmp_path: Path) -> None:
    assert run_ranks(start_where_nothing_can_be_written, 1, parts, tmp_path / "run") == [73]
    told = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert told["code"] == 73 and "a checkpoint cannot be written" in told["reason"] and "Read-only" in told["reason"]
    assert 2 <= told["step"] <= 4  # at the latest when the next one is due
