"""What every reward does with its arguments: texts out of completions, columns that pair up, work in threads; knows
nothing of how anything is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Job = TypeVar("Job")


def completion_texts(completions: Sequence[Any]) -> list[str]:
    """
    The text of each completion: itself, or what the assistant says in a conversational one.

    Args:
        completions (`Sequence[str | list[dict]]`): Plain texts or message lists; of a list, the last message with a
            text counts. A content made of parts counts with its text parts.

    Raises:
        `ValueError`: If a completion is neither.
    """
    return [_text(completion, index) for index, completion in enumerate(completions)]


def _text(completion: Any, index: int) -> str:
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Mapping):
        completion = [completion]
    if isinstance(completion, Sequence) and all(isinstance(message, Mapping) for message in completion):
        for message in reversed(completion):
            content = message.get("content")
            if isinstance(content, str):
                return content
            if isinstance(content, Sequence):
                return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
        return ""
    raise ValueError(
        f"Completion {index} is a {type(completion).__name__}. It has to be a text or a list of messages with "
        "`role` and `content`."
    )


def check_column(name: str, column: Sequence[Any] | None, completions: Sequence[Any]) -> Sequence[Any]:
    """
    A column that has one entry a completion.

    Args:
        name (`str`): Its name, for the message.
        column (`Sequence`, *optional*): The column.
        completions (`Sequence`): The completions.

    Raises:
        `ValueError`: If it is missing, a lone text, or of another length.
    """
    if column is None or isinstance(column, str | bytes):
        raise ValueError(
            f"The column `{name}` has to be a list with one entry a completion. Got {type(column).__name__}."
        )
    if len(column) != len(completions):
        raise ValueError(
            f"Got {len(completions)} completions and {len(column)} entries of `{name}`. They must pair up."
        )
    return column


def score_in_threads(score: Callable[[Job], float | None], jobs: Sequence[Job], workers: int) -> list[float | None]:
    """
    `[score(job) for job in jobs]`, several at a time.

    Args:
        score (`Callable`): Scores one job.
        jobs (`Sequence`): The jobs.
        workers (`int`): How many threads at most.
    """
    if workers < 1:
        raise ValueError(f"`workers` must be at least 1. Got {workers}.")
    if workers == 1 or len(jobs) < 2:
        return [score(job) for job in jobs]
    with ThreadPoolExecutor(max_workers=min(workers, len(jobs)), thread_name_prefix="reward") as pool:
        return list(pool.map(score, jobs))
