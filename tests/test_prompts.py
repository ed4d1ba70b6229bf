"""Prompts to learn on: templates as the paper prints them, balanced mixtures, and draws that any process repeats.

Draws are hashed from a seed, so nothing here is random from run to run. The bounds are 6 standard deviations wide: a
correct drawer would break a given one under 1 seed in 10^8.
"""

import copy
import json
import math
import os
import pickle
import subprocess
import sys
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_decode.budget import MAX_BUDGET
from hf_adaptive_decode.errors import BudgetError
from hf_adaptive_decode.training.data import DataFormatError
from hf_adaptive_decode.training.prompts import (
    COT_TEMPLATES,
    CoTTemplate,
    Draw,
    Drawer,
    PromptDataset,
    apply_template,
    as_template,
)

DRAWS = 4000


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def rows(count, tag="p"):
    return [{"prompt": f"{tag}{index}", "answer": index} for index in range(count)]


# Templates.


def test_the_presets_are_what_the_paper_prints():
    # Appendix D.2, between its quotation marks. The doubled backslash is the paper's.
    assert COT_TEMPLATES["math"] == CoTTemplate(
        "Provide the final answer within `" + 2 * chr(92) + "boxed{}`. /think",
        "Provide the final answer within `" + 2 * chr(92) + "boxed{}`. /nothink",
        "user",
    )
    assert COT_TEMPLATES["code"] == CoTTemplate(
        "You are a coding assistant. Please reason step by step. /think",
        "You are a coding assistant. /nothink",
        "system",
    )
    assert COT_TEMPLATES["step_by_step"] == CoTTemplate("Let's think step by step.", "", "user")
    assert set(COT_TEMPLATES) == {"math", "code", "step_by_step"}


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("code", COT_TEMPLATES["code"]),
        (COT_TEMPLATES["math"], COT_TEMPLATES["math"]),
        ({"cot": "a", "direct": "b", "role": "system"}, CoTTemplate("a", "b", "system")),
        ({"cot": "a"}, CoTTemplate("a", "", "user")),
        ("Do the math first.", CoTTemplate("Do the math first.", "", "user")),
    ],
)
def test_a_template_can_be_named_in_several_ways(value, wanted):
    assert as_template(value) == wanted


@pytest.mark.parametrize("value", ["maths", "", " maths ", 3, None, ["math"]])
def test_an_unknown_template_lists_the_presets(value):
    with pytest.raises(ValueError, match=r"\['math', 'code', 'step_by_step'\]") as caught:
        as_template(value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"direct": "b"}, "direct"),
        ({"cot": "a", "prefix": "b"}, "prefix"),
        ({"cot": "a", "role": "assistant"}, "assistant"),
        ({"cot": None}, "None"),
        ({"cot": "a", "direct": 3}, "3"),
    ],
)
def test_a_template_of_the_wrong_fields_names_them(value, named):
    with pytest.raises(ValueError, match=named):
        as_template(value)


USER, SYSTEM = CoTTemplate("C", "D", "user"), CoTTemplate("C", "D", "system")
PICTURE = {"type": "image", "url": "u"}


@pytest.mark.parametrize(
    ("template", "prompt", "wanted"),
    [
        (USER, "p", "p\nC"),
        (SYSTEM, "p", "C\np"),
        (USER, [user("p")], [user("p\nC")]),
        (SYSTEM, [user("p")], [system("C"), user("p")]),
        (SYSTEM, [system("s"), user("p")], [system("s\nC"), user("p")]),
        (SYSTEM, [system(""), user("p")], [system("C"), user("p")]),
        (USER, [user("a"), assistant("b"), user("c")], [user("a"), assistant("b"), user("c\nC")]),
        (USER, [user("a"), assistant("b")], [user("a\nC"), assistant("b")]),
        (USER, [user([PICTURE])], [user([PICTURE, {"type": "text", "text": "\nC"}])]),
    ],
)
def test_where_a_template_puts_its_text(template, prompt, wanted):
    before = copy.deepcopy(prompt)
    assert apply_template(prompt, template, True) == wanted
    direct = apply_template(prompt, template, False)
    assert direct == json.loads(json.dumps(wanted).replace("C", "D"))
    assert prompt == before


