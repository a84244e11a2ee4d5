"""Proofs that packed samples, and answers to one prompt, do not see each other, for any language model that is about to train."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data.collate import collate_packed
from data.preference.collate import collate_answers_packed
from data.preference.sample import PreferenceSample, Role, SampleAnswer
from data.sample import Sample
from model.batch import IGNORE_INDEX, Batch
from model.errors import ConfigError
from model.input_gradient import input_gradient
from model.multimodal import MultimodalLM
from model.preference.tuning import measuring
from trainer.distributed.shards import reshard
from trainer.distributed.world import World

LENGTH = 8  # tokens of each of two samples, of a prompt and of each of its answers
ROUNDING = {torch.float32: 1e-3}
HALF_ROUNDING = 0.03
"""Largest change of losses when other tokens change the shapes of products: far above rounding, far below the effect of a leak."""


def prove_isolation(model: MultimodalLM, pad_id: int, world: World) -> None:
    """Raise `ConfigError` unless two packed samples leave each other alone. Collective, host sync.

    The gradient of each sample's loss must be exactly zero at the embeddings of the other sample: whatever attention, convolution
    or recurrence carries over a border leaves a gradient there. Then the first sample is replaced by another one, to find leaks
    without a gradient: the losses of the second sample may move by rounding, because the experts of a mixture then multiply other
    numbers of rows, but no further.
    """
    vocabulary = model.llm.get_input_embeddings().weight.shape[0]

    def found(start: int, target: int) -> tuple[Tensor, bool]:
        samples = [_counting_sample(start, vocabulary, target == 0), _counting_sample(0, vocabulary, target == 1)]
        return _losses_and_leak(model, collate_packed(samples, pad_id).to(world.device), target)

    model.eval()
    try:
        before, leaks_on = found(0, target=1)
        after, still_leaks_on = found(LENGTH, target=1)
        _, leaks_back = found(LENGTH, target=0)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data.packing = true: {type(model.llm).__name__} cannot take packed samples: {error}") from error
    model.train()
    reshard(model)
    # A router that is close to a tie may choose another expert for a token: the median of the losses is compared, not each loss.
    moved = ((after - before).abs() / before.abs().clamp(min=1)).median().item()
    if leaks_on or still_leaks_on or leaks_back or not moved <= ROUNDING.get(model.dtype, HALF_ROUNDING):
        raise ConfigError(
            f"data.packing = true: packed samples of {type(model.llm).__name__} see each other; set data.packing = false"
        )


def _losses_and_leak(model: MultimodalLM, batch: Batch, target: int) -> tuple[Tensor, bool]:
    """Return the losses (LENGTH - 1,) of the supervised sample `target`, and whether they depend on the other's embeddings."""
    tuning, model.preference = model.preference, None  # answers that are compared have a proof of their own
    try:
        term, _, gradient = input_gradient(model, batch)
    finally:
        model.preference = tuning
    other = slice(0, LENGTH) if target else slice(LENGTH, None)
    return term.addends, bool(gradient[0, other].ne(0).any().item())


def _counting_sample(start: int, vocabulary: int, supervised: bool) -> Sample:
    """Return a sample of ids that count up from `start`; all ids but the first are supervised, or none."""
    ids = (start + np.arange(LENGTH)) % vocabulary
    labels = np.append(ids[1:], IGNORE_INDEX) if supervised else np.full(LENGTH, IGNORE_INDEX)
    return Sample(0, 0, ids, labels, {})


ORDERS: tuple[tuple[Role, Role], ...] = (("chosen", "rejected"), ("rejected", "chosen"))


def prove_answers_apart(model: MultimodalLM, pad_id: int, world: World) -> None:
    """Raise `ConfigError` unless each of two answers sees the prompt and not the other answer. Collective, host sync.

    The gradient of an answer's loss must be exactly zero at the embeddings of the other one, and not at those of the prompt.
    """
    vocabulary = model.llm.get_input_embeddings().weight.shape[0]
    model.eval()
    with measuring(model.preference):
        leaks = [_leaks(model, _sample(roles, vocabulary), pad_id, world) for roles in ORDERS]
    model.train()
    reshard(model)
    if any(leaks):
        raise ConfigError(
            f"data.packing = true with [preference]: answers to one prompt see each other in {type(model.llm).__name__}, "
            "or do not see the prompt; set data.packing = false"
        )


def _leaks(model: MultimodalLM, sample: PreferenceSample, pad_id: int, world: World) -> bool:
    """Tell whether the loss of the chosen answer depends on the other one, or does not depend on the prompt."""
    batch = collate_answers_packed([sample], pad_id).to(world.device)
    _, _, gradient = input_gradient(model, batch)
    changes = gradient[0].ne(0).any(-1)
    other = next(answer for answer in sample.answers if answer.role == "rejected")
    return bool((changes[other.start : other.stop].any() | ~changes[:LENGTH].any()).item())


def _sample(roles: tuple[Role, Role], vocabulary: int) -> PreferenceSample:
    ids = np.arange(3 * LENGTH) % vocabulary
    answers = tuple(SampleAnswer(role, (k + 1) * LENGTH, (k + 2) * LENGTH, np.ones(LENGTH, bool)) for k, role in enumerate(roles))
    return PreferenceSample(0, 0, ids, np.full(len(ids), IGNORE_INDEX), {}, prompt=LENGTH, answers=answers)
