"""Stages of a run: the place of each stage in the run, what the stage starts from and where it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from data.index.record_index import source_files
from model.card import media_specs
from model.errors import ConfigError
from trainer.config import RunConfig
from trainer.runfile.merge_tables import stage_tables
from trainer.runfile.part_checks import check_fit
from trainer.runfile.schema import SchemaReader, to_tables
from trainer.state import CheckpointState


@dataclass(frozen=True)
class Stage:
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
        """Return the folder of the files of this stage alone: final/, planned lengths, samples.bin and ledger.json."""
        return self.run_folder / "stages" / f"{self.number:02d}-{self.name}" if self.name else self.run_folder

    @property
    def is_last(self) -> bool:
        return self.number == self.count

    def __str__(self) -> str:
        return f"stage {self.number} of {self.count}, {self.name!r}"


def list_stages(root: RunConfig) -> list[Stage]:
    """Return the stages of a run in order; every stage but the first starts from the final/ of the stage before."""
    if not root.stage:
        return [Stage(root, root)]
    found: list[Stage] = []
    for number, (name, tables) in enumerate(stage_tables(to_tables(root)).items(), 1):
        config: RunConfig = SchemaReader().table(RunConfig, tables, "")
        if found:
            config = replace(config, model=replace(config.model, init_from=str(found[-1].folder / "final")))
        found.append(Stage(root, config, name, number, len(root.stage)))
    return found


def stage_for_reading(root: RunConfig, name: str) -> Stage:
    """Return the stage `name` for callers that only read its data, also when the stages before it have not run.

    Without the final/ of the stage before, the tokens that earlier stages add are taken from the run file. Raises `ConfigError`
    when the run has no such stage, or when it has stages and none is named.
    """
    stages = {stage.name: stage for stage in list_stages(root)}
    if name not in stages:
        known = ", ".join(repr(known) for known in stages if known)
        raise ConfigError(
            f"--stage {name!r}: " + (f"the run's stages are {known}: name one of them" if known else "the run has no [[stage]]")
        )
    stage = stages[name]
    if stage.number == 1 or Path(stage.config.model.init_from).is_dir():
        return stage
    # The stage before has not run, so its card does not exist: take the added tokens from the run file.
    earlier = list(stages.values())[: stage.number]
    tokens = tuple(dict.fromkeys(token for one in earlier for token in one.config.model.llm.new_tokens))
    model = stage.config.model
    model = replace(model, init_from=root.model.init_from, llm=replace(model.llm, new_tokens=tokens))
    return replace(stage, config=replace(stage.config, model=model))


def describe_stages(stages: list[Stage]) -> list[str]:
    """Describe every stage in one line, for people; return an empty list without a curriculum."""
    lines = []
    for stage in stages:
        if stage.name:
            train, tunes = stage.config.train, {name: part.tune for name, part in stage.config.model.parts().items()}
            learns = ", ".join(f"{name} {tune}" for name, tune in tunes.items() if tune != "frozen") or "nothing"
            length = f"{train.epochs:g} epoch(s)" if train.max_steps is None else f"{train.max_steps} step(s)"
            lines.append(f"stage     {stage.number} of {stage.count}: {stage.name}, {length}, learns {learns}")
    return lines


def stage_of_checkpoint(stages: list[Stage], state: CheckpointState) -> Stage:
    """Return the stage that a checkpoint with this `state` was written in. Raises `ConfigError` when the run has no such stage."""
    name = state.get("stage", "")
    for stage in stages:
        if stage.name == name:
            return replace(stage, first_step=state.get("first_step", 0))
    known = ", ".join(repr(stage.name) for stage in stages if stage.name) or "none"
    raise ConfigError(
        f"the checkpoint is of stage {name!r}, and this run's stages are {known}: use its run file, or another output_dir"
    )


def check_stages(stages: list[Stage]) -> None:
    """Check that the parts and sources of every stage exist, as far as names and JSON tell, before the first stage trains for days.

    A run of a single stage is not checked here: it finds out when it opens them. Raises one `ConfigError` for all stages.
    """
    problems = []
    for stage in stages if len(stages) > 1 else ():
        config = stage.config
        checks: list[Callable[[], object]] = [partial(lambda c: check_fit(c.data, media_specs(c.model)), config)]
        checks += [partial(source_files, source) for source in (*config.data.sources, *config.data.validation)]
        for check in checks:
            try:
                check()
            except ConfigError as error:
                problems.append(f"\n  - stage {stage.name}: {error}")
    if problems:
        raise ConfigError("what later stages need is not there:" + "".join(dict.fromkeys(problems)))
