"""A user's mistake is one clear line and an exit code, whatever the command; so are a closed pipe and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM
from hf_adaptive_decode.cli.main import COMMANDS, main
from hf_adaptive_decode.testbed import load_base_model

COMMAND = [sys.executable, "-m", "hf_adaptive_decode.cli.main"]
FEW = {
    "demo": "--train-problems 4 --validation-problems 2 --test-problems 2 --steps 1 --samples 1",
    "sample": "--problems 8 --samples 1 --keep 1",
    "train-heads": "--train-problems 8 --steps 1",
    "train-policy": "--train-problems 4 --steps 1 --prompts-per-step 2 --test-problems 0",
    "select-actions": "--problems 2 --samples 1 --grid small --k 1",
    "evaluate": "--validation-problems 2 --test-problems 2 --samples 1",
    "trace": "--versus greedy --token-budget 4",
}
WITH_DATA = ["sample", "train-heads", "train-policy", "select-actions", "evaluate", "trace"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with everything that can be wrong."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "file").write_text("not a folder")
    (folder / "empty").mkdir()
    (folder / "rows.jsonl").write_text('{"colour": "red"}\n')
    (folder / "broken.jsonl").write_text('{"prompt": "a"\n')
    (folder / "nothing.jsonl").write_text("")
    base = load_base_model()
    base.save_pretrained(folder / "a_base_model")
    model = AutoDecoForCausalLM.from_base(base, AutoDecoConfig(policy="heads"))
    for name in ("adapter", "cut", "garbled", "no_json"):
        model.save_pretrained(folder / name)
    weights = (folder / "adapter" / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(weights[:-100])
    (folder / "garbled" / "model.safetensors").write_bytes(b"x" * len(weights))
    (folder / "no_json" / "config.json").write_text("{")
    (folder / "pickled").mkdir()
    torch.save({}, folder / "pickled" / "pytorch_model.bin")
    return folder


@pytest.fixture
def here(prepared, tmp_path, monkeypatch):
    """A folder to work in, with all of that under its name."""
    for path in prepared.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def failed(capsys, command, *words):
    """The one line of an exit with 1, without what it begins with."""
    code = main([command, *FEW.get(command, "").split(), *words])
    said = capsys.readouterr()
    begin = f"hf-adaptive-decode {command}: error: "
    lines = [line for line in said.err.splitlines() if line.startswith(begin)]
    assert (code, len(lines)) == (1, 1), said
    assert "Traceback" not in said.err
    assert said.err.rstrip().endswith(lines[0])
    return lines[0].removeprefix(begin)


def refused(capsys, command, *words):
    """The last line of an exit with 2."""
    with pytest.raises(SystemExit) as caught:
        main([command, *words])
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert said.startswith("usage: hf-adaptive-decode")
    assert "Traceback" not in said
    return said.splitlines()[-1]


# --- every command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("push", "env", "convert")])
@pytest.mark.parametrize("output", ["file", "file/below"])
def test_an_output_that_cannot_be_written_is_found_out_before_the_work(here, capsys, command, output):
    line = failed(capsys, command, "--output", output)
    assert line.startswith(f"--output {output} cannot be written: ")
    assert line.endswith("file is no folder.")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("path", "said"), [("empty", "is a folder"), ("file/result.json", "is no folder")])
def test_a_result_that_cannot_be_written_is_found_out_before_the_work(here, capsys, command, path, said):
    places = {"push": ["adapter", "me/it"], "convert": ["adapter", "out", "--to", "merged"]}.get(command, [])
    line = failed(capsys, command, *places, "--json", path)
    assert line.startswith(f"--json {path} cannot be written: ")
    assert said in line


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("words", [["--no-such-flag"], ["--json"], ["--config", "missing.yaml"], ["a", "b", "c"]])
def test_wrong_usage_of_any_command(here, capsys, command, words):
    assert refused(capsys, command, *words).startswith(f"hf-adaptive-decode {command}: error: ")


@pytest.mark.parametrize("command", WITH_DATA)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dataset", "missing.jsonl", "--reward", "exact_match"], "--dataset missing.jsonl cannot be read"),
        (["--dataset", "broken.jsonl", "--reward", "exact_match"], "--dataset broken.jsonl cannot be read: line 1"),
        (["--dataset", "nothing.jsonl", "--reward", "exact_match"], "has to hold rows"),
        (["--dataset", "rows.jsonl", "--reward", "exact_match"], "['colour']"),
        (["--dataset", "no/such_data", "--reward", "exact_match"], "--dataset no/such_data cannot be loaded"),
        (["--dataset", "a:b:c:d", "--reward", "exact_match"], "NAME:CONFIG:SPLIT"),
        (["--model", "no/such_model"], "--model no/such_model cannot be loaded"),
        (["--model", "empty"], "--model empty cannot be loaded"),
        (["--model", "file"], "--model file cannot be loaded"),
    ],
)
def test_data_and_models_that_are_not_there(here, capsys, command, words, said):
    assert said in failed(capsys, command, *words)


@pytest.mark.parametrize("command", WITH_DATA)
@pytest.mark.parametrize(
    "words", [["--threads", "0"], ["--threads", "two"], ["--seed", "1.5"], ["--reward", "applause"], ["--dataset"]]
)
def test_bad_numbers_and_names(here, capsys, command, words):
    assert words[0] in refused(capsys, command, *words)


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["evaluate", "trace", "push"])
@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("missing_folder", "missing_folder"),
        ("empty", "config.json and model.safetensors missing"),
        ("a_base_model", "a_base_model"),
        ("pickled", "pickles and never loaded"),
        ("no_json", "is no valid JSON"),
        ("cut", "cut"),
        ("garbled", "garbled"),
        ("file", "file"),
    ],
)
def test_a_folder_that_is_no_adapter(here, capsys, command, folder, said):
    places = {"push": [folder, "me/it"]}.get(command, ["--adapter", folder])
    assert said in failed(capsys, command, *places)


# --- each command's own -----------------------------------------------------------------------------------------------

OWN = [
    ("demo", ["--easy-token-mask-ratio", "2"], "easy_token_mask_ratio"),
    ("evaluate", ["--k", "5"], "from 1 to 1"),
    ("evaluate", ["--task", "gsm8k=missing.jsonl"], "missing.jsonl"),
    ("evaluate", ["--task", "gsm8k="], "has no path"),
    ("evaluate", ["--reward", "math"], "--reward is for --dataset"),
    ("evaluate", ["--adapter", "=adapter"], "NAME=FOLDER"),
    ("evaluate", ["--engine-options", '{"pages": 3}'], "'transformers' has no option 'pages'"),
    ("sample", ["--reward", "math"], "--reward is for --dataset"),
    ("sample", ["--task", "gsm8k="], "has no path"),
    ("sample", ["--task", "applause"], "there is no task 'applause'"),
    ("sample", ["--problems", "999999"], "has only about"),
    ("sample", ["--chat"], "--task testbed: --chat asks through a chat template"),
    ("sample", ["--token-budget", "1"], "none of 8 problems has a completion to keep within 1 tokens"),
    ("trace", ["--adapter", "adapter", "--versus", "T=hot"], "has to be a number"),
    ("trace", ["--chat", "--prompt", "a"], "--chat needs a chat template"),
    ("trace", ["--problem", "5000"], "has only about"),
    ("select-actions", ["--k", "999"], "--k is 999"),
    ("push", ["adapter", "me/it"], "HF_HUB_OFFLINE=1"),
    ("push", ["adapter", "me/it", "--token-file", "missing"], "--token-file missing cannot be read: No such file"),
    ("push", ["adapter", "me/it", "--token-file", "file"], "--token-file file has to hold one token"),
    ("push", ["adapter", "me/it", "--token-file", "adapter/model.safetensors"], "it is no text"),
    ("convert", ["missing_folder", "out", "--to", "merged"], "missing_folder"),
    ("convert", ["adapter", "file", "--to", "merged"], "file"),
]


@pytest.mark.parametrize(("command", "words", "said"), OWN, ids=[" ".join([one[0], *one[1]]) for one in OWN])
def test_a_mistake_of_one_command(here, capsys, command, words, said):
    assert said in failed(capsys, command, *words)


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("demo", ["--samples", "0"], "--samples"),
        ("evaluate", ["--engine", "vlm"], "--engine"),
        ("evaluate", ["--engine-options", "[1]"], "has to be an object"),
        ("evaluate", ["--engine-options", "{"], "is no JSON"),
        ("demo", ["--dft-weight", "much"], "--dft-weight"),
        ("sample", ["--keep", "5"], "--keep is 5, and no problem has more than 4 completions"),
        ("sample", ["--sampling", "greedy", "--keep", "2"], "--keep is 2, and no problem has more than 1"),
        ("sample", ["--sampling", "T=hot"], "has to be a number"),
        ("sample", ["--sampling", "T=-1"], "temperature"),
        ("sample", ["--sampling", "adapter"], "is no setting"),
        ("sample", ["--solve-rate", "0.5"], "--solve-rate"),
        ("sample", ["--solve-rate", "0", "2"], "no number from 0 to 1"),
        ("sample", ["--solve-rate", "0.9", "0.1"], "nothing would be kept"),
        ("sample", ["--task", "math"], "is a benchmark, of which nothing is there to train on"),
        ("sample", ["--task", "testbed", "gsm8k"], "testbed and gsm8k have different rewards, testbed and math"),
        ("trace", ["--prompt", "a", "--problem", "1"], "not allowed with"),
        ("trace", ["--problem", "-1"], "--problem"),
        ("select-actions", ["--grid", "huge"], "--grid"),
        ("select-actions", ["--pool", "a", "--grid", "small"], "not allowed with"),
        ("push", [], "folder, REPO_ID"),
        ("push", ["adapter"], "REPO_ID"),
        ("push", ["adapter", "a/b/c"], "no REPO_ID"),
        ("push", ["adapter", "two words"], "no REPO_ID"),
        ("push", ["adapter", "me/it", "--token", "hf_secret"], "unrecognized arguments"),
        ("convert", ["a", "b"], "--to"),
    ],
)
def test_wrong_usage_of_one_command(here, capsys, command, words, said):
    assert said in refused(capsys, command, *words)


def test_a_refused_token_is_not_repeated(here, capsys):
    (here / "token").write_text("hf_secret and more\n")
    assert "hf_secret" not in failed(capsys, "push", "adapter", "me/it", "--token-file", "token")


def test_a_bug_is_no_users_mistake(monkeypatch):
    """What nobody foresaw keeps its traceback."""
    from hf_adaptive_decode.cli import env

    monkeypatch.setattr(env, "environment", lambda: [] + {})
    with pytest.raises(TypeError):
        main(["env"])


# --- signals ----------------------------------------------------------------------------------------------------------


def test_a_reader_that_leaves_is_no_traceback():
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([*COMMAND, "env"], stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_reader_of_help_that_leaves_is_no_traceback():
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([*COMMAND, "--help"], stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    # argparse itself lets it pass where nothing is buffered.
    assert done.returncode in (0, 1)
    assert done.stderr == ""


def test_ctrl_c_ends_a_command_in_a_line(tmp_path):
    words = ["train-heads", "--output", str(tmp_path / "out"), "--threads", "1", "--json", "-"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def listen():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores it

    with subprocess.Popen([*COMMAND, *words], **pipes, preexec_fn=listen) as process:
        seen = ""
        # The first bar is that of the sampling: everything is loaded, and there is much left to do.
        while "solutions at" not in seen:
            seen += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert err.splitlines()[-1].endswith("interrupted")
    assert "Traceback" not in err


def test_what_json_has_no_word_for_is_null(tmp_path, monkeypatch):
    from hf_adaptive_decode.cli import env

    monkeypatch.setattr(env, "run", lambda args: {"a": [float("nan"), (float("inf"), 1.5)], "b": {"c": -float("inf")}})
    assert main(["env", "--json", str(tmp_path / "new" / "folder" / "result.json")]) == 0
    found = json.loads((tmp_path / "new" / "folder" / "result.json").read_text(), parse_constant=pytest.fail)
    assert found == {"a": [None, [None, 1.5]], "b": {"c": None}}
