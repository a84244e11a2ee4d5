"""Sources of a few records with pictures of one grey each, so that a picture is known by its pixels."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken

from data.config import DataConfig, SourceConfig
from data.dataset import MultimodalDataset, Sample, open_dataset
from data.text.template import Template, TemplateOptions, load_template
from model.media_spec import ImageSpec
from tests.support.tiny_tokenizers import tiny_tokenizer

SPEC = ImageSpec(16, 8, 1, "patch", "shortest_edge", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
SPECS = {"image": SPEC}
WIDTH = 4  # tokens of a picture


def template(**options: Any) -> Template:
    return load_template("auto", tiny_tokenizer("qwen"), TemplateOptions(**options))


def hearing_template() -> Template:
    """The same for a model that has a part for sound."""
    tokenizer = copy.deepcopy(tiny_tokenizer("qwen"))
    tokenizer.add_tokens([AddedToken("<audio>", special=True, normalized=False)], special_tokens=True)
    return load_template("auto", tokenizer)


def image_id() -> int:
    return template().placeholder_ids["image"]


def talk(*contents: str, images: list[str] | str | None = None, id: str | None = None) -> dict[str, Any]:
    """A record of `contents`, said in turn by the human and the model."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": content} for i, content in enumerate(contents)]
    record: dict[str, Any] = {"conversations": turns}
    return record | ({} if images is None else {"image": images}) | ({} if id is None else {"id": id})


def grey(folder: Path, level: int) -> str:
    """The name of a picture whose bytes are all `level`."""
    name = f"{level}.png"
    Image.new("RGB", (20, 20), (level, level, level)).save(folder / name)
    return name


def level(values: torch.Tensor) -> int:
    """The grey of pixels (3, S, S), whose values must all be equal."""
    assert values.shape == (3, SPEC.size, SPEC.size) and bool((values == values.flatten()[0]).all())
    return round(float(values.flatten()[0] * SPEC.std[0] + SPEC.mean[0]) * 255)


def source(folder: Path, records: list[Any], name: str = "mix") -> SourceConfig:
    path = folder / f"{name}.jsonl"
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return SourceConfig(str(path), media_root=str(folder))


def dataset(folder: Path, records: list[Any], excluded: frozenset[int] = frozenset(), **config: Any) -> MultimodalDataset:
    return datasets(folder, {"mix": records}, excluded, **config)


def datasets(folder: Path, named: dict[str, list[Any]], excluded: frozenset[int] = frozenset(), **config: Any) -> MultimodalDataset:
    sources = tuple(source(folder, records, name) for name, records in named.items())
    data = open_dataset(sources, DataConfig(**config), template(), SPECS, folder / "index")
    data.exclude(excluded)
    return data


def sample(data: MultimodalDataset, i: int) -> Sample:
    item = data[i]
    assert isinstance(item, Sample), item
    return item
