"""A disk that is full, read-only or failing: found before training where it can be, told with what is missing, nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.files.manifest import verify
from model.files.tensor_files import Entry, write_safetensors
from tests.support.checkpoint import toy
from tests.support.disk import ALONE, CARD, Nothing, failing, names, save
from tests.support.ranks import run_ranks
from tests.support.resume import LORA, weights
from tests.support.runs import Start, start
from trainer import finish, loop
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.retention import newest_sound
from trainer.checkpoint.trial_save import space_warning, trial_save
from trainer.distributed.world import World
from trainer.errors import SaveError
from trainer.machine import disk_space
from trainer.machine.atomic_files import clean_leftovers
from trainer.machine.disk_space import (
    SpaceNeeded,
    checkpoint_bytes,
    describe_shortage,
    final_bytes,
    format_bytes,
    prove_space,
    warn_if_next_save_will_not_fit,
)

STEPS: dict[str, Any] = {
    **LORA,
    "train": {"max_steps": 4},
    "checkpoint": {"every": 2, "keep": 2},
    "log": {"every": 1},
    "data": {"workers": 0},
}
MIB = 2**20


@contextmanager
def free(count: int, folder: Path | None = None) -> Iterator[None]:
    """A disk with so many bytes left, or with so many that the files of `folder` share."""
    original = os.statvfs

    def told(path: Path) -> Any:
        used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder else 0
        return SimpleNamespace(f_bavail=count - used, f_frsize=1)

    os.statvfs = told  # type: ignore[assignment]
    try:
        yield
    finally:
        os.statvfs = original


@contextmanager
def files_up_to(count: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def shards_and_bytes(world: World, folder: Path, strategy: str) -> tuple[int, int, int, int]:
    trained = toy(world, strategy)
    total, largest = checkpoint_bytes(trained.saved(), world)
    checkpointer = Checkpointer(folder, 1, world)
    checkpointer.save(1, trained, {"config": {}, "meter": {}}, CARD, Nothing())  # type: ignore[arg-type]
    checkpointer.wait()
    sizes = [path.stat().st_size for path in (folder / "checkpoint-1").glob("rank-*")]
    return total, sum(sizes), largest, max(sizes)


@pytest.mark.parametrize(("strategy", "ranks"), [("ddp", 1), ("ddp", 2), ("fsdp", 3)])
def test_what_a_checkpoint_takes_is_known_to_the_byte(tmp_path: Path, strategy: str, ranks: int) -> None:
    for total, found, largest, found_largest in run_ranks(shards_and_bytes, ranks, tmp_path, strategy):
        assert (total, largest) == (found, found_largest)


def test_what_final_takes_is_known_to_the_byte(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(7).bfloat16()}
    files = [(name, {name: Entry(t.dtype, tuple(t.shape), lambda t=t: t)}) for name, t in tensors.items()]  # type: ignore[misc]
    for name, entries in files:
        with (tmp_path / name).open("wb") as out:
            write_safetensors(out, entries)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert final_bytes(files) == (sum(sizes), max(sizes))
    assert final_bytes([]) == (0, 0)


def test_what_is_missing_is_told_and_never_rounded_away(tmp_path: Path) -> None:
    found = SpaceNeeded(tmp_path, 10 * MIB, 5 * MIB, 9 * MIB, 3)
    with free(15 * MIB):
        prove_space(found)
        assert warn_if_next_save_will_not_fit(found) == ""
    with free(15 * MIB - 1), pytest.raises(SaveError) as caught:
        prove_space(found)
    text = f"A save takes 15.0 MiB, and 15.0 MiB are free on the file system of {tmp_path}: 1 bytes are missing. Free space"
    assert text in str(caught.value) and "checkpoint.keep" in str(caught.value) and "output_dir" in str(caught.value)
    with free(9 * MIB):
        assert "THE NEXT CHECKPOINT DOES NOT FIT" in warn_if_next_save_will_not_fit(
            found
        ) and "1.0 MiB are missing" in warn_if_next_save_will_not_fit(found)
        assert "that is enough" in describe_shortage(tmp_path, 10 * MIB, spent=2 * MIB)
    with files_up_to(9 * MIB):
        prove_space(found)
    with files_up_to(9 * MIB - 1024), pytest.raises(SaveError, match=r"1\.0 KiB are missing. Raise the limit .`ulimit -f`"):
        prove_space(found)
    with free(44 * MIB):  # four checkpoints and final/ are 45
        assert space_warning(found).startswith("; 1.0 MiB ARE MISSING")
        (tmp_path / "checkpoint-1").mkdir()
        assert space_warning(found) == ""
    assert [format_bytes(n) for n in (0, 1023, 1024, 1025, 2**30)] == ["0 bytes", "1023 bytes", "1.0 KiB", "1.1 KiB", "1.0 GiB"]


def test_a_trial_save_leaves_nothing_and_fails_wherever_a_save_would(tmp_path: Path) -> None:
    """Every fsync, rename, removal and mkdir of it in turn."""
    parameters = toy(ALONE, "ddp").parameters
    save(Checkpointer(tmp_path, 2, ALONE), 1)
    before = names(tmp_path)
    problem, others = trial_save(tmp_path, 1, parameters, {"config": {}}, {"model.json": b"{}"}, ALONE)
    assert problem == "" and 2 < others < 4096 and names(tmp_path) == before
    for call in ("fsync", "replace", "mkdir", "rmdir", "unlink"):
        number = 0
        while True:
            with failing(call, number, errno.EDQUOT) as calls:
                problem, _ = trial_save(tmp_path, 1, parameters, {"config": {}}, {"model.json": b"{}"}, ALONE)
            if len(calls) <= number:
                break
            assert "rank 0" in problem and os.strerror(errno.EDQUOT) in problem, f"{call} {number} of {calls}"
            clean_leftovers(tmp_path)
            assert names(tmp_path) == before
            number += 1
        assert problem == "" and number >= 1


def trial_on_two_disks(world: World, folder: Path) -> str:
    """Rank 1 writes into another folder of the same name, as on a machine that does not share it."""
    own = folder if world.is_main else folder.with_name("elsewhere")
    (own / ".trial-save.saving").mkdir(parents=True, exist_ok=True)
    return trial_save(own, 0, toy(world, "fsdp").parameters, {"config": {}}, {}, world)[0]


def test_a_machine_with_a_folder_of_its_own_is_found_before_training(tmp_path: Path) -> None:
    for problem in run_ranks(trial_on_two_disks, 2, tmp_path / "run"):
        assert "rank-00001-of-00002" in problem and "differ from the manifest" in problem


Fault = Callable[[Path], AbstractContextManager[Any]]


def start_failing(world: World, parts: Path, folder: Path, sections: dict[str, Any], fault: Fault, step: int) -> Start:
    """A start whose disk fails from 0-based `step` on (before anything: -1), and is well again afterwards."""
    original, active = loop.train_step, []

    def stepping(*args: Any, **kwargs: Any) -> Any:
        if args[4].step == step:
            for thread in threading.enumerate():
                if thread.name.startswith("checkpoint-"):
                    thread.join()  # it is the next save that fails
            active.append(fault(folder))
            active[-1].__enter__()
        return original(*args, **kwargs)

    loop.train_step = stepping
    try:
        with fault(folder) if step < 0 else nullcontext():
            return start(world, parts, folder, sections)
    finally:
        loop.train_step = original
        for one in active:
            one.__exit__(None, None, None)


FAULTS: dict[str, tuple[Fault, str]] = {
    "a file too large": (lambda folder: files_up_to(30_000), "File too large"),
    "an fsync fails": (lambda folder: failing("fsync", 3), "Input/output error"),
    "read-only": (lambda folder: failing("mkdir", 0, errno.EROFS), "Read-only file system"),
}


def all_faults(world: World, parts: Path, folder: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    whole = start(world, parts, folder / "whole", STEPS)
    found: dict[str, Any] = {"whole": whole.said}
    with free(1000):
        found["full"] = start(world, parts, folder / "full", STEPS)
    for kind in kinds:
        found[kind] = start_failing(world, parts, folder / kind, STEPS, FAULTS[kind][0], 3)
        found[f"{kind}: exit"] = json.loads((folder / kind / "exit.json").read_text())
        found[f"{kind}: left"] = sorted(names(folder / kind))
        verify(folder / kind / "checkpoint-2")
        found[f"{kind}: again"] = start(world, parts, folder / kind, STEPS)
    return found


def check_faults(parts: Path, tmp_path: Path, kinds: tuple[str, ...]) -> None:
    found = run_ranks(all_faults, 1, parts, tmp_path, kinds)[0]
    assert "disk      a checkpoint takes" in found["whole"] and "final/ " in found["whole"]
    full = found["full"]
    reason = json.loads((tmp_path / "full" / "exit.json").read_text())["reason"]
    assert (full.code, full.seen) == (73, []), full.said
    assert "the next checkpoint and final/ do not fit" in reason and "and 1000 bytes are free" in reason and "are missing" in reason
    for kind in kinds:
        broken, written, again = found[kind], found[f"{kind}: exit"], found[f"{kind}: again"]
        assert (broken.code, len(broken.seen)) == (73, 4) and written["code"] == 73, f"{kind}: {broken.said}"
        for part in (FAULTS[kind][1], "A save takes", "are free on the file system", "heckpoints are intact"):
            assert part in written["reason"], f"{kind}: {written['reason']}"
        assert not [name for name in found[f"{kind}: left"] if ".saving" in name], kind
        assert (again.code, len(again.seen)) == (0, 2), f"{kind}: {again.said}"  # from checkpoint-2
        assert weights(tmp_path / kind) == weights(tmp_path / "whole"), kind


def test_a_save_that_fails_ends_the_run_with_73_and_the_next_start_goes_on(parts: Path, tmp_path: Path) -> None:
    check_faults(parts, tmp_path, ("a file too large",))


@pytest.mark.long
def test_other_ways_to_fail_end_it_alike(parts: Path, tmp_path: Path) -> None:
    check_faults(parts, tmp_path, tuple(FAULTS))


def keep_fewer(world: World, parts: Path, folder: Path) -> list[Start]:
    """Four checkpoints on a disk that holds four and a half, then two more steps."""
    sections = {**STEPS, "checkpoint": {"every": 1, "keep": 99}}
    found = [start(world, parts, folder, sections)]
    used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    capacity = used + sum(file.stat().st_size for file in (folder / "checkpoint-4").iterdir()) // 2
    for keep in (99, 1):
        with free(capacity, folder):
            changed = {**STEPS, "train": {"max_steps": 6}, "checkpoint": {"every": 1, "keep": keep}}
            found.append(start(world, parts, folder, changed))
    return found


@pytest.mark.long
def test_a_start_that_keeps_fewer_makes_room_for_itself(parts: Path, tmp_path: Path) -> None:
    whole, full, again = run_ranks(keep_fewer, 1, parts, tmp_path / "run")[0]
    assert (whole.code, full.code, full.seen, again.code, len(again.seen)) == (0, 73, [], 0, 2), again.said
    assert {name for name in names(tmp_path / "run") if "checkpoint" in name} == {"checkpoint-6"}


@contextmanager
def no_new_weights() -> Iterator[None]:
    """As where no inode is left."""
    original = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.suffix == ".safetensors" and mode == "wb":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return original(self, mode, *args, **kwargs)

    Path.open = opened  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Path.open = original  # type: ignore[method-assign]


def final_without_room(world: World, parts: Path, folder: Path) -> list[Start]:
    """Rank 0 fails in the middle of a file of final/, then at its first byte, while the others give their rows to it."""
    sections = {**STEPS, "model": {}, "lora": None, "parallel": {"strategy": "fsdp"}}
    original, found = finish.write_final, []
    for fault in (lambda: files_up_to(30_000), no_new_weights):

        def failing_final(*args: Any, fault: Callable[[], AbstractContextManager[None]] = fault, **kwargs: Any) -> Any:
            with fault():
                return original(*args, **kwargs)

        finish.write_final = failing_final
        try:
            found.append(start(world, parts, folder, sections))
        finally:
            finish.write_final = original
        world.barrier()
        assert "final" not in names(folder)
        if world.is_main:
            assert not [name for name in names(folder) if ".saving" in name]
            assert "A save takes" in json.loads((folder / "exit.json").read_text())["reason"]
        world.barrier()
    return [*found, start(world, parts, folder, sections)]


def test_no_rank_waits_for_one_that_cannot_write_final(parts: Path, tmp_path: Path) -> None:
    for ends in run_ranks(final_without_room, 2, parts, tmp_path / "run"):
        assert [(end.code, len(end.seen)) for end in ends] == [(73, 4), (73, 0), (0, 0)], ends[-1].said
    assert (tmp_path / "run" / "final" / "proof.json").is_file()


@contextmanager
def mounted(path: Path, *arguments: str) -> Iterator[None]:
    """Something real at `path`; skipped where this process may not mount."""
    path.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", *arguments, str(path)], capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@contextmanager
def filled(folder: Path, left: int) -> Iterator[None]:
    """Something else takes the disk, but for `left` bytes."""
    path = folder.parent / "filler"
    with path.open("wb") as out:
        os.posix_fallocate(out.fileno(), 0, disk_space.free_bytes(folder.parent) - left)
    try:
        yield
    finally:
        path.unlink()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def real_disks(world: World, parts: Path, disk: Path, elsewhere: Path) -> dict[str, Start]:
    whole = start(world, parts, elsewhere / "whole", STEPS)
    takes = sum(path.stat().st_size for path in (elsewhere / "whole" / "checkpoint-4").iterdir())
    found = {"whole": whole}
    for kind, left, step in (("full at once", takes // 2, -1), ("full later", takes // 2, 3), ("full soon", takes * 7 // 4, 1)):
        folder = disk / kind / "run"
        folder.mkdir(parents=True)
        found[kind] = start_failing(world, parts, folder, STEPS, lambda path, left=left: filled(path, left), step)  # type: ignore[misc]
        found[f"{kind}: again"] = start(world, parts, folder, STEPS)
    folder = disk / "read-only"
    found["read-only"] = start_failing(world, parts, folder, STEPS, read_only, 3)
    found["read-only: again"] = start(world, parts, folder, STEPS)
    return found


@pytest.mark.long
def test_real_file_systems_that_are_full_or_read_only(parts: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "-t", "tmpfs", "-o", "size=400m", "none"):
        found = run_ranks(real_disks, 1, parts, disk, tmp_path, seconds=300)[0]
        assert (found["full at once"].code, found["full at once"].seen) == (73, [])
        for kind, num_steps, left in (("full at once", 0, 4), ("full later", 4, 2), ("full soon", 4, 2), ("read-only", 4, 2)):
            folder = disk / kind / "run" if kind.startswith("full") else disk / kind
            assert (found[kind].code, len(found[kind].seen)) == (73, num_steps), f"{kind}: {found[kind].said}"
            again = found[f"{kind}: again"]
            assert (again.code, len(again.seen)) == (0, left), f"{kind}: {again.said}"
            assert weights(folder) == weights(tmp_path / "whole")
            clean_leftovers(folder)
            assert newest_sound(folder) == (folder / "checkpoint-4", [])
        assert "THE NEXT CHECKPOINT DOES NOT FIT" in found["full soon"].said
        assert "THE NEXT CHECKPOINT DOES NOT FIT" not in found["full later"].said
