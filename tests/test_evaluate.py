"""`evaluate_decoding`: what it reports, that it can be killed and resumed, and that its baselines are what they say."""

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_heads_identity, wrap
from transformers import AutoModelForCausalLM

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM
from hf_adaptive_decode.engines.transformers import complete
from hf_adaptive_decode.evaluation import CONTROLS, Evaluation, Task, bootstrap_interval, evaluate_decoding, pass_at_k
from hf_adaptive_decode.evaluation.ablation import only
from hf_adaptive_decode.evaluation.digests import model_digest, policy_digest
from hf_adaptive_decode.evaluation.runner import Decoder
from hf_adaptive_decode.evaluation.tasks import load_task
from hf_adaptive_decode.testbed import load_base_model, load_tokenizer

GRID = [{"temperature": 0.5, "top_p": 1.0}, {"temperature": 1.0, "top_p": 0.9}]
SMALL = {"samples": 4, "ks": (1, 4), "token_budgets": 40, "grid": GRID, "show_progress": False}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def task():
    return load_task("testbed", validation=12, test=32)


def adaptive(**config):
    torch.manual_seed(0)
    return AutoDecoForCausalLM.from_base(load_base_model(), AutoDecoConfig(**config)).eval()


def hot(model):
    """Heads that cook everything: T near 2 wherever they look."""
    with torch.no_grad():
        model.decoding_adapter.temperature_head.out.bias.fill_(6.0)
    return model


# --- what is reported -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tokenizer, task):
    return evaluate_decoding(adaptive(policy="heads"), tokenizer, task, **SMALL)


def test_every_number_can_be_worked_out_from_the_completions(tokenizer, task, tmp_path):
    model = adaptive(policy="heads")
    found = evaluate_decoding(model, tokenizer, task, folder=tmp_path, **SMALL)
    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    runs = {line["run"]: line for line in lines if "problem" not in line}
    (own,) = [name for name, run in runs.items() if "policy" in run and run["split"] == "test"]
    rows = [line for line in lines if line["run"] == own and "problem" in line]
    right = np.zeros((32, 4))
    for row in rows:
        right[row["problem"], row["sample"]] = row["reward"]
        # Scored again, from the text alone.
        problem = task.test[row["problem"]]
        said = f"{row['text']} <eos>" if row["ended"] else row["text"]
        assert task.reward(prompts=[problem["prompt"]], completions=[said]) == [row["reward"]]
    line = found.find("adapter")
    assert line["pass@4"] == vars(bootstrap_interval(pass_at_k(4, right.sum(1).astype(int), 4)))
    lengths = np.array([row["tokens"] for row in rows])
    assert line["mean_tokens"] == pytest.approx(lengths.mean())
    assert line["truncated"] == pytest.approx(np.mean([not row["ended"] for row in rows]))
    means = np.array([row["temperature"] for row in rows])
    assert found.find("mean_shift")["settings"]["temperature"] == pytest.approx(
        np.average(means, weights=lengths), rel=0.01
    )


def test_gains_are_paired_and_sum_up(found):
    adapter = found.find("adapter")
    for line in found.measures:
        for metric in ("pass@1", "pass@4", "maj@4"):
            if line["role"] != "adapter":
                difference = adapter[metric]["mean"] - line[metric]["mean"]
                assert line["gain"][metric]["mean"] == pytest.approx(difference)
                assert line["gain"][metric]["low"] <= difference + 1e-9


def test_majority_of_one_answer_is_that_answer(found):
    greedy = found.find("greedy")
    assert greedy["maj@4"] == greedy["pass@1"] == greedy["pass@4"]


def test_the_completions_are_the_engines_own(tokenizer, task, tmp_path):
    evaluate_decoding(load_base_model(), tokenizer, task, baselines=["default"], folder=tmp_path, **SMALL)
    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    texts = {(line["problem"], line["sample"]): line["text"] for line in lines if "problem" in line}
    prompts = [row["prompt"] for row in task.test]
    # The seed of the test split is two above the one given.
    groups = complete(load_base_model(), tokenizer, prompts, samples=4, token_budget=40, seed=2, batch_rows=7)
    assert texts == {(i, j): one.text for i, group in enumerate(groups) for j, one in enumerate(group)}


