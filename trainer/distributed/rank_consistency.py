"""Check that all ranks do the same run: settings and versions are compared before anything else."""

from __future__ import annotations

import hashlib
import json
import platform

import torch
import transformers

from model.errors import ConfigError
from trainer.config import RunConfig
from trainer.distributed.world import World
from trainer.runfile.schema import flatten_tables, to_tables

SHOWN = 8  # differences that a message names


def check_same_settings(config: RunConfig, world: World) -> None:
    """Raise `ConfigError`, on all ranks alike, unless all ranks have the same settings and the same versions. Collective."""
    own = flatten_tables(to_tables(config)) | {
        "the version of torch": torch.__version__,
        "the version of transformers": transformers.__version__,
        "the version of Python": ".".join(platform.python_version_tuple()[:2]),
    }
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    digests = world.gather_json(digest)
    others = [rank for rank, found in enumerate(digests) if found != digests[0]]
    if others:
        tables = world.gather_json(own if world.is_main or world.rank in others else None)  # collective, on every rank alike
        lines = differences(tables[0], {rank: tables[rank] for rank in others})
        more = f"\n  - and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        raise ConfigError(
            "the ranks were started with different settings:\n" + "\n".join(f"  - {line}" for line in lines[:SHOWN]) + more
        )


def differences(first: dict[str, object], others: dict[int, dict[str, object]]) -> list[str]:
    """Return one line for every key and value in which some ranks differ from rank 0; `others`: their tables by rank."""
    found: dict[str, list[int]] = {}
    for rank, table in others.items():
        for key in sorted(first.keys() | table.keys()):
            if first.get(key) != table.get(key):
                found.setdefault(f"{key} is {first.get(key)!r} on rank 0 and {table.get(key)!r} on rank", []).append(rank)
    return [f"{line}{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" for line, ranks in found.items()]
