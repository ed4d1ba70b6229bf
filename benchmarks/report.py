"""
Renders RESULTS.md and RESULTS.png from the benchmarks' result files; measures nothing.

    python benchmarks/report.py [RESULTS_FOLDER [OUTPUT_FOLDER]]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from report_plot import draw, panels
from report_readme import readme_table
from report_sections import SECTIONS

__all__ = ["load", "readme_table", "render"]

HERE = Path(__file__).resolve().parent
Results = dict[str, dict[str, Any]]
PARTS = ("startup", "warping", "decoding", "training_step", "profile_steps", "rollout", "epoch_cache", "serving")
_PLACE = ("part", "kind", "start", "shape", "model", "dtype", "logits", "rows", "batch", "prompt")
_NAMED = {"rows": "{} rows", "batch": "batch {}", "prompt": "prompt {}", "part": "({})"}

INTRODUCTION = """\
# Results of the benchmarks

Made by `make bench` (`python benchmarks/run.py`) from the files in [results](results); the numbers of one section come
from one run. A ratio is taken within a round in which every contender has its turn, so that a slow minute of the
machine hits all of them. Given are the median of the rounds' ratios and, in brackets, the smallest and the largest. A
target is held to the median."""

PICTURE = "![How each cost grows with its work](RESULTS.png)"

ON_A_GPU = """\
On a machine with a GPU, in a checkout with the package installed (`make bench` makes the environment):

    python benchmarks/run.py --device cuda                                  # everything below that a GPU changes
    python benchmarks/run.py --device cuda --only decoding                  # one part
    python benchmarks/decoding.py --device cuda --cells 8B:1:64 8B:1:24576 --rounds 200 --compile 8B:1:64

The first two write to `benchmarks/results/NAME-OF-THE-GPU` and add a section here."""


def load(folder: Path) -> Results:
    """The result files of a folder, by name."""
    found = {name: folder / f"{name}.json" for name in PARTS}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items() if path.exists()}


def accelerators(folder: Path) -> dict[str, Results]:
    """Results of GPUs, by the folder's name."""
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    return {path.name: found for path in inner if (found := load(path))}


def render(folder: Path) -> str:
    """RESULTS.md."""
    found = load(folder)
    parts = [INTRODUCTION, *([PICTURE] if panels(found) else []), *sections(found, "##")]
    on_gpu = accelerators(folder)
    parts.append("## On a GPU")
    if not on_gpu:
        parts.append("Not measured: no GPU.")
    for name, results in on_gpu.items():
        parts += [f"### {name}", *sections(results, "####")]
    return "\n\n".join([*parts, ON_A_GPU]) + "\n"


def sections(found: Results, level: str) -> list[str]:
    """Machine, targets, one section a part, and what was skipped."""
    parts = [machine(found), f"{level} Targets", targets(found)]
    for name, (title, section) in SECTIONS.items():
        if name in found and (text := section(found[name])):
            parts += [f"{level} {title}", text]
    if lines := skipped(found):
        parts += [f"{level} Skipped", "\n".join(lines)]
    return parts


def machine(found: Results) -> str:
    """Where it was measured, and with what; load and seed of each part."""
    about = {name: result["about"] for name, result in found.items() if "seed" in result.get("about", {})}
    if not about:
        return "No part has been measured yet."
    lines = []
    for what, describe in (("Machine", _machine_of), ("Versions", _versions_of)):
        parts: dict[str, list[str]] = {}
        for name, one in about.items():
            parts.setdefault(describe(one), []).append(name)
        for text, names in parts.items():
            of_which = "" if len(parts) == 1 else f" ({', '.join(names)})"
            lines.append(f"- {what}{of_which}: {text}.")
    rest = [
        f"{name} {a['threads']} threads, seed {a['seed']}, load {a['load_average_at_start']}"
        for name, a in about.items()
    ]
    lines.append(f"- Threads, seed and load average at the start: {'; '.join(rest)}.")
    return "\n".join(lines)


