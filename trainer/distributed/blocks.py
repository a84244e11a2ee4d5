"""The blocks of a model, before it is sharded: which there are, which are compiled, and which are recomputed in backward."""

from __future__ import annotations

import functools
from collections.abc import Collection

from torch import nn
from torch.utils.checkpoint import checkpoint

from model.llm.causal_lm import blocks
from model.multimodal import ENCODERS, MultimodalLM
from trainer.config import ParallelConfig
from trainer.distributed.compiled_blocks import compile_blocks
from trainer.distributed.selective import recompute_selectively


def prepare_blocks(model: MultimodalLM, config: ParallelConfig) -> None:
    """Compile the blocks of all parts, and make backward recompute them, as `config` says. Names of parameters do not change.

    A compiler decides itself what backward computes again, so selective recomputation of what it compiles is left to it.
    """
    kind = config.activation_checkpointing
    compiled = [name for name, _ in model.named_children() if config.compile and has_blocks(model, name) and compiles(model, name)]
    if compiled:
        owners = {name: block_owner(model, name) for name in compiled}
        named = [(f"{part}.blocks.{i}", block) for part, owner in owners.items() for i, block in enumerate(blocks(owner))]
        compile_blocks(named, saves_memory=kind == "selective", goes_on=config.compile == "or_eager")
    if kind in ("full", "selective"):
        checkpoint_activations(model, kind, compiled if kind == "selective" else ())


def checkpoint_activations(model: MultimodalLM, kind: str = "full", spared: Collection[str] = ()) -> None:
    """Make backward recompute the blocks of every part on the gradient's path, but for those `spared`. Names of parameters do not
    change.

    `kind`: full | selective, which keeps most results of matrix products and of attention. Transformers' own switch does nothing in
    eval mode, which frozen parts are in.
    """
    for part in [block_owner(model, name) for name in {"llm", *model.trainable_parts} - {*spared} if has_blocks(model, name)]:
        if kind == "selective":
            recompute_selectively(blocks(part))
            continue
        for block in blocks(part):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def block_owner(model: MultimodalLM, part: str) -> nn.Module:
    """Return the module whose blocks are sharded and recomputed: the decoder, or the tower inside its wrapper."""
    return model.llm.get_decoder() if part == "llm" else model.encoder(part).tower


def compiles(model: MultimodalLM, part: str) -> bool:
    """Tell whether the blocks of a part become few graphs, whatever its input."""
    return part == "llm" or model.encoder(part).compiles


def has_blocks(model: MultimodalLM, part: str) -> bool:
    return part == "llm" or part in {encoder for encoder, _ in ENCODERS.values()}
