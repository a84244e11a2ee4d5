"""Generate greedy answers to held-out records and compare them with the records' own.

A record's prompt is everything before its last answer. exact_match: the share of records whose generated text equals that answer,
without its state token, white space around both stripped. loss: cross entropy per supervised token, over all answers of the kept
rounds, as in training.
Progress goes to stderr; the last line of stdout is JSON: {"samples", "exact_match", "loss"}.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.config import SourceConfig
from data.index.record_index import RecordIndex
from data.processor import Processor, load_processor
from data.records.record import Record, RecordError, parse
from model.errors import ConfigError
from model.multimodal import MultimodalLM
from tools.cli import command_parser, run_command
from tools.model_options import add_model_options, load


@dataclass(frozen=True)
class Answered:
    """A few records and the model's answers to them."""

    records: list[Record]
    texts: list[str]  # generated
    loss_sum: float
    num_supervised: int


@dataclass
class Totals:
    samples: int = 0
    exact: int = 0
    loss_sum: float = 0.0
    num_supervised: int = 0

    def add(self, answered: Answered) -> None:
        self.samples += len(answered.records)
        self.exact += sum(text == expected(record) for record, text in zip(answered.records, answered.texts))
        self.loss_sum += answered.loss_sum
        self.num_supervised += answered.num_supervised

    def result(self) -> dict[str, float]:
        return {"samples": self.samples, "exact_match": self.exact / self.samples, "loss": self.loss_sum / self.num_supervised}


def expected(record: Record) -> str:
    return record.turns[-1].content.strip()


def open_records(path: str, processor: Processor, folder: str) -> RecordIndex:
    """Open the records of `path` and read each once, so that a broken one raises `RecordError` before any model is loaded."""
    index = RecordIndex.open(SourceConfig(path), Path(folder), processor.specs)
    for i in range(len(index)):
        parse(index.raw(i), index.where(i), index.name(i))
    return index


def answers(
    net: MultimodalLM, processor: Processor, index: RecordIndex, *, media_root: str, max_new_tokens: int, batch_size: int
) -> Iterator[Answered]:
    """Answer all records, longest first, so that a batch that does not fit into memory fails at once. Raises `RecordError`."""
    order = np.argsort(-index.lengths, kind="stable")
    for ids in np.split(order, range(batch_size, len(order), batch_size)):
        raw = [index.raw(i) for i in ids]
        records = [parse(value, index.where(i), index.name(i)) for i, value in zip(ids, raw)]
        try:
            prompts, whole = processor(raw, media_root=media_root), processor(raw, answers=True, media_root=media_root)
        except RecordError as error:  # the processor only knows which of these records it was
            record = records[int(error.where.rpartition(":")[2])]
            raise RecordError(record.where, record.id, error.field, error.reason) from None
        said = processor.answers(net.generate(prompts, max_new_tokens=max_new_tokens))
        loss_sum, num_supervised = net.loss(whole)
        yield Answered(records, [text for _, text in said], loss_sum.item(), num_supervised)


def evaluate(options: argparse.Namespace) -> None:
    for name in ("max_new_tokens", "batch_size"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)} is not positive")
    totals, predictions = Totals(), []
    with tempfile.TemporaryDirectory() as folder:
        processor = load_processor(options.final)
        index = open_records(options.data, processor, folder)
        net = load(options)
        settings: dict[str, Any] = {key: getattr(options, key) for key in ("media_root", "max_new_tokens", "batch_size")}
        with tqdm(total=len(index), unit="sample", desc="evaluate", dynamic_ncols=True) as bar:
            for answered in answers(net, processor, index, **settings):
                totals.add(answered)
                predictions += [
                    {"id": r.id, "where": r.where, "expected": expected(r), "generated": text}
                    for r, text in zip(answered.records, answered.texts)
                ]
                bar.update(len(answered.records))
                bar.set_postfix_str(f"exact match {totals.exact / totals.samples:.3f}")
    if options.predictions:
        write_predictions(options.predictions, predictions)
    result = totals.result()
    print(json.dumps({key: value if math.isfinite(value) else None for key, value in result.items()}))


def write_predictions(path: str, values: list[dict[str, str]]) -> None:
    try:
        Path(path).write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--predictions {path!r} cannot be written: {error.strerror}") from error


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("evaluate", __doc__)
    add_model_options(parser)
    parser.add_argument("--data", required=True, help="held-out records, .json or .jsonl, in the form that training reads")
    parser.add_argument("--media-root", default="", metavar="DIR", help="the folder media must stand in; default: this one")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (128)")
    parser.add_argument("--batch-size", type=int, default=16, help="records answered at once (16)")
    parser.add_argument("--predictions", default="", metavar="FILE", help="also write every answer, one JSON object per line")
    options = parser.parse_args(argv)
    return run_command("evaluate", lambda: evaluate(options))


if __name__ == "__main__":
    raise SystemExit(main())
