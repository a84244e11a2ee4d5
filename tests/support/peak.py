"""Memory that a forward and backward takes on the CPU, as the allocator tells it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from model.batch import Batch
from trainer.distributed.parallelize import gradient_sync


def forward_backward(wrapped: torch.nn.Module, batch: Batch) -> None:
    with gradient_sync(wrapped, last=True):
        torch.stack([term.sum for term in wrapped(batch).values()]).sum().backward()


def bytes_of(tensors: Any) -> int:
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.itemsize for t in local)


WITH_SCRATCH = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::addcmul_")


def measured_peak(model: torch.nn.Module, batch: Batch, trace: Path) -> int:
    """Bytes that the allocator of the CPU held at most in a forward and backward, above what was there: gradients were."""
    forward_backward(model, batch)
    with profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as seen:
        forward_backward(model, batch)
    seen.export_chrome_trace(str(trace))
    events = sorted((e for e in json.loads(trace.read_text())["traceEvents"] if "ts" in e), key=lambda e: e["ts"])
    products = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] in WITH_SCRATCH and "dur" in e]
    memory = [(e["ts"], e["args"]["Addr"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"]
    return int(np.cumsum([size for _, _, size in without_scratch(memory, products)]).max())


def without_scratch(memory: list[tuple[float, int, int]], products: list[tuple[float, float]]) -> list[tuple[float, int, int]]:
    """Leave out what a product allocates and frees while it runs: rows that oneDNN repacks for the CPU, masks that it casts, and no
    GPU does.
    """
    kept = []
    for event in memory:
        at, address, size = event
        running = next(((start, stop) for start, stop in products if start <= at <= stop), None)
        if running and size < 0 and kept and kept[-1][1:] == (address, -size) and kept[-1][0] >= running[0]:
            kept.pop()
        else:
            kept.append(event)
    return kept
