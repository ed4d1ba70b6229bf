"""The command line: exit codes, files, and the demo from end to end at a small size."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


@pytest.mark.parametrize(
    "words",
    [(), ("no-such-command",), ("demo", "--steps", "many"), ("demo", "--samples", "0"), ("env", "--no-such-flag")],
)
def test_wrong_usage_exits_with_two_and_no_traceback(words):
    found = run(*words)
    assert found.returncode == 2
    assert "usage:" in found.stderr
    assert "Traceback" not in found.stderr


HEAVY = ("torch", "transformers", "numpy", "huggingface_hub", "datasets", "matplotlib", "yaml")


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_loads_nothing_heavy(command):
    words = [*([command] if command else []), "--help"]
    code = f"""
import contextlib, sys
from hf_adaptive_decode.cli.main import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(sys.stderr):
    main({words!r})
print([name for name in {HEAVY!r} if name in sys.modules])"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert "usage:" in found.stderr


# --- env --------------------------------------------------------------------------------------------------------------


def test_env_prints_what_a_bug_report_needs_as_text_and_as_json(capsys):
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert f"hf_adaptive_decode: {__version__}" in printed
    assert main(["env", "--json", "-"]) == 0
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert facts["hf_adaptive_decode"] == __version__
    assert facts["torch"] == torch.__version__
    wanted = (
        "python platform cores transformers accelerate safetensors huggingface-hub datasets trl peft commit cpu gpus"
    )
    assert set(wanted.split()) <= set(facts)
    assert facts["torch threads"].startswith(f"{torch.get_num_threads()}, ")
    assert facts["HF_HUB_OFFLINE"] == "1"
    assert facts["code sandbox"].partition(":")[0] in ("bubblewrap", "unshare", "none")
    assert [f"{name}: {value}" for name, value in facts.items()] == said.err.splitlines() == printed.splitlines()


def test_env_tells_neither_tokens_nor_passwords_nor_whose_home_it_is(tmp_path):
    home = tmp_path / "somebody"
    secrets = {"HF_TOKEN": "hf_secret", "HF_ENDPOINT": "https://me:hunter2@hub.example/mirror"}
    folders = {"HOME": str(home), "HF_HOME": str(home / "models")}
    found = subprocess.run(
        [sys.executable, "-m", "hf_adaptive_decode.cli.main", "env"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **secrets, **folders},
    ).stdout
    for word in ("hf_secret", "hunter2", "somebody"):
        assert word not in found
    for line in ("HF_HOME: ~/models", "HF_ENDPOINT: https://hub.example/mirror", "logged in: yes"):
        assert line in found.splitlines()


def test_env_says_what_is_broken_and_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: 1 / 0)
    assert main(["env", "--json", "-"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["accelerators"] == "cannot be told: ZeroDivisionError: division by zero"
    assert "code sandbox" in facts


def test_env_names_each_kind_of_gpu_once(monkeypatch, capsys):
    names = ["H200", "H200", "L4"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: names[index])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=141 * 2**30))
    assert main(["env", "--json", "-"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["gpus"], facts["gpu memory"]) == ("2 x H200, 1 x L4", "141 GiB")


# --- configuration, and results as JSON -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["select-actions", "--problems", "2", "--samples", "1", "--grid", "small", "--k", "1", "--token-budget", "4"],
        ["trace", "--versus", "greedy", "--token-budget", "4"],
        ["evaluate", "--validation-problems", "2", "--test-problems", "2", "--samples", "1", "--token-budget", "4"],
    ],
    ids=lambda words: words[0],
)
def test_nothing_but_json_goes_to_standard_output(tmp_path, monkeypatch, capfd, words):
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--json", "-"]) == 0
    said = capfd.readouterr()
    assert json.loads(said.out)
    assert "ritten" in said.err or "trace-0.html" in said.err


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
    words = ["demo", "--output", str(tmp_path / "out"), "--json", "-", "--steps", "6"]
    assert main([*words, *sizes, "--threads", "1"]) == 0
    said = capsys.readouterr()
    result, printed = json.loads(said.out), said.err
    for row in ("learned heads", "greedy", "default sampling", "MeanShift", "best static", "shuffled", "oracle"):
        assert row in printed
    assert "8 problems are too few to tell" in printed
    assert re.search(r"<eos>|\d +\d\.\d\d +\d\.\d\d", printed)
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
