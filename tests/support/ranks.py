"""Ranks for tests: processes of one forkserver that has imported everything already, talking gloo over a file store."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from trainer.distributed.world import World

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.support.preload"])


def run_ranks(fn: Callable[..., Any], size: int, *args: Any, seconds: float = 90) -> list[Any]:
    """fn(world, *args) on `size` ranks; what each returned. AssertionError with the traceback of the first that raised."""
    with _running(fn, size, args, seconds) as pipes:
        return _collect(pipes, seconds)


def kill_ranks(fn: Callable[..., Any], size: int, *args: Any, after: float, seconds: float = 90) -> list[Any] | None:
    """The same, but all ranks get SIGKILL `after` seconds: None, unless every one has answered before."""
    with _running(fn, size, args, seconds) as pipes:
        try:
            return _collect(pipes, after)
        except TimeoutError:
            return None


def kill_ranks_when(due: Callable[[], bool], fn: Callable[..., Any], size: int, *args: Any, seconds: float = 90) -> None:
    """The same, as soon as `due` says so. TimeoutError if it never does."""
    end = time.monotonic() + seconds
    with _running(fn, size, args, seconds):
        while not due():
            if time.monotonic() > end:
                raise TimeoutError(f"nothing was due in {seconds} s")
            time.sleep(0.02)


class Ends(NamedTuple):
    """How ranks ended that were expected to end by themselves."""

    codes: list[int]  # exit codes, below 0 for a signal
    seconds: float  # from when the first one ended to the last
    pids: list[int]


def ends_of(fn: Callable[..., Any], size: int, *args: Any, seconds: float = 60) -> Ends:
    """fn on `size` ranks, none of which comes back from it. TimeoutError where some have not ended."""
    with _running(fn, size, args, seconds) as pipes:
        processes = pipes.processes
        wait([process.sentinel for process in processes], seconds)
        first = time.monotonic()
        for process in processes:
            process.join(max(0.0, first + seconds - time.monotonic()))
        if left := [rank for rank, process in enumerate(processes) if process.exitcode is None]:
            raise TimeoutError(f"ranks {left} have not ended in {seconds} s")
        return Ends([process.exitcode for process in processes], time.monotonic() - first, [process.pid for process in processes])


class Pipes(list[Connection]):
    """To ranks, by number."""

    processes: list[Any]


@contextmanager
def _running(fn: Callable[..., Any], size: int, args: tuple[Any, ...], seconds: float) -> Iterator[Pipes]:
    """The pipes of `size` ranks that were started; at the end all are killed at once."""
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = Pipes(), []
        for rank in range(size):
            ours, theirs = SERVER.Pipe()
            process = SERVER.Process(target=_rank, args=(fn, rank, size, os.path.join(folder, "store"), theirs, args, seconds))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        pipes.processes = processes
        try:
            yield pipes
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _collect(pipes: list[Connection], seconds: float) -> list[Any]:
    answers: dict[int, Any] = {}
    end = time.monotonic() + seconds
    while len(answers) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in answers]
        ready = wait(waiting, max(0.0, end - time.monotonic()))
        if not ready:
            raise TimeoutError(f"no answer in {seconds} s from ranks {[r for r in range(len(pipes)) if r not in answers]}")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                good, answer = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            if not good:
                raise AssertionError(f"rank {rank}:\n{answer}")
            answers[rank] = answer
    return [answers[rank] for rank in range(len(pipes))]


def _rank(
    fn: Callable[..., Any], rank: int, size: int, store: str, pipe: Connection, args: tuple[Any, ...], seconds: float
) -> None:
    # End of file on the pipe: pytest is gone, and so must this process be.
    threading.Thread(target=lambda: (pipe.poll(None), os._exit(1)), daemon=True).start()
    torch.set_num_threads(1)
    # As in a process of its own. A child of a forkserver would start another one for its data workers, which imports it all again.
    multiprocessing.set_start_method("fork", force=True)
    try:
        shared = dist.FileStore(store, size)
        dist.init_process_group("gloo", store=shared, rank=rank, world_size=size, timeout=timedelta(seconds=seconds))
        answer: tuple[bool, Any] = (True, fn(World(rank, rank, size, torch.device("cpu"), shared), *args))
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))
    os._exit(0)  # no exit handlers: peers may hang