def _machine_of(about: Mapping[str, Any]) -> str:
    device = "" if about["device"] == about["processor"] else f"{about['device']}; "
    return f"{device}{about['processor']}, {about['cores']} cores, {about['memory_gib']} GiB; {about['platform']}"


def _versions_of(about: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {about[name]}" for name in ("python", "torch", "transformers", "numpy"))


def matches(cell: Mapping[str, Any], wanted: Mapping[str, Any] | None) -> bool:
    """Whether the cell's fields have these values."""
    return wanted is not None and all(cell.get(name) == value for name, value in wanted.items())


def place(cell: Mapping[str, Any]) -> str:
    """What tells the cell from others, in words."""
    return ", ".join(_NAMED.get(name, "{}").format(cell[name]) for name in _PLACE if name in cell)


def verdicts(found: Results) -> Iterable[tuple[str, dict[str, Any], list[tuple[str, float, bool]]]]:
    """Part, target, and (cell, median, whether it keeps to the bound) of each cell that it is for."""
    for name, result in found.items():
        for wanted in result.get("targets", ()):
            cells = [
                cell
                for cell in cells_of(result)
                if wanted["ratio"] in cell.get("ratios", {})
                and matches(cell, wanted.get("where", {}))
                and not matches(cell, wanted.get("unless"))
            ]
            measured = [(place(cell), cell["ratios"][wanted["ratio"]]["median"]) for cell in cells]
            yield name, wanted, [(where, value, holds(value, wanted)) for where, value in measured]


def cells_of(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The cells of a result file; those of the rollouts have their ratios beside what else they hold."""
    rows = [
        row | {"ratios": {n: v for n, v in row.items() if isinstance(v, dict)}} for row in result.get("results", ())
    ]
    return [*result.get("cells", ()), *rows]


def holds(value: float, wanted: Mapping[str, Any]) -> bool:
    """Whether a median keeps to the bound."""
    return wanted.get("at_least", -float("inf")) <= value <= wanted.get("at_most", float("inf"))


def targets(found: Results) -> str:
    """A table of the targets, and each miss in words."""
    lines = ["| part | what | target | cells that keep to it | |", "| --- | --- | --- | --- | --- |"]
    missed = []
    for name, wanted, measured in verdicts(found):
        bound = f"at least {wanted['at_least']:g}" if "at_least" in wanted else f"at most {wanted['at_most']:g}"
        what = ", ".join([wanted["ratio"], *map(str, wanted.get("where", {}).values())])
        kept = sum(held for _, _, held in measured)
        verdict = "not measured" if not measured else "holds" if kept == len(measured) else "**missed**"
        lines.append(f"| {name} | {what} | {bound} | {kept} of {len(measured)} | {verdict} |")
        bad = "; ".join(f"{value:g} ({where})" for where, value, held in measured if not held)
        missed += [f"- Missed: {what} of {name} is to be {bound} and is {bad}."] if bad else []
    if len(lines) == 2:
        return "None."
    return "\n".join([*lines, "", *(missed or ["No target was missed."])])


def skipped(found: Results) -> list[str]:
    """What was not measured, with the reason."""
    return [f"- {name}: {s['cell']}: {s['why']}." for name, result in found.items() for s in result.get("skipped", ())]


def write_report(folder: Path, output: Path) -> list[Path]:
    """Writes both files."""
    text = output / "RESULTS.md"
    text.write_text(render(folder), encoding="utf-8")
    picture = output / "RESULTS.png"
    return [text, *([picture] if draw(load(folder), picture) else [])]


def main(words: Sequence[str]) -> None:
    """Renders."""
    folder = Path(words[0]) if words else HERE / "results"
    output = Path(words[1]) if len(words) > 1 else (HERE if not words else folder)
    for path in write_report(folder, output):
        print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
