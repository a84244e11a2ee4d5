"""Layers that keep less for backward compute what transformers' own compute, and their gradients."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from model.lean_layers import make_lean, rotated

IDS = torch.tensor([[5, 9, 3, 17, 40, 41, 7], [8, 8, 60, 2, 33, 12, 19]])
TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"Attention", "MLP", "RMSNorm"}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"Attention", "MLP", "RMSNorm"}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"Attention", "MLP", "RMSNorm"}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"Attention", "RMSNorm"}),
    "gemma": (GemmaForCausalLM, GemmaConfig, {"Attention"}),  # its norm multiplies by 1 + weight
    "phi": (PhiForCausalLM, PhiConfig, {"Attention"}),
}


def made(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a tiny model of `family` whose norms and biases have no special values."""
    torch.manual_seed(1)
    if family == "clip":
        config = CLIPVisionConfig(**{k: v for k, v in TINY.items() if k != "vocab_size"}, image_size=16, patch_size=4)
        model: nn.Module = CLIPVisionModel(config)
    else:
        build, shape, _ = FAMILIES[family]
        model = build(shape(**TINY, num_key_value_heads=2, head_dim=8, pad_token_id=0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model.to(dtype)


def backward(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the output of `model`, and all gradients of a loss on it."""
    if isinstance(model, CLIPVisionModel):
        pixels = torch.linspace(-2, 2, 2 * 3 * 16 * 16).sin().view(2, 3, 16, 16)
        found = model(pixel_values=pixels.to(model.dtype)).last_hidden_state
        (found.float() * torch.linspace(-1, 1, found.numel()).view(found.shape)).sum().backward()
    else:
        answer = model(input_ids=IDS, labels=IDS)
        found = answer.logits
        answer.loss.backward()
    return found.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", [*FAMILIES, "clip"])
def test_outputs_are_equal_to_the_bit_and_gradients_within_rounding(family: str) -> None:
    plain, lean = made(family), made(family)
    make_lean(lean)
    (expected, wanted), (found, gradients) = backward(plain), backward(lean)
    assert torch.equal(found, expected)
    assert gradients.keys() == wanted.keys()
    least = 1e-3 * max(float(gradient.norm()) for gradient in wanted.values())  # that of a bias of keys is 0 but for rounding
    for name, gradient in gradients.items():
        error = (gradient - wanted[name]).norm() / wanted[name].norm().clamp(min=least)
        assert error < 2e-6, (name, float(error))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_of_a_family_that_are_taken(family: str) -> None:
    plain, lean = made(family), made(family)
    make_lean(lean)
    changed = {type(b).__name__ for a, b in zip(plain.modules(), lean.modules()) if type(a) is not type(b)}
    assert {name.replace(type(plain).__name__.removesuffix("ForCausalLM"), "") for name in changed} == FAMILIES[family][2]


def test_an_attention_is_taken_through_its_decorators(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.24 puts one around every attention, which renames an argument; what a decorator does is still done."""
    calls = []

    def counted(forward: Any) -> Any:
        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(forward)
            return forward(*args, **kwargs)

        return call

    plain, lean = made("qwen2"), made("qwen2")
    before = Qwen2Attention.forward
    monkeypatch.setattr(Qwen2Attention, "forward", counted(counted(before)))
    make_lean(lean)
    attention = next(m for m in lean.modules() if type(m).__name__ == "Qwen2Attention")
    assert type(attention) is not Qwen2Attention
    innermost = inspect.unwrap(type(attention).forward)
    assert innermost.__globals__["apply_rotary_pos_emb"] is rotated  # type: ignore[attr-defined]
    (found, _), again = backward(lean), len(calls)
    monkeypatch.undo()
    assert again == 4  # two layers, two decorators
    assert torch.equal(found, backward(plain)[0])
    assert inspect.unwrap(before).__globals__["apply_rotary_pos_emb"] is not rotated  # transformers' own is as it was


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_bfloat16_is_no_further_from_float32_than_transformers(family: str) -> None:
    """Outputs are the same to the bit, gradients of gated products and rotation within their rounding."""
    _, exact = backward(made(family, torch.bfloat16).float())
    plain, lean = made(family, torch.bfloat16), made(family, torch.bfloat16)
    make_lean(lean)
    (expected, wanted), (found, gradients) = backward(plain), backward(lean)
    assert torch.equal(found, expected)
    errors = [
        sum(float((g[name].float() - exact[name]).norm() / exact[name].norm().clamp(min=1e-3)) for name in exact)
        for g in (gradients, wanted)
    ]
    assert errors[0] < 1.05 * errors[1]


def test_less_is_kept_for_backward() -> None:
    """Per token and layer of width D and inner width F, a gated layer's activation (F) is not kept, nor two rows of D per norm."""
    kept = []
    for lean in (False, True):
        model, found = made("llama"), dict[int, int]()
        if lean:
            make_lean(model)

        def seen(t: torch.Tensor, found: dict[int, int] = found) -> torch.Tensor:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(seen, lambda t: t):
            loss = model(input_ids=IDS, labels=IDS).loss
        kept.append(sum(found.values()))
        del loss
    tokens, layers, norms = IDS.numel(), 2, 5
    assert kept[0] - kept[1] >= 4 * tokens * (layers * 48 + norms * 32)


def test_a_copy_of_a_model_reads_its_own_weights() -> None:
    model = made("qwen2")
    make_lean(model)
    copied = copy.deepcopy(model)
    before = model(input_ids=IDS).logits
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert not copied(input_ids=IDS).logits.any()


def test_an_attention_that_rotates_a_part_of_a_head_is_left_alone() -> None:
    from transformers import Glm4Config, Glm4ForCausalLM

    model = Glm4ForCausalLM(Glm4Config(**TINY, num_key_value_heads=2, head_dim=8, pad_token_id=0))
    kinds = {type(module) for module in model.modules()}
    make_lean(model)
    assert {type(m).__name__ for m in model.modules() if type(m) not in kinds} == {"Glm4RMSNorm"}
