"""The document on scale: its tables are the script's, the script's models are transformers', and its sentences hold."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_adaptive_decode import AutoDecoConfig
from hf_adaptive_decode.evaluation.baselines import STATIC_GRID
from hf_adaptive_decode.policies import build_policy

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import scaling
from scaling_formulas import H100, MODELS, STATICS, Assumed, Replica, Training, decision_bytes, smallest

DOCUMENT = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
TABLES = scaling.tables(Assumed())


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_the_document_is_the_scripts(name):
    assert f"\n\n{TABLES[name]}\n\n" in DOCUMENT, "paste what `python examples/scaling.py` prints"


def test_the_document_has_no_other_tables_and_stays_short():
    assert len(re.findall(r"^\| -", DOCUMENT, flags=re.MULTILINE)) == len(TABLES)
    assert len(DOCUMENT.splitlines()) < 200
    assert "Nothing on this page was run on such hardware" in DOCUMENT
    assert "(docs/scaling.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_a_models_parameters_are_those_that_transformers_builds(model):
    shape = {
        "hidden_size": model.hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab,
        "tie_word_embeddings": model.tied,
    }
    if model.experts > 1:
        shape |= {"num_experts": model.experts, "num_experts_per_tok": model.active_experts}
        config = AutoConfig.for_model("qwen3_moe", moe_intermediate_size=model.ffn, **shape)
    else:
        config = AutoConfig.for_model("qwen3", intermediate_size=model.ffn, **shape)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in built.parameters()) == replace(model, layers=2).parameters
    policy = build_policy(AutoDecoConfig(policy="heads", hidden_size=model.hidden))
    assert sum(weight.numel() for weight in policy.parameters()) == model.heads_parameters


def test_the_models_have_the_sizes_in_their_names():
    for name, model in MODELS.items():
        assert model.parameters / 1e9 == pytest.approx(float(name.removesuffix("B")), rel=0.02)
    assert MODELS["30B"].active / 1e9 == pytest.approx(3, rel=0.05)
    assert MODELS["235B"].active / 1e9 == pytest.approx(22, rel=0.05)


def test_a_step_of_one_row_and_of_all_experts_by_hand():
    dense, moe = MODELS["4B"], MODELS["30B"]
    # 36 layers, 8 heads for keys and 8 for values of 128 numbers, 2 bytes each.
    assert dense.kv_token == 36 * (8 + 8) * 128 * 2
    assert dense.read(1) == dense.read(1000) == dense.active
    assert moe.read(1) == pytest.approx(moe.active)
    assert moe.read(1e4) == pytest.approx(moe.parameters - moe.output - moe.hidden)
    alone = Replica(dense, H100, 1, Assumed())
    read = 2 * dense.active + 2560 * dense.kv_token
    assert alone.step(1, 2560) == pytest.approx(read / (0.6 * 3.35e12))
    # With enough rows and no context, computing takes longer than reading.
    assert alone.step(4096, 0) == pytest.approx(4096 * 2 * dense.active / (0.4 * 989e12))


def test_what_the_document_says_in_words_holds():
    a = Assumed()
    for model in MODELS.values():
        one = Training(model, a)
        assert one.gather(H100.nvlink) < one.compute(1), "within a node NVLink gathers faster"
        assert (one.hiding_rows > 1) == (model.experts > 1), "across nodes it does not for the MoE models"
        assert one.cached_read < one.step, "reading is faster than computing"
    two_nodes = Training(MODELS["235B"], a, gpus=16)
    assert f"{two_nodes.gather(H100.network):.1f} s, where computing takes {two_nodes.step:.2f} s" in DOCUMENT
    assert two_nodes.hiding_rows > 32 / 16, "a step waits for the network"
    assert Training(MODELS["235B"], a).memory / 80e9 > 0.88, "takes all that there is"
    assert 61 < 2 * MODELS["30B"].parameters / 1e9 < 62
    assert Replica(MODELS["235B"], H100, 8, a).rows(32_768) < 24, "a few dozen rows no longer fit"
    assert Replica(MODELS["235B"], H100, 8, a).kv_token == 2 * MODELS["235B"].kv_token
    for replica in smallest(a):
        carried = 96 * 8 * 4096 * 0.25 * decision_bytes(replica.model) / (H100.network * 0.7)
        assert carried < 0.01 * 96 * 8 * replica.rollout, "a fraction of the rollouts' time"
    assert len(STATIC_GRID) == STATICS
    assert f"= {scaling.evaluation_completions():,}" in DOCUMENT


def test_the_one_measured_number_is_the_benchmarks():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if "training step / frozen forward" in line)
    assert f"took {line.split('|')[2].split()[0]} times its forward pass" in DOCUMENT


def test_an_assumption_can_be_replaced():
    command = [sys.executable, str(ROOT / "examples" / "scaling.py"), "--price", "6"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    doubled = scaling.tables(Assumed(price=6.0))
    assert all(table in printed for table in doubled.values())
    assert doubled["recipe"] != TABLES["recipe"]
    assert doubled["heads"] == TABLES["heads"]
