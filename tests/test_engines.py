"""Engines: that they give the same completions and the same decisions, refuse what they cannot do, and fit in."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from test_rollout import POLICIES, PROMPTS, policy_of, rows_of
from test_tokens import Numbers

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM, REINFORCEDecodingTrainingArguments
from hf_adaptive_decode.cli.main import main
from hf_adaptive_decode.engines.by_name import ENGINES, build_engine
from hf_adaptive_decode.engines.transformers import complete
from hf_adaptive_decode.errors import BudgetError, LogitsError, UnsupportedGenerationError
from hf_adaptive_decode.evaluation import Evaluation, evaluate_decoding
from hf_adaptive_decode.evaluation.runner import Decoder
from hf_adaptive_decode.evaluation.tasks import load_task
from hf_adaptive_decode.policies import DecodingPolicy
from hf_adaptive_decode.testbed import load_base_model, load_tokenizer
from hf_adaptive_decode.types import SamplingParameters

TEXTS = [" ".join(map(str, prompt)) for prompt in PROMPTS]
# Prompts are read in parts, and rows wait for pages.
SMALL = {"page_size": 8, "num_blocks": 24, "max_batch_tokens": 8}
LAST = {**POLICIES, "sequence": {**POLICIES["sequence"], "pooling": "last"}}
LAST["held mixture"] = {**POLICIES["mixture"], "mixture_per": "sequence"}


def batching(model, **how):
    return build_engine("continuous_batching", model, Numbers(), **how)


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one.token_ids, one.text, one.ended) == (other.token_ids, other.text, other.ended)
            for name in ("temperature", "top_p", "action"):
                mine, its = vars(one)[name], vars(other)[name]
                assert (mine is None) == (its is None)
                if mine is not None:
                    assert mine.dtype == its.dtype
                    np.testing.assert_allclose(mine, its, rtol=1e-3, atol=1e-4)


# --- continuous batching draws what transformers draws ----------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"batch_rows": 3}, {"batching": SMALL}], ids=["usual", "few", "small"])
@pytest.mark.parametrize("kind", LAST)
def test_both_engines_write_the_same(kind, how):
    base = tiny.build_base()
    policy = policy_of(base, **LAST[kind])
    asked = {"samples": 3, "token_budget": [12, 5, 9, 1], "parallel_budget": 4, "policy": policy, "seed": 3}
    expected = complete(base, Numbers(), TEXTS, **asked)
    assert_same(batching(base, **how).complete(TEXTS, **asked), expected)
    assert tiny.hooks_left(base) == 0


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.05}]
)
def test_static_settings_are_those_of_transformers(settings):
    base = tiny.build_base("llama")
    asked = {"samples": 4, "token_budget": 10, "settings": settings}
    assert_same(batching(base).complete(TEXTS, **asked), complete(base, Numbers(), TEXTS, **asked))


def test_a_models_own_adapter_decides_and_stays_its_own(model):
    asked = {"samples": 3, "token_budget": 8, "seed": 5}
    expected = complete(model, Numbers(), TEXTS, **asked)
    assert_same(batching(model).complete(TEXTS, **asked), expected)
    assert_same(complete(model, Numbers(), TEXTS, **asked), expected)


def test_some_completions_are_those_of_all(base):
    engine = batching(base)
    whole = engine.complete(TEXTS, samples=4, token_budget=9)
    wanted = [(2, 3), (0, 1), (3, 0)]
    found = [one for part in engine.complete_batches(TEXTS, wanted, token_budget=9, parallel_budget=4) for one in part]
    assert sorted(one[:2] for one in found) == sorted(wanted)
    assert all(completion.token_ids == whole[index][sample].token_ids for index, sample, completion in found)


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_both_engines_record_the_same_decisions(kind):
    base = tiny.build_base()
    policy = policy_of(base, **LAST[kind])
    rows = rows_of(PROMPTS, per=3, budget=torch.tensor([12, 5, 9, 7]).repeat_interleave(3), samples=4)
    expected, theirs = build_engine("transformers", base, Numbers()).roll_out(policy, rows)
    found, ours = batching(base, batching=SMALL).roll_out(policy, rows)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    for name in ("action", "row", "step"):
        assert torch.equal(vars(ours)[name], vars(theirs)[name])
    for name in ("context", "remaining_tokens", "parallel_samples"):
        torch.testing.assert_close(vars(ours.seen)[name], vars(theirs.seen)[name], rtol=1e-3, atol=1e-4)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_an_unknown_engine_is_refused_by_the_names_of_those_there_are(base):
    for refused in (
        lambda: build_engine("vlm", base, Numbers()),
        lambda: REINFORCEDecodingTrainingArguments(output_dir="unused", rollout_engine="vlm"),
        lambda: evaluate_decoding(base, Numbers(), load_task("testbed", validation=1, test=1), engine="vlm"),
    ):
        with pytest.raises(ValueError, match="no engine 'vlm'; choose among 'transformers', 'continuous_batching'"):
            refused()


def test_an_unknown_option_of_an_engine_is_refused(base):
    with pytest.raises(ValueError, match="'transformers' has no option 'pages'; it takes none"):
        build_engine("transformers", base, Numbers(), pages=3)
    with pytest.raises(ValueError, match="no option 'pages'; it takes 'batching'"):
        build_engine("continuous_batching", base, Numbers(), pages=3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda base: None, "mean over a prompt"),
        (lambda base: base.generation_config.update(repetition_penalty=1.2), "RepetitionPenaltyLogitsProcessor"),
    ],
)
def test_continuous_batching_says_what_it_refuses_before_it_begins(base, change, said):
    pooled = policy_of(base, **POLICIES["sequence"]) if said.startswith("mean") else None
    change(base)
    engine = batching(base)
    assert said in engine.refusal(policy=pooled)
    with tiny.counted_forwards(base) as calls:
        with pytest.raises(UnsupportedGenerationError, match=said):
            engine.complete(TEXTS, policy=pooled, token_budget=3)
        assert not calls


def test_a_model_with_a_state_is_refused():
    engine = batching(tiny.build_base("mamba"))
    assert "a state besides" in engine.refusal(settings={"temperature": 1.0})


def test_a_bad_budget_is_refused(base):
    with pytest.raises(BudgetError):
        batching(base).complete(TEXTS, token_budget=0)


class Broken(DecodingPolicy):
    """Decides nothing that could be sampled with, once a row is at its third token."""

    def __init__(self):
        super().__init__(AutoDecoConfig(hidden_size=32))

    def forward(self, state):
        late = state.remaining_tokens <= 3
        return SamplingParameters(temperature=torch.where(late, torch.nan, 1.0))


def test_what_goes_wrong_in_a_batch_is_told_as_anywhere(base):
    with pytest.raises(LogitsError, match="step 2"):
        batching(base).complete(TEXTS, policy=Broken(), token_budget=5)
    assert tiny.hooks_left(base) == 0
    assert "_get_logits_processor" not in vars(base)


# --- evaluation and training through an engine ------------------------------------------------------------------------

EVALUATED = {"samples": 2, "token_budgets": 24, "grid": [{"temperature": 0.5}], "show_progress": False}


@pytest.fixture(scope="module")
def task():
    return load_task("testbed", validation=4, test=6)


def adaptive(**config):
    torch.manual_seed(0)
    return AutoDecoForCausalLM.from_base(load_base_model(), AutoDecoConfig(**config)).eval()


def without_times(lines):
    dropped = ("engine", "engine_refused", "seconds_per_1k_tokens")
    return [{name: value for name, value in line.items() if name not in dropped} for line in lines]


def test_an_evaluation_by_continuous_batching_has_the_figures_of_transformers(task):
    how = {**EVALUATED, "baselines": ["shuffle_in_bins"]}
    expected, found = (
        evaluate_decoding(adaptive(policy="heads"), load_tokenizer(), task, **how, engine=engine)
        for engine in ("transformers", "continuous_batching")
    )
    assert {line["engine"] for line in found.measures} == {"continuous_batching"}
    assert found.lines[0]["engine"] == "continuous_batching"
    for ours, theirs in zip(without_times(found.lines[1:]), without_times(expected.lines[1:]), strict=True):
        means = [ours.pop("mean_temperature", 0.0), ours.pop("mean_top_p", 0.0)]
        assert means == pytest.approx([theirs.pop("mean_temperature", 0.0), theirs.pop("mean_top_p", 0.0)], rel=1e-4)
        if (ours.get("settings") or {}) != {}:
            assert ours["settings"] == pytest.approx(theirs.pop("settings"), rel=1e-4)
            ours.pop("settings"), ours.pop("decoder"), theirs.pop("decoder")
        assert ours == theirs


def test_a_baseline_that_an_engine_refuses_is_run_in_transformers_with_that_said(task):
    model, tokenizer = load_base_model(), load_tokenizer()
    actions = [{"temperature": 0.0}, {"temperature": 1.0}]
    pooled = policy_of(load_base_model(), policy="sequence_actions", actions=actions, pooling="mean")
    how = {**EVALUATED, "baselines": ["greedy", Decoder("pooled", policy=pooled)], "engine": "continuous_batching"}
    found = evaluate_decoding(model, tokenizer, task, **how)
    line = found.find("rival")
    assert line["engine"] == "transformers"
    assert "mean over a prompt" in line["engine_refused"]
    assert "engine_refused" not in found.find("greedy")
    assert "pooled, in transformers" in found.table()


def test_an_adapter_that_an_engine_refuses_is_not_measured(task):
    actions = [{"temperature": 0.0}, {"temperature": 1.0}]
    model = adaptive(policy="sequence_actions", actions=actions, pooling="mean")
    with pytest.raises(UnsupportedGenerationError, match=r"'adapter' cannot be measured: .*mean over a prompt"):
        evaluate_decoding(model, load_tokenizer(), task, **EVALUATED, engine="continuous_batching")


def test_completions_of_another_engine_are_kept_apart(task, tmp_path):
    how = {**EVALUATED, "baselines": ["greedy"], "folder": tmp_path}
    for engine in ("transformers", "continuous_batching", "transformers"):
        evaluate_decoding(load_base_model(), load_tokenizer(), task, **how, engine=engine)
    lines = (tmp_path / "completions.jsonl").read_text().splitlines()
    assert len(lines) == 2 * (1 + 6)


@pytest.mark.parametrize("policy", ["token_actions", "sequence_actions"])
def test_training_by_continuous_batching_is_training_by_transformers(policy, tmp_path):
    from reinforce_tables import arguments

    from hf_adaptive_decode import REINFORCEDecodingTrainer
    from hf_adaptive_decode.testbed import build_problems, testbed_reward

    weights = []
    for engine in ("transformers", "continuous_batching"):
        actions = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.5, "top_k": 5}]
        model = adaptive(policy=policy, actions=actions, policy_dropout=0.0)
        # Not Adam, which would turn the last digits of a small gradient into a step.
        plain = {"optim": "sgd", "learning_rate": 0.1, "rollout_engine": engine, "budget": 24, "max_steps": 2}
        problems = build_problems("train", 16)
        args = arguments(tmp_path / engine, **plain)
        REINFORCEDecodingTrainer(model, testbed_reward, args, problems, None, load_tokenizer()).train()
        weights.append([parameter.detach().clone() for parameter in model.decoding_adapter.parameters()])
    fresh = list(adaptive(policy=policy, actions=actions).decoding_adapter.parameters())
    assert not torch.equal(weights[0][-1], fresh[-1])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_every_engine_is_in_the_dict_by_its_own_name():
    assert all(name == engine.name for name, engine in ENGINES.items())


def test_an_engine_is_chosen_on_the_command_line(tmp_path, capsys):
    words = "--validation-problems 2 --test-problems 2 --samples 1 --token-budget 8 --baselines greedy"
    options = ["--engine", "continuous_batching", "--engine-options", '{"batching": {"page_size": 8}}']
    assert main(["evaluate", *words.split(), *options, "--output", str(tmp_path)]) == 0
    found = Evaluation.load(tmp_path / "results.jsonl")
    assert {line["engine"] for line in found.measures} == {"continuous_batching"}