@pytest.mark.parametrize("role", ["user", "system"])
@pytest.mark.parametrize("prompt", ["p", [user("p")], [system("s"), user("p")]])
def test_an_empty_text_adds_nothing(role, prompt):
    found = apply_template(prompt, CoTTemplate("C", "", role), False)
    assert found == prompt
    assert isinstance(found, str) or found is not prompt
    assert apply_template(prompt, CoTTemplate("", "D", role), True) == prompt


def test_what_is_done_to_a_result_does_not_reach_the_prompt():
    prompt = [system("s"), user([{"type": "text", "text": "p"}])]
    before = copy.deepcopy(prompt)
    found = apply_template(prompt, USER, True)
    found[-1]["content"][0]["text"] = "changed"
    found.pop(0)
    assert prompt == before


def test_a_conversation_without_a_user_cannot_take_a_users_text():
    with pytest.raises(DataFormatError, match=r"\['system'\].*role='system'"):
        apply_template([system("s")], USER, True)


# Data sets.


@pytest.mark.parametrize("make", [list, tuple, datasets.Dataset.from_list])
def test_one_data_set_is_its_rows(make):
    data = PromptDataset(make(rows(3)))
    assert len(data) == 3
    assert [data[index] for index in range(3)] == [
        {"index": index, "prompt": f"p{index}", "columns": {"answer": index}} for index in range(3)
    ]
    assert list(data) == [data[index] for index in range(3)]
    assert data[-1] == data[2]
    assert data[np.int64(1)] == data[1]
    for outside in (3, -4):
        with pytest.raises(IndexError):
            data[outside]


def test_a_completion_stays_a_column():
    assert PromptDataset([{"prompt": "p", "completion": "c"}])[0]["columns"] == {"completion": "c"}


def test_a_list_whose_rows_differ_gives_every_item_the_same_columns():
    data = PromptDataset([{"prompt": "p", "a": 1}, {"prompt": "q", "b": 2}])
    assert [item["columns"] for item in data] == [{"a": 1, "b": None}, {"a": None, "b": 2}]


def test_mixed_sets_share_their_columns_and_carry_their_names():
    source = {"sums": [{"prompt": "p", "answer": 1}], "code": [{"prompt": f"q{i}", "tests": "t"} for i in range(3)]}
    for given_source in (source, datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in source.items()})):
        data = PromptDataset(given_source)
        assert [item["prompt"] for item in data] == ["p", "q0", "p", "q1", "p", "q2"]
        assert [item["index"] for item in data] == list(range(6))
        assert data[0]["columns"] == {"answer": 1, "tests": None, "dataset": "sums"}
        assert data[5]["columns"] == {"answer": None, "tests": "t", "dataset": "code"}


def test_a_column_called_dataset_is_left_alone():
    data = PromptDataset({"a": [{"prompt": "p", "dataset": "mine"}], "b": [{"prompt": "q"}]})
    assert [item["columns"] for item in data] == [{"dataset": "mine"}, {"dataset": None}]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_every_prefix_of_a_mixture_is_balanced_and_no_row_is_left_out(sizes):
    data = PromptDataset({f"s{which}": rows(size, f"s{which}.") for which, size in enumerate(sizes)})
    assert len(data) == len(sizes) * max(sizes)
    counts = Counter({f"s{which}": 0 for which in range(len(sizes))})
    seen = Counter()
    for item in data:
        counts[item["columns"]["dataset"]] += 1
        seen[item["prompt"]] += 1
        assert max(counts.values()) - min(counts.values()) <= 1
    assert len(seen) == sum(sizes)
    for which, size in enumerate(sizes):
        repeats = [seen[f"s{which}.{index}"] for index in range(size)]
        assert max(repeats) - min(repeats) <= 1


def test_keys_that_an_arrow_table_filled_in_are_dropped():
    call = [{"name": "f"}]
    talk = [user("a"), {"role": "assistant", "content": None, "tool_calls": call}, {**user("b"), "name": "Ada"}]
    stored = datasets.Dataset.from_list([{"prompt": talk}])
    assert stored[0]["prompt"][0] == {**user("a"), "tool_calls": None, "name": None}
    assert PromptDataset(stored)[0]["prompt"] == talk


