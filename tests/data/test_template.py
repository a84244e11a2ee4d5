"""Laws of templates: ids are the reference's, learned is the answer and its end, a prompt is a prefix of its row."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import logging
import re
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.check.certificate import certify
from data.config import SourceConfig
from data.index.record_index import RecordIndex
from data.records.record import Record, RecordError, parse
from data.text.chat_formats import freeze_date
from data.text.template import Encoded, Template, TemplateOptions, load_template
from model.errors import ConfigError, DataError
from tests.support import tiny_tokenizers
from tests.support.data.template_records import PAIRS, records
from tests.support.tiny_tokenizers import tiny_tokenizer, unigram

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions."
)
LLAMA2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, and "
    "assist the user with a variety of tasks using natural language."
)


def vita_system(kind: str) -> str:
    """VITA's place for a system text, filled with our own words; the text of each kind is put together here once more."""
    base = (
        "You are an assistant for text, pictures, video and speech. \n- Be helpful, honest and harmless. \n"
        "- Talk with the user fluently, in the language that the user chooses. \n"
        "- When the user points out a mistake in an answer, apologise and work out the right one together."
    )
    seen = f" \n- Answer strictly from what the {kind} shows; when the {kind} does not show what is asked, say so."
    return base if kind == "text" else base + seen


MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
VITA = {kind: vita_system(kind) for kind in ("text", "image", "video")}
TRIMMED = [("llama3", "auto"), ("llama3", "llama3"), ("gemma", "gemma")]
ENDS = {
    "qwen": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "mistral3": "</s>",
    "phi3": "<|end|>",
}
OWN_ENDS = {
    **dict.fromkeys(("chatml", "internlm2", "mpt", "vita_qwen"), "<|im_end|>"),
    **{"vicuna_v1": "</s>", "vita_mixtral": "</s>", "llama2": " </s>", "mistral": " </s>", "plain": "\n"},
    **{"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>"},
}


@cache
def template_for(name: str, tokenizer: str, **options: Any) -> Template:
    return load_template(name, tiny_tokenizer(tokenizer), TemplateOptions(**options))


def llava_text(name: str, messages: list[tuple[str, str]]) -> str:
    """The conversation as the replaced systems write it, told in Python and apart from the Jinja texts under test."""
    system = messages[0][1] if messages[0][0] == "system" else None
    turns = messages[1:] if system is not None else messages
    if name in ("chatml", "internlm2"):
        return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    if name == "mpt":
        header = f"<|im_start|>system\n{MPT if system is None else system}<|im_end|>"
        return header + "".join(f"<|im_start|>{role}\n{content}<|im_end|>" for role, content in turns)
    if name == "llama3":
        return "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{content.strip()}<|eot_id|>" for role, content in messages)
    if name == "gemma":
        return "".join(f"<start_of_turn>{role}\n{content.strip()}<end_of_turn>\n" for role, content in messages).replace(
            "<start_of_turn>assistant\n", "<start_of_turn>model\n"
        )
    if name == "phi3":
        return "".join(f"<|{role}|>\n{content}<|end|>\n" for role, content in messages) + "<|endoftext|>"
    if name.startswith("vita"):
        system = VITA["image" if any("<image>" in content for _, content in turns) else "text"] if system is None else system
    if name == "vita_mixtral":
        roles = {"user": "user", "assistant": "bot"}
        return f"system:{system}</s>" + "".join(f"\n{roles[role]}:{content}</s>" for role, content in turns)
    if name == "vita_qwen":
        blocks = [("system", system), *turns]
        return "\n".join(f"<|im_start|>{role}\n{content}<|im_end|>" for role, content in blocks)
    if name == "plain":
        return "<image>" * turns[0][1].count("<image>") + turns[1][1] + "\n"
    if name == "vicuna_v1":
        text = (VICUNA if system is None else system) + " "
        return text + "".join(f"USER: {c} " if role == "user" else f"ASSISTANT: {c}</s>" for role, c in turns)
    system = system if system is not None else {"llama2": LLAMA2, "mistral": ""}[name]
    header = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    text = ""
    for i, (role, content) in enumerate(turns):
        opening = "<s>" if name == "llama2" and i else ""
        text += f"{opening}[INST] {header if i == 0 else ''}{content} [/INST]" if role == "user" else f" {content} </s>"
    return text


