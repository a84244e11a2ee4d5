"""Proof that answers to one prompt in a packed row do not see each other, for any language model that is about to train."""

from __future__ import annotations

import numpy as np

from data.preference.collate import collate_answers_packed
from data.preference.sample import PreferenceSample, Role, SampleAnswer
from model.batch import IGNORE_INDEX
from model.errors import ConfigError
from model.input_gradient import input_gradient
from model.multimodal import MultimodalLM
from model.preference.tuning import measuring
from trainer.distributed.shards import reshard
from trainer.distributed.world import World

ORDERS: tuple[tuple[Role, Role], ...] = (("chosen", "rejected"), ("rejected", "chosen"))
LENGTH = 8  # tokens of the prompt and of each answer


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
    """Return a sample of ids that count up."""
    ids = np.arange(3 * LENGTH) % vocabulary
    answers = tuple(SampleAnswer(role, (k + 1) * LENGTH, (k + 2) * LENGTH, np.ones(LENGTH, bool)) for k, role in enumerate(roles))
    return PreferenceSample(0, 0, ids, np.full(len(ids), IGNORE_INDEX), {}, prompt=LENGTH, answers=answers)
