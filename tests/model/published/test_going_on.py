"""Runs that start from a published model: they train, say what contradicts it, and refuse by name what they cannot read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from model.config import LlmConfig, VisionConfig
from model.errors import ConfigError
from model.llm.causal_lm import llm_config
from model.published.refused import REFUSED
from model.published.table import LAYOUTS
from model.vision.tower import vision_config
from tests.support.finals import save_final, trained
from tests.support.lora import logits
from tests.support.published import MAKERS
from tests.support.published.asking import question, run_from
from tools.export_adapter import main as export
from trainer.main import run
from trainer.runfile.load import parse_config

NOW = [name for name in MAKERS if name.endswith("5.x")]


@pytest.mark.parametrize("name", NOW)
def test_two_steps_train_every_part_that_learns(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "published"
    MAKERS[name].write(folder)
    is_audio = "Audio" in name
    told = question(tmp_path, {"audio" if is_audio else "image": None})
    told["messages"][2]["content"][0]["path"] = "clip.wav" if is_audio else "odd.png"
    (tmp_path / "train.json").write_text(json.dumps([{**told, "id": str(i)} for i in range(4)]))
    projector, tower = ("audio_projector", "audio") if is_audio else ("vision_projector", "vision")
    config = parse_config(
        {
            "output_dir": str(tmp_path / "run"),
            "model": {"init_from": str(folder), "dtype": "float32", "llm": {"tune": "lora"}, tower: {"tune": "frozen"}},
            "lora": {"rank": 2},
            "data": {"sources": [{"path": str(tmp_path / "train.json"), "media_root": str(tmp_path)}], "workers": 0},
            "batch": {"global_batch_size": 2, "micro_batch_size": 2},
            "optim": {"lr": 1e-2},
            "train": {"max_steps": 2},
            "parallel": {"strategy": "ddp"},
        },
        "test",
    )
    assert run(config) == 0
    final = tmp_path / "run" / "final"
    lora, moved = load_file(final / "lora.safetensors"), load_file(final / f"{projector}.safetensors")
    assert all(rows.abs().max() > 0 for path, rows in lora.items() if path.endswith("lora_B"))
    before = load_file(folder / "model.safetensors")
    (old,) = [rows for path, rows in before.items() if path.endswith(("linear_2.bias", "projector.linear.bias"))]
    (new,) = [rows for rows in moved.values() if rows.shape == old.shape and torch.allclose(rows, old, atol=0.05)]
    assert not torch.equal(new, old)


@pytest.mark.parametrize(
    ("key", "written", "said"),
    [
        ("model.vision.layer", -1, "model.vision.layer = -1, but .*, LLaVA .transformers., has -2: remove the line"),
        ("model.vision_projector.kind", "linear", 'kind = "linear", but .* has "mlp2x_gelu"'),
        ("model.vision_projector.newline", True, "newline = true, but .* has false"),
        ("data.image_fit", "tiles", 'data.image_fit = "tiles", but .* has "square"'),
        ("model.vision.placeholder", "<pic>", 'placeholder = "<pic>", but .* has "<image>"'),
    ],
)
def test_a_written_setting_that_contradicts_the_model_is_named(tmp_path: Path, key: str, written: Any, said: str) -> None:
    folder = tmp_path / "published"
    MAKERS["LlavaForConditionalGeneration-hub"].write(folder)
    section, *path, last = key.split(".")
    inner: dict[str, Any] = {last: written}
    for word in reversed(path):
        inner = {word: inner}
    tables = {section: {"init_from": str(folder), **inner} if section == "model" else inner}
    with pytest.raises(ConfigError, match=said):
        parse_config({"output_dir": "run", "model": {"init_from": str(folder)}, **tables}, "test")


def test_what_may_differ_may_be_written(tmp_path: Path) -> None:
    MAKERS["LlavaForConditionalGeneration-hub"].write(tmp_path / "llava")
    config = run_from(tmp_path / "llava", tmp_path / "run", data={"image_fit": "pad", "template": "chatml"})
    assert (config.data.image_fit, config.data.template) == ("pad", "chatml")
    MAKERS["InternVLForConditionalGeneration-hub"].write(tmp_path / "internvl")
    one_view = run_from(tmp_path / "internvl", tmp_path / "run", data={"image_fit": "square"}).data
    assert (one_view.image_fit, one_view.max_tiles) == ("square", 1)
    assert run_from(tmp_path / "internvl", tmp_path / "run", data={"max_tiles": 9}).data.max_tiles == 9


HUB = {
    "vicuna_v1": "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "mistral": "{% for message in messages %}{% for content in message['content'] %}{% if message['role'] == 'user' %}{{ '[INST] '"
    " + content['text'] + ' [/INST]' }}{% else %}{{ ' ' + content['text'] + '<\\\\s> ' }}{% endif %}{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("template", HUB)
def test_a_template_of_the_hub_whose_answers_have_no_end_is_replaced(tmp_path: Path, template: str) -> None:
    MAKERS["LlavaForConditionalGeneration-hub"].write(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": HUB[template]}))
    assert run_from(tmp_path, tmp_path / "run").data.template == template


def test_a_part_of_a_published_model_may_be_named_by_hand(tmp_path: Path) -> None:
    MAKERS["LlavaNextForConditionalGeneration-5.x"].write(tmp_path)
    assert llm_config(LlmConfig(str(tmp_path)))["model_type"] == "qwen2"
    assert vision_config(VisionConfig(str(tmp_path)))["model_type"] == "clip_vision_model"


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_supported_is_refused_by_name_with_the_reason(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": ["AnyForConditionalGeneration"]}))
    with pytest.raises(ConfigError) as caught:
        run_from(tmp_path, tmp_path / "run")
    assert f"'{kind}' is not supported: {REFUSED[kind]}" in str(caught.value)
    with pytest.raises(ConfigError, match="is not supported"):
        llm_config(LlmConfig(str(tmp_path)))


def test_anything_else_is_refused_with_the_layouts_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))
    with pytest.raises(ConfigError) as caught:
        run_from(tmp_path, tmp_path / "run")
    said = str(caught.value)
    rows = Path("docs/exchange.md").read_text()
    assert all(f"| {layout.name.split(',')[0].split(' with')[0].strip(')')}" in rows for layout in LAYOUTS)
    assert all(layout.name in said for layout in LAYOUTS) and "model.llm.path" in said and len(said) < 1500


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("Llava", {"vision_feature_layer": [-2, -1]}, "reads several layers"),
        ("Llava", {"projector_hidden_act": "relu"}, "'relu' in config.json"),
        ("Llava", {"multimodal_projector_bias": False}, "has biases"),
        ("LlavaOnevision", {"vision_feature_select_strategy": "default"}, "a patch of the picture"),
        ("LlavaOnevision", {"vision_aspect_ratio": "spatial"}, "neither 'anyres' nor 'anyres_max_N'"),
        ("LlavaNext", {"image_grid_pinpoints": [[16, 33]]}, "not made of views of 16 pixels"),
        ("InternVL", {"downsample_ratio": 0.25}, "joins 2 x 2 patches"),
        ("Llava", {"image_token_index": 3}, "token 3 by config.json, and its tokenizer has '<image>' as"),
        ("Qwen2Audio", {"audio_token_index": 3}, "token 3 by config.json"),
    ],
)
def test_settings_of_a_model_that_cannot_be_expressed_are_named(tmp_path: Path, name: str, change: Any, said: str) -> None:
    MAKERS[f"{name}ForConditionalGeneration-hub"].write(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ConfigError, match=said):
        run_from(tmp_path, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"crop_size": {"height": 32, "width": 32}}, "crop_size = 32 .*image_size = 16"),
        ({"size": {"shortest_edge": 24}}, "size = 24 .*image_size = 16"),
        ({"size": 24}, "size = 24 .*image_size = 16"),
        ({"do_normalize": False}, "do_normalize = false"),
    ],
)
def test_pixels_that_the_tower_would_not_get_are_refused(tmp_path: Path, change: Any, said: str) -> None:
    MAKERS["LlavaForConditionalGeneration-hub"].write(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ConfigError, match=said):
        run_from(tmp_path, tmp_path / "run")


def test_an_adapter_of_a_whole_models_language_model_comes_with_what_it_belongs_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A class for language models opens no LLaVA."""
    MAKERS["LlavaForConditionalGeneration-hub"].write(tmp_path / "llava")
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0}
    config = run_from(tmp_path / "llava", tmp_path / "run", lora=lora)
    config = replace(config, model=replace(config.model, llm=replace(config.model.llm, tune="lora")))
    run = trained(config.model, config.lora)
    save_final(run, tmp_path)
    assert export([str(tmp_path / "final"), str(tmp_path / "out"), "--for", "peft"]) == 0
    assert "is more than a language model: LLaVA (transformers)" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base", dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(base, str(tmp_path / "out"))
    known = run.card.vocabulary.num_known
    found, expected = logits(wrapped.eval())[:, :known], logits(run.model.eval())[:, :known]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("adapter_config.json", "is an adapter: name the model that it belongs to"),
        ("final/model.json", "is the folder of a run: name its final/"),
        ("model.json", "is a run of ours, which gives weights"),
        ("mm_projector.bin", "is no published model: neither a folder with config.json"),
    ],
)
def test_a_folder_that_gives_no_parts_is_named_beside_what_is_missing(tmp_path: Path, file: str, said: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    with pytest.raises(ConfigError, match=said):
        run_from(tmp_path, tmp_path / "run")


@pytest.mark.parametrize("before", [False, True])
def test_a_stage_names_no_published_model(tmp_path: Path, before: bool) -> None:
    MAKERS["LlavaForConditionalGeneration-hub"].write(tmp_path)
    model = {"init_from": str(tmp_path)} if before else {}
    stage = {"name": "a", "model": {"init_from": str(tmp_path)}, "train": {"max_steps": 1}}
    with pytest.raises(ConfigError, match=r"stage 1: model.init_from = .* write it in \[model\]"):
        parse_config({"output_dir": "run", "model": model, "stage": [stage]}, "test")
