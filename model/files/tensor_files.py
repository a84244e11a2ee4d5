"""Weight files: safetensors read by rows and written as a stream; pickled .bin files of other projects through one reader."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.errors import ConfigError
from model.files.untrusted import open_regular

log = logging.getLogger(__name__)
STORED_TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
}
"""Number types that a safetensors file may contain, by the format's names."""
SHARD_BYTES = 5 * 10**9
"""Weights of more bytes are written as several files."""
POINTER = b"version https://git-lfs"
CODES = {dtype: code for code, dtype in STORED_TYPES.items()}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read on demand, whole or by rows of dim 0. The result of `read` may be a view of a mapped file."""

    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]
    dtype: torch.dtype | None = None  # of the numbers in the file; None for a computed tensor

    def all(self) -> Tensor:
        return self.read(0, self.shape[0] if self.shape else 1)


Tensors = dict[str, LazyTensor]


def read_weights(path: Path) -> Tensors:
    """Return every tensor of a .safetensors or .bin file, by name. Only names and shapes are read (.bin: the file is mapped).

    Raises `ConfigError` when the file is damaged or is something else.
    """
    return read_bin(path) if path.suffix in (".bin", ".pt", ".pth") else read_safetensors(path)


def read_safetensors(path: Path) -> Tensors:
    """Return every tensor of a safetensors file, by name, unread.

    The safetensors library limits the header to 100 MB, and checks that its offsets fit the file, the shapes and each other. Raises
    `ConfigError` when the file is damaged or holds an unsupported number type.
    """
    try:
        with open_regular(path):
            file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        if is_pointer(path):
            raise ConfigError(f"{path} is a Git LFS pointer, not the file itself: run 'git lfs pull' in its folder") from error
        raise ConfigError(f"{path} is cut short or is no safetensors file ({error}): restore it, or download it again") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    if unknown := [f"{name!r} ({part.get_dtype()})" for name, part in slices.items() if part.get_dtype() not in STORED_TYPES]:
        raise ConfigError(
            f"{path} holds numbers of a type that is not read: {', '.join(unknown[:3])}; known: {', '.join(STORED_TYPES)}"
        )

    def rows(name: str, part: Any) -> LazyTensor:
        shape = tuple(part.get_shape())
        return LazyTensor(shape, lambda a, b: part[a:b] if shape else file.get_tensor(name), STORED_TYPES[part.get_dtype()])

    return {name: rows(name, part) for name, part in slices.items()}


def is_pointer(path: Path) -> bool:
    """Tell whether a file is what `git clone` leaves of a large one where Git LFS is not installed."""
    try:
        with open_regular(path) as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


def read_bin(path: Path) -> Tensors:
    """Read pickled weights of other projects. No other code here reads a pickle, and only tensors are built."""
    log.warning("reading %s: a pickle, with weights_only=True; safetensors is the safer format", path)
    try:
        # Files from before PyTorch 1.6 are not zip archives, and only zip archives can be mapped.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_plain_zip(path))
    except MemoryError as error:
        raise ConfigError(
            f"{path} asks for more memory than there is: it is damaged, or too large; convert it to safetensors"
        ) from error
    except Exception as error:  # damaged bytes can raise any exception in the reader
        if is_pointer(path):
            raise ConfigError(f"{path} is a Git LFS pointer, not the file itself: run 'git lfs pull' in its folder") from error
        # The first sentence alone: torch goes on with the advice to read the file unsafely.
        reason = str(error).strip().splitlines()[0].split(". ")[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{path} is cut short, or holds more than tensors ({reason}): download it again, or convert it to safetensors"
        ) from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds a {type(loaded).__name__}, not tensors by name: save its state_dict instead")
    if other := [f"{name!r} ({type(value).__name__})" for name, value in loaded.items() if not _is_plain(name, value)]:
        raise ConfigError(f"{path} holds more than tensors: {', '.join(other[:3])}: save the dictionary of tensors alone")
    return {name: in_memory(t) for name, t in loaded.items()}


def _is_plain_zip(path: Path) -> bool:
    """Tell whether a file is a zip archive. Raises `ValueError` for one that is larger unpacked than packed: torch never
    compresses, and such a file could unpack to any size.
    """
    with open_regular(path) as file:
        if not zipfile.is_zipfile(file):
            return False
        with zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                raise ValueError("its members are compressed")
    return True


def _is_plain(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def in_memory(tensor: Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), lambda a, b: tensor[a:b] if tensor.dim() else tensor, tensor.dtype)


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its type and shape are known now, its values are computed when the writer reaches it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    value: Callable[[], Tensor | None]  # returns None on ranks that only take part in the collective

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def split_by_size(entries: dict[str, Entry], max_bytes: int) -> list[dict[str, Entry]]:
    """Split the entries, in order, into files of at most `max_bytes`; a larger tensor gets a file of its own."""
    groups: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if groups[-1] and size + entry.num_bytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = entry
        size += entry.num_bytes
    return groups


def write_safetensors(out: BinaryIO | None, entries: dict[str, Entry]) -> dict[str, str]:
    """Write the same bytes as `safetensors.torch.save_file`, with one tensor in memory at a time. Return the sha256 of each tensor.

    With `out` None (ranks other than 0) no byte is written, but every `value` is called, in the same order on every rank.
    Collective where `value` is.
    """
    names = file_order(entries)
    if out is not None:
        out.write(header(entries, names))
    digests = {}
    for name in names:
        tensor = entries[name].value()
        if out is None:
            continue
        if tensor is None or tuple(tensor.shape) != entries[name].shape:
            raise ValueError(f"{name}: expected shape {entries[name].shape}, got {None if tensor is None else tuple(tensor.shape)}")
        data = as_bytes(tensor.to(entries[name].dtype))
        digests[name] = hashlib.sha256(data).hexdigest()
        out.write(data)
    return digests


def file_order(entries: dict[str, Entry]) -> list[str]:
    """Order names as the safetensors library's own writer does, so that every number is aligned to its size."""
    return sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))


def header(entries: dict[str, Entry], names: Iterable[str]) -> bytes:
    # One metadata entry only: the library's own writer orders several of them differently in every process.
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, entry = end, entries[name]
        end += entry.num_bytes
        table[name] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def as_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensor_digests(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the sha256 of the stored bytes of every tensor in a safetensors file."""
    for name, rows in read_safetensors(path).items():
        yield name, hashlib.sha256(as_bytes(rows.all())).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled_digest(paths: Iterable[Path]) -> str:
    """Compute a fingerprint of large files from their sizes and 64 blocks of 64 KiB spread evenly over each.

    The fingerprint detects a different file, not a single flipped bit.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            for k in range(64):
                file.seek(size * k // 64)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()


def dump_json(value: object) -> str:
    """Return JSON text with stable bytes: sorted keys, two spaces, a final newline."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    # A lone surrogate, as in a file name that is not UTF-8, can only be written as an escape; in JSON both forms are equal.
    return text.encode("utf-8", "backslashreplace").decode()
