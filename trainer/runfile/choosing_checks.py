"""Checks of what a run is judged by: measures of its validation, and the value that chooses its best checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from model.preference.config import PAIRED
from trainer.config import RunConfig, ValidationConfig


def choosing_problems(config: RunConfig) -> Iterator[str]:
    """Yield the problems of validation.metrics and checkpoint.best, one line each."""
    validation, best = config.validation, config.checkpoint.best
    if len(set(validation.metrics)) < len(validation.metrics):
        yield f"validation.metrics = {list(validation.metrics)} names one twice"
    if validation.metrics and not config.data.validation:
        yield "validation.metrics has no effect without [[data.validation]]: name held-out records"
    if validation.max_new_tokens != ValidationConfig().max_new_tokens and not validation.metrics:
        yield f"validation.max_new_tokens = {validation.max_new_tokens} has no effect without validation.metrics"
    if best and not config.data.validation:
        yield f"checkpoint.best = {best!r} needs [[data.validation]]: name held-out records"
    elif best and not (allowed := best_values(config)).intersection([best]):
        yield f"checkpoint.best = {best!r} is not {' | '.join(map(repr, sorted(allowed)))}"


def best_values(config: RunConfig) -> set[str]:
    """Return every value that the validations of this run have: of all sources together, and of each."""
    prefixes = ["val", *(f"val/{source.key}" for source in config.data.validation)]
    names = ["loss", *config.validation.metrics]
    if config.preference.is_on:
        names.append("preference_loss")
    if config.preference.kind in PAIRED:
        names += ["preference_accuracy", "preference_margin"]
    terms = {"val/state_loss", "val/state_accuracy"} if config.model.state_head is not None else set()
    terms |= {"val/router_loss"} if config.model.llm.router_loss else set()
    return {f"{prefix}/{name}" for prefix in prefixes for name in names} | terms
