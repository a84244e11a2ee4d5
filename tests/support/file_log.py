"""The ordered changes of a folder, recorded as they are made, and what a crash at any of them may leave behind.

A log is a row of photographs of the folder, one before every operation that changes names (mkdir, create, open for writing, link,
rename, unlink, rmdir, truncate) and one around every fsync, with the bytes of all files. They are taken in the process that works
(audit hook, patched os.fsync), by whatever thread does the work. From these follow three models of a crash:

killed        SIGKILL: the system lives on and finishes what it was told. The state is the photograph.
power cut     Only what was fsynced is there for sure: of a file its bytes as of its last fsync, of a folder its names as of the
              folder's last fsync. What came after may be there or not: each folder shows its names as of any moment since, and the
              bytes of a file that were not fsynced are there, lost, cut in half, or zeros.
"""

from __future__ import annotations

import itertools
import os
import random
import stat
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
ROOT = "."


@dataclass(frozen=True)
class Node:
    """A file or folder: its identity, and its bytes if it is a file."""

    identity: int
    data: bytes | None


Photograph = dict[str, Node]
"""By path relative to the folder; the folder itself is '.'."""
State = dict[str, bytes | None]
"""What a crash leaves: bytes of files, None for folders, by relative path."""


@dataclass
class Event:
    caption: str
    photograph: Photograph  # before what the caption names
    synced: int | None = None  # identity of what was on the disk from then on, as the photograph shows it
    done: str = ""  # the last promise that had been made before
    time: float = field(default_factory=time.monotonic)  # one clock for all processes


@dataclass
class FileLog:
    folder: Path
    events: list[Event] = field(default_factory=list)
    done: str = ""
    lock: Any = field(default_factory=threading.RLock)
    known: dict[bytes, bytes] = field(default_factory=dict)  # each content once, however many photographs show it

    def promise(self, text: str) -> None:
        """What was asked for is done: from now on no crash may lose it."""
        with self.lock:
            self.done = text
            self.take(f"after {text}")

    def take(self, caption: str, synced: int | None = None) -> None:
        self.events.append(Event(caption, self.photograph(), synced, self.done))

    def photograph(self) -> Photograph:
        """All files as of one moment: taken again where another thread or rank renamed or removed something meanwhile.

        What such a photograph misses under either name would look new, and half written, in the next one.
        """
        for _ in range(100):
            try:
                return self.walk()
            except OSError:
                continue
        raise AssertionError(f"{self.folder} never stood still for a photograph")

    def walk(self) -> Photograph:
        found: Photograph = {}
        pending = [self.folder]
        while pending:
            path = pending.pop()
            facts = path.lstat()
            inner = sorted(path.iterdir()) if stat.S_ISDIR(facts.st_mode) else None
            data = None if inner is not None else path.read_bytes()
            found[str(path.relative_to(self.folder))] = Node(
                facts.st_ino, None if data is None else self.known.setdefault(data, data)
            )
            pending += inner or []
        return found


def in_order(logs: list[list[Event]]) -> list[Event]:
    """What several processes recorded of one folder as one row, and an identity that is never given twice in place of inodes,
    whose numbers are.
    """
    numbers: dict[int, int] = {}
    events, last = sorted((event for log in logs for event in log), key=lambda event: event.time), 0
    for event in events:
        inodes = {node.identity for node in event.photograph.values()}
        numbers = {inode: number for inode, number in numbers.items() if inode in inodes}
        for inode in sorted(inodes - numbers.keys()):
            numbers[inode] = last = last + 1
        event.photograph = {name: Node(numbers[node.identity], node.data) for name, node in event.photograph.items()}
        event.synced = None if event.synced is None else numbers.get(event.synced)
    return events


@contextmanager
def recorded(folder: Path) -> Iterator[FileLog]:
    """Record what any thread of this process does in `folder`, which must exist."""
    log, inside, over = FileLog(folder.resolve()), threading.local(), threading.Event()
    fsync = os.fsync

    def concerns(event: str, args: tuple[Any, ...]) -> bool:
        if isinstance(args[0], int):  # a file that is open: its name was seen
            return event != "open"
        if event == "open":
            writes = bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            return writes and within(log.folder, args[0])
        # Inside a folder that is being removed, names are relative to it.
        return event in NAMES and (within(log.folder, args[0]) or not os.path.isabs(os.fsdecode(args[0])))

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if over.is_set() or getattr(inside, "busy", False) or (event != "open" and event not in NAMES):
            return
        inside.busy = True
        try:
            if concerns(event, args):
                with log.lock:
                    log.take(f"{event} {args[0]}")
        finally:
            inside.busy = False

    def syncing(descriptor: int) -> None:
        inode, target = os.fstat(descriptor).st_ino, os.readlink(f"/proc/self/fd/{descriptor}")
        if over.is_set() or not within(log.folder, target):
            return fsync(descriptor)
        inside.busy = True
        try:
            with log.lock:
                log.take(f"fsync {target}")
                fsync(descriptor)
                log.take(f"after fsync {target}", inode)
        finally:
            inside.busy = False

    sys.addaudithook(hook)  # cannot be removed again: `over` silences it
    os.fsync = syncing  # type: ignore[assignment]
    try:
        log.take("the beginning")
        yield log
        log.take("the end")
    finally:
        over.set()
        os.fsync = fsync


