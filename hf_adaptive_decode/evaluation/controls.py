"""The baselines by name: what each is made of, chosen on validation problems; knows cells and nothing of tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ..actions import candidate_pool, describe
from ..configuration import AutoDecoConfig
from ..policies import DecodingPolicy, build_policy
from ..policies.heads import HeadsPolicy
from ..tap import output_embedding_shape
from .ablation import only
from .baselines import STATIC_GRID
from .cells import Cell
from .runner import DEFAULT, GREEDY, Decoder
from .runs import hears_samples
from .search import expert_search, measure_entropies, turn_temperature
from .shuffle import shuffled
from .tokens import token_table

MASKED_TEMPERATURES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
MIN_P_GRID = tuple({"temperature": t, "min_p": p} for t in (1.0, 1.5, 2.0) for p in (0.05, 0.1, 0.2))
EDT_RULES = tuple({"name": "edt", "temperature": t, "theta": theta} for t in (1.0, 1.5) for theta in (0.1, 0.5, 1.0))
DYNATEMP_RULES = tuple({"name": "dynatemp", "low": low, "high": h} for low in (0.0, 0.5) for h in (1.0, 1.5, 2.0))
TURN_TEMPERATURES = tuple(round(0.1 * step, 1) for step in range(1, 16))
# What the controls that look at tokens see of the validation problems.
_LOOKED_AT, _SAMPLES_LOOKED_AT = 100, 2
_ENTROPY_BINS = 8


@dataclass(frozen=True)
class Choice:
    """
    A decoder to report on, and why.

    Args:
        role (`str`): The name of the baseline.
        decoders (tuple of [`Decoder`]): One; of trained policies one for each training seed.
        for_k (`int`, *optional*): For which k it was chosen; `None` if it is the same for all.
        path (list, *optional*): How it was found, of JSON's types.
    """

    role: str
    decoders: tuple[Decoder, ...]
    for_k: int | None = None
    path: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Contender:
    """
    An adapter in a cell, and what its baselines are chosen by.

    Args:
        decoders (tuple of [`Decoder`]): The adapter's policies, one for each training seed; none to measure a base
            model alone, for which what is made of an adapter is left out.
        cell ([`Cell`]): Where.
        grid (sequence of mappings): Static settings to choose from, greedy aside.
        pool (sequence of mappings): Candidates of `"top_of_pool"`.
        seed (`int`): Seeds what the controls draw.
    """

    decoders: tuple[Decoder, ...]
    cell: Cell
    grid: Sequence[Mapping[str, float]] = STATIC_GRID
    pool: Sequence[Mapping[str, float]] = field(default_factory=candidate_pool)
    seed: int = 0

    @property
    def policy(self) -> DecodingPolicy | None:
        """The first training seed's."""
        return self.decoders[0].policy if self.decoders else None

    @property
    def model(self) -> PreTrainedModel:
        """What decodes."""
        return self.cell.runs.model

    def best(self, role: str, candidates: Iterable[Decoder], split: str = "validation") -> Iterator[Choice]:
        """The candidate with the highest pass@k for each k; of equals the first."""
        measured = [(one, self.cell.scores([one], split)) for one in candidates]
        for k in self.cell.ks:
            chosen = max(measured, key=lambda pair: float(pair[1].values[f"pass@{k}"].mean()))[0]
            yield Choice(role, (chosen,), k)


def static(settings: Mapping[str, float]) -> Decoder:
    """A decoder of fixed settings, named by them."""
    return Decoder(describe(settings), dict(settings))


def default_decoder(model: PreTrainedModel) -> Decoder:
    """Sampling as the base model's own `generation_config` has it, and at T = 1 where that says nothing."""
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    own = {name: vars(model.generation_config).get(name) for name in off}
    settings = {name: value for name, value in own.items() if value is not None and value != off[name]}
    if not settings:
        return DEFAULT
    settings = {"temperature": 1.0, **settings}
    return Decoder(f"the model's default sampling ({describe(settings)})", settings)


