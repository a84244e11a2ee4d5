"""Sharded loading: every rank reads its own rows from the files and nothing else, and buffers survive."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.build import assemble, build_model
from model.card import make_card
from model.config import LoraConfig
from model.files import tensor_files as files
from model.files.tensor_files import LazyTensor, Tensors
from model.llm.causal_lm import VocabularyLayout
from model.weights.materialise import materialise
from model.weights.origins import weight_layers
from tests.support.equivalence import config_of
from tests.support.ranks import run_ranks
from tests.support.tiny import save_llm, save_tower
from trainer.config import ParallelConfig
from trainer.distributed.shards import shard
from trainer.distributed.world import World


def load_sharded(world: World, folder: Path) -> tuple[int, int, dict[str, torch.Tensor]]:
    """Numbers read from files, numbers held, and the whole model gathered again."""
    num_read = 0
    original = files.read_safetensors

    def counting(path: Path) -> Tensors:
        def counted(rows: LazyTensor) -> LazyTensor:
            def read(start: int, stop: int) -> torch.Tensor:
                nonlocal num_read
                found = rows.read(start, stop)
                num_read += found.numel()
                return found

            return LazyTensor(rows.shape, read)

        return {name: counted(rows) for name, rows in original(path).items()}

    files.read_safetensors = counting
    try:
        card = make_card(config_of(folder, "lora"), LoraConfig(rank=2), VocabularyLayout())
        model = assemble(card, torch.float32)
        shard(model, ParallelConfig(unit_mib=0), world)
        materialise(model, weight_layers(card, model, 7), frozen_dtype=torch.float32, device=world.device)
    finally:
        files.read_safetensors = original
    num_held = sum(p.to_local().numel() for p in model.parameters())  # type: ignore[attr-defined]
    whole = {name: p.full_tensor().detach() for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    return num_read, num_held, whole | dict(model.named_buffers())


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_reads_no_more_than_it_holds(tmp_path: Path, size: int) -> None:
    save_llm(tmp_path / "llm", "llama")
    save_tower(tmp_path / "vision", "clip")
    model = build_model(config_of(tmp_path, "lora"), LoraConfig(rank=2), seed=7)
    expected = dict(model.named_parameters()) | dict(model.named_buffers())
    total = sum(p.numel() for p in model.parameters())
    answers = run_ranks(load_sharded, size, tmp_path)
    for num_read, num_held, whole in answers:
        assert num_read <= num_held <= total / size * 1.2  # rows of small tensors do not divide evenly
        assert whole.keys() == expected.keys()
        assert all(torch.equal(whole[name], expected[name]) for name in expected)
    assert sum(num_held for _, num_held, _ in answers) == total
