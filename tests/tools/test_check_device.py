"""tools.check_device: every check it can make on a CPU passes, and each turns red where what it looks at is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.build import DTYPES
from model.llm import attention, quantize
from model.lora import LoraLinear
from tests.support.ranks import run_ranks
from tools import check_device
from tools.devicechecks import answers, exactness, machine, models, products, resume, runner, stepping, variants
from tools.devicechecks.batches import mixed_samples, packed_batches
from tools.devicechecks.cards import PEAKS, peak_of
from tools.devicechecks.flops import useful_flops
from tools.devicechecks.outcome import Check, CheckResult, Context, ReportRow, Skipped, run_check
from tools.devicechecks.registry import all_checks
from tools.devicechecks.runner import run_apart, run_here
from tools.devicechecks.shapes import SEVEN_B, TINY
from trainer import setup
from trainer.distributed.world import World

ALONE = World(0, 0, 1, torch.device("cpu"))


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(ALONE, tmp_path, tiny=True)


def outcome_of(check: Callable[[Context], CheckResult], context: Context) -> ReportRow:
    return run_check(Check("planned", "", check, 60), context)


def changed_on_second_call(original: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    """`original`, whose result is changed at every call but the first."""
    calls: list[int] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        found = original(*args, **kwargs)
        return change(found) if len(calls) > 1 else found

    return call


def nudged(prepared: setup.PreparedRun) -> setup.PreparedRun:
    """A run one of whose weights differs in a thousandth."""
    with torch.no_grad():
        prepared.model.get_parameter("llm.model.norm.weight").mul_(1.001)
    return prepared


def test_a_device_that_computes_other_numbers_fails(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome_of(exactness.check_float32, context).status == "passed"
    monkeypatch.setattr(models, "build_run", changed_on_second_call(models.build_run, nudged))
    assert outcome_of(exactness.check_float32, context).status == "failed"


def test_rounding_is_told_from_error(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 the bound is what bfloat16 itself does."""
    exact = exactness.taken(context, exactness.Recipe(), num_steps=1)
    rounded = exactness.taken(context, exactness.Recipe(dtype="bfloat16"), num_steps=1)
    assert exactness.within_rounding(rounded, rounded, exact, "itself").passed
    wrong = replace(rounded, gradients={name: 1.1 * grad for name, grad in rounded.gradients.items()})
    assert not exactness.within_rounding(wrong, rounded, exact, "itself").passed
    missing = replace(rounded, gradients={})
    assert not exactness.within_rounding(missing, rounded, exact, "itself").passed


def test_attention_over_a_border_fails(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, **options: Any) -> Any:
        return attention.causal_attention(module, q, k, v, None, **{k: v for k, v in options.items() if "segment" not in k})

    monkeypatch.setattr(attention, "packed_attention", leaking)
    found = outcome_of(exactness.check_packed, context)
    assert found.status == "failed" and "see each other" in found.seen


