"""The token table: against a loop that reads one token at a time, on every family, whatever the batch and padding."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from hf_adaptive_decode.engines.base import Completion
from hf_adaptive_decode.engines.transformers import complete
from hf_adaptive_decode.evaluation.tokens import token_table

MEASURED = ("entropy", "probability", "top_probabilities")


class Numbers:
    """A tokenizer whose texts are the ids themselves, written out."""

    pad_token_id = tiny.PAD

    def __call__(self, text: str) -> dict:
        return {"input_ids": [int(word) for word in text.split()]}

    def batch_decode(self, rows, skip_special_tokens=True) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


def ragged(seed: int = 0) -> tuple[list[str], list[list[Completion]]]:
    """Five prompts of 1 to 9 tokens with 0 to 3 completions of 0 to 12 tokens, nothing recorded."""
    draw = np.random.default_rng(seed)
    write = lambda length: draw.integers(3, tiny.VOCABULARY, length).tolist()  # noqa: E731
    prompts = [" ".join(map(str, write(length))) for length in (1, 4, 9, 2, 6)]
    groups = [[12, 3], [], [1, 7, 0], [5], [0]]
    return prompts, [[Completion("", tuple(write(length)), True) for length in group] for group in groups]


@torch.no_grad()
def naive(model, prompts, completions, top):
    """Each token by a forward pass of its own over what precedes it, unpadded, in double precision."""
    rows = []
    for problem, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        for sample, one in enumerate(group):
            text = [int(word) for word in prompt.split()]
            for position, token in enumerate(one.token_ids):
                logits = model(torch.tensor([text]), use_cache=False).logits[0, -1].double()
                p = (logits - logits.logsumexp(0)).exp()
                best = p.sort(descending=True)
                entropy = -sum(float(x) * np.log(float(x)) for x in p if x > 0)
                where = (problem, sample, position, token)
                rows.append((where, entropy, float(p[token]), best.indices[:top].tolist(), best.values[:top].tolist()))
                text.append(token)
    return rows


@pytest.mark.parametrize("batch_rows", [1, 3, 64])
def test_the_table_is_that_of_a_loop_over_single_tokens(family, batch_rows):
    model = tiny.build_base(family)
    prompts, completions = ragged()
    table = token_table(model, Numbers(), prompts, completions, top=3, batch_rows=batch_rows)
    truth = naive(model, prompts, completions, top=3)
    assert len(table) == len(truth) == 28
    found = zip(table.problem, table.sample, table.position, table.token_id, strict=True)
    assert [tuple(map(int, row)) for row in found] == [row[0] for row in truth]
    np.testing.assert_allclose(table.entropy, [row[1] for row in truth], rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(table.probability, [row[2] for row in truth], rtol=2e-3, atol=1e-6)
    assert table.top_ids.tolist() == [row[3] for row in truth]
    np.testing.assert_allclose(table.top_probabilities, [row[4] for row in truth], rtol=2e-3, atol=1e-6)


def test_columns_have_the_types_they_promise():
    prompts, completions = ragged()
    table = token_table(tiny.build_base(), Numbers(), prompts, completions, top=4)
    whole, real = (
        ("problem", "sample", "position", "token_id", "action", "top_ids"),
        ("temperature", "top_p", *MEASURED),
    )
    assert all(vars(table)[name].dtype == np.int64 for name in whole)
    assert all(vars(table)[name].dtype == np.float32 for name in real)
    assert table.top_ids.shape == table.top_probabilities.shape == (28, 4)
    assert np.isnan(table.temperature).all()
    assert np.isnan(table.top_p).all()
    assert (table.action == -1).all()


def test_what_the_engine_recorded_lands_in_its_own_row(model):
    prompts = ["5 6 7", "8"]
    completions = complete(model, Numbers(), prompts, samples=3, token_budget=[6, 9], seed=2)
    table = token_table(model, Numbers(), prompts, completions)
    for problem, group in enumerate(completions):
        for sample, one in enumerate(group):
            own = table.select((table.problem == problem) & (table.sample == sample))
            assert own.token_id.tolist() == list(one.token_ids)
            np.testing.assert_array_equal(own.temperature, one.temperature)
            np.testing.assert_array_equal(own.top_p, one.top_p)
    assert table.temperature.std() > 0.05


def test_actions_are_kept_and_masked_ones_are_minus_one(base):
    actions = [{"temperature": 0.5}, {"temperature": 1.25}]
    model = tiny.wrap(base, policy="token_actions", actions=actions, max_prob_mask=0.5)
    completions = complete(model, Numbers(), ["5 6 7"], samples=8, token_budget=12)
    table = token_table(model, Numbers(), ["5 6 7"], completions)
    assert set(table.action.tolist()) == {-1, 0, 1}
    sure = table.top_probabilities[:, 0] > 0.5
    assert ((table.action == -1) == sure).all()
    assert (table.temperature[sure] == 0).all()


def test_the_logits_of_one_batch_never_exist_at_once(monkeypatch):
    from hf_adaptive_decode.evaluation import tokens

    monkeypatch.setattr(tokens, "_CHUNK", 5)
    model = tiny.build_base()
    prompts, completions = ragged()
    whole, sizes = token_table(model, Numbers(), prompts, completions), []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: sizes.append(out.shape[:-1].numel()))
    chunked = token_table(model, Numbers(), prompts, completions)
    assert max(sizes) <= 6  # the chunk, or the last position of each of the 6 completions with tokens
    for name, column in vars(whole).items():
        np.testing.assert_array_equal(column, vars(chunked)[name])


def test_top_is_cut_to_the_vocabulary_and_no_completion_gives_no_row():
    model = tiny.build_base()
    table = token_table(model, Numbers(), ["5"], [[Completion("", (), False)]], top=1000)
    assert len(table) == 0
    assert table.top_ids.shape == (0, tiny.VOCABULARY)


def test_a_token_of_no_probability_does_not_make_the_entropy_nan(base):
    head = base.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(tiny.VOCABULARY))
    with torch.no_grad():
        head.bias[7] = -200.0  # its probability underflows to 0, and 0 log 0 is NaN if written as it stands
    table = token_table(base, Numbers(), ["5 6"], [[Completion("", (8, 9), False)]])
    assert np.isfinite(table.entropy).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completions": []}, "1 prompts and 0 groups"),
        ({"top": 0}, "`top` is 0"),
        ({"batch_rows": 0}, "`batch_rows` is 0"),
        ({"prompts": [""]}, "is empty"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    given = {"prompts": ["5"], "completions": [[Completion("", (6,), False)]], **change}
    how = {name: given.pop(name) for name in ("top", "batch_rows") if name in given}
    with pytest.raises(ValueError, match=message):
        token_table(tiny.build_base(), Numbers(), **given, **how)
