"""Tasks for evaluation: where their problems come from, how they are asked and scored, and the answers that vote."""

import argparse
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_decode.cli.tasks import add_eval_task_arguments, load_tasks
from hf_adaptive_decode.evaluation.rows import entry_parts, read_tables
from hf_adaptive_decode.evaluation.runner import GREEDY, run_decoder
from hf_adaptive_decode.evaluation.sources import REWARDS, SPLITS, Source, rows_in_turns
from hf_adaptive_decode.evaluation.tasks import (
    PRESETS,
    Task,
    find_reward,
    function_reward,
    load_task,
    read_math_answer,
    read_testbed_answer,
)
from hf_adaptive_decode.rewards import SandboxUnavailableError, confinement, math_reward
from hf_adaptive_decode.testbed import build_problems, is_correct, load_base_model, load_tokenizer, testbed_reward
from hf_adaptive_decode.testbed.problems import TYPES


@pytest.fixture
def sandbox():
    try:
        return confinement.working_sandbox()
    except SandboxUnavailableError as error:
        pytest.skip(str(error))


def questions(count=60):
    return [{"question": f"What is {n} + 1?", "answer": f"It is\n#### {n + 1}", "id": n} for n in range(count)]


def length_reward(completions, **columns):
    return [float(len(text)) for text in completions]


def source(dataset=None, reward="exact_match", **changes):
    columns = {"prompt_column": "question", "solution_column": "answer"}
    return Source(questions() if dataset is None else dataset, reward, **{**columns, **changes})


def prompts(rows):
    return [row["prompt"] for row in rows]


# --- sources ----------------------------------------------------------------------------------------------------------


def test_rows_are_the_same_from_a_file_a_list_and_a_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, questions())))
    table = datasets.Dataset.from_list(questions())
    table.save_to_disk(tmp_path / "saved")
    given_as = [path, str(path), questions(), table, {"anything": questions()}, str(tmp_path / "saved")]
    first, *others = [source(one, solution_after="####").rows("train", 9, 4) for one in given_as]
    assert first[0].keys() == {"prompt", "solution"}
    assert first[0]["solution"] == str(int(first[0]["prompt"].split()[2]) + 1)
    assert all(rows == first for rows in others)


def test_a_mapping_of_splits_is_used_as_it_is_and_completed_from_train():
    tables = {name: [{"question": f"{name} {n}", "answer": 1} for n in range(60)] for name in ("train", "test")}
    parts = {split: source(tables).rows(split) for split in SPLITS}
    assert sorted(prompts(parts["test"])) == sorted(row["question"] for row in tables["test"])
    assert 0 < len(parts["validation"]) < 20
    assert len(parts["train"]) + len(parts["validation"]) == 60


texts = st.lists(st.text(min_size=1), min_size=1, max_size=40, unique=True)


@settings(max_examples=60, deadline=None)
@given(texts, st.booleans(), st.integers(0, 5))
def test_every_prompt_is_in_one_part_and_stays_there_when_others_come(found, benchmark, seed):
    def part_of(texts):
        where = {}
        for split in SPLITS:
            try:
                rows = Source([{"prompt": t, "solution": 1} for t in texts], "math", benchmark=benchmark).rows(
                    split, None, seed
                )
            except ValueError as error:
                assert "is empty" in str(error)  # noqa: PT017 (which parts are empty depends on the texts)
                continue
            for prompt in prompts(rows):
                assert prompt not in where
                where[prompt] = split
        return where

    whole = part_of(found)
    assert whole.keys() == set(found)
    assert not (benchmark and "train" in whole.values())
    assert {text: whole[text] for text in found[::2]} == part_of(found[::2])


def test_a_benchmark_is_a_fifth_validation_and_the_rest_test():
    source_of_many = Source([{"prompt": str(n), "solution": 1} for n in range(2000)], "math", benchmark=True)
    validation, test = (len(source_of_many.rows(split)) for split in ("validation", "test"))
    # Binomial(2000, 0.2): five standard deviations are 90, so the hash fails this with odds below 1 in a million.
    assert abs(validation - 400) < 90
    assert validation + test == 2000


