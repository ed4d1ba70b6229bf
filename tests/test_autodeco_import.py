"""Released AutoDeco checkpoints: what is loaded predicts what their formulas say, and nothing in them is trusted."""

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from released_checkpoints import (
    predict_by_hand,
    settings_of,
    statistics_by_hand,
    write_config,
    write_merged,
    write_released,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_adaptive_decode import (
    AdaptiveSamplerLogitsProcessor,
    AutoDecoConfig,
    AutoDecoForCausalLM,
    AutoDecoTrainer,
    AutoDecoTrainingArguments,
    DecodeState,
)
from hf_adaptive_decode.configuration import read_config
from hf_adaptive_decode.engines.transformers import complete
from hf_adaptive_decode.errors import AdapterConfigError, AdapterLoadError
from hf_adaptive_decode.features import scaled_statistics
from hf_adaptive_decode.hub.autodeco_base import base_config
from hf_adaptive_decode.hub.autodeco_import import (
    is_released_format,
    load_released,
    load_released_base,
    locate_released,
)
from hf_adaptive_decode.hub.merging import to_adapter
from hf_adaptive_decode.losses import DecodingLossConfig, chunked_decoding_loss, decoding_loss_reference
from hf_adaptive_decode.policies import build_policy
from hf_adaptive_decode.testbed import build_problems, load_base_model, load_tokenizer

FORMS = [
    (enhanced, heads) for enhanced in (True, False) for heads in (["temperature", "top_p"], ["temperature"], ["top_p"])
]


def rows_of(base, rows=5, length=13):
    """Hidden states `[N, H]` and logits `[N, V]` of real texts."""
    hidden, logits = tiny.hidden_and_logits(base, tiny.prompts(rows, length))
    return hidden.flatten(0, 1), logits.flatten(0, 1)


def policy_of(folder):
    config, tensors = load_released(folder)
    policy = build_policy(config)
    policy.load_state_dict(tensors)
    return policy.eval()


def close(found, wanted, tolerance=2e-5):
    if wanted is None:
        return found is None
    return found.dtype == torch.float32 and torch.allclose(found.double(), wanted, rtol=0, atol=tolerance)


# --- the prediction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_prediction_is_the_released_formula(family, dtype, tmp_path):
    base = tiny.build_base(family).to(dtype)
    hidden, logits = rows_of(base)
    assert hidden.dtype == dtype
    for number, (enhanced, heads) in enumerate(FORMS):
        tensors = write_released(tmp_path / str(number), base, enhanced=enhanced, heads=heads)
        policy = policy_of(tmp_path / str(number))
        found = policy(DecodeState(hidden, logits if policy.needs_logits else None))
        temperature, top_p = predict_by_hand(tensors, hidden, logits, enhanced)
        assert close(found.temperature, temperature)
        assert close(found.top_p, top_p)
        for value, range_ in ((temperature, 2), (top_p, 1)):
            assert value is None or value.std() > 0.05 * range_  # else a wrong input would hardly show


def test_only_what_the_top_p_head_reads_of_the_logits_needs_them(tmp_path):
    base = tiny.build_base()
    for number, (enhanced, heads) in enumerate(FORMS):
        write_released(tmp_path / str(number), base, enhanced=enhanced, heads=heads)
        assert policy_of(tmp_path / str(number)).needs_logits is (enhanced and "top_p" in heads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_heads_of_any_float_type_are_read_as_they_are(dtype, tmp_path):
    base = tiny.build_base()
    hidden, logits = rows_of(base)
    tensors = write_released(tmp_path / "released", base, dtype=dtype)
    found = policy_of(tmp_path / "released")(DecodeState(hidden, logits))
    for value, wanted in zip((found.temperature, found.top_p), predict_by_hand(tensors, hidden, logits), strict=True):
        assert close(value, wanted)


rows = st.lists(st.floats(-30, 30, width=32) | st.just(float("-inf")), min_size=1, max_size=20)


@settings(max_examples=80)
@given(rows, st.floats(-20, 20, width=32), st.floats(0.02, 2.0))
def test_scaled_statistics_and_their_slopes_follow_the_definitions(row, one, temperature):
    logits = torch.tensor([[*row, one]])
    exact = torch.tensor([temperature], dtype=torch.double, requires_grad=True)
    wanted = statistics_by_hand(logits.double().clamp(min=-1e4), exact)
    slopes = [torch.autograd.grad(wanted[0, i], exact, retain_graph=True)[0] for i in range(4)]
    known = torch.tensor([temperature], requires_grad=True)
    found = scaled_statistics(logits, known)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), wanted.detach(), rtol=0, atol=3e-5)
    for i in range(4):
        slope = torch.autograd.grad(found[0, i], known, retain_graph=True)[0].double()
        assert torch.allclose(slope, slopes[i], rtol=1e-2, atol=3e-3)
    assert torch.equal(scaled_statistics(logits, known.detach()), found.detach())


