"""Tools say what an independent path says, and fail in one line that names the place."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

from data import load_processor
from data.processor import Processor
from model import MultimodalLM, load_model
from model.batch import IGNORE_INDEX, Batch
from tests.support.runs import save_parts, save_records, tables
from tools import chat, cli, evaluate, inspect_data, plot_run
from tools.cli import printable_lines
from trainer.main import run
from trainer.runfile.load import parse_config
from trainer.runfile.toml_files import to_toml

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records, parts, run.toml and run/final: a model that nothing has trained, whose words are as good as any."""
    folder = tmp_path_factory.mktemp("tools")
    save_parts(folder, "qwen2")  # with a tied head it would only repeat itself
    save_records(folder)
    described = tables(folder, train={"max_steps": 0})
    (folder / "run.toml").write_text(to_toml(described))
    assert run(parse_config(described, "test")) == 0
    return folder


@pytest.fixture(scope="module")
def net(folder: Path) -> MultimodalLM:
    return load_model(folder / "run" / "final")


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    return load_processor(folder / "run" / "final")


def test_a_wheel_holds_every_file_that_is_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run files of the demos and of the recipes, style and script of the inspector's page, marks of typed packages."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    folders = {package: ROOT / given["package_dir"].get(package, package.replace(".", "/")) for package in given["packages"]}
    packed = {path for package, names in given["package_data"].items() for name in names for path in folders[package].glob(name)}
    found = {
        path for name in ("model", "data", "trainer", "tools", "recipes") for path in (ROOT / name).rglob("*") if path.is_file()
    }
    assert packed == {path for path in found if path.suffix not in (".py", ".pyc")} and len(packed) > 12


def logits_of(net: MultimodalLM, embeds: Tensor) -> Tensor:
    llm: Any = net.llm
    return llm(inputs_embeds=embeds, use_cache=False).logits[0]


@torch.no_grad()
def greedy(net: MultimodalLM, processor: Processor, record: dict[str, Any], root: Path) -> str:
    """The answer to one record by itself: whole forward passes, no cache, no padding."""
    batch: Batch = processor([record], media_root=str(root))
    embeds, ids = net.embed(batch), []
    table: Any = net.llm.get_input_embeddings()  # type: ignore[operator]
    while len(ids) < NEW_TOKENS and not (ids and ids[-1] in processor.stop_ids):
        ids.append(int(logits_of(net, embeds)[-1].argmax()))
        embeds = torch.cat([embeds, table(torch.tensor([[ids[-1]]]))], 1)
    text = processor.tokenizer.decode([i for i in ids if i not in processor.stop_ids], skip_special_tokens=True)
    return text.strip()


@torch.no_grad()
def loss_of(net: MultimodalLM, processor: Processor, record: dict[str, Any], root: Path) -> tuple[float, int]:
    batch = processor([record], answers=True, media_root=str(root))
    losses = cross_entropy(logits_of(net, net.embed(batch)), batch.labels[0], ignore_index=IGNORE_INDEX, reduction="sum")
    return float(losses), int((batch.labels != IGNORE_INDEX).sum())


@pytest.fixture(scope="module")
def answered(folder: Path, net: MultimodalLM, processor: Processor) -> Iterator[list[dict[str, Any]]]:
    """Held-out records: two in three answer what the model will say, with white space around; the rest something else."""
    records = json.loads((folder / "train.json").read_text())
    for i, record in enumerate(records):
        said = greedy(net, processor, record, folder / "images")
        record["conversations"][-1]["value"] = f" {said}\n" if i % 3 and said else "something else"
    (folder / "test.json").write_text(json.dumps(records, indent=1))
    yield records


