"""Saves beside training: what is written is what was there when the save was asked for, and every rank learns how it ended."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from model.files import shards
from model.files import verified_write as read_back
from model.files.manifest import file_facts, verify
from model.files.shards import Chunks, ShardPlan, plan_shard, write_shard
from model.files.verified_write import BadShard
from tests.support.checkpoint import CARD, Nothing, toy
from tests.support.ranks import run_ranks
from tests.support.runs import start
from trainer.checkpoint import checkpointer as module
from trainer.checkpoint import host_staging as staging
from trainer.checkpoint.background_save import Agreement
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.retention import checkpoints
from trainer.distributed.world import World
from trainer.errors import ProofError, SaveError
from trainer.machine import memory_info
from trainer.optim import Trained

ALONE = World(0, 0, 1, torch.device("cpu"))
STATE: dict[str, Any] = {"stage": "", "meter": {"seen": [1, 2]}}


def many(world: World, strategy: str) -> Trained:
    """Tensors of every kind: hundreds of small ones, as LoRA has, one beyond what is copied together, half precision, a number."""
    if strategy != "many":
        return toy(world, strategy)
    torch.manual_seed(5)
    tensors = {f"lora.{i}.weight": torch.randn(3 + i % 4, 5) for i in range(300)}
    tensors |= {"large": torch.randn(600, 500), "half": torch.randn(7, 3).bfloat16(), "number": torch.randn(())}
    parameters = {name: nn.Parameter(tensor) for name, tensor in tensors.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return Trained(dict(parameters), optimizer)


def poison(trained: Trained) -> None:
    """Everything that is saved becomes something else."""
    with torch.no_grad():
        for parameter in trained.parameters.values():
            for tensor in (parameter, *trained.optimizer.state[parameter].values()):
                tensor.fill_(float("nan"))


def checkpointer_of(world: World, folder: Path) -> Checkpointer:
    return Checkpointer(folder, 9, world)


def save(checkpointer: Checkpointer, step: int, trained: Trained, state: dict[str, Any] = STATE) -> None:
    checkpointer.save(step, trained, state, CARD, Nothing())  # type: ignore[arg-type]


class Gate:
    """In place of the writer: the files are written once the gate is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
        self.original, self.opened, self.inside, self.most = module.write_planned, threading.Event(), 0, 0
        if monkeypatch:
            monkeypatch.setattr(module, "write_planned", self.write)
        else:
            module.write_planned = self.write  # type: ignore[assignment]

    def write(self, *args: Any) -> Any:
        self.inside += 1
        self.most = max(self.most, self.inside)
        assert self.opened.wait(30)
        facts = self.original(*args)
        self.inside -= 1
        return facts


def save_and_poison(world: World, folder: Path, strategy: str) -> None:
    trained, state = many(world, strategy), json.loads(json.dumps(STATE))
    (folder / "expected").mkdir(exist_ok=True)
    write_shard(folder / "expected", world.rank, world.size, module._tensors(trained, world))
    checkpointer, gate = checkpointer_of(world, folder), Gate()
    save(checkpointer, 4, trained, state)
    poison(trained)
    state["meter"]["seen"].append("later")
    checkpointer.check()  # nothing has failed
    assert not checkpoints(folder)
    gate.opened.set()
    checkpointer.wait()


@pytest.mark.parametrize(("strategy", "size"), [pytest.param("many", 1, marks=pytest.mark.long), ("ddp", 2), ("fsdp", 2)])
def test_what_changes_after_the_save_was_asked_for_is_not_in_it(tmp_path: Path, strategy: str, size: int) -> None:
    run_ranks(save_and_poison, size, tmp_path, strategy)
    folder = tmp_path / "checkpoint-4"
    verify(folder)
    expected = sorted((tmp_path / "expected").iterdir())
    assert len(expected) == 2 * size
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in expected)
    told = json.loads((folder / "state.json").read_text())
    steps = told.pop("optimizer_steps")
    assert told == {**STATE, "step": 4} and set(steps.values()) == {2.0 if strategy != "many" else 1.0}
    assert sum(name.startswith("weights/") for name in load_file(folder / expected[1].name)) in (len(steps), len(steps) - 1)


