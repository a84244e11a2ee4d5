"""Answers that a run compares, as the inspector shows them: side by side, behind the prompt that they share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerFast

from data.preference.sample import PreferenceSample, Role
from data.sample import Sample
from model.batch import IGNORE_INDEX
from tools.inspector.tokens import Piece, token_pieces

WANTED = ("chosen", "desirable")
"""Answers that are shown in the colour of what is learned; others have one of their own."""


@dataclass(frozen=True)
class AnswerText:
    """One answer of a record."""

    role: Role
    num_tokens: int
    pieces: tuple[Piece, ...]  # learned: its probability counts

    @property
    def is_wanted(self) -> bool:
        return self.role in WANTED


def answer_texts(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> tuple[AnswerText, ...]:
    """Return the answers of a sample of preferences; none of another one."""
    if not isinstance(sample, PreferenceSample):
        return ()
    ids = sample.input_ids.tolist()
    before = ids[sample.prompt - 1 : sample.prompt]
    found = []
    for answer in sample.answers:
        pieces = token_pieces(tokenizer, ids[answer.start : answer.stop], answer.counted.tolist(), before)
        found.append(AnswerText(answer.role, int(answer.counted.sum()), tuple(pieces)))
    return tuple(found)


def prompt_of(sample: Sample) -> Sample:
    """Return the part of a sample before its answers, where those are shown apart; else the sample."""
    if not isinstance(sample, PreferenceSample):
        return sample
    return replace(sample, input_ids=sample.input_ids[: sample.prompt], labels=np.full(sample.prompt, IGNORE_INDEX))
