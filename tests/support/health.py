"""Helpers of tests/trainer/test_health.py that other tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model.multimodal import MultimodalLM
from tests.support.runs import Start, start
from trainer import loop
from trainer.distributed.world import World
from trainer.health import spike_detector

Plan = tuple[tuple[int, int], ...]
"""0-based steps, and a sample of each."""


def start_planted(world: World, parts: Path, folder: Path, sections: dict[str, Any], value: float, plan: Plan) -> Start:
    """One start in which the loss of some samples is `value` more in one step; their gradients are as they were."""
    forward, original, current = MultimodalLM.forward, loop.train_step, [-1]

    def stepping(*args: Any, **kwargs: Any) -> Any:
        current[0] = args[4].step
        return original(*args, **kwargs)

    def planted(self: MultimodalLM, batch: Any) -> Any:
        terms = dict(forward(self, batch))
        chosen = torch.tensor([sample for step, sample in plan if step == current[0]], dtype=torch.int64)
        more = torch.where(torch.isin(batch.sample_ids[batch.owners], chosen), value, 0.0)
        terms["text"] = terms["text"]._replace(sum=terms["text"].sum + more.sum(), addends=terms["text"].addends + more)
        return terms

    spike_detector.ENOUGH = 6
    loop.train_step, MultimodalLM.forward = stepping, planted  # type: ignore[method-assign]
    return start(world, parts, folder, sections)