def test_a_base_model_alone_has_no_gains_and_no_verdict(tokenizer, task):
    found = evaluate_decoding(
        load_base_model(), tokenizer, task, baselines=["greedy", "best_static", "mean_shift", "mixture"], **SMALL
    )
    assert {line["role"] for line in found.measures} == {"greedy", "best_static"}
    assert not found.verdicts
    assert not any("gain" in line for line in found.measures)
    assert "greedy" in found.table()


def test_provenance_says_where_the_numbers_come_from(found):
    first = found.lines[0]
    assert first["kind"] == "provenance"
    assert first["versions"]["torch"] == torch.__version__
    assert first["model"] == "hf_adaptive_decode:testbed"
    assert first["samples"] == 4
    assert first["seeds"] == [0]


def test_provenance_keeps_folders_to_itself(tokenizer, task, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/me/bin/run", f"--output={tmp_path}", str(tmp_path / "base"), "T=0.5"])
    load_base_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    first = evaluate_decoding(model, tokenizer, task, baselines=["greedy"], **SMALL).lines[0]
    assert first["command"] == ["run", f"--output={tmp_path.name}", "base", "T=0.5"]
    assert first["model"] == "base"


def test_results_survive_a_file(found, tmp_path):
    found.save(tmp_path / "results.jsonl")
    again = Evaluation.load(tmp_path / "results.jsonl")
    assert again.lines == json.loads(json.dumps(found.lines))
    assert again.table() == found.table()
    assert again.summary() == found.summary()


# --- verdicts on real adapters ----------------------------------------------------------------------------------------


def test_constant_heads_are_no_evidence(tokenizer):
    model = make_heads_identity(wrap(load_base_model()))
    task = load_task("testbed", validation=30, test=100)
    found = evaluate_decoding(model, tokenizer, task, **SMALL)
    assert {line["verdict"] for line in found.verdicts} == {"no_evidence"}


def test_heads_that_cook_everything_hurt(tokenizer):
    task = load_task("testbed", validation=30, test=100)
    found = evaluate_decoding(hot(adaptive(policy="heads")), tokenizer, task, **SMALL)
    assert found.verdicts[0]["verdict"] == "hurts"


# --- cells, seeds, rivals ---------------------------------------------------------------------------------------------


def test_seeds_add_samples_of_their_own(tokenizer, task):
    how = {**SMALL, "baselines": ["default"], "ks": (1,)}
    one, other, both = (
        evaluate_decoding(load_base_model(), tokenizer, task, seeds=seeds, **how).find("default")
        for seeds in ((0,), (1,), (0, 1))
    )
    assert both["samples"] == 8
    assert both["pass@1"]["mean"] == pytest.approx((one["pass@1"]["mean"] + other["pass@1"]["mean"]) / 2)


def test_a_shorter_budget_is_what_a_run_with_it_gives(tokenizer, task):
    how = {**SMALL, "baselines": ["default"]}
    several = evaluate_decoding(load_base_model(), tokenizer, task, **{**how, "token_budgets": (12, 40)})
    for budget in (12, 40):
        alone = evaluate_decoding(load_base_model(), tokenizer, task, **{**how, "token_budgets": budget})
        same = ("pass@1", "pass@4", "maj@4", "mean_tokens", "truncated")
        mine, own = (found.find("default", token_budget=budget) for found in (several, alone))
        assert [mine[name] for name in same] == [own[name] for name in same]
    together = several.find("default", token_budget=None)
    assert together["pass@1"]["mean"] == pytest.approx(
        np.mean([several.find("default", token_budget=b)["pass@1"]["mean"] for b in (12, 40)])
    )


def test_a_policy_that_is_told_b_is_run_for_each_k(tokenizer, task):
    model = adaptive(
        policy="sequence_actions", actions=[{"temperature": 0.0}, {"temperature": 1.0}], max_parallel_budget=8
    )
    policy = model.decoding_adapter
    with torch.no_grad():
        # Greedy for one sample, hot for several: the one thing in the encoding that differs decides.
        encoder = policy.budget_encoder

        def logits(seen, rows=None):
            one = (seen.parallel_samples == 1).float()
            return torch.stack([one * 50, (1 - one) * 50], dim=-1)

        policy.action_logits = logits
        assert encoder is not None
    found = evaluate_decoding(model, tokenizer, task, baselines=["mixture"], **SMALL)
    adapter = found.find("adapter")
    assert adapter["pass@1"] == found.find("greedy")["pass@1"]
    assert adapter["pass@4"] == found.find("default")["pass@4"]
    assert [line["for_k"] for line in found.measures if line["role"] == "mean_shift"] == [1, 4]
    assert [line["settings"]["temperature"] for line in found.measures if line["role"] == "mean_shift"] == [0.0, 1.0]


def test_training_seeds_are_averaged_and_rivals_subtracted(tokenizer, task):
    model = adaptive(policy="heads")
    cold, warm = (adaptive(policy="heads").decoding_adapter for _ in range(2))
    hot(wrap_policy := type("Holder", (), {"decoding_adapter": warm})())
    assert wrap_policy.decoding_adapter is warm
    how = {**SMALL, "baselines": []}
    both = evaluate_decoding(model, tokenizer, task, {"pair": [cold, warm]}, rivals={"warm": warm}, **how)
    alone = [
        evaluate_decoding(model, tokenizer, task, {"one": one}, **how).find("adapter")["pass@1"]["mean"]
        for one in (cold, warm)
    ]
    line = both.find("adapter")
    assert line["pass@1"]["mean"] == pytest.approx(np.mean(alone))
    assert line["by_training_seed"]["pass@1"] == pytest.approx(alone)
    assert both.find("rival")["pass@1"]["mean"] == pytest.approx(alone[1])


def test_adapters_are_found_in_folders(tokenizer, task, tmp_path):
    model = adaptive(policy="heads")
    model.save_pretrained(tmp_path / "heads")
    from_folder = evaluate_decoding(load_base_model(), tokenizer, task, {"h": str(tmp_path / "heads")}, **SMALL)
    own = evaluate_decoding(model, tokenizer, task, **SMALL)
    assert from_folder.find("adapter")["pass@1"] == own.find("adapter")["pass@1"]


@pytest.mark.parametrize("policy", ["heads", "token_actions"])
def test_every_baseline_can_be_had_by_its_name(tokenizer, policy):
    task = load_task("testbed", validation=6, test=8)
    config = {"policy": policy}
    if policy == "token_actions":
        config |= {"actions": [{"temperature": 0.0}, {"temperature": 1.0}], "max_prob_mask": 0.95}
    names = [name for name in CONTROLS if name not in ("top_of_pool", "expert_search_oracle")]
    how = {**SMALL, "samples": 2, "ks": (1,), "token_budgets": 16}
    found = evaluate_decoding(adaptive(**config), tokenizer, task, baselines=names, **how)
    left_out = {"heads": {"mixture", "masked_static"}, "token_actions": {"temperature_only", "top_p_only"}}[policy]
    assert {line["role"] for line in found.measures} == {"adapter", *names} - left_out
    assert found.find("expert_search")["path"][0]["settings"]


def test_the_best_of_the_pool_are_mixed_by_sequence(tokenizer, task):
    from hf_adaptive_decode.evaluation.cells import Cell
    from hf_adaptive_decode.evaluation.controls import Contender
    from hf_adaptive_decode.evaluation.runs import Runs

    runs = Runs(load_base_model(), tokenizer, task, samples=2, token_budgets=(24,), show_progress=False)
    pool = [{"temperature": t} for t in (0.0, 0.2, 0.4, 0.6, 5.0, 9.0)]
    (choice,) = CONTROLS["top_of_pool"](Contender((), Cell(runs, (24,), (1,)), pool=pool))
    config = choice.decoders[0].policy.config
    assert config.mixture_per == "sequence"
    assert len(config.actions) == 4
    assert {"temperature": 9.0} not in config.actions
    assert {"temperature": 5.0} not in config.actions


def test_the_models_own_defaults_are_the_default(tokenizer, task):
    model = load_base_model()
    model.generation_config.temperature, model.generation_config.top_k = 0.6, 20
    found = evaluate_decoding(model, tokenizer, task, baselines=["default"], **SMALL).find("default")
    assert found["settings"] == {"temperature": 0.6, "top_k": 20}


# --- files: resuming and batch sizes ----------------------------------------------------------------------------------


def completions(folder):
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    found = {}
    for line in lines:
        if "problem" in line:
            key = (line["run"], line["problem"], line["sample"])
            assert key not in found, "sampled twice"
            found[key] = {name: value for name, value in line.items() if name != "seconds"}
    return found


def test_the_batch_size_does_not_matter(tokenizer, task, tmp_path):
    folders = []
    for rows in (5, 1000):
        folders.append(tmp_path / str(rows))
        evaluate_decoding(adaptive(policy="heads"), tokenizer, task, folder=folders[-1], batch_rows=rows, **SMALL)
    first, second = map(completions, folders)
    assert first.keys() == second.keys()
    for key, line in first.items():
        assert {**line, "temperature": 0, "top_p": 0} == {**second[key], "temperature": 0, "top_p": 0}
        assert line["temperature"] == pytest.approx(second[key]["temperature"], abs=1e-5)


def test_what_is_there_is_not_sampled_again(tokenizer, task, tmp_path):
    model = adaptive(policy="heads")
    first = evaluate_decoding(model, tokenizer, task, folder=tmp_path, **SMALL)
    size = (tmp_path / "completions.jsonl").stat().st_size
    again = evaluate_decoding(model, tokenizer, task, folder=tmp_path, **SMALL)
    assert (tmp_path / "completions.jsonl").stat().st_size == size
    assert again.lines[1:] == first.lines[1:]
    more = evaluate_decoding(model, tokenizer, task, folder=tmp_path, **{**SMALL, "samples": 6})
    assert (tmp_path / "completions.jsonl").stat().st_size > size
    assert more.find("adapter")["samples"] == 6
    completions(tmp_path)


def test_another_adapter_of_the_same_name_is_another(tokenizer, task, tmp_path):
    how = {**SMALL, "baselines": [], "folder": tmp_path}
    first = evaluate_decoding(adaptive(policy="heads"), tokenizer, task, **how).find("adapter")
    second = evaluate_decoding(hot(adaptive(policy="heads")), tokenizer, task, **how).find("adapter")
    assert first["mean_temperature"] < 1.2 < 1.8 < second["mean_temperature"]


def test_controls_of_one_adapter_are_told_apart(tokenizer, task):
    model = adaptive(policy="heads")
    policy = model.decoding_adapter
    with torch.no_grad():
        policy.temperature_head.out.bias.fill_(-1.5)
        policy.top_p_head.out.bias.fill_(-1.5)
    assert len({policy_digest(one) for one in (policy, only(policy, "temperature"), only(policy, "top_p"))}) == 3
    found = evaluate_decoding(model, tokenizer, task, baselines=["temperature_only", "top_p_only"], **SMALL)
    cold, cut = found.find("temperature_only"), found.find("top_p_only")
    assert (cold["mean_temperature"] < 0.5, cold["mean_top_p"]) == (True, 1.0)
    assert (cut["mean_temperature"], cut["mean_top_p"] < 0.5) == (1.0, True)


def test_a_policy_that_is_made_deterministic_is_another():
    actions = [{"temperature": 0.0}, {"temperature": 1.0}]
    policy = adaptive(policy="token_actions", actions=actions).decoding_adapter
    before = policy_digest(policy)
    policy.deterministic = True
    assert policy_digest(policy) != before


def test_a_model_with_other_constraints_is_another():
    model = load_base_model()
    before = model_digest(model)
    model.generation_config.temperature = 0.5  # each decoder has its own
    assert model_digest(model) == before
    model.generation_config.repetition_penalty = 1.3
    assert model_digest(model) != before


KILLED = """
import sys, torch
torch.set_num_threads(1)
from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM
from hf_adaptive_decode.evaluation import evaluate_decoding
from hf_adaptive_decode.evaluation.tasks import load_task
from hf_adaptive_decode.testbed import load_base_model, load_tokenizer
torch.manual_seed(0)
model = AutoDecoForCausalLM.from_base(load_base_model(), AutoDecoConfig(policy="heads")).eval()
task = load_task("testbed", validation=12, test=32)
grid = [{"temperature": 0.5, "top_p": 1.0}, {"temperature": 1.0, "top_p": 0.9}]
how = dict(samples=4, ks=(1, 4), token_budgets=40, grid=grid, show_progress=False, batch_rows=8)
evaluate_decoding(model, load_tokenizer(), task, folder=sys.argv[1], **how)
"""


def test_a_killed_run_loses_the_batch_in_flight_and_ends_alike(tokenizer, task, tmp_path):
    path = tmp_path / "completions.jsonl"
    for wanted in itertools.count(40, 150):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[1])
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if path.exists() and path.read_bytes().count(b"\n") > wanted:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        process.wait()
        if wanted > 300:
            break
        assert process.returncode == -signal.SIGKILL
    # As if killed within a line as well.
    with path.open("ab") as file:
        file.write(b'{"run": "abc", "prob')
    resumed = evaluate_decoding(adaptive(policy="heads"), tokenizer, task, folder=tmp_path, batch_rows=8, **SMALL)
    whole = evaluate_decoding(adaptive(policy="heads"), tokenizer, task, folder=tmp_path / "whole", **SMALL)
    completions(tmp_path)
    for mine, other in zip(resumed.measures, whole.measures, strict=True):
        assert mine["pass@4"] == other["pass@4"]
        assert mine["decoder"] == other["decoder"]


