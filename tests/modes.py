"""Every way transformers generates, as one table: how to ask for it, what an adapter makes of it, what cannot do it."""

from __future__ import annotations

import asyncio
import copy
import functools
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
from tiny import ALL_FAMILIES, BOS, EOS, PAD, VOCABULARY, left_padded, prompts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch._dynamo.utils import counters
from transformers import (
    AsyncTextIteratorStreamer,
    CompileConfig,
    ContinuousBatchingConfig,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitNormalization,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    TextStreamer,
    TopHLogitsWarper,
    TypicalLogitsWarper,
    WatermarkingConfig,
    cache_utils,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import is_optimum_quanto_available

from hf_adaptive_decode import AutoDecoForCausalLM

NEVER = -float("inf")
STEPS = 6
DICT = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
PLAIN = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
ENDLESS = {"eos_token_id": None, "pad_token_id": PAD}
Settings = dict[str, Any]


@dataclass(frozen=True)
class Ran:
    """What a run gave: `generate`'s own output, and what else came of it, such as the text that a streamer heard."""

    output: Any
    extra: Any = None


def generate(model: Any, settings: Settings) -> Ran:
    return Ran(model.generate(**settings))


@dataclass(frozen=True)
class Gap:
    """Families that transformers itself cannot run in some mode, and why, in the README's words."""

    families: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Mode:
    """
    One way to generate.

    Args:
        name: Its name in the tests.
        row: The README's row that it stands in, and `shown` how that row names it.
        settings: Gives what `generate` is passed, made anew for each run.
        run: Runs it, where one call of `generate` is not all.
        expected: "same" (an adapter of T = 1 and P = 1 gives what the base gives with everything off), "base" (whatever
            the adapter, what the base gives) or "refused".
        without: What transformers itself cannot run; the wrapped model then fails as the base does.
        phrase: What the message of a refusal says.
        between: transformers' warpers that run between the constraints and the adapter.
        behind: What runs behind the adapter.
        truth: Where the tests take hidden states from: "forced" (the sequence run again, without a cache), "alone" (the
            same, each row without its padding), "heard" (a hook of the tests' own, where the cache is lossy) or "none".
        heard: Families of which the hidden states are taken by that hook.
        tolerance: How far identity and base may lie apart.
        is_there: Whether the installed packages have it; without them the base's own error is expected.
    """

    name: str
    row: str
    shown: str
    settings: Callable[[], Settings] = dict
    run: Callable[[Any, Settings], Ran] = generate
    expected: str = "same"
    without: Sequence[Gap] = ()
    phrase: str = ""
    between: Callable[[], Sequence[LogitsProcessor]] = list
    behind: Callable[[], Sequence[LogitsProcessor]] = list
    truth: str = "forced"
    heard: Sequence[str] = ()
    tolerance: float = 0.0
    is_there: Callable[[], bool] = lambda: True

    @property
    def cannot(self) -> frozenset[str]:
        """The families of all its gaps."""
        return frozenset(family for gap in self.without for family in gap.families)


# --- what the modes are asked with ------------------------------------------------------------------------------------


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A token is a word of one or two letters; some words begin others, so that there is something to heal."""
    plain = Tokenizer(models.WordLevel(_vocabulary(), unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, **_SPECIAL)


@functools.cache
def unspaced_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokens, written without spaces."""
    merges = [tuple(word) for word in _vocabulary() if len(word) == 2]
    plain = Tokenizer(models.BPE(_vocabulary(), merges))
    plain.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=plain, **_SPECIAL)


_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "padding_side": "left"}


