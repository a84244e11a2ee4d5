"""The proof that packed samples do not see each other, for whatever language model is about to train."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.collate import collate_packed
from data.sample import Sample
from model.batch import IGNORE_INDEX, Batch
from model.errors import ConfigError
from model.multimodal import MultimodalLM
from trainer.distributed.parallelize import reshard
from trainer.distributed.world import World

LENGTH = 8  # tokens of each of the two samples
ROUNDING = {torch.float32: 1e-3}
HALF_ROUNDING = 0.03
"""How far losses may move when other tokens change the shapes of products: far above rounding, far below what a leak does."""


def prove_isolation(model: MultimodalLM, pad_id: int, world: World) -> None:
    """Raise `ConfigError` unless two packed samples leave each other alone. Collective, host sync.

    The gradient of each one's loss is exactly zero at the other one's embeddings: whatever attention, convolution or recurrence
    carries over a border leaves a gradient there. Then the first sample is replaced by another one, for what has no gradient: the
    losses of the second may move by rounding, as the experts of a mixture multiply other numbers of rows then, but no further.
    """
    vocabulary = model.llm.get_input_embeddings().weight.shape[0]  # type: ignore[operator]

    def found(start: int, asked: int) -> tuple[Tensor, bool]:
        samples = [_counting(start, vocabulary, asked == 0), _counting(0, vocabulary, asked == 1)]
        return _losses_and_leak(model, collate_packed(samples, pad_id).to(world.device), asked)

    model.eval()
    try:
        before, leaks_on = found(0, asked=1)
        after, still_leaks_on = found(LENGTH, asked=1)
        _, leaks_back = found(LENGTH, asked=0)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data.packing = true: {type(model.llm).__name__} cannot take packed samples: {error}") from error
    model.train()
    reshard(model)
    # A router that hesitates between two experts may choose the other one for a token: most losses are judged, not each.
    moved = ((after - before).abs() / before.abs().clamp(min=1)).median().item()
    if leaks_on or still_leaks_on or leaks_back or not moved <= ROUNDING.get(model.dtype, HALF_ROUNDING):
        raise ConfigError(
            f"data.packing = true: packed samples of {type(model.llm).__name__} see each other; set data.packing = false"
        )


def _losses_and_leak(model: MultimodalLM, batch: Batch, asked: int) -> tuple[Tensor, bool]:
    """The losses (LENGTH - 1,) of sample `asked`, the one that is supervised, and whether they hang on the other's embeddings."""
    given: list[Tensor] = []

    def entered(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given.append(options["inputs_embeds"].detach().requires_grad_())
        return args, {**options, "inputs_embeds": given[0]}

    decoder: Any = model.llm.get_decoder()  # type: ignore[operator]
    hook = decoder.register_forward_pre_hook(entered, with_kwargs=True)
    try:
        term = model(batch)["text"]
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(term.sum, given)
    other = slice(0, LENGTH) if asked else slice(LENGTH, None)
    return term.addends, bool(gradient[0, other].ne(0).any().item())


def _counting(start: int, vocabulary: int, supervised: bool) -> Sample:
    """A sample of ids that count up from `start`, all of which but the first are supervised, or none."""
    ids = (start + np.arange(LENGTH)) % vocabulary
    labels = np.append(ids[1:], IGNORE_INDEX) if supervised else np.full(LENGTH, IGNORE_INDEX)
    return Sample(0, 0, ids, labels, {})