def test_the_statistics_are_computed_in_fp32_and_send_no_gradient_to_the_logits():
    logits = (torch.randn(7, 300) * 4).bfloat16().requires_grad_()
    temperature = torch.rand(7).add(0.3).requires_grad_()
    found = scaled_statistics(logits, temperature)
    assert torch.equal(found, scaled_statistics(logits.float(), temperature))
    found.sum().backward()
    assert logits.grad is None
    assert temperature.grad.abs().min() > 0


# --- everywhere that a heads policy works -----------------------------------------------------------------------------


@pytest.fixture
def converted(tmp_path):
    """An adapter folder of released heads on a tiny Qwen3 beside it, and the released tensors."""
    base = tiny.build_base()
    base.save_pretrained(tmp_path / "base")
    tensors = write_released(tmp_path / "released", base, base_name=str(tmp_path / "base"))
    return to_adapter(tmp_path / "released", tmp_path / "adapter"), tensors


def predictions_along(model, tensors, sequences, new_tokens):
    """By hand, for the steps that chose the last tokens of the sequences `[B, L]`: T and P `[B, new_tokens]`."""
    hidden, logits = tiny.hidden_and_logits(model, sequences)
    steps = slice(sequences.shape[1] - new_tokens - 1, -1)
    found = predict_by_hand(tensors, hidden[:, steps].flatten(0, 1), logits[:, steps].flatten(0, 1))
    return [value.reshape(len(sequences), new_tokens) for value in found]


def test_generate_samples_with_what_the_formulas_say(converted):
    folder, tensors = converted
    model = AutoDecoForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    output = tiny.sample(
        model, tiny.prompts(3, 5), max_new_tokens=9, return_dict_in_generate=True, output_decoding_trace=True
    )
    temperature, top_p = predictions_along(model, tensors, output.sequences, 9)
    assert close(output.decoding_trace.temperature, temperature, 1e-4)
    assert close(output.decoding_trace.top_p, top_p, 1e-4)


@pytest.mark.parametrize("form", ["alone", "merged"])
def test_a_released_checkpoint_loads_by_itself(form, tmp_path):
    base = tiny.build_base("llama")
    if form == "merged":
        tensors = write_merged(tmp_path / "released", base, tmp_path / "base", 3)
        shutil.rmtree(tmp_path / "base")
    else:
        base.save_pretrained(tmp_path / "base")
        tensors = write_released(tmp_path / "released", base, base_name=str(tmp_path / "base"))
    for loader in (AutoDecoForCausalLM, AutoModelForCausalLM):
        model = loader.from_pretrained(tmp_path / "released")
        assert isinstance(model, AutoDecoForCausalLM)
        assert torch.equal(model.lm_head.weight, base.lm_head.weight)
        model.generation_config.eos_token_id = None
        output = tiny.sample(
            model, tiny.prompts(2, 4), max_new_tokens=5, return_dict_in_generate=True, output_decoding_trace=True
        )
        temperature, top_p = predictions_along(model, tensors, output.sequences, 5)
        assert close(output.decoding_trace.temperature, temperature, 1e-4)
        assert close(output.decoding_trace.top_p, top_p, 1e-4)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoDecoForCausalLM.from_pretrained(tmp_path / "adapter", base_model=tiny.build_base("llama"))
    assert torch.equal(tiny.sample(again, tiny.prompts()), tiny.sample(model, tiny.prompts()))


def test_the_bare_processor_samples_the_same_tokens(converted):
    folder, _ = converted
    wrapped = tiny.sample(AutoDecoForCausalLM.from_pretrained(folder), tiny.prompts(), max_new_tokens=9)
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    processor = AdaptiveSamplerLogitsProcessor.from_pretrained(folder, base)
    how = {"do_sample": True, "top_k": 0, "logits_processor": [processor]}
    assert torch.equal(tiny.sample(base, tiny.prompts(), max_new_tokens=9, **how), wrapped)


