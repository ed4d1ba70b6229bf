"""Commands for less or more diversity: the ranking loss, its trainer, its measure, and the commands of the testbed."""

import copy
import importlib.util
import itertools
import json
import math
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import CHAT, adapter_of, arguments, build_rows, build_tokenizer
from tiny import build_base, prompts, randomise_heads, wrap
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_adaptive_decode import (
    AutoDecoConfig,
    AutoDecoForCausalLM,
    AutoDecoTrainer,
    AutoDecoTrainingArguments,
    DecodeState,
)
from hf_adaptive_decode.checks import check_parameters
from hf_adaptive_decode.engines.transformers import complete
from hf_adaptive_decode.errors import AdaptiveDecodeError, LogitsError
from hf_adaptive_decode.evaluation.control_table import control_table, measure_control
from hf_adaptive_decode.losses.control import RankingLossConfig, RowMeans, mean_predictions, ranking_loss
from hf_adaptive_decode.policies import build_policy
from hf_adaptive_decode.testbed import build_problems, load_base_model, load_tokenizer
from hf_adaptive_decode.testbed.commands import (
    COMMANDS,
    WORDS,
    build_command_base,
    build_command_problems,
    command_corpus,
    command_reward,
    entropy_under_commands,
    split_command,
    write_obeying,
)
from hf_adaptive_decode.testbed.commands import main as make_command_base
from hf_adaptive_decode.testbed.problems import SIGN_PATTERNS, draw_problem
from hf_adaptive_decode.testbed.tasks import split_of
from hf_adaptive_decode.training import DataFormatError, DecodingDataCollator
from hf_adaptive_decode.training.control import DIVERSITY_COMMANDS, CommandSet, with_command, with_commands
from hf_adaptive_decode.training.data import tokenized

ROOT = Path(__file__).parents[1]
SET = CommandSet(low=("w70 w71", "w72"), high=("w75 w76", "w77"))
COMMANDED = {"control_loss_weight": 2.0, "control_commands": asdict(SET)}


# --- the loss ---------------------------------------------------------------------------------------------------------


def means(temperature, top_p, present):
    as_tensor = [None if v is None else torch.tensor(v, dtype=torch.float64) for v in (temperature, top_p)]
    return RowMeans(*as_tensor, torch.tensor(present))


def hinges_by_hand(low, base, high, margins):
    """Sum of hinges and number of pairs, row by row, in Python's numbers."""
    total, pairs = 0.0, 0
    for row in range(len(base.present)):
        for lower, upper in ((low, base), (base, high)):
            if not (lower.present[row] and upper.present[row]):
                continue
            pairs += 1
            for name, margin in margins.items():
                below, above = vars(lower)[name], vars(upper)[name]
                if below is not None:
                    total += max(0.0, float(below[row]) + margin - float(above[row]))
    return total, pairs


number = st.floats(0.0, 2.0, width=32)
version = st.lists(st.tuples(number, number, st.booleans()), min_size=4, max_size=4)


@settings(max_examples=50)
@given(version, version, version, number, number, st.sampled_from(["both", "temperature", "top_p"]))
def test_the_loss_is_the_sum_of_the_pairs_hinges(low, base, high, margin_t, margin_p, heads):
    versions = []
    for rows in (low, base, high):
        t, p, present = map(list, zip(*rows, strict=True))
        versions.append(means(t if heads != "top_p" else None, p if heads != "temperature" else None, present))
    found = ranking_loss(*versions, RankingLossConfig(margin_t, margin_p))
    total, pairs = hinges_by_hand(*versions, {"temperature": margin_t, "top_p": margin_p})
    assert found.n_pairs == pairs
    assert float(found.loss_sum) == pytest.approx(total, abs=1e-9)
    assert float(found.loss) == pytest.approx(total / max(pairs, 1), abs=1e-9)
    assert float(ranking_loss(*versions, RankingLossConfig(margin_t, margin_p), num_pairs=7).loss) == pytest.approx(
        total / 7, abs=1e-9
    )


