"""Check of every record of a dataset by several processes, part by part; parts that were checked before are not checked again."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.check.check_record import SHALLOW, Depth, check_records
from data.check.found import PART, Found, collect_results, is_current, join_parts, read_part, write_check_part
from data.check.measured_lengths import Measurement, measurement_path, source_identities, write_measurement
from data.dataset import MultimodalDataset
from data.index.sidecar import safe_name

FOLDER = "check"
_AT = b"at "


@dataclass(frozen=True)
class SourceFound:
    """Results of the check of one source."""

    source_id: int
    found: Found
    num_parts: int
    num_cached: int  # number of parts that an earlier check had done

    def measurement(self) -> Measurement:
        """Return the measurement by which runs plan."""
        return Measurement(self.found["lengths"], np.unique([row for row, problem in self.found.problems if problem.is_bad]))


@dataclass(frozen=True)
class Part:
    """Consecutive records of one source, which are checked together."""

    source_id: int
    start: int  # sample ids
    stop: int
    path: Path  # file of the results


def check_dataset(
    dataset: MultimodalDataset,
    index_folder: Path,
    *,
    depth: Depth = SHALLOW,
    workers: int = 1,
    name: str = "check",
    on_progress: Callable[[str], object] = lambda at: None,
) -> list[SourceFound]:
    """Check every record of `dataset`: find everything that is wrong with any of them, and what the sources hold.

    Results are written to `index_folder` as soon as a part is done, lengths as soon as a source is done: a check that was stopped
    continues where it was. `workers` processes share the work; the result does not depend on their number. `on_progress` is called
    now and then with the record that one of them is at. Raises `RuntimeError` if a process dies.
    """
    names = source_identities(dataset)
    parts = [part for source_id, name in enumerate(names) for part in parts_of(dataset, source_id, index_folder, name)]
    cached = np.zeros(len(parts), dtype=bool)
    with tqdm(total=len(dataset), desc=name, unit="record", unit_scale=True, delay=1, dynamic_ncols=True) as bar:
        for place, was_cached in _work(parts, lambda part, tell: check_part(dataset, part, depth, tell), workers, on_progress):
            cached[place] = was_cached
            bar.update(parts[place].stop - parts[place].start)
            on_progress(dataset.where(parts[place].start))
    results = []
    for source_id, (source, identity) in enumerate(zip(dataset.sources, names)):
        own = [place for place, part in enumerate(parts) if part.source_id == source_id]
        found = [_read(parts[place].path) for place in own]
        whole = join_parts(found, [parts[place].stop - parts[place].start for place in own])
        results.append(SourceFound(source_id, whole, len(own), int(cached[own].sum())))
        write_measurement(index_folder, source.key, identity, results[-1].measurement())
    return results


def parts_of(dataset: MultimodalDataset, source_id: int, index_folder: Path, identity: str) -> list[Part]:
    """Return the parts of one source, in order."""
    first = int(np.searchsorted(dataset.source_ids, source_id))
    end = first + len(dataset.indexes[source_id])
    folder = index_folder / FOLDER / f"{safe_name(dataset.sources[source_id].key)}-{identity}"
    return [
        Part(source_id, start, min(start + PART, end), folder / f"{start - first:09d}.npz") for start in range(first, end, PART)
    ]


def check_part(
    dataset: MultimodalDataset, part: Part, depth: Depth, on_progress: Callable[[str], object] = lambda at: None
) -> bool:
    """Check the records of `part` and write the results. Return whether they were there already.

    `on_progress` is called with the place of the record that is next.
    """
    known = read_part(part.path, decode=depth.decode, near=depth.near)
    if known is not None and is_current(known):
        return True

    def told() -> Iterator[int]:
        for i in range(part.start, part.stop):
            on_progress(dataset.where(i))
            yield i

    checked = [*check_records(dataset, told(), depth, on_progress)]
    write_check_part(part.path, collect_results(checked), decode=depth.decode, near=depth.near)
    return False


def remove_stale(index_folder: Path, datasets: Sequence[MultimodalDataset]) -> None:
    """Remove the results for sources, files or settings that are no longer those of the run."""
    current = {
        (safe_name(source.key), identity)
        for dataset in datasets
        for source, identity in zip(dataset.sources, source_identities(dataset))
    }
    keep = {f"{key}-{identity}" for key, identity in current}
    for folder in (index_folder / FOLDER).glob("*"):
        if folder.name not in keep:
            shutil.rmtree(folder)
    for path in index_folder.glob("exact-*.npz"):
        if path not in {measurement_path(index_folder, key, identity) for key, identity in current}:
            path.unlink()


def _read(path: Path) -> Found:
    found = read_part(path)
    if found is None:
        raise RuntimeError(f"{path} was written and cannot be read; remove it and start again")
    return replace(found, files=found.missing)  # frees the others before the next part is read


_OnProgress = Callable[[str], object]


def _work(
    parts: Sequence[Part], work: Callable[[Part, _OnProgress], bool], workers: int, on_progress: _OnProgress
) -> Iterator[tuple[int, bool]]:
    """Run work(part, alive) for all parts; yield (place of the part, result) as they are done, in any order."""
    workers = min(workers, len(parts) // 2)  # a process is not worth starting for less
    if workers < 2:
        yield from ((place, work(part, on_progress)) for place, part in enumerate(parts))
        return
    context = multiprocessing.get_context("fork")  # the dataset is shared, never copied
    counter, lock, parent = context.RawValue("q", 0), context.Lock(), os.getpid()

    def run(pipe: Connection) -> None:
        _prepare()
        while True:
            with lock:
                place = counter.value
                counter.value = place + 1
            if place >= len(parts) or os.getppid() != parent:
                pipe.send_bytes(b"done")
                return
            try:
                answer = b"%d %d" % (place, work(parts[place], _sender(pipe)))
            except OSError as error:  # nothing can be written: the parent says so
                answer = b"failed %d" % (error.errno or 0)
            pipe.send_bytes(answer)

    pipes, processes = [], []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=run, args=(theirs,), daemon=True)
            process.start()
            theirs.close()  # otherwise the end of the child would never be seen here
            pipes.append(ours)
            processes.append(process)
        yield from _answers(pipes, on_progress)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _sender(pipe: Connection) -> _OnProgress:
    """Return a function that sends this process's position to its parent, once a second at most."""
    last_sent = 0.0

    def send(at: str) -> None:
        nonlocal last_sent
        if time.monotonic() - last_sent > 1.0:
            last_sent = time.monotonic()
            pipe.send_bytes(_AT + at.encode("utf-8", "backslashreplace"))

    return send


def _answers(pipes: list[Connection], on_progress: _OnProgress) -> Iterator[tuple[int, bool]]:
    """Yield the results that workers send, until all are done; pass their positions on to `on_progress`."""
    working = list(pipes)
    while working:
        for pipe in wait(working):
            try:
                assert isinstance(pipe, Connection)
                answer = pipe.recv_bytes()
            except EOFError:
                raise RuntimeError(
                    "a process of the check died, perhaps for want of memory; start again with fewer workers"
                ) from None
            if answer == b"done":
                working.remove(pipe)
                continue
            if answer.startswith(_AT):
                on_progress(answer.removeprefix(_AT).decode())
                continue
            if answer.startswith(b"failed"):
                code = int(answer.split()[1])
                raise OSError(code, f"what the check found cannot be written: {os.strerror(code)}")
            place, was_cached = map(int, answer.split())
            yield place, bool(was_cached)


def _prepare() -> None:
    """Set up a worker with one thread, which ignores SIGINT: a stop request reaches the parent, and the parent ends the workers."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
