"""A base that carries a LoRA, merged or not: it decodes as its weights say, is saved and loaded whole, and a folder
that somebody else made is not trusted."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, build_base, prompts, randomise_heads, sample, wrap
from tiny_lora import build_lora, changed_by_hand, heads_of, lora_of, randomise, rest_of, same
from transformers import AutoModelForCausalLM

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM, REINFORCEDecodingTrainer
from hf_adaptive_decode.errors import AdapterConfigError, AdapterLoadError, MissingExtraError
from hf_adaptive_decode.hub.bases import fingerprint
from hf_adaptive_decode.hub.peft_layers import active_lora, peft_names, unwrap_peft
from hf_adaptive_decode.hub.peft_weights import check_lora, load_peft, save_peft

peft = pytest.importorskip("peft")

TRACED = {"return_dict_in_generate": True, "output_decoding_trace": True}
ENDLESS = {"eos_token_id": None, "max_new_tokens": 8}


@torch.no_grad()
def logits(model):
    return model(prompts()).logits


def generated(model, **kwargs):
    return sample(model, prompts(), **{**ENDLESS, **TRACED, **kwargs})


def assert_same_decoding(found, expected):
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("temperature", "top_p"):
        torch.testing.assert_close(vars(found.decoding_trace)[name], vars(expected.decoding_trace)[name])


@pytest.fixture
def saved(tmp_path):
    """An adapter's folder with a LoRA, and the model that it was saved from."""
    base_folder = tmp_path / "base"
    build_base().save_pretrained(base_folder)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = randomise_heads(wrap(build_lora(base=base)))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


# --- a base with a LoRA decodes as a base with those weights ----------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_base_decodes_like_the_base_with_its_weights_changed_by_hand(family):
    tuned = build_lora(family)
    expected = generated(randomise_heads(wrap(changed_by_hand(tuned, family))))
    plain = generated(randomise_heads(wrap(build_base(family))))
    assert not torch.equal(plain.sequences, expected.sequences)
    assert_same_decoding(generated(randomise_heads(wrap(tuned))), expected)


def test_a_merged_lora_is_a_plain_model_like_any_other(tmp_path):
    tuned = build_lora()
    expected = generated(randomise_heads(wrap(changed_by_hand(tuned))))
    model = randomise_heads(wrap(tuned.merge_and_unload()))
    assert_same_decoding(generated(model), expected)
    assert peft_names(model) == []
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "peft").exists()


def test_the_peft_model_becomes_the_adaptive_model_inside_it():
    tuned = build_lora()
    inner, expected = tuned.base_model.model, logits(tuned)
    model = wrap(tuned)
    assert model is inner
    assert isinstance(model, AutoDecoForCausalLM)
    assert peft_names(model) == ["default"]
    assert torch.equal(logits(model), expected)


def test_what_transformers_itself_injected_is_a_lora_too(tmp_path):
    base = build_base()
    base.add_adapter(peft.LoraConfig(r=2, target_modules=["v_proj"]))
    model = wrap(base)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["target_modules"] == ["v_proj"]


def test_disabling_the_decoding_adapter_leaves_the_lora_on():
    tuned = build_lora()
    expected = sample(build_lora().base_model.model, prompts(), do_sample=True, **ENDLESS)
    model = randomise_heads(wrap(tuned))
    with model.disable_adapter():
        assert torch.equal(sample(model, prompts(), do_sample=True, **ENDLESS), expected)
    with_lora = logits(model)
    model.disable_adapters()  # transformers' own, which switches LoRAs off
    assert torch.equal(logits(model), logits(build_base()))
    model.enable_adapters()
    assert torch.equal(logits(model), with_lora)


def test_taking_the_decoding_adapter_away_gives_the_base_with_its_lora():
    tuned = build_lora()
    expected, kind = logits(tuned), type(tuned.base_model.model)
    base = wrap(tuned).unload()
    assert type(base) is kind
    assert torch.equal(logits(base), expected)


