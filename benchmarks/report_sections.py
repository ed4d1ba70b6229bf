"""The sections of RESULTS.md, each made from one result file; measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
# Latency of 1k tokens in seconds with and without heads for R1-Distill-Qwen-7B: AutoDeco, Table 3.
PAPER_PROMPTS = ("1k", "2k", "4k", "8k", "16k", "24k")
PAPER_SECONDS = ((18.84, 18.23), (19.10, 18.86), (19.43, 18.93), (20.03, 19.72), (22.36, 22.11), (26.05, 25.76))


SAME_FORWARD = ", same forward"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(value) for value in line) + " |" for line in lines)


def shown(summary: Mapping[str, float] | None, digits: int = 2) -> str:
    """Median and range."""
    if summary is None:
        return ""
    median, low, high = (f"{summary[name]:.{digits}f}" for name in ("median", "min", "max"))
    return median if summary.get("n") == 1 else f"{median} ({low} to {high})"


def interval(summary: Mapping[str, float] | None, digits: int = 3) -> str:
    """The bootstrap interval of the median."""
    return "" if summary is None else f"{summary['low']:.{digits}f} to {summary['high']:.{digits}f}"


def warping(found: Result) -> str:
    """Ratios by rows, who else took part, and how peaked the logits are."""
    cells = found.get("cells", [])
    if not cells:
        return ""
    rows = sorted({cell["rows"] for cell in cells})
    contenders = dict.fromkeys(name for cell in cells for name in cell["ratios"])
    parts = []
    for ratio in contenders:
        places = dict.fromkeys((c["kind"], c["logits"], c["dtype"]) for c in cells if ratio in c["ratios"])
        by_place = {(c["kind"], c["logits"], c["dtype"], c["rows"]): c for c in cells}
        lines = []
        for place in places:
            of_rows = [by_place[(*place, number)] for number in rows]
            values = [shown(cell["ratios"].get(ratio)) for cell in of_rows]
            lines.append([*place, *values, f"{of_rows[-1]['ms a call']['ours']['median']:.2f}"])
        head = [
            "parameters",
            "logits",
            "dtype",
            *(f"{n} row{'s'[: n > 1]}" for n in rows),
            f"ours, ms at {rows[-1]} rows",
        ]
        parts.append(f"Time, {ratio}:\n\n{table(head, lines)}")
    looks = [
        [name, *(", ".join(f"{value:g}" for value in d[field]) for field in d)]
        for name, d in found["peakedness"].items()
    ]
    fields = list(next(iter(found["peakedness"].values())))
    parts.append(f"The logits (smallest, middle and largest row):\n\n{table(['logits', *fields], looks)}")
    vocabulary = (
        f"Vocabulary {cells[0]['vocab']:,}; every row has parameters of its own, which transformers' warpers cannot do."
    )
    return "\n\n".join([vocabulary, *parts])


def decoding(found: Result) -> str:
    """Time of a token, operations, sizes, memory, the fixed cost and compiled decoding."""
    if not found.get("cells"):
        return ""
    plain, static = "adaptive / plain sampling", "adaptive / static T + top-p"
    lines = [
        [
            c["shape"], c["dtype"], c["batch"], f"{c['prompt']:,}",
            f"{c['ms a token']['plain sampling']['median']:.2f}",
            ", ".join(f"{value['median']:.2f}" for value in c["ms a token beside the model"].values()),
            *(with_interval(c, f"{name}{SAME_FORWARD}") for name in (plain, static)), free(c),
            *(with_interval(c, name) for name in (plain, static)),
            f"{c['operations a token']['adaptive'] / c['operations a token']['plain']:.5f}", c["ratios"][plain]["n"],
        ]
        for c in found["cells"]
    ]  # fmt: skip
    beside = ", ".join(found["cells"][0]["ms a token beside the model"])
    head = ["shape", "dtype", "batch", "prompt", "plain, ms a token", f"ms beside the model ({beside})"]
    head += [
        "adaptive / plain, same forward",
        "adaptive / static, same forward",
        "if it were free",
        "adaptive / plain",
        "adaptive / static",
    ]
    head += ["operations, adaptive / plain", "rounds"]
    paper = ", ".join(f"{p} {a / b:.3f}" for p, (a, b) in zip(PAPER_PROMPTS, PAPER_SECONDS, strict=True))
    parts = [
        f"Static is T = {found['static']['temperature']}, top-p = {found['static']['top_p']}. Decoders take turns "
        "token by token. Prompts are caches of random keys and values. Ratios are medians with their range, and behind "
        "the semicolon the 95 % interval of the median. The model's forward pass is the same work for every decoder, "
        "and its time varies by more than they differ: so `same forward` takes what each token of each decoder took "
        "beside it, behind one forward pass for all, the median of all. `if it were free` is plain over static: what "
        "adaptive / static would be if heads and warping took no time.",
        table(head, lines),
        f"AutoDeco's own latencies (Table 3, a 7B on a GPU), adaptive / default by prompt: {paper}.",
    ]
    alone = [c for c in found["cells"] if "in turns / alone" in c]
    if alone:
        values = ", ".join(f"{name} {value:.2f}" for name, value in alone[0]["in turns / alone"].items())
        parts.append(f"A token in turns over one of a decoder alone (fastest of each, first cell): {values}.")
    parts += [models(found), memory(found), fixed_cost(found), compiled(found)]
    return "\n\n".join(part for part in parts if part)


def with_interval(cell: Result, name: str) -> str:
    """A ratio with its range and the interval of its median."""
    value = cell["ratios"].get(name)
    return "" if value is None else f"{shown(value, 3)}; {interval(value)}"


def free(cell: Result) -> str:
    """Plain sampling over static, behind one forward pass."""
    beside = {name: value["median"] for name, value in cell["ms a token beside the model"].items()}
    if "static T + top-p" not in beside:
        return ""
    forward = cell["ms a token"]["plain sampling"]["median"] - beside["plain sampling"]
    return f"{(forward + beside['plain sampling']) / (forward + beside['static T + top-p']):.3f}"


def models(found: Result) -> str:
    """Sizes and operations by shape."""
    rows = []
    for m in found["models"]:
        share = m["adapter bytes"] / m["base bytes"]
        checks = [m[f"operations counted / on paper, {side}"] for side in ("plain", "adaptive")]
        rows.append(
            [
                m["shape"], m["dtype"], f"{m['base parameters']:,}", f"{m['adapter parameters']:,}",
                f"{m['adapter bytes'] / 2**20:.2f}", f"{100 * share:.3f} %",
                f"{m['operations a token of the heads']:,}",
                ", ".join(f"{check:.6f}" for check in checks),
                ", ".join(f"{p:g}" for p in m["largest probability, 10/50/90 %"]),
            ]
        )  # fmt: skip
    head = ["shape", "dtype", "base parameters", "adapter parameters", "adapter MiB", "of the base's bytes"]
    head += [
        "heads, operations a token",
        "torch's count / formula (plain, adaptive)",
        "largest probability, 10/50/90 %",
    ]
    return table(head, rows)


def memory(found: Result) -> str:
    """What a few steps peak above the model and its cache."""
    if not found.get("memory"):
        return ""
    rows = [
        [m["shape"], m["batch"], *(f"{value / 2**20:.1f}" for value in m["peak bytes"].values())]
        + [f"{m[name] / 2**20:+.1f}" for name in ("adaptive - plain", "adaptive - static")]
        for m in found["memory"]
    ]
    head = ["shape", "batch", *found["memory"][0]["peak bytes"], "adaptive - plain", "adaptive - static"]
    return f"Peak memory of four steps above what was there before, MiB:\n\n{table(head, rows)}"


def fixed_cost(found: Result) -> str:
    """What a call costs however short."""
    cost = found["fixed_cost"]
    rows = [[name, shown(value)] for name, value in cost["ms a call"].items()]
    ratios = "; ".join(f"{name}: {shown(value)}" for name, value in cost["ratios"].items())
    calls = table(["decoder", "ms"], rows)
    return f"One `generate` call for one token of a tiny model, ms:\n\n{calls}\n\nIts ratios: {ratios}."


def compiled(found: Result) -> str:
    """Static cache and torch.compile."""
    rows = [
        [
            c["shape"], c["dtype"], c["batch"], c["mode"], *(shown(value) for value in c["ratios"].values()),
            ", ".join(map(str, c["graphs"].values())), c["graph breaks"], c["recompilations in the timed calls"],
        ]
        for c in found.get("compiled", [])
    ]  # fmt: skip
    if not rows:
        return ""
    names = list(found["compiled"][0]["ratios"])
    graphs = f"graphs ({', '.join(found['compiled'][0]['graphs'])})"
    head = ["shape", "dtype", "batch", "mode", *names, graphs, "graph breaks", "recompilations when timed"]
    return f"Compiled decoding with a static cache:\n\n{table(head, rows)}"


def training(found: Result) -> str:
    """Ratios of time and memory, and growth."""
    cells = found.get("cells", [])
    if not cells:
        return ""
    rows = [
        [f"({c['part']})", c["logits"], name, shown(value)]
        for c in cells if c["part"] != "d" for name, value in c["ratios"].items()
    ]  # fmt: skip
    settings = found["settings"]
    parts = [
        f"{settings['tokens']:,} tokens, vocabulary {settings['vocab']:,}. Plain is the paper's equations as written, "
        f"on {settings['plain_tokens']} tokens for want of memory and scaled. (a) loss and gradients, (b) memory that "
        "they add, (c) a training step with a frozen body of the 0.6B's shape over that body's forward pass, on "
        f"{settings.get('step_tokens', settings['tokens']):,} tokens.",
        table(["", "logits", "ratio", "median and range"], rows),
    ]
    for c in cells:
        if c["part"] == "d":
            parts += [growth(c, over) for over in ("tokens", "vocabulary")]
    return "\n\n".join(parts)


def growth(cell: Result, over: str) -> str:
    """Seconds and bytes over one of the two sizes."""
    rows = [[f"{p[over]:,}", shown(p["seconds"]), f"{p['bytes'] / 2**20:.0f}"] for p in cell[over]]
    slopes = {kind: cell["ratios"][f"{kind} over {over}"]["median"] for kind in ("seconds", "bytes")}
    says = f"(slopes of the logarithms: time {slopes['seconds']:.2f}, memory {slopes['bytes']:.2f})"
    return f"The library's loss over {over} {says}:\n\n{table([over, 'seconds', 'added MiB'], rows)}"


def startup(found: Result) -> str:
    """Seconds of processes, and what is loaded."""
    rows, loads = [], []
    for c in found.get("cells", []):
        rows += [[c["start"], f"{side}, s", shown(value)] for side, value in c["s a process"].items()]
        rows += [
            [c["start"], name, shown(value)] for name, value in c["ratios"].items() if name != "s to answer --help"
        ]
        loads.append(f"{c['start']}: {', '.join(c['needlessly loaded']) or 'nothing'}")
    if not rows:
        return ""
    note = (
        "`import` is `import transformers, hf_adaptive_decode` beside `import transformers`; `model` is "
        "`hf_adaptive_decode.AutoDecoForCausalLM` beside transformers' own classes; added ms are within a process."
    )
    times = table(["start", "what", "median and range"], rows)
    return f"{note}\n\n{times}\n\nHeavy modules loaded needlessly: {'; '.join(loads)}."


def profiles(found: Result) -> str:
    """Shares of a step's time."""
    parts = []
    for c in found.get("cells", []):
        what = f"{c['shape']}, batch {c['batch']}, prompt {c['prompt']}" if "shape" in c else f"{c['tokens']:,} tokens"
        bound = ", ".join(f"{name} {value:,}" for name, value in c["bound"].items() if name != "ms")
        rows = [[name, f"{p['ms']:.2f}", f"{100 * p['share']:.1f} %"] for name, p in c["parts"].items()]
        title = f"A {c['step']} step, {c['contender']} ({what}, {c['dtype']}): {c['ms']:.1f} ms"
        parts.append(f"{title}; bound {c['bound']['ms']} ms ({bound}).\n\n{table(['part', 'ms', 'share'], rows)}")
        parts.append(in_words(c))
    return "\n\n".join(parts)


