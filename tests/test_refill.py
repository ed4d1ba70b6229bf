"""Rows that take the places of those that end: the same results as one loop for all, and a batch that stays full."""

from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from test_rollout import (
    CONSTRAINTS,
    ENDS,
    GREEDY,
    POLICIES,
    PROMPTS,
    assert_same,
    decoded_rows,
    generated,
    poisoned,
    policy_of,
    prompts_of,
    rows_of,
)

from hf_adaptive_decode.engines.rollout import decode, decode_finished
from hf_adaptive_decode.engines.transformers import TransformersEngine
from hf_adaptive_decode.errors import LogitsError
from hf_adaptive_decode.randomness import row_key, row_uniforms
from hf_adaptive_decode.testbed import build_problems, load_base_model, load_tokenizer

# Beyond their sliding windows, which are 16 wide; the last three keep a state that is no keys and values.
FAMILIES = [*tiny.FAMILIES, "mistral", "gemma3", "gpt_neox", "mamba", "qwen3_next", "zamba2"]
STATEFUL = FAMILIES[-3:]
LONG = prompts_of(5, 11, 2, 30)
BUDGETS = [3, 18, 1, 9, 26, 2]


def plain(base, policy, rows, ends=ENDS, **how):
    """All rows at once, none of which leaves before the last has ended."""
    return decode(base, policy, rows, ends=ends, pad=0, drops_ended=False, **how)


class Heard:
    """The shapes of a model's inputs, forward pass by forward pass: rows, new columns, all columns."""

    def __init__(self, model):
        self.calls = []
        self.handle = model.register_forward_pre_hook(self.hear, with_kwargs=True)

    def hear(self, module, args, kwargs):
        self.calls.append((*kwargs["input_ids"].shape, kwargs["attention_mask"].shape[1]))

    def __enter__(self):
        return self.calls

    def __exit__(self, *error):
        self.handle.remove()


# --- the same results -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decodes_as_in_one_batch(family):
    base = tiny.build_base(family)
    policy = policy_of(base, **POLICIES["token"])
    rows = rows_of(LONG, per=3, budget=BUDGETS * 2, samples=3)
    for records in ("decisions", "parameters"):
        expected = plain(base, policy, rows, records=records)
        found = decode(base, policy, rows, ends=ENDS, pad=0, records=records, batch_rows=4, patience=0.5)
        assert_same(found, expected)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "mistral", "qwen3_next"])
def test_every_family_is_greedy_as_generate_is_alone(family):
    base = tiny.build_base(family)
    rows = rows_of(LONG, budget=[26, 4, 18, 9])
    found = decode(base, GREEDY, rows, ends=ENDS, pad=0, batch_rows=2, patience=0)
    for row, budget in enumerate(rows.token_budget.tolist()):
        assert decoded_rows(found)[row] == generated(base, LONG[row], budget, ENDS)


