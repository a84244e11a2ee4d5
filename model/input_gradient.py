"""Gradient of a loss with respect to what the language model is given: one row for each position."""

from __future__ import annotations

import torch
from torch import Tensor

from model.batch import Batch
from model.loss import Term
from model.multimodal import MultimodalLM


def input_gradient(model: MultimodalLM, batch: Batch) -> tuple[Term, Tensor, Tensor]:
    """Return the text term of a forward, the embeddings (B, T, D) that the decoder was given, and the term's gradient for them.

    No parameter gets a gradient.
    """
    given: list[Tensor] = []

    def capture(_: object, args: tuple[()], options: dict[str, object]) -> tuple[tuple[()], dict[str, object]]:
        embeds = options["inputs_embeds"]
        assert isinstance(embeds, Tensor)
        given.append(embeds.detach().requires_grad_())
        return args, {**options, "inputs_embeds": given[0]}

    hook = model.llm.get_decoder().register_forward_pre_hook(capture, with_kwargs=True)
    try:
        with torch.enable_grad():
            term = model(batch)["text"]
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(term.sum, given)
    return term, given[0].detach(), gradient
