"""Pipelines, chat templates, configs and the Auto classes: where transformers makes the call, the adapter decides."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList, pipeline

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM
from hf_adaptive_decode.testbed import load_base_model, load_tokenizer

REPOSITORY = Path(__file__).parent.parent
PROMPTS = ["coin 4 7 47 - 11 =>", "run 42 - 10 + 3 =>", "calc 42 - 10 + 3 - 7 =>"]
SEED = 3
CHAT = (
    "{% if tools %}{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}=> {% endif %}"
)
USER, ANSWER = {"role": "user", "content": "run 42 - 10 + 3"}, {"role": "assistant", "content": "=> 32"}
NO_END = {"eos_token_id": None}  # every row runs to its limit


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = load_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module")
def model():
    """The testbed's base, whose adapter's temperature and top-p change strongly from token to token."""
    return tiny.randomise_heads(AutoDecoForCausalLM.from_base(load_base_model()))


@pytest.fixture(scope="module")
def adapter(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(adapter):
    return pipeline("text-generation", model=str(adapter))


def ids_of(found) -> list[list[int]]:
    """Tokens of what a pipeline gave for a list of prompts."""
    return [list(sequence["generated_token_ids"]) for rows in found for sequence in rows]


def run(pipe, prompts=PROMPTS[0], **how) -> list[list[int]]:
    torch.manual_seed(SEED)
    found = pipe(prompts, return_tensors=True, **{**NO_END, **how})
    return ids_of(found if isinstance(prompts, list) and isinstance(found[0], list) else [found])


def own(model, prompts: list[list[int]], **how) -> list[list[int]]:
    """The same by the model's own `generate`, padded on the left."""
    ids, mask = tiny.left_padded([torch.tensor(prompt) for prompt in prompts])
    return tiny.sample(model, ids, attention_mask=mask, seed=SEED, pad_token_id=0, **{**NO_END, **how}).tolist()


# --- pipelines --------------------------------------------------------------------------------------------------------

# What a pipeline is given, and what `generate` is given to the same effect.
CALLS = [
    ({"max_new_tokens": 40}, {"max_new_tokens": 40}),
    ({"budget": 9}, {"budget": 9}),
    ({"max_new_tokens": 40, "temperature": 0.3}, {"max_new_tokens": 40, "temperature": 0.3}),
    ({"max_new_tokens": 40, "temperature": 0.7}, {"max_new_tokens": 40, "temperature": 0.7}),
    ({"max_new_tokens": 40, "top_k": 2, "top_p": 0.9}, {"max_new_tokens": 40, "top_k": 2, "top_p": 0.9}),
    ({"max_new_tokens": 40, "do_sample": False}, {"max_new_tokens": 40, "do_sample": False}),
    ({"max_new_tokens": 40, "num_beams": 2}, {"max_new_tokens": 40, "num_beams": 2}),
    ({"max_new_tokens": 40, "num_return_sequences": 3}, {"max_new_tokens": 40, "num_return_sequences": 3}),
]


@pytest.mark.parametrize(("given", "meant"), CALLS, ids=[" ".join(given) for given, _ in CALLS])
def test_a_pipeline_samples_as_generate_does(pipe, model, tokenizer, given, meant):
    prompt = tokenizer(PROMPTS[0])["input_ids"]
    if meant.get("num_beams"):
        meant = {**meant, "do_sample": False}
        given = {**given, "do_sample": False}
    assert run(pipe, **given) == own(model, [prompt], **meant)


def test_the_pipelines_own_defaults_do_not_decide(pipe, model, tokenizer):
    """Its defaults are sampling at T = 0.7 and 256 tokens; the adapter decides and the length is theirs."""
    prompt = tokenizer(PROMPTS[0])["input_ids"]
    (found,) = run(pipe)
    assert len(found) == len(prompt) + 256
    (adaptive,) = own(model, [prompt], max_new_tokens=256)
    assert found == adaptive
    with model.disable_adapter():
        (warm,) = own(model, [prompt], max_new_tokens=256, do_sample=True, temperature=0.7)
    assert found != warm


