"""Published models as the start of a run: what transformers computes with a folder is what a run that starts from it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.batch import Batch
from model.multimodal import MultimodalLM
from model.published.transformers_names import LLM
from tests.support.finals import one_process
from tests.support.published import MAKERS, reader_of
from tests.support.published.asking import clip, question, run_from
from tools.exports.proofs import logits
from trainer.config import RunConfig
from trainer.records.run_data import RunData, open_data
from trainer.runfile.merge_tables import value_of
from trainer.runfile.schema import to_tables
from trainer.runfile.stages import Stage
from trainer.setup import build_run


def built(config: RunConfig) -> tuple[RunData, MultimodalLM]:
    """What a run of this configuration starts with."""
    with one_process() as world:
        data = open_data(config, world, first_start=True)
        return data, build_run(Stage(config, config), data, world).model.eval()


def their_inputs(folder: Path, cls: Any, record: dict[str, Any]) -> dict[str, Any]:
    """What the folder's own processor makes of the record."""
    reader = reader_of(folder, cls)
    if not hasattr(reader, "feature_extractor"):
        return dict(reader.apply_chat_template(record["messages"], tokenize=True, return_dict=True, return_tensors="pt"))
    text = reader.apply_chat_template(record["messages"], tokenize=False)
    return dict(reader(text=text, audio=[clip().numpy()], sampling_rate=16_000, return_tensors="pt"))


def check_media(batch: Batch, inputs: dict[str, Any]) -> None:
    if "image" in batch.media:
        assert torch.equal(inputs["pixel_values"].flatten(0, -4), batch.media["image"].values)
    else:
        torch.testing.assert_close(batch.media["audio"].values, inputs["input_features"], rtol=0, atol=1e-5)


def check_written_token_is_text(data: RunData, record: dict[str, Any]) -> None:
    """A person who writes the model's own placeholder means the word."""
    token = next(iter(data.processor.specs.values())).placeholder
    if token != "<image>":
        said = {**record["messages"][0], "content": [{"type": "text", "text": f"What is {token}?"}]}
        ids = data.processor([{"messages": [said, *record["messages"][1:]]}], answers=True).input_ids[0]
        assert token in data.processor.tokenizer.decode(ids).partition("Yes?")[0]


@pytest.mark.parametrize("name", MAKERS)
def test_ids_media_and_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    maker, folder = MAKERS[name], tmp_path / "published"
    maker.write(folder)
    config = run_from(folder, tmp_path / "run")
    resolved = to_tables(config)
    assert {key: value_of(resolved, key) for key in maker.settings} == maker.settings
    data, model = built(config)
    assert not data.card.tokens or all(token in data.processor.tokenizer.get_vocab() for token in data.card.tokens)
    assert data.card.vocabulary.new_ids == ()
    record = question(tmp_path, data.processor.specs)
    check_written_token_is_text(data, record)
    batch, inputs = data.processor([record], answers=True), their_inputs(folder, maker.cls, record)
    assert inputs["input_ids"].tolist() == batch.input_ids.tolist()
    check_media(batch, inputs)
    theirs = maker.cls.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(**inputs).logits[0]
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["language_model.model.model.", "language_model.model.", "model.language_model."])
def test_a_decoder_has_its_name_under_each_prefix(prefix: str) -> None:
    """Transformers 5.17 saves Qwen2-Audio with the first, the hub and 5.x have the others."""
    found = LLM.name_of(f"{prefix}layers.0.mlp.up_proj.weight")
    assert found is not None and found.removeprefix("model.") == "layers.0.mlp.up_proj.weight"