def reference_ids(template: Template, messages: list[tuple[str, str]], sanitize: bool = False) -> list[int]:
    tokenizer = template.tokenizer
    if template.name != "auto":
        return list(tokenizer(llava_text(template.name, messages))["input_ids"])
    dicts = [{"role": role, "content": content} for role, content in messages]
    options = {"sanitize_control_tokens": True} if sanitize else {}
    return list(tokenizer.apply_chat_template(dicts, tokenize=True, return_dict=False, date_string="26 Jul 2024", **options))


def all_references(template: Template, record: Record, sanitize: bool = False) -> list[list[int]]:
    """Reference ids with every choice of blank-led answers stripped: only such an answer may lose its white space."""
    choices = [{turn.content, turn.content.lstrip()} if turn.role == "assistant" else {turn.content} for turn in record.turns]
    roles = [turn.role for turn in record.turns]
    return [reference_ids(template, list(zip(roles, chosen)), sanitize) for chosen in itertools.product(*choices)]


def stretches(encoded: Encoded) -> list[tuple[int, int]]:
    """Borders of the supervised stretches."""
    text = "".join("x" if s else "-" for s in encoded.supervised)
    return [match.span() for match in re.finditer("x+", text)]


def refused(template: Template, tokenizer: str, record: Record) -> bool:
    """Whether the tokenizer's own chat template cannot express the record; then we must say so too."""
    if template.name not in ("auto", "gemma"):
        return False
    return tokenizer.startswith(("mistral", "gemma")) and record.turns[0].role == "system"