def test_versions_in_order_by_their_margins_have_no_loss_and_no_gradient():
    t = {
        name: torch.tensor([value], requires_grad=True) for name, value in (("low", 0.5), ("base", 0.7), ("high", 1.0))
    }
    rows = [RowMeans(t[name], None, torch.tensor([True])) for name in ("low", "base", "high")]
    loss = ranking_loss(*rows, RankingLossConfig(temperature_margin=0.19)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(value.grad.item() == 0.0 for value in t.values())


def test_a_pair_out_of_order_is_pulled_apart():
    t = {
        name: torch.tensor([value], requires_grad=True) for name, value in (("low", 0.7), ("base", 0.7), ("high", 2.0))
    }
    rows = [RowMeans(t[name], None, torch.tensor([True])) for name in ("low", "base", "high")]
    ranking_loss(*rows).loss.backward()
    assert [t[name].grad.item() for name in ("low", "base", "high")] == [0.5, -0.5, 0.0]


def test_the_gradient_through_means_and_hinges_is_the_numeric_one():
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([0, 0, 2, 1, 2, 2])
    values = [torch.rand(6, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(6)]

    def loss(*values):
        versions = [
            mean_predictions(torch.zeros(6, 1), rows, 4, lambda *_, pair=pair: pair)
            for pair in (values[:2], values[2:4], values[4:])
        ]
        return ranking_loss(*versions, RankingLossConfig(0.31, 0.17)).loss

    assert torch.autograd.gradcheck(loss, values)


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
@pytest.mark.parametrize("with_logits", [False, True])
def test_means_are_those_of_each_row_however_they_are_cut(chunk_size, with_logits):
    generator = torch.Generator().manual_seed(0)
    hidden, rows = torch.randn(11, 5, generator=generator), torch.tensor([0, 3, 3, 1, 0, 0, 3, 1, 1, 1, 0])
    layer = torch.randn(5, 7, generator=generator)
    shapes = []

    def predict(part, logits):
        shapes.append(len(part))
        assert (logits is not None) == with_logits
        extra = 0.0 if logits is None else logits.amax(1)
        return part[:, 0] + extra, None

    project = (lambda part: part @ layer) if with_logits else None
    found = mean_predictions(hidden, rows, 5, predict, project, chunk_size=chunk_size)
    each = hidden[:, 0] + ((hidden @ layer).amax(1) if with_logits else 0.0)
    wanted = [each[rows == row].mean() if (rows == row).any() else torch.tensor(0.0) for row in range(5)]
    torch.testing.assert_close(found.temperature, torch.stack(wanted))
    assert found.top_p is None
    assert found.present.tolist() == [True, True, False, True, False]
    assert sum(shapes) == 11
    assert max(shapes) <= (chunk_size or 11)


def test_without_any_token_the_loss_is_a_zero_that_reaches_the_policy():
    policy = build_policy(AutoDecoConfig(hidden_size=8, vocab_size=4))

    def predict(part, _):
        parameters = policy(DecodeState(part))
        return parameters.temperature, parameters.top_p

    nothing = [mean_predictions(torch.zeros(0, 8), torch.zeros(0, dtype=torch.long), 2, predict) for _ in range(3)]
    found = ranking_loss(*nothing)
    assert (found.loss.item(), found.n_pairs) == (0.0, 0)
    found.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


@pytest.mark.parametrize(
    "bad", [{"temperature_margin": -0.1}, {"top_p_margin": math.nan}, {"weight": math.inf}], ids=str
)
def test_a_bad_margin_or_weight_is_refused(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=name):
        RankingLossConfig(**bad)


# --- commands and data ------------------------------------------------------------------------------------------------


def test_a_command_stands_at_the_end_of_a_prompt_or_of_the_last_user_message():
    assert with_command("Tell a story.", "Be bold.") == "Tell a story. Be bold."
    talk = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    before = copy.deepcopy(talk)
    told = with_command(talk, "Be bold.")
    assert [message["content"] for message in told] == ["s", "one", "two", "three Be bold."]
    assert talk == before
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert with_command(parts, "Be bold.")[0]["content"][-1] == {"type": "text", "text": "Be bold."}
    with pytest.raises(ValueError, match="no user message"):
        with_command(talk[:1], "Be bold.")


def test_the_commands_of_a_row_depend_on_the_seed_and_its_place_alone():
    datasets = pytest.importorskip("datasets")
    rows = build_rows(40)
    first = with_commands(rows, SET, seed=1)
    assert first == with_commands(rows, SET, seed=1)
    assert first[:7] == with_commands(rows[:7], SET, seed=1)
    assert first != with_commands(rows, SET, seed=2)
    for row, plain in zip(first, rows, strict=True):
        assert {name: row[name] for name in plain} == plain
        assert row["low_prompt"] in [f"{plain['prompt']} {command}" for command in SET.low]
        assert row["high_prompt"] in [f"{plain['prompt']} {command}" for command in SET.high]
    assert {row["low_prompt"].removeprefix(row["prompt"]).strip() for row in first} == set(SET.low)
    assert list(with_commands(datasets.Dataset.from_list(rows), SET, seed=1)) == first


def test_the_built_in_commands_held_out_are_none_of_those_trained_on():
    trained, held_out = DIVERSITY_COMMANDS["train"], DIVERSITY_COMMANDS["held_out"]
    for name in ("low", "high"):
        assert not set(vars(trained)[name]) & set(vars(held_out)[name])
        assert len(set(vars(trained)[name])) == len(vars(trained)[name]) >= 8
        assert len(set(vars(held_out)[name])) == len(vars(held_out)[name]) >= 4


@pytest.mark.parametrize(
    "bad",
    [{"low": ["a"]}, {"low": [], "high": ["b"]}, {"low": "a", "high": ["b"]}, {"low": [" "], "high": ["b"]}, "x", 3],
)
def test_commands_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="low"):
        CommandSet.read(bad)


@pytest.mark.parametrize("kept", [8, 4, 1])
@pytest.mark.parametrize("conversational", [False, True])
def test_every_version_has_the_same_completion_even_where_it_is_cut(kept, conversational):
    tokenizer = build_tokenizer(CHAT if conversational else None)
    row, prompt_length = {"prompt": "w1 w2", "completion": " w3 w4 w5 w6 w7 w8 w9"}, 2
    if conversational:
        user, answer = {"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4 w5 w6 w7 w8 w9"}
        row, prompt_length = {"prompt": [user], "completion": [answer]}, 5  # [user] w1 w2 [end] [assistant]
    max_length = prompt_length + kept
    (example,) = tokenized(with_commands([row], SET), tokenizer, max_length, versions=True)
    batch = DecodingDataCollator(0)([example])
    said = [label for label in batch["labels"][0].tolist() if label != -100]
    assert len(said) == kept
    for name in ("low", "high"):
        labels, ids = batch[f"{name}_labels"][0].tolist(), batch[f"{name}_input_ids"][0].tolist()
        assert labels == [-100] * (len(ids) - kept) + said
        assert ids[-kept:] == said
        assert any(command in tokenizer.decode(ids[:-kept]) for command in vars(SET)[name])
        assert batch[f"{name}_attention_mask"].tolist() == [[1] * len(ids)]
    assert tokenized([example], tokenizer, max_length, versions=True) == [example]


def test_rows_without_a_command_are_padding_there():
    rows = [{**row, "low_prompt": None, "high_prompt": "w1 w77"} for row in build_rows(2)]
    rows[0] |= {"high_prompt": None, "low_prompt": "w1 w72"}
    batch = DecodingDataCollator(0)(tokenized(rows, build_tokenizer(), None, versions=True))
    has = {name: (batch[f"{name}_labels"] != -100).any(1).tolist() for name in ("low", "high")}
    assert has == {"low": [True, False], "high": [False, True]}
    assert not batch["low_attention_mask"][1].any()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "w1", "completion": " w2"},
        {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}], "low_prompt": "w1"},
    ],
    ids=["no command", "no completion"],
)
def test_data_that_cannot_teach_commands_is_refused(row, tmp_path):
    with pytest.raises(DataFormatError, match="low_prompt"):
        AutoDecoTrainer(
            wrap(),
            arguments(tmp_path, control_loss_weight=1.0),
            train_dataset=[row],
            processing_class=build_tokenizer(CHAT),
        )


