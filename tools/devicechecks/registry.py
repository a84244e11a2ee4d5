"""The list of checks, in the order in which they run: what must be right first, then how fast it is."""

from __future__ import annotations

from functools import partial

from tools.devicechecks import answers, exactness, machine, peer, products, resume, speed, variants
from tools.devicechecks.outcome import Check
from tools.devicechecks.shapes import HALF_B, ONE_AND_A_HALF_B, SEVEN_B
from tools.devicechecks.speed import Load

LOADS = {
    "0.5b-full": Load(HALF_B, "full"),
    "1.5b-full": Load(ONE_AND_A_HALF_B, "full"),
    "7b-projector": Load(SEVEN_B, "frozen"),
    "7b-lora": Load(SEVEN_B, "lora"),
}
"""What is trained to measure speed."""
GOALS = {
    "1.5b-full": "goal: MFU of 50 %",
    "7b-projector": "goal on an H200: 500 TFLOP/s",
    "7b-lora": "goal on an H200: 500 TFLOP/s",
}

PROOFS = (
    Check("float32", "losses within 1e-5 and gradients within 1e-4 of the CPU's", exactness.check_float32, 60),
    Check("bfloat16", "at most twice as far from float32 as the CPU's bfloat16", exactness.check_bfloat16, 60),
    Check("float16", "at most twice as far from float32 as the CPU's bfloat16", exactness.check_float16, 60),
    Check("packed", "as padded; on a GPU by the varlen kernel", exactness.check_packed, 60),
    Check("answers", "behind a shared prompt as alone; on a GPU by the varlen kernel", answers.check_answers, 30),
    Check("lora", "fused product and shared mask as the plain formula", products.check_lora, 30),
    Check("quantised", "8 bits and nf4: matrices and products as on the CPU", products.check_quantised, 60),
    Check("recomputed", "selective and full: as keeping everything", variants.check_recomputation, 60),
    Check("compiled", "as eager; in bfloat16 within rounding", variants.check_compiled, 180),
    Check("offloaded", "masters and moments on the host: as on the device", variants.check_offloaded, 60),
    Check("sharded", "FSDP2 and DDP on one rank: as one process", variants.check_sharded, 60),
    Check("syncs", "no step waits for the device", machine.check_syncs, 60),
    Check("staging", "page-locked, right, and without waiting", machine.check_staging, 60),
    Check("memory", "the plan within 12 % of the allocator's peak", machine.check_memory, 90),
    Check("resume", "killed and started again: the same final bytes", resume.check_resume, 240),
)
MEASUREMENTS = (
    Check("matmul", "-", speed.measure_matmul, 30),
    *(
        Check(f"{name}{mode}", GOALS.get(name, "-"), partial(speed.measure_training, load, bool(mode)), 150)
        for mode in ("", "-compiled")
        for name, load in LOADS.items()
    ),
)
PEER = Check("peer", "goal: ours at least 1.3 times as fast", peer.measure_trainer, 180)


def all_checks(*, with_peer: bool) -> dict[str, Check]:
    """Return the checks by name, in order."""
    return {check.name: check for check in (*PROOFS, *MEASUREMENTS, *((PEER,) if with_peer else ()))}
