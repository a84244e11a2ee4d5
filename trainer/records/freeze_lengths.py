"""By what lengths a run is planned: settled by rank 0 before step 1, read by every rank at every start."""

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


class Signs:
    """Signs of life of rank 0, to its own watch and to the ranks that `wait`: no single collective may take half an hour, and to
    index or measure millions of records can.
    """

    def __init__(self, world: World, alive: Callable[[str], object]) -> None:
        self._world, self._alive, self._told = world, alive, time.monotonic()

    def __call__(self, at: str) -> None:
        """Collective with a turn of `wait` once in SIGN_SECONDS."""
        self._alive(at)
        if time.monotonic() - self._told > SIGN_SECONDS:
            _tell(self._world, False)
            self._told = time.monotonic()


def settle(datasets: dict[str, MultimodalDataset], config: RunConfig, folder: Path, signs: Signs) -> None:
    """Freezes the best lengths there are for the whole life of the run. Packing needs exact ones: what no check has measured yet is
    measured now, by as many processes as the machine has processors. On rank 0, while the others `wait`. They are kept in `folder`.
    """
    index_folder = Path(config.output_dir) / "index"
    if config.data.packing:
        for split, dataset in datasets.items():
            print(
                f"data.packing: measuring the {len(dataset):,} records of {split}, as python -m tools.check_data would", flush=True
            )
            check_dataset(dataset, index_folder, workers=processors(), name=f"measure {split}", alive=signs)
    freeze_lengths(datasets, folder, index_folder)


def wait(world: World) -> None:
    """Until rank 0 is at the same place; it gives `Signs` on the way. Collective."""
    while not _tell(world, world.is_main):
        pass


def _tell(world: World, done: bool) -> bool:
    """Whether rank 0 says that it is done. Collective, and a host sync."""
    return bool(world.sum(torch.full((1,), float(done), device=world.device)).item())


def use(datasets: dict[str, MultimodalDataset], config: RunConfig, folder: Path) -> dict[str, str]:
    """Lets each dataset plan by the lengths frozen in `folder`, or the best there are; whether they are exact, by split.

    ConfigError when what was frozen cannot be read.
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


def agree(datasets: dict[str, MultimodalDataset], world: World) -> None:
    """ConfigError, on all ranks alike, unless all of them plan by the same lengths. Collective.

    Ranks that share out steps by different plans run different numbers of micro-batches and wait for each other for ever. It takes
    a source that is written while the run starts, or a shared folder that shows one machine an older file than another.
    """
    arrays = [array for dataset in datasets.values() for array in (dataset.lengths, dataset.modalities)]
    digests = world.gather_json([hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() for array in arrays])
    if others := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
        raise ConfigError(
            f"{len(others)} of {world.size} ranks, rank {others[0]} among them, read other records or planned lengths than rank 0: "
            "a source was changed while the run started, or output_dir and data are not the same files on all machines; start again"
        )


def processors() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
