"""Measure resampling of sound beside soxr, where that is installed: CPU time of one thread, and the error of three tones."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable

import numpy as np
import torch

from data.media.resample import resample
from tools.benches.turns import cpu_time
from tools.cli import command_parser, run_command

RATES, NEW_RATE, SECONDS = (44_100, 48_000, 8_000, 22_050), 16_000, (10, 60)
HERTZ = (200.0, 999.5, 3300.0)
_EDGE = 2000  # samples at either end, where the tones are cut off


def tones(rate: int, count: int) -> np.ndarray:
    moments = np.arange(count) / rate
    return np.sum([np.sin(2 * np.pi * hertz * moments) for hertz in HERTZ], axis=0) / 4


def least_cpu_ms(action: Callable[[], object], rounds: int) -> float:
    return 1000 * min(cpu_time(action) for _ in range(rounds))


def largest_error(made: np.ndarray) -> float:
    """Return the largest difference from the tones themselves, in float64."""
    return float(np.abs(made - tones(NEW_RATE, len(made)))[_EDGE:-_EDGE].max())


def row(rate: int, seconds: int, rounds: int) -> str:
    """Return the line of the table for one rate and length."""
    samples = tones(rate, rate * seconds).astype(np.float32)
    wave = torch.from_numpy(samples)
    ours = least_cpu_ms(lambda: resample(wave, rate, NEW_RATE), rounds)
    wrong = largest_error(resample(wave, rate, NEW_RATE).numpy())
    line = f"| {rate}, {seconds} | {ours:.1f} |"
    if importlib.util.find_spec("soxr") is None:
        return f"{line} not installed | | {wrong:.1e} | |"
    import soxr

    theirs = least_cpu_ms(lambda: soxr.resample(samples, rate, NEW_RATE), rounds)
    other = largest_error(soxr.resample(samples, rate, NEW_RATE))
    return f"{line} {theirs:.1f} | {ours / theirs:.2f} | {wrong:.1e} | {other:.1e} |"


def print_table(rounds: int) -> None:
    torch.set_num_threads(1)
    print("| from, seconds | ours ms | soxr ms | ours / soxr | error, ours | soxr |\n|---|---|---|---|---|---|")
    for rate, seconds in itertools.product(RATES, SECONDS):
        print(row(rate, seconds, rounds), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("bench_sound", __doc__)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(argv)
    return run_command("bench_sound", lambda: print_table(options.rounds))


if __name__ == "__main__":
    raise SystemExit(main())
