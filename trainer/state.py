"""Types of what a run writes in JSON: the state file of a checkpoint, all that it holds beside tensors, and answers."""

from __future__ import annotations

from typing import TypedDict

from model.files.untrusted import Json


class HealthState(TypedDict, total=False):
    """State of the loss monitor (trainer.health.loss_monitor)."""

    in_a_row: int  # skipped updates at the end
    losses: list[float]
    num_updates: int


class LossScaleState(TypedDict):
    """State of the loss scale of float16 (trainer.loss_scale)."""

    scale: float
    updates: int  # in a row since it changed


class MeterTotals(TypedDict):
    """Sums since the last logged line, over all ranks (trainer.metrics.Meter)."""

    sums: list[list[float]]  # (3, sources)
    ratios: dict[str, list[float]]  # sum and count by name
    wait: float
    skipped: int
    seconds: float


class MeterState(MeterTotals, total=False):
    """The sums, and the state of the loss monitor beside them."""

    health: HealthState


class BestState(TypedDict):
    """The best validation so far (trainer.scores.best)."""

    key: str  # the value that decides, as in checkpoint.best
    value: float
    step: int  # of the run, when its checkpoint was written


class CheckpointState(TypedDict, total=False):
    """The whole state file. `load_state` has proven the keys that every checkpoint has: config, lengths, meter, steps."""

    config: Json  # tables of the run file
    lengths: str  # fingerprint of the data
    meter: MeterState
    stage: str  # absent in a run without stages
    first_step: int  # of that stage
    step: int
    best: BestState  # absent without checkpoint.best, and before the first validation
    loss_scale: LossScaleState  # absent unless the run computes in float16
    rewards: RewardState  # absent unless the kind of preference tuning needs them
    optimizer_steps: dict[str, float]
    trackers: dict[str, str]  # id of the run by tracker; absent without trackers that have one
    num_ranks: int
    activation_checkpointing: str  # none | selective | full, also where the run file says auto


class RewardState(TypedDict):
    """Sums of the rewards from which preference tuning measures (model.preference.shift)."""

    total: float
    count: float


class AnswerRow(TypedDict):
    """One answer of a validation, as a row of generations.jsonl holds it beside the step."""

    sample: int  # its number in [[data.validation]]
    source: str
    id: str
    where: str  # file:line
    prompt: str  # the end of the last question, placeholders included
    answer: str
    expected: str
