"""Made-up samples with pictures, and micro-batches of them."""

from __future__ import annotations

import numpy as np
import torch

from data.collate import collate, collate_packed
from data.sample import Sample, SampleMedia
from model.batch import IGNORE_INDEX, Batch
from model.card import ModelCard
from model.media_spec import ImageSpec, MediaMeta, image_spec, num_tokens

SHORT_TEXT, LONG_TEXT = (24, 280), (64, 1700)
"""Least and most tokens of text beside a picture, and of a sample without one."""
SUPERVISED = 0.6
"""Share of the text that is learned: about a sixth of all tokens where a picture has 576."""


def mixed_samples(card: ModelCard, count: int, seed: int = 0, *, longest: int = 0) -> list[Sample]:
    """Return `count` samples. Of every five, four have one picture and a short or long answer; one is text, up to 1,700 tokens.

    `longest`: at most so many tokens of text; 0: no limit but these.
    """
    rng = np.random.default_rng(seed)
    spec, vocabulary = image_spec(card.specs), int(card.hugging_face["llm"]["vocab_size"])
    return [_sample(i, spec, vocabulary, rng, longest) for i in range(count)]


def _sample(i: int, spec: ImageSpec, vocabulary: int, rng: np.random.Generator, longest: int) -> Sample:
    has_picture = i % 5 != 4
    least, most = SHORT_TEXT if has_picture else LONG_TEXT
    text = round(least * (most / least) ** rng.random())
    text = max(8, text % longest) if longest else text
    width = num_tokens(spec, MediaMeta()) if has_picture else 0
    ids = rng.integers(3, vocabulary, width + text)
    labels = np.full(len(ids), IGNORE_INDEX)
    learned = max(1, int(text * SUPERVISED))
    labels[-1 - learned : -1] = ids[-learned:]
    if not has_picture:
        return Sample(i, 0, ids, labels, {})
    pixels = torch.from_numpy(rng.integers(0, 256, (1, 3, spec.size, spec.size), dtype=np.uint8))
    medium = SampleMedia("image", pixels, 1, width, np.arange(width), width)
    return Sample(i, 0, ids, labels, {"image": [medium]})


def packed_batches(samples: list[Sample], num_tokens: int) -> list[Batch]:
    """Pack samples in their order into rows of at most `num_tokens` tokens; the last row, which is not full, is left out."""
    rows: list[list[Sample]] = [[]]
    for sample in samples:
        if sum(len(s.input_ids) for s in rows[-1]) + len(sample.input_ids) > num_tokens and rows[-1]:
            rows.append([])
        rows[-1].append(sample)
    return [collate_packed(row, 0) for row in rows[: max(1, len(rows) - 1)]]


def steps_of(card: ModelCard, num_steps: int, *, packed: bool = False, longest: int = 60) -> list[list[Batch]]:
    """Return the micro-batches of `num_steps` steps, two a step, of ten small samples together."""
    join = collate_packed if packed else collate
    found = []
    for step in range(num_steps):
        samples = mixed_samples(card, 10, step, longest=longest)
        found.append([join(samples[:6], 0), join(samples[6:], 0)])
    return found
