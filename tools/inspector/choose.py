"""The selection of records of a run that the inspector shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data.config import SourceConfig
from data.dataset import MultimodalDataset
from data.order.mixing import Pool
from model.errors import ConfigError
from model.media_spec import PLACEHOLDERS
from tools.inspector.entry import InspectorEntry, entry_of
from tools.inspector.wanted import Wanted
from trainer.config import RunConfig
from trainer.distributed.world import World
from trainer.records.quarantine import TRAIN, VALIDATION, QuarantineRow, read_rows
from trainer.records.run_data import open_data
from trainer.records.sample_log import read_step
from trainer.runfile.load import load_config
from trainer.runfile.stages import Stage, stage_for_reading

KIND_BITS = {kind: 1 << n for n, kind in enumerate(PLACEHOLDERS)}
"""Bits of `MultimodalDataset.modalities` by kind."""
SPLITS = {"sources": TRAIN, "validation": VALIDATION}
"""The split of quarantine.jsonl by the table of run.toml."""


@dataclass(frozen=True)
class Opened:
    """The data of a run. No weight is read, nothing is certified."""

    place: Stage
    datasets: dict[str, MultimodalDataset]  # by the table of run.toml that names them
    pools: dict[str, tuple[Pool, ...]]  # by table: the records of each source that the run uses
    quarantined: dict[str, dict[int, QuarantineRow]]  # rows of quarantine.jsonl by table and sample
    lengths_kind: str  # exact | estimated

    @property
    def config(self) -> RunConfig:
        return self.place.config


@dataclass(frozen=True)
class Source:
    """One source of a run and the samples of it that are shown."""

    opened: Opened
    table: str
    source_id: int
    chosen: tuple[int, ...]  # sample ids

    @property
    def dataset(self) -> MultimodalDataset:
        return self.opened.datasets[self.table]

    @property
    def config(self) -> SourceConfig:
        return self.dataset.sources[self.source_id]

    @property
    def pool(self) -> Pool:
        return self.opened.pools[self.table][self.source_id]

    @property
    def kinds(self) -> dict[str, int]:
        """Count the used records that hold each kind of medium; kinds that no record holds are absent."""
        held = self.dataset.modalities[self.pool.ids]
        counts = {kind: int(((held & bit) > 0).sum()) for kind, bit in KIND_BITS.items()}
        return {kind: count for kind, count in counts.items() if count}

    @property
    def part(self) -> str:
        """Describe how much of the source the run uses; "" if it uses all of it once per epoch."""
        notes = []
        if len(self.pool.ids) < self.pool.size:
            notes.append(f"{len(self.pool.ids):,} of them take part (take = {self.config.take!r})")
        if self.pool.places != len(self.pool.ids):
            notes.append(f"{self.pool.places:,} are drawn each epoch (weight = {self.config.weight:g})")
        return ", ".join(notes)

    def entries(self) -> Iterator[InspectorEntry]:
        """Yield the entries one at a time: the media of a sample take memory."""
        rows = self.opened.quarantined[self.table]
        return (entry_of(self.dataset, i, rows) for i in self.chosen)


def stage_to_inspect(cfg: str | None, run: str | None, overrides: list[str], stage: str = "") -> Stage:
    """Return a run or one stage of it, by its run file or by its folder, even if the folder was moved."""
    if (cfg is None) == (run is None):
        raise ConfigError("name a run file with --cfg, or a run's folder with --run: one of them")
    if cfg is not None:
        return stage_for_reading(load_config(cfg, overrides), stage)
    return stage_for_reading(replace(load_config(str(Path(str(run)) / "run.toml"), overrides), output_dir=str(run)), stage)


def open_sources(stage: Stage) -> Opened:
    """Open the data of a run; indexes are written where the run itself looks for them."""
    # Bad records are shown as such, whatever the run does about them.
    config = replace(stage.config, data=replace(stage.config.data, on_bad_sample="quarantine"))
    data = open_data(config, World(0, 0, 1, torch.device("cpu")), stage=stage)
    tables = {"sources": data.train, "validation": data.validation}
    rows = read_rows(stage.run_folder, stage.name)
    found = {table: {row["sample_id"]: row for row in rows if row["split"] == split} for table, split in SPLITS.items()}
    datasets = {table: dataset for table, dataset in tables.items() if dataset is not None}
    pools = {"sources": data.pools, "validation": data.validation_pools}
    return Opened(stage, datasets, pools, found, data.lengths_kind)


def choose_samples(opened: Opened, wanted: Wanted) -> list[Source]:
    """Return every selected source with its samples. Raises ConfigError for a missing source, quarantine or step."""
    names = [source.key for dataset in opened.datasets.values() for source in dataset.sources]
    if wanted.source and wanted.source not in names:
        raise ConfigError(f"--source {wanted.source!r} is none of the run's: {', '.join(dict.fromkeys(names))}")
    if wanted.quarantined and not any(opened.quarantined.values()):
        raise ConfigError(f"--quarantined: {opened.config.output_dir!r} holds no quarantine.jsonl with records in it")
    step = None if wanted.step is None else read_step(opened.place.folder, wanted.step)
    return [
        Source(opened, table, i, tuple(_chosen(opened, table, i, wanted, step).tolist()))
        for table, dataset in opened.datasets.items()
        for i, source in enumerate(dataset.sources)
        if wanted.source in ("", source.key) and (step is None or table == "sources")
    ]


def _chosen(opened: Opened, table: str, source_id: int, wanted: Wanted, step: np.ndarray | None) -> np.ndarray:
    dataset = opened.datasets[table]
    ids = opened.pools[table][source_id].ids if step is None else step[dataset.source_ids[step] == source_id]
    if wanted.kind:
        bits = dataset.modalities[ids]
        ids = ids[bits == 0 if wanted.kind == "text" else (bits & KIND_BITS[wanted.kind]) > 0]
    if wanted.quarantined:
        ids = ids[np.isin(ids, list(opened.quarantined[table]))]
    num = len(ids) if wanted.num is None else min(wanted.num, len(ids))
    if wanted.longest:
        return ids[np.argsort(-dataset.lengths[ids], kind="stable")][:num]
    return ids[np.arange(num) * len(ids) // max(num, 1)] if wanted.spread else ids[:num]
