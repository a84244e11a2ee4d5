"""HSDP: several copies of the weights, each shared by some of the ranks, are one model; and ranks that cannot form such copies."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from model.errors import ConfigError
from tests.support import equivalence
from tests.support.ranks import run_ranks
from tests.support.resume import LORA, cut, metrics, weights
from tests.support.runs import start
from trainer.config import ParallelConfig
from trainer.distributed.parallelize import check_sharing
from trainer.distributed.world import World
from trainer.report import describe_sharing

HSDP: dict[str, Any] = {"parallel": {"strategy": "hsdp", "shard_size": 2}}


def steps_and_bytes(
    world: World, folder: Path, tune: str, strategy: str, dtype: str, global_batch: int, clip_norm: float
) -> tuple[list[float], str]:
    """Loss and gradient norm of five steps of `global_batch` samples; a digest of this rank's rows of what they leave."""
    equivalence.GLOBAL_BATCH = global_batch
    config = equivalence.config_of(folder, tune)
    found, model = equivalence.take_steps(world, config, strategy, False, 1, dtype, clip_norm, equivalence.WHOLE)
    digest = hashlib.sha256()
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        digest.update(local.detach().flatten().view(torch.uint8).numpy().tobytes())
    return found, digest.hexdigest()


@pytest.mark.parametrize("tune", ["lora", pytest.param("full", marks=pytest.mark.long)])
def test_copies_take_the_steps_of_one_process_and_stay_the_same_to_the_bit(parts: Path, tune: str) -> None:
    """Three micro-batches: with adapters summed over the ranks once, with the whole model in each copy every time."""
    (expected, _), *_ = run_ranks(steps_and_bytes, 1, parts, tune, "ddp", "float32", 10, 1.0)
    answers = run_ranks(steps_and_bytes, 4, parts, tune, "hsdp", "float32", 10, 1.0)
    torch.testing.assert_close(torch.tensor(answers[0][0]), torch.tensor(expected), rtol=1e-6, atol=1e-7)
    assert all(found == answers[0][0] for found, _ in answers)
    digests = [digest for _, digest in answers]
    assert digests[:2] == digests[2:] and digests[0] != digests[1]


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tune", equivalence.TUNES)
def test_copies_cast_as_one_does_to_the_bit(parts: Path, tune: str, dtype: str) -> None:
    """Two of four ranks have a sample in each step: their sum is the same in any order, so nothing but the casts could differ.

    No clipping, whose norm sums shards in another order.
    """
    hsdp, fsdp = (run_ranks(steps_and_bytes, 4, parts, tune, strategy, dtype, 2, 0.0)[0][0] for strategy in ("hsdp", "fsdp"))
    assert hsdp[::2] == fsdp[::2]
    torch.testing.assert_close(torch.tensor(hsdp), torch.tensor(fsdp), rtol=1e-6, atol=0)


def ended(size: int, parts: Path, output_dir: Path, sections: dict[str, Any]) -> str:
    """What rank 0 of a run that must end well said."""
    answers = run_ranks(start, size, parts, output_dir, sections, seconds=300)
    assert {answer.code for answer in answers} == {0}, answers[0].said
    return answers[0].said


def test_a_run_of_two_copies_is_written_whole_and_read_by_any_other(parts: Path, tmp_path: Path) -> None:
    """Its last checkpoint alone, read on other ranks, gives the bytes of its final/."""
    whole = tmp_path / "whole"
    said = ended(4, parts, whole, {**LORA, **HSDP, "train": {"max_steps": 2}})
    assert "hsdp: 2 copies of 2 ranks" in said
    again = cut(whole, tmp_path / "again", 2)
    ended(1, parts, again, {**LORA, **HSDP, "train": {"max_steps": 2}})  # one process holds everything, as under fsdp
    assert weights(again) == weights(whole)


@pytest.mark.long
@pytest.mark.parametrize("tune", ["lora", "full", "quantised"])
def test_stopped_after_any_step_two_copies_end_with_the_same_bytes(parts: Path, tmp_path: Path, tune: str) -> None:
    sections: dict[str, Any] = {**HSDP, "data": {"workers": 1}, **({} if tune == "full" else LORA)}
    if tune == "quantised":
        sections["quantize"] = {"bits": 4}
    whole = tmp_path / "whole"
    ended(4, parts, whole, sections)
    for step in range(1, 6):
        again = cut(whole, tmp_path / f"stopped{step}", step)
        ended(4, parts, again, sections)
        assert weights(again) == weights(whole)
        assert metrics(again) == metrics(whole)
    for size, strategy in ((3, "fsdp"), (2, "ddp"), (1, "ddp"), (4, "fsdp")):
        again = cut(whole, tmp_path / f"{strategy}{size}", 6)
        ended(size, parts, again, {**sections, "parallel": {"strategy": strategy}})
        assert weights(again) == weights(whole)
        shutil.rmtree(again / "final")
        ended(4, parts, again, sections)  # and back
        assert weights(again) == weights(whole)


@pytest.mark.parametrize(
    ("size", "num_ranks", "expected"),
    [
        (3, 4, "set it to 2, or use"),
        (4, 4, "set it to 2, or use"),
        (8, 4, "set it to 2, or use"),
        (5, 12, "set it to 2 or 3 or 4 or 6, or use"),
        (2, 3, "no number of ranks does; use"),
        (2, 2, "no number of ranks does; use"),
    ],
)
def test_ranks_that_cannot_form_copies_are_refused_with_what_they_can(size: int, num_ranks: int, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"parallel.shard_size = {size} with {num_ranks} ranks") as error:
        check_sharing(ParallelConfig("hsdp", size), num_ranks)
    assert expected in str(error.value)


def test_ranks_that_can_form_copies_are_named_as_they_do() -> None:
    for size, num_ranks, expected in (
        (2, 4, "hsdp: 2 copies of 2 ranks"),
        (8, 24, "hsdp: 3 copies of 8 ranks"),
        (2, 1, "one process"),
    ):
        config = ParallelConfig("hsdp", size)
        check_sharing(config, num_ranks)
        assert describe_sharing(config, num_ranks) == expected
    assert describe_sharing(ParallelConfig("fsdp"), 4) == "fsdp"


def test_a_run_whose_ranks_cannot_form_copies_ends_before_it_reads_anything(tmp_path: Path) -> None:
    answers = run_ranks(start, 2, tmp_path, tmp_path / "run", HSDP)
    assert {answer.code for answer in answers} == {2}
    assert "2 ranks" in (tmp_path / "run" / "exit.json").read_text()
