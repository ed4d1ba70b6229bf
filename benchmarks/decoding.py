"""
What adaptive decoding costs beside transformers' own sampling: time of each token, operations, parameters and memory by
prompt length, batch and size of the model (AutoDeco, Table 3), and what one call of `generate` costs however short.

    python benchmarks/decoding.py [--json FILE] [--cells 0.6B:1:64 0.6B:1:8192] [--rounds 30] [--compile 0.6B:1:64]

A cell is SHAPE:BATCH:PROMPT. Models are random Qwen3s of real shapes, whose output layer is scaled so that the
distributions are as peaked as a trained model's, and untied from the input's. Plain sampling, static sampling and
greedy search run on transformers' own model, and the heads on the wrapped one, all on the same weights. Every
contender's `generate` runs in a thread of its own and waits after each token, so that each token is a round in which
all take a turn, and a ratio is taken within the round. Prompts are not read: the cache is filled with random keys and
values of their length. Compiled decoding (static cache) keeps to the main thread, and there a round is a call of each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from contenders import ADAPTIVE, FIXED, GREEDY, PLAIN, SETTINGS, STATIC, Bench, pick_dtype
from measure import (
    PeakMemory,
    Timer,
    add_arguments,
    available_bytes,
    begin,
    interleaved,
    ratio,
    shown,
    spread,
    target,
    write,
)
from models import (
    SHAPES,
    base_flops,
    build_base,
    cache_after,
    cache_bytes,
    head_flops,
    parameter_count,
    with_plain_twin,
)
from transformers import CompileConfig, logging
from turns import Decoder, alone, in_turns

# What cannot be fitted into memory goes without these, from the left on; the other two are what is compared.
DISPENSABLE = (GREEDY, FIXED)
# AutoDeco's section 2.2 has its heads add 1 to 2 % to the time of a token; what is saved on top-p should pay for them.
# The targets are for prompts of 1k and more; the short ones show where the model's own step weighs least.
SAME_MODEL = ", same forward"
TARGETS = [
    target(f"adaptive / plain sampling{SAME_MODEL}", at_most=1.01, unless={"prompt": 64}),
    target(f"adaptive / static T + top-p{SAME_MODEL}", at_most=0.9, unless={"prompt": 64}),
]


def measure_cell(bench: Bench, batch: int, prompt: int, contenders: list[str]) -> dict[str, Any]:
    """One batch after one prompt's length: the time of a token, token by token in turn."""
    args, tokens = bench.args, bench.args.rounds + bench.args.discard
    start = time.perf_counter()
    decoders = {name: bench.decoder(name, batch, prompt, tokens) for name in contenders}
    with_models = {name: (decode, bench.model(name)) for name, decode in decoders.items()}
    seconds, forward = in_turns(with_models, tokens, args.discard, bench.timer, args.cell_seconds)
    own, pooled = beside_the_model(seconds, forward)
    flops = base_flops(bench.shape, args.vocab, prompt)
    result = {
        "shape": bench.shape,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "batch": batch,
        "prompt": prompt,
        "ms a token": {name: spread([1e3 * s for s in seconds[name]]) for name in contenders},
        "ms a token beside the model": {name: spread([1e3 * s for s in own[name]]) for name in contenders},
        "ratios": {
            f"adaptive / {name}{what}": ratio(times, ADAPTIVE, name)
            for what, times in (("", seconds), (SAME_MODEL, pooled))
            for name in (PLAIN, FIXED)
            if name in contenders
        },
        "operations a token": {"plain": flops, "adaptive": flops + head_flops(bench.adaptive)},
        "cache bytes": cache_bytes(bench.shape, batch, prompt, bench.dtype),
    }
    if [batch, prompt] == args.check_alone:
        result["in turns / alone"] = against_alone(bench, decoders, seconds)
    return result | {"seconds spent": round(time.perf_counter() - start, 1)}