def test_a_data_sets_own_commands_stand(tmp_path):
    rows = [{**row, "low_prompt": "w1 w78", "high_prompt": "w1 w79"} for row in build_rows(4)]
    trainer = AutoDecoTrainer(
        wrap(), arguments(tmp_path, **COMMANDED), train_dataset=rows, processing_class=build_tokenizer()
    )
    said = {name: build_tokenizer().decode(trainer.train_dataset[0][f"{name}_prompt_ids"]) for name in ("low", "high")}
    assert said == {"low": "w1 w78", "high": "w1 w79"}


def test_commands_need_a_prompt_to_stand_behind(tmp_path):
    with pytest.raises(DataFormatError, match="`prompt`"):
        AutoDecoTrainer(
            wrap(), arguments(tmp_path, **COMMANDED), train_dataset=[{"text": "w1"}], processing_class=build_tokenizer()
        )


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"control_loss_weight": -1.0},
        {"control_temperature_margin": -0.1},
        {"control_top_p_margin": math.nan},
        {"control_commands": "diversity"},
        {"control_commands": "some", "control_loss_weight": 1.0},
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_once(bad, tmp_path):
    with pytest.raises(ValueError, match=r"margin|weight|commands"):
        arguments(tmp_path, **bad)


@pytest.mark.parametrize("given", [SET, asdict(SET), json.dumps(asdict(SET))], ids=["set", "dict", "JSON"])
def test_commands_are_taken_in_several_forms_and_written_as_json(given, tmp_path):
    args = arguments(tmp_path, control_loss_weight=1.0, control_commands=given)
    assert CommandSet.read(args.control_commands) == SET
    assert CommandSet.read(json.loads(args.to_json_string())["control_commands"]) == SET


