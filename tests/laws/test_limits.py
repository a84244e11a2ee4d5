"""What is too large, too deep, no regular file or code is refused, by name, before it is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data.config import DataConfig
from data.dataset import Rejected
from data.index.json_scan import scan
from data.index.reader import RowError, decode_json
from data.index.sidecar import read_arrays, write_arrays
from data.media.blob import Blob, MediaError
from data.media.frames import _judge_work
from data.text.tokenizer import load_tokenizer
from model.errors import ConfigError, DataError
from model.files import untrusted as bounded
from model.files.hub import find_file, hugging_face_config, read_json
from model.files.tensor_files import read_weights
from tests.support.tiny_data import dataset, talk
from trainer.runfile.toml_files import MAX_OVERRIDE, apply_override, read_toml, to_toml


def test_a_run_file_that_is_too_deep_or_holds_absurd_numbers_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    for text in ("a = " + "[" * 40 + "]" * 40, "a = " + "[" * 5000 + "]" * 5000, ".".join(["a"] * 5000) + " = 1"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="nested deeper than 32"):
            read_toml(str(file))
    for bad in (b"a = " + b"9" * 5000, b"a = '\xff'"):
        file.write_bytes(bad)
        with pytest.raises(ConfigError, match="not TOML"):
            read_toml(str(file))


def test_overrides_are_one_value_at_one_place() -> None:
    found: dict[str, object] = {}
    apply_override(found, "a.b=1\nc = 2")
    assert found == {"a": {"b": "1\nc = 2"}}  # a second key would have been lost in silence
    for text, reason in (
        ("a=" + "x" * MAX_OVERRIDE, "at most 100000"),
        (".".join("a" * 40) + "=1", "nested deeper"),
        ("a=" + "[" * 5000, "nested deeper"),
        ("a=\udc80", "no UTF-8"),
    ):
        with pytest.raises(ConfigError, match=reason):
            apply_override({}, text)


def test_keys_that_are_no_bare_words_are_written_so_that_they_read_back(tmp_path: Path) -> None:
    value = {"data": {"media_root": {"a b": "x", 'q"': "y", "\x7f": "z"}}}
    (tmp_path / "run.toml").write_text(to_toml(value))
    assert read_toml(str(tmp_path / "run.toml")) == value


def test_records_that_are_too_deep_or_too_long_are_quarantined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = talk("Hi", "Hello")
    deep = json.dumps(good | {"extra": 0}).replace("0}", "[" * 65 + "]" * 65 + "}")
    long = json.dumps(talk("Hi", "x" * 5000))
    monkeypatch.setattr("data.index.reader.MAX_RECORD_BYTES", 4000)
    monkeypatch.setattr("data.index.token_estimate.MAX_RECORD_BYTES", 4000)
    found = dataset(tmp_path, [good, deep, long, "[" * 100_000, good])
    reasons = [item.reason if isinstance(item, Rejected) else "" for item in (found[i] for i in range(5))]
    assert reasons[0] == reasons[4] == ""
    assert "nested deeper than 64" in reasons[1] and "has 5" in reasons[2] and "at most 4000 are read" in reasons[2]
    assert "at most 4000" in reasons[3]


def test_a_file_of_a_byte_order_mark_alone_holds_no_record(tmp_path: Path) -> None:
    (tmp_path / "mix.jsonl").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(DataError, match="holds no record"):
        scan(tmp_path / "mix.jsonl", lambda size: None)


@pytest.mark.parametrize("depth", [62, 64, 65, 900, 100_000])
def test_depth_is_counted_to_the_bracket(depth: int) -> None:
    text = b"[" * depth + b"]" * depth
    if depth <= bounded.MAX_JSON_DEPTH:
        assert decode_json(text) == bounded.parse_json(text)
    else:
        with pytest.raises(RowError, match="nested deeper than 64"):
            decode_json(text)
        with pytest.raises(ValueError, match="nested deeper than 64"):
            bounded.parse_json(text)


def test_pipes_and_devices_are_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(OSError, match=r"regular file"):
            bounded.open_regular(tmp_path / name)
        with pytest.raises(MediaError, match="is not a regular file"):
            Blob(name, str(tmp_path / name)).open()
    for suffix in ("safetensors", "bin"):
        os.mkfifo(tmp_path / f"x.{suffix}")
        with pytest.raises(ConfigError, match="regular file"):
            read_weights(tmp_path / f"x.{suffix}")
    (tmp_path / "llm").mkdir()
    os.mkfifo(tmp_path / "llm" / "tokenizer.json")
    with pytest.raises(ConfigError, match="is not a regular file"):
        load_tokenizer(str(tmp_path / "llm"), [])


def test_descriptions_are_bounded_in_bytes_and_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"a": "' + "x" * 100 + '"}')
    monkeypatch.setattr(bounded, "MAX_JSON_BYTES", 50)
    with pytest.raises(ConfigError, match="more than 50 bytes"):
        read_json("model.llm.path", str(tmp_path), "config.json")
    (tmp_path / "config.json").write_text("[" * 20 + "]" * 20)
    with pytest.raises(ConfigError, match="not a JSON object"):
        read_json("model.llm.path", str(tmp_path), "config.json")


@pytest.mark.parametrize(
    "path", ["../x", "/none/x", "https://host/x", "a/..", "a/b/c", "a//b", "a/b\0", "-a/b", "a b/c", "a/" + "b" * 200]
)
def test_what_is_neither_a_folder_nor_owner_and_name_is_never_asked_of_the_hub(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a folder beside the checkout may be called x
    with pytest.raises(ConfigError, match="is no folder: give a Hugging Face folder or a hub id"):
        find_file("model.llm.path", path, "config.json")
    with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
        load_tokenizer(path, [])


def test_code_that_a_folder_brings_or_names_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
    own = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.T", None]}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**own, "tokenizer_class": "EvilTokenizer"}))
    with pytest.raises(ConfigError, match="wants code of its own"):
        hugging_face_config("model.llm.path", own)
    with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path), [])
    named = {"model_type": "qwen2", "attn_implementation": "a/kernel", "_attn_implementation_internal": "a/kernel", "auto_map": {}}
    assert hugging_face_config("model.llm.path", named)._attn_implementation != "a/kernel"
    with pytest.raises(ConfigError, match="more than 10000 layers"):
        hugging_face_config("model.llm.path", {"model_type": "qwen2", "num_hidden_layers": 10**9})


def test_arrays_are_never_larger_in_memory_than_on_disk(tmp_path: Path) -> None:
    import numpy as np

    np.savez_compressed(tmp_path / "bomb.npz", lengths=np.zeros(10**6))
    assert read_arrays(tmp_path / "bomb.npz") is None
    write_arrays(tmp_path / "good.npz", {"lengths": np.zeros(10)})
    assert read_arrays(tmp_path / "good.npz") is not None
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "lie.npz").write_bytes(whole.replace(b"(10,)", b"(99,)"))
    assert read_arrays(tmp_path / "lie.npz") is None


def test_animations_are_bounded_in_work(tmp_path: Path) -> None:
    config = DataConfig(max_pixels=1000)
    _judge_work("a.gif", 16, (10, 100), config)
    for count, size in ((17, (10, 100)), (20_001, (1, 1))):
        with pytest.raises(MediaError, match="is read"):
            _judge_work("a.gif", count, size, config)
