"""Proof on rows of a source that exactly the tokens are learned that the design says, before anything is trained on the source."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from data.index.record_index import RecordIndex
from data.records.record import Record, RecordError, parse
from data.records.turns import MARKS
from data.text.abilities import Message
from data.text.chat_formats import FORMATS, with_system_text
from data.text.messages import media_kinds
from data.text.render import TemplateInputs, apply
from data.text.rounds import TooLongError
from data.text.template import Encoded, Template
from model.errors import DataError


@dataclass(frozen=True)
class Certificate:
    """Facts that were proven about a source, for the log."""

    source: str
    rows: tuple[int, ...]  # rows that were checked
    num_tokens: int
    num_supervised: int
    bad: tuple[str, ...]  # records passed over because they break the rules; they are counted when training reads them
    removed: int = 0  # number of answers that the template shortens

    def __str__(self) -> str:
        bad = f", {len(self.bad)} bad records passed over" if self.bad else ""
        removed = f", the thoughts of {self.removed} answers left out by the template" if self.removed else ""
        supervised = f"{self.num_supervised} of {self.num_tokens} tokens supervised"
        return f"{self.source}: {len(self.rows)} rows certified, {supervised}{removed}{bad}"


class UnprovenError(RecordError):
    """A record whose ids or whose supervision are not what they have to be."""


def encode_proven(template: Template, record: Record, max_length: int | None = None) -> Encoded:
    """Encode the record, and prove it as every row of a certificate is proven: what passes here passes at the start of a run.

    Last rounds that cannot fit into `max_length` have no part in the proof. Raises `RecordError`; `UnprovenError` if the proof
    fails.
    """
    if max_length is None:
        encoded = of = template.encode(record)
    else:
        encoded = of = template.encode(record, max_length)
        fitted = template.fitting(record, max_length)
        if fitted is not record:
            record, of = fitted, template.encode(fitted)
    if problem := _problem(template, record, of):
        raise UnprovenError(record.where, record.id, f"data.template {template.name!r} is not proven", problem)
    return encoded


def certify(
    template: Template,
    index: RecordIndex,
    source_key: str,
    num_rows: int = 8,
    max_length: int | None = None,
    on_progress: Callable[[str], object] = lambda at: None,
) -> Certificate:
    """Check up to `num_rows` rows spread over the source; rows that break the rules of records are passed over.

    `on_progress` is called with the place of the row that is next. Raises `DataError` if a row's ids differ from the reference, an
    answer or its end is not learned, anything else is learned, or the prompt's ids are no prefix of the row's; or if no row can be
    encoded for another reason than its length.
    """
    rows: list[int] = []
    bad: list[str] = []
    num_tokens = num_supervised = removed = num_too_long = 0
    for i in _spread(len(index), 8 * num_rows):
        if len(rows) == num_rows:
            break
        on_progress(index.where(i))
        try:
            record = parse(index.raw(i), index.where(i), index.name(i))
            encoded = encode_proven(template, record, max_length)
        except UnprovenError as error:
            raise DataError(str(error)) from None
        except RecordError as error:
            num_too_long += isinstance(error, TooLongError)
            bad.append(str(error))
            continue
        rows.append(i)
        num_tokens += len(encoded.input_ids)
        num_supervised += sum(encoded.supervised)
        removed += encoded.removed
    if not rows and num_too_long < len(bad):  # records that are too long are judged by their share, and by their lengths
        raise DataError(f"data.sources {source_key!r}: none of {len(bad)} rows can be encoded; the first: {bad[0]}")
    return Certificate(source_key, tuple(rows), num_tokens, num_supervised, tuple(bad), removed)


def _spread(length: int, count: int) -> Iterator[int]:
    """Yield up to `count` rows, halving the gaps as it goes: however few are taken, they come from all over the file."""
    bits = max(1, (length - 1).bit_length())
    order = (int(f"{k:0{bits}b}"[::-1], 2) for k in range(1 << bits))
    for taken, row in enumerate(row for row in order if row < length):
        if taken == count:
            return
        yield row


def _problem(template: Template, record: Record, encoded: Encoded) -> str:
    """Return what is wrong with a row, or an empty string. Every check takes another path than the code under proof."""
    ids, supervised = encoded.input_ids, encoded.supervised
    if any(learned and i in template.placeholder_ids.values() for i, learned in zip(ids, supervised)):
        return "a placeholder is supervised"
    runs = [k for k in range(len(ids)) if supervised[k] and not (k and supervised[k - 1])]
    answers = sum(turn.role == "assistant" and turn.learn for turn in record.turns)
    if len(runs) != answers:
        return f"{len(runs)} supervised stretches, {answers} answers"
    ends = [k for k in range(len(ids)) if supervised[k] and not (k + 1 < len(ids) and supervised[k + 1])]
    is_last = record.turns[-1].role == "assistant" and record.turns[-1].learn
    if template.end_is_token and not (record.interrupted and is_last):
        inner = template.control_ids.union(template.stop_ids)  # answers before the last may end otherwise, as those of gpt-oss do
        ending = [ids[k] in (template.stop_ids if is_last and k == ends[-1] else inner) for k in ends]
        if not all(ending):
            return "an answer's last supervised token does not end its turn"
    if record.interrupted and is_last and (ends[-1] != len(ids) - 1 or (template.end_is_token and ids[-1] in template.stop_ids)):
        return "something follows an interrupted answer"
    if is_last and template.prompt(replace(record, turns=record.turns[:-1]), record.turns[-1]) != ids[: runs[-1]]:
        return "the prompt's ids are not the row's up to its last answer"
    return _reference_problem(template, record, ids)


def _reference_problem(template: Template, record: Record, ids: list[int]) -> str:
    """Compare the ids with the tokenizer's own one-shot path, and return what differs, or an empty string.

    That path exists where no control token was written by a person and nothing is stripped.
    """
    messages = template.messages(record)
    said = json.dumps([messages, record.tools], ensure_ascii=False)
    if any(match["ours"] is None for match in template.written.finditer(said)):
        return ""
    own = template.name in FORMATS  # a format of ours: the tokenizer itself decides what comes before the text
    source = with_system_text(FORMATS[template.name].source, template.system) if own else template.source
    text = _reference_text(template, record, messages, source)
    reference = template.tokenizer(text, add_special_tokens=own, verbose=False)["input_ids"]
    if list(reference) == ids or any(m["role"] == "assistant" and (m["content"] or "")[:1].isspace() for m in messages):
        return ""
    at = next((k for k, (a, b) in enumerate(zip(reference, ids)) if a != b), min(len(reference), len(ids)))
    return f"ids differ from the tokenizer's own for the same text, first at {at}"


def _reference_text(template: Template, record: Record, messages: list[Message], source: str) -> str:
    """Return the template's own rendering, up to the end of an interrupted answer."""
    inputs = TemplateInputs(media_kinds(record), record.tools)
    text = apply(template.tokenizer, source, messages, inputs)
    if not record.interrupted or messages[-1]["role"] != "assistant":
        return text
    marked = apply(template.tokenizer, source, [*messages[:-1], {**messages[-1], "content": MARKS[0]}], inputs)
    return text.removesuffix(marked.rpartition(MARKS[0])[2])
