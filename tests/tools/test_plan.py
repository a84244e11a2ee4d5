"""tools.plan: what a rank holds and writes to the byte, what it computes with within a tenth, before anything is built."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.collate import collate, collate_packed
from data.sample import Sample, SampleMedia
from model.batch import IGNORE_INDEX, Batch
from model.build import DTYPES, assemble
from model.card import ModelCard, make_card
from model.config import LlmConfig, LoraConfig, ModelConfig, QuantizeConfig, VisionConfig, VisionProjectorConfig
from model.llm.causal_lm import VocabularyLayout
from model.multimodal import MultimodalLM
from model.weights.materialise import materialise
from model.weights.origins import weight_layers
from tests.support.peak import bytes_of, forward_backward, measured_peak
from tests.support.ranks import run_ranks
from tests.support.router import save_mixture
from tests.support.runs import start, tables
from tests.support.tiny import save_llm, save_tower
from tools import plan
from trainer.config import BatchConfig, OptimConfig, ParallelConfig
from trainer.distributed import shards
from trainer.distributed.blocks import prepare_blocks
from trainer.distributed.compile_environment import prepare_compiling
from trainer.distributed.parallelize import is_sharded, replicate
from trainer.distributed.shards import shard
from trainer.distributed.world import World
from trainer.machine import memory_info
from trainer.memory import advice
from trainer.memory.footprint import Footprint, footprint, held_rows, holdings, on_meta, sharing_ranks
from trainer.memory.simulate import live_bytes
from trainer.optim import build_optimizer
from trainer.runfile.load import parse_config
from trainer.runfile.toml_files import to_toml

SIZE, PATCHES, LENGTH = 32, 16, 120
WHOLE = QuantizeConfig()
LONG = pytest.mark.long
Tunes = tuple[Any, Any, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planned")
    larger = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4}
    save_llm(root / "llm", "qwen2", **larger)
    save_llm(root / "tied", "qwen2_tied", **larger)
    save_llm(root / "wide", "qwen2", **{**larger, "hidden_size": 256, "num_hidden_layers": 1})
    save_tower(root / "vision", hidden_size=48, intermediate_size=128, num_hidden_layers=4, image_size=SIZE)
    return root


def card_of(folder: Path, tunes: Tunes, dtype: Any = "float32", llm: str = "llm", quantize: QuantizeConfig = WHOLE) -> ModelCard:
    vision = VisionConfig(str(folder / "vision"), tunes[1]) if tunes[1] else None
    projector = VisionProjectorConfig(tune=tunes[2]) if tunes[1] else None
    config = ModelConfig(LlmConfig(str(folder / llm), tunes[0]), vision, projector, dtype=dtype)
    return make_card(config, LoraConfig(rank=8, dropout=0.05), VocabularyLayout(), quantize=quantize)


def heavy_samples(pictures: bool = True) -> list[Sample]:
    rng, samples = np.random.default_rng(0), []
    for i in range(4):
        ids = rng.integers(0, 300, LENGTH)
        labels = np.where(np.arange(LENGTH) < LENGTH // 2, IGNORE_INDEX, ids)
        picture = SampleMedia("image", torch.zeros(1, 3, SIZE, SIZE), 1, PATCHES, np.arange(PATCHES), PATCHES)
        samples.append(Sample(i, 0, ids, labels, {"image": [picture]} if pictures else {}))
    return samples


def heavy_batch(packed: bool = False, pictures: bool = True) -> Batch:
    return (collate_packed if packed else collate)(heavy_samples(pictures), 0)


def bytes_of_batch(batch: Batch) -> int:
    found = [*vars(batch).values(), *(t for media in batch.media.values() for t in vars(media).values())]
    return bytes_of(value for value in found if isinstance(value, Tensor))


def built(card: ModelCard, config: ParallelConfig, world: World) -> tuple[MultimodalLM, torch.nn.Module]:
    """The real model with its weights, as trainer.setup builds it, and what is called."""
    model = assemble(card, DTYPES[card.model.dtype])
    prepare_blocks(model, config)
    sharded = is_sharded(config, world)
    if sharded:
        shard(model, config, world)
    materialise(model, weight_layers(card, model, 7), frozen_dtype=model.dtype, device=world.device)
    model.train()
    return model, model if sharded else replicate(model, world, config)


HELD: dict[str, tuple[Tunes, Any, str, Any]] = {
    "full": (("full", "full", "full"), "float32", "llm", "adamw"),
    "lora": (("lora", "frozen", "full"), "bfloat16", "llm", "adamw"),
    "tied": (("full", "frozen", "full"), "bfloat16", "tied", "adamw"),
    "8 bits": (("full", "frozen", "full"), "float16", "wide", "adamw8bit"),
    "muon": (("full", "frozen", "full"), "bfloat16", "tied", "muon"),
    "sgd": (("full", "frozen", "full"), "bfloat16", "llm", "sgd"),
}


def held(world: World, folder: Path, config: ParallelConfig) -> dict[str, dict[str, list[int]]]:
    """By kind of run and part: bytes of weights, gradients, optimizer and buffers of this rank."""
    found: dict[str, dict[str, list[int]]] = {}
    for name, (tunes, dtype, llm, kind) in HELD.items():
        card = card_of(folder, tunes, dtype, llm)
        model, wrapped = built(card, config, world)
        optimizer = build_optimizer(model, card.model, OptimConfig(kind=kind))
        forward_backward(wrapped, heavy_batch())
        found[name] = {
            part: [bytes_of(p.grad for p in model.get_submodule(part).parameters() if p.grad is not None)]
            for part in card.model.parts()
        }
        optimizer.step()
        for part, sizes in found[name].items():
            module = model.get_submodule(part)
            state = [v for p in module.parameters() for v in optimizer.state.get(p, {}).values()]
            sizes[:] = [bytes_of(module.parameters()), sizes[0], bytes_of(state), bytes_of(module.buffers())]
    return found


STRATEGIES = {
    "ddp": (ParallelConfig("ddp"), 2),
    "fsdp": (ParallelConfig("fsdp"), 3),
    "hsdp": (ParallelConfig("hsdp", shard_size=2), 4),
}


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=LONG), "fsdp", pytest.param("hsdp", marks=LONG)])
def test_every_byte_a_rank_holds_is_known_before_it_is_built(folder: Path, strategy: str) -> None:
    """Weights, gradients, moments and buffers of every part; three ranks share rows that three does not divide."""
    config, size = STRATEGIES[strategy]
    ranks = run_ranks(held, size, folder, config)
    ways = sharing_ranks(config, size)
    for name, (tunes, dtype, llm, kind) in HELD.items():
        card = card_of(folder, tunes, dtype, llm)
        model = on_meta(card, config, computes=False)
        parts = holdings(model, card, ways, OptimConfig(kind=kind))
        planned = {h.part: [h.weights, h.gradients, h.optimizer, h.buffers] for h in parts}
        assert ranks[0][name] == planned
        for rank, found in enumerate(ranks):
            for part, sizes in found[name].items():
                assert sizes[0] == sum(held_rows(p, ways, rank % ways).nbytes for p in model.get_submodule(part).parameters())


def test_codes_of_a_quantised_model_count_as_they_are_stored(folder: Path) -> None:
    card = card_of(folder, ("lora", "frozen", "full"), "bfloat16", quantize=QuantizeConfig(4))
    world = World(0, 0, 1, torch.device("cpu"))
    model, _ = built(card, ParallelConfig(), world)
    planned = {h.part: (h.weights, h.buffers) for h in holdings(on_meta(card, ParallelConfig(), computes=False), card, 1)}
    found = {part: model.get_submodule(part) for part in card.model.parts()}
    assert planned == {part: (bytes_of(module.parameters()), bytes_of(module.buffers())) for part, module in found.items()}


ACTIVATIONS: dict[str, tuple[dict[str, Any], str, bool]] = {
    "full": ({"tunes": ("full", "frozen", "full")}, "none", False),
    "everything": ({"tunes": ("full", "full", "full")}, "none", False),
    "projector": ({"tunes": ("frozen", "frozen", "full")}, "none", False),
    "lora": ({"tunes": ("lora", "frozen", "full")}, "none", False),
    "lora packed": ({"tunes": ("lora", "frozen", "full")}, "none", True),
    "lora in bfloat16": ({"tunes": ("lora", "frozen", "full"), "dtype": "bfloat16"}, "none", False),
    "full in bfloat16": ({"tunes": ("full", "frozen", "full"), "dtype": "bfloat16"}, "none", False),
    "recomputed": ({"tunes": ("full", "frozen", "full")}, "full", False),
    "lora recomputed, packed, bfloat16": ({"tunes": ("lora", "lora", "full"), "dtype": "bfloat16"}, "full", True),
    "tied, recomputed": ({"tunes": ("full", "frozen", "full"), "dtype": "bfloat16", "llm": "tied"}, "full", False),
    "qlora": ({"tunes": ("lora", "frozen", "full"), "quantize": QuantizeConfig(4)}, "none", False),
    "selective": ({"tunes": ("full", "frozen", "full")}, "selective", False),
    "lora selective, packed, bfloat16": ({"tunes": ("lora", "lora", "full"), "dtype": "bfloat16"}, "selective", True),
    "mixtral selective": ({"tunes": ("full", None, None), "llm": "mixtral"}, "selective", False),
    "mixtral": ({"tunes": ("full", None, None), "llm": "mixtral"}, "none", False),
}
QUICK = ("full", "lora packed", "lora recomputed, packed, bfloat16", "lora selective, packed, bfloat16")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else LONG) for name in ACTIVATIONS])
def test_activations_are_within_a_tenth_of_what_is_measured(folder: Path, tmp_path: Path, name: str) -> None:
    options, recomputes, packed = ACTIVATIONS[name]
    if options.get("llm") == "mixtral" and not (folder / "mixtral").exists():
        save_mixture(folder / "mixtral", "mixtral")
    card = card_of(folder, **options)
    config = ParallelConfig("ddp", activation_checkpointing=recomputes)  # type: ignore[arg-type]
    batch = heavy_batch(packed, pictures=options["tunes"][1] is not None)
    planned = footprint(card, config, 1, batch, 2)
    model, _ = built(card, config, World(0, 0, 1, torch.device("cpu")))
    given = bytes_of_batch(batch)
    assert planned.activations - given == pytest.approx(measured_peak(model, batch, tmp_path / "trace.json"), rel=0.1)


COMPILED: dict[str, tuple[Tunes, Any, Any, bool]] = {
    "full": (("full", "frozen", "full"), "float32", "none", False),
    "lora packed": (("lora", "frozen", "full"), "float32", "none", True),
    "lora selective, packed, bfloat16": (("lora", "lora", "full"), "bfloat16", "selective", True),
    "full selective": (("full", "frozen", "full"), "float32", "selective", False),
    "full recomputed": (("full", "full", "full"), "float32", "full", False),
}


@pytest.mark.long
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_activations_are_within_an_eighth_of_what_is_measured(folder: Path, tmp_path: Path, name: str) -> None:
    """Of inductor's kernels. What the compiler itself takes is not in it: it ends before the second forward."""
    if prepare_compiling(ParallelConfig(compile="or_eager"), torch.device("cpu")).count(";"):
        pytest.skip("no compiler")
    tunes, dtype, recomputes, packed = COMPILED[name]
    card, batch = card_of(folder, tunes, dtype), heavy_batch(packed)
    config = ParallelConfig("ddp", activation_checkpointing=recomputes, compile=True)
    torch._dynamo.reset()
    planned = footprint(card, config, 1, batch, 2)
    torch._dynamo.reset()
    model, _ = built(card, config, World(0, 0, 1, torch.device("cpu")))
    given = bytes_of_batch(batch)
    assert planned.activations - given == pytest.approx(measured_peak(model, batch, tmp_path / "trace.json"), rel=0.12)


