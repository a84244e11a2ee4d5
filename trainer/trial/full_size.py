"""The full size of a run on paper: parameters of each part, what of them learns, and memory, from files of JSON alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from model.errors import ConfigError
from model.trainable import PartRow, part_table
from trainer.config import RunConfig
from trainer.distributed.world import World
from trainer.machine.disk_space import format_bytes
from trainer.memory.fit_plan import heaviest_of
from trainer.memory.footprint import on_meta
from trainer.optim import learning_rates
from trainer.records.run_data import RunData, open_data
from trainer.runfile.stages import list_stages, stage_for_reading
from trainer.setup import resolve_config

USUAL_RANKS = 8


def describe_full_size(root: RunConfig, folder: Path, world: World) -> Iterator[str]:
    """Yield a table: a row per part, and a column per stage with what learns at which rate; then the memory of a rank.

    `folder`: for files that reading leaves. No weight and no record is read.
    """
    root = replace(root, output_dir=str(folder), model=replace(root.model, init_from=""))
    opened = {stage.name: _opened(root, stage.name, world) for stage in list_stages(root)}
    columns: dict[str, dict[str, str]] = {}
    sizes: dict[str, int] = {}
    for name, (config, data) in opened.items():
        rates = learning_rates(config.model, config.optim)
        rows = part_table(on_meta(data.card, config.parallel, computes=False), config.model)
        sizes |= {row.part: max(row.num_parameters, sizes.get(row.part, 0)) for row in rows}
        columns[name or "learns"] = {row.part: _cell(row, rates[row.part]) for row in rows}
    widths = {name: max(len(text) for text in (name, *cells.values())) + 2 for name, cells in columns.items()}
    yield f"{'part':<19}{'parameters':>15}" + "".join(f"{name:>{width}}" for name, width in widths.items())
    for part, size in sizes.items():
        yield f"{part:<19}{size:>15,}" + "".join(f"{cells.get(part, '-'):>{widths[name]}}" for name, cells in columns.items())
    for ranks in (1, world.size if world.size > 1 else max(USUAL_RANKS, root.parallel.shard_size)):
        cells = [f"{_memory(config, data, ranks):>{widths[name or 'learns']}}" for name, (config, data) in opened.items()]
        yield f"{'memory of one rank' if ranks == 1 else f'memory, {ranks} ranks':<34}" + "".join(cells)


def _opened(root: RunConfig, name: str, world: World) -> tuple[RunConfig, RunData]:
    """Return a stage as a run of its own without records, and what can be known of its data."""
    stage, alone = stage_for_reading(root, name), World(0, 0, 1, world.device)
    config = replace(stage.config, data=replace(stage.config.data, sources=(), validation=()))
    one = replace(config, parallel=replace(config.parallel, strategy="ddp", shard_size=0))
    config = replace(resolve_config(one, alone), parallel=config.parallel)
    return config, open_data(config, alone, stage=replace(stage, config=config))


def _cell(row: PartRow, rate: float) -> str:
    number = row.num_trainable
    size = f"{number / 1e6:,.1f} M" if number >= 100_000 else f"{number:,}"
    return f"{row.tune} {size}, lr {rate:.3g}" if number else "frozen"


def _memory(config: RunConfig, data: RunData, ranks: int) -> str:
    """Return the memory that each of `ranks` ranks needs in its heaviest micro-batch, samples being data.max_length long."""
    parallel = config.parallel
    if ranks == 1 or (parallel.strategy == "hsdp" and ranks % parallel.shard_size):
        parallel = replace(parallel, strategy="ddp" if ranks == 1 else "fsdp", shard_size=0)
    try:
        scenario, _ = heaviest_of(replace(config, parallel=parallel), data, ranks)
        return format_bytes(scenario.needed().total)
    except ConfigError:
        return "not known"