def check_laws(template: Template, tokenizer: str, record: Record) -> Encoded:
    encoded = template.encode(record)
    ids, supervised = encoded.input_ids, encoded.supervised
    answers = [turn.content for turn in record.turns if turn.role == "assistant"]
    end = ENDS[tokenizer] if template.name == "auto" else OWN_ENDS[template.name]
    learned = stretches(encoded)
    # One stretch each, and it reads as the answer and its end: nothing else is learned, nothing of it is left out.
    assert len(learned) == len(answers)
    for (low, high), answer in zip(learned, answers):
        text = template.tokenizer.decode(ids[low:high], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        stripped = answer.rstrip() if (tokenizer, template.name) in TRIMMED else answer
        expected = unicodedata.normalize("NFC", stripped + end)
        assert unicodedata.normalize("NFC", text).lstrip() == expected.lstrip()
    assert not any(s and i == template.placeholder_ids["image"] for i, s in zip(ids, supervised))
    assert ids.count(template.placeholder_ids["image"]) == len(record.media)
    asked = dataclasses.replace(record, turns=record.turns[:-1])
    assert template.prompt(asked) == ids[: learned[-1][0]]
    return encoded


RUN = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize(("tokenizer", "name"), PAIRS)
@RUN
@given(data=st.data())
def test_ids_are_the_references(tokenizer: str, name: str, data: st.DataObject) -> None:
    template = template_for(name, tokenizer)
    record = data.draw(records(name, controls=False))
    if refused(template, tokenizer, record):
        with pytest.raises(RecordError):
            template.encode(record)
        return
    encoded = check_laws(template, tokenizer, record)
    assert encoded.input_ids in all_references(template, record)


@pytest.mark.parametrize(("tokenizer", "name"), PAIRS)
@RUN
@given(data=st.data())
def test_written_control_tokens_stay_text(tokenizer: str, name: str, data: st.DataObject) -> None:
    template = template_for(name, tokenizer)
    record = data.draw(records(name, controls=True))
    if refused(template, tokenizer, record):
        return
    encoded = check_laws(template, tokenizer, record)
    harmless = [dataclasses.replace(turn, content="<image>" * turn.content.count("<image>") + "x") for turn in record.turns]
    bare = template.encode(dataclasses.replace(record, turns=tuple(harmless)))
    controls = lambda ids: [i for i in ids if i in template.control_ids]  # noqa: E731
    assert controls(encoded.input_ids) == controls(bare.input_ids)
    if name == "auto" and "sanitize_control_tokens" in inspect.signature(template.tokenizer.apply_chat_template).parameters:
        same = dataclasses.replace(record, turns=tuple(t for t in record.turns if "<image>" not in t.content))
        if len(same.turns) == len(record.turns):
            assert encoded.input_ids in all_references(template, record, sanitize=True)


@pytest.mark.parametrize(("tokenizer", "name"), [p for p in PAIRS if p[0] not in ("qwen3", "phi3") and p[1] != "plain"])
@RUN
@given(data=st.data())
def test_dropping_rounds_gives_the_shorter_records_ids(tokenizer: str, name: str, data: st.DataObject) -> None:
    template = template_for(name, tokenizer)
    record = data.draw(records(name, controls=True))
    if refused(template, tokenizer, record):
        return
    encoded = template.encode(record)
    first = len(record.turns) % 2
    assert len(encoded.round_ends) == len(record.turns) // 2 and encoded.round_ends[-1] == len(encoded.input_ids)
    for k, end in enumerate(encoded.round_ends):
        turns = record.turns[: first + 2 * (k + 1)]
        media = record.media[: sum(turn.content.count("<image>") for turn in turns)]
        if name.startswith("vita") and bool(media) != bool(record.media):
            continue  # the system text is the one of the whole record
        shorter = template.encode(dataclasses.replace(record, turns=turns, media=media))
        assert shorter.input_ids == encoded.input_ids[:end]
        assert shorter.supervised == encoded.supervised[:end]


def chat(*values: str, **extra: Any) -> Record:
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return parse({"id": "r", "conversations": turns, **extra}, "f.json:7", needs_answer=len(values) % 2 == 0)


def test_an_answers_leading_newline_is_dropped_only_where_it_would_merge() -> None:
    merging, apart = template_for("chatml", "qwen"), template_for("chatml", "bytes")
    assert merging.encode(chat("q", "\n\n x")).input_ids == merging.encode(chat("q", "x")).input_ids
    assert (
        apart.encode(chat("q", "\n\n x")).input_ids
        == apart.tokenizer("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n\n\n x<|im_end|>\n")["input_ids"]
    )
    # A question's white space is nobody's to drop.
    assert merging.encode(chat("\n q", "x")).input_ids == reference_ids(merging, [("user", "\n q"), ("assistant", "x")])


def test_only_the_merging_answer_loses_its_newline() -> None:
    template = template_for("vicuna_v1", "llama")
    record = chat("q", "\n\n x", "q", " y")
    expected = [("user", "q"), ("assistant", "\n\n x"), ("user", "q"), ("assistant", " y")]
    assert template.encode(record).input_ids == reference_ids(template, expected)


def test_qwen3_prompt_holds_the_empty_thought() -> None:
    template = template_for("auto", "qwen3")
    ids = template.prompt(chat("q"))
    assert template.tokenizer.decode(ids) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_stop_ids() -> None:
    known = {n: tiny_tokenizer(n).get_vocab() for n in ("qwen", "llama3", "llama", "bytes", "phi3")}
    assert template_for("auto", "qwen").stop_ids == (known["qwen"]["<|im_end|>"],)
    assert template_for("auto", "llama3").stop_ids == (known["llama3"]["<|eot_id|>"],)
    assert template_for("chatml", "bytes").stop_ids == (known["bytes"]["<|im_end|>"], known["bytes"]["</s>"])
    assert template_for("auto", "phi3").stop_ids == (known["phi3"]["<|end|>"], known["phi3"]["<|endoftext|>"])
    assert template_for("plain", "llama").stop_ids == (known["llama"]["<0x0A>"], known["llama"]["</s>"])


def text_of(template: Template, record: Record) -> str:
    return template.tokenizer.decode(template.encode(record).input_ids)


def test_placeholders_first_and_wrapped() -> None:
    images = {"image": ["a", "b"]}
    first = template_for("chatml", "qwen", placeholders="first")
    record = chat("Look <image> and\n<image>", "ok", "again", "yes", **images)
    assert text_of(first, record).startswith("<|im_start|>user\n<image>\n<image>\nLook  and<|im_end|>")
    around = text_of(first, chat("\n Look <image>\n", "ok", image="a"))
    assert around.startswith("<|im_start|>user\n<image>\nLook<|im_end|>")
    assert text_of(first, chat("<image>", "ok", image="a")).startswith("<|im_start|>user\n<image><|im_end|>")
    wrapped = template_for("chatml", "qwen", media_wrap=("<Image>", "</Image>"))
    assert "<Image><image></Image>\nand <Image><image></Image>" in text_of(wrapped, chat("<image>\nand <image>", "ok", **images))
    # A wrap that is a control token stays one around media, and stays text where a person wrote it.
    control = template_for("chatml", "bytes", media_wrap=("<s>", "</s>"))
    ids, known = control.encode(chat("<s> <image> </s>", "ok", image="a")).input_ids, control.tokenizer.get_vocab()
    at = ids.index(known["<image>"])
    assert (ids[at - 1], ids[at + 1]) == (known["<s>"], known["</s>"])
    assert ids.count(known["<s>"]) == ids.count(known["</s>"]) == 1


def test_plain_keeps_only_placeholders_and_the_answer() -> None:
    template = template_for("plain", "llama")
    encoded = template.encode(chat("Describe <image>\nbriefly", "A cat.", image="a"))
    assert encoded.input_ids == template.tokenizer("<image>A cat.\n")["input_ids"]
    first = encoded.input_ids.index(template.placeholder_ids["image"]) + 1
    assert encoded.supervised == [False] * first + [True] * (len(encoded.input_ids) - first)
    with pytest.raises(RecordError, match=r"f.json:7 r: conversations: 4 turns; template 'plain'"):
        template.encode(chat("<image>", "a", "b", "c", image="a"))
    with pytest.raises(RecordError, match="no placeholder in the question"):
        template.encode(chat("b", "c"))


def test_configured_tokens_may_be_written() -> None:
    allowed = ["<|endoftext|>", "<s>", "<|im_end|>"]
    template = load_template("chatml", tiny_tokenizer("bytes"), TemplateOptions(allowed=allowed))
    ids, known = template.encode(chat("<|endoftext|><s><|im_end|>", "ok")).input_ids, template.tokenizer.get_vocab()
    # The tokenizer's own BOS and the format's own end are nobody's to write.
    assert [ids.count(known[token]) for token in allowed] == [1, 0, 2]


def test_a_text_longer_than_the_tokenizers_own_limit_is_nothing_to_warn_of(caplog: pytest.LogCaptureFixture) -> None:
    """transformers would foretell indexing errors; what is too long is for data.max_length to say."""
    template = template_for.__wrapped__("chatml", "bytes")  # its own: the tokenizer is changed
    template.tokenizer.model_max_length = 4
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert len(template.encode(chat("a long question", "and its answer")).input_ids) > 4
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_todays_date_is_not_rendered() -> None:
    text = text_of(template_for("auto", "llama3"), chat("q", "a"))
    assert "Today Date: 26 Jul 2024\n" in text
    source = template_for("auto", "llama3").source
    assert freeze_date(source) == source != tiny_tokenizers.LLAMA3
    whole = with_chat_template("{% for m in messages %}{{ strftime_now('%Y-%m-%d, %A %B %e') + m.content + '</s>' }}{% endfor %}")
    assert text_of(whole, chat("q", "a")) == "2024-07-26, Friday July 26q</s>2024-07-26, Friday July 26a</s>"


@pytest.mark.parametrize(
    ("name", "tokenizer", "message"),
    [
        ("auto", "llama", "has no chat template; name one: chatml"),
        (
            "chatml",
            "llama",
            re.escape("""'<|im_start|>', '<|im_end|>', which are no single tokens of this tokenizer; choose another template, or \
add them with model.llm.new_tokens = ["<|im_start|>", "<|im_end|>"] and model.llm.tune = "new_tokens\""""),
        ),
        ("vicuna_v1", "qwen", "'</s>', which is no single token"),
        ("vicuna", "qwen", "'vicuna' is not known; allowed: auto, chatml"),
    ],
)
def test_templates_that_do_not_fit_are_refused(name: str, tokenizer: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        template_for(name, tokenizer)


def with_chat_template(source: str, tokenizer: str = "bytes") -> Template:
    copy = type(tiny_tokenizer(tokenizer))(tokenizer_object=tiny_tokenizer(tokenizer).backend_tokenizer, chat_template=source)
    return load_template("auto", copy)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}", "no token ends the assistant's turn"),
        ("{{ messages[0].content }}</s>", "drops, repeats or reorders messages"),
        ("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}", "rewrites a content"),
        ("{{ raise_exception('only tools') }}", "refuses the conversation: only tools"),
    ],
)
def test_chat_templates_that_cannot_be_followed_are_refused(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_chat_template(source)


def test_a_content_that_the_template_rewrites_is_a_data_error() -> None:
    template = with_chat_template("{% for m in messages %}{{ '<s>' + (m.content | replace('x', 'y')) + '</s>' }}{% endfor %}")
    assert template.encode(chat("a", "b")).supervised == [False, False, False, False, True, True]
    with pytest.raises(RecordError, match=r"f.json:7 r: conversations: the template rewrites a content"):
        template.encode(chat("a", "ox"))


def test_unigram_dangers_are_data_errors() -> None:
    template = load_template("vicuna_v1", unigram())
    template.encode(chat("q", "fine"))
    with pytest.raises(RecordError, match="makes a control token of a content's plain text"):
        template.encode(chat("q </s>", "a"))
    with pytest.raises(RecordError, match="an answer holds what the tokenizer only knows as <unk>"):
        template.encode(chat("q", "漢"))
    template.encode(chat("漢", "a"))


def test_media_that_the_model_cannot_take() -> None:
    tokenizer = tiny_tokenizers.NAMES["bytes"]()
    template = load_template("chatml", tokenizer)
    with pytest.raises(RecordError, match="image: 1 files, but the model has no part for this modality"):
        template.encode(chat("<image>", "a", image="a"))


def index_of(tmp_path: Path, rows: list[Any]) -> RecordIndex:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return RecordIndex.open(SourceConfig(str(path)), tmp_path, {})


def rows(count: int) -> list[Any]:
    return [
        {"id": i, "conversations": [{"from": "human", "value": f"q {i}"}, {"from": "gpt", "value": f"a {i}"}]} for i in range(count)
    ]


@pytest.mark.parametrize(("tokenizer", "name"), [p for p in PAIRS if p[1] != "plain"])
def test_sound_templates_are_certified(tokenizer: str, name: str, tmp_path: Path) -> None:
    template = template_for(name, tokenizer)
    bad = {"id": "empty", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]}
    certificate = certify(template, index_of(tmp_path, [bad, *rows(40)]), "rows")
    assert len(certificate.rows) == len(set(certificate.rows)) == 8 and max(certificate.rows) > 20
    assert len(certificate.bad) == 1 and 0 < certificate.num_supervised < certificate.num_tokens
    assert str(certificate).startswith("rows: 8 rows certified") and "1 bad records passed over" in str(certificate)


