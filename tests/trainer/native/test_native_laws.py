"""The laws for models that read pictures at their own size: the same steps however a run is shared out, and the same bytes after a
kill.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.processor import load_processor
from model.errors import ConfigError
from model.load import load_model
from tests.support.kills import Point, difference, ending_of, start_and_kill
from tests.support.published.asking import run_from
from tests.support.published.families import FAMILIES, families
from tests.support.published.native import NativeMaker
from tests.support.published.native_runs import built, opened_by_transformers, picture, talk
from tests.support.published.native_training import (
    TUNES,
    final_tensors,
    largest_difference,
    native_sections,
    save_published,
    trained_natively,
)
from tests.support.ranks import run_ranks
from tests.support.runs import merged, start, start_alone
from tools.export_adapter import export
from tools.exports.proofs import logits
from trainer.distributed import compiled_blocks
from trainer.distributed.world import World

Expected = Callable[[str, tuple[str, ...]], dict[str, list[float]]]
QUICK = "qwen2_5_vl"
ONE_EACH = {"batch": {"micro_batch_size": 1}}
PACKED = {"data": {"packing": True}, "batch": {"micro_batch_size": None, "micro_batch_tokens": 600}}


def layout(strategy: str, recompute: str = "none", **sections: Any) -> dict[str, Any]:
    """Every block is a unit of FSDP2, as those of large models are."""
    units = {"unit_mib": 0} if strategy == "fsdp" else {}
    return {"parallel": {"strategy": strategy, "activation_checkpointing": recompute, **units}, **sections}


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank, recomputed": (1, layout("ddp", "full", **ONE_EACH)),
    "1 rank, packed": (1, layout("ddp", **PACKED)),
    "2 ranks, ddp": (2, layout("ddp", batch={"micro_batch_size": 2})),
    "2 ranks, fsdp, selective": (2, layout("fsdp", "selective", batch={"micro_batch_size": 2})),
    "2 ranks, fsdp, packed": (2, layout("fsdp", "full", **PACKED)),
    "3 ranks, ddp, packed": (3, layout("ddp", **PACKED)),
    "3 ranks, fsdp": (3, layout("fsdp", "full", **ONE_EACH)),
    "4 ranks, ddp": (4, layout("ddp", "full", **ONE_EACH)),
    "4 ranks, fsdp": (4, layout("fsdp", **ONE_EACH)),
}
TWO = ("full", "lora")
ALL = [
    pytest.param(QUICK, "2 ranks, fsdp, selective", ("full",)),
    *(pytest.param(name, how, tuple(TUNES), marks=pytest.mark.long) for name in FAMILIES for how in LAYOUTS),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The records and the model of a family."""
    return cache(lambda name: save_published(tmp_path_factory.mktemp(name), name))


@pytest.fixture(scope="module")
def expected(made: Callable[[str], Path]) -> Callable[[str, tuple[str, ...]], dict[str, list[float]]]:
    """What one process finds with a whole step in one padded micro-batch; its runs stand in one/ beside the model."""

    @cache
    def found(name: str, tunes: tuple[str, ...]) -> dict[str, list[float]]:
        cases = {tune: {"tune": tune} for tune in tunes}
        return run_ranks(trained_natively, 1, made(name), made(name) / "one" / str(len(tunes)), cases, seconds=300)[0]

    return found


@pytest.mark.parametrize(("name", "how", "tunes"), ALL)
def test_same_steps_however_they_are_shared_out(
    made: Callable[[str], Path], expected: Expected, tmp_path: Path, name: str, how: str, tunes: tuple[str, ...]
) -> None:
    size, sections = LAYOUTS[how]
    cases = {tune: {"tune": tune, **sections} for tune in tunes}
    first, *others = run_ranks(trained_natively, size, made(name), tmp_path, cases, seconds=300)
    assert all(rank == first for rank in others)
    for tune, numbers in expected(name, tunes).items():
        torch.testing.assert_close(torch.tensor(first[tune]), torch.tensor(numbers), rtol=1e-6, atol=1e-7)
        assert largest_difference(tmp_path / tune, made(name) / "one" / str(len(tunes)) / tune) < 1e-6


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_only_what_learns_moves(made: Callable[[str], Path], expected: Expected, name: str) -> None:
    """A step without pictures moves the language model alone."""
    norms = {tune: numbers[1::2] for tune, numbers in expected(name, tuple(TUNES)).items()}
    for part in ("projector", "tower"):
        assert [norm > 0 for norm in norms[part]] == [True, True, False, True, True]
    assert all(norm > 0 for tune in TWO for norm in norms[tune])
    learns = {"projector": {"vision_projector"}, "tower": {"vision", "vision_projector"}, "lora": {"lora", "vision_projector"}}
    for tune, files in learns.items():
        written = final_tensors(made(name) / "one" / str(len(TUNES)) / tune)
        assert {key.partition(".safetensors")[0] for key in written} == files


