"""Rewards programs that pass their tests, run in a sandbox or not at all; knows no model and trusts no program.

The verdict is formed where the program cannot reach. With inputs and outputs, the program's output is compared here,
and the expected output never enters the sandbox. With asserts, the tests run in one sandbox and the program in another:
the tests call the program's functions through this process, and only plain data crosses, built anew as exactly the
built-in types. So leaving early, printing "passed", replacing `json` or builtins, reading frames, a `__eq__` that is
always true or an exit handler decide nothing: all that a program can do is to return values.

What cannot be excluded: a program that returns right values without computing them, for instance because it knows the
tests by heart; one that breaks out through a fault of the kernel; and one that uses up the time of others, since the
processor is shared. Tests see data and functions only: a class of the program's, its instances and functions as
arguments do not cross, so such tests fail even for right programs. A name that tests use and do not define is the
program's. Programs and tests see the standard library alone.
"""

from __future__ import annotations

import ast
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from .columns import check_column, completion_texts, score_in_threads
from .confinement import Limits, module_text, working_sandbox
from .sandbox import Sandboxed

logger = logging.getLogger(__name__)

MAX_CHARACTERS: Final = 100_000
# How many requests tests may make of a program, and how many bytes either may write for that.
MAX_MESSAGES: Final = 100_000
MAX_TRAFFIC: Final = 8 * 1024**2
_FENCE = re.compile(
    r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+-]*)[^\n`]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL
)
_RUNNER: Final = "_code_runner.py"
_PYTHON: Final = ("python", "py", "python3")

Tests = str | Sequence[str] | Sequence[Mapping[str, Any]]


def code_reward(
    completions: Sequence[Any],
    tests: Sequence[Tests | None],
    prompts: Sequence[Any] | None = None,
    completion_ids: Sequence[Sequence[int]] | None = None,
    entry_point: Sequence[str | None] | None = None,
    *,
    timeout: float = 10.0,
    limits: Limits | None = None,
    workers: int = 2,
    **columns: Any,
) -> list[float | None]:
    r"""
    1.0 where the program passes all its tests, 0.0 where it fails one, `None` where there are no tests.

    The program is the last fenced block of Python of a completion, or the whole text where there is no fence.

    Args:
        completions (`Sequence[str | list[dict]]`): Texts or message lists.
        tests (`Sequence[str | list[str] | list[dict] | None]`): The tests of each completion: Python with asserts, a
            list of such, or dicts with `input` and `output`, for which the program is run as a script; outputs are
            compared line by line without white space at the ends of lines and of the output.
        prompts, completion_ids, **columns: What else TRL passes; not needed.
        entry_point (`Sequence[str | None]`, *optional*): The function to call `check` with, where tests define
            `check(candidate)` and do not call it, as HumanEval's do.
        timeout (`float`): Seconds for all asserts of a completion together, or for each input.
        limits ([`~rewards.confinement.Limits`], *optional*): What else a program may use; its `seconds` are not read.
        workers (`int`): How many completions are tested at once.

    Raises:
        [`SandboxUnavailableError`]: If no sandbox works on this machine. Nothing is ever run without one.
        `ValueError`: If tests are empty, are no Python, or have no `input` and `output`.

    Example:
        >>> code_reward(completions=["def double(x):\n    return 2 * x"], tests=["assert double(4) == 8"])
        [1.0]
    """
    check_column("tests", tests, completions)
    names = [None] * len(completions) if entry_point is None else check_column("entry_point", entry_point, completions)
    texts = completion_texts(completions)
    limits = replace(limits or Limits(), seconds=timeout)
    prepared = [_prepare(one, name, index) for index, (one, name) in enumerate(zip(tests, names, strict=True))]
    # Asked here as well as at every start, so that a machine without a sandbox is an error even if all texts are empty.
    working_sandbox()
    jobs = [(extract_program(text), one) for text, one in zip(texts, prepared, strict=True)]
    return score_in_threads(lambda job: _score(*job, limits), jobs, workers)


def extract_program(text: str) -> str:
    """
    The last fenced block marked as Python, else the last one with no language, else the whole text.

    Args:
        text (`str`): A completion. A block that is not closed ends with the text.
    """
    blocks = [(match[2].lower(), match[3]) for match in _FENCE.finditer(text[:MAX_CHARACTERS])]
    for wanted in (_PYTHON, ("",)):
        found = [body for language, body in blocks if language in wanted]
        if found:
            return found[-1]
    return text


def _prepare(tests: Tests | None, entry_point: str | None, index: int) -> str | list[tuple[str, str]] | None:
    """Tests as one text of Python or as pairs of input and output; a `ValueError` names the row."""
    if tests is None:
        return None
    if isinstance(tests, Sequence) and not isinstance(tests, str):
        if tests and all(isinstance(test, Mapping) and {"input", "output"} <= set(test) for test in tests):
            return [(_as_text(test["input"]), _as_text(test["output"])) for test in tests]  # type: ignore[call-overload,index]
        if not tests or not all(isinstance(test, str) for test in tests):
            raise ValueError(
                f"The tests of row {index} have to be Python with asserts, a list of such, or dicts with `input` and "
                f"`output`, and at least one. Got {ascii(tests)[:200]}."
            )
        tests = "\n".join(str(test) for test in tests)
    if not isinstance(tests, str):
        raise ValueError(f"The tests of row {index} are a {type(tests).__name__}. They have to be a text or a list.")
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"The tests of row {index} are no Python: {error}.") from error
    if not tree.body:
        raise ValueError(f"The tests of row {index} are empty.")
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    if entry_point is not None and "check" in defined - called:
        if not entry_point.isidentifier():
            raise ValueError(f"The entry point of row {index} is no name: {ascii(entry_point)[:80]}.")
        tests += f"\ncheck({entry_point})\n"
    return tests


def _as_text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _score(program: str, tests: str | list[tuple[str, str]] | None, limits: Limits) -> float | None:
    if tests is None:
        return None
    if not program.strip() or len(program) > MAX_CHARACTERS:
        return 0.0
    if isinstance(tests, str):
        return float(_passes_asserts(program, tests, limits))
    return float(all(_prints(program, given, expected, limits) for given, expected in tests))


def _prints(program: str, given: str, expected: str, limits: Limits) -> bool:
    """Whether the program ends well and its output is the expected one."""
    payload = {"role": "program", "source": program}
    with Sandboxed(module_text(_RUNNER), payload, limits) as sandbox:
        done = sandbox.communicate(given.encode(errors="replace"))
    if done is None:
        return False
    output, code = done
    return code == 0 and _lines(output.decode(errors="replace")) == _lines(expected)


def _lines(output: str) -> list[str]:
    return [line.rstrip() for line in output.strip().splitlines()]


def _passes_asserts(program: str, tests: str, limits: Limits) -> bool:
    """
    Whether the tests, in their sandbox, pass with what the program, in another, returns.

    The program gets the names of its functions and their arguments, never the tests. It has to have answered at least
    once: tests that use nothing of it prove nothing.
    """
    traffic = replace(limits, output=MAX_TRAFFIC)
    source = module_text(_RUNNER)
    with (
        Sandboxed(source, {"role": "tests", "tests": tests}, traffic) as checker,
        Sandboxed(source, {"role": "candidate", "source": program}, traffic) as candidate,
    ):
        checker.deadline = candidate.deadline
        if _message(candidate.receive_line()) != {"loaded": True}:
            return False
        values = 0
        for _ in range(MAX_MESSAGES):
            request = _message(checker.receive_line())
            if request is None:
                return False
            if "passed" in request:
                return request["passed"] is True and values > 0
            candidate.send_line(json.dumps(request).encode())
            reply = _message(candidate.receive_line())
            if reply is None:
                return False
            values += "value" in reply or "raised" in reply
            checker.send_line(json.dumps(reply).encode())
    return False


def _message(line: bytes | None) -> dict[str, Any] | None:
    """A line as a message, or `None` for anything that is none."""
    try:
        message = json.loads(line) if line is not None else None
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