def beside_the_model(
    seconds: dict[str, list[float]], forward: dict[str, list[float]]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """
    What each token took beside its model's forward pass, and that behind one forward pass for all: the median of all.

    The forward pass is the same work for every contender, and its time varies by more than they differ.
    """
    own = {name: [a - b for a, b in zip(seconds[name], forward[name], strict=True)] for name in seconds}
    same = statistics.median(value for values in forward.values() for value in values)
    return own, {name: [same + value for value in values] for name, values in own.items()}


def against_alone(bench: Bench, decoders: dict[str, Decoder], seconds: dict[str, list[float]]) -> dict[str, float]:
    """What taking turns does to a token's time: the fastest over that of calls that have the machine for themselves."""
    lone: dict[str, list[float]] = {PLAIN: [], ADAPTIVE: []}
    for number in range(2):
        for name in sorted(lone, reverse=bool(number)):
            lone[name] += alone(decoders[name], bench.args.discard, bench.timer)
    return {name: round(min(seconds[name]) / min(lone[name]), 3) for name in lone}


def measure_memory(bench: Bench, batch: int, repeats: int = 3) -> dict[str, Any]:
    """Bytes by which a few steps peak above what was there before, per contender."""
    peaks: dict[str, list[int]] = {PLAIN: [], FIXED: [], ADAPTIVE: []}
    for number in range(repeats + 1):
        for name, found in peaks.items():
            decode, cache = bench.decoder(name, batch, 64, 4), cache_after(bench.plain, batch, 63)
            with PeakMemory(bench.args.device) as peak:
                decode(cache=cache)
            found += [peak.bytes] if number else []  # the first call allocates for good
    bytes_ = {name: int(statistics.median(found)) for name, found in peaks.items()}
    return {
        "shape": bench.shape,
        "batch": batch,
        "peak bytes": bytes_,
        "adaptive - plain": bytes_[ADAPTIVE] - bytes_[PLAIN],
        "adaptive - static": bytes_[ADAPTIVE] - bytes_[FIXED],
    }


def measure_compiled(bench: Bench, batch: int, prompt: int, rounds: int = 5) -> dict[str, Any]:
    """Static cache and compiled forward passes, in rounds of whole calls."""
    from torch._dynamo.utils import counters

    config = CompileConfig(mode="reduce-overhead" if bench.timer.device.type == "cuda" else "default")
    config._compile_all_devices = True
    how = {"cache_implementation": "static", "compile_config": config}
    tokens, seconds, graphs, spent = bench.args.rounds + bench.args.discard, {}, {}, {}
    decoders = {f"{name}, compiled": bench.decoder(name, batch, prompt, tokens, **how) for name in (PLAIN, ADAPTIVE)}
    decoders[PLAIN] = bench.decoder(PLAIN, batch, prompt, tokens)
    counters.clear()
    for name, decode in decoders.items():
        before, start = counters["stats"]["unique_graphs"], time.perf_counter()
        decode()
        spent[name] = round(time.perf_counter() - start, 1)
        graphs[name] = counters["stats"]["unique_graphs"] - before
    made, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    seconds = {name: [] for name in decoders}
    for number in range(rounds):
        for name in sorted(decoders, reverse=bool(number % 2)):
            steps = alone(decoders[name], bench.args.discard, bench.timer)
            seconds[name].append(statistics.median(steps))
    return {
        "shape": bench.shape,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "batch": batch,
        "prompt": prompt,
        "mode": config.mode,
        "graphs": graphs,
        "graph breaks": breaks,
        "recompilations in the timed calls": counters["stats"]["unique_graphs"] - made,
        "seconds of the first call": spent,
        "ms a token": {name: spread([1e3 * s for s in values]) for name, values in seconds.items()},
        "ratios": {
            "adaptive / plain, both compiled": ratio(seconds, f"{ADAPTIVE}, compiled", f"{PLAIN}, compiled"),
            "plain: compiled / not": ratio(seconds, f"{PLAIN}, compiled", PLAIN),
        },
    }


def fixed_cost(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a `generate` call for one token of a tiny model: almost nothing but its setting up."""
    base = build_base("tiny", 1000, torch.float32, args.device, args.seed)
    adaptive, plain = with_plain_twin(base)
    ids = torch.ones(1, 4, dtype=torch.long, device=args.device)
    runs: dict[str, Callable[[], Any]] = {
        name: lambda model=adaptive if name == ADAPTIVE else plain, how=how: model.generate(
            ids, max_new_tokens=1, **how
        )
        for name, how in SETTINGS.items()
    }
    seconds = interleaved(runs, args.rounds, Timer(args.device), shortest=0.02)
    return {
        "ms a call": {name: spread([1e3 * s for s in values]) for name, values in seconds.items()},
        "ratios": {f"one token, adaptive / {name}": ratio(seconds, ADAPTIVE, name) for name in (PLAIN, FIXED)},
    }


def that_fit(shape: str, batch: int, prompt: int, dtype: torch.dtype, limit: float, vocab: int) -> list[str]:
    """The contenders that fit into so many bytes beside the model; at the least the two that are compared, or none."""
    contenders = list(SETTINGS)
    # Keys and values of a layer are copied as they grow, and sampling holds some copies of the logits.
    each = cache_bytes(shape, batch, prompt, dtype) * (1 + 2 / SHAPES[shape]["num_hidden_layers"])
    each += 10 * 4 * batch * vocab
    for name in ("", *DISPENSABLE):
        contenders = [other for other in contenders if other != name]
        if each * len(contenders) < limit:
            return contenders
    return []


def measure_shape(shape: str, cells: list[tuple[int, int]], args: argparse.Namespace, result: dict[str, Any]) -> None:
    """All cells of a shape, added to the result."""
    limit = args.max_memory_gib * 2**30 if args.max_memory_gib else 0.8 * available_bytes(args.device)
    dtype = pick_dtype(shape, args)
    weights = parameter_count(shape, args.vocab) * dtype.itemsize
    names = [f"{shape}:{batch}:{prompt}" for batch, prompt in cells]
    # Beside the weights, what the smallest cell needs.
    if not any(that_fit(shape, *cell, dtype, limit - weights, args.vocab) for cell in cells):
        reason = (
            f"needs more than the {limit / 2**30:.1f} GiB that may be taken (the weights alone {weights / 2**30:.1f})"
        )
        result["skipped"] += [{"cell": name, "why": reason} for name in names]
        return
    bench = Bench(shape, args)
    result["models"].append(bench.about())
    print(shape, result["models"][-1], flush=True)
    for (batch, prompt), name in zip(cells, names, strict=True):
        contenders = that_fit(shape, batch, prompt, dtype, limit - weights, args.vocab)
        if not contenders:
            need = 2 * cache_bytes(shape, batch, prompt, dtype) / 2**30
            reason = f"two caches take {need:.1f} GiB beside the weights, more than {limit / 2**30:.1f} in all"
            result["skipped"].append({"cell": name, "why": reason})
            continue
        contenders = [other for other in contenders if other != GREEDY or prompt <= args.greedy_up_to]
        result["cells"].append(measure_cell(bench, batch, prompt, contenders))
        show(name, result["cells"][-1])
    result["memory"] += [
        measure_memory(bench, batch) for batch in args.memory_batch if shape != "tiny" or len(args.cells) == 1
    ]
    for cell in args.compile:
        if cell.startswith(f"{shape}:"):
            result["compiled"].append(measure_compiled(bench, *parse_cell(cell)[1:]))
            show(f"{cell}, compiled", result["compiled"][-1])


def show(name: str, cell: dict[str, Any]) -> None:
    """Prints a cell."""
    print(name)
    for contender, value in cell["ms a token"].items():
        print(f"  {contender:28} {shown(value, 2)} ms a token")
    for between, value in cell["ratios"].items():
        print(f"  {between:36} {shown(value)}, 95 % {value['low']:.3f} to {value['high']:.3f}", flush=True)


def parse_cell(text: str) -> tuple[str, int, int]:
    """SHAPE:BATCH:PROMPT."""
    shape, batch, prompt = text.split(":")
    if shape not in SHAPES or int(prompt) < 2:
        raise SystemExit(f"{text!r} is no cell: SHAPE is one of {', '.join(SHAPES)}, PROMPT at least 2.")
    return shape, int(batch), int(prompt)


DEFAULT_CELLS = [
    *(f"0.6B:1:{prompt}" for prompt in (64, 1024, 4096, 8192, 24576)),
    *(f"0.6B:8:{prompt}" for prompt in (64, 1024)),
    *(f"0.6B:32:{prompt}" for prompt in (64, 1024)),
    *(f"4B:{batch}:{prompt}" for batch in (1, 8) for prompt in (64, 1024)),
    *(f"tiny:{batch}:64" for batch in (1, 8)),
]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, rounds=30)
    parser.add_argument("--cells", nargs="+", default=DEFAULT_CELLS)
    parser.add_argument("--compile", nargs="*", default=[], help="cells for compiled decoding with a static cache")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--cell-seconds", type=float, default=40.0, help="then a cell ends, if it has 7 rounds")
    parser.add_argument("--greedy-up-to", type=int, default=1024, help="longer prompts go without greedy search")
    parser.add_argument("--discard", type=int, default=3, help="first tokens that are not counted")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--memory-batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--max-memory-gib", type=float, help="default: 80 %% of what is free")
    args = parser.parse_args()
    logging.set_verbosity_error()
    result = begin(args) | {"targets": TARGETS, "static": STATIC}
    result |= {"models": [], "cells": [], "memory": [], "compiled": [], "skipped": []}
    result["fixed_cost"] = fixed_cost(args)
    for between, value in result["fixed_cost"]["ratios"].items():
        print(f"{between:36} {shown(value)}", flush=True)
    cells = [parse_cell(text) for text in args.cells]
    args.check_alone = [cells[0][1], cells[0][2]]
    for shape in dict.fromkeys(shape for shape, _, _ in cells):
        measure_shape(shape, [cell[1:] for cell in cells if cell[0] == shape], args, result)
        write(args.json, result)


if __name__ == "__main__":
    main()
