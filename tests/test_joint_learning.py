"""Heads and a LoRA of the base learn more together than either does alone, and their folder loads anywhere."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_training import arguments
from tiny_lora import heads_of, lora_of, rest_of, same

from hf_adaptive_decode import AutoDecoTrainer
from hf_adaptive_decode.testbed import load_base_model, load_tokenizer
from hf_adaptive_decode.testbed.corpus import AuthorSettings, generate_corpus

peft = pytest.importorskip("peft")

CAREFUL = AuthorSettings(
    shares={"calc": 0.5, "run": 0.3, "sign": 0.2},
    calc_bare=0.0,
    slips=dict.fromkeys(("calc", "run", "coin", "sign"), 0.0),
)


def careful_rows(seed, count):
    """
    Documents of an author whom the base does not know: one who never slips, and closes with `see` instead of `so`.

    Only the LoRA can learn the new word; not to slip is what heads do best, by decoding calculations coldly.
    """
    rows = []
    for problem, tokens in itertools.islice(generate_corpus(seed, lambda prompt: True, CAREFUL), count):
        text = " ".join(token.text for token in tokens[:-1]).replace(" so ", " see ")
        rows.append({"prompt": problem.prompt, "completion": f" {text}"})
    return rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Held-out losses after the same training of the heads, of the LoRA and of both; and the last one's trainer."""
    losses, trainers = {}, {}
    rates = {"nothing": (0.0, 0.0), "heads": (1e-3, 0.0), "lora": (0.0, 4e-3), "both": (1e-3, 4e-3)}
    rows, held_out = careful_rows(1, 800), careful_rows(2, 80)
    for name, (rate, lora_rate) in rates.items():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "o_proj", "down_proj"])
        settings = arguments(
            tmp_path_factory.mktemp(name),
            max_steps=100,
            learning_rate=rate,
            train_peft=lora_rate > 0,
            peft_learning_rate=lora_rate or None,
            dft_weight="off",
            easy_token_mask_ratio=0.0,
            save_strategy="no",
        )
        trainer = AutoDecoTrainer(
            peft.get_peft_model(load_base_model(), config),
            settings,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=load_tokenizer(),
        )
        if name != "nothing":
            trainer.train()
        losses[name], trainers[name] = trainer.evaluate()["eval_loss"], trainer
    return losses, trainers["both"], trainers["nothing"].model


def test_both_together_are_better_on_held_out_text_than_either_alone(trained):
    losses, _, _ = trained
    assert losses["heads"] < 0.8 * losses["nothing"]
    assert losses["lora"] < 0.8 * losses["nothing"]
    # 0.61 to 0.69 of the better one with three seeds.
    assert losses["both"] < 0.85 * min(losses["heads"], losses["lora"])


def test_the_base_is_bit_for_bit_what_it_was_and_both_have_moved(trained):
    _, trainer, untouched = trained
    assert same(rest_of(trainer.model), rest_of(untouched))
    pristine = load_base_model().state_dict()
    kept = {name.replace(".base_layer", ""): tensor for name, tensor in rest_of(trainer.model).items()}
    assert same(kept, pristine)
    for found, before in (
        (lora_of(trainer.model), lora_of(untouched)),
        (heads_of(trainer.model), heads_of(untouched)),
    ):
        assert all(not torch.equal(tensor, before[name]) for name, tensor in found.items())


IN_A_FRESH_PROCESS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
import hf_adaptive_decode
from hf_adaptive_decode.testbed import load_tokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
inputs = load_tokenizer()("calc 42 - 10 + 3 - 7 =>", return_tensors="pt")
torch.manual_seed(0)
out = model.generate(**inputs, budget=24, return_dict_in_generate=True, output_decoding_trace=True)
print(json.dumps({"tokens": out.sequences.tolist(), "temperature": out.decoding_trace.temperature.tolist()}))
"""


def test_the_folder_holds_both_and_loads_in_a_fresh_process(trained, tmp_path):
    _, trainer, _ = trained
    trainer.save_model(str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert "the base's LoRA learned together with the heads" in card
    inputs = load_tokenizer()("calc 42 - 10 + 3 - 7 =>", return_tensors="pt")
    trainer.model.eval()
    torch.manual_seed(0)
    expected = trainer.model.generate(**inputs, budget=24, return_dict_in_generate=True, output_decoding_trace=True)
    code = [sys.executable, "-W", "ignore", "-c", IN_A_FRESH_PROCESS, str(tmp_path)]
    done = subprocess.run(code, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens"] == expected.sequences.tolist()
    temperature = torch.tensor(found["temperature"])
    torch.testing.assert_close(temperature, expected.decoding_trace.temperature, equal_nan=True)
