"""tune = "new_tokens": the rows of added tokens learn as they would in full training, and nothing else moves, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data.collate import collate, collate_packed
from data.processor import load_processor
from data.sample import Sample
from model.batch import IGNORE_INDEX, Batch
from model.build import assemble, build_model
from model.card import make_card
from model.config import LlmConfig, LoraConfig, ModelConfig
from model.errors import ConfigError
from model.llm.causal_lm import VocabularyLayout
from model.load import load_model
from model.multimodal import MultimodalLM
from model.weights.materialise import materialise
from model.weights.origins import weight_layers
from tests.support.config import problems
from tests.support.finals import Run, config_of, save_checkpoint, save_final, save_parts, trained
from tests.support.ranks import run_ranks
from tests.support.runs import failure_of, start_alone
from tests.support.tiny import VOCAB, save_llm
from tools.export_adapter import main as export
from trainer.config import OptimConfig, ParallelConfig
from trainer.distributed.parallelize import replicate
from trainer.distributed.shards import shard
from trainer.distributed.world import World
from trainer.optim import build_optimizer, set_learning_rates
from trainer.step import StepOptions, train_step

ALONE = World(0, 0, 1, torch.device("cpu"))
IDS = (VOCAB, VOCAB + 2)  # VOCAB + 1 is new too, and is not to learn: a placeholder
VOCABULARY = VocabularyLayout(VOCAB + 3, VOCAB, (VOCAB, VOCAB + 1, VOCAB + 2), IDS)
OPTIM = OptimConfig(lr=0.1, eps=1.0)
TOKENS = ("<im_start>", "<im_end>")
CONSTANT = {"schedule": "constant", "warmup_ratio": 0.0}


def samples(step: int) -> list[Sample]:
    """Six samples of known and new ids, all but the first position of each supervised."""
    rng, found = np.random.default_rng(step), []
    for i, length in enumerate((9, 4, 7, 12, 5, 6)):
        ids = rng.integers(1, VOCAB, length)
        ids[rng.random(length) < 0.4] = IDS[i % 2]
        found.append(Sample(i, 0, ids, np.append(ids[1:], IGNORE_INDEX), {}))
    return found


def model_of(folder: Path, tune: str, dtype: str = "float32") -> tuple[MultimodalLM, ModelConfig]:
    config = ModelConfig(LlmConfig(str(folder), tune), dtype=dtype)  # type: ignore[arg-type]
    return build_model(config, None, VOCABULARY), config


def matrices(model: MultimodalLM) -> dict[str, Tensor]:
    """The embedding and the head; of tied ones the embedding alone."""
    llm: Any = model.llm
    found = {"embedding": llm.get_input_embeddings(), "head": llm.get_output_embeddings()}
    return found if found["embedding"].weight is not found["head"].weight else {"embedding": found["embedding"]}


def trained_model(folder: Path, tune: str, steps: int, layout: Any = collate) -> MultimodalLM:
    """After `steps` steps in one process; "full" has the gradient of every other row and weight masked."""
    model, config = model_of(folder, tune)
    if tune == "full":
        only = torch.zeros(model.llm.get_input_embeddings().weight.shape[0], 1)  # type: ignore[operator]
        only[list(IDS)] = 1
        model.requires_grad_(False)
        for matrix in matrices(model).values():
            matrix.weight.requires_grad_(True).register_hook(lambda grad: grad * only)
    optimizer = build_optimizer(model, config, OPTIM)
    set_learning_rates(optimizer, 1.0)
    for step in range(steps):
        parts = samples(step)
        train_step(
            model, optimizer, [layout(parts[:2], 0), layout(parts[2:], 0)], ALONE, StepOptions(seed=0, step=step, clip_norm=1.0)
        )
    return model


@pytest.mark.parametrize("layout", [collate, collate_packed])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_tied", "gemma", "gemma2", "cohere", "granite"])
def test_they_learn_as_in_full_training_with_all_other_rows_masked(tmp_path: Path, family: str, layout: Any) -> None:
    """Scaled embeddings, changed logits, a padding index at the first row: each would show in the rows."""
    save_llm(tmp_path, family)
    own, full = trained_model(tmp_path, "new_tokens", 3, layout), trained_model(tmp_path, "full", 3)
    before = model_of(tmp_path, "new_tokens")[0]
    assert matrices(own).keys() == matrices(full).keys()
    for name, matrix in matrices(own).items():
        found, start = matrix.new_rows, matrices(before)[name].new_rows
        assert found.shape == (2, 32) and (found - start).abs().min(1).values.max() > 0
        torch.testing.assert_close(found, matrices(full)[name].weight[list(IDS)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_tied", "gemma"])
def test_nothing_else_changes_to_the_bit(tmp_path: Path, family: str) -> None:
    save_llm(tmp_path, family)
    before = dict(model_of(tmp_path, "new_tokens")[0].state_dict())
    model = trained_model(tmp_path, "new_tokens", 2)
    after = model.state_dict()
    assert before.keys() == after.keys()
    learns = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert {name for name, value in before.items() if not torch.equal(value, after[name])} == learns
    assert all(name.endswith(".new_rows") for name in learns) and len(learns) == 2


@pytest.mark.parametrize("family", ["qwen2", "qwen2_tied", "gemma"])
def test_at_first_the_model_is_the_one_whose_matrix_grew(tmp_path: Path, family: str) -> None:
    save_llm(tmp_path, family)
    own, grown = model_of(tmp_path, "new_tokens")[0], model_of(tmp_path, "frozen")[0]
    batch = collate(samples(0), 0)
    torch.testing.assert_close(own(batch)["text"].addends, grown(batch)["text"].addends, rtol=1e-6, atol=1e-6)
    known = own.llm.get_input_embeddings().weight[:VOCAB]  # type: ignore[operator]
    for matrix in matrices(own).values():
        torch.testing.assert_close(matrix.new_rows, matrix.weight[:VOCAB].mean(0).expand(2, -1), rtol=1e-5, atol=1e-6)
    assert not known.requires_grad


def stepped(world: World, folder: Path, strategy: str, dtype: str) -> list[float]:
    """Loss and gradient norm of three steps, the samples shared among ranks, one of which has none in the last."""
    config = ModelConfig(LlmConfig(str(folder), "new_tokens"), dtype=dtype)  # type: ignore[arg-type]
    card = make_card(config, LoraConfig(), VOCABULARY)
    model = assemble(card, getattr(torch, dtype))
    if strategy == "fsdp":
        shard(model, ParallelConfig(unit_mib=0), world)
    materialise(model, weight_layers(card, model, 7), frozen_dtype=model.dtype, device=world.device)
    wrapped = model if strategy == "fsdp" else replicate(model, world)
    optimizer = build_optimizer(model, config, OPTIM)
    set_learning_rates(optimizer, 1.0)
    found: list[float] = []
    for step in range(3):
        mine = samples(step)[: 1 if step == 2 else 6][world.rank :: world.size]
        result = train_step(wrapped, optimizer, [collate(mine, 0)], world, StepOptions(seed=0, step=step, clip_norm=0.0))
        found += [world.sum(torch.cat(result.addends).sum()).item(), result.grad_norm.item()]
    return found


def all_stepped(world: World, folder: Path, strategies: tuple[str, ...]) -> dict[tuple[str, str, str], list[float]]:
    cases = product(("qwen2", "qwen2_tied"), strategies, ("float32", "bfloat16"))
    return {case: stepped(world, folder / case[0], *case[1:]) for case in cases}


def test_ranks_of_either_strategy_train_them_as_one_process(tmp_path: Path) -> None:
    """And cast alike: in bfloat16 both strategies lose the same, to the bit."""
    for family in ("qwen2", "qwen2_tied"):
        save_llm(tmp_path / family, family)
    (alone,) = run_ranks(all_stepped, 1, tmp_path, ("ddp",))
    for rank in run_ranks(all_stepped, 2, tmp_path, ("ddp", "fsdp")):
        for (family, strategy, dtype), found in rank.items():
            if dtype == "float32":
                expected = torch.tensor(alone[family, "ddp", dtype])
                torch.testing.assert_close(torch.tensor(found), expected, rtol=2e-6, atol=1e-6, msg=f"{family} {strategy}")
            assert found[::2] == rank[family, "ddp", dtype][::2] or dtype == "float32"


def embeddings(net: MultimodalLM) -> list[Tensor]:
    return [matrix.weight.detach() for matrix in matrices(net).values()]


def run_of(parts: Path, tune: str = "new_tokens", tokens: tuple[str, ...] = TOKENS, **options: Any) -> Run:
    config = config_of(parts, tune, **options)
    return trained(replace(config, llm=replace(config.llm, new_tokens=tokens)))


@pytest.mark.parametrize("family", ["qwen2", "qwen2_tied"])
@pytest.mark.parametrize("save", [save_final, save_checkpoint])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_has_them_in_its_matrices(tmp_path: Path, family: str, save: Callable[..., Path], dtype: str) -> None:
    parts = save_parts(tmp_path / "parts", family)
    run = run_of(parts, dtype=dtype)
    folder = save(run, tmp_path)
    ids = list(run.card.vocabulary.tuned_ids)
    assert len(ids) == 2 < len(run.card.vocabulary.new_ids)
    net = load_model(folder)
    assert not [name for name, _ in net.named_parameters() if name.endswith("new_rows")]
    for found, matrix in zip(embeddings(net), matrices(run.model).values()):
        expected = matrix.weight.detach().clone()
        assert not torch.equal(expected[ids], matrix.new_rows.to(expected.dtype))
        expected[ids] = matrix.new_rows.detach().to(expected.dtype)
        assert torch.equal(found, expected)
    if dtype == "bfloat16":  # masters would have to be cast first, which is the wrapper's work
        return
    batch = collate([Sample(0, 0, np.array([5, *ids, 9]), np.array([ids[0], ids[1], 9, IGNORE_INDEX]), {})], 0)
    with torch.no_grad():
        torch.testing.assert_close(net(batch)["text"].addends, run.model(batch)["text"].addends, rtol=1e-6, atol=1e-6)


def test_answers_with_rows_beside_the_matrix_are_those_of_the_merged_one(tmp_path: Path) -> None:
    """Logits of new tokens are raised until greedy decoding picks them, so that both ends are asked."""
    run = run_of(save_parts(tmp_path / "parts"))
    head: Any = matrices(run.model)["head"]
    with torch.no_grad():
        head.new_rows.mul_(30)
    net = load_model(save_final(run, tmp_path))
    ids = torch.arange(5, 11)[None].repeat(2, 1)
    ids[1, 2:4] = torch.tensor(run.card.vocabulary.tuned_ids)
    batch = Batch(ids, ids, None, ids, ids[0], ids[0], ids[0], ids[0], (6, 6))
    answers = [model.eval().generate(batch, max_new_tokens=6) for model in (net, run.model)]
    assert answers[0] == answers[1]
    assert {*answers[0][0], *answers[0][1]} & set(run.card.vocabulary.tuned_ids)


def test_the_file_holds_the_rows_and_is_handed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(save_parts(tmp_path / "parts"))
    final = save_final(run, tmp_path)
    names = {"llm.model.embed_tokens.new_rows", "llm.lm_head.new_rows"}
    for folder in (final, tmp_path / "out"):
        if folder != final:
            assert export([str(final), str(folder)]) == 0
        found = load_file(folder / "new_tokens.safetensors")
        assert found.keys() == names
        assert all(torch.equal(rows, run.model.get_parameter(name)) for name, rows in found.items())
    assert f"model.init_from={final}" in capsys.readouterr().out
    assert export([str(final), str(tmp_path / "peft"), "--for", "peft"]) == 2
    assert "model.llm.tune = 'new_tokens': the run has no LoRA adapter to export" in capsys.readouterr().err
    assert export([str(final), str(tmp_path / "hf"), "--for", "hf"]) == 0
    hf = load_file(tmp_path / "hf" / "model.safetensors")
    ids = list(run.card.vocabulary.tuned_ids)
    assert torch.equal(hf["language_model.lm_head.weight"][ids], matrices(run.model)["head"].new_rows)


SECTIONS: dict[str, Any] = {
    "model": {"llm": {"tune": "new_tokens", "new_tokens": list(TOKENS)}, "vision": {"tune": "frozen"}},
    "data": {"media_wrap": list(TOKENS)},
}


def ended(parts: Path, output_dir: Path, tune: str, tokens: tuple[str, ...] = (), init_from: Path | None = None) -> MultimodalLM:
    """What a run of one step ends with."""
    model = {"llm": {"tune": tune, "new_tokens": list(tokens)}, "vision": {"tune": "frozen"}}
    begun = {"init_from": str(init_from / "final")} if init_from else {}
    sections = {"model": {**model, **begun}, "data": {"media_wrap": list(TOKENS)}, "train": {"max_steps": 1}, "optim": CONSTANT}
    assert start_alone(parts, output_dir, sections).code == 0
    return load_model(output_dir / "final")


def test_runs_that_start_from_them_keep_them(parts: Path, tmp_path: Path) -> None:
    """new_tokens -> one of them and another one -> lora: each row is what the last run that trained it left."""
    folders = [tmp_path / str(i) for i in range(3)]
    first = embeddings(ended(parts, folders[0], "new_tokens", TOKENS))[0]
    second = embeddings(ended(parts, folders[1], "new_tokens", ("<im_end>", "<other>"), folders[0]))[0]
    third = embeddings(ended(parts, folders[2], "lora", (), folders[1]))[0]
    tokenizer = load_processor(folders[2] / "final").tokenizer
    begin, end, other = (tokenizer.convert_tokens_to_ids(token) for token in (*TOKENS, "<other>"))
    assert {i for i, row in enumerate(first) if not torch.equal(row, second[i])} == {end, other}
    assert torch.equal(second, third)
    base = load_file(parts / "llm" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(third[: len(base) - 8], base[: len(base) - 8]) and not torch.equal(third[begin], third[end])


def test_a_stopped_run_goes_on_to_the_same_bytes(parts: Path, tmp_path: Path) -> None:
    for run, steps in (("stopped", 2), ("stopped", 4), ("whole", 4)):
        sections = {**SECTIONS, "train": {"max_steps": steps}, "optim": CONSTANT}
        assert start_alone(parts, tmp_path / run, sections).code == 0
    files = [tmp_path / run / "final" / "new_tokens.safetensors" for run in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    rows = load_file(files[0])["llm.model.embed_tokens.new_rows"]
    assert rows.shape[0] == 2 and not torch.equal(rows[0], rows[1])


def test_what_could_never_learn_is_refused(parts: Path, tmp_path: Path) -> None:
    text = problems(model={"llm": {"tune": "new_tokens"}})
    assert "model.llm.tune = 'new_tokens' trains the rows of model.llm.new_tokens, which names none" in text
    known = {"model": {"llm": {"tune": "new_tokens", "new_tokens": ["<|im_end|>"]}}}
    code, reason = failure_of(parts, tmp_path / "run", known)
    assert code == 2 and "'<|im_end|>' are in the tokenizer of model.llm.path already" in reason
    config = ModelConfig(LlmConfig(str(parts / "llm"), "new_tokens"), dtype="float32")
    with pytest.raises(ConfigError, match="are none, or do not ascend"):
        build_model(config)
