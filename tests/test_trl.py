"""TRL's data formats, and TRL's and transformers' own trainers on a wrapped model."""

from __future__ import annotations

import json
import warnings

import pytest
import tiny
import torch
from test_training import CHAT, arguments, build_rows, build_tokenizer, labels_as_text
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM, AutoDecoTrainer
from hf_adaptive_decode.testbed import build_problems, load_base_model, load_tokenizer
from hf_adaptive_decode.training import DataFormatError, DecodingDataCollator
from hf_adaptive_decode.training.data import tokenized

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
from trl.chat_template_utils import qwen3_chat_template

USER, ANSWER = {"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}
MORE, LAST = {"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}
TOOL = {"type": "function", "function": {"name": "w7", "description": "", "parameters": {}}}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def build_character_tokenizer(chat_template: str) -> PreTrainedTokenizerFast:
    """One token a character, whatever a real model's template writes."""
    characters = {chr(code): code for code in range(128)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(characters, [])),
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def joined(row, tokenizer) -> str:
    return labels_as_text(row, tokenizer).replace(" ", "")


# --- data -------------------------------------------------------------------------------------------------------------


def prepared_by_trl(rows, tokenizer, folder, **how) -> list[dict]:
    settings = SFTConfig(str(folder), use_cpu=True, bf16=False, report_to="none", max_length=None, **how)
    trainer = SFTTrainer(
        tiny.build_base(), settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    return [{name: row[name] for name in ("input_ids", "labels")} for row in trainer.train_dataset]


FORMATS = {
    "prompt and completion": {"prompt": "w1 w2", "completion": " w3 w4"},
    "text": {"text": "w1 w2 w3 w4"},
    "conversation": {"prompt": [USER], "completion": [ANSWER]},
    "longer conversation": {"prompt": [USER, ANSWER, MORE], "completion": [LAST]},
    "with tools": {"prompt": [USER], "completion": [ANSWER], "tools": json.dumps([TOOL])},
    "with settings": {"prompt": [USER], "completion": [ANSWER], "chat_template_kwargs": {"loud": True}},
}


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_tokenised_as_trls_own_trainer_does(name, tmp_path):
    tokenizer = build_tokenizer("{% if tools %}w7 {% endif %}{% if loud %}w8 {% endif %}" + CHAT)
    expected = prepared_by_trl([FORMATS[name]], tokenizer, tmp_path)
    assert tokenized([FORMATS[name]], tokenizer, None) == expected
    text = tokenizer.decode(expected[0]["input_ids"])
    assert ("w7" in text) == (name == "with tools")
    assert ("w8" in text) == (name == "with settings")


def test_messages_teach_what_trl_teaches_with_assistant_only_loss(tmp_path):
    tokenizer = build_character_tokenizer(qwen3_chat_template)
    tokenizer.chat_template = trl.get_training_chat_template(tokenizer)
    rows = [{"messages": [USER, ANSWER, MORE, LAST]}]
    assert tokenized(rows, tokenizer, None) == prepared_by_trl(rows, tokenizer, tmp_path, assistant_only_loss=True)


def test_a_template_that_rewrites_history_is_replaced_by_trls_training_template():
    """Qwen3's leaves the thoughts of earlier turns out, and its generation prompt does not begin with one."""
    tokenizer = build_character_tokenizer(qwen3_chat_template)
    (row,) = tokenized([{"messages": [USER, ANSWER, MORE, LAST]}], tokenizer, None)
    thought = "<think>\n\n</think>\n\n"
    assert joined(row, tokenizer) == f"{thought}w3w4<|im_end|>\n{thought}w6<|im_end|>\n"
    (short,) = tokenized([{"messages": [USER, ANSWER]}], tokenizer, None)
    own = tokenizer.apply_chat_template([USER, ANSWER], return_dict=False)
    assert short["input_ids"] == own  # where its own template does, it is used


def test_a_template_that_is_nobodys_is_refused_with_the_way_out():
    template = "{{ messages|length }} {% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer = build_character_tokenizer(template)
    with pytest.raises(DataFormatError, match="chat_template_kwargs"):
        tokenized([{"prompt": [USER], "completion": [ANSWER]}], tokenizer, None)
    with pytest.raises(DataFormatError, match="chat template"):
        tokenized([{"messages": [USER, ANSWER, MORE, LAST]}], tokenizer, None)


def test_conversations_of_from_and_value_are_read_and_left_as_they_are():
    tokenizer = build_tokenizer(CHAT)
    said = [{"from": "user", "value": "w1 w2"}, {"from": "assistant", "value": "w3 w4"}]
    row = {"conversations": said}
    assert tokenized([row], tokenizer, None) == tokenized([{"messages": [USER, ANSWER]}], tokenizer, None)
    assert row == {"conversations": [{"from": "user", "value": "w1 w2"}, {"from": "assistant", "value": "w3 w4"}]}
    table = datasets.Dataset.from_list([row])
    assert list(tokenized(table, tokenizer, None)) == tokenized([row], tokenizer, None)


def test_batches_are_those_of_trls_collator():
    rows = tokenized(build_rows(5), build_tokenizer(), None)
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    found, expected = DecodingDataCollator(9)(rows), DataCollatorForLanguageModeling(9)(rows)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    "rows", [[{"messages": [USER, ANSWER]}], [{"prompt": [USER], "completion": [ANSWER]}]], ids=str
)
def test_heads_learn_from_conversations(rows, tmp_path):
    model = AutoDecoForCausalLM.from_base(tiny.build_base())
    before = {name: tensor.clone() for name, tensor in model.decoding_adapter.state_dict().items()}
    settings = arguments(tmp_path, max_steps=2, save_strategy="no")
    AutoDecoTrainer(model, settings, train_dataset=rows * 8, processing_class=build_tokenizer(CHAT)).train()
    assert all(not torch.equal(tensor, before[n]) for n, tensor in model.decoding_adapter.state_dict().items())


# --- trainers of the base ---------------------------------------------------------------------------------------------


def trained_by(kind, model, tokenizer, folder, **how):
    shared = {"use_cpu": True, "report_to": "none", "max_steps": 2, "logging_steps": 1, "disable_tqdm": True}
    shared |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    torch.manual_seed(0)
    if kind is SFTTrainer:
        rows, settings = datasets.Dataset.from_list(build_rows(8)), SFTConfig(str(folder), bf16=False, **shared)
        trainer = SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer, **how)
    else:
        rows, settings = tokenized(build_rows(8), tokenizer, None), TrainingArguments(str(folder), **shared)
        trainer = Trainer(model, settings, train_dataset=rows, data_collator=DecodingDataCollator(0))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", [Trainer, SFTTrainer])
def test_a_trainer_of_the_base_trains_it_as_if_it_were_not_wrapped(kind, tmp_path):
    tokenizer = build_tokenizer()
    plain, wrapped = tiny.build_base(), tiny.randomise_heads(tiny.wrap())
    wrapped.decoding_adapter.requires_grad_(False)
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(not name.startswith("decoding_adapters."))
    heads = {name: tensor.clone() for name, tensor in wrapped.decoding_adapter.state_dict().items()}
    losses = trained_by(kind, wrapped, tokenizer, tmp_path / "wrapped")
    assert losses == trained_by(kind, plain, tokenizer, tmp_path / "plain")
    assert losses[1] != losses[0]
    trained = dict(plain.named_parameters())
    for name, parameter in wrapped.named_parameters():
        expected = heads[name.split(".", 2)[2]] if name.startswith("decoding_adapters.") else trained[name]
        assert torch.equal(parameter, expected), name


def test_a_lora_learns_under_an_adapter_that_acts_afterwards(tmp_path):
    tokenizer, model = build_tokenizer(), tiny.randomise_heads(tiny.wrap())
    how = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_decoding_trace": True, "pad_token_id": 0}
    before = tiny.sample(model, tiny.prompts(), **how)
    trained_by(SFTTrainer, model, tokenizer, tmp_path, peft_config=LoraConfig(**LORA))
    after = tiny.sample(model.eval(), tiny.prompts(), **how)
    assert not torch.equal(after.decoding_trace.temperature[:, 0], before.decoding_trace.temperature[:, 0])
    hidden, _ = tiny.hidden_and_logits(model, tiny.prompts())
    temperature, _ = tiny.heads_by_hand(model.decoding_adapter, hidden[:, -1])
    torch.testing.assert_close(after.decoding_trace.temperature[:, 0], temperature, rtol=0, atol=1e-4)


# --- reinforcement learning of the base -------------------------------------------------------------------------------

ADAPTER_DECIDES = {"temperature": None, "top_p": None, "top_k": None}
KINDS = {"GRPO": (GRPOConfig, GRPOTrainer), "RLOO": (RLOOConfig, RLOOTrainer)}
GENERATIONS = 4


@pytest.fixture(scope="module")
def problems():
    return datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in build_problems("train", 4)])


