"""Helpers of tests/trainer/distributed/test_torchrun.py that other tests share."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from tests.support.runs import tables
from trainer.runfile.toml_files import to_toml

ROOT = Path(__file__).parents[2]


def command(parts: Path, output_dir: Path, **sections: Any) -> list[str]:
    path = output_dir.with_suffix(".toml")
    path.write_text(to_toml(tables(parts, output_dir=str(output_dir), **sections)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    return [*launcher, "-m", "trainer.main", "--cfg", str(path)]


def workers(output_dir: Path) -> list[int]:
    """Processes whose command line names this run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if str(output_dir.with_suffix(".toml")).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_until_gone(output_dir: Path, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while workers(output_dir):
        assert time.monotonic() < end, f"orphans: {workers(output_dir)}"
        time.sleep(0.1)


def weights(output_dir: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (output_dir / "final").glob("*.safetensors")}
