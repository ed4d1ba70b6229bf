"""Every Python block of the README runs, in order, in one session; the commands it names exist."""

import re
from pathlib import Path

import pytest

from hf_adaptive_decode.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
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


def test_nothing_was_left_to_fill_in():
    assert "<!-- bench -->" not in README
    assert "<!-- text results -->" not in README