def untimed(found):
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in found.lines[1:]]


def test_a_kill_between_two_budgets_of_a_batch_repeats_neither(tokenizer, task, tmp_path):
    how = {**SMALL, "baselines": ["default"], "token_budgets": (12, 40), "folder": tmp_path}
    whole = untimed(evaluate_decoding(load_base_model(), tokenizer, task, **how))
    path = tmp_path / "completions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    # The longer budget's last lines are not there yet.
    path.write_text("".join(lines[:-5]))
    assert untimed(evaluate_decoding(load_base_model(), tokenizer, task, **how)) == whole
    assert len(completions(tmp_path)) == len(lines) - 2


def test_a_policy_with_a_prior_for_each_b_is_run_for_each(tokenizer, task):
    prior = [{"samples": 1, "probabilities": [1.0, 0.0]}, {"samples": 4, "probabilities": [0.0, 1.0]}]
    actions = [{"temperature": 0.0}, {"temperature": 1.0}]
    how = {"policy": "sequence_actions", "actions": actions, "budget_features": [], "action_prior": prior}
    found = evaluate_decoding(adaptive(**how, deterministic=True), tokenizer, task, baselines=[], **SMALL)
    adapter = found.find("adapter")
    assert adapter["pass@1"] == found.find("greedy")["pass@1"]
    assert adapter["pass@4"] == found.find("default")["pass@4"]


