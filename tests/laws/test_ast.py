"""What the shipped code may not do, read off its text: each rule is shown to bite on a planted line."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [
    *(path for folder in ("model", "data", "trainer", "tools") for path in sorted((ROOT / folder).rglob("*.py"))),
    ROOT / "setup.py",
]
READER = "model/files/tensor_files.py"
"""The one file that reads other people's pickled weights."""
HEADERS = "data/index/tar_headers.py"
"""The one file that reads the headers of archives; nothing is ever unpacked to where they say."""
SERVER = "tools/local_page.py"
"""The one file that listens, on the loopback alone, and reads no file by a name that it is asked for."""
STARTERS = {
    *("tools/demo.py", "tools/demo_omni.py", "tools/benches/turns.py", "tools/check_serving.py"),
    *("tools/devicechecks/runner.py", "tools/devicechecks/resume.py"),
}
"""Files that start other programs: commands as lists, never through a shell."""
MODULES = {
    **dict.fromkeys(("pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "copyreg"), "unpickles"),
    **dict.fromkeys(("yaml", "runpy", "code", "codeop", "imp"), "runs what a file says"),
    **dict.fromkeys(
        ("ssl", "socketserver", "urllib", "urllib3", "requests", "httpx", "aiohttp", "http", "ftplib", "smtplib"),
        "opens connections",
    ),
    **dict.fromkeys(("pty", "commands", "webbrowser", "tarfile"), "starts programs, or unpacks archives"),
}
CALLS = {
    **dict.fromkeys(("eval", "exec", "compile", "__import__", "execfile", "breakpoint"), "runs text"),
    **dict.fromkeys(("os.system", "os.popen", "os.startfile"), "runs a shell"),
    **dict.fromkeys(("tempfile.mktemp", "os.tempnam"), "names a file that another may make first"),
    **dict.fromkeys(("np.fromregex", "numpy.load", "torch.hub.load", "torch.jit.load", "torch.package"), "loads what may be code"),
    "importlib.import_module": "imports by a name that data may choose",
}
TORCHRUN = ("os.exec", "os.spawn", "os.posix_spawn", "os.fork")


def problems(source: str, name: str) -> Iterator[str]:
    """Every line of `source`, the file `name` of the project, that breaks a rule, and why."""
    for node in ast.walk(ast.parse(source)):
        for why in _problems(node, name):
            yield f"{name}:{getattr(node, 'lineno', 0)}: {why}"


def _problems(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        for top in {module.split(".")[0] for module in names}:
            if top in MODULES and (top, name) not in (("tarfile", HEADERS), ("http", SERVER)):
                yield f"{top} {MODULES[top]}"
            if top == "subprocess" and name not in STARTERS:
                yield "subprocess starts programs"
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "builtins", "torch", "numpy", "socket"):
            yield from (f"from {node.module} import {a.name} hides a call" for a in node.names if a.name in HIDDEN)
    elif isinstance(node, ast.Call):
        yield from _call_problems(node, name)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        written = {ast.unparse(target).rpartition(".")[2] for target in targets}
        if written & {"MAX_IMAGE_PIXELS", "LOAD_TRUNCATED_IMAGES"}:
            yield "Pillow's own limits are for whole processes; ours are asked first"


LOCAL = ("gethostname", "socketpair")
"""What of the module socket reaches no other machine."""
HIDDEN = {"socket", "create_connection", "system", "popen", "load", "eval", "exec", "hub"}


def _call_problems(node: ast.Call, name: str) -> Iterator[str]:
    called, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
    method = called.rpartition(".")[2]
    if called in CALLS:
        yield f"{called} {CALLS[called]}"
    if called.startswith(TORCHRUN):
        yield f"{called} starts processes"
    if called == "torch.load" and (name != READER or options.get("weights_only") != "True"):
        yield "torch.load stands in one reader, with weights_only=True"
    if called == "np.load" and options.get("allow_pickle") != "False":
        yield "np.load unpickles without allow_pickle=False"
    if called == "Image.open" and "formats" not in options and not name.startswith("tools/bench_"):
        yield "Image.open tries every format Pillow knows without formats="
    if method in ("extract", "extractall", "unpack_archive", "unpack_from_file"):
        yield f"{method} writes where an archive says"
    if options.get("shell", "False") != "False":
        yield "shell= runs a shell"
    if options.get("trust_remote_code", "False") != "False":
        yield "trust_remote_code runs a stranger's code"
    if method == "from_pretrained" and "trust_remote_code" not in options and name not in WRITTEN_BY_US:
        yield "from_pretrained says trust_remote_code=False where it is called"
    if called.startswith("subprocess.") and (not node.args or isinstance(node.args[0], ast.Constant | ast.JoinedStr)):
        yield "a command is a list"
    if method == "chmod" and any(isinstance(a, ast.Constant) and isinstance(a.value, int) and a.value & 0o022 for a in node.args):
        yield "chmod lets others write"
    if called.startswith("socket.") and method not in LOCAL:
        yield f"{called} opens connections"
    if called in ("pickle.load", "pickle.loads") or method in ("Unpickler", "load_pickle"):
        yield f"{called} unpickles"


WRITTEN_BY_US = {
    "tools/exports/hf_folder.py",
    "tools/exports/ask_library.py",
    "tools/bench_images.py",
    "tools/bench_step.py",
    "tools/bench_data.py",
    "tools/bench_quantize.py",
}
"""Files that load what they have written themselves, or classes without code of folders."""

PLANTED = {
    "import pickle": "unpickles",
    "from marshal import loads": "unpickles",
    "import yaml": "runs what a file says",
    "import urllib.request": "opens connections",
    "from http.client import HTTPConnection": "opens connections",
    "socket.create_connection(address)": "opens connections",
    "socket.socket()": "opens connections",
    "from socket import socket": "hides a call",
    "import subprocess": "starts programs",
    "from os import system": "hides a call",
    "from torch import load": "hides a call",
    "eval(record['value'])": "runs text",
    "exec(text)": "runs text",
    "compile(text, 'x', 'exec')": "runs text",
    "__import__(name)": "runs text",
    "importlib.import_module(name)": "imports by a name",
    "os.system('ls')": "runs a shell",
    "os.popen(command)": "runs a shell",
    "os.execvp('sh', [])": "starts processes",
    "os.fork()": "starts processes",
    "run(command, shell=True)": "runs a shell",
    "torch.load(path)": "in one reader",
    "torch.load(path, weights_only=True)": "in one reader",
    "np.load(path)": "without allow_pickle=False",
    "np.load(path, allow_pickle=True)": "without allow_pickle=False",
    "Image.open(path)": "tries every format",
    "Image.MAX_IMAGE_PIXELS = None": "Pillow's own limits",
    "ImageFile.LOAD_TRUNCATED_IMAGES = True": "Pillow's own limits",
    "import tarfile": "unpacks archives",
    "archive.extract(member, folder)": "writes where an archive says",
    "archive.extractall(folder)": "writes where an archive says",
    "AutoModel.from_pretrained(path)": "says trust_remote_code=False",
    "AutoModel.from_pretrained(path, trust_remote_code=True)": "runs a stranger's code",
    "tempfile.mktemp()": "another may make first",
    "os.chmod(path, 0o777)": "lets others write",
    "pickle.Unpickler(file)": "unpickles",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_shipped_code_keeps_to_the_rules(path: Path) -> None:
    assert list(problems(path.read_text(), str(path.relative_to(ROOT)))) == []


@pytest.mark.parametrize(("line", "why"), PLANTED.items(), ids=list(PLANTED))
def test_each_rule_bites(line: str, why: str) -> None:
    found = list(problems(line, "data/planted.py"))
    assert found and any(why in problem for problem in found)


def test_exceptions_are_as_narrow_as_they_are_named() -> None:
    """The reader may not forget weights_only, a starter not its list."""
    assert list(problems("torch.load(path, weights_only=True)", READER)) == []
    assert list(problems("torch.load(path)", READER))
    assert list(problems("torch.load(path, weights_only=False)", READER))
    assert list(problems("import subprocess\nsubprocess.run([a, b])", "tools/demo.py")) == []
    assert list(problems("subprocess.run(f'ls {a}')", "tools/demo.py"))
    assert list(problems("subprocess.run(command, shell=True)", "tools/demo.py"))
