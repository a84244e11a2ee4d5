"""Loading of run files: read the tables, apply overrides, check the whole and fill in defaults, which gives a RunConfig."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from model.errors import ConfigError
from model.files.untrusted import Json, shown
from trainer.config import RunConfig
from trainer.runfile.checks import problems_of
from trainer.runfile.curriculum import read_curriculum
from trainer.runfile.published import resolve_published
from trainer.runfile.revisions import with_revisions
from trainer.runfile.schema import SchemaReader
from trainer.runfile.toml_files import apply_override, read_toml


def load_config(path: str, overrides: list[str] | None = None) -> RunConfig:
    """Return the run that a TOML file and `section.key=value` overrides describe, defaults filled in. Raises `ConfigError`."""
    tables = read_toml(path)
    for text in overrides or []:
        apply_override(tables, text)
    return parse_config(tables, path, overrides or ())


def parse_config(tables: Json, origin: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the RunConfig of plain tables. Raises one `ConfigError` with every problem, `origin` in front.

    A problem that is about one of the `overrides`, which are applied already, names it.
    """
    try:
        tables, contradictions = resolve_published(with_revisions(tables))
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
    config, problems = read_curriculum(tables, with_defaults) if tables.get("stage") else read_run(tables)
    problems = [*contradictions, *problems]
    if config is None or problems:
        raise ConfigError(f"{origin}:\n" + "\n".join(f"  - {_with_override(line, overrides)}" for line in problems))
    return config


def _with_override(line: str, overrides: Sequence[str]) -> str:
    """Return the problem with the override in front that it is about, if there is one."""
    about = line.partition(";")[0]  # without what is suggested
    for text in reversed(overrides):
        if re.search(rf"(?<![\w.]){re.escape(text.partition('=')[0].strip())}(?!\w)", about):
            return f"{shown(text)} on the command line: {line}"
    return line


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