def test_the_built_in_commands_can_be_named_on_a_command_line_and_dicts_are_json_there(tmp_path):
    words = [
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "--control_loss_weight",
        "1",
        "--control_commands",
        "diversity",
    ]
    words += ["--chat_template_kwargs", '{"enable_thinking": false}']
    (args,) = HfArgumentParser(AutoDecoTrainingArguments).parse_args_into_dataclasses(words)
    assert CommandSet.read(args.control_commands) == DIVERSITY_COMMANDS["train"]
    assert args.chat_template_kwargs == {"enable_thinking": False}


# --- training ---------------------------------------------------------------------------------------------------------


def train(folder, rows=None, model=None, resume=None, eval_rows=None, **settings):
    torch.manual_seed(0)
    model = model or AutoDecoForCausalLM.from_base(build_base("qwen3"))
    trainer = AutoDecoTrainer(
        model,
        arguments(folder, **settings),
        train_dataset=rows or build_rows(),
        eval_dataset=eval_rows,
        processing_class=build_tokenizer(),
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def patchy_rows(count=32):
    """Some rows with both commands, some with one, some with none."""
    rows = with_commands(build_rows(count), SET)
    for index, row in enumerate(rows):
        row["low_prompt"] = None if index % 3 == 1 else row["low_prompt"]
        row["high_prompt"] = None if index % 4 == 1 else row["high_prompt"]
    return rows


@pytest.mark.parametrize("features", [["hidden"], ["hidden", "statistics"]], ids=str)
def test_a_batch_has_the_decoding_loss_plus_the_weighted_hinges(features, tmp_path):
    model = randomise_heads(wrap(features=features))
    settings = {"control_temperature_margin": 0.3, "control_top_p_margin": 0.2}
    losses, gradients = {}, {}
    for weight in (0.0, 1.5):
        trainer = AutoDecoTrainer(
            model,
            arguments(tmp_path, control_loss_weight=weight, **settings),
            train_dataset=patchy_rows(),
            processing_class=build_tokenizer(),
        )
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
        model.train()
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        losses[weight] = loss.item()
        gradients[weight] = [p.grad.clone() for p in model.decoding_adapter.parameters()]
        model.zero_grad()

    def of_row(ids, labels, mask):
        """Mean T and P over the completion, from the whole model's own outputs for this row alone."""
        length = int(mask.sum())
        heard = []
        handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: heard.append(args[0]))
        with torch.no_grad():
            logits = model(input_ids=ids[None, :length]).logits
        handle.remove()
        at = (labels[1:length] != -100).nonzero()[:, 0]
        parameters = model.decoding_adapter(DecodeState(heard[0][0, at], logits[0, at]))
        return parameters.temperature.mean(), parameters.top_p.mean()

    total, pairs = torch.zeros(()), 0
    for row in range(8):
        found = {}
        for name, prefix in (("base", ""), ("low", "low_"), ("high", "high_")):
            columns = [batch[f"{prefix}{column}"][row] for column in ("input_ids", "labels", "attention_mask")]
            if (columns[1] != -100).any():
                found[name] = of_row(*columns)
        for lower, upper in (("low", "base"), ("base", "high")):
            if lower in found and upper in found:
                pairs += 1
                for below, above, margin in zip(found[lower], found[upper], (0.3, 0.2), strict=True):
                    total = total + torch.relu(below + margin - above)
    assert 8 < pairs < 16
    expected = total / pairs * 1.5
    assert expected > 0.05
    assert losses[1.5] - losses[0.0] == pytest.approx(expected.item(), rel=1e-4)
    expected.backward()
    for whole, plain, p in zip(gradients[1.5], gradients[0.0], model.decoding_adapter.parameters(), strict=True):
        torch.testing.assert_close(whole - plain, p.grad, rtol=2e-3, atol=2e-6)


