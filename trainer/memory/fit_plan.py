"""Plan of what a run takes of every rank's memory and of the disk, with the settings that would make it fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from data.check.measured_lengths import EXACT
from data.loader import BatchPlan
from data.sample import Sample
from model.multimodal import MultimodalLM
from trainer.checkpoint.final_files import weight_files_of
from trainer.config import OptimConfig, ParallelConfig, RunConfig
from trainer.machine.disk_space import final_bytes, shard_bytes
from trainer.memory.advice import Change, MemoryScenario, weigh_changes
from trainer.memory.footprint import Footprint, held_rows, on_meta, sharing_ranks
from trainer.memory.heaviest_batch import find_heaviest, read_batch_samples
from trainer.memory.recomputation import choose
from trainer.memory.sample_cost import media_memory, sample_costs
from trainer.memory.synthetic_samples import build_synthetic_samples
from trainer.optim_state import assign_rules, tensors_to_save
from trainer.records.run_data import RunData
from trainer.setup import num_steps

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Everything that the tool reports."""

    scenario: MemoryScenario
    strategies: dict[str, Footprint]  # the configured one first
    calendar: dict[str, int]  # steps, samples and tokens; empty without data
    lengths: str  # exact | partly exact | estimated: the lengths behind the calendar and the heaviest micro-batch
    checkpoint_bytes: int
    final_bytes: int  # without what an earlier run trained and this one only passes on
    memory: float  # bytes of a rank; 0: not known
    changes: list[Change]  # changes that would make the run fit, when it does not
    nearest: Change | None  # the change that comes nearest, when none makes it fit
    recomputation: str = ""  # what activation_checkpointing = "auto" picks, and why

    @property
    def fits(self) -> bool | None:
        configured = next(iter(self.strategies.values()))
        return configured.total <= self.memory if self.memory else None


def plan_run(config: RunConfig, data: RunData, num_ranks: int, memory: float, *, on_host: bool = False) -> Plan:
    """Plan a run on `num_ranks` ranks of `memory` bytes each. `on_host`: they compute on the CPU."""
    scenario, calendar = heaviest_of(config, data, num_ranks)
    scenario = replace(scenario, on_host=on_host)
    chosen = ""
    if config.parallel.activation_checkpointing == "auto":
        choice = choose(scenario, memory)
        config = replace(config, parallel=replace(config.parallel, activation_checkpointing=choice.kind))
        scenario, chosen = replace(scenario, config=config), f"'auto' picks '{choice.kind}': {choice.reason}"
    now, parallel = scenario.needed(), config.parallel
    strategies: dict[str, Footprint] = {parallel.strategy: now}
    for other in other_strategies(parallel, num_ranks):
        strategies[other.strategy] = scenario.needed(other)
    changes: list[Change] = []
    nearest = None
    if memory and now.total > memory:
        changes, least = weigh_changes(scenario, now, memory)
        nearest = None if changes else least
    model = on_meta(data.card, parallel, computes=False)
    shards = planned_checkpoint_bytes(model, sharing_ranks(parallel, num_ranks), num_ranks, config.optim)
    final, _ = final_bytes(weight_files_of(model, data.card))
    return Plan(scenario, strategies, calendar, data.lengths_kind, shards, final, memory, changes, nearest, chosen)


def planned_checkpoint_bytes(model: MultimodalLM, ways: int, num_ranks: int, optim: OptimConfig) -> int:
    """Return the bytes of all tensor files of a checkpoint after the first update, from the structure of the model alone.

    `ways`: number of the `num_ranks` ranks that share one copy by rows; of several copies the first is written. 1: every rank has
    its own.
    """
    rules = assign_rules(model, optim)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = 0
    for rank in range(num_ranks):
        rows = {name: held_rows(p, ways, rank).detach() for name, p in trained.items()} if rank < ways else {}
        total += shard_bytes(tensors_to_save(rows, {own: rules[trained[name]] for name, own in rows.items()}))[0]
    return total


def other_strategies(parallel: ParallelConfig, num_ranks: int) -> list[ParallelConfig]:
    """Return [parallel] with each of the other strategies.

    hsdp is planned in two copies if the ranks can form them and no shard size is set.
    """
    if num_ranks == 1:
        return []
    size = parallel.shard_size or (num_ranks // 2 if num_ranks % 2 == 0 and num_ranks > 2 else 0)
    whole = replace(parallel, strategy="ddp", shard_size=0, cpu_offload=False)  # DDP keeps everything on the device
    known = [whole, replace(parallel, strategy="fsdp", shard_size=0)]
    known += [replace(parallel, strategy="hsdp", shard_size=size)] if size else []
    return [other for other in known if other.strategy != parallel.strategy]


def heaviest_of(config: RunConfig, data: RunData, num_ranks: int) -> tuple[MemoryScenario, dict[str, int]]:
    """Return the heaviest micro-batch of the first epoch, and the run's steps, samples and tokens ({} without data)."""
    batch, sampler = config.batch, data.sampler
    if sampler is None or data.train is None:
        micros = 2 if config.data.packing else -(-batch.global_batch_size // (num_ranks * batch.micro_batch_size))
        return MemoryScenario(config, data.card, num_ranks, build_synthetic_samples(config, data), micros), {}
    deal = BatchPlan(num_ranks, batch.micro_batch_size, batch.micro_batch_tokens)
    model = on_meta(data.card, config.parallel, computes=False)
    media = media_memory(model, data.train, config.parallel.activation_checkpointing == "full")
    costs = sample_costs(model, config.model, data.train) if deal.is_packed else None
    found = find_heaviest(sampler, deal, media, costs, 0, sampler.steps_per_epoch)
    if deal.is_packed and data.lengths_kind != EXACT:  # a run measures before it packs; here records may be longer than planned
        samples = samples_that_fit(read_batch_samples(data.train, found.ids, False), batch.micro_batch_tokens)
    else:
        samples = read_batch_samples(data.train, found.ids, deal.is_packed)
    _, ids = sampler.before(sampler.steps_per_epoch - 1)
    tokens = sum(int(sampler.lengths[part].sum(dtype="int64")) for part in (ids, sampler.step(sampler.steps_per_epoch - 1)))
    calendar = {
        "steps": num_steps(config, data),
        "steps_per_epoch": sampler.steps_per_epoch,
        "samples_per_epoch": sampler.samples_per_epoch,
        "tokens_per_epoch": tokens,
    }
    return MemoryScenario(config, data.card, num_ranks, samples, found.num_micro_batches), calendar


def samples_that_fit(samples: list[Sample], num_tokens: int) -> list[Sample]:
    """Keep the samples that fit into `num_tokens`, in order; a sample that does not fit is skipped."""
    kept, left = [], num_tokens
    for sample in samples:
        if len(sample.input_ids) <= left:
            kept.append(sample)
            left -= len(sample.input_ids)
    return kept
