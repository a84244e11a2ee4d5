"""RUN/stacks/rank-NNNNN.txt: where every thread of a rank stood when a run was given up."""

from __future__ import annotations

import faulthandler
import os
import signal
import traceback
from pathlib import Path
from typing import TextIO

FOLDER = "stacks"


class Stacks:
    """This rank's file. On SIGUSR2 the interpreter writes to it even while the main thread is in C++ or holds everything up;
    data workers, which inherit it, do too.
    """

    def __init__(self, run_folder: Path, rank: int, num_ranks: int) -> None:
        """Stacks of earlier starts are removed."""
        self.folder = run_folder / FOLDER
        self._file: TextIO | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            old = {path_of(run_folder, other) for other in range(num_ranks)}
            for path in set(self.folder.glob("rank-*.txt")) - old if rank == 0 else ():
                path.unlink(missing_ok=True)
            self._file = path_of(run_folder, rank).open("w", buffering=1)
            os.set_inheritable(self._file.fileno(), False)
            faulthandler.register(signal.SIGUSR2, file=self._file, all_threads=True)
        except (OSError, ValueError):  # the run needs none of it; that its folder cannot be written is told elsewhere
            self._file = None

    def dump(self, error: BaseException | None = None) -> None:
        """Write down where all threads are; with `error`, where that came from first."""
        if self._file is None:
            return
        try:
            if error is not None:
                self._file.write("".join(traceback.format_exception(error)))
            faulthandler.dump_traceback(self._file, all_threads=True)
        except (OSError, ValueError):
            return

    def note(self, rank: int, text: str) -> None:
        """In the file of a rank that cannot write any more."""
        try:
            with path_of(self.folder.parent, rank).open("a") as out:
                out.write(text + "\n")
        except OSError:
            return

    def close(self) -> None:
        """Nothing is written from then on; a file in which nothing stands is removed, and the folder with the last one."""
        if self._file is None:
            return
        faulthandler.unregister(signal.SIGUSR2)
        name, file, self._file = self._file.name, self._file, None
        file.close()
        try:
            if not os.path.getsize(name):
                os.unlink(name)
                self.folder.rmdir()
        except OSError:
            return


def path_of(run_folder: Path, rank: int) -> Path:
    return run_folder / FOLDER / f"rank-{rank:05d}.txt"