def test_the_engine_samples_with_what_the_formulas_say(tmp_path):
    base, tokenizer = load_base_model(), load_tokenizer()
    tensors = write_released(tmp_path / "released", base)
    texts = [row["prompt"] for row in build_problems("test", 3)]
    found = complete(base, tokenizer, texts, samples=2, token_budget=8, policy=policy_of(tmp_path / "released"))
    for text, group in zip(texts, found, strict=True):
        for completion in group:
            ids = tokenizer(text)["input_ids"] + list(completion.token_ids)
            by_hand = predictions_along(base, tensors, torch.tensor([ids]), len(completion.token_ids))
            for value, wanted in zip((completion.temperature, completion.top_p), by_hand, strict=True):
                assert close(torch.as_tensor(value)[None], wanted, 1e-4)


@pytest.mark.parametrize("detach", [False, True])
def test_the_chunked_loss_has_the_gradients_of_the_formulas(detach, tmp_path):
    base = tiny.build_base()
    hidden, logits = rows_of(base)
    targets = logits.topk(4).indices[:, 3]  # likely, and mostly outside of the nucleus
    exact = {n: t.double().requires_grad_() for n, t in write_released(tmp_path / "released", base).items()}
    config = DecodingLossConfig(easy_token_mask_ratio=0.0, dft_weight="off")
    gradients = {}
    for way in (not detach, detach):
        temperature, top_p = predict_by_hand(exact, hidden, logits, detach=way)
        # A tiny T would drown all the rest.
        wanted = decoding_loss_reference(logits.double(), targets, temperature + 0.3, top_p, config)
        gradients[way] = torch.autograd.grad(wanted, list(exact.values()))
    apart = [(one - other).norm() > 0.01 * one.norm() for one, other in zip(*gradients.values(), strict=True)]
    assert apart == [True] * 4 + [False] * 4  # it makes a difference to the temperature head

    policy = policy_of(tmp_path / "released")
    assert policy.config.detach_temperature  # as they were trained
    policy.config.detach_temperature = detach

    def predict(part, its_logits):
        assert not its_logits.requires_grad
        found = policy(DecodeState(part, its_logits))
        return found.temperature + 0.3, found.top_p

    project = base.get_output_embeddings()
    output = chunked_decoding_loss(hidden, targets, predict, project, config, chunk_size=16)
    assert output.loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    output.loss.backward()
    names = {"temp_head.mlp.0": "temperature_head.up", "temp_head.mlp.2": "temperature_head.out"}
    names |= {"top_p_head.mlp.0": "top_p_head.up", "top_p_head.mlp.2": "top_p_head.out"}
    found = dict(policy.named_parameters())
    for name, gradient in zip(exact, gradients[detach], strict=True):
        layer, _, part = name.rpartition(".")
        grad = found[f"{names[layer]}.{part}"].grad.double()
        assert (grad - gradient).norm() < 1e-3 * gradient.norm(), name


def test_fresh_heads_with_statistics_train_and_the_base_stays(tmp_path):
    model = AutoDecoForCausalLM.from_base(
        load_base_model(), AutoDecoConfig(top_p_statistics=True, top_p_head_hidden_size=24)
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = [{"prompt": row["prompt"], "completion": f" so {row['solution'][0]}"} for row in build_problems("train", 16)]
    args = AutoDecoTrainingArguments(
        output_dir=str(tmp_path), max_steps=3, learning_rate=1e-2, report_to="none", use_cpu=True, save_strategy="no"
    )
    AutoDecoTrainer(model, args, train_dataset=data, processing_class=load_tokenizer()).train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, _ in model.named_parameters() if name.startswith("decoding_adapter")}
    assert any(tensor.shape == (24, model.decoding_config.hidden_size + 5) for tensor in model.state_dict().values())

    model.save_pretrained(tmp_path / "adapter")
    again = AutoDecoForCausalLM.from_pretrained(tmp_path / "adapter", base_model=load_base_model())
    assert again.decoding_config.top_p_statistics
    for name, tensor in model.decoding_adapter.state_dict().items():
        assert torch.equal(again.decoding_adapter.state_dict()[name], tensor)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p_statistics": "yes"},
        {"top_p_statistics": None},
        {"top_p_statistics": True, "heads": ["temperature"]},
        {"top_p_statistics": True, "policy": "token_actions", "actions": [{"temperature": 0.5}]},
        {"top_p_head_hidden_size": 0},
        {"top_p_head_hidden_size": 10**9},
        {"top_p_head_hidden_size": 2.5},
        {"top_p_head_hidden_size": 16, "heads": ["temperature"]},
    ],
    ids=str,
)
def test_settings_of_a_top_p_head_that_make_no_sense_are_refused(settings):
    with pytest.raises(AdapterConfigError, match=next(iter(settings))):
        AutoDecoConfig(**settings)


