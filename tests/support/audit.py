"""A watch over a process and its forked workers: what Python's audit events tell of files, code, processes and connections.

Every event that is not allowed is written as a line of JSON to a file that was opened before. A hook cannot be removed: use it in
a process of its own. Not seen is what libraries in C and C++ do by themselves.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import sysconfig
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[2])
CODE = tuple({os.path.realpath(sysconfig.get_paths()[key]) for key in ("stdlib", "platstdlib", "purelib", "platlib")}) + (
    *(os.path.join(ROOT, folder) for folder in ("model", "data", "trainer", "tools", "tests")),
)
"""Where code may stand: the standard library, what is installed, and this project."""
SYSTEM = (
    "/proc",
    "/sys",
    "/usr/share",
    "/usr/lib",
    "/lib",
    "/etc/localtime",
    "/etc/mime.types",
    "/etc/ld.so.cache",
    "/dev/urandom",
    "/dev/null",
)
SCRATCH = ("/dev/shm", "/dev/null")
"""Where tensors that go from a worker to its parent stand, and nowhere."""
MAKERS = (
    "dataclasses.py",
    "collections/__init__.py",
    "jinja2/",
    "torch/",
    "numpy/",
    "typing.py",
    "enum.py",
    "functools.py",
    "ast.py",
    "inspect.py",
)
"""Parts of the standard library and of packages that make code out of their own text: of a dataclass, of a chat template in
jinja2's sandbox. Ours is not among them."""
BETWEEN_OURSELVES = ("multiprocessing/", "torch/multiprocessing/", "torch/utils/data/")
CARRIED = {
    "data",
    "model",
    "torch",
    "numpy",
    "builtins",
    "collections",
    "multiprocessing",
    "functools",
    "copyreg",
    "pathlib",
    "_codecs",
}
"""Modules whose objects a data worker sends to its parent."""


@dataclass(frozen=True)
class Rules:
    readable: tuple[str, ...]  # folders of what is read: records, media, bases
    writable: tuple[str, ...]  # the run's folder


