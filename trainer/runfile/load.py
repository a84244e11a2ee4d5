"""Loading of run files: read the tables, apply overrides, check the whole and fill in defaults, which gives a RunConfig."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

from model.errors import ConfigError
from model.files.untrusted import Json
from trainer.config import RunConfig
from trainer.runfile.catalog import with_catalog
from trainer.runfile.checks import problems_of
from trainer.runfile.curriculum import read_curriculum
from trainer.runfile.overrides import apply_overrides, with_override, without_idle
from trainer.runfile.published import resolve_published, with_revisions
from trainer.runfile.schema import SchemaReader
from trainer.runfile.toml_files import read_toml


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run that a TOML file and `section.key=value` overrides describe, defaults filled in. Raises `ConfigError`."""
    return load_run(path, overrides)[0]


def load_run(
    path: str, overrides: Sequence[str] = (), changed: Callable[[Json], Json] = lambda tables: tables
) -> tuple[RunConfig, list[str]]:
    """Return the run as `load_config` does, and one line per setting of the file that the overrides set aside.

    `changed` is called with tables before they are read, and returns those to read.
    """
    alone = read_toml(path)
    tables, notes = apply_overrides(copy.deepcopy(alone), overrides)
    tables, alone = changed(tables), changed(alone)
    tables, idle = without_idle(tables, overrides, lambda some: checked(some, path)[1], alone)
    return parse_config(tables, path, overrides), [*notes, *idle]


def parse_config(tables: Json, origin: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the RunConfig of plain tables. Raises one `ConfigError` with every problem, `origin` in front.

    A problem that is about one of the `overrides`, which are applied already, names it; if all are, `origin` is not named.
    """
    config, problems = checked(tables, origin)
    if config is None or problems:
        lines = [with_override(line, overrides) for line in problems]
        if len(lines) == 1 and lines != problems:
            raise ConfigError(lines[0])
        of_file = any(line == problem for line, problem in zip(lines, problems))
        raise ConfigError(f"{origin if of_file else 'command line'}:\n" + "\n".join(f"  - {line}" for line in lines))
    return config


def checked(tables: Json, origin: str) -> tuple[RunConfig | None, list[str]]:
    """Return the run of plain tables and all its problems; the run may be None where there are some.

    Raises `ConfigError`, `origin` in front, where its catalogue or the model that it starts from cannot be read.
    """
    try:
        tables, unnamed = with_catalog(tables)
        tables, contradictions = resolve_published(with_revisions(tables))
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
    config, problems = read_curriculum(tables, with_defaults) if tables.get("stage") else read_run(tables)
    return config, [*unnamed, *contradictions, *problems]


def read_run(tables: Json) -> tuple[RunConfig | None, list[str]]:
    """Return the run of a file without stages, and its problems; the run is None where the tables do not fit the schema."""
    reader = SchemaReader()
    config = reader.table(RunConfig, {key: value for key, value in tables.items() if (key, value) != ("stage", [])}, "")
    if config is None:
        return None, reader.problems
    return with_defaults(config), problems_of(config)


def with_defaults(config: RunConfig) -> RunConfig:
    """Fill in the defaults of paired settings, of which a run may name only one."""
    train, optim = config.train, config.optim
    if train.epochs is None and train.max_steps is None:
        train = replace(train, epochs=1.0)
    if optim.warmup_ratio is None and optim.warmup_steps is None:
        optim = replace(optim, warmup_ratio=0.03)
    if optim.schedule == "wsd" and optim.decay_ratio is None and optim.decay_steps is None:
        optim = replace(optim, decay_ratio=0.1)
    return replace(config, train=train, optim=optim)
