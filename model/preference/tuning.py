"""Preference tuning of a model: the log-probabilities of a batch's answers, those of the reference, and the terms made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from model.batch import Answers, Batch
from model.llm.causal_lm import head_weight
from model.llm.new_tokens import new_head_rows
from model.lora import switched_off
from model.loss import HeadOptions, Term
from model.preference.config import WITH_REFERENCE, PreferenceConfig
from model.preference.log_probs import token_log_probs
from model.preference.losses import terms_of, unwanted, wanted
from model.preference.scored import ScoredModel
from model.preference.scores import Scores, no_answers, summed
from model.preference.shift import RewardShift


class PreferenceTuning:
    """Preference tuning of one model. `adapters_off` says that the reference is the model without its adapters."""

    def __init__(self, config: PreferenceConfig) -> None:
        self.config, self.terms = config, terms_of(config)
        self.shift = RewardShift(config)
        self.adapters_off = False
        self.measured: list[Tensor] | None = None  # collects the log-probabilities (A,) of every batch, while it is a list
        self.seen: list[Scores] | None = None  # collects the scores of every batch, while it is a list

    @property
    def needs_reference(self) -> bool:
        return self.config.kind in WITH_REFERENCE

    def coefficients(self) -> dict[str, float]:
        """Return the factor of each term in the loss; that of the text comes first."""
        text = 0.0 if "generation" in self.terms else self.config.sft
        return {"text": text, **{name: term.coefficient for name, term in self.terms.items()}}

    def counts(self, batches: Sequence[Batch]) -> dict[str, Tensor | float]:
        """Return the divisor of each term but the text's over `batches`, known before the forward."""
        found = [batch.answers for batch in batches if batch.answers is not None]
        return {name: float(sum(term.count(answers) for answers in found)) for name, term in self.terms.items()}

    def compute(self, model: ScoredModel, batch: Batch) -> tuple[dict[str, Term], Tensor]:
        """Compute the text term and those of preferences, and the decoder's output (B, T, D), of a `MultimodalLM`."""
        answers = no_answers(batch) if batch.answers is None else batch.answers
        embeds = model.embed(batch)
        reference = self._reference(model, batch, answers, embeds)
        hidden = model.decode_embeds(embeds, batch)
        tokens = answer_log_probs(model, hidden, answers)
        policy = summed(tokens, answers)
        scores = Scores(policy, reference, answers, len(batch.lengths), self.shift.value(policy))
        self._note(scores)
        learned = tokens.index_select(0, answers.learned)
        text = Term(-learned.sum(), -learned.detach(), self._report(scores))
        return {"text": text, **{name: term.term(scores) for name, term in self.terms.items()}}, hidden

    def _note(self, scores: Scores) -> None:
        if self.measured is not None:
            self.measured.append(scores.policy.detach())
        elif self.seen is not None:
            self.seen.append(scores)
        elif torch.is_grad_enabled() and self.config.kind == "mpo":
            self.shift.add(scores)

    def _reference(self, model: ScoredModel, batch: Batch, answers: Answers, embeds: Tensor) -> Tensor:
        """Return the log-probability of each answer under the reference (A,)."""
        if not self.needs_reference or self.measured is not None:
            return torch.zeros_like(answers.tokens)
        if answers.reference is not None:
            return answers.reference
        if not self.adapters_off and answers.samples.numel():
            raise RuntimeError("the log-probabilities of the reference are not known, and it is not the model without adapters")
        if not self.adapters_off:
            return torch.zeros_like(answers.tokens)
        # On a rank without answers too: all ranks have to run the same collectives.
        with torch.no_grad(), switched_off(cast(nn.Module, model)):
            # What no adapter reaches is the same for both: pictures are encoded once.
            shared = embeds.detach() if model.trainable_parts == {"llm"} else model.embed(batch)
            return summed(answer_log_probs(model, model.decode_embeds(shared, batch), answers), answers)

    def _report(self, scores: Scores) -> Mapping[str, Tensor]:
        """Return what is logged of every sample, (2, samples) sums and counts by name."""
        answers, beta = scores.answers, self.config.beta
        good, bad = torch.cat(wanted(answers)), torch.cat(unwanted(answers))
        found = {
            "chosen_log_prob": scores.by_sample(good, scores.policy.index_select(0, good)),
            "rejected_log_prob": scores.by_sample(bad, scores.policy.index_select(0, bad)),
        }
        rewards = (scores.rewards(which, beta) for which in (answers.chosen, answers.rejected))
        if not self.needs_reference:  # the rewards of simpo and orpo are of the model alone, per token
            rewards = (scores.per_token(values, which) for values, which in zip(rewards, (answers.chosen, answers.rejected)))
        margins = torch.sub(*rewards)
        found["preference_margin"] = scores.by_sample(answers.chosen, margins)
        found["preference_accuracy"] = scores.by_sample(answers.chosen, (margins > 0).float())
        if self.needs_reference:
            every = torch.cat([good, bad])
            found["chosen_reward"] = scores.by_sample(good, scores.rewards(good, beta))
            found["rejected_reward"] = scores.by_sample(bad, scores.rewards(bad, beta))
            found["reference_kl"] = scores.by_sample(every, scores.per_token(scores.ratios(every), every))
        return found

    def prepare(self, wrapped: nn.Module, batches: list[Batch]) -> list[Batch]:
        """Return the micro-batches of a step as it computes them, after what has to be known of all of them before. Collective."""
        if self.config.kind != "kto":
            return batches
        training, self.seen = wrapped.training, []
        wrapped.eval()
        with torch.no_grad():
            for batch in batches:
                wrapped(batch)
        wrapped.train(training)
        seen, self.seen = self.seen, None
        for scores in seen:
            self.shift.add(scores)
        # Batches without answers too: no rank computes a reference again.
        return [replace(batch, answers=replace(of.answers, reference=of.reference)) for batch, of in zip(batches, seen)]


@contextmanager
def measuring(tuning: PreferenceTuning | None) -> Iterator[list[Tensor]]:
    """Collect, inside the context, the log-probabilities (A,) of the answers of every batch, and ask for no reference."""
    found: list[Tensor] = []
    if tuning is not None:
        tuning.measured = found
    try:
        yield found
    finally:
        if tuning is not None:
            tuning.measured = None


def answer_log_probs(model: ScoredModel, hidden: Tensor, answers: Answers) -> Tensor:
    """Compute the log-probability of every token of the answers (R,) from the decoder's output (B, T, D) of a `MultimodalLM`."""
    rows = hidden.flatten(0, 1).index_select(0, answers.positions)
    options = HeadOptions(change=model.llm.logit_change, new=new_head_rows(model.llm, model.dtype))
    return token_log_probs(rows, head_weight(model.llm).to(model.dtype), answers.targets, options)