# --- which checkpoints there are --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"model_type": "autodeco", "architectures": ["AutoDecoModelForCausalLM"]}, True),
        ({"model_type": "autodeco", "enable_top_p_head": False}, True),
        ({"model_type": "autodeco", "architectures": None, "use_enhanced_features": True}, True),
        ({"model_type": "autodeco"}, False),
        ({"model_type": "autodeco", "architectures": "AutoDecoModelForCausalLM"}, False),
        ({"model_type": "qwen3", "architectures": ["AutoDecoModelForCausalLM"]}, False),
        (AutoDecoConfig().to_dict(), False),
        ({**AutoDecoConfig().to_dict(), "architectures": ["AutoDecoModelForCausalLM"]}, False),
        ({}, False),
    ],
)
def test_the_format_is_told_by_the_config(values, wanted):
    assert is_released_format(values) is wanted


def test_what_is_not_of_the_format_is_left_to_others(folder, tmp_path):
    assert locate_released(folder) is None
    assert locate_released(tmp_path / "base") is None
    assert locate_released(tmp_path) is None
    assert locate_released("no/such-repository", local_files_only=True) is None
    with pytest.raises(AdapterLoadError, match="no released AutoDeco checkpoint"):
        load_released(folder)


def test_a_released_config_is_no_adapters(tmp_path):
    write_released(tmp_path / "released", tiny.build_base())
    with pytest.raises(AdapterConfigError, match="hf-adaptive-decode convert"):
        read_config(tmp_path / "released" / "config.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the Auto classes read it on their way to this library
        AutoDecoConfig.from_pretrained(tmp_path / "released")


@pytest.mark.parametrize("file", ["model.safetensors", "autodeco_heads.safetensors"])
def test_heads_alone_are_found_by_either_name(file, tmp_path):
    base = tiny.build_base()
    tensors = write_released(tmp_path / "released", base, file, base_name="owner/base", dtype=torch.bfloat16)
    config, found = load_released(tmp_path / "released")
    assert len(found) == 8
    assert torch.equal(found["top_p_head.out.weight"], tensors["top_p_head.mlp.2.weight"].float())
    assert (config.hidden_size, config.vocab_size) == (32, tiny.VOCABULARY)
    assert (config.head_hidden_size, config.top_p_head_hidden_size) == (12, 20)
    assert (config.heads, config.features, config.top_p_statistics) == (["temperature", "top_p"], ["hidden"], True)
    assert config.base_model_name_or_path == "owner/base"


def test_the_tensors_of_a_disabled_head_may_be_there(tmp_path):
    base = tiny.build_base()
    both = write_released(tmp_path / "both", base)
    for head, theirs in (("temperature", "temp_head"), ("top_p", "top_p_head")):
        write_released(tmp_path / head, base, tensors=both, heads=[head])
        config, found = load_released(tmp_path / head)
        assert config.heads == [head]
        assert len(found) == 4
        assert torch.equal(found[f"{head}_head.up.weight"], both[f"{theirs}.mlp.0.weight"])


def test_without_any_head_there_is_nothing_to_load(tmp_path):
    write_released(tmp_path / "released", tiny.build_base(), heads=[])
    with pytest.raises(AdapterLoadError, match="both of its heads disabled"):
        load_released(tmp_path / "released")


# --- merged with a base -----------------------------------------------------------------------------------------------


def mixture_of_experts():
    config = MixtralConfig(**{**tiny._LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2})
    torch.manual_seed(0)
    return MixtralForCausalLM(config).eval()


BUILDERS = {
    **{name: (lambda name=name: tiny.build_base(name)) for name in tiny.FAMILIES},
    "mixtral": mixture_of_experts,
}


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("kind", BUILDERS)
def test_a_merged_checkpoint_brings_its_own_base(kind, shards, tmp_path):
    base = BUILDERS[kind]()
    tensors = write_merged(tmp_path / "merged", base, tmp_path / "base", shards)
    shutil.rmtree(tmp_path / "base")
    released = locate_released(tmp_path / "merged")
    assert released.is_merged
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_released_base(released, revision="main", token=None)
    assert type(loaded) is type(base)
    ids = tiny.prompts()
    assert torch.equal(loaded(ids).logits, base(ids).logits)
    _, found = load_released(released)
    assert torch.equal(found["temperature_head.up.bias"], tensors["temp_head.mlp.0.bias"])
    assert loaded.generation_config.eos_token_id == base.generation_config.eos_token_id


def test_heads_beside_a_base_are_no_news(tmp_path, caplog):
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING, logger.name)
    write_merged(tmp_path / "merged", tiny.build_base(), tmp_path / "base")
    released = locate_released(tmp_path / "merged")
    load_released_base(released)
    assert caplog.text == ""
    config = base_config(released.files.settings, "merged")
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged", config=config, key_mapping={r"^llm\.": ""})
    logger.removeHandler(caplog.handler)
    assert "LOAD REPORT" in caplog.text  # as transformers says it by itself, also afterwards