def test_a_template_asks_and_the_splits_do_not_depend_on_it():
    bare = source()
    asked = source(prompt_template="Q: {prompt} Answer in \\boxed{} {now} {solution}")
    for split in SPLITS:
        wanted = [f"Q: {text} Answer in \\boxed{{}} {{now}} {{solution}}" for text in prompts(bare.rows(split))]
        assert prompts(asked.rows(split)) == wanted
    # What looks like a place within a problem is the problem's own.
    odd = Source([{"prompt": f"{n} {{tests}} {{prompt}}", "tests": ["a", "b"]} for n in range(30)], "code")
    row = odd.rows("train", 1)[0]
    framed = Source(odd.dataset, "code", prompt_template="<{prompt}|{tests}>").rows("train", 1)[0]
    assert framed["prompt"] == f"<{row['prompt']}|a\nb>"


def test_chat_makes_a_message_of_a_text_and_leaves_messages():
    plain = source().rows("test")
    assert prompts(source(chat=True).rows("test")) == [[{"role": "user", "content": p}] for p in prompts(plain)]
    talk = [{"prompt": [{"role": "user", "content": str(n)}], "solution": 1} for n in range(60)]
    assert Source(talk, "math", chat=True).rows("test") == Source(talk, "math").rows("test")


def test_a_reward_of_ones_own_is_handed_every_column_of_every_row():
    data = [{**row, "level": 3} if row["id"] % 2 else row for row in questions()]
    rows = Source(data, length_reward, "question").rows("train")
    assert all(row.keys() == {"prompt", "question", "answer", "id", "level"} for row in rows)
    assert {row["level"] for row in rows} == {3, None}
    row = source(data, length_reward, solution_after="####").rows("train", 1)[0]
    assert row["solution"] == str(row["id"] + 1)
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(questions())
    assert source(table, length_reward).rows("train", 1)[0].keys() == {"prompt", "solution", *questions()[0]}


def test_of_several_column_names_the_first_that_is_there_counts():
    rows = [{"text": f"old {n}", "label": n} for n in range(30)] + [
        {"question": f"new {n}", "text": f"not {n}", "answer": n, "label": -1} for n in range(30)
    ]
    found = Source(rows, "math", ("question", "text"), ("answer", "label"))
    for row in [row for split in SPLITS for row in found.rows(split)]:
        assert re.fullmatch(f"(new|old) {row['solution']}", row["prompt"])


