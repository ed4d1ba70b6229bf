"""Several adapters on one model, as PEFT has them: added, loaded, chosen, mixed in a batch, deleted, taken off."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from tiny import PAD, hooks_left, prompts, sample

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM, Budget, SamplingParameters
from hf_adaptive_decode.errors import (
    AdapterConfigError,
    AdapterLoadError,
    UnknownAdapterError,
    UnsupportedGenerationError,
)
from hf_adaptive_decode.policies import DecodingPolicy, RowPolicies, StaticPolicy
from hf_adaptive_decode.types import DecodeState

TRACED = {"return_dict_in_generate": True, "output_scores": True, "output_decoding_trace": True}
ENDLESS = {"eos_token_id": None, "pad_token_id": PAD}
COLD, HOT = [{"temperature": 0.25}], [{"temperature": 1.75, "top_p": 0.9}]


def static(actions) -> AutoDecoConfig:
    return AutoDecoConfig(policy="static", actions=actions)


@pytest.fixture
def several(model):
    """Heads called "default", and two fixed settings beside them."""
    model.add_adapter("cold", static(COLD))
    model.add_adapter("hot", static(HOT))
    return model


@pytest.fixture
def saved(several, tmp_path):
    base = tmp_path / "base"
    tiny.build_base().save_pretrained(base)
    for config in several.decoding_configs.values():
        config.base_model_name_or_path = str(base)
    several.save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters"


def temperatures(model, ids=None, **settings):
    ids = prompts(3) if ids is None else ids
    return sample(model, ids, max_new_tokens=4, **settings, **TRACED, **ENDLESS).decoding_trace.temperature


# --- one active adapter ----------------------------------------------------------------------------------------------


def test_a_new_adapter_is_there_and_not_active(several):
    assert list(several.decoding_adapters) == ["default", "cold", "hot"]
    assert several.active_adapter == "default"
    assert temperatures(several).std() > 0.1


def test_the_active_adapter_decides(several):
    several.set_adapter("cold")
    assert several.active_adapter == "cold"
    assert several.decoding_config.actions == COLD
    assert (temperatures(several) == 0.25).all()
    several.set_adapter("hot")
    assert (temperatures(several) == 1.75).all()


def test_only_the_active_adapter_is_trainable(base):
    model = AutoDecoForCausalLM.from_base(base)
    model.add_adapter("other", AutoDecoConfig(head_hidden_size=16))

    def trainable():
        return {name.split(".")[1] for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trainable() == {"default"}
    model.set_adapter("other")
    assert trainable() == {"other"}
    assert all(name.startswith("decoding_adapters.") for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("trainable", [True, False])
def test_a_loaded_adapter_is_trainable_if_asked_for(saved, trainable):
    model = AutoDecoForCausalLM.from_pretrained(saved)
    assert not any(p.requires_grad for p in model.parameters())
    model.load_adapter(saved, "again", is_trainable=trainable)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_adapter("again")
    assert any(p.requires_grad for p in model.parameters()) == trainable


def test_the_half_precision_of_the_base_is_taken_if_asked_for(saved):
    model = AutoDecoForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    model.load_adapter(saved, "low", autocast_adapter_dtype=False)
    assert {p.dtype for p in model.decoding_adapter.parameters()} == {torch.float32}
    assert {p.dtype for p in model.decoding_adapters["low"].parameters()} == {torch.bfloat16}


def test_a_deleted_adapter_is_gone_and_another_takes_over(several):
    several.delete_adapter("default")
    assert several.active_adapter == "cold"
    assert (temperatures(several) == 0.25).all()
    several.delete_adapter("hot")
    assert several.active_adapter == "cold"
    assert not any("default" in name or "hot" in name for name in several.state_dict())
    with pytest.raises(AdapterConfigError, match="unload"):
        several.delete_adapter("cold")


def test_trace_and_training_see_the_active_adapter(several):
    several.set_adapter("cold")
    assert several.decoding_adapter is several.decoding_adapters["cold"]
    trained, _ = several.get_nb_trainable_parameters()
    assert trained == 0
    several.set_adapter("default")
    assert several.get_nb_trainable_parameters()[0] == sum(p.numel() for p in several.decoding_adapter.parameters())


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["set_adapter", "delete_adapter"])
def test_an_unknown_name_is_refused_and_the_known_ones_listed(several, call):
    with pytest.raises(KeyError, match=r"'warm'.*'default', 'cold', 'hot'") as caught:
        getattr(several, call)("warm")
    assert isinstance(caught.value, UnknownAdapterError)


def test_a_name_that_is_taken_is_refused(several, saved):
    with pytest.raises(UnknownAdapterError, match="'cold' already"):
        several.add_adapter("cold", static(HOT))
    with pytest.raises(UnknownAdapterError, match="'cold' already"):
        several.load_adapter(saved, "cold")
    several.set_adapter("cold")
    assert (temperatures(several) == 0.25).all()


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", "__base__", "keys", "x" * 129, "a\\b"])
def test_a_name_that_no_module_or_folder_could_have_is_refused(model, name):
    with pytest.raises(UnknownAdapterError, match="cannot be an adapter's name"):
        model.add_adapter(name, static(COLD))
    with pytest.raises(UnknownAdapterError, match="cannot be an adapter's name"):
        AutoDecoForCausalLM.from_base(tiny.build_base(), adapter_name=name)
    assert list(model.decoding_adapters) == ["default"]


def test_a_config_for_another_shape_is_refused(model):
    with pytest.raises(AdapterConfigError, match=r"7.*32"):
        model.add_adapter("other", AutoDecoConfig(hidden_size=7))


def test_wrapping_twice_says_how_to_add(model):
    with pytest.raises(AdapterConfigError, match="add_adapter"):
        AutoDecoForCausalLM.from_base(model)


def test_a_damaged_adapter_leaves_the_others_as_they_were(several, saved):
    (saved / "hot" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(AdapterLoadError):
        several.load_adapter(saved / "hot", "again")
    assert list(several.decoding_adapters) == ["default", "cold", "hot"]


# --- several in one batch --------------------------------------------------------------------------------------------


def test_each_row_is_decided_by_the_adapter_that_it_names(several):
    ids = prompts(4)
    found = temperatures(several, ids, adapter_names=["cold", "default", "hot", "cold"])
    assert (found[[0, 3]] == 0.25).all()
    assert (found[2] == 1.75).all()
    hidden, _ = tiny.hidden_and_logits(several, ids)
    expected, _ = tiny.heads_by_hand(several.decoding_adapters["default"], hidden[:, -1])
    assert torch.allclose(found[1, 0], expected[1], atol=1e-5)


def test_a_row_of_a_mixed_batch_is_what_it_is_alone(several):
    """Greedy-like settings make the tokens of a row its own, whoever shares the batch."""
    several.add_adapter("greedy", static([{"temperature": 0.0}]))
    several.add_adapter("top", static([{"top_k": 1}]))
    ids = prompts(4)
    names = ["greedy", "top", "__base__", "default"]
    mixed = sample(several, ids, adapter_names=names, max_new_tokens=6, **ENDLESS)
    greedy = several.generate(ids, max_new_tokens=6, do_sample=False, **ENDLESS)
    assert torch.equal(mixed[:3], greedy[:3])  # the base's own config does not sample


def test_the_order_of_rows_changes_no_rows_parameters(several):
    ids = prompts(5)
    names = ["hot", "default", "cold", "default", "__base__"]
    first = sample(several, ids, adapter_names=names, max_new_tokens=1, **TRACED, **ENDLESS)
    order = [4, 2, 0, 3, 1]
    names = [names[i] for i in order]
    second = sample(several, ids[order], adapter_names=names, max_new_tokens=1, **TRACED, **ENDLESS)
    for column in ("temperature", "top_p", "action"):
        ours, theirs = (getattr(found.decoding_trace, column)[:, 0] for found in (first, second))
        assert torch.allclose(ours[order].float(), theirs.float(), atol=1e-6)


def test_base_rows_sample_as_the_base_does(several):
    """As the caller, or else the base's own config, says; with the other rows' settings off."""
    several.generation_config.do_sample, several.generation_config.top_p = True, 0.8
    several.generation_config.temperature = 0.6
    found = sample(several, prompts(2), adapter_names=["__base__", "hot"], max_new_tokens=3, **TRACED, **ENDLESS)
    assert (found.decoding_trace.temperature[0] == 0.6).all()
    assert torch.allclose(found.decoding_trace.top_p[0], torch.tensor(0.8))
    assert (found.scores[0] > -float("inf")).sum(-1)[0] <= 50
    with several.disable_adapter():
        base = sample(
            several, prompts(2), max_new_tokens=3, return_dict_in_generate=True, output_scores=True, **ENDLESS
        )
    assert torch.allclose(found.scores[0][0], base.scores[0][0], atol=1e-5)
    several.generation_config.typical_p = 0.5
    with pytest.raises(UnsupportedGenerationError, match="typical_p"):
        several.generate(prompts(2), adapter_names=["__base__", "hot"], max_new_tokens=3)


def test_what_the_caller_fixes_holds_for_every_row(several):
    found = temperatures(several, prompts(2), adapter_names=["cold", "hot"], temperature=0.5)
    assert (found == 0.5).all()


def test_samples_and_budgets_follow_their_prompts(several):
    found = sample(
        several,
        prompts(2),
        adapter_names=["cold", "hot"],
        budget=Budget(tokens=[2, 4], samples=3),
        **TRACED,
        **ENDLESS,
    ).decoding_trace
    assert found.temperature.shape == (6, 4)
    assert (found.temperature[:3, :2] == 0.25).all()
    assert found.temperature[:3, 2:].isnan().all()
    assert (found.temperature[3:] == 1.75).all()
    assert (found.action[3:] == 0).all()


def test_adapters_that_decide_once_keep_to_it_in_a_mixed_batch(several):
    twice = AutoDecoConfig(policy="static", actions=[*COLD, *HOT], mixture_per="sequence")
    several.add_adapter("drawn", twice)
    found = temperatures(several, prompts(6), adapter_names=["drawn"] * 5 + ["default"])
    assert (found[:5] == found[:5, :1]).all()
    assert set(found[:5, 0].tolist()) == {0.25, 1.75}
    assert found[5].std() > 0


@pytest.mark.parametrize("names", [["cold"], ["cold", "hot", "hot"], "cold", []])
def test_names_have_to_be_one_a_prompt(several, names):
    with tiny.counted_forwards(several) as calls, pytest.raises(UnsupportedGenerationError, match="exactly 2 names"):
        several.generate(prompts(2), adapter_names=names, max_new_tokens=2)
    assert not calls


def test_an_unknown_name_in_a_batch_is_refused_before_the_model_runs(several):
    with tiny.counted_forwards(several) as calls, pytest.raises(KeyError, match="'wram'"):
        several.generate(prompts(2), adapter_names=["cold", "wram"], max_new_tokens=2)
    assert not calls
    assert hooks_left(several) == 0


class Told(DecodingPolicy):
    """Remembers the states that it is shown."""

    def __init__(self):
        super().__init__(AutoDecoConfig(hidden_size=4))
        self.seen = []

    def forward(self, state):
        self.seen.append(state)
        return SamplingParameters(temperature=state.hidden[:, 0])


def test_each_policy_sees_its_own_rows_and_no_others():
    first, second = Told(), Told()
    state = DecodeState(torch.arange(12.0).view(3, 4), torch.ones(3, 9), torch.tensor([5, 6, 7]))
    found = RowPolicies([first, second, first])(state)
    assert found.temperature.tolist() == [0.0, 4.0, 8.0]
    assert found.top_p is None
    assert first.seen[0].remaining_tokens.tolist() == [5, 7]
    assert second.seen[0].remaining_tokens.tolist() == [6]
    mixed = RowPolicies([first, StaticPolicy(AutoDecoConfig(policy="static", actions=HOT, hidden_size=4)), first])(
        state
    )
    assert mixed.temperature.tolist() == [0.0, 1.75, 8.0]
    assert mixed.top_p.tolist() == pytest.approx([1.0, 0.9, 1.0])
    assert mixed.action.tolist() == [-1, 0, -1]


# --- files -----------------------------------------------------------------------------------------------------------


def test_adapters_are_saved_as_peft_saves_them_and_come_back(several, saved):
    assert (saved / "config.json").exists()
    assert (saved / "cold" / "config.json").exists()
    assert (saved / "hot" / "model.safetensors").exists()
    model = AutoDecoForCausalLM.from_pretrained(saved)
    loaded = model.load_adapter(saved, "cold", subfolder="cold")
    model.load_adapter(saved / "hot", "hot")
    assert (loaded.missing_keys, loaded.unexpected_keys) == ([], [])
    assert model.active_adapter == "default"
    for seed in range(2):
        names = ["hot", "cold", "default"]
        expected = sample(several, prompts(3), seed=seed, adapter_names=names, max_new_tokens=5, **ENDLESS)
        assert torch.equal(
            sample(model, prompts(3), seed=seed, adapter_names=names, max_new_tokens=5, **ENDLESS), expected
        )


def test_selected_adapters_are_saved_alone(several, tmp_path):
    several.save_pretrained(tmp_path / "one", selected_adapters=["cold"])
    assert not (tmp_path / "one" / "cold").exists()
    model = AutoDecoForCausalLM.from_pretrained(tmp_path / "one", tiny.build_base(), adapter_name="cold")
    assert model.active_adapter == "cold"
    assert (temperatures(model) == 0.25).all()
    with pytest.raises(UnknownAdapterError):
        several.save_pretrained(tmp_path / "none", selected_adapters=["warm"])
    with pytest.raises(UnknownAdapterError, match="empty"):
        several.save_pretrained(tmp_path / "none", selected_adapters=[])
    assert not (tmp_path / "none").exists()


def test_several_adapters_are_not_pushed_as_one(several, tmp_path):
    with pytest.raises(UnknownAdapterError, match="selected_adapters"):
        several.save_pretrained(tmp_path / "all", push_to_hub=True)


# --- taking it off ---------------------------------------------------------------------------------------------------


def test_unload_gives_the_base_back_untouched(family):
    base = tiny.build_base(family)
    trained = next(iter(base.parameters())).requires_grad_(False)
    kind, config = type(base), base.generation_config
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    wanted = sample(base, prompts(), do_sample=True, max_new_tokens=5, **ENDLESS)
    model = tiny.randomise_heads(tiny.wrap(base))
    model.add_adapter("cold", static(COLD))
    sample(model, prompts(), max_new_tokens=5, **ENDLESS)
    back = model.unload()
    assert back is base
    assert type(back) is kind
    assert back.generation_config is config
    assert set(back.state_dict()) == set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in back.state_dict().items())
    assert not trained.requires_grad
    assert all(p.requires_grad for p in back.parameters() if p is not trained)
    assert len(back.get_output_embeddings()._forward_pre_hooks) == 0
    assert not hasattr(back, "decoding_adapters")
    assert torch.equal(sample(back, prompts(), do_sample=True, max_new_tokens=5, **ENDLESS), wanted)
    again = AutoDecoForCausalLM.from_base(back)
    assert again.active_adapter == "default"


def test_a_policy_with_dropout_decides_without_it_on_a_base_that_does_not_train(base):
    actions = [{"temperature": 0.5}, {"temperature": 1.5}]
    config = AutoDecoConfig(policy="token_actions", actions=actions, policy_dropout=0.9)
    model = AutoDecoForCausalLM.from_base(base.eval(), config)
    assert not model.decoding_adapter.training
    model.add_adapter("other", config)
    assert not model.decoding_adapters["other"].training
    assert AutoDecoForCausalLM.from_base(tiny.build_base().train(), config).decoding_adapter.training


def test_a_copy_has_adapters_of_its_own(several):
    twin = copy.deepcopy(several)
    twin.set_adapter("hot")
    twin.delete_adapter("cold")
    assert several.active_adapter == "default"
    assert "cold" in several.decoding_adapters
    expected = temperatures(several)
    assert (temperatures(twin) == 1.75).all()
    assert torch.allclose(temperatures(several), expected)


# --- beside a LoRA ---------------------------------------------------------------------------------------------------


def test_a_lora_is_managed_by_the_same_methods_under_its_own_name(several):
    peft = pytest.importorskip("peft")
    expected = sample(several, prompts(), max_new_tokens=5, **ENDLESS)
    several.add_adapter("tuned", peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=True))
    assert "tuned" in several.peft_config
    assert several.active_adapter == "default"
    assert torch.equal(sample(several, prompts(), max_new_tokens=5, **ENDLESS), expected)
    with pytest.raises(UnknownAdapterError, match="already"):
        several.add_adapter("tuned", static(COLD))
    several.set_adapter("tuned")
    several.set_adapter("cold")
    assert several.active_adapter == "cold"
    several.delete_adapter("tuned")
    assert (temperatures(several) == 0.25).all()