def _vocabulary() -> dict[str, int]:
    letters = "abcdefghij"
    words = [*letters, *(first + second for first in letters for second in letters)][: VOCABULARY - 3]
    return {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {word: index + 3 for index, word in enumerate(words)}


def asks(**settings: Any) -> Callable[[], Settings]:
    return lambda: dict(settings)


ONE_ROW = {"input_ids": prompts(1, 5)}


class StopAt(StoppingCriteria):
    """Stops at a length, and looks at the scores as criteria may."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        assert torch.isfinite(scores[-1]).any()
        return torch.full(input_ids.shape[:1], input_ids.shape[1] >= self.length)


class Grammar(LogitsProcessor):
    """After an even token comes an odd one, and after an odd one an even one."""

    def __call__(self, input_ids, scores):
        parity = torch.arange(scores.shape[1]) % 2
        return scores.masked_fill(parity[None] == input_ids[:, -1:] % 2, NEVER)


def padded(side: str) -> Settings:
    ids, mask = left_padded([prompts(1, 5)[0], prompts(1, 3, seed=4)[0]])
    if side == "right":
        ids, mask = (torch.stack([rows[0], rows[1].roll(-2)]) for rows in (ids, mask))
    return {"input_ids": ids, "attention_mask": mask}


# --- runs of more than one call ---------------------------------------------------------------------------------------


def eagerly(model: Any, settings: Settings) -> Ran:
    """With attentions computed so that they can be shown."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return generate(model, settings)
    finally:
        model.set_attn_implementation(before)


def from_embeddings(model: Any, settings: Settings) -> Ran:
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(settings.pop("input_ids"))
    return generate(model, settings | {"inputs_embeds": embeddings})


def on_from_a_cache(model: Any, settings: Settings) -> Ran:
    settings = dict(settings)
    begin = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True, **ENDLESS}
    first = model.generate(settings.pop("input_ids"), **begin)
    cache = "cache_params" if "mamba" in model.config.model_type else "past_key_values"
    return generate(model, {"input_ids": first.sequences, cache: first.past_key_values, **settings})


def streamed(kind: type[TextStreamer]) -> Callable[[Any, Settings], Ran]:
    """The text that a streamer heard, and the output."""

    def run(model: Any, settings: Settings) -> Ran:
        found: list[Any] = []

        def work(streamer: Any) -> None:
            try:
                found.append(model.generate(**settings, streamer=streamer))
            except Exception as error:
                found.append(error)
                streamer.end()

        async def listen() -> str:
            streamer = kind(tokenizer())
            thread = threading.Thread(target=work, args=(streamer,))
            thread.start()
            pieces = [piece async for piece in streamer] if hasattr(streamer, "__aiter__") else list(streamer)
            thread.join()
            return "".join(pieces)

        text = asyncio.run(listen())
        if isinstance(found[0], Exception):
            raise found[0]
        return Ran(found[0], text)

    return run


class Heard(TextStreamer):
    """A `TextStreamer` that keeps what it would print."""

    def __init__(self) -> None:
        super().__init__(tokenizer())
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text


def printed(model: Any, settings: Settings) -> Ran:
    streamer = Heard()
    return Ran(model.generate(**settings, streamer=streamer), streamer.text)


def with_transition_scores(model: Any, settings: Settings) -> Ran:
    found = model.generate(**settings)
    return Ran(found, model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True))


def family_of(model: Any) -> str:
    return {"gemma3_text": "gemma3"}.get(model.config.model_type, model.config.model_type)


def with_draft(model: Any, settings: Settings) -> Ran:
    """The draft is the base with flatter logits, so that some drafts are accepted and some are not."""
    draft = tiny.build_base(family_of(model)).requires_grad_(False)
    draft.get_output_embeddings().weight.mul_(0.7)
    draft.generation_config.update(num_assistant_tokens=3, num_assistant_tokens_schedule="constant")
    draft.generation_config.assistant_confidence_threshold = 0.0
    with tiny.counted_forwards(draft) as drafted:
        ran = generate(model, settings | {"assistant_model": draft})
    assert drafted
    return ran


def leaving_early(model: Any, settings: Settings) -> Ran:
    """A draft by the model's own first layer. Where that fails, transformers leaves the model without its others."""
    layers = model.config.num_hidden_layers
    try:
        return generate(model, settings)
    finally:
        model.config.num_hidden_layers = layers


