"""The command line: exit codes, files, and the demo from end to end at a small size."""

import json
import re
import subprocess
import sys

import pytest

from hf_adaptive_decode import AutoDecoForCausalLM, __version__
from hf_adaptive_decode.cli.main import COMMANDS, main


def run(*words):
    return subprocess.run(
        [sys.executable, "-m", "hf_adaptive_decode.cli.main", *words], capture_output=True, text=True, check=False
    )


def test_help_names_every_command():
    found = run("--help")
    assert found.returncode == 0
    assert all(command in found.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    found = run(command, "--help")
    assert found.returncode == 0
    assert "--config" in found.stdout
    assert "--json" in found.stdout


@pytest.mark.parametrize("words", [(), ("no-such-command",), ("demo", "--steps", "many"), ("env", "--no-such-flag")])
def test_wrong_usage_exits_with_two_and_no_traceback(words):
    found = run(*words)
    assert found.returncode == 2
    assert "usage:" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_users_mistake_exits_with_one_and_no_traceback(tmp_path):
    found = run("demo", "--output", str(tmp_path), "--train-problems", "4", "--samples", "0")
    assert found.returncode == 1
    assert "error:" in found.stderr
    assert "Traceback" not in found.stderr


def test_env_prints_the_versions_as_text_and_as_json(capsys):
    assert main(["env"]) == 0
    assert f"hf_adaptive_decode: {__version__}" in capsys.readouterr().out
    assert main(["env", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["hf_adaptive_decode"] == __version__


def test_a_config_file_sets_what_flags_do_not(tmp_path, capsys):
    config = tmp_path / "env.yaml"
    config.write_text(f"json: {tmp_path / 'from_config.json'}\n")
    assert main(["env", "--config", str(config)]) == 0
    assert (tmp_path / "from_config.json").exists()
    assert main(["env", "--config", str(config), "--json", str(tmp_path / "from_flag.json")]) == 0
    assert (tmp_path / "from_flag.json").exists()
    capsys.readouterr()


@pytest.mark.parametrize("text", ["no_such_option: 1\n", "- a\n- list\n", "a: [unclosed\n", None])
def test_a_bad_config_file_is_wrong_usage(tmp_path, text, capsys):
    config = tmp_path / "bad.yaml"
    if text is not None:
        config.write_text(text)
    with pytest.raises(SystemExit) as caught:
        main(["env", "--config", str(config)])
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_the_demo_trains_compares_saves_and_reloads(tmp_path, capsys):
    sizes = ["--train-problems", "40", "--validation-problems", "8", "--test-problems", "8", "--samples", "2"]
    words = ["demo", "--output", str(tmp_path / "out"), "--json", str(tmp_path / "demo.json"), "--steps", "6"]
    assert main([*words, *sizes, "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    for row in ("learned heads", "greedy", "default sampling", "MeanShift", "chosen on validation", "oracle"):
        assert row in printed
    assert re.search(r"<eos>|\d +\d\.\d\d +\d\.\d\d", printed)
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result["problems"] == 8
    assert {"pass@1", "pass@2"} <= set(result["rows"][0])
    assert result["environment"]["hf_adaptive_decode"] == __version__
    AutoDecoForCausalLM.from_pretrained(tmp_path / "out" / "adapter")
