"""GLM-4.1V and GLM-4.6V-Flash beyond the laws of all families: what ends an answer, times behind frames, what is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Glm4vForConditionalGeneration, Glm4vProcessor
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil, smart_resize
from transformers.models.glm46v.processing_glm46v import Glm46VProcessor
from transformers.video_utils import VideoMetadata

from data.media.blob import MediaError
from data.media.pixel_budget import clip_size
from data.processor import load_processor
from data.records.record import RecordError
from model.card import make_card
from model.config import LoraConfig
from model.errors import ConfigError
from model.llm.causal_lm import VocabularyLayout
from model.load import load_model
from model.media_spec import NativeSpec
from tests.support.published.asking import run_from
from tests.support.published.glm import GLM_MAKERS, OWN, SIGNS, glm4v, save_clip_sizes
from tests.support.published.native import native_reader
from tests.support.published.native_films import FRAMES, noise, opened, patches_of, spoken
from tests.support.published.native_runs import picture, talk
from tests.support.tiny_media import folder
from tools.export_adapter import export
from tools.exports.proofs import logits
from tools.import_model import main as import_model
from trainer.trial.published_shapes import published_shape

LISTS = OWN.replace(" if msg.content is string else msg.content[0].text", "")
"""GLM-4.1V's way with anyone's content but a user's: it is printed, a list as a list."""
END = "<|user|>"
NAME = "zai-org/GLM-4.1V-9B-Thinking"


def as_46(published: Path) -> None:
    """The folder of a GLM-4.6V-Flash: the same class, with processors of its own name."""
    for file in ("preprocessor_config.json", "processor_config.json"):
        text = (published / file).read_text()
        (published / file).write_text(text.replace("Glm4v", "Glm46V"))


READERS: dict[str, tuple[Any, Callable[[Path], None]]] = {
    "Glm4v": (Glm4vProcessor, lambda published: None),
    "Glm46V": (Glm46VProcessor, as_46),
}


def said(*turns: str, system: str = "") -> dict[str, Any]:
    roles = [("user", "assistant")[i % 2] for i in range(len(turns))]
    system_turn = [{"role": "system", "content": system}] if system else []
    return {"messages": [*system_turn, *({"role": role, "content": text} for role, text in zip(roles, turns))]}


@pytest.mark.parametrize("template", [OWN, LISTS])
def test_the_next_turns_token_ends_an_answer(tmp_path: Path, template: str) -> None:
    """Behind the last one too, where the model's own template writes nothing; all else is as that writes it."""
    glm4v(tmp_path / "published", True, template)
    data, _ = opened(run_from(tmp_path / "published", tmp_path / "run"))
    tokenizer = data.processor.tokenizer
    record = said("Hello.", "Yes?", "What?", "A cat.", system="Be kind.")
    batch = data.processor([record], answers=True)
    theirs = tokenizer.apply_chat_template(record["messages"], chat_template=template, tokenize=True, return_dict=True)["input_ids"]
    end = tokenizer.convert_tokens_to_ids(END)
    assert batch.input_ids[0].tolist() == [*theirs, end] and theirs[-1] != end
    learned = [id for id in batch.labels[0].tolist() if id != -100]
    assert tokenizer.decode(learned) == f"Yes?{END}A cat.{END}"
    prompt = data.processor([said("Hello.")]).input_ids[0].tolist()
    asked = {"chat_template": template, "tokenize": True, "return_dict": True, "add_generation_prompt": True}
    assert prompt == tokenizer.apply_chat_template(said("Hello.")["messages"], **asked)["input_ids"]
    assert data.processor.stop_ids[0] == end


