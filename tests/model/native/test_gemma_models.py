"""Gemma 3: what tokens of a picture see, in every way in which rows are put together, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.collate import collate, collate_packed, picture_runs
from model.batch import Batch, Media
from model.config import VisionConfig
from model.errors import ConfigError
from model.llm import attention
from model.llm.attention import causal_attention, packed_attention
from model.llm.causal_lm import blocks
from model.llm.decoder_options import masked_attention
from model.llm.picture_attention import PictureMasks, allow_two_way
from model.vision.tower import VisionTower, vision_config
from tests.support.published.asking import run_from
from tests.support.published.gemma import GEMMA_MAKERS, PER_PICTURE, WINDOW
from tests.support.published.native_runs import BothModels, assert_same_gradients, both_models, built, few_records, picture, talk
from trainer.distributed.blocks import block_owner, checkpoint_activations
from trainer.memory.simulate import live_bytes
from trainer.runfile.load import parse_config

WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "crops": ("preprocessor_config.json", {"do_pan_and_scan": True}, "do_pan_and_scan = true among .* are not cut into crops"),
    "bytes": ("preprocessor_config.json", {"do_rescale": False}, "do_rescale = false"),
    "size": ("preprocessor_config.json", {"size": {"height": 32, "width": 32}}, "size = 32 among .*image_size = 24"),
    "counted": ("processor_config.json", {"image_seq_length": 256}, "image_seq_length = 256 .* mm_tokens_per_image = 9"),
    "pooled": ("config.json", {"mm_tokens_per_image": 36}, "image_seq_length = 9 .* mm_tokens_per_image = 36"),
    "token": ("config.json", {"image_token_index": 3}, "take the place of token 3 by config.json"),
    "template": ("chat_template.json", {"chat_template": None}, "no chat template, by which pictures are written"),
}
NESTED = {
    "norm": ("vision_config", {"layer_norm_eps": 1e-5}, "layer_norm_eps = 1e-05 in config.json"),
    "reader": ("text_config", {"use_bidirectional_attention": True}, "use_bidirectional_attention = true"),
    "squares": ("vision_config", {"image_size": 24, "patch_size": 8}, "mm_tokens_per_image = 9 in config.json for 3 x 3 patches"),
}
HEADS, GROUPS, WIDTH = 4, 2, 8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BothModels]:
    folder = tmp_path_factory.mktemp("gemma3")
    yield both_models("gemma3", folder / "published", folder / "run")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "published"
    GEMMA_MAKERS["gemma3"].write(folder, True)
    return folder


@pytest.mark.parametrize("case", [*WRONG, *NESTED])
def test_files_that_do_not_fit_are_refused(published: Path, tmp_path: Path, case: str) -> None:
    shutil.copytree(published, tmp_path / "changed")
    name, changed, message = WRONG.get(case) or ("config.json", {}, NESTED[case][2])
    file = tmp_path / "changed" / name
    value = json.loads(file.read_text())
    if case in NESTED:
        part, inner, _ = NESTED[case]
        changed = {part: {**value[part], **inner}}
    file.write_text(json.dumps({**value, **changed}))
    with pytest.raises(ConfigError, match=message):
        run_from(tmp_path / "changed", tmp_path / "run")


def test_a_template_with_the_sign_in_another_form_is_refused(published: Path, tmp_path: Path) -> None:
    """It could not be found where the processor would expand it."""
    shutil.copytree(published, tmp_path / "changed")
    file = tmp_path / "changed" / "chat_template.json"
    file.write_text(file.read_text().replace("{{ '<start_of_image>' }}", "<start_of_image>"))
    with pytest.raises(ConfigError, match="the chat template holds '<start_of_image>'"):
        built(run_from(tmp_path / "changed", tmp_path / "run"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"compile": True}}, "parallel.compile = True with model.llm.image_attention = 'two_way'"),
        ({"model": {"attention": "eager"}}, "model.attention = 'eager' with model.llm.image_attention = 'two_way'"),
        ({"model": {"vision": {"layer": -2}}}, "model.vision.layer = -2"),
        ({"model": {"llm": {"image_attention": "causal"}}}, 'model.llm.image_attention = "causal", but .* has "two_way"'),
        ({"data": {"image_fit": "pad"}}, 'data.image_fit = "pad", but .* has "square"'),
        ({"data": {"template": "chatml"}}, 'data.template = "chatml", but .* has "auto"'),
    ],
)
def test_settings_that_would_make_another_model_are_refused(
    published: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    model = {"init_from": str(published), "dtype": "float32", **sections.pop("model", {})}
    with pytest.raises(ConfigError, match=message):
        run_from(published, tmp_path / "run", model=model, **sections)


def test_both_ways_need_a_tower_and_a_language_model_that_was_compared(models: BothModels) -> None:
    with pytest.raises(ConfigError, match=r"image_attention = 'two_way' has no effect without \[model.vision\]"):
        parse_config(
            {"output_dir": "x", "model": {"llm": {"path": "x", "image_attention": "two_way"}}, "train": {"max_steps": 0}}, "x"
        )
    llm: Any = nn.Module()
    llm.config = type("Config", (), {"model_type": "llama"})
    with pytest.raises(ConfigError, match="with a language model of model_type 'llama': it is built for gemma3_text"):
        allow_two_way(llm)


def test_a_tower_without_such_a_norm_is_refused(published: Path) -> None:
    found = {"model_type": "clip_vision_model", "image_size": 24, "patch_size": 4, "num_hidden_layers": 2}
    with pytest.raises(ConfigError, match="final_norm = true: 'clip_vision_model' is not siglip_vision_model"):
        VisionTower(found, VisionConfig("", layer=-1, final_norm=True))
    config = VisionConfig(str(published), layer=-2, final_norm=True)
    with pytest.raises(ConfigError, match="read behind the norm of its last block: set it to -1"):
        VisionTower(vision_config(config), config)


def seen(length: int, runs: list[tuple[int, int]], window: int | None) -> Tensor:
    """What each token sees, (T, T), by the words of transformers: (causal or in one picture) and within the window behind."""
    groups = {place: i for i, (first, count) in enumerate(runs) for place in range(first, first + count)}
    found = torch.zeros(length, length, dtype=torch.bool)
    for q, k in product(range(length), repeat=2):
        together = q in groups and groups[q] == groups.get(k)
        found[q, k] = (k <= q or together) and (window is None or k > q - window)
    return found


@pytest.mark.parametrize("window", [None, 1, 3, 40])
def test_masks_hold_what_each_token_sees(window: int | None) -> None:
    """Of documents with no picture, one, and two side by side in the last; each at a place of its own among all."""
    lengths, runs = (4, 11, 17), [(5, 6), (15, 4), (19, 7), (28, 4)]
    masks, like = PictureMasks(runs[::-1], lengths), torch.zeros(1, dtype=torch.float64)
    inside: list[list[tuple[int, int]]] = [[], [(1, 6)], [(0, 4), (4, 7), (13, 4)]]
    assert [i in masks for i in range(3)] == [False, True, True]
    for i, (length, mine) in enumerate(zip(lengths, inside)):
        found = masks.of(i, window, like)
        assert found.dtype == torch.float64 and torch.equal(found == 0, seen(length, mine, window))
        assert bool((found[found != 0] == -torch.inf).all())
        alone = masks.alone(i)
        assert (alone is None) == (not mine)
        assert alone is None or torch.equal(alone.of(0, window, like), found)


def test_runs_of_pictures_end_at_borders_and_where_text_stands() -> None:
    """Two that touch inside a document are one, as in transformers."""
    slots = torch.tensor([3, 4, 5, 8, 9, 10, 11, 2, 0])
    media = {"image": Media(torch.zeros(1), torch.zeros(9, dtype=torch.long), slots)}
    assert picture_runs(media, torch.tensor([0, 4, 10, 12]).numpy()) == ((0, 1), (2, 2), (4, 2), (8, 2), (10, 2))
    assert picture_runs({}, torch.tensor([0, 4]).numpy()) == ()


class Layer(nn.Module):
    num_key_value_groups = HEADS // GROUPS


def row(length: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, length, WIDTH, dtype=torch.float64) for heads in (HEADS, GROUPS, GROUPS))
    return query, key, value


def expected_of(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, softcap: float | None) -> Tensor:
    """Attention written out (1, T, H, D)."""
    key, value = (tensor.repeat_interleave(HEADS // GROUPS, 1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("by_kernel", [False, True])
def test_documents_of_a_packed_row_attend_as_their_masks_say(
    monkeypatch: pytest.MonkeyPatch, window: int | None, softcap: float | None, by_kernel: bool
) -> None:
    """Documents without pictures go through the kernel without a mask, several at once."""
    lengths, pictures = (5, 4, 9, 3, 12, 6), [(10, 7), (22, 5), (28, 4)]
    query, key, value = row(sum(lengths))
    calls: list[list[int]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, options: dict[str, Any]) -> Tensor:
        calls.append(borders.tolist())
        assert longest == int(borders.diff().max()) and len(q[0, 0]) == borders[-1]
        parts = [tensor.split(borders.diff().tolist(), 2) for tensor in (q, k, v)]
        how: dict[str, Any] = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}
        return torch.cat([causal_attention(Layer(), *one, None, **how)[0] for one in zip(*parts)], 1)

    if by_kernel:
        monkeypatch.setattr(attention, "varlen_segments", kernel)
        monkeypatch.setattr(attention, "takes_varlen", lambda *_, **__: True)
    borders = torch.tensor([0, *lengths]).cumsum(0)
    how: dict[str, Any] = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}
    places = {"segment_lengths": lengths, "segment_borders": borders}
    found, _ = packed_attention(Layer(), query, key, value, None, **how, **places, pictures=PictureMasks(pictures, lengths))
    mask = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    for first, last in zip(borders.tolist(), borders.tolist()[1:]):
        inside = [(start - first, count) for start, count in pictures if first <= start < last]
        mask[first:last, first:last] = seen(last - first, inside, window)
    torch.testing.assert_close(found, expected_of(query, key, value, mask, softcap))
    assert calls == ([[0, 5, 9], [0, 3], [0, 6]] if by_kernel else [])


def test_a_picture_is_longer_than_the_window_and_its_first_token_sees_its_last(models: BothModels, tmp_path: Path) -> None:
    """Else no law here would tell both ways from one; padded and packed, and generation begins with it too."""
    assert PER_PICTURE > WINDOW
    record = talk(picture(tmp_path, 33, 44))
    batch, llm = models.batch(record), models.ours.llm
    (first, count), *rest = batch.pictures
    assert (count, rest) == (PER_PICTURE, [])
    both = [models.ours.decode(one) for one in (batch, models.packed([record]))]
    assert models.ours.generate(models.data.processor([record]), 1)[0]
    llm.image_attention = "causal"
    try:
        one_way = models.ours.decode(batch)
    finally:
        llm.image_attention = "two_way"
    for found in both:
        differs = (found - one_way)[0].abs().amax(-1) > 1e-3
        assert not differs[:first].any() and differs[first : first + count - 1].all()


def test_logits_in_float64_are_those_of_transformers_in_training(models: BothModels, tmp_path: Path) -> None:
    """No, one and two pictures, with token_type_ids as the processor returns them; padded and packed, to 1e-9."""
    records = few_records(tmp_path)
    ours, theirs = models.ours.double(), models.theirs.double().train()
    ours.dtype = torch.float64
    try:
        with torch.no_grad():
            expected = [theirs(**in_float64(models.inputs(record))).logits[0] for record in records]
            head = ours.llm.get_output_embeddings()
            padded = models.data.processor(records, answers=True)
            rows = [row[:length] for row, length in zip(head(ours.decode(padded)), padded.lengths)]
            packed = head(ours.decode(models.packed(records)))[0].split(padded.lengths)
        for wanted, *found in zip(expected, rows, packed, strict=True):
            for one in found:
                torch.testing.assert_close(one, wanted, rtol=1e-9, atol=1e-9)
    finally:
        ours.float()
        ours.dtype = torch.float32
        theirs.float().eval()


def in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The pixels in float64."""
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputed_blocks_learn_the_same(models: BothModels, tmp_path: Path, kind: str) -> None:
    for batch in (models.data.processor(few_records(tmp_path), answers=True), models.packed(few_records(tmp_path))):
        expected = models.our_gradients(batch)
        checkpoint_activations(models.ours, kind)
        assert_same_gradients(models.our_gradients(batch), expected)
        for part in ("llm", "vision"):
            for block in blocks(block_owner(models.ours, part)):
                del vars(block)["forward"]