def test_counts_and_fingerprint_are_those_of_the_base_and_its_lora():
    plain, tuned = build_base(), build_lora()
    of_lora = sum(p.numel() for name, p in tuned.named_parameters() if ".lora_" in name)
    model = wrap(tuned)
    heads = sum(p.numel() for p in model.decoding_adapter.parameters())
    assert model.get_nb_trainable_parameters() == (heads, heads + of_lora + plain.num_parameters())
    assert model.decoding_config.base_fingerprint == fingerprint(plain)


def test_a_lora_on_top_of_an_adaptive_model_is_saved_with_it(tmp_path):
    model = randomise_heads(wrap())
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    fresh = generated(model)
    randomise(tuned)
    expected = generated(model)
    assert not torch.equal(fresh.sequences, expected.sequences)
    model.save_pretrained(tmp_path)
    assert_same_decoding(generated(AutoDecoForCausalLM.from_pretrained(tmp_path, base_model=build_base())), expected)


# --- saved and loaded -------------------------------------------------------------------------------------------------


def test_a_folder_holds_both_and_gives_both_back(saved):
    folder, model = saved
    assert sorted(path.name for path in (folder / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not (folder / "adapter_config.json").exists()
    for loaded in (
        AutoDecoForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
        AutoDecoForCausalLM.from_pretrained(folder, base_model=build_base()),
    ):
        assert same(lora_of(loaded), lora_of(model))
        assert same(heads_of(loaded), heads_of(model))
        assert not loaded.training
        assert_same_decoding(generated(loaded), generated(model))


def test_saving_what_was_loaded_writes_the_same_again(saved, tmp_path):
    folder, _ = saved
    AutoDecoForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / "peft" / name).read_bytes() == (folder / "peft" / name).read_bytes()


VARIANTS = {
    "dora": {"use_dora": True},
    "rslora and a bias of B": {"use_rslora": True, "lora_bias": True},
    "ranks and alphas by pattern": {
        "rank_pattern": {r".*1\.self_attn.q_proj": 5, "down_proj": 1},
        "alpha_pattern": {"q_proj": 3},
    },
    "embeddings": {"target_modules": ["embed_tokens", "lm_head"]},
    "one layer, by a regular expression": {"target_modules": r".*\.1\.(self_attn\.[qk]_proj|mlp\.up_proj)"},
    "every linear layer but one": {"target_modules": "all-linear", "exclude_modules": ["model.layers.0.mlp.up_proj"]},
    "layers by number": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])  # gemma2's embeddings are untied here, too
def test_every_kind_of_lora_comes_back_and_peft_itself_reads_it(variant, family, tmp_path):
    tuned = build_lora(family, **VARIANTS[variant])
    expected = logits(tuned)
    save_peft(unwrap_peft(tuned), tmp_path)
    base = build_base(family)
    load_peft(base, tmp_path / "peft")
    assert torch.equal(logits(base), expected)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(build_base(family), tmp_path / "peft")), expected)
    stored = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert isinstance(stored["target_modules"], list)  # nothing to be matched as a pattern


@settings(max_examples=12)
@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 2.5, 16])), min_size=4, max_size=4))
def test_any_mixture_of_ranks_and_alphas_comes_back(tmp_path_factory, mixture):
    names = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")]
    patterns = {
        "rank_pattern": {name: rank for name, (rank, _) in zip(names, mixture, strict=True)},
        "alpha_pattern": {name: alpha for name, (_, alpha) in zip(names, mixture, strict=True)},
    }
    folder = tmp_path_factory.mktemp("mixture")
    tuned = build_lora(target_modules=["q_proj", "v_proj"], **patterns)
    save_peft(unwrap_peft(tuned), folder)
    base = build_base()
    load_peft(base, folder / "peft")
    assert torch.equal(logits(base), logits(tuned))


def test_loading_draws_no_random_number_and_unfreezes_nothing(saved):
    folder, _ = saved
    base = build_base()
    base.model.layers[0].requires_grad_(False)
    before = {name for name, p in base.named_parameters() if p.requires_grad}
    state = torch.random.get_rng_state()
    load_peft(base, folder / "peft")
    assert torch.equal(torch.random.get_rng_state(), state)
    after = {name.replace(".base_layer", "") for name, p in base.named_parameters() if p.requires_grad}
    assert after == before


