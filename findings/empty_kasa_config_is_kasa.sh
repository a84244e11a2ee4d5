#!/usr/bin/env bash
# One pair of empty braces in adapter_config.json turns a plain LoRA adapter into another one, drawn anew at each load.
#
# Versions  peft 0.21.2, torch 2.13.0, transformers 5.23.0, accelerate 1.15.0, safetensors 0.8.0, numpy 2.4.6
# Guess     `"kasa_config": {}` says nothing, like `"rank_pattern": {}` and `"alpha_pattern": {}`, which PEFT itself writes
#           into every LoRA's file. The adapter loads as the plain LoRA that it is.
# Instead   Only null is nothing. From an empty dictionary PEFT builds a KasaConfig with its default values, so that:
#             - the smallest r singular values of the base weight are cut off, and `unload()` does not bring them back;
#             - the update becomes B diag(d) A. The file has no d, so d is drawn at random: the same files loaded twice
#               make two different models. The one sign is PEFT's usual warning about missing keys.
# Seen      null     same as saved: True; base after unload: rank 8, unchanged
#           {}       same as saved: False; base after unload: rank 6, changed
#           {} twice same as each other: False
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet peft==0.21.2 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 \
    safetensors==0.8.0 numpy==2.4.6

cd "$work"
venv/bin/python - <<'PYTHON'
import json
import warnings
from pathlib import Path

import torch
from peft import KasaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

SIZE, RANK = 8, 2
torch.manual_seed(0)
weight = torch.randn(SIZE, SIZE)
probe = torch.eye(SIZE)


def base():
    model = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False))
    model[0].weight.data.copy_(weight)
    return model


plain = get_peft_model(base(), LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False))
plain.save_pretrained("adapter")
with torch.no_grad():
    saved = plain(probe)

path = Path("adapter/adapter_config.json")
fields = json.loads(path.read_text())
assert fields["kasa_config"] is None
assert fields["rank_pattern"] == {} and fields["alpha_pattern"] == {}


def load(kasa):
    """What the loaded model answers, its KaSA settings, the base weight once the adapter is gone, and the warnings."""
    path.write_text(json.dumps({**fields, "kasa_config": kasa}))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base(), "adapter")
    with torch.no_grad():
        answer = model(probe)
    settings = model.peft_config["default"].kasa_config
    return answer, settings, model.unload()[0].weight.detach(), [str(warning.message) for warning in told]


answer, settings, left, told = load(None)
print(f"null     same as saved: {torch.equal(answer, saved)}; base after unload: rank 8, unchanged")
assert torch.equal(answer, saved) and settings is None and torch.equal(left, weight) and not told
assert torch.linalg.matrix_rank(left) == SIZE

first, settings, left, told = load({})
print(f"{{}}       same as saved: {torch.allclose(first, saved)}; base after unload: rank 6, changed")
assert not torch.allclose(first, saved, atol=1e-3)
assert settings == KasaConfig()
assert not torch.allclose(left, weight, atol=1e-3) and torch.linalg.matrix_rank(left) == SIZE - RANK
assert len(told) == 1 and "missing adapter keys" in told[0] and "lora_diag" in told[0]

second, _, again, _ = load({})
print(f"{{}} twice same as each other: {torch.allclose(first, second)}")
assert not torch.allclose(first, second, atol=1e-3)
assert torch.allclose(left, again)  # the cut is the same; the drawn diagonal is not
PYTHON
