"""`push` and `--push-to-hub` as one types them, through huggingface_hub's own client, against a small Hub here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hub_server import Hub, environment

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM
from hf_adaptive_decode.testbed import load_base_model, load_tokenizer

TOKEN = "hf_write"


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    AutoDecoForCausalLM.from_base(load_base_model(), AutoDecoConfig(policy="heads")).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def hub():
    with Hub() as running:
        yield running


def run(hub, tmp_path, *words, token=None):
    """The command in a process whose client knows this Hub, since it reads its settings as it is imported."""
    settings = {"HF_ENDPOINT": hub.address, **({"HF_TOKEN": token} if token else {})}
    command = [sys.executable, "-m", "hf_adaptive_decode.cli.main", *map(str, words)]
    env = environment(tmp_path, **settings)
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)


def test_an_adapter_is_uploaded_whole_and_its_address_printed(hub, tmp_path, adapter):
    done = run(hub, tmp_path, "push", adapter, "me/it", "--private", "--commit-message", "first", token=TOKEN)
    assert done.returncode == 0, done.stderr
    repo = hub.repos["me/it"]
    commit = repo.commits[repo.resolve("main")]
    assert done.stdout.strip().endswith(f"/me/it/commit/{commit.id}")
    assert (commit.message, repo.private) == ("first", True)
    there = hub.read("me/it")
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= set(there)
    assert there["model.safetensors"] == (adapter / "model.safetensors").read_bytes()


def test_the_token_comes_from_a_file_and_everything_from_a_config(hub, tmp_path, adapter):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    config = tmp_path / "run.yaml"
    config.write_text(f"push:\n  folder: {adapter}\n  repo_id: me/it\n  revision: try\n  token_file: token\n")
    done = run(hub, tmp_path, "push", "--config", config, "--json", "-")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["repo_id"], result["url"] in done.stderr) == ("me/it", True)
    assert "model.safetensors" in hub.read("me/it", "try")
    assert "model.safetensors" not in hub.read("me/it")
    assert TOKEN not in done.stdout + done.stderr


def test_what_does_not_get_there_says_why_and_how_to_send_it_again(hub, tmp_path, adapter):
    done = run(hub, tmp_path, "push", adapter, "me/it", token="hf_wrong")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("hf-adaptive-decode push: error: ")]
    assert "the Hub does not accept the token (401)" in line
    assert f"hf-adaptive-decode push {adapter} me/it" in line
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_training_ends_with_an_upload_if_asked_to(hub, tmp_path):
    sizes = ["--train-problems", "16", "--steps", "1", "--budget", "16", "--threads", "1"]
    words = ["train-heads", *sizes, "--output", "out", "--push-to-hub", "me/heads", "--json", "result.json"]
    done = run(hub, tmp_path, *words, token=TOKEN)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "result.json").read_text())["url"] == done.stdout.splitlines()[-1]
    there = hub.read("me/heads")
    assert there["model.safetensors"] == (tmp_path / "out" / "adapter" / "model.safetensors").read_bytes()
    assert not [name for name in there if name.endswith((".bin", ".pt"))]


def test_a_policy_goes_there_as_well(hub, tmp_path):
    words = "train-policy --train-problems 4 --steps 1 --prompts-per-step 2 --num-generations 2 --budget 8 --threads 1"
    done = run(hub, tmp_path, *words.split(), "--test-problems", "0", "--push-to-hub", "me/policy", token=TOKEN)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.read("me/policy")
