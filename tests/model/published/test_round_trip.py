"""Published models in and out again: exported for the class that they came from, untrained, they are the same bit for bit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.published.table import find_layout
from tests.model.published.test_come_in import built, question, run_from
from tests.support.finals import one_process
from tests.support.published import MAKERS
from tools.export_adapter import main as export
from tools.exports.proofs import logits
from trainer.checkpoint.write_final import write_final

NOT_READ = re.compile(r"vision\.(post_layernorm\.|head\.|encoder\.layers?\.2\.)")
"""Of a tower: its pooling, and blocks behind the layer that is read."""


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor by part and by the name that it has there."""
    found = find_layout("test", str(folder))
    assert found is not None
    layout, files = found[0], load_file(folder / "model.safetensors")
    named = {}
    for name, rows in files.items():
        ((part, own),) = [(part, own) for part, view in layout.parts.items() if (own := view.name_of(name)) is not None]
        named[f"{part}.{own.removeprefix('model.')}"] = rows
    return named


@pytest.mark.parametrize("name", [name for name in MAKERS if name.endswith("5.x")])
def test_out_again_without_training_it_is_the_same(tmp_path: Path, name: str) -> None:
    folder, out = tmp_path / "published", tmp_path / "out"
    MAKERS[name].write(folder)
    config = run_from(folder, tmp_path / "run")
    data, model = built(config)
    with one_process() as world:
        final = write_final(model, data.card, data.processor, tmp_path / "run", 0, world)
    assert export([str(final), str(out), "--for", "hf"]) == 0
    before, after = tensors(folder), tensors(out)
    assert after.keys() <= before.keys()
    assert all(torch.equal(before[key], rows) for key, rows in after.items())
    assert all(NOT_READ.match(key) for key in before.keys() - after.keys())
    again, reopened = built(run_from(out, tmp_path / "again"))
    record = question(tmp_path, data.processor.specs)
    batch, other = (one.processor([record], answers=True) for one in (data, again))
    assert batch.input_ids.tolist() == other.input_ids.tolist()
    assert torch.equal(logits(model, batch), logits(reopened, other))
