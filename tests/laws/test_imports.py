"""What a start imports: only what its run needs. The rest costs every start, every rank and every spawned worker CPU seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import tables
from trainer.runfile.toml_files import to_toml

ROOT = Path(__file__).parents[2]
NEVER = {
    "scipy": "a loss of object detection in transformers",
    "sklearn": "assisted generation in transformers",
    "accelerate": "models spread over devices in transformers",
    "sympy": "symbolic shapes, of compiled or sharded models",
    "torch._dynamo.eval_frame": "torch's compiler: only parallel.compile compiles",
    "torch._inductor": "torch's compiler",
    "torch.distributed.tensor": "DTensor: only sharded models have some",
    "torch.distributed.fsdp": "FSDP2: only sharded models",
    "torch.distributed.checkpoint": "checkpoints of transformers; ours are safetensors",
    "transformers.models.whisper.modeling_whisper": "only for models that hear",
    "transformers.trainer": "another trainer",
    "av": "only for videos and compressed sound",
    "pyarrow": "only for .parquet",
    "bitsandbytes": "only for its optimizer",
}
"""Modules that a run of language model, tower and projector on one rank does not import, and what they are for."""

RUN = """
import json, sys
from trainer.main import main
code = main(["--cfg", sys.argv[1]])
print(json.dumps([code, sorted(sys.modules)]))
"""
AFTER = """
import sys
from model.deferred_imports import Deferred, import_transformers, models_structure
import_transformers()
import torch, transformers
from transformers.utils import import_utils
ours, theirs = transformers.models, import_utils.define_import_structure(transformers.models.__file__)
theirs = import_utils._LazyModule("transformers.models", ours.__file__, theirs, module_spec=ours.__spec__)
assert ours._class_to_module == theirs._class_to_module and ours._modules == theirs._modules and set(dir(ours)) == set(dir(theirs))
missing = [{name: sorted(packages) for name, packages in m._object_missing_backend.items()} for m in (ours, theirs)]
assert missing[0] == missing[1]
holders = {name for name, m in list(sys.modules.items()) for value in list(vars(m).values()) if isinstance(value, Deferred)}
assert holders and all(name.startswith("transformers.") for name in holders), holders
assert "torch.distributed.tensor" not in sys.modules and "torch._dynamo.eval_frame" not in sys.modules
x = torch.ones(3)
from transformers.distributed.tensor_parallel import DTensor, Replicate
assert not isinstance(x, DTensor) and "torch.distributed.tensor" not in sys.modules
from torch.distributed.tensor import DTensor as real, Replicate as replicate
assert not isinstance(x, DTensor) and isinstance(replicate(), Replicate) and Replicate() == replicate()
assert real.__module__.startswith("torch.") and DTensor.from_local is real.from_local
calls = []
@torch.compiler.disable
def left_out(y):
    calls.append(torch.compiler.is_compiling())
    return y + 1
assert left_out(x).tolist() == [2, 2, 2] and "torch._dynamo.eval_frame" not in sys.modules
compiled = torch.compile(lambda y: left_out(y * 2) * 3, backend="eager")
assert compiled(x).tolist() == [9, 9, 9] and calls == [False, False]
assert "torch._dynamo.eval_frame" in sys.modules and torch._dynamo is sys.modules["torch._dynamo"]
import torch._dynamo.config
assert type(torch._dynamo.config).__module__ != "model.deferred_imports"
torch._dynamo.graph_break()
print("fine")
"""


def python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_imports_what_it_needs(parts: Path, tmp_path: Path) -> None:
    """From the command to final/: two steps, a checkpoint, a validation."""
    settings: dict[str, Any] = {"train": {"max_steps": 2}, "checkpoint": {"every": 1}, "parallel": {"strategy": "fsdp"}}
    (tmp_path / "run.toml").write_text(to_toml(tables(parts, output_dir=str(tmp_path / "run"), **settings)))
    code, modules = json.loads(python(RUN, str(tmp_path / "run.toml")).splitlines()[-1])
    assert code == 0
    assert {name: why for name, why in NEVER.items() if name in modules} == {}
    assert "transformers.modeling_utils" in modules


def test_what_was_left_out_comes_when_it_is_asked_for() -> None:
    """Classes are listed as transformers lists them; only transformers holds deferred names; they and the compiler work."""
    assert python(AFTER).splitlines()[-1] == "fine"


def test_the_commands_help_costs_no_torch() -> None:
    """Nor does importing the entry, which every spawned worker does."""
    assert python("import sys, trainer.main; print('torch' in sys.modules)").strip() == "False"


@pytest.mark.parametrize("name", ["bench_start", "demo", "inspect_data", "plan"])
def test_help_of_a_tool_is_cheap(name: str) -> None:
    code = f"""
import sys, runpy
sys.argv = ["tools.{name}", "--help"]
try:
    runpy.run_module("tools.{name}", run_name="__main__")
except SystemExit as end:
    print([end.code or 0, "torch" in sys.modules])
"""
    assert python(code).splitlines()[-1] == "[0, False]"
