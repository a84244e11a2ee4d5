"""Transport of batches from a data worker to its rank: the tensors of a few micro-batches share one piece of memory and one file.

Torch shares each tensor by a file of its own, which stays open in the rank as long as the tensor lives: a step of many
micro-batches passes the usual limit of 1,024 open files. Here one file is open on the way, which the rank closes as soon as it has
mapped it, and a worker that is killed leaves no name in /dev/shm.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from typing import Any, TypeVar

import torch
from torch import Tensor

from data.workers import NO_FILE, OPEN_FILES, OpenFilesError, WorkerError
from model.batch import Media

T = TypeVar("T")
_ALIGNED = 64  # bytes
_MOST_AT_ONCE = 1 << 30  # bytes; Linux writes at most 2 GiB in one call


@dataclass(frozen=True)
class _TensorPosition:
    """Position of a tensor in the memory of a parcel; it stands in the contents instead of the tensor."""

    start: int  # byte
    dtype: torch.dtype
    shape: tuple[int, ...]
    stays: bool  # arrives as a view of the memory, not as a copy: encoder input, which is most of it

    @property
    def stop(self) -> int:
        return self.start + self.dtype.itemsize * torch.Size(self.shape).numel()


class Parcel:
    """Contents without their tensors, and the memory that holds the tensors.

    In another process a parcel arrives as the contents.
    """

    def __init__(self, skeleton: object, descriptor: int, size: int) -> None:
        self._skeleton, self._descriptor, self._size = skeleton, descriptor, size

    def __reduce__(self) -> tuple[object, ...]:
        """Return how to rebuild the contents; a parcel is pickled once.

        A failure becomes the contents: raised here, it would be printed, and the rank would wait for the batch for ever.
        """
        try:
            return _received, (self._skeleton, DupFd(self._descriptor), self._size)
        except OSError as error:
            problem = _problem(error)
            return type(problem), problem.args
        finally:
            os.close(self._descriptor)


def pack_for_transport(contents: object) -> Any:
    """Pack `contents`, anything of dataclasses, dicts, lists and tuples, in the form in which a worker sends it.

    Encoder input arrives as a view of the shared memory, and other tensors as copies: whoever keeps labels keeps no pictures. Where
    the contents cannot be sent for want of open files or memory, the `WorkerError` to send is returned.
    """
    tensors: list[tuple[_TensorPosition, Tensor]] = []
    skeleton = _replaced(contents, Tensor, lambda tensor, stays: _placed(tensors, tensor, stays))
    size = tensors[-1][0].stop if tensors else 0
    if size == 0 or not hasattr(os, "memfd_create"):
        return contents  # torch sends it, with a file per tensor
    try:
        descriptor = os.memfd_create("micro-batches", os.MFD_CLOEXEC)
    except OSError as error:
        return _problem(error)
    try:
        os.ftruncate(descriptor, size)
        for place, tensor in tensors:
            _write(descriptor, tensor, place.start)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError):
            return _problem(error)
        raise
    return Parcel(skeleton, descriptor, size)


def _problem(error: OSError) -> WorkerError:
    if error.errno in NO_FILE:
        return OpenFilesError(f"a data worker cannot send a batch: {OPEN_FILES}")
    return WorkerError(f"a data worker cannot send a batch: {error.strerror}")


def _received(skeleton: object, handle: Any, size: int) -> object:
    """Return the contents in the process that received them, or the `OpenFilesError` that kept the memory from arriving."""
    try:
        descriptor = handle.detach()
    except (OSError, RuntimeError) as error:
        # Where a received file is over the limit, Python drops it from the message, and only this text says so.
        if getattr(error, "errno", None) in NO_FILE or "ancdata" in str(error):
            return OpenFilesError(f"a batch cannot be received from a data worker: {OPEN_FILES}")
        raise  # the worker is dead; `data.workers.explain_worker_death` says why
    try:
        memory = _mapped(descriptor, size)
    finally:
        os.close(descriptor)
    return _replaced(skeleton, _TensorPosition, lambda place, _: _tensor(memory, place))


def _mapped(descriptor: int, size: int) -> Tensor:
    """Map the bytes of an open file, shared, as (size,) uint8, which stay when the file is closed."""
    path = f"/proc/self/fd/{descriptor}"
    if os.path.exists(path):
        return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    found = torch.empty(size, dtype=torch.uint8)
    buffer, at = found.numpy().data, 0
    while at < size:
        at += os.preadv(descriptor, [buffer[at : at + _MOST_AT_ONCE]], at)
    return found


def _tensor(memory: Tensor, place: _TensorPosition) -> Tensor:
    found = memory[place.start : place.stop].view(place.dtype).view(place.shape)
    return found if place.stays else found.clone()


def _placed(tensors: list[tuple[_TensorPosition, Tensor]], tensor: Tensor, stays: bool) -> _TensorPosition:
    """Place `tensor` behind those that are placed already, and return its position."""
    end = tensors[-1][0].stop if tensors else 0
    place = _TensorPosition(end + -end % _ALIGNED, tensor.dtype, tuple(tensor.shape), stays)
    tensors.append((place, tensor))
    return place


def _write(descriptor: int, tensor: Tensor, at: int) -> None:
    flat = tensor.contiguous().reshape(-1)
    if flat.numel() < 2:  # its stride may be anything
        flat = flat.new_empty(flat.shape).copy_(flat)
    data = flat.view(torch.uint8).numpy().data
    while data:
        written = os.pwrite(descriptor, data[:_MOST_AT_ONCE], at)
        data, at = data[written:], at + written


def _replaced(value: Any, kind: type[T], change: Callable[[T, bool], object], stays: bool = False) -> Any:
    """Replace everything of a `kind` in `value` by the result of `change`, which is also given whether it is encoder input."""
    if isinstance(value, kind):
        return change(value, stays)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        is_media = isinstance(value, Media)
        changed = {n: _replaced(getattr(value, n), kind, change, is_media and n == "values") for n in names}
        return dataclasses.replace(value, **changed)
    if isinstance(value, dict):
        return {key: _replaced(item, kind, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(item, kind, change) for item in value)
    return value
