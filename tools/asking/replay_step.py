"""A past step done again: its losses sample by sample and token by token, its gradient, and the row that the run has logged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from model.batch import Batch
from model.files.sharding import is_sharded_tensor
from model.files.untrusted import Json
from tools.asking.past_step import PastRecords, PastStep, recorded_rows
from trainer.distributed.world import World
from trainer.faults.phase_tracker import PhaseTracker
from trainer.feed import Feed
from trainer.metrics import Meter
from trainer.optim import in_norm_order, set_learning_rates
from trainer.part_norms import PartNorms
from trainer.schedule import multiplier
from trainer.setup import PreparedRun
from trainer.state import CheckpointState
from trainer.step import StepOptions, StepResult, train_step


@dataclass(frozen=True)
class SampleLoss:
    """One sample of the step: the loss of each token that it supervises."""

    sample: int
    source: str
    where: str  # file:line
    ids: list[int]  # the supervised tokens
    losses: list[float]  # cross entropy of each

    @property
    def loss(self) -> float:
        """Return the mean over the supervised tokens; NaN without any."""
        return math.fsum(self.losses) / len(self.losses) if self.losses else math.nan


@dataclass(frozen=True)
class Replayed:
    """Losses, gradient and metrics of a step done again, beside what the run has logged."""

    samples: list[SampleLoss]  # in the order of ranks and micro-batches
    left_out: list[str]  # records of the step that could not be used
    grad_norm: float
    norms: dict[str, float]  # of each part's gradient, before clipping
    skipped: bool  # the update, because loss or gradient was not finite
    row_step: int | None  # step of the logged row that covers this one; None: there is none
    first_covered: int  # first step that the row covers
    row: Json  # the recorded row
    again: dict[str, float]  # the same numbers of the replay

    @property
    def differences(self) -> Mapping[str, tuple[object, object]]:
        """Return what is not equal to the bit: recorded and replayed value by name. Speed and memory are not compared."""
        found = dict[str, tuple[object, object]]()
        for name in sorted({*self.again, *(key for key in self.row if key.startswith("train/"))}):
            before, now = self.row.get(name), self.again.get(name)
            now = None if isinstance(now, float) and not math.isfinite(now) else now
            if before != now and name.startswith("train/"):
                found[name] = (before, now)
        return found


def replay(past: PastStep, prepared: PreparedRun, state: CheckpointState | None) -> Replayed:
    """Do the steps from the start of the replay to the row of metrics.jsonl that covers the step. Collective.

    The row of a step is a mean over the steps since the row before it: the checkpoint holds the sums so far, and the steps up to
    the row are done again too.
    """
    world, stage, first = prepared.world, past.stage, past.stage.first_step
    dataset, _ = prepared.data.training()
    rows = world.broadcast_json(sorted(recorded_rows(past)) if world.is_main else None)
    row_step = next((step for step in rows if step >= past.number), None)
    last = (row_step or past.number) - 1 - first
    assert prepared.trained is not None
    meter = Meter(dataset.source_names, world, PartNorms(prepared.trained.optimizer, world))
    if state:
        meter.restore(state["meter"])
    feed = Feed(prepared, PastRecords(prepared.data, stage, last), PhaseTracker())
    again: dict[str, float] = {}
    for step in range(past.begins - first, last + 1):
        batches, rejected, result = _train(prepared, feed, step)
        meter.add(batches, result, 0.0)
        if first + step + 1 == past.number:
            found = _samples(prepared, batches, result)
            left_out = [f"{item.where} {item.id}: {item.reason}" for item in rejected]
            norms, skipped, grad_norm = part_norms(prepared, result), bool(result.skipped.item()), result.grad_norm.item()
        if first + step + 1 in rows:
            again = {k: v for k, v in meter.read().items() if k.startswith("train/")}
            groups = prepared.trained.optimizer.param_groups
            again |= {f"train/lr/{group['name'].partition('/')[0]}": group["lr"] for group in groups}
        elif (step + 1) % prepared.config.checkpoint.every == 0:
            meter.sums.total()  # the run added its sums up here as well, for its checkpoint
    gathered = world.gather_json([[asdict(sample) for sample in found], left_out])
    samples = [SampleLoss(**sample) for of_rank, _ in gathered for sample in of_rank]
    return Replayed(
        samples=samples,
        left_out=[line for _, lines in gathered for line in lines],
        grad_norm=grad_norm,
        norms=norms,
        skipped=skipped,
        row_step=row_step,
        first_covered=max([step for step in rows if step < past.number], default=first) + 1,
        row=recorded_rows(past)[row_step] if row_step else {},
        again=again if row_step else {},
    )


def _train(prepared: PreparedRun, feed: Feed, step: int) -> tuple[list[Batch], list, StepResult]:
    """Do one step as `trainer.loop.Loop` does it. Collective."""
    assert prepared.trained is not None
    config, world = prepared.config, prepared.world
    micro_batches, _ = feed.next(step)
    set_learning_rates(prepared.trained.optimizer, multiplier(config.optim, step, prepared.total_steps))
    batches = [micro.batch.to(world.device) for micro in micro_batches]
    scaling = prepared.trained.loss_scale
    options = StepOptions(seed=config.seed, step=step, clip_norm=config.optim.clip_norm, scaling=scaling)
    result = train_step(prepared.wrapped, prepared.trained.optimizer, batches, world, options)
    return batches, [item for micro in micro_batches for item in micro.rejected], result


def _samples(prepared: PreparedRun, batches: Sequence[Batch], result: StepResult) -> list[SampleLoss]:
    """Return the samples of this rank with the loss of each supervised token. Host sync."""
    dataset, _ = prepared.data.training()
    found = []
    for batch, addends in zip(batches, result.addends):
        targets = batch.labels.flatten().index_select(0, batch.supervised).tolist()
        owners, losses, names = batch.owners.tolist(), addends.tolist(), batch.sample_ids.tolist()
        for place, sample in enumerate(names):
            if sample < 0:
                continue
            own = [k for k, owner in enumerate(owners) if owner == place]
            source = dataset.source_names[int(dataset.source_ids[sample])]
            ids, own_losses = [targets[k] for k in own], [losses[k] for k in own]
            found.append(SampleLoss(sample, source, dataset.where(sample), ids, own_losses))
    return found


def part_norms(prepared: PreparedRun, result: StepResult) -> dict[str, float]:
    """Return the norm of the gradient of each part, over all ranks and before clipping. Collective, host sync."""
    assert prepared.trained is not None
    trained, world = prepared.trained, prepared.world
    names = {id(p): name for name, p in trained.parameters.items()}
    ordered = in_norm_order(p for group in trained.optimizer.param_groups for p in group["params"])
    parts = list(dict.fromkeys(names[id(p)].partition(".")[0] for p in trained.parameters.values()))
    squares = torch.zeros(2, len(parts), dtype=torch.float64, device=world.device)  # of shards, and of whole gradients
    for p, norm in zip(ordered, result.norms):
        copies = world.size // p.device_mesh.size() if is_sharded_tensor(p) else 1
        squares[int(not is_sharded_tensor(p)), parts.index(names[id(p)].partition(".")[0])] += norm.double().square() / copies
    total = world.sum(squares[0].clone()) + squares[1]
    scale = 1.0 if result.loss_scale is None else result.loss_scale.double()  # float16's gradients are scaled
    return dict(zip(parts, (total.sqrt() / scale).tolist()))


def largest_difference(differences: Mapping[str, tuple[object, object]]) -> float:
    """Return the largest relative difference of numbers; infinity where one is missing or no number."""
    found = 0.0
    for before, now in differences.values():
        if not isinstance(before, int | float) or not isinstance(now, int | float):
            return math.inf
        found = max(found, abs(before - now) / max(abs(before), abs(now)))
    return found


def ranks_note(past: PastStep, world: World) -> str:
    """Return what the number of ranks means for the comparison; "" where both are the same."""
    if past.num_ranks in (None, world.size):
        return ""
    return (
        f"the run had {past.num_ranks} ranks and this replay has {world.size}: sums are equal to rounding, and dropout draws other "
        f"numbers. For equal bits: torchrun --nproc_per_node={past.num_ranks} -m tools.replay ..."
    )
