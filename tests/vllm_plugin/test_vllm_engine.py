"""vLLM as an engine: that it draws from the same distributions, takes and records the same decisions, and serves
evaluation and training.

Nothing here is random from run to run, but vLLM's draws are not those of transformers: where frequencies are compared,
the odds of a false alarm are given, as for fresh seeds.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reinforce_tables import arguments

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM, REINFORCEDecodingTrainer
from hf_adaptive_decode.adapters import config_for
from hf_adaptive_decode.cli.main import main
from hf_adaptive_decode.engines.by_name import build_engine
from hf_adaptive_decode.engines.rollout import Rows, decode
from hf_adaptive_decode.engines.transformers import complete, encode_prompt
from hf_adaptive_decode.errors import BudgetError, UnsupportedGenerationError
from hf_adaptive_decode.evaluation import Evaluation, evaluate_decoding
from hf_adaptive_decode.evaluation.runner import Decoder
from hf_adaptive_decode.evaluation.tasks import load_task
from hf_adaptive_decode.policies import StaticPolicy, build_policy
from hf_adaptive_decode.policies.static import draw
from hf_adaptive_decode.randomness import row_key, row_uniforms
from hf_adaptive_decode.testbed import build_problems, load_base_model, load_tokenizer, testbed_reward
from hf_adaptive_decode.types import SamplingParameters
from hf_adaptive_decode.warping import warp_logits

ACTIONS = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.5, "top_k": 5}]
PROMPTS = [row["prompt"] for row in build_problems("test", 6)]
BUDGETS = [24, 7, 16, 24, 3, 12]


@pytest.fixture(scope="module")
def engine(base, tokenizer):
    with build_engine("vllm", base, tokenizer) as built:
        yield built


def policy_of(base, spread=3.0, **settings):
    """A policy whose choices differ strongly from row to row."""
    policy = build_policy(config_for(base, AutoDecoConfig(**settings))).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        noise = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
        parameter.data = noise * spread
    return policy


def rows_of(tokenizer, per=2, samples=4):
    prompt = torch.arange(len(PROMPTS)).repeat_interleave(per)
    keys = [row_key(0, index, sample) for index in range(len(PROMPTS)) for sample in range(per)]
    encoded = [encode_prompt(tokenizer, text) for text in PROMPTS]
    return Rows(encoded, prompt, torch.tensor(BUDGETS)[prompt], torch.full(prompt.shape, samples), torch.tensor(keys))


def ids_of(groups):
    return [[one.token_ids for one in group] for group in groups]


# --- static settings --------------------------------------------------------------------------------------------------


def test_greedy_decoding_is_that_of_transformers(engine, base, tokenizer):
    asked = {"token_budget": BUDGETS, "settings": {"temperature": 0.0}}
    for ours, theirs in zip(
        engine.complete(PROMPTS, **asked), complete(base, tokenizer, PROMPTS, **asked), strict=True
    ):
        assert (ours[0].token_ids, ours[0].text, ours[0].ended) == (
            theirs[0].token_ids,
            theirs[0].text,
            theirs[0].ended,
        )
        np.testing.assert_array_equal(ours[0].temperature, theirs[0].temperature)


def test_a_repetition_penalty_is_applied(engine, tokenizer):
    base = load_base_model()
    base.generation_config.update(repetition_penalty=1.6, min_new_tokens=6)
    asked = {"token_budget": 24, "settings": {"temperature": 0.0}}
    expected = complete(base, tokenizer, PROMPTS, **asked)
    assert ids_of(expected) != ids_of(complete(load_base_model(), tokenizer, PROMPTS, **asked))
    another = build_engine("vllm", base, tokenizer, llm=engine.llm)
    assert ids_of(another.complete(PROMPTS, **asked)) == ids_of(expected)


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 1.6, "top_k": 7, "top_p": 0.8},
    {"temperature": 1.3, "top_p": 0.7},
    {"temperature": 2.0, "min_p": 0.1},
    {"temperature": 2.0, "top_k": 6, "min_p": 0.1},
    # vLLM's own sampler does these otherwise, so that they go through the plugin.
    {"temperature": 2.0, "top_p": 0.6, "min_p": 0.15},
    {"temperature": 0.004},
    {"temperature": 3.0, "top_k": 4},
]
DRAWN = 600


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_tokens_are_drawn_from_the_distribution_that_the_warp_says(engine, base, tokenizer, settings):
    """Of 2 prompts and 8 settings, a chi-square of each at 1e-5: a false alarm once in 6,000 seeds."""
    prompts = PROMPTS[:2]
    found = engine.complete(prompts, samples=DRAWN, token_budget=1, settings=settings, seed=1)
    for prompt, group in zip(prompts, found, strict=True):
        logits = base(torch.tensor([encode_prompt(tokenizer, prompt)])).logits[:, -1].detach()
        wanted = warp_logits(logits, SamplingParameters(**settings)).double().softmax(-1)[0].numpy()
        counts = np.bincount([one.token_ids[0] for one in group], minlength=len(wanted))
        assert not counts[wanted == 0].any()
        assert chance_of(counts, wanted * DRAWN) > 1e-5


def chance_of(counts, expected):
    """P value of Pearson's chi-square, rare tokens together."""
    rare = expected < 5
    pairs = [(counts[~rare], expected[~rare]), ([counts[rare].sum()], [expected[rare].sum()])]
    observed, wanted = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    squares = ((observed - wanted) ** 2 / wanted.clip(1)).sum()
    freedom = torch.tensor(max(len(wanted) - 1, 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(squares / 2, dtype=torch.float64)))