def test_an_end_that_cannot_be_is_refused(tmp_path: Path) -> None:
    published = tmp_path / "published"
    glm4v(published, True, OWN)
    with pytest.raises(ConfigError, match="no token ends the assistant's turn"):
        opened(run_from(published, tmp_path / "run", data={"answer_end": ""}))
    with pytest.raises(ConfigError, match=r"data.answer_end = '<\|bye\|>' is no token of the tokenizer"):
        opened(run_from(published, tmp_path / "run", data={"answer_end": "<|bye|>"}))
    with pytest.raises(ConfigError, match=r"data.answer_end = '<\|user\|>' has no effect: data.template = 'phi3'"):
        run_from(published, tmp_path / "run", data={"answer_end": END, "template": "phi3"})
    assert run_from(published, tmp_path / "run", data={"template": "phi3"}).data.answer_end == ""


def test_a_call_of_tools_has_no_such_end(tmp_path: Path) -> None:
    """What ends it is another token, which its template writes before the answer of the tool, and not behind the last turn."""
    calling = LISTS.replace("{%- endfor %}\n{% if", "CALLS{%- endfor %}\n{% if")
    calling = calling.replace(
        "CALLS",
        "{%- if msg.tool_calls %}{{ msg.tool_calls[0].function | tojson }}{% endif %}"
        "{%- if msg.role == 'tool' %}<|observation|>{{ msg.content }}{% endif %}",
    )
    glm4v(tmp_path / "published", True, calling)
    data, _ = opened(run_from(tmp_path / "published", tmp_path / "run"))
    called = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}],
    }
    asked = {"role": "user", "content": "What?"}
    answered = [asked, called, {"role": "tool", "content": "7"}, {"role": "assistant", "content": "Seven."}]
    batch = data.processor([{"messages": answered}], answers=True)
    learned = [id for id in batch.labels[0].tolist() if id != -100]
    assert data.processor.tokenizer.decode(learned) == f'{{"name": "look", "arguments": {{"at": 1}}}}<|observation|>Seven.{END}'
    with pytest.raises(RecordError, match="no token ends the assistant's turn"):
        data.processor([{"messages": [asked, called]}], answers=True)


