"""A server for one page, on the loopback of this machine alone: it knows four questions and opens no file that it is asked for."""

from __future__ import annotations

import json
import threading

from tools.inspector.document import policy_rules
from tools.inspector.page_html import PICTURES, SCRIPT, STYLE
from tools.local_page import LocalHandler, LocalServer
from tools.watcher.page_html import policy, run_page, values_text
from tools.watcher.run_view import RunView
from tools.watcher.step_page import StepPages


class Watched:
    """The runs of a page, and their values as of the last look."""

    def __init__(self, runs: list[RunView], title: str) -> None:
        self.runs, self.title, self.version, self.text = runs, title, 0, ""
        self._looking = threading.Lock()

    def look(self) -> tuple[int, str]:
        """Return the values and their version, which rises when something has changed."""
        with self._looking:
            changed = [run.has_changed() for run in self.runs]  # of every run: each reads on
            if any(changed) or not self.text:
                self.version, self.text = self.version + 1, values_text(self.runs, live=True)
            return self.version, self.text


class PageServer(LocalServer):
    """The server of the page; `port` 0 takes a free one."""

    def __init__(self, watched: Watched, port: int = 0) -> None:
        super().__init__(Handler, port)
        self.watched, self.pages = watched, StepPages()


class Handler(LocalHandler):
    """Answers of the server."""

    server: PageServer
    policy = policy(live=True)

    def do_GET(self) -> None:
        """Answer with the page, the values if they are new, or the samples of a step."""
        if not self.is_for_us():
            return
        path, _, query = self.path.partition("?")
        asked = {key: value for key, _, value in (pair.partition("=") for pair in query.split("&"))}
        if path == "/":
            version, values = self.server.watched.look()
            self.answer(200, "text/html", run_page(f'{{"version":{version},{values[1:]}', self.server.watched.title, live=True))
        elif path == "/values":
            version, values = self.server.watched.look()
            same = asked.get("version") == str(version)
            self.answer(200, "application/json", "{}" if same else f'{{"version":{version},{values[1:]}')
        elif path == "/step":
            run, step = self._step(asked)
            self.answer(200, "application/json", json.dumps(run.samples_of(step) if run else []))
        elif path == "/inspect":
            run, step = self._step(asked)
            kind, text = self.server.pages.page(run, step) if run else ("text/plain", "there is no such step\n")
            self.answer(200, kind, text, policy_rules(STYLE, SCRIPT, PICTURES))
        else:
            self.answer(404, "text/plain", "there is nothing here\n")

    def _step(self, asked: dict[str, str]) -> tuple[RunView | None, int]:
        """Return a run and a step of it, both asked for by number; None without such a run."""
        run, step = asked.get("run", ""), asked.get("step", "")
        runs = self.server.watched.runs
        if not (run.isascii() and run.isdigit() and step.isascii() and step.isdigit() and len(run + step) < 20):
            return None, 0
        return (runs[int(run)] if int(run) < len(runs) else None), int(step)
