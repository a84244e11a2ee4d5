"""The architecture, executable: who may import whom, and what a file may be called."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("model", "data", "trainer", "tools")
MAY_IMPORT = {
    "model": {"model"},
    "data": {"data"},
    "trainer": {"trainer", "data", "model"},
    "tools": {"tools", "trainer", "data", "model"},
}
DATA_MAY_IMPORT = {"model.batch", "model.media_spec", "model.patch_layout", "model.errors", "model.files.untrusted"}
"""Modules of model/ that data/ may import: the contract between the two, and what costs nothing."""
ORDER = {
    "model": ("files", "published", "audio", "llm", "vision", "preference", "weights", "exports"),
    "data": ("order", "records", "media", "text", "preference", "index", "check"),
    "trainer": (
        "runfile",
        "distributed",
        "machine",
        "trackers",
        "health",
        "records",
        "checkpoint",
        "faults",
        "scores",
        "preference",
        "memory",
        "trial",
    ),
    "tools": ("demos", "devicechecks", "exports", "inspector", "asking", "evaluation", "benches", "watcher", "chatting"),
}
"""Sub-folders from the lowest up: each may import those before it. Files beside them may be imported by all, and import all."""
EXTERNAL = {"torch", "transformers", "safetensors", "PIL", "numpy", "tqdm", "jinja2", "tokenizers", "huggingface_hub"}
"""What is always there; jinja2 comes with torch, tokenizers and huggingface_hub with transformers."""
EXTRAS = {
    *("av", "bitsandbytes", "matplotlib", "pyarrow", "sklearn", "peft", "soxr", "trl", "datasets", "tensorboard", "wandb"),
    *("jiwer", "rapidfuzz", "sacrebleu"),
}
"""Imported where they are used, never with a module."""
FORBIDDEN_NAMES = {"utils", "helpers", "common", "base", "misc"}
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path, *, lazy: bool = True) -> set[str]:
    """Full names a file imports; with `lazy` False those at import time only."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def ours(name: str) -> str | None:
    """The module of this project that an imported name stands in."""
    words = name.split(".")
    if words[0] not in FOLDERS:
        return None
    for length in range(len(words), 0, -1):
        if (ROOT / Path(*words[:length])).with_suffix(".py").exists():
            return ".".join(words[:length])
    return words[0]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_folder_imports_only_what_it_may(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        module = ours(name)
        if module is not None:
            allowed = module.split(".")[0] in MAY_IMPORT[folder] or (folder == "data" and module in DATA_MAY_IMPORT)
            assert allowed, f"{path} imports {name}"
            assert module != "trainer.main" or folder == "tools", f"{path} imports the entry"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_listed_packages_are_needed(path: Path) -> None:
    at_import = {name.split(".")[0] for name in imports(path, lazy=False)}
    allowed = EXTERNAL | set(FOLDERS) | set(sys.stdlib_module_names) | {"compression"}  # of Python 3.14
    assert at_import <= allowed
    assert {name.split(".")[0] for name in imports(path)} <= allowed | EXTRAS


def sub_folder(module: str) -> str | None:
    words = module.split(".")
    return words[1] if len(words) > 2 else None


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_sub_folder_imports_only_those_below_it(path: Path) -> None:
    folder, own = name_of(path).split(".")[0], sub_folder(name_of(path))
    if own is None:
        return
    for name in imports(path):
        module = ours(name)
        if module is not None and module.split(".")[0] == folder and (other := sub_folder(module)) not in (None, own):
            order = ORDER[folder]
            assert order.index(other) < order.index(own), f"{path} imports {name}: {other} is above {own}"


def test_every_sub_folder_has_its_place() -> None:
    for folder, order in ORDER.items():
        assert {p.name for p in (ROOT / folder).iterdir() if p.is_dir() and list(p.glob("*.py"))} == set(order)


def test_no_cycle() -> None:
    """Imports inside functions and under TYPE_CHECKING count as well."""
    graph = {name_of(p): {m for n in imports(p) if (m := ours(n)) and m != name_of(p)} for p in FILES if p.stem != "__init__"}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_names_and_sizes() -> None:
    for path in FILES:
        assert path.stem not in FORBIDDEN_NAMES, path
        assert path.read_text().count("\n") <= 260, f"{path} is too long to be one responsibility"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 50, f"{path}: {node.name}"


def test_nothing_unpickles_evaluates_or_starts_a_shell() -> None:
    """Other people's .bin weights have one reader, with weights_only=True; remote code is never trusted."""
    readers = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called == "torch.load":
                readers.append(name_of(path))
                assert keywords["weights_only"] == "True"
            assert called not in {"eval", "exec", "pickle.load", "pickle.loads", "os.system", "os.popen"}, path
            assert keywords.get("shell", "False") == "False" and keywords.get("trust_remote_code", "False") == "False", path
        assert not imports(path) & {"pickle", "shelve", "marshal"}, path
    assert readers == ["model.files.tensor_files"]


def test_the_contract_is_cheap_to_import() -> None:
    """A data worker that imports `model.batch` must not pay for LoRA and transformers."""
    heavy = "('transformers', 'model.lora', 'data.processor')"
    code = f"import sys, model.batch, model, data; print([m for m in sys.modules if m in {heavy}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_test_module_imports_another() -> None:
    """What several of them need stands in tests/support."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        assert not [name for name in imports(path) if re.search(r"^tests\.(.+\.)?test_", name)], path