def test_a_merged_base_is_loaded_as_transformers_is_told(tmp_path):
    base = tiny.build_base().bfloat16()
    write_merged(tmp_path / "merged", base, tmp_path / "base", 3)
    released = locate_released(tmp_path / "merged")
    assert load_released_base(released).dtype == torch.bfloat16
    loaded = load_released_base(released, dtype=torch.float32, device_map="cpu", attn_implementation="eager")
    assert loaded.dtype == torch.float32
    assert loaded.config._attn_implementation == "eager"
    assert torch.equal(loaded.lm_head.weight, base.lm_head.weight.float())
    on_disk = load_released_base(
        released, device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=str(tmp_path / "offload")
    )
    assert on_disk.hf_device_map["lm_head"] == "disk"
    assert torch.allclose(on_disk(tiny.prompts()).logits, base(tiny.prompts()).logits, atol=0.1)


def test_tied_embeddings_stay_tied(tmp_path):
    base = tiny.build_base("gpt2")
    write_merged(tmp_path / "merged", base, tmp_path / "base", 2)
    loaded = load_released_base(locate_released(tmp_path / "merged"))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_heads_are_read_without_the_base_beside_them(tmp_path):
    base = tiny.build_base()
    write_merged(tmp_path / "merged", base, tmp_path / "base", 4)
    for file in (tmp_path / "merged").glob("model-0000[123]*.safetensors"):
        file.write_bytes(b"no tensors")
    config, _ = load_released(tmp_path / "merged")
    assert config.heads == ["temperature", "top_p"]


def test_heads_alone_take_the_base_that_they_name(tmp_path):
    base = tiny.build_base()
    base.save_pretrained(tmp_path / "base")
    write_released(tmp_path / "released", base, base_name=str(tmp_path / "base"))
    loaded = load_released_base(locate_released(tmp_path / "released"), dtype=torch.bfloat16)
    assert torch.equal(loaded.lm_head.weight, base.lm_head.weight.bfloat16())
    write_released(tmp_path / "nameless", base)
    with pytest.raises(AdapterLoadError, match="names no base model"):
        load_released_base(locate_released(tmp_path / "nameless"))


