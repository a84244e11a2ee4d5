"""The blocks of a model, before it is sharded: which there are, which are compiled, and which are recomputed in backward."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model.llm.causal_lm import blocks
from model.multimodal import ENCODERS, MultimodalLM
from trainer.config import ParallelConfig
from trainer.distributed.compiled_blocks import compile_blocks

KEPT_OPERATORS = {
    *("mm", "addmm", "adapted", "_grouped_mm", "_varlen_attn"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
    *("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu"),
}
"""Operators whose results selective recomputation keeps: products of weights, and attention in one kernel."""


def prepare_blocks(model: MultimodalLM, config: ParallelConfig) -> None:
    """Compile the blocks of all parts, and make backward recompute them, as `config` says. Names of parameters do not change.

    A compiler decides itself what backward computes again, so selective recomputation of what it compiles is left to it.
    """
    kind = config.activation_checkpointing
    compiled = [name for name, _ in model.named_children() if config.compile and has_blocks(model, name)]
    if compiled:
        owners = {name: block_owner(model, name) for name in compiled}
        named = [(f"{part}.blocks.{i}", block) for part, owner in owners.items() for i, block in enumerate(blocks(owner))]
        compile_blocks(named, saves_memory=kind == "selective", goes_on=config.compile == "or_eager")
    if kind in ("full", "selective"):
        checkpoint_activations(model, kind, compiled if kind == "selective" else ())


def checkpoint_activations(model: MultimodalLM, kind: str = "full", spared: Collection[str] = ()) -> None:
    """Make backward recompute the blocks of every part on the gradient's path, but for those `spared`. Names of parameters do not
    change.

    `kind`: full | selective, which keeps the results of matrix products and attention. Transformers' own switch does nothing in
    eval mode, which frozen parts are in.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keeps)
    parts = [block_owner(model, name) for name in {"llm", *model.trainable_parts} - {*spared} if has_blocks(model, name)]
    for part in parts:
        for block in blocks(part):
            block.forward = functools.partial(checkpoint, block.forward, **options)


def keeps(context: object, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Tell selective recomputation whether backward keeps an operator's result."""
    is_kept = operator.overloadpacket.__name__ in KEPT_OPERATORS
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def block_owner(model: MultimodalLM, part: str) -> nn.Module:
    """Return the module whose blocks are sharded and recomputed: the decoder, or the tower inside its wrapper."""
    return model.llm.get_decoder() if part == "llm" else model.encoder(part).tower


def has_blocks(model: MultimodalLM, part: str) -> bool:
    return part == "llm" or part in {encoder for encoder, _ in ENCODERS.values()}
