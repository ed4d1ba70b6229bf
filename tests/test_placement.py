"""Where a base lies and in which numbers: device maps, offloading, half precision and quantised weights."""

from __future__ import annotations

import functools
import warnings

import pytest
import tiny
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from test_training import build_rows, train
from transformers import AutoModelForCausalLM, LogitsProcessorList, Qwen3Config, Qwen3ForCausalLM
from transformers import TemperatureLogitsWarper as Temperature
from transformers import TopPLogitsWarper as TopP

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM
from hf_adaptive_decode.tap import output_device, output_embedding_shape

HOW = {"max_new_tokens": 8, "pad_token_id": tiny.PAD, "eos_token_id": None}


def build(tied: bool = False):
    """Wide enough for quantisers that work in blocks of 64."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": tiny.VOCABULARY, "initializer_range": 0.3}
    ends = {"bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**shape, **more, **ends, tie_word_embeddings=tied)).eval()
    if not tied:
        with torch.no_grad():
            spread = model(tiny.prompts(4, 12)).logits.std()
            model.get_output_embeddings().weight.mul_(tiny.LOGIT_STD / spread)
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folders(request, tmp_path_factory):
    """A base and an adapter on it, on disk, and what they generate on the CPU."""
    root = tmp_path_factory.mktemp("tied" if request.param else "untied")
    build(request.param).save_pretrained(root / "base")
    model = tiny.randomise_heads(tiny.wrap(AutoModelForCausalLM.from_pretrained(root / "base")))
    model.save_pretrained(root / "adapter")
    return root / "base", root / "adapter", tiny.sample(model, tiny.prompts(), **HOW)


# --- device maps ------------------------------------------------------------------------------------------------------

DISK = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
DISK |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
TIED_DISK = {**DISK, "model.embed_tokens": "disk"}


def loaded(base, adapter, offload, **how):
    return AutoDecoForCausalLM.from_pretrained(adapter, **how)


def loaded_partly_on_disk(base, adapter, offload):
    tied = AutoModelForCausalLM.from_pretrained(base).config.tie_word_embeddings
    return AutoDecoForCausalLM.from_pretrained(adapter, device_map=TIED_DISK if tied else DISK, offload_folder=offload)


def offloaded_then_wrapped(base, adapter, offload, by, **how):
    model = AutoModelForCausalLM.from_pretrained(base)
    by(model, execution_device=torch.device("cpu"), **({"offload_dir": offload} if by is disk_offload else {}))
    return AutoDecoForCausalLM.from_pretrained(adapter, base_model=model)


def wrapped_then_dispatched(base, adapter, offload):
    model = AutoDecoForCausalLM.from_pretrained(adapter)
    tied = model.config.tie_word_embeddings
    where = {**(TIED_DISK if tied else DISK), "decoding_adapters": "cpu"}
    return dispatch_model(model, where, main_device="cpu", offload_dir=offload, force_hooks=True)


def wrapped_then_offloaded(base, adapter, offload):
    model = AutoDecoForCausalLM.from_pretrained(adapter)
    # A policy reads the weights of its layers itself, so they have to be brought for all of it.
    return cpu_offload(model, torch.device("cpu"), preload_module_classes=["HeadsPolicy"])


PLACES = {
    "cpu": functools.partial(loaded, device_map="cpu"),
    "everything on the cpu": functools.partial(loaded, device_map={"": "cpu"}),
    "auto": functools.partial(loaded, device_map="auto"),
    "low memory": functools.partial(loaded, low_cpu_mem_usage=True),
    "partly on disk": loaded_partly_on_disk,
    "offloaded to the cpu": functools.partial(offloaded_then_wrapped, by=cpu_offload),
    "offloaded to disk": functools.partial(offloaded_then_wrapped, by=disk_offload),
    "dispatched": wrapped_then_dispatched,
    "wrapped, then offloaded": wrapped_then_offloaded,
}
OFFLOADED = set(list(PLACES)[4:])


@pytest.mark.parametrize("place", PLACES)
def test_a_base_may_lie_anywhere_and_the_heads_lie_where_its_output_embedding_computes(folders, place, tmp_path):
    base, adapter, expected = folders
    model = PLACES[place](base, adapter, tmp_path)
    assert (model.get_output_embeddings().weight.device.type == "meta") == (place in OFFLOADED)
    assert output_device(model) == torch.device("cpu")
    if place != "wrapped, then offloaded":
        assert {p.device.type for p in model.decoding_adapter.parameters()} == {"cpu"}
    assert torch.equal(tiny.sample(model, tiny.prompts(), **HOW), expected)


def test_a_fresh_adapter_on_an_offloaded_base_is_whole(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    model = AutoDecoForCausalLM.from_base(model)
    assert not any(p.is_meta for p in model.decoding_adapter.parameters())
    model.add_adapter("other", AutoDecoConfig(policy="static", actions=[{"temperature": 0.0}]))
    model.set_adapter("other")
    plain = tiny.sample(model, tiny.prompts(), do_sample=False, **HOW)
    assert torch.equal(tiny.sample(model, tiny.prompts(), **HOW), plain)


# --- half precision ---------------------------------------------------------------------------------------------------


def generated_by_hand(model, prompt: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and temperatures of one prompt, without a cache: the model's own logits, heads and warping written out."""
    ids, temperatures = prompt[None], []
    torch.manual_seed(0)
    for _ in range(steps):
        hidden, logits = tiny.hidden_and_logits(model, ids)
        temperature, top_p = tiny.heads_by_hand(model.decoding_adapter, hidden[:, -1].float())
        chain = LogitsProcessorList([Temperature(float(temperature)), TopP(float(top_p))])
        probabilities = chain(ids, logits[:, -1].float()).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1)], dim=1)
        temperatures.append(temperature)
    return ids, torch.stack(temperatures, dim=1)