def watch(log: int, rules: Rules) -> None:
    """From now on, in this process and in those forked from it."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        judge = JUDGES.get(event)
        if judge is None:
            return
        for problem in judge(args, rules):
            os.write(log, json.dumps([event, problem, *_callers()[:6]]).encode() + b"\n")

    sys.addaudithook(hook)


def _callers() -> list[str]:
    """Files of the frames below the hook, innermost first."""
    frame: types.FrameType | None = sys._getframe(1)
    found = []
    while frame is not None:
        if frame.f_code.co_filename != __file__:
            found.append(frame.f_code.co_filename)
        frame = frame.f_back
    return found


def _inside(path: str, folders: tuple[str, ...]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)


def _is_by(parts: tuple[str, ...]) -> bool:
    """Whether the code that did it, or called it, is one of these files of the library or of a package."""
    library = CODE[:-5]
    return any(_inside(os.path.realpath(f), library) and any(part in f for part in parts) for f in _callers()[:3])


def _forbidden(args: tuple[Any, ...], rules: Rules) -> Iterator[str]:
    yield repr(args)[:200]


def _unpickled(args: tuple[Any, ...], rules: Rules) -> Iterator[str]:
    module = str(args[0])
    ours = any(part in caller for caller in _callers() for part in BETWEEN_OURSELVES)
    if not ours or module.partition(".")[0] not in CARRIED:
        yield f"{module}.{args[1]}"


def _code(args: tuple[Any, ...], rules: Rules) -> Iterator[str]:
    name = getattr(args[0], "co_filename", None) or (args[1] if len(args) > 1 else None)
    name = os.fsdecode(name) if isinstance(name, bytes) else str(name)
    if name.startswith("<frozen ") or (_inside(os.path.realpath(name), CODE) and os.path.isfile(name)):
        return
    if not _is_by(MAKERS):
        yield f"code of {name}"


def _marshalled(args: tuple[Any, ...], rules: Rules) -> Iterator[str]:
    if not any("importlib" in caller for caller in _callers()[:4]):
        yield f"{len(args[0]) if args and isinstance(args[0], bytes) else ''} bytes of code"


def _library(args: tuple[Any, ...], rules: Rules) -> Iterator[str]:
    name = args[0]
    if name is not None and not _inside(os.path.realpath(str(name)), CODE):
        yield f"the library {name}"


def _module(args: tuple[Any, ...], rules: Rules) -> Iterator[str]:
    if args[1] is not None and not _inside(os.path.realpath(str(args[1])), CODE):
        yield f"the module {args[0]} of {args[1]}"


def _forked(args: tuple[Any, ...], rules: Rules) -> Iterator[str]:
    if not any("multiprocessing/popen_fork.py" in caller for caller in _callers()):
        yield "a process"


def _connected(args: tuple[Any, ...], rules: Rules) -> Iterator[str]:
    """Sockets of the machine itself, by which workers hand their tensors over."""
    family = args[1] if isinstance(args[1], int) and len(args) == 4 else args[0].family
    if family != socket.AF_UNIX:
        yield repr(args[1:])[:200]


def _opened(args: tuple[Any, ...], rules: Rules) -> Iterator[str]:
    path, _, flags = args
    if isinstance(path, int) or path is None:
        return
    real = os.path.realpath(os.fsdecode(path))
    if (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
        if not _inside(real, (*rules.writable, *SCRATCH)) and real != f"/proc/{os.getpid()}/clear_refs":  # its own peak of memory
            yield f"{real} for writing"
    elif not _inside(real, (*rules.readable, *rules.writable, *CODE, *SYSTEM, *SCRATCH)) and not SOCKETS.fullmatch(real):
        yield f"{real} for reading"


def _changed(places: tuple[tuple[int, int], ...], args: tuple[Any, ...], rules: Rules) -> Iterator[str]:
    """Of each pair the first argument is a path, the second the open folder that it begins in, if that is one."""
    for at, beside in places:
        if isinstance(args[at], int):  # a file that is open: its opening was judged
            continue
        path, folder = os.fsdecode(args[at]), args[beside] if len(args) > beside else -1
        if isinstance(folder, int) and folder >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        parent, name = os.path.split(os.path.abspath(path))
        real = os.path.join(os.path.realpath(parent), name)
        if not _inside(real, (*rules.writable, *SCRATCH)) and not SOCKET.fullmatch(real):
            yield real


SOCKETS = re.compile(re.escape(os.path.realpath(tempfile.gettempdir())) + r"/pymp-[^/]+")
"""Folder where multiprocessing keeps the sockets by which workers hand over their tensors; it is opened when it is removed."""
SOCKET = re.compile(SOCKETS.pattern + r"(/[^/]+)?")
"""That folder, or what stands in it."""
CHANGES = {
    **{"os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.mkdir": ((0, 2),), "os.rename": ((0, 2), (1, 3)), "os.link": ((1, 3),)},
    **{"os.symlink": ((1, 2),), "os.truncate": ((0, 9),), "os.chmod": ((0, 2),), "os.chown": ((0, 3),)},
}
JUDGES: dict[str, Callable[[tuple[Any, ...], Rules], Iterator[str]]] = {
    **dict.fromkeys(
        ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.forkpty", "pty.spawn"),
        _forbidden,
    ),
    **dict.fromkeys(
        ("urllib.Request", "http.client.connect", "http.client.send", "ftplib.connect", "smtplib.connect", "webbrowser.open"),
        _forbidden,
    ),
    **dict.fromkeys(("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"), _forbidden),
    **dict.fromkeys(("socket.__new__", "socket.connect", "socket.bind", "socket.sendto"), _connected),
    **dict.fromkeys(("exec", "compile"), _code),
    **{event: partial(_changed, places) for event, places in CHANGES.items()},
    **{"pickle.find_class": _unpickled, "marshal.loads": _marshalled, "ctypes.dlopen": _library, "import": _module},
    **{"os.fork": _forked, "open": _opened},
}
