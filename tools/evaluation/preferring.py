"""Comparison of the two answers of held-out records: how often a model finds the chosen one more probable, on any ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from data.index.record_index import RecordIndex
from data.preference.collate import collate_answers
from data.preference.sample import PreferenceSample, assemble_answers, encode_answers
from data.processor import Processor
from data.records.record import check_answers, parse
from data.text.tokenizer import pad_id
from model.multimodal import MultimodalLM
from model.preference.config import PreferenceConfig
from model.preference.tuning import PreferenceTuning, measuring

Pair = tuple[float, float, int, int]
"""Log-probabilities of the chosen and of the rejected answer, and their tokens."""


def open_pair(index: RecordIndex, i: int, processor: Processor, media_root: str) -> PreferenceSample:
    """Read record `i`. Raises `RecordError` if it is not a pair."""
    record = parse(index.raw(i), index.where(i), index.name(i))
    check_answers(record, "pairs")
    record = processor.media(record, media_root).timed()
    found, media = encode_answers(processor.template, record), processor.media(record, media_root)
    return assemble_answers(found, processor.template, media, None, sample_id=i, source_id=0)


def compare_answers(
    net: MultimodalLM,
    processor: Processor,
    index: RecordIndex,
    *,
    media_root: str,
    batch_size: int,
    share: tuple[int, int] = (0, 1),
) -> Iterator[dict[int, Pair]]:
    """Compare the answers of all records, longest first, by their number in the file. `share`: rank and number of ranks."""
    order = np.argsort(-index.lengths, kind="stable")
    rank, size = share
    net.preference = PreferenceTuning(PreferenceConfig("simpo"))
    for ids in np.split(order, range(batch_size, len(order), batch_size))[rank::size]:
        samples = [open_pair(index, int(i), processor, media_root) for i in ids]
        with torch.no_grad(), measuring(net.preference) as found:
            net(collate_answers(samples, pad_id(processor.tokenizer)).to(net._device()))
        values = found[0].view(-1, 2).tolist()
        counts = [[int(answer.counted.sum()) for answer in sample.answers] for sample in samples]
        yield {int(i): (*pair, *tokens) for i, pair, tokens in zip(ids, values, counts)}


def preference_result(pairs: dict[int, Pair]) -> dict[str, float]:
    """Return the number of pairs, and the share of those whose chosen answer is more probable: whole, and per token."""
    rows = np.array([pairs[i] for i in sorted(pairs)], dtype=np.float64).reshape(-1, 4)
    if not len(rows):
        return {"samples": 0, "preference_accuracy": math.nan}
    chosen, rejected = rows[:, 0], rows[:, 1]
    return {
        "samples": len(rows),
        "preference_accuracy": float((chosen > rejected).mean()),
        "preference_accuracy_per_token": float((chosen / rows[:, 2] > rejected / rows[:, 3]).mean()),
        "chosen_log_prob": float(chosen.mean()),
        "rejected_log_prob": float(rejected.mean()),
    }
