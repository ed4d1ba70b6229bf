"""Compares answers with math-verify, a JSON line in and a JSON line out; run by `math`, knows no reward and no model.

It stands in a process of its own so that a comparison that never ends, or eats all memory, can be killed.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
from typing import Any


def parse_solution(text: str) -> list[Any]:
    """
    A solution as expressions: a bare answer is read as LaTeX, a text with its own marks as it stands.

    Args:
        text (`str`): The solution.
    """
    marked = any(mark in text for mark in ("$", r"\boxed", r"\(", r"\["))
    for form in [text] if marked else [f"${text}$", text]:
        if found := _parse(form):
            return found
    return []


def _parse(text: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse  # type: ignore[import-untyped]

    # No timeouts of math-verify's own: they rest on SIGALRM inside the comparison; here the whole process is killed.
    found: list[Any] = parse(
        text, [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()], parsing_timeout=None
    )
    return found


def compare(solution: str, answers: list[str]) -> bool | None:
    """
    Whether an answer is equal to the solution; `None` if the solution is no mathematics.

    Args:
        solution (`str`): The solution.
        answers (`list[str]`): Texts with the answer, or ways to read the same text; one that is equal is enough.
    """
    from math_verify import verify

    expected = parse_solution(solution)
    if not expected:
        return None
    readings = (_parse(answer) for answer in answers)
    return any(found and verify(expected, found, timeout_seconds=None) for found in readings)


def main() -> None:
    """Answers lines until the input ends. The first line holds the limits."""
    limits = json.loads(sys.stdin.readline())
    logging.disable(logging.CRITICAL)
    reply = sys.stdout
    sys.stdout = sys.stderr
    reply.write(json.dumps({"ready": _warm_up()}) + "\n")
    reply.flush()
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory"], limits["memory"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Should the parent be gone, the alarm ends a comparison that nobody will kill any more.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin:
        request = json.loads(line)
        signal.alarm(limits["alarm"])
        try:
            result: dict[str, Any] = {"equal": compare(request["solution"], request["answers"])}
        except Exception as error:
            result = {"error": type(error).__name__}
        signal.alarm(0)
        reply.write(json.dumps({"id": request["id"], **result}) + "\n")
        reply.flush()


def _warm_up() -> bool:
    """Loads everything, so that no comparison's deadline pays for it; `False` if math-verify is not installed."""
    try:
        return compare("1", ["$1$"]) is True
    except ImportError:
        return False


if __name__ == "__main__":
    main()
