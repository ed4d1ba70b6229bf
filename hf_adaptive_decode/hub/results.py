"""Measured results as a section of a model card and as its metadata; knows lines of JSON, no models and no files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult

from ..actions import describe
from .markdown import code, escape, plain, table
from .result_lines import METRIC, Line, budgets_of, is_number, read_results

AS_WELL = "mean_does_as_well"
# In the arguments of each metric that this library writes into a card's metadata, so that it finds them again.
MARK = {"measured_by": "hf_adaptive_decode"}
# A decoder of these roles is named by how it was chosen, its settings in brackets.
# What tables call a role, in front of the decoder that has it.
ROLES = {
    "mean_shift": "MeanShift",
    "best_static": "best static",
    "oracle_static": "oracle static, chosen on test,",
    "masked_static": "best masked static",
    "expert_search": "expert-guided search",
    "expert_search_oracle": "oracle expert-guided search, on test,",
    "min_p": "best min-p",
    "turn": "TURN",
    "edt": "EDT",
    "dynatemp": "dynatemp",
}
_STATIC = """### A static setting instead

Where a static setting does as well, use that; it needs no adapter:

{settings}

`static/generation_config.json` holds the first of them. With `adapter`, `model` and the rest as under "How to use":

```python
from transformers import GenerationConfig

settings = GenerationConfig.from_pretrained(adapter, "static/generation_config.json")
with model.disable_adapter():  # or with the base model, loaded without the adapter
    print(tokenizer.decode(model.generate(**inputs, generation_config=settings, max_new_tokens=256)[0]))
```"""
Group = tuple[str, tuple[int, ...], str]


def results_section(lines: Sequence[Line], weights: str | None = None) -> str:
    """
    The results of an adapter as Markdown: verdicts, every decoder's rates, gains, and where the numbers come from.

    Args:
        lines (sequence of mappings): Of a `results.jsonl`, as [`read_results`] checks them.
        weights (`str`, *optional*): SHA-256 of the weights that were measured.
    """
    lines = read_results(lines)
    groups = list(dict.fromkeys(_group(line) for line in lines if line["kind"] == "measure"))
    several = len({adapter for _, _, adapter in groups}) > 1
    parts = ["## Results"]
    for group in groups:
        parts.append(f"### {escape(_title(group, several))}")
        verdicts = [line for line in _of(lines, "verdict") if _group(line) == group]
        parts += ["\n".join(_verdict(line) for line in verdicts)] if verdicts else []
        parts.append(_rates([line for line in _of(lines, "measure") if _group(line) == group]))
    statics = list(dict.fromkeys(_static_line(line, several) for line in _as_well(lines)))
    parts += [_STATIC.format(settings="\n".join(statics))] if statics else []
    parts.append("### How these were measured")
    parts += [_provenance(line) for line in _of(lines, "provenance")]
    if weights:
        parts.append(f"Measured with a `model.safetensors` of SHA-256 `{weights}`.")
    return "\n\n".join(parts)


def static_setting(lines: Iterable[Line]) -> dict[str, float] | None:
    """The static setting to use instead of the adapter, by the first verdict that names one; `None` where none does."""
    found = _as_well(lines)
    return dict(found[0]["static"]) if found else None


def model_index(lines: Sequence[Line]) -> list[EvalResult]:
    """
    The adapter's own rates for a card's `model-index`, fractions rounded to four digits.

    Args:
        lines (sequence of mappings): Of a `results.jsonl`.

    Returns:
        list of [`~huggingface_hub.EvalResult`]: One for each task, token budget, adapter and metric.
    """
    lines = read_results(lines)
    measures = [line for line in _of(lines, "measure") if line["role"] == "adapter"]
    several = len({line["adapter"] for line in measures}) > 1
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=_dataset_type(line["task"]),
            dataset_name=plain(_title(_group(line), several=False)),
            # The Hub tells results apart by this.
            dataset_config="_".join(["token_budget", *map(str, budgets_of(line))]),
            metric_type=metric,
            metric_value=round(line[metric]["mean"], 4),
            metric_name=plain(f"{metric} ({line['adapter']})" if several else metric),
            metric_args={"interval_95": [round(line[metric][end], 4) for end in ("low", "high")], **MARK},
        )
        for line in measures
        for metric in _metrics([line])
    ]


def _of(lines: Iterable[Line], kind: str) -> list[Line]:
    return [line for line in lines if line["kind"] == kind]


def _as_well(lines: Iterable[Line]) -> list[Line]:
    return [line for line in _of(lines, "verdict") if line["verdict"] == AS_WELL and line.get("static")]


def _group(line: Line) -> Group:
    return line["task"], budgets_of(line), line["adapter"]


def _title(group: Group, several: bool) -> str:
    task, budgets, adapter = group
    tokens = f"{' and '.join(map(str, budgets))} new tokens{' together' if len(budgets) > 1 else ''}"
    return ", ".join([task, tokens, *([adapter] if several else [])])


def _dataset_type(task: str) -> str:
    """The task as a data set's id, of the form that the Hub takes: `name` or `owner/name`."""
    parts = [re.sub(r"[^\w.-]+", "-", part, flags=re.ASCII).strip("-.") for part in task.split("/")]
    kept = [part for part in parts if part]
    # What stands before the slash may hold no dot.
    return f"{kept[0].replace('.', '-')}/{kept[1]}" if len(parts) == len(kept) == 2 else "-".join(kept) or "task"


