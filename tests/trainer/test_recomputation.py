"""What `parallel.activation_checkpointing = "auto"` picks: nothing is recomputed that fits, and a resumed run keeps the choice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.card import ModelCard
from model.config import LlmConfig, LoraConfig, ModelConfig
from model.errors import ConfigError
from model.llm.causal_lm import VocabularyLayout
from tests.support.ranks import run_ranks
from tests.support.resume import metrics, weights
from tests.support.runs import Start, start, start_alone
from trainer.config import ParallelConfig
from trainer.distributed.world import World
from trainer.memory import advice, chosen_at_start
from trainer.memory.advice import MemoryScenario
from trainer.memory.footprint import Footprint
from trainer.memory.recomputation import choose
from trainer.runfile.load import parse_config

NEEDED = {"none": 100, "selective": 60, "full": 20}
"""Made-up bytes of activations; ten more are stored."""


@pytest.fixture
def scenario(monkeypatch: pytest.MonkeyPatch) -> MemoryScenario:
    def made_up(card: ModelCard, config: ParallelConfig, *_: object) -> Footprint:
        return Footprint((), NEEDED[config.activation_checkpointing], 0, 10)

    monkeypatch.setattr(advice, "footprint", made_up)
    monkeypatch.setattr(MemoryScenario, "batch", lambda self, count=None: None)
    config = parse_config({"output_dir": "x", "model": {"llm": {"path": "x"}}, "train": {"max_steps": 0}}, "test")
    config = replace(config, parallel=ParallelConfig("ddp", activation_checkpointing="auto"))
    return MemoryScenario(config, ModelCard(ModelConfig(LlmConfig("x")), LoraConfig(), {}, {}, VocabularyLayout()), 1, [], 1)


@pytest.mark.parametrize(("memory", "kind"), [(121, "none"), (119, "selective"), (77, "selective"), (75, "full"), (5, "full")])
def test_the_first_that_fits_with_a_tenth_of_what_is_simulated_to_spare(scenario: MemoryScenario, memory: int, kind: str) -> None:
    found = choose(scenario, memory)
    assert found.kind == kind
    assert f"{kind} needs" in found.reason and ("may not fit" in found.reason) == (memory == 5)


def test_nothing_is_recomputed_where_memory_or_needs_are_not_known(
    scenario: MemoryScenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose(scenario, 0).kind == "none"

    def unknown(*_: object) -> Footprint:
        raise ConfigError("it looks at values")

    monkeypatch.setattr(advice, "footprint", unknown)
    found = choose(scenario, 1)
    assert found.kind == "none" and "it looks at values" in found.reason


def test_advice_names_selective_where_it_is_enough(scenario: MemoryScenario) -> None:
    def named(allowed: float) -> list[str]:
        config = replace(scenario.config, parallel=ParallelConfig("ddp"))
        here = replace(scenario, config=config, samples=[])
        return [change.settings for change in advice.parallel_changes(here, allowed) if advice.fits(change, allowed)]

    assert named(70) == [advice.RECOMPUTES_LITTLE]
    assert named(69) == [advice.RECOMPUTES]


def test_auto_has_the_numbers_of_what_it_chose(parts: Path, tmp_path: Path) -> None:
    """Losses and final files, to the bit: it changes nothing but memory and time."""
    sections: dict[str, Any] = {"parallel": {"activation_checkpointing": "full"}, "train": {"max_steps": 2}}
    assert run_ranks(starts, 1, parts, tmp_path / "auto", [1], [2])[0][0].code == 0
    assert start_alone(parts, tmp_path / "full", sections).code == 0
    assert metrics(tmp_path / "auto") == metrics(tmp_path / "full") and len(metrics(tmp_path / "full")) == 2
    assert weights(tmp_path / "auto") == weights(tmp_path / "full")


def starts(world: World, folder: Path, output: Path, memories: list[int], steps: list[int]) -> list[Start]:
    """Starts of one run, each with so much memory for a rank and up to so many steps."""
    found = []
    for memory, until in zip(memories, steps, strict=True):
        chosen_at_start.memory_of_a_rank = lambda world, memory=memory: memory
        sections: dict[str, Any] = {"parallel": {"activation_checkpointing": "auto"}, "train": {"max_steps": until}}
        found.append(start(world, folder, output, sections))
    return found


def test_a_run_says_what_it_chose_and_a_resumed_one_keeps_it(parts: Path, tmp_path: Path) -> None:
    first, later = run_ranks(starts, 1, parts, tmp_path, [1, 1 << 40], [1, 2])[0]
    assert first.code == later.code == 0
    assert "'auto' chose 'full': none needs" in first.said and "activation checkpointing full" in first.said
    assert "'auto' chose 'full': as in the checkpoint" in later.said
    state = json.loads((tmp_path / "checkpoint-2" / "state.json").read_text())
    assert (state["activation_checkpointing"], state["num_ranks"]) == ("full", 1)
    assert "# parallel.activation_checkpointing = 'auto' chose 'full'" in (tmp_path / "run.toml").read_text()