def sharded_peak(world: World, folder: Path, config: ParallelConfig, tunes: Tunes, dtype: Any, trace: str) -> int:
    """With the collectives of torch, as on a GPU: between CPU ranks ours need less memory than is planned."""
    shards.use_host_collectives = lambda module: None
    _, wrapped = built(card_of(folder, tunes, dtype), config, world)
    return measured_peak(wrapped, heavy_batch(), Path(f"{trace}-{world.rank}.json"))


@pytest.mark.long
@pytest.mark.parametrize("recomputes", ["none", "full"])
@pytest.mark.parametrize(("tunes", "dtype"), [(("full", "full", "full"), "float32"), (("lora", "frozen", "full"), "bfloat16")])
def test_blocks_that_sharding_gathers_are_within_a_quarter(
    folder: Path, tmp_path: Path, recomputes: Any, tunes: Tunes, dtype: str
) -> None:
    config = ParallelConfig("fsdp", unit_mib=0, activation_checkpointing=recomputes)
    planned = footprint(card_of(folder, tunes, dtype), config, 2, heavy_batch(), 1)
    for peak in run_ranks(sharded_peak, 2, folder, config, tunes, dtype, str(tmp_path / "trace")):
        assert planned.activations + planned.gathered == pytest.approx(peak, rel=0.25)


