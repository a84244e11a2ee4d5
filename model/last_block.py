"""The last block of a decoder, of which the loss reads the supervised rows alone.

Of the other rows only keys and values are needed. What follows attention, and the decoder's final norm, is computed of the
supervised rows, with the same arithmetic for each. A class of blocks is taken where a probe shows that it computes what
`standard_block` does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from model.errors import ConfigError
from model.lean_layers import probe_numbers, with_forward
from model.llm.causal_lm import blocks

DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
"""Parts of a decoder whose blocks are called once each, and which only norms what the last one returns."""
BLOCK = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


class BlockLayers(Protocol):
    """Interface of a block: its parts, as transformers names them."""

    input_layernorm: Callable[[Tensor], Tensor]
    self_attn: Callable[..., tuple[Tensor, object]]
    post_attention_layernorm: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]


def standard_block(block: BlockLayers, hidden_states: Tensor, rows: Tensor | None, **options: object) -> Tensor:
    """Compute a block that norms the input of its attention and of its MLP: hidden_states (B, T, D) -> (B, T, D).

    Given flat positions `rows` (S,), its second half is computed of these alone -> (1, S, D). Attention is given `options`.
    """
    found = hidden_states + block.self_attn(hidden_states=block.input_layernorm(hidden_states), **options)[0]
    if rows is not None:
        found = found.flatten(0, 1).index_select(0, rows)[None]
    return found + block.mlp(block.post_attention_layernorm(found))


def make_last_block_selective(decoder: nn.Module) -> bool:
    """Let the last block of `decoder` take flat positions `supervised_rows` (S,), and return these alone. Names do not change.

    Returns False, and changes nothing, where it is no such block: it then computes all rows. To be called before adapters take the
    place of layers, and after everybody who hooks into blocks.
    """
    try:
        last = blocks(decoder)[-1]
    except ConfigError:
        return False
    if not (_is_plain(decoder, last) and _is_standard(type(last))):
        return False
    last.__class__ = with_forward(type(last), _selective(type(last).forward))
    return True


def _is_plain(decoder: nn.Module, last: nn.Module) -> bool:
    """Tell whether decoder and block have the parts they should have, whose MLP treats each row by itself, and no hooks."""
    if {name for name, _ in decoder.named_children()} != DECODER or {name for name, _ in last.named_children()} != BLOCK:
        return False
    mlp = cast(nn.Module, last.mlp)
    by_row = all(isinstance(layer, nn.Linear) or not list(layer.parameters()) for layer in mlp.children())  # no experts
    hooked = last._forward_hooks or last._forward_pre_hooks
    return by_row and not list(mlp.parameters(recurse=False)) and not hooked


def _is_standard(kind: type[nn.Module]) -> bool:
    """Tell whether a class of blocks computes what `standard_block` does, to the bit, and hands attention the same options."""
    plain = inspect.unwrap(kind.forward)
    if not isinstance(plain, FunctionType) or not plain.__module__.startswith("transformers."):
        return False
    named = [p.name for p in inspect.signature(plain).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][2:]
    options = {name: object() for name in (*named, "another")}
    handed: list[dict[str, object]] = []

    def attention(hidden_states: Tensor, **options: object) -> tuple[Tensor, None]:
        handed.append(options)
        return hidden_states * 3, None

    layers = SimpleNamespace(
        input_layernorm=lambda x: x + 1, self_attn=attention, post_attention_layernorm=torch.square, mlp=torch.sin
    )
    x = probe_numbers(2, 3, 8)
    try:
        found = plain(layers, x, **options)
    except (AttributeError, TypeError, ValueError):  # it reads more of its module, or of what attention returns
        return False
    expected = standard_block(layers, x, None, **options)
    return isinstance(found, Tensor) and torch.equal(found, expected) and handed == [options, options]


def _selective(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the forward of a block that takes `supervised_rows`; without them it is that of its class."""

    def forward(
        self: BlockLayers, hidden_states: Tensor, *args: object, supervised_rows: Tensor | None = None, **options: object
    ) -> Tensor:
        if supervised_rows is None or args:
            return plain(self, hidden_states, *args, **options)
        return standard_block(self, hidden_states, supervised_rows, **options)

    return forward
