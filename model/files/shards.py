"""Checkpoint tensors in pieces: one safetensors file per rank, and a JSON file with the first row and the whole shape of each
piece.

Any number of ranks, under any strategy, may have written the pieces; a tensor is joined from adjoining pieces.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from model.errors import ConfigError
from model.files.manifest import Facts, UnsoundCheckpoint
from model.files.sharding import is_sharded_tensor, local_range
from model.files.tensor_files import Entry, LazyTensor, Tensors, as_bytes, dump_json, file_order, header, read_safetensors
from model.files.untrusted import load_json
from model.files.verified_write import PIECE_BYTES, BadShard, check_written, write_synced

WEIGHTS = "weights/"
"""Prefix of the trained parameters among a checkpoint's tensors; the optimizer's tensors have the prefixes in MOMENTS."""
MOMENTS = ("exp_avg", "exp_avg_sq")
EXPONENTS: dict[torch.dtype, tuple[Any, int]] = {
    torch.float64: (np.uint64, 0x7FF0 << 48),
    torch.float32: (np.uint32, 0x7F80 << 16),
    torch.float16: (np.uint16, 0x7C00),
    torch.bfloat16: (np.uint16, 0x7F80),
}
"""Exponent bits by type: all of them are set only in infinities and NaN."""


@dataclass(frozen=True)
class ShardPiece:
    """Rows [first, first + rows.shape[0]) of a tensor."""

    first: int
    rows: LazyTensor
    shape: tuple[int, ...]  # of the whole tensor


@dataclass(frozen=True)
class ByteRange:
    """Position [begin, end) of a tensor's bytes in the data section of a file."""

    name: str
    dtype: torch.dtype
    begin: int
    end: int


class RowsFacts(TypedDict):
    """Rows of a tensor that a rank holds, in the JSON file beside its shard."""

    first: int  # row
    shape: list[int]  # of the whole tensor


@dataclass(frozen=True)
class ShardPlan:
    """Layout of a rank's file before anything is written: its header, its tensors in order, and the contents of its JSON file."""

    header: bytes
    ranges: list[ByteRange]
    layout: dict[str, RowsFacts]

    def name_at(self, position: int) -> str:
        """Return the name of the tensor that contains byte `position` of the data section."""
        return self.ranges[bisect_right(self.ranges, position, key=lambda byte_range: byte_range.begin) - 1].name


Chunks = Callable[[], Iterator[tuple[torch.dtype, memoryview]]]
"""Returns a file's data in order, each chunk with its number type. It is called twice: to write and to compare."""


def plan_shard(tensors: dict[str, Tensor]) -> ShardPlan:
    """Plan the file of this rank's rows of `tensors` (plain or sharded). Tensors of which this rank has no rows are left out."""
    entries: dict[str, Entry] = {}
    layout: dict[str, RowsFacts] = {}
    for name, tensor in tensors.items():
        first, stop = local_range(tensor)
        if tensor.dim() and first == stop:
            continue
        layout[name] = {"first": first, "shape": list(tensor.shape)}
        rows = local(tensor)
        entries[name] = Entry(rows.dtype, tuple(rows.shape), lambda: None)
    places, end = [], 0
    for name in file_order(entries):
        begin, end = end, end + entries[name].num_bytes
        places.append(ByteRange(name, entries[name].dtype, begin, end))
    return ShardPlan(header(entries, [byte_range.name for byte_range in places]), places, layout)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a tensor, without a copy."""
    if not is_sharded_tensor(tensor):
        return tensor
    if not torch.is_grad_enabled():  # optimizers ask for hundreds in a step, and the context costs more than the question
        return tensor.to_local()
    with torch.no_grad():
        return tensor.to_local()


def write_shard(folder: Path, rank: int, world_size: int, tensors: dict[str, Tensor]) -> Facts:
    """Write this rank's rows of `tensors` as rank-RRRRR-of-WWWWW.safetensors and .json. Returns and raises as `write_planned`."""
    plan = plan_shard(tensors)
    return write_planned(folder, rank, world_size, plan, lambda: tensor_chunks(plan, tensors))


def write_planned(folder: Path, rank: int, world_size: int, plan: ShardPlan, chunks: Chunks) -> Facts:
    """Write both files of a rank, and compare the bytes on disk with the data. Return size and sha256 of each file, by name.

    Raises `BadShard` when a number is not finite, or when the bytes on disk differ from the data.
    """
    stem = f"rank-{rank:05d}-of-{world_size:05d}"
    data, layout = folder / f"{stem}.safetensors", folder / f"{stem}.json"
    text = dump_json(plan.layout).encode()
    facts = {data.name: write_synced(data, _checked(plan, chunks)), layout.name: write_synced(layout, iter([memoryview(text)]))}
    check_written(data, chain([memoryview(plan.header)], (chunk for _, chunk in chunks())))
    check_written(layout, iter([memoryview(text)]))
    return facts


