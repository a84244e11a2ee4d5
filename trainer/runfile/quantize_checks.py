"""Checks of [quantize]: what cannot be stored in few bits, and settings that have no effect for the number of bits."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from model.config import ModelConfig, QuantizeConfig

LEARNS_BESIDE = ("frozen", "lora", "new_tokens")
"""Values of model.llm.tune under which no quantised matrix learns."""


def quantize_problems(config: QuantizeConfig, model: ModelConfig) -> Iterator[str]:
    if config.bits != 4:
        for key in ("type", "double"):
            if (value := getattr(config, key)) != getattr(QuantizeConfig(), key):
                yield f"quantize.{key} = {value!r} has no effect with quantize.bits = {config.bits}: it is a setting of 4 bits"
    if config.bits == 16:
        return
    if model.llm.tune not in LEARNS_BESIDE:
        yield (
            f"quantize.bits = {config.bits} with model.llm.tune = {model.llm.tune!r}: a matrix stored in {config.bits} bits cannot "
            f"learn; use model.llm.tune = {' or '.join(map(repr, LEARNS_BESIDE))}, or quantize.bits = 16"
        )
    if find_spec("bitsandbytes") is None:
        yield f"quantize.bits = {config.bits} needs bitsandbytes, which is not installed: pip install -e '.[quantize]'"
