"""Losses of preferences by kind, each a term with its own count. docs/preference.md has the formulas and their sources."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import Answers
from model.loss import Term
from model.preference.config import PreferenceConfig
from model.preference.scores import Scores


class AnswerTerm(Protocol):
    """A term of the loss that compares log-probabilities of answers; see `model.loss.LossTerm`."""

    coefficient: float

    def count(self, answers: Answers) -> float:
        """Return the answers' share of the divisor, known before the forward."""

    def term(self, scores: Scores) -> Term:
        """Compute the term."""


PairLoss = Callable[[PreferenceConfig, Scores], Tensor]
"""Returns the loss of each pair (P,)."""


def dpo(config: PreferenceConfig, scores: Scores) -> Tensor:
    """Compute DPO (Rafailov et al. 2023, equation 7); with label smoothing it is conservative DPO (Mitchell 2023)."""
    logits = config.beta * log_ratio_difference(config, scores)
    smoothing = config.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


def ipo(config: PreferenceConfig, scores: Scores) -> Tensor:
    """Compute IPO (Azar et al. 2023, equation 17)."""
    return (log_ratio_difference(config, scores) - 1 / (2 * config.beta)).square()


def simpo(config: PreferenceConfig, scores: Scores) -> Tensor:
    """Compute SimPO (Meng et al. 2024, equation 6)."""
    chosen, rejected = (scores.per_token(scores.policy.index_select(0, which), which) for which in _pair(scores))
    return -F.logsigmoid(config.beta * (chosen - rejected) - config.margin)


def orpo(config: PreferenceConfig, scores: Scores) -> Tensor:
    """Compute ORPO's loss of odds (Hong et al. 2024, equation 7), whose coefficient is beta beside that of the text term."""
    chosen, rejected = (log_odds(scores.per_token(scores.policy.index_select(0, which), which)) for which in _pair(scores))
    return -F.logsigmoid(chosen - rejected)


def log_odds(log_prob: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of log p."""
    return log_prob - torch.log(-torch.expm1(log_prob))


def log_ratio_difference(config: PreferenceConfig, scores: Scores) -> Tensor:
    """Return log(policy / reference) of the chosen answers less that of the rejected ones (P,)."""
    chosen, rejected = (scores.ratios(which) for which in _pair(scores))
    if config.length_normalisation:
        chosen, rejected = (scores.per_token(values, which) for values, which in zip((chosen, rejected), _pair(scores)))
    return chosen - rejected


def _pair(scores: Scores) -> tuple[Tensor, Tensor]:
    return scores.answers.chosen, scores.answers.rejected


PAIR_LOSSES: dict[str, PairLoss] = {"dpo": dpo, "ipo": ipo, "simpo": simpo, "orpo": orpo, "mpo": dpo}
"""What compares the two answers of a pair, by kind."""


class PairTerm:
    """The mean over pairs of a loss of the two answers."""

    def __init__(self, config: PreferenceConfig) -> None:
        self.config, self.loss = config, PAIR_LOSSES[config.kind]
        self.coefficient = {"orpo": config.beta, "mpo": config.preference_weight}.get(config.kind, 1.0)

    def count(self, answers: Answers) -> float:
        """Return the number of pairs."""
        return float(answers.chosen.shape[0])

    def term(self, scores: Scores) -> Term:
        """Compute the term, and what is logged of the pairs."""
        losses = self.loss(self.config, scores)
        return Term(losses.sum(), losses.detach(), {"preference_loss": scores.by_sample(scores.answers.chosen, losses)})


class QualityTerm:
    """The loss of each answer of a pair by itself, BCO's (Jung et al. 2024), as MPO adds it (Wang et al. 2024, equation 5).

    Rewards are measured from `shift`, the mean of all rewards of the steps before.
    """

    def __init__(self, config: PreferenceConfig) -> None:
        self.config, self.coefficient = config, config.quality_weight

    def count(self, answers: Answers) -> float:
        """Return the number of pairs."""
        return float(answers.chosen.shape[0])

    def term(self, scores: Scores) -> Term:
        """Compute the term."""
        chosen, rejected = (scores.rewards(which, self.config.beta) - scores.shift for which in _pair(scores))
        losses = -F.logsigmoid(chosen) - F.logsigmoid(-rejected)
        return Term(losses.sum(), losses.detach(), {"quality_loss": scores.by_sample(scores.answers.chosen, losses)})


class GenerationTerm:
    """The supervised loss of chosen answers, each the mean over its own tokens (Wang et al. 2024, equation 7)."""

    def __init__(self, config: PreferenceConfig) -> None:
        self.coefficient = config.sft

    def count(self, answers: Answers) -> float:
        """Return the number of chosen answers."""
        return float(answers.chosen.shape[0])

    def term(self, scores: Scores) -> Term:
        """Compute the term."""
        which = scores.answers.chosen
        losses = -scores.per_token(scores.policy.index_select(0, which), which)
        return Term(losses.sum(), losses.detach(), {"generation_loss": scores.by_sample(which, losses)})


class JudgedTerm:
    """KTO (Ethayarajh et al. 2024, equation 8) of answers that are wanted or not, both answers of a pair among them.

    Rewards are measured from `shift`, beta times the divergence from the reference in this step.
    """

    def __init__(self, config: PreferenceConfig) -> None:
        self.config, self.coefficient = config, 1.0

    def count(self, answers: Answers) -> float:
        """Return the number of answers that are judged."""
        return float(sum(which.shape[0] for which in (*wanted(answers), *unwanted(answers))))

    def term(self, scores: Scores) -> Term:
        """Compute the term."""
        config, answers = self.config, scores.answers
        good, bad = torch.cat(wanted(answers)), torch.cat(unwanted(answers))
        good_losses = config.desirable_weight * (1 - torch.sigmoid(scores.rewards(good, config.beta) - scores.shift))
        bad_losses = config.undesirable_weight * (1 - torch.sigmoid(scores.shift - scores.rewards(bad, config.beta)))
        losses = torch.cat([good_losses, bad_losses])
        found = scores.by_sample(torch.cat([good, bad]), losses)
        return Term(losses.sum(), losses.detach(), {"preference_loss": found})


def wanted(answers: Answers) -> tuple[Tensor, Tensor]:
    """Return the answers that are chosen, and those that are wanted by themselves."""
    return answers.chosen, answers.desirable


def unwanted(answers: Answers) -> tuple[Tensor, Tensor]:
    """Return the answers that are rejected, and those that are unwanted by themselves."""
    return answers.rejected, answers.undesirable


def terms_of(config: PreferenceConfig) -> dict[str, AnswerTerm]:
    """Return the terms of a kind of preference tuning by name, beside the text term."""
    if config.kind == "kto":
        return {"preference": JudgedTerm(config)}
    terms: dict[str, AnswerTerm] = {"preference": PairTerm(config)}
    if config.kind == "mpo":
        terms |= {"quality": QualityTerm(config), "generation": GenerationTerm(config)}
    return terms
