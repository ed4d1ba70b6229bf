"""`REINFORCEDecodingTrainer`: that it finds what is known to be best, and what its arguments, rewards and files do.

Nothing here is random from run to run. Where a test bounds what training came to, the bound also held for ten other
seeds, unless it says otherwise.
"""

import asyncio
import itertools
import json
import shutil

import pytest
import tiny
import torch
from reinforce_tables import (
    CHAT,
    GREEDY,
    ID,
    SPREAD,
    VARIED,
    adapter_of,
    arguments,
    build_rows,
    build_table,
    build_tokenizer,
    build_trainer,
    choice,
    config,
    logged,
    right,
    says,
    train,
)
from transformers import TrainerCallback

from hf_adaptive_decode import (
    AutoDecoConfig,
    AutoDecoForCausalLM,
    REINFORCEDecodingTrainer,
    REINFORCEDecodingTrainingArguments,
)
from hf_adaptive_decode.errors import AdapterConfigError, BudgetError
from hf_adaptive_decode.rewards.calls import RewardError
from hf_adaptive_decode.testbed import build_problems, load_base_model, load_tokenizer, testbed_reward
from hf_adaptive_decode.training import DataFormatError
from hf_adaptive_decode.types import Observation

POLICIES = ("token_actions", "sequence_actions")
# Adam divides by the gradient's size and so blows up the rounding of sums that run in another order.
PLAIN = {"optim": "sgd", "learning_rate": 1.0, "final_learning_rate_ratio": None, "entropy_coef": 0.0}
STEADY = build_rows(8, kinds=("steady",))


def wanted(completions, wants, **columns):
    return [float(text == want) for text, want in zip(completions, wants, strict=True)]


# The policy cannot see which answer is wanted. Greedy decoding is right on half of the prompts with any number of
# samples; sampling at T = 1.25 is right on 0.25 with one sample and on 0.65 with four.
HIDDEN = [{"prompt": "steady", "wants": "ab"[index % 2]} for index in range(16)]


# --- what is best is found --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_each_kind_of_prompt_gets_the_action_that_answers_it(policy, tmp_path):
    # The bonus holds off the policy that ends as greedy everywhere, or nowhere, before it tells the kinds apart: with
    # the default one of ten seeds does.
    options = {"per_device_train_batch_size": 16, "num_generations": 16, "entropy_coef": 0.1, "max_steps": 60}
    trainer = train(tmp_path, settings=config(policy), **options)
    assert choice(trainer, "steady")[0] > 0.9
    assert choice(trainer, "varied")[1] > 0.9
    assert logged(trainer, "objective")[-1] > logged(trainer, "objective")[0]


def test_the_best_arm_of_a_bandit_is_found(tmp_path):
    # Odds of "b": 0, 0.375, 0.3 and about 0.22.
    spread = {"a": 0.5, "b": 0.3, "c": 0.05, "d": 0.05, "e": 0.1}
    arms = [GREEDY, {"temperature": 1.0, "top_k": 2}, {"temperature": 1.0}, {"temperature": 4.0}]
    trainer = train(
        tmp_path, says("b"), STEADY, build_table(spread), config(actions=arms), max_steps=60, num_generations=16
    )
    assert choice(trainer, "steady")[1] > 0.9


def test_a_policy_that_is_to_take_its_likeliest_action_still_tries_the_others_in_training(tmp_path):
    trainer = train(tmp_path, says("b"), STEADY, settings=config(deterministic=True), max_steps=40, learning_rate=1e-2)
    assert choice(trainer, "steady")[1] > 0.9
    assert trainer.model.decoding_adapter.deterministic
    assert trainer.evaluate(STEADY)["eval_action/1"] == 1.0


def test_a_policy_that_is_told_b_samples_differently_for_one_and_for_four(tmp_path):
    how = {"reward_aggregation": "pass@B", "parallel_budget": [1, 4], "num_generations": 16, "max_steps": 100}
    how |= {"learning_rate": 3e-3, "final_learning_rate_ratio": None}
    trainer = train(
        tmp_path, wanted, HIDDEN, settings=config("sequence_actions"), per_device_train_batch_size=16, **how
    )
    assert choice(trainer, "steady", samples=1)[0] > 0.9
    assert choice(trainer, "steady", samples=4)[1] > 0.7
    assert {"objective/B=1", "objective/B=4"} <= set(trainer.state.log_history[-2])