def test_a_call_can_be_repeated_and_completed_in_parts(engine):
    asked = {"token_budget": BUDGETS, "settings": {"temperature": 0.9, "top_p": 0.95}}
    whole = engine.complete(PROMPTS, samples=4, **asked)
    assert ids_of(engine.complete(PROMPTS, samples=4, **asked)) == ids_of(whole)
    assert ids_of(engine.complete(PROMPTS, samples=4, seed=1, **asked)) != ids_of(whole)
    wanted = [(4, 3), (0, 1), (5, 2)]
    parts = list(engine.complete_batches(PROMPTS, wanted, parallel_budget=4, **asked))
    found = {(index, sample): one for part in parts for index, sample, one in part}
    assert set(found) == set(wanted)
    assert all(one.token_ids == whole[index][sample].token_ids for (index, sample), one in found.items())


# --- policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_sequence_policy_decides_what_it_decides_in_transformers(engine, base, tokenizer, pooling):
    policy = policy_of(base, policy="sequence_actions", actions=ACTIONS, pooling=pooling)
    rows = rows_of(tokenizer)
    theirs = decode(base, policy, rows, ends={tokenizer.eos_token_id}, pad=0, records="decisions").decisions
    found, ours = engine.roll_out(policy, rows)
    for name in ("action", "row", "step"):
        assert torch.equal(vars(ours)[name], vars(theirs)[name])
    for name in ("context", "remaining_tokens", "parallel_samples"):
        torch.testing.assert_close(vars(ours.seen)[name], vars(theirs.seen)[name], rtol=1e-4, atol=1e-5)
    assert len(set(ours.action.tolist())) > 1
    greedy = complete(base, tokenizer, PROMPTS, token_budget=BUDGETS, settings={"temperature": 0.0})
    for row, one in enumerate(found):
        if ours.action[row] == 0:
            assert one.token_ids == greedy[row // 2][0].token_ids
    traced = engine.complete(PROMPTS, samples=2, token_budget=BUDGETS, parallel_budget=4, policy=policy)
    actions = [one.action[0] for group in traced for one in group]
    assert actions == ours.action.tolist()


def test_a_sequence_policy_that_vllm_would_sample_otherwise_decides_in_the_worker(engine, base, tokenizer):
    odd = [{"temperature": 1.0, "top_p": 0.5, "min_p": 0.1}, {"temperature": 0.0}]
    policy = policy_of(base, policy="sequence_actions", actions=odd)
    rows = rows_of(tokenizer)
    theirs = decode(base, policy, rows, ends={tokenizer.eos_token_id}, pad=0, records="decisions").decisions
    _, ours = engine.roll_out(policy, rows)
    assert torch.equal(ours.row, theirs.row)
    assert not ours.step.any()
    torch.testing.assert_close(ours.seen.context, theirs.seen.context, rtol=1e-3, atol=1e-3)
    traced = engine.complete(PROMPTS, samples=4, token_budget=12, policy=policy)
    assert all(len(set(one.action.tolist())) == 1 for group in traced for one in group)


@pytest.mark.parametrize("per", [2, 50], ids=["few", "more than fit at once"])
def test_a_token_policys_decisions_are_brought_back_from_the_worker(engine, base, tokenizer, per):
    policy = policy_of(base, spread=1.0, policy="token_actions", actions=ACTIONS, max_prob_mask=0.8)
    rows = rows_of(tokenizer, per)
    found, decisions = engine.roll_out(policy, rows)
    # Teacher-forced: what a policy would have seen at each of these tokens.
    for row, one in enumerate(found):
        prompt = rows.prompts[int(rows.prompt[row])]
        own = (decisions.row == row).nonzero().squeeze(-1)
        heard = []
        handle = base.get_output_embeddings().register_forward_pre_hook(
            lambda _, args, into=heard: into.append(args[0])
        )
        logits = base(torch.tensor([[*prompt, *one.token_ids]])).logits[0, len(prompt) - 1 : -1].detach()
        handle.remove()
        unsure = logits.softmax(-1).amax(-1) <= 0.8
        step = decisions.step[own]
        assert step.tolist() == unsure.nonzero().squeeze(-1).tolist()
        torch.testing.assert_close(
            decisions.seen.context[own], heard[0][0, len(prompt) - 1 : -1][step].detach(), rtol=1e-3, atol=1e-3
        )
        assert decisions.seen.remaining_tokens[own].tolist() == (rows.token_budget[row] - step).tolist()
        assert set(decisions.seen.parallel_samples[own].tolist()) <= {4}
        sure = [token for token, ok in zip(one.token_ids, unsure.tolist(), strict=True) if not ok]
        assert sure == logits.argmax(-1)[~unsure].tolist()
    # Drawn by the request's own random numbers.
    keys = torch.tensor([row_key(key) for key in rows.keys.tolist()])[decisions.row]
    with torch.no_grad():
        again = draw(policy.action_logits(decisions.seen).softmax(-1), row_uniforms(keys, decisions.step, 0))
    assert torch.equal(again, decisions.action)
    assert len(set(decisions.action.tolist())) > 1


@pytest.mark.parametrize("kind", ["heads", "entropy", "mixture"])
def test_what_tokens_were_sampled_with_is_recorded(engine, base, tokenizer, kind):
    settings = {
        "heads": {"policy": "heads"},
        "entropy": {"policy": "entropy", "entropy_rule": {"name": "edt", "temperature": 1.2, "theta": 0.5}},
        "mixture": {"policy": "static", "actions": ACTIONS},
    }[kind]
    policy = policy_of(base, **settings)
    for group in engine.complete(PROMPTS, samples=2, token_budget=12, policy=policy):
        for one in group:
            assert len(one.temperature) == len(one.top_p) == len(one.token_ids)
            if kind == "mixture":
                wanted = [ACTIONS[action]["temperature"] for action in one.action]
                np.testing.assert_allclose(one.temperature, wanted)
            else:
                assert one.action is None
                assert one.temperature.std() > 0.01 or len(one.temperature) < 3


def test_new_weights_reach_the_engine_without_a_restart(engine, base, tokenizer):
    before = engine.llm
    policy = policy_of(base, policy="token_actions", actions=ACTIONS)
    rows = rows_of(tokenizer)
    for wanted in (2, 0, 1):
        with torch.no_grad():
            policy.layers[-1].weight.zero_()
            policy.layers[-1].bias.copy_(torch.full((3,), -40.0)).index_fill_(0, torch.tensor([wanted]), 40.0)
        assert set(engine.roll_out(policy, rows)[1].action.tolist()) == {wanted}
    assert engine.llm is before


def test_exploring_draws_what_using_would_not(engine, base, tokenizer):
    policy = policy_of(base, spread=0.01, policy="token_actions", actions=ACTIONS, deterministic=True)
    policy.layers[-1].bias.data = torch.tensor([0.0, 0.3, 0.0])
    usual = engine.roll_out(policy, rows_of(tokenizer))[1].action
    policy.deterministic = False
    explored = engine.roll_out(policy, rows_of(tokenizer))[1].action
    assert set(usual.tolist()) == {1}
    assert set(explored.tolist()) == {0, 1, 2}


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_vllm_cannot_do_it_refuses_by_name(engine, base, tokenizer):
    class Own(StaticPolicy):
        """Of a kind that no worker knows."""

    own = Own(AutoDecoConfig(policy="static", actions=ACTIONS))
    with pytest.raises(UnsupportedGenerationError, match="Own has no name by which vLLM's workers could be given it"):
        engine.complete(PROMPTS, policy=own)
    longest = engine.llm.llm_engine.model_config.max_model_len
    with pytest.raises(BudgetError, match=f"`max_model_len` is {longest}"):
        engine.complete(PROMPTS, token_budget=longest)


def test_a_model_that_lies_nowhere_is_refused(tokenizer):
    base = load_base_model()
    base.config.name_or_path = ""
    with pytest.raises(UnsupportedGenerationError, match="save it with `save_pretrained`"):
        build_engine("vllm", base, tokenizer)


# --- evaluation and training ------------------------------------------------------------------------------------------


def adaptive(**config):
    torch.manual_seed(0)
    return AutoDecoForCausalLM.from_base(load_base_model(), AutoDecoConfig(**config)).eval()


@pytest.mark.parametrize("kind", ["heads", "sequence_actions"])
def test_an_evaluation_gives_the_figures_of_transformers_within_their_intervals(kind, tmp_path):
    """
    Each decoder's rate of success differs by less than 4.5 standard errors of problems drawn independently. Of about 8
    decoders and 2 policies, a false alarm once in 9,000 seeds; and the greedy ones are the same.
    """
    settings = {} if kind == "heads" else {"actions": ACTIONS}
    task = load_task("testbed", validation=16, test=60)
    how = {"samples": 8, "token_budgets": 32, "grid": [{"temperature": 0.5}, {"temperature": 1.0, "top_p": 0.9}]}
    how |= {"baselines": ["mixture", "shuffle", "edt"], "show_progress": False, "ks": (1, 8)}
    expected, found = (
        evaluate_decoding(
            adaptive(policy=kind, **settings), load_tokenizer(), task, **how, engine=engine, folder=tmp_path / engine
        )
        for engine in ("transformers", "vllm")
    )
    seen = 0
    for line in found.measures:
        if line["role"] in ("adapter", "greedy", "default", "mixture"):
            other = expected.find(line["role"], for_k=line["for_k"])
            for metric in ("pass@1", "pass@8"):
                errors = [(one[metric]["high"] - one[metric]["low"]) / 2 / 1.96 for one in (line, other)]
                assert abs(line[metric]["mean"] - other[metric]["mean"]) <= 4.5 * np.hypot(*errors) + 1e-9
            assert line["engine"] == "vllm"
            seen += 1
    assert seen >= (3 if kind == "heads" else 4)
    greedy = ("pass@1", "mean_tokens", "truncated")
    assert [found.find("greedy")[name] for name in greedy] == [expected.find("greedy")[name] for name in greedy]
    assert found.find("shuffle")["engine"] == "transformers"
    assert "ShuffledPolicy" in found.find("shuffle")["engine_refused"]
    assert found.find("edt")["engine"] == "vllm"


def test_decoders_of_ones_own_go_through_vllm_or_say_why_not(engine, base, tokenizer):
    task = load_task("testbed", validation=4, test=4)
    mixed = Decoder("mixed", policy=policy_of(base, policy="static", actions=ACTIONS, mixture_per="sequence"))
    how = {"samples": 2, "token_budgets": 16, "grid": [{"temperature": 0.5}], "show_progress": False}
    found = evaluate_decoding(base, tokenizer, task, baselines=["greedy", mixed], engine=engine, **how)
    assert {line["engine"] for line in found.measures} == {"vllm"}


@pytest.mark.parametrize("kind", ["sequence_actions", "token_actions"])
def test_training_through_vllm_learns_what_training_through_transformers_learns(kind, tmp_path):
    """
    The reward of the first step, before anything is learned, within 4.5 standard errors (a false alarm once in 70,000
    seeds for each policy); in the end, the greedy action, which earns four times as much, nearly always.
    """
    rewards, favoured = {}, {}
    for engine in ("transformers", "vllm"):
        model = adaptive(policy=kind, actions=[{"temperature": 0.0}, {"temperature": 2.0}], policy_dropout=0.0)
        args = arguments(
            tmp_path / engine,
            rollout_engine=engine,
            budget=24,
            per_device_train_batch_size=32,
            num_generations=8,
            max_steps=16,
            learning_rate=1e-2,
            max_prob_mask=None,
        )
        trainer = REINFORCEDecodingTrainer(
            model, testbed_reward, args, build_problems("train", 256), None, load_tokenizer()
        )
        trainer.train()
        trainer._maker.engine.close()
        logs = [line for line in trainer.state.log_history if "reward" in line]
        rewards[engine] = [line["reward"] for line in logs]
        favoured[engine] = [line["action/0"] for line in logs]
    # 256 completions of 32 prompts; a reward of 0 or 1 varies by at most 1/4 a prompt, whatever its samples share.
    error = np.hypot(*[0.5 / np.sqrt(32)] * 2)
    assert abs(rewards["vllm"][0] - rewards["transformers"][0]) < 4.5 * error
    assert abs(favoured["vllm"][0] - 0.5) < 0.15
    for engine in rewards:
        assert favoured[engine][-1] > 0.85, favoured  # of four other seeds of either engine, from 0.89 to 1


def test_an_engine_is_chosen_on_the_command_line(tmp_path):
    words = "--validation-problems 2 --test-problems 2 --samples 1 --token-budget 8 --baselines greedy"
    options = ["--engine", "vllm", "--engine-options", '{"max_model_len": 200}']
    assert main(["evaluate", *words.split(), *options, "--output", str(tmp_path)]) == 0
    found = Evaluation.load(tmp_path / "results.jsonl")
    assert {line["engine"] for line in found.measures} == {"vllm"}
