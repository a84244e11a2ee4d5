"""Checks of the settings of the loss terms other than the text."""

from __future__ import annotations

import math
from collections.abc import Iterator

from model.config import ModelConfig, StateHeadConfig


def term_problems(config: ModelConfig) -> Iterator[str]:
    """Yield the problems of model.llm.router_loss and [model.state_head], one line each."""
    if not 0 <= config.llm.router_loss < math.inf:
        yield f"model.llm.router_loss = {config.llm.router_loss} is negative or not finite; 0 means none, 0.001 to 0.02 are usual"
    if config.state_head is not None:
        yield from _state_head(config.state_head)
        if config.audio is None:
            yield "[model.state_head] has no effect without [model.audio]: it reads the end of every clip"
        if config.state_head.tune == "frozen" and not config.state_head.path and not config.init_from:
            yield "model.state_head.tune = 'frozen' without weights: name its path, or model.init_from"


def _state_head(head: StateHeadConfig) -> Iterator[str]:
    weights = list(head.class_weights)
    if head.classes < 2:
        yield f"model.state_head.classes = {head.classes} is nothing to choose from: give at least 2"
    if weights and len(weights) != head.classes:
        yield f"model.state_head.class_weights = {weights} are not one for each of {head.classes} classes"
    if not all(0 < weight < math.inf for weight in weights):
        yield f"model.state_head.class_weights = {weights} are not all positive"
    if not 0 < head.loss_weight < math.inf:
        yield f"model.state_head.loss_weight = {head.loss_weight} is not positive; without its loss, leave [model.state_head] out"
