"""
Time of `warp_logits` beside transformers' own warpers, for rows that each have their own parameters.

    python benchmarks/warping.py [--json FILE] [--rows 1 8 64] [--rounds 9] [--vocab 151936] [--growth 1024 262144]

Transformers' warpers take one number for the whole batch, so they are given one of those that the rows have; what they
do does not depend on it. Peaked rows have logits of deviations from 3 to 10, as trained models have, flat ones 0.64.
Contenders take turns round by round, and a ratio is taken within a round. Where a compiler is found, the same warp for
rows, written in plain PyTorch and compiled, is a third contender.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from measure import Timer, add_arguments, begin, interleaved, ratio, shown, spread, target, write
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hf_adaptive_decode import SamplingParameters
from hf_adaptive_decode.warping import warp_logits

TOP_P = (0.5, 0.9, 0.95, 0.999)
TOP_K = (10, 20, 50, 200)
MIN_P = (0.02, 0.05, 0.1, 0.2)
TEMPERATURE = (0.6, 0.8, 1.0, 1.2)
KINDS = ("top-p", "top-k", "min-p", "T + top-p")
TARGETS = [
    target("transformers / ours", at_least=4.0, where={"logits": "peaked", "kind": "top-p"}),
    target("transformers / ours", at_least=4.0, where={"logits": "peaked", "kind": "T + top-p"}),
    target("transformers / ours", at_least=1.0, where={"logits": "peaked", "kind": "top-k"}),
    target("transformers / ours", at_least=1.0, where={"logits": "peaked", "kind": "min-p"}),
    target("transformers / ours", at_least=1.0, where={"logits": "flat"}),
]


def make_logits(rows: int, vocab: int, kind: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal logits `[rows, vocab]`, each row with its own deviation."""
    generator = torch.Generator().manual_seed(seed)
    # One row alone stands in the middle; several spread over the range.
    scales = torch.full((rows,), 0.64) if kind == "flat" else torch.linspace(3.0, 10.0, rows + 2)[1:-1]
    return (torch.randn(rows, vocab, generator=generator) * scales[:, None]).to(dtype)


def peakedness(logits: torch.Tensor) -> dict[str, list[float]]:
    """Smallest, middle and largest row: the most likely token's probability, and tokens in a nucleus of 0.95."""
    ranked = logits.double().softmax(-1).sort(-1, descending=True).values
    sizes = (ranked.cumsum(-1) < 0.95).sum(-1).double() + 1
    points = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, device=logits.device)
    return {
        "largest probability": [round(value, 4) for value in ranked[:, 0].quantile(points).tolist()],
        "tokens in the 0.95 nucleus": [int(value) for value in sizes.quantile(points).tolist()],
    }