def test_one_save_at_a_time_in_the_same_memory_and_nothing_is_left_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, checkpointer, gate = toy(ALONE, "ddp"), checkpointer_of(ALONE, tmp_path), Gate(monkeypatch)
    before, addresses = threading.active_count(), set()
    keys = checkpointer.agreement.store.num_keys()
    for step in range(1, 7):
        save(checkpointer, step, trained)
        assert (checkpointer.task and checkpointer.task.under_way) or step > 1
        gate.opened.set()
        addresses.add(staging_of(checkpointer).buffer.data_ptr())
    checkpointer.wait()
    assert gate.most == 1 and len(addresses) == 1 and threading.active_count() == before
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in range(1, 7)]
    assert checkpointer.agreement.store.num_keys() == keys + 1
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in checkpoints(tmp_path)}


def test_the_memory_is_there_before_the_moments_are_and_no_worker_copies_it(tmp_path: Path) -> None:
    trained, checkpointer = toy(ALONE, "ddp"), checkpointer_of(ALONE, tmp_path)
    moments = dict(trained.optimizer.state)
    trained.optimizer.state.clear()
    checkpointer.prepare(trained, CARD, Nothing())  # type: ignore[arg-type]
    address = staging_of(checkpointer).buffer.data_ptr()
    save(checkpointer, 0, trained)
    trained.optimizer.state.update(moments)
    save(checkpointer, 2, trained)
    checkpointer.wait()
    assert staging_of(checkpointer).buffer.data_ptr() == address
    names = [set(load_file(next((tmp_path / f"checkpoint-{step}").glob("*.safetensors")))) for step in (0, 2)]
    assert names[0] < names[1] and len(names[1]) == 3 * len(names[0])
    flags = mapping_flags(address)
    assert flags is None or "dc" in flags  # not copied into forked processes


def test_the_memory_is_taken_for_a_save_and_given_back_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "LEAST_GIVEN_BACK", 0)
    trained, checkpointer, gate = many(ALONE, "many"), checkpointer_of(ALONE, tmp_path), Gate(monkeypatch)
    checkpointer.prepare(trained, CARD, Nothing())  # type: ignore[arg-type]
    memory = staging_of(checkpointer)
    buffer, values = memory.buffer, trained.optimizer.state
    resident = [mapping_line(buffer.data_ptr(), "Rss:")]
    for step in (1, 2):
        if step == 2:  # the loop says one step before that a save will come
            checkpointer.expect()
            assert memory.warming
            memory.warming.join()
            assert mapping_line(buffer.data_ptr(), "Rss:") in (None, resident[1])
        save(checkpointer, step, trained)
        resident.append(mapping_line(buffer.data_ptr(), "Rss:"))
        gate.opened.set()
        checkpointer.wait()
        resident.append(mapping_line(buffer.data_ptr(), "Rss:"))
        gate.opened.clear()
    verify(tmp_path / "checkpoint-2")  # what was given back was filled again
    assert values and not buffer.any()
    if None not in resident:
        kib = [int((line or ["0"])[0]) for line in resident]
        assert kib[0] == kib[2] == kib[4] == 0 and min(kib[1], kib[3]) >= buffer.numel() >> 10


def test_training_waits_for_a_save_that_the_memory_has_become_too_small_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(staging, "LEAST_GIVEN_BACK", 0)
    trained, checkpointer = many(ALONE, "many"), checkpointer_of(ALONE, tmp_path)
    checkpointer.prepare(trained, CARD, Nothing())  # type: ignore[arg-type]
    for step, free in enumerate((1 << 40, 1000, 1 << 40)):
        monkeypatch.setattr(staging, "free_beside_steps", lambda *_, free=free: free)
        checkpointer.expect()
        assert (staging_of(checkpointer).warming is None) == (free == 1000)  # it may end a process to take what is not there
        save(checkpointer, step, trained)
        assert (checkpointer.task is None) == (free == 1000)
        checkpointer.wait()
        verify(tmp_path / f"checkpoint-{step}")
        said = capsys.readouterr()
        assert ("training waits while this checkpoint is written" in said.out + said.err) == (free == 1000)
    files = [sorted((tmp_path / f"checkpoint-{step}").glob("*.safetensors")) for step in (0, 1)]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_memory_that_was_taken_before_the_save_is_not_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "LEAST_GIVEN_BACK", 0)
    trained, checkpointer = many(ALONE, "many"), checkpointer_of(ALONE, tmp_path)
    checkpointer.prepare(trained, CARD, Nothing())  # type: ignore[arg-type]
    checkpointer.expect()
    monkeypatch.setattr(staging, "free_beside_steps", lambda *_: 0)
    save(checkpointer, 1, trained)
    assert checkpointer.task
    checkpointer.wait()
    verify(tmp_path / "checkpoint-1")


