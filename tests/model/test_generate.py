"""A batch padded on the left answers like each prompt alone, and like Hugging Face's model of the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlavaForConditionalGeneration

from data.processor import Processor
from model.generate import GenerationOptions
from model.llm.attention import NAME
from model.load import load_model
from model.multimodal import MultimodalLM
from tests.support.finals import build, config_of, save_final, save_parts
from tests.support.tiny_data import grey, talk
from tools.export_adapter import export

NEW = 12
INPUTS = ("inputs_embeds", "input_ids")


@pytest.fixture(scope="module", params=["qwen2", "mistral"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, MultimodalLM, Processor]]:
    folder = tmp_path_factory.mktemp(request.param)
    made = build(config_of(save_parts(folder, request.param)))
    yield folder, load_model(save_final(made, folder)), made.processor


def prompts(folder: Path) -> list[dict[str, Any]]:
    first, second = grey(folder, 30), grey(folder, 220)
    return [
        talk("<image>\nWhat is this?", images=[first]),
        talk("Say it."),
        talk("<image> and <image>: which colour is the car in the picture?", images=[second, first]),
    ]


def test_batched_equals_each_alone_equals_transformers(run: tuple[Path, MultimodalLM, Processor], tmp_path: Path) -> None:
    folder, net, processor = run
    net.stop_ids = ()
    records = prompts(tmp_path)
    together = net.generate(processor(records, media_root=str(tmp_path)), max_new_tokens=NEW)
    alone = [net.generate(processor([record], media_root=str(tmp_path)), max_new_tokens=NEW)[0] for record in records]
    assert together == alone
    assert [len(ids) for ids in together] == [NEW] * 3 and together[0] != together[2]
    export(folder / "final", tmp_path / "hf", "hf")
    llava = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    for record, ids in zip(records, together):
        batch = processor([record], media_root=str(tmp_path))
        inputs = {"pixel_values": batch.media["image"].values} if batch.media else {}
        mask = torch.ones_like(batch.input_ids)
        limits = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        expected = llava.generate(input_ids=batch.input_ids, attention_mask=mask, eos_token_id=None, **limits, **inputs)
        assert expected[0, batch.input_ids.shape[1] :].tolist() == ids


def test_an_answer_ends_before_its_stop_token_and_others_go_on(run: tuple[Path, MultimodalLM, Processor], tmp_path: Path) -> None:
    _, net, processor = run
    batch = processor(prompts(tmp_path), media_root=str(tmp_path))
    net.stop_ids = ()
    free = net.generate(batch, max_new_tokens=NEW)
    stop = free[0][4]
    net.stop_ids = (stop, 5)
    found = net.generate(batch, max_new_tokens=NEW)
    for ids, before in zip(found, free):
        end = next((i for i, token in enumerate(before) if token in net.stop_ids), NEW)
        assert ids == before[:end]
    assert len(found[0]) <= 4


def test_sampling_is_a_function_of_its_seed(run: tuple[Path, MultimodalLM, Processor], tmp_path: Path) -> None:
    _, net, processor = run
    net.stop_ids = ()
    batch = processor(prompts(tmp_path), media_root=str(tmp_path))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first, again, other = (net.generate(batch, max_new_tokens=NEW, temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    greedy = net.generate(batch, max_new_tokens=NEW)
    assert first == again != other and first != greedy
    assert net.generate(batch, max_new_tokens=NEW, temperature=5.0, top_p=1e-6, seed=1) == greedy
    net.generate(batch, max_new_tokens=2, temperature=1.0)
    assert not torch.equal(torch.get_rng_state(), state)  # without a seed it is the global generator that is asked


def test_the_folders_own_generation_settings_decide_nothing(
    run: tuple[Path, MultimodalLM, Processor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, net, processor = run
    net.stop_ids = ()
    batch = processor(prompts(tmp_path), media_root=str(tmp_path))
    plain = net.generate(batch, max_new_tokens=NEW)
    settings = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 3.0, "no_repeat_ngram_size": 1}
    monkeypatch.setattr(net.llm, "generation_config", GenerationConfig(eos_token_id=plain[0][1], **settings))
    assert net.generate(batch, max_new_tokens=NEW) == plain


def test_after_the_prompt_one_token_at_a_time_passes_through(run: tuple[Path, MultimodalLM, Processor], tmp_path: Path) -> None:
    _, net, processor = run
    net.stop_ids = ()
    batch = processor(prompts(tmp_path), media_root=str(tmp_path))
    widths: list[int] = []
    hook = net.llm.get_decoder().register_forward_pre_hook(  # type: ignore[operator]
        lambda module, args, given: widths.append(next(given[k] for k in INPUTS if given.get(k) is not None).shape[1]),
        with_kwargs=True,
    )
    net.generate(batch, max_new_tokens=4)
    hook.remove()
    assert widths == [batch.input_ids.shape[1], 1, 1, 1]


def test_once_every_row_has_stopped_nothing_is_computed(run: tuple[Path, MultimodalLM, Processor], tmp_path: Path) -> None:
    _, net, processor = run
    net.stop_ids = ()
    batch = processor(prompts(tmp_path), media_root=str(tmp_path))
    net.stop_ids = tuple({ids[2] for ids in net.generate(batch, max_new_tokens=NEW)})
    passes: list[int] = []
    hook = net.llm.get_decoder().register_forward_pre_hook(lambda module, args: passes.append(1))  # type: ignore[operator]
    assert max(map(len, net.generate(batch, max_new_tokens=NEW))) <= 2
    hook.remove()
    assert len(passes) <= 3


def test_training_attention_is_back_afterwards_even_after_an_error(
    run: tuple[Path, MultimodalLM, Processor], tmp_path: Path
) -> None:
    _, net, processor = run
    batch = processor(prompts(tmp_path), media_root=str(tmp_path))
    with pytest.raises(ValueError, match="max_new_tokens = 0 is not positive"):
        net.generate(batch, max_new_tokens=0)
    image = batch.media["image"]
    with pytest.raises(ValueError, match="feature rows"):
        net.generate(replace(batch, media={"image": replace(image, slots=image.slots[1:])}), max_new_tokens=1)
    assert net.llm.config._attn_implementation == NAME  # type: ignore[union-attr]


def test_ids_are_told_as_they_are_chosen(run: tuple[Path, MultimodalLM, Processor], tmp_path: Path) -> None:
    """Up to the stop id; what the listener raises ends the row, and several rows are refused."""
    _, net, processor = run
    net.stop_ids = ()
    records = prompts(tmp_path)
    batch = processor(records[:1], media_root=str(tmp_path))
    ids = net.generate(batch, NEW)[0]
    told: list[int] = []
    options = GenerationOptions(NEW, (ids[-1],), net.pad_id, on_token=told.append)
    assert net.generate_with(batch, options) == [ids[: ids.index(ids[-1])]] == [told]

    def leave(token: int) -> None:
        told.append(token)
        raise ConnectionResetError

    told.clear()
    with pytest.raises(ConnectionResetError):
        net.generate_with(batch, replace(options, stop_ids=(), on_token=leave))
    assert told == ids[:1]
    with pytest.raises(ValueError, match="one row, and there are 2"):
        net.generate_with(processor(records[:2], media_root=str(tmp_path)), options)
