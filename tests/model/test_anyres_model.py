"""Models that see tiles of a picture's own aspect: as LLaVA-NeXT and OneVision compute, on any ranks, saved, exported, restored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration, LlavaOnevisionForConditionalGeneration
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from data.config import DataConfig
from data.processor import load_processor
from model.batch import IGNORE_INDEX, Batch
from model.config import ModelConfig
from model.errors import ConfigError
from model.exports.hf_classes import NEXT as NEXT_CLASS
from model.exports.hf_classes import ONEVISION as ONEVISION_CLASS
from model.exports.hf_classes import class_config
from model.exports.hf_weights import weights, write_weights
from model.files.tensor_files import dump_json
from model.load import load_model
from tests.support.anyres import NEXT, ONEVISION, SIZES, pinpoints
from tests.support.finals import Run, build, config_of, same, save_checkpoint, save_final, save_parts, trained, values
from tests.support.ranks import run_ranks
from tests.support.resume import metrics
from tests.support.runs import merged, save_records, start, start_alone, tables
from tests.support.runs import save_parts as save_run_parts
from tests.support.tiny_data import talk
from tools.export_adapter import main as export
from tools.exports.hf_folder import facts_of
from trainer.runfile.load import parse_config
from trainer.runfile.part_checks import anyres_problems

SIDE = 32  # pixels of a view; 4 x 4 patches
KINDS: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
    "next": (LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil, "clip", {}),
    "onevision": (
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessorPil,
        "siglip",
        {"image_grid": ("1x1...4x4",), "anyres_max": 3},
    ),
}


def settings_of(folder: Path, tower: str = "clip", newline: bool = True, **options: Any) -> ModelConfig:
    found = config_of(save_parts(folder / "parts", tower=tower), "full", "full", **options)
    assert found.vision is not None and found.vision_projector is not None
    vision, projector = replace(found.vision, image_size=SIDE), replace(found.vision_projector, newline=newline)
    return replace(found, vision=vision, vision_projector=projector)


def records(folder: Path, with_several: bool) -> list[dict[str, Any]]:
    """A text alone, a picture of each size, and perhaps two pictures in one record."""
    found = [talk("What colour is the car?", "Red.")]
    for i, (width, height) in enumerate(SIZES.values()):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        found.append(talk("<image>\nWhat is this?", f"It is {i * 7} red.", images=[f"{i}.png"]))
    if with_several:
        found.append(talk("<image> and <image>?", "A cat.", images=["0.png", "1.png"]))
    return found


def theirs(folder: Path, run: Run, kind: str) -> Any:
    """transformers' model with the weights of `run`."""
    cls, target = KINDS[kind][0], ONEVISION_CLASS if kind == "onevision" else NEXT_CLASS
    config = class_config(target, run.card, run.model, facts_of(run.processor))
    folder.mkdir()
    (folder / "config.json").write_text(dump_json(config))
    write_weights(folder, weights(target, run.card, run.model))
    model, report = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def their_inputs(kind: str, run: Run, batch: Batch, folder: Path, told: list[dict[str, Any]]) -> dict[str, Any]:
    _, processor, _, data = KINDS[kind]
    spec: Any = run.model.specs["image"]
    square = {"height": SIDE, "width": SIDE}
    facts = {"image_mean": spec.mean, "image_std": spec.std, "image_grid_pinpoints": pinpoints(ONEVISION if data else NEXT, SIDE)}
    reader = processor(size=square, **facts) if data else processor(size={"shortest_edge": SIDE}, crop_size=square, **facts)
    pictures = [[Image.open(folder / name) for name in record["image"]] for record in told if "image" in record]
    seen = reader(pictures if data else [one for (one,) in pictures], return_tensors="pt")
    labels = torch.full_like(batch.labels, IGNORE_INDEX)
    labels[:, 1:] = batch.labels[:, :-1]
    found = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels, **seen}
    return found | ({"batch_num_images": torch.tensor([len(group) for group in pictures])} if data else {})


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_features_logits_loss_and_gradients_equal_those_of_transformers(tmp_path: Path, kind: str) -> None:
    tower, data = KINDS[kind][2:]
    run = build(settings_of(tmp_path, tower, layer=-2), image_fit="anyres", **data)
    told = records(tmp_path, with_several=kind == "onevision")
    batch = run.processor(told, answers=True, media_root=str(tmp_path))
    media = batch.media["image"]
    assert (media.weights is not None) == bool(data)
    llava, model = theirs(tmp_path / "hf", run, kind).train(), run.model.train()
    inputs = their_inputs(kind, run, batch, tmp_path, told)
    flat = inputs["pixel_values"].flatten(0, 1)
    assert torch.equal(flat[flat.abs().amax((1, 2, 3)) > 0], media.values)  # theirs are filled up with blank views
    seen = {name: inputs[name] for name in ("pixel_values", "image_sizes", "batch_num_images") if name in inputs}
    features = llava.get_image_features(**seen)
    features = torch.cat(list(getattr(features, "pooler_output", features)))
    torch.testing.assert_close(model._features("image", media), features, rtol=1e-5, atol=1e-5)
    out = llava(**inputs)
    term = model(batch)["text"]
    term_loss = term.sum / term.num_addends
    torch.testing.assert_close(term_loss, out.loss, rtol=1e-6, atol=0)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(our_logits(run, batch)[real], out.logits[real], rtol=1e-5, atol=1e-5)
    term_loss.backward()
    out.loss.backward()
    newline: Any = model.get_parameter("vision_projector.image_newline").grad
    assert newline.abs().max() > 1e-4
    torch.testing.assert_close(newline, llava.model.image_newline.grad, rtol=1e-4, atol=1e-7)
    ours: Any = model.get_parameter("vision_projector.0.weight").grad
    torch.testing.assert_close(ours, llava.model.multi_modal_projector.linear_1.weight.grad, rtol=1e-4, atol=1e-6)