def test_a_half_precision_lora_stays_one(tmp_path):
    tuned = build_lora(base=build_base().bfloat16()).bfloat16()
    save_peft(unwrap_peft(tuned), tmp_path)
    base = build_base().bfloat16()
    load_peft(base, tmp_path / "peft")
    assert {tensor.dtype for tensor in lora_of(base).values()} == {torch.bfloat16}
    assert torch.equal(logits(base), logits(tuned))


def test_saving_without_a_lora_takes_the_old_one_away_and_nothing_else(saved):
    folder, _ = saved
    (folder / "peft" / "notes.txt").write_text("mine")
    save_peft(build_base(), folder)
    assert [path.name for path in (folder / "peft").iterdir()] == ["notes.txt"]
    (folder / "peft" / "notes.txt").unlink()
    save_peft(build_base(), folder)
    assert not (folder / "peft").exists()


def test_a_save_that_fails_leaves_no_part_of_a_lora(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_adaptive_decode.hub.peft_weights.base_name", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_peft(unwrap_peft(build_lora()), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_one_of_several_loras_is_saved_if_it_acts_alone(tmp_path):
    tuned = build_lora()
    tuned.add_adapter("other", peft.LoraConfig(r=1, target_modules=["v_proj"]))
    tuned.set_adapter("other")
    model = wrap(tuned)
    save_peft(model, tmp_path)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["target_modules"] == ["v_proj"]
    tuned.set_adapter("default")
    save_peft(model, tmp_path)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 3


def test_the_card_says_that_a_lora_lies_beside(saved):
    folder, _ = saved
    card = (folder / "README.md").read_text()
    assert "- peft\n" in card
    assert "`peft/`" in card
    assert "gives the base model with its LoRA, exactly" in card
    AutoDecoForCausalLM.from_base(build_base()).save_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert "- peft\n" not in card
    assert "`peft/`" not in card


# --- what does not go with a decoding adapter -------------------------------------------------------------------------


def with_two_active():
    tuned = build_lora()
    tuned.add_adapter("other", peft.LoraConfig(r=1, target_modules=["v_proj"]))
    tuned.base_model.set_adapter(["default", "other"])
    return tuned


def switched_off():
    tuned = build_lora()
    tuned.base_model.disable_adapter_layers()
    return tuned


UNSUITABLE = {
    "prompt tuning": (
        lambda: peft.get_peft_model(
            build_base(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", num_layers=2)
        ),
        "PROMPT_TUNING",
    ),
    "prefix tuning": (
        lambda: peft.get_peft_model(
            build_base("gpt2"), peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        ),
        "PREFIX_TUNING",
    ),
    "another tuner": (
        lambda: peft.get_peft_model(
            build_base(), peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])
        ),
        "IA3",
    ),
    "trained biases": (lambda: build_lora(bias="all"), "bias='all'"),
    "whole modules": (lambda: build_lora(modules_to_save=["lm_head"]), "modules_to_save"),
    "a changed base": (lambda: build_lora(init_lora_weights="pissa"), "pissa"),
    "two at once": (with_two_active, "2 LoRAs"),
    "a LoRA switched off": (switched_off, "switched off"),
}


@pytest.mark.parametrize("kind", UNSUITABLE)
def test_what_could_not_be_saved_is_refused_with_the_reason_and_what_to_do(kind):
    build, named = UNSUITABLE[kind]
    with pytest.raises(AdapterConfigError, match=named) as refused:
        wrap(build())
    assert any(word in str(refused.value) for word in ("merge", "set_adapter", "enable_adapters"))


