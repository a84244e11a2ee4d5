"""Losses of preferences against their papers' formulas, written here on full logits, padded and packed with shared prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.collate import collate
from data.preference.collate import collate_answers, collate_answers_packed
from data.preference.sample import PreferenceSample
from data.sample import Sample
from model.batch import Batch
from model.build import build_model
from model.config import LoraConfig
from model.errors import ConfigError
from model.llm import attention
from model.llm.causal_lm import VocabularyLayout, head_weight
from model.multimodal import MultimodalLM
from model.preference.config import PreferenceConfig
from model.preference.tuning import PreferenceTuning
from tests.support.equivalence import config_of
from tests.support.preference.pairs import made_sample
from tests.support.tiny import save_llm, save_tower
from tests.support.trainable import ALONE
from tools.bench_step import Counter, hidden_syncs
from trainer.config import OptimConfig
from trainer.optim import build_optimizer
from trainer.preference.isolation import prove_answers_apart
from trainer.step import StepOptions, train_step, unwrapped

BETA, NUM = 0.3, 5
JOINS = {"padded": collate_answers, "packed": collate_answers_packed}


def built(folder: Path, tune: str, family: str = "qwen2") -> MultimodalLM:
    if not (folder / "llm").exists():
        save_llm(folder / "llm", family)
        save_tower(folder / "vision")
    return build_model(config_of(folder, tune), LoraConfig(rank=2, dropout=0.0), VocabularyLayout(321, 320, (320,)))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def samples() -> list[PreferenceSample]:
    rng = np.random.default_rng(0)
    return [made_sample(i, rng, num_images=i % 3) for i in range(NUM)]


def plain_log_probs(model: MultimodalLM, samples: list[PreferenceSample]) -> Tensor:
    """(samples, answers) log-probability of each answer: the whole conversation by itself, all its logits, a log-softmax."""
    found = []
    for sample in samples:
        for answer in sample.answers:
            ids = np.concatenate([sample.input_ids[: sample.prompt], sample.input_ids[answer.start : answer.stop]])
            alone = collate([Sample(0, 0, ids, np.full(len(ids), -100), sample.media)], 0)
            logits = (model.decode(alone) @ head_weight(model.llm).T)[0].log_softmax(-1)
            where = sample.prompt + np.flatnonzero(answer.counted)
            found.append(logits[where - 1, ids[where]].sum())
    return torch.stack(found).view(len(samples), -1)


def counts_of(samples: list[PreferenceSample]) -> Tensor:
    return torch.tensor([[float(answer.counted.sum()) for answer in sample.answers] for sample in samples])


Plain = Callable[[Tensor, Tensor, Tensor], Tensor]


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def plain_dpo(pi: Tensor, ref: Tensor, tokens: Tensor) -> Tensor:
    return -sigmoid(BETA * ((pi - ref)[:, 0] - (pi - ref)[:, 1])).log()


def plain_smooth(pi: Tensor, ref: Tensor, tokens: Tensor) -> Tensor:
    h = BETA * ((pi - ref)[:, 0] - (pi - ref)[:, 1])
    return -0.9 * sigmoid(h).log() - 0.1 * sigmoid(-h).log()


def plain_normalised(pi: Tensor, ref: Tensor, tokens: Tensor) -> Tensor:
    return plain_dpo(pi / tokens, ref / tokens, tokens)


def plain_ipo(pi: Tensor, ref: Tensor, tokens: Tensor) -> Tensor:
    return ((pi[:, 0] - pi[:, 1]) - (ref[:, 0] - ref[:, 1]) - 1 / (2 * BETA)) ** 2


def plain_simpo(pi: Tensor, ref: Tensor, tokens: Tensor) -> Tensor:
    return -sigmoid(BETA / tokens[:, 0] * pi[:, 0] - BETA / tokens[:, 1] * pi[:, 1] - 0.7).log()


def plain_orpo(pi: Tensor, ref: Tensor, tokens: Tensor) -> Tensor:
    p = (pi / tokens).exp()
    odds = p / (1 - p)
    return -sigmoid((odds[:, 0] / odds[:, 1]).log()).log()


KINDS: dict[str, tuple[dict[str, Any], Plain]] = {
    "dpo": ({"kind": "dpo"}, plain_dpo),
    "smooth": ({"kind": "dpo", "label_smoothing": 0.1}, plain_smooth),
    "normalised": ({"kind": "dpo", "length_normalisation": True}, plain_normalised),
    "ipo": ({"kind": "ipo"}, plain_ipo),
    "simpo": ({"kind": "simpo", "margin": 0.7}, plain_simpo),
    "orpo": ({"kind": "orpo"}, plain_orpo),
}


def with_reference(batch: Batch, values: Tensor) -> Batch:
    assert batch.answers is not None
    return replace(batch, answers=replace(batch.answers, reference=values.flatten()))


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_of_pairs_is_its_formula(parts: Path, samples: list[PreferenceSample], kind: str, join: str) -> None:
    """The value, the supervised loss beside it, and every gradient."""
    model, (settings, formula) = built(parts, "full"), KINDS[kind]
    reference = torch.linspace(-30, -22, 2 * NUM).view(NUM, 2)
    batch = with_reference(JOINS[join](samples, 0), reference)
    model.preference = PreferenceTuning(PreferenceConfig(beta=BETA, sft_weight=0.5, **settings))
    factor = model.preference.coefficients()["preference"]
    assert factor == (BETA if kind == "orpo" else 1.0)
    terms = model(batch)
    tokens, pi = counts_of(samples), plain_log_probs(model, samples)
    expected = formula(pi, reference, tokens)
    largest = expected.abs().max().item()
    torch.testing.assert_close(terms["preference"].addends, expected, rtol=1e-6, atol=1e-6 * max(1.0, largest))
    torch.testing.assert_close(terms["text"].sum, -pi[:, 0].sum(), rtol=1e-6, atol=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(terms["preference"].sum + 0.5 * terms["text"].sum, parameters, allow_unused=True)
    wanted = torch.autograd.grad(expected.sum() - 0.5 * pi[:, 0].sum(), parameters, allow_unused=True)
    scale = max(grad.abs().max().item() for grad in wanted)
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("join", JOINS)
def test_mpo_is_preference_quality_and_generation(parts: Path, samples: list[PreferenceSample], join: str) -> None:
    """Wang et al. 2024: DPO, BCO from the mean reward of the steps before, and the loss of chosen answers per token."""
    model, reference = built(parts, "full"), torch.linspace(-30, -22, 2 * NUM).view(NUM, 2)
    tuning = model.preference = PreferenceTuning(PreferenceConfig("mpo", BETA))
    assert tuning.coefficients() == {"text": 0.0, "preference": 0.8, "quality": 0.2, "generation": 1.0}
    tuning.shift.receive(torch.tensor([6.0, 4.0]).unbind())
    tuning.shift.receive(torch.tensor([-1.0, 4.0]).unbind())
    terms = model(with_reference(JOINS[join](samples, 0), reference))
    pi, tokens = plain_log_probs(model, samples), counts_of(samples)
    rewards = BETA * (pi - reference)
    delta = 5.0 / 8
    quality = -sigmoid(rewards[:, 0] - delta).log() - sigmoid(-(rewards[:, 1] - delta)).log()
    torch.testing.assert_close(terms["preference"].addends, plain_dpo(pi, reference, tokens), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(terms["quality"].addends, quality, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(terms["generation"].addends, -(pi / tokens)[:, 0], rtol=1e-6, atol=1e-6)
    total, count = tuning.shift.shared()
    torch.testing.assert_close(total, rewards.sum(), rtol=1e-5, atol=1e-5)
    assert count.item() == 2 * NUM


@pytest.mark.parametrize("join", JOINS)
def test_kto_measures_from_the_divergence_of_the_step(parts: Path, join: str) -> None:
    """Ethayarajh et al. 2024: wanted and unwanted answers, a pair among them; z0 of mismatched answers, the same for all."""
    rng = np.random.default_rng(3)
    roles = [("desirable", "other"), ("undesirable", "other"), ("desirable", "other"), ("chosen", "rejected", "other")]
    samples = [made_sample(i, rng, kinds, num_images=i % 2) for i, kinds in enumerate(roles)]  # type: ignore[arg-type]
    model = built(parts, "full")
    tuning = model.preference = PreferenceTuning(PreferenceConfig("kto", BETA, desirable_weight=1.5, undesirable_weight=0.5))
    flat = [plain_log_probs(model, [sample])[0] for sample in samples]
    reference = torch.linspace(-28, -24, sum(map(len, flat)))
    starts = np.cumsum([0, *map(len, flat)])
    batches = [JOINS[join](samples[:2], 0), JOINS[join](samples[2:], 0)]
    batches = [with_reference(batches[0], reference[:4]), with_reference(batches[1], reference[4:])]
    batches = tuning.prepare(model, batches)
    tuning.shift.receive(tuning.shift.shared())
    assert unwrapped(model) is model and model.training
    ratios = [own - reference[a:b] for own, a, b in zip(flat, starts, starts[1:])]
    divergence = max(0.0, sum(ratio[-1].item() for ratio in ratios) / 4)
    z0 = BETA * divergence
    assert z0 > 0
    good = [ratios[0][0], ratios[2][0], ratios[3][0]]
    bad = [ratios[1][0], ratios[3][1]]
    expected = 1.5 * sum(1 - sigmoid(BETA * r - z0) for r in good) + 0.5 * sum(1 - sigmoid(z0 - BETA * r) for r in bad)
    found = [model(batch)["preference"] for batch in batches]
    torch.testing.assert_close(found[0].sum + found[1].sum, expected, rtol=1e-6, atol=1e-6)
    assert tuning.counts(batches)["preference"] == 5.0
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(found[0].sum + found[1].sum, trained)
    wanted = torch.autograd.grad(expected, trained)  # type: ignore[arg-type]
    scale = max(grad.abs().max().item() for grad in wanted)
    for one, other in zip(grads, wanted):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("join", JOINS)
def test_adapters_switched_off_are_the_reference(parts: Path, samples: list[PreferenceSample], join: str) -> None:
    """At the start the loss is log 2 for any pair; later it is that of a model without adapters, built a second time."""
    model, start = built(parts, "lora"), built(parts, "lora")
    tuning = model.preference = PreferenceTuning(PreferenceConfig("dpo", BETA))
    tuning.adapters_off = True
    batch = JOINS[join](samples, 0)
    torch.testing.assert_close(model(batch)["preference"].addends, torch.full((NUM,), math.log(2)), rtol=0, atol=1e-6)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.1)
    pi, reference = plain_log_probs(model, samples), plain_log_probs(start, samples).detach()
    terms = model(batch)
    torch.testing.assert_close(terms["preference"].addends, plain_dpo(pi, reference, counts_of(samples)), rtol=1e-5, atol=1e-5)
    trained = [p for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B"))]
    found = torch.autograd.grad(terms["preference"].sum, trained)
    wanted = torch.autograd.grad(plain_dpo(pi, reference, counts_of(samples)).sum(), trained)
    scale = max(grad.abs().max().item() for grad in wanted)
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("family", ["gemma2", "mistral", "gemma3"])
def test_a_shared_prompt_is_seen_alike_by_every_family(tmp_path: Path, samples: list[PreferenceSample], family: str) -> None:
    """Sliding windows shorter than a prompt and its answer, capped scores, and layers of both kinds."""
    model = built(tmp_path, "full", family)
    model.preference = PreferenceTuning(PreferenceConfig("simpo", 2.0))
    padded, packed = (model(join(samples, 0))["preference"].addends for join in JOINS.values())
    torch.testing.assert_close(packed, padded, rtol=1e-6, atol=1e-6)


def test_a_packed_row_computes_a_prompt_and_its_pictures_once(samples: list[PreferenceSample]) -> None:
    packed, padded = collate_answers_packed(samples, 0), collate_answers(samples, 0)
    assert packed.input_ids.shape[1] == sum(len(sample.input_ids) for sample in samples)
    assert packed.media["image"].values.shape[0] == padded.media["image"].values.shape[0] == 4
    assert packed.media["image"].slots.shape[0] * 2 == padded.media["image"].slots.shape[0] == 32
    assert packed.sample_ids.tolist() == padded.sample_ids.tolist() == list(range(NUM))
    assert packed.num_supervised == padded.num_supervised
    assert packed.owners.tolist() == padded.owners.tolist()


def test_a_batch_without_samples_has_every_term(parts: Path) -> None:
    model = built(parts, "full")
    for kind in ("dpo", "ipo", "simpo", "orpo", "kto", "mpo"):
        model.preference = PreferenceTuning(PreferenceConfig(kind))  # type: ignore[arg-type]
        terms = model(collate_answers([], 0))
        assert terms.keys() == model.coefficients().keys() == model.counts([]).keys()
        loss = torch.stack([term.sum for term in terms.values()]).sum()
        loss.backward()
        assert loss.item() == 0 and all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_model_that_lets_answers_see_each_other_is_refused(parts: Path) -> None:
    model = built(parts, "full")
    model.preference = PreferenceTuning(PreferenceConfig("dpo"))
    prove_answers_apart(model, 0, ALONE)
    assert model.training and model.preference.measured is None

    def leaking(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any) -> Any:
        kept = {name: value for name, value in options.items() if name != "shared_prompts" and "segment" not in name}
        return attention.causal_attention(module, query, key, value, mask, **kept)

    attention.AttentionInterface.register(attention.PACKED, leaking)
    try:
        with pytest.raises(ConfigError, match="answers to one prompt see each other in Qwen2ForCausalLM"):
            prove_answers_apart(model, 0, ALONE)
    finally:
        attention.register()


@pytest.mark.parametrize("join", JOINS)
def test_a_step_of_pairs_never_waits_for_the_device(parts: Path, samples: list[PreferenceSample], join: str) -> None:
    """Adapters switched off for the reference; mpo, whose terms have a shift from step to step."""
    model = built(parts, "lora")
    tuning = model.preference = PreferenceTuning(PreferenceConfig("mpo"))
    tuning.adapters_off = True
    tuning.shift.receive(torch.zeros(2).unbind())
    optimizer = build_optimizer(model, config_of(parts, "lora"), OptimConfig())
    batches = [JOINS[join](samples, 0), JOINS[join]([], 0)]
    with Counter() as counter, hidden_syncs(counter):
        train_step(model, optimizer, batches, ALONE, StepOptions(seed=0, step=0, clip_norm=1.0))
    assert counter.num_syncs == 0 and counter.num_ops > 100
