"""Through torchrun, as on several machines: what dies is started again by it, and the run ends with the same bytes.

Two hosts are two network namespaces of this one, with a cable between them and the folder of the run in common.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.resume import metrics
from tests.support.runs import tables
from tests.support.torchrun import ROOT, wait_until_gone, weights, workers
from trainer.runfile.toml_files import to_toml

SECTIONS: dict[str, Any] = {"train": {"max_steps": 30}, "checkpoint": {"every": 1, "keep": 3}, "data": {"workers": 1}}
HSDP: dict[str, Any] = {"parallel": {"strategy": "hsdp", "shard_size": 2}}
ADDRESSES = ("10.213.7.1", "10.213.7.2")
LIMIT = 400  # seconds; four ranks take their time to start on two cores


def launch(parts: Path, output_dir: Path, options: list[str], within: list[str], **sections: Any) -> subprocess.Popen[str]:
    """A launcher with `options`, `within` another command, whose words go to a file beside the run."""
    path = output_dir.with_suffix(".toml")
    path.write_text(to_toml(tables(parts, output_dir=str(output_dir), **{**SECTIONS, **sections})))
    command = [*within, sys.executable, "-m", "torch.distributed.run", *options, "-m", "trainer.main", "--cfg", str(path)]
    with said_by(output_dir).open("a") as said:
        return subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, text=True)


def said_by(output_dir: Path) -> Path:
    return output_dir.with_suffix(".log")


def wait_for(due: Callable[[], bool], launcher: subprocess.Popen[str], output_dir: Path) -> None:
    end = time.monotonic() + LIMIT
    while not due():
        assert launcher.poll() is None and time.monotonic() < end, said_by(output_dir).read_text()
        time.sleep(0.05)


def ranks_of(launcher: subprocess.Popen[str], output_dir: Path) -> dict[int, int]:
    """The processes of the ranks that `launcher` has started, by rank. Their data workers are not among them."""
    found = {}
    for pid in workers(output_dir):
        try:
            process = Path("/proc") / str(pid)
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            words = dict(word.partition("=")[::2] for word in (process / "environ").read_text().split("\0"))
        except OSError:  # gone in the meantime
            continue
        if parent == launcher.pid:
            found[int(words["RANK"])] = pid
    return found


def finished(launcher: subprocess.Popen[str], output_dir: Path) -> None:
    assert launcher.wait(LIMIT) == 0, said_by(output_dir).read_text()
    wait_until_gone(output_dir)
    assert json.loads((output_dir / "exit.json").read_text())["code"] == 0


def check_same(one: Path, other: Path) -> None:
    assert weights(one) == weights(other) and weights(one)
    assert metrics(one) == metrics(other)
    for name in ("samples.bin", "ledger.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.fixture(scope="module")
def whole(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to: four ranks on one machine."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finished(launch(parts, folder, ["--standalone", "--nproc_per_node=4"], [], **HSDP), folder)
    return folder


@pytest.mark.long
def test_a_killed_rank_is_started_again_by_its_launcher(parts: Path, whole: Path, tmp_path: Path) -> None:
    """Before the first step and twice after it, rank 0 being one of them; nobody types anything."""
    killed = tmp_path / "killed"
    launcher = launch(parts, killed, ["--standalone", "--nproc_per_node=4", "--max-restarts=3"], [], **HSDP)
    wait_for((killed / "index").exists, launcher, killed)
    os.kill(ranks_of(launcher, killed)[1], signal.SIGKILL)
    for rank, step in ((2, 3), (0, 12)):
        wait_for((killed / f"checkpoint-{step}" / "manifest.json").exists, launcher, killed)
        os.kill(ranks_of(launcher, killed)[rank], signal.SIGKILL)
    finished(launcher, killed)
    assert said_by(killed).read_text().count("start     from ") == 2
    check_same(killed, whole)


@contextmanager
def hosts() -> Iterator[list[list[str]]]:
    """What runs a command on each of two hosts. Skips where namespaces may not be made."""
    names = [f"trainer{os.getpid()}{side}" for side in "ab"]
    ends = [f"v{os.getpid()}{side}" for side in "ab"]
    with ExitStack() as stack:
        for name in names:
            made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
            if made.returncode:
                pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
            stack.callback(subprocess.run, ["ip", "netns", "delete", name], check=False)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, ADDRESSES):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        variables = [f"GLOO_SOCKET_IFNAME={end}" for end in ends]
        yield [["ip", "netns", "exec", name, "env", variable] for name, variable in zip(names, variables)]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="network namespaces need root on Linux")
def test_a_host_that_is_lost_and_comes_back_ends_with_the_same_bytes(parts: Path, whole: Path, tmp_path: Path) -> None:
    """Two ranks on each, a copy of the weights on each. The second is killed: the first ends by itself, and both are started again,
    as SLURM does. (torchrun cannot wait for a host to come back: for 15 s it takes the dead one's place for filled.)
    """
    lost = tmp_path / "lost"
    with hosts() as within:

        def host(number: int) -> subprocess.Popen[str]:
            meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29400", "--rdzv-id=run"]
            meeting.append(f"--rdzv-conf=is_host={int(number == 0)}")  # both have the name of the one machine they are
            counts = ["--nnodes=2", "--nproc_per_node=2"]
            return launch(parts, lost, [*meeting, *counts, f"--local-addr={ADDRESSES[number]}"], within[number], **HSDP)

        first, second = host(0), host(1)
        wait_for((lost / "checkpoint-5" / "manifest.json").exists, first, lost)
        for pid in (second.pid, *ranks_of(second, lost).values()):  # all at once, as when a machine loses power
            os.kill(pid, signal.SIGKILL)
        second.wait()
        assert first.wait(LIMIT) == 1
        wait_until_gone(lost)
        assert json.loads((lost / "exit.json").read_text())["code"] == 1
        first, second = host(0), host(1)
        finished(first, lost)
        assert second.wait(LIMIT) == 0, said_by(lost).read_text()
    assert said_by(lost).read_text().count("start     from ") == 1
    check_same(lost, whole)