def write_chunks(dtype: torch.dtype, data: memoryview) -> Iterator[tuple[torch.dtype, memoryview]]:
    """Split `data` into chunks of PIECE_BYTES for writing."""
    for begin in range(0, len(data), PIECE_BYTES):
        yield dtype, data[begin : begin + PIECE_BYTES]


def tensor_chunks(plan: ShardPlan, tensors: dict[str, Tensor]) -> Iterator[tuple[torch.dtype, memoryview]]:
    """Yield the chunks of a shard file from the tensors themselves; one tensor at a time is on the host."""
    for byte_range in plan.ranges:
        yield from write_chunks(byte_range.dtype, as_bytes(local(tensors[byte_range.name])))


def _checked(plan: ShardPlan, chunks: Chunks) -> Iterator[memoryview]:
    """Yield the header and the data. Raises `BadShard` instead of yielding the first chunk in which a number is not finite."""
    yield memoryview(plan.header)
    position = 0
    for dtype, chunk in chunks():
        if dtype in EXPONENTS:
            kind, exponent = EXPONENTS[dtype]
            bits = np.frombuffer(chunk, dtype=kind)
            wrong = (bits & kind(exponent)) == exponent
            if wrong.any():
                name = plan.name_at(position + int(wrong.argmax()) * bits.itemsize)
                raise BadShard(f"{name} holds numbers that are not finite")
        position += len(chunk)
        yield chunk


def checkpoint_tensors(folder: Path) -> Tensors:
    """Return every tensor of a checkpoint by its name in the files, joined from the pieces of all ranks.

    Raises `UnsoundCheckpoint` when rows are missing, or when the two files of a rank contradict each other.
    """
    pieces: dict[str, list[ShardPiece]] = {}
    for path in sorted(folder.glob("rank-*.json")):
        try:
            file = read_safetensors(path.with_suffix(".safetensors"))
        except ConfigError as error:
            raise UnsoundCheckpoint(str(error)) from error
        for name, (first, shape) in _read_layout(path).items():
            if name not in file or file[name].shape[1:] != shape[1:] or len(file[name].shape) != len(shape):
                raise UnsoundCheckpoint(f"{path}: {name} is of shape {list(shape)}, and its rows are not in the file beside it")
            pieces.setdefault(name, []).append(ShardPiece(first, file[name], shape))
    return {name: _joined(folder, name, parts) for name, parts in pieces.items()}


def _read_layout(path: Path) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Read the first row and the whole shape of each tensor that a rank wrote."""
    try:
        found = {name: (facts["first"], tuple(facts["shape"])) for name, facts in load_json(path).items()}
        if wrong := [name for name, (first, shape) in found.items() if not all(type(n) is int and n >= 0 for n in (first, *shape))]:
            raise ValueError(f"{wrong[0]!r} has no shape")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsoundCheckpoint(f"{path} is not what a rank writes: {type(error).__name__}: {error}") from error
    return found


def weight_tensors(folder: Path) -> Tensors:
    """Return the trained parameters of a checkpoint by full name."""
    return {n.removeprefix(WEIGHTS): rows for n, rows in checkpoint_tensors(folder).items() if n.startswith(WEIGHTS)}


def _joined(folder: Path, name: str, parts: list[ShardPiece]) -> LazyTensor:
    parts = sorted(parts, key=lambda piece: piece.first)
    shape, end = parts[0].shape, 0
    for piece in parts:
        if piece.first != end or piece.shape != shape:
            raise UnsoundCheckpoint(f"{folder}: the pieces of {name} do not fit together at row {end}")
        end += piece.rows.shape[0] if shape else 1
    if shape and end != shape[0]:
        raise UnsoundCheckpoint(f"{folder}: rows {end} to {shape[0]} of {name} are missing")

    def read(start: int, stop: int) -> Tensor:
        if not shape:
            return parts[0].rows.all()
        found = [
            piece.rows.read(max(start - piece.first, 0), min(stop - piece.first, piece.rows.shape[0]))
            for piece in parts
            if piece.first < stop and start < piece.first + piece.rows.shape[0]
        ]
        return torch.cat(found) if found else torch.empty(0, *shape[1:])

    return LazyTensor(shape, read)
