"""Helpers of tests/trainer/checkpoint/test_disk.py that other tests share."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from model.card import ModelCard
from model.config import LlmConfig, LoraConfig, ModelConfig
from model.llm.causal_lm import VocabularyLayout
from tests.support.checkpoint import toy
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.distributed.world import World

ALONE = World(0, 0, 1, torch.device("cpu"))


CARD = ModelCard(ModelConfig(LlmConfig("llm")), LoraConfig(), {}, {}, VocabularyLayout(4, 4))


class Nothing:
    """In place of a processor."""

    def save(self, folder: Path) -> None:
        (folder / "processor.json").write_text("{}")


def save(checkpointer: Checkpointer, step: int) -> None:
    state = {"config": {}, "meter": {}}
    checkpointer.save(step, toy(ALONE, "ddp"), state, CARD, Nothing())  # type: ignore[arg-type]
    checkpointer.wait()


@contextmanager
def failing(name: str, number: int, code: int = errno.EIO) -> Iterator[list[str]]:
    """The call of os.`name` with this number, from 0, fails; what was called with, as far as it came."""
    original: Callable[..., Any] = getattr(os, name)
    calls: list[str] = []

    def broken(target: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target))
        if len(calls) - 1 == number:
            raise OSError(code, os.strerror(code), str(target))
        return original(target, *args, **kwargs)

    setattr(os, name, broken)
    try:
        yield calls
    finally:
        setattr(os, name, original)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
