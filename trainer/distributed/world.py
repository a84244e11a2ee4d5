"""Start of the process group, and one frozen World per process, made once, with the collectives that most modules use."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from model.errors import ConfigError
from trainer.distributed.rendezvous import RendezvousTimeout, join_start

TIMEOUT = timedelta(minutes=30)
START_SECONDS = 600.0  # for all ranks to join


@dataclass(frozen=True)
class World:
    """Rank, device and store of this process.

    Every method but `is_main` and `channel` is a collective: all ranks call it, in the same order.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device
    store: dist.Store = field(default_factory=dist.HashStore, compare=False, repr=False)

    def channel(self, name: str) -> dist.Store:
        """Return a store of small texts by key, shared by all ranks and separate for every `name`. Not a collective.

        The store has a connection of its own: a thread may use it while other threads wait in theirs.
        """
        return dist.PrefixStore(name, self.store.clone())  # type: ignore[attr-defined]  # torch declares it nowhere

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mesh(self, shard_size: int = 0) -> DeviceMesh:
        """Return a mesh of all ranks, (size,); with `shard_size`, a divisor of their number, (size / shard_size, shard_size).

        The ranks of a row share one copy. They are neighbours: as a rule, ranks of one machine.
        """
        if not shard_size:
            return init_device_mesh(self.device.type, (self.size,))
        return init_device_mesh(self.device.type, (self.size // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over ranks, in place, and return it; on CUDA the host does not wait."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.size > 1:
            self.sum(torch.zeros((), device=self.device)).item()

    def gather_json(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in the order of ranks, on every rank. A host sync.

        The values travel as JSON, because the object collectives of torch.distributed unpickle.
        """
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([data.numel()], device=self.device))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: data.numel()] = data
        rows = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(rows, padded)
        return [json.loads(bytes(row[: int(size)].tolist())) for row, size in zip(rows, sizes)]

    def broadcast_json(self, value: Any) -> Any:
        """Return the value of rank 0 on every rank. A host sync."""
        return self.gather_json(value if self.is_main else None)[0]


def start_world() -> World:
    """Join the process group that torchrun describes in the environment, or make a group of this process alone, without a port."""
    rank, local_rank, size = (int(os.environ.get(name, default)) for name, default in ENVIRONMENT)
    use_expandable_segments()  # read once, when CUDA starts
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        check_devices(rank, local_rank)
        # Otherwise a thread of torch aborts the process at the first error of a device or a peer, before this rank has reported it.
        os.environ.setdefault("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0")
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    store = dist.HashStore() if size == 1 else join_store()
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=TIMEOUT)
    return World(rank, local_rank, size, device, store)


ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables that configure the allocator of a GPU, by their names of today and before."""


def use_expandable_segments() -> None:
    """Let the allocator of a GPU grow its segments: shapes change at every step, and fixed ones would fragment.

    What a user has configured stays as it is.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


def check_devices(rank: int, local_rank: int) -> None:
    """Raise `ConfigError` where this machine has no device left for the rank."""
    count = torch.cuda.device_count()
    if local_rank >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        by = "" if visible is None else f" (CUDA_VISIBLE_DEVICES = {visible!r})"
        raise ConfigError(
            f"rank {rank} is number {local_rank} of its machine, counted from 0, and that has {count} CUDA devices{by}: start one "
            f"process for each, --nproc_per_node={count}"
        )


ENVIRONMENT = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))


def join_store() -> dist.Store:
    """Return the store at the address that the launcher names, in which ranks find each other, once all ranks have joined.

    Raises `ConfigError`, with the ranks that did not come within START_SECONDS.
    """
    address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    rank, _, size = (int(os.environ.get(name, default)) for name, default in ENVIRONMENT)
    try:
        store = open_store(rank, size)
    except (dist.DistError, RuntimeError, ValueError, KeyError) as error:
        reason = f"{error} is not set" if isinstance(error, KeyError) else str(error).strip().splitlines()[0]
        raise ConfigError(
            f"the ranks cannot meet at {address} ({reason}). A port in use: choose another one with --master_port, or start "
            "one process with `python -m trainer.main`, which needs none"
        ) from error
    try:
        start = join_start(store, rank, size, START_SECONDS)
    except RendezvousTimeout as error:
        who = describe_missing(error.missing, size)
        raise ConfigError(f"{who} {START_SECONDS:.0f} s to {address}: look at what their machines say") from error
    start.set_timeout(TIMEOUT)
    return start


def open_store(rank: int, size: int) -> dist.Store:
    """Connect to the launcher's store, or to the store of rank 0, which is made here, without waiting for the other ranks."""
    from_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        rank == 0 and not from_launcher,
        timeout=timedelta(seconds=START_SECONDS),
        wait_for_workers=False,
        multi_tenant=True,
    )


def describe_missing(missing: list[int], size: int) -> str:
    """Describe for people which ranks did not come: the beginning of a sentence."""
    who = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing[:16]))}{' ...' * (len(missing) > 16)}"
    return f"{who} of {size} did not come within"


def stop_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its launcher dies: torchrun's workers are sessions of their own and would run on.

    Where the launcher has died while this process was starting, the process kills itself here.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent or not could_be_launcher(parent):
        os.kill(os.getpid(), signal.SIGKILL)


def could_be_launcher(pid: int) -> bool:
    """Tell whether a process can be torchrun, which is Python.

    The process that adopts orphans is none, as a rule: init, a shell, SLURM's step.
    """
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return pid != 1
    return b"python" in line or b"torch" in line
