"""Engines in processes of their own: with an adapter's Hub id, as the README starts one, and in the benchmark."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import tiny
from hub_server import Hub, environment
from served import Asked, adapter_folder, base_folder, engine, run

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM
from hf_adaptive_decode.testbed import load_base_model

PROMPT = tiny.prompts(1, 9, seed=3)
CODE = """
import json
from served import Asked, engine, run
llm = engine("me/adapter", revision="v1")
config = llm.llm_engine.vllm_config.model_config
tokens = list(run(llm, [Asked({prompt}, {{"seed": 4}})])[0].outputs[0].token_ids)
print(json.dumps([tokens, config.model, config.revision, config.tokenizer]))
"""


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_hub_id(tmp_path):
    model = AutoDecoForCausalLM.from_pretrained(adapter_folder("heads"), base_folder())
    with Hub() as hub:
        commit = hub.push("me/base", files_in(base_folder()))
        hub.push("me/base", {"config.json": b"a later commit that cannot be read"})
        model.decoding_configs["default"].base_model_name_or_path = "me/base"
        model.decoding_configs["default"].base_model_revision = commit
        model.save_pretrained(tmp_path / "adapter")
        hub.push("me/adapter", files_in(tmp_path / "adapter"), branch="v1")
        mine = environment(tmp_path, HF_ENDPOINT=hub.address, VLLM_CPU_KVCACHE_SPACE="1")
        mine["PYTHONPATH"] = os.pathsep.join([mine["PYTHONPATH"], *sys.path])
        code = CODE.format(prompt=PROMPT[0].tolist())
        done = subprocess.run([sys.executable, "-c", code], env=mine, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    tokens, base, revision, tokenizer = json.loads(done.stdout.splitlines()[-1])
    assert (base, revision, tokenizer) == ("me/base", commit, "me/base")
    # The same seed in this process, from the folder.
    llm = engine(adapter_folder("heads"))
    assert tokens == list(run(llm, [Asked(PROMPT[0].tolist(), {"seed": 4})])[0].outputs[0].token_ids)


def test_the_python_of_the_readme_runs(tmp_path):
    AutoDecoForCausalLM.from_base(load_base_model(), AutoDecoConfig()).save_pretrained(tmp_path / "my-adapter")
    readme = Path(__file__).parents[2] / "README.md"
    (block,) = re.findall(r"```py\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    mine = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    # Compiling for a processor takes minutes.
    command = [sys.executable, "-c", block.replace("max_model_len=128", "max_model_len=128, enforce_eager=True")]
    done = subprocess.run(command, env=mine, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1].strip()


def test_the_benchmark_runs(tmp_path):
    folder = Path(__file__).parents[2] / "benchmarks"
    code = "import json, sys; sys.path.insert(0, sys.argv[1]); import run; print(json.dumps(run.QUICK['serving']))"
    asked = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    command = [sys.executable, str(folder / "serving.py"), "--json", str(tmp_path / "serving.json")]
    done = subprocess.run([*command, *json.loads(asked.stdout)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "serving.json").read_text())
    (cell,) = found["cells"]
    assert {target["ratio"] for target in found["targets"]} <= cell["ratios"].keys()
