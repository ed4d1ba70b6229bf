"""Whether an adapter helps, in plain words; knows scores by problem and nothing of how they came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..actions import describe
from .metrics import Interval, bootstrap_intervals, sign_flip_p

HELPS, AS_WELL, NOTHING, HURTS = "helps_beyond_mean", "mean_does_as_well", "no_evidence", "hurts"
# Three ways to a false word (that it helps, that it is worse than plain decoding, that its choices hurt), each
# one-sided at 1 %: together at most 3 %, which leaves room for the bootstrap's own error on few problems. Where few
# differ at all, its intervals are far too narrow (five that all went up are enough), so a test of signs has to agree.
CONFIDENCE = 0.98
_P = (1 - CONFIDENCE) / 2
FEWEST_PROBLEMS = 30
UNTUNED = ("greedy", "default")
STATIC = ("mean_shift", "best_static")


@dataclass(frozen=True)
class Verdict:
    """
    What one comparison says of an adapter.

    Args:
        verdict (`str`): `"helps_beyond_mean"`, `"mean_does_as_well"`, `"no_evidence"` or `"hurts"`.
        sentence (`str`): The same in plain words, with the numbers.
        k (`int`): Of which pass@k.
        evidence (mapping of `str` to [`Interval`]): The adapter's paired gain over each baseline, at `confidence`.
        static (`dict`, *optional*): The setting to use instead, where a static one does as well.
        confidence (`float`): What the intervals cover.
    """

    verdict: str
    sentence: str
    k: int
    evidence: Mapping[str, Interval]
    static: dict[str, float] | None = None
    confidence: float = CONFIDENCE

    def as_dict(self) -> dict[str, Any]:
        """Of JSON's types."""
        return asdict(self)


def judge(
    adapter: np.ndarray,
    baselines: Mapping[str, np.ndarray],
    statics: Mapping[str, Mapping[str, float]],
    k: int = 1,
    seed: int = 0,
) -> Verdict:
    """
    The verdict on an adapter's pass@k.

    - *Helps beyond its mean*: better than greedy decoding and than default sampling, and better than both its own mean
      and the best static setting.
    - *A static setting does as well*: better than the first two, not shown to be better than one of the others.
    - *Hurts*: worse than greedy decoding and than default sampling both, or worse than its own mean, so that its
      choices are what does the harm.
    - *No evidence*: anything else.

    Each comparison is paired by problem: a 98 % bootstrap interval has to leave out 0, and a sign-flip test at 1 % has
    to agree. An adapter that changes nothing is called
    anything but "no evidence" at most 5 % of the time (a test holds it).

    Args:
        adapter (`np.ndarray` of shape `[problems]`): The adapter's pass@k on each problem.
        baselines (mapping of `str` to `np.ndarray`): The same of `"greedy"`, `"default"`, `"mean_shift"` and
            `"best_static"`.
        statics (mapping of `str` to mapping): The settings of the last two, the better one on validation first.
        k (`int`): Of which pass@k.
        seed (`int`): Seeds the bootstrap.

    Raises:
        `ValueError`: If a baseline is missing.
    """
    missing = [name for name in (*UNTUNED, *STATIC) if name not in baselines]
    if missing:
        raise ValueError(f"a verdict needs the baselines {', '.join(missing)}, too.")
    differences = [adapter - values for values in baselines.values()]
    gains = dict(zip(baselines, bootstrap_intervals(differences, seed, confidence=CONFIDENCE), strict=True))
    pairs = dict(zip(baselines, differences, strict=True))
    better = {name: gain.low > 0 and sign_flip_p(pairs[name], seed) <= _P for name, gain in gains.items()}
    worse = {name: gain.high < 0 and sign_flip_p(-pairs[name], seed) <= _P for name, gain in gains.items()}
    static = None
    if len(adapter) < FEWEST_PROBLEMS:
        verdict = NOTHING
    elif all(better[name] for name in UNTUNED):
        unbeaten = [dict(settings) for name, settings in statics.items() if not better[name]]
        verdict, static = (AS_WELL, unbeaten[0]) if unbeaten else (HELPS, None)
    else:
        verdict = HURTS if worse["mean_shift"] or all(worse[name] for name in UNTUNED) else NOTHING
    return Verdict(verdict, _sentence(verdict, gains, static, k, len(adapter)), k, gains, static)


def _sentence(verdict: str, gains: Mapping[str, Interval], static: Mapping[str, float] | None, k: int, n: int) -> str:
    what = f"pass@{k} on {n} problems: "
    against = {name: _points(gain) for name, gain in gains.items()}
    plain = f"{against['greedy']} against greedy decoding, {against['default']} against default sampling"
    means = f"{against['mean_shift']} against its own mean, {against['best_static']} against the best static setting"
    if n < FEWEST_PROBLEMS:
        return f"No evidence: {n} problems are too few to tell (at least {FEWEST_PROBLEMS} are needed)."
    if verdict == HELPS:
        return f"It helps, beyond its mean. {what}{plain}; {means}."
    if verdict == AS_WELL:
        named = describe(static or {})
        return f"It helps, but a static setting does as well: use {named} instead. {what}{plain}; {means}."
    if verdict == HURTS:
        return f"It hurts. {what}{plain}; {means}."
    return f"No evidence that it helps. {what}{plain}; {means}."


def _points(gain: Interval) -> str:
    return f"{100 * gain.mean:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
