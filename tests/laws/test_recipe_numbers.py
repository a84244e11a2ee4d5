"""Every shipped recipe is what its script says: what learns at which rate, and how; and it says which script that is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.config import violations
from trainer.config import RunConfig
from trainer.optim import learning_rates
from trainer.runfile.load import load_run
from trainer.runfile.stages import list_stages
from trainer.runfile.toml_files import read_toml
from trainer.trial.reachable_parts import with_reachable

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))


class Numbers(NamedTuple):
    """What a script trains: parts with their rates, samples per step, longest sample, template, and how pictures are fitted."""

    learns: dict[str, tuple[str, float]]
    batch: int
    length: int
    template: str
    fit: str
    epochs: float = 1.0
    schedule: str = "cosine"
    warmup: float = 0.03
    order: str = "modality_length"


def full(rate: float, *parts: str) -> dict[str, tuple[str, float]]:
    return dict.fromkeys(parts, ("full", rate))


def lora(rate: float, projector: float = 0.0) -> dict[str, tuple[str, float]]:
    return {"llm": ("lora", rate), "vision_projector": ("full", projector or rate)}


BOTH = ("llm", "vision_projector")
ALL = {**full(1e-5, *BOTH), "vision": ("full", 2e-6)}
QWEN_CHAT = {"epochs": 5.0, "schedule": "linear", "warmup": 0.0, "order": "random"}
FIRST = Numbers(full(1e-3, "vision_projector"), 256, 2048, "plain", "square", order="random")
VITA = {"template": "vita_qwen", "fit": "tiles", "order": "random"}
VITA_1 = {"template": "vita_mixtral", "fit": "tiles", "order": "random"}
PUBLISHED: dict[str, Numbers] = {
    "llava15_pretrain": FIRST,
    "llava15_finetune": Numbers(full(2e-5, *BOTH), 128, 2048, "vicuna_v1", "pad"),
    "llava15_lora": Numbers(lora(2e-4, 2e-5), 128, 2048, "vicuna_v1", "pad"),
    "llava15_task": Numbers(full(2e-5, *BOTH), 128, 2048, "vicuna_v1", "pad"),
    "llava15_task_lora": Numbers(lora(2e-4, 2e-5), 128, 2048, "vicuna_v1", "pad"),
    "llava15_task_qlora": Numbers(lora(2e-5), 128, 2048, "vicuna_v1", "pad"),
    "trainllava_lora": Numbers(lora(4e-4), 192, 2048, "auto", "square", **QWEN_CHAT),
    "trainllava_full": Numbers(full(2e-5, *BOTH, "vision"), 192, 2048, "auto", "square", **QWEN_CHAT),
    "trainllava_freeze_vision": Numbers(full(2e-5, *BOTH), 192, 2048, "auto", "square", **QWEN_CHAT),
    "internvl_llava_pretrain": FIRST,
    "internvl_llava_finetune": Numbers(full(2e-5, *BOTH), 128, 2048, "vicuna_v1", "pad"),
    "llava15_dpo": Numbers({"llm": ("lora", 1e-5)}, 8, 2048, "vicuna_v1", "pad", 0.0, warmup=0.05, order="random"),
    "internvl_mpo": Numbers(full(5e-6, *BOTH, "vision"), 256, 8192, "auto", "tiles", order="random"),
    "llava_next/align": FIRST._replace(length=8192),
    "llava_next/finetune": Numbers(ALL, 128, 8192, "auto", "anyres"),
    "llava_onevision/align": FIRST._replace(batch=512, length=8192),
    **{
        f"llava_onevision/{name}": Numbers(ALL, 256, 16384, "auto", "anyres") for name in ("knowledge", "single_image", "onevision")
    },
    "tinyllava/pretrain": FIRST,
    "tinyllava/finetune": Numbers(full(2e-5, *BOTH), 128, 2048, "vicuna_v1", "square"),
    "vita10_mixtral/align_vision": Numbers(full(5e-4, "vision_projector"), 128, 6200, **VITA_1),
    "vita10_mixtral/together": Numbers(full(2e-5, *BOTH, "audio_projector"), 640, 6200, **VITA_1),
    "vita10_mixtral/task": Numbers(full(2e-5, *BOTH, "audio_projector"), 768, 9100, **VITA_1),
    "vita_progressive/align_vision": Numbers(full(5e-4, "vision_projector"), 128, 6200, **VITA),
    "vita_progressive/see": Numbers({**full(2e-5, *BOTH), "vision": ("full", 2e-6)}, 128, 6200, **VITA),
    "vita_progressive/see_task": Numbers(full(2e-5, *BOTH), 128, 6200, **VITA),
    "vita_progressive/hear": Numbers(full(5e-4, "audio_projector"), 128, 6200, **VITA),
    "vita_progressive/negative_audio": Numbers(full(1e-5, *BOTH, "audio_projector"), 128, 6200, **VITA),
    "vita_progressive/duplex": Numbers({"audio_projector": ("prompts", 1e-4), "state_head": ("full", 1e-4)}, 128, 6200, **VITA),
}
"""Numbers of the scripts that the recipes name, but where a recipe's head says that they are its own."""
OWN = {"one_gpu_lora", "one_gpu_3b_24gb", "full_72b_64gpus", "qwen2_5_vl_3b_lora"}
LORA = {"trainllava_lora": (32, 8, 0.05, 4), "llava15_lora": (128, 256, 0.05, 0), "llava15_task_lora": (128, 256, 0.05, 0)}
LORA["llava15_task_qlora"] = (64, 16, 0.05, 0)
LORA["llava15_dpo"] = (64, 16, 0.0, 0)
"""Rank, alpha, dropout, and the number of patterns of layers; 0 = all linear ones."""


