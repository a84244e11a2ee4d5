#!/usr/bin/env bash
# A config.json with the language model's keys at its top is read by transformers 5.17, and by 5.24 as a model of default size.
#
# Versions  transformers 5.17.0 and 5.24.0 with numpy 2.4.6; torch is not needed
# Guess     A vision-language config without `text_config` has its language model's keys at the top, as the first releases of such
#           models had. What one minor release reads, the next ones read too, or say that they no longer do.
# Instead   Five families lost it in between: ernie4_5_vl_moe, glm4v, glm4v_moe, glm_image, glm_ocr. 5.24 keeps each key as an
#           attribute that no model reads, and fills in a language model of the class's default size, another rope base and a share
#           of each head that turns which is no longer 0.5. Nothing is raised. qwen2_vl and qwen2_5_vl read the same form in both.
# Seen      5.17.0 glm4v: 64 wide, 3 layers, theta 12345.0, share 0.5
#           5.24.0 glm4v: 4096 wide, 40 layers, theta 10000.0, share None; config.hidden_size = 64
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

cat > read.py <<'PYTHON'
import importlib.metadata
import logging
import sys

from transformers import CONFIG_MAPPING

logging.disable(logging.WARNING)
reads = sys.argv[1] == "reads"
LOST = ("ernie4_5_vl_moe", "glm4v", "glm4v_moe", "glm_image", "glm_ocr")
KEPT = ("qwen2_vl", "qwen2_5_vl")
version = importlib.metadata.version("transformers")

for kind in LOST + KEPT:
    text = CONFIG_MAPPING[kind].from_dict({"model_type": kind, "hidden_size": 64, "vocab_size": 500}).text_config
    assert ((text.hidden_size, text.vocab_size) == (64, 500)) == (reads or kind in KEPT), (version, kind, text)

flat = {"model_type": "glm4v", "hidden_size": 64, "num_hidden_layers": 3, "rope_theta": 12345.0, "partial_rotary_factor": 0.5}
whole = CONFIG_MAPPING["glm4v"].from_dict(flat)
text, rope = whole.text_config, whole.text_config.rope_parameters
share = rope.get("partial_rotary_factor")
unread = "" if reads else f"; config.hidden_size = {whole.hidden_size}"
print(
    f"{version} glm4v: {text.hidden_size} wide, {text.num_hidden_layers} layers, theta {rope['rope_theta']}, share {share}{unread}"
)
expected = (64, 3, 12345.0, 0.5) if reads else (4096, 40, 10000.0, None)
assert (text.hidden_size, text.num_hidden_layers, rope["rope_theta"], share) == expected
assert whole.hidden_size == 64  # also where the language model is 4096 wide
PYTHON

for pair in "5.17.0 reads" "5.24.0 drops"; do
    read -r version what <<< "$pair"
    python3 -m venv "$version"
    "$version/bin/pip" install --quiet "transformers==$version" numpy==2.4.6
    "$version/bin/python" read.py "$what"
done
