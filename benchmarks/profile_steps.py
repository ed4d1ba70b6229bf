"""
Where the time of a decoding step and of a training step goes, part by part, and how near each is to what the machine
can do.

    python benchmarks/profile_steps.py [--json FILE] [--steps decoding training] [--shape 0.6B] [--batch 1]

torch.profiler records ranges that are put around the library's and transformers' functions from outside, for as long
as this script runs; a range's time is its own, without that of the ranges within it. On a GPU every range waits for
what it launched, so that the host's time and the device's are in one sum. The bound of decoding is the bytes that a
token has to move (weights and cache) over the bandwidth of a large copy; that of training is the operations of the
forward pass and of the projection over the speed of a large matrix product.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from contenders import ADAPTIVE, FIXED, PLAIN, Bench
from measure import Timer, add_arguments, begin, faster_dtype, write
from models import SHAPES, base_flops, cache_bytes
from torch.profiler import ProfilerActivity, profile, record_function
from training_step import Heads, qwen3_body, realistic_scales, sample_targets, with_scales
from transformers import TemperatureLogitsWarper, TopPLogitsWarper, logging
from transformers.generation.streamers import BaseStreamer

from hf_adaptive_decode import generation, losses, sampler
from hf_adaptive_decode.checks import StepChecks
from hf_adaptive_decode.losses import chunked, rows

WHOLE, REST = "whole step", "bookkeeping of transformers and Python"
TRAINING_REST = "loss: the rest"


class Ranges:
    """Functions that are recorded while they run, as long as the block is open; labels without any are listed."""

    def __init__(self, timer: Timer) -> None:
        self.labels: list[str] = [WHOLE]
        self._wanted: list[str] = []
        self._timer = timer
        self._undo: list[Callable[[], None]] = []

    def around(self, owner: Any, name: str, label: str) -> None:
        """Records `owner.name` under the label, if there is such a function."""
        own = vars(owner).get(name)
        function = getattr(owner, name, None)
        self._wanted.append(label)
        if function is None:
            return

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            with self.range(label):
                return function(*args, **kwargs)

        setattr(owner, name, recorded)
        self._undo.append(functools.partial(delattr, owner, name) if own is None else lambda: setattr(owner, name, own))
        self.labels += [label] if label not in self.labels else []

    @property
    def missing(self) -> list[str]:
        """Labels of which no function was found."""
        return sorted(set(self._wanted) - set(self.labels))

    @contextmanager
    def range(self, label: str) -> Iterator[None]:
        """A range of that name."""
        self._timer.wait()
        with record_function(label):
            yield
            self._timer.wait()

    def __enter__(self) -> Ranges:
        return self

    def __exit__(self, *_error: object) -> None:
        for undo in reversed(self._undo):
            undo()

    def own_ms(self, events: Any, steps: int) -> dict[str, float]:
        """Milliseconds a step of each range, those of the ranges within it taken away."""
        found: dict[str, float] = defaultdict(float)
        for event in events:
            if event.name not in self.labels:
                continue
            found[event.name] += event.time_range.elapsed_us()
            outer = event.cpu_parent
            while outer is not None and outer.name not in self.labels:
                outer = outer.cpu_parent
            if outer is not None:
                found[outer.name] -= event.time_range.elapsed_us()
        return {name: found[name] / 1e3 / steps for name in self.labels if name in found}


class ProfiledTokens(BaseStreamer):
    """Starts the profiler after some tokens, and makes a range of every token after that."""

    def __init__(self, profiler: Any, skip: int, timer: Timer) -> None:
        self._profiler, self._skip, self._timer = profiler, skip, timer
        self._seen, self._step = 0, None

    def put(self, value: Any) -> None:
        """The prompt, then each token."""
        self._timer.wait()
        self._close()
        if self._seen == self._skip:
            self._profiler.start()
        if self._seen >= self._skip:
            self._step = record_function(WHOLE)
            self._step.__enter__()
        self._seen += 1

    def _close(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def end(self) -> None:
        """After the last token."""
        self._close()
        self._profiler.stop()


def activities() -> list[ProfilerActivity]:
    """The host's, whose ranges wait for the device."""
    return [ProfilerActivity.CPU]


