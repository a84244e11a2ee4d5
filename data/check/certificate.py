"""Proof on rows of a source that exactly the tokens are learned that the design says, before anything is trained on the source."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from data.check.layout_proof import begins_as_prompt, layout_in_force, remember_proof
from data.index.record_index import RecordIndex
from data.preference.sample import with_rejected
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


def encode_proven(template: Template, record: Record, max_length: int | None = None, *, in_full: bool = True) -> Encoded:
    """Encode the record, and prove it as every row of a certificate is proven: what passes here passes at the start of a run.

    Last rounds that cannot fit into `max_length` have no part in the proof. Unless `in_full`, what was proven of another row of the
    same layout is not proven again: only what this row's words can change, without rendering it or tokenising all of it once more.
    Raises `RecordError`; `UnprovenError` if the proof fails.
    """
    encoded = template.encode(record) if max_length is None else template.encode(record, max_length)
    prove_encoded(template, record, encoded, max_length, in_full=in_full)
    return encoded


def prove_encoded(template: Template, record: Record, encoded: Encoded, max_length: int | None, *, in_full: bool) -> None:
    """Prove what the template encoded of a record within `max_length`, as `encode_proven` does. Raises `UnprovenError`."""
    if max_length is not None and len(encoded.round_ends) < encoded.num_rounds:
        record = template.fitting(record, max_length)
        encoded = template.encode(record)
    if problem := _problem(template, record, encoded, in_full):
        raise UnprovenError(record.where, record.id, f"data.template {template.name!r} is not proven", problem)


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
            if record.rejected:
                encode_proven(template, with_rejected(record), max_length)
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


def _problem(template: Template, record: Record, encoded: Encoded, in_full: bool) -> str:
    """Return what is wrong with a row, or an empty string. Every check takes another path than the code under proof."""
    ids, supervised = encoded.input_ids, encoded.supervised
    if not set(template.placeholder_ids.values()).isdisjoint(itertools.compress(ids, supervised)):
        return "a placeholder is supervised"
    runs, ends = _stretches(supervised)
    answers = sum(turn.role == "assistant" and turn.learn for turn in record.turns)
    if len(runs) != answers:
        return f"{len(runs)} supervised stretches, {answers} answers"
    is_last = record.turns[-1].role == "assistant" and record.turns[-1].learn
    if template.end_is_token and not (record.interrupted and is_last):
        # Answers before the last may end otherwise, as those of gpt-oss do.
        inner = ends[:-1] if is_last else ends
        if not all(ids[k] in template.stop_ids or (k in inner and ids[k] in template.control_ids) for k in ends):
            return "an answer's last supervised token does not end its turn"
    if record.interrupted and is_last and (ends[-1] != len(ids) - 1 or (template.end_is_token and ids[-1] in template.stop_ids)):
        return "something follows an interrupted answer"
    layout = layout_in_force(record, encoded)
    if not in_full and layout in template.layouts.proven and not (is_last and not begins_as_prompt(template, encoded, runs[-1])):
        return ""
    asked = replace(record, turns=record.turns[:-1])
    if is_last and template.prompt(asked, record.turns[-1]) != ids[: runs[-1]]:
        return "the prompt's ids are not the row's up to its last answer"
    if not (problem := _reference_problem(template, record, encoded)) and is_last and layout is not None:
        remember_proof(template, layout, template.answered(asked, record.turns[-1]))
    return problem


def _stretches(supervised: list[bool]) -> tuple[list[int], list[int]]:
    """Return the first and the last place of each stretch of supervised ids."""
    flags, first, last = bytes(supervised), [], []
    at = flags.find(1)
    while at >= 0:
        stop = flags.find(0, at)
        stop = len(flags) if stop < 0 else stop
        first.append(at)
        last.append(stop - 1)
        at = flags.find(1, stop)
    return first, last


def _reference_problem(template: Template, record: Record, encoded: Encoded) -> str:
    """Compare the ids with the tokenizer's own one-shot path, and return what differs, or an empty string.

    That path exists where no control token was written by a person and nothing is stripped.
    """
    messages = template.messages(record)
    said = json.dumps([messages, record.tools], ensure_ascii=False)
    if any(match["ours"] is None for match in template.written.finditer(said)):
        return ""
    if any(m["role"] == "assistant" and (m["content"] or "")[:1].isspace() for m in messages):
        return ""
    own = template.name in FORMATS  # a format of ours: the tokenizer itself decides what comes before the text
    if record.interrupted:
        source = with_system_text(FORMATS[template.name].source, template.system) if own else template.source
        text = _reference_text(template, record, messages, source)
    else:  # as nothing was stripped, the row's text is what the template writes for these messages, behind our BOS
        text = "" if encoded.rendering is None else encoded.rendering.text[len(template.lead) :]
    reference = template.tokenizer(text, add_special_tokens=own, verbose=False)["input_ids"]
    ids = encoded.input_ids
    if list(reference) == ids:
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