def edited(folder, change):
    """Changes the tensors of a checkpoint of one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_base_that_lacks_tensors_or_has_others_is_refused(tmp_path):
    write_merged(tmp_path / "merged", tiny.build_base(), tmp_path / "base")

    def damage(tensors):
        del tensors["llm.model.norm.weight"]
        tensors["llm.lm_head.weight"] = torch.zeros(96, 31)

    edited(tmp_path / "merged", damage)
    with pytest.raises(AdapterLoadError, match=r"model\.norm\.weight is missing.*lm_head\.weight has shape \(96, 31\)"):
        load_released_base(locate_released(tmp_path / "merged"))


def test_a_tensor_that_the_base_does_not_know_is_told(tmp_path):
    write_merged(tmp_path / "merged", tiny.build_base(), tmp_path / "base")
    edited(tmp_path / "merged", lambda tensors: tensors.update({"llm.model.spare.weight": torch.zeros(2)}))
    with pytest.warns(UserWarning, match=r"no use for .*spare\.weight"):
        load_released_base(locate_released(tmp_path / "merged"))


# --- nothing is trusted -----------------------------------------------------------------------------------------------


def with_nan(tensors):
    tensors["temp_head.mlp.0.bias"][1] = float("nan")


DAMAGES = {
    "missing": (lambda t: t.pop("top_p_head.mlp.2.bias"), r"top_p_head\.mlp\.2\.bias is missing"),
    "unexpected": (lambda t: t.update({"temp_head.scale": torch.ones(1)}), r"temp_head\.scale is unexpected"),
    "another model's": (lambda t: t.update({"lm_head.weight": torch.ones(1)}), r"lm_head\.weight is unexpected"),
    "mis-shaped": (
        lambda t: t.update({"temp_head.mlp.2.weight": torch.zeros(1, 5)}),
        r"temp_head\.mlp\.2\.weight has shape \(1, 5\) and should have \(1, 12\)",
    ),
    "for another base": (
        lambda t: t.update({"temp_head.mlp.0.weight": torch.zeros(12, 30)}),
        r"temp_head\.mlp\.0\.weight has shape \(12, 30\) and should have \(12, 32\)",
    ),
    "flat": (lambda t: t.update({"temp_head.mlp.0.weight": torch.zeros(12)}), r"mlp\.0\.weight has shape \(12,\)"),
    "whole numbers": (lambda t: t.update({"temp_head.mlp.0.bias": torch.zeros(12, dtype=torch.long)}), "int64"),
    "NaN": (with_nan, "NaN or infinite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_tensors_that_are_not_exactly_the_heads_are_refused(damage, tmp_path):
    change, message = DAMAGES[damage]
    for folder, write in (("alone", write_released), ("merged", write_merged)):
        write(tmp_path / folder, tiny.build_base(), *([tmp_path / "base"] if folder == "merged" else []))
        edited(tmp_path / folder, change)
        with pytest.raises(AdapterLoadError, match=message):
            load_released(tmp_path / folder)


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    write_released(tmp_path / "released", tiny.build_base(), enhanced=False)
    settings = json.loads((tmp_path / "released" / "config.json").read_text())
    write_config(tmp_path / "released", {**settings, "use_enhanced_features": True})
    edited(tmp_path / "released", lambda t: (t.pop("temp_head.mlp.0.bias"), t.update(extra=torch.ones(1))))
    with pytest.raises(AdapterLoadError) as caught:
        load_released(tmp_path / "released")
    for part in ("temp_head.mlp.0.bias is missing", "extra is unexpected", "(20, 33) and should have (20, 37)"):
        assert part in str(caught.value)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "autodeco_heads.bin", "model.pt"])
def test_pickles_are_refused(file, tmp_path):
    write_config(tmp_path / "released", settings_of(tiny.build_base()))
    torch.save({"temp_head.mlp.0.bias": torch.zeros(2)}, tmp_path / "released" / file)
    with pytest.raises(AdapterLoadError, match=f"{file}.*pickles"):
        locate_released(tmp_path / "released")


def test_heads_over_the_limit_are_refused_and_a_base_does_not_count(tmp_path):
    base = tiny.build_base()
    tensors = write_merged(tmp_path / "merged", base, tmp_path / "base")
    write_released(tmp_path / "alone", base)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size > 5 * size
    for folder in ("alone", "merged"):
        found = locate_released(tmp_path / folder, max_weight_bytes=size + 2000)
        assert set(found.heads) == set(tensors)
        with pytest.raises(AdapterLoadError, match="max_weight_bytes"):
            locate_released(tmp_path / folder, max_weight_bytes=size - 1)


def rewritten(tmp_path, **changes):
    write_released(tmp_path / "released", tiny.build_base())
    settings = json.loads((tmp_path / "released" / "config.json").read_text())
    write_config(tmp_path / "released", {**settings, **changes})
    return tmp_path / "released"


@pytest.mark.parametrize(
    "changes",
    [
        {"enable_top_p_head": "yes"},
        {"enable_temperature_head": 1},
        {"use_enhanced_features": None},
        {"hidden_size": "32"},
        {"hidden_size": 10**12},
        {"hidden_size": True},
        {"vocab_size": -1},
        {"vocab_size": [96]},
        {"temperature_hidden_size": "32"},
        {"top_p_hidden_size": {}},
        {"base_model_name_or_path": ["a"]},
        {"base_model_revision": 3},
    ],
    ids=str,
)
def test_settings_of_another_type_or_size_are_refused(changes, tmp_path):
    with pytest.raises((AdapterConfigError, AdapterLoadError), match=next(iter(changes))):
        load_released(rewritten(tmp_path, **changes))


def test_a_config_over_a_mebibyte_or_of_no_json_is_refused(tmp_path):
    folder = rewritten(tmp_path, filler="x" * (1 << 20))
    assert locate_released(folder) is None  # so that it is refused as any adapter's is
    with pytest.raises(AdapterConfigError, match="1 MiB"):
        read_config(folder / "config.json")
    (folder / "config.json").write_text("{" * 100_000)
    with pytest.raises(AdapterConfigError, match="JSON"):
        locate_released(folder)


def test_a_config_can_neither_run_code_nor_choose_files_nor_make_labels(tmp_path):
    base = tiny.build_base()
    write_merged(tmp_path / "merged", base, tmp_path / "base")
    bait = {
        "auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"},
        "trust_remote_code": True,
        "transformers_weights": "../../elsewhere.safetensors",
        "attn_implementation": "somebody/kernels",
        "_attn_implementation": "somebody/kernels",
        "num_labels": 10**9,
        "custom_pipelines": {"text-generation": {"impl": "evil.Pipeline"}},
    }
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    write_config(tmp_path / "merged", {**settings, **bait})
    (tmp_path / "merged" / "evil.py").write_text("raise SystemExit('ran')")
    released = locate_released(tmp_path / "merged")
    loaded = load_released_base(released)
    assert torch.equal(loaded(tiny.prompts()).logits, base(tiny.prompts()).logits)
    assert not set(bait) & set(base_config(released.files.settings, "merged").to_dict()) - {"attn_implementation"}
    config, _ = load_released(released)
    assert not (set(bait) - {"num_labels"}) & set(config.to_dict())


@pytest.mark.parametrize("kind", ["autodeco", "no_such_model", None, 3])
def test_a_base_of_unknown_kind_is_told(kind, tmp_path):
    base = tiny.build_base()
    write_merged(tmp_path / "merged", base, tmp_path / "base", base_model_type=kind)
    released = locate_released(tmp_path / "merged")
    assert load_released(released)[0].hidden_size == 32
    with pytest.raises(AdapterLoadError, match="base_model_type"):
        load_released_base(released)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.bin", "", None, 3])
def test_an_index_names_files_beside_it_alone(name, tmp_path):
    write_merged(tmp_path / "merged", tiny.build_base(), tmp_path / "base", 3)
    path = tmp_path / "merged" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["temp_head.mlp.0.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(AdapterLoadError, match="as a file"):
        locate_released(tmp_path / "merged")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_an_index_that_is_none_is_told(text, tmp_path):
    write_merged(tmp_path / "merged", tiny.build_base(), tmp_path / "base", 3)
    (tmp_path / "merged" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(AdapterLoadError, match="index"):
        locate_released(tmp_path / "merged")


def test_a_header_that_names_a_tensor_twice_is_refused(tmp_path):
    write_released(tmp_path / "released", tiny.build_base())
    path = tmp_path / "released" / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b"temp_head.mlp.2.bias", b"temp_head.mlp.0.bias")
    path.write_bytes(content[:8] + header + content[8 + length :])
    with pytest.raises(AdapterLoadError, match="more than once"):
        locate_released(tmp_path / "released")


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, (10**9).to_bytes(8, "little") + b"{}"], ids=["empty", "ff", "huge"]
)
def test_a_file_of_something_else_is_told(content, tmp_path):
    write_released(tmp_path / "released", tiny.build_base())
    (tmp_path / "released" / "model.safetensors").write_bytes(content)
    with pytest.raises(AdapterLoadError, match="no safetensors file"):
        locate_released(tmp_path / "released")


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    write_released(tmp_path / "released", tiny.build_base())
    (tmp_path / "released" / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (tmp_path / "released" / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(AdapterLoadError, match="link"):
        locate_released(tmp_path / "released")


# --- from the Hub -----------------------------------------------------------------------------------------------------

COMMITS = [f"{number:040x}" for number in (1, 2)]


class Hub(BaseHTTPRequestHandler):
    """Repositories whose branch moves on with every request for it."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path.startswith("/api/models/"):
            repository = "/".join(self.path.split("?")[0].split("/")[3:5])
            commit = next((one for one in COMMITS if one in self.path), None) or COMMITS[next(self.server.moves) > 0]
            sizes = {name: len(body) for name, body in self.server.files[repository, commit].items()}
            names = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            self.answer(200, json.dumps({"id": repository, "sha": commit, "siblings": names}).encode())
            return
        repository, _, rest = self.path.split("?")[0].lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        commit = revision if revision in COMMITS else COMMITS[next(self.server.moves) > 0]
        found = self.server.files[repository, commit].get(name)
        if found is None:
            self.answer(404, b"", **{"X-Error-Code": "EntryNotFound"})
            return
        self.answer(200, found, ETag=f'"{repository}-{commit}-{name}"', **{"X-Repo-Commit": commit})

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.files, server.moves = [], {}, itertools.count()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