def test_a_lora_inside_the_heads_is_refused_when_it_would_be_saved(tmp_path):
    tuned = peft.get_peft_model(wrap(), peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(AdapterConfigError, match="exclude_modules"):
        unwrap_peft(tuned)
    apart = peft.LoraConfig(target_modules="all-linear", exclude_modules=".*decoding_adapters.*")
    assert active_lora(unwrap_peft(peft.get_peft_model(wrap(), apart))) is not None


def test_a_base_with_a_lora_takes_no_second_one_from_a_folder(saved):
    folder, _ = saved
    with pytest.raises(AdapterLoadError, match="plain base"):
        AutoDecoForCausalLM.from_pretrained(folder, base_model=build_lora())


def test_an_adapter_on_a_model_without_its_lora_is_warned_of(saved, recwarn):
    folder, model = saved
    with pytest.warns(UserWarning, match="has none"):
        check_lora(build_base(), folder / "peft", "mine")
    with pytest.warns(UserWarning, match="another one"):
        check_lora(unwrap_peft(build_lora(size=0.2)), folder / "peft", "mine")
    with pytest.warns(UserWarning, match="another one"):
        check_lora(unwrap_peft(build_lora(r=2)), folder / "peft", "mine")
    recwarn.clear()
    check_lora(model, folder / "peft", "mine")
    check_lora(build_base(), None, "mine")
    assert not recwarn.list


def test_without_peft_the_missing_extra_is_named(saved, monkeypatch):
    folder, _ = saved
    base = build_base()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"\[train\]"):
        load_peft(base, folder / "peft")


# --- folders that somebody else made ----------------------------------------------------------------------------------