def assert_generates_as_by_hand(model, tolerance: float, spread: float = 0.05) -> None:
    for prompt in tiny.prompts(3, 6):
        expected, temperatures = generated_by_hand(model, prompt, 8)
        # Without a cache, so that the same numbers are added up in the same order.
        traced = {"return_dict_in_generate": True, "output_decoding_trace": True, "use_cache": False}
        found = tiny.sample(model, prompt[None], **HOW, **traced)
        assert torch.equal(found.sequences, expected)
        torch.testing.assert_close(found.decoding_trace.temperature, temperatures, atol=tolerance, rtol=0)
        assert temperatures.std() > spread


def with_random_heads(base, reference):
    """`base` with an adapter of its own whose temperatures spread as those of a wrapped `reference`."""
    model = AutoDecoForCausalLM.from_base(base)
    model.decoding_adapter.load_state_dict(tiny.randomise_heads(tiny.wrap(reference)).decoding_adapter.state_dict())
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_half_precision_bases_are_decoded_and_trained_by_heads_in_fp32(family, dtype, tmp_path):
    tiny.build_base(family).to(dtype).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    model = with_random_heads(base, tiny.build_base(family))
    assert_generates_as_by_hand(model, tolerance=1e-5)

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(tmp_path / "training", model, max_steps=1, save_strategy="no")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith("decoding_adapters."), name

    model.eval().save_pretrained(tmp_path / "adapter")
    again = AutoDecoForCausalLM.from_pretrained(tmp_path / "adapter", dtype=dtype)
    assert again.dtype == dtype
    assert {p.dtype for p in again.decoding_adapter.parameters()} == {torch.float32}
    # Not the same tokens: where in memory the weights lie may decide how a half-precision product rounds.
    loaded = again.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    assert_generates_as_by_hand(again, tolerance=1e-5, spread=0.02)  # trained, they spread less


# --- quantised bases --------------------------------------------------------------------------------------------------


def quanto(bits: str, **how):
    pytest.importorskip("optimum.quanto")
    if bits == "int4" and not tiny.has_compiler():
        pytest.skip("quanto unpacks 4 bits with code that it compiles, and there is no compiler")
    from transformers import QuantoConfig

    return QuantoConfig(weights=bits, **how)


