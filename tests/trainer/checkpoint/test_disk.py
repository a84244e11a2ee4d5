"""Files in a run folder: begun or done, whatever fails; a disk that says no is believed the first time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from model.files.manifest import verify
from tests.support.disk import ALONE, failing, names, save
from tests.support.ranks import run_ranks
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.retention import newest_sound
from trainer.distributed.world import World
from trainer.errors import SaveError
from trainer.machine import atomic_files as disk
from trainer.machine.atomic_files import (
    clean_leftovers,
    fresh_folder,
    is_leftover,
    make_folder,
    put_in_place,
    remove_folder,
    replace_text,
    sync_file,
    sync_run,
)


@pytest.mark.parametrize(("call", "code"), [("fsync", errno.EIO), ("replace", errno.EROFS), ("mkdir", errno.ENOSPC)])
def test_whichever_call_of_a_save_fails_the_save_fails_and_a_start_finds_the_last_sound_one(
    tmp_path: Path, call: str, code: int
) -> None:
    """Every fsync, rename and mkdir in turn, until a save has no more of them."""
    before = tmp_path / "before"
    checkpointer = Checkpointer(before, 2, ALONE)
    save(checkpointer, 1)
    save(checkpointer, 2)
    number = 0
    while True:
        folder = tmp_path / str(number)
        shutil.copytree(before, folder)
        checkpointer.folder = folder
        with failing(call, number, code) as calls:
            try:
                save(checkpointer, 3)
            except SaveError as error:
                problem = str(error)
            else:
                assert len(calls) <= number, f"{call} {number} of {calls[number]} failed, and nobody was told"
                break
        assert os.strerror(code) in problem and "Earlier checkpoints are intact" in problem, problem
        durable = "checkpoint-3" in names(folder) and str(folder) in calls[:number]
        assert durable or {"checkpoint-1", "checkpoint-2"} <= names(folder), f"{calls[number]}: {names(folder)}"
        clean_leftovers(folder)
        found, told = newest_sound(folder)
        assert found in (folder / "checkpoint-2", folder / "checkpoint-3") and not told, f"{calls[number]}: {told}"
        save(checkpointer, 3)  # the disk is well again
        assert newest_sound(folder) == (folder / "checkpoint-3", [])
        number += 1
    assert number >= {"fsync": 8, "replace": 2, "mkdir": 1}[call]
    assert names(folder) == {"checkpoint-2", "checkpoint-3"}


def test_the_folder_that_holds_a_new_checkpoint_is_synced_before_an_older_one_goes(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, 1, ALONE)
    save(checkpointer, 1)
    log: list[str] = []
    original = disk.remove_folder
    disk.remove_folder = lambda path: (log.append(f"remove {path.name}"), original(path))[1]  # type: ignore[assignment]
    try:
        with failing("fsync", -1) as synced:
            save(checkpointer, 2)
    finally:
        disk.remove_folder = original  # type: ignore[assignment]
    files = [path for path in synced if Path(path).name == "manifest.json"]
    assert files and synced.index(files[0]) < synced.index(str(tmp_path), synced.index(files[0]))
    assert names(tmp_path) == {"checkpoint-2"}


def test_a_file_is_old_or_new_whichever_call_fails(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    replace_text(path, "old")
    for call in ("fsync", "replace"):
        for number in range(2 if call == "fsync" else 1):
            with failing(call, number), pytest.raises(OSError, match="Input/output error"):
                replace_text(path, "new")
            assert (path.read_text() in ("old", "new") and (call, number) != ("fsync", 0)) or path.read_text() == "old"
            clean_leftovers(tmp_path)
            assert names(tmp_path) == {"state.json"}
            replace_text(path, "old")
    replace_text(path, "nöw")
    assert path.read_text(encoding="utf-8") == "nöw"


@pytest.mark.parametrize("call", ["fsync", "replace", "unlink", "rmdir"])
def test_final_is_the_old_or_the_new_one_whichever_call_fails(tmp_path: Path, call: str) -> None:
    number, found = 0, set()
    while True:
        folder = tmp_path / f"{call}{number}"
        for name in ("final", ".final.saving"):
            (folder / name).mkdir(parents=True)
            (folder / name / "weights").write_text(name)
        with failing(call, number) as calls:
            try:
                put_in_place(folder / ".final.saving", folder / "final")
            except OSError:
                pass
            else:
                assert len(calls) <= number
                break
        clean_leftovers(folder)
        assert names(folder) == {"final"} and names(folder / "final") == {"weights"}, f"{call} {number}: {names(folder)}"
        found.add((folder / "final" / "weights").read_text())
        number += 1
    assert number >= 1 and found <= {"final", ".final.saving"}
    assert (folder / "final" / "weights").read_text() == ".final.saving"


def test_a_replacement_cut_in_two_is_undone_or_finished(tmp_path: Path) -> None:
    (tmp_path / "stages" / "01-a" / ".final.previous").mkdir(parents=True)
    (tmp_path / "stages" / "01-a" / ".final.previous" / "weights").write_text("old")
    (tmp_path / ".checkpoint-4.previous").mkdir()
    (tmp_path / "checkpoint-4").mkdir()
    told = clean_leftovers(tmp_path)
    assert (tmp_path / "stages" / "01-a" / "final" / "weights").read_text() == "old"
    assert names(tmp_path) == {"stages", "checkpoint-4"} and names(tmp_path / "stages" / "01-a") == {"final"}
    assert len(told) == 2 and any("put back" in text for text in told)


def test_what_an_earlier_start_left_goes_and_nothing_else(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    run = tmp_path / "run"
    stage = run / "stages" / "01-a"
    unfinished = (".checkpoint-4.saving-0123abcd", ".checkpoint-4.saving", ".trial-save", ".removing-checkpoint-2-0")
    left = [stage / ".final.saving", *(run / name for name in unfinished)]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "part").write_text("half")
    (run / ".trial-link").symlink_to(outside)
    (run / ".metrics.jsonl.new").write_text("half")
    mine = {".lock", ".saving", ".new", ".hidden", "notes.new", "checkpoint-4", "damaged-checkpoint-3", "x.saving-y", "stages"}
    for name in mine - {"stages"}:
        (run / name).mkdir() if "checkpoint" in name else (run / name).write_text("mine")
    told = clean_leftovers(run)
    assert names(run) == mine and names(stage) == set() and names(outside) == {"kept"}
    assert len(told) == len(left) + 2 and all("was not finished; removed" in text for text in told)
    assert clean_leftovers(run) == []
    assert clean_leftovers(tmp_path / "not there") == []


def test_half_a_removed_folder_has_no_name_that_means_something(tmp_path: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("a")
    (tmp_path / ".removing-checkpoint-2-0").mkdir()
    with failing("unlink", 0), pytest.raises(OSError, match="Input/output error"):
        remove_folder(tmp_path / "checkpoint-2")
    assert names(tmp_path) == {".removing-checkpoint-2-0", ".removing-checkpoint-2-1", "checkpoint-3"}
    (tmp_path / "link").symlink_to(tmp_path / "checkpoint-3")
    for name in ("link", "not there"):
        remove_folder(tmp_path / name)
    clean_leftovers(tmp_path)
    assert names(tmp_path) == {"checkpoint-3"} and names(tmp_path / "checkpoint-3") == {"a"}


def test_names_of_unfinished_things() -> None:
    assert all(map(is_leftover, (".a.saving", ".a.saving-1", ".trial-1", ".removing-a-0", ".a.json.new")))
    assert not any(map(is_leftover, (".lock", "a.saving", "checkpoint-1", ".saving", ".a.savings", ".new", "a.new", "trial-1")))


def test_folders_above_a_new_one_are_on_disk_too(tmp_path: Path) -> None:
    with failing("fsync", -1) as synced:
        make_folder(tmp_path / "a" / "b" / "c")
        fresh_folder(tmp_path / "a" / "b")
    assert synced[:3] == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    assert names(tmp_path / "a") == {"b"} and names(tmp_path / "a" / "b") == set()


def test_only_a_file_system_that_cannot_sync_a_folder_is_excused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with failing("fsync", 0, errno.EINVAL):
        sync_file(tmp_path)
    for path, code in ((tmp_path, errno.EIO), (tmp_path / "file", errno.EINVAL), (tmp_path / "file", errno.EIO)):
        with failing("fsync", 0, code), pytest.raises(OSError) as caught:
            sync_file(path)
        assert caught.value.errno == code and caught.value.filename == str(path)


def try_lock(world: World, path: Path) -> bool:
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def test_syncing_a_run_folder_keeps_its_lock_and_looks_into_no_checkpoint(tmp_path: Path) -> None:
    """A record lock goes when its process closes any descriptor of the file."""
    descriptor = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (tmp_path / "metrics.jsonl").write_text("{}")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "a").write_text("a")
    (tmp_path / "stages" / "01-a").mkdir(parents=True)
    (tmp_path / "stages" / "01-a" / "samples.bin").write_text("x")
    with failing("fsync", -1) as synced:
        sync_run(tmp_path)
    inner = tmp_path / "stages" / "01-a"
    assert synced == [str(path) for path in (tmp_path / "metrics.jsonl", tmp_path, inner / "samples.bin", inner)]
    assert run_ranks(try_lock, 1, tmp_path / ".lock") == [False]
    os.close(descriptor)


def test_a_checkpoint_saved_over_one_of_the_same_step_leaves_one_of_them(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, 2, ALONE)
    save(checkpointer, 1)
    (tmp_path / "checkpoint-1" / "state.json").write_text("damaged")
    save(checkpointer, 1)
    verify(tmp_path / "checkpoint-1")
    assert names(tmp_path) == {"checkpoint-1"}
