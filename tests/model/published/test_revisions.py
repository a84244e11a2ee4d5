"""`revision`: a branch, tag or commit of a hub id, as a key beside every path or behind an @."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from data.text.tokenizer import load_tokenizer, save_tokenizer
from model.errors import ConfigError
from model.files.hub import read_json
from tests.support.config import MINIMAL, problems
from tests.support.runs import merged
from tests.support.tiny_tokenizers import NAMES
from trainer.runfile.load import parse_config


def cached(cache: Path, revision: str, commit: str) -> Path:
    """The folder of one revision of org/name in a cache, as huggingface_hub keeps it."""
    repository = cache / "models--org--name"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def test_a_revision_is_the_one_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for i, revision in enumerate(("main", "v1.5")):
        snapshot = cached(tmp_path, revision, f"{i}" * 40)
        (snapshot / "config.json").write_text(json.dumps({"model_type": "qwen2", "number": i}))
        save_tokenizer(NAMES["qwen" if revision == "main" else "llama"](), snapshot)
    found = {
        path: read_json("model.llm.path", path, "config.json", str(tmp_path))["number"] for path in ("org/name", "org/name@v1.5")
    }
    assert found == {"org/name": 0, "org/name@v1.5": 1}
    for path, token in (("org/name", "<|im_end|>"), ("org/name@v1.5", "</s>")):
        assert token in load_tokenizer(path, [], str(tmp_path)).tokenizer.get_vocab()


def test_the_key_stands_beside_every_path_and_is_written_down_in_it(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "model": {
            "llm": {"path": "org/llm", "revision": "main", "tune": "lora"},
            "vision": {"path": "org/vision", "revision": "refs/pr/3"},
            "vision_projector": {"path": "org/projector", "revision": ""},
        },
        "lora": {"path": "org/adapter", "revision": "0a1b"},
    }
    config = parse_config(merged(MINIMAL, given), "run.toml")
    assert config.model.llm.path == "org/llm@main" and config.lora.path == "org/adapter@0a1b"
    assert config.model.vision is not None and config.model.vision.path == "org/vision@refs/pr/3"
    assert config.model.vision_projector is not None and config.model.vision_projector.path == "org/projector"


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"path": "org/llm", "revision": "../x"}, "a branch, a tag or a commit of a hub id"),
        ({"path": "org/llm@a", "revision": "b"}, "a branch, a tag or a commit of a hub id"),
        ({"path": "./folder/of/mine", "revision": "main"}, "a folder has none"),
        ({"path": "org/llm", "revision": 3}, "revision = 3 is no string"),
    ],
)
def test_a_revision_of_anything_else_is_refused(table: dict[str, Any], reason: str) -> None:
    assert reason in problems(model={"llm": table})


def test_a_revision_without_a_path_is_refused() -> None:
    assert "model.revision = 'main' is of no path" in problems(model={"revision": "main"})
    with pytest.raises(ConfigError, match="is no folder"):
        read_json("model.llm.path", "org/name@../../x", "config.json")
