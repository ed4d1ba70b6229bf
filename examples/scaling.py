"""
The arithmetic of docs/scaling.md: what learned decoding costs from one GPU to a cluster, from formulas alone.

    python examples/scaling.py [--price 3] [--completion 4096] [--bandwidth-part 0.5] ...

Prints the document's tables. Nothing here was measured: data sheets, configs and the named assumptions go in, and any
of these can be replaced. All sizes are in bytes, all rates in a second; GB is 10^9 bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence

from scaling_formulas import (
    BATCH,
    BF16,
    FP32,
    GB,
    GENERATIONS,
    H100,
    H200,
    MODELS,
    PROMPTS,
    ROWS,
    Assumed,
    Training,
    decision_bytes,
    evaluation_completions,
    replicas,
    smallest,
)

from hf_adaptive_decode.evaluation.table import markdown_table


def _n(value: float, digits: int = 3) -> str:
    """A number to three digits."""
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    rounded = round(value, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{rounded:,.{places}f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str | float]]) -> str:
    return markdown_table(header, [[one if isinstance(one, str) else _n(one) for one in row] for row in rows])


def tables(a: Assumed) -> dict[str, str]:
    """The document's tables by name."""
    return {**_given(a), **_decoding(a), **_training(a), **_whole(a)}


def _given(a: Assumed) -> dict[str, str]:
    """What goes in."""
    models = [
        [m.name, m.parameters / 1e9, m.active / 1e9, BF16 * m.parameters / GB, m.kv_token / 1024, m.heads_parameters]
        for m in MODELS.values()
    ]
    gpus = [
        [g.name, g.flops / 1e12, g.memory / GB, g.bandwidth / 1e12, g.nvlink / GB, g.network / GB] for g in (H100, H200)
    ]
    fields = [[f"`{one.name}`", f"{vars(a)[one.name]:g}", one.metadata["help"]] for one in dataclasses.fields(a)]
    model_header = ["", "parameters, 10^9", "active", "weights, GB", "KV of a token, KiB", "parameters of the heads"]
    gpu_header = ["", "TFLOP/s", "HBM, GB", "HBM, TB/s", "NVLink, GB/s", "network, GB/s a GPU"]
    return {
        "models": _table(model_header, models),
        "gpus": _table(gpu_header, gpus),
        "assumed": _table(["assumed", "value", "what"], fields),
    }


def _decoding(a: Assumed) -> dict[str, str]:
    """Rollouts."""
    sizes = (1, 8, 32, 128, 512)
    batch = [[r.name, *(r.vllm(n) if n <= r.most else "no room" for n in sizes)] for r in replicas(a)]
    rollouts, engines = [], []
    for r in replicas(a):
        rate = r.vllm(r.full)
        nodes = [n * r.gpu.node / r.gpus / r.rollout for n in (1, 64)]
        price = r.gpus * a.price / 3600 / rate * 1e6
        rows = [str(r.rows(32_768)), str(r.full)]
        rollouts.append([r.name, r.room / GB, *rows, 1000 * r.full / rate, rate, 1 / r.rollout, *nodes, price])
    for r in smallest(a):
        for rows in (8, 64):
            slow, fast = r.transformers(rows), r.vllm(rows)
            even = a.vllm_start / (1 / slow - 1 / fast) / a.completion
            engines.append([r.name, str(rows), slow, fast, fast / slow, even])
    rollout_header = ["", "room for KV, GB", "rows of 32,768", "rows", "ms a step", "tokens/s", "rollouts/s"]
    rollout_header += ["of a node", "of 64 nodes", "$ for 10^6 tokens"]
    return {
        "batch": _table(["tokens/s at rows:", *map(str, sizes)], batch),
        "rollouts": _table(rollout_header, rollouts),
        "engines": _table(["", "rows", "transformers, tokens/s", "vLLM", "ratio", "even after completions"], engines),
    }


def _training(a: Assumed) -> dict[str, str]:
    """Heads, and what an action policy's update needs."""
    own = a.prompt + a.completion
    full = [Training(m, a) for m in MODELS.values()]
    short = [Training(m, a, length=own) for m in MODELS.values()]
    heads = [
        [t.model.name, BATCH * t.forward / 1e15, t.step, t.gpu_hours, t.gpu_hours / t.epochs, s.gpu_hours]
        for t, s in zip(full, short, strict=True)
    ]
    heads_header = ["8 H100", "PFLOP a step", "s a step", "GPU-hours", "of the first epoch", f"at {own:,} tokens a row"]
    cache = [[t.model.name, f"{t.cached_position:,}", t.cache / GB, t.cached_read, t.step] for t in full]
    cache_header = ["", "bytes a position", "on disk, GB", "reading a step, s", "forward on 8 H100, s"]
    zero = [_zero3(t) for t in [*full, Training(MODELS["235B"], a, gpus=16)]]
    zero_header = ["ZeRO-3", "shard, GB", "2 layers", "activations", "in all", "gathered, GB", "computing, s"]
    zero_header += ["NVLink, s", "network, s", "rows to hide it"]
    decisions = PROMPTS * GENERATIONS * a.completion * a.decided
    reinforce = []
    for r in smallest(a):
        size = decision_bytes(r.model)
        seconds = [decisions * size / (r.gpu.network * a.link_part), PROMPTS * GENERATIONS * r.rollout]
        reinforce.append([r.name, f"{size:,}", decisions * size / GB, *seconds])
    reinforce_header = ["", "bytes a decision", "GB a step", "over the network, s", "rollouts of a step, s"]
    return {
        "heads": _table(heads_header, heads),
        "cache": _table(cache_header, cache),
        "zero3": _table(zero_header, zero),
        "reinforce": _table(reinforce_header, reinforce),
    }


def _zero3(t: Training) -> list[str | float]:
    memory = [BF16 * t.model.parameters / t.gpus, 2 * t.layer, t.activations, t.memory, t.gathered]
    seconds = [t.compute(1), t.gather(t.gpu.nvlink), t.gather(t.gpu.network)]
    return [f"{t.model.name}, {t.gpus} {t.gpu.name}", *(one / GB for one in memory), *seconds, str(t.hiding_rows)]


def _whole(a: Assumed) -> dict[str, str]:
    """What everything costs, and what goes from node to node."""
    recipe, network = [], []
    for r in smallest(a):
        hours = [
            r.gpu_hours(ROWS * a.drawn_per_kept),
            Training(r.model, a, length=a.prompt + a.completion).gpu_hours,
            r.gpu_hours(evaluation_completions()),
        ]
        recipe.append([r.name, *hours, sum(hours), sum(hours) * a.price])
        tokens = r.gpu.node / r.gpus * r.vllm(r.full)
        megabytes = [FP32 * r.model.heads_parameters, FP32 * tokens, a.decided * tokens * decision_bytes(r.model)]
        sharded = Training(r.model, a, gpus=16).gathered
        network.append([r.model.name, *(one / 1e6 for one in megabytes), sharded / 1e6])
    recipe_header = ["GPU-hours", "sample", "train, 8 H100", "evaluate", "in all", f"$ at {a.price:g}"]
    network_header = ["MB", "heads, an update", "tokens, a second", "decisions, a second", "ZeRO-3, a pass"]
    return {"recipe": _table(recipe_header, recipe), "network": _table(network_header, network)}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    for field in dataclasses.fields(Assumed):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default, help=field.metadata["help"])
    for name, table in tables(Assumed(**vars(parser.parse_args()))).items():
        print(f"{name}:\n\n{table}\n")


if __name__ == "__main__":
    main()