def learn(kind, problems, folder, generation_kwargs=None, lora=False, **how):
    """The model, its trainer and the groups of completions, after two steps with an adapter that is always greedy."""
    config_class, trainer_class = KINDS[kind]
    greedy = AutoDecoConfig(policy="static", actions=[{"temperature": 0.0}])
    model = AutoDecoForCausalLM.from_base(load_base_model(), greedy)
    if not lora:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("decoding_adapters" not in name)
    groups: list[list[str]] = []

    def reward(completions, **columns):
        groups.extend(completions[at : at + GENERATIONS] for at in range(0, len(completions), GENERATIONS))
        return [float(len(set(completion.split()))) for completion in completions]

    shared = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 2, "disable_tqdm": True}
    sizes = {"per_device_train_batch_size": GENERATIONS, "num_generations": GENERATIONS, "max_completion_length": 10}
    settings = config_class(
        str(folder),
        save_strategy="no",
        learning_rate=1e-3,
        generation_kwargs=generation_kwargs,
        **shared,
        **sizes,
        **how,
    )
    peft = {"peft_config": LoraConfig(**LORA)} if lora else {}
    trainer = trainer_class(
        model=model,
        reward_funcs=reward,
        args=settings,
        train_dataset=problems,
        processing_class=load_tokenizer(),
        **peft,
    )
    before = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, tensor in trainer.model.named_parameters() if not torch.equal(tensor, before[name])}
    assert len(groups) == 2
    return model, moved, groups