def test_the_rows_of_a_list_are_not_changed():
    source = [{"prompt": [{**user("a"), "name": None}], "answer": 1}]
    before = copy.deepcopy(source)
    data = PromptDataset({"a": source})
    Drawer(8, 2, 0.5, "math").draw(0, 0, data[0]["prompt"])
    data[0]["columns"].clear()
    assert source == before
    assert data[0]["columns"] == {"answer": 1, "dataset": "a"}


def test_it_loads_in_worker_processes():
    data = PromptDataset({"a": rows(2), "b": datasets.Dataset.from_list(rows(3, "q"))})
    assert list(pickle.loads(pickle.dumps(data))) == list(data)
    loader = torch.utils.data.DataLoader(data, batch_size=4, collate_fn=list)
    assert [item for batch in loader for item in batch] == list(data)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ([{"question": "q", "answer": 1}], r"`eval`.*\['question', 'answer'\].*needs `prompt`.*conversational"),
        (datasets.Dataset.from_list([{"text": "q"}]), r"\['text'\].*needs `prompt`"),
        ({"a": rows(2), "b": [{"text": "q"}]}, r"`eval\['b'\]`.*\['text'\]"),
        ([], "`eval` is empty"),
        (datasets.Dataset.from_dict({"prompt": []}), "`eval` is empty"),
        ({"a": rows(1), "b": []}, r"`eval\['b'\]` is empty"),
        ({}, "no data sets"),
        ({"prompt": ["p"], "answer": [1]}, r"`eval\['prompt'\]\[0\]` is 'p'.*`dict`"),
        ({"a": {"prompt": "p"}}, r"`eval\['a'\]` is \{'prompt'"),
        (["p", "q"], r"`eval\[0\]` is 'p'"),
        ([{"prompt": "p"}, 7], r"`eval\[1\]` is 7"),
        ("rows.json", "'rows.json'.*pass a `datasets.Dataset`"),
        (None, "None.*pass a `datasets.Dataset`"),
        (3, "3.*pass a `datasets.Dataset`"),
    ],
)
def test_a_source_that_cannot_be_used_says_why(source, named):
    with pytest.raises(DataFormatError, match=named):
        PromptDataset(source, name="eval")


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(rows(2))


@pytest.mark.parametrize(
    "source",
    [
        datasets.Dataset.from_list(rows(2)).to_iterable_dataset(),
        {"a": rows(2), "b": datasets.Dataset.from_list(rows(2)).to_iterable_dataset()},
        Stream(),
        (row for row in rows(2)),
    ],
)
def test_an_iterable_data_set_is_refused_with_a_way_out(source):
    with pytest.raises(DataFormatError, match=r"iterable.*index.*Dataset\.from_generator.*list\("):
        PromptDataset(source)


BAD_PROMPTS = ["", [], None, 3, ["p"], [{"content": "p"}], [{"role": "user"}], [{"role": "user", "content": None}]]
BAD_PROMPTS += [[user("p"), {"role": 1, "content": "p"}], {"role": ["user"], "content": ["p"]}]


@pytest.mark.parametrize("prompt", BAD_PROMPTS)
def test_a_bad_prompt_is_named(prompt):
    with pytest.raises(DataFormatError, match=r"`train_dataset\[0\]`.*non-empty `str`.*list of messages"):
        PromptDataset([{"prompt": prompt}])
    data = PromptDataset({"a": rows(2), "b": [*rows(1), {"prompt": prompt}]})
    with pytest.raises(DataFormatError, match=r"`train_dataset\['b'\]\[1\]`"):
        data[3]


def test_a_row_without_a_prompt_is_named_when_it_is_reached():
    data = PromptDataset([{"prompt": "p"}, {"answer": 1}])
    with pytest.raises(DataFormatError, match=r"`train_dataset\[1\]` is None"):
        data[1]


