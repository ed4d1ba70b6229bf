"""Trained policies beat what they have to beat on the embedded testbed, at a size that takes seconds and a fixed seed.

The gains asked for are far below those of a full training (see the README), and several standard errors above nothing.
"""

import pytest
import torch

from hf_adaptive_decode import (
    AutoDecoConfig,
    AutoDecoForCausalLM,
    REINFORCEDecodingTrainer,
    REINFORCEDecodingTrainingArguments,
)
from hf_adaptive_decode.evaluation import evaluate_decoding, load_task
from hf_adaptive_decode.testbed import build_problems, load_base_model, load_tokenizer, testbed_reward


def train(tmp_path, config, **settings):
    torch.manual_seed(0)
    args = REINFORCEDecodingTrainingArguments(
        output_dir=tmp_path,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=5e-3,
        **{"entropy_coef": 0.01, **settings},
    )
    tokenizer = load_tokenizer()
    config = AutoDecoConfig(max_token_budget=64, max_parallel_budget=8, **config)
    model = AutoDecoForCausalLM.from_base(load_base_model(), config)
    REINFORCEDecodingTrainer(
        model, testbed_reward, args, build_problems("train", 2000), processing_class=tokenizer
    ).train()
    return model, tokenizer


def gains(model, tokenizer, over, ks=(1,), problems=200, **how):
    """Gains in points over the baselines of the roles `over`, one list for each, one number for each k."""
    found = evaluate_decoding(
        model,
        tokenizer,
        load_task("testbed", validation=problems // 2, test=problems),
        baselines=over,
        samples=8,
        ks=ks,
        grid=[{"temperature": t, "top_p": p} for t in (0.5, 1.0, 1.25) for p in (0.8, 1.0)],
        batch_rows=2048,
        show_progress=False,
        **how,
    )

    def gain(role, k):
        (line,) = [line for line in found.measures if line["role"] == role and line["for_k"] in (None, k)]
        return 100 * line["gain"][f"pass@{k}"]["mean"]

    return [[gain(role, k) for k in ks] for role in over], found


def test_a_token_policy_beats_greedy_and_its_own_mean(tmp_path):
    actions = [{"temperature": t} for t in (0.0, 0.5, 1.0, 1.5)]
    model, tokenizer = train(
        tmp_path,
        {"policy": "token_actions", "actions": actions},
        max_steps=25,
        per_device_train_batch_size=48,
        num_generations=8,
        budget=48,
    )
    each, found = gains(model, tokenizer, ["greedy", "mean_shift", "best_static"], token_budgets=48)
    assert all(of_role[0] > 8 for of_role in each)
    assert [line["verdict"] for line in found.verdicts] == ["helps_beyond_mean"]


def test_a_prompt_policy_that_is_told_b_beats_the_best_static_at_each(tmp_path):
    actions = [{"temperature": t} for t in (0.0, 0.75, 1.0)] + [{"temperature": 1.5, "top_p": 0.8}]
    model, tokenizer = train(
        tmp_path,
        {"policy": "sequence_actions", "actions": actions},
        max_steps=60,
        per_device_train_batch_size=48,
        num_generations=8,
        budget=28,
        parallel_budget=[1, 4, 8],
        reward_aggregation="pass@B",
    )
    ((one, four, eight),), _ = gains(model, tokenizer, ["best_static"], ks=(1, 4, 8), token_budgets=28)
    assert one > 6
    assert four > 1
    assert eight > -1


@pytest.mark.parametrize("told", [["tokens"], []], ids=["told", "twin"])
def test_a_policy_learns_that_a_short_budget_wants_the_short_answer_only_if_it_is_told(tmp_path, told):
    model, tokenizer = train(
        tmp_path,
        {"policy": "token_actions", "actions": [{"temperature": 0.0}, {"temperature": 1.5}], "budget_features": told},
        max_steps=30,
        per_device_train_batch_size=32,
        num_generations=8,
        budget=[6, 24],
        entropy_coef=0.03,
    )
    policy = model.decoding_adapter
    prompts = [row["prompt"] for row in build_problems("test", 20, types=["calc"])]
    hot = {}
    for budget in (6, 24):
        state = [model.generate(**tokenizer(p, return_tensors="pt"), budget=budget, **_traced()) for p in prompts]
        hot[budget] = sum(float(one.decoding_trace.action[0, 0] == 1) for one in state) / len(prompts)
    assert policy.config.budget_features == told
    # 20 prompts a budget: a policy that does not know the budget differs between them by chance alone, and by more than
    # .6 in fewer than 1 of 1,000 runs.
    assert (hot[24] - hot[6] > 0.6) == bool(told)


def _traced():
    return {"return_dict_in_generate": True, "output_decoding_trace": True}
