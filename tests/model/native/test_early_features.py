"""Features for early layers (Qwen3-VL): added once, where they belong, whatever is done with the blocks, and never left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from model.build import assemble
from model.errors import ConfigError
from model.files.sharding import is_sharded_module
from model.llm.early_features import EarlyFeatures
from model.vision.native_kinds import kept_blocks
from model.weights.materialise import materialise
from model.weights.origins import weight_layers
from tests.support.published.asking import run_from
from tests.support.published.native_runs import TUNED, BothModels, both_models, picture, talk
from tests.support.ranks import run_ranks
from tests.support.tiny import SIZES
from trainer.config import ParallelConfig
from trainer.distributed.blocks import prepare_blocks
from trainer.distributed.parallelize import gradient_sync, replicate
from trainer.distributed.shards import shard
from trainer.distributed.world import World
from trainer.records.run_data import open_data

LEVELS, WIDTH = 3, SIZES["hidden_size"]
Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def decoder() -> Any:
    torch.manual_seed(0)
    llm = Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "num_hidden_layers": 3})).eval()
    EarlyFeatures(llm.get_decoder(), WIDTH, LEVELS)
    return llm.get_decoder()


def by_hand(decoder: Any, rows: Tensor) -> Tensor:
    """The last hidden state, block by block."""
    first, *others = rows.split(WIDTH, -1)
    hidden, places = first, torch.arange(first.shape[1])[None]
    for i, block in enumerate(decoder.layers):
        hidden = type(block).forward(block, hidden, position_ids=places, position_embeddings=decoder.rotary_emb(hidden, places))
        hidden = hidden + others[i] if i < len(others) else hidden
    found: Tensor = decoder.norm(hidden)
    return found


def test_each_level_is_added_behind_its_block_and_plain_embeddings_pass(decoder: Any) -> None:
    rows, plain = torch.randn(2, 5, LEVELS * WIDTH, requires_grad=True), torch.randn(1, 5, WIDTH)
    before = decoder(inputs_embeds=plain).last_hidden_state
    for _ in range(2):  # nothing is left of the first call
        found = decoder(inputs_embeds=rows).last_hidden_state
        torch.testing.assert_close(found, by_hand(decoder, rows))
        assert torch.equal(decoder(inputs_embeds=plain).last_hidden_state, before)
    (gradient,) = torch.autograd.grad(found.square().sum(), [rows])
    (expected,) = torch.autograd.grad(by_hand(decoder, rows).square().sum(), [rows])
    torch.testing.assert_close(gradient, expected)
    assert all(level.any() for level in gradient.split(WIDTH, -1))


def test_a_call_that_fails_leaves_nothing_behind(decoder: Any) -> None:
    rows, plain = torch.randn(1, 5, LEVELS * WIDTH), torch.randn(1, 5, WIDTH)
    expected = decoder(inputs_embeds=plain).last_hidden_state
    with pytest.raises((RuntimeError, IndexError)):
        decoder(inputs_embeds=rows, position_ids=torch.zeros(5, dtype=torch.long))
    assert torch.equal(decoder(inputs_embeds=plain).last_hidden_state, expected)


def test_a_language_model_with_too_few_layers_is_refused() -> None:
    small = Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "num_hidden_layers": 1}))
    with pytest.raises(ConfigError, match=r"features for 2 layers of the language model .* and it has 1"):
        EarlyFeatures(small.get_decoder(), WIDTH, LEVELS)


@pytest.mark.parametrize(
    ("indexes", "problem"), [((2, 1), "are not ascending"), ((0, 0), "are not ascending"), ((1, 3), "block 3 .*layer = -1")]
)
def test_blocks_that_cannot_give_features_are_refused(indexes: tuple[int, ...], problem: str) -> None:
    assert kept_blocks((0, 2), 3) == (0, 2)
    with pytest.raises(ConfigError, match=problem):
        kept_blocks(indexes, 3)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BothModels]:
    folder = tmp_path_factory.mktemp("qwen3")
    yield both_models("qwen3_vl", folder / "published", folder / "run")


def test_bfloat16_is_near_transformers(qwen3: BothModels, tmp_path: Path) -> None:
    """As near as transformers' own bfloat16 is to its float32."""
    folder = tmp_path / "same"
    other = both_models("qwen3_vl", folder, tmp_path / "run", dtype="bfloat16")
    record = talk(picture(tmp_path, 97, 61), picture(tmp_path, 28, 150))
    batch = other.data.processor([record], answers=True)
    with torch.no_grad():
        exact = qwen3.ours.decode(batch)
        theirs = other.theirs.bfloat16().model(**other.inputs(record)).last_hidden_state.float()
        distance = (other.ours.decode(batch).float() - exact).abs().mean()
    assert distance <= 1.2 * (theirs - exact).abs().mean()


def assert_close(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5 * max(1.0, float(gradient.abs().max())))


def rank_gradients(world: World, folder: Path, output: Path, options: dict[str, Any], records: list[list[Any]]) -> Gradients:
    """Gradients of this rank's `records`, one micro-batch each, summed over ranks."""
    config = run_from(folder, output, model={"init_from": str(folder), "dtype": "float32", **TUNED})
    data, parallel = open_data(config, world, first_start=True), ParallelConfig(**options, unit_mib=0)
    model = assemble(data.card, torch.float32)
    prepare_blocks(model, parallel)
    if parallel.strategy == "fsdp":
        shard(model, parallel, world)
    materialise(model, weight_layers(data.card, model, 7), frozen_dtype=model.dtype, device=world.device)
    wrapped = model if is_sharded_module(model) else replicate(model, world, parallel)
    mine = records[world.rank]
    for i, record in enumerate(mine):
        with gradient_sync(wrapped, last=i == len(mine) - 1):
            wrapped(data.processor([record], answers=True))["text"].sum.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient for name, gradient in found.items()}


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["none", "full", "selective"])
def test_ranks_learn_what_one_process_learns(qwen3: BothModels, tmp_path: Path, strategy: str, kind: str) -> None:
    """One rank sees no picture in its first micro-batch, the other none in its last."""
    shown = [talk(picture(tmp_path, *size)) for size in ((97, 61), (28, 150))]
    records = [[shown[0], talk()], [talk(), shown[1]]]
    _, expected = qwen3.our_gradients(qwen3.data.processor([record for mine in records for record in mine], answers=True))
    options = {"strategy": strategy, "activation_checkpointing": kind}
    for found in run_ranks(rank_gradients, 2, qwen3.folder, tmp_path / "run", options, records):
        assert_close(found, expected)
