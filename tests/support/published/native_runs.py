"""Runs that start from a published model which reads pictures at their own size, and records that show it some."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from data.collate import collate_packed
from model.batch import Batch
from model.multimodal import MultimodalLM
from model.published.table import find_layout
from tests.support.finals import one_process
from tests.support.published.asking import run_from
from tests.support.published.families import FAMILIES
from tests.support.published.native import NativeMaker
from tests.support.runs import merged
from trainer.config import RunConfig
from trainer.records.run_data import RunData, open_data
from trainer.runfile.merge_tables import value_of
from trainer.runfile.schema import to_tables
from trainer.runfile.stages import Stage
from trainer.setup import build_run

ODD_SIZES = (
    *((28, 1500), (1333, 777), (56, 56), (97, 61), (10, 10), (1500, 28)),
    *((33, 200), (640, 480), (7, 9), (101, 100), (300, 8), (1, 54)),
)
"""Width and height of pictures of odd shapes."""
PIXELS = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "image_sizes", "spatial_shapes")
"""Inputs of transformers' classes that belong to pictures."""
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
    """A round without pictures, then one with those of `parts`, words behind each."""
    words = [{"type": "text", "text": text} for text in (*(f"No. {i}" for i in range(len(parts) - 1)), "What?")]
    mixed = [item for pair in zip(parts, words, strict=True) for item in pair] if parts else words
    said = [("user", "Hello."), ("assistant", "Yes?"), ("user", None), ("assistant", "A cat.")]
    return {"messages": [{"role": role, "content": [{"type": "text", "text": text}] if text else mixed} for role, text in said]}


def odd_records(folder: Path) -> list[dict[str, Any]]:
    """Of pictures of all odd sizes, in turn one and two to a record, and a talk without any."""
    shown = iter([picture(folder, *size) for size in ODD_SIZES])
    return [talk(*(next(shown) for _ in range(count))) for count in (1, 2) * 4] + [talk()]


def few_records(folder: Path) -> list[dict[str, Any]]:
    """One and two pictures of odd shapes, and a talk without any."""
    shown = [picture(folder, *size) for size in ((1, 54), (28, 150), (97, 61))]
    return [talk(shown[0]), talk(), talk(*shown[1:])]


@dataclass(frozen=True)
class Theirs:
    """A folder of a family opened by transformers' own class and processor, in float32."""

    maker: NativeMaker
    theirs: Any
    reader: Any

    def inputs(self, record: dict[str, Any]) -> dict[str, Tensor]:
        """What transformers' processor makes of a record."""
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return dict(self.reader.apply_chat_template(record["messages"], **options))

    def prompt_inputs(self, records: list[dict[str, Any]], batch: Batch) -> dict[str, Tensor]:
        """What transformers' model reads of prompts that are padded on the left, `batch` being ours of the same records."""
        ids, mask = batch.input_ids, batch.attention_mask
        shown = [self.inputs(record) for record in records]
        held = {key: [inputs[key] for inputs in shown if key in inputs] for key in PIXELS}
        pixels = {key: joined(values, self.maker.joined_along) for key, values in held.items() if values}
        names = [name for name in ("mm_token_type_ids", "token_type_ids") if name in shown[0]]
        kinds = {name: (ids == self.theirs.config.image_token_id).int() for name in names}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask, **kinds, **pixels}

    def their_answers(self, records: list[dict[str, Any]], batch: Batch, length: int) -> list[list[int]]:
        """What transformers' model answers to the prompts, `length` ids each."""
        limits: dict[str, Any] = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "eos_token_id": None}
        with torch.no_grad():
            found = self.theirs.generate(**self.prompt_inputs(records, batch), **limits)
        answers: list[list[int]] = found[:, batch.input_ids.shape[1] :].tolist()
        return answers


def opened_by_transformers(maker: NativeMaker, folder: Path) -> Theirs:
    return Theirs(maker, maker.cls.from_pretrained(folder, dtype=torch.float32).eval(), maker.read(folder))


@dataclass(frozen=True)
class BothModels(Theirs):
    """A folder opened by a run of ours, all of which is tuned, and by transformers' own class and processor."""

    folder: Path
    data: RunData
    ours: MultimodalLM

    def batch(self, record: dict[str, Any]) -> Batch:
        """What a run makes of a record."""
        return self.data.processor([record], answers=True)

    def packed(self, records: list[dict[str, Any]]) -> Batch:
        """What a run makes of all in one packed row."""
        samples = [self.data.processor._sample(i, record, True, None, False) for i, record in enumerate(records)]
        return collate_packed(samples, self.data.pad_id)

    def own_name(self, name: str) -> str:
        """Our name of a parameter of transformers' model."""
        if (found := find_layout("test", str(self.folder))) is None:
            return name
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


def joined(tensors: list[Tensor], dim: int) -> Tensor:
    """Tensors one behind the other along `dim`, each filled up with zeros to the largest of them in all other dimensions."""
    sides = [max(tensor.shape[i] for tensor in tensors) for i in range(tensors[0].dim())]
    missing = [[0 if i == dim else side - tensor.shape[i] for i, side in enumerate(sides)] for tensor in tensors]
    pads = [[n for side in reversed(counts) for n in (0, side)] for counts in missing]
    return torch.cat([torch.nn.functional.pad(tensor, pad) for tensor, pad in zip(tensors, pads)], dim)


def both_models(name: str, folder: Path, output: Path, hub: bool = False, **settings: Any) -> BothModels:
    """Write the model of the family `name` into `folder`, and open it on both sides in float32. `settings` of [model]."""
    maker = FAMILIES[name]
    maker.write(folder, hub)
    config = run_from(folder, output, **merged(maker.sections(folder), {"model": {"dtype": "float32", **TUNED, **settings}}))
    resolved = to_tables(config)
    assert {key: value_of(resolved, key) for key in maker.settings} == maker.settings
    return BothModels(*vars(opened_by_transformers(maker, folder)).values(), folder, *built(config))


def assert_same_gradients(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    """Losses and gradients by name are equal to rounding, and no gradient is all zeros."""
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.any(), name
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=partial("{}: {}".format, name))
