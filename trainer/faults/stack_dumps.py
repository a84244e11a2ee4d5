"""Stack dumps in RUN/stacks/rank-NNNNN.txt: where every thread of a rank was when the run ended."""

from __future__ import annotations

import faulthandler
import os
import signal
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TextIO

FOLDER = "stacks"


class Stacks:
    """Stack file of this rank. On SIGUSR2 the interpreter writes to it, even while the main thread is in C++ or holds the GIL.

    Data workers inherit the handler and write to it as well.
    """

    def __init__(self, run_folder: Path, rank: int, num_ranks: int) -> None:
        """Open this rank's file and register SIGUSR2. Stacks of earlier starts are removed."""
        self.folder = run_folder / FOLDER
        self._file: TextIO | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            old = {stack_file(run_folder, other) for other in range(num_ranks)}
            for path in set(self.folder.glob("rank-*.txt")) - old if rank == 0 else ():
                path.unlink(missing_ok=True)
            self._file = stack_file(run_folder, rank).open("w", buffering=1)
            os.set_inheritable(self._file.fileno(), False)
            faulthandler.register(signal.SIGUSR2, file=self._file, all_threads=True)
        except (OSError, ValueError):  # a run works without stacks; that its folder cannot be written is reported elsewhere
            self._file = None

    def dump(self, error: BaseException | None = None) -> None:
        """Write the stacks of all threads; before them, with `error`, its traceback."""
        if self._file is None:
            return
        with suppress(OSError, ValueError):
            if error is not None:
                self._file.write("".join(traceback.format_exception(error)))
            faulthandler.dump_traceback(self._file, all_threads=True)

    def note(self, rank: int, text: str) -> None:
        """Append a text to the file of a rank that cannot write any more."""
        with suppress(OSError), stack_file(self.folder.parent, rank).open("a") as out:
            out.write(text + "\n")

    def close(self) -> None:
        """Close the file. An empty file is removed, and the folder with its last file."""
        if self._file is None:
            return
        faulthandler.unregister(signal.SIGUSR2)
        name, file, self._file = self._file.name, self._file, None
        file.close()
        with suppress(OSError):
            if not os.path.getsize(name):
                os.unlink(name)
                self.folder.rmdir()


def stack_file(run_folder: Path, rank: int) -> Path:
    return run_folder / FOLDER / f"rank-{rank:05d}.txt"