def test_evaluate_equals_one_record_at_a_time(
    folder: Path, net: MultimodalLM, processor: Processor, answered: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = folder / "predictions.jsonl"
    options = ["--data", str(folder / "test.json"), "--media-root", str(folder / "images"), "--max-new-tokens", str(NEW_TOKENS)]
    assert evaluate.main([str(folder / "run/final"), *options, "--batch-size", "4", "--predictions", str(predictions)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    texts = {record["id"]: greedy(net, processor, record, folder / "images") for record in answered}
    right = [texts[record["id"]] == record["conversations"][-1]["value"].strip() for record in answered]
    sums = [loss_of(net, processor, record, folder / "images") for record in answered]
    assert set(result) == {"samples", "exact_match", "loss"} and result["samples"] == len(answered)
    assert 0.2 < sum(right) / len(right) < 0.8, "the records must hold right and wrong answers"
    assert result["exact_match"] == sum(right) / len(right)
    assert math.isclose(result["loss"], sum(s for s, _ in sums) / sum(n for _, n in sums), rel_tol=1e-5)
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert {line["id"]: line["generated"] for line in lines} == texts and len(set(texts.values())) > 5


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What stands on stderr, which must be one line of ours and no traceback; bars of tqdm are left aside."""
    lines = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if line and "sample" not in line]
    assert len(lines) == 1, lines
    return lines[0]


def evaluated(folder: Path, records: list[dict[str, Any]], tmp_path: Path) -> int:
    (tmp_path / "bad.json").write_text(json.dumps(records, indent=1))
    return evaluate.main([str(folder / "run/final"), "--data", str(tmp_path / "bad.json"), "--media-root", str(folder / "images")])


def test_evaluate_names_a_bad_record(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, other = json.loads((folder / "train.json").read_text())[:3]
    lines = json.dumps([good, bad], indent=1).splitlines()
    place = f"bad.json:{[i for i, line in enumerate(lines, 1) if line == ' {'][1]} r1"
    assert evaluated(folder, [good, {**bad, "image": "none.png"}, other], tmp_path) == 65
    assert re.match(rf"evaluate: {place}: image: .*none\.png' does not exist", one_line(capsys))
    assert evaluated(folder, [good, {**bad, "conversations": bad["conversations"][:1]}], tmp_path) == 65
    assert one_line(capsys).startswith(f"evaluate: {place}: conversations: the last turn is the user's")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["--batch-size", "0"], "--batch-size 0 is not positive"),
        (["--device", "cuda:99"], "this machine has"),
        (["--device", "nowhere"], "'nowhere' is no device"),
        (["--base", "llm"], "--base 'llm' is not PART=PATH"),
        (["--data", "none.json"], "'none.json' is no file"),
    ],
)
def test_evaluate_refuses_wrong_options(folder: Path, changes: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(folder / "run/final"), "--data", str(folder / "train.json"), "--media-root", str(folder / "images")]
    assert evaluate.main([*given, *changes]) == 2
    assert reason in one_line(capsys)


def test_a_folder_that_is_no_run_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main([str(tmp_path), "Hi"]) == 2
    told = one_line(capsys)
    assert told.startswith(f"chat: {tmp_path}") and told.endswith("name a final/ or checkpoint folder of a run")
    for command, words in ((chat, ["Hi"]), (evaluate, ["--data", str(folder / "train.json")])):
        assert command.main([str(folder / "run"), *words]) == 2
        assert one_line(capsys).endswith(f"did you mean {folder / 'run' / 'final'}?")


def test_chat_names_a_medium_and_no_record_that_nobody_wrote(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main([str(folder / "run/final"), "--image", "none.png", "What is it?"]) == 65
    told = one_line(capsys)
    assert told.startswith("chat: image: ") and "none.png" in told and "records:0" not in told


def test_chat_answers_one_question(
    folder: Path, net: MultimodalLM, processor: Processor, capsys: pytest.CaptureFixture[str]
) -> None:
    def expected(question: str) -> str:
        record = {"image": "1_0.png", "conversations": [{"from": "human", "value": question}]}
        return greedy(net, processor, record, folder / "images")

    question = next(text for text in ("What is it?", "Who?", "one two", "a red cat", "Is it?") if expected(text))
    given = [str(folder / "run/final"), "--image", str(folder / "images/1_0.png"), "--max-new-tokens", str(NEW_TOKENS)]
    assert chat.main([*given, question]) == 0
    assert capsys.readouterr().out == printable_lines(expected(question)) + "\n"
    assert chat.main([*given, "--top-p", "0.5", question]) == 2
    assert "--top-p and --seed have no effect at --temperature 0" in one_line(capsys)


def test_inspect_shows_what_is_learned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_data.main(["--cfg", str(folder / "run.toml"), "--num", "3", "data.max_length=120"]) == 0
    out = capsys.readouterr().out
    assert "certificate: train: 8 rows certified" in out
    shown = dict(re.findall(r"^train\.json:\d+ (r\d+): (.*?\n(?:.*\n)*?)(?=\n)", out, re.MULTILINE))
    assert set(shown) == {"r0", "r1", "r2"}
    for i, text in enumerate(shown.values()):
        assert re.findall(r"\{\+(.*?)\+\}", text, re.DOTALL) == [f"{i} cats on a mat<|im_end|>"]
        assert re.findall(r"\[image 4 tokens: (.*?)\]", text) == [f"{i}_{k}.png" for k in range(i)]
        head = re.match(r"(\d+) tokens, (\d+) supervised", text)
        assert head is not None and (f", {4 * i} of image" in text) == (i > 0)
    assert "<|im_start|>user\n[image 4 tokens: 2_0.png]\n[image 4 tokens: 2_1.png]\nWhat is this? red red " in shown["r2"]


def test_inspect_says_why_a_record_is_left_out_and_a_source_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads((folder / "train.json").read_text())[:3]
    records[1]["image"] = "gone\x1b.png"
    (tmp_path / "part.json").write_text(json.dumps(records))
    source = [f"data.sources.0.path={tmp_path / 'part.json'}", f"output_dir={tmp_path / 'run'}"]
    given = ["--cfg", str(folder / "run.toml"), "data.max_length=50", *source]
    assert inspect_data.main(given) == 0
    out = capsys.readouterr().out
    assert "part.json:1 r1: bad, not trained on: image: " in out and "gone\\x1b.png' does not exist" in out
    assert "part.json:1 r2: too long, not trained on: conversations: the first round takes " in out
    (tmp_path / "part.json").write_text(json.dumps([{"id": "x", "conversations": []}]))
    assert inspect_data.main(given) == 65
    printed = capsys.readouterr()
    assert "certificate: REFUSED: data.sources 'part': none of 1 rows can be encoded" in printed.out
    assert printed.err == "inspect_data: the run would refuse part: see the certificates above\n"


def test_supervised_tokens_are_green_on_a_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert inspect_data.main(["--cfg", str(folder / "run.toml"), "--num", "1"]) == 0
    assert "\x1b[32m0 cats on a mat<|im_end|>\x1b[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert inspect_data.main(["--cfg", str(folder / "run.toml"), "--num", "1"]) == 0
    assert "\x1b" not in capsys.readouterr().out


METRICS = [
    {"step": 1, "train/loss": 3.0, "train/a/loss": 2.0, "train/b/loss": 4.0, "train/lr/llm": 1e-4, "train/lr/vision": 1e-4},
    {"step": 2, "train/loss": None, "train/a/loss": 1.5, "train/lr/llm": 5e-5, "train/lr/vision": 5e-5, "train/grad_norm": 1.0},
    {"step": 2, "val/loss": 2.5, "val/c/loss": 2.5},
]


def write_metrics(folder: Path, lines: list[dict[str, Any]], rest: str = "") -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + rest)


def test_plot_draws_every_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(tmp_path, METRICS, rest='{"step": 3, "trai')
    assert plot_run.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'curves.png'}\n"
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 500
    losses, rates = Figure().subplots(1, 2)
    plot_run.draw_losses(losses, METRICS)
    plot_run.draw_rates(rates, METRICS)
    drawn = {str(line.get_label()): line.get_xydata().tolist() for axes in (losses, rates) for line in axes.get_lines()}
    assert drawn == {
        "train, last 3": [[1, 3.0]],
        "train a": [[1, 2.0], [2, 1.5]],
        "train b": [[1, 4.0]],
        "val, last 2.5": [[2, 2.5]],
        "llm, vision": [[1, 1e-4], [2, 5e-5]],
    }


def test_plot_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert plot_run.main([str(tmp_path)]) == 2
    assert "metrics.jsonl cannot be read: No such file" in one_line(capsys)
    write_metrics(tmp_path, [])
    assert plot_run.main([str(tmp_path)]) == 2
    assert "holds no logged step yet" in one_line(capsys)
    write_metrics(tmp_path, METRICS[:1], rest="{}\n")
    assert plot_run.main([str(tmp_path)]) == 65
    assert "metrics.jsonl:2: is no line of metrics" in one_line(capsys)
    write_metrics(tmp_path, METRICS)
    assert plot_run.main([str(tmp_path), "--out", str(tmp_path / "no" / "a.png")]) == 2
    assert "a.png cannot be written: No such file" in one_line(capsys)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot_run.main([str(tmp_path)]) == 2
    assert "the extra `plot`" in one_line(capsys)


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.run_command("tool", lambda: print("more than anyone reads")) == cli.BROKEN_PIPE
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_tools_explain_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    for tool in (evaluate, chat, plot_run, inspect_data):
        with pytest.raises(SystemExit) as stop:
            tool.main(["--help"])
        assert stop.value.code == 0
        assert str(tool.__doc__).split()[:4] == capsys.readouterr().out.partition("\n\n")[2].split()[:4]
