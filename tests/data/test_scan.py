"""Laws of the scanner: it finds what a decoder finds, whatever stands in the strings, and its windows leave no trace."""

from __future__ import annotations

import json
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.index import json_borders as borders_module
from data.index import json_scan as scan_module
from data.index import token_estimate
from data.index.json_scan import scan
from data.index.table import KINDS, Table, join_tables
from data.index.token_estimate import plan_by_parsing
from model.errors import DataError

TEXTS = st.text(st.sampled_from('ab"\\{}[],:\n \t\x7f/é漢🙂\u2028'), max_size=20)
TURNS = st.lists(st.tuples(st.sampled_from(["human", "gpt"]), TEXTS), min_size=1, max_size=4)
PATHS = st.none() | TEXTS | st.lists(TEXTS, max_size=3)
OTHERS = st.recursive(
    st.none() | st.integers() | st.sampled_from(["value", "content", "image", "conversations"]) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["value", "image", "x", "a"]), inner, max_size=2),
    max_leaves=5,
)
LAYOUTS = st.fixed_dictionaries(
    {
        "indent": st.sampled_from([None, 0, 2, "\t"]),
        "ensure_ascii": st.booleans(),
        "separators": st.sampled_from([None, (",", ":"), (" ,\n", " :\t ")]),
    }
)


@st.composite
def records(draw: st.DrawFn) -> dict[str, Any]:
    """Well-formed in both spellings, with keys of no account before and after, some of them misleading."""
    turns = draw(TURNS)
    spelt = {
        "conversations": [{"from": role, "value": text} for role, text in turns],
        "messages": [{"content": text, "role": role} for role, text in turns],
    }
    key = draw(st.sampled_from(sorted(spelt)))
    media = {
        word: draw(PATHS) for word in draw(st.sets(st.sampled_from(["image", "images", "video", "audio", "audios"]), max_size=3))
    }
    return {"meta": draw(OTHERS), **media, key: spelt[key], "note": draw(OTHERS)}


def planned_text(record: dict[str, Any]) -> int:
    """By the decoder: every string that stands under "value" or "content" of an object in a list of the record."""
    lists = [value for value in record.values() if isinstance(value, list)]
    holders = [item for value in lists for item in value if isinstance(item, dict)]
    texts = [item[key] for item in holders for key in ("value", "content") if isinstance(item.get(key), str)]
    # An object in an object in the record stands as deep as a turn does.
    nested = [v for value in record.values() if isinstance(value, dict) for v in value.values() if isinstance(v, dict)]
    texts += [item[key] for item in nested for key in ("value", "content") if isinstance(item.get(key), str)]
    return sum(max(1, len(text.encode()) // 4) for text in texts)


def planned_media(record: dict[str, Any], kind: str) -> int:
    values = [record.get(key) for key in (kind, f"{kind}s")]
    return sum(len(value) if isinstance(value, list) else isinstance(value, str) for value in values)


def table_of(name: str, content: bytes, window: int) -> Table:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_module, "WINDOW", window)
        path = Path(folder, name)
        path.write_bytes(content)
        return scan(path, lambda size: None)


def same(one: Table, other: Table) -> bool:
    return all(np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(Table))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(rows=st.lists(records(), min_size=1, max_size=6), layout=LAYOUTS, window=st.integers(1, 300))
def test_an_array_is_planned_as_its_records_say(rows: list[dict[str, Any]], layout: dict[str, Any], window: int) -> None:
    content = json.dumps(rows, **layout).encode()
    table = table_of("m.json", content, window)
    assert [json.loads(content[a:b]) for a, b in zip(table.start, table.stop)] == rows
    assert table.text_tokens.tolist() == [planned_text(row) for row in rows]
    assert table.media.tolist() == [[planned_media(row, kind) for kind in KINDS] for row in rows]
    assert table.line.tolist() == [1 + content[:start].count(b"\n") for start in table.start]
    assert same(table, table_of("m.json", content, 1 << 22))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    rows=st.lists(records() | st.just("broken"), min_size=1, max_size=6),
    ascii_=st.booleans(),
    broken=st.text(st.sampled_from('"\\{}[]:,a \t'), min_size=1, max_size=12).filter(str.strip),
    newline=st.sampled_from(["\n", "\r\n", " \n\n\t"]),
    window=st.integers(1, 300),
)
def test_a_broken_line_is_alone_with_it(rows: list[Any], ascii_: bool, broken: str, newline: str, window: int) -> None:
    lines = [broken if row == "broken" else json.dumps(row, ensure_ascii=ascii_) for row in rows]
    content = newline.join(lines).encode()
    table = table_of("m.jsonl", content, window)
    assert [content[a:b] for a, b in zip(table.start, table.stop)] == [line.strip().encode() for line in lines]
    assert table.line.tolist() == [1 + newline.count("\n") * i for i in range(len(lines))]
    for i, row in enumerate(rows):
        if row != "broken":
            assert (table.text_tokens[i], table.media[i].tolist()) == (planned_text(row), [planned_media(row, k) for k in KINDS])
    assert table.text_tokens.min() >= 1
    assert same(table, table_of("m.jsonl", content, 1 << 22))


