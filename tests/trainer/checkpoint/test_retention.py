"""Which checkpoint a start goes on from, and which ones may go: the last sound one and what something starts from never do."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.files import manifest as manifest_module
from model.files.manifest import MAX_BYTES, NAME, UnsoundCheckpoint, check_sizes, read_manifest, verify, write_manifest
from model.files.tensor_files import dump_json
from tests.support.ranks import run_ranks
from trainer.checkpoint import retention
from trainer.checkpoint.retention import bases, checkpoints, newest_sound, prune, shares, verify_together
from trainer.distributed.world import World
from trainer.errors import ProofError


def make(folder: Path, step: int, config: Any = None, init_from: str = "", run_id: str = "r") -> Path:
    """A checkpoint as far as names, sizes and checksums go."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "state.json").write_text(dump_json({"config": config or {}, "step": step}))
    (path / "model.json").write_text(dump_json({"model": {"init_from": init_from}}))
    for rank in range(3):
        (path / f"rank-{rank}.safetensors").write_bytes(f"{run_id} {step} {rank}".encode() * (10 + rank))
    write_manifest(path, {"step": step, "run_id": run_id})
    verify(path)
    return path


def steps(folder: Path) -> list[int]:
    return [retention.step_of(path) for path in checkpoints(folder)]


def tear(path: Path) -> None:
    (path / "rank-1.safetensors").unlink()


def test_torn_checkpoints_do_not_count_and_the_last_sound_one_stays(tmp_path: Path) -> None:
    """A prune that counts folders would keep 4 and 5, which cannot be used, and remove what can."""
    for step in (1, 2, 3, 4, 5):
        make(tmp_path, step)
    for step in (3, 4, 5):
        tear(tmp_path / f"checkpoint-{step}")
    prune(tmp_path, 2, tmp_path / "checkpoint-2")
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    written = make(tmp_path, 6)
    prune(tmp_path, 2, written)
    assert steps(tmp_path) == [2, 3, 4, 5, 6]
    tear(tmp_path / "checkpoint-6")
    found, told = newest_sound(tmp_path)
    assert found == tmp_path / "checkpoint-2" and len(told) == 4


def test_the_one_just_written_stays_whatever_its_number(tmp_path: Path) -> None:
    for step in (8, 9):
        make(tmp_path, step)
    prune(tmp_path, 1, make(tmp_path, 4))
    assert steps(tmp_path) == [4, 9]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_are_kept_as_asked_for(tmp_path: Path, keep: int) -> None:
    for step in range(1, 7):
        prune(tmp_path, keep, make(tmp_path, step))
    assert steps(tmp_path) == list(range(7 - keep, 7))
    assert not list(tmp_path.glob(".*"))


NAMED: dict[str, Callable[[Path], Any]] = {
    "init_from": lambda run: {"model": {"init_from": str(run / "checkpoint-2")}},
    "init_from by another way": lambda run: {"model": {"init_from": f"{run}/stages/../checkpoint-2/"}},
    "resume": lambda run: {"checkpoint": {"resume": str(run / "checkpoint-2")}},
    "a stage's": lambda run: {"stage": [{"name": "a"}, {"name": "b", "model": {"init_from": str(run / "checkpoint-2")}}]},
    "a file in it": lambda run: {"model": {"vision_projector": {"path": str(run / "checkpoint-2" / "model.json")}}},
}


@pytest.mark.parametrize("named", NAMED)
def test_what_the_run_starts_from_stays(tmp_path: Path, named: str) -> None:
    """With keep = 1 a prune that counts would remove it."""
    run = tmp_path / "run"
    (run / "stages").mkdir(parents=True)
    config = NAMED[named](run)
    for step in (1, 2, 3, 4):
        prune(run, 1, make(run, step, config))
    assert steps(run) == [2, 4]


def test_a_relative_path_is_of_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (1, 2, 3):
        prune(Path("run"), 1, make(Path("run"), step, {"model": {"init_from": "run/checkpoint-1"}}))
    assert steps(tmp_path / "run") == [1, 3]


