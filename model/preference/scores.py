"""Log-probabilities of the answers of a batch under the model that learns and under its reference, which losses compare."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import Answers, Batch


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of whole answers, float32, answer by answer."""

    policy: Tensor  # (A,) with graph
    reference: Tensor  # (A,) without graph; zeros where the kind of loss needs none
    answers: Answers
    num_samples: int
    shift: Tensor  # () the reward from which kto and mpo measure those of single answers

    def rewards(self, which: Tensor, beta: float) -> Tensor:
        """Return beta * log(policy / reference) of the answers `which`."""
        return beta * self.ratios(which)

    def ratios(self, which: Tensor) -> Tensor:
        """Return log(policy / reference) of the answers `which`."""
        return self.policy.index_select(0, which) - self.reference.index_select(0, which)

    def per_token(self, values: Tensor, which: Tensor) -> Tensor:
        """Return values of the answers `which`, each divided by the tokens of its answer."""
        return values / self.answers.tokens.index_select(0, which)

    def by_sample(self, which: Tensor, values: Tensor) -> Tensor:
        """Return (2, samples): the sum of the values of answers `which` and their number, sample by sample, without graph."""
        rows = torch.stack([values.detach(), torch.ones_like(values)])
        return rows.new_zeros(2, self.num_samples).index_add(1, self.answers.samples.index_select(0, which), rows)


def summed(token_log_probs: Tensor, answers: Answers) -> Tensor:
    """Return the log-probability of each answer (A,) from that of its tokens (R,)."""
    whole = token_log_probs.new_zeros(answers.samples.shape[0])
    return whole.index_add(0, answers.owners, token_log_probs)


def no_answers(batch: Batch) -> Answers:
    """Return the answers of a batch that holds no sample."""
    none = torch.zeros(0, dtype=torch.long, device=batch.input_ids.device)
    numbers = torch.zeros(0, device=batch.input_ids.device)
    return Answers(none, none, none, none, none, numbers, none, none, none, none, none, none)
