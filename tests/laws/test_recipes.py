"""Every shipped recipe's numbers on tiny parts, in bfloat16: no update is skipped, and three ranks do what one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.text.tokenizer import save_tokenizer
from tests.support.published.native import NATIVE_MAKERS
from tests.support.ranks import run_ranks
from tests.support.router import save_mixture
from tests.support.runs import Start, merged
from tests.support.tiny import VOCAB, save_llm, save_tower
from tests.support.tiny_audio import save_whisper, wave
from tests.support.tiny_media import wav
from tests.support.tiny_tokenizers import NAMES
from trainer.distributed.world import World
from trainer.main import run
from trainer.runfile.load import parse_config
from trainer.runfile.toml_files import read_toml

RECIPES = {path.stem: path for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))}
QUICK = "one_gpu_lora"
STEPS, GLOBAL_BATCH, NUM_RECORDS = 2, 12, 30
"""The recipes' batches of 128 and more would take minutes here; micro-batches are the recipe's where this one allows it."""
KINDS = {
    "blip_laion_cc_sbu_558k": ("image",),
    "captions": ("image",),
    "chat": ("image",),
    "onevision": ("image", "video"),
    "pictures_and_videos_task": ("image", "video"),
    "transcripts": ("audio",),
    "pictures_and_videos": ("image", "video"),
    "questions_by_voice": ("image", "audio"),
    "text": ("",),
    "negative": ("audio",),
    "mixed": ("image", "video", ""),
    "duplex": ("audio",),
}
"""Media of a source's records in turn, by the name of its file; of any other file pictures and text."""


PAIRS = ("rlaif_v", "mmpr")
"""Sources with two answers to each question."""


LLMS = {
    "vicuna": ("llama", "llama"),
    "TinyLlama": ("llama", "llama"),
    "llava-v1.5": ("llama", "llama"),
    "Mixtral": ("mixtral", "llama"),
}
TOWERS = {"siglip": "siglip", "InternViT": "internvit"}
"""Tiny parts by a word of the path that a recipe names: kind and tokenizer of a model, kind of a tower; else Qwen2, CLIP."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that tiny parts are written to when a recipe needs them, and media: pictures, videos as folders of frames, clips."""
    folder = tmp_path_factory.mktemp("recipes")
    save_whisper(folder / "audio", seconds=1)
    rng = np.random.default_rng(0)
    for i in range(NUM_RECORDS):
        for name in (f"{i}.png", f"{i}_film/0.png", f"{i}_film/1.png"):
            path = folder / "media" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 24 + 10 * (i % 3), 3), dtype=np.uint8)).save(path)
        (folder / "media" / f"{i}.wav").write_bytes(wav(wave(0.02 + 0.3 * (i % 4), i).numpy()[:, None], 16_000))
    return folder


def tiny_llm(tiny: Path, path: str) -> str:
    """The folder of a tiny language model in place of `path`."""
    family, tokenizer = next((found for word, found in LLMS.items() if word in path), ("qwen2", "qwen"))
    folder, made = tiny / family, NAMES[tokenizer]()
    if not folder.exists():
        if family == "mixtral":
            save_mixture(folder, family, max(VOCAB, len(made)))
        else:
            save_llm(folder, family, vocab_size=max(VOCAB, len(made)))
        save_tokenizer(made, folder)
    return str(folder)


def tiny_tower(tiny: Path, path: str) -> str:
    family = next((found for word, found in TOWERS.items() if word in path), "clip")
    if not (folder := tiny / family).exists():
        save_tower(folder, family)
    return str(folder)


def source(tiny: Path, of: dict[str, Any]) -> dict[str, Any]:
    """Tiny records in place of those of a recipe's file."""
    name, lines = Path(of["path"]).stem.replace("*", of.get("name", "")), []
    kinds = KINDS.get(name, ("image", "", "image"))
    for i in range(NUM_RECORDS):
        kind = kinds[i % len(kinds)]
        media = {"image": f"{i}.png", "video": f"{i}_film", "audio": f"{i}.wav"}.get(kind)
        question = f"<{kind}>\n" * bool(kind) + "What is this? " + "red " * (i % 5)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"{i} cats on a mat"}]
        more: dict[str, Any] = {kind: media} if media else {}
        if name in PAIRS:
            more |= {"chosen": turns.pop()["value"], "rejected": f"{i} dogs"}
        more |= {"inserted_id": 1} if name == "negative" else {"audio_state": i % 3} if name == "duplex" else {}
        lines.append(json.dumps({"conversations": turns, **more}))
    file = tiny / f"{name}.jsonl"
    file.write_text("\n".join(lines))
    return {"path": str(file), "name": name, "media_root": str(tiny / "media")}