CODE = """
import json, os, sys
from pathlib import Path
from hf_adaptive_decode.hub.merging import to_adapter
from hf_adaptive_decode.errors import AdapterLoadError
from hf_adaptive_decode.hub.autodeco_import import load_released, load_released_base, locate_released

def found(name, **download):
    released = locate_released(name, **download)
    _, tensors = load_released(released)
    files = sorted(path.name for path in released.files.folder.glob("*.safetensors"))
    base = load_released_base(released)
    return released.commit, files, tensors["temperature_head.out.bias"].item(), base.lm_head.weight[0, 0].item()

def refused(name):
    try:
        locate_released(name, max_weight_bytes=1000)
    except AdapterLoadError as error:
        return str(error)

before = [refused("me/alone"), [str(path) for path in Path(os.environ["HF_HOME"]).rglob("*alone*/**/*.safetensors")]]
names = ("me/single", "me/sharded")
once = [found(name) for name in names]
again = [found(name, revision=one[0], local_files_only=True) for name, one in zip(names, once)]
assert [[one[0], *one[2:]] for one in again] == [[one[0], *one[2:]] for one in once]
named = json.loads((to_adapter("me/alone", sys.argv[1]) / "config.json").read_text())["base_model_name_or_path"]
print(json.dumps([*once, before, named]))
"""