def _greedy(c: Contender) -> Iterator[Choice]:
    yield Choice("greedy", (GREEDY,))


def _default(c: Contender) -> Iterator[Choice]:
    yield Choice("default", (default_decoder(c.model),))


def _statics(c: Contender) -> list[Decoder]:
    return [GREEDY, *map(static, c.grid)]


def _best_static(c: Contender) -> Iterator[Choice]:
    return c.best("best_static", _statics(c))


def _oracle_static(c: Contender) -> Iterator[Choice]:
    return c.best("oracle_static", _statics(c), "test")


def _search(split: str, role: str, c: Contender) -> Iterator[Choice]:
    for k in c.cell.ks:

        def measure(settings: Mapping[str, float], metric: str = f"pass@{k}") -> float:
            return float(c.cell.scores([static(settings)], split).values[metric].mean())

        found = expert_search(measure)
        yield Choice(role, (static(found.settings),), k, path=list(found.path))


def _mean_shift(c: Contender) -> Iterator[Choice]:
    if c.policy is None:
        return
    found = c.cell.scores(c.decoders, "validation").settings
    told = hears_samples(c.policy)
    for k in c.cell.ks if told else c.cell.ks[:1]:
        yield Choice("mean_shift", (static(found[f"pass@{k}"]),), k if told else None)


def _mixture(c: Contender) -> Iterator[Choice]:
    if c.policy is not None and c.policy.config.actions:
        config, per = c.policy.config, "sequence" if c.policy.decides_once else "token"
        how: dict[str, Any] = {"actions": config.actions, "max_prob_mask": config.max_prob_mask, "mixture_per": per}
        yield Choice("mixture", (Decoder("uniform mixture of its actions", policy=_static_policy(**how)),))


def _masked_static(c: Contender) -> Iterator[Choice]:
    limit = None if c.policy is None else c.policy.config.max_prob_mask
    if limit is not None:
        masked = [
            Decoder(f"T={t:g} where unsure", policy=_static_policy(actions=[{"temperature": t}], max_prob_mask=limit))
            for t in MASKED_TEMPERATURES
        ]
        yield from c.best("masked_static", masked)


def _shuffle(bins: int | None, role: str, c: Contender) -> Iterator[Choice]:
    """The parameters that each policy used on some validation problems, drawn again without regard to the token."""
    model, tokenizer = c.model, c.cell.runs.tokenizer
    prompts = [row["prompt"] for row in c.cell.runs.problems("validation")[:_LOOKED_AT]]
    how: dict[str, Any] = {"samples": _SAMPLES_LOOKED_AT, "token_budget": max(c.cell.budgets), "seed": c.seed}
    how |= {"parallel_budget": max(c.cell.ks)}
    decoders = []
    for policy in (one.policy for one in c.decoders if one.policy is not None):
        completions = c.cell.runs.engine.complete(prompts, policy=policy, **how)
        table = token_table(model, tokenizer, prompts, completions)
        name = f"its parameters shuffled over tokens{' of like entropy' if bins else ''}"
        decoders.append(Decoder(name, None, shuffled(policy, table, bins, parallel_samples=max(c.cell.ks))))
    if decoders:
        yield Choice(role, tuple(decoders))


def _only(head: str, role: str, c: Contender) -> Iterator[Choice]:
    heads = [
        one.policy for one in c.decoders if isinstance(one.policy, HeadsPolicy) and len(one.policy.config.heads) == 2
    ]
    if heads:
        name = f"its {head.replace('_', '-')} alone"
        yield Choice(role, tuple(Decoder(name, None, only(policy, head)) for policy in heads))


def _rule(rules: Sequence[Mapping[str, Any]], role: str, c: Contender) -> Iterator[Choice]:
    width = output_embedding_shape(c.model)[1]
    policies = [
        build_policy(AutoDecoConfig(policy="entropy", entropy_rule=dict(rule), hidden_size=width)).eval()
        for rule in rules
    ]
    named = [", ".join(f"{k} {v:g}" for k, v in rule.items() if k != "name") for rule in rules]
    yield from c.best(role, [Decoder(f"{role} ({n})", None, p) for n, p in zip(named, policies, strict=True)])