def torchao(bits: int, **how):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(weight_dtype=torch.int4), **how)


def bitsandbytes(bits: int, **how):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, **how)


QUANTISED = {
    "quanto int8": functools.partial(quanto, "int8"),
    "quanto int4": functools.partial(quanto, "int4"),
    "quanto int8, output embedding too": functools.partial(quanto, "int8", modules_to_not_convert=["none"]),
    "torchao int8": functools.partial(torchao, 8),
    "torchao int4": functools.partial(torchao, 4),
    "torchao int8, output embedding too": functools.partial(
        torchao, 8, include_input_output_embeddings=True, modules_to_not_convert=["none"]
    ),
    "bitsandbytes 8 bits": functools.partial(bitsandbytes, 8),
    "bitsandbytes 4 bits": functools.partial(bitsandbytes, 4, bnb_4bit_compute_dtype=torch.float32),
    "bitsandbytes 4 bits, output embedding too": functools.partial(
        bitsandbytes,
        4,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32,
        llm_int8_skip_modules=["none"],
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base and an adapter on it, on disk."""
    root = tmp_path_factory.mktemp("quantised")
    build().save_pretrained(root / "base")
    model = tiny.randomise_heads(tiny.wrap(AutoModelForCausalLM.from_pretrained(root / "base")))
    model.save_pretrained(root / "adapter")
    return root / "base", root / "adapter"


@pytest.mark.parametrize("how", QUANTISED)
def test_quantised_bases_are_decoded_as_by_hand_on_their_own_logits(saved, how):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other settings.*")
        model = AutoDecoForCausalLM.from_pretrained(saved[1], quantization_config=QUANTISED[how]())
    assert model.is_quantized
    exact = AutoModelForCausalLM.from_pretrained(saved[0])
    with torch.no_grad():
        assert not torch.equal(model(tiny.prompts()).logits, exact(tiny.prompts()).logits)
    assert {p.dtype for p in model.decoding_adapter.parameters()} == {torch.float32}
    assert_generates_as_by_hand(model, tolerance=1e-5)


@pytest.mark.parametrize("how", QUANTISED)
def test_heads_learn_on_a_quantised_base_that_stands_still(saved, how, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(saved[0], quantization_config=QUANTISED[how]())
    plain = AutoDecoForCausalLM.from_base(build())
    model = AutoDecoForCausalLM.from_base(base)
    assert output_embedding_shape(model) == (tiny.VOCABULARY, 64)
    assert model.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()

    with torch.no_grad():
        logits = model(tiny.prompts()).logits
    before = {name: tensor.clone() for name, tensor in model.decoding_adapter.state_dict().items()}
    trainable, _ = model.get_nb_trainable_parameters()
    train(tmp_path, model, build_rows(16), max_steps=2)
    assert model.is_quantized
    for name, tensor in model.decoding_adapter.state_dict().items():
        assert not torch.equal(tensor, before[name]), name
    with torch.no_grad():
        assert torch.equal(model.eval()(tiny.prompts()).logits, logits)

    again = AutoDecoForCausalLM.from_pretrained(tmp_path / "checkpoint-2", quantization_config=QUANTISED[how]())
    assert torch.equal(tiny.sample(again, tiny.prompts(), **HOW), tiny.sample(model, tiny.prompts(), **HOW))
    assert (tmp_path / "checkpoint-2" / "model.safetensors").stat().st_size < 4.1 * trainable + 4096


class Packed(torch.nn.Module):
    """As the layers of GPTQ and AWQ are: no `weight`, and the shape in two attributes."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().amax() / 127
        self.register_buffer("qweight", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.qweight.to(x.dtype) * self.scale)


def test_an_output_embedding_without_a_weight_will_do():
    base = build()
    base.set_output_embeddings(Packed(base.get_output_embeddings()))
    model = with_random_heads(base, build())
    assert (model.decoding_config.vocab_size, model.decoding_config.hidden_size) == (tiny.VOCABULARY, 64)
    assert_generates_as_by_hand(model, tolerance=1e-5)
