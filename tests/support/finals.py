"""Runs that ended, without having trained: tiny models with weights moved away from their start, written as the trainer writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.config import DataConfig
from data.processor import Processor
from data.text.template import TemplateOptions, load_template
from data.text.tokenizer import load_tokenizer, pad_id, save_tokenizer
from model.build import DTYPES, assemble
from model.card import ModelCard, base_digests, make_card, media_specs, write_card
from model.config import LlmConfig, LoraConfig, ModelConfig, QuantizeConfig, VisionConfig, VisionProjectorConfig
from model.files.manifest import write_manifest
from model.files.shards import WEIGHTS, write_shard
from model.llm.causal_lm import VocabularyLayout
from model.multimodal import MultimodalLM
from model.weights.materialise import materialise
from model.weights.origins import weight_layers
from tests.support.tiny import save_llm, save_tower
from tests.support.tiny_tokenizers import NAMES
from trainer.checkpoint.write_final import FinalRun, write_final
from trainer.distributed.world import World
from trainer.records.vocabulary import tuned_ids

NO_LORA = LoraConfig(rank=2, dropout=0.0)


@dataclass(frozen=True)
class Run:
    card: ModelCard
    model: MultimodalLM  # training mode, its weights are those of the run's end
    processor: Processor


def save_parts(folder: Path, family: str = "qwen2", tower: str = "clip", tokenizer: str = "qwen", **overrides: Any) -> Path:
    """folder/llm with a tokenizer whose every id has a row, folder/vision."""
    made = NAMES[tokenizer]()
    save_llm(folder / "llm", family, **{"vocab_size": len(made), **overrides})
    save_tokenizer(made, folder / "llm")
    save_tower(folder / "vision", tower)
    return folder


def config_of(parts: Path, llm: str = "lora", vision: str = "frozen", **options: Any) -> ModelConfig:
    """`options`: layer, select, kind, projector (its tune), and settings of [model]."""
    tower = VisionConfig(str(parts / "vision"), vision, options.pop("layer", -2), options.pop("select", "patch"))  # type: ignore[arg-type]
    projector = VisionProjectorConfig(options.pop("kind", "mlp2x_gelu"), options.pop("projector", "full"), options.pop("path", ""))
    return ModelConfig(LlmConfig(str(parts / "llm"), llm), tower, projector, **{"dtype": "float32", **options})  # type: ignore[arg-type]


WHOLE = QuantizeConfig()


def build(config: ModelConfig, lora: LoraConfig = NO_LORA, seed: int = 3, quantize: QuantizeConfig = WHOLE, **data: Any) -> Run:
    """A model as a run starts with it."""
    specs = media_specs(config)
    vocabulary = load_tokenizer(config.llm.path, ("<image>", *(["<audio>"] if "audio" in specs else []), *config.llm.new_tokens))
    settings = DataConfig(**data)
    template = load_template(
        settings.template,
        vocabulary.tokenizer,
        TemplateOptions(placeholders=settings.placeholders, media_wrap=settings.media_wrap, allowed=config.llm.new_tokens),
    )
    card = make_card(
        config,
        lora,
        VocabularyLayout(len(vocabulary.tokenizer), vocabulary.num_known, vocabulary.new_ids, tuned_ids(config.llm, vocabulary)),
        quantize=quantize,
    )
    card = replace(card, stop_ids=template.stop_ids, pad_id=pad_id(vocabulary.tokenizer), bases=base_digests(config))
    model = assemble(card, DTYPES[config.dtype])
    materialise(model, weight_layers(card, model, seed), frozen_dtype=model.dtype, device=torch.device("cpu"))
    return Run(card, model, Processor(template, specs, settings))


def trained(config: ModelConfig, lora: LoraConfig = NO_LORA, seed: int = 3, **data: Any) -> Run:
    """The same after training: everything that learns has moved, LoRA's B away from zero."""
    run = build(config, lora, seed, **data)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(trainable(run.model).items()):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return run


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_final(run: Run, folder: Path) -> Path:
    """folder/final, by the trainer's own writer."""
    with one_process() as world:
        return write_final(run.model, FinalRun(run.card, run.processor, folder, 1), world)


def save_checkpoint(run: Run, folder: Path, num_ranks: int = 2, step: int = 7) -> Path:
    """folder/checkpoint-`step` as `num_ranks` ranks would have written it, moments included."""
    target = folder / f"checkpoint-{step}"
    target.mkdir(parents=True)
    named = {}
    for name, parameter in trainable(run.model).items():
        value = parameter.detach()
        named |= {WEIGHTS + name: value, f"exp_avg/{name}": value * 0.5, f"exp_avg_sq/{name}": value.square()}
    for rank in range(num_ranks):
        write_rows(target, rank, num_ranks, named)
    write_card(run.card, target)
    run.processor.save(target)
    write_manifest(target, {"step": step, "run_id": "test"})
    return target


def write_rows(folder: Path, rank: int, num_ranks: int, tensors: dict[str, Tensor]) -> None:
    """The rows that `rank` of `num_ranks` holds of each tensor; none of small ones on late ranks."""
    shares = {}
    layout = {}
    for name, tensor in tensors.items():
        chunk = -(-tensor.shape[0] // num_ranks)
        rows = tensor[rank * chunk : (rank + 1) * chunk]
        if rows.shape[0]:
            shares[name] = rows.contiguous()
            layout[name] = {"first": rank * chunk, "shape": list(tensor.shape)}
    write_shard(folder, rank, num_ranks, shares)
    path = folder / f"rank-{rank:05d}-of-{num_ranks:05d}.json"
    path.write_text(json.dumps(layout))


@contextmanager
def one_process() -> Iterator[World]:
    """A process group of this process alone, which collectives ask for."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(0, 0, 1, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def values(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