def borders_or_error(name: str, content: bytes, window: int) -> Any:
    try:
        table = table_of(name, content, window)
    except DataError as error:
        return str(error).rpartition(name)[2]
    return list(zip(table.start.tolist(), table.stop.tolist()))


JUNK = st.lists(
    st.sampled_from([b'{"a": 1}', b'"', b"\\", b"{", b"}", b"[", b"]", b",", b" ", b"\n", b"a", b'\\"', b'{"b": "\\\\"}'])
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(junk=JUNK, whole=st.booleans(), window=st.integers(1, 20))
def test_junk_is_read_or_refused_as_by_its_brackets(junk: list[bytes], whole: bool, window: int) -> None:
    """A window of one byte holds no object: all are measured by their brackets."""
    content = b"[" + b",".join(junk) + b"]" if whole else b"".join(junk)
    by_brackets = borders_or_error("m.json", content, 1)
    assert borders_or_error("m.json", content, window) == borders_or_error("m.json", content, 1 << 22) == by_brackets


@settings(max_examples=100, deadline=None, derandomize=True)
@given(junk=JUNK)
def test_lines_of_junk_are_those_that_are_not_blank(junk: list[bytes]) -> None:
    content = b"".join(junk)
    lines = [line.strip() for line in content.split(b"\n") if line.strip()]
    found = borders_or_error("m.jsonl", content, 1 << 22)
    if lines:
        assert [content[start:stop] for start, stop in found] == lines
    else:
        assert found == f": {'holds no record' if content else 'is empty; expected at least one record'}"


def test_parts_are_planned_by_parsing() -> None:
    parts = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "x" * 40}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "y" * 8}]}
    plain = {"conversations": [{"from": "human", "value": "x" * 40}, {"from": "gpt", "value": "y" * 8}]}
    table = table_of("m.json", json.dumps([plain, row, plain]).encode(), 1 << 22)
    text = len("<image>\n" + "x" * 40) // 4 + 8 // 4
    assert table.text_tokens.tolist() == [12, text, 12] and table.media.tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_all_that_a_template_writes_is_planned() -> None:
    """Thoughts and a system text beside the turns as turns are; calls and tools by their JSON."""
    said = [
        {"role": "user", "content": "q" * 8},
        {"role": "assistant", "content": "y" * 8, "reasoning_content": "z" * 16, "weight": 0},
    ]
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    tool = {"type": "function", "function": {"name": "f"}}
    rows: list[Any] = [
        {"messages": said},
        {"system": "s" * 12, "messages": said},
        {"system": "", "messages": [said[0], {**said[1], "reasoning_content": ""}], "tools": None},
        {"messages": [said[0], {"role": "assistant", "content": "", "tool_calls": [call]}]},
        {"tools": [tool], "messages": said, "note": [{"tool_calls": "[", "content": 3}]},
        {"messages": said, "functions": json.dumps([tool])},
    ]
    expected = [2 + 2 + 4, 3 + 2 + 2 + 4, 2 + 2, 2 + 1 + len(json.dumps([call])) // 4, 8 + len(json.dumps([tool])) // 4]
    table = table_of("m.jsonl", "\n".join(map(json.dumps, rows)).encode(), 1 << 22)
    assert table.text_tokens.tolist()[:5] == expected
    assert table.text_tokens[5] >= 8 and table.media.max() == 0
    one_by_one = [plan_by_parsing(row, 0)[0] for row in rows]
    assert table.text_tokens.tolist()[:5] == one_by_one[:5]


def test_media_of_records_that_break_a_rule_are_counted() -> None:
    """What is wrong with them is told when they are read; that there is no picture at all would be another fault."""
    remote = [{"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}, {"type": "image", "image": {"bytes": "AA"}}, 3]
    rows: list[Any] = [
        {"messages": [{"role": "user", "content": remote}, {"role": "assistant", "content": "y"}, 3]},
        {"images": [{"path": "a.png"}], "videos": [[1], [2]], "messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"messages": [{"role": "user", "content": [{"type": ["image"]}, {"type": "audio"}, {"type": "text", "text": "x"}]}]},
    ]
    table = table_of("m.jsonl", "\n".join(map(json.dumps, rows)).encode(), 1 << 22)
    assert table.media.tolist() == [[2, 0, 0], [1, 2, 0], [0, 0, 1]]
    assert table_of("m.jsonl", b"[1]\n{}\n{", 1 << 22).media.tolist() == [[0, 0, 0]] * 3


def test_a_record_without_texts_is_planned_by_its_size() -> None:
    table = table_of("m.jsonl", json.dumps({"id": "x" * 91}).encode() + b"\n3", 1 << 22)
    assert table.text_tokens.tolist() == [25, 1]


def test_files_are_joined_in_order(tmp_path: Path) -> None:
    one, two = (table_of("m.jsonl", b"\n".join([b"{}"] * count), 1 << 22) for count in (2, 3))
    both = join_tables([one, two])
    assert len(both) == 5 and [both.file_of(i) for i in range(5)] == [0, 0, 1, 1, 1]
    assert both.start.tolist() == [*one.start, *two.start]


TALKS = st.lists(
    st.tuples(TEXTS.filter(str.strip), TEXTS.filter(str.strip)).map(
        lambda said: {"conversations": [{"from": "human", "value": said[0]}, {"from": "gpt", "value": said[1]}]}
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(rows=TALKS, layout=LAYOUTS, piece=st.integers(1, 300))
def test_records_larger_than_a_window_leave_no_trace(rows: list[dict[str, Any]], layout: dict[str, Any], piece: int) -> None:
    """Whatever is larger than a window is measured by its brackets, which are looked for in pieces as small."""
    content = json.dumps(rows, **layout).encode()
    expected = table_of("m.json", content, 1 << 22)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(borders_module, "_PIECE", piece)
        assert same(expected, table_of("m.json", content, piece))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(junk=JUNK, piece=st.integers(1, 9))
def test_junk_in_pieces_is_refused_as_in_one(junk: list[bytes], piece: int) -> None:
    content = b"[" + b",".join(junk) + b"]"
    with pytest.MonkeyPatch.context() as patch:
        expected = borders_or_error("m.json", content, 1 << 22)
        patch.setattr(borders_module, "_PIECE", piece)
        assert borders_or_error("m.json", content, piece) == expected


def test_what_is_too_large_to_be_read_is_neither_copied_nor_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    plan = token_estimate.plan_record
    for module in (scan_module, token_estimate):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 300)
    monkeypatch.setattr(token_estimate, "plan_record", lambda raw: parsed.append(len(raw)) or plan(raw))
    rows = [{"conversations": [{"from": "human", "value": "x" * n}, {"from": "gpt", "value": "y" * 8}]} for n in (4, 150, 1000, 4)]
    for name, content in (("m.json", json.dumps(rows)), ("m.jsonl", "\n".join(map(json.dumps, rows)))):
        assert table_of(name, content.encode(), 50).text_tokens.tolist() == [3, 39, 1, 3]
    assert len(parsed) == 6 and max(parsed) < 300


def test_a_record_of_too_many_brackets_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.index.reader.MAX_RECORD_BRACKETS", 8)
    rows = [{"a": [[]] * 9, "conversations": [{"from": "human", "value": "x"}]}, {"conversations": [{"from": "gpt", "value": "x"}]}]
    table = table_of("m.jsonl", "\n".join(map(json.dumps, rows)).encode(), 1 << 22)
    assert table.text_tokens.tolist() == [len(json.dumps(rows[0])) // 4, 1]


def test_a_record_that_is_too_deep_is_planned_by_its_size() -> None:
    text = '{"messages": [], "tools": ' + "[" * 900 + "]" * 900 + "}"
    for name, content in (("m.json", f"[{text}]"), ("m.jsonl", text)):
        assert table_of(name, content.encode(), 1 << 22).text_tokens.tolist() == [len(text) // 4]
