"""Adapters travel to PEFT and back without a tensor lost, and what would mean something else here is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data.text.tokenizer import load_tokenizer
from model.config import LoraConfig
from model.errors import ConfigError
from tests.support.finals import NO_LORA, build, config_of, same, save_checkpoint, save_final, save_parts, trained, values
from tests.support.lora import LINEAR, logits
from tools.export_adapter import main as export


@pytest.mark.parametrize("save", [save_final, save_checkpoint])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_an_exported_adapter_is_the_same_model_in_peft(tmp_path: Path, bias: Any, save: Any) -> None:
    lora = LoraConfig(rank=4, alpha=8, dropout=0.0, bias=bias, rslora=True, targets=("llm.*.q_proj", "llm.*.down_proj"))
    run = trained(config_of(save_parts(tmp_path, vocab_size=448)), lora)
    assert export([str(save(run, tmp_path)), str(tmp_path / "out"), "--for", "peft"]) == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llm", dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(base, str(tmp_path / "out"))
    known = run.card.vocabulary.num_known  # rows of new tokens are in no adapter
    found, expected = logits(wrapped.eval())[:, :known], logits(run.model.eval())[:, :known]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    wrapped.save_pretrained(str(tmp_path / "again"))  # PEFT writes the same keys: none was missing and none was ignored
    same(load_file(tmp_path / "again" / "adapter_model.safetensors"), stored)
    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    assert all(target.startswith("model.layers.") for target in targets) and len(targets) == 4


def test_a_tower_beside_the_language_model_gets_nothing_in_peft(tmp_path: Path) -> None:
    parts = save_parts(tmp_path, vocab_size=448)
    export([str(save_final(trained(config_of(parts)), tmp_path)), str(tmp_path / "out"), "--for", "peft"])

    both = AutoModelForCausalLM.from_pretrained(parts / "llm")
    both.vision_tower = build(config_of(parts)).model.get_submodule("vision.tower")
    wrapped = peft.PeftModel.from_pretrained(both, str(tmp_path / "out"))
    found = {n for n, _ in wrapped.named_parameters() if "lora_" in n}
    assert len(found) == 2 * 2 * len(LINEAR) and not any("vision_tower" in n for n in found)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_training_goes_on_from_a_peft_folder_and_from_ours(tmp_path: Path, bias: Any) -> None:
    lora = LoraConfig(rank=4, alpha=8, dropout=0.0, bias=bias)
    parts = save_parts(tmp_path, vocab_size=448)
    run = trained(config_of(parts), lora)
    folder = save_final(run, tmp_path)
    export([str(folder), str(tmp_path / "ours")])
    export([str(folder), str(tmp_path / "exported"), "--for", "peft"])
    base = AutoModelForCausalLM.from_pretrained(parts / "llm", dtype=torch.float32)
    peft.PeftModel.from_pretrained(base, str(tmp_path / "exported")).save_pretrained(str(tmp_path / "peft"))
    expected = {name: value for name, value in values(run.model).items() if name.startswith("llm.")}
    for path in ("ours", "ours/lora.safetensors", "exported", "peft", "final"):
        started = build(config_of(parts), replace(lora, path=str(tmp_path / path)), seed=9)
        same({n: v for n, v in values(started.model).items() if n.startswith("llm.")}, expected)


def test_an_adapter_that_would_mean_something_else_here_is_refused(tmp_path: Path) -> None:
    parts = save_parts(tmp_path)
    export([str(save_final(trained(config_of(parts)), tmp_path)), str(tmp_path / "peft"), "--for", "peft"])
    export([str(tmp_path / "final"), str(tmp_path / "ours")])

    def refused(path: str, reason: str, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=reason):
            build(config_of(parts), replace(NO_LORA, path=str(tmp_path / path), **changes))

    for path in ("peft", "ours", "ours/lora.safetensors", "final"):
        refused(path, r"rank = 2, but lora\.rank = 3", rank=3)
        refused(path, r"alpha = 16(\.0)?, but lora\.alpha = 8", alpha=8)
        refused(path, r"rslora = False, but lora\.rslora = True", rslora=True)
        refused(path, r"also has llm\.model\.layers\.0\.mlp\.down_proj\.lora_A", targets=("llm.*.q_proj",))
    (tmp_path / "peft" / "non_lora_trainables.bin").touch()
    refused("peft", r"non_lora_trainables\.bin as well, with the projector .* model\.vision_projector\.path = ")
    (tmp_path / "peft" / "non_lora_trainables.bin").rename(tmp_path / "peft" / "lora.safetensors")
    refused("peft", "two adapters")
    (tmp_path / "peft" / "lora.safetensors").unlink()
    refused("peft/adapter_model.safetensors", r"rank = 2, but lora\.rank = 3", rank=3)
    refused("nowhere", "neither a PEFT folder nor a lora.safetensors")
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    dropped = next(name for name in stored if "up_proj.lora_B" in name)
    save_file({n: t for n, t in stored.items() if n != dropped}, tmp_path / "peft" / "adapter_model.safetensors")
    refused("peft", r"has no llm\..*up_proj\.lora_B")
    file = tmp_path / "peft" / "adapter_config.json"
    config = json.loads(file.read_text())
    for changes in ({"use_dora": True}, {"alpha_pattern": {"q_proj": 2}}, {"modules_to_save": ["lm_head"]}):
        file.write_text(json.dumps({**config, **changes}))
        refused("peft", f"uses {next(iter(changes))} = ")
    file.write_text(json.dumps({k: v for k, v in config.items() if k != "lora_alpha"}))
    refused("peft", "alpha = 8, but")  # PEFT's own default
    file.write_text(json.dumps({**config, "peft_type": "IA3"}))
    refused("peft", "is a IA3 adapter")


def test_an_adapter_on_what_an_earlier_run_trained_comes_with_its_base(tmp_path: Path) -> None:
    """Full tuning, then LoRA by init_from: on the original base the adapter would be wrong without a word."""
    parts = save_parts(tmp_path / "parts")
    first = trained(config_of(parts, "full"))
    second = trained(config_of(parts, "lora", init_from=str(save_final(first, tmp_path / "first"))), seed=5)
    final = save_final(second, tmp_path / "second")
    assert export([str(final), str(tmp_path / "out"), "--for", "peft"]) == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base", dtype=torch.float32)
    assert load_tokenizer(str(tmp_path / "out" / "base"), ()).tokenizer.get_vocab() == second.processor.tokenizer.get_vocab()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "out" / "base")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = second.model.eval().llm(input_ids=ids).logits  # type: ignore[operator]
        found = peft.PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
