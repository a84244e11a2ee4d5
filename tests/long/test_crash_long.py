"""Crashes of a whole run, on two ranks as well: killed or cut off before any change of a file, it ends with the same bytes."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.file_log import Event, State, distinct, in_order, killed, power_cuts, recorded, write_state
from tests.support.kill_long import STAGES, sections_of
from tests.support.kills import difference, ending_of
from tests.support.ranks import run_ranks
from tests.support.resume import LORA
from tests.support.runs import Start, merged, start
from trainer.distributed.world import World

SAMPLE = 40
CASES: dict[str, tuple[int, str, dict[str, Any], int]] = {
    "one process": (1, "ddp", LORA, 0),
    "final replaced": (1, "ddp", LORA, 2),
    "two ranks": (2, "fsdp", LORA, 0),
    "stages": (2, "ddp", {**STAGES, "stage": [{**stage, "train": {"max_steps": 2}} for stage in STAGES["stage"]]}, 0),
}
"""Ranks, strategy, settings, and steps that were done before the record begins."""


def start_recorded(world: World, parts: Path, output_dir: Path, sections: dict[str, Any]) -> tuple[Start, list[Event]]:
    with recorded(output_dir) as log:
        begun = start(world, parts, output_dir, sections)
    return begun, log.events


def durable(event: Event) -> int:
    """The newest checkpoint that has its name on the disk once the run folder is synced; 0 without one."""
    steps = [name.removeprefix("checkpoint-") for name in event.photograph if name.startswith("checkpoint-")]
    return max((int(step) for step in steps if step.isdigit()), default=0)


def promised(events: list[Event], run: str) -> list[Event]:
    """The same, and in each what no crash may lose from then on."""
    newest = 0
    for event in events:
        event.done = str(newest)
        if event.synced is not None and event.caption.endswith(run):
            newest = max(newest, durable(event))
            event.done = str(newest)
    return events


@pytest.mark.long
@pytest.mark.parametrize("crash", ["killed", "power cut"])
@pytest.mark.parametrize("case", CASES)
def test_whatever_a_crash_of_a_run_leaves_it_ends_with_the_same_bytes(parts: Path, tmp_path: Path, case: str, crash: str) -> None:
    """A sample of all states; a start never goes on from an older checkpoint than the disk was known to have."""
    size, strategy, changes, done = CASES[case]
    sections = merged(sections_of(parts, tmp_path, strategy, 0, {}), changes)
    sections |= {"train": None} if "stage" in changes else {"train": {"max_steps": 4}}
    run, kept = tmp_path / "run", tmp_path / "kept"
    if done:
        assert {a.code for a in run_ranks(start, size, parts, run, {**sections, "train": {"max_steps": done}})} == {0}
    run.mkdir(exist_ok=True)
    answers = run_ranks(start_recorded, size, parts, run, sections, seconds=300)
    assert {begun.code for begun, _ in answers} == {0}, answers[0][0].said
    expected = ending_of(run)
    run.rename(kept)
    events = promised(in_order([log for _, log in answers]), str(run))
    found = list(distinct(killed(events) if crash == "killed" else power_cuts(events)))
    chosen = random.Random(case).sample(found, min(SAMPLE, len(found)))
    for caption, newest, state in chosen:
        check_goes_on(size, parts, run, sections, f"{crash}, {caption}", int(newest), state, expected)
    print(f"\n{case}, {crash}: {len(chosen)} of {len(found)} states at {len(events)} instants, all ended alike")


def check_goes_on(
    size: int, parts: Path, run: Path, sections: dict[str, Any], caption: str, newest: int, state: State, expected: dict[str, Any]
) -> None:
    shutil.rmtree(run, ignore_errors=True)
    write_state(state, run)
    answers = run_ranks(start, size, parts, run, sections, seconds=300)
    assert {answer.code for answer in answers} == {0}, f"{caption}: {answers[0].said}"
    total = len(expected["metrics"])
    assert max(len(answer.seen) for answer in answers) <= total - newest, f"{caption}: step {newest} was on disk"
    assert difference(ending_of(run), expected) == [], caption
