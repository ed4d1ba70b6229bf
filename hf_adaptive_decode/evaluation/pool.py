"""Mean reward of each candidate setting on each problem, resumable; knows nothing of how actions are then chosen."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .. import __version__
from ..actions import describe
from ..budget import resolve_budget
from ..configuration import AutoDecoConfig
from ..engines.transformers import complete
from ..types import Budget
from .digests import model_digest, rows_digest
from .lines import AppendedLines
from .runner import Reward, score

POOL_FILE = "pool.jsonl"
_FORMAT = 1


def evaluate_pool(
    model: PreTrainedModel,
    tokenizer: Any,
    problems: Sequence[Mapping[str, Any]],
    reward: Reward,
    pool: Sequence[Mapping[str, float]],
    *,
    samples: int,
    token_budget: int | Sequence[int],
    seed: int = 0,
    batch_rows: int = 256,
    folder: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
) -> np.ndarray:
    """
    Q(s) on each problem: the mean reward of a candidate's samples (Adaptive Decoding, appendix C).

    All candidates draw the same random numbers, from the seed, the problem's place and the sample's number alone. So
    neither the pool's order nor what was done before matters, and candidates that decode alike earn alike.

    Args:
        model, tokenizer: A base model and its tokenizer.
        problems (sequence of mappings): Rows with a `prompt` and whatever columns the reward needs.
        reward (`Callable`): In TRL's signature; its values count as they are.
        pool (sequence of mappings): Static settings, such as [`candidate_pool`] gives; a repeated one runs once.
        samples, token_budget, seed, batch_rows: As [`~engines.transformers.complete`] takes them.
        folder (`str`, *optional*): Where `pool.jsonl` keeps each finished candidate. A call that was killed picks up
            from there and repeats at most one candidate; so does one with a larger pool.
        show_progress (`bool`): Whether to show progress bars.

    Raises:
        [`AdapterConfigError`]: If a candidate is no sampling configuration.
        `ValueError`: If there are no problems, a reward is not finite, or the folder holds another evaluation.

    Returns:
        `np.ndarray` of shape `[problems, candidates]`, `float64`, ready for [`select_actions`].
    """
    if not len(problems):
        raise ValueError("`problems` is empty; pass at least one row with a `prompt`.")
    # Both before a file is begun that a corrected call could not go on with.
    resolve_budget(Budget(tokens=token_budget, samples=samples), prompts=len(problems))
    AutoDecoConfig(policy="static", actions=[dict(settings) for settings in pool])
    how: dict[str, Any] = {"samples": samples, "token_budget": token_budget, "seed": seed}
    record = None
    if folder is not None:
        record = _Record(Path(folder, POOL_FILE), _header(model, problems, reward, **how), len(problems))
    done = {} if record is None else record.done
    for settings in tqdm(pool, desc="candidates", unit="candidate", disable=not show_progress, leave=False):
        if _key(settings) in done:
            continue
        name = describe(dict(settings)) if show_progress else None
        prompts = [row["prompt"] for row in problems]
        how |= {"batch_rows": batch_rows, "settings": settings, "description": name}
        completions = complete(model, tokenizer, prompts, **how)
        rewards = _finite(score(completions, problems, reward).mean(axis=1), settings)
        if record is not None:
            tokens = [len(one.token_ids) for group in completions for one in group]
            record.append(settings, rewards, float(np.mean(tokens)))
        done[_key(settings)] = rewards
    return np.stack([done[_key(settings)] for settings in pool], axis=1)


class _Record:
    """
    The file of finished candidates: a header that says of what, then a line each.

    Args:
        path (`Path`): The file; begun if it is not there.
        header (`dict`): What has to be the same for a line to count.
        problems (`int`): How many rewards a line holds.
    """

    def __init__(self, path: Path, header: dict[str, Any], problems: int) -> None:
        self._file = AppendedLines(path)
        self.done: dict[str, np.ndarray] = {}
        if not self._file.found:
            self._file.append([header])
            return
        first, *others = self._file.found
        # As it reads once it has been written: a list where a tuple was.
        self._compare(first, json.loads(json.dumps(header)))
        for number, entry in enumerate(others, start=2):
            key, rewards = self._parse(entry, number, problems)
            self.done[key] = rewards

    def append(self, settings: Mapping[str, float], rewards: np.ndarray, mean_tokens: float) -> None:
        """Adds a finished candidate; on disk when this returns."""
        self._file.append([{"settings": dict(settings), "rewards": rewards.tolist(), "mean_tokens": mean_tokens}])

    def _compare(self, found: dict[str, Any], header: dict[str, Any]) -> None:
        path = self._file.path
        if "format" not in found:
            raise ValueError(f"{path} is no record of a pool; choose another folder or delete the file.")
        wrong = [
            f"`{name}` is {found.get(name)!r} there and {header.get(name)!r} here"
            for name in {**header, **found}
            if found.get(name) != header.get(name)
        ]
        if wrong:
            raise ValueError(
                f"{path} holds another evaluation: {'; '.join(wrong)}. Choose another folder or delete the file."
            )

    def _parse(self, entry: dict[str, Any], number: int, problems: int) -> tuple[str, np.ndarray]:
        try:
            key, rewards = _key(entry["settings"]), np.asarray(entry["rewards"], dtype=np.float64)
        except (ValueError, TypeError, KeyError, AttributeError):
            rewards = np.empty(0)
        if rewards.shape != (problems,) or not np.isfinite(rewards).all():
            raise ValueError(
                f"line {number} of {self._file.path} is damaged: it has to hold `settings` and {problems} `rewards`; "
                "delete that line, which is then done again, or the file."
            )
        return key, rewards


def _header(
    model: PreTrainedModel, problems: Sequence[Mapping[str, Any]], reward: Reward, **how: Any
) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "library": __version__,
        "model": model_digest(model),
        "problems": rows_digest(problems),
        "reward": getattr(reward, "__name__", type(reward).__name__),
        **how,
    }


def _finite(rewards: np.ndarray, settings: Mapping[str, float]) -> np.ndarray:
    if not np.isfinite(rewards).all():
        index = int(np.flatnonzero(~np.isfinite(rewards))[0])
        raise ValueError(
            f"the mean reward of {dict(settings)} on problem {index} is {rewards[index]}; rewards have to be finite."
        )
    return rewards


def _key(settings: Mapping[str, float]) -> str:
    return json.dumps({name: float(value) for name, value in settings.items()}, sort_keys=True)