def test_types_of_the_testbed_are_sources_and_share_its_problems():
    rows = Source("testbed:coin+sign", "testbed").rows("train", 8, 3)
    assert rows == build_problems("train", 8, ["coin", "sign"], seed=3)
    assert Source("testbed", length_reward).rows("test", 4) == build_problems("test", 4)
    both = rows_in_turns([Source("testbed:run", "testbed"), Source("testbed:coin", "testbed")], "train", 3)
    assert [row["type"] for row in both] == ["run", "coin", "run"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: source(reward="nice"), "no reward 'nice'; choose one of testbed, exact_match"),
        (lambda: source(reward=None), "`reward=` is None"),
        (lambda: source(reward="testbed"), "`reward=testbed` does not fit `dataset=the given rows`"),
        (lambda: Source("testbed", "math"), "`reward=math` does not fit `dataset=testbed`"),
        (lambda: Source("testbed:coin+nim", "testbed"), "`dataset=testbed:coin\\+nim` names no types"),
        (lambda: Source("testbed:", "testbed"), "names no types"),
        (lambda: Source("testbed", "testbed", chat=True), "`chat=`"),
        (lambda: Source("testbed", "testbed", prompt_template="{prompt}!"), "reads the bare prompt"),
        (lambda: source(prompt_template="Q: {question}"), "write {prompt} where"),
        (lambda: source([]).rows("test"), "`dataset=` is \\[\\]"),
        (lambda: source([1]).rows("test"), "it has to be a path"),
        (lambda: source({"train": questions(), "test": 7}).rows("test"), "`dataset=` is 7 in split 'test'"),
        (lambda: source(iter(questions())).rows("test"), "it has to be a path"),
        (lambda: source().rows("test", 999), "has \\d+ different prompts, and 999 are needed"),
        (lambda: source().rows("test", -1), "and -1 are needed"),
        (lambda: source(questions(1)).rows("test"), "the test part of the given rows is empty"),
        (lambda: source(benchmark=True).rows("train"), "the train part of the given rows is empty"),
        (
            lambda: source(prompt_column=("problem", "text")).rows("test"),
            "not \\['problem or text'\\]; name the right ones with `prompt_column=`",
        ),
        (lambda: source(solution_after="=>").rows("test"), "nothing behind '=>', as `solution_after=` says"),
        (
            lambda: Source(
                [{"prompt": [{"role": "user", "content": str(n)}], "solution": 1} for n in range(9)],
                "math",
                prompt_template="{prompt}",
            ).rows("train"),
            "is for prompts that are texts",
        ),
        (lambda: Source([{"prompt": "q", "tests": "assert f()"}], "function").rows("test"), "not \\['entry_point'\\]"),
    ],
)
def test_what_is_wrong_with_a_source_is_said(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_tables_keep_their_names_and_entries_their_parts():
    assert read_tables({"a": questions(1)}) == {"a": questions(1)}
    assert entry_parts("org/name") == ("org/name", None, None)
    assert entry_parts("org/name:test") == ("org/name", None, "test")
    assert entry_parts("org/name:main:test") == ("org/name", "main", "test")


# --- the presets, in the formats that their data sets document --------------------------------------------------------

MATH_500 = [
    {
        "problem": f"Write ${n}/4$ in lowest terms.",
        "solution": f"With $n={n}$ we get $\\boxed{{\\frac{{{n}}}{{4}}}}$.",
        "answer": f"\\frac{{{n}}}{{4}}",
        "subject": "Prealgebra",
        "level": 1,
        "unique_id": f"test/prealgebra/{n}.json",
    }
    for n in range(1, 40)
]
MATH = [{name: row[name] for name in ("problem", "level", "solution")} | {"type": "Prealgebra"} for row in MATH_500]
AIME_2024 = [
    {"id": n, "problem": f"Find the {n}-th.", "solution": "see", "answer": f"{n:03}", "url": "https://", "year": "2024"}
    for n in range(30)
]
AIME_2025 = [{"question": f"Find $p_{{{n}}}$.", "answer": n} for n in range(30)]
ADD = '''from typing import List


def twice(x: int) -> int:
    return 2 * x


def add_{n}(numbers: List[int]) -> int:
    """ The sum of the numbers, each doubled, and {n}.
    >>> add_{n}([1])
    {result}
    """
'''
HUMANEVAL = [
    {
        "task_id": f"HumanEval/{n}",
        "prompt": ADD.format(n=n, result=n + 2),
        "canonical_solution": f"    return sum(twice(x) for x in numbers) + {n}\n",
        "test": "\n\nMETADATA = {'author': 'x'}\n\n\ndef check(candidate):\n"
        f"    assert candidate([]) == {n}\n    assert candidate([1, 2]) == {n + 6}\n",
        "entry_point": f"add_{n}",
    }
    for n in range(40)
]
MBPP = [
    {
        "task_id": n,
        "text": f"Write a function to add {n}.",
        "code": f"def add(x):\r\n  return x + {n}",
        "test_list": [f"assert add(1) == {n + 1}", f"assert add(-{n}) == ZERO"],
        "test_setup_code": "ZERO = 0",
        "challenge_test_list": [],
    }
    for n in range(60)
]
SANITIZED = [
    {
        "source_file": "file",
        "task_id": n,
        "prompt": f"Write a function to take the root and add {n}.",
        "code": f"import math\ndef root(x):\n    return math.sqrt(x) + {n}",
        "test_imports": ["import math"],
        "test_list": [f"assert math.isclose(root(4), {n + 2})"],
    }
    for n in range(60)
]


def scores(task, *completions, index=0):
    """What the task's reward gives each of several completions of one of its test problems."""
    row = task.test[index]
    answers = completions
    if not isinstance(row["prompt"], str):
        answers = [[{"role": "assistant", "content": text}] for text in completions]
    columns = {name: [value] * len(completions) for name, value in row.items() if name != "prompt"}
    return task.reward(
        prompts=[row["prompt"]] * len(completions),
        completions=answers,
        completion_ids=[[1]] * len(completions),
        **columns,
    )


def test_gsm8k_is_asked_for_a_box_and_scored_by_what_follows_the_mark():
    pytest.importorskip("math_verify")
    task = load_task("gsm8k", questions(200), seed=1)
    assert (task.name, task.answer) == ("gsm8k", read_math_answer)
    n = int(task.test[0]["solution"])
    assert task.test[0]["prompt"].startswith(f"What is {n - 1} + 1?\n")
    assert "\\boxed{}" in task.test[0]["prompt"]
    assert scores(task, f"So \\boxed{{{n}}}.", f"So \\boxed{{{n}.00}}.", "So \\boxed{9999}.") == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("rows", [MATH_500, MATH], ids=["with an answer", "with a boxed solution"])
def test_math_is_scored_by_the_answer_or_by_the_box_of_the_solution(rows):
    pytest.importorskip("math_verify")
    task = load_task("math", rows)
    assert len(task.validation) + len(task.test) == len(rows)
    n = int(re.search(r"\$(\d+)/4", task.test[0]["prompt"])[1])
    assert scores(task, f"\\boxed{{{n / 4}}}", f"\\boxed{{{n}/4}}", f"\\boxed{{{n}}}") == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("rows", [AIME_2024, AIME_2025], ids=["problem", "question"])
def test_aime_is_read_under_both_names_of_its_problems(rows):
    pytest.importorskip("math_verify")
    task = load_task("aime", rows)
    assert len(task.validation) + len(task.test) == 30
    n = int(task.test[0]["solution"])
    assert scores(task, f"\\boxed{{{n}}}", f"\\boxed{{{n + 1}}}") == [1.0, 0.0]


def body(row):
    return next(one["canonical_solution"] for one in HUMANEVAL if one["entry_point"] == row["entry_point"])


def test_humaneval_takes_the_rest_of_a_function_or_the_whole(sandbox):
    task = load_task("humaneval", HUMANEVAL)
    assert len(task.validation) + len(task.test) == 40
    assert task.answer is None
    row = task.test[0]
    name, rest = row["entry_point"], body(row)
    assert f"```python\n{next(o['prompt'] for o in HUMANEVAL if o['entry_point'] == name)}\n```" in row["prompt"]
    # Its imports and its helper are the prompt's.
    whole = f"def {name}(numbers: List[int]) -> int:\n{rest}"
    wrong = "    return 0\n"
    right = [
        rest,
        f"{rest}\n\nprint(undefined)\n",
        f"```python\n{rest}```",
        f"Here you are:\n```python\n{whole}```\nIt adds.",
        whole,
        f"def helper(x):\n    return twice(x)\n\n{whole.replace('twice(', 'helper(')}",
    ]
    assert scores(task, *right) == [1.0] * len(right)
    assert scores(task, wrong, f"```python\n{whole.replace('sum(', 'max(')}```", "", "No.", whole[:-9]) == [0.0] * 5


def test_humaneval_in_a_chat_and_asked_as_it_is(sandbox):
    chat = load_task("humaneval", HUMANEVAL, chat=True, test=1, validation=1)
    assert chat.test[0]["prompt"][0]["role"] == "user"
    bare = Source(HUMANEVAL, "function", "prompt", "test", benchmark=True)
    for task in (chat, load_task("bare", bare, test=1)):
        assert scores(task, body(task.test[0]), "    return 0\n") == [1.0, 0.0]
    assert task.test[0]["prompt"] in {row["prompt"] for row in HUMANEVAL}


def test_a_fence_within_the_program_is_the_programs(sandbox):
    program = 'def f():\n    """\n```\nf()\n```\n    """\n    return 1\n'
    columns = {"tests": ["assert f() == 1"], "entry_point": ["f"]}
    assert function_reward(["def f():\n"], [f"~~~python\n{program}~~~\n"], **columns) == [1.0]


@pytest.mark.parametrize("rows", [MBPP, SANITIZED], ids=["full", "sanitized"])
def test_mbpp_shows_its_tests_and_runs_what_stands_before_them(sandbox, rows):
    task = load_task("mbpp", {"train": rows[:20], "validation": rows[20:30], "test": rows[30:], "prompt": rows[:2]})
    assert (len(task.validation), len(task.test)) == (10, 30)
    row = task.test[0]
    assert all(test in row["prompt"] for test in row["tests"])
    code = next(one["code"] for one in rows if row["prompt"].startswith(one.get("text") or one["prompt"]))
    assert scores(task, f"```python\n{code}\n```", f"```python\n{code} + 1\n```") == [1.0, 0.0]


def test_every_preset_names_a_data_set_a_reward_and_a_template():
    for name, preset in PRESETS.items():
        repository, _, split = entry_parts(preset.dataset)
        assert "/" in repository, name
        assert split is None
        assert preset.reward in REWARDS
        assert "{prompt}" in preset.prompt_template


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_the_testbed_and_its_types_are_tasks():
    task = load_task("testbed", validation=8, test=12, seed=2)
    assert task.validation == build_problems("validation", 8, seed=2)
    assert task.test == build_problems("test", 12, seed=2)
    assert (task.name, task.reward, task.answer) == ("testbed", testbed_reward, read_testbed_answer)
    for kind in TYPES:
        one = load_task(f"testbed:{kind}")
        assert (len(one.validation), len(one.test)) == (100, 200)
        assert {row["type"] for row in [*one.validation, *one.test]} == {kind}
    # There are 498 such problems.
    assert 440 < len(load_task("testbed:coin", test=530, validation=1).test) < 499


def test_a_task_is_decoded_and_scored():
    task = load_task("testbed:run+calc", validation=1, test=6)
    done = run_decoder(
        load_base_model(),
        load_tokenizer(),
        task.test,
        task.reward,
        GREEDY,
        samples=1,
        token_budget=48,
        show_progress=False,
    )
    assert done.correct.shape == (6, 1)
    # The testbed's model is right about most of these by greedy decoding.
    assert done.correct.any()


def test_numbers_of_problems_are_upper_bounds_and_fewer_are_the_first_of_more():
    whole = load_task("mine", source())
    some = load_task("mine", source(), validation=2, test=3)
    assert (some.validation, some.test) == (whole.validation[:2], whole.test[:3])
    assert load_task("mine", source(), validation=999, test=999) == whole
    assert load_task("mine", source(questions(200)), seed=1).test != load_task("mine", source(questions(200))).test


def test_a_problem_in_both_of_a_sets_own_splits_counts_where_it_is_reported():
    rows = questions(20)
    task = load_task("mine", source({"validation": rows[:12], "test": rows[8:]}))
    assert (len(task.validation), len(task.test)) == (8, 12)
    with pytest.raises(ValueError, match="is empty without the problems that are in its test part"):
        load_task("mine", source({"validation": rows, "test": rows}))


def test_a_task_is_called_by_its_name_or_after_its_data(tmp_path):
    path = tmp_path / "some.problems.jsonl"
    path.write_text("\n".join(map(json.dumps, questions())))
    assert load_task(source(str(path))).name == "some.problems"
    assert load_task("mine", source(path)).name == "mine"
    assert load_task(Source("testbed:sign", "testbed"), test=1, validation=1).name == "testbed:sign"
    assert load_task(source()).name == "the given rows"


def test_a_reward_of_ones_own_has_no_answers_to_vote_on():
    task = load_task("lengths", source(reward=length_reward))
    assert task.reward is find_reward(length_reward) is length_reward
    assert task.answer is None
    assert load_task("exact", source()).answer is read_math_answer


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gsm9k",), "there is no task 'gsm9k'; choose one of testbed, testbed:TYPE, gsm8k"),
        (("mine", questions()), "there is no task 'mine'"),
        (("testbed", questions()), "is built in"),
        (("testbed:nim",), "names no types"),
        ((source(), questions()), "is a `Source` already"),
        (("gsm8k", "no_such.jsonl"), "`dataset=no_such.jsonl` cannot be read"),
        (("math", questions()), "not \\['problem', 'answer or solution'\\]|not \\['problem'\\]"),
        (("math", MATH_500[:1]), "the (test|validation) part of the given rows is empty"),
    ],
)
def test_what_is_wrong_with_a_task_is_said(arguments, said):
    pytest.importorskip("math_verify")
    with pytest.raises(ValueError, match=said):
        load_task(*arguments)


