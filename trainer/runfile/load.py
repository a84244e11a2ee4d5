"""A run file becomes a RunConfig: read, overridden, checked as a whole, defaults of paired settings filled in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from model.errors import ConfigError
from trainer.config import RunConfig
from trainer.runfile.checks import problems_of
from trainer.runfile.curriculum import read_curriculum
from trainer.runfile.planned import PLANNED
from trainer.runfile.schema import SchemaReader
from trainer.runfile.toml_files import apply_override, read_toml


def load_config(path: str, overrides: list[str] | None = None) -> RunConfig:
    """The run described by a TOML file and `section.key=value` overrides, defaults filled in."""
    tables = read_toml(path)
    for text in overrides or []:
        apply_override(tables, text)
    return parse_config(tables, path)


def parse_config(tables: dict[str, Any], origin: str) -> RunConfig:
    """RunConfig from plain tables; one ConfigError with every problem."""
    config, problems = read_curriculum(tables, filled) if tables.get("stage") else read_run(tables)
    if config is None or problems:
        raise ConfigError(f"{origin}:\n" + "\n".join(f"  - {line}" for line in problems))
    return config


def read_run(tables: dict[str, Any]) -> tuple[RunConfig | None, list[str]]:
    """The run of a file without stages, or every problem of it."""
    reader = SchemaReader(PLANNED)
    config = reader.table(RunConfig, {key: value for key, value in tables.items() if (key, value) != ("stage", [])}, "")
    if config is None:
        return None, reader.problems
    return filled(config), problems_of(config)


def filled(config: RunConfig) -> RunConfig:
    """Defaults of the settings of which only one of a pair may be named."""
    train, optim = config.train, config.optim
    if train.epochs is None and train.max_steps is None:
        train = replace(train, epochs=1.0)
    if optim.warmup_ratio is None and optim.warmup_steps is None:
        optim = replace(optim, warmup_ratio=0.03)
    return replace(config, train=train, optim=optim)
