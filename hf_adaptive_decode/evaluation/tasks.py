"""Tasks to evaluate on, the well-known ones by name, with their reward and how to read an answer for a vote; knows no
model and no decoder.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from .. import rewards
from ..rewards.code import code_reward, extract_program
from ..rewards.columns import completion_texts
from ..rewards.exact import as_number, final_answer, marked_answer, normalise
from ..testbed import testbed_reward
from ..testbed.problems import EOS, SO, TYPES
from ..testbed.tasks import SPLITS
from .sources import REWARDS, TESTBED, Row, Source, check_reward, prompt_key

Reward = Callable[..., Sequence[float | None]]

_MATH_TEMPLATE: Final = "{prompt}\n\nSolve this step by step, and put the final answer, and nothing else, in \\boxed{}."
_FUNCTION_TEMPLATE: Final = (
    "Complete this Python function. Answer with the whole function in one block of code.\n\n```python\n{prompt}\n```"
)
_TESTED_TEMPLATE: Final = (
    "{prompt}\n\nWrite this in Python and answer with one block of code. It has to pass these tests:\n\n"
    "```python\n{tests}\n```"
)

_FORMULA: Final = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)")
_ASSIGNED: Final = re.compile(r"^\s*[a-zA-Z]\s*=")
# `2x` and `3 n`: no number with a unit.
_MONOMIAL: Final = re.compile(r"\d[a-zA-Z]+\s*$|\d\s[a-zA-Z]\s*$")
# `\sqrt{2}` and `\sqrt2`.
_NEEDLESS_BRACES: Final = re.compile(r"\{(\w)\}")

# The testbed, which has a task for each choice of its types, is none of these.
PRESETS: Final[dict[str, Source]] = {
    "gsm8k": Source(
        "openai/gsm8k:main:", "math", "question", "answer", solution_after="####", prompt_template=_MATH_TEMPLATE
    ),
    # Without a column `answer`, as the original set is, the reward reads the box at the end of `solution`.
    "math": Source(
        "HuggingFaceH4/MATH-500",
        "math",
        "problem",
        ("answer", "solution"),
        prompt_template=_MATH_TEMPLATE,
        benchmark=True,
    ),
    "aime": Source(
        "math-ai/aime25",
        "math",
        ("problem", "question"),
        "answer",
        prompt_template=_MATH_TEMPLATE,
        benchmark=True,
    ),
    "humaneval": Source(
        "openai/openai_humaneval", "function", "prompt", "test", prompt_template=_FUNCTION_TEMPLATE, benchmark=True
    ),
    "mbpp": Source(
        "google-research-datasets/mbpp:full:",
        "code",
        ("text", "prompt"),
        "test_list",
        prompt_template=_TESTED_TEMPLATE,
    ),
}


@dataclass(frozen=True)
class Task:
    """
    Problems to choose baselines on, others to report on, and what scores them.

    Args:
        name (`str`): What tables call it.
        validation (sequence of mappings): Rows with a `prompt` and the columns that the reward reads.
        test (sequence of mappings): The same; no prompt is in both.
        reward (`Callable`): In TRL's signature.
        answer (`Callable`, *optional*): The answer that a completion's text gives, or `None` where it gives none; equal
            answers as equal texts. Without it there is no majority to vote.

    Raises:
        `ValueError`: If a row has no `prompt`, or one is in both parts.
    """

    name: str
    validation: Sequence[Mapping[str, Any]]
    test: Sequence[Mapping[str, Any]]
    reward: Reward
    answer: Callable[[str], str | None] | None = None

    def __post_init__(self) -> None:
        for part, rows in (("validation", self.validation), ("test", self.test)):
            for index, row in enumerate(rows):
                if "prompt" not in row:
                    raise ValueError(
                        f"{part} row {index} of task {self.name!r} has the columns {list(row)}, no prompt."
                    )
        shared = {prompt_key(row["prompt"]) for row in self.validation} & {
            prompt_key(row["prompt"]) for row in self.test
        }
        if shared:
            raise ValueError(
                f"{len(shared)} prompts of task {self.name!r} are in both of its parts, such as {min(shared)!r:.200}; "
                "what is chosen on problems cannot be measured on them."
            )


def load_task(
    name_or_source: str | Source,
    source: Any = None,
    *,
    validation: int | None = None,
    test: int | None = None,
    seed: int = 0,
    chat: bool = False,
) -> Task:
    r"""
    A task by its name, or from any data set.

    | name | data set | reward | validation |
    |---|---|---|---|
    | `testbed`, `testbed:coin`, `testbed:coin+sign` | the embedded problems, all or some types | `testbed` | its own |
    | `gsm8k` | `openai/gsm8k` | `math` | a tenth of train |
    | `math` | `HuggingFaceH4/MATH-500`; or MATH's own format | `math` | a fifth |
    | `aime` | `math-ai/aime25` | `math` | a fifth |
    | `humaneval` | `openai/openai_humaneval` | `function` | a fifth |
    | `mbpp` | `google-research-datasets/mbpp`, `full` or `sanitized` | `code` | its own |

    Args:
        name_or_source (`str` or [`Source`]): One of these names, or a data set with all that belongs to it.
        source (*optional*): Beside one of these names a file, folder, Hub id or rows in the same format, in place of
            the data set; beside a name of your own a [`Source`].
        validation, test (`int`, *optional*): At most how many problems; by default all there are, and 100 and 200 of
            each type of the testbed.
        seed (`int`): Which ones.
        chat (`bool`): Whether a text is asked as a user's message, for models with a chat template.

    Raises:
        `ValueError`: If there is no such task, its data cannot be read or lack a column, or a part is empty.
        [`MissingExtraError`], [`SandboxUnavailableError`]: If `datasets` or what the reward needs is missing.

    Example:
        >>> load_task("testbed:coin", validation=10, test=20).test[0]["type"]
        'coin'
    """
    name, found = task_source(name_or_source, source)
    for part, count in (("validation", validation), ("test", test)):
        if count is not None and count < 1:
            raise ValueError(f"`{part}` is {count}; it has to be a number of problems from 1, or None for all.")
    if chat:
        found = replace(found, chat=True)
    reward = find_reward(found.reward)
    test_rows = _rows(found, "test", test, seed)[:test]
    reported = {prompt_key(row["prompt"]) for row in test_rows}
    rest = _rows(found, "validation", validation, seed)
    # A set's own splits may share problems, which then count where they are reported.
    chosen_on = [row for row in rest if prompt_key(row["prompt"]) not in reported][:validation]
    if not chosen_on:
        raise ValueError(
            f"the validation part of {found.label} is empty without the problems that are in its test part as well; "
            "ask for fewer of those, or use another data set."
        )
    answer = _READERS.get(found.reward) if isinstance(found.reward, str) else None
    return Task(name, chosen_on, test_rows, reward, answer)


def task_source(name: str | Source, source: Any = None) -> tuple[str, Source]:
    """
    A task's name, and where its problems come from; of a benchmark nothing is there to train on.

    Args:
        name, source: As [`load_task`] takes them.

    Raises:
        `ValueError`: If there is no such task.
    """
    if isinstance(name, Source):
        if source is not None:
            raise ValueError("the task is a `Source` already; pass it alone, or a name and the `Source`.")
        path = Path(name.label)
        return path.stem if path.is_file() else path.name if path.is_dir() else name.label, name
    if isinstance(source, Source):
        return name, source
    if name.partition(":")[0] == TESTBED:
        if source is not None:
            raise ValueError(f"the task {name!r} is built in and takes no data; pass its name alone.")
        return name, Source(name, TESTBED)
    if name not in PRESETS:
        raise ValueError(
            f"there is no task {name!r}; choose one of {TESTBED}, {TESTBED}:TYPE, {', '.join(PRESETS)}, or hand over a "
            "`Source`, which names the columns and the reward of any other data set."
        )
    return name, PRESETS[name] if source is None else replace(PRESETS[name], dataset=source)


def _rows(source: Source, split: str, n: int | None, seed: int) -> list[Row]:
    """All rows there are; of the testbed, which draws its problems, n or as many as it finds."""
    if not source.is_testbed:
        return source.rows(split, None, seed)
    wanted = SPLITS[split] * len(source.types) // len(TYPES) if n is None else n
    while True:
        try:
            return source.rows(split, wanted, seed)
        except ValueError:  # the problems of a type are used up
            if wanted < len(source.types):
                raise
            wanted = wanted * 9 // 10


def find_reward(reward: str | Reward) -> Reward:
    """
    The reward of a name; a function is its own.

    Args:
        reward (`str` or `Callable`): One of `REWARDS`, or a function in TRL's signature.

    Raises:
        `ValueError`: If there is none of that name.
        [`MissingExtraError`], [`SandboxUnavailableError`]: If it cannot work here.
    """
    if not isinstance(reward, str):
        return reward
    check_reward(reward)
    if reward == TESTBED:
        return testbed_reward
    found: Reward = function_reward if reward == "function" else getattr(rewards, f"{reward}_reward")
    # Scoring nothing finds out now, instead of after the first hour of completions, what is missing.
    found(prompts=[], completions=[], **{name: [] for name in REWARDS[reward]})
    return found


def function_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    tests: Sequence[Any],
    entry_point: Sequence[str],
    completion_ids: Sequence[Sequence[int]] | None = None,
    **columns: Any,
) -> list[float | None]:
    """
    [`~rewards.code_reward`] where the prompt holds the beginning of the function, as HumanEval's does.

    A completion whose first line is indented goes on from the prompt's last block of code, or from the whole prompt if
    it has none, and counts as far as the indentation goes. Any other is a whole program, in which the prompt's imports
    and helpers in front of the function are there as well.

    Args:
        prompts, completions (`Sequence[str | list[dict]]`): Texts or message lists; of a prompt the last message
            counts.
        tests, entry_point: As [`~rewards.code_reward`] takes them.
        completion_ids, **columns: What else TRL passes; not needed.
    """
    rows = zip(completion_texts(prompts), completion_texts(completions), entry_point, strict=True)
    programs = [_fenced(_program(extract_program(prompt), extract_program(text), name)) for prompt, text, name in rows]
    return code_reward(completions=programs, tests=tests, entry_point=entry_point)


def _program(beginning: str, text: str, name: str) -> str:
    lines = text.splitlines(keepends=True)
    first = next(filter(str.strip, lines), "")
    if first[:1] in (" ", "\t"):
        return beginning + "".join(itertools.takewhile(lambda line: not line.strip() or line[0] in " \t", lines))
    signature = re.search(rf"^(?:async )?def {re.escape(name)}\b", beginning, re.MULTILINE)
    return (beginning[: signature.start()] if signature else "") + text


def _fenced(program: str) -> str:
    """In a fence that no program holds, so that one in a docstring of the program is not taken for it."""
    fence = "~" * 20
    return f"{fence}python\n{program}\n{fence}"


def read_testbed_answer(text: str) -> str | None:
    """
    What follows `so` in a completion for the testbed.

    Example:
        >>> read_testbed_answer("- 10 32 + 3 35 so 35 <eos>")
        '35'
    """
    words = f" {' '.join(text.partition(EOS)[0].split())} "
    return words.partition(f" {SO} ")[2].strip() or None


def read_math_answer(text: str) -> str | None:
    r"""
    The final answer of a text: its last box, else what follows `####`, else the last line's last formula or number.

    Numbers are read as exact fractions without their units, other answers without white space and decoration, so equal
    ones are mostly the same text. Those that only algebra shows to be equal (`2(x+1)` and `2x+2`) vote apart.

    Example:
        >>> read_math_answer("so \\boxed{\\frac{1}{2}}"), read_math_answer("It is 0.5 litres.")
        ('1/2', '1/2')
    """
    answer = marked_answer(text)
    if answer is None:
        line = final_answer(text, wants_number=False) or ""
        formulas = [one or other for one, other in _FORMULA.findall(line)] if "\\" in line else []
        answer = formulas[-1] if formulas else final_answer(text, wants_number=True)
    answer = _ASSIGNED.sub("", answer or "").replace("{,}", ",")
    number = None if _MONOMIAL.search(answer) else as_number(answer)
    return str(number) if number is not None else _NEEDLESS_BRACES.sub(r"\1", normalise(answer)) or None


_READERS: Final[dict[str, Callable[[str], str | None]]] = {
    TESTBED: read_testbed_answer,
    "math": read_math_answer,
    "exact_match": read_math_answer,
}
