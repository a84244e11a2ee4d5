"""Planned token lengths of a run: frozen by rank 0 before step 1, loaded by every rank at every start."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data.check.check_dataset import check_dataset
from data.check.measured_lengths import FROZEN, freeze_lengths, planned_lengths
from data.dataset import MultimodalDataset
from data.index.sidecar import read_arrays
from model.errors import ConfigError
from trainer.config import RunConfig
from trainer.distributed.world import World

SIGN_SECONDS = 60.0


class MainRankProgress:
    """Heartbeats of rank 0 while it works alone, to its own watchdog and to the ranks that `wait`.

    No single collective may take half an hour, and indexing or measuring millions of records can.
    """

    def __init__(self, world: World, on_progress: Callable[[str], object]) -> None:
        self._world, self._on_progress, self._last_sent = world, on_progress, time.monotonic()

    def __call__(self, at: str) -> None:
        """Send a heartbeat. Once in SIGN_SECONDS it is a collective, with one turn of `wait` on the other ranks."""
        self._on_progress(at)
        if time.monotonic() - self._last_sent > SIGN_SECONDS:
            _sum_done(self._world, False)
            self._last_sent = time.monotonic()


def measure_and_freeze(datasets: dict[str, MultimodalDataset], config: RunConfig, folder: Path, signs: MainRankProgress) -> None:
    """Freeze the best lengths there are in `folder`, for the whole life of the run. Runs on rank 0, while the other ranks `wait`.

    Packing needs exact lengths: records that no check has measured yet are measured now, by one process per available CPU.
    """
    index_folder = Path(config.output_dir) / "index"
    if config.data.packing:
        for split, dataset in datasets.items():
            text = f"data.packing: measuring the {len(dataset):,} records of {split}, as python -m tools.check_data would"
            print(text, flush=True)
            check_dataset(dataset, index_folder, workers=available_cpus(), name=f"measure {split}", on_progress=signs)
    freeze_lengths(datasets, folder, index_folder)


def wait_for_main_rank(world: World) -> None:
    """Wait until rank 0 makes the same call; rank 0 sends `MainRankProgress` until then. Collective."""
    while not _sum_done(world, world.is_main):
        pass


def _sum_done(world: World, done: bool) -> bool:
    """Return on every rank whether rank 0 is done. Collective, and a host sync."""
    return bool(world.sum(torch.full((1,), float(done), device=world.device)).item())


def load_lengths(datasets: dict[str, MultimodalDataset], config: RunConfig, folder: Path) -> dict[str, str]:
    """Set the planned lengths of each dataset: those frozen in `folder`, or the best there are.

    Returns by split how good they are: exact, partly exact or estimated. Raises `ConfigError` when the frozen file cannot be read.
    """
    kinds = {}
    if (folder / FROZEN).exists() and read_arrays(folder / FROZEN) is None:
        raise ConfigError(
            f"{folder / FROZEN}, which this run is planned by, is damaged: restore it from a copy, or remove it: the run goes on "
            "if the lengths that are known today are those it began with"
        )
    for split, dataset in datasets.items():
        dataset.lengths, kinds[split] = planned_lengths(dataset, folder, split, Path(config.output_dir) / "index")
    return kinds


def check_same_lengths(datasets: dict[str, MultimodalDataset], world: World) -> None:
    """Raise `ConfigError`, on all ranks alike, unless all ranks plan by the same lengths and modalities. Collective.

    Ranks that split steps by different plans run different numbers of micro-batches and wait for each other for ever. The causes
    are a source that is written while the run starts, or a shared folder that shows one machine an older file than another.
    """
    arrays = [array for dataset in datasets.values() for array in (dataset.lengths, dataset.modalities)]
    digests = world.gather_json([hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() for array in arrays])
    if others := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
        raise ConfigError(
            f"{len(others)} of {world.size} ranks, rank {others[0]} among them, read other records or planned lengths than rank 0: "
            "a source was changed while the run started, or output_dir and data are not the same files on all machines; start again"
        )


def available_cpus() -> int:
    """Return the number of CPUs available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