@pytest.mark.parametrize(
    ("settings", "meant"), [({}, {}), ({"temperature": 1.0}, {"temperature": 1.0}), ({"top_p": 0.6}, {"top_p": 0.6})]
)
def test_a_generation_config_decides_what_it_sets_and_no_more(pipe, model, tokenizer, settings, meant):
    prompt = tokenizer(PROMPTS[0])["input_ids"]
    expected = own(model, [prompt], max_new_tokens=40, **meant)
    fresh = GenerationConfig(max_new_tokens=40, **settings)
    assert run(pipe, generation_config=fresh, eos_token_id=None) == expected


def test_a_pipeline_keeps_the_settings_it_was_made_with(model, tokenizer):
    made = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=40, temperature=0.4)
    prompt = tokenizer(PROMPTS[0])["input_ids"]
    assert run(made) == own(model, [prompt], max_new_tokens=40, temperature=0.4)
    assert run(made) != own(model, [prompt], max_new_tokens=40)


class Seeding(LogitsProcessor):
    """The loader that makes a pipeline's batches draws a random number of its own."""

    def __call__(self, input_ids, scores):
        torch.manual_seed(input_ids.shape[1])
        return scores


def test_batches_are_padded_on_the_left_and_every_row_is_the_adapters(pipe, model, tokenizer):
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert len(set(map(len, prompts))) > 1
    how = {"max_new_tokens": 10, "logits_processor": LogitsProcessorList([Seeding()])}
    found = run(pipe, PROMPTS, batch_size=3, **how)
    assert found == own(model, prompts, **how)
    assert [[token for token in row[:-10] if token] for row in found] == prompts


@pytest.mark.parametrize("messages", [[USER], [USER, ANSWER]], ids=["asked", "prefilled"])
def test_chats_go_through_the_template_and_end_as_messages(pipe, model, tokenizer, messages):
    continues = messages[-1]["role"] == "assistant"
    how = {"continue_final_message": True} if continues else {"add_generation_prompt": True}
    prompt = tokenizer.apply_chat_template(messages, return_dict=True, **how)["input_ids"]
    expected = own(model, [prompt], max_new_tokens=8)[0][len(prompt) :]
    torch.manual_seed(SEED)
    (found,) = pipe(messages, max_new_tokens=8, **NO_END)
    said = found["generated_text"]
    assert said[: len(messages) - continues] == messages[: len(messages) - continues]
    assert said[-1]["role"] == "assistant"
    before = ANSWER["content"] if continues else ""
    assert said[-1]["content"] == before + tokenizer.decode(expected, skip_special_tokens=True)


def test_the_prompt_may_be_left_out_of_the_text(pipe):
    torch.manual_seed(SEED)
    whole = pipe(PROMPTS[0], max_new_tokens=8)[0]["generated_text"]
    torch.manual_seed(SEED)
    new = pipe(PROMPTS[0], max_new_tokens=8, return_full_text=False)[0]["generated_text"]
    assert whole == PROMPTS[0] + new
    assert new


class Streamer:
    def __init__(self):
        self.tokens, self.is_done = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.is_done = True


def test_a_streamer_gets_the_adapters_tokens(pipe, model, tokenizer):
    streamer = Streamer()
    run(pipe, max_new_tokens=8, streamer=streamer)
    assert [streamer.tokens] == own(model, [tokenizer(PROMPTS[0])["input_ids"]], max_new_tokens=8)
    assert streamer.is_done


def test_a_draft_models_tokens_are_judged_by_the_adapter(tokenizer):
    """An adapter that is always greedy: assisted or not, the text is the greedy one, and plain sampling's is not."""
    greedy = AutoDecoConfig(policy="static", actions=[{"temperature": 0.0}])
    model = AutoDecoForCausalLM.from_base(load_base_model(), greedy)
    assisted = pipeline("text-generation", model=model, tokenizer=tokenizer, assistant_model=load_base_model())
    plain = pipeline("text-generation", model=load_base_model(), tokenizer=tokenizer)
    (expected,) = run(plain, max_new_tokens=20, do_sample=False)
    assert run(assisted, max_new_tokens=20) == [expected]
    assert run(plain, max_new_tokens=20, temperature=1.0) != [expected]


# --- configs and templates --------------------------------------------------------------------------------------------