def test_without_a_weight_commands_change_nothing(tmp_path):
    plain, _ = train(tmp_path / "a", save_strategy="no")
    with_columns, trainer = train(tmp_path / "b", rows=patchy_rows(), save_strategy="no")
    for name, tensor in adapter_of(plain).items():
        assert torch.equal(adapter_of(with_columns)[name], tensor), name
    assert not [name for entry in trainer.state.log_history for name in entry if "control" in name]


def test_accumulation_makes_no_difference(tmp_path):
    plain = {"save_strategy": "no", "optim": "sgd", "learning_rate": 1.0, "control_loss_weight": 2.0}
    whole, _ = train(tmp_path / "a", patchy_rows(), **plain)
    parts, _ = train(
        tmp_path / "b", patchy_rows(), **plain, per_device_train_batch_size=1, gradient_accumulation_steps=8
    )
    for name, tensor in adapter_of(whole).items():
        torch.testing.assert_close(adapter_of(parts)[name], tensor, rtol=0, atol=1e-6)


def test_resuming_gives_the_uninterrupted_runs_adapter_bit_for_bit(tmp_path):
    whole, _ = train(tmp_path, **COMMANDED)
    resumed, _ = train(tmp_path, resume=str(tmp_path / "checkpoint-2"), **COMMANDED)
    for name, tensor in adapter_of(whole).items():
        assert torch.equal(adapter_of(resumed)[name], tensor), name


@pytest.fixture(scope="module")
def obedient(tmp_path_factory):
    """An adapter trained to heed the commands, and its trainer."""
    torch.manual_seed(0)
    rows = build_rows(64)
    before = build_base("qwen3").state_dict()
    model, trainer = train(
        tmp_path_factory.mktemp("obedient"),
        rows[:56],
        eval_rows={"told": rows[56:], "plain": build_rows(8, seed=5)},
        **{**COMMANDED, "control_loss_weight": 20.0},
        max_steps=60,
        logging_steps=20,
        save_strategy="no",
    )
    return model.eval(), trainer, before


def test_training_puts_the_versions_in_order_and_logs_them(obedient):
    model, trainer, before = obedient
    logged = [entry for entry in trainer.state.log_history if "control_loss" in entry]
    assert logged[-1]["control_loss"] < 0.5 * logged[0]["control_loss"]
    for name in ("temperature", "top_p"):
        low, base, high = (logged[-1][f"control_{name}_{version}"] for version in ("low", "base", "high"))
        assert 0 < low < base < high < 2, name
    held_out = trainer.evaluate()
    assert held_out["eval_told_control_top_p_low"] < held_out["eval_told_control_top_p_high"]
    assert math.isfinite(held_out["eval_plain_control_loss"])
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_data_without_commands_can_be_evaluated_on(tmp_path):
    _, trainer = train(
        tmp_path,
        patchy_rows(),
        eval_rows=build_rows(8, seed=5),
        control_loss_weight=1.0,
        save_strategy="no",
        max_steps=1,
    )
    found = trainer.evaluate()
    assert math.isfinite(found["eval_loss"])
    assert "eval_control_loss" not in found


