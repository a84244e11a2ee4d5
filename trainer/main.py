"""The command line: `torchrun --nproc_per_node=N -m trainer.main --cfg run.toml [section.key=value ...]`.

What a run does, in order, stands in trainer/run.py; the step in trainer/step.py.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import NoReturn

from trainer.config import RunConfig
from trainer.distributed.world import World
from trainer.errors import DONE, STOPPED, code_of
from trainer.run import train
from trainer.runfile.load import load_config
from trainer.runfile.toml_files import without_dashes
from trainer.supervise import refuse, run_supervised


def run(config: RunConfig, world: World | None = None) -> int:
    """Train as `config` says and return the exit code. An error is reported by one rank, and in exit.json."""
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
    try:
        config = load_config(arguments.cfg, arguments.overrides)
    except Exception as error:
        refuse(error, arguments.cfg, arguments.overrides)
        return code_of(error)
    return run(config)


def command() -> NoReturn:
    """Run the command line and leave the process with its exit code: under torchrun 0 for a run that was stopped on request.

    torchrun calls any other code a failure, with a traceback of its own, and makes 1 of it; exit.json keeps 75.
    """
    code = main()
    if code == STOPPED and "TORCHELASTIC_RUN_ID" in os.environ:
        code = DONE
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a failed rank must leave at once, while its peers may still hang in a collective with it.
    os._exit(code)


if __name__ == "__main__":
    command()
