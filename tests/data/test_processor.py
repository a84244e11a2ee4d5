"""Inference sees what training saw: the same ids and pixels, prompts that are their beginning, files that prove themselves."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from data import load_processor
from data.collate import collate
from data.config import DataConfig
from data.processor import Processor
from data.records.record import RecordError
from data.text.template import TemplateOptions, load_template
from model.batch import IGNORE_INDEX, Batch
from model.errors import ConfigError
from tests.support.tiny_data import SPECS, WIDTH, dataset, grey, image_id, level, sample, talk, template
from tests.support.tiny_tokenizers import tiny_tokenizer


def processor(name: str = "auto", tokenizer: str = "qwen", **config: object) -> Processor:
    made = load_template(name, tiny_tokenizer(tokenizer))
    return Processor(made, SPECS, DataConfig(name, **config))  # type: ignore[arg-type]


def equal(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, key), getattr(b, key)) for key in ("input_ids", "labels", "attention_mask", "position_ids", "supervised")]
    pairs += [(getattr(a.media[m], key), getattr(b.media[m], key)) for m in a.media for key in ("values", "rows", "slots")]
    return a.media.keys() == b.media.keys() and all(x is y is None or torch.equal(x, y) for x, y in pairs)


def rows(batch: Batch) -> list[list[int]]:
    mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    return [ids[keep.bool()].tolist() for ids, keep in zip(batch.input_ids, mask)]


def test_answers_give_the_batch_that_training_sees(tmp_path: Path) -> None:
    records = [talk("<image> what?", "A cat.", images=[grey(tmp_path, 10)]), talk("Hi", "Yes.", "No?", "Well.")]
    data = dataset(tmp_path, records)
    expected = collate([sample(data, i) for i in range(2)], 0)
    batch = processor()(records, answers=True, media_root=str(tmp_path))
    assert torch.equal(batch.labels, expected.labels) and batch.num_supervised > 0
    assert torch.equal(batch.media["image"].values, expected.media["image"].values)
    assert rows(batch) == rows(expected)


def test_prompts_are_how_the_training_rows_begin_and_pad_left(tmp_path: Path) -> None:
    records = [talk("<image> what is this thing?", "A cat.", images=[grey(tmp_path, 10)]), talk("Hi", "Yes.", "No?", "Well.")]
    build = processor()
    prompts, whole = build(records, media_root=str(tmp_path)), build(records, answers=True, media_root=str(tmp_path))
    assert prompts.attention_mask is not None and prompts.num_supervised == 0
    assert (prompts.attention_mask[:, -1] == 1).all() and prompts.attention_mask[:, 0].tolist() != [1, 1]
    for row, (prompt, full) in enumerate(zip(rows(prompts), rows(whole))):
        assert full[: len(prompt)] == prompt
        last = [t for t, label in enumerate(whole.labels[row].tolist()) if label != IGNORE_INDEX]
        starts = [t for t in last if t - 1 not in last]
        assert len(prompt) == starts[-1] + 1
        assert prompts.position_ids[row][prompts.attention_mask[row] == 1].tolist() == list(range(len(prompt)))
    slots = prompts.media["image"].slots
    assert (prompts.input_ids.flatten()[slots] == image_id()).all() and len(slots) == WIDTH


def test_a_record_with_and_without_its_answer_ask_the_same() -> None:
    build = processor()
    assert equal(build([talk("Hi", "Yes.")]), build([talk("Hi")]))


def test_only_whole_conversations_have_answers() -> None:
    with pytest.raises(RecordError, match=r"^records:1 1: conversations: .*answer must come last"):
        processor()([talk("Hi", "a"), talk("Hi")], answers=True)


def test_a_person_names_files_from_here_or_by_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    grey(tmp_path, 10)
    for path in ("../10.png", str(tmp_path / "10.png")):
        assert level(processor()([talk("what?", images=path)]).media["image"].values[0]) == 10
    with pytest.raises(RecordError, match=r"^records:0 x: image: '../10.png' leaves media_root"):
        processor()([talk("what?", images="../10.png", id="x")], media_root=str(tmp_path / "sub"))


def test_the_settings_of_the_run_hold(tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), (200, 200, 200)).save(tmp_path / "wide.png")
    record = talk("what?", images=str(tmp_path / "wide.png"), id="x")
    padded, cropped = (processor(image_fit=fit)([record]).media["image"].values for fit in ("pad", "square"))
    assert level(cropped[0]) == 200 and not torch.equal(padded, cropped)
    with pytest.raises(RecordError, match=r"records:0 x: image: .*data.max_pixels allows 100"):
        processor(max_pixels=100)([record])
    with pytest.raises(RecordError, match=r"2 images; data\.max_images allows 1"):
        processor(max_images=1)([talk("what?", images=["a", "b"])])
    with pytest.raises(RecordError, match="the first round takes"):
        processor(max_length=10)([talk("what?", "a")], answers=True)
    assert processor(max_length=10)([talk("what?")]).input_ids.shape[1] > 10


def test_decoding_stops_at_the_end_of_the_answer() -> None:
    build = processor()
    tokenizer = build.tokenizer
    ids = tokenizer(" A cat.", add_special_tokens=False)["input_ids"]
    stop, pad = build.stop_ids[0], tokenizer.pad_token_id
    assert build.decode([[*ids, stop, *ids], [*ids, pad], [stop]]) == ["A cat.", "A cat.", ""]
    assert build.decode(torch.tensor([[*ids, stop, pad]])) == ["A cat."]


NAMES = [("auto", "qwen"), ("auto", "llama3"), ("vicuna_v1", "llama"), ("chatml", "bytes"), ("llama2", "llama_first")]


@pytest.mark.parametrize("name,tokenizer", NAMES)
def test_a_saved_processor_is_the_one_that_was_saved(tmp_path: Path, name: str, tokenizer: str) -> None:
    records = [
        talk("<image> what  is\nthis?", "A cat </s> <|im_end|>.", images=[grey(tmp_path, 10)]),
        talk("Hi", "Yes.", "No?", "W."),
    ]
    made = processor(name, tokenizer, max_length=300, max_images=3, max_pixels=12345, image_fit="square")
    made.save(tmp_path / "final")
    loaded = load_processor(tmp_path / "final")
    assert loaded.specs == SPECS and loaded.stop_ids == made.stop_ids
    assert loaded.config == made.config
    for answers in (False, True):
        batches = [p(records, answers=answers, media_root=str(tmp_path)) for p in (made, loaded)]
        assert equal(*batches)
    loaded.save(tmp_path / "again")
    for file in sorted((tmp_path / "final").iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    assert AutoTokenizer.from_pretrained(tmp_path / "final").chat_template == made.template.source


def test_new_tokens_and_wraps_of_the_run_come_back(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("qwen").__class__.from_pretrained(saved_copy(tmp_path))
    tokenizer.add_tokens(["<new>", "<im_start>", "<im_end>"], special_tokens=True)
    options = {"placeholders": "first", "media_wrap": ("<im_start>", "<im_end>")}
    made_of = load_template("auto", tokenizer, TemplateOptions(allowed=("<new>", "<im_start>", "<im_end>"), **options))
    made = Processor(made_of, SPECS, DataConfig(**options))
    made.save(tmp_path / "final")
    loaded = load_processor(tmp_path / "final")
    assert loaded.config == made.config
    record = talk("say <new> of <image>", "<new>", images=[str(tmp_path / grey(tmp_path, 10))])
    ids = tokenizer.convert_tokens_to_ids(["<new>", "<im_start>", "<im_end>"])
    batches = [p([record], answers=True) for p in (made, loaded)]
    assert equal(*batches) and [batches[1].input_ids.tolist()[0].count(i) for i in ids] == [2, 1, 1]
    begin = batches[1].input_ids.tolist()[0].index(ids[1])
    assert batches[1].input_ids[0, begin + 1 : begin + 2 + WIDTH].tolist() == [image_id()] * WIDTH + [ids[2]]


def saved_copy(folder: Path) -> Path:
    tiny_tokenizer("qwen").save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def edited(folder: Path, **changes: object) -> Path:
    processor().save(folder)
    stored = json.loads((folder / "processor.json").read_text())
    (folder / "processor.json").write_text(json.dumps({k: v for k, v in {**stored, **changes}.items() if v is not None}))
    return folder


def test_files_that_changed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"processor.json cannot be read: No such file"):
        load_processor(tmp_path)
    for changes, reason in [
        ({"version": 7}, "has version 7, this program reads 2"),
        ({"specs": None}, "damaged: KeyError 'specs'"),
        ({"specs": {"image": {"size": 1}}}, "damaged: KeyError .kind"),
        ({"specs": {"image": {"kind": "image", "size": 1}}}, "damaged: TypeError .*patch"),
        ({"stop_ids": [1]}, "is not the one the run used"),
        ({"fingerprint": {"Hello world": [1, 2]}}, "tokenizer has changed: 'Hello world'"),
    ]:
        with pytest.raises(ConfigError, match=reason):
            load_processor(edited(tmp_path / "final", **changes))
    folder = edited(tmp_path / "final")
    (folder / "processor.json").write_text("{")
    with pytest.raises(ConfigError, match=r"processor\.json is damaged"):
        load_processor(folder)
    folder = edited(tmp_path / "final")
    template_file = folder / "chat_template.jinja"
    template_file.write_text(template_file.read_text().replace("helpful", "useless"))
    with pytest.raises(ConfigError, match="template 'auto' is not the one the run used"):
        load_processor(folder)


def test_the_template_in_use_is_what_the_tests_call_auto() -> None:
    assert processor().template.source == template().source