@pytest.mark.parametrize("bad", [{"validation": 0}, {"test": -3}])
def test_no_problems_are_no_number_of_problems(bad):
    with pytest.raises(ValueError, match="a number of problems from 1"):
        load_task("testbed", **bad)


def test_what_is_chosen_on_and_what_is_reported_share_no_prompt():
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    Task("fine", rows[:1], rows[1:], length_reward)
    with pytest.raises(ValueError, match="1 prompts of task 'leaky' are in both of its parts, such as 'b'"):
        Task("leaky", rows, rows[1:], length_reward)
    with pytest.raises(ValueError, match="test row 1 of task 'odd' has the columns \\['question'\\]"):
        Task("odd", rows[:1], [rows[1], {"question": "b"}], length_reward)


# --- answers ----------------------------------------------------------------------------------------------------------

EQUAL = [
    ["\\boxed{\\frac{1}{2}}", "\\boxed{0.5}", "\\boxed{1/2}", "\\boxed{\\dfrac12}", "The answer is $\\frac{1}{2}$."],
    ["\\boxed{1,000}", "first \\boxed{7}, then \\boxed{1000}", "\\boxed{1{,}000}", "#### 1000", "That makes 1,000."],
    ["\\boxed{x=5}", "\\boxed{5}", "\\boxed{5.0}", "so \\(x = 5\\)", "\\boxed{5\\text{ cm}}"],
    ["\\boxed{11\\sqrt2}", "\\boxed{11\\sqrt{2}}", "\\boxed{11 \\sqrt{2}}"],
    ["\\boxed{(1, 2)}", "\\boxed{\\left(1,2\\right)}"],
    ["\\boxed{2x+1}", "\\boxed{2x + 1}"],
    ["\\boxed{2x}", "\\boxed{2 x}"],
    ["\\boxed{2}", "\\boxed{2\\text{ cm}}", "2 litres"],
    ["\\boxed{\\text{Evelyn}}", "\\boxed{\\text{ Evelyn }}"],
]


