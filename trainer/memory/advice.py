"""Advice for a run that does not fit: a fixed list of other settings, each with the simulated memory that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from data.order.sampler import num_micro_batches
from data.preference.collate import join_samples
from data.sample import Sample
from model.batch import Batch
from model.card import ModelCard
from model.config import QuantizeConfig
from model.errors import ConfigError
from trainer.config import ParallelConfig, RunConfig
from trainer.machine.disk_space import format_bytes
from trainer.memory.footprint import Footprint, footprint

SHOWN = 4
RECOMPUTES, SHARDS = "parallel.activation_checkpointing = 'full'", "parallel.strategy = 'fsdp'"
RECOMPUTES_LITTLE = "parallel.activation_checkpointing = 'selective'"


@dataclass(frozen=True)
class Change:
    """Settings in place of those of the run, and the memory that a rank needs with them."""

    settings: str
    needed: Footprint

    def __str__(self) -> str:
        return f"{self.settings} ({format_bytes(self.needed.total, 2)})"


@dataclass(frozen=True)
class MemoryScenario:
    """The heaviest micro-batch of a run with all that its memory depends on: smaller micro-batches are cut from it."""

    config: RunConfig
    card: ModelCard
    num_ranks: int
    samples: Sequence[Sample]
    num_micro_batches: int
    on_host: bool = False  # the ranks compute on the CPU

    def batch(self, count: int | None = None) -> Batch:
        """Collate the first `count` samples, which are the longest ones; None: all of them."""
        return join_samples(self.samples[:count], self.card.pad_id, self.config.data.packing)

    def needed(self, parallel: ParallelConfig | None = None, count: int | None = None) -> Footprint:
        """Simulate the memory with the first `count` samples and another [parallel], in bytes of one rank.

        Raises ConfigError where the model cannot be simulated.
        """
        micros = self.num_micro_batches
        if count is not None and not self.config.data.packing:
            micros = num_micro_batches(self.config.batch.global_batch_size, self.num_ranks, count)
        batch, config = self.batch(count), self.config
        found = footprint(self.card, parallel or config.parallel, self.num_ranks, batch, micros, config.optim)
        return replace(found, on_host=self.on_host)


def advice(scenario: MemoryScenario, limit: Callable[[Footprint], float]) -> str:
    """Describe for people which settings make a rank need at most `limit(its simulated memory now)` bytes."""
    try:
        now = scenario.needed()
    except ConfigError as error:
        return f"What would fit is not known: {error}. A smaller micro-batch takes less, and so does {RECOMPUTES}"
    fitting, least = weigh_changes(scenario, now, limit(now))
    if not fitting:
        return f"No one setting makes it fit; {least} comes nearest: use more or larger devices, or a smaller model"
    return "What fits: " + "; ".join(map(str, fitting[:SHOWN]))


def weigh_changes(scenario: MemoryScenario, now: Footprint, allowed: float) -> tuple[list[Change], Change]:
    """Return the changes that need at most `allowed` bytes, and the one that needs least, fitting or not; each is simulated once.

    Those that do not alter the numbers of training come first. `now`: what the run needs as it is.
    """
    parallel = scenario.config.parallel
    recomputing = replace(parallel, activation_checkpointing="full")
    found = [*smaller_batches(scenario, parallel, allowed)]
    found += parallel_changes(scenario, allowed)
    if parallel != recomputing:
        with_both = smaller_batches(scenario, recomputing, allowed)
        found += [replace(change, settings=f"{change.settings} with {RECOMPUTES}") for change in with_both]
    for settings, card in other_trainings(scenario):
        with suppress(ConfigError):  # no linear layers to adapt, or a mixture of experts, which 4 bits do not reach
            found.append(Change(settings, replace(scenario, card=card).needed()))
    least = min([Change("the run as it is", now), *found], key=lambda change: change.needed.total)
    return [change for change in found if fits(change, allowed)], least


def parallel_changes(scenario: MemoryScenario, allowed: float) -> Iterator[Change]:
    """Yield other tables of [parallel]; full recomputation by itself only where selective does not fit in `allowed` bytes."""
    is_enough = False
    for settings, other in other_parallel(scenario):
        if settings != RECOMPUTES or not is_enough:
            yield (change := Change(settings, scenario.needed(other)))
            is_enough |= settings == RECOMPUTES_LITTLE and fits(change, allowed)


def fits(change: Change, allowed: float) -> bool:
    """Tell whether a change needs at most `allowed` bytes."""
    return change.needed.total <= allowed


def smaller_batches(scenario: MemoryScenario, parallel: ParallelConfig, allowed: float) -> Iterator[Change]:
    """Yield half the heaviest micro-batch, a quarter and so on, up to the first that needs at most `allowed` bytes."""
    count, least = len(scenario.samples), _fewest(scenario)
    while count > least:
        count = max(count // 2, least)
        yield (change := Change(_size_setting(scenario, count), scenario.needed(parallel, count)))
        if change.needed.total <= allowed:
            return


def other_parallel(scenario: MemoryScenario) -> Iterator[tuple[str, ParallelConfig]]:
    """Yield other tables of [parallel], with the settings in words."""
    parallel = scenario.config.parallel
    recomputing = replace(parallel, activation_checkpointing="full")
    if parallel.activation_checkpointing == "none":
        yield RECOMPUTES_LITTLE, replace(parallel, activation_checkpointing="selective")
    if parallel != recomputing:
        yield RECOMPUTES, recomputing
    if scenario.num_ranks > 1 and parallel.strategy != "fsdp":
        yield SHARDS, replace(parallel, strategy="fsdp", shard_size=0)
        if parallel != recomputing:
            yield f"{SHARDS} with {RECOMPUTES}", replace(recomputing, strategy="fsdp", shard_size=0)


def other_trainings(scenario: MemoryScenario) -> Iterator[tuple[str, ModelCard]]:
    """Yield cards whose language model is not trained whole, or is stored in 4 bits, with the settings in words."""
    card = scenario.card
    if card.model.llm.tune == "full":
        model = replace(card.model, llm=replace(card.model.llm, tune="lora"))
        yield f"model.llm.tune = 'lora' (lora.rank = {scenario.config.lora.rank})", replace(card, model=model)
    elif card.quantize.bits == 16:
        yield "quantize.bits = 4", replace(card, quantize=QuantizeConfig(bits=4))


def _fewest(scenario: MemoryScenario) -> int:
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
