"""Hub ids: asked for once per id, revision and process; without the network a quick answer. No hub is asked here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

from model.errors import ConfigError
from model.files import hub_repository
from model.files.hub import find_file, read_json
from tests.support.runs import config_of
from trainer.distributed.world import World
from trainer.records.hub_look_ups import hub_ids, share_look_ups

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_repository, "_looked_up", {})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that holds config.json of org/name at one commit, as the library lays it out."""
    folder = tmp_path / "models--org--name"
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT / "config.json").write_text('{"a": 1}')
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What the hub is asked for, by a stand-in that knows org/name."""
    found: list[Any] = []

    def model_info(self: HfApi, repo_id: str, *, revision: str | None = None, timeout: float | None = None) -> Any:
        found.append((repo_id, revision))
        assert timeout is not None and timeout <= 5
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename="config.json")])

    monkeypatch.setattr(HfApi, "model_info", model_info)
    yield found


def unreachable(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []

    def model_info(self: HfApi, repo_id: str, **_: Any) -> Any:
        calls.append(repo_id)
        raise OSError("[Errno -2] Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    return calls


def test_an_id_is_asked_for_once_per_revision_whatever_the_part_and_the_file(cache: Path, asked: list[Any]) -> None:
    for setting in ("model.llm.path", "model.vision.path"):
        assert read_json(setting, "org/name", "config.json", str(cache)) == {"a": 1}
        assert find_file(setting, "org/name", "model.safetensors", str(cache)) is None
    assert asked == [("org/name", None)]
    (cache / "models--org--name" / "refs" / "v2").write_text(COMMIT)
    assert find_file("model.llm.path", "org/name@v2", "config.json", str(cache)) is not None
    assert asked == [("org/name", None), ("org/name", "v2")]


def test_without_the_hub_the_cache_answers_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, began = unreachable(monkeypatch), time.monotonic()
    for name in ("config.json", "config.json", "model.safetensors"):
        assert (find_file("model.llm.path", "org/name", name, str(cache)) is None) == (name != "config.json")
    assert calls == ["org/name"] and constants.HF_HUB_OFFLINE and time.monotonic() - began < 3


def test_without_the_hub_and_the_cache_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, began = unreachable(monkeypatch), time.monotonic()
    for _ in range(2):
        with pytest.raises(ConfigError) as found:
            read_json("model.vision.path", "org/name@v1", "config.json", str(tmp_path))
    said = str(found.value)
    named = ("model.vision.path = 'org/name@v1'", "Name or service not known", str(tmp_path))
    for part in (*named, "HF_HUB_OFFLINE=1", "name a folder"):
        assert part in said
    assert calls == ["org/name"] and time.monotonic() - began < 3


def test_offline_asks_nobody(cache: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_file("model.llm.path", "org/name", "config.json", str(cache)) is not None
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        find_file("model.llm.path", "org/other", "config.json", str(cache))
    assert asked == []


class Follower:
    """A rank that is told what rank 0 said."""

    is_main = False

    def __init__(self, told: Any) -> None:
        self.told = told

    def broadcast_json(self, value: Any) -> Any:
        assert value == []
        return self.told


def test_rank_0_asks_for_all_ranks(parts: Path, cache: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(parts, model={"llm": {"path": "org/name"}, "cache_dir": str(cache)})
    assert list(hub_ids(config)) == [("model.llm.path", "org/name")]
    share_look_ups([config], World(0, 0, 1, None))  # type: ignore[arg-type]
    told = ["", "", hub_repository.known_look_ups()]
    monkeypatch.setattr(hub_repository, "_looked_up", {})
    share_look_ups([config], Follower(told))  # type: ignore[arg-type]
    assert find_file("model.llm.path", "org/name", "config.json", str(cache)) is not None
    assert asked == [("org/name", None)]
    with pytest.raises(ConfigError, match="planted"):
        share_look_ups([config], Follower(["ConfigError", "planted", None]))  # type: ignore[arg-type]
