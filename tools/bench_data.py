"""Measure opening a large file of records, reading it from workers and planning an epoch, beside `json.load` and a list.

Memory is the kernel's own count (smaps_rollup: Private_Dirty) of the pages that a forked worker has written and shares with nobody.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from data.config import SourceConfig
from data.index.record_index import RecordIndex
from data.loader import prepare_worker
from data.order.sampler import Sampler
from data.records.record import parse
from model.files.untrusted import Json
from model.media_spec import ImageSpec
from tools.cli import command_parser

SPEC = ImageSpec(336, 14, 1, "patch", "shortest_edge", (0.5,) * 3, (0.5,) * 3)
PARTS = ("index", "memory", "plan")
WORKERS, READS = 4, 20_000
_WORDS = (
    *("the", "a", "cat", "on", "mat", "with", "red", "blue", "green", "picture", "shows", "left", "right", "person", "it's"),
    *("holding", "standing", "near", "table", "which", "one", "two"),
)
_HINT = "\nAnswer the question using a single word or phrase."
_ANSWER_WORDS = (2, 8, 20, 75, 130)


def make_file(path: Path, num_records: int) -> None:
    """Write a JSON array in the manner of LLaVA's 665k mix: 94 % with a picture, one to five rounds, 1.2 kB each on average."""
    draw = random.Random(665)
    made = [json.dumps(_record(draw)) for _ in range(3000)]
    with path.open("w") as file:
        for i in range(num_records):
            file.write(("[\n" if i == 0 else ",\n") + made[i % len(made)].replace("ID", f"{i:012}"))
        file.write("\n]\n")


def _record(draw: random.Random) -> Json:
    has_image = draw.random() < 0.94
    turns = []
    for k in range(draw.choice((1, 1, 2, 3, 4, 5))):
        question = _text(draw, draw.randint(6, 20)) + "?" + (_HINT if draw.random() < 0.3 else "")
        turns.append({"from": "human", "value": ("<image>\n" if has_image and k == 0 else "") + question})
        turns.append({"from": "gpt", "value": _text(draw, draw.choice(_ANSWER_WORDS)) + "."})
    return {"id": "ID", **({"image": "coco/train2017/ID.jpg"} if has_image else {}), "conversations": turns}


def _text(draw: random.Random, num_words: int) -> str:
    words = draw.choices(_WORDS, k=num_words)
    if draw.random() < 0.05:
        words[0] = '"quoted"'
    if draw.random() < 0.03:
        words[-1] = "café"
    return " ".join(words)


def seconds(action: Callable[[], object], repeats: int = 1) -> float:
    """Time `action`: return its wall time, the median of `repeats`."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def kernel_mib(key: str) -> float:
    """Return a memory count of the kernel for this process, in MiB: Private_Dirty, Rss ..."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) / 1024


def worker_mib(read: Callable[[int], object], num_records: int, prepare: Callable[[int], object]) -> tuple[float, float]:
    """Return the MiB that a forked process has for itself before and after reading `READS` records at random.

    Both numbers are means over `WORKERS` processes.
    """
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def work(seed: int) -> None:
        prepare(seed)
        before = kernel_mib("Private_Dirty")
        for i in np.random.default_rng(seed).integers(num_records, size=READS).tolist():
            read(i)
        results.put((before, kernel_mib("Private_Dirty")))

    workers = [context.Process(target=work, args=(seed,)) for seed in range(WORKERS)]
    for worker in workers:
        worker.start()
    found = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    before, after = np.mean(found, axis=0)
    return float(before), float(after)


@contextmanager
def in_a_process_of_its_own() -> Iterator[Callable[[Callable[[], list[str]]], list[str]]]:
    """Provide a function that runs an action in a fork, so that its memory is freed afterwards."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def run(action: Callable[[], list[str]]) -> list[str]:
        process = context.Process(target=lambda: results.put(action()))
        process.start()
        found = results.get()
        process.join()
        return found

    yield run


def open_index(path: Path, folder: Path) -> RecordIndex:
    return RecordIndex.open(SourceConfig(str(path)), folder, {"image": SPEC})


def index_lines(path: Path, folder: Path) -> list[str]:
    """Measure cold and warm opening, and reading."""
    path.read_bytes()  # warms the page cache for all measurements
    cold = seconds(lambda: open_index(path, folder))
    warm = seconds(lambda: open_index(path, folder), 9)
    index = open_index(path, folder)
    ids = np.random.default_rng(0).integers(len(index), size=READS).tolist()
    reading = seconds(lambda: [index.raw(i) for i in ids])
    sidecar = sum(file.stat().st_size for file in folder.iterdir())
    return [
        f"{len(index)} records, {path.stat().st_size / 1e6:.0f} MB; sidecar {sidecar / 1e6:.1f} MB",
        f"index, first opening: {cold:.2f} s",
        f"index, every later one: {warm * 1000:.0f} ms",
        f"index, reading at random: {READS / reading:.0f} records per second",
    ]


def index_memory(path: Path, folder: Path) -> list[str]:
    index = open_index(path, folder)
    before, after = worker_mib(lambda i: parse(index.raw(i), index.where(i)), len(index), prepare_worker)
    part = f"{after:.1f} MiB after reading {READS} records, {before:.1f} before"
    return [f"index: the parent has {kernel_mib('Rss'):.0f} MiB, a worker for itself {part}"]


def list_memory(path: Path) -> list[str]:
    start = time.perf_counter()
    with path.open() as file:
        rows = json.load(file)
    loading = time.perf_counter() - start
    before, after = worker_mib(lambda i: parse(rows[i], "x:1"), len(rows), lambda seed: None)
    part = f"{after:.1f} MiB after reading {READS} records, {before:.1f} before"
    return [f"json.load and a list, {loading:.1f} s: the parent has {kernel_mib('Rss'):.0f} MiB, a worker for itself {part}"]


def plan_lines(num_records: int = 10_000_000) -> list[str]:
    """Measure the planning of an epoch of `num_records` with a spread of lengths, 94 % of them with a picture."""
    draw = np.random.default_rng(0)
    lengths = np.minimum(577 + np.exp(draw.normal(5.2, 0.52, num_records)), 2048).astype(np.int32)
    modalities = (draw.random(num_records) < 0.94).astype(np.int8)
    found = [seconds(partial(Sampler(lengths, modalities, 128, 0, "modality_length").epoch, e)) for e in range(3)]
    return [f"plan of an epoch of {num_records} records: {min(found):.2f} s (largest of {len(found)}: {max(found):.2f} s)"]


def main() -> None:
    parser = command_parser("bench_data", __doc__)
    parser.add_argument("--records", type=int, default=665_000)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS)
    options = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name, in_a_process_of_its_own() as run:
        path, folder = Path(name, "mix.json"), Path(name, "index")
        if {"index", "memory"} & set(options.part):
            make_file(path, options.records)
        if "index" in options.part:
            print("\n".join(run(lambda: index_lines(path, folder))))
        if "memory" in options.part:
            print("\n".join(run(lambda: index_memory(path, folder))))
            print("\n".join(run(lambda: list_memory(path))))
    if "plan" in options.part:
        print("\n".join(plan_lines()))


if __name__ == "__main__":
    main()
