"""The command line: `torchrun --nproc_per_node=N -m trainer.main --cfg run.toml [section.key=value ...]`.

What a run does, in order, stands in trainer/run.py; the step in trainer/step.py.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from trainer.errors import DONE, STOPPED, code_of
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
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # Many ranks and workers share a machine; the tokenizer's own threads would fight them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if arguments.settings is not None or arguments.schema or arguments.markdown:
        from trainer.runfile.settings_page import print_settings

        return print_settings(arguments.settings or "", schema=arguments.schema, page=arguments.markdown)
    from model.deferred_imports import import_transformers

    import_transformers()  # before anything else imports it
    if arguments.dry_run:
        from trainer.trial.dry_run import dry_run

        return dry_run(arguments.cfg, arguments.overrides)
    from trainer.runfile.load import load_run
    from trainer.supervise import report_refusal

    try:
        config, aside = load_run(arguments.cfg, arguments.overrides)
    except Exception as error:
        report_refusal(error, arguments.cfg, arguments.overrides)
        return code_of(error)
    if int(os.environ.get("RANK", "0")) == 0:
        for line in aside:
            print(f"aside     {line}", flush=True)
    return run(config)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return what stands on the command line: `argv`, or that of this process."""
    parser = argparse.ArgumentParser(prog="trainer.main", description="Train a multimodal model as a run.toml describes it.")
    parser.add_argument("--cfg", help="the run file, or recipe:NAME")
    described = "try the run file: what it trains at full size, and two steps on small parts with made-up weights; keeps nothing"
    parser.add_argument("--dry-run", action="store_true", help=described)
    parser.add_argument("--settings", nargs="?", const="", metavar="WORD", help="print all settings, or those that hold a word")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of run files, for editors")
    parser.add_argument("--markdown", action="store_true", help="print the page of all settings")
    described = "settings that replace those of the file; KEY= takes one out"
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=described)
    arguments = parser.parse_intermixed_args(without_dashes(argv))
    if arguments.cfg is None and not (arguments.settings is not None or arguments.schema or arguments.markdown):
        parser.error("the following arguments are required: --cfg")
    return arguments


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