def test_a_policy_that_is_told_the_tokens_left_decodes_differently_with_one_and_with_two(tmp_path):
    def reward(completions, completion_ids, **columns):
        # A completion of two tokens ended, so its budget was two.
        return [float((text == "a") == (len(ids) == 1)) for text, ids in zip(completions, completion_ids, strict=True)]

    trainer = train(tmp_path, reward, STEADY, budget=[1, 2], num_generations=8, max_steps=80)
    assert choice(trainer, "steady", budget=1)[0] > 0.9
    assert choice(trainer, "steady", budget=2)[1] > 0.9


AGGREGATIONS = {
    "mean": ({"reward_aggregation": "mean"}, {}, wanted, 0),
    "pass@B": ({"reward_aggregation": "pass@B"}, {}, wanted, 1),
    "best_of": ({"reward_aggregation": "best_of"}, {"scorer": wanted}, wanted, 1),
    "best_of by no judge": ({"reward_aggregation": "best_of"}, {"scorer": says("nothing")}, wanted, 0),
    "majority": ({"reward_aggregation": "majority"}, {"answer_of": str}, says("a"), 0),
    # Four samples at T = 1.25 hold another answer than "a" nearly always, and "a" does not vote.
    "majority of those that answer": (
        {"reward_aggregation": "majority"},
        {"answer_of": lambda text: None if text == "a" else "other"},
        lambda completions, **columns: [float(text != "a") for text in completions],
        1,
    ),
}


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_what_b_samples_are_worth_decides_the_action(name, tmp_path):
    options, helpers, reward, best = AGGREGATIONS[name]
    options = {**options, "parallel_budget": 4, "num_generations": 16, "max_steps": 40}
    trainer = train(tmp_path, reward, HIDDEN, helpers=helpers, per_device_train_batch_size=16, **options)
    assert choice(trainer, "steady", samples=4)[best] > 0.7


# Leaving one out takes two.
@pytest.mark.parametrize(
    ("baseline", "samples"),
    [("leave_one_out", 4), *itertools.product(["batch", "ema", "none"], [1, 4])],
)
def test_every_baseline_learns_also_from_single_completions(baseline, samples, tmp_path):
    trainer = train(
        tmp_path,
        says("a"),
        STEADY,
        baseline=baseline,
        num_generations=samples,
        max_steps=60,
        learning_rate=1e-2,
        entropy_coef=0.01,
    )
    assert choice(trainer, "steady")[0] > 0.9


def courses(policy, trainer):
    """For the table below: every course of two answers with its reward, and its log-odds as the policy has them."""
    table = trainer.model.head.weight.detach().T.softmax(-1).double()
    context = trainer.model.embedding.weight.detach()
    for actions in itertools.product(range(2), repeat=2):
        for answers in itertools.product("ab", repeat=2):
            log_odds, seen = 0.0, "steady"
            for step, (action, word) in enumerate(zip(actions, answers, strict=True)):
                probabilities = table[ID[seen]]
                if action == 0:
                    probabilities = torch.nn.functional.one_hot(probabilities.argmax(), len(probabilities)).double()
                else:
                    probabilities = (probabilities.log() / VARIED["temperature"]).softmax(-1)
                observed = Observation(context[ID[seen]][None], torch.tensor([2 - step]), torch.tensor([1]))
                logits = policy.action_logits(observed)
                log_odds = log_odds + logits.double().log_softmax(-1)[0, action] + probabilities[ID[word]].log()
                seen = word
            yield log_odds, float(answers == ("a", "b")) + 0.5 * (answers[0] == "b")


@pytest.mark.parametrize("baseline", ["leave_one_out", "ema"])
def test_the_gradient_of_whole_rollouts_is_on_average_that_of_the_expected_reward(baseline, tmp_path):
    # 22 means of 60 rollouts, of which one that is right lies 7 standard errors off with odds of about 1 in 10^7.
    model = build_table({"a": 0.6, "b": 0.4}, a={"a": 0.3, "b": 0.7}, b={"a": 0.2, "b": 0.8})

    def reward(completions, **columns):
        return [float(text == "a b") + 0.5 * (text[0] == "b") for text in completions]

    settings = config(policy_dropout=0.0, policy_hidden_size=10)
    trainer = build_trainer(
        tmp_path, reward, STEADY, model, settings, num_generations=3, entropy_coef=0.0, baseline=baseline
    )
    policy = trainer.model.decoding_adapter
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.layers[-1].parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2)
    last = list(policy.layers[-1].parameters())
    expected = sum(log_odds.exp() * reward for log_odds, reward in courses(policy, trainer))
    exact = torch.cat([part.flatten() for part in torch.autograd.grad(-expected, last)]).double()
    batch = [{"index": index, "prompt": "steady", "columns": {}} for index in range(40)]
    found = []
    for step in range(60):
        trainer.state.global_step = step
        loss = trainer.compute_loss(trainer.model, batch)
        found.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, last)]).double())
    found = torch.stack(found)
    error = found.std(dim=0) / len(found) ** 0.5
    assert (exact.abs() > 10 * error).any()
    assert ((found.mean(dim=0) - exact).abs() <= 7 * error + 1e-7).all()


