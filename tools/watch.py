"""Show runs on a page in a browser of this machine: progress, curves, faults, records, settings; live while they go.

Several runs are drawn over one another. --html writes the page once, as one file that needs no server and no network.
Nothing is written. Run folders are read, and the data of a run when somebody asks for the samples of a step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.cli import check_named, command_parser, run_command, write_named
from tools.local_page import serve_page
from tools.watcher.page_html import run_page, values_text
from tools.watcher.run_view import RunView
from tools.watcher.serve import PageServer, Watched


def watch(options: argparse.Namespace) -> None:
    """Write the page, or serve it until Ctrl-C. Raises `ConfigError` for what is no run, or a file or port that cannot be had."""
    runs = [RunView(folder) for folder in options.runs]
    title = ", ".join(run.folder.resolve().name for run in runs)
    for run in runs:
        run.has_changed()
    if options.html:
        check_named("--html", options.html)
        write_html(options.html, run_page(values_text(runs, live=False), title, live=False))
        return
    serve_page(lambda port: PageServer(Watched(runs, title), port), options.port, f"shows {title}")


def write_html(file: Path, text: str) -> None:
    """Write the page as one file. Raises `ConfigError` where that is impossible."""
    write_named("--html", file, text)
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB: open it in a browser")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("watch", __doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="the output_dir of a run; it may still be going")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page once, in place of serving it")
    parser.add_argument("--port", type=int, default=0, help="port of the page (default: a free one)")
    options = parser.parse_args(argv)
    return run_command("watch", lambda: watch(options))


if __name__ == "__main__":
    raise SystemExit(main())
