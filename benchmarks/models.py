"""Random models of real shapes, caches as after long prompts, what a token costs on paper; knows nothing of time."""

from __future__ import annotations

import copy
import math
from itertools import chain
from typing import Any

import torch
from measure import default_dtype
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM
from transformers.initialization import no_init_weights

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM

SHAPES = {
    "0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072},
    "4B": {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728},
    "8B": {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12288},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
}
HEAD_SIZE = 128
# Standard deviation of the logits; about half of the mass then lies on the most likely token.
LOGIT_SPREAD = 7.0
# Weights repeat such a block: a prime length, so that no two rows of a matrix are alike, and drawing it is quick.
_BLOCK = 4_194_301


def configuration(shape: str, vocab: int) -> Qwen3Config:
    """Qwen3's of that size."""
    heads = SHAPES[shape]["num_attention_heads"]
    return Qwen3Config(
        vocab_size=vocab,
        num_key_value_heads=min(8, heads),
        head_dim=HEAD_SIZE,
        max_position_embeddings=1 << 17,
        # Tied to the input's, random rows would favour the very token that was read.
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=0,
        **SHAPES[shape],
    )


@torch.no_grad()
def build_base(shape: str, vocab: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Qwen3ForCausalLM:
    """A random model whose distributions are as peaked as a trained model's."""
    with default_dtype(dtype), torch.device(device), no_init_weights():
        model = Qwen3ForCausalLM(configuration(shape, vocab)).eval()
    generator = torch.Generator(device).manual_seed(seed)
    block = torch.randn(_BLOCK, generator=generator, device=device).mul_(0.02).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        for part in parameter.view(-1).split(_BLOCK):
            part.copy_(block[: len(part)])
    # The final norm gives unit components, so a logit's spread is the norm of its row.
    output = model.lm_head.weight
    output.mul_(LOGIT_SPREAD / (0.02 * math.sqrt(output.shape[1])))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def with_plain_twin(base: Qwen3ForCausalLM) -> tuple[AutoDecoForCausalLM, Qwen3ForCausalLM]:
    """The model with heads that choose T and P around 0.8 and 0.95, and transformers' own model on the same weights."""
    shared = {id(tensor): tensor for tensor in chain(base.parameters(), base.buffers())}
    twin = copy.deepcopy(base, shared)
    model = AutoDecoForCausalLM.from_base(base, AutoDecoConfig(policy="heads"))
    generator = torch.Generator(base.device).manual_seed(1)
    with torch.no_grad():
        for head, bias in ((model.decoding_adapter.temperature_head, -0.4), (model.decoding_adapter.top_p_head, 3.0)):
            head.out.weight.normal_(std=0.1, generator=generator)
            head.out.bias.fill_(bias)
    return model, twin


@torch.no_grad()
def peakedness(model: Any, seed: int = 0) -> list[float]:
    """The 10, 50 and 90 % points of the largest probability over 64 positions."""
    ids = torch.randint(1, model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(seed))
    top = model(ids.to(model.device)).logits[0].float().softmax(-1).amax(-1).cpu()
    return [round(float(value), 3) for value in top.quantile(torch.tensor([0.1, 0.5, 0.9]))]


def cache_after(model: Any, batch: int, length: int, seed: int = 0) -> DynamicCache:
    """The cache as a prompt of that length would leave it, of random keys and values: nothing is prefilled."""
    config = model.config
    shape = (batch, config.num_key_value_heads, length, config.head_dim)
    generator = torch.Generator(model.device).manual_seed(seed)
    block = torch.randn(_BLOCK, generator=generator, device=model.device).mul_(0.3).to(model.dtype)
    states = block.repeat(math.prod(shape) // _BLOCK + 1)[: math.prod(shape)].view(shape)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(states, states, layer)
    return cache


def cache_bytes(shape: str, batch: int, length: int, dtype: torch.dtype) -> int:
    """Keys and values of all layers."""
    of = SHAPES[shape]
    width = 2 * min(8, of["num_attention_heads"]) * HEAD_SIZE * of["num_hidden_layers"]
    return batch * length * width * dtype.itemsize


def layer_matrices(shape: str) -> int:
    """Entries of a layer's matrices."""
    of = SHAPES[shape]
    width, wide = of["hidden_size"], of["num_attention_heads"] * HEAD_SIZE
    narrow = min(8, of["num_attention_heads"]) * HEAD_SIZE
    return 2 * width * wide + 2 * width * narrow + 3 * width * of["intermediate_size"]


def parameter_count(shape: str, vocab: int) -> int:
    """Parameters of the base, an input embedding of its own among them."""
    of = SHAPES[shape]
    width = of["hidden_size"]
    norms = of["num_hidden_layers"] * (2 * width + 2 * HEAD_SIZE) + width
    return of["num_hidden_layers"] * layer_matrices(shape) + norms + 2 * vocab * width


def base_flops(shape: str, vocab: int, length: int) -> int:
    """Multiplications and additions of one token after `length` others: matrices and attention."""
    of = SHAPES[shape]
    attention = 2 * of["num_attention_heads"] * HEAD_SIZE * (length + 1)
    return 2 * (of["num_hidden_layers"] * (layer_matrices(shape) + attention) + of["hidden_size"] * vocab)


def head_flops(model: AutoDecoForCausalLM) -> int:
    """Multiplications and additions of the heads for one token."""
    linear = [part for part in model.decoding_adapter.modules() if isinstance(part, torch.nn.Linear)]
    return sum(2 * layer.in_features * layer.out_features for layer in linear)
