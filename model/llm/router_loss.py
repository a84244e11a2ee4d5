"""Load-balancing loss for mixtures of experts, computed from router logits that forward hooks collect."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from model.batch import Batch
from model.errors import ConfigError
from model.loss import Term

ROUTER = "TopKRouter"
"""Suffix of the class names of transformers' modules that choose experts; their first output is the logits (tokens, E)."""


class RouterTap:
    """The loss term `router`: collects the router logits of a decoder's forward, and computes the load-balancing loss from them.

    Forward hooks collect the logits, because a sharded decoder returns no router logits. The hooks collect only between `listen`
    and `term`, so recomputation in backward, and generation, keep no tensors alive.
    """

    def __init__(self, decoder: nn.Module, coefficient: float) -> None:
        """Register hooks on the routers of `decoder`. Raises `ConfigError` when it has none."""
        self.coefficient = coefficient
        self.routers: list[Any] = [module for module in decoder.modules() if type(module).__name__.endswith(ROUTER)]
        if not self.routers:
            raise ConfigError(
                f"model.llm.router_loss = {coefficient} has no effect: {type(decoder).__name__} is no mixture of experts "
                f"(no module of it is called ...{ROUTER}); set it to 0"
            )
        self.listening = False
        for module in self.routers:
            module.register_forward_hook(self._keep)

    def listen(self) -> None:
        """Start collecting router logits, until `term` takes them."""
        self.listening = True

    def _keep(self, module: Any, inputs: object, output: tuple[Tensor, ...]) -> None:
        if self.listening:
            # On the module: a list that grows from layer to layer would make every compiled layer another graph.
            module.seen_logits = output[0].flatten(0, -2)

    def count(self, batch: Batch) -> float:
        """Return the number of samples."""
        return float(len(batch.lengths))

    def term(self, hidden: Tensor, batch: Batch) -> Term:
        """Return the loss summed over the samples of `batch`, each over its own real tokens.

        Raises `RuntimeError` if a router was not called.
        """
        self.listening = False
        logits: list[Tensor] = [vars(module).pop("seen_logits") for module in self.routers if "seen_logits" in vars(module)]
        if len(logits) != len(self.routers):
            raise RuntimeError(f"{len(logits)} of {len(self.routers)} routers were called: their balance is not known")
        losses = balancing_losses(logits, token_owners(batch), len(batch.lengths), self.routers[0].top_k)
        total = losses.sum()
        count = torch.full_like(total, self.count(batch), requires_grad=False)
        return Term(total, losses.detach(), {"router_loss": torch.stack([total.detach(), count])})


def balancing_losses(logits: list[Tensor], owners: Tensor, num_samples: int, top_k: int) -> Tensor:
    """Return the load-balancing loss of each sample, (n,) float32: E * sum over experts of (share of choices) * (mean probability),
    over all layers and the sample's own tokens (Fedus et al. 2021, equations 4 to 6; Mixtral's form, one sample at a time).

    logits: (tokens, E) of each layer; owners (tokens,): sample of each token, `num_samples` for padding.
    """
    probs = [layer.float().softmax(-1) for layer in logits]
    chosen = torch.zeros_like(probs[0], requires_grad=False)
    for layer in probs:
        picked = layer.detach().topk(top_k, -1).indices
        chosen.scatter_add_(-1, picked, torch.ones_like(picked, dtype=chosen.dtype))
    num_experts = chosen.shape[-1]
    found = torch.cat([torch.stack(probs).sum(0), chosen, torch.full_like(chosen[:, :1], len(logits))], -1)
    # One bin more than samples: the last one collects padding.
    sums = found.new_zeros(num_samples + 1, found.shape[-1]).index_add(0, owners, found)[:num_samples]
    mass, choices, tokens = sums.split([num_experts, num_experts, 1], -1)
    return num_experts * (mass / tokens * (choices / tokens)).sum(-1)


def token_owners(batch: Batch) -> Tensor:
    """Return the sample of `batch` that each position belongs to, (B * T,) int64; padding gets their number. No host sync.

    Samples of preferences have a row, or a segment, for each of their answers.
    """
    if batch.answers is not None:
        plain = token_owners(replace(batch, answers=None, lengths=batch.lengths[:1] * batch.answers.rows.shape[0]))
        return torch.cat([batch.answers.rows, plain.new_full((1,), len(batch.lengths))]).index_select(0, plain)
    num_rows, length = batch.input_ids.shape
    device = batch.input_ids.device
    if batch.segment_borders is not None:
        positions = torch.arange(length, dtype=batch.segment_borders.dtype, device=device)
        return torch.searchsorted(batch.segment_borders[1:], positions, right=True)
    rows = torch.arange(num_rows, device=device)[:, None].expand(num_rows, length)
    if batch.attention_mask is not None:
        rows = rows.where(batch.attention_mask.bool(), len(batch.lengths))
    return rows.flatten()
