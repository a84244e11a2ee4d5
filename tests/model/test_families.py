"""One table of language models, one program: hidden states, logits, losses, gradients and answers are those of transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.collate import collate, collate_packed
from data.sample import Sample
from model import loss
from model.batch import IGNORE_INDEX, Batch
from model.build import assemble
from model.card import make_card
from model.config import LlmConfig, LoraConfig, ModelConfig
from model.errors import ConfigError
from model.files.hub import hugging_face_config
from model.llm.causal_lm import VocabularyLayout, build_llm, check_supported, head_weight
from model.llm.interface import LogitChange
from model.logit_scaling import logit_change
from model.loss import HeadOptions, text_term
from model.weights.materialise import materialise
from model.weights.origins import weight_layers
from tests.support.llm import BASE, TOLERANCE, gradients, ours, theirs
from tests.support.loss import case
from tests.support.ranks import run_ranks
from tests.support.tiny import FAMILIES, VOCAB, save_llm
from trainer.config import OptimConfig, ParallelConfig
from trainer.distributed.parallelize import replicate
from trainer.distributed.shards import shard
from trainer.distributed.world import World
from trainer.optim import build_optimizer, set_learning_rates
from trainer.step import StepOptions, train_step

SHARDED = ("qwen3", "phi3", "gemma2", "gemma3", "granite", "cohere")
LENGTHS = (21, 13, 5)  # two are longer than the sliding window of 8 and the 16 positions that rope was trained for


def samples(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Sample]:
    """Random ids, about half of them supervised."""
    rng, found = np.random.default_rng(seed), []
    for i, length in enumerate(lengths):
        ids = rng.integers(1, VOCAB, length)
        labels = np.where(rng.random(length) < 0.5, np.append(ids[1:], IGNORE_INDEX), IGNORE_INDEX)
        labels[-1] = IGNORE_INDEX
        found.append(Sample(i, 0, ids, labels, {}))
    return found


def by_sample(rows: Tensor, batch: Batch) -> Tensor:
    """(B, T, ...) -> (sum of lengths, ...): real positions, sample after sample, padded or packed."""
    if batch.segment_lengths is not None:
        return rows[0, : sum(batch.lengths)]
    return torch.cat([row[:length] for row, length in zip(rows, batch.lengths)])


@pytest.mark.parametrize("layout", [collate, collate_packed])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_transformers_does(
    tmp_path: Path, family: str, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_llm(tmp_path, family)
    monkeypatch.setattr(loss.HeadOptions.__init__, "__defaults__", (5, loss.UNCHANGED, None))  # chunks of 5 rows, the last not full
    model, plain = ours(tmp_path), theirs(tmp_path)
    batch, padded = layout(samples(), 0), collate(samples(), 0)
    term = model(batch)["text"]
    term.sum.backward()
    output = plain(input_ids=padded.input_ids, attention_mask=padded.attention_mask, output_hidden_states=True)
    expected = F.cross_entropy(output.logits.flatten(0, 1), padded.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    expected.backward()
    found = by_sample(model.decode(batch), batch)
    torch.testing.assert_close(found, by_sample(output.hidden_states[-1], padded), **TOLERANCE)
    logits = model.llm.logit_change(found @ head_weight(model.llm).T)
    torch.testing.assert_close(logits, by_sample(output.logits, padded), **TOLERANCE)
    torch.testing.assert_close(term.sum, expected, **TOLERANCE)
    wanted = gradients(plain)
    assert gradients(model).keys() == wanted.keys()
    for key, value in gradients(model).items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_wrapped_model(tmp_path: Path, family: str) -> None:
    """Two prompts of different lengths, padded on the left, against each by itself with its ids."""
    save_llm(tmp_path, family)
    model, plain = ours(tmp_path).eval(), theirs(tmp_path).eval()
    prompts = [sample.input_ids for sample in samples((11, 6))]
    width = 11
    ids = torch.tensor([[0] * (width - len(p)) + p.tolist() for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    found = model.generate(Batch(ids, ids, mask, ids, ids[0], ids[0], ids[0], ids[0], (11, 6)), max_new_tokens=6)
    for prompt, answer in zip(prompts, found):
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 6}
        expected = plain.generate(torch.tensor(prompt)[None], **options)
        assert answer == expected[0, len(prompt) :].tolist()


def trained_losses(world: World, folder: Path, strategy: str) -> dict[str, list[float]]:
    """Loss and gradient norm of two steps of families that differ in structure, three samples each."""
    found = {}
    for family in SHARDED:
        config = ModelConfig(LlmConfig(str(folder / family), "full"), dtype="float32")
        card = make_card(config, LoraConfig(), VocabularyLayout())
        model = assemble(card, torch.float32)
        if strategy == "fsdp":
            shard(model, ParallelConfig(unit_mib=0), world)
        materialise(model, weight_layers(card, model, 7), frozen_dtype=torch.float32, device=world.device)
        wrapped = model if strategy == "fsdp" else replicate(model, world)
        optimizer = build_optimizer(model, config, OptimConfig(lr=0.1, eps=1.0))
        set_learning_rates(optimizer, 1.0)
        found[family] = []
        for step in range(2):
            mine = samples((9, 14, 5), step)[world.rank :: world.size]
            result = train_step(wrapped, optimizer, [collate(mine, 0)], world, StepOptions(seed=0, step=step, clip_norm=1.0))
            total = world.sum(torch.cat(result.addends).sum())
            found[family] += [total.item(), result.grad_norm.item()]
    return found


def test_two_sharded_ranks_train_any_family_as_one_process(tmp_path: Path) -> None:
    for family in SHARDED:
        save_llm(tmp_path / family, family)
    (alone,) = run_ranks(trained_losses, 1, tmp_path, "ddp")
    for rank in run_ranks(trained_losses, 2, tmp_path, "fsdp"):
        for family, expected in alone.items():
            torch.testing.assert_close(torch.tensor(rank[family]), torch.tensor(expected), rtol=2e-6, atol=1e-6, msg=family)


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("qwen2", {}, LogitChange()),
        ("granite", {"logits_scaling": 4.0}, LogitChange(0.25)),
        ("hyperclovax", {"logits_scaling": 4.0}, LogitChange(4.0)),
        ("cohere", {"logit_scale": 0.0625}, LogitChange(0.0625)),
        ("falcon_h1", {"lm_head_multiplier": 0.02}, LogitChange(0.02)),
        ("gemma2", {}, LogitChange(cap=30.0)),
        ("gemma2", {"final_logit_softcapping": None}, LogitChange()),
        ("nanochat", {}, LogitChange(cap=15.0)),
    ],
)
def test_what_a_model_does_with_its_logits_is_found_out(kind: str, changes: dict[str, Any], expected: LogitChange) -> None:
    """One name divides in one family and multiplies in another, so only the model itself can tell."""
    value = {"model_type": kind, **BASE, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    llm: Any = build_llm({**value, **changes}, "eager", VocabularyLayout())
    assert llm.logit_change == expected
    assert "forward" not in vars(llm.get_decoder()) and "forward" not in vars(llm.get_output_embeddings())


def test_logits_that_nothing_explains_are_refused(tmp_path: Path) -> None:
    llm: Any = theirs(save_llm(tmp_path))
    original = llm.forward

    def changed(**kwargs: Any) -> Any:
        output = original(**kwargs)
        output.logits = output.logits * 1.001
        return output

    llm.forward = changed
    with pytest.raises(ConfigError, match="Qwen2ForCausalLM changes its logits after the head's product"):
        logit_change(llm)
    llm.forward = original
    assert logit_change(llm) == LogitChange()


@pytest.mark.parametrize("change", [LogitChange(0.25), LogitChange(cap=2.0), LogitChange(3.0, 1.5)])
def test_gradients_go_through_the_change_of_logits(change: LogitChange) -> None:
    hidden, weight, labels, supervised = case(10)
    term = text_term(hidden, weight, labels, supervised, HeadOptions(4, change))
    (term.sum * 0.5).backward()
    found = [term.sum.detach(), hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    logits = (hidden @ weight.T).flatten(0, 1) * change.scale
    logits = logits if change.cap is None else change.cap * torch.tanh(logits / change.cap)
    expected = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    (expected * 0.5).backward()
    for value, wanted in zip(found, (expected.detach(), hidden.grad, weight.grad)):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


def test_what_is_no_language_model_or_drops_a_soft_cap_is_refused() -> None:
    with pytest.raises(ConfigError, match="llava is a model of several parts, not a language model"):
        build_llm({"model_type": "llava"}, "eager", VocabularyLayout())
    config = hugging_face_config("x", {"model_type": "gemma2", **BASE})
    with pytest.raises(ConfigError, match="'sdpa_paged' drops the attention soft cap of gemma2: use one of sdpa, varlen, eager"):
        check_supported(config, "sdpa_paged")
    check_supported(config, "sdpa")
