"""A curriculum: where each stage of a run stands, what it starts from and where it writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.config import ConfigError
from trainer.config import RunConfig
from trainer.curriculum import stage_tables
from trainer.schema import Reader, to_tables


@dataclass(frozen=True)
class Place:
    """One stage of a run. A run without a curriculum is a single stage without a name, whose folder is the run's."""

    root: RunConfig  # the run
    config: RunConfig  # the stage as a run of its own, in the run's folder
    name: str = ""
    number: int = 1  # from 1
    count: int = 1
    first_step: int = 0  # completed steps of the run when the stage begins

    @property
    def run_folder(self) -> Path:
        return Path(self.root.output_dir)

    @property
    def folder(self) -> Path:
        """Of final/, planned lengths, samples.bin and ledger.json: what belongs to this stage alone."""
        return stage_folder(self.run_folder, self.number, self.name) if self.name else self.run_folder

    @property
    def is_last(self) -> bool:
        return self.number == self.count

    def __str__(self) -> str:
        return f"stage {self.number} of {self.count}, {self.name!r}"


def stage_folder(run_folder: Path, number: int, name: str) -> Path:
    return run_folder / "stages" / f"{number:02d}-{name}"


def places_of(root: RunConfig) -> list[Place]:
    """The stages of a run in order; every one but the first starts from the final/ of the one before."""
    if not root.stage:
        return [Place(root, root)]
    found: list[Place] = []
    for number, (name, tables) in enumerate(stage_tables(to_tables(root)).items(), 1):
        config: RunConfig = Reader({}).table(RunConfig, tables, "")
        if found:
            config = replace(config, model=replace(config.model, init_from=str(found[-1].folder / "final")))
        found.append(Place(root, config, name, number, len(root.stage)))
    return found


def outline(places: list[Place]) -> list[str]:
    """One line per stage, for people; nothing without a curriculum."""
    lines = []
    for place in places:
        if place.name:
            train, tunes = place.config.train, {name: part.tune for name, part in place.config.model.parts().items()}
            learns = ", ".join(f"{name} {tune}" for name, tune in tunes.items() if tune != "frozen") or "nothing"
            length = f"{train.epochs:g} epochs" if train.max_steps is None else f"{train.max_steps} steps"
            lines.append(f"stage     {place.number} of {place.count}: {place.name}, {length}, learns {learns}")
    return lines


def resume_place(places: list[Place], state: dict[str, Any]) -> Place:
    """The stage a checkpoint was written in."""
    name = state.get("stage", "")
    for place in places:
        if place.name == name:
            return replace(place, first_step=state.get("first_step", 0))
    known = ", ".join(repr(place.name) for place in places if place.name) or "none"
    raise ConfigError(
        f"the checkpoint is of stage {name!r}, and this run's stages are {known}: use its run file, or another output_dir"
    )