def test_all_files_are_of_one_commit_and_no_more_is_downloaded_than_needed(hub, tmp_path):
    bases = [tiny.build_base(), tiny.build_base("llama")]
    wanted = {}
    for repository, shards in (("me/single", 1), ("me/sharded", 3)):
        for commit, base, seed in zip(COMMITS, bases, (0, 1), strict=True):
            folder = tmp_path / f"{commit}-{shards}"
            heads = write_merged(folder, base, tmp_path / "base", shards, seed=seed)
            hub.files[repository, commit] = {path.name: path.read_bytes() for path in folder.iterdir()}
            wanted[commit] = [heads["temp_head.mlp.2.bias"].item(), base.lm_head.weight[0, 0].item()]
    write_released(tmp_path / "alone", bases[0], base_name=str(tmp_path / "base"))
    for commit in COMMITS:
        hub.files["me/alone", commit] = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", CODE, str(tmp_path / "adapter")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    single, sharded, (refused, downloaded), named = json.loads(done.stdout.splitlines()[-1])
    for commit, _, *values in (single, sharded):
        assert values == pytest.approx(wanted[commit])
    assert single[1] == ["model.safetensors"]
    assert sharded[1] == ["model-00003-of-00003.safetensors"]  # before its base was asked for
    assert "max_weight_bytes" in refused
    assert downloaded == []
    assert named is None  # it is a path of this machine, which a repository has no business with
    for repository, commit in (("me/single", single[0]), ("me/sharded", sharded[0])):
        asked = {path for path in hub.asked if path.startswith(f"/{repository}/resolve/") and ".safetensors" in path}
        assert asked
        assert all(f"/resolve/{commit}/" in path for path in asked)