def profile_decoding(bench: Bench, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Shares of a token's time for one contender."""
    skip = 3
    model = bench.adaptive if name == ADAPTIVE else bench.plain
    with Ranges(bench.timer) as ranges:
        ranges.around(model.model, "forward", "base: layers")
        ranges.around(model.lm_head, "forward", "base: output projection")
        for function in ("hear", "take_hidden"):
            ranges.around(generation.GenerationSession, function, "reading the hidden state")
        ranges.around(bench.adaptive.decoding_adapter, "forward", "heads")
        for function in ("scores", "parameters", "make_harmless"):
            ranges.around(StepChecks, function, "checks")
        ranges.around(sampler, "warp_logits", "warping")
        for kind in (TemperatureLogitsWarper, TopPLogitsWarper):
            ranges.around(kind, "__call__", "warping")
        ranges.around(torch, "multinomial", "drawing")
        ranges.around(torch.nn.functional, "softmax", "drawing")
        profiler = profile(activities=activities())
        decode = bench.decoder(name, args.batch, args.prompt, args.rounds + skip)
        decode(ProfiledTokens(profiler, skip, bench.timer))
        shares = ranges.own_ms(profiler.events(), args.rounds)
    of = SHAPES[args.shape]
    embedding = args.vocab * of["hidden_size"] * bench.dtype.itemsize
    cache = cache_bytes(args.shape, args.batch, args.prompt, bench.dtype)
    moved = bench.base_bytes - embedding + cache
    bandwidth = copy_bandwidth(args.device)
    bound = {
        "GiB a token": round(moved / 2**30, 3),
        "GiB/s of a copy": round(bandwidth / 2**30, 1),
        "ms": round(1e3 * moved / bandwidth, 3),
        "operations a token": args.batch * base_flops(args.shape, args.vocab, args.prompt),
    }
    about = {"step": "decoding", "contender": name, "batch": args.batch, "prompt": args.prompt, "shape": args.shape}
    return about | described(shares, REST, ranges.missing) | {"bound": bound, "dtype": dtype_name(bench.dtype)}


def profile_training(args: argparse.Namespace) -> dict[str, Any]:
    """Shares of a training step's time: the paper's defaults, peaked logits, frozen body."""
    timer, dtype = Timer(args.device), faster_dtype(args.hidden, 256, args.device)
    body = qwen3_body(args, dtype)
    weight = body.embed_tokens.weight.detach()
    tokens = torch.randint(0, args.vocab, (4, args.tokens // 4)).to(args.device)
    scales = realistic_scales(tokens.numel(), "peaked").to(args.device)
    heads, uniform = Heads(args.hidden).to(args.device), torch.rand(tokens.numel()).to(args.device)
    optimiser = torch.optim.AdamW(heads.parameters())

    @torch.no_grad()
    def hidden_states() -> torch.Tensor:
        return with_scales(body(tokens, use_cache=False).last_hidden_state.flatten(0, 1), scales)

    targets, _ = sample_targets(hidden_states(), weight)
    with Ranges(timer) as ranges:

        def project(part: torch.Tensor) -> torch.Tensor:
            with ranges.range("base: output projection"):
                return part @ weight.t()

        def step() -> None:
            hidden = hidden_states()
            out = losses.chunked_decoding_loss(hidden, targets, heads, project, mask_uniform=uniform)
            with ranges.range("backward into the heads"):
                out.loss.backward()
            with ranges.range("optimiser"):
                optimiser.step()
                optimiser.zero_grad()

        ranges.labels += ["base: output projection", "backward into the heads", "optimiser"]
        ranges.around(body, "forward", "base: layers")
        ranges.around(heads, "forward", "heads")
        ranges.around(losses, "chunked_decoding_loss", TRAINING_REST)
        ranges.around(chunked, "_drawn_easy", "loss: easy tokens")
        ranges.around(rows, "_vocabulary_passes", "loss: passes over the vocabulary")
        for function in ("find_tokens", "rank"):
            ranges.around(rows, function, "loss: ranking")
        ranges.around(rows, "tail_sums", "loss: tail")
        step()
        with profile(activities=activities()) as profiler:
            for _ in range(args.training_rounds):
                with ranges.range(WHOLE):
                    step()
        shares = ranges.own_ms(profiler.events(), args.training_rounds)
    flops = args.tokens * training_flops(args)
    speed = matmul_speed(dtype, args.device)
    bound = {
        "operations a step": flops,
        "operations/s of a matrix product": speed,
        "ms": round(1e3 * flops / speed, 1),
    }
    about = {"step": "training", "contender": "heads", "tokens": args.tokens, "dtype": dtype_name(dtype)}
    return about | described(shares, "the rest", ranges.missing) | {"bound": bound}


def described(shares: dict[str, float], rest: str, missing: list[str]) -> dict[str, Any]:
    """Milliseconds and share of each part; what is in no range is the rest."""
    whole = sum(shares.values())
    parts = {rest if name == WHOLE else name: value for name, value in shares.items()}
    ranked = sorted(parts, key=lambda name: -parts[name])
    found = {name: {"ms": round(parts[name], 4), "share": round(parts[name] / whole, 4)} for name in ranked}
    return {"ms": round(whole, 3), "parts": found, "parts not found": missing}


def training_flops(args: argparse.Namespace) -> int:
    """Operations of the frozen forward pass and of the projection for one token, half the length before it."""
    width, attention = args.hidden, 16 * 128
    weights = 2 * width * attention + 2 * width * 8 * 128 + 3 * width * 3 * width
    return 2 * (args.layers * (weights + 2 * attention * (args.tokens // 8)) + width * args.vocab)


def copy_bandwidth(device: str, megabytes: int = 512) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.ones(megabytes << 18, device=device)
    copied, timer = torch.empty_like(source), Timer(device)
    seconds = [timer(lambda: copied.copy_(source)) for _ in range(6)][1:]
    return 2 * source.numel() * source.element_size() / statistics.median(seconds)


def matmul_speed(dtype: torch.dtype, device: str, size: int = 1024) -> float:
    """Operations a second of a large matrix product."""
    size = size if torch.device(device).type == "cpu" else 8 * size
    left = torch.randn(size, size, device=device).to(dtype)
    timer = Timer(device)
    seconds = [timer(lambda: left @ left.t(), times=4) for _ in range(6)][1:]
    return round(2 * size**3 / statistics.median(seconds))


def dtype_name(dtype: torch.dtype) -> str:
    """Without its package."""
    return str(dtype).removeprefix("torch.")


def show(cell: dict[str, Any]) -> None:
    """Prints a cell."""
    print(f"{cell['step']}, {cell['contender']}: {cell['ms']:.1f} ms; bound {cell['bound']}")
    for name, part in cell["parts"].items():
        print(f"  {name:42} {part['ms']:10.2f} ms {100 * part['share']:6.1f} %", flush=True)
    if cell["parts not found"]:
        print(f"  not found: {cell['parts not found']}")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, rounds=20)
    parser.add_argument("--steps", nargs="+", choices=["decoding", "training"], default=["decoding", "training"])
    parser.add_argument("--shape", choices=SHAPES, default="0.6B")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    for name, default in (
        ("batch", 1), ("prompt", 64), ("vocab", 151_936), ("tokens", 2048), ("hidden", 1024), ("layers", 28),
        ("training-rounds", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    logging.set_verbosity_error()
    result = begin(args) | {"targets": [], "cells": [], "skipped": []}
    if "decoding" in args.steps:
        bench = Bench(args.shape, args)
        for name in (PLAIN, FIXED, ADAPTIVE):
            result["cells"].append(profile_decoding(bench, name, args))
            show(result["cells"][-1])
        del bench
    if "training" in args.steps:
        result["cells"].append(profile_training(args))
        show(result["cells"][-1])
    write(args.json, result)


if __name__ == "__main__":
    main()
