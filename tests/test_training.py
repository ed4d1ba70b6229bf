"""`AutoDecoTrainer`: what it changes, what it must not, and that how a batch is cut up makes no difference."""

import json
import math
import os
import random

import pytest
import torch
from tiny import FAMILIES, build_base
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, PreTrainedTokenizerFast

from hf_adaptive_decode import (
    AutoDecoConfig,
    AutoDecoForCausalLM,
    AutoDecoTrainer,
    AutoDecoTrainingArguments,
    DecodeState,
)
from hf_adaptive_decode.errors import AdaptiveDecodeError
from hf_adaptive_decode.losses import decoding_loss_reference, stable_mask_uniform
from hf_adaptive_decode.projection import FrozenProjection
from hf_adaptive_decode.training import DataFormatError, DecodingDataCollator
from hf_adaptive_decode.training.data import tokenized

WORDS = [f"w{index}" for index in range(80)]


def build_tokenizer(chat_template=None):
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{word: 3 + i for i, word in enumerate(WORDS)}}
    vocabulary |= {"[user]": 83, "[assistant]": 84, "[end]": 85}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = chat_template
    return tokenizer


CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} [end] {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def sentence(rng, low, high):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def build_rows(count=32, seed=0):
    rng = random.Random(seed)
    return [{"prompt": sentence(rng, 2, 6), "completion": " " + sentence(rng, 2, 14)} for _ in range(count)]


def arguments(folder, **settings):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return AutoDecoTrainingArguments(**{**defaults, **settings})


def train(folder, model=None, rows=None, resume=None, **settings):
    """A trained model and the trainer; the same arguments always start from the same weights."""
    torch.manual_seed(0)
    model = model or AutoDecoForCausalLM.from_base(build_base("qwen3"))
    trainer = AutoDecoTrainer(
        model, arguments(folder, **settings), train_dataset=rows or build_rows(), processing_class=build_tokenizer()
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def adapter_of(model):
    return {name: tensor.clone() for name, tensor in model.decoding_adapter.state_dict().items()}


# --- what moves -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_weight_moves_and_no_weight_of_the_base(family, tmp_path):
    torch.manual_seed(0)
    model = AutoDecoForCausalLM.from_base(build_base(family))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(tmp_path, model, save_strategy="no")
    for name, tensor in model.state_dict().items():
        moved = not torch.equal(tensor, before[name])
        assert moved == name.startswith("decoding_adapters."), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["bf16 base", "bf16 autocast"])
def test_training_works_in_bf16_and_stays_near_the_loss_of_fp32(family, how, tmp_path):
    first = {}
    for precision in ("fp32", how):
        torch.manual_seed(0)
        base = build_base(family)
        model = AutoDecoForCausalLM.from_base(base.bfloat16() if precision == "bf16 base" else base)
        _, trainer = train(tmp_path, model, save_strategy="no", max_steps=1, bf16=precision == "bf16 autocast")
        assert {p.dtype for p in model.decoding_adapter.parameters()} == {torch.float32}
        first[precision] = trainer.state.log_history[0]["temperature_loss"]
    assert first[how] == pytest.approx(first["fp32"], rel=0.03)


@pytest.mark.parametrize("heads", [["temperature"], ["top_p"]])
def test_one_head_alone_trains(heads, tmp_path):
    torch.manual_seed(0)
    model = AutoDecoForCausalLM.from_base(build_base("qwen3"), AutoDecoConfig(heads=heads))
    before = adapter_of(model)
    _, trainer = train(tmp_path, model, save_strategy="no")
    after = adapter_of(model)
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert all(name.startswith(heads[0]) for name in before)
    logged = trainer.state.log_history[0]
    assert f"{heads[0]}_mean" in logged
    assert len([name for name in logged if name.endswith("_mean")]) == 1


def test_training_lowers_the_loss_that_it_minimises(tmp_path):
    # One word always follows the prompt, so the best temperature there is as low as it gets.
    rows = [{"prompt": "w1 w2", "completion": " w3 w4 w5"}] * 16
    _, trainer = train(
        tmp_path, rows=rows, max_steps=60, save_strategy="no", dft_weight="off", easy_token_mask_ratio=0.0
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.01


def test_statistics_of_the_logits_train_too(tmp_path):
    torch.manual_seed(0)
    model = AutoDecoForCausalLM.from_base(build_base("qwen3"), AutoDecoConfig(features=["hidden", "statistics"]))
    before = adapter_of(model)
    train(tmp_path, model, save_strategy="no")
    columns = slice(-4, None)  # the statistics come behind the hidden state
    name = "temperature_head.up.weight"
    assert not torch.equal(adapter_of(model)[name][:, columns], before[name][:, columns])


# --- the loss is the equations' ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"loss_type": "two_loss", "easy_token_mask_target": "temperature"}], ids=str)
def test_a_batch_has_the_reference_loss_and_gradient(family, settings, tmp_path):
    torch.manual_seed(0)
    model = AutoDecoForCausalLM.from_base(build_base(family))
    trainer = AutoDecoTrainer(
        model, arguments(tmp_path, **settings), train_dataset=build_rows(), processing_class=build_tokenizer()
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    model.train()
    trainer.compute_loss(model, batch, num_items_in_batch=50).backward()
    found = {name: p.grad.clone() for name, p in model.decoding_adapter.named_parameters()}
    model.zero_grad()

    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    hidden = FrozenProjection(model).hidden_states(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    )[:, :-1]
    parameters = model.decoding_adapter(DecodeState(hidden.flatten(0, 1)))
    config = trainer.args.loss_config()
    uniform = stable_mask_uniform(batch["input_ids"], trainer.args.seed << 32)[:, :-1].flatten()
    expected = decoding_loss_reference(
        logits.flatten(0, 1),
        batch["labels"][:, 1:].flatten(),
        parameters.temperature,
        parameters.top_p,
        config,
        mask_uniform=uniform,
        num_items=50,
    )
    expected.backward()
    for name, p in model.decoding_adapter.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=2e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_projection_gives_the_models_own_logits(family):
    model = build_base(family)
    ids = torch.randint(3, 80, (2, 7))
    projection = FrozenProjection(model)
    hidden = projection.hidden_states(input_ids=ids)
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(projection.logits(hidden.flatten(0, 1)).view_as(expected), expected)


@pytest.mark.parametrize(
    ("config", "scaled"), [(CohereConfig, {"logit_scale": 0.0625}), (GraniteConfig, {"logits_scaling": 8.0})]
)
def test_the_projection_knows_scaled_logits(config, scaled):
    shape = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    settings = config(vocab_size=96, hidden_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape, **scaled)
    model = AutoModelForCausalLM.from_config(settings).eval()
    ids = torch.randint(3, 80, (2, 7))
    projection = FrozenProjection(model)
    hidden = projection.hidden_states(input_ids=ids)
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(projection.logits(hidden.flatten(0, 1)).view_as(expected), expected)


def test_a_model_with_an_unknown_change_of_logits_is_refused(monkeypatch):
    model = build_base("qwen3")
    forward = type(model).forward

    def changed(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits.sin()
        return output

    monkeypatch.setattr(type(model), "forward", changed)
    with pytest.raises(AdaptiveDecodeError, match="logits"):
        FrozenProjection(model).hidden_states(input_ids=torch.randint(3, 80, (2, 7)))


# --- cutting up, stopping and going on --------------------------------------------------------------------------------


def test_accumulation_makes_no_difference(tmp_path):
    # Adam divides by the gradient's size and so blows up the rounding of sums that run in another order.
    plain = {"save_strategy": "no", "optim": "sgd", "learning_rate": 1.0}
    whole, _ = train(tmp_path / "a", **plain)
    parts, _ = train(tmp_path / "b", **plain, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    for name, tensor in adapter_of(whole).items():
        torch.testing.assert_close(adapter_of(parts)[name], tensor, rtol=0, atol=1e-6)


def test_resuming_gives_the_uninterrupted_runs_adapter_bit_for_bit(tmp_path):
    whole, _ = train(tmp_path)
    resumed, _ = train(tmp_path, resume=str(tmp_path / "checkpoint-2"))
    for name, tensor in adapter_of(whole).items():
        assert torch.equal(adapter_of(resumed)[name], tensor), name


def test_a_checkpoint_holds_the_adapter_alone_and_loads_like_any_adapter(tmp_path):
    model, _ = train(tmp_path)
    folder = tmp_path / "checkpoint-4"
    assert os.path.getsize(folder / "model.safetensors") < 4.1 * model.get_nb_trainable_parameters()[0] + 4096
    loaded = AutoDecoForCausalLM.from_pretrained(folder, base_model=build_base("qwen3"))
    for name, tensor in adapter_of(model).items():
        assert torch.equal(adapter_of(loaded)[name], tensor)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    torch.manual_seed(0)
    model = AutoDecoForCausalLM.from_base(build_base("qwen3"))
    settings = arguments(
        tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, learning_rate=0.3, max_steps=8
    )
    rows = build_rows()
    trainer = AutoDecoTrainer(
        model, settings, train_dataset=rows, eval_dataset=rows[:8], processing_class=build_tokenizer()
    )
    trainer.train()
    best = min(e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-7)


def test_the_frozen_base_runs_without_dropout_and_without_gradient(tmp_path):
    torch.manual_seed(0)
    base = build_base("gpt2")
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model = AutoDecoForCausalLM.from_base(base)
    seen = []
    base.get_output_embeddings().register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    _, trainer = train(tmp_path, model, save_strategy="no", max_steps=1)
    assert seen
    assert not any(seen)
    model.train()
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert trainer.compute_loss(model, batch) == trainer.compute_loss(model, batch)


def test_evaluation_drops_no_token_and_gives_the_same_number_twice(tmp_path):
    torch.manual_seed(0)
    model = AutoDecoForCausalLM.from_base(build_base("qwen3"))
    trainer = AutoDecoTrainer(
        model, arguments(tmp_path), eval_dataset={"one": build_rows(8)}, processing_class=build_tokenizer()
    )
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_one_loss"] == second["eval_one_loss"]
    assert first["eval_one_kept_fraction"] == 1.0


def test_the_log_names_what_the_policy_does(tmp_path):
    _, trainer = train(tmp_path, save_strategy="no")
    entry = trainer.state.log_history[0]
    assert 0.9 < entry["temperature_mean"] < 1.1
    assert 0.9 < entry["top_p_mean"] < 1.0
    for name in ("temperature_std", "top_p_std", "temperature_loss", "top_p_loss", "kept_fraction"):
        assert math.isfinite(entry[name]), name


# --- data -------------------------------------------------------------------------------------------------------------


def labels_as_text(row, tokenizer):
    return tokenizer.decode([t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100])


def test_the_formats_of_the_same_data_teach_the_same_tokens():
    tokenizer = build_tokenizer()
    rows = [{"prompt": "w1 w2", "completion": " w3 w4"}]
    (plain,) = tokenized(rows, tokenizer, None)
    assert tokenizer.decode(plain["input_ids"]) == "w1 w2 w3 w4 <eos>"
    assert labels_as_text(plain, tokenizer) == "w3 w4 <eos>"
    (again,) = tokenized([plain], tokenizer, None)
    assert again == plain
    (text,) = tokenized([{"text": "w1 w2 w3 w4"}], tokenizer, None)
    assert text["input_ids"] == plain["input_ids"] == text["labels"]


def test_conversations_teach_the_assistant_turns_alone():
    tokenizer = build_tokenizer(CHAT)
    user, answer = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}
    more, last = {"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5"}
    (pair,) = tokenized([{"prompt": [user], "completion": [answer]}], tokenizer, None)
    assert labels_as_text(pair, tokenizer) == "w2 w3 [end]"
    (talk,) = tokenized([{"messages": [user, answer, more, last]}], tokenizer, None)
    assert tokenizer.decode(talk["input_ids"]) == (
        "[user] w1 [end] [assistant] w2 w3 [end] [user] w4 [end] [assistant] w5 [end]"
    )
    assert labels_as_text(talk, tokenizer) == "w2 w3 [end] w5 [end]"


def test_a_template_that_rewrites_history_is_refused():
    template = "{% for m in messages %}{{ messages|length }} [{{ m.role }}] {{ m.content }} {% endfor %}"
    talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    tokenizer = build_tokenizer(template.replace("{{ messages|length }}", "w{{ messages|length }}"))
    with pytest.raises(DataFormatError, match="chat template"):
        tokenized([{"messages": talk}], tokenizer, None)


def test_datasets_are_taken_like_lists():
    datasets = pytest.importorskip("datasets")
    tokenizer, rows = build_tokenizer(), build_rows(5)
    from_list = tokenized(rows, tokenizer, 12)
    assert list(tokenized(datasets.Dataset.from_list(rows), tokenizer, 12)) == from_list
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    assert list(tokenized(stream, tokenizer, 12)) == from_list


def test_cutting_drops_examples_without_a_completion():
    rows = [{"prompt": "w1 w2 w3", "completion": " w4"}, {"prompt": "w1", "completion": " w4"}]
    kept = tokenized(rows, build_tokenizer(), 3)
    assert [len(row["input_ids"]) for row in kept] == [3]
    with pytest.raises(DataFormatError, match="max_length"):
        tokenized(rows[:1], build_tokenizer(), 3)


@pytest.mark.parametrize(("rows", "named"), [([], "empty"), ([{"question": "w1", "answer": "w2"}], "answer")])
def test_unusable_data_is_refused_and_its_columns_named(rows, named):
    with pytest.raises(DataFormatError, match=named):
        tokenized(rows, build_tokenizer(), None)


def test_the_collator_pads_on_the_right():
    batch = DecodingDataCollator(9)([{"input_ids": [3, 4], "labels": [-100, 4]}, {"input_ids": [5], "labels": [5]}])
    assert batch["input_ids"].tolist() == [[3, 4], [5, 9]]
    assert batch["labels"].tolist() == [[-100, 4], [5, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_a_batch_without_a_target_gives_zero_and_no_gradient(tmp_path):
    torch.manual_seed(0)
    model = AutoDecoForCausalLM.from_base(build_base("qwen3"))
    trainer = AutoDecoTrainer(
        model, arguments(tmp_path), train_dataset=build_rows(), processing_class=build_tokenizer()
    )
    ids = torch.randint(3, 80, (2, 5))
    batch = {"input_ids": ids, "labels": torch.full_like(ids, -100), "attention_mask": torch.ones_like(ids)}
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.decoding_adapter.parameters())


# --- arguments --------------------------------------------------------------------------------------------------------


def test_the_papers_preset_is_the_papers(tmp_path):
    args = AutoDecoTrainingArguments.autodeco_paper(str(tmp_path), use_cpu=True)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 32
    assert (args.learning_rate, args.max_steps, args.max_length) == (5e-6, 400, 16384)
    assert (args.alpha, args.easy_token_mask_ratio, args.dft_weight) == (30.0, 0.6, "base")
    assert args.loss_type == "end_to_end"
    assert args.optim.startswith("adamw")
    assert AutoDecoTrainingArguments.autodeco_paper(str(tmp_path), use_cpu=True, max_steps=7).max_steps == 7


@pytest.mark.parametrize(
    "bad",
    [
        {"max_length": 1},
        {"alpha": 0.0},
        {"easy_token_mask_ratio": 1.5},
        {"dft_weight": "some"},
        {"loss_type": "mse"},
        {"easy_token_mask_target": "top_p"},
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_once(bad, tmp_path):
    (name,) = bad
    with pytest.raises(ValueError, match=name):
        AutoDecoTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **bad)


def test_arguments_survive_json(tmp_path):
    args = arguments(tmp_path, dft_weight="scaled", easy_token_mask_ratio=0.25)
    again = json.loads(args.to_json_string())
    assert (again["dft_weight"], again["easy_token_mask_ratio"]) == ("scaled", 0.25)
