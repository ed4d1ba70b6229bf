"""The command line: exit codes, files, and the demo from end to end at a small size."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM, __version__
from hf_adaptive_decode.cli.evaluate import _write_statics
from hf_adaptive_decode.cli.main import COMMANDS, main
from hf_adaptive_decode.testbed import load_base_model


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
    for row in ("learned heads", "greedy", "default sampling", "MeanShift", "best static", "shuffled", "oracle"):
        assert row in printed
    assert "8 problems are too few to tell" in printed
    assert re.search(r"<eos>|\d +\d\.\d\d +\d\.\d\d", printed)
    result = json.loads((tmp_path / "demo.json").read_text())
    own = next(line for line in result["lines"] if line["kind"] == "measure")
    assert own["problems"] == 8
    assert {"pass@1", "pass@2"} <= set(own)
    assert result["environment"]["hf_adaptive_decode"] == __version__
    AutoDecoForCausalLM.from_pretrained(tmp_path / "out" / "adapter")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"trace.html", "gains.png", "generation.png", "training.png", "adapter", "evaluation"} <= names
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert "8 problems are too few to tell" in card


def evaluated(tmp_path, *words):
    sizes = ["--validation-problems", "4", "--test-problems", "8", "--samples", "2", "--token-budget", "16"]
    command = ["evaluate", "--output", str(tmp_path / "out"), "--threads", "1", *sizes, *words]
    return main([*command, "--json", str(tmp_path / "result.json")])


@pytest.fixture
def adapters(tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        torch.manual_seed(seed)
        model = AutoDecoForCausalLM.from_base(load_base_model(), AutoDecoConfig(policy="heads"))
        model.save_pretrained(tmp_path / name)
    return [str(tmp_path / "one"), str(tmp_path / "two")]


def test_adapters_are_evaluated_with_their_training_seeds_and_rivals(tmp_path, adapters, capsys):
    first, second = adapters
    words = ["--adapter", f"heads={first}", f"--adapter=heads={second}", "--rival", first, "--k", "1", "2"]
    words += ["--static", "T=0.7,top_p=0.9", "--baselines", "greedy", "shuffle", "--update-cards"]
    assert evaluated(tmp_path, *words) == 0
    printed = capsys.readouterr().out
    lines = json.loads((tmp_path / "result.json").read_text())["lines"]
    roles = [line["role"] for line in lines if line["kind"] == "measure"]
    assert {"adapter", "greedy", "default", "mean_shift", "best_static", "shuffle", "static", "rival"} == set(roles)
    own = next(line for line in lines if line["kind"] == "measure")
    assert own["adapter"] == "heads"
    assert len(own["by_training_seed"]["pass@1"]) == 2
    assert "8 problems are too few to tell" in printed
    assert (tmp_path / "out" / "gains.png").exists()
    assert len((tmp_path / "out" / "completions.jsonl").read_text().splitlines()) > 100
    for folder in adapters:
        assert "8 problems are too few to tell" in Path(folder, "README.md").read_text()
        AutoDecoForCausalLM.from_pretrained(folder)


def test_a_base_model_is_evaluated_without_an_adapter_and_several_tasks_and_budgets(tmp_path, capsys):
    words = ["--task", "testbed:calc", "testbed:run", "--baselines", "greedy", "best_static"]
    assert evaluated(tmp_path, *words, "--token-budget", "8", "16") == 0
    printed = capsys.readouterr().out
    for title in ("testbed:calc, 8 tokens", "testbed:run, 16 tokens", "testbed:run, 8 and 16 tokens"):
        assert title in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--baselines", "gredy"], "no baseline 'gredy'"),
        (["--adapter", "heads="], "NAME=FOLDER"),
        (["--adapter", "/nowhere/at/all"], "nowhere"),
        (["--k", "3"], "from 1 to 2"),
        (["--static", "hot"], "is no setting"),
        (["--static", "T=hot"], "has to be a number"),
        (["--task", "nonsense"], "nonsense"),
    ],
)
def test_a_wrong_evaluation_says_what_is_wrong(tmp_path, capsys, words, said):
    assert evaluated(tmp_path, *words) == 1
    assert said in capsys.readouterr().err


def test_a_static_setting_that_does_as_well_is_written_as_a_generation_config(tmp_path):
    line = {"adapter": "a/b", "task": "testbed:coin+sign", "token_budgets": [8, 16], "k": 4}
    verdicts = [{**line, "static": {"temperature": 0.75, "top_p": 0.9}}, {**line, "k": 1, "static": None}]
    base = load_base_model()
    (path,) = _write_statics(verdicts, base, tmp_path)
    assert Path(path).parts[-3:] == ("a-b-testbed-coin+sign-8+16-pass4", "static", "generation_config.json")
    config = GenerationConfig.from_pretrained(Path(path).parent)
    assert (config.do_sample, config.temperature, config.top_p, config.top_k) == (True, 0.75, 0.9, 0)
    assert config.eos_token_id == base.generation_config.eos_token_id