def resolved(name: str, folder: Path) -> RunConfig:
    """A recipe with folders of JSON in place of models that cannot be reached."""
    return load_run(f"recipe:{name}", (), lambda tables: with_reachable(tables, folder, {}))[0]


def numbers(config: RunConfig) -> Numbers:
    rates, data, optim = learning_rates(config.model, config.optim), config.data, config.optim
    learns = {name: (part.tune, rates[name]) for name, part in config.model.parts().items() if part.tune != "frozen"}
    warmup, epochs = optim.warmup_ratio or optim.warmup_steps or 0.0, config.train.epochs or 0.0
    batch = config.batch.global_batch_size
    return Numbers(learns, batch, data.max_length, data.template, data.image_fit, epochs, optim.schedule, warmup, data.order)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_what_its_script_does(tmp_path: Path, name: str) -> None:
    root = resolved(name, tmp_path)
    found = {f"{name}/{stage.name}".rstrip("/"): numbers(stage.config) for stage in list_stages(root)}
    expected = {key: value for key, value in PUBLISHED.items() if key.partition("/")[0] == name}
    assert expected or name in OWN
    assert root.output_dir == f"runs/{name}"
    assert not expected or found == expected
    assert all(stage.config.optim.weight_decay == 0 and stage.config.optim.clip_norm == 1 for stage in list_stages(root))
    if name in LORA:
        rank, alpha, dropout, patterns = LORA[name]
        assert (root.lora.rank, root.lora.alpha, root.lora.dropout) == (rank, alpha, dropout)
        assert patterns == (0 if isinstance(root.lora.targets, str) else len(root.lora.targets))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_how_it_is_run_and_what_it_follows(name: str) -> None:
    path = ROOT / "recipes" / f"{name}.toml"
    head = path.read_text().partition("\noutput_dir")[0]
    assert f"trainer.main --cfg recipes/{name}.toml" in head
    assert re.search(r"(Follows|After|scripts/)", head) or name == "one_gpu_lora"
    schema = json.loads((ROOT / "docs" / "run.schema.json").read_text())
    assert violations(read_toml(str(path)), schema, schema) == []
    assert f"`{name}`" in (ROOT / "docs" / "training.md").read_text(), "docs/training.md lists every recipe"