def test_a_storage_counts_from_its_birth_to_its_death() -> None:
    """Three products of a chain, of which the first two are kept for backward, and the gradients on the way back."""
    weights = [torch.nn.Parameter(torch.empty(10, 10, device="meta")) for _ in range(3)]
    model = torch.nn.ParameterList(weights)
    x = torch.empty(50, 10, device="meta")

    def loss() -> Tensor:
        hidden = x
        for weight in weights:
            hidden = hidden @ weight
        return hidden.sum()

    found = live_bytes(model, loss, [x])
    product, weight = 50 * 10 * 4, 10 * 10 * 4
    # Two kept products, the gradient that goes on and that of a weight; the one that comes is an expanded number.
    assert found.activations == pytest.approx(2 * product + product + weight, abs=2 * 4)
    assert found.with_gradients <= found.activations + 3 * weight
    assert all(w.grad is None for w in weights)


def test_rows_are_shared_as_sharding_shares_them() -> None:
    matrix = torch.empty(7, 3)
    assert [held_rows(matrix, 3, rank).numel() for rank in range(3)] == [9, 9, 3]
    assert [held_rows(torch.empty(2), 4, rank).numel() for rank in range(4)] == [1, 1, 0, 0]
    assert held_rows(matrix, 1).numel() == 21


