#!/usr/bin/env bash
# A Qwen3-VL with experts that transformers 4.57 saved opens with one of its two expert matrices transposed where that is square.
#
# Versions  transformers 4.57.1 (writes) and 5.23.0 (reads), torch 2.13.0
# Guess     4.57 keeps the matrices of experts lying on their side, (experts, width, 2 x hidden) and (experts, hidden, width); 5.x
#           turns them as it opens the file. It knows the family, and both matrices of a file lie the same way: both are turned.
# Instead   5.23 turns a matrix only if its shape is not the expected one, each by itself. Where twice the experts' hidden width is
#           the width of the model, gate_up_proj is taken as it lies; where the hidden width is that width, down_proj is. The other
#           one is turned. No warning, no missing or unexpected key; with shapes of which none is square all is as saved.
# Seen      width 32, experts of 8: both turned; of 16: gate_up_proj as it lies, down_proj turned; of 32: gate_up_proj turned,
#           down_proj as it lies.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > experts.py <<'PYTHON'
import sys

import torch
from safetensors.torch import load_file
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

WIDTH = 32
TEXT = {
    "vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
    "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]},
}
VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH, "patch_size": 4,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}


def write(folder, hidden):
    torch.manual_seed(0)
    config = Qwen3VLMoeConfig(text_config=TEXT | {"moe_intermediate_size": hidden}, vision_config=VISION)
    Qwen3VLMoeForConditionalGeneration(config).save_pretrained(folder)


def read(folder):
    """Return how each matrix of the opened model lies beside the file's."""
    model, info = Qwen3VLMoeForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    saved, found = load_file(f"{folder}/model.safetensors"), {}
    for name in ("gate_up_proj", "down_proj"):
        opened = getattr(model.model.language_model.layers[0].mlp.experts, name)
        (key,) = [key for key in saved if key.endswith(f"experts.{name}")]
        same = opened.shape == saved[key].shape and torch.equal(opened, saved[key])
        assert same or torch.equal(opened, saved[key].mT)
        found[name] = "as it lies" if same else "turned"
    return found


expected = {8: ("turned", "turned"), 16: ("as it lies", "turned"), 32: ("turned", "as it lies")}
for hidden, (gate, down) in expected.items():
    if sys.argv[1] == "write":
        write(f"experts-{hidden}", hidden)
    else:
        found = read(f"experts-{hidden}")
        print(f"width {WIDTH}, experts of {hidden}: gate_up_proj {found['gate_up_proj']}, down_proj {found['down_proj']}")
        assert found == {"gate_up_proj": gate, "down_proj": down}, "the behaviour has changed"
PYTHON
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy
venv/bin/pip install --quiet transformers==4.57.1
venv/bin/python experts.py write 2> /dev/null
venv/bin/pip install --quiet transformers==5.23.0
venv/bin/python experts.py read 2> /dev/null
