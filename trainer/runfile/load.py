"""Loading of run files: read the tables, apply overrides, check the whole and fill in defaults, which gives a RunConfig."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from model.errors import ConfigError
from trainer.config import RunConfig
from trainer.runfile.checks import problems_of
from trainer.runfile.curriculum import read_curriculum
from trainer.runfile.planned import PLANNED
from trainer.runfile.published import resolve_published
from trainer.runfile.schema import SchemaReader
from trainer.runfile.toml_files import apply_override, read_toml


def load_config(path: str, overrides: list[str] | None = None) -> RunConfig:
    """Return the run that a TOML file and `section.key=value` overrides describe, defaults filled in. Raises `ConfigError`."""
    tables = read_toml(path)
    for text in overrides or []:
        apply_override(tables, text)
    return parse_config(tables, path)


def parse_config(tables: dict[str, Any], origin: str) -> RunConfig:
    """Return the RunConfig of plain tables. Raises one `ConfigError` with every problem, `origin` in front."""
    tables, contradictions = resolve_published(tables)
    config, problems = read_curriculum(tables, with_defaults) if tables.get("stage") else read_run(tables)
    problems = [*contradictions, *problems]
    if config is None or problems:
        raise ConfigError(f"{origin}:\n" + "\n".join(f"  - {line}" for line in problems))
    return config


def read_run(tables: dict[str, Any]) -> tuple[RunConfig | None, list[str]]:
    """Return the run of a file without stages, and its problems; the run is None where the tables do not fit the schema."""
    reader = SchemaReader(PLANNED)
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
    return replace(config, train=train, optim=optim)