def planned(
    parts: Path, folder: Path, capsys: pytest.CaptureFixture[str], *options: str, **sections: Any
) -> tuple[str, dict[str, Any]]:
    """What the tool prints, and its last line."""
    folder.mkdir(exist_ok=True)
    path = folder / "run.toml"
    path.write_text(to_toml({**tables(parts, **sections), "output_dir": str(folder / "run")}))
    code = plan.main(["--cfg", str(path), *options])
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines()[:-1])) <= 100
    found = json.loads(out.splitlines()[-1])
    assert code == (69 if found["fits"] is False else 0) and ("does not fit" in err) == bool(code), err
    return out, found


@pytest.mark.parametrize(
    ("size", "strategy", "kind"), [(1, "ddp", "adamw"), pytest.param(3, "fsdp", "adamw", marks=LONG), (1, "ddp", "muon")]
)
def test_files_have_the_sizes_that_were_planned(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int, strategy: str, kind: str
) -> None:
    sections: dict[str, Any] = {
        "parallel": {"strategy": strategy},
        "train": {"max_steps": 2},
        "model": {"llm": {"tune": "lora"}},
        "lora": {"rank": 2},
        "optim": {"kind": kind},
    }
    out, found = planned(parts, tmp_path / "plan", capsys, "--ranks", str(size), **sections)
    assert {answer.code for answer in run_ranks(start, size, parts, tmp_path / "run", sections)} == {0}
    assert found["checkpoint_bytes"] == sum(p.stat().st_size for p in (tmp_path / "run" / "checkpoint-2").glob("*.safetensors"))
    assert found["final_bytes"] == sum(p.stat().st_size for p in (tmp_path / "run" / "final").glob("*.safetensors"))
    assert (found["steps"], found["steps_per_epoch"], found["samples_per_epoch"]) == (2, 4, 22)
    assert found["strategies"].keys() == ({"ddp"} if size == 1 else {"ddp", "fsdp"})
    assert found["strategies"][strategy]["weights"] == sum(part["weights"] + part["buffers"] for part in found["parts"].values())
    assert found["fits"] and "fits in" in out


