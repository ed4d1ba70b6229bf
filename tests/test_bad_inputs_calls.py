"""What `generate` does with each kind of adapter when budgets, prompts, the vocabulary or the caller go wrong."""

from __future__ import annotations

import logging
import math
import warnings

import pytest
import tiny
import torch
from adapter_kinds import ENDLESS, KINDS, TRACED, Change, Script, build
from test_batching import batching, settings
from test_training import build_tokenizer
from tiny import EOS, PAD, VOCABULARY, counted_forwards, hooks_left, left_padded, prompts, sample
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hf_adaptive_decode import AdaptiveSamplerLogitsProcessor, AutoDecoConfig, AutoDecoForCausalLM, Budget
from hf_adaptive_decode.capture import current_call
from hf_adaptive_decode.engines.transformers import complete
from hf_adaptive_decode.errors import BudgetError, LogitsError


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, -1, True, math.nan, [1, 2], Budget(samples=0)], ids=str)
def test_a_bad_budget_is_refused_before_the_model_runs_whatever_decides(kind, budget):
    model = build(kind)
    with counted_forwards(model) as calls, pytest.raises(BudgetError):
        model.generate(prompts(3), budget=budget)
    assert not calls
    assert hooks_left(model) == 0


@pytest.mark.parametrize("budget", [0, -1, True, math.nan, "4", [1, 2], Budget()], ids=str)
def test_a_processor_refuses_a_bad_budget_and_leaves_no_hook(folder, base, budget):
    with pytest.raises(BudgetError):
        AdaptiveSamplerLogitsProcessor.from_pretrained(folder, base, budget=budget)
    assert hooks_left(base) == 0


