"""Training text from the model itself: samples solutions and keeps verified ones; knows no losses and no files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..engines.base import Completion
from ..engines.engine import Engine, is_greedy
from ..engines.prompts import encode_prompt
from ..engines.transformers import TransformersEngine
from ..evaluation.digests import model_digest, rows_digest
from ..evaluation.runner import Reward, score_rows
from ..evaluation.store import CompletionStore
from ..losses import IGNORE_INDEX

# From cold to hot: greedy first, plain sampling last.
LADDER: tuple[dict[str, float], ...] = ({"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 1.0})

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Drawn:
    """
    One completion of a problem, without its text.

    Args:
        problem (`int`): Which problem.
        rung (`int`): Which setting of the ladder it was sampled at.
        run (`str`), place (`tuple[int, int]`): Where the store has it.
        reward (`float`): What it earned.
        tokens (`int`): Its length.
        ended (`bool`): Whether it ended by itself.
        digest (`str`): The same for the same tokens.
    """

    problem: int
    rung: int
    run: str
    place: tuple[int, int]
    reward: float
    tokens: int
    ended: bool
    digest: str

    @property
    def verified(self) -> bool:
        """Whether it may be learned from: what was cut off would teach not to end."""
        return self.ended and self.reward >= 1


def draw_solutions(
    engine: Engine,
    problems: Sequence[Row],
    reward: Reward,
    *,
    samples: int,
    token_budget: int,
    ladder: Sequence[Mapping[str, float]] = LADDER,
    seed: int = 0,
    store: CompletionStore,
    show_progress: bool = True,
) -> list[list[Drawn]]:
    """
    Completions of each problem, scored, from the coldest setting up to the one that solves it.

    A solution sampled hotter than its problem needs holds slips that happened not to matter, and heads trained on it
    learn to allow them. So a problem moves on to the next setting of `ladder` only if no sample was right and ended.

    Args:
        engine ([`Engine`]): Decodes.
        problems (sequence of mappings): Rows with a `prompt` and the reward's columns.
        reward (`Callable`): In TRL's signature; a completion that earns at least 1 is right.
        samples (`int`): Completions drawn of a problem at each setting; one at temperature 0.
        token_budget (`int`): Most tokens of each.
        ladder (sequence of mappings): Static settings, from cold to hot.
        seed (`int`): Seeds the draws.
        store ([`CompletionStore`]): Keeps completions; what is there already is not sampled again.
        show_progress (`bool`): Whether to show progress bars.

    Returns:
        The draws of each problem, in the order of `problems`, by setting and sample.
    """
    drawn: list[list[Drawn]] = [[] for _ in problems]
    own = {"model": model_digest(engine.model), "engine": engine.name, "token_budget": token_budget}
    own["reward"] = getattr(reward, "__name__", type(reward).__name__)
    for rung, settings in enumerate(ladder):
        open_problems = [index for index, of in enumerate(drawn) if not any(one.verified for one in of)]
        if not open_problems:
            break
        rows = [problems[index] for index in open_problems]
        how: dict[str, Any] = {"settings": dict(settings), "seed": seed + rung}
        heat = f"solutions at T={settings.get('temperature', 1.0):g}"
        run = store.run({**own, **how, "problems": rows_digest(rows)}, heat)
        each = 1 if is_greedy(settings) else samples
        # A draw depends on the problem's place among the open ones.
        places = [(place, sample) for place in range(len(rows)) for sample in range(each)]
        wanted = [place for place in places if place not in store.done(run)]
        with tqdm(total=len(wanted), desc=heat, unit="row", disable=not show_progress, leave=False) as bar:
            prompts = [row["prompt"] for row in rows]
            for batch in engine.complete_batches(
                prompts, wanted, token_budget=token_budget, parallel_budget=each, **how
            ):
                store.add(_lines(run, rows, batch, reward))
                bar.update(len(batch))
        for place in places:
            line = store.done(run)[place]
            known = {name: line[name] for name in ("reward", "tokens", "ended", "digest")}
            index = open_problems[place[0]]
            drawn[index].append(Drawn(index, rung, run, place, **known))
    return drawn


def _lines(
    run: str, rows: Sequence[Row], batch: Sequence[tuple[int, int, Completion]], reward: Reward
) -> list[dict[str, Any]]:
    rewards = score_rows([rows[index] for index, *_ in batch], [one for *_, one in batch], reward)
    return [
        {
            "run": run,
            "problem": index,
            "sample": sample,
            "reward": float(score),
            "tokens": len(one.token_ids),
            "ended": one.ended,
            "digest": hashlib.sha256(str(one.token_ids).encode()).hexdigest()[:16],
            "text": one.text,
            "token_ids": list(one.token_ids),
        }
        for (index, sample, one), score in zip(batch, rewards, strict=True)
    ]


def choose(drawn: Sequence[Drawn], keep: int, distinct: bool = True) -> list[Drawn]:
    """
    The verified draws of one problem that are learned from, at most `keep`.

    They are the first by sample number, which are as random as any others, since the draws are; so a larger `keep` or
    more samples add to what fewer gave.

    Args:
        drawn (sequence of [`Drawn`]): All of the problem.
        keep (`int`): Most of them.
        distinct (`bool`): Whether of equal ones only the first counts.
    """
    verified = [one for one in drawn if one.verified]
    if distinct:
        first: dict[str, Drawn] = {}
        for one in verified:
            first.setdefault(one.digest, one)
        verified = list(first.values())
    return verified[:keep]


def verified_completions(
    model: PreTrainedModel,
    tokenizer: Any,
    problems: Sequence[Row],
    reward: Reward,
    *,
    samples: int = 4,
    keep: int = 2,
    token_budget: int = 256,
    ladder: Sequence[Mapping[str, float]] = LADDER,
    seed: int = 0,
    batch_rows: int = 256,
    store: CompletionStore | None = None,
    show_progress: bool = True,
) -> list[dict[str, list[int]]]:
    """
    Rejection-sampled solutions (AutoDeco, section 3.1), each problem's from the coldest setting that solves it.

    Args:
        model, tokenizer: The base model and its tokenizer.
        keep (`int`): How many right ones to keep of a problem.
        problems, reward, samples, token_budget, ladder, seed, store, show_progress: As [`draw_solutions`] takes them.
        batch_rows (`int`): Most completions decoded at once.

    Returns:
        Rows of `input_ids` and `labels` (−100 on the prompt) for [`AutoDecoTrainer`].
    """
    store = store or CompletionStore(keeps_whole=True)
    drawn = draw_solutions(
        TransformersEngine(model, tokenizer, batch_rows=batch_rows),
        problems,
        reward,
        samples=samples,
        token_budget=token_budget,
        ladder=ladder,
        seed=seed,
        store=store,
        show_progress=show_progress,
    )
    kept = [one for of in drawn for one in choose(of, keep, distinct=False)]
    kept.sort(key=lambda one: one.rung)  # as they came
    return [
        token_row(tokenizer, problems[one.problem]["prompt"], store.whole(one.run, one.place)["token_ids"])
        for one in kept
    ]


def token_row(tokenizer: Any, prompt: Any, completion: Sequence[int]) -> dict[str, list[int]]:
    """A completion behind its prompt as `input_ids` and `labels`, −100 on the prompt."""
    head, ids = encode_prompt(tokenizer, prompt), list(completion)
    return {"input_ids": head + ids, "labels": [IGNORE_INDEX] * len(head) + ids}
