"""The card of a data set of sampled solutions, from what its provenance says; knows no rows and no models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from .markdown import code, escape, plain, table

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_COUNTED = {
    "problems": "problems",
    "solved": "of these solved at least once",
    "solved_always": "solved by every completion",
    "solved_never": "solved by none",
    "outside_solve_rate": "solved, and left out for their difficulty",
    "sampled": "completions sampled",
    "truncated": "cut off by the token budget",
    "right_but_truncated": "right, but cut off",
    "verified": "right and ended by themselves",
    "duplicates": "of these the same as an earlier one",
    "kept": "kept",
    "tokens_sampled": "tokens sampled",
    "tokens_kept": "tokens kept",
}
_TEXT = """# Sampled solutions of {model}

Solutions that {model}{revision} wrote to problems of {source}, sampled and kept where the reward {reward} found the
final answer right: rejection sampling, as decoding heads are trained on after *The End of Manual Decoding* (section
3.1). Only completions that ended by themselves are here.

## How many

{counts}

{by_setting}

{choice}

## Use

```bash
hf-adaptive-decode train-heads --model MODEL --dataset train.jsonl --no-hold-out
```

`--no-hold-out`, because every prompt is of the training part of its source already.

```python
from datasets import load_dataset

rows = load_dataset("json", data_files="train.jsonl", split="train")
```

## Columns

`prompt` and `completion` (texts, or lists of messages), the problem's own columns, `reward`, `tokens` (the
completion's length), `solve_rate` (the part of the problem's completions that was right) and `sampling` (what this one
was sampled with; null: off){token_ids}. Versions, seed and all settings are in `provenance.json`.

## Limits

- The reward reads the final answer alone. The way to it may be wrong.
- Everything else in the texts, the problems' too, was read by nobody.
- Problems come from their source and stay under its licence, completions under what the model's licence says.
- It is of this model: another model's heads need that model's own completions.
"""


def dataset_card(facts: Mapping[str, Any]) -> str:
    """
    The card, metadata first.

    Args:
        facts (mapping): The provenance, with `model`, `model_revision`, `source`, `reward`, `counts`, `by_setting`
            (list of `dict` with `name`, `sampled`, `verified`, `kept`), `keep`, `solve_rate` and `token_ids`. Names in
            it may be any text.
    """
    counts = facts["counts"]
    size = next((name for most, name in _SIZES if counts["kept"] < most), "n>1M")
    metadata = {
        "pretty_name": plain(f"Sampled solutions of {facts['model']}"),
        "task_categories": ["text-generation"],
        "tags": ["adaptive-decoding", "rejection-sampling", "synthetic"],
        "size_categories": [size],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "train.jsonl"}]}],
    }
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=False)
    text = _TEXT.format(
        model=code(facts["model"]),
        revision=f" (revision {code(facts['model_revision'])})" if facts["model_revision"] else "",
        source=escape(facts["source"]),
        reward=code(facts["reward"]),
        counts=table(["", ""], [[said, f"{counts[name]:,}"] for name, said in _COUNTED.items()]),
        by_setting=table(*settings_table(facts["by_setting"])),
        choice=_choice(facts),
        token_ids=", `input_ids` and `labels` (the tokens themselves)" if facts["token_ids"] else "",
    )
    return f"---\n{head}---\n\n{text}"


def settings_table(by_setting: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what came of each setting of the ladder."""
    columns = {"sampled": "sampled", "verified": "right and ended", "kept": "kept"}
    rows = [[str(line["name"]), *(f"{line[name]:,}" for name in columns)] for line in by_setting]
    return ["sampled with", *columns.values()], rows


def _choice(facts: Mapping[str, Any]) -> str:
    said = [f"At most {facts['keep']} of a problem, equal ones once."]
    if len(facts["by_setting"]) > 1:
        said.append("A problem went on to the next setting only if no completion was right.")
    if facts["solve_rate"] is not None:
        low, high = facts["solve_rate"]
        said.append(f"Only problems of which {100 * low:g} to {100 * high:g} % of the completions were right.")
    return " ".join(said)