@pytest.mark.parametrize("name", READERS)
def test_a_folder_as_published_goes_out_with_its_own_processors(tmp_path: Path, name: str) -> None:
    """Its template prints lists, and its processors are of either name."""
    glm4v(tmp_path / "published", True, LISTS)
    READERS[name][1](tmp_path / "published")
    save_clip_sizes(tmp_path / "published", 4096, 40_960)
    assert import_model([str(tmp_path / "published"), str(tmp_path / "ours")]) == 0
    export(tmp_path / "ours", tmp_path / "out", "hf")
    files = {part: json.loads((tmp_path / "out" / f"{part}_config.json").read_text()) for part in ("preprocessor", "processor")}
    assert files["preprocessor"]["image_processor_type"] == f"{name}ImageProcessor"
    assert files["processor"]["processor_class"] == f"{name}Processor"
    assert files["processor"]["video_processor"]["video_processor_type"] == f"{name}VideoProcessor"
    assert files["processor"]["video_processor"]["size"] == {"shortest_edge": 4096, "longest_edge": 40_960}
    assert files["preprocessor"]["size"] == {"shortest_edge": 8 * 64, "longest_edge": 80 * 64}
    assert import_model([str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    record = talk(picture(tmp_path, 97, 61), picture(tmp_path, 12, 16))
    batches = [load_processor(tmp_path / side)([record], answers=True) for side in ("ours", "again")]
    assert torch.equal(batches[0].input_ids, batches[1].input_ids)
    first, second = (logits(load_model(tmp_path / side), batch) for side, batch in zip(("ours", "again"), batches))
    assert torch.equal(first, second)


def written_by(reader: Any, text: str, grids: list[list[int]], fps: float) -> list[int]:
    """Ids of videos that the reader is told the grids of, and that every frame at `fps` was taken."""
    reader.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    counts = [count + count % 2 for count in FRAMES]
    facts = [
        VideoMetadata(total_num_frames=n, fps=fps, frames_indices=[*range(k), *[k - 1] * (n - k)]) for k, n in zip(FRAMES, counts)
    ]
    told = {"video_grid_thw": torch.tensor(grids), "video_metadata": facts}
    replaced = [reader.replace_video_token(told, i) for i in range(len(grids))]
    for video in replaced:
        text = text.replace(SIGNS["video"], video.replace(SIGNS["video"], SIGNS["image"]), 1)
    found: list[int] = reader.tokenizer(text)["input_ids"]
    return found


def test_frames_are_of_the_size_that_its_processor_picks(tmp_path: Path) -> None:
    """Of an odd number of frames, which its processor fills up before."""
    glm4v(tmp_path / "published", True)
    save_clip_sizes(tmp_path / "published", 2048, 40_960)
    data, _ = opened(run_from(tmp_path / "published", tmp_path / "run"))
    spec, chance = data.processor.specs["image"], random.Random(0)
    assert isinstance(spec, NativeSpec)
    sizes = {"factor": 8, "min_pixels": 2048, "max_pixels": 40_960}
    seen = set()
    for _ in range(300):
        size, count = (int(2 ** chance.uniform(0, 9)), int(2 ** chance.uniform(0, 9))), chance.randint(1, 9)
        try:
            theirs = smart_resize(num_frames=count + count % 2, height=size[1], width=size[0], **sizes)[::-1]
        except ValueError:
            theirs = None
        try:
            ours = clip_size(size, count, spec, data.processor.config)
        except MediaError:
            ours = None
        assert ours == theirs, (size, count)
        seen.add(theirs)
    assert len(seen) > 50 and None in seen


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("fps", [2.0, 0.7])
def test_videos_are_those_of_transformers(tmp_path: Path, name: str, fps: float) -> None:
    """Ids, patches, positions and logits; transformers' class reads no pictures beside videos."""
    published, (cls, renamed) = tmp_path / "published", READERS[name]
    glm4v(published, True)
    renamed(published)
    save_clip_sizes(published, 64, 2**20)  # no frame is of another size than it would be alone
    data, model = opened(run_from(published, tmp_path / "run", data={"fps": fps, "min_frames": 1}))
    reader = native_reader(published, cls, Glm4vImageProcessorPil)
    films = [noise(count, (60 + count, 30)) for count in FRAMES]
    shown = [{"type": "video", "path": str(folder(tmp_path / str(len(film)), film))} for film in films]
    batch = data.processor([spoken(*shown)], answers=True)
    pixels, grids = zip(*(patches_of(reader, film) for film in films))
    assert torch.equal(batch.media["image"].values, torch.cat(pixels))
    text = reader.apply_chat_template(spoken(*shown)["messages"], tokenize=False)
    ids = batch.input_ids
    assert ids[0].tolist() == written_by(reader, text, list(grids), fps)
    inputs: dict[str, Tensor] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.cat(pixels).flatten(1),
        "video_grid_thw": torch.tensor(grids),
        "mm_token_type_ids": torch.tensor(reader.create_mm_token_type_ids(ids.tolist())),
    }
    theirs = Glm4vForConditionalGeneration.from_pretrained(published, dtype=torch.float32).eval()
    indexed = {key: value for key, value in inputs.items() if not key.startswith("pixel")}
    assert torch.equal(batch.position_ids, theirs.model.get_rope_index(**indexed)[0])
    with torch.no_grad():
        torch.testing.assert_close(logits(model, batch), theirs(**inputs).logits[0], rtol=1e-5, atol=1e-5)


def test_a_picture_beside_a_video_keeps_its_own_signs(tmp_path: Path) -> None:
    published = tmp_path / "published"
    glm4v(published, True)
    data, _ = opened(run_from(published, tmp_path / "run", data={"fps": 2.0}))
    film = {"type": "video", "path": str(folder(tmp_path / "film", noise(4, (60, 30))))}
    still = picture(tmp_path, 33, 50)
    found = data.processor.tokenizer.decode(data.processor([spoken(still, film, still)], answers=True).input_ids[0])
    shown = found.replace(SIGNS["image"], "")
    around, video = f"{SIGNS['image_start']}{SIGNS['image_end']}", (SIGNS["video_start"], SIGNS["video_end"])
    assert f"{around}{video[0]}{around}0{around}1{video[1]}{around}What?" in shown


def changed(published: Path, file: str, **values: Any) -> None:
    """Write values by dotted keys, joined by two underscores, into a JSON file; None removes a key."""
    whole = json.loads((published / file).read_text())
    for key, value in values.items():
        *parts, last = key.split("__")
        inner = whole
        for part in parts:
            inner = inner[part]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    (published / file).write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("file", "values", "wrong"),
    [
        (
            "config.json",
            {"text_config__rope_scaling__rope_type": "linear", "text_config__rope_scaling__factor": 2.0},
            "rope_type = 'linear'",
        ),
        ("config.json", {"text_config__head_dim": 8}, "head_dim = 8 in config.json"),
        ("config.json", {"text_config": None}, "config.json has no text_config"),
        ("config.json", {"vision_config__hidden_act": "gelu"}, "vision_config.hidden_act = 'gelu'"),
        ("config.json", {"vision_config__spatial_merge_size": 4}, "vision_config.spatial_merge_size = 4"),
        ("config.json", {"vision_config__out_hidden_size": 48}, "vision_config.out_hidden_size = 48"),
        ("config.json", {"image_token_id": 7}, "features take the place of token 7"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize = false"),
        ("preprocessor_config.json", {"size__longest_edge": 5121}, "only multiples of 2 are read"),
        ("preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor"}, "'Qwen2VLImageProcessor' is not"),
    ],
)
def test_what_its_class_would_read_otherwise_is_refused(tmp_path: Path, file: str, values: dict[str, Any], wrong: str) -> None:
    glm4v(tmp_path / "published", True)
    changed(tmp_path / "published", file, **values)
    with pytest.raises(ConfigError, match=wrong.replace("(", r"\(")):
        opened(run_from(tmp_path / "published", tmp_path / "run"))


