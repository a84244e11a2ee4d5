"""The run page: curves that keep their extremes, a server that tells nothing else, and a document that a real browser draws."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.pages.browser import CHROMIUM, browser
from tools.watch import main
from tools.watcher.curves import MetricsTail, thinned
from tools.watcher.page_html import LEAST_POINTS, run_page, values_text
from tools.watcher.run_view import RunView, answers_over_time
from tools.watcher.serve import PageServer, Watched

EVIL = "</script><script>document.title='owned'</script><b>&"


def make_run(folder: Path, steps: int = 30, more: int = 0) -> Path:
    """A run folder as the trainer leaves it: a stage of 30 steps with two sources, faults, records left out and samples."""
    folder.mkdir()
    lines = []
    for step in range(1, steps + 1):
        row: dict[str, Any] = {"step": step, "train/loss": 4.0 / step, "train/a/loss": 4.0 / step, "train/b/loss": 5.0 / step}
        row |= {"train/grad_norm": 1.0, "train/grad_norm/llm": 0.9, "train/lr/llm": 1e-4, "perf/tokens_per_second": 900.0 + step}
        row |= {f"train/extra{k}": 0.123456789 * step + k for k in range(more)}
        lines.append(json.dumps(row))
        lines += [json.dumps({"step": step, "val/loss": 4.5 / step})] * (step % 10 == 0)
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 31, "tra']))
    (folder / "run.toml").write_text('output_dir = "x"\n[optim]\nlr = 0.0001\n')
    start = {"at": 1.0, "step": 0, "last_step": 40, "plan": "the plan", "machine": {"device": "1 x H200", "cores": 8}, "parts": []}
    (folder / "start.json").write_text(json.dumps(start))
    (folder / "faults.jsonl").write_text(
        json.dumps({"kind": "spike", "step": 7, "loss": 9.0, "usual": 1.0, "samples": [1] * 99, "records": [EVIL]}) + "\n"
    )
    rows = [
        {
            "split": "train",
            "source": "a",
            "step": i,
            "reason": f"image: 'p/{i}.png' is no picture",
            "where": f"a.json:{i}",
            "id": "r",
        }
        for i in range(5)
    ]
    (folder / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"source": "a", "size": 10, "samples": 40, "trained": 9}, {"source": "b", "size": 20, "samples": 50, "trained": 20}]
    (folder / "ledger.json").write_text(json.dumps({"step": steps, "sources": sources}))
    (folder / "samples.json").write_text(json.dumps({"global_batch_size": 3, "dtype": "<i4"}))
    np.array([[step % 30, 12, -1] for step in range(steps)], dtype="<i4").tofile(folder / "samples.bin")
    return folder


def view_of(folder: Path) -> RunView:
    run = RunView(folder)
    run.has_changed()
    return run


def test_a_thinned_curve_keeps_its_extremes_and_its_mean() -> None:
    rng = np.random.default_rng(0)
    steps, values = np.arange(1, 10_001) * 10, rng.standard_normal(10_000)
    values[[7, 1234, 9999]] = 50.0, -60.0, np.nan
    found = thinned(steps, values, 100)
    assert len(found["s"]) == len(found["m"]) == 100 and found["s"][-1] == 99_990 and sorted(found["s"]) == found["s"]
    assert max(found["hi"]) == 50 and min(found["lo"]) == -60
    assert np.mean(found["m"]) == pytest.approx(np.nanmean(values), abs=1e-3)
    bounds = np.searchsorted(steps, [0, *found["s"]], side="right")
    for k in range(100):
        part = values[bounds[k] : bounds[k + 1]]
        part = part[np.isfinite(part)]
        assert (found["lo"][k], found["m"][k], found["hi"][k]) == pytest.approx((part.min(), part.mean(), part.max()), rel=1e-5)
    assert thinned(steps[:3], values[:3], 100) == {"s": [10, 20, 30], "m": pytest.approx(values[:3].tolist(), rel=1e-5)}


def test_the_log_is_read_as_it_grows_and_anew_when_a_start_has_cut_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert not tail.read()
    path.write_text('{"step": 1, "a": 1.0, "stage": "x"}\nno json\n[1]\n{"step": 2, "a": null}\n{"step": 3, "a"')
    assert tail.read() and tail.curves(9)["a"] == {"s": [1], "m": [1]} and tail.last_step == 2
    with path.open("a") as out:
        out.write(': 3.5, "stage": "y"}\n')
    assert tail.read() and tail.curves(9)["a"] == {"s": [1, 3], "m": [1, 3.5]} and tail.stages == [(1, "x"), (3, "y")]
    assert not tail.read()
    path.write_text('{"step": 1, "a": 8.0}\n')
    assert tail.read() and tail.curves(9)["a"] == {"s": [1], "m": [8]} and tail.stages == []


def test_what_the_page_tells_is_what_the_folder_holds(tmp_path: Path) -> None:
    found = view_of(make_run(tmp_path / "run")).values(100, with_samples=True)
    assert found["progress"]["done"] == 30 and found["progress"]["last"] == 40 and found["progress"]["left"] >= 0
    assert found["curves"]["val/loss"] == {"s": [10, 20, 30], "m": [0.45, 0.225, 0.15]}
    assert found["settings"] == {"output_dir": "x", "optim.lr": "0.0001"}
    assert found["quarantine"]["count"] == 5 and [row["count"] for row in found["quarantine"]["rows"]] == [5]
    assert found["faults"]["rows"] == [{"kind": "spike", "step": 7, "loss": 9.0, "usual": 1.0, "records": [EVIL]}]
    # Step 7 was brought by row 6 of samples.bin; 12 is the third record of the second source.
    assert found["samples"]["7"] == [{"id": 6, "source": "a", "row": 6}, {"id": 12, "source": "b", "row": 2}]
    assert found["ledger"][1]["source"] == "b"


def test_answers_of_a_record_stand_beside_each_other_over_validations() -> None:
    rows = [
        {"step": step, "sample": i, "id": f"r{i}", "source": "a", "prompt": "What?", "expected": "cat", "answer": f"{step}-{i}"}
        for step in range(1, 9)
        for i in range(50)
        if (step, i) != (8, 0)
    ]
    found = answers_over_time(rows)
    assert found["steps"] == [3, 4, 5, 6, 7, 8] and len(found["rows"]) == 40
    assert found["rows"][0]["answers"] == ["3-0", "4-0", "5-0", "6-0", "7-0", None]
    assert found["rows"][39] == {**found["rows"][39], "id": "r39", "expected": "cat"}


def test_the_page_is_one_safe_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert main([str(make_run(tmp_path / EVIL.replace("/", "-"))), str(make_run(tmp_path / "two")), "--html", str(out)]) == 0
    text = out.read_text()
    assert len(re.findall("<script", text)) == 2 and "<b>" not in text and f"{out}: 0." in capsys.readouterr().out
    assert set(re.findall(r"https?://[^\"' ]*", text)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text and "connect-src 'none'" in text
    inside = text.split("<script id=values type=application/json>")[1].split("</script>")[0]
    assert [run["name"] for run in json.loads(inside)["runs"]] == [EVIL.replace("/", "-"), "two"]


def test_very_many_curves_get_fewer_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.watcher.page_html.MOST_BYTES", 200_000)
    text = values_text([view_of(make_run(tmp_path / "run", 700, 40))], live=False)
    curves = json.loads(text)["runs"][0]["curves"]
    assert LEAST_POINTS <= len(curves["train/loss"]["s"]) < 300 and len(text) < 250_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "watch: nowhere: no such folder; name the output_dir of a run"),
        (["empty"], "watch: empty holds neither metrics.jsonl nor run.toml"),
        (["run", "--html", "nowhere/page.html"], "watch: --html 'nowhere/page.html' cannot be written: No such file"),
        (["run", "--port", "70000"], "watch: --port 70000: is not from 0 to 65535; leave it out"),
    ],
)
def test_what_is_no_run_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "run")
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@contextmanager
def served(run: Path) -> Iterator[PageServer]:
    with PageServer(Watched([view_of(run)], "run")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(server: PageServer, path: str, host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_server_answers_three_questions_of_its_own_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with served(run) as server:
        assert server.server_address[0] == "127.0.0.1"
        port = server.server_address[1]
        code, text = ask(server, "/")
        assert code == 200 and "connect-src 'self'" in text and text.count("<script") == 2
        assert ask(server, "/", f"localhost:{port}")[0] == 200
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"[::1]:{port}"):
            assert ask(server, "/values", host)[0] == 403
        for path in ("/run.toml", "/../run.toml", "//etc/passwd", "/values/../run.toml", "/%2e%2e/run.toml", "/metrics.jsonl"):
            assert ask(server, path)[0] == 404
        first = json.loads(ask(server, "/values")[1])
        assert first["runs"][0]["progress"]["done"] == 30 and first["runs"][0]["samples"] == {}
        assert json.loads(ask(server, f"/values?version={first['version']}")[1]) == {}
        with (run / "metrics.jsonl").open("a") as out:
            out.write('in/loss": 1.0}\n{"step": 32, "train/loss": 0.5}\n')
        later = json.loads(ask(server, f"/values?version={first['version']}")[1])
        assert later["runs"][0]["progress"]["done"] == 32 and later["version"] > first["version"]
        assert json.loads(ask(server, "/step?run=0&step=7")[1])[1] == {"id": 12, "source": "b", "row": 2}
        for query in (
            "",
            "?run=1&step=7",
            "?run=0&step=999",
            "?run=0&step=-1",
            "?run=x&step=y",
            "?run=0&step=%C2%B2",
            f"?step={'9' * 5000}",
        ):
            assert json.loads(ask(server, f"/step{query}")[1]) == []


def test_a_link_that_leads_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "secret.json").write_text('{"reason": "secret"}')
    (run / "exit.json").symlink_to(tmp_path / "secret.json")
    assert "secret" not in run_page(values_text([view_of(run)], live=False), "run", live=False)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_real_browser_draws_the_page(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert main([str(make_run(tmp_path / "run")), str(make_run(tmp_path / "two", 10)), "--html", str(out)]) == 0
    with browser(tmp_path) as page:
        page.open(out.as_uri())
        assert page.run("document.title") == "run, two"
        titles = page.run("[...document.querySelectorAll('.sheet.chart h2')].map((title) => title.textContent)")
        assert titles == ["Loss", "Loss per source", "Learning rate", "Gradient norm", "Tokens per second"]
        assert page.run("document.querySelectorAll('path.curve').length") > 2 * 7
        said = page.run("document.body.innerText")
        assert "Settings that differ: 0" in said and EVIL in said, "what a run wrote is text"
        for width in (360, 1400):
            page.resize(width, 900)
            assert page.run("document.documentElement.scrollWidth <= innerWidth"), width


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_page_that_is_open_follows_the_run_and_tells_what_a_step_held(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with served(run) as server, browser(tmp_path) as page:
        page.open(server.address)
        assert "30 of 40" in page.run("find('head').innerText")
        with (run / "metrics.jsonl").open("a") as out:
            out.write('in/loss": 1.0}\n{"step": 32, "train/loss": 0.5}\n')
        page.wait("find('head').innerText.includes('32 of 40')")
        asked = "document.querySelector('#facts input[type=number]')"
        page.run(f"{asked}.value = 7; {asked}.dispatchEvent(new Event('change')); 0")
        page.wait("find('facts').innerText.includes('samples brought the run to step 7')")
        with (run / "metrics.jsonl").open("a") as out:
            out.write('{"step": 33, "train/loss": 0.5}\n')
        page.wait("find('head').innerText.includes('33 of 40')")
        page.wait("find('facts').innerText.includes('samples brought the run to step 7')")
        titles = "[...document.querySelectorAll('#facts .ids span')].map((one) => one.title)"
        assert page.run(titles) == [
            f"sample {sample}"
            for sample in page.run("fetch('/step?run=0&step=7').then((a) => a.json()).then((rows) => rows.map((row) => row.id))")
        ]
        page.open(f"{server.address}inspect?run=0&step=7")
        assert "model is required" in page.run("document.body.innerText"), "a run whose data cannot be opened says why"