def touch_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory comes late, and all of it is zero then."""
    touch = staging.Staging._touch

    def slow(self: staging.Staging) -> None:
        time.sleep(0.2)
        touch(self)
        self.buffer.zero_()

    monkeypatch.setattr(staging.Staging, "_touch", slow)


def test_a_save_waits_for_memory_that_is_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "LEAST_GIVEN_BACK", 0)
    trained, checkpointer, gate = many(ALONE, "many"), checkpointer_of(ALONE, tmp_path), Gate(monkeypatch)
    checkpointer.prepare(trained, CARD, Nothing())  # type: ignore[arg-type]
    touch_slowly(monkeypatch)
    checkpointer.expect()
    save(checkpointer, 1, trained)
    time.sleep(0.3)
    gate.opened.set()
    checkpointer.wait()
    found = load_file(tmp_path / "checkpoint-1" / "rank-00000-of-00001.safetensors")
    assert all(torch.equal(found[f"weights/{name}"], parameter) for name, parameter in trained.parameters.items())


def test_memory_that_a_save_under_way_is_read_from_is_not_taken_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "LEAST_GIVEN_BACK", 0)
    trained, checkpointer, gate = many(ALONE, "many"), checkpointer_of(ALONE, tmp_path), Gate(monkeypatch)
    save(checkpointer, 1, trained)
    assert not gate.opened.is_set()
    checkpointer.expect()
    assert staging_of(checkpointer).warming is None
    gate.opened.set()
    checkpointer.wait()
    found = load_file(tmp_path / "checkpoint-1" / "rank-00000-of-00001.safetensors")
    assert all(torch.equal(found[f"weights/{name}"], parameter) for name, parameter in trained.parameters.items())


def test_memory_is_given_back_where_another_rank_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was on its way already: that of a step before a save which training then waits for."""
    monkeypatch.setattr(staging, "LEAST_GIVEN_BACK", 0)
    touch_slowly(monkeypatch)
    other = ["there", 50, 0]
    world = SimpleNamespace(rank=0, device=torch.device("cpu"), is_main=False, gather_json=lambda own: [own, other])
    memory = staging.SaveMemory(world, [("here", 1 << 20, 1 << 40), ("there", 50, 1 << 40)])  # type: ignore[arg-type]
    assert memory.staging
    memory.expect()
    warming = memory.staging.warming
    assert warming and memory.staging.still_needed == 0
    assert memory.of_next_save() is None
    assert not warming.is_alive() and memory.staging.still_needed == 1 << 20


def test_memory_is_expected_where_the_host_has_it_for_all_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "LEAST_GIVEN_BACK", 0)
    monkeypatch.setattr(staging, "free_beside_steps", lambda *_: 150)
    for other in ("here", "there"):
        memory = staging.SaveMemory(ALONE, [("here", 100, 1 << 40), (other, 100, 1 << 40)])
        memory.expect()
        assert memory.staging and bool(memory.staging.warming) == (other == "there")


def saves_with_memory(world: World, folder: Path, frees: list[list[int]]) -> list[tuple[bool, bool]]:
    """Whether this rank holds its memory, and whether its saves were written beside training; `frees`: by save and rank."""
    trained, checkpointer = toy(world, "ddp"), checkpointer_of(world, folder)
    found = []
    with patch.object(staging, "LEAST_GIVEN_BACK", 100):
        checkpointer.prepare(trained, CARD, Nothing())  # type: ignore[arg-type]
        for step, free in enumerate(frees):
            with patch.object(staging, "free_beside_steps", lambda *_, free=free: free[world.rank]):
                save(checkpointer, step, trained)
            found.append((staging_of(checkpointer).is_held, checkpointer.task is not None))
            checkpointer.wait()
    return found


