"""Will it fit? Estimate what a run takes of every rank's memory and of the disk, before any weight is read.

Parameters, gradients and the optimizer are exact; activations are simulated: the heaviest micro-batch of the epoch goes through the
real model without values. The tool reads JSON files, the tokenizer, the index of the data and the records of that micro-batch; with
--no-data, samples of data.max_length tokens replace them. The last line of stdout is JSON. Exit code 0: the run fits as configured,
or the memory is not known; 69: it does not fit; 2: the run file is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import ConfigError
from tools.cli import check_positive, command_parser, printable_lines, run_command
from trainer.runfile.toml_files import without_dashes

if TYPE_CHECKING:
    from model.card import ModelCard


class NotFitting(Exception):
    """A run that does not fit as configured."""

    exit_code = 69


def plan(options: argparse.Namespace) -> None:
    # Here: --help and a wrong option need none of it.
    from model.deferred_imports import import_transformers

    import_transformers()
    import torch

    from tools.plan_table import as_json, exact_size, report_lines
    from trainer.distributed.parallelize import check_sharing
    from trainer.distributed.world import World
    from trainer.machine import memory_info
    from trainer.memory.fit_plan import GIB, plan_run
    from trainer.records.run_data import open_data
    from trainer.runfile.load import load_config
    from trainer.runfile.stages import stage_for_reading
    from trainer.setup import resolve_config

    check_positive(options, "ranks")
    if options.memory is not None and not (options.memory > 0 and math.isfinite(options.memory)):
        raise ConfigError(f"--memory {options.memory} is not a positive number of GiB")
    stage = stage_for_reading(load_config(options.cfg, options.overrides), options.stage)
    check_sharing(stage.config.parallel, options.ranks)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    alone = World(0, 0, 1, torch.device("cpu"))
    config = resolve_config(stage.config, replace(alone, device=device))
    if options.no_data:
        config = replace(config, data=replace(config.data, sources=(), validation=()))
    data = open_data(config, alone, stage=replace(stage, config=config))
    check_adapter(data.card)
    sharing = options.ranks if device.type == "cpu" else 1  # processes of one machine; a GPU is its rank's alone
    memory = options.memory * GIB if options.memory else memory_info.total_memory(device) / sharing
    found = plan_run(config, data, options.ranks, memory, on_host=device.type == "cpu")
    print(printable_lines("\n".join(report_lines(found))))
    print(json.dumps(as_json(found)), flush=True)
    if found.fits is False:
        raise NotFitting(f"the run does not fit in {exact_size(memory)} per rank as it is configured")


def check_adapter(card: ModelCard) -> None:
    """Check the names and shapes of the adapter that lora.path names, if it is there yet; no value is read.

    Raises `ConfigError` when it is damaged or does not belong to the model.
    """
    import torch

    from model.build import assemble
    from model.weights.origins import configured_adapter

    if card.lora.path and Path(card.lora.path).exists():
        configured_adapter(Path(card.lora.path), card, assemble(card, torch.float32))


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("plan", __doc__)
    parser.add_argument("--cfg", required=True, help="the run file")
    parser.add_argument("--stage", default="", metavar="NAME", help="of a file with [[stage]] tables: this one")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes that train together (1)")
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="of each rank (default: this machine's GPU, or its share of the RAM)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="what it will run on (default: a GPU where there is one)")
    parser.add_argument("--no-data", action="store_true", help="the data are elsewhere: plan by data.max_length")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file")
    options = parser.parse_intermixed_args(without_dashes(argv))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return run_command("plan", lambda: plan(options))


if __name__ == "__main__":
    raise SystemExit(main())
