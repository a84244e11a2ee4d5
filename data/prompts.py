"""Prompts of records: all that stands before the answer that is asked for, as a user would send it."""

from __future__ import annotations

from dataclasses import replace

from data.records.record import Record
from data.records.turns import Turn
from data.text.encoded import Encoded
from data.text.rounds import THOUGHTFUL
from data.text.template import Template


def split_answer(record: Record) -> tuple[Record, Turn | None]:
    """Return the record up to its last answer, and that answer; None where the record ends with a question.

    Media stay as they are: none stands in an answer.
    """
    *before, last = record.turns
    return (replace(record, turns=tuple(before)), last) if last.role == "assistant" else (record, None)


def encode_prompt(template: Template, record: Record, thinking: bool = False) -> Encoded:
    """Render the prompt of `record` as ids, of any length.

    `thinking`: the answer begins with a thought, where the record has no answer that decides it.
    """
    asked, answer = split_answer(record)
    ids = template.prompt(asked, answer or (THOUGHTFUL if thinking else None))
    return Encoded(ids, [False] * len(ids), [len(ids)])
