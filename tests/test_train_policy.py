"""The command that trains action policies, its config files, and the examples that do the same by hand."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import readme_tables
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hf_adaptive_decode import AutoDecoForCausalLM, REINFORCEDecodingTrainer
from hf_adaptive_decode.actions import ACTION_PRESETS
from hf_adaptive_decode.cli import policy_run
from hf_adaptive_decode.cli.main import main, parse
from hf_adaptive_decode.cli.train_policy import _actions
from hf_adaptive_decode.evaluation import Evaluation
from hf_adaptive_decode.testbed import load_tokenizer

ROOT = Path(__file__).parents[1]
CONFIGS = [path for path in sorted((ROOT / "examples" / "configs").glob("*.yaml")) if not path.stem.endswith("_heads")]
SIZES = {
    "train-problems": 16,
    "steps": 4,
    "prompts-per-step": 8,
    "num-generations": 4,
    "budget": 16,
    "validation-problems": 4,
    "test-problems": 0,
    "eval-samples": 2,
    "save-steps": 2,
    "threads": 1,
    # The hottest and the coldest: on the testbed a few prompts of each batch then differ in reward.
    "actions": (0, 1),
}


def words(folder, *extra, **changes):
    sizes = SIZES | {name.replace("_", "-"): value for name, value in changes.items()}
    parts = [[f"--{name}", *(value if isinstance(value, tuple) else (value,))] for name, value in sizes.items()]
    return ["train-policy", "--output", str(folder), *(str(part) for group in parts for part in group), *extra]


def train(folder, *extra, **changes):
    """The JSON result."""
    path = folder.parent / f"{folder.name}.json"
    assert main([*words(folder, *extra, **changes), "--json", str(path)]) == 0
    return json.loads(path.read_text())


def weights(folder):
    return load_file(folder / "adapter" / "model.safetensors")


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def generates(folder):
    model, tokenizer = AutoDecoForCausalLM.from_pretrained(folder / "adapter"), load_tokenizer()
    inputs = tokenizer("run 42 - 10 + 3 =>", return_tensors="pt")
    return model.generate(**inputs, budget=8).shape[1] > inputs["input_ids"].shape[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished token policy: its folder and result."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    result = train(folder)
    # It has learned: output layers start at zero.
    assert weights(folder)["layers.2.weight"].abs().sum() > 0
    return folder, result


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_token_policy_from_end_to_end(tmp_path, capsys):
    result = train(
        tmp_path / "out", "--told", "tokens", "samples", test_problems=4, budget=(8, 16), actions=(0, 1, 2.5)
    )
    printed = capsys.readouterr().out
    found = Evaluation(result["lines"])
    assert {line["token_budget"] for line in found.measures} == {8, 16, None}
    assert found.measures[0]["decoder"] == "learned token policy"
    assert {"greedy", "default", "mean_shift", "best_static", "mixture", "masked_static"} < {
        line["role"] for line in found.measures
    }
    # The answers of the testbed can be read, and one of one is no vote.
    assert found.find("adapter")["task"] == "testbed"
    assert not any(name.startswith("maj@") for name in found.find("adapter"))
    assert result["actions"] == [{"temperature": t} for t in (0.0, 1.0, 2.5)]
    assert result["arguments"]["steps"] == 4
    assert "torch" in result["environment"]
    assert any("reward" in entry for entry in result["training"]["learned token policy"])
    assert found.table() in printed
    assert found.summary() in printed
    assert Evaluation.load(tmp_path / "out" / "evaluation" / "results.jsonl").lines == found.lines
    assert f"AutoDecoForCausalLM.from_pretrained('{tmp_path / 'out' / 'adapter'}')" in printed
    config = AutoDecoForCausalLM.from_pretrained(tmp_path / "out" / "adapter").decoding_config
    assert (config.budget_features, config.max_token_budget, config.max_prob_mask) == (["tokens", "samples"], 16, 0.95)
    assert generates(tmp_path / "out")
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert "16 problems of testbed" in card
    assert "4 problems are too few to tell" in card
    assert not (tmp_path / "out" / "adapter" / "training_args.bin").exists()


def test_a_prompt_policy_with_its_twin_and_nothing_but_json_on_standard_output(tmp_path, capsys):
    actions = tmp_path / "actions.json"
    actions.write_text(json.dumps([{"temperature": 0.5}, {"temperature": 1.0, "top_p": 0.8}]))
    changes = {"parallel_budget": (2, 1), "reward_aggregation": "pass@B", "test_problems": 4, "actions": str(actions)}
    extra = ["--policy", "sequence_actions", "--pooling", "mean", "--twin", "--deterministic", "--json", "-"]
    assert main(words(tmp_path / "out", *extra, **changes)) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    found = Evaluation(result["lines"])
    assert found.find("adapter")["decoder"] == "learned prompt policy"
    assert found.find("rival")["decoder"] == "its twin, not told the budget"
    assert {"pass@1", "pass@2", "maj@2"} < set(found.find("adapter"))
    assert [line["k"] for line in found.verdicts] == [1, 2]
    assert "its twin, not told the budget" in said.err
    configs = [
        AutoDecoForCausalLM.from_pretrained(tmp_path / "out" / part / "adapter").decoding_config
        for part in ("", "twin")
    ]
    assert [config.budget_features for config in configs] == [["samples"], []]
    assert [config.max_prob_mask for config in configs] == [None, None]
    assert all(config.deterministic and config.pooling == "mean" for config in configs)
    # It learned while it was drawn from, and decides for good afterwards.
    assert weights(tmp_path / "out")["layers.2.weight"].abs().sum() > 0
    assert generates(tmp_path / "out")
    assert generates(tmp_path / "out" / "twin")


def test_a_finished_run_is_not_trained_again(trained, monkeypatch):
    folder, result = trained
    before = weights(folder)
    monkeypatch.setattr(REINFORCEDecodingTrainer, "train", lambda *_, **__: pytest.fail("it was trained again"))
    again = train(folder, save_steps=0, test_problems=2)
    assert equal(weights(folder), before)
    assert again["training"] == result["training"]
    assert result["lines"] == []
    assert Evaluation(again["lines"]).find("adapter")["problems"] == 2


def test_what_has_been_measured_is_not_sampled_again(tmp_path):
    out = tmp_path / "out"
    first = train(out, steps=1, test_problems=2)
    completions = out / "evaluation" / "completions.jsonl"
    size = completions.stat().st_size
    # The policy comes from its folder now, and is the same.
    second = train(out, steps=1, test_problems=2)
    assert second["lines"][1:] == first["lines"][1:]
    assert completions.stat().st_size == size


@pytest.mark.parametrize("left", [[], [2], [2, 4]])
def test_a_killed_run_goes_on_from_its_last_checkpoint_and_ends_the_same(trained, tmp_path, left, monkeypatch):
    folder, _ = trained
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    shutil.rmtree(out / "adapter")
    for step in {2, 4} - set(left):
        shutil.rmtree(out / "training" / f"checkpoint-{step}")
    record = json.loads((out / "training" / "run.json").read_text())
    (out / "training" / "run.json").write_text(json.dumps({**record, "finished": False}))
    steps = []
    rolled = REINFORCEDecodingTrainer.compute_loss
    monkeypatch.setattr(
        REINFORCEDecodingTrainer,
        "compute_loss",
        lambda self, *args, **kwargs: (steps.append(self.state.global_step), rolled(self, *args, **kwargs))[1],
    )
    train(out)
    assert steps == list(range(max(left, default=0), 4))
    assert equal(weights(out), weights(folder))


def test_other_arguments_are_refused_unless_told_to_start_over(trained, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(trained[0], out)
    assert main(words(out, steps=3, entropy_coef=0.5)) == 1
    said = capsys.readouterr().err
    for part in ("`steps` is 4 there and 3 here", "`entropy_coef` is 0.03 there and 0.5 here", "--no-resume"):
        assert part in said
    assert equal(weights(out), weights(trained[0]))
    train(out, "--no-resume", steps=3, entropy_coef=0.5)
    assert not equal(weights(out), weights(trained[0]))
    left = sorted(path.name for path in (out / "training").glob("checkpoint-*"))
    assert left == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("content", ["", "[]", '{"arguments": 1}', '{"arguments": {}}', None])
def test_a_damaged_record_is_refused(tmp_path, capsys, content):
    (tmp_path / "out" / "training" / "checkpoint-2").mkdir(parents=True)
    if content is not None:
        (tmp_path / "out" / "training" / "run.json").write_text(content)
    assert main(words(tmp_path / "out")) == 1
    assert "--no-resume" in capsys.readouterr().err


def test_changed_training_problems_are_other_arguments(tmp_path):
    first = policy_run.RunFolder(tmp_path, {"problems": "a"}, resume=True)
    assert first.begin() is None
    with pytest.raises(ValueError, match="`problems` is 'a' there and 'b' here"):
        policy_run.RunFolder(tmp_path, {"problems": "b"}, resume=True)


# --- the prior --------------------------------------------------------------------------------------------------------


def test_the_prior_starts_at_each_budgets_best_static(tmp_path):
    changes = {"parallel_budget": (1, 2), "reward_aggregation": "pass@B", "steps": 1, "actions": (0, 3)}
    result = train(tmp_path / "out", "--policy", "sequence_actions", "--prior", "0.9", "--twin", **changes)
    config = AutoDecoForCausalLM.from_pretrained(tmp_path / "out" / "adapter").decoding_config
    # At temperature 3 the testbed's model writes nonsense.
    expected = [{"samples": b, "probabilities": pytest.approx([0.9, 0.1])} for b in (1, 2)]
    assert config.action_prior == expected
    assert result["priors"] == {"learned prompt policy": expected, "its twin, not told the budget": expected[:1]}
    assert main(words(tmp_path / "out", "--policy", "sequence_actions", "--twin", "--prior", "0.8", **changes)) == 1


def test_each_budget_has_its_own_favourite_unless_the_policy_is_not_told():
    rates = torch.tensor([[0.5, 0.4, 0.0], [0.5, 0.9, 0.0]]).numpy()
    entries = policy_run.prior_entries(rates, [1, 4], 0.8, told_samples=True)
    assert [entry["samples"] for entry in entries] == [1, 4]
    assert entries[0]["probabilities"] == pytest.approx([0.8, 0.1, 0.1])
    assert entries[1]["probabilities"] == pytest.approx([0.1, 0.8, 0.1])
    (single,) = policy_run.prior_entries(rates, [1, 4], 0.8, told_samples=False)
    assert single["probabilities"] == pytest.approx([0.1, 0.8, 0.1])


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--actions", "no_preset"], "--actions is no_preset"),
        (["--actions", "missing.json"], "missing.json cannot be read"),
        (["--actions", "3", "-1"], "`temperature`"),
        (["--told", "none", "tokens"], "`none` stands alone"),
        (["--told", "none", "--twin"], "--twin"),
        (["--prior", "1.5"], "--prior is 1.5"),
        (["--test-problems", "4", "--parallel-budget", "4", "1"], "--eval-samples is 2"),
        (["--parallel-budget", "8", "--reward-aggregation", "pass@B"], "`num_generations` is 4"),
        (["--num-generations", "1"], "leaving one out"),
        (["--reward-aggregation", "pass@B", "--baseline", "ema"], "baseline of its own"),
        (["--entropy-coef", "-1"], "`entropy_coef` is -1.0"),
        (["--max-prob-mask", "1.5"], "`max_prob_mask` is 1.5"),
        (["--cot-ratio", "0.5"], "no template"),
        (["--dropout", "1"], "`policy_dropout` is 1.0"),
        (["--pooling", "mean"], "`pooling="),
        (["--report-to", "nothing_of_the_kind"], "--report-to is nothing_of_the_kind"),
        (["--reward", "exact_match"], "does not fit --dataset testbed"),
        (["--model", "no/such_model"], "--model no/such_model cannot be loaded"),
        (["--chat"], "has none"),
        (["--learning-rate", "-1"], "learning rate"),
    ],
)
def test_a_users_mistake_is_a_message_and_exit_code_1(tmp_path, capsys, extra, said):
    assert main([*words(tmp_path / "out"), *extra]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize(
    "extra",
    [
        ["--policy", "heads"],
        ["--steps", "0"],
        ["--budget", "many"],
        ["--told", "everything"],
        ["--features", "mood"],
        ["--reward-aggregation", "majority"],
        ["--save-steps", "-1"],
    ],
)
def test_wrong_usage_exits_with_2(tmp_path, capsys, extra):
    with pytest.raises(SystemExit) as caught:
        main([*words(tmp_path / "out"), *extra])
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def parsed(*flags):
    return parse(["train-policy", *flags])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_is_one_that_the_command_takes(path, monkeypatch):
    from hf_adaptive_decode.cli.train_policy import _check, _plan

    monkeypatch.chdir(ROOT)
    args = parsed("--config", str(path))
    _check(args)
    plan = _plan(args, _actions(args), {"train": []}, is_twin=False)
    config = plan.config(None)
    assert config.policy == args.policy
    assert plan.arguments.max_steps == args.steps


def test_the_config_files_are_those_that_are_documented():
    names = {"testbed_token", "testbed_sequence", "testbed_one_policy", "gsm8k", "code"}
    assert {path.stem for path in CONFIGS} == names
    from hf_adaptive_decode.evaluation.rows import entry_parts

    args = parsed("--config", str(ROOT / "examples/configs/gsm8k.yaml"))
    assert entry_parts(args.dataset[0]) == ("openai/gsm8k", "main", None)
    assert parsed("--config", str(ROOT / "examples/configs/testbed_token.yaml"), "--steps", "5").steps == 5


def test_any_other_argument_of_the_trainer_can_be_set():
    from hf_adaptive_decode.cli.train_policy import _plan

    args = parsed("--set", "ema_decay=0.5", "--set", "final_learning_rate_ratio=none", "--set", "optim=adafactor")
    given = _plan(args, _actions(args), {"train": []}, is_twin=False).arguments
    assert (given.ema_decay, given.final_learning_rate_ratio, given.optim) == (0.5, None, "adafactor")
    args = parsed("--set", "prefilter_range=[0.1, 0.5]", "--set", "drop_equal_groups=false")
    given = _plan(args, _actions(args), {"train": []}, is_twin=False).arguments
    assert (given.prefilter_range, given.drop_equal_groups) == ([0.1, 0.5], False)


def test_actions_are_a_preset_a_file_or_temperatures():
    assert _actions(parsed()) == ACTION_PRESETS["token_math"]
    assert _actions(parsed("--policy", "sequence_actions")) == ACTION_PRESETS["math"]
    assert _actions(parsed("--actions", "code")) == ACTION_PRESETS["code"]
    assert _actions(parsed("--actions", "0", ".5")) == [{"temperature": 0.0}, {"temperature": 0.5}]


# --- the examples -----------------------------------------------------------------------------------------------------


def save_model(folder, texts):
    """A tiny model that has learned nothing, with a tokenizer that knows every byte."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **shape, **heads, **ends))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def example(tmp_path, monkeypatch, script, rows, *extra):
    """Runs it in this process, which has everything imported; what it exits with, if it does."""
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    save_model(tmp_path / "model", [json.dumps(row) for row in rows])
    sizes = ["--model", tmp_path / "model", "--budget", 6, "--steps", 2, "--prompts-per-step", 1, "--held-out", 1]
    path = ROOT / "examples" / script
    monkeypatch.setattr(sys, "argv", [str(part) for part in (path, data, *sizes, "--output", tmp_path / "out", *extra)])
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stopped:
        return stopped.code
    return None


