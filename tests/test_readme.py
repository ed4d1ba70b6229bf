"""Every Python block of the README runs, in order, in one session; the commands it names exist."""

import json
import re
import sys
from pathlib import Path

import pytest
import readme_tables

from hf_adaptive_decode.cli.main import COMMANDS
from hf_adaptive_decode.evaluation import Evaluation

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import report

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 7
    session = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README block {number}", "exec"), session)
    assert (tmp_path / "my-adapter" / "model.safetensors").exists()


def test_the_commands_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"`?\bmake ([a-z]+)\b", README)) - {"adapting"}
    assert named <= targets
    assert set(re.findall(r"hf-adaptive-decode ([a-z-]+)", README)) <= set(COMMANDS)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_the_files_that_the_readme_links_to_exist(link):
    assert (ROOT / link).exists()


def test_the_demos_table_is_the_one_in_its_results():
    found = Evaluation.load(ROOT / "examples" / "results" / "demo.jsonl")
    assert found.table() in README
    assert all(f"> {line['sentence']}" in README for line in found.verdicts)


@pytest.mark.parametrize(
    "table",
    [
        readme_tables.token_policy,
        lambda: readme_tables.against_statics("one_policy"),
        lambda: readme_tables.cells_of("one_policy"),
        lambda: readme_tables.against_statics("sequence"),
        readme_tables.small_budgets,
    ],
    ids=["token", "one policy", "its cells", "sequence", "small budgets"],
)
def test_the_policies_tables_are_those_of_their_results(table):
    assert table() in README


def test_what_commands_do_is_what_was_measured():
    assert readme_tables.commands() in README
    rates = readme_tables.pass_rates()
    before, plain, after = (rates[stage] for stage in rates)
    shown = [after["none"], before["none"], plain["none"], before["low"], after["low"], before["high"], after["high"]]
    section = README.partition("**Commands in words.**")[2]
    assert all(f"{rate:.1f}" in section for rate in shown)


def test_the_ratios_are_the_ones_in_the_benchmarks_results():
    table = report.readme_table(report.load(ROOT / "benchmarks" / "results"))
    assert "decoding, 0.6B shape" in table
    assert table in README


def test_the_likelihoods_are_the_ones_in_the_examples_results():
    rows = json.loads((ROOT / "examples" / "results" / "gsm8k_text.json").read_text(encoding="utf-8"))["rows"]
    assert all(f"| {row['nll']:.4f} |" in README for row in rows)
