"""Do a past step of a run again: the same samples, order and dropout, from the nearest checkpoint before it.

Prints the loss of each sample with its highest tokens, the gradient norm of each part, and whether the numbers are those of
metrics.jsonl, to the bit in one process as on as many ranks as the run had (torchrun). --step counts as metrics.jsonl and
faults.jsonl do: step N brought the run to N completed steps. Nothing is written into the run's folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import ConfigError
from tools.cli import check_named, command_parser, printable_lines, run_command, write_named

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tools.asking.past_step import PastStep
    from tools.asking.replay_step import Replayed, SampleLoss

ROUNDING = 1e-5
"""Relative difference up to which numbers are called equal to rounding."""


def replayed_lines(found: Replayed, past: PastStep) -> list[str]:
    """Return the verdict of the comparison with metrics.jsonl."""
    from tools.asking.replay_step import largest_difference

    if found.row_step is None:
        return [f"metrics.jsonl has no row at or after step {past.number}: nothing to compare with"]
    covered = f"steps {found.first_covered} to {found.row_step}" if found.first_covered < found.row_step else "this step alone"
    row = f"row {found.row_step} of metrics.jsonl ({covered})"
    if not (differences := found.differences):
        return [f"{row}: all {len(found.again)} numbers are equal to the bit"]
    size = largest_difference(differences)
    kind = f"equal to rounding (largest relative difference {size:.1e})" if size <= ROUNDING else "DIFFERENT"
    lines = [f"{row}: {len(differences)} of {len(found.again)} numbers are {kind}"]
    return lines + [f"  {name}: {before!r} recorded, {now!r} now" for name, (before, now) in differences.items()]


def sample_lines(sample: SampleLoss, tokenizer: PreTrainedTokenizerFast, num_tokens: int) -> list[str]:
    """Return a line about a sample, and one with its tokens of highest loss in their order; all of them where `num_tokens` is 0."""
    loss = f"{sample.loss:.6f}" if sample.losses else "no token is learned"
    lines = [f"  {sample.sample:>8}  {loss}  {len(sample.ids):>5} tokens  {sample.source}  {printable_lines(sample.where)}"]
    by_loss = sorted(range(len(sample.ids)), key=lambda k: -sample.losses[k])
    shown = sorted(by_loss[: num_tokens or len(by_loss)])
    words = [f"{json.dumps(str(tokenizer.decode([sample.ids[k]])), ensure_ascii=False)} {sample.losses[k]:.4f}" for k in shown]
    return lines + ([printable_lines("            " + "  ".join(words))] if words else [])


def replay_text(found: Replayed, past: PastStep, tokenizer: PreTrainedTokenizerFast, num_tokens: int) -> str:
    """Return all that is printed."""
    tokens = [loss for sample in found.samples for loss in sample.losses]
    mean = math.fsum(tokens) / len(tokens) if tokens else math.nan
    origin = past.checkpoint.name if past.checkpoint else "the beginning"
    lines = [
        f"step {past.number} of {past.stage.run_folder}, from {origin}: loss {mean:.6f} over {len(tokens)} tokens of "
        f"{len(found.samples)} samples" + ("; the update was skipped" if found.skipped else "")
    ]
    norms = "  ".join(f"{part} {norm:.6g}" for part, norm in found.norms.items())
    lines += [f"gradient norm {found.grad_norm:.6g}: {norms}", "samples, highest loss first"]
    order = sorted(found.samples, key=lambda sample: -sample.loss if sample.losses else math.inf)
    for sample in order:
        lines += sample_lines(sample, tokenizer, num_tokens)
    lines += [printable_lines(f"  left out: {line}") for line in found.left_out]
    return "\n".join([*lines, *replayed_lines(found, past)])


def replay_json(found: Replayed, past: PastStep, tokenizer: PreTrainedTokenizerFast) -> str:
    samples = [
        asdict(sample) | {"loss": sample.loss if sample.losses else None, "tokens": [tokenizer.decode([i]) for i in sample.ids]}
        for sample in found.samples
    ]
    fields = {
        "step": past.number,
        "checkpoint": past.checkpoint.name if past.checkpoint else None,
        "grad_norm": found.grad_norm if math.isfinite(found.grad_norm) else None,
        "part_norms": {part: norm if math.isfinite(norm) else None for part, norm in found.norms.items()},
        "skipped": found.skipped,
        "row_step": found.row_step,
        "differences": found.differences,
        "left_out": found.left_out,
        "samples": samples,
    }
    return json.dumps(fields, ensure_ascii=False, indent=1) + "\n"


def replay_run(options: argparse.Namespace) -> None:
    if options.step < 1 or options.tokens < 0:
        raise ConfigError(f"--step {options.step} and --tokens {options.tokens}: steps count from 1, and --tokens is 0 or more")
    run = options.run.resolve()
    if options.json and options.json.resolve().is_relative_to(run):
        raise ConfigError(f"--json {options.json} is in the folder of the run, where nothing is written: name another place")
    if int(os.environ.get("RANK", "0")) == 0:  # the one that writes
        check_named("--json", options.json)
    from model.deferred_imports import import_transformers

    import_transformers()
    from tools.asking.past_step import find_past_step, prepared_step
    from tools.asking.replay_step import ranks_note, replay
    from trainer.distributed.world import start_world, stop_world

    world = start_world()
    try:
        past = find_past_step(run, options.step, world, from_start=options.from_start)
        if world.is_main and (note := ranks_note(past, world)):
            print(note, flush=True)
        with prepared_step(past, world) as (prepared, state):
            found, tokenizer = replay(past, prepared, state), prepared.data.processor.tokenizer
        if world.is_main:
            print(replay_text(found, past, tokenizer, options.tokens))
            if options.json:
                write_named("--json", options.json, replay_json(found, past, tokenizer))
    finally:
        stop_world()


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("replay", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of the run")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="the step, counted from 1 as in metrics.jsonl")
    parser.add_argument("--from-start", action="store_true", help="where no checkpoint is left: begin where the stage began")
    parser.add_argument("--tokens", type=int, default=8, metavar="K", help="tokens shown of each sample, highest loss (8); 0: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything, every token, as JSON")
    options = parser.parse_args(argv)
    return run_command("replay", lambda: replay_run(options))


if __name__ == "__main__":
    raise SystemExit(main())
