"""By what lengths a run is planned: settled by rank 0 before step 1, read by every rank at every start."""

from __future__ import annotations

import os
from pathlib import Path

from data.check_run import check_dataset
from data.dataset import MultimodalDataset
from data.lengths import freeze_lengths, planned_lengths
from trainer.config import RunConfig


def settle(datasets: dict[str, MultimodalDataset], config: RunConfig, folder: Path) -> None:
    """Freezes the best lengths there are for the whole life of the run. Packing needs exact ones: what no check has measured yet is
    measured now, by as many processes as the machine has processors, while the other ranks wait. They are kept in `folder`.
    """
    index_folder = Path(config.output_dir) / "index"
    if config.data.packing:
        for split, dataset in datasets.items():
            print(
                f"data.packing: measuring the {len(dataset):,} records of {split}, as python -m tools.check_data would", flush=True
            )
            check_dataset(dataset, index_folder, workers=processors(), name=f"measure {split}")
    freeze_lengths(datasets, folder, index_folder)


def use(datasets: dict[str, MultimodalDataset], config: RunConfig, folder: Path) -> dict[str, str]:
    """Lets each dataset plan by the lengths frozen in `folder`, or the best there are; whether they are exact, by split."""
    kinds = {}
    for split, dataset in datasets.items():
        dataset.lengths, kinds[split] = planned_lengths(dataset, folder, split, Path(config.output_dir) / "index")
    return kinds


def processors() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
