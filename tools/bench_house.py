"""Measure the house: folders, import circles, the spine, docstrings, loose types, repeated names. `python -m tools.bench_house`."""

from __future__ import annotations

import argparse
import ast
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("model", "data", "trainer", "tools")
SPINE = ("trainer/main.py", "trainer/run.py", "trainer/loop.py", "trainer/step.py")
MAX_PARAMETERS = 6
_WORDS = tomllib.loads((ROOT / "tools" / "house_words.toml").read_text(encoding="utf-8"))
VERBS, FRAGMENTS = (frozenset(_WORDS[kind].split()) for kind in ("verbs", "fragments"))
"""First words of a docstring that says what a function does, and of one that begins in the middle of a sentence."""


def sources() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield the full names a module imports, anywhere in it: under TYPE_CHECKING and inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Return the modules of this project that each module imports."""

    def ours(name: str) -> str | None:
        words = name.split(".")
        return next((found for n in range(len(words), 1, -1) if (found := ".".join(words[:n])) in trees), None)

    return {name: {found for other in imports(tree) if (found := ours(other)) and found != name} for name, tree in trees.items()}


def circles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Return the groups of modules that reach each other (strongly connected components of two or more)."""

    def reached(start: str) -> set[str]:
        seen, queue = set(), [start]
        while queue:
            for other in graph.get(queue.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    queue.append(other)
        return seen

    reach = {name: reached(name) for name in graph}
    looped = [name for name in graph if name in reach[name]]
    return sorted({tuple(sorted(b for b in looped if b in reach[a] and a in reach[b])) for a in looped}, key=str)


def first_words(trees: dict[str, ast.Module]) -> Counter[str]:
    """Count how docstrings of functions begin: with a verb, with a fragment, or otherwise."""
    found: Counter[str] = Counter()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
                found[kind_of_start(text)] += 1
    return found


def kind_of_start(docstring: str) -> str:
    """Return "verb", "fragment" or "other"."""
    word = re.split(r"[^\w-]", docstring.strip(), maxsplit=1)[0].lower()
    stems = {word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)}
    if stems & VERBS:
        return "verb"
    return "fragment" if word in FRAGMENTS else "other"


def parameters(trees: dict[str, ast.Module]) -> list[tuple[int, str]]:
    """Return (number of parameters, function) of every function with more than MAX_PARAMETERS, most first."""
    found = []
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                args = [
                    a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")
                ]
                if len(args) > MAX_PARAMETERS:
                    found.append((len(args), f"{name}.{node.name}"))
    return sorted(found, reverse=True)


def repeated_names(trees: dict[str, ast.Module]) -> dict[str, list[str]]:
    """Return the public functions and classes that stand in two or more modules; `main` of the commands is one word."""
    homes: dict[str, list[str]] = {}
    for name, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and node.name != "main":
                homes.setdefault(node.name, []).append(name)
    return {name: where for name, where in homes.items() if len(where) > 1}


def largest_folder() -> tuple[int, str]:
    """Return how many Python files the fullest folder holds, tests included, and its name."""
    counts = Counter(str(path.parent.relative_to(ROOT)) for top in (*FOLDERS, "tests") for path in (ROOT / top).rglob("*.py"))
    name, count = counts.most_common(1)[0]
    return count, name


def table() -> list[tuple[str, str]]:
    """Return the rows of the table: what is measured, and what it is now."""
    texts = {module_name(path): path.read_text() for path in sources()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    lines = {name: text.count("\n") for name, text in texts.items()}
    starts, wide, twice = first_words(trees), parameters(trees), repeated_names(trees)
    documented = sum(starts.values())
    spine = [f"{path} {(ROOT / path).read_text().count(chr(10))}" for path in SPINE if (ROOT / path).exists()]
    whole = "\n".join(texts.values())
    classes = [node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return [
        ("largest folder", "{} files ({})".format(*largest_folder())),
        ("import circles, TYPE_CHECKING counted", str(circles(import_graph(trees)) or 0)),
        ("from the command to optimizer.step()", f"{sum(int(row.split()[1]) for row in spine)} lines: {', '.join(spine)}"),
        (f"functions of more than {MAX_PARAMETERS} parameters", f"{len(wide)}, at most {wide[0][0] if wide else MAX_PARAMETERS}"),
        ("`type: ignore`", str(len(re.findall(r"#\s*type: ignore", whole)))),
        ("`Any`", str(len(re.findall(r"\bAny\b", whole)))),
        ("classes ConfigError", str(classes.count("ConfigError"))),
        ("docstrings of functions that begin with a verb", f"{starts['verb'] / documented:.0%} of {documented}"),
        ("... with a fragment", f"{starts['fragment'] / documented:.1%}"),
        ("public names in two or more modules", f"{len(twice)}: {', '.join(sorted(twice)[:20])}"),
        ("lines of product", str(sum(lines.values()))),
        ("lines of README", str((ROOT / "README.md").read_text().count("\n"))),
    ]


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m tools.bench_house", description=__doc__).parse_args(argv)
    for name, value in table():
        print(f"| {name} | {value} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
