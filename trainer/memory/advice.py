"""Advice for a run that does not fit: other settings, each with the simulated memory that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data.collate import collate, collate_packed
from data.order.sampler import num_micro_batches
from data.sample import Sample
from model.batch import Batch
from model.card import ModelCard
from model.config import QuantizeConfig
from model.errors import ConfigError
from trainer.config import RunConfig
from trainer.machine.disk_space import format_bytes
from trainer.memory.footprint import Footprint, footprint

SHOWN = 4
RECOMPUTES = "parallel.activation_checkpointing = 'full'"


@dataclass(frozen=True)
class Change:
    """Settings in place of those of the run, and the memory that a rank needs with them."""

    settings: str
    needed: Footprint


@dataclass(frozen=True)
class MemoryScenario:
    """The heaviest micro-batch of a run with all that its memory depends on: smaller micro-batches are cut from it."""

    config: RunConfig
    card: ModelCard
    num_ranks: int
    samples: Sequence[Sample]
    num_micro_batches: int

    def batch(self, count: int | None = None) -> Batch:
        """Collate the first `count` samples, which are the longest ones; None: all of them."""
        return (collate_packed if self.config.data.packing else collate)(self.samples[:count], self.card.pad_id)

    def needed(self, count: int | None = None, **changes: Any) -> Footprint:
        """Simulate the memory with the first `count` samples and the given [parallel] overrides, in bytes of one rank.

        Raises ConfigError where the model cannot be simulated.
        """
        parallel = replace(self.config.parallel, **changes)
        micros = self.num_micro_batches
        if count is not None and not self.config.data.packing:
            micros = num_micro_batches(self.config.batch.global_batch_size, self.num_ranks, count)
        return footprint(self.card, parallel, self.num_ranks, self.batch(count), micros)


def advice(scenario: MemoryScenario, limit: Callable[[Footprint], float]) -> str:
    """Describe for people which settings make a rank need at most `limit(its simulated memory now)` bytes."""
    try:
        now = scenario.needed()
    except ConfigError as error:
        return f"What would fit is not known: {error}. A smaller micro-batch takes less, and so does {RECOMPUTES}"
    allowed = limit(now)
    changes = list(fitting(scenario, allowed))
    if not changes:
        least = least_change(scenario)
        return f"No one setting makes it fit; {describe(least)} comes nearest: use more or larger devices, or a smaller model"
    return "What fits: " + "; ".join(describe(change) for change in changes[:SHOWN])


def describe(change: Change) -> str:
    """Describe a change for people: its settings and the memory that it needs."""
    return f"{change.settings} ({format_bytes(change.needed.total, 2)})"


def fitting(scenario: MemoryScenario, allowed: float) -> Iterator[Change]:
    """Yield the changes that need at most `allowed` bytes; those that do not alter the numbers of training come first."""
    for change in (smaller(scenario, allowed), *other_settings(scenario)):
        if change is not None and change.needed.total <= allowed:
            yield change
    if scenario.config.parallel.activation_checkpointing == "none":
        change = smaller(scenario, allowed, activation_checkpointing="full")
        if change is not None and change.needed.total <= allowed:
            yield replace(change, settings=f"{change.settings} with {RECOMPUTES}")
    for other in (with_lora(scenario), with_four_bits(scenario)):
        if other is not None and other.needed.total <= allowed:
            yield other


def smaller(scenario: MemoryScenario, allowed: float, **changes: Any) -> Change | None:
    """Return the largest micro-batch below the heaviest one that fits, by bisection; None when no smaller one can be set or fits.

    It consists of the first samples of the heaviest. `changes`: overrides of [parallel].
    """
    low, high, best = fewest(scenario), len(scenario.samples) - 1, None
    while low <= high:
        middle = (low + high) // 2
        needed = scenario.needed(middle, **changes)
        if needed.total <= allowed:
            best, low = (middle, needed), middle + 1
        else:
            high = middle - 1
    return None if best is None else Change(_size_setting(scenario, best[0]), best[1])


def fewest(scenario: MemoryScenario) -> int:
    """Return the fewest samples that a micro-batch may have: a packed one is filled up to at least data.max_length tokens."""
    if not scenario.config.data.packing:
        return 1
    counts = range(2, len(scenario.samples) + 1)
    return max((count for count in counts if _tokens(scenario, count) <= scenario.config.data.max_length), default=1)


def _tokens(scenario: MemoryScenario, count: int) -> int:
    """Return the tokens of the first `count` samples."""
    return sum(len(sample.input_ids) for sample in scenario.samples[:count])


def _size_setting(scenario: MemoryScenario, count: int) -> str:
    """Return the setting that limits a micro-batch to `count` samples."""
    if scenario.config.data.packing:
        return f"batch.micro_batch_tokens = {max(_tokens(scenario, count), scenario.config.data.max_length)}"
    return f"batch.micro_batch_size = {count}"


def other_settings(scenario: MemoryScenario) -> Iterator[Change]:
    """Yield changes of [parallel] that do not alter the numbers of training."""
    parallel = scenario.config.parallel
    if parallel.activation_checkpointing == "none":
        yield Change(RECOMPUTES, scenario.needed(activation_checkpointing="full"))
    if scenario.num_ranks > 1 and parallel.strategy != "fsdp":
        yield Change("parallel.strategy = 'fsdp'", scenario.needed(strategy="fsdp", shard_size=0))
        if parallel.activation_checkpointing == "none":
            settings = f"parallel.strategy = 'fsdp' with {RECOMPUTES}"
            yield Change(settings, scenario.needed(strategy="fsdp", shard_size=0, activation_checkpointing="full"))


def with_lora(scenario: MemoryScenario) -> Change | None:
    """Return the change to adapters in place of the whole language model; None where it does not apply.

    It is another training, which needs no moments of all weights.
    """
    model = scenario.card.model
    if model.llm.tune != "full":
        return None
    try:
        changed = replace(scenario, card=replace(scenario.card, model=replace(model, llm=replace(model.llm, tune="lora"))))
        return Change(f"model.llm.tune = 'lora' (lora.rank = {scenario.config.lora.rank})", changed.needed())
    except ConfigError:  # a model without linear layers to adapt
        return None


def with_four_bits(scenario: MemoryScenario) -> Change | None:
    """Return the change to a language model quantised to 4 bits; None where it learns, is quantised already or cannot be.

    It is another training as well.
    """
    if scenario.card.model.llm.tune == "full" or scenario.card.quantize.bits != 16:
        return None
    try:
        changed = replace(scenario, card=replace(scenario.card, quantize=QuantizeConfig(bits=4)))
        return Change("quantize.bits = 4", changed.needed())
    except ConfigError:  # a mixture of experts, which 4 bits do not reach
        return None


def least_change(scenario: MemoryScenario) -> Change:
    """Return the change, or combination of changes, that needs the least memory."""
    found, least = [Change("the run as it is", scenario.needed()), *other_settings(scenario)], fewest(scenario)
    if least < len(scenario.samples):
        found.append(Change(_size_setting(scenario, least), scenario.needed(least)))
        if scenario.config.parallel.activation_checkpointing == "none":
            settings = f"{_size_setting(scenario, least)} with {RECOMPUTES}"
            found.append(Change(settings, scenario.needed(least, activation_checkpointing="full")))
    found += filter(None, [with_lora(scenario), with_four_bits(scenario)])
    return min(found, key=lambda change: change.needed.total)