def test_an_evaluation_has_the_loss_of_its_batch_and_the_means_of_the_rows_with_commands(tmp_path):
    model, rows = randomise_heads(wrap()), patchy_rows(8)
    for row in rows[2:]:
        row["low_prompt"] = row["high_prompt"] = None
    args = arguments(tmp_path, control_loss_weight=2.0, control_temperature_margin=0.3, save_strategy="no")
    found = []
    for part in (rows, rows[:2]):
        trainer = AutoDecoTrainer(model, args, eval_dataset=part, processing_class=build_tokenizer())
        found.append(trainer.evaluate())
        loss = trainer.compute_loss(model, trainer.data_collator(list(trainer.eval_dataset)))
        assert found[-1]["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name in ("loss", "temperature_low", "temperature_base", "temperature_high", "top_p_base"):
        assert found[0][f"eval_control_{name}"] == pytest.approx(found[1][f"eval_control_{name}"], abs=1e-5)


def test_a_batch_whose_rows_have_no_command_has_the_decoding_loss_alone(tmp_path):
    model = randomise_heads(wrap())
    rows = [{**row, "low_prompt": None, "high_prompt": None} for row in build_rows(8)]
    found = []
    for weight in (0.0, 3.0):
        args = arguments(tmp_path, control_loss_weight=weight)
        trainer = AutoDecoTrainer(model, args, train_dataset=rows, processing_class=build_tokenizer())
        model.train()
        loss = trainer.compute_loss(model, trainer.data_collator(list(trainer.train_dataset)))
        loss.backward()
        found.append(loss.item())
    assert found[0] == found[1]


def test_a_data_set_may_have_its_first_command_late():
    datasets = pytest.importorskip("datasets")
    rows = [{**row, "low_prompt": None, "high_prompt": None} for row in build_rows(1001)]
    rows[-1]["high_prompt"] = "w1 w77"
    dataset, tokenizer = datasets.Dataset.from_list(rows), build_tokenizer()
    wanted = tokenized(rows, tokenizer, None, versions=True)
    for kind in (dataset, dataset.to_iterable_dataset()):
        assert list(tokenized(kind, tokenizer, None, versions=True)) == wanted


def test_a_stream_trains_as_a_list_does(tmp_path):
    datasets = pytest.importorskip("datasets")
    settings = {**COMMANDED, "save_strategy": "no", "max_steps": 3}
    stream = datasets.Dataset.from_list(build_rows()).to_iterable_dataset()
    first, _ = train(tmp_path / "a", stream, **settings)
    order = datasets.Dataset.from_list(build_rows())
    second, _ = train(tmp_path / "b", order, **settings, train_sampling_strategy="sequential")
    for name, tensor in adapter_of(first).items():
        torch.testing.assert_close(adapter_of(second)[name], tensor, rtol=0, atol=1e-6)


# --- what is measured -------------------------------------------------------------------------------------------------


def test_the_measure_is_that_of_the_tokens_traces(obedient):
    model, _, _ = obedient
    tokenizer = build_tokenizer()
    texts = [row["prompt"] for row in build_rows(12, seed=9)]
    how = {"token_budget": 8, "samples": 3, "seed": 4}
    result = measure_control(model, tokenizer, texts, SET, **how, batch_rows=7)
    assert (result["prompts"], result["samples"], result["seed"]) == (12, 3, 4)
    rows = {(row["command"], row["text"]): row for row in result["rows"]}
    assert set(rows) == {(command, text) for command in SET.low + SET.high for text in ("own", "same")}

    def prompt_means(told, name):
        groups = complete(model, tokenizer, told, **how)
        return np.array([np.concatenate([vars(one)[name] for one in group]).mean() for group in groups])

    command = SET.high[0]
    for name in ("temperature", "top_p"):
        base, after = prompt_means(texts, name), prompt_means([f"{text} {command}" for text in texts], name)
        effect = rows[command, "own"][name]
        assert effect["mean_baseline"] == pytest.approx(base.mean(), abs=1e-5)
        assert effect["mean_command"] == pytest.approx(after.mean(), abs=1e-5)
        assert effect["consistency"] == pytest.approx((after - base > 1e-6).mean())
        # Reading a text gives what was decided while it was written.
        assert rows[command, "same"][name]["mean_baseline"] == pytest.approx(base.mean(), abs=1e-5)


def test_reading_the_same_text_isolates_what_the_adapter_makes_of_the_command(obedient):
    model, _, _ = obedient
    tokenizer = build_tokenizer()
    text, command = "w1 w2 w3", SET.low[0]
    (row,) = [
        row
        for row in measure_control(model, tokenizer, [text], SET, token_budget=8, samples=1)["rows"]
        if row["command"] == command and row["text"] == "same"
    ]
    ((written,),) = complete(model, tokenizer, [text], token_budget=8, samples=1)
    head = tokenizer(f"{text} {command}")["input_ids"]
    heard = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([head + list(written.token_ids)]))
    handle.remove()
    parameters = model.decoding_adapter(DecodeState(heard[0][0, len(head) - 1 : -1]))
    assert row["temperature"]["mean_command"] == pytest.approx(parameters.temperature.mean().item(), abs=1e-5)
    assert row["top_p"]["mean_command"] == pytest.approx(parameters.top_p.mean().item(), abs=1e-5)


def test_the_table_has_a_line_for_every_command_and_reads_back_from_json(obedient):
    model, _, _ = obedient
    result = measure_control(model, build_tokenizer(), ["w1 w2", "w5"], SET, token_budget=4, samples=2)
    table = control_table(result)
    assert table == control_table(json.loads(json.dumps(result)))
    own, same = table.split("\n\n")
    for block in (own, same):
        assert len(block.splitlines()) == 2 + 1 + 4
        assert all(f"{command} (" in block for command in SET.low + SET.high)
    effect = result["rows"][0]["temperature"]
    assert f"{effect['mean_command']:.3f} | {effect['difference']:+.3f} [" in " ".join(own.split())


