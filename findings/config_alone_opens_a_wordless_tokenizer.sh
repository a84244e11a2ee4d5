#!/usr/bin/env bash
# AutoTokenizer, given a folder with a config.json and no tokenizer, returns one that turns every text into nothing.
#
# Versions  transformers 5.23.0, tokenizers 0.23.3
# Guess     A model folder that was copied without its tokenizer's files raises, as it does for a Llama's.
# Instead   For qwen2, gpt2, gpt_neox and olmo a tokenizer is made of no vocabulary at all. It has a fast backend and special
#           tokens, answers every call without a warning, and returns an empty list of ids for any sentence. For gemma and bert it
#           has special tokens alone, and any sentence is unknown. Training code that counts tokens sees records of length zero.
# Seen      qwen2: 1 token, "The cat sat." -> []; gemma: 5 tokens, "The cat sat." -> unknown; llama raises ValueError.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3

cd "$work"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import json
import pathlib

from transformers import AutoTokenizer

SENTENCE = "The cat sat."


def opened(family):
    """Return the tokenizer of a folder that holds nothing but the name of the model's family."""
    folder = pathlib.Path(family)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return AutoTokenizer.from_pretrained(folder)


for family in ("qwen2", "gpt2", "gpt_neox", "olmo"):
    tokenizer = opened(family)
    ids = tokenizer(SENTENCE).input_ids
    print(f"{family}: {type(tokenizer).__name__}, fast: {tokenizer.is_fast}, {len(tokenizer)} tokens, {SENTENCE!r} -> {ids}")
    assert tokenizer.is_fast and ids == [], "it is refused, or reads the text, now"
gemma = opened("gemma")
ids = gemma(SENTENCE, add_special_tokens=False).input_ids
print(f"gemma: {len(gemma)} tokens, {SENTENCE!r} -> {gemma.convert_ids_to_tokens(ids)}")
assert set(ids) == {gemma.unk_token_id}
try:
    opened("llama")
except ValueError as error:
    print(f"llama: ValueError: {str(error).splitlines()[0]}")
else:
    raise AssertionError("a Llama's folder opens as well now")
PYTHON
