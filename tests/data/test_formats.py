"""Laws of the formats of our own: to the character what their systems write; media of every kind in their places."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.check.certificate import certify
from data.records.record import Record, RecordError
from data.text.chat_formats import FORMATS
from data.text.template import Encoded, Template, load_template
from model.errors import ConfigError, DataError
from tests.support.formats import FITTING, index_of, talk, template, text
from tests.support.tiny_tokenizers import NAMES

TALKING = [name for name in FITTING if name != "plain"]


def test_every_format_has_a_tokenizer_here() -> None:
    assert FITTING.keys() == FORMATS.keys()


BASE = (
    "You are an assistant for text, pictures, video and speech. \n- Be helpful, honest and harmless. \n"
    "- Talk with the user fluently, in the language that the user chooses. \n"
    "- When the user points out a mistake in an answer, apologise and work out the right one together."
)
SEEN = BASE + " \n- Answer strictly from what the {0} shows; when the {0} does not show what is asked, say so."
MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
WRITTEN = {
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nr<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>",
    "gemma": "<bos><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n"
    "<start_of_turn>user\nr<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n",
    "mpt": f"<s><|im_start|>system\n{MPT}<|im_end|><|im_start|>user\nq<|im_end|><|im_start|>assistant\na<|im_end|>"
    "<|im_start|>user\nr<|im_end|><|im_start|>assistant\nb<|im_end|>",
    "vita_qwen": f"<|im_start|>system\n{BASE}<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|>",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_formats_write_these_texts(name: str) -> None:
    assert text(template(name), talk("q", "a", "r", "b")) == WRITTEN[name]


# Compared by their ids: decoding shows the space that these tokenizers put after a control token.
OF_PIECES = {
    "vita_mixtral": f"system:{BASE}</s>\nuser:q</s>\nbot:a</s>\nuser:r</s>\nbot:b</s>",
    "internlm2": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
    "phi3": "<|user|>\nq<|end|>\n<|assistant|>\na<|end|>\n<|user|>\nr<|end|>\n<|assistant|>\nb<|end|>\n<|endoftext|>",
}


@pytest.mark.parametrize("name", OF_PIECES)
def test_formats_of_sentence_pieces_write_these_texts(name: str) -> None:
    made = template(name)
    ids = made.encode(talk("q", "a", "r", "b")).input_ids
    assert ids == made.tokenizer(OF_PIECES[name])["input_ids"]
    assert (ids[0] == made.tokenizer.bos_token_id) == (name != "phi3")


@pytest.mark.parametrize("name", ["gemma", "phi3", "internlm2"])
def test_formats_of_families_are_the_tokenizers_own_templates(name: str) -> None:
    for record in (talk("<image> q ", " a", "r\n", "b "), talk("q", "a")):
        assert template(name).encode(record) == template("auto", name).encode(record)


@pytest.mark.parametrize("name", ["vita_mixtral", "vita_qwen", "mpt", "llama3", "phi3", "internlm2"])
def test_a_records_own_system_turn_takes_the_place_of_the_formats(name: str) -> None:
    written = text(template(name), talk("BE BRIEF", "<image> q", "a"))
    assert "BE BRIEF" in written and "assistant for text" not in written and "LLM-based" not in written


def test_gemma_refuses_a_system_turn() -> None:
    with pytest.raises(RecordError, match=r"f.json:7 r: conversations: .*gemma has no system turn; put its words into the first"):
        template("gemma").encode(talk("BE BRIEF", "q", "a"))


@pytest.mark.parametrize("name", ["vita_mixtral", "vita_qwen"])
@pytest.mark.parametrize(
    ("question", "system"),
    [
        ("q", BASE),
        ("<audio>", BASE),
        ("<image> q", SEEN.format("image")),
        ("<audio><image>", SEEN.format("image")),
        ("<video> q", SEEN.format("video")),
        ("<video><image> q", SEEN.format("image")),
    ],
)
def test_vitas_system_text_follows_the_kinds_of_media(name: str, question: str, system: str) -> None:
    made, record = template(name), talk(question, "a")
    shown = question.replace("<video>", "<image>")
    if name == "vita_qwen":
        expected = (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{shown}<|im_end|>\n<|im_start|>assistant\na<|im_end|>"
        )
    else:
        expected = f"system:{system}</s>\nuser:{shown}</s>\nbot:a</s>"
    ids = made.encode(record).input_ids
    assert ids == made.tokenizer(expected)["input_ids"]
    asked = dataclasses.replace(record, turns=record.turns[:-1])
    prompt = made.prompt(asked)
    assert ids[: len(prompt)] == prompt and made.encode(record).supervised.index(True) == len(prompt)


def test_a_video_is_written_as_an_image_is() -> None:
    record = talk("<video> and <image>, said <audio>", "a")
    plain = text(template("vita_qwen"), record)
    assert "user\n<image> and <image>, said <audio><|im_end|>" in plain
    wrapped = text(template("vita_qwen", media_wrap=("<Image>", "</Image>")), record)
    assert "user\n<Image><image></Image> and <Image><image></Image>, said <audio><|im_end|>" in wrapped
    first = text(
        template("vita_qwen", placeholders="first"), talk("See <video>, hear <audio>, and <image>", "a", "no <audio>", "b")
    )
    assert "user\n<image>\n<audio><image>\nSee , hear , and<|im_end|>" in first and "user\n<audio>no<|im_end|>" in first
    assert "<image><image><audio>a\n" in text(template("plain", "qwen"), talk("a <image> b <video><audio>", "a"))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    questions=st.lists(st.lists(st.sampled_from(["a", "\n", "<image>", "<video>", "<audio>"]), max_size=4), min_size=1, max_size=3),
    options=st.sampled_from([{}, {"placeholders": "first"}, {"media_wrap": ("<Image>", "</Image>")}]),
)
def test_placeholders_among_the_ids_stand_in_the_order_of_the_media(questions: list[list[str]], options: dict[str, Any]) -> None:
    made = template("vita_qwen", **options)
    record = talk(*(value for question in questions for value in ("q" + "".join(question), "ok")))
    by_id = {i: modality for modality, i in made.placeholder_ids.items()}
    found = [by_id[i] for i in made.encode(record).input_ids if i in by_id]
    assert found == [ref.modality for ref in record.media]
    assert [ref.kind for ref in record.media] == [p.strip("<>") for question in questions for p in question if p.startswith("<")]


def test_placeholders_are_counted_by_the_modality_that_reads_them() -> None:
    made = template("vita_qwen")
    assert made.placeholder_ids.keys() == {"image", "audio"}
    record = talk("<video><image>", "a")
    assert made.encode(record).input_ids.count(made.placeholder_ids["image"]) == 2
    with pytest.raises(RecordError, match="image: 2 placeholders in the ids, 1 files"):
        made.encode(dataclasses.replace(record, media=record.media[:1]))
    deaf = load_template("chatml", NAMES["bytes"]())
    for kind in ("video", "audio"):
        with pytest.raises(RecordError, match=f"{kind}: 1 files, but the model has no part for this modality"):
            deaf.encode(talk(f"<{kind}>", "a"))


@pytest.mark.parametrize(
    ("name", "of", "missing"),
    [
        ("llama3", "llama", "'<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'"),
        ("gemma", "qwen", "'<start_of_turn>', '<end_of_turn>'"),
        ("phi3", "bytes", "'<|system|>', '<|user|>', '<|assistant|>', '<|end|>', which are no"),
        ("vita_qwen", "llama", "'<|im_start|>', '<|im_end|>'"),
        ("vita_mixtral", "qwen", "'</s>', which is no single token"),
    ],
)
def test_all_tokens_that_a_tokenizer_lacks_are_named_at_once(name: str, of: str, missing: str) -> None:
    with pytest.raises(ConfigError) as caught:
        template(name, of)
    assert missing in str(caught.value)


def row(i: int, **extra: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[k % 2], "value": v} for k, v in enumerate((f"<audio> q {i}", f"a {i}", "r", f"b {i}"))]
    return {"id": i, "audio": "a.wav", "conversations": turns, **extra}


@pytest.mark.parametrize("name", TALKING)
def test_interrupted_answers_end_the_row_and_are_certified(name: str, tmp_path: Path) -> None:
    made, end = template(name), FITTING[name][1]
    whole = talk("<audio> q", "one", "<audio> r", "two two")
    cut = dataclasses.replace(whole, interrupted=True)
    full, short = made.encode(whole), made.encode(cut)
    stop = len(short.input_ids)
    # The row is the same up to the answer's end; there it stops, and what would have ended the turn is not learned.
    assert short.input_ids == full.input_ids[:stop] and short.supervised == full.supervised[:stop]
    rest = made.tokenizer.decode(full.input_ids[stop:], skip_special_tokens=False)
    assert rest.strip().startswith(end) and short.supervised[-1]
    assert made.tokenizer.decode(short.input_ids).endswith("two")
    end_id = made.tokenizer.convert_tokens_to_ids(end)
    ends = [k for k, i in enumerate(short.input_ids) if i == end_id and short.supervised[k]]
    assert len(ends) == 1  # the first answer's
    # A cut to fewer rounds gives the rows of the shorter record, which nothing interrupted (Phi-3 closes every text).
    first = dataclasses.replace(whole, turns=whole.turns[:2], media=whole.media[:1])
    if name != "phi3":
        assert short.input_ids[: short.round_ends[0]] == made.encode(first).input_ids
    assert short.round_ends == [full.round_ends[0], stop]
    assert made.prompt(dataclasses.replace(cut, turns=cut.turns[:-1])) == made.prompt(
        dataclasses.replace(whole, turns=whole.turns[:-1])
    )
    certificate = certify(made, index_of(tmp_path, [row(i, **({"end_tag": False} if i % 2 else {})) for i in range(9)]), "rows")
    assert len(certificate.rows) == 8 and not certificate.bad


class Tampered(Template):
    """A template that ends what was interrupted."""

    def encode(self, record: Record) -> Encoded:
        return super().encode(dataclasses.replace(record, interrupted=False))


def test_an_end_after_an_interrupted_answer_is_not_certified(tmp_path: Path) -> None:
    sound = template("chatml")
    tampered = Tampered(**{field.name: getattr(sound, field.name) for field in dataclasses.fields(Template)})
    with pytest.raises(DataError, match="something follows an interrupted answer"):
        certify(tampered, index_of(tmp_path, [row(1, end_tag=False)]), "rows")


def test_media_of_all_kinds_are_certified(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<video><audio><image>"}, {"from": "gpt", "value": "a"}]
    records = [{"id": i, "image": "i", "video": "v", "audio": "a", "conversations": turns} for i in range(3)]
    for name in ("vita_mixtral", "vita_qwen"):
        assert len(certify(template(name), index_of(tmp_path, records), "rows").rows) == 3