def test_a_lazy_sequence_is_loaded_row_by_row():
    class Lazy:
        reads = 0

        def __len__(self):
            return 1000

        def __getitem__(self, index):
            self.reads += 1
            return {"prompt": f"p{index}", "late": index}

    lazy = Lazy()
    data = PromptDataset(lazy)
    assert lazy.reads <= 2
    assert data[7] == {"index": 7, "prompt": "p7", "columns": {"late": 7}}


# Draws.


def draws(drawer, count=DRAWS):
    """Half of them over indices, half over steps."""
    half = count // 2
    return [drawer.draw(i, 3, "p") for i in range(half)] + [drawer.draw(5, 10 + i, "p") for i in range(half)]


def within_six_sigma(found, chance, count=DRAWS):
    return abs(found - count * chance) <= 6 * math.sqrt(count * chance * (1 - chance))


def test_what_is_fixed_is_always_drawn():
    drawer = Drawer(256, 8)
    assert drawer.draw(3, 1, "p") == Draw("p", False, 256, 8)
    assert set(draws(drawer, 100)) == {Draw("p", False, 256, 8)}
    assert (drawer.largest_tokens, drawer.largest_samples) == (256, 8)


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        ([64, 128, 256], {64, 128, 256}),
        ((9, 3), {9, 3}),
        (range(2, 5), {2, 3, 4}),
        (range(9, 0, -4), {9, 5, 1}),
        ({"low": 2, "high": 5}, {2, 3, 4, 5}),
        ({"high": 7, "low": 7}, {7}),
        (np.int64(7), {7}),
        ([np.int64(7), 9], {7, 9}),
    ],
)
def test_budgets_are_drawn_uniformly(tokens, wanted):
    drawer = Drawer(tokens, [1, 8])
    counts = Counter(draw.tokens for draw in draws(drawer))
    assert set(counts) == wanted
    assert all(type(number) is int and within_six_sigma(n, 1 / len(wanted)) for number, n in counts.items())
    assert (drawer.largest_tokens, drawer.largest_samples) == (max(wanted), 8)


def test_a_number_listed_twice_is_drawn_twice_as_often():
    counts = Counter(draw.samples for draw in draws(Drawer(1, [1, 1, 8])))
    assert within_six_sigma(counts[1], 2 / 3)


def test_a_long_range_stays_a_range():
    drawer = Drawer({"low": 1, "high": MAX_BUDGET}, range(1, MAX_BUDGET + 1))
    assert drawer.largest_tokens == drawer.largest_samples == MAX_BUDGET
    found = [draw.tokens / MAX_BUDGET for draw in draws(drawer)]
    assert all(0 < value <= 1 for value in found)
    # A uniform number has the variance 1/12.
    assert abs(sum(found) / DRAWS - 0.5) <= 6 / math.sqrt(12 * DRAWS)


def test_what_is_drawn_is_drawn_independently():
    counts = Counter((d.with_cot, d.tokens, d.samples) for d in draws(Drawer([1, 2], [1, 2], 0.5, "math")))
    assert len(counts) == 8
    assert all(within_six_sigma(found, 1 / 8) for found in counts.values())


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0, 0, 1])
def test_the_ratio_of_chains_of_thought_and_their_prompts(ratio):
    found = draws(Drawer(8, 1, ratio, "code"))
    assert within_six_sigma(sum(draw.with_cot for draw in found), ratio)
    template = COT_TEMPLATES["code"]
    assert all(draw.prompt == f"{template.cot if draw.with_cot else template.direct}\np" for draw in found)


@given(
    st.integers(-(2**40), 2**40),
    st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
)
def test_a_draw_depends_on_seed_step_and_index_alone(seed, asked, shuffler):
    def make():
        return Drawer({"low": 1, "high": 10**6}, [1, 2, 4], 0.5, "math", seed)

    drawer = make()
    first = {pair: drawer.draw(*pair, "p") for pair in asked}
    again = list(first)
    shuffler.shuffle(again)
    assert {pair: make().draw(*pair, "p") for pair in again} == first
    # Which prompt it is, and what else may be drawn, changes no draw.
    for pair, found in first.items():
        assert make().draw(*pair, [user("q")]).tokens == found.tokens
        other = Drawer([5], [1, 2, 4], 0.5, "code", seed).draw(*pair, "p")
        assert (other.with_cot, other.samples) == (found.with_cot, found.samples)


