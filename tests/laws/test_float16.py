"""float16: losses near float32's, and a loss scale that falls on all ranks together, grows, stops at its floor and is resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.errors import ConfigError
from model.multimodal import MultimodalLM
from tests.support.equivalence import WHOLE, take_steps
from tests.support.equivalence import config_of as model_config
from tests.support.ranks import run_ranks
from tests.support.resume import cut, weights
from tests.support.runs import Start, config_of, start
from tests.support.tiny import save_llm, save_tower
from trainer import loop
from trainer.checkpoint.restore import restore_loss_scale
from trainer.config import LossScaleConfig
from trainer.distributed.world import World
from trainer.errors import ProofError
from trainer.loss_scale import CEILING, LossScale
from trainer.optim import Trained

ALONE = torch.device("cpu")


def test_the_scale_moves_as_torch_s_gradient_scaler_does() -> None:
    scale, theirs, tracker = LossScale(LossScaleConfig(1024.0, 3), ALONE), torch.tensor(1024.0), torch.tensor(0, dtype=torch.int32)
    for i in range(40):
        skipped = torch.tensor(float(i % 7 == 2 or i % 11 == 4))
        scale.update(skipped)
        torch._amp_update_scale_(theirs, tracker, skipped, 2.0, 0.5, 3)
        assert (scale.scale.item(), scale.state()["updates"]) == (theirs.item(), tracker.item())


def test_the_scale_stays_between_its_floor_and_its_ceiling_and_comes_back() -> None:
    scale = LossScale(LossScaleConfig(8.0, 2, floor=2.0), ALONE)
    for _ in range(5):
        scale.update(torch.tensor(1.0))
    assert scale.scale.item() == 2.0
    for _ in range(101):
        scale.update(torch.tensor(0.0))
    assert scale.state() == {"scale": CEILING, "updates": 1}
    again = LossScale(LossScaleConfig(8.0, 2), ALONE)
    again.restore(scale.state())
    assert again.state() == scale.state()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float16")
    save_llm(folder / "llm", "qwen2_tied")
    save_tower(folder / "vision", "clip")
    return folder


def losses(world: World, folder: Path, ways: list[tuple[str, str, str | bool, str]]) -> list[list[float]]:
    """Losses and gradient norms of five steps, of every tune, strategy, recomputation and dtype in `ways`."""
    return [take_steps(world, model_config(folder, way[0]), way[1], way[2], 2, way[3], 1.0, WHOLE)[0] for way in ways]


@pytest.mark.parametrize(("tune", "recompute"), [("full", "full"), pytest.param("lora", False, marks=pytest.mark.long)])
def test_losses_are_float32_s_within_rounding_however_it_is_run(tiny: Path, tune: str, recompute: bool | str) -> None:
    """DDP and FSDP2, several micro-batches, recomputed or not."""
    ways: list[Any] = [
        (tune, "ddp", False, "float32"),
        (tune, "ddp", False, "float16"),
        (tune, "fsdp", recompute, "float16"),
    ]
    ranks = run_ranks(losses, 2, tiny, ways, seconds=200)
    assert ranks[0] == ranks[1]
    (exact_loss, exact_norm), *half = (torch.tensor(found).view(-1, 2).T for found in ranks[0])
    for loss, norm in half:
        torch.testing.assert_close(loss, exact_loss, rtol=2**-10, atol=0)
        torch.testing.assert_close(norm, exact_norm, rtol=2**-7, atol=0)


HALF: dict[str, Any] = {
    "model": {"dtype": "float16", "llm": {"tune": "lora"}},
    "lora": {"rank": 2, "dropout": 0.3},
    "loss_scale": {"initial": 1024.0, "growth_interval": 2},
}


def start_overflowing(
    world: World, parts: Path, folder: Path, sections: dict[str, Any], steps: tuple[int, ...], rank: int | None
) -> Start:
    """One start in which gradients of `rank` (None: of all) overflow in some 0-based steps, while every loss is as it was."""
    forward, original, current = MultimodalLM.forward, loop.train_step, [-1]

    def stepping(*args: Any, **kwargs: Any) -> Any:
        current[0] = args[4].step
        return original(*args, **kwargs)

    def planted(self: MultimodalLM, batch: Any) -> Any:
        terms = dict(forward(self, batch))
        if current[0] in steps and rank in (None, world.rank):
            much = terms["text"].sum * 1e20
            terms["text"] = terms["text"]._replace(sum=terms["text"].sum + (much - much.detach()))
        return terms

    loop.train_step, MultimodalLM.forward = stepping, planted  # type: ignore[method-assign]
    return start(world, parts, folder, sections)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.long)])
def test_an_overflow_on_one_rank_is_skipped_on_all_and_resumed_with_the_same_scale(
    parts: Path, tmp_path: Path, strategy: str
) -> None:
    """Stopped where the scale has just fallen and the count of updates has begun anew: the same bytes, curve and scale."""
    sections = {**HALF, "parallel": {"strategy": strategy}}
    whole = tmp_path / "whole"
    assert {found.code for found in run_ranks(start_overflowing, 2, parts, whole, sections, (2,), 1)} == {0}
    lines = rows(whole)
    assert [line["train/loss_scale"] for line in lines] == [1024, 1024, 2048, 1024, 1024, 2048]
    assert [line["train/skipped_steps"] for line in lines] == [0, 0, 1, 0, 0, 0]
    assert not (whole / "faults.jsonl").exists()
    again = cut(whole, tmp_path / "again", 4)
    state = json.loads((again / "checkpoint-4" / "state.json").read_text())
    assert state["loss_scale"] == {"scale": 1024.0, "updates": 1}
    assert {found.code for found in run_ranks(start_overflowing, 2, parts, again, sections, (2,), 1)} == {0}
    assert weights(again) == weights(whole)
    keys = ("train/loss", "train/loss_scale", "train/skipped_steps", "train/grad_norm")
    assert [[line[key] for key in keys] for line in rows(again)] == [[line[key] for key in keys] for line in lines]


def overflow_everywhere(world: World, parts: Path, folder: Path, sections: dict[str, Any]) -> tuple[int, str]:
    code = start_overflowing(world, parts, folder, sections, tuple(range(6)), None).code
    return code, json.loads((folder / "exit.json").read_text())["reason"]


def test_at_its_floor_the_run_stops_and_says_what_to_do(parts: Path, tmp_path: Path) -> None:
    """Four overflows in a row are more than faults.max_nonfinite = 3, and no fault while the scale may fall."""
    sections = {**HALF, "loss_scale": {"initial": 32.0, "floor": 2.0}, "train": {"max_steps": 9}}
    ((code, reason),) = run_ranks(overflow_everywhere, 1, parts, tmp_path / "run", sections)
    assert code == 70 and "even at a loss scale of 2, the smallest that is allowed (loss_scale.floor = 2)" in reason
    assert "Use model.dtype = 'bfloat16' where the device computes in it, or 'float32'; or lower optim.lr" in reason
    assert len(rows(tmp_path / "run")) == 4  # the fifth step was not logged


@pytest.mark.long
def test_a_run_that_only_overflows_has_learned_nothing(parts: Path, tmp_path: Path) -> None:
    sections = {**HALF, "loss_scale": {"initial": 1024.0}, "train": {"max_steps": 4}}
    ((code, reason),) = run_ranks(overflow_everywhere, 1, parts, tmp_path / "short", sections)
    assert code == 70 and "all 4 updates were skipped while the loss scale of float16 was falling" in reason


@pytest.mark.parametrize("state", [{}, {"loss_scale": {"scale": 8.0}}, {"loss_scale": {"scale": 0.0, "updates": 1}}])
def test_a_checkpoint_without_a_scale_is_refused(tmp_path: Path, state: Any) -> None:
    trained = Trained({}, torch.optim.SGD([torch.zeros(1)]), LossScale(LossScaleConfig(), ALONE))
    with pytest.raises(ProofError, match=r"state.json does not say which loss scale the run had reached"):
        restore_loss_scale(tmp_path, trained, state)
    restore_loss_scale(tmp_path, replace(trained, loss_scale=None), state)


@pytest.mark.parametrize(
    ("scale", "dtype", "reason"),
    [
        ({"initial": 1000.0}, "float16", "loss_scale.initial = 1000.0 is not a power of two"),
        ({"floor": 0.0}, "float16", "loss_scale.floor = 0.0 is not a power of two"),
        ({"initial": 2.0, "floor": 4.0}, "float16", "loss_scale.floor = 4.0 is more than loss_scale.initial = 2.0"),
        ({"growth_interval": 0}, "float16", "loss_scale.growth_interval = 0 is not positive"),
        ({"initial": 2.0}, "bfloat16", "[loss_scale] has no effect with model.dtype = 'bfloat16'"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, scale: dict[str, Any], dtype: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, model={"dtype": dtype}, loss_scale=scale)
    assert reason in str(caught.value)