def test_what_would_fit_is_computed_and_fits(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch = {"micro_batch_size": 6}
    _, whole = planned(parts, tmp_path / "plan", capsys, batch=batch)
    limit = whole["strategies"]["ddp"]["total"] * 0.8 / 2**30
    out, found = planned(parts, tmp_path / "plan", capsys, "--memory", repr(limit), batch=batch)
    assert found["fits"] is False and "It does not fit" in out
    assert found["would_fit"] and all(total <= limit * 2**30 for total in found["would_fit"].values())
    size = next(int(key.rpartition("= ")[2]) for key in found["would_fit"] if key.startswith("batch.micro_batch_size = "))
    assert 1 <= size < 6
    _, smaller = planned(parts, tmp_path / "plan", capsys, "--memory", repr(limit), batch={"micro_batch_size": size})
    assert smaller["heaviest"]["samples"] == size


def test_each_change_is_simulated_once_and_the_largest_half_that_fits_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A made-up memory: 10 a sample, which recomputing halves, 16 of states, which two ranks share, and 4 of a trained model."""
    asked: list[tuple[Any, ...]] = []

    def made_up(card: ModelCard, config: ParallelConfig, ranks: int, batch: Batch, micros: int, _: OptimConfig) -> Footprint:
        asked.append((config, card.model.llm.tune, card.quantize.bits, len(batch.sample_ids)))
        samples = len(batch.sample_ids) * (5 if config.activation_checkpointing == "full" else 10)
        states = 16 // (ranks if config.strategy == "fsdp" else 1)
        return Footprint((), samples, states, 4 if card.model.llm.tune == "full" else 1)

    monkeypatch.setattr(advice, "footprint", made_up)
    config = parse_config({"output_dir": "x", "model": {"llm": {"path": "x"}}, "train": {"max_steps": 0}}, "test")
    config = replace(config, parallel=ParallelConfig("ddp"), batch=BatchConfig(8, 4))
    heavy = advice.MemoryScenario(config, card_of(folder, ("full", None, None)), 2, heavy_samples(False), 1)
    found, least = advice.weigh_changes(heavy, heavy.needed(), 41)
    full = advice.RECOMPUTES
    assert {change.settings: change.needed.total for change in found} == {
        "batch.micro_batch_size = 2": 40,
        full: 40,
        f"{advice.SHARDS} with {full}": 32,
        f"batch.micro_batch_size = 2 with {full}": 30,
    }
    assert least.settings == f"batch.micro_batch_size = 2 with {full}" and len(asked) == len(set(asked))
    found, least = advice.weigh_changes(heavy, heavy.needed(), 20)
    assert found == [] and least == advice.Change(f"batch.micro_batch_size = 1 with {full}", Footprint((), 5, 16, 4))


def test_nothing_is_advised_that_is_set_already_or_cannot_be(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A packed micro-batch holds data.max_length tokens or more, however few its first sample has."""
    lora = {"model": {"llm": {"tune": "lora"}}, "lora": {"rank": 2}}
    packed = {**lora, "data": {"packing": True, "max_length": 256}, "batch": {"micro_batch_tokens": 256, "micro_batch_size": None}}
    sections = {**packed, "parallel": {"activation_checkpointing": "full"}}
    _, whole = planned(parts, tmp_path / "plan", capsys, **sections)
    total = whole["strategies"]["ddp"]["total"]
    out, found = planned(parts, tmp_path / "plan", capsys, "--memory", repr((total - 1) / 2**30), **sections)
    assert whole["heaviest"]["samples"] > 1 and found["would_fit"].keys() == {"quantize.bits = 4"}
    _, changed = planned(parts, tmp_path / "plan", capsys, **sections, quantize={"bits": 4})
    assert found["would_fit"]["quantize.bits = 4"] == changed["strategies"]["ddp"]["total"] < total
    out, _ = planned(parts, tmp_path / "plan", capsys, "--memory", "1e-9", **sections)
    assert "nearest comes\n  quantize.bits = 4 (" in out


def test_ranks_of_a_machine_share_its_memory_and_a_device_that_is_not_there_has_none(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out, found = planned(parts, tmp_path / "plan", capsys, "--device", "cuda")
    assert (found["memory"], found["fits"]) == (None, None) and "fits: not known" in out and "--memory" in out
    monkeypatch.setattr(memory_info, "total_memory", lambda device: 3 << 40)  # room enough: no advice to work out
    for device, ranks, memory in (("cpu", 1, 3 << 40), ("cpu", 3, 1 << 40), ("cuda", 3, 3 << 40)):
        assert planned(parts, tmp_path / "plan", capsys, "--device", device, "--ranks", str(ranks))[1]["memory"] == memory


def test_a_plan_needs_no_data(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = {"data": {"sources": [{"path": str(tmp_path / "elsewhere.json")}], "max_length": 256}}
    _, found = planned(parts, tmp_path / "plan", capsys, "--no-data", **sources)
    assert found["heaviest"]["tokens"] == 2 * 256 and "steps" not in found


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--ranks", "0"], "--ranks 0 is not positive"),
        (["--memory", "-1"], "--memory -1.0 is not a positive number of GiB"),
        (["optim.lr=-1.0"], "optim.lr = -1.0 is not positive"),
        (["--ranks", "3", "parallel.strategy=hsdp", "parallel.shard_size=2"], "parallel.shard_size = 2 with 3 ranks"),
    ],
)
def test_what_is_wrong_is_told_with_code_2(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(to_toml({**tables(parts), "output_dir": str(tmp_path / "run")}))
    assert plan.main(["--cfg", str(path), *options]) == 2
    assert reason in capsys.readouterr().err


def test_a_model_that_looks_at_values_is_told(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def looking(self: MultimodalLM, batch: Batch, rows: Tensor) -> Tensor:
        return torch.zeros(int(batch.input_ids.max()))

    monkeypatch.setattr(MultimodalLM, "decode", looking)
    path = tmp_path / "run.toml"
    path.write_text(to_toml({**tables(parts), "output_dir": str(tmp_path / "run")}))
    assert plan.main(["--cfg", str(path)]) == 2
    assert "takes cannot be told without running it" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 2])
def test_what_is_offloaded_is_host_memory_instead(folder: Path, size: int) -> None:
    """Of one GPU the masters, of a sharded one all weights; on a CPU both are one memory."""
    card = card_of(folder, ("full", "frozen", "full"), "bfloat16")
    away, here = (footprint(card, ParallelConfig(cpu_offload=how), size, heavy_batch(), 2) for how in (True, False))
    model = on_meta(card, ParallelConfig(), computes=False)
    trained = sum(held_rows(p, size).numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(held_rows(p, size).nbytes for p in model.parameters() if not p.requires_grad)
    steps = 4 * sum(p.requires_grad for p in model.parameters())
    staged = 2 * trained if size == 1 else frozen
    assert away.host == 16 * trained + steps + staged and here.host == 0
    assert here.total - away.total == 16 * trained + steps + (frozen if size > 1 else 0)
    assert replace(away, on_host=True).total == here.total + (staged if size == 1 else 0)