# --- what moves -------------------------------------------------------------------------------------------------------


def evens(completion_ids, **columns):
    """A reward for any model."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_adapter_weight_moves_and_no_weight_of_the_base(policy, family, tmp_path):
    settings = config(policy, policy_dropout=0.0, budget_features=["tokens", "samples"])
    model = AutoDecoForCausalLM.from_base(tiny.build_base(family), settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(tmp_path, evens, model=model, budget=6, max_steps=3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith("decoding_adapters."), name
    assert all(parameter.grad is None for parameter in tiny_base_parameters(model))


def tiny_base_parameters(model):
    return [parameter for name, parameter in model.named_parameters() if not name.startswith("decoding_adapters.")]


class Snapshots(TrainerCallback):
    """The adapter after every step."""

    def __init__(self):
        self.taken = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.taken.append({name: tensor.clone() for name, tensor in model.decoding_adapter.state_dict().items()})


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def until_step_three(later):
    def reward(completions, trainer_state, **columns):
        taught = says("a")(completions)
        return taught if trainer_state.global_step < 3 else [later] * len(completions)

    return reward


@pytest.mark.parametrize("later", [1.0, None])
def test_rewards_that_teach_nothing_leave_the_adapter_where_momentum_would_carry_it_on(later, tmp_path):
    trainer = build_trainer(tmp_path, until_step_three(later), STEADY, max_steps=6)
    snapshots = Snapshots()
    trainer.add_callback(snapshots)
    trainer.train()
    after = snapshots.taken
    assert not same(after[1], after[2])
    assert same(after[2], after[3])
    assert same(after[2], after[5])
    assert all(torch.isfinite(tensor).all() for tensor in after[5].values())
    assert logged(trainer, "kept_fraction")[-3:] == [0.0] * 3
    assert logged(trainer, "loss")[-3:] == [0.0] * 3
    assert [entry.get("reward") for entry in trainer.state.log_history[3:6]] == [later] * 3


@pytest.mark.parametrize("baseline", ["batch", "ema", "none"])
def test_a_training_without_any_reward_changes_nothing_with_any_baseline(baseline, tmp_path):
    trainer = build_trainer(tmp_path, lambda completions, **columns: [None] * len(completions), baseline=baseline)
    before = adapter_of(trainer)
    trainer.train()
    assert same(before, adapter_of(trainer))


def test_a_batch_without_a_reward_does_not_pull_the_moving_average_to_zero(tmp_path):
    def reward(completions, trainer_state, **columns):
        return [None if trainer_state.global_step in (2, 3) else 5.0] * len(completions)

    # Rewards are always 5 where there are any, so a baseline that knows them leaves nothing to teach.
    trainer = build_trainer(
        tmp_path, reward, baseline="ema", drop_equal_groups=False, entropy_coef=0.0, max_steps=6, weight_decay=0.0
    )
    trainer.train()
    assert logged(trainer, "loss")[1:] == pytest.approx([0.0] * 5, abs=1e-6)
    assert logged(trainer, "loss")[0] != 0.0


def test_the_entropy_bonus_keeps_choices_open(tmp_path):
    def last_entropy(coefficient):
        trainer = train(tmp_path, says("a"), STEADY, max_steps=50, entropy_coef=coefficient, learning_rate=2e-3)
        return logged(trainer, "entropy")[-1]

    # Greedy decoding is worth 0.67 more; against 0.5 times the entropy that is best at 0.51 nats, dropout aside.
    assert last_entropy(2.0) > 0.65 > 0.6 > last_entropy(0.5) > 0.4 > 0.1 > last_entropy(0.0)


@pytest.mark.parametrize("start", [0.5, 0.1])
def test_the_divergence_keeps_the_policy_near_where_it_began(start, tmp_path):
    def train_with(coefficient):
        settings = config(action_prior=[{"samples": 1, "probabilities": [start, 1 - start]}])
        options = {"max_steps": 40, "kl_coef": coefficient, "learning_rate": 1e-2}
        trainer = train(tmp_path, says("a"), STEADY, settings=settings, **options)
        return float(choice(trainer, "steady")[0]), logged(trainer, "kl")[-1]

    (held, near), (free, unknown) = train_with(3.0), train_with(0.0)
    assert abs(held - start) < 0.15 < abs(free - start)
    assert 0 < near < 0.05
    assert unknown == 0.0


def test_logits_are_divided_by_the_action_temperature(tmp_path):
    trainer = build_trainer(tmp_path, action_temperature=4.0)
    with torch.no_grad():
        trainer.model.decoding_adapter.layers[-1].bias.copy_(torch.tensor([4.0, 0.0]))
    torch.testing.assert_close(choice(trainer, "steady"), torch.tensor([1.0, 0.0]).softmax(-1))
    trainer.save_model(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["action_temperature"] == 4.0


def test_the_learning_rate_falls_exponentially_to_its_last_part(tmp_path):
    trainer = train(tmp_path, max_steps=4, learning_rate=1e-2, final_learning_rate_ratio=0.0625)
    assert logged(trainer, "learning_rate") == pytest.approx([1e-2, 5e-3, 2.5e-3, 1.25e-3])
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(6.25e-4)
    # It rises over two steps of warmup, and then falls in four.
    trainer = train(tmp_path, max_steps=6, learning_rate=1.2e-2, final_learning_rate_ratio=0.0625, warmup_steps=2)
    assert logged(trainer, "learning_rate") == pytest.approx([4e-3, 8e-3, 1.2e-2, 6e-3, 3e-3, 1.5e-3])
    trainer = train(tmp_path, max_steps=4, learning_rate=1e-2, final_learning_rate_ratio=None)
    assert logged(trainer, "learning_rate") == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])


# --- how a batch is cut up --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["mean", "pass@B"])
def test_accumulation_makes_no_difference(aggregation, tmp_path):
    options = {**PLAIN, "reward_aggregation": aggregation, "parallel_budget": [1, 2]}
    options["settings"] = config(policy_dropout=0.0)
    whole = adapter_of(train(tmp_path, **options))
    for size in (4, 1):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        for name, tensor in adapter_of(train(tmp_path, **options, **cut)).items():
            torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-6, msg=name)


def test_the_rows_decoded_at_once_make_no_difference(tmp_path):
    options = {**PLAIN, "settings": config(policy_dropout=0.0), "log_completions": True, "budget": [1, 2]}
    found = []
    for rows in (None, 5, 8, 1):
        trainer = train(tmp_path / str(rows), rollout_batch_rows=rows, **options)
        written = [(tmp_path / str(rows) / "completions" / f"step_{step}.jsonl").read_text() for step in range(1, 5)]
        found.append((adapter_of(trainer), written))
    for adapter, written in found[1:]:
        assert written == found[0][1]
        for name, tensor in adapter.items():
            torch.testing.assert_close(tensor, found[0][0][name], rtol=0, atol=1e-6, msg=name)


def test_another_seed_draws_other_completions(tmp_path):
    def texts(seed):
        train(tmp_path / str(seed), seed=seed, max_steps=1, log_completions=True)
        lines = (tmp_path / str(seed) / "completions" / "step_1.jsonl").read_text().splitlines()
        return [json.loads(line)["completion"] for line in lines]

    assert texts(1) == texts(1) != texts(2)


# --- prompts and budgets ----------------------------------------------------------------------------------------------


class Heard:
    """A reward that keeps what it was given."""

    __name__ = "heard"

    def __init__(self, reward=right):
        self.reward, self.calls = reward, []

    def __call__(self, **given):
        self.calls.append(given)
        return self.reward(**given)

    def all(self, name):
        return [value for call in self.calls for value in call[name]]


def test_plain_prompts_reach_the_reward_with_their_columns(tmp_path):
    heard = Heard()
    train(tmp_path, heard, max_steps=2)
    assert len(heard.all("prompts")) == 2 * 8 * 4
    for prompt, completion, ids, wants_a in zip(
        *(heard.all(name) for name in ("prompts", "completions", "completion_ids", "wants_a")), strict=True
    ):
        assert (prompt == "steady") == wants_a
        assert ids == [ID[completion], ID["<eos>"]]
    assert [call["trainer_state"].max_steps for call in heard.calls] == [2, 2]


def test_conversations_are_decoded_after_their_template_and_rewarded_as_messages(tmp_path):
    heard = Heard(lambda completions, **columns: says("a")([said[0]["content"] for said in completions]))
    rows = [{"prompt": [{"role": "user", "content": kind}], "kind": kind} for kind in ("steady", "varied")] * 4
    table = build_table({"a": 0.5, "b": 0.5}, think={"c": 0.5, "d": 0.5})
    train(tmp_path, heard, rows, table, tokenizer=build_tokenizer(CHAT), max_steps=1)
    for prompt, completion, kind in zip(heard.all("prompts"), heard.all("completions"), heard.all("kind"), strict=True):
        assert prompt == [{"role": "user", "content": kind}]
        assert completion[0]["role"] == "assistant"
        assert completion[0]["content"] in "ab"
    options = {"chat_template_kwargs": {"last": "think"}, "prefilter_samples": 4, "prefilter_range": [0.0, 1.0]}
    heard.calls.clear()
    train(tmp_path, heard, rows, table, tokenizer=build_tokenizer(CHAT), max_steps=1, **options)
    # Also where prompts are filtered, before the first step.
    assert len(heard.calls) == 2
    assert {said[0]["content"] for said in heard.all("completions")} == {"c", "d"}


def test_a_part_of_the_prompts_asks_for_a_chain_of_thought(tmp_path):
    table = build_table(think={"a": 0.5, "b": 0.5})
    for ratio, kinds in ((0.0, {False}), (0.5, {True, False}), (1.0, {True})):
        heard = Heard()
        template = {"cot": "think", "direct": ""}
        train(tmp_path, heard, STEADY, table, cot_ratio=ratio, cot_template=template)
        asked = [prompt.endswith("\nthink") for prompt in heard.all("prompts")]
        assert set(asked) == kinds
        # After "think" there is no "c", "d" or "e".
        said = {text for text, with_cot in zip(heard.all("completions"), asked, strict=True) if with_cot}
        assert said <= {"a", "b"}


def test_several_data_sets_are_mixed_in_equal_parts(tmp_path):
    heard = Heard()
    rows = {"many": build_rows(12, kinds=("steady",)), "few": [{"prompt": "varied", "level": 3}] * 5}
    train(tmp_path, heard, rows, max_steps=3)
    names = heard.all("dataset")
    assert names.count("many") == names.count("few") == 3 * 8 * 4 // 2
    for prompt, name, level in zip(heard.all("prompts"), names, heard.all("level"), strict=True):
        assert (prompt, level) == (("steady", None) if name == "many" else ("varied", 3))


@pytest.mark.parametrize(
    ("budget", "allowed"), [(1, {1}), ([1, 3], {1, 3}), ({"low": 2, "high": 4}, {2, 3, 4}), (range(1, 3), {1, 2})]
)
def test_budgets_are_drawn_from_what_is_given(budget, allowed, tmp_path):
    options = {"budget": budget, "parallel_budget": [1, 3], "log_completions": True, "max_steps": 4}
    # An answer never ends, so a completion is as long as it may be.
    table = build_table(**{word: dict.fromkeys("ab", 0.5) for word in SPREAD})
    heard = Heard()
    trainer = train(tmp_path, heard, model=table, **options)
    assert {len(ids) for ids in heard.all("completion_ids")} == allowed
    assert set(logged(trainer, "completions/clipped_ratio")) == {1.0}
    rows = [json.loads(line) for path in (tmp_path / "completions").iterdir() for line in path.open()]
    assert {row["budget"] for row in rows} == allowed
    assert {row["parallel_budget"] for row in rows} == {1, 3}
    assert json.loads(trainer.args.to_json_string())["parallel_budget"] == [1, 3]


def test_prompts_that_are_always_or_never_solved_are_left_out(tmp_path):
    table = build_table(think={"a": 1.0})
    rows = [{"prompt": prompt, "wants": "a"} for prompt in ("steady", "think", "[user]", "varied")] * 4
    heard = Heard(wanted)
    trainer = build_trainer(tmp_path, heard, rows, table, prefilter_samples=32, max_steps=2)
    assert heard.all("prompts").count("think") == 4 * 32
    heard.calls.clear()
    trainer.train()
    assert set(heard.all("prompts")) == {"steady", "varied"}
    assert logged(trainer, "prefilter/kept_fraction") == [0.5]
    with pytest.raises(DataFormatError, match="prefilter_range"):
        build_trainer(tmp_path, heard, rows, table, prefilter_samples=32, prefilter_range=[0.99, 0.995])


def test_filtering_runs_the_base_without_its_dropout(tmp_path):
    def kept(base):
        options = {"prefilter_samples": 4, "prefilter_range": [0.3, 0.7], "budget": 4}
        return build_trainer(tmp_path, evens, model=base, **options)._sums["train"]["prefilter/kept_fraction"]

    assert kept(tiny.build_base("gpt2").train()) == kept(tiny.build_base("gpt2").eval())


# --- rewards ----------------------------------------------------------------------------------------------------------


def test_several_rewards_are_weighed_and_need_not_apply(tmp_path):
    def only_steady(prompts, **columns):
        return [3.0 if prompt == "steady" else None for prompt in prompts]

    heard = Heard(says("a"))
    rewards = [heard, only_steady]
    trainer = train(tmp_path, rewards, reward_weights=[2.0, 0.5], max_steps=2, log_completions=True)
    for step, call in enumerate(heard.calls):
        entry = trainer.state.log_history[step]
        steady = sum(prompt == "steady" for prompt in call["prompts"]) / 32
        said = sum(text == "a" for text in call["completions"]) / 32
        assert entry["rewards/heard/mean"] == pytest.approx(said)
        assert entry["rewards/only_steady/mean"] == pytest.approx(3.0)
        assert entry["reward"] == pytest.approx(2.0 * said + 0.5 * 3.0 * steady)
    row = json.loads((tmp_path / "completions" / "step_1.jsonl").read_text().splitlines()[0])
    assert row["rewards"]["only_steady"] == (3.0 if row["prompt"] == "steady" else None)


def test_an_async_reward_teaches_like_any_other(tmp_path):
    async def later(completions, **columns):
        await asyncio.sleep(0.001)
        return says("a")(completions)

    one, other = (adapter_of(train(tmp_path / str(i), reward)) for i, reward in enumerate((later, says("a"))))
    assert same(one, other)


def test_a_reward_of_trl_teaches(tmp_path):
    rewards = pytest.importorskip("trl.rewards")
    # Less is better here: from -1 for two tokens to 0 for one.
    shorter = rewards.get_soft_overlong_punishment(max_completion_len=2, soft_punish_cache=1)
    table = build_table({"a": 0.4, "b": 0.2, "c": 0.2, "<eos>": 0.2})
    trainer = train(tmp_path, shorter, STEADY, table, max_steps=40, num_generations=8, learning_rate=1e-2)
    assert choice(trainer, "steady")[1] > 0.9
    assert -1 < logged(trainer, "rewards/soft_overlong_punishment_reward/mean")[0] < 0


def fails_for(row):
    def reward(completions, number, **columns):
        if row in number:
            raise KeyError("no such answer")
        return says("a")(completions)

    return reward


NUMBERED = [{"prompt": "steady", "number": index} for index in range(16)]


def test_a_reward_that_raises_is_named_with_its_prompts_index(tmp_path):
    with pytest.raises(RewardError, match=r"'reward' raised KeyError.*index 11"):
        train(tmp_path, fails_for(11), NUMBERED, max_steps=2)


def test_prompts_that_a_reward_fails_on_can_be_skipped_and_are_counted(tmp_path):
    trainer = train(tmp_path, fails_for(11), NUMBERED, max_steps=2, reward_errors="skip")
    assert sorted(logged(trainer, "rewards/skipped")) == [0.0, 4.0]
    assert min(logged(trainer, "kept_fraction")) <= 7 / 8


def test_a_reward_of_nan_is_an_error(tmp_path):
    with pytest.raises(RewardError, match="nan"):
        train(tmp_path, lambda completions, **columns: [float("nan")] * len(completions), reward_errors="skip")


# --- evaluation and logs ----------------------------------------------------------------------------------------------


def test_evaluation_is_the_same_at_every_call_and_for_every_batch_size(tmp_path):
    evaluation = [{"prompt": "steady"}] * 7 + [{"prompt": "varied"}] * 4
    found = []
    for size in (1, 4, 8, 11):
        options = {"evaluation": evaluation, "per_device_eval_batch_size": size, "parallel_budget": [1, 2]}
        trainer = build_trainer(tmp_path, reward_aggregation="pass@B", **options)
        found += [trainer.evaluate(), trainer.evaluate()]
    names = [
        name for name in found[0] if not any(word in name for word in ("runtime", "per_second", "preparation", "skip"))
    ]
    assert {"eval_reward", "eval_objective", "eval_objective/B=2", "eval_action/0", "eval_kept_fraction"} <= set(names)
    assert "eval_loss" not in found[0]
    for metrics in found[1:]:
        assert {name: metrics[name] for name in names} == pytest.approx({name: found[0][name] for name in names})


def test_evaluation_leaves_training_as_it_would_have_been(tmp_path):
    # Loading data takes a number from the generator that dropout draws from, as with any Trainer.
    settings = config(policy_dropout=0.0)
    without = train(tmp_path, settings=settings)
    evaluation = {"evaluation": {"one": build_rows(4)}, "eval_strategy": "steps", "eval_steps": 1}
    between = train(tmp_path, settings=settings, **evaluation)
    assert same(adapter_of(without), adapter_of(between))
    assert len(logged(between, "eval_one_reward")) == 4


def test_the_best_checkpoint_by_reward_is_loaded_at_the_end(tmp_path):
    def reward(prompts, completions, split, trainer_state, **columns):
        spoilt = split[0] == "train" and trainer_state.global_step >= 24
        return [1.0 - value if spoilt else value for value in right(prompts, completions)]

    rows, held_out = ([{**row, "split": split} for row in build_rows()] for split in ("train", "eval"))
    trainer = train(
        tmp_path,
        reward,
        rows,
        evaluation=held_out,
        max_steps=36,
        num_generations=16,
        final_learning_rate_ratio=None,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=4,
        eval_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        save_total_limit=2,
    )
    rewards = logged(trainer, "eval_reward")
    assert rewards[-1] < max(rewards)
    assert trainer.evaluate()["eval_reward"] == pytest.approx(max(rewards))
    best = trainer.state.best_model_checkpoint
    left = sorted(path.name for path in tmp_path.glob("*checkpoint-*"))
    assert left == sorted({best.rsplit("/", 1)[-1], "checkpoint-36"})
    assert json.loads((tmp_path / "checkpoint-36" / "trainer_state.json").read_text())["best_model_checkpoint"] == best


def test_the_log_has_the_documented_names(tmp_path):
    trainer = train(tmp_path, kl_coef=0.1)
    entry = trainer.state.log_history[0]
    names = (
        "loss grad_norm learning_rate reward reward_std objective kept_fraction frac_reward_zero_std rewards/skipped "
        "rewards/right/mean completions/mean_length completions/clipped_ratio decisions_per_completion action/0 "
        "action/1 entropy kl seconds/rollout seconds/loss"
    )
    assert set(names.split()) <= set(entry)
    assert entry["completions/mean_length"] == 2.0
    assert entry["decisions_per_completion"] == 1.0  # the end is certain, and so masked
    assert entry["action/0"] + entry["action/1"] == pytest.approx(1.0)
    assert entry["entropy"] == pytest.approx(0.6931, abs=1e-3)


def test_completions_are_written_with_what_they_were_given_and_earned(tmp_path):
    def reward(prompts, completions, log_extra, **columns):
        log_extra("shouted", [text.upper() for text in completions])
        return right(prompts, completions)

    train(tmp_path, reward, log_completions=True, logging_steps=2)
    assert sorted(path.name for path in (tmp_path / "completions").iterdir()) == ["step_2.jsonl", "step_4.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "completions" / "step_4.jsonl").open()]
    assert len(rows) == 8 * 4
    for row in rows:
        assert row["rewards"] == {"reward": right([row["prompt"]], [row["completion"]])[0]}
        assert (row["budget"], row["parallel_budget"], row["ended"]) == (2, 1, True)
        assert row["shouted"] == row["completion"].upper()


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["ema", "leave_one_out"])
def test_resuming_gives_the_uninterrupted_runs_adapter_bit_for_bit(baseline, tmp_path):
    options = {"baseline": baseline, "kl_coef": 0.5, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = adapter_of(train(tmp_path, **options))
    shutil.rmtree(tmp_path / "checkpoint-6")
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = train(tmp_path, resume=True, **options)
    assert len(logged(resumed, "loss")) == 6
    for name, tensor in adapter_of(resumed).items():
        assert torch.equal(tensor, whole[name]), name


def test_a_resumed_run_still_measures_the_divergence_from_the_very_first_policy(tmp_path):
    options = {"kl_coef": 0.5, "save_strategy": "steps", "save_steps": 2, "max_steps": 6, "learning_rate": 0.05}
    whole = train(tmp_path, **options)
    shutil.rmtree(tmp_path / "checkpoint-6")
    # Resumed from an adapter that was loaded, as a user would.
    model = AutoDecoForCausalLM.from_pretrained(tmp_path / "checkpoint-4", base_model=build_table())
    resumed = train(tmp_path, model=model, resume=True, **options)
    assert logged(resumed, "kl")[-1] == logged(whole, "kl")[-1] > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_a_saved_adapter_loads_and_generates(policy, tmp_path):
    torch.manual_seed(0)
    trainer = REINFORCEDecodingTrainer(
        load_base_model(),
        [testbed_reward, evens],
        arguments(tmp_path, budget=8, max_steps=2, max_prob_mask=0.9),
        build_problems("train", 16),
        processing_class=load_tokenizer(),
        decoding_config=config(policy),
    )
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    loaded = AutoDecoForCausalLM.from_pretrained(tmp_path / "saved")
    for name, tensor in adapter_of(trainer).items():
        assert torch.equal(loaded.decoding_adapter.state_dict()[name], tensor)
    assert loaded.decoding_config.max_prob_mask == (0.9 if policy == "token_actions" else None)
    ids = torch.tensor([load_tokenizer()("calc 42 - 10 + 3 =>")["input_ids"]])
    output = loaded.generate(ids, budget=5, return_dict_in_generate=True, output_decoding_trace=True)
    assert 0 < output.sequences.shape[1] - ids.shape[1] <= 5
    assert loaded.decoding_adapter.has_actions


def test_the_mask_of_training_is_the_mask_of_use(tmp_path):
    for mask in (0.95, 0.5, None):
        trainer = build_trainer(tmp_path, max_prob_mask=mask)
        trainer.save_model(tmp_path / "saved")
        assert json.loads((tmp_path / "saved" / "config.json").read_text())["max_prob_mask"] == mask
    # Everything is surer than 0.1, so nothing is decided and nothing taught.
    trainer = build_trainer(tmp_path, max_prob_mask=0.1)
    before = adapter_of(trainer)
    trainer.train()
    assert same(before, adapter_of(trainer))
    assert logged(trainer, "decisions_per_completion") == [0.0] * 4
    # Without a mask the certain end is decided, too.
    assert logged(train(tmp_path, max_prob_mask=None), "decisions_per_completion") == [2.0] * 4


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_mask_that_contradicts_the_adapters_is_refused(tmp_path):
    with pytest.raises(AdapterConfigError, match=r"0\.7 .* 0\.95"):
        build_trainer(tmp_path, settings=config(max_prob_mask=0.7))
    assert build_trainer(tmp_path, settings=config(max_prob_mask=0.7), max_prob_mask=0.7)


@pytest.mark.parametrize("settings", [AutoDecoConfig(), AutoDecoConfig(policy="static", actions=[GREEDY])])
def test_an_adapter_without_actions_to_learn_is_refused_with_what_to_pass(settings, tmp_path):
    with pytest.raises(AdapterConfigError, match=rf'"{settings.policy}".*token_actions.*decoding_config='):
        build_trainer(tmp_path, settings=settings)


@pytest.mark.parametrize(
    ("bad", "allowed"),
    [
        ({"reward_aggregation": "best"}, "pass@B"),
        ({"baseline": "critic"}, "leave_one_out"),
        ({"reward_errors": "ignore"}, "skip"),
        ({"num_generations": 0}, "at least 1"),
        ({"num_generations": 2.5}, "whole number"),
        ({"num_generations": 1}, "at least 2"),
        ({"entropy_coef": -0.1}, "at least 0"),
        ({"entropy_coef": "much"}, "at least 0"),
        ({"kl_coef": float("nan")}, "at least 0"),
        ({"kl_coef": float("inf")}, "at least 0"),
        ({"ema_decay": 1.5}, "from 0 to 1"),
        ({"max_prob_mask": 95}, "from 0 to 1"),
        ({"action_temperature": 0.0}, "from 0.001 to 1000"),
        ({"final_learning_rate_ratio": 2.0}, "from 0 to 1"),
        ({"rollout_batch_rows": 0}, "at least 1"),
        ({"prefilter_samples": -1}, "at least 0"),
        ({"prefilter_range": [0.9, 0.1]}, "low <= high"),
        ({"cot_ratio": 2}, "from 0 to 1"),
        ({"cot_template": "maths"}, "step_by_step"),
        ({"budget": 0}, "whole number from 1"),
        ({"budget": "many"}, "whole number from 1"),
        ({"parallel_budget": [2, 0]}, "whole number from 1"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_once_with_what_is_allowed(bad, allowed, tmp_path):
    ((name, value),) = bad.items()
    with pytest.raises((ValueError, BudgetError)) as caught:
        REINFORCEDecodingTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **bad)
    said = str(caught.value)
    assert name in said or name == "cot_template"
    assert repr(value[1] if name == "parallel_budget" else value) in said
    assert allowed in said


def test_arguments_that_contradict_each_other_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r'pass@B.*`baseline`.*"ema"'):
        arguments(tmp_path, reward_aggregation="pass@B", baseline="ema")
    with pytest.raises(ValueError, match=r"`parallel_budget` goes up to 8 and `num_generations` is 4"):
        arguments(tmp_path, reward_aggregation="pass@B", parallel_budget=[1, 8])
    # What one sample is worth has no B: a policy may be told any.
    assert train(tmp_path, parallel_budget=[1, 8])
    for aggregation, name in (("best_of", "scorer"), ("majority", "answer_of")):
        with pytest.raises(ValueError, match=rf'"{aggregation}".*`{name}`'):
            build_trainer(tmp_path, reward_aggregation=aggregation)
    with pytest.raises(ValueError, match="2 weights"):
        build_trainer(tmp_path, reward_weights=[1.0, 2.0])
    with pytest.raises(DataFormatError, match="prompt"):
        build_trainer(tmp_path, rows=[{"question": "steady"}])
