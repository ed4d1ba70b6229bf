"""Tiny real models built in code, seeded and in fp32, and adapters on them whose behaviour a test can predict."""

from __future__ import annotations

import contextlib
import copy
import shutil

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
)

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM

VOCABULARY = 96
BOS, EOS, PAD = 1, 2, 0
LOGIT_STD = 2.5

_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
_LLAMA_LIKE = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
_WITHOUT_HEAD_DIM = {name: value for name, value in _LLAMA_LIKE.items() if name != "head_dim"}


def _qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**_LLAMA_LIKE))


def _llama():
    return LlamaForCausalLM(LlamaConfig(**_LLAMA_LIKE))


def _gemma2():
    soft = {"final_logit_softcapping": 10.0, "query_pre_attn_scalar": 8, "sliding_window": 16}
    return Gemma2ForCausalLM(Gemma2Config(**{**_LLAMA_LIKE, **soft}, attn_implementation="eager"))


def _gpt2():
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**_TOKENS, **shape, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))


def _gpt_oss():
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
    return GptOssForCausalLM(GptOssConfig(**{**_LLAMA_LIKE, **experts}, attn_implementation="eager"))


def _opt():
    # The output embedding is narrower than the layers: 24, not 32.
    shape = {"hidden_size": 32, "word_embed_proj_dim": 24, "ffn_dim": 48, "num_hidden_layers": 2}
    config = OPTConfig(**_TOKENS, **shape, num_attention_heads=4, max_position_embeddings=256, init_std=0.3)
    return OPTForCausalLM(config)


def _qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**_LLAMA_LIKE))


def _qwen3_moe():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_LLAMA_LIKE, **experts))


def _mistral():
    return MistralForCausalLM(MistralConfig(**_LLAMA_LIKE, sliding_window=16))


def _gemma3():
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    return Gemma3ForCausalLM(Gemma3TextConfig(**_LLAMA_LIKE, **layers, query_pre_attn_scalar=8))


def _phi3():
    return Phi3ForCausalLM(Phi3Config(**_WITHOUT_HEAD_DIM))


def _gpt_neox():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GPTNeoXConfig(**_TOKENS, **shape, max_position_embeddings=256, initializer_range=0.3)
    return GPTNeoXForCausalLM(config)


def _mamba():
    shape = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
    return MambaForCausalLM(MambaConfig(**_TOKENS, **shape, initializer_range=0.3))


def _qwen3_next():
    # One layer with a linear attention and one with a full one.
    layers = {"layer_types": ["linear_attention", "full_attention"]}
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    more = {"linear_num_value_heads": 4, "shared_expert_intermediate_size": 24}
    return Qwen3NextForCausalLM(Qwen3NextConfig(**_LLAMA_LIKE, **layers, **linear, **experts, **more))


