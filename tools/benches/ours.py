"""Ours as a contender of `tools.bench_train`: the trainer as its users start it, watched from outside."""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch import nn
from torch.optim import Optimizer

from model.batch import Batch
from tools.benches.meter import COMPUTE, DATA, REST, UPDATE, StepMeter
from trainer import loop
from trainer.distributed.world import World
from trainer.faults.phase_tracker import Beat, PhaseTracker
from trainer.main import main
from trainer.step import StepOptions, StepResult, train_step

PHASE_OF = {"data": DATA, "copy": COMPUTE, "count": COMPUTE, "forward": COMPUTE, "backward": COMPUTE, "update": UPDATE}


def run_ours(run_file: str, meter: StepMeter) -> None:
    """Train as the run file says until the meter ends the process. RuntimeError if the run ends before."""
    set_beat = PhaseTracker._set

    def watched(tracker: PhaseTracker, beat: Beat) -> None:
        if beat.phase != tracker.beat.phase:
            meter.enter(PHASE_OF.get(beat.phase, REST))
        set_beat(tracker, beat)

    def step(wrapped: nn.Module, optimizer: Optimizer, batches: list[Batch], world: World, options: StepOptions) -> StepResult:
        result = train_step(wrapped, optimizer, batches, world, options)
        meter.end_step(sum(batch.input_ids.numel() for batch in batches), torch.cat(result.addends).mean())
        return result

    with patch.object(PhaseTracker, "_set", watched), patch.object(loop, "train_step", step):
        code = main(["--cfg", run_file])
    raise RuntimeError(f"the run ended with exit code {code} before its last step")
