"""Our adapters compute what PEFT's do, stand where they are asked to and nowhere else, and travel both ways."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from model.build import build_model
from model.config import LlmConfig, LoraConfig, ModelConfig
from model.errors import ConfigError
from model.load import load_model
from model.lora import LoraLinear, adapted, target_paths
from model.multimodal import MultimodalLM
from tests.support.finals import NO_LORA, build, config_of, save_final, save_parts, trainable, trained, values
from tests.support.lora import logits
from tests.support.tiny import LLMS, save_llm


def llm_of(folder: Path, lora: LoraConfig) -> MultimodalLM:
    """A language model alone with adapters away from their start, biases too."""
    model = build_model(ModelConfig(LlmConfig(str(folder), "lora"), dtype="float32"), lora)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted(trainable(model).items()):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def in_peft(folder: Path, ours: MultimodalLM, lora: LoraConfig) -> Any:
    """PEFT's own wrapping of the same base, given our matrices by hand."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    paths = [path.removeprefix("llm.") for path, _ in adapted(ours)]
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, use_rslora=lora.rslora, target_modules=paths, lora_dropout=0.0)  # type: ignore[arg-type]
    wrapped = peft.get_peft_model(base, config).eval()
    found = dict(ours.named_parameters())
    with torch.no_grad():
        for path in paths:
            layer = wrapped.base_model.model.get_submodule(path)
            layer.lora_A["default"].weight.copy_(found[f"llm.{path}.lora_A"])
            layer.lora_B["default"].weight.copy_(found[f"llm.{path}.lora_B"])
    return wrapped


@pytest.mark.parametrize("family", LLMS)
@pytest.mark.parametrize(("rank", "alpha", "rslora"), [(2, 2.0, False), (4, 16.0, False), (4, 16.0, True), (8, 3.5, True)])
def test_logits_equal_those_of_peft(tmp_path: Path, family: str, rank: int, alpha: float, rslora: bool) -> None:
    save_llm(tmp_path, family)
    lora = LoraConfig(rank=rank, alpha=alpha, rslora=rslora, dropout=0.0)
    ours = llm_of(tmp_path, lora)
    found, base = logits(ours), logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    torch.testing.assert_close(found, logits(in_peft(tmp_path, ours, lora)), rtol=0, atol=1e-6 * float(found.abs().max()))
    assert (found - base).abs().max() > 1e-2


def test_a_new_adapter_changes_nothing(tmp_path: Path) -> None:
    save_llm(tmp_path)
    ours = build_model(ModelConfig(LlmConfig(str(tmp_path), "lora"), dtype="float32"), LoraConfig(rank=4, dropout=0.0))
    torch.testing.assert_close(
        logits(ours), logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)), rtol=1e-5, atol=1e-5
    )
    for _, layer in adapted(ours):
        assert not layer.lora_B.any() and 0.9 < layer.lora_A.abs().max() * layer.in_features**0.5 <= 1.0


def test_dropout_stands_before_a_and_only_in_training() -> None:
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(50, 3), LoraConfig(rank=2, alpha=4, dropout=0.5))
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(7, 50)
    torch.manual_seed(1)
    kept = nn.functional.dropout(x, 0.5)
    torch.manual_seed(1)
    expected = nn.functional.linear(x, layer.weight, layer.bias) + 2.0 * kept @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected)
    layer.eval()
    assert torch.equal(layer(x), layer(x)) and not torch.allclose(layer(x), expected)


def paths(model: MultimodalLM) -> set[str]:
    return {path for path, _ in adapted(model)}