def test_an_answer_that_sees_no_prompt_fails(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome_of(answers.check_shared_prompts, context).status == "passed"

    def forgetful(*args: Any, shared_prompts: object, **options: Any) -> Any:
        return attention.packed_attention(*args, **options)

    monkeypatch.setattr(answers, "packed_attention", forgetful)
    assert outcome_of(answers.check_shared_prompts, context).status == "failed"


def test_a_mask_that_is_not_the_formulas_fails(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome_of(products.check_lora, context).status == "passed"
    monkeypatch.setattr(LoraLinear, "scale", property(lambda self: 0.5, lambda self, value: None), raising=False)
    monkeypatch.setattr(products, "plain", lambda x, mask, rate, layer: torch.nn.functional.linear(x, layer.weight, layer.bias))
    assert outcome_of(products.check_lora, context).status == "failed"


@pytest.mark.long
def test_codes_that_a_device_reads_differently_fail(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    products.product_distance(context.device, models.QUANTISED["8 bits"], torch.float32)
    original = quantize._dense_rows
    monkeypatch.setattr(quantize, "_dense_rows", changed_on_second_call(original, lambda matrix: matrix * 1.01))
    assert products.product_distance(context.device, models.QUANTISED["8 bits"], torch.float32) > products.FLOAT32_BOUND


@pytest.mark.long
def test_a_recomputed_block_that_draws_another_mask_fails(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome_of(variants.check_recomputation, context).status == "passed"
    monkeypatch.setattr(models, "build_run", changed_on_second_call(models.build_run, nudged))
    assert outcome_of(variants.check_recomputation, context).status == "failed"


def sharded(world: World, folder: Path) -> tuple[str, str]:
    """The check's status on a group of one, before and after a weight is changed."""
    context = Context(world, folder, tiny=True)
    good = outcome_of(variants.check_sharded, context).status
    original = models.build_run
    models.build_run = changed_on_second_call(original, nudged)
    try:
        return good, outcome_of(variants.check_sharded, context).status
    finally:
        models.build_run = original


@pytest.mark.long
def test_wrapped_models_that_differ_fail(tmp_path: Path) -> None:
    assert run_ranks(sharded, 1, tmp_path)[0] == ("passed", "failed")


def test_a_step_that_waits_for_the_device_fails(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome_of(machine.check_syncs, context).status == "passed"
    original = stepping.train_step

    def waiting(*args: Any) -> Any:
        result = original(*args)
        result.grad_norm.item()
        return result

    monkeypatch.setattr(stepping, "train_step", waiting)
    assert outcome_of(machine.check_syncs, context).status == "failed"


def test_what_a_checkpoint_holds_is_copied_before_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.staged_bytes(torch.device("cpu"), 5000)[:2] == (True, False)
    monkeypatch.setattr(machine.Staging, "take", lambda self, tensors: None)
    with pytest.raises(KeyError):
        machine.staged_bytes(torch.device("cpu"), 5000)


def test_a_plan_off_by_a_fifth_fails() -> None:
    assert machine.compare_memory(109, 100).passed and not machine.compare_memory(80, 100).passed


UNCOUNTED: dict[Any, Callable[..., int]] = {
    torch.ops.multimodal_lora.adapted: lambda x, w, bias, low, b, scale, **_: 2 * x[0] * w[0] * w[1] + 2 * low[0] * low[1] * b[0],
    torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1],
}
"""Products that torch's counter does not know."""


def test_useful_operations_are_those_that_torch_counts(context: Context) -> None:
    """Of products: everything but attention, which torch counts whole and for padding too."""
    for llm in ("full", "frozen", "lora"):
        prepared = models.build(TINY, models.Recipe(llm=llm, packing=True), context)  # type: ignore[arg-type]
        batch = packed_batches(mixed_samples(prepared.data.card, 8, longest=60), 200)[0]
        with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
            sum(term.sum for term in prepared.wrapped(batch).values()).backward()
        counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)}
        found = useful_flops(prepared.model, batch)
        pictures, rows = len(batch.media["image"].values), 17
        of_tower = pictures * 4 * 2 * 32 * rows**2  # attention of two blocks, in tower
        assert found.total - found.attention - of_tower == pytest.approx(sum(counts.values()), rel=0.01), llm


def test_a_known_card_is_found_by_its_drivers_name() -> None:
    names = {
        **{"NVIDIA H200": 989.0, "NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H100 PCIe": 756.0, "NVIDIA A100-SXM4-80GB": 312.0},
        **{
            "Tesla V100-SXM2-32GB": 125.0,
            "Tesla V100-PCIE-16GB": 112.0,
            "Tesla T4": 65.1,
            "NVIDIA L40S": 362.0,
            "NVIDIA L4": 121.0,
        },
        **{
            "NVIDIA GeForce RTX 4090": 165.2,
            "NVIDIA GeForce RTX 3090 Ti": 80.0,
            "NVIDIA GeForce RTX 3090": 71.0,
            "NVIDIA A10": 125.0,
        },
        **{"NVIDIA H20": 148.0, "NVIDIA GH200 480GB": 989.0, "NVIDIA RTX 6000 Ada Generation": 364.2},
    }
    assert {name: peak_of(name) for name in names} == names
    assert peak_of("Some Card 9000") is None and len(PEAKS) > 30


def test_the_shapes_are_qwen2s() -> None:
    assert SEVEN_B.llm_config()["hidden_size"] == 3584 and SEVEN_B.vision_config()["intermediate_size"] == 4096


def raising(error: BaseException) -> Callable[[Context], CheckResult]:
    def check(context: Context) -> CheckResult:
        raise error

    return check


def test_a_check_that_breaks_leaves_the_others_alone(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [
        Check("out of memory", "-", raising(torch.OutOfMemoryError("CUDA out of memory.\nmore")), 5),
        Check("cannot", "-", raising(Skipped("no such device")), 5),
        Check("works", "-", lambda context: CheckResult(True, "yes"), 5),
    ]
    monkeypatch.setattr(runner, "clean_up", lambda context: None)
    found: list[ReportRow] = []
    run_here(checks, context, 2**40, lambda name, outcome: found.append(outcome) if outcome else None)
    assert [o.status for o in found] == ["failed", "skipped", "passed"]
    assert found[0].seen.startswith("OutOfMemoryError: CUDA out of memory. (tests/tools/test_check_device.py:")
    late: list[ReportRow] = []
    run_here(checks[2:], context, 0, lambda name, outcome: late.append(outcome) if outcome else None)
    assert [o.status for o in late] == ["skipped"] and "--minutes" in late[0].seen


DYING = """
import json, os, sys
out = os.fdopen(int(sys.argv[sys.argv.index("--worker") + 1]), "w")
names = [sys.argv[i + 1] for i, word in enumerate(sys.argv) if word == "--only"]
for name in names:
    print(json.dumps({"name": name, "outcome": None}), file=out, flush=True)
    if name == "dies":
        os.kill(os.getpid(), 9)
    if name == "hangs":
        import time
        time.sleep(60)
    row = {"name": name, "expected": "-", "status": "passed", "seen": "", "seconds": 0.0, "figures": {}}
    print(json.dumps({"name": name, "outcome": row}), file=out, flush=True)
"""


def test_a_process_that_dies_or_hangs_costs_its_check_alone(tmp_path: Path) -> None:
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    checks = {name: Check(name, "-", raising(AssertionError()), 1.0) for name in ("first", "dies", "second", "hangs", "third")}
    found: list[ReportRow] = []
    run_apart(checks, [sys.executable, str(script)], found.append)
    assert {o.name: o.status for o in found} == {
        **{"first": "passed", "dies": "failed", "second": "passed", "hangs": "failed", "third": "passed"}
    }
    assert "signal 9" in found[1].seen and "more than 1 s" in found[3].seen


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "speed"], "--only 'speed' is none of the checks: float32"),
        (["--minutes", "0"], "--minutes 0.0 is not a positive number"),
        (["--json", "no/such/folder/file.json"], "--json 'no/such/folder/file.json' cannot be written: No such file"),
        *([(["--device", "cuda"], "--device cuda: torch sees no GPU here")] if not torch.cuda.is_available() else []),
    ],
)
def test_a_wrong_command_line_names_what_is_wrong(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_device.main(words) == 2
    assert says in capsys.readouterr().err


@pytest.mark.long
def test_every_check_that_a_cpu_can_make_passes(tmp_path: Path) -> None:
    """As a user starts it. What needs a GPU is skipped with its reason."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "tools.check_device", "--device", "cpu", "--tiny", "--minutes", "30", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True)
    value = json.loads(report.read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert value["schema"] == 1 and value["failed"] == [] and value["machine"]["torch"] == torch.__version__
    assert [row["name"] for row in value["checks"]] == [*all_checks(with_peer=False)]
    skipped = {row["name"]: row["seen"] for row in value["checks"] if row["status"] == "skipped"}
    assert {name for name in skipped if "compiled" not in name} == {"staging", "memory", "offloaded"} | ({"float16"} - set(DTYPES))
    assert all(row["figures"]["useful_tflops"] > 0 for row in value["checks"] if row["name"] in ("0.5b-full", "7b-lora"))


@pytest.mark.long
def test_a_resumed_run_that_ends_elsewhere_fails(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    original = resume.write_run_file

    def other_rate(folder: Path, name: str, *given: str, **values: object) -> Path:
        path = original(folder, name, *given, **values)
        path.write_text(path.read_text().replace("lr = 0.001", "lr = 0.002") if name == "killed" else path.read_text())
        return path

    monkeypatch.setattr(resume, "write_run_file", other_rate)
    found = outcome_of(resume.check_resume, context)
    assert found.status == "failed" and "differ" in found.seen


@pytest.fixture(autouse=True)
def no_group_is_left() -> Iterator[None]:
    yield
    assert not torch.distributed.is_initialized()