def broken(template: Template, **values: Any) -> Template:
    return dataclasses.replace(template, **values)


def test_broken_templates_are_not_certified(tmp_path: Path) -> None:
    index = index_of(tmp_path, rows(9))
    vicuna, first = template_for("vicuna_v1", "llama"), template_for("vicuna_v1", "llama_first")
    cases = [
        (broken(first, lead=""), "ids differ"),  # BOS written as text takes the prefix space away
        (broken(template_for("llama2", "llama"), ends=re.compile(" ")), "does not end its turn"),
        (
            broken(vicuna, ends=re.compile("(?!)")),
            "none of 9 rows can be encoded; the first: rows.json:1 0: conversations: no token ends",
        ),
        (broken(vicuna, placeholder_ids={"image": vicuna.tokenizer.eos_token_id}), "none of 9 rows"),
    ]
    for template, message in cases:
        with pytest.raises(DataError, match=message):
            certify(template, index, "rows")


def test_a_prompt_that_ends_in_a_space_is_refused(tmp_path: Path) -> None:
    spaced = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    spaced += "{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(DataError, match="an answer's first token holds the end of its prompt"):
        certify(with_chat_template(spaced), index_of(tmp_path, rows(9)), "rows")


class Tampered(Template):
    """A template whose supervision is wrong at one place."""

    def encode(self, record: Record) -> Encoded:
        encoded = super().encode(record)
        ids, supervised = encoded.input_ids, list(encoded.supervised)
        low, high = stretches(encoded)[-1]
        image = ids.index(self.placeholder_ids["image"])
        changes = {"media": (image, True), "question": (image + 1, True), "hole": (high - 2, False), "late": (low, False)}
        at, value = changes[self.name.removeprefix("tampered ")]
        supervised[at] = value
        return dataclasses.replace(encoded, supervised=supervised)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("media", "a placeholder is supervised"),
        ("question", "2 supervised stretches, 1 answers"),
        ("hole", "2 supervised stretches, 1 answers"),
        ("late", "the prompt's ids are not the row's up to its last answer"),
    ],
)
def test_wrong_supervision_is_not_certified(tmp_path: Path, change: str, message: str) -> None:
    sound = template_for("auto", "qwen")
    fields = {field.name: getattr(sound, field.name) for field in dataclasses.fields(Template)}
    row = {
        "id": 1,
        "image": "a",
        "conversations": [{"from": "human", "value": "<image> q"}, {"from": "gpt", "value": "one two three"}],
    }
    with pytest.raises(DataError, match=message):
        certify(Tampered(**{**fields, "name": f"tampered {change}"}), index_of(tmp_path, [row]), "rows")
