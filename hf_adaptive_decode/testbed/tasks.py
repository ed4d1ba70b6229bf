"""The testbed's problems as plain rows with disjoint splits, their exact verifier and a reward in TRL's signature; it
knows no model and no tokenizer.

A completion earns its reward only if it ended by itself inside the token budget, so a truncated one earns nothing even
when its last words happen to be right.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from ..errors import MissingExtraError
from .problems import EOS, SO, TYPES, VOCABULARY, draw_problem, parse_prompt

if TYPE_CHECKING:
    from datasets import Dataset

EOS_TOKEN_ID: Final = VOCABULARY.index(EOS)
SPLITS: Final = {"train": 4000, "validation": 400, "test": 800}
TEST_PERCENT: Final = 8
VALIDATION_PERCENT: Final = 6
# How many draws in a row may bring nothing new before the type counts as used up.
PATIENCE: Final = 20_000


def split_of(prompt: str) -> str:
    """
    The split that a prompt belongs to, from a hash of its text alone: stable across versions, seeds and machines.

    Args:
        prompt (`str`): The prompt.

    Example:
        >>> split_of("run 42 - 10 + 3 =>") in ("train", "validation", "test")
        True
    """
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 100
    if bucket < TEST_PERCENT:
        return "test"
    return "validation" if bucket < TEST_PERCENT + VALIDATION_PERCENT else "train"


def in_training_split(prompt: str) -> bool:
    """Whether a model of the testbed may be trained on this prompt."""
    return split_of(prompt) == "train"


def build_problems(
    split: str, n: int | None = None, types: Sequence[str] | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """
    Distinct problems of one split, the types taking turns, so that every prefix is balanced.

    Args:
        split (`str`): `"train"`, `"validation"` or `"test"`; a prompt never appears in two of them, whatever the seed.
        n (`int`, *optional*): How many rows; by default 4000, 400 and 800.
        types (`Sequence[str]`, *optional*): The types to draw from, by default all four.
        seed (`int`): Which problems of the split.

    Returns:
        `list[dict]`: Rows with `prompt` (`str`), `type` (`str`) and `solution` (`list[str]`: every right answer).
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}. Choose from {', '.join(SPLITS)}.")
    chosen = tuple(TYPES if types is None else types)
    if not chosen or not set(chosen) <= set(TYPES):
        raise ValueError(f"Unknown types {chosen!r}. Choose some of {', '.join(TYPES)}.")
    total = SPLITS[split] if n is None else n
    if total < 0:
        raise ValueError(f"`n` must not be negative. Got {n}.")
    wanted = [len(range(turn, total, len(chosen))) for turn in range(len(chosen))]
    columns = [_draw_rows(split, kind, count, seed) for kind, count in zip(chosen, wanted, strict=True)]
    return [columns[i % len(chosen)][i // len(chosen)] for i in range(total)]


def _draw_rows(split: str, kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` distinct problems of one type in one split."""
    rng = random.Random(f"{split} {kind} {seed}")
    rows: dict[str, dict[str, Any]] = {}
    misses = 0
    while len(rows) < count:
        problem = draw_problem(kind, rng)
        prompt = problem.prompt
        if prompt not in rows and split_of(prompt) == split:
            rows[prompt] = {"prompt": prompt, "type": kind, "solution": problem.answers}
            misses = 0
        elif (misses := misses + 1) > PATIENCE:
            raise ValueError(f"The {split} split has only about {len(rows)} problems of type {kind!r}, not {count}.")
    return list(rows.values())


def to_dataset(rows: list[dict[str, Any]]) -> Dataset:
    """
    Rows of `build_problems` as a `datasets.Dataset`, ready for a trainer.

    Args:
        rows (`list[dict]`): The rows.
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise MissingExtraError("datasets", "train") from error
    return Dataset.from_list(rows)


def is_correct(prompt: str, completion: str, ended: bool | None = None) -> bool:
    """
    Whether a completion answers its prompt: it ended, said `so` once, and a right answer and nothing else follows.

    Args:
        prompt (`str`): The prompt, as `build_problems` wrote it.
        completion (`str`): What the model wrote after it; anything behind the first `<eos>` is ignored.
        ended (`bool`, *optional*): Whether the model wrote `<eos>`, for texts decoded without special tokens. By
            default this is read from the text, so a text without `<eos>` counts as truncated.

    Example:
        >>> is_correct("run 42 - 10 + 3 =>", "- 10 32 + 3 35 so 35 <eos>")
        True
        >>> is_correct("run 42 - 10 + 3 =>", "- 10 32 + 3 35 so 35")
        False
    """
    body, mark, _ = completion.partition(EOS)
    if not (bool(mark) if ended is None else ended):
        return False
    _, so, answer = f" {' '.join(body.split())} ".partition(f" {SO} ")
    return bool(so) and answer.strip() in parse_prompt(prompt).answers


def testbed_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]] | None = None,  # noqa: PT028 (a reward, not a test)
    **columns: Any,
) -> list[float]:
    """
    1.0 for a right completion that ended by itself, 0.0 otherwise, in TRL's reward signature.

    Args:
        prompts (`Sequence[str]`): One prompt a completion.
        completions (`Sequence[str]`): The texts. Where they still hold `<eos>` it shows that the completion ended.
        completion_ids (`Sequence[Sequence[int]]`, *optional*): The tokens, from which the end is read when the texts
            were decoded without special tokens, as TRL does. Without them a text without `<eos>` earns nothing.
        **columns: The other columns of the dataset; not needed.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"Got {len(prompts)} prompts and {len(completions)} completions. They must pair up.")
    if completion_ids is None:
        return [float(is_correct(p, c)) for p, c in zip(prompts, completions, strict=True)]
    if len(completion_ids) != len(completions):
        raise ValueError(f"Got {len(completion_ids)} rows of `completion_ids` and {len(completions)} completions.")
    ended = [EOS_TOKEN_ID in list(ids) for ids in completion_ids]
    return [float(is_correct(p, c, e)) for p, c, e in zip(prompts, completions, ended, strict=True)]


# pytest collects imported functions whose names begin with `test`; this is not one of them.
testbed_reward.__test__ = False  # type: ignore[attr-defined]
