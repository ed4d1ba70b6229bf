"""`evaluate_decoding`: adapters beside every cheaper decoder, on any tasks; knows no command line and no pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..budget import resolve_budget
from ..engines.by_name import build_engine, check_engine
from ..engines.engine import Engine
from ..errors import UnsupportedGenerationError
from ..hub.bases import base_name
from ..hub.store import load_adapter
from ..modeling import AutoDecoForCausalLM
from ..policies import DecodingPolicy
from ..types import Budget
from .baselines import STATIC_GRID
from .cells import Cell, Scores
from .controls import STANDARD, Choice, Contender, check_names, choices
from .metrics import bootstrap_interval
from .provenance import provenance
from .results import Evaluation
from .runner import Decoder
from .runs import Runs
from .store import CompletionStore
from .tasks import Task
from .verdict import STATIC, UNTUNED, judge

Adapter = DecodingPolicy | str | os.PathLike[str]
COMPLETIONS_FILE, RESULTS_FILE = "completions.jsonl", "results.jsonl"


def evaluate_decoding(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Task | Sequence[Task],
    adapters: Mapping[str, Adapter | Sequence[Adapter]] | None = None,
    *,
    baselines: Sequence[str | Decoder] = STANDARD,
    rivals: Mapping[str, Adapter | Sequence[Adapter]] | None = None,
    samples: int = 8,
    ks: Sequence[int] | None = None,
    token_budgets: int | Sequence[int] = 256,
    seeds: Sequence[int] = (0,),
    grid: Sequence[Mapping[str, float]] = STATIC_GRID,
    folder: str | os.PathLike[str] | None = None,
    batch_rows: int = 256,
    show_progress: bool = True,
    engine: str | Engine = "transformers",
) -> Evaluation:
    """
    Measures adapters against everything that is cheaper, and says in plain words whether they help.

    What is chosen (a static setting, MeanShift, a rule's parameters) is chosen on a task's validation problems; what is
    reported is measured on its test problems. Within an engine all decoders draw the same random numbers.

    Args:
        model, tokenizer: The base model, or an adaptive one, and its tokenizer.
        tasks ([`Task`] or sequence of them): See [`~evaluation.tasks.load_task`].
        adapters (mapping, *optional*): By name a policy, an adapter's folder or Hub id, or several of them. By
            default the model's own adapter; a base model is measured without one.
        baselines (sequence of `str` or [`Decoder`]): Names among `evaluation.CONTROLS`, and decoders of one's own. The
            four that a verdict needs are always there.
        rivals (mapping, *optional*): Other policies to subtract: a twin without a budget, one that sees entropy alone.
        samples (`int`): Completions of each problem and seed.
        ks (sequence of `int`, *optional*): For which k to report pass@k and maj@k, by default 1 and all samples. A
            policy that is told the parallel budget B hears B = k.
        token_budgets (`int` or sequence of `int`): New tokens. Of several, each is reported, and all together.
        seeds (sequence of `int`): Each draws `samples` completions of its own; they count together.
        grid (sequence of mappings): Static settings to choose the best from, greedy aside.
        folder (`str`, *optional*): Keeps completions in `completions.jsonl` as they are scored, and the results in
            `results.jsonl`. A call that was killed goes on from there and repeats at most one batch.
        batch_rows (`int`), show_progress (`bool`): Sequences decoded at once, and whether to show progress bars.
        engine (`str` or [`Engine`]): What decodes: `"transformers"`, `"continuous_batching"`, `"vllm"`, or one that is
            built. A baseline that it refuses is run in transformers, and its measure says so.

    Raises:
        `ValueError`: If a k is above the samples drawn, a task is empty, or a baseline or an engine is unknown.
        [`UnsupportedGenerationError`]: If the engine refuses an adapter.
    """
    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    ks = sorted({1, samples * len(seeds)} if ks is None else set(ks))
    budgets = sorted({token_budgets} if isinstance(token_budgets, int) else set(token_budgets))
    _check(tasks, budgets, ks, samples * len(seeds), baselines, engine)
    sizes: dict[str, Any] = {"samples": samples, "seeds": list(seeds), "token_budgets": budgets}
    store = CompletionStore(None if folder is None else Path(folder, COMPLETIONS_FILE))
    contenders, others = _decoders(model, _own(model) if adapters is None else adapters), _decoders(model, rivals or {})
    with _running(engine, model, tokenizer, batch_rows, [contenders, others]) as decodes:
        how = {**sizes, "store": store, "batch_rows": batch_rows, "show_progress": show_progress, "engine": decodes}
        cells = [cell for task in tasks for cell in _cells(Runs(model, tokenizer, task, **how), ks)]
        lines = _report_all(cells, contenders, others, baselines, grid)
        return _evaluation(lines, folder, **sizes, ks=ks, model=base_name(model), engine=decodes.name)


def _evaluation(lines: Iterator[dict[str, Any]], folder: str | os.PathLike[str] | None, **facts: Any) -> Evaluation:
    evaluation = Evaluation([provenance(**facts, interval=_INTERVAL), *lines])
    if folder is not None:
        evaluation.save(Path(folder, RESULTS_FILE))
    return evaluation


def _cells(runs: Runs, ks: Sequence[int]) -> list[Cell]:
    """One for each token budget, and one for all together if there are several."""
    budgets = runs.token_budgets
    return [Cell(runs, one, ks) for one in [*((b,) for b in budgets), *([budgets] if len(budgets) > 1 else [])]]


@contextmanager
def _running(
    engine: str | Engine,
    model: PreTrainedModel,
    tokenizer: Any,
    batch_rows: int,
    adapters: Sequence[Mapping[str, tuple[Decoder, ...]]],
) -> Iterator[Engine]:
    """An engine that decodes by all `adapters`; one that is built here is closed again, another stays open."""
    built = build_engine(engine, model, tokenizer, batch_rows=batch_rows)
    try:
        for name, decoder in ((name, one) for group in adapters for name, of in group.items() for one in of):
            why = built.refusal(policy=decoder.policy)
            if why is not None:
                raise UnsupportedGenerationError(f"the adapter {name!r} cannot be measured: {why}")
        yield built
    finally:
        if built is not engine:
            built.close()


_INTERVAL = "95% bootstrap over problems of the mean over training seeds; gains paired by problem"


def _check(
    tasks: Sequence[Task],
    budgets: Sequence[int],
    ks: Sequence[int],
    total: int,
    baselines: Sequence[str | Decoder],
    engine: str | Engine,
) -> None:
    check_names(baselines)
    check_engine(engine)
    if not tasks:
        raise ValueError("`tasks` is empty; pass at least one `Task`.")
    for task in tasks:
        for split in ("validation", "test"):
            if not len(getattr(task, split)):
                raise ValueError(f"the {split} problems of task {task.name!r} are none; pass at least one.")
    if not budgets:
        raise ValueError("`token_budgets` is empty; pass at least one number of new tokens.")
    for budget in budgets:
        resolve_budget(Budget(tokens=budget, samples=total), prompts=1)
    if not ks or ks[0] < 1 or ks[-1] > total:
        raise ValueError(f"`ks` is {list(ks)}; each has to be from 1 to {total}, the samples drawn of each problem.")


def _own(model: PreTrainedModel) -> dict[str, Adapter]:
    return {"adapter": model.decoding_adapter} if isinstance(model, AutoDecoForCausalLM) else {}


def _decoders(
    model: PreTrainedModel, given: Mapping[str, Adapter | Sequence[Adapter]]
) -> dict[str, tuple[Decoder, ...]]:
    found = {}
    for name, one in given.items():
        group = one if isinstance(one, Sequence) and not isinstance(one, str) else [one]
        policies = [p if isinstance(p, DecodingPolicy) else load_adapter(p, model) for p in group]
        found[name] = tuple(Decoder(name, policy=policy.to(model.device)) for policy in policies)
    return found


def _with_needed(baselines: Sequence[str | Decoder], adapter: Sequence[Decoder]) -> list[str | Decoder]:
    needed = [one for one in (*UNTUNED, *STATIC) if one not in baselines] if adapter else []
    return [*needed, *baselines]


def _report_all(
    cells: Sequence[Cell],
    contenders: Mapping[str, tuple[Decoder, ...]],
    rivals: Mapping[str, tuple[Decoder, ...]],
    baselines: Sequence[str | Decoder],
    grid: Sequence[Mapping[str, float]],
) -> Iterator[dict[str, Any]]:
    """The lines of every adapter (or of none) in every cell."""
    for cell in cells:
        for name, decoders in contenders.items() or [(None, ())]:
            contender = Contender(decoders, cell, grid, seed=cell.runs.seeds[0])
            yield from _report(contender, name, _with_needed(baselines, decoders), rivals)


def _report(
    contender: Contender,
    name: str | None,
    baselines: Sequence[str | Decoder],
    rivals: Mapping[str, tuple[Decoder, ...]],
) -> Iterator[dict[str, Any]]:
    """The lines of one adapter (or of none) in one cell."""
    cell = contender.cell
    facts = {
        "kind": "measure",
        "task": cell.runs.task.name,
        "token_budget": cell.token_budget,
        "token_budgets": list(cell.budgets),
        "adapter": name,
    }
    of_adapter = cell.scores(contender.decoders, "test") if contender.decoders else None
    if of_adapter is not None:
        yield {**facts, **_measure(Choice("adapter", contender.decoders), of_adapter, cell)}
    chosen = [*choices(contender, baselines), *(Choice("rival", one) for one in rivals.values())]
    for choice in chosen:
        scores = cell.scores(choice.decoders, "test")
        line = {**facts, **_measure(choice, scores, cell)}
        if of_adapter is not None:
            pairs = {metric: of_adapter.values[metric] - scores.values[metric] for metric in scores.values}
            line["gain"] = {metric: vars(bootstrap_interval(values)) for metric, values in pairs.items()}
        yield line
    if of_adapter is not None:
        for k in cell.ks:
            yield {**facts, "kind": "verdict", **_verdict(cell, of_adapter, chosen, k)}


def _measure(choice: Choice, scores: Scores, cell: Cell) -> dict[str, Any]:
    first = choice.decoders[0]
    means = next(iter(scores.settings.values()))
    line: dict[str, Any] = {
        "decoder": first.name,
        "role": choice.role,
        "for_k": choice.for_k,
        "settings": None if first.settings is None else dict(first.settings),
        "problems": len(cell.runs.problems("test")),
        "validation_problems": len(cell.runs.problems("validation")),
        "samples": cell.runs.samples * len(cell.runs.seeds),
        **{metric: vars(bootstrap_interval(values)) for metric, values in scores.values.items()},
        "mean_tokens": scores.mean_tokens,
        "truncated": scores.truncated,
        "seconds_per_1k_tokens": scores.seconds_per_1k_tokens,
        "mean_temperature": means["temperature"],
        "mean_top_p": means["top_p"],
        "engine": cell.runs.engine_of(first).name,
    }
    refused = cell.runs.refusal(first)
    if refused is not None:
        line["engine_refused"] = refused
    if len(choice.decoders) > 1:
        line["by_training_seed"] = scores.by_seed
    return line if choice.path is None else {**line, "path": choice.path}


def _verdict(cell: Cell, adapter: Scores, chosen: Sequence[Choice], k: int) -> dict[str, Any]:
    metric = f"pass@{k}"
    wanted = {role: _of(chosen, role, k) for role in (*UNTUNED, *STATIC)}
    baselines = {role: cell.scores(one.decoders, "test").values[metric] for role, one in wanted.items()}

    def on_validation(role: str) -> float:
        return float(cell.scores(wanted[role].decoders, "validation").values[metric].mean())

    ordered = sorted(STATIC, key=on_validation, reverse=True)
    statics = {role: wanted[role].decoders[0].settings or {} for role in ordered}
    return judge(adapter.values[metric], baselines, statics, k).as_dict()


def _of(chosen: Sequence[Choice], role: str, k: int) -> Choice:
    return next(one for one in chosen if one.role == role and one.for_k in (None, k))
