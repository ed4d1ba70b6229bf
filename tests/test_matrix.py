"""Every generation mode on every model family: what an adapter must leave as the base has it, and that it acts."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import logging
from pathlib import Path
from typing import Any

import modes
import pytest
import tiny
import torch
import transformers
from modes import DICT, ENDLESS, MODES, NEVER, PLAIN, STEPS, Mode, Ran, Settings
from tiny import ALL_FAMILIES, prompts
from torch._dynamo.utils import counters
from transformers import Cache, LogitsProcessor, dynamic_module_utils
from transformers.utils import ModelOutput

from hf_adaptive_decode import AutoDecoForCausalLM
from hf_adaptive_decode.errors import UnsupportedGenerationError

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def light_collections():
    """Continuous batching collects garbage around each call, and this process holds a great many objects."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def compiler(monkeypatch):
    """Compiled code is kept for each function, whatever the model, and there is a limit to how much."""
    # Its log of all it does would be kept by pytest, which takes longer than the compiling.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module", autouse=True)
def code_of_folders(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


class Family:
    """A family's base, and one wrapped model whose heads are identity or random."""

    def __init__(self, name: str) -> None:
        # Frozen, since torch multiplies matrices that require gradients another way and rounds otherwise.
        self.base = tiny.build_base(name).requires_grad_(False)
        self.wrapped = tiny.make_heads_identity(tiny.wrap(tiny.build_base(name)))
        self._heads = {"identity": copy.deepcopy(self.wrapped.decoding_adapter.state_dict())}
        self._heads["random"] = copy.deepcopy(tiny.randomise_heads(self.wrapped).decoding_adapter.state_dict())

    def with_heads(self, heads: str) -> AutoDecoForCausalLM:
        self.wrapped.decoding_adapter.load_state_dict(self._heads[heads])
        return self.wrapped


family_of_name = functools.cache(Family)


class Record(LogitsProcessor):
    """Behind every constraint and in front of the adapter: keeps what the adapter is about to warp."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids.clone(), scores.clone()))
        return scores


class Ear:
    """Keeps the last position of what enters the output embedding, forward pass by forward pass."""

    def __init__(self, model: AutoDecoForCausalLM) -> None:
        self.heard: list[torch.Tensor] = []
        self._handle = model.get_output_embeddings().register_forward_pre_hook(self._hear)

    def _hear(self, layer, args):
        self.heard.append(args[0][:, -1].clone())

    def remove(self) -> None:
        self._handle.remove()


def settings_of(mode: Mode, **more: Any) -> Settings:
    usual = {"input_ids": prompts(2, 5), "max_new_tokens": STEPS, **DICT, **ENDLESS}
    return {**usual, **more, **mode.settings()}


def run(mode: Mode, model: Any, settings: Settings) -> Ran:
    torch.default_generator.manual_seed(0)  # `torch.manual_seed` also notes a stack trace for each GPU to come
    return mode.run(model, settings)


def outcome(mode: Mode, model: Any, settings: Settings) -> Ran | Exception:
    try:
        return run(mode, model, settings)
    except Exception as error:
        return error


# --- the same, to the bit ---------------------------------------------------------------------------------------------


def parts_of(value: Any) -> Any:
    """A value as tensors, numbers and strings in tuples and dicts; of a cache what its layers hold."""
    if isinstance(value, Cache):
        return {"layers": tuple(parts_of(vars(layer)) for layer in value.layers)}
    if isinstance(value, torch.Tensor):
        return value.dequantize() if type(value) is not torch.Tensor else value
    if isinstance(value, ModelOutput | dict):
        return {name: parts_of(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return tuple(parts_of(part) for part in value)
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__


def assert_same(found: Any, expected: Any, tolerance: float, where: str = "") -> None:
    assert type(found) is type(expected), where
    if isinstance(found, dict):
        assert set(found) == set(expected), where
        for name in found:
            assert_same(found[name], expected[name], tolerance, f"{where}.{name}")
    elif isinstance(found, tuple):
        assert len(found) == len(expected), where
        for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert_same(ours, theirs, tolerance, f"{where}[{index}]")
    elif not isinstance(found, torch.Tensor):
        assert found == expected, where
    elif tolerance and found.is_floating_point():
        assert torch.equal(found == NEVER, expected == NEVER), where
        assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance), where
    else:
        assert torch.equal(found, expected), where


# --- the slow truth ---------------------------------------------------------------------------------------------------


def forced(
    model: AutoDecoForCausalLM, sequences: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and logits of whole sequences, all at once and without a cache."""
    mask = settings.get("attention_mask")
    if mask is None:
        return tiny.hidden_and_logits(model, sequences)
    new = sequences.shape[1] - mask.shape[1]
    # As generate counts: padding is at 0, and what is generated counts on from the prompt's last place, padded or not.
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    positions = torch.cat([positions, positions[:, -1:] + torch.arange(1, new + 1)], dim=1)
    inputs = {"attention_mask": torch.cat([mask, mask.new_ones(len(mask), new)], dim=1), "position_ids": positions}
    takes = inspect.signature(model.forward).parameters
    return tiny.hidden_and_logits(model, sequences, **{name: value for name, value in inputs.items() if name in takes})


def alone(model: AutoDecoForCausalLM, sequences: torch.Tensor, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """As `forced`, each row without its padding on the left; only the last steps are there to be read."""
    rows = []
    for row, mask in zip(sequences, settings["attention_mask"], strict=True):
        rows.append(tiny.hidden_and_logits(model, row[None, int((mask == 0).sum()) :]))
    return tuple(torch.cat([part[:, -STEPS:] for part in parts]) for parts in zip(*rows, strict=True))


def warp_by_hand(scores, temperature, top_p, top_k=0, min_p=0.0):
    """Scores `[N, V]` warped in double precision, and which tokens lie within rounding of the nucleus' edge."""
    warped = scores.double() / temperature.double()[:, None]
    if top_k:
        warped[warped < warped.topk(top_k).values[:, -1:]] = NEVER
    probabilities, order = warped.softmax(-1).sort(descending=True)
    ahead = (probabilities.cumsum(-1) - probabilities).gather(1, order.argsort(1))
    edge = torch.where(top_p < 1, top_p.double(), torch.inf)[:, None]
    last = warped.masked_fill(ahead >= edge, torch.inf).amin(-1, keepdim=True)
    doubtful = ((ahead - edge).abs() < 1e-4) | ((warped == last) & ((warped == last).sum(-1, keepdim=True) > 1))
    warped[(ahead >= edge) & (ahead > 0)] = NEVER
    if min_p:
        warped[warped < warped.amax(-1, keepdim=True) + torch.tensor(min_p).log()] = NEVER
    return warped.float(), doubtful


def through(processors, seen, scores: torch.Tensor) -> torch.Tensor:
    """Scores `[R, S, V]` through processors, step by step."""
    steps = []
    for step, (input_ids, _) in enumerate(seen):
        after = scores[:, step]
        for processor in processors:
            after = processor(input_ids, after)
        steps.append(after)
    return torch.stack(steps, dim=1)


def takes_by_ear(mode: Mode, model: AutoDecoForCausalLM) -> bool:
    return mode.truth == "heard" or modes.family_of(model) in mode.heard


def assert_acted(mode: Mode, model, settings: Settings, ran: Ran, record: Record, ear: Ear | None) -> None:
    """Each step's scores are those that came to the adapter, warped by the T and P of that very position."""
    found = ran.output
    steps = len(found.scores)
    assert steps > 0
    sequences = found.sequences
    if mode.name == "embeddings":
        sequences = torch.cat([settings["input_ids"], sequences], dim=1)
    if ear is not None:
        hidden, logits = torch.stack(ear.heard[-steps:], dim=1), torch.stack(found.logits, dim=1)
    else:
        hidden, logits = (alone if mode.truth == "alone" else forced)(model, sequences[:, :-1], settings)
        hidden, logits = hidden[:, -steps:], logits[:, -steps:]
    assert torch.allclose(torch.stack(found.logits, dim=1), logits, rtol=1e-3, atol=1e-3)
    if len(record.seen) < steps or mode.row == modes.ASSISTED:  # a draft asks the processors too
        before, seen = logits, [(sequences[:, : sequences.shape[1] - steps + step], None) for step in range(steps)]
    else:
        seen = record.seen[-steps:]
        before = torch.stack([scores for _, scores in seen], dim=1)
    before = through(mode.between(), seen, before)
    fixed = {name: settings[name] for name in PLAIN if name != "do_sample" and name in settings}
    temperature, top_p = tiny.heads_by_hand(model.decoding_adapter, hidden.flatten(0, 1))
    temperature = torch.full_like(temperature, fixed.pop("temperature")) if "temperature" in fixed else temperature
    top_p = torch.full_like(top_p, fixed.pop("top_p")) if "top_p" in fixed else top_p
    min_p = {"min_p": settings["min_p"]} if "min_p" in settings else {}
    warped, doubtful = warp_by_hand(before.flatten(0, 1), temperature, top_p, **fixed, **min_p)
    expected = through(mode.behind(), seen, warped.view_as(before))
    got = torch.stack(found.scores, dim=1)
    doubtful = doubtful.view_as(got)
    assert torch.equal((got == NEVER) & ~doubtful, (expected == NEVER) & ~doubtful)
    both = torch.isfinite(got) & torch.isfinite(expected)
    assert torch.allclose(got[both], expected[both], rtol=2e-3, atol=2e-3)
    assert not (torch.isfinite(got) & (before == NEVER)).any()
    untouched = through(mode.behind(), seen, before)
    assert not torch.allclose(got, untouched, rtol=1e-2, atol=1e-2), "an adapter that does nothing would pass"
    assert_traced(found, temperature.view(-1, steps), top_p.view(-1, steps))


def assert_traced(found, temperature: torch.Tensor, top_p: torch.Tensor) -> None:
    for values, name in ((temperature, "temperature"), (top_p, "top_p")):
        traced = getattr(found.decoding_trace, name)
        assert traced.shape == values.shape
        assert torch.isfinite(traced[:, 0]).all()
        going = torch.isfinite(traced)
        assert torch.allclose(traced[going], values[going], rtol=1e-3, atol=1e-3)


def assert_extra(mode: Mode, model: AutoDecoForCausalLM, settings: Settings, ran: Ran) -> None:
    """What a run gave besides `generate`'s output."""
    if mode.row == modes.STREAMERS:
        assert ran.extra == modes.tokenizer().decode(ran.output.sequences[0])
    elif mode.name == "transition scores":
        tokens = ran.output.sequences[:, -len(ran.output.scores) :, None]
        by_hand = torch.stack(ran.output.scores, dim=1).log_softmax(-1).gather(-1, tokens)[..., 0]
        assert torch.isfinite(by_hand).all()
        assert torch.allclose(ran.extra, by_hand, atol=1e-5)
    elif mode.run is modes.compiled:
        assert ran.extra == {"graphs": 0, "breaks": 0}, "the second call is compiled code too"
    elif mode.name == "generate_batch":
        assert_batch_acted(model, settings, ran)
    elif mode.name == "paged cache":
        plain = next(mode for mode in MODES if mode.name == "generate_batch")
        tokens = run(plain, model, settings_of(plain)).output
        assert ran.output[0, :, 5:].tolist() == tokens


def assert_batch_acted(model: AutoDecoForCausalLM, settings: Settings, ran: Ran) -> None:
    """The log-probabilities of each request's tokens are those of the warped distribution."""
    for prompt, tokens, found in zip(settings["input_ids"], ran.output, ran.extra, strict=True):
        sequence = torch.cat([prompt, torch.tensor(tokens)])[None]
        hidden, logits = (part[0, -len(tokens) :] for part in tiny.hidden_and_logits(model, sequence[:, :-1]))
        warped, _ = warp_by_hand(logits, *tiny.heads_by_hand(model.decoding_adapter, hidden))
        expected = warped.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(found), expected, atol=1e-2)


# --- the matrix -------------------------------------------------------------------------------------------------------


def assert_refused(mode: Mode, family: Family, expected: Ran | Exception) -> None:
    for heads in ("identity", "random"):
        with pytest.raises(UnsupportedGenerationError, match=mode.phrase):
            run(mode, family.with_heads(heads), settings_of(mode))
    with family.wrapped.disable_adapter():
        found = outcome(mode, family.wrapped, settings_of(mode))
    if isinstance(expected, Exception):
        assert type(found) is type(expected)
    else:
        assert_same(parts_of(found.output), parts_of(expected.output), mode.tolerance)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_a_mode_on_a_family(mode, family, request):
    for kind, fixture in ((modes.COMPILED, "compiler"), (modes.BATCHING, "light_collections")):
        if mode.row == kind:
            request.getfixturevalue(fixture)
    name, family = family, family_of_name(family)
    off = PLAIN if mode.expected == "same" else {}
    expected = outcome(mode, family.base, settings_of(mode, **off))
    if mode.expected == "refused":
        assert_refused(mode, family, expected)
        return
    if isinstance(expected, Exception):
        if name not in mode.cannot and mode.is_there():
            raise expected
        for heads in ("identity", "random"):
            found = outcome(mode, family.with_heads(heads), settings_of(mode))
            assert type(found) is type(expected), found
        return
    assert name not in mode.cannot or transformers.__version__ != modes.TRANSFORMERS, "transformers can do this"
    heads = "identity" if mode.expected == "same" else "random"
    found = run(mode, family.with_heads(heads), settings_of(mode))
    assert_same(parts_of(found.output), parts_of(expected.output), mode.tolerance, "output")
    assert_same(parts_of(found.extra), parts_of(expected.extra), mode.tolerance, "extra")
    if mode.expected == "same":
        check_that_it_acts(mode, family.with_heads("random"))


def check_that_it_acts(mode: Mode, model: AutoDecoForCausalLM) -> None:
    record = Record()
    ear = Ear(model) if takes_by_ear(mode, model) else None
    settings = settings_of(mode)
    if mode.truth != "none":
        settings["logits_processor"] = [*settings.get("logits_processor", []), record]
        settings["output_decoding_trace"] = True
    try:
        ran = run(mode, model, dict(settings))
    finally:
        if ear is not None:
            ear.remove()
    if mode.truth != "none":
        assert_acted(mode, model, settings, ran, record, ear)
    assert_extra(mode, model, settings, ran)


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_the_base_takes_as_many_graphs_as_the_matrix_says(name, compiler):
    base = tiny.build_base(name).requires_grad_(False)
    static = {"cache_implementation": "static", "compile_config": modes.compile_config()}
    for sampled in (False, True, True):
        base.generate(prompts(2, 5), max_new_tokens=STEPS, do_sample=sampled, **static, **ENDLESS)
    assert counters["stats"]["unique_graphs"] == modes.graphs_of(name)
    assert not counters["graph_break"]


def test_a_forward_pass_compiled_by_hand_is_heard_and_leaves_nothing_behind(compiler):
    model = tiny.randomise_heads(tiny.wrap())
    settings = {"max_new_tokens": STEPS, "output_decoding_trace": True, **DICT, **ENDLESS}
    expected = tiny.sample(model, prompts(2, 5), **settings)
    by_hand = torch.compile(model, backend="eager")
    with torch.no_grad():
        by_hand(prompts(2, 9, seed=3))
    found = tiny.sample(model, prompts(2, 5), **settings)
    assert torch.equal(found.decoding_trace.temperature, expected.decoding_trace.temperature)
    model.forward = torch.compile(model.forward, backend="eager")
    for seed in (1, 0):
        found = tiny.sample(model, prompts(2, 5), seed=seed, cache_implementation="static", **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.allclose(found.decoding_trace.temperature, expected.decoding_trace.temperature, atol=1e-4)


def test_every_family_has_its_name_in_the_table():
    assert set(modes.NAMES) == set(ALL_FAMILIES)
    assert set(modes.DIFFERS) == {mode.row for mode in MODES}


def test_the_readmes_table_is_that_of_the_matrix():
    text = README.read_text(encoding="utf-8")
    if modes.BEGIN not in text:
        pytest.skip("the README has no table of modes")
    shown = text.partition(modes.BEGIN)[2].partition(modes.END)[0]
    assert shown.strip() == modes.readme_table().strip()
