"""The output of `tools.plan`: a table of at most 100 columns for people, one object for programs."""

from __future__ import annotations

from dataclasses import asdict

from data.check.measured_lengths import EXACT
from model.trainable import part_table
from trainer.machine.disk_space import format_bytes as rounded
from trainer.memory.fit_plan import Plan
from trainer.memory.footprint import Footprint, on_meta
from trainer.memory.rehearsal import describe_batch

ROWS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "copies": "copies for computing",
    "activations": "activations, at most",
    "gathered": "whole blocks gathered",
    "unsummed": "gradients before the sum",
    "offloaded": "of these, on the host",
    "total": "total",
    "host": "host memory beside it",
}


def report_lines(plan: Plan) -> list[str]:
    """Return the lines of the table for people."""
    return [*_parts(plan), "", *_strategies(plan), "", *_run(plan), *_advice(plan)]


def _parts(plan: Plan) -> list[str]:
    """Return the lines that show what each part takes on a rank of the configured strategy."""
    scenario, (footprint, *_) = plan.scenario, plan.strategies.values()
    held = {part.part: part for part in footprint.holdings}
    ranks, strategy = scenario.num_ranks, scenario.config.parallel.strategy
    lines = [f"sizes are those on each of {ranks} ranks with parallel.strategy = {strategy!r}"] if ranks > 1 else []
    lines += [f"{'part':<17}{'parameters':>15}{'trainable':>15}  {'tune':<10}{'weights':>12}{'gradients':>12}{'optimizer':>12}"]
    for row in part_table(on_meta(scenario.card, scenario.config.parallel, computes=False), scenario.card.model):
        part = held[row.part]
        sizes = "".join(f"{exact_size(value):>12}" for value in (part.weights + part.buffers, part.gradients, part.optimizer))
        lines.append(f"{row.part:<17}{row.num_parameters:>15,}{row.num_trainable:>15,}  {row.tune:<10}{sizes}")
    return lines


def _strategies(plan: Plan) -> list[str]:
    """Return the lines that show all strategies side by side; the configured one is marked."""
    config, ranks = plan.scenario.config, plan.scenario.num_ranks
    names = [f"{name} *" if i == 0 and ranks > 1 else name for i, name in enumerate(plan.strategies)]
    if ranks == 1:
        names = ["one process"]
    lines = [f"{f'on each of {ranks} ranks' if ranks > 1 else 'memory':<28}" + "".join(f"{name:>14}" for name in names)]
    for key, label in ROWS.items():
        values = [getattr(found, key) for found in plan.strategies.values()]
        if any(values):
            lines.append(f"{label:<28}" + "".join(f"{exact_size(value):>14}" for value in values))
    if plan.memory:
        fits = ["yes" if found.total <= plan.memory else "no" for found in plan.strategies.values()]
        lines.append(f"{f'fits in {exact_size(plan.memory)}':<28}" + "".join(f"{answer:>14}" for answer in fits))
    else:
        lines.append("fits: not known, as this machine has no such device; name the memory of a rank with --memory")
    if "hsdp" in plan.strategies and config.parallel.strategy != "hsdp":
        lines.append(f"hsdp: parallel.shard_size = {config.parallel.shard_size or ranks // 2}")
    return lines


def _run(plan: Plan) -> list[str]:
    scenario, calendar = plan.scenario, plan.calendar
    lines = [
        f"heaviest    {describe_batch(scenario.batch())}",
        f"            one of {scenario.num_micro_batches} micro-batch(es) in its step, computing in {scenario.card.model.dtype}",
    ]
    if calendar:
        lines.append(
            f"steps       {calendar['steps']:,} in all, {calendar['steps_per_epoch']:,} per epoch of "
            f"{calendar['samples_per_epoch']:,} samples, {calendar['tokens_per_epoch']:,} tokens"
        )
        if plan.lengths != EXACT:
            lines.append(f"lengths     {plan.lengths}: python -m tools.check_data measures every record, as a packed run does")
    else:
        lines.append("steps       not known without the data; samples of data.max_length tokens were made up")
    kept = scenario.config.checkpoint.keep
    lines.append(f"checkpoint  {exact_size(plan.checkpoint_bytes)} of tensors each")
    lines.append(f"final       {exact_size(plan.final_bytes)} of weights")
    best = bool(scenario.config.checkpoint.best)
    most = plan.checkpoint_bytes * (kept + 1 + best) + plan.final_bytes * (1 + best)
    more = "the best, one more being written, final/ and best/" if best else "one more being written, and final/"
    lines.append(f"disk        {exact_size(most)} at most: checkpoint.keep = {kept}, {more}")
    return lines


def _advice(plan: Plan) -> list[str]:
    if plan.fits is not False:
        return []
    lines = ["", f"It does not fit in {exact_size(plan.memory)}. What would:"]
    lines += [f"  {change}" for change in plan.changes]
    if plan.nearest is not None:
        lines += ["  nothing by itself; nearest comes", f"  {plan.nearest}"]
    return lines


def as_json(plan: Plan) -> dict[str, object]:
    """Return the plan for programs, with sizes in bytes."""
    scenario = plan.scenario
    batch = scenario.batch()
    strategies = {name: _sizes(found) for name, found in plan.strategies.items()}
    configured = next(iter(plan.strategies.values()))
    return {
        "ranks": scenario.num_ranks,
        "strategy": scenario.config.parallel.strategy,
        "parts": {part.part: {k: v for k, v in asdict(part).items() if k != "part"} for part in configured.holdings},
        "strategies": strategies,
        "heaviest": {
            "samples": len(scenario.samples),
            "tokens": batch.input_ids.numel(),
            "micro_batches": scenario.num_micro_batches,
        },
        **plan.calendar,
        **({"lengths": plan.lengths} if plan.calendar else {}),
        "checkpoint_bytes": plan.checkpoint_bytes,
        "final_bytes": plan.final_bytes,
        "memory": int(plan.memory) or None,
        "fits": plan.fits,
        "would_fit": {change.settings: change.needed.total for change in plan.changes},
    }


def exact_size(value: float) -> str:
    """Format bytes with two decimals, exact enough for sums to be checked."""
    return rounded(value, 2)


def _sizes(found: Footprint) -> dict[str, int]:
    return {key: getattr(found, key) for key in ROWS}