def test_what_a_final_needs_stays_with_all_below_it(tmp_path: Path) -> None:
    """stages/01-a/final stands on checkpoint-3, and that on checkpoint-1."""
    make(tmp_path, 1)
    make(tmp_path, 2)
    make(tmp_path, 3, init_from=str(tmp_path / "checkpoint-1"))
    final = tmp_path / "stages" / "01-a" / "final"
    final.mkdir(parents=True)
    (final / "model.json").write_text(dump_json({"model": {"init_from": str(tmp_path / "checkpoint-3")}}))
    elsewhere = tmp_path / "elsewhere" / "checkpoint-2"
    written = make(tmp_path, 4, {"model": {"init_from": str(elsewhere)}})
    assert bases(tmp_path, written) == {tmp_path / "checkpoint-1", tmp_path / "checkpoint-3"}
    prune(tmp_path, 1, written)
    assert steps(tmp_path) == [1, 3, 4]
    (final / "model.json").write_text("{")
    with pytest.raises(OSError, match=r"model\.json"):  # nobody knows what it needs: nothing goes
        prune(tmp_path, 1, make(tmp_path, 5))
    assert steps(tmp_path) == [1, 3, 4, 5]


def choose_together(world: World, run: Path) -> tuple[str, list[str], list[str]]:
    """What each rank found, and which files it read."""
    read: list[str] = []
    original = retention.changed

    def recording(folder: Path, files: Any, names: Any = None) -> str:
        read.extend(f"{folder.name}/{name}" for name in names)
        return original(folder, files, names)

    retention.changed = recording
    found, told = newest_sound(run, world)
    return str(found), told, read


def test_ranks_read_a_checkpoint_together_and_agree(tmp_path: Path) -> None:
    """checkpoint-3 is bad in a file that one of the ranks reads, checkpoint-2 is good."""
    for number in range(3):
        run = tmp_path / str(number)
        for step in (1, 2, 3):
            make(run, step)
        path = run / "checkpoint-3" / f"rank-{number}.safetensors"
        path.write_bytes(path.read_bytes().swapcase().replace(b"R", b"x", 1))
    for run, answers in zip(sorted(tmp_path.iterdir()), run_ranks(choose_all, 3, tmp_path)[0:1] * 3, strict=True):
        found, told, read = answers[run.name]
        assert found == str(run / "checkpoint-2") and len(told) == 1
        assert f"rank-{run.name}.safetensors was changed" in told[0] and "moved to damaged-checkpoint-3" in told[0]
        assert steps(run) == [1, 2]
        assert sorted(name for name in read if "checkpoint-2" in name) == [f"checkpoint-2/{name}" for name in FILES]
        assert len(read) == len({*read}), "a file was read by two ranks"


FILES = ("model.json", "rank-0.safetensors", "rank-1.safetensors", "rank-2.safetensors", "state.json")


def choose_all(world: World, folder: Path) -> dict[str, tuple[str, list[str], list[str]]]:
    found = {}
    for run in sorted(folder.iterdir()):
        path, told, read = choose_together(world, run)
        answers = world.gather_json([path, told, read])
        assert all(answer[:2] == [path, told] for answer in answers)
        assert all(answer[2] for answer in answers), "a rank had nothing to read"
        found[run.name] = (path, told, [name for answer in answers for name in answer[2]])
    return found


def see_another(world: World, run: Path, other: Path) -> str:
    try:
        return verify_together((other if world.rank == 1 else run) / "checkpoint-1", world)
    except ProofError as error:
        return str(error)


def test_a_rank_that_sees_another_folder_is_named_and_nothing_is_called_damaged(tmp_path: Path) -> None:
    make(tmp_path / "run", 1)
    make(tmp_path / "other", 1, run_id="another")
    for text in run_ranks(see_another, 2, tmp_path / "run", tmp_path / "other"):
        assert "rank 1: another manifest" in text and "Every machine needs the same output_dir" in text


def test_shares_are_even_in_bytes() -> None:
    sizes = {f"{i}": (i * 7919) % 1000 for i in range(50)} | {"large": 4000}
    found = shares(sizes, 4)
    assert sorted(name for names in found for name in names) == sorted(sizes)
    loads = [sum(sizes[name] for name in names) for names in found]
    assert max(loads) - min(loads) <= max(size for name, size in sizes.items() if name != "large")
    assert shares({}, 2) == [[], []]