GSM8K = [{"question": f"Ann has {n} eggs and buys 2. How many?", "answer": f"{n} + 2\n#### {n + 2}"} for n in range(12)]


def test_the_gsm8k_example_trains_and_compares(tmp_path, monkeypatch, capsys):
    pytest.importorskip("math_verify")
    assert example(tmp_path, monkeypatch, "train_policy_on_gsm8k.py", GSM8K) is None
    printed = capsys.readouterr().out
    for part in ("learned token policy", "pass@4", "MeanShift", "best static", "1 problems"):
        assert part in printed
    AutoDecoForCausalLM.from_pretrained(tmp_path / "out" / "adapter")


def test_the_code_example_trains_and_compares_or_says_that_there_is_no_sandbox(tmp_path, monkeypatch, capsys):
    # An input and an output take one sandbox, where asserts take two.
    rows = [{"prompt": f"# prints {n}\n", "tests": [{"input": "", "output": str(n)}]} for n in range(12)]
    code = example(tmp_path, monkeypatch, "train_policy_on_code.py", rows)
    if code is not None:
        assert str(code).startswith("no sandbox")
        return
    printed = capsys.readouterr().out
    for part in ("learned prompt policy", "pass@4", "best static"):
        assert part in printed
    AutoDecoForCausalLM.from_pretrained(tmp_path / "out" / "adapter")


