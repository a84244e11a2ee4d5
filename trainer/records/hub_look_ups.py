"""Look-ups of hub ids by rank 0, for all ranks: they read the same commit of each, and the hub is asked once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from model.files.hub import HUB_ID, split_revision
from model.files.hub_repository import adopt_look_ups, known_look_ups, look_up
from model.files.untrusted import Json
from trainer.config import RunConfig
from trainer.distributed.main_rank import on_main_rank
from trainer.distributed.world import World


def share_look_ups(configs: Iterable[RunConfig], world: World) -> None:
    """Look up every hub id of a run on rank 0, and give all ranks what was found. Raises its `ConfigError` on all. Collective."""

    def found() -> Json:
        for config in configs:
            for setting, path in hub_ids(config):
                look_up(setting, *split_revision(path), config.model.cache_dir)
        return known_look_ups()

    adopt_look_ups(on_main_rank(world, found))


def hub_ids(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of every setting of a run that names a hub id."""
    named = {"model.init_from": config.model.init_from, "lora.path": config.lora.path}
    named |= {f"model.{name}.path": part.path for name, part in config.model.parts().items()}
    for setting, path in named.items():
        of_a_run = Path(path).name == "final" or Path(path).name.startswith("checkpoint-")  # which a stage is still to write
        if path and not Path(path).exists() and HUB_ID.fullmatch(path) and ".." not in path and not of_a_run:
            yield setting, path