def settings_with(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def text_instead(text):
    return lambda folder: (folder / "adapter_config.json").write_text(text)


def tensors_changed(change):
    def apply(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors, sorted(tensors)[0])
        save_file(tensors, path)

    return apply


def header_names_twice(folder):
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode()
    first = sorted(load_file(path))[0]
    twice = header.rstrip()[:-1] + f',"{first}":{json.dumps(json.loads(header)[first])}}}'
    path.write_bytes(len(twice).to_bytes(8, "little") + twice.encode() + data[8 + length :])


def pickle_instead(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")


HOSTILE = {
    "another tuner": (settings_with(peft_type="IA3"), "peft_type"),
    "a prompt": (settings_with(peft_type="PROMPT_TUNING", token_dim=1), "peft_type"),
    "no type": (settings_with(peft_type=None), "peft_type"),
    "a regular expression": (settings_with(target_modules="(a+)+$"), "target_modules"),
    "every linear layer": (settings_with(target_modules="all-linear"), "target_modules"),
    "expressions in names": (settings_with(target_modules=["q_proj", "(a+)+$"]), "target_modules"),
    "expressions in ranks": (settings_with(rank_pattern={"(a|a)*$": 2}), "rank_pattern"),
    "no names": (settings_with(target_modules=[]), "target_modules"),
    "names of nothing": (settings_with(target_modules=["nothing"]), "does not fit"),
    "a module that is no layer": (settings_with(target_modules=["self_attn"]), "does not fit"),
    "too many names": (settings_with(target_modules=["a"] * 100_001), "target_modules"),
    "a huge rank": (settings_with(r=10**9), "`r`"),
    "a huge rank of one layer": (settings_with(rank_pattern={"q_proj": 10**9}), "rank_pattern"),
    "a rank that is no number": (settings_with(r=True), "`r`"),
    "an endless alpha": (settings_with(lora_alpha=float("inf")), "lora_alpha"),
    "an alpha beyond floats": (settings_with(lora_alpha=10**400), "lora_alpha"),
    "dropout that is none": (settings_with(lora_dropout=1.0), "lora_dropout"),
    "flags that are words": (settings_with(use_dora="yes"), "use_dora"),
    "base weights by PiSSA": (settings_with(init_lora_weights="pissa"), "init_lora_weights"),
    "data by LoftQ": (settings_with(init_lora_weights="loftq", loftq_config={"a": 1}), "init_lora_weights"),
    "biases": (settings_with(bias="all"), "bias"),
    "whole modules": (settings_with(modules_to_save=["lm_head"]), "modules_to_save"),
    "code": (settings_with(trust_remote_code=True), "trust_remote_code"),
    "megatron": (settings_with(megatron_config={"a": 1}), "megatron_config"),
    "other ranks": (settings_with(r=2), "shape"),
    "other layers": (settings_with(target_modules=["v_proj"]), "unexpected"),
    "no JSON": (text_instead("{"), "JSON"),
    "a list": (text_instead("[]"), "list"),
    "depth": (text_instead("[" * 100_000), "JSON"),
    "length": (text_instead(" " * (2 << 20)), "1048576"),
    "a missing tensor": (tensors_changed(lambda t, first: t.pop(first)), "is missing"),
    "a tensor too many": (tensors_changed(lambda t, first: t.update(extra=t[first].clone())), "extra is unexpected"),
    "the base's weights": (
        tensors_changed(lambda t, first: t.update({"base_model.model.lm_head.weight": torch.zeros(96, 32)})),
        "lm_head.weight is unexpected",
    ),
    "NaN": (tensors_changed(lambda t, first: t[first].fill_(float("nan"))), "NaN"),
    "whole numbers": (tensors_changed(lambda t, first: t.update({first: t[first].int()})), "dtype"),
    "a name twice": (header_names_twice, "more than once"),
    "a pickle": (pickle_instead, "pickle"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_bad_folder_is_refused_and_the_base_is_left_as_it_was(kind, saved):
    folder, _ = saved
    damage, named = HOSTILE[kind]
    damage(folder / "peft")
    base = build_base()
    before = {name: id(parameter) for name, parameter in base.named_parameters()}
    with pytest.raises((AdapterLoadError, AdapterConfigError), match=named):
        AutoDecoForCausalLM.from_pretrained(folder, base_model=base)
    assert {name: id(parameter) for name, parameter in base.named_parameters()} == before
    assert peft_names(base) == []
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert torch.equal(logits(base), logits(build_base()))


def test_what_a_folder_says_of_its_origin_is_not_followed(saved, tmp_path):
    folder, model = saved
    origin = {"base_model_class": "Popen", "parent_library": "subprocess"}
    settings_with(base_model_name_or_path=str(tmp_path / "nowhere"), auto_mapping=origin)(folder / "peft")
    assert same(lora_of(AutoDecoForCausalLM.from_pretrained(folder)), lora_of(model))


def test_a_large_lora_is_loaded_only_if_it_is_asked_for(saved):
    folder, _ = saved
    size = (folder / "peft" / "adapter_model.safetensors").stat().st_size
    with pytest.raises(AdapterLoadError, match="max_peft_bytes"):
        AutoDecoForCausalLM.from_pretrained(folder, max_peft_bytes=size - 1)
    AutoDecoForCausalLM.from_pretrained(folder, max_peft_bytes=size)


# --- policies on a base with a LoRA -----------------------------------------------------------------------------------


def test_a_policy_learns_from_rollouts_of_a_lora_base_that_stands_still(tmp_path):
    from reinforce_tables import arguments

    from hf_adaptive_decode.testbed import build_problems, load_base_model, load_tokenizer

    tuned = build_lora(base=load_base_model(), size=0.02, target_modules=["q_proj", "v_proj"])
    actions = [{"temperature": 0.0}, {"temperature": 1.3}]
    trainer = REINFORCEDecodingTrainer(
        tuned,
        lambda completion_ids, **columns: [len(set(ids)) / len(ids) for ids in completion_ids],
        arguments(tmp_path, per_device_train_batch_size=4, budget=6, max_steps=2, save_steps=2, save_strategy="steps"),
        build_problems("train", 8),
        processing_class=load_tokenizer(),
        decoding_config=AutoDecoConfig(policy="token_actions", actions=actions),
    )
    model = trainer.model
    before, lora, policy = rest_of(model), lora_of(model), heads_of(model)
    trainer.train()
    assert same(rest_of(model), before)
    assert same(lora_of(model), lora)
    assert not same(heads_of(model), policy)
    loaded = AutoDecoForCausalLM.from_pretrained(tmp_path / "checkpoint-2", base_model=load_base_model())
    assert same(lora_of(loaded), lora)
    assert same(heads_of(loaded), heads_of(model))