def our_logits(run: Run, batch: Batch) -> Tensor:
    model: Any = run.model
    return model.llm(inputs_embeds=model.embed(batch), position_ids=batch.position_ids, use_cache=False).logits


@pytest.mark.parametrize("save", [save_final, save_checkpoint])
@pytest.mark.parametrize("kind", ["linear", "conv_mlp"])
def test_the_line_break_is_saved_exported_and_restored(tmp_path: Path, kind: str, save: Any) -> None:
    run = trained(settings_of(tmp_path, kind=kind), image_fit="anyres", image_grid=("2x1", (32, 64)), anyres_max=1)
    folder = save(run, tmp_path)
    loaded, processor = load_model(folder, merge_lora=False), load_processor(folder)
    same(values(loaded), values(run.model))
    assert processor.config == replace(run.processor.config, template=processor.config.template)
    assert loaded.specs == run.model.specs == processor.specs and loaded.specs["image"].newline is True  # type: ignore[union-attr]
    told = records(tmp_path, with_several=True)
    expected, found = (one(told, answers=True, media_root=str(tmp_path)) for one in (run.processor, processor))
    media = found.media["image"]
    assert torch.equal(found.input_ids, expected.input_ids) and torch.equal(media.rows, expected.media["image"].rows)
    assert found.to(torch.device("cpu")).media["image"].weights is media.weights is not None
    assert export([str(folder), str(tmp_path / "out")]) == 0
    stored = load_file(tmp_path / "out" / "vision_projector.safetensors")
    assert torch.equal(stored["image_newline"], run.model.get_parameter("vision_projector.image_newline").detach())
    path = str(tmp_path / "out" / "vision_projector.safetensors")
    again = replace(run.card.model, vision_projector=replace(run.card.model.vision_projector, path=path))  # type: ignore[type-var]
    same(values(build(again).model.get_submodule("vision_projector")), stored)


def test_a_line_break_goes_to_llava_and_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings_of(tmp_path)
    assert config.vision is not None
    frozen = replace(config, llm=replace(config.llm, tune="frozen"), vision=replace(config.vision, tune="frozen"))
    run = trained(frozen, image_fit="anyres")
    final = save_final(run, tmp_path)
    assert export([str(final), str(tmp_path / "out"), "--for", "llava"]) == 0
    file = tmp_path / "out" / "mm_projector.bin"
    assert "model.image_newline" in torch.load(file, weights_only=True)
    again = replace(run.card.model, vision_projector=replace(run.card.model.vision_projector, path=str(file)))  # type: ignore[type-var]
    same(*(values(one.model.get_submodule("vision_projector")) for one in (build(again), run)))
    padded = save_final(trained(frozen, image_fit="pad"), tmp_path / "padded")
    assert export([str(padded), str(tmp_path / "hf"), "--for", "hf"]) == 2
    assert "model.vision_projector.newline = true" in capsys.readouterr().err and not (tmp_path / "hf").exists()


def test_a_line_break_starts_as_llava_nexts_in_a_run_that_goes_on_too_and_is_never_dropped(tmp_path: Path) -> None:
    config = settings_of(tmp_path, kind="linear")
    newline = build(config).model.get_parameter("vision_projector.image_newline").detach()
    assert newline.shape == (32,) and 0.6 < float(newline.std()) * 32**0.5 < 1.4
    without = build(replace(config, vision_projector=replace(config.vision_projector, newline=False)))  # type: ignore[type-var]
    assert "vision_projector.image_newline" not in values(without.model)
    going_on = build(replace(config, init_from=str(save_final(without, tmp_path / "without"))))
    assert torch.equal(going_on.model.get_parameter("vision_projector.image_newline"), newline)
    with_it = save_final(build(config), tmp_path / "with")
    with pytest.raises(ConfigError, match=r"image newline = False, but .* was trained with True"):
        build(replace(without.card.model, init_from=str(with_it)))


