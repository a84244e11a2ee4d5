"""Scaling and capping between a language model's head and its logits, found by running the model's own head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from model.errors import ConfigError
from model.llm.interface import CausalLM, LogitChange

SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier", "logits_mup_width_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap")
"""Settings by which families scale their logits or cap them softly. One name may mean a factor here and a divisor there."""
NUM_ROWS, NUM_COLUMNS = 8, 16
SPREAD = 8.0
"""Standard deviation of the compared products: large enough for a cap of 30 to 50 to have an effect."""
TOLERANCE = 1e-5
"""Largest accepted difference, relative to the largest logit."""


def logit_change(llm: CausalLM) -> LogitChange:
    """Find the change under which the products of a few random rows equal the logits that `llm` computes from these rows.

    Only the head runs, with a small random matrix in place of its own, so parameters may be on meta. Raises `ConfigError` when no
    setting in the config explains the logits: a loss computed from the products would be silently wrong.
    """
    width = llm.get_input_embeddings().embedding_dim
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, NUM_ROWS, width, generator=generator)
    weight = torch.randn(NUM_COLUMNS, width, generator=generator) * (SPREAD / width**0.5)
    logits = _logits_of(llm, hidden, weight)
    for change in _candidates(llm.config):
        found = change(hidden @ weight.T)
        if logits.shape == found.shape and (found - logits).abs().max() <= TOLERANCE * logits.abs().max():
            return change
    raise ConfigError(
        f"model.llm.path: {type(llm).__name__} changes its logits after the head's product in a way that is not supported: "
        f"neither {', '.join(SCALES)} nor {', '.join(CAPS)} of its config.json explains them"
    )


def _candidates(config: PretrainedConfig) -> Iterator[LogitChange]:
    scales, caps = ([float(v) for name in names if _is_number(v := getattr(config, name, None))] for names in (SCALES, CAPS))
    factors = [1.0, *scales, *(1 / value for value in scales)]
    for cap, scale in product((None, *caps), factors):
        yield LogitChange(scale, cap)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value != 0


def _logits_of(llm: CausalLM, hidden: Tensor, weight: Tensor) -> Tensor:
    """Compute the logits of `llm` for a decoder output `hidden` and a head matrix `weight`."""
    with torch.no_grad(), _replaced_decoder(llm, hidden, weight):
        try:
            logits: Tensor = llm(inputs_embeds=torch.zeros_like(hidden), use_cache=False).logits
        except (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError) as error:
            raise ConfigError(
                f"model.llm.path: {type(llm).__name__} cannot be asked what it does with its logits ({error}); not supported"
            ) from error
    if logits.is_meta:
        raise ConfigError(f"model.llm.path: {type(llm).__name__} does more than its decoder before the head; not supported")
    return logits.float()


@dataclass(frozen=True)
class FixedDecoderOutput:
    """A decoder output for the head: it has a last hidden state, and every other attribute is None."""

    last_hidden_state: Tensor

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, place: int | slice) -> Tensor | tuple[Tensor, ...]:
        return (self.last_hidden_state,)[place]


@contextmanager
def _replaced_decoder(llm: CausalLM, hidden: Tensor, weight: Tensor) -> Iterator[None]:
    """Make the decoder return `hidden` for any input, and the head multiply by `weight`, inside the context."""
    decoder, head = llm.get_decoder(), llm.get_output_embeddings()
    forwards: list[tuple[nn.Module, Callable[..., object]]]
    forwards = [(decoder, lambda *_, **__: FixedDecoderOutput(hidden)), (head, lambda x: F.linear(x, weight))]
    try:
        for module, forward in forwards:
            module.forward = forward
        yield
    finally:
        for module, _ in forwards:
            del module.forward