@pytest.mark.parametrize("name", families((QUICK,)))
def test_adapters_stand_where_paths_say_and_go_out_merged(made: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    tower = f"vision.tower.{FAMILIES[name].query}"
    wanted = ["llm.*.q_proj", tower.replace("tower", "*")]
    sections = native_sections(made(name), "lora", lora={"targets": wanted}, train={"max_steps": 2})
    assert start_alone(made(name), tmp_path / "run", sections).code == 0
    found = {path.rpartition(".")[0] for path in load_file(tmp_path / "run" / "final" / "lora.safetensors")}
    assert found == {tower, *(f"llm.model.layers.{i}.self_attn.q_proj" for i in range(len(found) - 1))} and len(found) > 2
    check_way_out(FAMILIES[name], tmp_path / "run" / "final", tmp_path / "out")


def check_way_out(maker: NativeMaker, final: Path, out: Path) -> None:
    """What was learned is what the class of transformers computes with the folder written for it, and a run that starts there."""
    if maker.not_exported:
        with pytest.raises(ConfigError, match=maker.not_exported):
            export(final, out, "hf")
        return
    export(final, out, "hf")
    model, processor, theirs = load_model(final), load_processor(final), opened_by_transformers(maker, out)
    record = talk(picture(final.parent, 97, 61), picture(final.parent, 12, 30))
    data, again = built(run_from(out, out / "run"))
    with torch.no_grad():
        expected = theirs.theirs(**theirs.inputs(record)).logits[0]
    for opened, reader in ((model.eval(), processor), (again, data.processor)):
        torch.testing.assert_close(logits(opened, reader([record], answers=True)), expected, rtol=1e-5, atol=1e-5)


KILLS = [(2, "fsdp", Point(1, "backward", 8)), (1, "ddp", Point(0, "backward", 13))]
"""Both in the fourth step: each rank's micro-batches hold one sample."""


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("size", "strategy", "point"), KILLS)
def test_killed_in_the_middle_it_ends_with_the_same_bytes(
    made: Callable[[str], Path], tmp_path: Path, name: str, size: int, strategy: str, point: Point
) -> None:
    changes = {"lora": {"dropout": 0.3}, "checkpoint": {"every": 1, "keep": 99}, "data": {"workers": 1}}
    sections = native_sections(made(name), "lora", **layout(strategy, **ONE_EACH), **changes)
    assert {found.code for found in run_ranks(start, size, made(name), tmp_path / "whole", sections)} == {0}
    assert start_and_kill(size, made(name), tmp_path / "killed", sections, point, 0) is None
    again = run_ranks(start, size, made(name), tmp_path / "killed", {**sections, "data": {**sections["data"], "workers": 0}})
    assert {found.code for found in again} == {0} and 0 < len(again[0].seen) < 5
    assert difference(ending_of(tmp_path / "killed"), ending_of(tmp_path / "whole")) == []


def compiled_natively(world: World, folder: Path, output: Path, strategy: str) -> list[float]:
    """What compiled blocks find, cut as for kernels but without them."""
    compiled_blocks.compile_graph = compiled_blocks.partition_graph  # this process ends here
    return trained_natively(world, folder, output, {"full": merged(layout(strategy), {"parallel": {"compile": True}})})["full"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "size", "strategy"),
    [*((name, 1, "ddp") for name, maker in FAMILIES.items() if maker.compiles), (QUICK, 2, "fsdp"), ("naflex", 2, "fsdp")],
)
def test_compiled_the_steps_are_the_same(
    made: Callable[[str], Path], expected: Expected, tmp_path: Path, name: str, size: int, strategy: str
) -> None:
    found = run_ranks(compiled_natively, size, made(name), tmp_path, strategy, seconds=300)[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected(name, TWO)["full"]), rtol=1e-6, atol=1e-7)
