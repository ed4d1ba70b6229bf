"""Bad input is refused with the right error, by name, before the model runs, and leaves nothing half done."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import struct
import warnings

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save, save_file
from tiny import VOCABULARY, counted_forwards, hooks_left, prompts
from transformers import Qwen3Model, T5Config, T5ForConditionalGeneration

from hf_adaptive_decode import AdaptiveSamplerLogitsProcessor, AutoDecoConfig, AutoDecoForCausalLM, Budget
from hf_adaptive_decode.budget import resolve_budget
from hf_adaptive_decode.configuration import FORMAT_VERSION
from hf_adaptive_decode.errors import (
    AdapterConfigError,
    AdapterLoadError,
    AdaptiveDecodeError,
    BudgetError,
    LogitsError,
    MissingExtraError,
    SamplingParameterError,
    UnsupportedGenerationError,
)
from hf_adaptive_decode.tap import HiddenStateTap, NoOutputEmbeddingError


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (AdapterConfigError, ValueError),
        (AdapterLoadError, ValueError),
        (BudgetError, ValueError),
        (SamplingParameterError, ValueError),
        (LogitsError, ValueError),
        (UnsupportedGenerationError, ValueError),
        (MissingExtraError, ImportError),
        (NoOutputEmbeddingError, TypeError),
    ],
)
def test_every_error_is_the_librarys_and_a_builtin(error, builtin):
    assert issubclass(error, AdaptiveDecodeError)
    assert issubclass(error, builtin)


def test_a_missing_extra_names_the_install_command():
    assert "pip install 'hf_adaptive_decode[math]'" in str(MissingExtraError("math_verify", "math"))


# --- budgets ----------------------------------------------------------------------------------------------------------

BAD_BUDGETS = [
    0,
    -1,
    math.nan,
    math.inf,
    2.5,
    3.0,
    True,
    False,
    "4",
    b"4",
    "many",
    1j,
    [],
    (),
    [1],
    [1, 2, 3, 4],
    [1, 2, None],
    [1, 2, 0],
    [1, 2, -5],
    [1, True, 2],
    [1, 2, 3.0],
    [1, 2, math.nan],
    [1, 2, "3"],
    [[1], [2], [3]],
    np.array([1.0, 2.0, 3.0]),
    np.array([True, True, True]),
    np.float64(3),
    np.bool_(True),
    np.array([]),
    torch.tensor(2.0),
    torch.tensor(True),
    torch.tensor([1, 2]),
    torch.tensor([[1, 2, 3]]),
    torch.tensor([1.0, 2.0, 3.0]),
    torch.tensor([]),
    complex(1, 1),
    Budget(),
    Budget(tokens=0),
    Budget(tokens=[1, 2]),
    Budget(tokens="4"),
    Budget(samples=0),
    Budget(samples=-2),
    Budget(samples=2.0),
    Budget(samples=True),
    Budget(samples="3"),
    Budget(tokens=4, samples=[2]),
]


@pytest.mark.parametrize("budget", BAD_BUDGETS, ids=repr)
def test_a_bad_budget_is_refused_before_the_model_runs(model, budget):
    with counted_forwards(model) as calls, pytest.raises(BudgetError) as caught:
        model.generate(prompts(3), budget=budget, max_new_tokens=2)
    assert not calls
    assert hooks_left(model) == 0
    assert isinstance(caught.value, ValueError)
    assert "budget" in str(caught.value).lower() or "samples" in str(caught.value)


def test_a_bad_budget_message_names_found_and_wanted():
    with pytest.raises(BudgetError, match=r"budget\[1\].*-3.*positive whole number"):
        resolve_budget([2, -3], 2)
    with pytest.raises(BudgetError, match=r"2 numbers.*3 prompts"):
        resolve_budget([2, 3], 3)
    with pytest.raises(BudgetError, match=r"samples.*2\.5.*positive whole number"):
        resolve_budget(Budget(samples=2.5), 3)


def test_a_bad_budget_in_a_generation_config_is_refused_too(model):
    model.generation_config.budget = -4
    with counted_forwards(model) as calls, pytest.raises(BudgetError):
        model.generate(prompts(3))
    assert not calls


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs",
    [
        {"inputs": torch.zeros(0, 5, dtype=torch.long)},
        {"input_ids": torch.zeros(0, 5, dtype=torch.long)},
        {"input_ids": torch.zeros(2, 0, dtype=torch.long)},
        {"input_ids": torch.zeros(2, 0, dtype=torch.long), "attention_mask": torch.zeros(2, 0, dtype=torch.long)},
        {"inputs_embeds": torch.zeros(0, 5, 32)},
        {"inputs_embeds": torch.zeros(2, 0, 32)},
    ],
    ids=lambda inputs: "+".join(f"{k}{list(v.shape)}" for k, v in inputs.items()),
)
def test_an_empty_batch_or_prompt_is_refused_before_the_model_runs(model, inputs):
    with counted_forwards(model) as calls, pytest.raises(AdaptiveDecodeError, match="empty") as caught:
        model.generate(**inputs, max_new_tokens=2)
    assert isinstance(caught.value, ValueError)
    assert not calls


@pytest.mark.parametrize(
    "setting",
    [{"temperature": -1.0}, {"top_p": 1.5}, {"top_k": -3}, {"min_p": 2.0}, {"temperature": math.nan}],
    ids=str,
)
def test_a_bad_explicit_parameter_is_refused_before_the_model_runs(model, setting):
    with counted_forwards(model) as calls, pytest.raises(ValueError, match=next(iter(setting))):
        model.generate(prompts(), max_new_tokens=2, **setting)
    assert not calls
    assert hooks_left(model) == 0


# --- models that cannot have an adapter -------------------------------------------------------------------------------


def encoder_decoder():
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **shape))


def test_a_headless_model_is_refused_and_stays_as_it_was():
    headless = Qwen3Model(tiny.build_base().config)
    with pytest.raises(NoOutputEmbeddingError, match="Qwen3Model") as caught:
        AutoDecoForCausalLM.from_base(headless)
    assert isinstance(caught.value, TypeError)
    assert type(headless) is Qwen3Model
    assert all(p.requires_grad for p in headless.parameters())


def test_something_that_is_no_transformers_model_is_refused():
    with pytest.raises(NoOutputEmbeddingError, match="Linear"):
        AutoDecoForCausalLM.from_base(torch.nn.Linear(2, 2))


def test_an_encoder_decoder_is_refused_and_stays_as_it_was():
    model = encoder_decoder()
    with pytest.raises(AdaptiveDecodeError, match="encoder-decoder") as caught:
        AutoDecoForCausalLM.from_base(model)
    assert isinstance(caught.value, (ValueError, TypeError))
    assert type(model) is T5ForConditionalGeneration
    assert all(p.requires_grad for p in model.parameters())
    assert not any("adapter" in name for name, _ in model.named_modules())


def test_wrapping_twice_is_refused(model):
    adapter, kind = model.decoding_adapter, type(model)
    with pytest.raises(AdapterConfigError, match="already"):
        AutoDecoForCausalLM.from_base(model)
    assert model.decoding_adapter is adapter
    assert type(model) is kind
    assert all(p.requires_grad for p in adapter.parameters())


@pytest.mark.parametrize(("name", "value"), [("hidden_size", 64), ("vocab_size", 1000)])
def test_a_config_for_another_shape_is_refused_with_both_numbers(base, name, value):
    kind = type(base)
    own = {"hidden_size": 32, "vocab_size": VOCABULARY}[name]
    with pytest.raises(AdapterConfigError, match=rf"{name}.*{value}.*{own}"):
        AutoDecoForCausalLM.from_base(base, AutoDecoConfig(**{name: value}))
    assert type(base) is kind


def test_reading_a_tap_too_early_is_refused(base):
    with HiddenStateTap(base) as tap, pytest.raises(AdaptiveDecodeError, match="no hidden state"):
        tap.last_position()
    assert hooks_left(base) == 0


# --- damaged adapters -------------------------------------------------------------------------------------------------


def rewrite(folder, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, path)


def set_tensor(name: str, tensor):
    def change(tensors):
        tensors[name] = tensor(tensors[name]) if callable(tensor) else tensor

    return change


def with_value(value: float):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


def raw_safetensors(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def duplicate_first_key(data: bytes) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].decode().rstrip()
    entries = json.loads(header)
    name = next(key for key in entries if key != "__metadata__")
    doubled = f"{header[:-1]},{json.dumps(name)}:{json.dumps(entries[name])}}}".encode()
    return raw_safetensors(doubled, data[8 + length :])


def truncate(count: int):
    return lambda data: data[:count]


DAMAGED_BYTES = {
    "zero bytes": lambda data: b"",
    "three bytes": truncate(3),
    "cut in the header": truncate(50),
    "cut in the data": lambda data: data[:-10],
    "trailing data": lambda data: data + b"\0" * 16,
    "no safetensors": lambda data: b"hello world, this is no safetensors file at all",
    "header of 2^63 bytes": lambda data: struct.pack("<Q", 2**63) + data[8:],
    "header of 90 MB": lambda data: struct.pack("<Q", 90 << 20) + data[8:],
    "header beyond the file": lambda data: struct.pack("<Q", 900_000) + data[8:],
    "header of no object": lambda data: raw_safetensors(b"[1, 2]"),
    "header of broken JSON": lambda data: raw_safetensors(b"{oh no"),
    "header nested deeply": lambda data: raw_safetensors(b"[" * 500_000 + b"]" * 500_000),
    "header of bad UTF-8": lambda data: raw_safetensors(b"\xff\xfe{}"),
    "offsets beyond the data": lambda data: raw_safetensors(
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 8
    ),
    "a pickle": lambda data: pickle.dumps({"a": 1}),
    "a duplicate key": duplicate_first_key,
}
DAMAGED_TENSORS = {
    "a missing key": (lambda t: t.pop("top_p_head.out.bias"), "top_p_head.out.bias is missing"),
    "an extra key": (set_tensor("extra.weight", torch.zeros(2)), "extra.weight is unexpected"),
    "no tensor at all": (lambda _: {}, "missing"),
    "NaN": (set_tensor("top_p_head.up.bias", with_value(math.nan)), "top_p_head.up.bias.*NaN"),
    "inf": (set_tensor("temperature_head.up.weight", with_value(math.inf)), "temperature_head.up.weight.*infinite"),
    "-inf": (set_tensor("temperature_head.out.bias", with_value(-math.inf)), "temperature_head.out.bias.*infinite"),
    "a wrong shape": (
        set_tensor("temperature_head.up.bias", torch.zeros(7)),
        r"temperature_head.up.bias.*\(7,\).*\(256,\)",
    ),
    "a transposed shape": (set_tensor("top_p_head.out.weight", lambda t: t.T.contiguous()), r"\(256, 1\).*\(1, 256\)"),
    "integers": (
        set_tensor("temperature_head.up.bias", torch.zeros(256, dtype=torch.long)),
        "temperature_head.up.bias.*int64",
    ),
    "booleans": (
        set_tensor("temperature_head.up.bias", torch.zeros(256, dtype=torch.bool)),
        "temperature_head.up.bias.*bool",
    ),
    "too large for fp32": (
        set_tensor("temperature_head.out.bias", torch.tensor([1e300], dtype=torch.float64)),
        "temperature_head.out.bias",
    ),
}


def assert_refused(folder, match: str | None = None, error: type[AdaptiveDecodeError] = AdapterLoadError) -> str:
    """Both ways of loading refuse, and the base they were given is as it was."""
    messages = []
    for load in (
        lambda base: AutoDecoForCausalLM.from_pretrained(folder, base_model=base),
        lambda base: AdaptiveSamplerLogitsProcessor.from_pretrained(folder, base),
    ):
        base = tiny.build_base()
        kind, names = type(base), [name for name, _ in base.named_modules()]
        with counted_forwards(base) as calls, pytest.raises(error, match=match) as caught:
            load(base)
        assert isinstance(caught.value, ValueError)
        assert not calls
        assert hooks_left(base) == 0
        assert type(base) is kind
        assert [name for name, _ in base.named_modules()] == names
        assert all(p.requires_grad for p in base.parameters())
        messages.append(str(caught.value))
    return messages[0]


@pytest.mark.parametrize("name", list(DAMAGED_BYTES))
def test_damaged_weights_are_refused_and_the_file_named(folder, name):
    path = folder / "model.safetensors"
    path.write_bytes(DAMAGED_BYTES[name](path.read_bytes()))
    message = assert_refused(folder)
    if name != "a duplicate key":
        assert "model.safetensors" in message
    else:
        assert "more than once" in message


def test_the_message_about_a_duplicate_key_names_the_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(duplicate_first_key(path.read_bytes()))
    assert "model.safetensors" in assert_refused(folder, "more than once")


@pytest.mark.parametrize("name", list(DAMAGED_TENSORS))
def test_wrong_tensors_are_refused_and_named(folder, name):
    change, match = DAMAGED_TENSORS[name]
    rewrite(folder, change)
    assert_refused(folder, match)


def test_every_wrong_tensor_is_listed(folder):
    def change(tensors):
        del tensors["top_p_head.out.bias"]
        tensors["other"] = torch.zeros(1)
        tensors["temperature_head.up.bias"] = torch.zeros(3)

    rewrite(folder, change)
    message = assert_refused(folder)
    assert all(name in message for name in ("top_p_head.out.bias", "other", "temperature_head.up.bias"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_dtypes_are_taken(folder, dtype):
    rewrite(folder, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    loaded = AutoDecoForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in loaded.decoding_adapter.parameters()} == {torch.float32}


def test_eight_bit_floats_are_taken_or_refused(folder):
    rewrite(folder, lambda tensors: {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()})
    try:
        loaded = AutoDecoForCausalLM.from_pretrained(folder)
    except AdapterLoadError:
        return
    assert {p.dtype for p in loaded.decoding_adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("pickle_name", ["pytorch_model.bin", "adapter.pt", "heads.pkl"])
def test_pickles_are_never_loaded(folder, pickle_name):
    os.rename(folder / "model.safetensors", folder / pickle_name)
    message = assert_refused(folder, "model.safetensors missing")
    assert pickle_name in message
    assert "safetensors" in message.split("pickles")[-1]


def test_a_missing_config_is_named(folder):
    os.remove(folder / "config.json")
    assert_refused(folder, "config.json missing")


def test_an_empty_folder_is_no_adapter(tmp_path):
    (tmp_path / "nothing").mkdir()
    assert_refused(tmp_path / "nothing", "config.json and model.safetensors missing")


def test_weights_over_the_limit_are_refused_unless_trusted(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate((64 << 20) + 1)  # sparse: takes no room on the disk
    message = assert_refused(folder, "max_weight_bytes")
    assert str((64 << 20) + 1) in message
    assert str(64 << 20) in message


def test_the_limit_can_be_set(folder):
    size = (folder / "model.safetensors").stat().st_size
    with pytest.raises(AdapterLoadError, match=str(size)):
        AutoDecoForCausalLM.from_pretrained(folder, max_weight_bytes=size - 1)
    assert AutoDecoForCausalLM.from_pretrained(folder, max_weight_bytes=size).decoding_adapter is not None


# --- configs ----------------------------------------------------------------------------------------------------------


def edit_config(folder, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"policy": "oracle"}, ["oracle", "heads"]),
        ({"format_version": FORMAT_VERSION + 1}, [str(FORMAT_VERSION + 1), "pip install -U"]),
        ({"model_type": "qwen3"}, ["qwen3", "autodeco"]),
        ({"model_type": None}, ["None", "autodeco"]),
        ({"head_hidden_size": 10**12}, ["head_hidden_size", str(10**12)]),
        ({"head_hidden_size": "256"}, ["head_hidden_size", "'256'"]),
        ({"heads": ["temperature", "magic"]}, ["heads", "magic"]),
        ({"policy": "static", "actions": [{"temperature": -1}]}, ["actions[0]", "-1"]),
        ({"policy": "static", "actions": [{"file": "/etc/passwd"}]}, ["actions[0]", "file"]),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_a_bad_config_is_refused(folder, values, parts):
    edit_config(folder, **values)
    message = assert_refused(folder, error=AdapterConfigError)
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"not json",
        b"[]",
        b'"autodeco"',
        b"null",
        b"7",
        b"[" * 200_000 + b"]" * 200_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b"\xff\xfe\x00",
        b'{"model_type": "autodeco", "hidden_size": ' + b"9" * 5000 + b"}",
        b" " * ((1 << 20) + 1),
        b"{}",
    ],
    ids=lambda text: f"{text[:12]!r} of {len(text)}",
)
def test_a_config_that_is_no_adapters_is_refused_and_the_file_named(folder, text):
    (folder / "config.json").write_bytes(text)
    assert "config.json" in assert_refused(folder, error=AdapterConfigError)


def test_the_folder_of_a_base_model_is_no_adapter(tmp_path):
    tiny.build_base().save_pretrained(tmp_path)
    assert "from_base" in assert_refused(tmp_path, error=AdapterConfigError)


def test_a_config_at_odds_with_the_weights_is_refused(folder):
    edit_config(folder, head_hidden_size=17)
    assert_refused(folder, r"\(256,\).*\(17,\)")


def test_a_config_cannot_make_the_policy_allocate_what_the_limit_forbids(folder):
    edit_config(folder, head_hidden_size=1 << 16, hidden_size=1 << 16)
    # The width is refused against the base first; a policy as wide as its base is held against the limit.
    assert_refused(folder, "hidden_size")
    edit_config(folder, head_hidden_size=1 << 16, hidden_size=32)
    with pytest.raises(AdapterLoadError, match="max_weight_bytes"):
        AutoDecoForCausalLM.from_pretrained(folder, base_model=tiny.build_base(), max_weight_bytes=1 << 20)


def test_settings_that_could_run_code_are_not_forwarded(folder, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    evil = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    edit_config(folder, trust_remote_code=True, auto_map=evil)
    with contextlib.suppress(AdaptiveDecodeError):
        AutoDecoForCausalLM.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


# --- another base -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name", "found", "wanted"),
    [({"hidden_size": 48}, "hidden_size", 32, 48), ({"vocab_size": 200}, "vocab_size", VOCABULARY, 200)],
    ids=["width", "vocabulary"],
)
def test_an_adapter_for_another_shape_shows_both_numbers(folder, settings, name, found, wanted):
    config = tiny.build_base().config
    config.update(settings)
    other = type(tiny.build_base())(config)
    for load in (
        lambda: AutoDecoForCausalLM.from_pretrained(folder, base_model=other),
        lambda: AdaptiveSamplerLogitsProcessor.from_pretrained(folder, other),
    ):
        with pytest.raises(AdapterLoadError, match=rf"{name} {found}.*{wanted}"):
            load()
    assert not isinstance(other, AutoDecoForCausalLM)
    assert hooks_left(other) == 0


def test_the_same_shape_from_another_base_warns(folder):
    with pytest.warns(UserWarning, match="other settings"):
        loaded = AutoDecoForCausalLM.from_pretrained(folder, base_model=tiny.build_base("llama"))
    assert loaded.generate(prompts(), max_new_tokens=2).shape[0] == 3


def test_its_own_base_does_not_warn(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        AutoDecoForCausalLM.from_pretrained(folder)
        AdaptiveSamplerLogitsProcessor.from_pretrained(folder, tiny.build_base())


@pytest.mark.parametrize("other_kind", ["headless", "encoder-decoder"])
def test_loading_onto_a_model_that_cannot_have_an_adapter_is_refused(folder, other_kind):
    other = Qwen3Model(tiny.build_base().config) if other_kind == "headless" else encoder_decoder()
    kind = type(other)
    with pytest.raises(AdaptiveDecodeError):
        AutoDecoForCausalLM.from_pretrained(folder, base_model=other)
    with pytest.raises(AdaptiveDecodeError):
        AdaptiveSamplerLogitsProcessor.from_pretrained(folder, other)
    assert type(other) is kind


def test_weights_that_are_finite_and_absurd_do_not_sample_garbage(folder):
    """Finite weights can still overflow into NaN parameters; then a call fails by name or samples from real numbers."""
    rewrite(
        folder,
        lambda tensors: {
            name: torch.full_like(t, 3e38) * (torch.rand_like(t) - 0.5).sign() for name, t in tensors.items()
        },
    )
    try:
        loaded = AutoDecoForCausalLM.from_pretrained(folder)
        found = loaded.generate(prompts(), max_new_tokens=2, return_dict_in_generate=True, output_scores=True)
    except AdaptiveDecodeError:
        return
    assert all(not scores.isnan().any() for scores in found.scores)


def test_a_safetensors_file_made_by_others_is_read(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes(save(dict(reversed(tensors.items()))))
    assert AutoDecoForCausalLM.from_pretrained(folder).decoding_adapter is not None