@pytest.mark.parametrize(("kind", "lora"), [("GRPO", False), ("GRPO", True), ("RLOO", False)])
def test_trls_own_sampling_settings_beat_the_adapter_and_a_warning_says_so(kind, lora, problems, tmp_path):
    with pytest.warns(UserWarning, match="it takes no part.*generation_kwargs"):
        model, moved, groups = learn(kind, problems, tmp_path, lora=lora)
    assert any(len(set(group)) > 1 for group in groups)
    assert moved
    assert all(("lora_" in name) == lora for name in moved)
    if lora:
        model.eval().save_pretrained(tmp_path / "both")
        again = AutoDecoForCausalLM.from_pretrained(tmp_path / "both")
        ids = load_tokenizer()(problems[0]["prompt"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
            assert not torch.allclose(again(ids).logits, load_base_model()(ids).logits, atol=1e-5)


BATCHING = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"num_blocks": 24, "page_size": 8, "max_batch_tokens": 16},
}


@pytest.mark.parametrize(
    ("kind", "how"),
    [("GRPO", {}), ("RLOO", {}), ("GRPO", BATCHING)],
    ids=["GRPO", "RLOO", "GRPO, continuous batching"],
)
def test_without_these_settings_the_adapter_samples_the_rollouts(kind, how, problems, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*takes no part.*")
        _, _, groups = learn(kind, problems, tmp_path, ADAPTER_DECIDES, **how)
    assert all(len(set(group)) == 1 for group in groups)
    assert len(groups[0][0].split()) > 3


def test_settings_that_leave_the_adapter_nothing_to_decide_are_warned_about(model):
    how = {"max_new_tokens": 2, "pad_token_id": 0}
    with pytest.warns(UserWarning, match="`temperature=0.7`, `top_p=0.9` was passed"):
        model.generate(tiny.prompts(), temperature=0.7, top_p=0.9, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(tiny.prompts(), temperature=0.7, top_k=5, **how)
        model.generate(tiny.prompts(), do_sample=False, **how)
