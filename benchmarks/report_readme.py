"""The README's table of the benchmarks; measures nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from report_sections import SAME_FORWARD, Result, shown, table

README_ROLLOUTS = {
    "decode, actions / generate, whole": "token policy / plain `generate`, time",
    "update / rollout": "the training step beyond its rollout / the rollout",
}


def find(found: Mapping[str, Result], script: str, ratio: str, **wanted: Any) -> Mapping[str, float] | None:
    """The ratio of the first cell of a benchmark whose fields have these values."""
    cells = [c for c in found.get(script, {}).get("cells", ()) if all(c.get(n) == v for n, v in wanted.items())]
    return next((cell["ratios"][ratio] for cell in cells if ratio in cell["ratios"]), None)


def readme_table(found: Mapping[str, Result]) -> str:
    """The table of the README, without what was not measured."""
    rows: list[list[str]] = []

    def add(what: str, script: str, ratio: str, digits: int = 2, **wanted: Any) -> None:
        peaked, flat = (find(found, script, ratio, **wanted, logits=logits) for logits in ("peaked", "flat"))
        peaked = peaked or find(found, script, ratio, **wanted)
        rows.extend([[what, shown(peaked, digits), shown(flat, digits)]] if peaked else [])

    for kind in ("top-p", "T + top-p"):
        add(f"{kind} of 8 rows: transformers / ours, time", "warping", "transformers / ours",
            kind=kind, rows=8, dtype="float32")  # fmt: skip
    tokens = found.get("training_step", {}).get("settings", {}).get("tokens", 0)
    add(f"loss and gradients of {tokens:,} tokens: plain / ours, time", "training_step", "plain / chunked", part="a")
    add("the same: plain / ours, added memory", "training_step", "added memory, plain / chunked", part="b")
    add("training step / frozen forward alone, 0.6B shape", "training_step", "step / frozen forward", part="c")
    cells = found.get("decoding", {}).get("cells", ())
    longest = max((c["prompt"] for c in cells if (c["shape"], c["batch"]) == ("0.6B", 1)), default=0)
    for batch, prompt in ((1, 64), (32, 64), (1, 1024), (8, 1024), (32, 1024), (1, longest)):
        for name in ("plain sampling", "static T + top-p"):
            what = f"decoding, 0.6B shape, batch {batch}, prompt {prompt:,}: adaptive / {name}, time a token"
            place = {"shape": "0.6B", "batch": batch, "prompt": prompt}
            add(what, "decoding", f"adaptive / {name}{SAME_FORWARD}", digits=3, **place)
    for row in found.get("rollout", {}).get("results", ()):
        for ratio, what in README_ROLLOUTS.items():
            if ratio in row:
                until = "rows of equal length" if row["part"] == "a" else "rows"
                rows.append([f"rollout, {row['model']}, {row['rows']} {until}: {what}", shown(row[ratio]), ""])
    cached = found.get("epoch_cache", {}).get("ratios", {})
    rows += [[f"training step with cached states, {name}", shown(value, 3), ""] for name, value in cached.items()]
    for cell in found.get("serving", {}).get("cells", ()):
        for name, value in cell["ratios"].items():
            who, _, stock = name.partition(" / ")
            if who.startswith("adapter"):
                what = f"vLLM, batch {cell['batch']}: tokens a second with {who.removeprefix('adapter, ')} / {stock}"
                rows.append([what, shown(value), ""])
    add(
        "milliseconds that `import hf_adaptive_decode` adds to transformers' own", "startup", "added ms", start="import"
    )
    return table(["", "peaked logits", "flat logits (worst case)"], rows)