@pytest.mark.parametrize(
    ("rows", "extra", "said"),
    [
        ([{"no": "question"}], [], "not in GSM8K's format"),
        (GSM8K, ["--held-out", "12"], "--held-out is 12 of 12 problems"),
        (GSM8K, ["--model", "no/such_model"], "--model no/such_model cannot be loaded"),
    ],
)
def test_an_examples_wrong_usage_is_a_message(tmp_path, monkeypatch, capsys, rows, extra, said):
    assert example(tmp_path, monkeypatch, "train_policy_on_gsm8k.py", rows, *extra) == 2
    assert said in capsys.readouterr().err


def test_the_testbeds_example_writes_what_the_readmes_table_is_made_of(tmp_path, monkeypatch, capsys):
    path = ROOT / "examples" / "policies_on_testbed.py"
    sizes = ["--steps", "1", "--seeds", "3", "--validation-problems", "4", "--test-problems", "4"]
    output = tmp_path / "policies_budget.jsonl"
    monkeypatch.setattr(sys, "argv", [str(path), "budget", *sizes, "--output", str(output)])
    runpy.run_path(str(path), run_name="__main__")
    found = Evaluation.load(output)
    assert found.table() in capsys.readouterr().out
    first = found.lines[0]
    assert first["arguments"]["seeds"] == [3]
    assert (first["settings"]["entropy"], first["base"], first["token_budgets"]) == (0.03, "shipped", [6, 12, 24])
    assert first["seconds"] > 0
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    assert readme_tables.small_budgets().count("\n") == 5


def test_the_command_trains_on_a_gsm8k_file_in_a_models_own_chat(tmp_path):
    pytest.importorskip("math_verify")
    rows = [{**row, "question": row["question"] + " " * n} for n in range(4) for row in GSM8K]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_model(tmp_path / "model", [json.dumps(row) for row in rows])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    config = ROOT / "examples" / "configs" / "gsm8k.yaml"
    extra = ["--config", str(config), "--dataset", str(tmp_path / "rows.jsonl"), "--model", str(tmp_path / "model")]
    result = train(
        tmp_path / "out", *extra, "--log-completions", budget=4, steps=2, test_problems=2, validation_problems=1
    )
    (adapter, *_) = Evaluation(result["lines"]).measures
    assert (adapter["task"], adapter["problems"]) == ("rows", 2)
    logged = (tmp_path / "out" / "training" / "completions" / "step_1.jsonl").read_text().splitlines()
    texts = {json.loads(line)["prompt"][0]["content"] for line in logged}
    assert all("Provide the final answer" in text for text in texts)
