"""Greedy answers to held-out records in batches, shared over ranks, with their loss; what they say does not depend on the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.config import SourceConfig
from data.index.record_index import RecordIndex
from data.processor import Processor
from data.records.record import Record, RecordError, parse
from model.multimodal import MultimodalLM
from trainer.distributed.world import World
from trainer.scores.text_metrics import score_texts


@dataclass(frozen=True)
class Answered:
    """A few records and the model's answers to them."""

    ids: list[int]  # their numbers in the file
    records: list[Record]
    texts: list[str]  # generated
    loss_sum: float
    num_supervised: int


@dataclass
class Totals:
    """All answers so far, by the number of their record."""

    expected: dict[int, str] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    losses: dict[int, tuple[float, int]] = field(default_factory=dict)  # of each batch, by its first record

    def add(self, answered: Answered) -> None:
        """Add a batch."""
        self.expected |= {i: expected(record) for i, record in zip(answered.ids, answered.records)}
        self.texts |= dict(zip(answered.ids, answered.texts))
        self.losses[answered.ids[0]] = (answered.loss_sum, answered.num_supervised)

    def shared(self, world: World) -> Totals:
        """Return the totals of all ranks together, in the order of the records. Collective."""
        found = Totals()
        for texts, wanted, losses in world.gather_json([[*of.items()] for of in (self.texts, self.expected, self.losses)]):
            found.texts |= dict(texts)
            found.expected |= dict(wanted)
            found.losses |= {first: (total, count) for first, (total, count) in losses}
        found.texts, found.expected = dict(sorted(found.texts.items())), dict(sorted(found.expected.items()))
        found.losses = dict(sorted(found.losses.items()))
        return found

    def result(self, metrics: Sequence[str] = ("exact_match",)) -> dict[str, float]:
        """Return the number of records, the value of each measure, NaN where it has none, and the loss per supervised token."""
        numbers = [*self.texts]
        values = score_texts(metrics, [self.texts[i] for i in numbers], [self.expected[i] for i in numbers])
        count = sum(count for _, count in self.losses.values())
        loss = math.fsum(total for total, _ in self.losses.values()) / count if count else math.nan
        return {"samples": len(numbers), **{name: values.get(name, math.nan) for name in metrics}, "loss": loss}


def expected(record: Record) -> str:
    """Return the answer that is asked for: the record's last."""
    return record.turns[-1].content.strip()


def open_records(path: str, processor: Processor, folder: str) -> RecordIndex:
    """Open the records of `path` and read each once, so that a broken one raises `RecordError` before any model is loaded."""
    index = RecordIndex.open(SourceConfig(path), Path(folder), processor.specs)
    for i in range(len(index)):
        parse(index.raw(i), index.where(i), index.name(i))
    return index


def answers(
    net: MultimodalLM,
    processor: Processor,
    index: RecordIndex,
    *,
    media_root: str,
    max_new_tokens: int,
    batch_size: int,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Answered]:
    """Answer all records, longest first, so that a batch that does not fit into memory fails at once. Raises `RecordError`.

    `share`: rank and number of ranks; a rank takes every so many-th batch, and batches do not depend on the ranks.
    """
    order = np.argsort(-index.lengths, kind="stable")
    rank, size = share
    for ids in np.split(order, range(batch_size, len(order), batch_size))[rank::size]:
        raw = [index.raw(i) for i in ids]
        records = [parse(value, index.where(i), index.name(i)) for i, value in zip(ids, raw)]
        try:
            prompts, whole = processor(raw, media_root=media_root), processor(raw, answers=True, media_root=media_root)
        except RecordError as error:  # the processor only knows which of these records it was
            record = records[int(error.where.rpartition(":")[2])]
            raise RecordError(record.where, record.id, error.field, error.reason) from None
        said = processor.answers(net.generate(prompts, max_new_tokens=max_new_tokens))
        loss_sum, num_supervised = net.loss(whole)
        yield Answered(ids.tolist(), records, [text for _, text in said], loss_sum.item(), num_supervised)