def test_folders_moved_aside_stay_when_another_one_comes_to_be_damaged(tmp_path: Path) -> None:
    make(tmp_path, 1)
    for number in ("", "-2", "-3"):
        tear(make(tmp_path, 2))
        assert newest_sound(tmp_path)[1][0].endswith(f"moved to damaged-checkpoint-2{number}")


def forged(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Edit the manifest and make its digest fit again."""
    value = json.loads((folder / NAME).read_text())
    value = change(value) or value
    if isinstance(value, dict):
        body = {key: item for key, item in value.items() if key != "digest"}
        value = {**body, "digest": hashlib.sha256(dump_json(body).encode()).hexdigest()}
    (folder / NAME).write_text(dump_json(value))


def named(folder: Path, name: str) -> None:
    """The manifest names a file that is there, elsewhere, by its true size and checksum."""
    data = (folder.parent / "outside").read_bytes()
    facts = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forged(folder, lambda value: value["files"].update({name: facts}))


def swap(folder: Path, name: str, source: Path) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(source)


def stale(folder: Path, step: int) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name(f"checkpoint-{step}"), folder)


def take(folder: Path, other: Path, *names: str) -> None:
    for name in names:
        shutil.copyfile(other / name, folder / name)


OTHER = "another run/checkpoint-2"
MIXED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "two steps": (lambda f: take(f, f.with_name("checkpoint-1"), "rank-1.safetensors"), "rank-1.safetensors was changed"),
    "two runs": (lambda f: take(f, f.parent / OTHER, "rank-1.safetensors"), "bytes, not|was changed"),
    "two runs' manifests": (lambda f: take(f, f.parent / OTHER, NAME), "bytes, not|was changed"),
    "stale copy": (lambda f: stale(f, 1), "holds step 1: the folder was renamed or copied"),
    "edited": (lambda f: (f / NAME).write_text((f / NAME).read_text().replace('"step": 2', '"step": 3')), "digest does not match"),
    "edited, same meaning": (lambda f: (f / NAME).write_text((f / NAME).read_text() + "\n"), "not as it was written"),
    "said twice": (lambda f: (f / NAME).write_text((f / NAME).read_text().replace("{", '{"step": 2,', 1)), "not as it was written"),
    "surplus": (lambda f: (f / "rank-3.safetensors").write_text("x"), "differ from the manifest: .'rank-3.safetensors'"),
    "surplus folder": (lambda f: (f / "more").mkdir(), "differ from the manifest: .'more'"),
    "missing": (lambda f: (f / "rank-1.safetensors").unlink(), "differ from the manifest: .'rank-1.safetensors'"),
    "link to the same": (
        lambda f: (shutil.copy(f / "state.json", f.parent / "twin"), swap(f, "state.json", f.parent / "twin")),
        "state.json is a link, a folder or a device",
    ),
    "link away": (lambda f: swap(f, "state.json", f.parent / "outside"), "state.json is a link"),
    "manifest a link": (lambda f: swap(f, NAME, f.parent / "outside"), "is no file of at most"),
    "folder in place": (lambda f: ((f / "state.json").unlink(), (f / "state.json").mkdir()), "state.json is a link, a folder"),
    "pipe": (lambda f: ((f / "state.json").unlink(), os.mkfifo(f / "state.json")), "state.json is a link, a folder or a device"),
    "manifest a pipe": (lambda f: ((f / NAME).unlink(), os.mkfifo(f / NAME)), "is no file of at most"),
    "folder a link": (
        lambda f: (f.rename(f.parent / "away"), f.symlink_to(f.parent / "away")),
        "is a link: a checkpoint is a folder",
    ),
    "names what is above": (lambda f: named(f, "../outside"), "'../outside' is not the name of a file in this folder"),
    "names a path": (lambda f: named(f, str(f.parent / "outside")), "is not the name of a file in this folder"),
    "names itself": (lambda f: named(f, NAME), "is not the name of a file in this folder"),
    "names its parent": (lambda f: named(f, ".."), "is not the name of a file in this folder"),
    "no files": (lambda f: forged(f, lambda v: {**v, "files": {}}), "it names no files"),
    "a list": (lambda f: forged(f, lambda v: [v]), "not as it was written|changed"),
    "files a list": (lambda f: forged(f, lambda v: {**v, "files": [*v["files"]]}), "it names no files"),
    "step a truth": (lambda f: forged(f, lambda v: {**v, "step": True}), "step = 'True' is not a number of steps"),
    "step missing": (lambda f: forged(f, lambda v: v.pop("step") and None), "step = 'None' is not a number of steps"),
    "step below 0": (lambda f: forged(f, lambda v: {**v, "step": -2}), "is not a number of steps"),
    "run a number": (lambda f: forged(f, lambda v: {**v, "run_id": 7}), "run_id is not a string"),
    "no size": (
        lambda f: forged(f, lambda v: v["files"]["state.json"].pop("size") and None),
        "state.json: size or sha256 is not one",
    ),
    "size a fraction": (lambda f: forged(f, lambda v: v["files"]["state.json"].update(size=1.5)), "size or sha256 is not one"),
    "checksum short": (lambda f: forged(f, lambda v: v["files"]["state.json"].update(sha256="ab")), "size or sha256 is not one"),
    "facts a string": (lambda f: forged(f, lambda v: v["files"].update({"state.json": "x"})), "size or sha256 is not one"),
    "no digest": (lambda f: (f / NAME).write_text(dump_json({"step": 2, "files": {}})), "digest does not match"),
    "deep": (lambda f: (f / NAME).write_text("[" * 200_000), "cannot be read: RecursionError"),
    "no JSON": (lambda f: (f / NAME).write_bytes(b"\xff\xfe{}"), "cannot be read: UnicodeDecodeError"),
    "not a number": (lambda f: (f / NAME).write_text('{"step": NaN}\n'), "cannot be read: ValueError"),
    "a huge number": (lambda f: (f / NAME).write_text('{"step": ' + "9" * 5000 + "}\n"), "cannot be read: ValueError"),
    "huge": (lambda f: os.truncate(f / NAME, MAX_BYTES + 1), "is no file of at most 67,108,864 bytes"),
}


@pytest.mark.parametrize("kind", MIXED)
def test_a_folder_that_is_not_what_one_save_wrote_is_named_and_nothing_outside_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The digest over names and checksums ties all files to one step of one run; none of them says so itself."""
    (tmp_path / "outside").write_text("secret")
    make(tmp_path / "another run", 2, run_id="another")
    for step in (1, 2):
        make(tmp_path, step)
    change, expected = MIXED[kind]
    change(tmp_path / "checkpoint-2")
    read: list[Path] = []
    original = manifest_module.file_digest

    def recording(path: Path) -> str:
        read.append(path)
        return original(path)

    monkeypatch.setattr(manifest_module, "file_digest", recording)
    with pytest.raises(UnsoundCheckpoint, match=expected) as caught:
        verify(tmp_path / "checkpoint-2")
    assert "checkpoint-2" in str(caught.value)
    found, told = newest_sound(tmp_path)
    assert found == tmp_path / "checkpoint-1" and len(told) == 1 and "moved to damaged-checkpoint-2" in told[0]
    top = tmp_path.resolve()
    assert all(path.resolve().parent in (top / "checkpoint-1", top / "checkpoint-2") for path in read)


def test_sizes_alone_tell_what_is_torn_but_not_what_was_flipped(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    manifest = check_sizes(path)
    assert manifest == read_manifest(path) == verify(path) and manifest["run_id"] == "r"
    assert check_sizes(path.rename(tmp_path / ".new"), "checkpoint-1") == manifest
    (tmp_path / ".new").rename(path)
    (path / "rank-0.safetensors").write_bytes((path / "rank-0.safetensors").read_bytes()[::-1])
    assert check_sizes(path) == manifest
    with pytest.raises(UnsoundCheckpoint, match=r"rank-0.safetensors was changed"):
        verify(path)


def test_only_folders_called_checkpoint_and_a_number_are_looked_at(tmp_path: Path) -> None:
    for name in ("checkpoint-12", "checkpoint-3", "checkpoint-²", "checkpoint-3a", "damaged-checkpoint-4", ".checkpoint-5.saving"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-6").write_text("a file")
    assert steps(tmp_path) == [3, 12]