def per_row(values: tuple[float, ...], rows: int, device: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values in turn, `[rows]`; one row alone gets the last but one."""
    chosen = values if rows > 1 else values[-2:]
    return torch.tensor([chosen[row % len(chosen)] for row in range(rows)], dtype=dtype, device=device)


def ours(kind: str, logits: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The library's warp, with a parameter a row."""
    rows, device = logits.shape[0], logits.device
    fields: dict[str, Any] = {}
    if "top-p" in kind:
        fields["top_p"] = per_row(TOP_P, rows, device)
    if "T" in kind:
        fields["temperature"] = per_row(TEMPERATURE, rows, device)
    if kind == "top-k":
        fields["top_k"] = per_row(TOP_K, rows, device, torch.long)
    if kind == "min-p":
        fields["min_p"] = per_row(MIN_P, rows, device)
    parameters = SamplingParameters(**fields)
    return lambda: warp_logits(logits, parameters)


def theirs(kind: str, logits: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Transformers' warpers, on float32 scores as `generate` hands them over."""
    ids = torch.zeros(logits.shape[0], 1, dtype=torch.long, device=logits.device)
    warpers: list[Any] = [TemperatureLogitsWarper(0.8)] if "T" in kind else []
    warpers += [TopPLogitsWarper(0.95)] if "top-p" in kind else []
    warpers += [TopKLogitsWarper(50)] if kind == "top-k" else []
    warpers += [MinPLogitsWarper(0.1)] if kind == "min-p" else []

    def run() -> torch.Tensor:
        scores = logits.float()
        for warper in warpers:
            scores = warper(ids, scores)
        return scores

    return run


def sorted_top_p(logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Temperature and top-p as anyone would write them for rows, to be compiled."""
    scores = logits.float() / temperature[:, None]
    ranked, order = scores.sort(-1, descending=True)
    p = ranked.softmax(-1)
    drop = (p.cumsum(-1) - p) >= top_p[:, None]
    return scores.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -float("inf"))


def compiled(logits: torch.Tensor, temperature: torch.Tensor | None) -> Callable[[], torch.Tensor]:
    """[`sorted_top_p`], compiled."""
    run = torch.compile(sorted_top_p, dynamic=False)
    top_p = per_row(TOP_P, logits.shape[0], logits.device)
    return lambda: run(logits, torch.ones_like(top_p) if temperature is None else temperature, top_p)


def can_compile(device: str) -> bool:
    """Whether torch.compile has what it needs: Triton for a GPU, a C++ compiler for a CPU."""
    if torch.device(device).type == "cuda":
        from torch.utils._triton import has_triton

        return bool(has_triton())
    return shutil.which("g++") is not None or shutil.which("clang++") is not None


def measure(
    kind: str, flatness: str, dtype: torch.dtype, rows: int, vocab: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One cell."""
    logits = make_logits(rows, vocab, flatness, dtype, args.seed).to(args.device)
    contenders = {"ours": ours(kind, logits), "transformers": theirs(kind, logits)}
    if args.compiled and "top-p" in kind:
        temperature = per_row(TEMPERATURE, rows, logits.device) if "T" in kind else None
        contenders["compiled"] = compiled(logits, temperature)
    with torch.no_grad():
        seconds = interleaved(contenders, args.rounds, Timer(args.device), args.shortest)
    return {
        "kind": kind,
        "logits": flatness,
        "dtype": str(dtype).removeprefix("torch."),
        "rows": rows,
        "vocab": vocab,
        "ms a call": {name: spread([1e3 * s for s in values]) for name, values in seconds.items()},
        "ratios": {f"{name} / ours": ratio(seconds, name, "ours") for name in contenders if name != "ours"},
    }


def show(cell: dict[str, Any]) -> None:
    """Prints a cell."""
    place = f"{cell['kind']:9} {cell['logits']:6} {cell['dtype']:8} {cell['rows']:3} x {cell['vocab']:6}"
    found = [f"{name} {shown(value, 2)}" for name, value in cell["ratios"].items()]
    print(f"{place}  {cell['ms a call']['ours']['median']:8.3f} ms  {', '.join(found)}", flush=True)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, rounds=9)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--growth", type=int, nargs=2, metavar=("FROM", "TO"), default=[1024, 262_144])
    parser.add_argument("--growth-rows", type=int, default=8)
    parser.add_argument("--shortest", type=float, default=0.02, help="seconds of a turn, at least")
    parser.add_argument("--no-compile", dest="compiled", action="store_false", help="leave the compiled contender out")
    args = parser.parse_args()
    result = begin(args) | {"targets": TARGETS, "cells": [], "growth": [], "skipped": []}
    if args.compiled and not can_compile(args.device):
        args.compiled = False
        result["skipped"].append({"cell": "compiled plain PyTorch", "why": "no compiler was found"})
    dtypes = [getattr(torch, name) for name in args.dtypes]
    result["peakedness"] = {
        f"{flatness}, {rows} rows": peakedness(make_logits(rows, args.vocab, flatness, torch.float32, args.seed))
        for flatness in ("peaked", "flat")
        for rows in args.rows
    }
    for name, described in result["peakedness"].items():
        print(name, described)
    cells = [
        (kind, f, d, rows) for kind in args.kinds for f in ("peaked", "flat") for d in dtypes for rows in args.rows
    ]
    for kind, flatness, dtype, rows in cells:
        result["cells"].append(measure(kind, flatness, dtype, rows, args.vocab, args))
        show(result["cells"][-1])
    args.compiled = False
    first, last = (round(math.log2(size)) for size in args.growth)
    for size in [1 << power for power in range(first, last + 1, 2)]:
        for flatness in ("peaked", "flat"):
            result["growth"].append(measure("top-p", flatness, torch.float32, args.growth_rows, size, args))
            show(result["growth"][-1])
    write(args.json, result)


if __name__ == "__main__":
    main()
