"""Measure training as a whole: ours, a bare loop around transformers' model, Hugging Face's Trainer and TRL's SFTTrainer.

All train the same model on the same records with the same loss, each in a process of its own with one thread; the contenders take
turns, round after round, and medians are printed. The records are of unequal lengths: 80 % show one picture and answer shortly or
at length, 20 % are text with a tail to 1,700 tokens. Of an epoch of 1,024, every order (at random, or as transformers'
`group_by_length` puts batches together) gives steps spread evenly over all its batches. Contenders that see the same steps must
find the same losses, or the command fails.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from tools.benches.contender import CONTENDERS, GROUPED, RANDOM
from tools.benches.meter import COMPUTE, DATA, UPDATE, Figures
from tools.benches.turns import in_turns, run_child
from tools.cli import command_parser, run_command
from trainer.errors import ProofError

CHOSEN = {
    "34m": ("ours, packed", "ours, padded", "bare loop", "Trainer", "Trainer, group_by_length", "TRL"),
    "34m-short": ("ours, packed", "bare loop", "Trainer"),
    "digits": ("ours, in order", "bare loop", "Trainer", "TRL"),
}
"""Contenders by size, the first is the one that others are compared with; a size that is not named has those of the first."""
NATIVE = ("ours, packed", "bare loop", "Trainer", "Trainer, group_by_length")
"""Contenders on a model that reads pictures at their own size."""
TOLERANCE = {"cpu": 1e-3, "cuda": 3e-2}
"""Greatest relative difference of the loss of a step between contenders: rounding of float32, or of bfloat16."""
NEEDS = {"trl": ("trl", "datasets"), "trainer": ("accelerate",)}
"""Packages that a contender needs beyond ours."""


@dataclass(frozen=True)
class Bench:
    """Settings of a measurement, and how often it is repeated."""

    folder: Path
    size: str
    batch: int
    steps: int
    rounds: int
    device: str


def run_contender(bench: Bench, name: str) -> Figures:
    """Run one contender in a process of its own. RuntimeError if it fails."""
    options = ("--steps", str(bench.steps), "--batch", str(bench.batch), "--device", bench.device)
    print(name, file=sys.stderr, flush=True)
    found = Figures(**json.loads(run_child(name, "tools.benches.contender", name, str(bench.folder), *options)))
    print(json.dumps(asdict(found)), file=sys.stderr, flush=True)
    return found


def useful_tokens(bench: Bench, name: str) -> int:
    """Return the tokens of the samples of all steps but the first, padding left out."""
    text = (bench.folder / f"{CONTENDERS[name].order}.tokens.json").read_text(encoding="utf-8")
    return sum(json.loads(text)[1 : bench.steps])


def check_losses(bench: Bench, found: dict[str, list[Figures]]) -> dict[str, float]:
    """Return, by order of the steps, the greatest relative difference of the loss of a step between contenders.

    Raises `ProofError` where it is more than rounding: the contenders did not do the same work.
    """
    differences = {}
    for order in (RANDOM, GROUPED):
        losses = {name: runs[0].losses for name, runs in found.items() if CONTENDERS[name].order == order}
        if len(losses) < 2:
            continue
        worst = max((max(step) - min(step)) / min(step) for step in zip(*losses.values()))
        differences[order] = worst
        if worst > TOLERANCE[bench.device]:
            raise ProofError(f"losses of the same steps differ by {worst:.1e}: {losses}")
    return differences


def table_lines(bench: Bench, found: dict[str, list[Figures]]) -> list[str]:
    """Return the lines of the table, one per contender; ratios are medians of the rounds' own ratios to the first contender."""
    steps, first = bench.steps - 1, next(iter(found))
    lines = [
        "| | useful tokens / CPU s | / s | first / it | useful share | peak MiB | first / it | CPU s / step | data | compute "
        "| update | CPU s to end of step 1 |",
        "|" + "---|" * 12,
    ]
    for name, runs in found.items():
        tokens = useful_tokens(bench, name)
        rate = [useful_tokens(bench, first) / a.cpu / (tokens / b.cpu) for a, b in zip(found[first], runs)]
        memory = [a.peak_mib / b.peak_mib for a, b in zip(found[first], runs)]
        share = tokens / sum(runs[0].slots[1:])
        phases = [statistics.median(run.phases[phase] for run in runs) / steps for phase in (DATA, COMPUTE, UPDATE)]
        cpu, seconds = (statistics.median(getattr(run, what) for run in runs) for what in ("cpu", "seconds"))
        peak, start = (statistics.median(getattr(run, what) for run in runs) for what in ("peak_mib", "start_cpu"))
        lines.append(
            f"| {name} | {tokens / cpu:,.0f} | {tokens / seconds:,.0f} | {statistics.median(rate):.2f} | {share:.2f} | {peak:,.0f} "
            f"| {statistics.median(memory):.2f} | {cpu / steps:.3f} | {' | '.join(f'{p:.3f}' for p in phases)} | {start:.2f} |"
        )
    return lines


def not_installed(name: str) -> list[str]:
    """Return the packages that a contender needs and that are not installed."""
    kind = CONTENDERS[name].kind
    return [package for package in NEEDS.get(kind, ()) if find_spec(package) is None]


def run_bench(options: argparse.Namespace) -> None:
    """Prepare the folder, measure, check and print."""
    from tools.benches.mix import SIZES
    from tools.benches.native_mix import padded_shares
    from tools.benches.prepare import prepare

    size = "digits" if options.digits else options.size
    names = options.only or (NATIVE if options.family else CHOSEN.get(size, CHOSEN["34m"]))
    with tempfile.TemporaryDirectory() as made:
        bench = Bench(Path(made), size, SIZES[size].batch, options.steps, options.rounds, options.device)
        dtype = "float32" if options.device == "cpu" else "bfloat16"
        shares = prepare(bench.folder, size, options.steps, dtype, options.family)
        print(
            f"{size}, {bench.batch} samples a step, {bench.steps} steps, medians of {bench.rounds} rounds, {options.device}, one "
            f"thread, {platform.machine()}, Python {platform.python_version()}; of a padded batch are useful: {shares[RANDOM]:.2f} "
            f"at random, {shares[GROUPED]:.2f} grouped by length"
        )
        if options.family:
            padded = {name: f"{share:.2f}" for name, share in padded_shares(bench.folder, bench.batch).items()}
            print(f"patches of {bench.batch} pictures of the mix that are useful: ours 1.00; padded by the processor of {padded}")
        found = in_turns({name: partial(run_contender, bench, name) for name in names if not not_installed(name)}, bench.rounds)
        print("\n".join(table_lines(bench, found)))
        for name in names:
            if absent := not_installed(name):
                print(f"| {name} | not installed: {', '.join(absent)} |")
        for order, worst in check_losses(bench, found).items():
            print(f"steps {order}: the loss of every step equal within {worst:.1e} for all contenders that saw them")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("bench_train", __doc__)
    sizes = ("34m", "34m-short", "small", "tiny")
    parser.add_argument("--size", choices=sizes, default="34m", help="the model: 33 M or 1 M parameters; -short: 4 short samples")
    parser.add_argument("--digits", action="store_true", help="the demo's model and records, 32 samples a step")
    parser.add_argument(
        "--family", choices=("qwen2_5_vl",), default="", help="a model that reads pictures at their own size instead"
    )
    parser.add_argument("--steps", type=int, default=5, help="steps of each run; the first is not in the rates (default 5)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="contenders; the others are compared with the first")
    options = parser.parse_args(argv)
    return run_command("bench_train", lambda: run_bench(options))


if __name__ == "__main__":
    raise SystemExit(main())