def test_a_smaller_part_of_a_head_may_turn(tmp_path: Path) -> None:
    """A part that is not half, which GLM-4 has where nothing is said."""
    published = tmp_path / "published"
    glm4v(published, False, rope_parameters={"rope_type": "default", "rope_theta": 500.0, "mrope_section": [4, 2, 2]})
    data, model = opened(run_from(published, tmp_path / "run"))
    reader = GLM_MAKERS["glm4v"].read(published)
    record = talk(picture(tmp_path, 97, 61))
    inputs = reader.apply_chat_template(record["messages"], tokenize=True, return_dict=True, return_tensors="pt")
    theirs = Glm4vForConditionalGeneration.from_pretrained(published, dtype=torch.float32).eval()
    with torch.no_grad():
        found = logits(model, data.processor([record], answers=True))
        torch.testing.assert_close(found, theirs(**inputs).logits[0], rtol=1e-5, atol=1e-5)


def test_what_its_config_leaves_out_is_as_its_class_has_it(tmp_path: Path) -> None:
    """GLM-4's class fills in other values."""
    published = tmp_path / "published"
    glm4v(published, True)
    left_out = ("rms_norm_eps", "pad_token_id", "initializer_range")
    changed(published, "config.json", **{f"text_config__{key}": None for key in left_out})
    _, model = opened(run_from(published, tmp_path / "run"))
    theirs = Glm4vForConditionalGeneration.from_pretrained(published)
    ours, expected = (
        net.model.layers[0].input_layernorm for net in (model.llm, SimpleNamespace(model=theirs.model.language_model))
    )
    assert ours.variance_epsilon == expected.variance_epsilon == 1e-5
    assert {key: getattr(model.llm.config, key) for key in left_out} == {
        key: getattr(theirs.config.text_config, key) for key in left_out
    }


def test_the_built_in_shape_has_a_table_of_positions(tmp_path: Path) -> None:
    for file, value in (published_shape(NAME) or {}).items():
        (tmp_path / file).write_text(json.dumps(value))
    spec = make_card(run_from(tmp_path, tmp_path / "run").model, LoraConfig(), VocabularyLayout()).specs["image"]
    assert isinstance(spec, NativeSpec) and spec.table == 24