def test_what_anyres_needs_is_asked_for_at_once(tmp_path: Path) -> None:
    config, data = settings_of(tmp_path), DataConfig(image_fit="anyres")
    assert list(anyres_problems(data, config)) == []
    assert config.vision is not None and config.vision_projector is not None
    wrong = replace(
        config,
        vision=replace(config.vision, select="cls_patch"),
        vision_projector=replace(config.vision_projector, newline=False, kind="resampler"),
    )
    found = list(anyres_problems(data, wrong))
    assert len(found) == 3 and "model.vision_projector.newline = true" in found[0]
    assert "model.vision.select = 'patch'" in found[1] and "'resampler' leaves none" in found[2]
    assert list(anyres_problems(DataConfig(), wrong)) == []


@pytest.mark.parametrize("shrink", [0, 2])
def test_a_batch_together_is_the_same_as_alone_and_a_text_reaches_the_line_break_with_zero(tmp_path: Path, shrink: int) -> None:
    run = build(settings_of(tmp_path), image_fit="anyres", anyres_max=shrink)
    told, model = records(tmp_path, with_several=True), run.model.train()
    together = model(run.processor(told, answers=True, media_root=str(tmp_path)))["text"].addends
    alone = [model(run.processor([one], answers=True, media_root=str(tmp_path)))["text"].addends for one in told]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    model(run.processor(told[:1], answers=True))["text"].sum.backward()
    newline = model.get_parameter("vision_projector.image_newline").grad
    assert newline is not None and not newline.any()


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeing")
    save_run_parts(folder)
    save_records(folder)
    return folder


def test_every_rank_steps_alike_and_a_run_needs_a_line_break(seeing: Path, tmp_path: Path) -> None:
    """Texts alone, pictures in tiles, some shrunk, and pairs in one view each: one process, DDP and FSDP2 on two ranks."""
    given: dict[str, Any] = {
        "model": {"vision_projector": {"newline": True}},
        "data": {"image_fit": "anyres", "image_grid": ["1x1...2x2", [48, 16]], "anyres_max": 2, "max_length": 512},
        "optim": {"lr": 1e-1, "eps": 1.0, "schedule": "constant"},
        "train": {"max_steps": 3},
        "batch": {"micro_batch_size": 1},
    }
    assert start_alone(seeing, tmp_path / "alone", given).code == 0
    expected = metrics(tmp_path / "alone")
    assert len(expected) == 3 and expected[0][1] != expected[1][1]
    for strategy, recompute in (("ddp", "none"), ("fsdp", "full")):
        changed = merged(given, {"parallel": {"strategy": strategy, "activation_checkpointing": recompute}})
        assert {answer.code for answer in run_ranks(start, 2, seeing, tmp_path / strategy, changed)} == {0}
        for (step, loss), (same_step, other) in zip(metrics(tmp_path / strategy), expected, strict=True):
            assert step == same_step and loss == pytest.approx(other, rel=1e-6)
    held = load_file(tmp_path / "fsdp" / "final" / "vision_projector.safetensors")
    same(values(load_model(tmp_path / "fsdp" / "final").get_submodule("vision_projector")), held)
    without = parse_problems({"model": {"vision_projector": {"newline": False}}, "data": given["data"]}, seeing)
    assert "set model.vision_projector.newline = true" in without


def test_a_stage_may_begin_to_end_lines_and_none_may_stop(seeing: Path, tmp_path: Path) -> None:
    """LLaVA-NeXT's order: the projector is aligned on padded pictures, tiles and their line break come later."""
    grids = {"name": "grids", "model": {"vision_projector": {"newline": True}}, "data": {"image_fit": "anyres", "max_length": 512}}
    given: dict[str, Any] = {"train": {"max_steps": 1}, "stage": [{"name": "align"}, grids]}
    answer = start_alone(seeing, tmp_path / "run", given)
    assert answer.code == 0, answer.said
    aligned, final = (tmp_path / "run" / place / "vision_projector.safetensors" for place in ("stages/01-align/final", "final"))
    assert "image_newline" not in load_file(aligned) and bool(load_file(final)["image_newline"].any())
    back = {
        **given,
        "stage": [grids, {"name": "pad", "model": {"vision_projector": {"newline": False}}, "data": {"image_fit": "pad"}}],
    }
    assert "model.vision_projector.newline = False, but stage 'grids' has True" in parse_problems(back, seeing)


def parse_problems(sections: dict[str, Any], folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(tables(folder, **sections), "test")
    return str(caught.value)


def test_a_projector_by_itself_is_whole_and_of_its_kind_but_for_a_new_line_break(tmp_path: Path) -> None:
    first = trained(settings_of(tmp_path, newline=False))
    assert export([str(save_final(first, tmp_path)), str(tmp_path / "out")]) == 0
    config = first.card.model
    assert config.vision_projector is not None
    named = replace(config.vision_projector, path=str(tmp_path / "out"))
    for kind, problem in (("mlp3x_gelu", r"lacks .*projector\.4\.bias"), ("mlp1x_gelu", r"holds .*projector\.2\.bias.* has not")):
        with pytest.raises(ConfigError, match=problem):
            build(replace(config, vision_projector=replace(named, kind=kind)))
    new = values(build(replace(config, vision_projector=replace(named, newline=True))).model.get_submodule("vision_projector"))
    assert new.pop("image_newline").any()
    same(new, values(first.model.get_submodule("vision_projector")))