def in_words(cell: Result) -> str:
    """Whose time it is, and how far it is from what the machine could do."""

    def of(*beginnings: str) -> float:
        return sum(p["ms"] for name, p in cell["parts"].items() if name.startswith(beginnings))

    whole, bound = cell["ms"], cell["bound"]["ms"]
    base = of("base:")
    if cell["step"] == "training":
        added = of("loss:", "heads", "backward", "optimiser")
        what = "the loss, the heads, their gradients and the optimiser take"
        limit = "the operations of the base's forward pass and projection at the speed of one large matrix product"
    else:
        added = of("heads", "reading", "checks", "warping")
        what = "what decides and warps takes"
        limit = "each weight and each key and value read once at the bandwidth of a large copy"
    return (
        f"In words: the base takes {base:.1f} ms of {whole:.1f} ({100 * base / whole:.0f} %), and {what} {added:.1f} "
        f"({100 * added / whole:.1f} %). The limit is {limit}: {bound} ms, of which the base alone takes "
        f"{base / bound:.1f} times as much, in its own kernels."
    )


def rollouts(found: Result) -> str:
    """Every ratio of the rollout benchmark."""
    rows = [
        [f"({row['part']})", row.get("model", ""), row.get("rows", ""), row.get("new_tokens", ""), name, shown(value)]
        for row in found.get("results", [])
        for name, value in row.items()
        if isinstance(value, dict) and "median" in value
    ]
    return table(["part", "model", "rows", "new tokens at most", "ratio", "median and range"], rows) if rows else ""