@pytest.mark.parametrize("kind", ["token actions", "sequence actions"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_budget_that_nobody_trained_for_warns_once_and_is_the_largest_to_the_policy(kind, mixed):
    model = build(kind, deterministic=True)
    names = {"adapter_names": ["default", "default", "__base__"]} if mixed else {}
    settings = {**names, **TRACED, **ENDLESS}
    with pytest.warns(UserWarning, match=r"40 tokens is beyond the policy's largest, 32") as caught:
        beyond = sample(model, prompts(), budget=40, **settings)
    assert len([one for one in caught if "largest" in str(one.message)]) == 1
    assert beyond.sequences.shape == (3, 45)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.generate(prompts(), budget=36, **settings)
        # `max_new_tokens` still caps, so that there is nothing to warn of.
        fresh = build(kind, deterministic=True)
        assert fresh.generate(prompts(), budget=10**9, max_new_tokens=2, **names, **ENDLESS).shape == (3, 7)
        exactly = sample(fresh, prompts(), budget=32, **settings)
    # Beyond the largest it decides as at the largest.
    assert torch.equal(beyond.decoding_trace.action[:, 0], exactly.decoding_trace.action[:, 0])


def test_more_samples_than_anybody_trained_for_warn_too():
    with pytest.warns(UserWarning, match="16 samples is beyond the policy's largest, 8"):
        many = build("sequence actions").generate(prompts(1), budget=Budget(tokens=1, samples=16), **ENDLESS)
    assert many.shape == (16, 6)


@pytest.mark.parametrize("budget", [10**9, 2**31 - 1])
def test_a_huge_budget_is_no_reason_to_warn_for_who_knows_none(model, budget):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert model.generate(prompts(), budget=budget, max_new_tokens=2, eos_token_id=None).shape == (3, 7)


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_a_prompt_of_padding_alone_is_refused(kind):
    ids, mask = left_padded([prompts(1, 5)[0], prompts(1, 3)[0]])
    mask[1] = 0
    model = build(kind)
    with counted_forwards(model) as calls, pytest.raises(BudgetError, match=r"row 1 .*empty"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)
    assert not calls
    with model.disable_adapter():  # the base's own answer to it is the base's own
        assert model.generate(ids, attention_mask=mask, max_new_tokens=2).shape == (2, 7)


@pytest.mark.parametrize("inputs", [[], [[]], [[5, 6], []]], ids=str)
def test_an_empty_prompt_is_refused_in_continuous_batches(model, inputs):
    with counted_forwards(model) as calls, pytest.raises(ValueError, match="empty"):
        model.generate_batch(inputs, settings(), batching(), warmup=False)
    assert not calls


@pytest.mark.parametrize("texts", [["w1 w2", ""], [""], ["w1", [{"role": "user", "content": "w2"}]]], ids=str)
def test_an_empty_prompt_is_refused_by_the_engine(model, texts):
    with counted_forwards(model) as calls, pytest.raises(BudgetError, match="empty"):
        complete(model, build_tokenizer("{{ '' }}"), texts, token_budget=2)
    assert not calls


class Listened(logging.Handler):
    def __init__(self):
        super().__init__()
        self.said: list[str] = []

    def emit(self, record):
        self.said.append(record.getMessage())


@pytest.fixture
def transformers_says():
    """What transformers logs as a warning."""
    logger, handler = logging.getLogger("transformers"), Listened()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    yield handler.said
    logger.setLevel(level)
    logger.removeHandler(handler)


def test_without_a_pad_token_rows_are_filled_with_eos_and_nothing_is_changed(transformers_says):
    """That is transformers' own way, and an adapter changes nothing of it."""
    base = tiny.build_base()
    base.generation_config.pad_token_id = base.config.pad_token_id = None
    with torch.no_grad():  # a row ends early
        base.get_output_embeddings().weight[EOS] = base.get_output_embeddings().weight[7] * 1.5
    model = tiny.make_heads_identity(tiny.wrap(base))
    before = model.generation_config.to_dict()
    found = sample(model, prompts(8), max_new_tokens=12)
    ended = (found[:, 5:] == EOS).int().argmax(-1)[(found[:, 5:] == EOS).any(-1)]
    assert len(ended) > 1
    for row in found[(found[:, 5:] == EOS).any(-1)]:
        first = int((row[5:] == EOS).int().argmax())
        assert (row[5 + first :] == EOS).all()
    assert any("pad token id were not set" in said for said in transformers_says)
    assert model.generation_config.to_dict() == before
    assert model.config.pad_token_id is None
    with model.disable_adapter():
        plain = sample(model, prompts(8), max_new_tokens=12, do_sample=True, top_k=0)
    assert torch.equal(found, plain)


def test_padding_on_the_right_is_warned_of(model, transformers_says):
    ids, mask = left_padded([prompts(1, 5)[0], prompts(1, 3)[0]])
    model.generate(ids, attention_mask=mask, max_new_tokens=1)
    assert not any("right-padding" in said for said in transformers_says)
    model.generate(ids.flip(1), attention_mask=mask.flip(1), max_new_tokens=1)
    assert any("right-padding" in said and "padding_side='left'" in said for said in transformers_says)


@pytest.mark.parametrize("kind", ["token actions", "sequence actions by the mean", "heads"])
def test_a_tokenizer_without_a_pad_token_that_pads_on_the_right_is_served_and_left_as_it_is(kind):
    texts = ["w1 w2 w3 w4", "w5", "w6 w7"]
    found = []
    for side, pad in (("left", "<pad>"), ("right", None)):
        base = tiny.build_base()
        base.generation_config.pad_token_id = PAD if pad else None
        tokenizer = build_tokenizer()
        tokenizer.padding_side, tokenizer.pad_token = side, pad
        found.append(
            [[c.token_ids for c in one] for one in complete(build(kind, base), tokenizer, texts, token_budget=6)]
        )
        assert (tokenizer.padding_side, tokenizer.pad_token) == (side, pad)
    assert found[0] == found[1]


# --- what interrupts a call -------------------------------------------------------------------------------------------


class Leaves(BaseStreamer):
    def __init__(self):
        self.left = 2

    def put(self, value):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("the listener went away")

    def end(self):
        pass


class Interrupts(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] == 8:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("how", ["streamer", "ctrl-c", "broken logits"])
def test_after_an_interrupted_call_the_next_one_is_right_whatever_decides(kind, how):
    model = build(kind)
    settings = {"budget": 6, **ENDLESS}
    expected = sample(model, prompts(1), **settings, **TRACED)
    interruption, error = {
        "streamer": ({"streamer": Leaves()}, RuntimeError),
        "ctrl-c": ({"stopping_criteria": StoppingCriteriaList([Interrupts()])}, KeyboardInterrupt),
        "broken logits": ({"logits_processor": [Change(math.nan, length=7)]}, (LogitsError, IndexError)),
    }[how]
    with pytest.raises(error):
        sample(model, prompts(1), **settings, **interruption)
    assert hooks_left(model) == 0
    assert current_call() is None
    found = sample(model, prompts(1), **settings, **TRACED)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.decoding_trace.temperature, expected.decoding_trace.temperature)


@pytest.mark.parametrize("kind", ["sequence actions", "a mixture per sequence", "token actions"])
@pytest.mark.parametrize("rows", [3, 2])
def test_a_bare_processor_whose_call_was_interrupted_begins_anew(kind, rows, tmp_path):
    """Even if the next prompt is as long as the interrupted text would have been at its next step."""
    build(kind, deterministic="actions" in kind).save_pretrained(tmp_path)
    settings = {"max_new_tokens": 6, "do_sample": True, "top_k": 0, **ENDLESS}

    def processor_on(base):
        return AdaptiveSamplerLogitsProcessor.from_pretrained(tmp_path, base, budget=Budget(tokens=6, samples=1))

    base = tiny.build_base()
    fresh = processor_on(base)
    expected = sample(base, prompts(rows, 8, seed=5), logits_processor=[fresh], **settings)
    fresh.close()
    used = processor_on(base)
    with pytest.raises(KeyboardInterrupt):
        sample(
            base,
            prompts(3, 5, seed=3),
            logits_processor=[used],
            stopping_criteria=StoppingCriteriaList([Interrupts()]),
            **settings,
        )
    found = sample(base, prompts(rows, 8, seed=5), logits_processor=[used], **settings)
    assert torch.equal(found, expected)


def test_blocks_without_the_adapter_may_overlap(model):
    """As those of two threads do, of which the first to begin is the first to end."""
    greedy = {"max_new_tokens": 4, **ENDLESS}
    base = model.generate(prompts(), do_sample=False, **greedy)
    one, other = model.disable_adapter(), model.disable_adapter()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert torch.equal(model.generate(prompts(), **greedy), base)
    other.__exit__(None, None, None)
    assert model.generate(prompts(), **greedy, **TRACED).decoding_trace.temperature.shape == (3, 4)


# --- the order of rows ------------------------------------------------------------------------------------------------

DETERMINISTIC = [kind for kind in KINDS if "mixture" not in kind]
# With one token left there is nothing for them to read.
READS_LOGITS = ["heads with statistics", "heads as released", "masked token actions", "edt", "dynatemp"]


@pytest.mark.parametrize("kind", DETERMINISTIC)
@pytest.mark.parametrize("budget", [5, [24, 2, 9, 17]], ids=str)
def test_the_order_of_rows_changes_no_rows_parameters_whatever_decides(kind, budget):
    """Nor do the other rows' budgets. What a mixture draws is drawn by place, as the base's own tokens are."""
    model = build(kind, **({"deterministic": True} if "actions" in kind else {}))
    ids, mask = left_padded([prompts(1, length, seed=length)[0] for length in (5, 9, 3, 6)])
    script = prompts(4, 5, seed=9)
    order = [2, 0, 3, 1]

    def trace(rows):
        own = [budget[row] for row in rows] if isinstance(budget, list) else budget
        how = {"logits_processor": [Script(script[rows], ids.shape[1])]}
        how = {"max_new_tokens": 1} if kind in READS_LOGITS else how
        found = model.generate(ids[rows], attention_mask=mask[rows], budget=own, **how, **TRACED, **ENDLESS)
        return found.decoding_trace

    first, second = trace([0, 1, 2, 3]), trace(order)
    for name in ("temperature", "top_p", "action"):
        one, other = getattr(first, name), getattr(second, name)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one[order].float(), other.float(), rtol=0, atol=1e-5, equal_nan=True)
    if "static" not in kind:  # they differ from row to row, or the order could not be told
        shown = first.temperature if first.action is None else first.action
        assert len({tuple(row) for row in shown[:, :2].tolist()}) > 1, shown


