"""A whole run under an audit hook: nothing is unpickled, started, connected to or executed; files stay in their folders."""

from __future__ import annotations

import http.client
import io
import json
import marshal
import os
import pickle
import shutil
import socket
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from data import load_processor
from model import load_model
from tests.support.audit import Rules, watch
from tests.support.ranks import run_ranks
from tests.support.runs import config_of, save_parts, save_records, tables
from tools import check_data, export_adapter
from trainer.distributed.world import World
from trainer.main import run
from trainer.runfile.toml_files import to_toml

LORA = {"model": {"llm": {"tune": "lora"}, "vision": {"tune": "frozen"}}, "lora": {"rank": 2}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """parts/ to read, work/ to write, outside/ with files that nobody may touch."""
    folder = tmp_path_factory.mktemp("audit").resolve()
    (folder / "parts").mkdir()
    save_parts(folder / "parts")
    save_records(folder / "parts", 8)
    for name in ("work", "outside"):
        (folder / name).mkdir()
    (folder / "outside" / "secret.txt").write_text("secret")
    (folder / "outside" / "evil.py").write_text("evil = True\n")
    return folder


def watched(world: World, place: Path, log: Path, action: Callable[..., Any], *args: Any) -> Any:
    """What `action` returns, all its events judged."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    watch(descriptor, Rules((str(place / "parts"),), (str(place / "work"),)))
    with redirect_stdout(io.StringIO()):
        return action(world, place, *args)


def events(place: Path, action: Callable[..., Any], *args: Any) -> tuple[Any, list[list[str]]]:
    """What it returned, and what it should not have done."""
    log = place / f"{action.__name__}-{'-'.join(map(str, args))}.log"
    (answer,) = run_ranks(watched, 1, place, log, action, *args, seconds=300)
    return answer, [json.loads(line) for line in log.read_text().splitlines()]


def whole_life(world: World, place: Path, workers: int) -> list[Any]:
    """Fresh, resumed, finished, exported in two forms, checked, loaded and asked."""
    work, parts = place / "work" / str(workers), place / "parts"
    sections: dict[str, Any] = {"output_dir": str(work / "run"), "data": {"workers": workers}, **LORA}
    codes: list[Any] = [run(config_of(parts, **sections, train={"max_steps": steps}), world) for steps in (1, 2)]
    final = work / "run" / "final"
    codes += [export_adapter.main([str(final), str(work / form), "--for", form]) for form in ("safetensors", "peft")]
    (work / "run.toml").write_text(to_toml(tables(parts, **sections)))
    codes.append(check_data.main(["--cfg", str(work / "run.toml")]))
    net, processor = load_model(final), load_processor(final)
    record = {"image": "1_0.png", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}]}
    answer = net.generate(processor([record], media_root=str(parts / "images")), max_new_tokens=2)
    return [*codes, len(processor.decode(answer))]


@pytest.mark.parametrize("workers", [2, pytest.param(0, marks=pytest.mark.long)])
def test_a_whole_run_does_nothing_that_it_should_not(place: Path, workers: int) -> None:
    answer, found = events(place, whole_life, workers)
    assert found == []
    assert answer == [0, 0, 0, 0, 0, 1]


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.getcwd, ()


def _outside(place: Path) -> str:
    return str(place / "outside" / "secret.txt")


def _connect(kind: int) -> None:
    with socket.socket(kind) as made:
        made.settimeout(0.1)
        made.connect(("127.0.0.1", 9))


PLANTED: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "unpickling": ("pickle.find_class", lambda place: pickle.loads(pickle.dumps(Evil()))),
    "code from text": ("exec", lambda place: exec("1 + 1")),
    "code from a file": (
        "exec",
        lambda place: exec(compile((place / "outside/evil.py").read_text(), str(place / "outside/evil.py"), "exec")),
    ),
    "compiling": ("compile", lambda place: compile("1 + 1", "<record>", "eval")),
    "marshal": ("marshal.loads", lambda place: marshal.loads(marshal.dumps(1))),
    "a shell": ("os.system", lambda place: os.system("true")),
    "a program": ("subprocess.Popen", lambda place: subprocess.run(["true"], check=True)),
    "a process": ("os.fork", lambda place: os.fork() or os._exit(0)),
    "spawning": ("os.posix_spawn", lambda place: os.posix_spawn("/bin/true", ["true"], {})),
    "a connection": ("socket.connect", lambda place: _connect(socket.AF_INET)),
    "a name of the network": ("socket.getaddrinfo", lambda place: socket.getaddrinfo("localhost", 80)),
    "a page": ("urllib.Request", lambda place: urllib.request.urlopen("http://127.0.0.1:9/", timeout=0.1)),
    "http": ("http.client.connect", lambda place: http.client.HTTPConnection("127.0.0.1", 9, timeout=0.1).connect()),
    "reading elsewhere": ("open", lambda place: Path(_outside(place)).read_text()),
    "writing elsewhere": ("open", lambda place: Path(place / "outside" / "new.txt").write_text("x")),
    "writing into what is read": ("open", lambda place: Path(place / "parts" / "new.txt").write_text("x")),
    "removing elsewhere": ("os.remove", lambda place: os.remove(place / "outside" / "gone" / "x")),
    "moving elsewhere": ("os.rename", lambda place: os.rename(_outside(place), place / "outside" / "gone" / "x")),
    "a library": ("ctypes.dlopen", lambda place: __import__("ctypes").CDLL(_outside(place))),
    "reading beside the sockets of workers": ("open", lambda place: Path(tempfile.gettempdir(), "pymp-none", "secret").read_text()),
    "reading through a link": ("open", lambda place: _through_link(place)),
}


def _through_link(place: Path) -> str:
    link = place / "work" / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(_outside(place))
    return link.read_text()


def planted(world: World, place: Path) -> None:
    for name, (_, act) in PLANTED.items():
        os.write(1, b"")
        Path(place / "work" / "now").write_text(name)
        try:
            act(place)
        except Exception:  # that it was tried is what counts
            continue


def test_each_forbidden_thing_is_seen(place: Path) -> None:
    _, found = events(place, planted)
    seen = [event for event, *_ in found]
    assert {event for event, _ in PLANTED.values()} <= set(seen)
    for wanted in (
        "secret.txt for reading",
        "pymp-none/secret for reading",
        "outside/new.txt for writing",
        "parts/new.txt for writing",
        "code of <record>",
    ):
        assert any(wanted in problem for _, problem, *_ in found), wanted
    assert sum("secret.txt for reading" in problem for _, problem, *_ in found) >= 2


class Leaking:
    """Records whose worker reads what it should not, and sends an object of a module that is none of ours."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> Any:
        Path(_outside(self.place)).read_text()
        return shutil.disk_usage


def in_a_worker(world: World, place: Path) -> None:
    loader: DataLoader[Any] = DataLoader(Leaking(place), batch_size=None, num_workers=1)  # type: ignore[arg-type]
    list(loader)


def test_a_worker_is_watched_too(place: Path) -> None:
    _, found = events(place, in_a_worker)
    assert any(event == "open" and "secret.txt for reading" in problem for event, problem, *_ in found)
    assert any(event == "pickle.find_class" and "shutil" in problem for event, problem, *_ in found)