def test_a_copy_of_the_models_own_config_chooses_nothing_but_what_is_set_on_it(tokenizer):
    """Servers do so. The base's config has a temperature and a top-p, which the copy then has too."""
    base = load_base_model()
    base.generation_config.update(temperature=0.2, top_p=0.3, do_sample=True)
    model = tiny.randomise_heads(AutoDecoForCausalLM.from_base(base))
    prompt = [tokenizer(PROMPTS[0])["input_ids"]]
    adaptive = own(model, prompt, max_new_tokens=40)

    def with_copy(**settings):
        config = copy.deepcopy(model.generation_config)
        for name, value in settings.items():
            setattr(config, name, value)
        ids = torch.tensor(prompt)
        return tiny.sample(model, ids, generation_config=config, seed=SEED, pad_token_id=0, **NO_END).tolist()

    assert with_copy(max_new_tokens=40) == adaptive
    for chosen in ({"temperature": 0.2}, {"top_p": 0.3}, {"do_sample": False}):
        found = with_copy(max_new_tokens=40, **chosen)
        assert found == own(model, prompt, max_new_tokens=40, **chosen)
        assert found != adaptive
    assert type(model.unload().generation_config) is GenerationConfig


def test_the_models_own_config_is_saved_and_compared_like_any(model, tmp_path):
    config = model.generation_config
    assert GenerationConfig.from_dict(config.to_dict()) == config
    config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path) == config


TOOL = {"type": "function", "function": {"name": "run", "description": "", "parameters": {}}}


@pytest.mark.parametrize(
    "how",
    [
        {"add_generation_prompt": True},
        {"continue_final_message": True},
        {"add_generation_prompt": True, "tools": [TOOL]},
    ],
    ids=["question", "continued", "with a tool"],
)
def test_what_a_chat_template_gives_is_what_generate_takes(model, tokenizer, how):
    messages = [USER, ANSWER] if "continue_final_message" in how else [USER]
    batch = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt", **how)
    text = tokenizer.decode(batch["input_ids"][0])
    assert text.startswith("run run" if "tools" in how else "run 42")
    assert text.endswith("32" if "continue_final_message" in how else "=>")
    found = tiny.sample(model, **batch, seed=SEED, max_new_tokens=6, pad_token_id=0, **NO_END).tolist()
    assert found == own(model, [tokenizer(text)["input_ids"]], max_new_tokens=6)


def test_the_auto_classes_pass_their_arguments_on_in_a_fresh_process(adapter, model, tokenizer):
    prompt = tokenizer(PROMPTS[0])["input_ids"]
    script = f"""
import json, warnings, hf_adaptive_decode, torch
torch.set_num_threads(1)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
folder, found = {str(adapter)!r}, {{}}
assert AutoConfig.from_pretrained(folder).model_type == "autodeco"
assert AutoTokenizer.from_pretrained(folder)({PROMPTS[0]!r})["input_ids"] == {prompt}
for name, how in {{
    "plain": dict(),
    "attention": dict(attn_implementation="eager", token=False, low_cpu_mem_usage=True),
    "device map": dict(device_map="auto"),
    "dtype": dict(dtype=torch.bfloat16),
    "torch_dtype": dict(torch_dtype="bfloat16"),
}}.items():
    model = AutoModelForCausalLM.from_pretrained(folder, **how)
    torch.manual_seed({SEED})
    ids = model.generate(torch.tensor([{prompt}]), max_new_tokens=8, eos_token_id=None, pad_token_id=0).tolist()
    heads = {{str(p.dtype) for p in model.decoding_adapter.parameters()}}
    found[name] = [ids, str(model.dtype), sorted(heads), model.config._attn_implementation]
pipe = pipeline("text-generation", model=folder, dtype=torch.bfloat16, device_map="cpu")
found["pipeline"] = [type(pipe.model).__mro__[1].__name__, str(pipe.model.dtype)]
print(json.dumps(found))
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected = own(model, [prompt], max_new_tokens=8)
    for name in ("plain", "attention", "device map"):
        assert found[name][:3] == [expected, "torch.float32", ["torch.float32"]], name
    assert found["attention"][3] == "eager"
    for name in ("dtype", "torch_dtype"):
        assert found[name][1:3] == ["torch.bfloat16", ["torch.float32"]], name
    assert found["pipeline"] == ["AutoDecoForCausalLM", "torch.bfloat16"]


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_file_cannot_choose_the_code_that_runs_its_base(adapter, tmp_path, name):
    """An attention may be a kernel from the Hub."""
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: "someone/kernel"}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config._attn_implementation == "sdpa"