def test_equal_answers_are_one_vote_and_others_another_as_the_reward_has_it():
    pytest.importorskip("math_verify")
    read = [{read_math_answer(text) for text in group} for group in EQUAL]
    assert all(len(answers) == 1 and None not in answers for answers in read), read
    assert len(set.union(*read)) == len(EQUAL)
    for group, other in zip(EQUAL, [*EQUAL[1:], EQUAL[0]], strict=True):
        assert math_reward(completions=group, solution=[group[0]] * len(group)) == [1.0] * len(group)
        assert math_reward(completions=other, solution=[group[0]] * len(other)) == [0.0] * len(other)


@settings(max_examples=200, deadline=None)
@given(st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=999))
def test_a_fraction_is_read_in_every_way_to_write_it(value):
    top, bottom = value.numerator, value.denominator
    forms = [f"\\boxed{{{top}/{bottom}}}", f"\\boxed{{\\frac{{{top}}}{{{bottom}}}}}", f"x\n#### {3 * top}/{3 * bottom}"]
    assert {read_math_answer(form) for form in forms} == {str(value)}


@pytest.mark.parametrize("text", ["", "   \n", "\\boxed{}", "no idea", "a formula like \\alpha is none", "####"])
def test_a_text_without_an_answer_has_no_vote(text):
    assert read_math_answer(text) is None
    assert read_testbed_answer(text) is None


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=300), st.sampled_from(["", "\\boxed{", "####", "$\\", "so "]))
def test_any_text_can_be_read(text, mark):
    for read in (read_math_answer, read_testbed_answer):
        assert read(text + mark + text) != ""