def _zamba2():
    # A state space layer, and one with an attention that layers share. Steps have a lower bound in decoding alone, so
    # it has to be out of reach if a sequence is to be the same with and without a cache.
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    state = {"mamba_d_state": 8, "mamba_headdim": 16, "n_mamba_heads": 4, "mamba_ngroups": 1, "chunk_size": 8}
    state |= {"time_step_min": 1e-6}
    shared = {"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "adapter_rank": 4}
    config = Zamba2Config(**_TOKENS, **shape, **state, **shared, max_position_embeddings=256, initializer_range=0.3)
    return Zamba2ForCausalLM(config)


def _cohere():
    # Its logits are scaled behind the output embedding, and so are Granite's.
    return CohereForCausalLM(CohereConfig(**_WITHOUT_HEAD_DIM, logit_scale=0.25))


def _granite():
    scales = {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}
    return GraniteForCausalLM(GraniteConfig(**_WITHOUT_HEAD_DIM, **scales, attention_multiplier=0.3))


_BUILDERS = {
    "qwen3": _qwen3,
    "llama": _llama,
    "gemma2": _gemma2,
    "gpt2": _gpt2,
    "gpt_oss": _gpt_oss,
    "opt": _opt,
}
FAMILIES = tuple(_BUILDERS)
_MORE_BUILDERS = {
    "qwen2": _qwen2,
    "qwen3_moe": _qwen3_moe,
    "mistral": _mistral,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt_neox": _gpt_neox,
    "mamba": _mamba,
    "qwen3_next": _qwen3_next,
    "zamba2": _zamba2,
    "cohere": _cohere,
    "granite": _granite,
}
MORE_FAMILIES = tuple(_MORE_BUILDERS)
ALL_FAMILIES = (*FAMILIES, *MORE_FAMILIES)
_BUILT: dict[str, torch.nn.Module] = {}


def build_base(family: str = "qwen3"):
    """A fresh copy of the family's model; every call gives the same weights."""
    if family not in _BUILT:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(sum(map(ord, family)))
            model = (_BUILDERS | _MORE_BUILDERS)[family]().eval()
            spread = model(prompts(4, 12)).logits.std()
            # Flat logits would hide a wrong temperature; the head is scaled until they are as peaked as a trained
            # model's.
            model.get_output_embeddings().weight.mul_(LOGIT_STD / spread)
            _BUILT[family] = model
    return copy.deepcopy(_BUILT[family])


def wrap(base=None, **settings) -> AutoDecoForCausalLM:
    base = build_base() if base is None else base
    return AutoDecoForCausalLM.from_base(base, AutoDecoConfig(**settings))


def prompts(rows: int = 3, length: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts `[length]` of different lengths as one batch: (input_ids, attention_mask)."""
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=PAD) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    return ids, mask


@torch.no_grad()
def make_heads_identity(model):
    """T is exactly 1 and P exactly 1: the model then samples as its base does with everything off."""
    adapter = model.decoding_adapter
    for head, bias in ((adapter.temperature_head, 0.0), (adapter.top_p_head, 40.0)):
        head.out.weight.zero_()
        head.out.bias.fill_(bias)
    return model


@torch.no_grad()
def randomise_heads(model, seed: int = 0):
    """T spreads over about 0.2 to 1.8 and P over about 0.2 to 0.98, token by token."""
    generator = torch.Generator().manual_seed(seed)
    adapter = model.decoding_adapter
    hidden, _ = hidden_and_logits(model, prompts(8, 16, seed=seed + 1))
    x = hidden.reshape(-1, hidden.shape[-1])
    if "statistics" in adapter.config.features:
        x = torch.cat([x, torch.rand(len(x), 4, generator=generator)], dim=-1)
    for head, middle in ((adapter.temperature_head, 0.0), (adapter.top_p_head, 1.0)):
        if head is None:
            continue
        head.up.weight.copy_(torch.randn(head.up.weight.shape, generator=generator) / x.std() / x.shape[-1] ** 0.5)
        head.up.bias.copy_(torch.randn(head.up.bias.shape, generator=generator) * 0.1)
        inner = torch.relu(head.up(torch.nn.functional.pad(x, (0, head.up.in_features - x.shape[-1]), value=1.0)))
        direction = torch.randn(head.out.weight.shape, generator=generator)
        raw = inner @ direction.T
        head.out.weight.copy_(direction * (1.3 / raw.std()))
        head.out.bias.fill_(middle - float((raw * (1.3 / raw.std())).mean()))
    return model


def hidden_and_logits(model, input_ids, **inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Input of the output embedding `[B, L, H]`, by a hook of our own, and the logits `[B, L, V]`; no cache."""
    heard = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False, **inputs).logits
    handle.remove()
    return heard[-1], logits


def heads_by_hand(adapter, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """T and P of hidden states `[N, H]`, written out from the weights in double precision."""
    w = {name: tensor.double() for name, tensor in adapter.state_dict().items()}

    def mlp(head: str, x: torch.Tensor) -> torch.Tensor:
        inner = (x @ w[f"{head}.up.weight"].T + w[f"{head}.up.bias"]).clamp(min=0)
        return (inner @ w[f"{head}.out.weight"].T + w[f"{head}.out.bias"])[:, 0]

    hidden = hidden.double()
    temperature = 2 / (1 + torch.exp(-mlp("temperature_head", hidden)))
    top_p = 1 / (1 + torch.exp(-mlp("top_p_head", torch.cat([hidden, temperature[:, None]], dim=1))))
    return temperature.float(), top_p.float()


@contextlib.contextmanager
def counted_forwards(model):
    """Yields a list that grows by one entry a forward pass."""
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def has_compiler() -> bool:
    """Whether code for PyTorch can be compiled here."""
    return shutil.which("g++") is not None or shutil.which("c++") is not None


def hooks_left(model) -> int:
    """Hooks on the output embedding, but for the one that a wrapped model has as long as it is wrapped."""
    return len(model.get_output_embeddings()._forward_pre_hooks) - isinstance(model, AutoDecoForCausalLM)


def sample(model, *args, seed: int = 0, **kwargs):
    torch.manual_seed(seed)
    return model.generate(*args, **kwargs)