@pytest.mark.parametrize("name", POLICIES)
@examples(max_examples=6)
@given(data=st.data())
def test_neither_the_places_nor_the_order_nor_the_patience_matter(name, data):
    base = tiny.build_base()
    policy = policy_of(base, **POLICIES[name])
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    per = data.draw(st.integers(1, 4))
    count = per * len(lengths)
    budgets = data.draw(st.lists(st.sampled_from([1, 2, 5, 24]), min_size=count, max_size=count))
    order = torch.tensor(data.draw(st.permutations(range(count))))
    rows = rows_of(prompts_of(*lengths), per=per, budget=budgets, samples=per).select(order)
    places = {
        "batch_rows": data.draw(st.integers(1, count + 1)),
        "patience": data.draw(st.sampled_from([0, 0.3, 1, 4, 1e9])),
    }
    for records in ("parameters", "decisions"):
        found = decode(base, policy, rows, ends=ENDS, pad=0, records=records, **places)
        assert_same(found, plain(base, policy, rows, records=records))


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")  # of `generate`, for the shortest budgets
@pytest.mark.parametrize(
    "constraint", [*CONSTRAINTS, {"min_length": 20}], ids=lambda constraint: next(iter(constraint))
)
def test_constraints_act_on_each_row_as_if_it_were_alone(constraint, base):
    ends = set(range(2, 50))
    for name, value in constraint.items():
        setattr(base.generation_config, name, value)
    base.generation_config.eos_token_id = sorted(ends)
    rows = rows_of(LONG, per=2, budget=[12, 3, 12, 1, 6, 12, 2, 12])
    for patience in (0, 1):
        found = decode(base, GREEDY, rows, ends=ends, pad=0, batch_rows=3, patience=patience)
        for row, budget in enumerate(rows.token_budget.tolist()):
            assert decoded_rows(found)[row] == generated(base, LONG[row // 2], budget, ends)


def test_a_prompt_may_be_longer_than_all_that_goes_on(base):
    prompts = prompts_of(3, 4, 200, 5)
    with Heard(base) as calls:
        rows = rows_of(prompts, budget=[2, 20, 6, 20])
        found = decode(base, GREEDY, rows, ends=set(), pad=0, batch_rows=2, patience=0)
    for row, budget in enumerate([2, 20, 6, 20]):
        assert decoded_rows(found)[row] == generated(base, prompts[row], budget)
    assert max(width for *_, width in calls) == 205
    # When it has left, so have its columns.
    assert calls[-1][2] <= 25


def test_positions_stay_within_the_models_table():
    base = tiny.build_base("gpt2")  # 256 positions
    prompts = prompts_of(250, 4, 245, 4, 4)
    budgets = [6, 40, 11, 40, 40]
    found = decode(base, GREEDY, rows_of(prompts, budget=budgets), ends=set(), pad=0, batch_rows=2)
    for row, budget in enumerate(budgets):
        assert decoded_rows(found)[row] == generated(base, prompts[row], budget)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_what_a_broken_row_left_does_not_reach_who_takes_its_place(family):
    base = tiny.build_base(family)
    greedy = decoded_rows(decode(base, GREEDY, rows_of(PROMPTS, budget=16), ends=set(), pad=0))
    others = set(greedy[0] + greedy[2][:6] + greedy[3][:6]).union(*PROMPTS)
    token = next(token for token in greedy[1] if token not in others)
    budgets = [16, greedy[1].index(token) + 1, 6, 6]
    with torch.no_grad():
        base.get_input_embeddings().weight[token] = float("nan")
    # Its last token is NaN, and so are the keys and values of 8 columns, while it stands still; then 6 tokens enter.
    found = decode(base, GREEDY, rows_of(PROMPTS, budget=budgets), ends=set(), pad=0, batch_rows=2, patience=4)
    assert decoded_rows(found) == [row[:budget] for row, budget in zip(greedy, budgets, strict=True)]


def test_random_numbers_of_rows_at_different_steps_are_their_own():
    keys, steps = torch.tensor([row_key(0, row) for row in range(5)]), torch.tensor([0, 3, 700, 1, 0])
    for stream in (0, 1):
        expected = torch.cat([row_uniforms(keys[row : row + 1], int(steps[row]), stream) for row in range(5)])
        assert torch.equal(row_uniforms(keys, steps, stream), expected)
        ahead = row_uniforms(keys, steps + torch.arange(3)[:, None], stream)
        assert torch.equal(ahead[2], row_uniforms(keys, steps + 2, stream))


# --- a batch that stays full ------------------------------------------------------------------------------------------


def test_the_batch_stays_full(base):
    budgets = [40 if row % 5 == 0 else 5 for row in range(60)]
    rows = rows_of(prompts_of(*[4, 6, 8] * 4), per=5, budget=budgets)
    made = sum(budgets)
    share = {}
    for name, how in {"refilled": {}, "kept": {"drops_ended": False}}.items():
        with Heard(base) as calls:
            decode(base, GREEDY, rows, ends=set(), pad=0, batch_rows=10, **how)
        assert max(count for count, *_ in calls) <= 10
        # A row's first token comes of its prompt.
        share[name] = (made - 60) / sum(count for count, new, _ in calls if new == 1)
    assert share["kept"] < 0.35
    assert share["refilled"] > 0.75


def test_no_places_stand_free_without_patience(base):
    budgets = [30 if row % 4 == 0 else 3 + row % 5 for row in range(32)]
    rows = rows_of(prompts_of(*[3, 9, 5, 7] * 2), per=4, budget=budgets)
    with Heard(base) as calls:
        decode(base, GREEDY, rows, ends=set(), pad=0, batch_rows=8, patience=0)
    steps = [call for call in calls if call[1] == 1]
    read = max(index for index, (_, new, _) in enumerate(calls) if new > 1)
    until = sum(new == 1 for _, new, _ in calls[: read + 1])
    assert {count for count, *_ in steps[:until]} == {8}
    # The width is that of the longest row that goes on.
    assert max(width for *_, width in calls) <= max(
        len(rows.prompts[prompt]) + budget for prompt, budget in zip(rows.prompt.tolist(), budgets, strict=True)
    )


def test_the_width_does_not_grow_for_ever(base):
    rows = rows_of(prompts_of(*[4] * 40), budget=[4 + row % 3 for row in range(40)])
    with Heard(base) as calls:
        decode(base, GREEDY, rows, ends=set(), pad=0, batch_rows=4, patience=0)
    assert max(width for *_, width in calls) <= 10
    assert len(calls) > 50


@pytest.mark.parametrize("batch_rows", [1, 3, 4, 7, 100])
def test_each_prompt_is_read_once_however_its_rows_enter(base, batch_rows):
    prompts = prompts_of(7, 3, 12)
    rows = rows_of(prompts, per=6, budget=[2, 5, 3, 1, 4, 2] * 3)
    shuffled = rows.select(torch.randperm(18, generator=torch.Generator().manual_seed(0)))
    for some in (rows, shuffled):
        read = []
        handle = base.register_forward_pre_hook(
            lambda _, args, kwargs: (
                read.extend(  # noqa: B023
                    row[mask.bool()].tolist()
                    for row, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
                )
                if kwargs["input_ids"].shape[1] > 1
                else None
            ),
            with_kwargs=True,
        )
        decode(base, GREEDY, some, ends=set(), pad=0, batch_rows=batch_rows)
        handle.remove()
        assert sorted(read) == sorted(prompts)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_sequence_policy_decides_once_for_each_row_whenever_it_enters(base, pooling):
    policy = policy_of(base, **{**POLICIES["sequence"], "pooling": pooling})
    rows = rows_of(LONG, per=3, budget=BUDGETS * 2, samples=3)
    made = decode(base, policy, rows, ends=ENDS, pad=0, records="decisions", batch_rows=4).decisions
    assert made.row.tolist() == list(range(12))
    assert (made.step == 0).all()
    for index, prompt in enumerate(LONG):
        hidden = tiny.hidden_and_logits(base, torch.tensor([prompt]))[0][0].float()
        wanted = hidden.mean(0) if pooling == "mean" else hidden[-1]
        torch.testing.assert_close(made.seen.context[3 * index], wanted, rtol=1e-3, atol=1e-4)
    trace = decode(base, policy, rows, ends=ENDS, pad=0, records="parameters", batch_rows=4).action
    assert (trace == made.action[:, None])[trace >= 0].all()


@pytest.mark.parametrize("family", STATEFUL)
def test_a_model_with_another_state_keeps_batches(family):
    base = tiny.build_base(family)
    rows = rows_of(prompts_of(4, 6, 5, 3, 7, 4), budget=[2, 9, 4, 3, 1, 6])
    with Heard(base) as calls:
        found = decode(base, GREEDY, rows, ends=set(), pad=0, batch_rows=2)
    assert found.lengths.tolist() == [2, 9, 4, 3, 1, 6]
    # Nothing joins: the number of rows only falls until the next batch begins, of which there are three.
    counts = [count for count, *_ in calls]
    assert counts == [2] * 2 + [1] * 7 + [2] * 3 + [1] + [2] + [1] * 5


# --- what is finished, as it comes ------------------------------------------------------------------------------------


def test_each_row_is_handed_over_once_and_early(base):
    budgets = [40, 3, 4, 3, 5, 3, 4, 40, 3, 5]
    rows = rows_of(prompts_of(*[5] * 10), budget=budgets)
    policy = policy_of(base, **POLICIES["token"])
    how = {"ends": set(), "pad": 0, "records": "parameters"}
    whole = decode(base, policy, rows, **how)
    seen, passes = {}, {}
    with Heard(base) as calls:
        for at, part in decode_finished(base, policy, rows, batch_rows=3, **how):
            for place, row in enumerate(at.tolist()):
                assert row not in seen
                seen[row], passes[row] = part.tokens[place, : part.lengths[place]].tolist(), len(calls)
                for name in ("temperature", "top_p", "action"):
                    values = vars(part)[name][place, : part.lengths[place]]
                    torch.testing.assert_close(values, vars(whole)[name][row, : part.lengths[place]])
            assert part.tokens.shape[1] == int(part.lengths.max())
            assert part.decisions is None
    assert [seen[row] for row in range(10)] == decoded_rows(whole)
    assert passes[1] < 10 < 40 < passes[0]


def test_a_caller_may_stop_early(base):
    rows = rows_of(prompts_of(*[5] * 10), budget=[40, 3] * 5)
    for _ in decode_finished(base, GREEDY, rows, ends=set(), pad=0, batch_rows=3):
        break
    assert tiny.hooks_left(base) == 0


def test_completions_come_as_they_end():
    model, tokenizer = load_base_model(), load_tokenizer()
    prompts = [row["prompt"] for row in build_problems("validation", 6)]
    wanted = [(index, sample) for index in range(6) for sample in range(4)]
    budgets = [40, 2, 3, 40, 2, 4]
    how = {"token_budget": budgets, "parallel_budget": 4}
    engine = TransformersEngine(model, tokenizer, batch_rows=5)
    parts = list(engine.complete_batches(prompts, wanted, **how))
    assert len(parts) > 5
    found = [(index, sample) for part in parts for index, sample, _ in part]
    assert sorted(found) == wanted
    assert list(engine.complete_batches(prompts, [], **how)) == []


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_rows", [1, 2, 3])
def test_broken_logits_name_the_rows_own_step(batch_rows):
    base = poisoned(3, 3, others=[])
    rows = rows_of(PROMPTS, budget=[1, 2, 1, 12])
    with pytest.raises(LogitsError, match=r"step 4, row 3\b"):
        decode(base, GREEDY, rows, ends=set(), pad=0, batch_rows=batch_rows)
    assert tiny.hooks_left(base) == 0


def test_a_policy_that_breaks_down_names_the_rows_own_step(base):
    policy = policy_of(base, **POLICIES["token"])

    def breaks(module, args, found):
        return replace(found, temperature=found.temperature.masked_fill(args[0].remaining_tokens == 9, float("nan")))

    policy.register_forward_hook(breaks)
    with pytest.raises(LogitsError, match=r"step 3, row 3\b.*temperature"):
        decode(base, policy, rows_of(PROMPTS, budget=[1, 8, 1, 12]), ends=set(), pad=0, batch_rows=2)
