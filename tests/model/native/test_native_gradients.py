"""Models that read pictures at their own size learn as transformers' own classes do: loss and every gradient, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.collate import collate, collate_packed
from model.llm.causal_lm import blocks
from model.multimodal import MultimodalLM
from tests.support.published.native import NATIVE_NAMES
from tests.support.published.native_runs import BothModels, both_models, picture, talk
from trainer.distributed.blocks import block_owner, checkpoint_activations


@pytest.fixture(scope="module", params=NATIVE_NAMES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BothModels]:
    folder = tmp_path_factory.mktemp(request.param)
    yield both_models(request.param, folder / "published", folder / "run")


def records_of(folder: Path) -> list[dict[str, Any]]:
    """One and two pictures of odd shapes, and a talk without any."""
    shown = [picture(folder, *size) for size in ((1, 54), (28, 150), (97, 61))]
    return [talk(shown[0]), talk(), talk(*shown[1:])]


@contextmanager
def recomputing(model: MultimodalLM, kind: str) -> Iterator[None]:
    """Backward recomputes all blocks inside the context."""
    checkpoint_activations(model, kind)
    yield
    for part in ("llm", "vision"):
        for block in blocks(block_owner(model, part)):
            del vars(block)["forward"]


def assert_same(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.any(), name
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5 * scale)


def test_loss_and_every_gradient_are_those_of_transformers(models: BothModels, tmp_path: Path) -> None:
    """Of rows that are padded on the right, and of the same samples in one packed row."""
    records = records_of(tmp_path)
    expected = models.their_gradients(records, [models.data.processor([record], answers=True) for record in records])
    assert_same(models.our_gradients(models.data.processor(records, answers=True)), expected)
    samples = [models.data.processor._sample(i, record, True, None, False) for i, record in enumerate(records)]
    assert_same(models.our_gradients(collate_packed(samples, models.data.pad_id)), expected)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputed_blocks_learn_the_same(models: BothModels, tmp_path: Path, kind: str) -> None:
    batch = models.data.processor(records_of(tmp_path), answers=True)
    expected = models.our_gradients(batch)
    with recomputing(models.ours, kind):
        assert_same(models.our_gradients(batch), expected)


def test_a_batch_without_pictures_gives_every_part_a_gradient_of_zeros(models: BothModels) -> None:
    _, found = models.our_gradients(models.data.processor([talk()], answers=True))
    assert found.keys() == dict(models.ours.named_parameters()).keys()
    assert not [name for name, gradient in found.items() if name.startswith("vision") == bool(gradient.any())]
    _, blank = models.our_gradients(collate([], models.data.pad_id))
    assert blank.keys() == found.keys() and not any(gradient.any() for gradient in blank.values())


@pytest.mark.long
def test_answers_are_those_of_transformers_whatever_stands_beside_a_prompt(models: BothModels, tmp_path: Path) -> None:
    models.ours.stop_ids = ()
    records = records_of(tmp_path)
    prompts = models.data.processor(records)
    assert prompts.attention_mask is not None and 0 in prompts.attention_mask
    limits: dict[str, Any] = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    expected = models.theirs.generate(**models.prompt_inputs(records, prompts), **limits)[:, prompts.input_ids.shape[1] :].tolist()
    assert models.ours.generate(prompts, 10) == expected and expected[0] != expected[2]
    for record, ids in zip(records, expected):  # each alone, and behind one with other features
        assert models.ours.generate(models.data.processor([record]), 10) == [ids]