def shrunk(tables: dict[str, Any], tiny: Path) -> dict[str, Any]:
    """The tables of a recipe, or of one of its stages, with the paths of tiny parts and data; every other number as it is."""
    model, data = dict(tables.get("model", {})), dict(tables.get("data", {}))
    if "Qwen2.5-VL" in model.get("init_from", ""):
        return {**tables, "model": {**model, "init_from": tiny_native(tiny)}, "data": small_data(data, tiny)}
    if published := model.pop("init_from", ""):
        model["llm"] = {"path": published, **model["llm"]}
        model["vision"] = {"path": "", **model["vision"]}
        if model["vision_projector"]["tune"] == "frozen":  # without published weights it is new
            model["vision_projector"] = {**model["vision_projector"], "tune": "full"}
    for part, place in (("llm", tiny_llm), ("vision", tiny_tower), ("audio", lambda tiny, path: str(tiny / "audio"))):
        if "path" in model.get(part, {}):
            model[part] = {**model[part], "path": place(tiny, model[part]["path"])}
    if "vision_projector" in model:
        model["vision_projector"] = {key: value for key, value in model["vision_projector"].items() if key != "path"}
    data = small_data(data, tiny)
    return {**tables, **{key: value for key, value in (("model", model), ("data", data)) if value}}


def small_data(data: dict[str, Any], tiny: Path) -> dict[str, Any]:
    """The [data] of a recipe with tiny records."""
    found = {**data, **{key: [source(tiny, one) for one in data[key]] for key in ("sources", "validation") if key in data}}
    if sizes := data.get("image_grid"):  # pixels of a tower of 336 become those of one of 16
        found["image_grid"] = [size if isinstance(size, str) else [side // 336 * 16 for side in size] for size in sizes]
    return found


def tiny_native(tiny: Path) -> str:
    """The folder of a tiny published model that reads pictures at their own size."""
    if not (folder := tiny / "native").exists():
        NATIVE_MAKERS["qwen2_5_vl"].write(folder, True)
    return str(folder)


def tables_of(name: str, tiny: Path, output_dir: Path) -> dict[str, Any]:
    recipe = read_toml(str(RECIPES[name]))
    found = shrunk(recipe, tiny)
    micro = min(recipe.get("batch", {}).get("micro_batch_size", 4), GLOBAL_BATCH // 3)
    changes: dict[str, Any] = {
        "output_dir": str(output_dir),
        "batch": {"global_batch_size": GLOBAL_BATCH, "micro_batch_size": micro},
        "train": {"epochs": None, "max_steps": STEPS},
        "data": {"workers": 0},
        "log": {"every": 1},
    }
    if "lora" in recipe:
        changes["lora"] = {"dropout": 0.0}  # its draws hang on the rank
    if "stage" in found:
        found["stage"] = [shrunk(stage, tiny) for stage in found["stage"]]
        for stage in found["stage"]:
            if "batch" in stage:
                stage["batch"] = {**stage["batch"], "global_batch_size": GLOBAL_BATCH, "micro_batch_size": micro}
    return merged(found, changes)


def started(world: World, tables: dict[str, Any]) -> Start:
    return Start(run(parse_config(tables, "recipe"), world), [], "")


@pytest.mark.parametrize("name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.long) for name in RECIPES])
def test_a_recipe_skips_no_update_and_is_the_same_on_three_ranks(tiny: Path, tmp_path: Path, name: str) -> None:
    lines = {}
    for size in (1, 3):
        output_dir = tmp_path / f"{size}"
        answers = run_ranks(started, size, tables_of(name, tiny, output_dir), seconds=300)
        assert {answer.code for answer in answers} == {0}, (output_dir / "exit.json").read_text()
        assert not (output_dir / "faults.jsonl").exists() and not (output_dir / "quarantine.jsonl").exists()
        lines[size] = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines[1] if "train/loss" in line]
    assert len(trained) == STEPS * max(1, len(read_toml(str(RECIPES[name])).get("stage", [])))
    for one, three in zip(lines[1], lines[3], strict=True):
        assert (one["step"], one.get("train/skipped_steps", 0), three.get("train/skipped_steps", 0)) == (three["step"], 0, 0)
        for key in {"train/loss", "val/loss"} & one.keys():
            assert three[key] == pytest.approx(one[key], rel=2**-8), (one["step"], key)
