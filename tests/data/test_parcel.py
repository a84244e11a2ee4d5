"""Batches come from workers in one piece: the same to the bit, with few open files, and with nothing left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data.dataset import MultimodalDataset
from data.loader import BatchPlan, LoadOptions, MicroBatch, train_batches
from data.order.sampler import Sampler
from data.prefetch import AHEAD_BYTES, micro_batches_together, planned_bytes, prefetch_factor
from data.workers import OpenFilesError, WorkerError
from tests.support.parcel import files_up_to, open_files
from tests.support.ranks import run_ranks
from tests.support.tiny_data import SPEC, WIDTH, dataset, grey, talk
from trainer.distributed.world import World

PAD = 3


def pictures(folder: Path, count: int) -> MultimodalDataset:
    grey(folder, 10)
    return dataset(folder, [talk("<image> word" + " more" * (i % 3), f"{i}", images=["10.png"]) for i in range(count)])


def steps(data: MultimodalDataset, per_step: int, workers: int, last: int = 2) -> Iterator[list[MicroBatch]]:
    sampler = Sampler(data.lengths, data.modalities, per_step, 0, "modality_length")
    return train_batches(data, sampler, BatchPlan(1, 1), LoadOptions(pad_id=PAD, rank=0, workers=workers), range(last))


def told(value: Any) -> Any:
    """All of a batch as plain values, with the type and shape of every tensor."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if dataclasses.is_dataclass(value):
        return {f.name: told(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: told(item) for key, item in value.items()}
    return [told(item) for item in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def most_open_files() -> Iterator[list[int]]:
    """The most that this process had open meanwhile, in a list of one."""
    most, over = [open_files()], threading.Event()

    def look() -> None:
        while not over.wait(0.001):
            most[0] = max(most[0], open_files())

    thread = threading.Thread(target=look)
    thread.start()
    yield most
    over.set()
    thread.join()


def test_a_batch_arrives_as_it_was_made(tmp_path: Path) -> None:
    grey(tmp_path, 10)
    data = dataset(tmp_path, [talk("<image>" * (i % 3), f"{i}" * i, images=["10.png"] * (i % 3)) for i in range(80)])
    alone, helped = (list(steps(data, 40, workers)) for workers in (0, 2))  # three micro-batches in a piece
    assert [told(step) for step in alone] == [told(step) for step in helped] and len(alone[0]) == 40


def test_open_files_do_not_grow_with_accumulation(tmp_path: Path) -> None:
    """Each tensor had a file of its own: 128 micro-batches of a step and those of the next passed 1,024."""
    data, found = pictures(tmp_path, 256), {}
    for per_step in (16, 128):
        before = open_files()
        with files_up_to(before + 100), most_open_files() as most:
            assert [len(step) for step in steps(data, per_step, 2)] == [per_step] * 2
        found[per_step] = most[0] - before
    assert max(found.values()) < 24, found


def test_labels_that_are_kept_keep_no_pictures(tmp_path: Path) -> None:
    micro = next(steps(pictures(tmp_path, 4), 4, 1))[0]
    text, values = micro.batch.labels.untyped_storage(), micro.batch.media["image"].values.untyped_storage()
    assert text.data_ptr() != values.data_ptr() and text.nbytes() == micro.batch.labels.nbytes


def children() -> set[int]:
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def kill_workers(world: World, folder: Path) -> set[str]:
    """What stands in /dev/shm, and did not before, after all workers were killed."""
    data, before, others = pictures(folder, 64), set(os.listdir("/dev/shm")), children()
    batches = steps(data, 16, 2, last=4)
    next(batches)
    for pid in children() - others:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises((RuntimeError, OSError, EOFError)):
        for _ in batches:
            time.sleep(0.05)
    return {name for name in set(os.listdir("/dev/shm")) - before if not name.startswith("trainer-")}  # pages of other runs


# In processes of their own: torch raises the death of a worker wherever the main thread is, at once or tests later.


def test_a_killed_worker_leaves_no_memory_behind(tmp_path: Path) -> None:
    assert run_ranks(kill_workers, 1, tmp_path) == [set()]


class _Narrow(MultimodalDataset):
    """Lets the process that reads a sample open `room` more files than it has."""

    room = 0

    def __getitem__(self, i: int) -> Any:
        sample = super().__getitem__(i)
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files() + self.room, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        return sample


def read_without_files(world: World, folder: Path, room: int) -> tuple[str, int, str]:
    """How reading ends in a worker that may open `room` more files, steps read, and what was written to stderr."""
    data, num_steps, ended = pictures(folder, 8), 0, "read"
    data.__class__, _Narrow.room = _Narrow, room
    with (folder / "stderr").open("w") as file:
        os.dup2(file.fileno(), 2)
    try:
        for step in steps(data, 4, 1):
            num_steps += len(step)
    except (WorkerError, RuntimeError, OSError, EOFError) as error:
        ended = "no files" if isinstance(error, OpenFilesError) else f"{type(error).__name__}: {error}"
    return ended, num_steps, (folder / "stderr").read_text()


@pytest.mark.parametrize("room", range(6))
def test_a_worker_without_files_says_so_in_one_line(tmp_path: Path, room: int) -> None:
    """multiprocessing wrote the same traceback for as long as the run hung."""
    [(ended, num_steps, said)] = run_ranks(read_without_files, 1, tmp_path, room)
    if ended == "read":
        assert num_steps == 8  # there was room
    else:
        # What was on its way breaks off where the worker ends meanwhile: `data.workers` explains that to people.
        told = ("no files", "exited unexpectedly", "Too many open files", "EOFError", "ConnectionResetError")
        assert room < 5 and any(word in ended for word in told), ended
    assert len(said) < 2000


def read_with_no_file_left(world: World, folder: Path) -> None:
    batches = steps(pictures(folder, 64), 16, 1, last=4)
    next(batches)
    with files_up_to(open_files()), pytest.raises(OpenFilesError, match="ulimit -n"):
        list(batches)


def test_a_rank_without_files_says_so(tmp_path: Path) -> None:
    run_ranks(read_with_no_file_left, 1, tmp_path)


@pytest.mark.parametrize(
    "per_step, workers, together", [(2, 4, 1), (16, 0, 1), (17, 0, 2), (16, 4, 1), (128, 8, 4), (10_000, 8, 313)]
)
def test_a_step_is_made_in_few_pieces(per_step: int, workers: int, together: int) -> None:
    assert micro_batches_together(per_step, workers) == together


def test_what_is_prepared_is_bounded_by_its_bytes(tmp_path: Path) -> None:
    assert prefetch_factor(32, 8, AHEAD_BYTES / 1000) == 5
    assert prefetch_factor(32, 8, AHEAD_BYTES / 24) == 3
    assert prefetch_factor(32, 8, AHEAD_BYTES) == 2
    data = pictures(tmp_path, 4)
    assert planned_bytes(data) == pytest.approx(float(data.lengths.max()) * 32 + 3 * SPEC.size**2 * 4, rel=0.05)
    assert WIDTH < planned_bytes(dataset(tmp_path, [talk("Hi", "a")])) < 1000