def test_seed_step_and_index_each_change_the_draws():
    def tokens(seed, step, index):
        return Drawer({"low": 1, "high": MAX_BUDGET}, 1, seed=seed).draw(index, step, "p").tokens

    # A thousand numbers of 2^31 are all different but for 1 seed in 4000.
    found = [tokens(seed, step, index) for seed in range(10) for step in range(10) for index in range(10)]
    assert len(set(found)) == len(found)
    assert tokens(0, 1, 11) != tokens(0, 11, 1)
    assert tokens(np.int64(1), torch.tensor(2), np.int32(3)) == tokens(1, 2, 3)


# An empty package in place of the trainers', which take seconds to import and have no part in a draw.
SCRIPT = """
import json, sys, types
import hf_adaptive_decode
bare = types.ModuleType("hf_adaptive_decode.training")
bare.__path__ = [hf_adaptive_decode.__path__[0] + "/training"]
sys.modules[bare.__name__] = bare
from hf_adaptive_decode.training.prompts import Drawer
drawer = Drawer({"low": 1, "high": 1000}, [1, 2, 4, 8], 0.3, "math", seed=7)
found = [drawer.draw(index, step, "p") for step in range(5) for index in range(40)]
print(json.dumps([[d.prompt, d.with_cot, d.tokens, d.samples] for d in found]))
"""


def test_another_process_draws_the_same():
    here = Drawer({"low": 1, "high": 1000}, [1, 2, 4, 8], 0.3, "math", seed=7)
    wanted = [here.draw(index, step, "p") for step in range(5) for index in range(40)]
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    env = {**os.environ, "PYTHONHASHSEED": other, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
    assert [Draw(*values) for values in json.loads(ran.stdout)] == wanted


def test_draws_stay_what_they_were():
    # Written down once: a run continued under another version of this library or of Python goes on as it began.
    drawer = Drawer({"low": 1, "high": 1000}, [1, 2, 4, 8], 0.3, "step_by_step")
    found = [drawer.draw(index, 2, "p") for index in range(4)]
    assert [(draw.with_cot, draw.tokens, draw.samples) for draw in found] == [
        (True, 288, 4),
        (True, 247, 2),
        (True, 286, 2),
        (False, 918, 2),
    ]


@pytest.mark.parametrize("name", ["tokens", "samples"])
@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, True, None, 2.0, float("nan"), "8", b"8", {4}, MAX_BUDGET + 1),
        *([], (), [4, 0], [4, True], [4, 2.5], [[4]]),
        *(range(0), range(4), range(4, -1, -1), range(1, MAX_BUDGET + 2)),
        *({}, {"low": 1}, {"low": 0, "high": 4}, {"low": 5, "high": 4}, {"low": 1, "high": 4, "step": 2}),
        *({"low": 1, "high": True}, {"low": 1, "high": MAX_BUDGET + 1}),
    ],
)
def test_a_budget_that_cannot_be_drawn_is_named(name, value):
    with pytest.raises(BudgetError, match=rf"{name}.*whole number from 1 to {MAX_BUDGET}.*'low'"):
        Drawer(**{"tokens": 8, "samples": 2, name: value})


def test_the_offending_number_of_a_list_is_named():
    with pytest.raises(BudgetError, match=r"`tokens\[1\]` is -3"):
        Drawer([4, -3], 1)
    with pytest.raises(BudgetError, match=r"`samples` is \{'low': 5, 'high': 4\}"):
        Drawer(4, {"low": 5, "high": 4})


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), float("inf"), True, "0.3", None])
def test_a_ratio_outside_its_range_is_named(ratio):
    with pytest.raises(ValueError, match=f"`cot_ratio` is {ratio!r}.*from 0 to 1"):
        Drawer(8, 1, ratio, "math")


def test_a_ratio_needs_a_template():
    with pytest.raises(ValueError, match=r"`cot_ratio` is 0\.3.*'math', 'code', 'step_by_step'"):
        Drawer(8, 1, 0.3)
    with pytest.raises(ValueError, match="'maths'"):
        Drawer(8, 1, 0.3, "maths")