words = st.lists(st.sampled_from(["so", "3", "35", "- ", "+", "- 10", "<eos>"]), max_size=6).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(words, words)
def test_a_completion_for_the_testbed_is_right_if_it_ended_and_its_answer_is_a_solution(before, behind):
    for row in build_problems("test", 4):
        for answer in [*row["solution"], "0"]:
            text = f"{before} so {answer} {behind}"
            right = "<eos>" in text and read_testbed_answer(text) in row["solution"]
            assert right == is_correct(row["prompt"], text)


# --- the command line -------------------------------------------------------------------------------------------------


def tasks(*words):
    parser = argparse.ArgumentParser()
    add_eval_task_arguments(parser)
    return load_tasks(parser.parse_args(list(words)))


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "rows.jsonl"
    found.write_text("\n".join(map(json.dumps, questions(200))))
    return str(found)


OWN = ["--reward", "exact_match", "--prompt-column", "question", "--solution-column", "answer"]


def test_without_flags_the_testbed_is_the_task():
    (task,) = tasks("--validation-problems", "3", "--test-problems", "5", "--seed", "4")
    assert task == load_task("testbed", validation=3, test=5, seed=4)


def test_tasks_by_name_and_of_ones_own_stand_side_by_side(path):
    pytest.importorskip("math_verify")
    words = ["--task", "testbed:coin", f"gsm8k={path}", "--task", "testbed", "--dataset", path, *OWN]
    found = tasks(*words, "--solution-after", "####", "--prompt-template", "Q: {prompt}", "--test-problems", "2")
    assert [task.name for task in found] == ["testbed:coin", "gsm8k", "testbed", "rows"]
    own = source(path, solution_after="####", prompt_template="Q: {prompt}")
    assert found[3] == load_task("rows", own, validation=300, test=2)
    assert found[1] == load_task("gsm8k", path, validation=300, test=2)


