"""Samples of preferences made of random ids, and their losses as the papers write them, on full logits."""

from __future__ import annotations

import numpy as np
import torch

from data.preference.sample import Answer, PreferenceSample, Role
from data.sample import SampleMedia
from model.batch import IGNORE_INDEX

PAIR: tuple[Role, ...] = ("chosen", "rejected")


def made_sample(
    index: int, rng: np.random.Generator, roles: tuple[Role, ...] = PAIR, num_images: int = 0, width: int = 4
) -> PreferenceSample:
    """A prompt with pictures of 16 pixels, and answers of 2 to 6 tokens of which some are not counted now and then."""
    prompt = int(rng.integers(3, 7)) + num_images * (width + 1)
    ids = [rng.integers(1, 300, prompt)]
    answers = []
    at = prompt
    for role in roles:
        length = int(rng.integers(2, 7))
        ids.append(rng.integers(1, 300, length))
        counted = np.ones(length, dtype=bool)
        counted[: index % 2] = False
        answers.append(Answer(role, at, at + length, counted))
        at += length
    flat = np.concatenate(ids)
    labels = np.full(len(flat), IGNORE_INDEX)
    if roles[0] in ("chosen", "desirable"):
        first = answers[0]
        where = first.start - 1 + np.flatnonzero(first.counted)
        labels[where] = flat[where + 1]
    pictures = [SampleMedia("image", noise_of(rng), 1 + k * (width + 1), width, np.arange(width), width) for k in range(num_images)]
    return PreferenceSample(
        index, index % 2, flat, labels, {"image": pictures} if pictures else {}, prompt=prompt, answers=tuple(answers)
    )


def noise_of(rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal((1, 3, 16, 16))).float()
