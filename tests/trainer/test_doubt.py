"""What the heaviest micro-batch takes at most is counted from above: a run far from its limit is not rehearsed, and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.errors import ConfigError
from tests.support.ranks import run_ranks
from tests.support.runs import Start, config_of, start, start_alone
from trainer.distributed.world import World
from trainer.machine.memory_info import Usage
from trainer.memory import doubt
from trainer.memory.doubt import upper_bound
from trainer.memory.fit_plan import heaviest_of
from trainer.memory.footprint import footprint, on_meta
from trainer.memory.heaviest_batch import Heaviest
from trainer.memory.sample_cost import media_memory
from trainer.records.run_data import open_data

ALONE = World(0, 0, 1, None)  # type: ignore[arg-type]
FULL = {"model": {"llm": {"tune": "full"}, "vision": {"tune": "full"}}}
LORA = {"model": {"llm": {"tune": "lora"}, "vision": {"tune": "frozen"}}, "lora": {"rank": 8, "dropout": 0.1}}


@pytest.mark.parametrize("sections", [FULL, LORA, {}], ids=["full", "lora", "projector"])
def test_the_bound_is_above_what_the_plan_simulates(parts: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    """Above, and not so far that it would say nothing."""
    config = config_of(
        parts, output_dir=str(tmp_path / "run"), **{**sections, "model": {**sections.get("model", {}), "dtype": "float32"}}
    )
    data = open_data(config, ALONE)
    scenario, _ = heaviest_of(config, data, 1)
    batch, model = scenario.batch(), on_meta(data.card, config.parallel, computes=False)
    assert data.train is not None
    media = media_memory(model, data.train, False)
    ids = np.array([i for i in batch.sample_ids.tolist() if i >= 0])
    bound = upper_bound(model, Heaviest(0, ids, 2, float(batch.input_ids.numel() + media[ids].sum())))
    found = footprint(data.card, config.parallel, 1, batch, 2)
    assert found.activations + found.gradients < bound < 30 * (found.activations + found.gradients)


def test_a_run_far_from_the_limit_is_not_rehearsed_and_says_how_to(parts: Path, tmp_path: Path) -> None:
    done = start_alone(parts, tmp_path / "run", {"train": {"max_steps": 1}})
    (line,) = [line for line in done.said.splitlines() if line.startswith("memory ")]
    assert line.startswith("memory    at most 0.0") and line.endswith("nothing to rehearse (train.rehearsal = 'always' does)")


def little_left(world: World, folder: Path, output_dir: Path, sections: dict[str, Any]) -> Start:
    doubt.usage = lambda device: Usage(now=0, peak=0, free=1 << 20, total=1 << 30)
    return start(world, folder, output_dir, sections)


def test_it_is_rehearsed_where_it_may_not_fit_where_counting_says_nothing_and_where_asked(parts: Path, tmp_path: Path) -> None:
    once = {"train": {"max_steps": 1}}
    assert "memory    peak" in run_ranks(little_left, 1, parts, tmp_path / "little", once)[0].said
    scores = {**once, "model": {"attention": "eager"}}
    assert "memory    peak" in start_alone(parts, tmp_path / "eager", scores).said
    assert "memory    peak" in start_alone(parts, tmp_path / "asked", {"train": {"max_steps": 1, "rehearsal": "always"}}).said


def test_a_wrong_word_names_the_right_ones(parts: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.rehearsal = 'never'.*'auto'.*'always'"):
        config_of(parts, train={"rehearsal": "never"})
