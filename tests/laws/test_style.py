"""Style of the shipped code: docstrings say what is done, one name is one thing, one error class one error, and types are named."""

from __future__ import annotations

import ast
import re

import pytest

from tools.bench_house import circles, import_graph, kind_of_start, largest_folder, module_name, repeated_names, sources

TREES = {module_name(path): ast.parse(path.read_text()) for path in sources()}
MOST_REPEATED, MOST_FILES = 10, 44
MOST_IGNORED, MOST_ANY = 50, 300


@pytest.mark.parametrize("name", TREES)
def test_a_docstring_begins_with_what_is_done(name: str) -> None:
    """Of functions: a verb, never the middle of a sentence. Of modules and classes: no pronoun without a noun."""
    for node in ast.walk(TREES[name]):
        text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) else None
        if text and isinstance(node, ast.FunctionDef):
            assert kind_of_start(text) == "verb", f"{name}.{node.name}: {text.splitlines()[0]}"
        elif text:
            first = text.split(maxsplit=1)[0]
            assert first not in {"Of", "Those", "That", "What", "Which", "Whose"}, f"{name}: {text.splitlines()[0]}"


def test_a_public_name_stands_in_one_module() -> None:
    assert len(found := repeated_names(TREES)) <= MOST_REPEATED, found


def test_there_is_one_class_for_wrong_settings_and_no_circle() -> None:
    classes = [node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert classes.count("ConfigError") == classes.count("DataError") == 1
    assert circles(import_graph(TREES)) == []


def test_no_folder_is_a_heap() -> None:
    assert largest_folder()[0] <= MOST_FILES


def test_few_types_are_loose() -> None:
    text = "\n".join(path.read_text() for path in sources())
    assert len(re.findall(r"#\s*type: ignore", text)) <= MOST_IGNORED
    assert len(re.findall(r"\bAny\b", text)) <= MOST_ANY
