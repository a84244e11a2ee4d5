"""In and out without training: a published model that comes in leaves as the same tensors, bit for bit, and the same prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.processor import load_processor
from model.exports.hf_classes import CLASSES
from tests.support.published import MAKERS
from tests.support.published.asking import question
from tools.export_adapter import main as export
from tools.exports.hf_inputs import open_processor
from tools.exports.proofs import batch_of
from tools.import_model import main as import_model

QUICK = ("LlavaNext", "InternVL", "Qwen2Audio")
NAMES = [name if name.startswith(QUICK) else pytest.param(name, marks=pytest.mark.long) for name in MAKERS if name.endswith("hub")]


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_in_goes_out_again_bit_for_bit(tmp_path: Path, name: str) -> None:
    maker, source, out = MAKERS[name], tmp_path / "published", tmp_path / "out"
    maker.write(source)
    assert import_model([str(source), str(tmp_path / "ours")]) == 0
    assert export([str(tmp_path / "ours"), str(out), "--for", "hf"]) == 0
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    pooling = "vision_tower.vision_model.head."  # no folder on the hub has it, and no class that sees reads it
    before = {name: rows for name, rows in before.items() if not name.startswith(pooling)}
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    processor: Any = load_processor(tmp_path / "ours")
    record = question(tmp_path, processor.specs)
    target = next(target for target in CLASSES if target.name == maker.cls.__name__)
    theirs = open_processor(out, target).apply_chat_template(record["messages"], tokenize=False)
    batch = batch_of(processor, record)
    token = processor.specs[target.modality].placeholder
    ours = processor.tokenizer.decode(batch.input_ids[0])
    assert theirs.replace(token, "") == ours.replace(token, "").replace("<img></img>", "")