def test_one_head_alone_is_measured_alone():
    model = randomise_heads(wrap(heads=["temperature"]))
    result = measure_control(model, build_tokenizer(), ["w1 w2"], SET, token_budget=4, samples=1)
    assert all("top_p" not in row for row in result["rows"])
    assert "top-p" not in control_table(result)


def test_policies_of_actions_are_measured_on_their_own_text_alone():
    model = wrap(policy="token_actions", actions=[{"temperature": 0.5}, {"temperature": 1.5}])
    result = measure_control(model, build_tokenizer(), ["w1 w2"], SET, token_budget=4, samples=2)
    assert {row["text"] for row in result["rows"]} == {"own"}


def test_a_base_without_an_adapter_is_refused():
    with pytest.raises(AdaptiveDecodeError, match="adapter"):
        measure_control(build_base(), build_tokenizer(), ["w1"], SET)


# --- the configured ranges hold, whatever a prompt says ---------------------------------------------------------------

# low + (high - low) sigmoid(x) in float32 may end a rounding beyond an end of the range.
ROUNDING = 3e-7
interval = st.tuples(st.floats(0.0, 1.0, width=32), st.floats(0.0, 1.0, width=32)).filter(lambda x: x[0] + 0.01 < x[1])


@settings(max_examples=60)
@given(interval, interval, st.floats(0.0, 37.0), st.integers(0, 2**32 - 1))
def test_no_hidden_state_takes_t_or_p_out_of_its_range(of_t, of_p, exponent, seed):
    ranges = {"temperature": tuple(3 * end for end in of_t), "top_p": of_p}
    torch.manual_seed(seed)
    config = AutoDecoConfig(
        temperature_range=ranges["temperature"], top_p_range=ranges["top_p"], hidden_size=16, vocab_size=8
    )
    policy = build_policy(config)
    for head in (policy.temperature_head, policy.top_p_head):
        torch.nn.init.normal_(head.out.weight)
    parameters = policy(DecodeState(torch.randn(32, 16) * 10.0**exponent))
    for name, (low, high) in ranges.items():
        values = vars(parameters)[name]
        finite = values[~values.isnan()]
        assert bool(((finite >= low - ROUNDING * high) & (finite <= high * (1 + ROUNDING))).all())
        if values.isnan().any():  # the hidden state overflowed on the way; such a step is never sampled
            with pytest.raises(LogitsError):
                check_parameters(parameters, 0)


@pytest.mark.parametrize(
    ("of_t", "of_p"), [((0.3, 0.9), (0.6, 0.95)), ((0.0, 2.0), (0.0, 1.0)), ((0.5, 0.6), (0.1, 0.2))], ids=str
)
def test_no_prompt_takes_generation_out_of_the_configured_ranges(of_t, of_p):
    torch.manual_seed(0)
    model = wrap(temperature_range=of_t, top_p_range=of_p)
    randomise_heads(model)
    with torch.no_grad():  # heads that go to either end at every token
        for head in (model.decoding_adapter.temperature_head, model.decoding_adapter.top_p_head):
            head.out.weight.mul_(1e4)
    adversarial = torch.cat([prompts(24, 12), torch.arange(3, 11)[:, None].expand(8, 12)])  # and one word repeated
    out = model.generate(
        input_ids=adversarial,
        attention_mask=torch.ones_like(adversarial),
        budget=12,
        return_dict_in_generate=True,
        output_decoding_trace=True,
    )
    for values, (low, high) in ((out.decoding_trace.temperature, of_t), (out.decoding_trace.top_p, of_p)):
        known = values[~values.isnan()]
        assert len(known) > 100
        assert bool(((known >= low - ROUNDING * high) & (known <= high * (1 + ROUNDING))).all())
        # Both ends are reached, so a wider range would have shown.
        assert known.min() < low + 0.01 * (high - low)
        assert known.max() > high - 0.01 * (high - low)


# --- the testbed's commands -------------------------------------------------------------------------------------------