def test_ranks_ask_for_memory_together_though_only_one_gives_it_back(tmp_path: Path) -> None:
    """Rank 0 writes what both hold whole: only its copy is large. A host is as free as the rank that sees it fullest."""
    ample = 1 << 40
    ranks = run_ranks(saves_with_memory, 2, tmp_path, [[ample, ample], [ample, 10], [10, ample], [ample, ample]], seconds=60)
    assert ranks == [[(held, beside) for beside in (True, False, False, True)] for held in (False, True)]
    for step in range(4):
        verify(tmp_path / f"checkpoint-{step}")


def saves_beside_steps(world: World, folder: Path, steps: list[int]) -> list[bool]:
    """Whether saves were written beside training, where a step of a rank takes so much and 1000 bytes and a copy are free."""
    trained, checkpointer = toy(world, "ddp"), checkpointer_of(world, folder)
    found = []
    with patch.object(staging, "LEAST_GIVEN_BACK", 100):
        checkpointer.prepare(trained, CARD, Nothing())  # type: ignore[arg-type]
        assert checkpointer.memory
        free = 1000 + int(checkpointer.memory.needed_on_host / staging.SHARE) + 1
        memory = staging_of(checkpointer)
        copy = 0 if memory.is_held else memory.buffer.numel()
        for number, more in enumerate(steps):

            def used(_: torch.device, more: int = more, earlier: int = copy * bool(number)) -> memory_info.Usage:
                held = 0 if memory.still_needed else copy
                return memory_info.Usage(50 + held, 50 + more + max(held, earlier), free - held, 1 << 40)

            with patch.object(memory_info, "usage", used), patch.object(staging, "usage", used):
                checkpointer.expect()
                assert bool(memory.warming) == (not memory.is_held and world.size * more <= 1000)
                save(checkpointer, number, trained)
            found.append(checkpointer.task is not None)
            checkpointer.wait()
    return found


def test_a_step_of_every_rank_of_a_host_is_left_its_memory(tmp_path: Path) -> None:
    """The copy of an earlier save is none of it, though it was there when a step took the most."""
    assert run_ranks(saves_beside_steps, 2, tmp_path / "two", [490, 500, 510, 1000]) == [[True, True, False, False]] * 2
    assert run_ranks(saves_beside_steps, 1, tmp_path / "one", [500, 1000, 1010]) == [[True, True, False]]


def staging_of(checkpointer: Checkpointer) -> staging.Staging:
    assert checkpointer.memory and checkpointer.memory.staging
    return checkpointer.memory.staging


def mapping_flags(address: int) -> list[str] | None:
    """The flags of the memory at an address; None where the system does not tell."""
    return mapping_line(address, "VmFlags:")


