"""The index of bad inputs is complete, and every test that it names is there."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest
from bad_inputs import BAD_INPUTS

HERE = Path(__file__).parent


@cache
def held_in(file: str) -> set[str]:
    """The names of a file's tests, without "test_"; those of a class with its name in front."""
    found = set()
    for node in ast.parse((HERE / f"test_{file}.py").read_text(encoding="utf-8")).body:
        inside = [(f"{node.name}.", item) for item in node.body] if isinstance(node, ast.ClassDef) else [("", node)]
        for owner, item in inside:
            if isinstance(item, ast.FunctionDef) and item.name.startswith("test_"):
                found.add(owner + item.name.removeprefix("test_"))
    return found


def test_there_are_forty_three():
    assert sorted(BAD_INPUTS) == list(range(1, 44))


@pytest.mark.parametrize("number", BAD_INPUTS)
def test_what_holds_it_is_there(number):
    entry = BAD_INPUTS[number]
    assert entry.what
    assert entry.does
    named = [(file, name) for file, names in entry.tests.items() for name in names.split()]
    assert named
    assert len(set(named)) == len(named)
    missing = [f"tests/test_{file}.py::{name}" for file, name in named if name not in held_in(file)]
    assert not missing, f"renamed or gone: {missing}; {number} is {entry.what}"


@pytest.mark.parametrize("path", sorted(HERE.glob("test_bad_inputs_*.py")), ids=lambda path: path.stem)
def test_what_was_written_for_it_is_named(path):
    """But for this file, whose tests are about the index itself."""
    file = path.stem.removeprefix("test_")
    if file == "bad_inputs_index":
        return
    named = {name for entry in BAD_INPUTS.values() for name in entry.tests.get(file, "").split()}
    assert sorted(held_in(file) - named) == []
