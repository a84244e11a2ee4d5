"""Original LLaVA and InternVL folders as the start of a run: the logits are those of transformers' model of the same weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.processor import Processor
from model.errors import ConfigError
from model.load import load_model
from tests.support.finals import Run, save_final
from tests.support.published.opening import ORIGINALS, opened, opened_whole, pictures
from tests.support.published.original import Original, first_stage, llava, lora, save_adapter
from tests.support.runs import merged
from tests.support.tiny import save_tower
from tests.support.tiny_data import talk
from trainer.config import RunConfig
from trainer.runfile.load import parse_config
from trainer.runfile.merge_tables import value_of
from trainer.runfile.schema import to_tables


def run_from(path: Path | str, root: Path, **sections: Any) -> RunConfig:
    tables = {"output_dir": str(root / "run"), "model": {"init_from": str(path), "dtype": "float32"}, "train": {"max_steps": 0}}
    return parse_config(merged(tables, sections), "test")


def compare(original: Original, model: Any, processor: Processor, root: Path) -> None:
    """Pixels bit for bit and logits within 1e-5, of pictures of odd shapes in one batch."""
    seen = pictures(root)
    told = [talk("<image>\nWhat is this?", f"A cat {i * 7}.", images=[f"{i}.png"]) for i in range(len(seen))]
    batch = processor(told, answers=True, media_root=str(root))
    inputs = original.pixels(seen)
    flat = inputs["pixel_values"].flatten(0, -4)
    views = flat[flat.abs().amax((1, 2, 3)) > 0]  # theirs are filled up with blank views
    assert torch.equal(views, batch.media["image"].values)
    ids, here = batch.input_ids, processor.template.placeholder_ids["image"]
    image_id = getattr(original.native.config, "image_token_id", None)
    image_id = original.native.config.image_token_index if image_id is None else image_id
    ids = torch.where(ids == here, image_id, ids)
    with torch.no_grad():
        found = model.llm(inputs_embeds=model.embed(batch), position_ids=batch.position_ids, use_cache=False).logits
        expected = original.native(input_ids=ids, attention_mask=batch.attention_mask, **inputs).logits
    mask = batch.attention_mask
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(found[real][:, : expected.shape[-1]], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ORIGINALS)
def test_pixels_and_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    original = ORIGINALS[name](tmp_path)
    config = run_from(original.folder, tmp_path)
    resolved = to_tables(config)
    assert {key: value_of(resolved, key) for key in original.settings} == original.settings
    compare(original, *opened(config), tmp_path)


LORAS = {".bin": ("bin", "bin"), "safetensors": ("safetensors", "safetensors")}


@pytest.mark.parametrize(
    ("form", "tune"),
    [
        (".bin", "lora"),
        ("safetensors", "frozen"),
        pytest.param(".bin", "frozen", marks=pytest.mark.long),
        pytest.param("safetensors", "lora", marks=pytest.mark.long),
    ],
)
def test_a_lora_folder_goes_on_as_an_adapter_or_is_merged(tmp_path: Path, form: str, tune: str) -> None:
    original = lora(tmp_path, *LORAS[form])
    config = run_from(original.folder, tmp_path, model={"llm": {"tune": tune}})
    resolved = to_tables(config)
    assert {key: value_of(resolved, key) for key in original.settings} == original.settings
    assert (config.lora.path, config.model.llm.adapter) == (
        (str(original.folder), "") if tune == "lora" else ("", str(original.folder))
    )
    if tune == "lora":
        assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (4, 8.0, 0.05)
    model, processor, card = opened_whole(config)
    compare(original, model, processor, tmp_path)
    compare(original, load_model(save_final(Run(card, model, processor), tmp_path)), processor, tmp_path)


@pytest.mark.parametrize("rows", [pytest.param(2, marks=pytest.mark.long), 40])
def test_a_first_stage_gives_its_projector_and_the_rows_around_pictures(tmp_path: Path, rows: int) -> None:
    folder, stored = first_stage(tmp_path, rows)
    config = run_from(folder, tmp_path, model={"llm": {"tune": "new_tokens"}}, data={"template": "plain"})
    assert config.model.llm.new_tokens == config.data.media_wrap == ("<im_start>", "<im_end>")
    model, processor, card = opened_whole(config)
    ids = processor.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    final = load_model(save_final(Run(card, model, processor), tmp_path))
    for name, rows_now in {"built": model, "saved": final}.items():
        matrix: Any = rows_now.llm.get_input_embeddings()
        found = matrix(torch.tensor(ids))
        assert torch.equal(found, stored["model.embed_tokens.weight"][-2:]), name
        assert torch.equal(rows_now.get_parameter("vision_projector.2.weight"), stored["model.mm_projector.2.weight"])
    for tune, reason in (("frozen", "could never be learned"), ("lora", "could never be learned")):
        with pytest.raises(ConfigError, match=reason):
            run_from(folder, tmp_path, model={"llm": {"tune": tune}}, data={"template": "plain"})
    parts = {"llm": {"path": config.model.llm.path, "tune": "full"}, "vision": {"path": config.model.vision.path}}  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="'<im_start>' is no new token"):
        opened(run_from("", tmp_path, model={**parts, "vision_projector": {"path": str(folder)}}, data={"template": "plain"}))


PREFIXES = {"5.x": "model.language_model.", "4.x": "language_model.model."}


@pytest.mark.parametrize(("names", "suffix"), [("5.x", "safetensors"), pytest.param("4.x", "bin", marks=pytest.mark.long)])
def test_an_adapter_of_the_whole_model_goes_on_in_its_parts(tmp_path: Path, names: str, suffix: str) -> None:
    original, folder = llava(tmp_path), tmp_path / "adapter"
    folder.mkdir()
    tower = "model.vision_tower." if names == "5.x" else "vision_tower.vision_model."
    parts = {PREFIXES[names]: "model.language_model.", f"{tower}encoder.layers.0.": "model.vision_tower.encoder.layers.0."}
    save_adapter(folder, original.native, suffix, str(original.folder), parts)
    lora_of: dict[str, Any] = {"path": str(folder), "rank": 4, "alpha": 8.0, "targets": ["llm.*", "vision.*.layers.0.*"]}
    given: dict[str, Any] = {"lora": lora_of}
    with pytest.raises(ConfigError, match="also has vision"):
        opened(run_from(original.folder, tmp_path, lora={**lora_of, "targets": "all-linear"}))
    seeing = {"vision": {"tune": "lora"}}
    compare(original, *opened(run_from(original.folder, tmp_path, model=seeing, **given)), tmp_path)
    bare = {"llm": {"path": str(lora(tmp_path / "bare").settings["model.llm.path"])}, "init_from": ""}
    with pytest.raises(ConfigError, match="a part of a larger model"):
        opened(run_from("", tmp_path, model=bare, data={"template": "vicuna_v1"}, lora={**lora_of, "targets": "all-linear"}))


LLAVA: dict[str, Any] = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
}
INTERNVL: dict[str, Any] = {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "llm_config": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "vision_config": {"model_type": "intern_vit_6b", "image_size": 448, "patch_size": 14},
    "ps_version": "v2",
    "template": "internvl2_5",
}
ANYRES = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "resampler": ({**LLAVA, "mm_resampler_type": "qformer"}, "resamplers of LLaVA-NeXT are not built"),
    "residual projector": ({**LLAVA, "mm_projector_type": "mlp2x_res2x_gelu"}, "this kind of projector is not built"),
    "several layers": ({**LLAVA, "mm_vision_select_feature": "slicefour_patch"}, "read several layers"),
    "flat tiles": ({**LLAVA, "image_aspect_ratio": "anyres"}, "tiles are merged as 'spatial_unpad'"),
    "another fit": ({**LLAVA, "image_aspect_ratio": "highres"}, "'highres' in config.json is not 'pad'"),
    "grids of no tiles": ({**LLAVA, **ANYRES, "image_grid_pinpoints": [[17, 16]]}, "are not made of views of 16 pixels"),
    "a template that no name tells": (LLAVA, "write data.template"),
    "a tower elsewhere": ({**LLAVA, "mm_vision_tower": "/none/clip"}, "write the folder where the tower is as model.vision.path"),
    "adapters among the weights": ({**INTERNVL, "use_llm_lora": 16}, "tools/merge_lora.py"),
    "InternLM2": (
        {**INTERNVL, "llm_config": {"architectures": ["InternLM2ForCausalLM"]}},
        "is InternLM2, which transformers does not",
    ),
    "another ratio": ({**INTERNVL, "downsample_ratio": 0.25}, "one token of 2 x 2 patches"),
    "another shuffle": ({**INTERNVL, "ps_version": "v3"}, "ps_version = 'v3'"),
    "a template of its own": ({**INTERNVL, "template": "phi3-chat"}, "write data.template"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_expressed_is_refused_by_name(tmp_path: Path, what: str) -> None:
    config, reason = REFUSED[what]
    if "llm_config" not in config:
        config = {"mm_vision_tower": str(save_tower(tmp_path / "clip")), **config}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=re.escape(reason)):
        run_from(tmp_path / "model", tmp_path)


def test_what_contradicts_the_model_is_an_error_and_what_is_free_is_not(tmp_path: Path) -> None:
    folder = llava(tmp_path).folder
    with pytest.raises(ConfigError) as error:
        run_from(
            folder, tmp_path, model={"vision": {"layer": -1}, "vision_projector": {"kind": "linear"}}, data={"image_fit": "square"}
        )
    said = str(error.value)
    for key in ("model.vision.layer = -1", 'model.vision_projector.kind = "linear"', 'data.image_fit = "square"'):
        assert f"{key}, but" in said
    config = run_from(folder, tmp_path, data={"template": "llama2"}, model={"llm": {"tune": "full"}})
    assert (config.data.template, config.data.system, config.model.llm.tune) == ("llama2", "", "full")


def test_a_foreign_tensor_and_a_lost_one_are_errors(tmp_path: Path) -> None:
    folder = llava(tmp_path, "safetensors").folder
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.vision_resampler.query": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"no place for 'model\.vision_resampler\.query', which would be lost"):
        opened(run_from(folder, tmp_path))
    del tensors["model.mm_projector.2.bias"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 'vision_projector\.2\.bias'"):
        opened(run_from(folder, tmp_path))
