"""One contender of `tools.bench_train` in a process of its own: `python -m tools.benches.contender NAME FOLDER ...`.

It imports no more than the contender does, because its start is measured too.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

RANDOM, GROUPED = "random", "grouped"
"""Order of the steps: samples at random, or as transformers' `group_by_length` puts them together."""


@dataclass(frozen=True)
class Contender:
    """Who trains, on which order of the records."""

    kind: str  # ours | bare | trainer | trl
    order: str
    run: str = ""  # ours: packed | compiled | padded | in_order
    accumulate: int = 1  # micro-batches per step; ours chooses its own


CONTENDERS = {
    "ours, packed": Contender("ours", RANDOM, run="packed"),
    "ours, compiled": Contender("ours", RANDOM, run="compiled"),
    "ours, padded": Contender("ours", GROUPED, run="padded"),
    "ours, in order": Contender("ours", RANDOM, run="in_order"),
    "bare loop": Contender("bare", RANDOM),
    "Trainer": Contender("trainer", RANDOM),
    "Trainer, micro-batches": Contender("trainer", RANDOM, accumulate=4),
    "Trainer, group_by_length": Contender("trainer", GROUPED),
    "TRL": Contender("trl", RANDOM),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--device", required=True)
    options = parser.parse_args()
    contender = CONTENDERS[options.name]
    import torch

    torch.set_num_threads(1)
    from tools.benches.meter import StepMeter

    meter = StepMeter(options.steps)
    if contender.kind == "ours":
        from tools.benches.ours import run_ours

        run_ours(str(options.folder / f"{contender.run}.toml"), meter)
        return
    from tools.benches import peers

    task = peers.PeerRun(options.folder, contender.order, options.batch, contender.accumulate, options.device, meter)
    {"bare": peers.run_bare, "trainer": peers.run_trainer, "trl": peers.run_trl}[contender.kind](task)


if __name__ == "__main__":
    main()