def epoch_cache(found: Result) -> str:
    """Every ratio of the cache of hidden states."""
    rows = [[name, shown(value), value.get("n", "")] for name, value in found.get("ratios", {}).items()]
    return table(["ratio", "median and range", "rounds"], rows) if rows else ""


def serving(found: Result) -> str:
    """Tokens a second of stock vLLM with and without an adapter."""
    rows = [
        [
            cell["batch"],
            cell["layers"],
            name,
            shown(rate, 1),
            shown(next((value for what, value in cell["ratios"].items() if what.startswith(f"{name} / ")), None), 3),
        ]
        for cell in found.get("cells", [])
        for name, rate in cell["tokens_a_second"].items()
    ]
    if not rows:
        return ""
    settings = found["settings"]
    about = (
        f"vLLM {found['about']['vllm']}, vocabulary {settings['vocab']:,}; layers of the {settings['shape']}'s shape, "
        "seconds of the processor."
    )
    return f"{about}\n\n{table(['batch', 'layers', 'requests', 'tokens a second', 'of stock with top-p'], rows)}"


SECTIONS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "warping": ("Warping", warping),
    "decoding": ("Decoding", decoding),
    "training_step": ("Training", training),
    "epoch_cache": ("Epochs from cached states", epoch_cache),
    "rollout": ("Rollouts", rollouts),
    "serving": ("Serving with vLLM", serving),
    "startup": ("Start-up", startup),
    "profile_steps": ("Where the time goes", profiles),
}
