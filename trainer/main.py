"""The command line: `torchrun --nproc_per_node=N -m trainer.main --cfg run.toml [section.key=value ...]`.

What a run does, in order, stands in trainer/run.py; the step in trainer/step.py.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from trainer.errors import code_of
from trainer.runfile.toml_files import without_dashes

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.distributed.world import World


def run(config: RunConfig, world: World | None = None) -> int:
    """Train as `config` says and return the exit code. An error is reported by one rank, and in exit.json."""
    # Here, as in `main`: what comes first decides what transformers imports (model/deferred_imports.py), and --help needs nothing.
    from trainer.run import train
    from trainer.supervise import run_supervised

    return run_supervised(train, config, world)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, load the run file, train, and return the exit code."""
    parser = argparse.ArgumentParser(prog="trainer.main", description="Train a multimodal model as a run.toml describes it.")
    parser.add_argument("--cfg", required=True, help="the run file, or recipe:NAME")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file")
    arguments = parser.parse_args(without_dashes(argv))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # Many ranks and workers share a machine; the tokenizer's own threads would fight them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from model.deferred_imports import import_transformers

    import_transformers()  # before anything else imports it
    from trainer.runfile.load import load_config
    from trainer.supervise import refuse

    try:
        config = load_config(arguments.cfg, arguments.overrides)
    except Exception as error:
        # Every rank reads the same file and fails in the same way: rank 0 reports.
        if int(os.environ.get("RANK", "0")) == 0:
            refuse(error, arguments.cfg, arguments.overrides)
        return code_of(error)
    return run(config)


def command() -> NoReturn:
    """Run the command line and leave the process with its exit code."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a failed rank must leave at once, while its peers may still hang in a collective with it.
    os._exit(code)


if __name__ == "__main__":
    command()