@pytest.mark.parametrize("family", LLMS)
def test_all_linear_is_every_linear_layer_but_the_head(tmp_path: Path, family: str) -> None:
    model = build_model(ModelConfig(LlmConfig(str(save_llm(tmp_path, family)), "lora")), NO_LORA)
    blocks = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names = (*blocks, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert paths(model) == {f"llm.model.layers.{i}.{name}" for i in range(2) for name in names}


def test_only_parts_whose_own_tune_is_lora_get_adapters(tmp_path: Path) -> None:
    """Tower and LLM share names like q_proj: short names would hit both."""
    parts = save_parts(tmp_path)
    for llm, vision in (("lora", "frozen"), ("lora", "full"), ("full", "lora"), ("lora", "lora")):
        run = build(config_of(parts, llm, vision))
        expected = {name for name, tune in (("llm", llm), ("vision", vision)) if tune == "lora"}
        assert {path.partition(".")[0] for path in paths(run.model)} == expected
    assert not paths(build(config_of(parts, "full", "frozen")).model)


def test_patterns_are_full_paths_and_each_must_match(tmp_path: Path) -> None:
    parts = save_parts(tmp_path)
    chosen = replace(NO_LORA, targets=("llm.*.q_proj", "llm.model.layers.1.mlp.up_proj"))
    expected = {f"llm.model.layers.{i}.self_attn.q_proj" for i in range(2)} | {"llm.model.layers.1.mlp.up_proj"}
    assert paths(build(config_of(parts, "lora", "frozen"), chosen).model) == expected
    everywhere = paths(build(config_of(parts, "lora", "lora"), replace(NO_LORA, targets=("*.q_proj",))).model)
    assert {path.partition(".")[0] for path in everywhere} == {"llm", "vision"} and len(everywhere) == 4
    for wrong in ("q_proj", "llm.*.qproj", "vision.*", "llm.lm_head.*"):
        with pytest.raises(ConfigError) as error:
            build(config_of(parts, "lora", "frozen"), replace(NO_LORA, targets=("llm.*.q_proj", wrong)))
        assert repr(wrong) in str(error.value) and "llm.model.layers.0.self_attn.q_proj" in str(error.value)


WHY = {
    "llm.lm_head": "llm.lm_head is the head, which is never adapted",
    "*.input_layernorm": "is a Qwen2RMSNorm, and adapters stand in linear layers",
    "llm.model.embed_tokens": "is a Embedding, and",
    "llm.*.q_proj.weight": "it names a parameter; write 'llm.*.q_proj', the layer",
    "q_proj": "patterns are of whole paths; write '*.q_proj'",
    "x" * 5000: "... (5002 characters) matches no linear layer",
}


@pytest.mark.parametrize("pattern", WHY)
def test_a_pattern_that_names_no_linear_layer_says_what_it_names(tmp_path: Path, pattern: str) -> None:
    save_llm(tmp_path)
    with pytest.raises(ConfigError, match=r"matches no linear layer .*full paths look like") as error:
        build_model(ModelConfig(LlmConfig(str(tmp_path), "lora")), LoraConfig(rank=2, targets=("llm.*.v_proj", pattern)))
    assert WHY[pattern] in str(error.value) and len(str(error.value)) < 1000


def test_experts_and_models_without_linear_layers_are_named() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(2, 3, 4))

    part = nn.ModuleDict({"experts": Experts(), "q": nn.Linear(2, 2)})
    with pytest.raises(ConfigError, match=r"vision\.experts holds its experts fused in one parameter each"):
        target_paths({"vision": part}, ("*.experts",))
    for wrong, reason in ((nn.Conv1d(1, 1, 1), "no linear layer that an adapter"), (part, r"lora\.targets = \[\] names no layer")):
        with pytest.raises(ConfigError, match=reason):
            target_paths({"vision": nn.Sequential(wrong)}, ())


def test_bias_says_which_biases_train(tmp_path: Path) -> None:
    parts = save_parts(tmp_path)
    some = replace(NO_LORA, targets=("llm.*.0.self_attn.q_proj", "llm.*.o_proj"))  # o_proj has no bias
    biases = {
        bias: {
            n
            for n in trainable(build(config_of(parts), replace(some, bias=bias)).model)
            if n.startswith("llm.") and "lora_" not in n
        }
        for bias in ("none", "all", "lora_only")
    }
    every = {f"llm.model.layers.{i}.self_attn.{p}_proj.bias" for i in range(2) for p in "qkv"}
    assert biases == {"none": set(), "all": every, "lora_only": {"llm.model.layers.0.self_attn.q_proj.bias"}}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_merged_equals_unmerged(tmp_path: Path, bias: Any, rslora: bool) -> None:
    lora = LoraConfig(rank=4, alpha=8, dropout=0.0, bias=bias, rslora=rslora)
    run = trained(config_of(save_parts(tmp_path), "lora", "lora"), lora)
    folder = save_final(run, tmp_path)
    live, beside, merged = logits(run.model.eval()), logits(load_model(folder, merge_lora=False)), logits(load_model(folder))
    assert torch.equal(beside, live)
    torch.testing.assert_close(merged, live, rtol=0, atol=1e-5 * float(live.abs().max()))
    assert not paths(load_model(folder))


def test_merging_into_bfloat16_rounds_once(tmp_path: Path) -> None:
    run = trained(config_of(save_parts(tmp_path), "lora", dtype="bfloat16"), NO_LORA)
    folder = save_final(run, tmp_path)
    name = "llm.model.layers.1.mlp.down_proj"
    exact = load_file(tmp_path / "llm" / "model.safetensors")[name.removeprefix("llm.") + ".weight"].double()
    tensors = values(run.model)
    exact += NO_LORA.scale * tensors[f"{name}.lora_B"].double() @ tensors[f"{name}.lora_A"].double()
    found = load_model(folder).get_parameter(f"{name}.weight")
    assert found.dtype == torch.bfloat16
    assert (found != exact.to(torch.bfloat16)).float().mean() < 0.01  # ties of float32 rounding at most