def in_batches(model: Any, settings: Settings) -> Ran:
    """Continuous batching, with as little memory as will do: tokens and log-probabilities of each request."""
    config = GenerationConfig(**{name: settings[name] for name in ("max_new_tokens", *PLAIN) if name in settings})
    config.eos_token_id, config.pad_token_id = _NO_EOS, PAD
    found = model.generate_batch(settings["input_ids"].tolist(), config, small_batches(), warmup=False)
    requests = [found[name] for name in sorted(found)]
    if len(requests) < len(settings["input_ids"]) or any(request.error for request in requests):
        raise RuntimeError(f"continuous batching failed: {requests}")
    return Ran([request.generated_tokens for request in requests], [request.logprobs for request in requests])


_NO_EOS = -1  # as continuous batching writes it; rows of different lengths would be no tensor for a paged `generate`


def small_batches() -> ContinuousBatchingConfig:
    of_pages = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"
    return ContinuousBatchingConfig(return_logprobs=True, num_blocks=16, max_batch_tokens=32, **{of_pages: 8})


def compiled(model: Any, settings: Settings) -> Ran:
    """
    Two calls after a greedy one, decoded by compiled code; also the graphs that this took more, and the breaks.

    The base runs uncompiled, which gives the same up to rounding and takes a fraction of the time; how many graphs it
    would take a test of its own holds. With random heads the graphs are there already.
    """
    greedy = {**settings, **dict.fromkeys(PLAIN), "do_sample": False}
    greedy.pop("output_decoding_trace", None)
    stands = isinstance(model, AutoDecoForCausalLM)
    before = counters["stats"]["unique_graphs"]
    for asked in (greedy, settings, settings):
        found = model.generate(**asked, **({"compile_config": compile_config()} if stands else {}))
    graphs = counters["stats"]["unique_graphs"] - before if stands else graphs_of(family_of(model))
    return Ran(found, {"graphs": graphs, "breaks": sum(counters["graph_break"].values())})


def compile_config() -> CompileConfig:
    """Compiles on a CPU too, without generating code; a break in the graph is an error."""
    config = CompileConfig(backend="eager", fullgraph=True)
    config._compile_all_devices = True
    return config


def graphs_of(family: str) -> int:
    """Graphs that the base compiles to; what a sliding window's cache has seen is at first part of them."""
    return 2 if family in SLIDING else 1


def by_own_loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
    """What a caller's own decoding loop may look like: no cache, and one row of bookkeeping."""
    scores: tuple[torch.Tensor, ...] = ()
    logits: tuple[torch.Tensor, ...] = ()
    done = torch.zeros(len(input_ids), dtype=torch.bool)
    while not done.all():
        logits += (model(input_ids=input_ids, use_cache=False).logits[:, -1].float(),)
        scores += (logits_processor(input_ids, logits[-1].clone()),)
        token = torch.multinomial(scores[-1].softmax(-1), 1)
        input_ids = torch.cat([input_ids, token], dim=1)
        done |= stopping_criteria(input_ids, scores)
    return GenerateDecoderOnlyOutput(sequences=input_ids, scores=scores, logits=logits)


def by_greedy_loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
    """A decoding loop that asks no logits processor."""
    for _ in range(STEPS):
        input_ids = torch.cat([input_ids, model(input_ids=input_ids).logits[:, -1:].argmax(-1)], dim=1)
    return input_ids


_THROUGH_GENERATE = """
def generate(model, **settings):
    from transformers import GenerationMixin

    return GenerationMixin.generate(model, **settings)
"""
_BY_ITSELF = """
import torch


def generate(model, input_ids=None, max_new_tokens=None, **settings):
    for _ in range(max_new_tokens):
        input_ids = torch.cat([input_ids, model(input_ids=input_ids).logits[:, -1:].argmax(-1)], dim=1)
    return input_ids
"""


def from_folder(code: str) -> Callable[[Any, Settings], Ran]:
    def run(model: Any, settings: Settings) -> Ran:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "custom_generate").mkdir()
            (Path(folder) / "custom_generate" / "generate.py").write_text(code, encoding="utf-8")
            return generate(model, settings | {"custom_generate": folder, "trust_remote_code": True})

    return run


