"""A check does each thing once per record, and finds by what it remembers of a layout all that it finds by proving it anew."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from data.check import check_record as check
from data.check.certificate import UnprovenError, encode_proven
from data.check.check_record import check_record
from data.media import image_decode
from data.media.blob import Blob, MediaError, resolve_path
from data.records.record import Record, RecordError, Turn
from data.text import render, tokens
from data.text.template import Template, load_template
from tests.support.data.template_records import PAIRS, records
from tests.support.data.template_records import talk as conversation
from tests.support.tiny_data import datasets, grey, talk
from tests.support.tiny_tokenizers import tiny_tokenizer

WARM = {pair: load_template(pair[1], tiny_tokenizer(pair[0])) for pair in PAIRS}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often the costly things were done."""
    found: Counter[str] = Counter()

    def count(holder: Any, name: str, key: str) -> None:
        plain: Callable[..., object] = getattr(holder, name)

        def counting(*args: Any, **options: Any) -> object:
            found[key] += 1
            return plain(*args, **options)

        monkeypatch.setattr(holder, name, counting)

    count(render, "apply", "renderings")
    count(tokens, "_call", "tokenisations")
    count(image_decode, "_header", "headers")
    count(Blob, "open", "openings")
    for name in ("stat", "lstat"):
        count(os, name, "look-ups")
    yield found


@pytest.mark.parametrize("fit", ["pad", "tiles"])
@pytest.mark.parametrize("num_rounds", [1, 4])
def test_a_record_is_rendered_tokenised_and_its_picture_opened_once(
    tmp_path: Path, counted: Counter[str], fit: str, num_rounds: int
) -> None:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    paths = [f"deep/{grey(tmp_path / 'images' / 'deep', level)}" for level in range(4)]
    said = [f"{word} {k}" for k in range(num_rounds) for word in ("What is this?", "A cat.")]
    rows = [talk(f"<image>\n{said[0]}", *said[1:], images=path, id=f"r{i}") for i, path in enumerate(paths)]
    (tmp_path / "images" / "mix.jsonl").touch()
    data = datasets(tmp_path / "images", {"mix": rows}, image_fit=fit)
    for i in range(3):  # the layout is learned, then proven, then used
        assert not check_record(data, i).problems
    counted.clear()
    assert not check_record(data, 3).problems
    assert counted == {"renderings": 1, "tokenisations": 1, "headers": 1, "openings": 1, "look-ups": 2}


def test_a_text_is_tokenised_once_and_one_record_in_many_is_proven_in_full(
    tmp_path: Path, counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = datasets(tmp_path, {"mix": [talk("What is this?", f"A cat {i}.", id=f"r{i}") for i in range(7)]})
    monkeypatch.setattr(check, "IN_FULL", 6)
    found = []
    for i in range(7):
        counted.clear()
        assert not check_record(data, i).problems
        found.append(counted["tokenisations"])
    assert found[3:6] == [1, 1, 1] and found[6] > 1


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_what_is_proven_by_its_layout_is_what_is_proven_in_full(data: st.DataObject) -> None:
    pair = data.draw(st.sampled_from(PAIRS))
    record = data.draw(records(pair[1], controls=data.draw(st.booleans())))

    def outcome(template: Template, in_full: bool) -> object:
        try:
            return encode_proven(template, record, 4096, in_full=in_full)
        except RecordError as error:
            return str(error)

    expected = outcome(dataclasses.replace(WARM[pair]), True)
    for _ in range(3):
        assert outcome(WARM[pair], False) == expected


@pytest.mark.parametrize("pair", [("qwen", "chatml"), ("llama", "vicuna_v1"), ("llama_first", "llama2"), ("llama3", "auto")])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("question", "supervised stretches"),
        ("late", "the prompt's ids are not the row's up to its last answer"),
        ("early", "the prompt's ids are not the row's up to its last answer"),
        ("other", "the prompt's ids are not the row's up to its last answer"),
        ("merged", "the prompt's ids are not the row's up to its last answer"),
        ("open", "an answer's last supervised token does not end its turn"),
    ],
)
def test_wrong_rows_of_a_proven_layout_are_found(
    pair: tuple[str, str], change: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = dataclasses.replace(WARM[pair])
    for k in range(3):
        encode_proven(template, conversation(2, answer=f"A cat {k}"), in_full=False)
    assert template.layouts.proven
    plain = Template.encode

    def tampered(self: Template, record: Record, max_length: int | None = None) -> object:
        made = plain(self, record, max_length)
        ids, flags = list(made.input_ids), list(made.supervised)
        start = len(flags) - flags[::-1].index(True)
        start = max(k for k in range(1, start) if flags[k] and not flags[k - 1])
        if change == "question":
            flags[2] = True
        elif change == "late":
            flags[start] = False
        elif change == "early":
            flags[start - 1] = True
        elif change == "other":
            ids[start - 1] += 1
        elif change == "merged":  # one token in place of the prompt's last and the answer's first
            del ids[start - 1], flags[start - 1]
        else:
            flags[max(k for k, flag in enumerate(flags) if flag)] = False
        return dataclasses.replace(made, input_ids=ids, supervised=flags)

    monkeypatch.setattr(Template, "encode", tampered)
    with pytest.raises(UnprovenError, match=message):
        encode_proven(template, conversation(2, answer="A dog"), in_full=False)


def test_a_template_whose_prompt_depends_on_its_answer_is_proven_row_by_row() -> None:
    source = (
        "{% for m in messages %}<s>{{ m.role + ('!' if messages[-1].content == 'x' else '') + '\\n' + m.content }}</s>{% endfor %}"
    )
    base = tiny_tokenizer("bytes").backend_tokenizer
    template = load_template("auto", PreTrainedTokenizerFast(tokenizer_object=base, chat_template=source))
    for k in range(4):
        with pytest.raises(RecordError, match="the template rewrites a content"):
            encode_proven(template, Record("r", (Turn("user", "q"), Turn("assistant", f"a{k}")), (), "f.json:1"), in_full=False)
    assert not template.layouts.proven


def test_a_folder_that_became_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "a" / "b", outside / "b"):
        folder.mkdir(parents=True)
        grey(folder, 10)
    path = f"a/b/{grey(root / 'a' / 'b', 10)}"
    assert resolve_path(path, str(root), follow_links=False) == str((root / path).resolve())
    assert resolve_path(path, str(root), follow_links=False) == str((root / path).resolve())
    (root / "a").rename(tmp_path / "kept")
    os.symlink(outside, root / "a")
    with pytest.raises(MediaError, match="is a link that leaves media_root"):
        resolve_path(path, str(root), follow_links=False)