def test_the_author_obeys():
    rng = random.Random(0)
    texts = {
        direction: [
            (problem, write_obeying(problem, direction, rng))
            for kind in ("calc", "run", "coin", "sign")
            for problem in (draw_problem(kind, rng) for _ in range(150))
        ]
        for direction in (None, "low", "high")
    }
    assert all(
        token.right in (None, token.text) for _, tokens in texts["low"] for token in tokens if token.kind != "bare"
    )
    favourite = max(SIGN_PATTERNS, key=SIGN_PATTERNS.get)
    shares = {}
    for direction, written in texts.items():
        bare = np.mean([tokens[0].text == "so" for problem, tokens in written if problem.type == "calc"])
        signs = [tuple(t.text for t in tokens if t.kind == "sign") for p, tokens in written if p.type == "sign"]
        guesses = [next(t.text for t in tokens if t.kind == "guess") for p, tokens in written if p.type == "coin"]
        first = max(guesses.count(guess) for guess in set(guesses)) / len(guesses)
        shares[direction] = (bare, np.mean([pattern == favourite for pattern in signs]), first)
    # 150 draws each; the author's chances are at least .15 apart, four standard errors of .04: 1 in 10,000 at worst.
    for low, plain, high in zip(shares["low"], shares[None], shares["high"], strict=True):
        assert low > plain > high


def test_problems_with_commands_are_those_of_the_split_and_are_judged_the_same():
    rows = build_command_problems("test", 8, "low")
    plain = build_problems("test", 8)
    assert [split_command(row["prompt"]) for row in rows] == [
        (p["prompt"], r["command"]) for p, r in zip(plain, rows, strict=True)
    ]
    assert {row["command"] for row in rows} == set(COMMANDS["held_out"]["low"])
    assert all(split_of(split_command(row["prompt"])[0]) == "test" for row in rows)
    right = "- 10 32 + 3 35 so 35 <eos>"
    assert command_reward(["run 42 - 10 + 3 => be calm", "run 42 - 10 + 3 =>"], [right, right]) == [1.0, 1.0]
    assert command_reward(["run 42 - 10 + 4 => be calm"], [right]) == [0.0]


@pytest.fixture(scope="module")
def command_base(tmp_path_factory):
    """The folder of a base with commands, trained for a moment by the command line."""
    folder = tmp_path_factory.mktemp("base")
    assert make_command_base(["--output", str(folder), "--steps", "3"]) == 0
    return folder


def test_a_base_with_commands_has_new_words_and_leaves_the_shipped_one_alone(command_base):
    tokenizer = AutoTokenizer.from_pretrained(command_base)
    model = AutoModelForCausalLM.from_pretrained(command_base)
    shipped = load_base_model()
    assert model.config.vocab_size == shipped.config.vocab_size + len(WORDS) == len(tokenizer)
    assert len(load_tokenizer()) == shipped.config.vocab_size == 120
    text = "coin 4 7 46 - 6 => be calm"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.split())
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids
    assert ids[:7] == load_tokenizer()(text)["input_ids"][:7]
    # The corpus and the weights come from the seed alone.
    again, _ = build_command_base(steps=3)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_the_corpus_has_commands_of_both_kinds_and_prompts_of_the_training_split_alone():
    texts = [text for text, _ in itertools.islice(command_corpus(0), 400)]
    assert texts == [text for text, _ in itertools.islice(command_corpus(0), 400)]
    assert texts[:40] != [text for text, _ in itertools.islice(command_corpus(1), 40)]
    prompts, commands = zip(*map(split_command, texts), strict=True)
    assert {split_of(prompt) for prompt in prompts} == {"train"}
    # 12 commands, of which each of 400 texts has a given one with a chance of .05: all are there but once in 10**7.
    assert set(commands) == {""} | {c for part in COMMANDS.values() for kind in part.values() for c in kind}


def test_the_entropy_of_a_flat_model_is_that_of_its_vocabulary_under_every_command(command_base):
    tokenizer, model = (kind.from_pretrained(command_base) for kind in (AutoTokenizer, AutoModelForCausalLM))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = entropy_under_commands(model, tokenizer, texts=4)
    assert found == pytest.approx(dict.fromkeys(("none", "low", "high"), math.log(len(tokenizer))), rel=1e-5)


def test_the_example_measures_before_and_after_and_says_with_what(tmp_path, command_base):
    spec = importlib.util.spec_from_file_location("language_control", ROOT / "examples" / "language_control.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    sizes = ["--base", command_base, "--seeds", 0, "--train-problems", 64, "--steps", 1, "--control-steps", 1]
    sizes += ["--prompts", 2, "--reward-prompts", 4, "--samples", 1, "--token-budget", 4, "--json", tmp_path / "r.json"]
    example.main([str(word) for word in sizes])
    result = json.loads((tmp_path / "r.json").read_text())
    (run,) = result["runs"]
    for stage in example.STAGES:
        assert control_table(run[stage]["control"])
        assert set(run[stage]["pass@1"]) == {"none", "low", "high"}
    assert result["settings"]["prompts"] == 2