def by_config(model: Any, settings: Settings) -> Ran:
    """All of it in a `GenerationConfig`, with a setting that transformers does not know."""
    inputs = {"input_ids": settings.pop("input_ids")}
    if "logits_processor" in settings:
        inputs["logits_processor"] = settings.pop("logits_processor")
    if "output_decoding_trace" in settings:
        inputs["output_decoding_trace"] = settings.pop("output_decoding_trace")
    return generate(model, {**inputs, "generation_config": GenerationConfig(**settings, house_style="plain")})


def with_own_settings(model: Any, settings: Settings) -> Ran:
    """A wrapped model whose base came with sampling settings of its own."""
    if not isinstance(model, AutoDecoForCausalLM):
        return generate(model, settings)
    before = copy.deepcopy(model.generation_config)
    model.generation_config.update(temperature=0.4, top_k=5, top_p=0.5, min_p=0.2, typical_p=0.6, epsilon_cutoff=0.1)
    model.generation_config.update(eta_cutoff=0.1, top_h=0.3, do_sample=False, num_beams=2)
    try:
        return generate(model, settings)
    finally:
        model.generation_config = before


def while_disabled(model: Any, settings: Settings) -> Ran:
    if not isinstance(model, AutoDecoForCausalLM):
        return generate(model, settings)
    with model.disable_adapter():
        return generate(model, settings)


# --- the table --------------------------------------------------------------------------------------------------------

NAMES = {
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE",
    "qwen3_next": "Qwen3-Next",
    "llama": "Llama",
    "mistral": "Mistral",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "phi3": "Phi-3",
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX",
    "gpt_oss": "GPT-OSS",
    "opt": "OPT",
    "cohere": "Cohere",
    "granite": "Granite",
    "mamba": "Mamba",
    "zamba2": "Zamba2",
}
STATEFUL = ("mamba", "qwen3_next", "zamba2")
SLIDING = ("gemma2", "gemma3", "gpt_oss", "mistral")
NOT_MAMBA = tuple(family for family in ALL_FAMILIES if family != "mamba")
NO_KEYS = Gap(("mamba",), "it has no keys and no attentions")
NO_GOING_BACK = Gap(STATEFUL, "a recurrent state cannot go back to an earlier token")
NO_PAGES = Gap(STATEFUL, "a recurrent state has no pages")
NO_EXIT = Gap(("gpt2", "gpt_neox", "gpt_oss", "opt"), "transformers' early exit fails")
FULL_ATTENTION = Gap((*SLIDING, *STATEFUL), "it is for full attention alone")
NO_GPU = Gap(NOT_MAMBA, "they need a GPU, and the tests have none")
NO_EMBEDDINGS = Gap(("zamba2",), "its `generate` takes none")
NO_MTP = Gap(ALL_FAMILIES, "they have no heads for it")
ON_THE_HUB = Gap(ALL_FAMILIES, "transformers' own error")

SAMPLING, SEARCH, CACHES = "sampling", "greedy and beam search", "caches"
PROMPTS, CONSTRAINTS, WARPERS = "prompts", "constraints", "other warpers"
EXPLICIT, STOPPING, OUTPUTS = "explicit parameters", "stopping", "outputs"
STREAMERS, ASSISTED, BATCHING = "streamers", "assisted generation", "continuous batching"
CUSTOM, HUB_CODE, PREFILL = "generation code of yours", "decoding that transformers keeps on the Hub", "prefill"
LAST, COMPILED, DEAF = "watermark and normalisation", "compiled decoding", "code of yours that asks no logits processor"

