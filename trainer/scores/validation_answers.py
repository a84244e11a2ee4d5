"""Answers to the records of the validation: generated greedily, in batches that are the same on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.collate import collate
from data.dataset import MultimodalDataset
from data.loader import validation_ids
from data.prompts import split_answer
from data.records.record import RecordError
from data.sample import Sample
from trainer.distributed.parallelize import is_sharded
from trainer.distributed.shards import reshard
from trainer.distributed.world import World
from trainer.faults.phase_tracker import VALIDATION, PhaseTracker
from trainer.machine.atomic_files import replace_text
from trainer.machine.json_lines import read_valid_lines
from trainer.scores.text_metrics import score_texts
from trainer.setup import PreparedRun
from trainer.state import AnswerRow

NAME = "generations.jsonl"
PROMPT_TAIL = 500
"""Characters at the end of a question that a row of the file holds."""


def answer_records(prepared: PreparedRun, tracker: PhaseTracker | None = None) -> list[AnswerRow]:
    """Answer the records of a validation; return all rows on every rank, in the order of the records. Collective.

    A record whose prompt cannot be made, or does not fit data.max_length, is left out: the loss of the validation reports it. No
    random number is drawn. Each batch is the same on any number of ranks, and so is each answer.
    """
    dataset, config, world, model = prepared.data.validation, prepared.config, prepared.world, prepared.model
    if dataset is None:
        return []
    tracker = tracker or PhaseTracker()
    ids = validation_ids(dataset, config.validation.max_samples, prepared.data.validation_pools)
    order = ids[np.argsort(-dataset.lengths[ids], kind="stable")]  # longest first: what does not fit into memory fails at once
    batches = np.split(order, range(config.batch.micro_batch_size, len(order), config.batch.micro_batch_size))
    rows: list[AnswerRow] = []
    model.eval()
    for start in range(0, len(batches), world.size):
        own = batches[start + world.rank].tolist() if start + world.rank < len(batches) else []
        tracker.begin(VALIDATION, tracker.beat.step, [own])
        rows += _answer(prepared, dataset, own)
    model.train()
    reshard(model)
    gathered: list[AnswerRow] = [row for part in world.gather_json(rows) for row in part]
    return sorted(gathered, key=lambda row: row["sample"])


def _answer(prepared: PreparedRun, dataset: MultimodalDataset, ids: list[int]) -> list[AnswerRow]:
    """Answer the records `ids` in one batch. Collective where ranks share the weights: a blank prompt then stands for none."""
    samples = list(_prompts(dataset, ids))
    together = is_sharded(prepared.config.parallel, prepared.world)
    if not samples and not together:
        return []
    batch = collate(samples, prepared.data.pad_id, "left")
    longest = prepared.config.validation.max_new_tokens if samples else 1  # a blank ends at once, and then follows the others
    generated = prepared.model.generate(batch, longest, together=together)
    said = prepared.data.processor.answers(generated[: len(samples)])
    return [_row(dataset, sample.sample_id, text) for sample, (_, text) in zip(samples, said)]


def _prompts(dataset: MultimodalDataset, ids: list[int]) -> Iterator[Sample]:
    for i in ids:
        try:
            sample = dataset.prompt(i)
        except RecordError:
            continue
        if len(sample.input_ids) <= dataset.config.max_length:
            yield sample


def _row(dataset: MultimodalDataset, i: int, answer: str) -> AnswerRow:
    record = dataset.record(i, timed=False)
    asked, expected = split_answer(record)
    return {
        "sample": i,
        "source": dataset.source_names[int(dataset.source_ids[i])],
        "id": record.id,
        "where": record.where,
        "prompt": asked.turns[-1].content[-PROMPT_TAIL:],
        "answer": answer,
        "expected": expected.content.strip() if expected else "",
    }


def score_rows(names: tuple[str, ...], rows: list[AnswerRow], sources: list[str], world: World) -> dict[str, float]:
    """Return val/<metric>, val/<source>/<metric> and val/answers, their number, the same on every rank. Collective."""
    found: dict[str, float] = {}
    if world.is_main:  # once: libraries need not be fast
        groups = {"val": rows, **{f"val/{source}": [row for row in rows if row["source"] == source] for source in sources}}
        for prefix, group in groups.items():
            values = score_texts(names, [row["answer"] for row in group], [row["expected"] for row in group])
            found |= {f"{prefix}/{name}": value for name, value in values.items()}
        found["val/answers"] = len(rows)
    shared: dict[str, float] = world.broadcast_json(found)
    return shared


class AnswerLog:
    """Writer of generations.jsonl, on rank 0: every answer of every validation."""

    def __init__(self, folder: Path, resumed_step: int, world: World, stage: str = "") -> None:
        """Open the file and keep its rows up to `resumed_step` of the whole run: those of steps to come would be there twice."""
        self.path, self.active, self.stage = folder / NAME, world.is_main, {"stage": stage} if stage else {}
        if self.active and self.path.exists():
            rows = read_valid_lines(self.path, {"step": int}) if resumed_step else []
            replace_text(self.path, "".join(_line(row) for row in rows if row["step"] <= resumed_step))

    def write(self, step: int, rows: list[AnswerRow]) -> None:
        """Append the `rows` of a validation after `step` steps of the run."""
        if self.active and rows:
            with self.path.open("a", encoding="utf-8") as out:
                out.write("".join(_line({"step": step, **self.stage, **row}) for row in rows))


def _line(row: object) -> str:
    return json.dumps(row) + "\n"