def test_prompts_on_either_side_of_their_padding_are_read_alike(models: BothModels, tmp_path: Path) -> None:
    """By the masks of generation, in transformers' own attention."""
    records = few_records(tmp_path)
    right = models.data.processor(records, answers=True)
    expected = models.ours.decode(right)
    samples = [models.data.processor._sample(i, record, True, None, False) for i, record in enumerate(records)]
    left: Batch = collate(samples, models.data.pad_id, "left")
    with torch.no_grad(), masked_attention(models.ours.llm):
        found = models.ours.decode(left)
        same = models.ours.decode(replace(right))
    for i, length in enumerate(right.lengths):
        torch.testing.assert_close(found[i, -length:], expected[i, :length], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(same[i, :length], expected[i, :length], rtol=1e-5, atol=1e-5)
    assert collate_packed([], 0).pictures == ()


def test_a_plan_counts_the_masks_that_layers_keep(models: BothModels, tmp_path: Path) -> None:
    """One for all layers of a kind, in backward too."""
    model, batch = deepcopy(models.ours).to("meta"), models.batch(talk(picture(tmp_path, 33, 44))).to(torch.device("meta"))

    def held(way: str) -> int:
        model.llm.image_attention = way
        return live_bytes(model, lambda: model(batch)["text"].sum, []).activations

    length = batch.input_ids.shape[1]
    masks = 2 * length * (length + -length % 16) * 4
    assert masks <= held("two_way") - held("causal") <= 1.5 * masks
