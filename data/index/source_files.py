"""The files of a source, readable at any place by any process without being held in memory."""

from __future__ import annotations

import os
from collections import OrderedDict

MAX_OPEN = 32  # a source may be thousands of files, a process may open about a thousand


class Shards:
    """Files by number. Forked copies share open descriptors, pickled ones reopen the files; file positions are never shared."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self.names = _names(paths)
        self._open: OrderedDict[int, int] = OrderedDict()

    def __reduce__(self) -> tuple[type[Shards], tuple[list[str]]]:
        return Shards, (self.paths,)

    def read(self, file: int, start: int, stop: int) -> bytes:
        """Return bytes [start, stop) of a file; fewer if it has become shorter. Raises `OSError`."""
        return os.pread(self._descriptor(file), stop - start, start)

    def _descriptor(self, file: int) -> int:
        if file not in self._open:
            self._open[file] = os.open(self.paths[file], os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) > MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(file)
        return self._open[file]

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def _names(paths: list[str]) -> list[str]:
    """Return the file names, with as much of their folders as distinguishes them."""
    names = [os.path.basename(path) for path in paths]
    if len(set(names)) == len(names):
        return names
    folder = os.path.commonpath(paths)
    return [os.path.relpath(path, folder) for path in paths]