# What an adapter makes of a row, in the README's words.
POOLS = "refused for policies that read the mean over the prompt"
REFUSED = "`UnsupportedGenerationError` while the adapter is active"
DIFFERS = {
    SAMPLING: "the adapter decides for each token; the base's own sampling settings are off",
    SEARCH: "the base model's own, to the bit; the adapter takes no part",
    EXPLICIT: "what is passed beats the adapter, which decides the rest",
    WARPERS: "off, unless they are passed; then in front of the adapter",
    CACHES: "as sampling",
    COMPILED: "as sampling; as many graphs as the base's, no break, none compiled anew",
    PREFILL: f"as sampling; in chunks {POOLS}",
    PROMPTS: "as sampling",
    CONSTRAINTS: "in front of the adapter, which brings back nothing that they forbid",
    LAST: "behind the adapter",
    STOPPING: "as sampling",
    OUTPUTS: "`scores` are those that were sampled from, the rest is the base's",
    STREAMERS: "as sampling",
    ASSISTED: f"each position from its own hidden state; the draft never meets the adapter; {POOLS}",
    BATCHING: f"each request as in a batch of its own; {POOLS}",
    CUSTOM: "the adapter is among the logits processors that the code is given",
    DEAF: "`UnsupportedGenerationError` when it has run",
    HUB_CODE: f"{REFUSED} (`num_beam_groups`: transformers' own); without it transformers loads code from the Hub",
}

