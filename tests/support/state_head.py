"""Helpers of tests/model/test_state_head.py that other tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.sample import Sample, SampleMedia
from model.batch import IGNORE_INDEX
from model.card import media_specs
from model.config import AudioConfig, AudioProjectorConfig, LlmConfig, ModelConfig, StateHeadConfig
from model.media_spec import AudioSpec, MediaMeta, row_width, token_rows

CLASSES, WEIGHTS, FACTOR = 3, (0.05, 0.2, 0.1), 0.5
"""All weights of a small step together are less than 1: a count that is clamped there shows."""


NUM_SAMPLES = 9


def config_of(folder: Path, llm: str = "llm", tune: Any = "full", **head: Any) -> ModelConfig:
    return ModelConfig(
        LlmConfig(str(folder / llm), tune, router_loss=0.5 if llm == "mixture" else 0.0),
        audio=AudioConfig(str(folder / "audio")),
        audio_projector=AudioProjectorConfig(),
        state_head=StateHeadConfig(**{"classes": CLASSES, "class_weights": WEIGHTS, "loss_weight": FACTOR, **head}),
        dtype="float32",
    )


def spec_of(config: ModelConfig) -> AudioSpec:
    spec = media_specs(config)["audio"]
    assert isinstance(spec, AudioSpec)
    return spec


def samples(spec: AudioSpec, num: int = NUM_SAMPLES) -> list[Sample]:
    """No clip, one or two; every fourth clip has no state, every third sample supervises nothing."""
    rng, found, num_clips = np.random.default_rng(6), [], 0
    for i in range(num):
        clips, ids = [], list(rng.integers(1, 300, 3))
        for _ in range(i % 3):
            frames, longest = int(rng.integers(20, spec.window_frames)), spec.window_frames
            rows = token_rows(spec, MediaMeta(num_frames=frames), width := row_width(spec, longest))
            label = num_clips % CLASSES if num_clips % 4 else IGNORE_INDEX
            values = torch.from_numpy(rng.standard_normal((1, spec.num_mels, longest))).float()
            clips.append(SampleMedia("audio", values, len(ids), len(rows), rows, width, (frames,), label))
            ids += [0] * len(rows) + list(rng.integers(1, 300, 2))
            num_clips += 1
        ids += list(rng.integers(1, 300, int(rng.integers(2, 9))))
        labels = np.full(len(ids), IGNORE_INDEX)
        if i % 3 != 2:
            labels[-3:-1] = ids[-2:]
        found.append(Sample(i, 0, np.array(ids), labels, {"audio": clips} if clips else {}))
    return found