def test_tasks_of_the_same_name_are_called_what_the_flags_say(path, tmp_path):
    pytest.importorskip("math_verify")
    other = tmp_path / "more.jsonl"
    other.write_text("\n".join(map(json.dumps, questions(250))))
    found = tasks("--task", f"gsm8k={path}", f"gsm8k={other}", "testbed", f"gsm8k={path}", "--test-problems", "1")
    assert [task.name for task in found] == [f"gsm8k={path}", f"gsm8k={other}", "testbed"]


def test_chat_is_for_all_of_them(path):
    (task,) = tasks("--dataset", path, *OWN, "--chat")
    assert all(isinstance(row["prompt"], list) for row in [*task.validation, *task.test])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "gsm9k"], "--task gsm9k: there is no task 'gsm9k'"),
        (["--task", "gsm8k="], "--task gsm8k= has no path"),
        (["--task", "gsm8k=missing.jsonl"], "--task gsm8k=missing.jsonl: --dataset missing.jsonl cannot be read"),
        (["--task", "testbed=rows.jsonl"], "is built in"),
        (["--reward", "math"], "--reward is for --dataset, and none is given"),
        (["--task", "testbed", "--prompt-template", "{prompt}"], "--prompt-template is for --dataset"),
        (["--dataset", "missing.jsonl", *OWN], "^--dataset missing.jsonl cannot be read"),
        (
            ["--dataset", "missing.jsonl"],
            "^--reward testbed does not fit --dataset missing.jsonl: .*pass --reward with",
        ),
        (["--dataset", "testbed", "--chat"], "^--chat asks through a chat template"),
    ],
)
def test_errors_are_in_the_words_of_the_flags(words, said):
    pytest.importorskip("math_verify")
    with pytest.raises(ValueError, match=said):
        tasks(*words)


def test_columns_that_are_not_there_are_told_with_their_flags(path):
    with pytest.raises(ValueError, match=r"and not \['prompt', 'solution'\]; .* --prompt-column and --solution-column"):
        tasks("--dataset", path, "--reward", "exact_match")


@pytest.mark.parametrize("words", [["--test-problems", "0"], ["--reward", "function"], ["--task"]])
def test_wrong_usage_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        tasks(*words)
    assert caught.value.code == 2
    capsys.readouterr()


def test_function_reward_is_one_of_the_rewards_by_name(sandbox):
    assert find_reward("function") is function_reward
    with pytest.raises(ValueError, match="no reward 'nice'"):
        find_reward("nice")