def _metrics(rows: Sequence[Line]) -> list[str]:
    """pass@1, pass@8, ..., then maj@8, ..., as far as any row has them."""
    found = {name: match for row in rows for name in row if (match := METRIC.fullmatch(name))}
    return sorted(found, key=lambda name: (found[name][1] != "pass", int(found[name][2])))


def _verdict(line: Line) -> str:
    return f"- **pass@{line['k']}** ({100 * line['confidence']:.4g} % intervals): {escape(line['sentence'])}"


def _rates(rows: Sequence[Line]) -> str:
    own = next((row for row in rows if row["role"] == "adapter"), rows[0])
    metrics = _metrics(rows)
    gains = [metric for metric in metrics if any(metric in (row.get("gain") or {}) for row in rows)]
    shown = []
    for row, ks in _without_repeats(sorted(rows, key=lambda row: row["role"] != "adapter")):
        rates = [_percent(row.get(metric)) for metric in metrics]
        against = [_percent((row.get("gain") or {}).get(metric), sign=True) for metric in gains]
        shown.append([_label(row, ks, own), *rates, *against])
    size = f"{own['problems']} problems, {own['samples']} samples each"
    trained = max(map(len, (own.get("by_training_seed") or {}).values()), default=1)
    size += f", mean of {trained} training seeds" if trained > 1 else ""
    paired = "; the adapter's gains are paired by problem" if gains else ""
    header = ["decoder", *metrics, *(f"adapter's gain at {metric}" for metric in gains)]
    return f"{size}; per cent with 95 % intervals over problems{paired}.\n\n{table(header, shown)}{_facts(own)}"


def _without_repeats(rows: Sequence[Line]) -> list[tuple[Line, list[int]]]:
    """Each decoder once, with the ks that it was chosen for; none if it is the same for all."""
    found: dict[Any, tuple[Line, list[int]]] = {}
    for row in rows:
        key = (row["role"], row["decoder"], str(row.get("settings")))
        ks = found.setdefault(key, (row, []))[1]
        ks += [row["for_k"]] if row.get("for_k") is not None else []
    return list(found.values())


def _percent(interval: Mapping[str, float] | None, sign: bool = False) -> str:
    if interval is None:
        return ""
    # Adding 0 turns a rounded -0.0 into 0.0.
    mean, low, high = (round(100 * interval[name], 1) + 0.0 for name in ("mean", "low", "high"))
    plus = "+" if sign else ""
    return f"{mean:{plus}.1f} [{low:{plus}.1f}, {high:{plus}.1f}]"


def _label(row: Line, ks: Sequence[int], own: Line) -> str:
    """The decoder's name, and what it does not say itself: its role, for which k, its settings, another size."""
    name, role = row["decoder"], ROLES.get(row["role"])
    given = f" for {' and '.join(f'pass@{k}' for k in ks)}" if ks else ""
    if role is not None and role.lower() not in name.lower():
        name = f"{role}{given} ({name.removeprefix(row['role']).strip(' ()')})"
    elif "pass@" not in name:
        name += given
    details = [_described(row["settings"])] if isinstance(row.get("settings"), Mapping) else []
    details += [f"{row[n]} {n}" for n in ("problems", "samples") if row[n] != own[n]]
    new = [detail for detail in details if detail not in name]
    return f"{name} ({'; '.join(new)})" if new else name


def _described(settings: Mapping[str, Any]) -> str:
    return describe({name: value for name, value in settings.items() if is_number(value)})


def _facts(own: Line) -> str:
    formats = {"mean_tokens": "{:.1f} tokens", "mean_temperature": "temperature {:.3f}", "mean_top_p": "top-p {:.3f}"}
    found = [text.format(own[name]) for name, text in formats.items() if is_number(own.get(name))]
    cut = f"; {100 * own['truncated']:.1f} % are cut off by the budget" if is_number(own.get("truncated")) else ""
    return f"\n\nThe adapter's completions on average: {', '.join(found)}{cut}." if found else ""


def _static_line(line: Line, several: bool) -> str:
    return f"- {escape(_title(_group(line), several))}, pass@{line['k']}: {escape(_described(line['static']))}"


def _provenance(line: Line) -> str:
    versions = {"hf_adaptive_decode": line["library"], **line["versions"]}
    facts = {
        "base model": line.get("model"),
        "seeds": ", ".join(map(str, line["seeds"])),
        "versions": _listed({name: value for name, value in versions.items() if value != "not installed"}),
        "commit": line.get("commit"),
        "hardware": _listed(line["hardware"]),
        "started": line["started"],
    }
    return "\n".join(f"- {name}: {code(value)}" for name, value in facts.items() if value)


def _listed(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