MODES = (
    Mode("sampling", SAMPLING, "`do_sample=True`, or nothing"),
    Mode("several samples", SAMPLING, "`num_return_sequences`", asks(num_return_sequences=3)),
    Mode("generation config", SAMPLING, "`generation_config`", asks(repetition_penalty=1.3), by_config),
    Mode("own settings", SAMPLING, "", run=with_own_settings),
    Mode("adapter disabled", SEARCH, "`disable_adapter()`", asks(do_sample=True), while_disabled, expected="base"),
    Mode("greedy", SEARCH, "`do_sample=False`", asks(do_sample=False), expected="base"),
    Mode("beams", SEARCH, "`num_beams`", asks(num_beams=3, num_return_sequences=2), expected="base"),
    Mode("beam sampling", SEARCH, "`num_beams` with `do_sample`", asks(num_beams=3, do_sample=True), expected="base"),
    # --- explicit parameters
    Mode("temperature", EXPLICIT, "`temperature`", asks(temperature=0.7)),
    Mode("top-k", EXPLICIT, "`top_k`", asks(top_k=5)),
    Mode("top-p", EXPLICIT, "`top_p`", asks(top_p=0.8)),
    Mode("min-p", EXPLICIT, "`min_p`", asks(min_p=0.1)),
    Mode("typical-p", WARPERS, "`typical_p`", asks(typical_p=0.8), between=lambda: [TypicalLogitsWarper(0.8)]),
    Mode(
        "epsilon", WARPERS, "`epsilon_cutoff`", asks(epsilon_cutoff=0.03), between=lambda: [EpsilonLogitsWarper(0.03)]
    ),
    Mode("eta", WARPERS, "`eta_cutoff`", asks(eta_cutoff=0.1), between=lambda: [EtaLogitsWarper(0.1)]),
    Mode("top-h", WARPERS, "`top_h`", asks(top_h=0.4), between=lambda: [TopHLogitsWarper(0.4)]),
    # --- caches
    Mode("no cache", CACHES, "`use_cache=False`", asks(use_cache=False)),
    Mode("static cache", CACHES, '`cache_implementation="static"`', asks(cache_implementation="static")),
    Mode("offloaded cache", CACHES, '`"offloaded"`', asks(cache_implementation="offloaded"), without=(NO_GPU,)),
    Mode(
        "offloaded static cache",
        CACHES,
        '`"offloaded_static"`',
        asks(cache_implementation="offloaded_static"),
        without=(NO_GPU,),
    ),
    Mode(
        "fp8 cache",
        CACHES,
        '`"quantized"` (fp8)',
        asks(cache_implementation="quantized", cache_config={"backend": "fp8"}),
        without=(FULL_ATTENTION,),
        truth="heard",
        is_there=lambda: hasattr(cache_utils, "Fp8QuantizedLayer"),  # not in the oldest transformers that will do
    ),
    Mode(
        "int4 cache",
        CACHES,
        '`"quantized"` (int4, optimum-quanto)',
        asks(
            cache_implementation="quantized",
            cache_config={"backend": "quanto", "nbits": 4, "q_group_size": 8, "residual_length": 2},
        ),
        without=(FULL_ATTENTION,),
        truth="heard",
        is_there=lambda: is_optimum_quanto_available() and tiny.has_compiler(),
    ),
    # A Mamba goes over the whole text again, on top of what its state holds.
    Mode("continued cache", CACHES, "`past_key_values`", run=on_from_a_cache, heard=("mamba",)),
    Mode(
        "compile",
        COMPILED,
        "`compile_config` with a static cache",
        asks(cache_implementation="static"),
        compiled,
        tolerance=1e-3,
    ),
    Mode("chunked prefill", PREFILL, "`prefill_chunk_size`", asks(prefill_chunk_size=2), without=(NO_KEYS,)),
    Mode("all logits", PREFILL, "`logits_to_keep`", asks(logits_to_keep=0)),
    # --- prompts
    Mode("left padding", PROMPTS, "left padding", lambda: padded("left"), truth="alone"),
    Mode("right padding", PROMPTS, "right padding", lambda: padded("right")),
    Mode("embeddings", PROMPTS, "`inputs_embeds`", run=from_embeddings, without=(NO_EMBEDDINGS,)),
    Mode("no prompt", PROMPTS, "no prompt", asks(input_ids=None)),
    Mode("token healing", PROMPTS, "`token_healing`", lambda: {"token_healing": True, "tokenizer": tokenizer()}),
    # --- constraints
    Mode("repetition penalty", CONSTRAINTS, "`repetition_penalty`", asks(repetition_penalty=1.7)),
    Mode("no repeats", CONSTRAINTS, "`no_repeat_ngram_size`", asks(no_repeat_ngram_size=1)),
    Mode("no prompt repeats", CONSTRAINTS, "`encoder_no_repeat_ngram_size`", asks(encoder_no_repeat_ngram_size=1)),
    Mode("prompt penalty", CONSTRAINTS, "`encoder_repetition_penalty`", asks(encoder_repetition_penalty=1.5)),
    Mode("bad words", CONSTRAINTS, "`bad_words_ids`", asks(bad_words_ids=[[5], [7], [8, 9]])),
    Mode("minimal length", CONSTRAINTS, "`min_length`", asks(min_length=9, eos_token_id=[EOS, *range(3, 30)])),
    Mode(
        "minimal new tokens", CONSTRAINTS, "`min_new_tokens`", asks(min_new_tokens=3, eos_token_id=list(range(2, 50)))
    ),
    Mode(
        "forced first",
        CONSTRAINTS,
        "`forced_bos_token_id`",
        lambda: {"input_ids": prompts(2, 1), "forced_bos_token_id": 9},
    ),
    Mode("forced last", CONSTRAINTS, "`forced_eos_token_id`", asks(forced_eos_token_id=EOS)),
    Mode("suppressed", CONSTRAINTS, "`suppress_tokens`", asks(suppress_tokens=list(range(3, 40)))),
    Mode("suppressed first", CONSTRAINTS, "`begin_suppress_tokens`", asks(begin_suppress_tokens=list(range(3, 60)))),
    Mode("sequence bias", CONSTRAINTS, "`sequence_bias`", asks(sequence_bias={(11,): 4.0, (11, 12): 6.0, (13,): -5.0})),
    Mode(
        "length decay",
        CONSTRAINTS,
        "`exponential_decay_length_penalty`",
        asks(exponential_decay_length_penalty=(1, 2.5), eos_token_id=EOS),
    ),
    Mode("invalid values", CONSTRAINTS, "`remove_invalid_values`", asks(remove_invalid_values=True)),
    Mode(
        "allowed tokens",
        CONSTRAINTS,
        "`prefix_allowed_tokens_fn`",
        asks(prefix_allowed_tokens_fn=lambda row, ids: list(range(10 + row, 40 + row))),
    ),
    Mode("grammar", CONSTRAINTS, "`logits_processor`", lambda: {"logits_processor": [Grammar()]}),
    Mode("guidance", CONSTRAINTS, "`guidance_scale`", asks(guidance_scale=1.8)),
    Mode(
        "negative prompt",
        CONSTRAINTS,
        "`negative_prompt_ids`",
        lambda: {"guidance_scale": 1.8, "negative_prompt_ids": prompts(2, 4, seed=9)},
    ),
    # --- behind the adapter
    Mode(
        "watermark",
        LAST,
        "`watermarking_config`",
        lambda: {"watermarking_config": WATERMARK},
        behind=lambda: [WATERMARK.construct_processor(VOCABULARY, "cpu")],
    ),
    Mode(
        "SynthID",
        LAST,
        "`SynthIDTextWatermarkingConfig`",
        lambda: {"watermarking_config": SYNTHID},
        behind=lambda: [SYNTHID.construct_processor(VOCABULARY, "cpu")],
    ),
    Mode(
        "normalisation",
        LAST,
        "`renormalize_logits`",
        asks(renormalize_logits=True),
        behind=lambda: [LogitNormalization()],
    ),
    Mode(
        "watermark, normalised",
        LAST,
        "",
        lambda: {"watermarking_config": WATERMARK, "renormalize_logits": True},
        behind=lambda: [WATERMARK.construct_processor(VOCABULARY, "cpu"), LogitNormalization()],
    ),
    # --- stopping
    Mode("end of text", STOPPING, "`eos_token_id`", asks(eos_token_id=[EOS, *range(3, 20)])),
    Mode("stopping criteria", STOPPING, "`stopping_criteria`", lambda: {"stopping_criteria": [StopAt(8)]}),
    Mode(
        "stop strings",
        STOPPING,
        "`stop_strings`",
        lambda: {"stop_strings": ["bc", "e", "gh"], "tokenizer": unspaced_tokenizer()},
    ),
    Mode("maximal time", STOPPING, "`max_time`", asks(max_time=1e-9)),
    Mode("maximal length", STOPPING, "`max_length`", asks(max_length=9, max_new_tokens=None)),
    # --- outputs
    Mode(
        "hidden states",
        OUTPUTS,
        "`output_scores`, `output_logits`, `output_hidden_states`",
        asks(output_hidden_states=True),
    ),
    Mode("attentions", OUTPUTS, "`output_attentions`", asks(output_attentions=True), eagerly, without=(NO_KEYS,)),
    Mode("transition scores", OUTPUTS, "`compute_transition_scores`", run=with_transition_scores),
    # --- streamers
    Mode("text streamer", STREAMERS, "`TextStreamer`", asks(**ONE_ROW), printed),
    Mode("text iterator", STREAMERS, "`TextIteratorStreamer`", asks(**ONE_ROW), streamed(TextIteratorStreamer)),
    Mode(
        "asynchronous text iterator",
        STREAMERS,
        "`AsyncTextIteratorStreamer`",
        asks(**ONE_ROW),
        streamed(AsyncTextIteratorStreamer),
    ),
    # --- assisted generation
    Mode("draft model", ASSISTED, "`assistant_model`", asks(**ONE_ROW), with_draft, without=(NO_GOING_BACK,)),
    Mode(
        "prompt lookup",
        ASSISTED,
        "`prompt_lookup_num_tokens`",
        asks(input_ids=torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7]]), prompt_lookup_num_tokens=3),
        without=(NO_GOING_BACK,),
    ),
    Mode(
        "early exit",
        ASSISTED,
        "`assistant_early_exit`",
        asks(**ONE_ROW, assistant_early_exit=1),
        leaving_early,
        without=(NO_GOING_BACK, NO_EXIT),
    ),
    Mode("multi-token prediction", ASSISTED, "`use_mtp`", asks(**ONE_ROW, use_mtp=True), without=(NO_MTP,)),
    # --- continuous batching
    Mode("generate_batch", BATCHING, "`generate_batch`", run=in_batches, without=(NO_PAGES,), truth="none"),
    Mode(
        "generate_batch, greedy",
        BATCHING,
        "",
        asks(do_sample=False),
        in_batches,
        expected="base",
        without=(NO_PAGES,),
    ),
    Mode(
        "paged cache",
        BATCHING,
        '`cache_implementation="paged"`',
        lambda: {
            "cache_implementation": "paged",
            "continuous_batching_config": small_batches(),
            "eos_token_id": _NO_EOS,
        },
        without=(NO_PAGES,),
        truth="none",
    ),
    # --- code of the caller's
    Mode("custom loop", CUSTOM, "`custom_generate`: a function", asks(custom_generate=by_own_loop)),
    Mode("custom folder", CUSTOM, "a folder or repository", run=from_folder(_THROUGH_GENERATE)),
    Mode(
        "custom loop by itself",
        DEAF,
        "`custom_generate`",
        asks(custom_generate=by_greedy_loop),
        expected="refused",
        phrase="logits processor",
    ),
    Mode(
        "custom folder by itself",
        DEAF,
        "",
        run=from_folder(_BY_ITSELF),
        expected="refused",
        phrase="logits processor",
    ),
    # --- what transformers has moved out
    Mode(
        "contrastive",
        HUB_CODE,
        "`penalty_alpha`",
        asks(penalty_alpha=0.6, top_k=4),
        expected="refused",
        phrase="contrastive",
    ),
    Mode("DoLa", HUB_CODE, "`dola_layers`", asks(dola_layers="high"), expected="refused", phrase="DoLa"),
    Mode(
        "forced words",
        HUB_CODE,
        "`force_words_ids`",
        asks(force_words_ids=[[11]]),
        expected="refused",
        phrase="constrained beam search",
    ),
    Mode(
        "constraints",
        HUB_CODE,
        "`constraints`",
        asks(constraints=["anything"]),
        expected="refused",
        phrase="constrained",
    ),
    Mode(
        "group beams",
        HUB_CODE,
        "`num_beam_groups`",
        asks(num_beams=4, num_beam_groups=2, diversity_penalty=0.5, do_sample=False),
        expected="base",
        without=(ON_THE_HUB,),
    ),
)
WATERMARK = WatermarkingConfig(bias=2.5)
SYNTHID = SynthIDTextWatermarkingConfig(keys=[11, 23, 37, 41], ngram_len=3, sampling_table_size=64)


