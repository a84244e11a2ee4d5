"""Whether memory is in doubt: a bound on what the heaviest micro-batch takes, by counting, beside what is free."""

from __future__ import annotations

import socket
from typing import TypedDict

from data.check.measured_lengths import EXACT
from model.config import OUR_ATTENTION
from model.llm.causal_lm import head_weight
from model.llm.experts import fused_parameters
from model.media_spec import NativeSpec
from model.multimodal import MultimodalLM
from trainer.distributed.parallelize import is_sharded
from trainer.machine.memory_info import usage
from trainer.memory.footprint import MASTER
from trainer.memory.heaviest_batch import Heaviest
from trainer.memory.sample_cost import position_memory
from trainer.setup import PreparedRun

SAVED = 4
"""Numbers that a layer keeps or copies at most for each number that its linear layers return."""
SHARE = 0.25
"""Part of what is free that the bound may take before the run is rehearsed."""
GIB = 2**30
KEEP_SCORES = ("attn_logit_softcapping", "attention_dropout")
"""Keys of config.json with which scores of attention exist as a whole."""
NUMBER = 4  # bytes, whatever the type that is computed in


class RankBound(TypedDict):
    """Bytes that one rank takes at most beside what it holds already, and what is free there."""

    bound: int
    free: int
    host: str


def without_rehearsal(prepared: PreparedRun, heaviest: Heaviest, moments: int) -> str:
    """Return the line that says why nothing has to be rehearsed; "" where memory is in doubt. The same on all ranks. Collective.

    `moments`: bytes that the first update allocates.
    """
    world, device = prepared.world, prepared.world.device
    if prepared.config.train.rehearsal == "always" or not can_be_counted(prepared):
        return ""
    bound = upper_bound(prepared.model, heaviest) + moments
    mine: RankBound = {"bound": bound, "free": usage(device).free, "host": socket.gethostname()}
    rows: list[RankBound] = world.gather_json(mine)  # collective
    for row in rows:
        sharing = [other["bound"] for other in rows if other["host"] == row["host"]] if device.type == "cpu" else [row["bound"]]
        if sum(sharing) > SHARE * row["free"]:
            return ""
    bound, free = max(row["bound"] for row in rows), min(row["free"] for row in rows)
    return (
        f"memory    at most {bound / GIB:.2f} GiB more on a rank in the heaviest micro-batch, {free / GIB:.1f} are free: "
        "nothing to rehearse (train.rehearsal = 'always' does)"
    )


def can_be_counted(prepared: PreparedRun) -> bool:
    """Tell whether `upper_bound` holds: experts, quantised layers, sharding and attention that keeps its scores take more.

    So may pictures at their own size that nobody measured.
    """
    config = prepared.config
    sized = prepared.data.lengths_kind == EXACT or not isinstance(prepared.data.card.specs.get("image"), NativeSpec)
    return (
        sized
        and config.model.attention in OUR_ATTENTION
        and config.quantize.bits == 16
        and not is_sharded(config.parallel, prepared.world)
        and not fused_parameters(prepared.model.llm)
        and config.model.llm.image_attention == "causal"
        and not any(getattr(prepared.model.llm.config, key, None) for key in KEEP_SCORES)
    )


def upper_bound(model: MultimodalLM, heaviest: Heaviest) -> int:
    """Return the bytes that a rank takes for its heaviest micro-batch and for gradients, beside the weights, at most.

    Counted are SAVED times the numbers that linear layers return, and the logits of all tokens three times.
    """
    numbers = heaviest.cost * (SAVED * position_memory(model, "llm", False) + 3 * head_weight(model.llm).shape[0])
    return int(numbers * NUMBER) + sum(p.numel() for p in model.parameters() if p.requires_grad) * MASTER