def _min_p(c: Contender) -> Iterator[Choice]:
    return c.best("min_p", map(static, MIN_P_GRID))


def _turn(c: Contender) -> Iterator[Choice]:
    prompts = [row["prompt"] for row in c.cell.runs.problems("validation")[:_LOOKED_AT]]
    how: dict[str, Any] = {"token_budget": max(c.cell.budgets), "seed": c.seed, "samples": 1}
    runs = c.cell.runs
    entropies = measure_entropies(c.model, runs.tokenizer, prompts, TURN_TEMPERATURES, **how, engine=runs.engine)
    yield Choice("turn", (static({"temperature": turn_temperature(TURN_TEMPERATURES, entropies)}),))


def _top_of_pool(c: Contender) -> Iterator[Choice]:
    """As many of the pool as the adapter has actions (or 4), by their mean on validation; each sequence draws one."""
    metric = f"pass@{c.cell.ks[0]}"
    scored = [(float(c.cell.scores([static(one)], "validation").values[metric].mean()), one) for one in c.pool]
    count = len((c.policy and c.policy.config.actions) or ()) or 4
    top = [dict(one) for _, one in sorted(scored, key=lambda pair: -pair[0])[:count]]
    policy = _static_policy(actions=top, mixture_per="sequence")
    yield Choice("top_of_pool", (Decoder(f"mixture of the pool's best {count}", None, policy),))


def _static_policy(**settings: Any) -> DecodingPolicy:
    return build_policy(AutoDecoConfig(policy="static", **settings)).eval()


CONTROLS: dict[str, Callable[[Contender], Iterator[Choice]]] = {
    "greedy": _greedy,
    "default": _default,
    "mean_shift": _mean_shift,
    "best_static": _best_static,
    "mixture": _mixture,
    "masked_static": _masked_static,
    "shuffle": lambda c: _shuffle(None, "shuffle", c),
    "shuffle_in_bins": lambda c: _shuffle(_ENTROPY_BINS, "shuffle_in_bins", c),
    "temperature_only": lambda c: _only("temperature", "temperature_only", c),
    "top_p_only": lambda c: _only("top_p", "top_p_only", c),
    "edt": lambda c: _rule(EDT_RULES, "edt", c),
    "dynatemp": lambda c: _rule(DYNATEMP_RULES, "dynatemp", c),
    "min_p": _min_p,
    "turn": _turn,
    "expert_search": lambda c: _search("validation", "expert_search", c),
    "top_of_pool": _top_of_pool,
    "oracle_static": _oracle_static,
    "expert_search_oracle": lambda c: _search("test", "expert_search_oracle", c),
}
STANDARD = ("greedy", "default", "mean_shift", "best_static", "mixture", "masked_static")
EVERY_FAIR = tuple(name for name in CONTROLS if "oracle" not in name and name != "top_of_pool")


def choices(contender: Contender, baselines: Sequence[str | Decoder]) -> Iterator[Choice]:
    """
    The baselines of an adapter in a cell. A name that does not apply to it (a mixture of actions that it does not
    have) gives none.

    Args:
        contender ([`Contender`]): The adapter and its cell.
        baselines (sequence of `str` or [`Decoder`]): Names among [`CONTROLS`], or decoders of one's own.

    Raises:
        `ValueError`: If there is no baseline of a name.
    """
    for one in baselines:
        if isinstance(one, Decoder):
            yield Choice("static" if one.settings is not None else "rival", (one,))
        else:
            yield from CONTROLS[one](contender)


def check_names(baselines: Sequence[str | Decoder]) -> None:
    """Raises `ValueError` if one is neither a decoder nor the name of a baseline."""
    for one in baselines:
        if not isinstance(one, Decoder) and one not in CONTROLS:
            raise ValueError(f"there is no baseline {one!r}; choose among {', '.join(CONTROLS)}, or pass a `Decoder`.")