# --- a vocabulary that is resized under an adapter --------------------------------------------------------------------


@pytest.mark.parametrize("rows", [VOCABULARY + 8, VOCABULARY - 8])
def test_a_resized_vocabulary_is_the_adapters_too(kind, rows, tmp_path):
    model = build(kind)
    was = model.decoding_config.base_fingerprint
    model.resize_token_embeddings(rows)
    assert model.decoding_config.vocab_size == rows
    assert model.decoding_config.base_fingerprint != was
    assert not any(p.requires_grad for name, p in model.named_parameters() if "decoding_adapters" not in name)
    found = sample(model, prompts().clamp(max=rows - 1), budget=3, **TRACED, **ENDLESS)
    assert found.scores[0].shape == (3, rows)
    assert torch.isfinite(found.decoding_trace.temperature).all()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        other = tiny.build_base()
        other.resize_token_embeddings(rows)
        AutoDecoForCausalLM.from_pretrained(tmp_path, base_model=other)
    with pytest.raises(ValueError, match=rf"vocab_size {rows}.*{VOCABULARY}"):
        AutoDecoForCausalLM.from_pretrained(tmp_path, base_model=tiny.build_base())


def test_resizing_to_the_same_size_changes_nothing(model):
    before = model.decoding_config.to_dict()
    expected = sample(model, prompts(), max_new_tokens=4)
    model.resize_token_embeddings(VOCABULARY)
    assert model.decoding_config.to_dict() == before
    assert torch.equal(sample(model, prompts(), max_new_tokens=4), expected)


def test_an_adapter_of_another_base_stays_that_of_another_base(folder):
    """The warning of the load is not lost by resizing."""
    with pytest.warns(UserWarning, match="other settings"):
        model = AutoDecoForCausalLM.from_pretrained(folder, base_model=tiny.build_base("llama"))
    before = model.decoding_config.base_fingerprint
    model.resize_token_embeddings(VOCABULARY + 8)
    assert model.decoding_config.base_fingerprint == before
    assert model.decoding_config.vocab_size == VOCABULARY + 8


def test_every_adapter_learns_of_a_resized_vocabulary(model):
    model.add_adapter("other", AutoDecoConfig(**KINDS["edt"]))
    model.resize_token_embeddings(VOCABULARY + 8)
    assert {config.vocab_size for config in model.decoding_configs.values()} == {VOCABULARY + 8}
    assert model.generate(prompts(2), adapter_names=["default", "other"], max_new_tokens=2).shape == (2, 7)
