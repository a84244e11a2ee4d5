"""Runs that start from a published model which reads pictures at their own size, and records that show it some."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from model.batch import Batch
from model.multimodal import MultimodalLM
from model.published.table import find_layout
from tests.support.finals import one_process
from tests.support.published.asking import run_from
from tests.support.published.native import NATIVE_MAKERS, NativeMaker, native_reader
from trainer.config import RunConfig
from trainer.records.run_data import RunData, open_data
from trainer.runfile.stages import Stage
from trainer.setup import build_run

SIZES = ((1, 54), (28, 1500), (1333, 777), (56, 56), (10, 10), (97, 61))
"""Width and height of pictures of odd shapes."""
TUNED = {part: {"tune": "full"} for part in ("llm", "vision", "vision_projector")}
HOLDERS = {"llm": ("llm.model.", "llm."), "vision": ("vision.tower.",), "vision_projector": ("vision_projector.",)}
"""Where the tensors of a published model's parts may stand in ours."""


def built(config: RunConfig) -> tuple[RunData, MultimodalLM]:
    """The run's data, and its model in eval mode."""
    with one_process() as world:
        data = open_data(config, world, first_start=True)
        return data, build_run(Stage(config, config), data, world).model.eval()


def picture(folder: Path, width: int, height: int) -> dict[str, str]:
    """A picture of noise, as a part of a message."""
    file = folder / f"{width}x{height}.png"
    Image.effect_noise((width, height), 90).convert("RGB").save(file)
    return {"type": "image", "path": str(file)}


def talk(*parts: dict[str, str]) -> dict[str, Any]:
    """A round without pictures, then one with those of `parts`, words between them."""
    words = [{"type": "text", "text": f"No. {i}"} for i in range(len(parts))]
    mixed = [item for pair in zip(parts, words) for item in pair]
    said = [("user", "Hello."), ("assistant", "Yes?"), ("user", None), ("assistant", "A cat.")]
    return {
        "messages": [
            {"role": role, "content": [{"type": "text", "text": text}] if text else [*mixed, {"type": "text", "text": "What?"}]}
            for role, text in said
        ]
    }


@dataclass(frozen=True)
class BothModels:
    """A published folder opened by a run of ours, all of which is tuned, and by transformers' own class and processor."""

    folder: Path
    data: RunData
    ours: MultimodalLM
    theirs: Any
    reader: Any

    def inputs(self, record: dict[str, Any]) -> dict[str, Tensor]:
        """What transformers' processor makes of a record."""
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        found: dict[str, Tensor] = self.reader.apply_chat_template(record["messages"], **options)
        return found

    def prompt_inputs(self, records: list[dict[str, Any]], batch: Batch) -> dict[str, Tensor]:
        """What transformers' model reads of prompts that are padded on the left, `batch` being ours of the same records."""
        ids, mask = batch.input_ids, batch.attention_mask
        shown = [self.inputs(record) for record in records]
        pixels = {
            key: torch.cat([found[key] for found in shown if key in found])
            for key in ("pixel_values", "image_grid_thw")
            if any(key in found for found in shown)
        }
        kinds = (ids == self.theirs.config.image_token_id).int()
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids) if mask is None else mask,
            "mm_token_type_ids": kinds,
            **pixels,
        }

    def own_name(self, name: str) -> str:
        """Our name of a parameter of transformers' model."""
        found = find_layout("test", str(self.folder))
        assert found is not None
        for part, view in found[0].parts.items():
            if (own := view.name_of(name)) is not None:
                return next(full for holder in HOLDERS[part] if (full := holder + own) in dict(self.ours.named_parameters()))
        raise AssertionError(f"{name} is no part of ours")

    def their_gradients(self, records: list[dict[str, Any]], batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
        """The summed loss of `records`, of which `batches` holds ours one by one, and its gradients by our names."""
        total = 0.0
        self.theirs.zero_grad()
        for record, batch in zip(records, batches, strict=True):
            labels = torch.nn.functional.pad(batch.labels, (1, 0), value=-100)[:, :-1]
            loss = self.theirs(**self.inputs(record), labels=labels).loss * batch.num_supervised
            loss.backward()
            total += loss.item()
        return total, {self.own_name(name): p.grad for name, p in self.theirs.named_parameters() if p.grad is not None}

    def our_gradients(self, batch: Batch) -> tuple[float, dict[str, Tensor]]:
        """The summed loss of a batch, and its gradients."""
        self.ours.zero_grad()
        loss = self.ours(batch)["text"].sum
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in self.ours.named_parameters() if p.grad is not None}


def both_models(name: str, folder: Path, output: Path, **settings: Any) -> BothModels:
    """Write the published model `name` into `folder`, and open it on both sides in float32. `settings` of [model]."""
    return both_of(NATIVE_MAKERS[name], folder, output, **settings)


def both_of(maker: NativeMaker, folder: Path, output: Path, **settings: Any) -> BothModels:
    """Write the published model of `maker` into `folder`, and open it as `both_models` does."""
    maker.write(folder, False)
    data, ours = built(run_from(folder, output, model={"init_from": str(folder), "dtype": "float32", **TUNED, **settings}))
    theirs = maker.cls.from_pretrained(folder, dtype=torch.float32).eval()
    return BothModels(folder, data, ours, theirs, native_reader(folder, maker))
