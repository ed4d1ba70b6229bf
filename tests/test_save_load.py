"""An adapter saved and loaded again, by every way in, samples what it sampled before."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import PAD, VOCABULARY, hooks_left, prompts, sample
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    pipeline,
)

from hf_adaptive_decode import AdaptiveSamplerLogitsProcessor, AutoDecoConfig, AutoDecoForCausalLM, SamplingParameters
from hf_adaptive_decode.errors import AdapterConfigError, AdapterLoadError, AdaptiveDecodeError
from hf_adaptive_decode.hub.bases import PACKAGED_BASES, fingerprint, load_base
from hf_adaptive_decode.policies import build_policy

REPOSITORY = Path(__file__).parent.parent
FILES = {"config.json", "model.safetensors", "generation_config.json", "README.md"}
SETTINGS = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": PAD}


def save_pair(tmp_path, family: str, **settings):
    """An adapter and its base on disk: (base folder, adapter folder, the model they were saved from)."""
    base = tiny.build_base(family)
    base.save_pretrained(tmp_path / "base")
    model = AutoDecoForCausalLM.from_base(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), AutoDecoConfig(**settings)
    )
    if settings.get("policy") != "static":
        tiny.randomise_heads(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", model


def save_tokenizer(folder) -> None:
    words = {f"w{i}": i for i in range(VOCABULARY)}
    words = {{0: "<pad>", 1: "<s>", 2: "</s>"}.get(i, word): i for word, i in words.items()}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    ).save_pretrained(folder)


# --- ways in ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2", "opt"])
def test_every_way_in_gives_the_same_tokens(family, tmp_path):
    base_folder, folder, model = save_pair(tmp_path, family)
    expected = sample(model, prompts(), seed=4, **SETTINGS)

    loaded = AutoDecoForCausalLM.from_pretrained(folder)
    assert torch.equal(sample(loaded, prompts(), seed=4, **SETTINGS), expected)

    by_auto_class = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(by_auto_class, AutoDecoForCausalLM)
    assert torch.equal(sample(by_auto_class, prompts(), seed=4, **SETTINGS), expected)

    bare = AutoModelForCausalLM.from_pretrained(base_folder)
    processor = AdaptiveSamplerLogitsProcessor.from_pretrained(folder, bare)
    assert not isinstance(bare, AutoDecoForCausalLM)
    found = sample(bare, prompts(), seed=4, do_sample=True, top_k=0, logits_processor=[processor], **SETTINGS)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2"])
def test_a_pipeline_gives_the_same_tokens(family, tmp_path):
    _, folder, model = save_pair(tmp_path, family)
    save_tokenizer(folder)
    expected = sample(model, prompts(1), seed=4, max_new_tokens=8)
    text = " ".join(f"w{i}" for i in prompts(1)[0].tolist())
    generator = pipeline("text-generation", model=str(folder))
    assert isinstance(generator.model, AutoDecoForCausalLM)
    torch.manual_seed(4)
    found = generator(text, max_new_tokens=8, return_tensors=True)[0]["generated_token_ids"]
    assert list(found) == expected[0].tolist()


def test_a_pipeline_takes_a_budget_and_a_model_object(model, tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    found = generator(["w5 w6", "w7 w8 w9"], budget=3, eos_token_id=None, return_tensors=True, batch_size=2)
    assert [len(rows[0]["generated_token_ids"]) for rows in found] == [6, 6]


def test_a_fresh_process_needs_one_import(tmp_path):
    _, folder, model = save_pair(tmp_path, "qwen3")
    expected = sample(model, prompts(), seed=4, **SETTINGS)
    script = (
        "import hf_adaptive_decode, torch\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "torch.set_num_threads(1)\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        f"assert AutoConfig.from_pretrained({str(folder)!r}).policy == 'heads'\n"
        "torch.manual_seed(4)\n"
        f"ids = torch.tensor({prompts().tolist()})\n"
        f"print(model.generate(ids, **{SETTINGS!r}).tolist())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected.tolist()


def test_the_auto_config_is_ours(folder):
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, AutoDecoConfig)
    assert (config.hidden_size, config.vocab_size, config.model_type) == (32, VOCABULARY, "autodeco")


def test_the_auto_class_passes_a_base_model_and_a_dtype_on(folder):
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.get_output_embeddings().weight.dtype == torch.bfloat16
    base = tiny.build_base()
    assert AutoModelForCausalLM.from_pretrained(folder, base_model=base) is base


def test_a_loaded_adapter_is_frozen_in_fp32_and_in_evaluation_mode(folder):
    loaded = AutoDecoForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.decoding_adapter.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not any(m.training for m in loaded.modules())
    trainable = AutoDecoForCausalLM.from_pretrained(folder, is_trainable=True)
    assert all(p.requires_grad for p in trainable.decoding_adapter.parameters())
    assert sum(p.requires_grad for p in trainable.parameters()) == len(list(trainable.decoding_adapter.parameters()))


def test_a_subfolder_holds_an_adapter(folder, tmp_path):
    os.rename(folder, tmp_path / "inner")
    (tmp_path / "outer").mkdir()
    os.rename(tmp_path / "inner", tmp_path / "outer" / "math")
    assert AutoDecoForCausalLM.from_pretrained(tmp_path / "outer", subfolder="math").decoding_config.policy == "heads"
    with pytest.raises(AdapterLoadError):
        AutoDecoForCausalLM.from_pretrained(tmp_path / "outer")


# --- what is saved ----------------------------------------------------------------------------------------------------


def test_the_folder_holds_the_documented_files_and_only_the_adapter(folder, model):
    assert set(os.listdir(folder)) == FILES
    tensors = load_file(folder / "model.safetensors")
    adapter = model.decoding_adapter.state_dict()
    assert set(tensors) == set(adapter)
    assert all(torch.equal(tensors[name], adapter[name]) for name in adapter)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "autodeco"
    assert config["architectures"] == ["AutoDecoForCausalLM"]
    assert config["format_version"] == 1
    assert (config["hidden_size"], config["vocab_size"]) == (32, VOCABULARY)
    assert config["base_model_name_or_path"] == model.decoding_config.base_model_name_or_path
    assert config["base_fingerprint"] == fingerprint(tiny.build_base())
    assert config["library_version"]
    GenerationConfig.from_pretrained(folder)


def test_saving_twice_writes_the_same_bytes_and_leaves_other_files(folder, model):
    before = {name: (folder / name).read_bytes() for name in FILES}
    (folder / "notes.txt").write_text("mine")
    model.save_pretrained(folder)
    assert set(os.listdir(folder)) == FILES | {"notes.txt"}
    assert {name: (folder / name).read_bytes() for name in FILES} == before


def test_a_round_trip_keeps_every_bit(folder, tmp_path):
    AutoDecoForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_other_processes_write_nothing(model, tmp_path):
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_nothing_is_saved_of_a_broken_adapter(model, folder):
    before = (folder / "model.safetensors").read_bytes()
    model.decoding_adapter.top_p_head.out.bias.data.fill_(float("nan"))
    with pytest.raises(AdaptiveDecodeError, match="top_p_head"):
        model.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert set(os.listdir(folder)) == FILES


@pytest.mark.parametrize(
    "settings",
    [
        {"features": ["hidden", "statistics"]},
        {"heads": ["temperature"], "head_hidden_size": 16},
        {"temperature_range": (0.2, 1.4), "top_p_range": (0.3, 1.0), "detach_temperature": True},
    ],
    ids=str,
)
def test_every_kind_of_heads_comes_back(settings, tmp_path):
    _, folder, model = save_pair(tmp_path, "llama", **settings)
    expected = sample(model, prompts(), seed=2, **SETTINGS)
    loaded = AutoDecoForCausalLM.from_pretrained(folder)
    assert torch.equal(sample(loaded, prompts(), seed=2, **SETTINGS), expected)
    assert loaded.decoding_config.to_dict() == model.decoding_config.to_dict()


def test_a_static_adapter_has_no_weights_and_comes_back(tmp_path):
    actions = [{"temperature": 0.4}, {"temperature": 1.5, "top_k": 9}]
    _, folder, model = save_pair(tmp_path, "qwen3", policy="static", actions=actions, action_weights=[1, 2])
    assert set(os.listdir(folder)) == FILES
    expected = sample(model, prompts(), seed=2, **SETTINGS)
    assert torch.equal(sample(AutoDecoForCausalLM.from_pretrained(folder), prompts(), seed=2, **SETTINGS), expected)


def test_a_half_precision_adapter_is_saved_in_fp32(tmp_path):
    _, folder, _ = save_pair(tmp_path, "qwen3")
    loaded = AutoDecoForCausalLM.from_pretrained(folder).to(torch.bfloat16)
    loaded.save_pretrained(tmp_path / "half")
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float32}


# --- the base stays as it is ------------------------------------------------------------------------------------------


def test_the_base_is_bit_identical_through_it_all(folder, tmp_path):
    pristine = tiny.build_base().state_dict()
    first = AutoDecoForCausalLM.from_pretrained(folder)
    sample(first, prompts(), max_new_tokens=4)
    second = AutoDecoForCausalLM.from_pretrained(folder)
    for loaded in (first, second):
        state = loaded.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in pristine.items())
        assert loaded.config.to_dict() | {"dtype": None} == second.config.to_dict() | {"dtype": None}


def test_two_adapters_do_not_share_weights(folder):
    first, second = AutoDecoForCausalLM.from_pretrained(folder), AutoDecoForCausalLM.from_pretrained(folder)
    tiny.make_heads_identity(first)
    assert second.decoding_adapter.top_p_head.out.weight.abs().sum() > 0


def test_another_base_by_object_and_by_path(folder, tmp_path):
    expected = sample(AutoDecoForCausalLM.from_pretrained(folder), prompts(), **SETTINGS)
    base = tiny.build_base()
    by_object = AutoDecoForCausalLM.from_pretrained(folder, base_model=base)
    assert by_object is base
    assert torch.equal(sample(by_object, prompts(), **SETTINGS), expected)
    os.rename(tmp_path / "base", tmp_path / "moved")
    for path in (tmp_path / "moved", str(tmp_path / "moved")):
        assert torch.equal(
            sample(AutoDecoForCausalLM.from_pretrained(folder, base_model=path), prompts(), **SETTINGS), expected
        )
    with pytest.raises(AdapterLoadError, match="base_model="):
        AutoDecoForCausalLM.from_pretrained(folder)


def test_a_base_loaded_from_a_name_is_remembered(tmp_path):
    base_folder, _, model = save_pair(tmp_path, "qwen3")
    assert model.decoding_config.base_model_name_or_path == str(base_folder)
    by_path = AutoDecoForCausalLM.from_base(base_folder)
    assert by_path.decoding_config.base_model_name_or_path == str(base_folder)
    assert tiny.wrap().decoding_config.base_model_name_or_path is None


def test_the_callers_config_is_not_filled_in(base):
    config = AutoDecoConfig()
    AutoDecoForCausalLM.from_base(base, config)
    assert config.hidden_size is None
    assert config.base_fingerprint is None


def test_the_fingerprint_ignores_where_and_how_and_sees_what(tmp_path):
    base = tiny.build_base()
    base.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert fingerprint(loaded) == fingerprint(base)
    assert fingerprint(copy.deepcopy(base)) == fingerprint(base)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert fingerprint(eager) == fingerprint(base)
    base.config.rms_norm_eps = 1e-3
    assert fingerprint(base) != fingerprint(loaded)


# --- which bases may be named -----------------------------------------------------------------------------------------


def test_an_adapter_that_names_no_base_says_what_to_do():
    with pytest.raises(AdapterLoadError, match="base_model=") as caught:
        load_base(None, "some/adapter", adapter_is_remote=False)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc", ".", "..", "~/model", "./base", "a/b/c", "here", "C:\\base", "", "a/..", "-x/y", "file:///x"],
)
def test_a_downloaded_adapter_may_not_name_a_local_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(AdapterLoadError, match="local path") as caught:
        load_base(name, "someone/adapter", adapter_is_remote=True)
    assert repr(name) in str(caught.value)


def test_a_folder_adapter_may_name_a_local_path(tmp_path):
    tiny.build_base().save_pretrained(tmp_path)
    assert load_base(str(tmp_path), "here", adapter_is_remote=False).config.vocab_size == VOCABULARY


@pytest.mark.parametrize("remote", [False, True])
def test_a_base_that_is_not_there_is_named(remote):
    with pytest.raises(AdapterLoadError, match="nobody/nothing-at-all"):
        load_base("nobody/nothing-at-all", "some/adapter", adapter_is_remote=remote)


def test_an_adapter_that_is_not_there_is_named():
    with pytest.raises(AdapterLoadError, match="no/such-adapter"):
        AutoDecoForCausalLM.from_pretrained("no/such-adapter")


def test_a_packaged_base_goes_by_its_alias(model, tmp_path, monkeypatch):
    tiny.build_base().save_pretrained(tmp_path / "packaged")
    monkeypatch.setitem(PACKAGED_BASES, "hf_adaptive_decode:testbed", tmp_path / "packaged")
    wrapped = AutoDecoForCausalLM.from_base(AutoModelForCausalLM.from_pretrained(tmp_path / "packaged"))
    assert wrapped.decoding_config.base_model_name_or_path == "hf_adaptive_decode:testbed"
    wrapped.save_pretrained(tmp_path / "adapter")
    assert AutoDecoForCausalLM.from_pretrained(tmp_path / "adapter").config.vocab_size == VOCABULARY


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_has_metadata_and_says_how_to_use_it(folder):
    card = (folder / "README.md").read_text()
    for part in (
        "library_name: hf_adaptive_decode",
        "pipeline_tag: text-generation",
        "adaptive-decoding",
        "from_pretrained",
    ):
        assert part in card


def test_a_base_on_the_hub_is_linked(model, tmp_path):
    model.decoding_config.base_model_name_or_path = "someone/base"
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "base_model: someone/base" in card
    assert "base_model_relation: adapter" in card


@pytest.mark.parametrize(
    "text",
    [
        "# My adapter\n\nTrained with care.\n",
        "---\nlicense: mit\ntags:\n- mine\n---\n\n# My adapter\n\nTrained with care.\n",
        "Trained with care.\n\n---\n\nA rule above.\n",
    ],
    ids=["no metadata", "metadata", "a rule"],
)
def test_an_existing_card_keeps_its_text(model, tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    body = text.split("---\n")[-1].strip() if text.startswith("---") else text.strip()
    assert card.strip().endswith(body)
    assert "library_name: hf_adaptive_decode" in card
    if "license" in text:
        assert "license: mit" in card
        assert "- mine" in card
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == card


def test_a_card_with_broken_metadata_does_not_lose_the_adapter(model, tmp_path):
    (tmp_path / "README.md").write_text("---\ntags: [unclosed\n---\n# Mine\n")
    with contextlib.suppress(AdaptiveDecodeError):
        model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors", "generation_config.json"} <= set(os.listdir(tmp_path))
    assert "# Mine" in (tmp_path / "README.md").read_text()


# --- the bare processor -----------------------------------------------------------------------------------------------


def test_closing_the_processor_or_losing_it_removes_its_hook(folder, base):
    processor = AdaptiveSamplerLogitsProcessor.from_pretrained(folder, base)
    assert hooks_left(base) == 1
    processor.close()
    assert hooks_left(base) == 0
    processor.close()
    processor = AdaptiveSamplerLogitsProcessor.from_pretrained(folder, base)
    assert hooks_left(base) == 1
    del processor
    gc.collect()
    assert hooks_left(base) == 0


def test_a_processor_serves_one_call_after_another(folder, base):
    processor = AdaptiveSamplerLogitsProcessor.from_pretrained(folder, base)
    settings = {"do_sample": True, "top_k": 0, "logits_processor": [processor], **SETTINGS}
    first = sample(base, prompts(), seed=4, **settings)
    sample(base, prompts(5, 3), seed=1, **settings)
    assert torch.equal(sample(base, prompts(), seed=4, **settings), first)


def test_a_closed_processor_says_so(folder, base):
    processor = AdaptiveSamplerLogitsProcessor.from_pretrained(folder, base)
    processor.close()
    with pytest.raises(AdaptiveDecodeError, match="tap"):
        base.generate(prompts(), max_new_tokens=2, do_sample=True, logits_processor=[processor])


def test_a_processor_of_another_model_is_refused(folder, base):
    processor = AdaptiveSamplerLogitsProcessor.from_pretrained(folder, base)
    with pytest.raises(AdaptiveDecodeError):
        tiny.build_base("llama").generate(prompts(), max_new_tokens=2, do_sample=True, logits_processor=[processor])


def test_a_processor_with_guidance_reads_the_main_pass_or_refuses(folder, base):
    wrapped = AutoDecoForCausalLM.from_pretrained(folder)
    expected = sample(
        wrapped, prompts(), guidance_scale=2.0, return_dict_in_generate=True, output_scores=True, **SETTINGS
    )
    processor = AdaptiveSamplerLogitsProcessor.from_pretrained(folder, base)
    settings = {
        "do_sample": True,
        "top_k": 0,
        "guidance_scale": 2.0,
        "logits_processor": LogitsProcessorList([processor]),
    }
    try:
        found = sample(base, prompts(), return_dict_in_generate=True, output_scores=True, **settings, **SETTINGS)
    except AdaptiveDecodeError:
        return
    assert torch.allclose(found.scores[0], expected.scores[0], atol=1e-4)
    assert torch.equal(found.sequences, expected.sequences)


def test_a_failed_load_leaves_no_hook(folder, base):
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterLoadError):
        AdaptiveSamplerLogitsProcessor.from_pretrained(folder, base)
    assert hooks_left(base) == 0


def test_a_processor_can_be_made_by_hand(base):
    policy = build_policy(AutoDecoConfig(policy="static", actions=[{"temperature": 0.0}], hidden_size=32))
    processor = AdaptiveSamplerLogitsProcessor(policy, lambda: torch.zeros(2, 32))
    scores, ids = torch.randn(2, 9), torch.zeros(2, 3, dtype=torch.long)
    assert torch.equal(processor(ids, scores).argmax(-1), scores.argmax(-1))
    assert (processor(ids, scores) > -float("inf")).sum(-1).tolist() == [1, 1]
    assert isinstance(policy, torch.nn.Module)
    assert SamplingParameters().temperature is None


def test_wrapping_a_wrapped_model_by_loading_is_refused(folder, model):
    adapter = model.decoding_adapter
    with pytest.raises(AdapterConfigError, match="already"):
        AutoDecoForCausalLM.from_pretrained(folder, base_model=model)
    assert model.decoding_adapter is adapter
