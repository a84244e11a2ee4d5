"""Curricula: a `[[stage]]` table is merged into the settings above it, then checked as a run and against the stage before."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace

from data.records.fields import MAX_NAME
from model.config import PartConfig
from model.files.untrusted import Json, shown
from model.weights.compatibility import LORA_SHAPE
from trainer.config import RunConfig, StageConfig
from trainer.runfile.checks import idle_settings, problems_of
from trainer.runfile.merge_tables import difference, has_key, merge_into, value_of, without_key
from trainer.runfile.schema import SchemaReader, to_tables

NAME = re.compile(r"[a-z0-9_-]+")
RUN_WIDE = (
    *("output_dir", "stage", "checkpoint.resume", "train.deterministic", "faults.grace_seconds"),
    *("log.tensorboard", "log.wandb"),
)
"""Settings of the whole run: a single stage cannot set them."""
FREE = {"tune", "lr", "router_loss", "new_tokens", "prompts", "newline", "class_weights", "loss_weight"}
"""Settings of a part that may change from stage to stage; the meaning of its weights depends on all others."""


@dataclass
class Draft:
    """A stage while its table is read and checked."""

    name: str
    own: Json  # the settings of its own table
    config: RunConfig | None = None
    problems: list[str] = field(default_factory=list)
    idle: dict[str, str] = field(default_factory=dict)  # inherited settings without effect in this stage: key and reason


def read_curriculum(tables: Json, filled: Callable[[RunConfig], RunConfig]) -> tuple[RunConfig | None, list[str]]:
    """Return the run of a file that has `[[stage]]` tables, or None and every problem of every stage, each with the stage in front.

    `filled` fills in the defaults of paired settings.
    """
    base = {key: value for key, value in tables.items() if key != "stage"}
    drafts, problems = _drafts(tables["stage"])
    earlier: list[Draft] = []
    for draft in drafts:
        _read(draft, base, earlier, filled)
        earlier.append(draft)
    problems += _all_problems(drafts)
    configs = [draft.config for draft in drafts if draft.config is not None]
    if problems or len(configs) < len(drafts):
        return None, problems
    whole = [to_tables(config) for config in configs]
    stages = tuple(StageConfig(draft.name, difference(whole[0], own)) for draft, own in zip(drafts, whole))
    return replace(configs[0], stage=stages), []


def _drafts(stages: object) -> tuple[list[Draft], list[str]]:
    """Return the stages with usable names, and one line per problem of the other stages."""
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        return [], [f"stage = {shown(stages)} is not a list of tables: write [[stage]], with a name"]
    drafts: list[Draft] = []
    problems = []
    for number, stage in enumerate(stages, 1):
        name = stage.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            problems.append(
                f"stage {number}: name = {shown(name)} is not made of a-z, 0-9, _ and -: every [[stage]] needs such a name"
            )
        elif len(name) > MAX_NAME:
            problems.append(f"stage {number}: name has {len(name)} characters, more than {MAX_NAME}: it is part of a folder's name")
        elif name in [draft.name for draft in drafts]:
            problems.append(f"stage {number}: name = {name!r} is the name of an earlier stage: their folders would be one")
        else:
            drafts.append(Draft(name, {key: value for key, value in stage.items() if key != "name"}))
    return drafts, problems


def _read(draft: Draft, base: Json, earlier: list[Draft], filled: Callable[[RunConfig], RunConfig]) -> None:
    """Fill in the configuration and the problems of `draft`, given the settings above all stages and the stages before it."""
    for key in RUN_WIDE:
        if has_key(draft.own, key):
            draft.problems.append(f"{key} belongs to the whole run: write it above the first [[stage]]")
    before = earlier[-1].config if earlier else None
    inherited = _inherited_keys(earlier)
    for key in inherited:
        if value_of(draft.own, key):
            draft.problems.append(f"{key} has no effect: the part comes from the stage before it")
    for key in inherited:
        base = without_key(base, key)
    tables = merge_into(base, draft.own)
    if (
        earlier
        and value_of(tables, "model.llm.tune") in (None, "frozen", "lora")
        and not has_key(draft.own, "model.llm.new_tokens")
    ):
        tables = without_key(tables, "model.llm.new_tokens")  # an earlier stage has added and trained them
    while True:
        reader = SchemaReader()
        config = reader.table(RunConfig, tables, "")
        if config is None:
            draft.problems += reader.problems
            return
        idle = {key: line for line in idle_settings(config) if has_key(tables, key := _key(line)) and not has_key(draft.own, key)}
        if not idle:
            break
        # A setting above all stages may be meant for another stage: where it has no effect, it is left out.
        draft.idle |= idle
        for key in idle:
            tables = without_key(tables, key)
    draft.config = config = filled(config)
    from_before = replace(config, model=replace(config.model, init_from="the stage before")) if earlier else config
    draft.problems += problems_of(from_before)
    if before is not None:
        draft.problems += _transition_problems(earlier[-1].name, before, config)


def _key(line: str) -> str:
    return line.split(" ", 1)[0].strip("[]")


def _inherited_keys(earlier: list[Draft]) -> list[str]:
    """Return the keys that name files of weights, for parts whose weights come from an earlier stage."""
    keys = ["model.init_from"] if earlier else []
    configs = [draft.config for draft in earlier if draft.config is not None]
    for name in ("vision_projector", "audio_projector", "state_head"):
        if any(name in config.model.parts() for config in configs):
            keys.append(f"model.{name}.path")
    keys += [f"model.{name}.weights" for name in ("vision", "audio") if any(name in config.model.parts() for config in configs)]
    if any(part.tune == "lora" for config in configs for part in config.model.parts().values()):
        keys.append("lora.path")
    return keys


def _transition_problems(name: str, before: RunConfig, now: RunConfig) -> Iterator[str]:
    """Yield one line per setting under which the weights of the stage `name` before this one could not be used."""
    old, new = before.model.parts(), now.model.parts()
    for part in old.keys() - new.keys():
        yield f"[model.{part}] is missing: stage {name!r} has it, and the weights of all its parts go on"
    for part in sorted(old.keys() & new.keys()):
        yield from _meaning_problems(part, name, old[part], new[part])
    same_lora = all(getattr(before.lora, key) == getattr(now.lora, key) for key in LORA_SHAPE)
    if old["llm"].tune == new["llm"].tune == "lora" and same_lora and before.quantize != now.quantize:
        yield f"quantize = {now.quantize}, but the adapter of stage {name!r}, which goes on, was trained with {before.quantize}"
    for part in sorted(new.keys() - old.keys()):
        if part not in ("llm", "vision", "audio") and new[part].tune != "full" and not getattr(new[part], "path", ""):
            yield f"model.{part}.tune = {new[part].tune!r} without weights: stage {name!r} has no such part, and no path is named"


def _meaning_problems(part: str, name: str, old: PartConfig, new: PartConfig) -> Iterator[str]:
    free = FREE | ({"path"} if part not in ("llm", "vision", "audio") else {"weights"})
    for setting in fields(old):
        then, now = getattr(old, setting.name), getattr(new, setting.name)
        dropped = setting.name in ("prompts", "newline") and then and now != then
        if then != now and (setting.name not in free or dropped):
            yield f"model.{part}.{setting.name} = {now!r}, but stage {name!r} has {then!r}: weights go on only where it is the same"


def _all_problems(drafts: list[Draft]) -> list[str]:
    """Return the problems of all stages; a problem that every stage has is listed once."""
    found: dict[str, list[str]] = {}
    for draft in drafts:
        for line in dict.fromkeys(draft.problems):
            found.setdefault(line, []).append(draft.name)
    for key, line in drafts[0].idle.items() if drafts else ():
        if all(key in draft.idle for draft in drafts):
            found[line] = [draft.name for draft in drafts]
    lines = []
    for line, names in found.items():
        everywhere = len(names) == len(drafts) > 1
        lines += ["every stage: " + line] if everywhere else [f"stage {name}: {line}" for name in names]
    return lines
