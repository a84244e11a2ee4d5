"""Checks of the data of stages that have not begun, made before the first stage trains for days."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from model.errors import ConfigError, DataError
from trainer.config import RunConfig
from trainer.distributed.world import World
from trainer.records.quick_check import quick_check
from trainer.records.run_data import certify_all, open_data
from trainer.runfile.stages import Stage, stage_for_reading
from trainer.setup import resolve_config


def check_later_stages(
    root: RunConfig, stages: Sequence[Stage], world: World, on_progress: Callable[[str], object]
) -> Iterator[str]:
    """Open, certify and check the data of each stage as the start of the stage will; no weight is read. Yields lines for people.

    `on_progress` is called now and then with what is being read: hours of it are no stall. Tokens that earlier stages add are known
    from the run file. Indexes that are built here are reused when the stage begins. Raises `ConfigError` or `DataError` with the
    stage's name. Collective.
    """
    for stage in stages:
        early = stage_for_reading(root, stage.name)  # without the final/ that the stage starts from, which does not exist yet
        early = replace(early, config=resolve_config(early.config, world))
        try:
            data = open_data(early.config, world, stage=early, on_progress=on_progress)
            certify_all(data, stage.config, on_progress)
            found = quick_check(data, stage.config, world, on_progress)
        except (ConfigError, DataError) as error:
            kind = ConfigError if isinstance(error, ConfigError) else DataError
            raise kind(f"stage {stage.name}: {error}") from error
        yield from (f"later     {stage.name}: {line}" for line in found)
