"""Peaks of known GPUs: what a share of the hardware's limit is counted by."""

from __future__ import annotations

PEAKS: tuple[tuple[str, float], ...] = (
    *(("GB200", 2500.0), ("B200", 2250.0), ("B100", 1750.0), ("GH200", 989.0)),
    *(("H200 NVL", 835.0), ("H200", 989.0), ("H100 NVL", 835.0), ("H100 PCIE", 756.0), ("H100", 989.0), ("H800", 989.0)),
    *(("H20", 148.0), ("A100", 312.0), ("A800", 312.0), ("A40", 149.7), ("A30", 165.0), ("A10G", 70.0), ("A10", 125.0)),
    *(("L40S", 362.0), ("L40", 181.0), ("L20", 119.5), ("L4", 121.0)),
    *(("RTX 6000 ADA", 364.2), ("RTX A6000", 154.8), ("RTX A5000", 111.1), ("RTX A4000", 76.7)),
    *(("RTX 5090", 209.5), ("RTX 4090", 165.2), ("RTX 4080", 97.5), ("RTX 3090 TI", 80.0), ("RTX 3090", 71.0), ("RTX 3080", 59.5)),
    *(("V100-PCIE", 112.0), ("V100", 125.0), ("T4", 65.1), ("MI300X", 1307.4), ("MI250", 383.0)),
)
"""Part of a card's name and its TFLOP/s of dense products of 16-bit numbers, summed in float32, by the maker's data sheets.

Those of V100 and T4 are of float16. The first that fits counts, so longer names come before shorter ones.
"""


def peak_of(name: str) -> float | None:
    """Return the TFLOP/s of a card by the name that its driver gives it; None for one that is not known."""
    words = name.upper().replace("-", " ")
    for part, peak in PEAKS:
        if f" {part.replace('-', ' ')} " in f" {words.replace('_', ' ')} ":
            return peak
    return None