def mapping_line(address: int, name: str) -> list[str] | None:
    """What the system tells under a name of the memory at an address; None where it does not."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return None
    inside = False
    for line in lines:
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first <= address < last
        elif inside and head == name:
            return line.split()[1:]
    return None


def test_where_memory_is_short_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = many(ALONE, "many")
    for name, free in (("short", 1000), ("ample", 1 << 40)):
        monkeypatch.setattr(module, "available_bytes", lambda free=free: free)
        checkpointer = checkpointer_of(ALONE, tmp_path / name)
        save(checkpointer, 3, trained)
        assert checkpointer.memory
        assert (checkpointer.task is None) == (checkpointer.memory.staging is None) == (name == "short")
        checkpointer.wait()
        said = capsys.readouterr().out
        assert ("training waits" in said and "1,000 bytes" in said) == (name == "short")
    files = [sorted((tmp_path / name / "checkpoint-3").glob("[!m]*")) for name in ("short", "ample")]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files))


def test_memory_is_counted_by_host() -> None:
    assert staging.short_of_memory([("a", 40, 100), ("a", 40, 101), ("b", 80, 100)]) == ""
    short = staging.short_of_memory([("a", 10, 100), ("b", 41, 101), ("b", 40, 100)])
    assert "b has 100 bytes" in short and "takes 81" in short


def fail_at(world: World, folder: Path, value: float, name: str) -> tuple[str, str]:
    """Save, go on, save what is spoilt on the last rank, and step on until it is known."""
    trained, checkpointer = toy(world, "fsdp"), checkpointer_of(world, folder)
    save(checkpointer, 1, trained)
    if world.rank == world.size - 1:
        parameter = trained.parameters["2.weight" if world.size == 1 else "0.weight"]
        tensor = parameter if name == "weights" else trained.optimizer.state[parameter][name]
        with torch.no_grad():
            tensor.to_local()[-1, -1] = value  # type: ignore[union-attr]
    save(checkpointer, 2, trained)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            checkpointer.check()
        except (ProofError, SaveError) as error:
            return type(error).__name__, str(error)
        time.sleep(0.01)
    return "", "nothing was said"


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "weights"), (float("-inf"), "exp_avg"), (float("inf"), "exp_avg_sq")])
def test_nothing_that_is_not_finite_is_saved_and_every_rank_says_where_it_is(tmp_path: Path, value: float, name: str) -> None:
    for kind, text in run_ranks(fail_at, 2, tmp_path, value, name):
        assert kind == "ProofError" and f"rank 1: {name}/0.weight holds numbers that are not finite" in text
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    verify(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_tensor_that_is_not_finite_is_named(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PIECE_BYTES", 64)
    tensors = {f"t{i}": torch.full((5, 3), torch.finfo(dtype).max, dtype=dtype) for i in range(9)}
    tensors |= {"whole": torch.full((4,), -1), "small": torch.tensor([torch.finfo(dtype).smallest_normal / 2]).to(dtype)}
    write_shard(tmp_path, 0, 1, tensors)
    for i in range(9):
        for value in (float("nan"), float("inf"), float("-inf")):
            spoilt = tensors[f"t{i}"].clone()
            spoilt.view(-1)[i] = value
            with pytest.raises(BadShard, match=rf"^t{i} holds"):
                write_shard(tmp_path, 0, 1, tensors | {f"t{i}": spoilt})


@pytest.mark.parametrize("harm", ["flipped", "longer", "shorter", "layout"])
def test_what_is_read_back_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    original = shards.write_synced

    def failing_disk(path: Path, chunks: Any) -> dict[str, Any]:
        facts = original(path, chunks)
        data = bytearray(path.read_bytes())
        if (harm == "layout" and path.suffix == ".json") or (harm == "flipped" and path.suffix != ".json"):
            data[len(data) // 2] ^= 4
        path.write_bytes(data + b"x" if harm == "longer" else data[:-1] if harm == "shorter" else data)
        return facts

    monkeypatch.setattr(shards, "write_synced", failing_disk)
    checkpointer = checkpointer_of(ALONE, tmp_path)
    save(checkpointer, 1, toy(ALONE, "ddp"))
    with pytest.raises(ProofError, match=r"rank 0: .*rank-00000-of-00001\.(safetensors|json)"):
        checkpointer.wait()
    assert not list(tmp_path.iterdir())


def test_files_are_the_library_s_and_facts_are_those_of_the_files(tmp_path: Path) -> None:
    trained = many(ALONE, "many")
    tensors = module._tensors(trained, ALONE)
    facts = write_shard(tmp_path, 0, 1, tensors)
    assert facts == file_facts(tmp_path)
    found = load_file(tmp_path / "rank-00000-of-00001.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    plan = plan_shard(tensors)
    assert all(
        plan.name_at(position) == byte_range.name
        for byte_range in plan.ranges
        for position in (byte_range.begin, byte_range.end - 1)
    )


def agree(world: World, problems: dict[int, list[str]]) -> tuple[list[str], int]:
    agreement, ruling = Agreement(world.channel("matter"), "x", world.rank, world.size), ["nothing"]
    for _ in range(20):
        agreement.report(problems.get(world.rank, []), world.rank)
        if world.is_main:
            problem, facts = agreement.reports()
            assert facts == [*range(world.size)]
            agreement.rule(problem)
        ruling = agreement.ruling()
    return ruling, agreement.number


def test_ranks_agree_on_the_gravest_problem() -> None:
    assert run_ranks(agree, 3, {}) == [([], 20)] * 3
    problems = {1: ["write", "full"], 2: ["proof", "odd"]}
    assert run_ranks(agree, 3, problems) == [(["proof", "rank 1: full; rank 2: odd"], 20)] * 3


LORA = {"model": {"llm": {"tune": "lora"}, "vision": {"tune": "frozen"}}, "lora": {"rank": 2, "dropout": 0.1}}


def start_saving(world: World, parts: Path, output_dir: Path, strategy: str, how: str) -> int:
    """A run whose training either waits for every save, or goes on and finds the writer slow; or fails once it has saved."""
    original, write = Checkpointer.save, module.write_planned

    def saved(self: Checkpointer, step: int, *args: Any) -> Path:
        path = original(self, step, *args)
        if how == "waiting":
            self.wait()
        elif how == "raising" and step == 3:
            raise RuntimeError("something else")
        return path

    def slow(*args: Any) -> Any:
        time.sleep(0.3 if how == "raising" else 0.05)
        return write(*args)

    Checkpointer.save = saved  # type: ignore[assignment,method-assign]
    if how != "waiting":
        module.write_planned = slow  # type: ignore[assignment]
    sections = {**LORA, "train": {"max_steps": 4}, "parallel": {"strategy": strategy}}
    return start(world, parts, output_dir, sections).code


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_saves_the_same_bytes_whether_training_waits_or_not(parts: Path, tmp_path: Path, strategy: str) -> None:
    for how in ("waiting", "going on"):
        assert run_ranks(start_saving, 2, parts, tmp_path / how, strategy, how) == [0, 0]
    for folder in checkpoints(tmp_path / "waiting"):
        names = {path.name for path in folder.iterdir()}
        other = tmp_path / "going on" / folder.name
        assert len(names) > 8 and names == {path.name for path in other.iterdir()}
        for name in names - {"manifest.json", "state.json"}:
            assert (folder / name).read_bytes() == (other / name).read_bytes(), name
        first, second = (json.loads((path / "state.json").read_text()) for path in (folder, other))
        for state in (first, second):
            del state["config"], state["meter"]["seconds"], state["meter"]["wait"]
        assert first == second


def test_a_run_that_fails_while_it_saves_still_has_that_checkpoint(parts: Path, tmp_path: Path) -> None:
    assert run_ranks(start_saving, 2, parts, tmp_path / "run", "ddp", "raising") == [1, 1]
    assert [path.name for path in checkpoints(tmp_path / "run")][-1] == "checkpoint-3"
    verify(tmp_path / "run" / "checkpoint-3")
    assert not list((tmp_path / "run").glob(".checkpoint*"))


def start_long_save(world: World, parts: Path, output_dir: Path) -> int:
    """A run whose last save takes three times as long as a stall may, and comes on all the time."""
    write = module.write_planned

    def slow(folder: Path, rank: int, world_size: int, plan: ShardPlan, chunks: Chunks) -> Any:
        for _ in range(6):
            time.sleep(0.5)
            list(chunks())
        return write(folder, rank, world_size, plan, chunks)

    module.write_planned = slow
    sections = {**LORA, "train": {"max_steps": 1}, "data": {"workers": 0}, "faults": {"stall_seconds": 1.0}}
    return start(world, parts, output_dir, sections).code


def test_a_save_that_takes_long_and_comes_on_is_no_stall(parts: Path, tmp_path: Path) -> None:
    assert run_ranks(start_long_save, 1, parts, tmp_path / "run") == [0]


def test_a_large_file_is_on_its_way_to_the_disk_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(read_back, "SYNC_BYTES", 10)
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    facts = read_back.write_synced(tmp_path / "file", iter([memoryview(bytes([i]) * 4) for i in range(7)]))
    assert facts["size"] == 28 == synced[-1] and len(synced) == 3