# --- the README's table -----------------------------------------------------------------------------------------------

BEGIN, END = "<!-- modes -->", "<!-- end of modes -->"
TRANSFORMERS = "5.23.0"  # whose gaps they are; others have fewer or more


def readme_table() -> str:
    """The table as Markdown: a line for each row, with what transformers itself cannot run."""
    lines = ["| mode | families | with an adapter |", "| --- | --- | --- |"]
    for row in dict.fromkeys(mode.row for mode in MODES):
        within = [mode for mode in MODES if mode.row == row]
        shown = ", ".join(mode.shown for mode in within if mode.shown)
        lines.append(f"| **{row}**: {shown} | {_families(within)} | {DIFFERS[row]} |")
    return "\n".join(lines)


def _families(within: Sequence[Mode]) -> str:
    if all(mode.expected == "refused" or len(mode.cannot) == len(ALL_FAMILIES) for mode in within):
        return "none"
    said = ["all"]
    for gap in dict.fromkeys(gap for mode in within for gap in mode.without):
        those = ", ".join(mode.shown for mode in within if mode.shown and gap in mode.without)
        said.append(f"{those} not {_listed(gap.families)} ({gap.why})")
    return "; ".join(said)


def _listed(families: Sequence[str]) -> str:
    if len(families) > len(ALL_FAMILIES) / 2:
        others = [name for family, name in NAMES.items() if family not in families]
        return "on any" + (f" but {', '.join(others)}" if others else "")
    return "on " + ", ".join(name for family, name in NAMES.items() if family in families)
