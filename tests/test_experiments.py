"""The experiments run, and what RESULTS.md says of them is what their lines say."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "experiments"
RESULTS = FOLDER / "RESULTS.md"
SHARED = {"lab", "run_all", "adaptive_sequence"}
INTERVAL = re.compile(r"([+-]?\d+\.\d) \[([+-]?\d+\.\d), ([+-]?\d+\.\d)\]")


@pytest.fixture(scope="module")
def names():
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("run_all").NAMES
    finally:
        sys.path.remove(str(FOLDER))


def sections():
    """Each section's text by the name of its experiment."""
    text = RESULTS.read_text(encoding="utf-8")
    parts = text.split("\n## ")[1:]
    return {re.search(r"\(results/(\w+)\.jsonl\)", part)[1]: part for part in parts}


def intervals(value):
    """All intervals in a JSON value, as they are printed."""
    if isinstance(value, dict):
        if {"mean", "low", "high"} <= set(value):
            for sign in ("", "+"):
                yield tuple(f"{100 * value[name]:{sign}.1f}" for name in ("mean", "low", "high"))
                yield tuple(f"{value[name]:{sign}.1f}" for name in ("mean", "low", "high"))
        for inner in value.values():
            yield from intervals(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from intervals(inner)


def test_the_driver_runs_every_script(names):
    scripts = {path.stem for path in FOLDER.glob("*.py")} - SHARED
    assert set(names) == scripts


def test_every_script_says_what_it_is_an_experiment_on(names):
    for name in names:
        experiment = importlib.import_module(name).EXPERIMENT
        assert experiment.name == name
        assert experiment.what.startswith(("AutoDeco, ", "Adaptive Decoding, "))
        assert experiment.paper


def test_all_of_them_have_a_section_in_the_results(names):
    assert set(sections()) == set(names)


@pytest.mark.parametrize("name", sorted(sections()) if RESULTS.exists() else [])
def test_every_interval_in_the_results_stands_in_a_line(name):
    lines = [json.loads(line) for line in (FOLDER / "results" / f"{name}.jsonl").read_text().splitlines()]
    known = set(intervals(lines))
    shown = set(INTERVAL.findall(sections()[name].partition("**Ours**")[2]))
    assert shown <= known
    for picture in re.findall(r"\((pictures/[^)]+)\)", sections()[name]):
        assert (FOLDER / picture).read_bytes().startswith(b"\x89PNG")


def test_an_experiment_runs_from_its_own_script(tmp_path):
    sizes = {"validation": 4, "test": 8, "samples": 2, "heads-problems": 24, "heads-steps": 3, "token-budget": 24}
    words = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, str(FOLDER / "autodeco_table1.py"), "--output", str(tmp_path), *words]
    # Also where the package is not installed.
    env = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "## AutoDeco, Table 1" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "results" / "autodeco_table1.jsonl").read_text().splitlines()]
    assert lines[0]["kind"] == "provenance"
    assert {"adapter", "greedy", "default"} <= {line.get("role") for line in lines}
    assert set(INTERVAL.findall(done.stdout)) <= set(intervals(lines))