def within(folder: Path, path: Any) -> bool:
    text = os.path.abspath(os.fsdecode(path))
    return text == str(folder) or text.startswith(f"{folder}{os.sep}")


def killed(events: list[Event]) -> Iterator[tuple[str, str, State]]:
    """Caption, promise and state of every SIGKILL; files that were written between two photographs also half as far.

    What the first photograph shows was written before the record began, by a process that ended: it is whole.
    """
    before = {node.identity: node.data for node in events[0].photograph.values()} if events else {}
    for event in events:
        state: State = {name: node.data for name, node in event.photograph.items()}
        for name, node in event.photograph.items():
            if node.data and before.get(node.identity) != node.data:
                old = before.get(node.identity) or b""
                kept = len(old) if node.data.startswith(old) else 0  # what is added to the end of a file takes nothing from it
                half = node.data[: kept + (len(node.data) - kept) // 2]
                yield f"{event.caption}, {name} half written", event.done, {**state, name: half}
        yield event.caption, event.done, state
        before = {node.identity: node.data for node in event.photograph.values()}


@dataclass
class Disk:
    """What is known of the disk while a log is read: of each file its bytes, of each folder its names, since its last fsync."""

    data: dict[int, list[bytes]] = field(default_factory=dict)
    names: dict[int, list[dict[str, int]]] = field(default_factory=dict)

    def see(self, photograph: Photograph) -> None:
        listed: dict[int, dict[str, int]] = {node.identity: {} for node in photograph.values() if node.data is None}
        for name, node in photograph.items():
            if name != ROOT:
                listed[photograph[str(Path(name).parent)].identity][Path(name).name] = node.identity
            if node.data is not None:
                add(self.data.setdefault(node.identity, [b""]), node.data)
        for folder, names in listed.items():
            add(self.names.setdefault(folder, [{}]), names)

    def settle(self, identity: int) -> None:
        """After its fsync: what it is now, it stays until it changes again."""
        for history in (self.data, self.names):
            if identity in history:
                del history[identity][:-1]  # type: ignore[attr-defined]


def add(history: list[Any], value: Any) -> None:
    if history[-1] != value:
        history.append(value)


def synced_part(history: list[bytes]) -> bytes:
    """What an fsync had put on the disk of a file that has only grown since; nothing of one that was written anew."""
    return history[0] if history[-1].startswith(history[0]) else b""


def half(history: list[bytes]) -> bytes:
    first = len(synced_part(history))
    return history[-1][: first + (len(history[-1]) - first) // 2]


LOST: dict[str, Callable[[list[bytes]], bytes]] = {
    "there": lambda history: history[-1],
    "as fsynced": lambda history: history[0],
    "lost": synced_part,
    "half": half,
    "zeros": lambda history: synced_part(history) + bytes(len(history[-1]) - len(synced_part(history))),
}
"""Bytes of a file that was changed since its last fsync."""


def power_cuts(
    events: list[Event], seed: int = 0, extra: int = 4, without: Collection[int] = ()
) -> Iterator[tuple[str, str, State]]:
    """Caption, promise and state of power cuts at every event: all folders as of their fsync or as they were, in every combination
    of up to four of them, and `extra` draws of any moment in between; and for each, all that bytes may have become.

    `without`: fsyncs of these numbers are left out, as if the program had forgotten them.
    """
    disk, draw = Disk(), random.Random(seed)
    root, numbered = events[0].photograph[ROOT].identity, 0
    for event in events:
        disk.see(event.photograph)
        if event is events[0]:  # it has been there for long
            for identity in (*disk.data, *disk.names):
                disk.settle(identity)
        if event.synced is not None:
            if numbered not in without:
                disk.settle(event.synced)
            numbered += 1
        open_folders = [folder for folder, history in disk.names.items() if len(history) > 1]
        chosen = [dict(zip(open_folders[-4:], ends)) for ends in itertools.product((0, -1), repeat=len(open_folders[-4:]))]
        chosen += [{folder: draw.randrange(len(disk.names[folder])) for folder in open_folders} for _ in range(extra)]
        for moments in chosen:
            for name, lost in LOST.items():
                yield f"{event.caption}, bytes {name}", event.done, left(disk, root, moments, lost)


def left(disk: Disk, root: int, moments: dict[int, int], lost: Callable[[list[bytes]], bytes]) -> State:
    """The folder when each of its folders shows its names of one moment; those not named, of their last."""
    state: State = {ROOT: None}
    pending = [(ROOT, root)]
    while pending:
        path, folder = pending.pop()
        for name, identity in disk.names[folder][moments.get(folder, -1)].items():
            inner = str(Path(path) / name)
            if identity in disk.names:
                state[inner] = None
                pending.append((inner, identity))
            else:
                history = disk.data[identity]
                state[inner] = history[0] if len(history) == 1 else lost(history)
    return state


def distinct(states: Iterator[tuple[str, str, State]]) -> Iterator[tuple[str, str, State]]:
    """Each state once per promise."""
    seen: set[tuple[str, frozenset[tuple[str, bytes | None]]]] = set()
    for caption, done, state in states:
        key = (done, frozenset(state.items()))
        if key not in seen:
            seen.add(key)
            yield caption, done, state


def write_state(state: State, folder: Path) -> None:
    """Lay a state out in `folder`, which is new."""
    for name in sorted(state):
        data = state[name]
        if data is None:
            (folder / name).mkdir(parents=True)
        else:
            (folder / name).write_bytes(data)