@pytest.mark.parametrize("line", ["[1]\n", "nonsense\n"])
def test_a_damaged_file_is_named(tokenizer, task, tmp_path, line):
    (tmp_path / "completions.jsonl").write_text(line)
    with pytest.raises(ValueError, match=r"line 1 of .*completions.jsonl is damaged"):
        evaluate_decoding(load_base_model(), tokenizer, task, baselines=["greedy"], folder=tmp_path, **SMALL)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ks": (1, 5)}, r"each has to be from 1 to 4"),
        ({"ks": (0,)}, r"each has to be from 1 to 4"),
        ({"token_budgets": 0}, "token"),
        ({"token_budgets": ()}, "token_budgets"),
        ({"baselines": ["gredy"]}, "no baseline 'gredy'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(tokenizer, task, changed, message):
    with pytest.raises(ValueError, match=message):
        evaluate_decoding(load_base_model(), tokenizer, task, **{**SMALL, **changed})


def test_a_task_without_problems_is_refused(tokenizer, task):
    with pytest.raises(ValueError, match="validation problems"):
        evaluate_decoding(load_base_model(), tokenizer, Task("empty", [], task.test, task.reward), **SMALL)


def test_a_decoder_that_says_nothing_is_refused(tokenizer, task):
    with pytest.raises(ValueError, match="neither settings nor a policy"):
        evaluate_decoding(load_base_model(), tokenizer, task, baselines=[Decoder("mine")], **SMALL)
