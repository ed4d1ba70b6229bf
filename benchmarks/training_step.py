"""
What the decoding loss of a training step costs, in time and in memory, and how that grows.

    python benchmarks/training_step.py [--json FILE] [--parts a b c d] [--tokens 2048] [--vocab 151936] [--rounds 7]

(a) time of the loss and its gradients: the paper's equations as anyone would write them (full logits, full sort,
    autograd) against the library's, on the same hidden states and output layer.
(b) memory that each adds: the peak above what was there just before, each in a process of its own.
(c) a training step with a frozen body of Qwen3 0.6B's shape against that model's forward pass alone, on
    `--step-tokens` tokens: both are linear in them.
(d) the library's loss over the number of tokens and over the vocabulary: time, and added memory as in (b), the latter
    from 512 tokens on.

The two sides of a ratio take turns, round by round, so that a slow minute hits both. Weights are random; see
`realistic_scales` for what that means for the logits.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from measure import (
    PeakMemory,
    Timer,
    add_arguments,
    begin,
    default_dtype,
    faster_dtype,
    interleaved,
    log_slope,
    ratio,
    shown,
    spread,
    target,
    write,
)

from hf_adaptive_decode import AutoDecoConfig, DecodeState
from hf_adaptive_decode.losses import DecodingLossConfig, chunked_decoding_loss
from hf_adaptive_decode.policies import HeadsPolicy

# Fewer tokens do not fill the blocks that are worked on, whose memory is what the loss adds.
FILLED = 512
# What (a) and (b) compare is the loss of every position, so that both sides do the same work.
EVERY_POSITION = DecodingLossConfig(dft_weight="off", easy_token_mask_ratio=0.0)
TARGETS = [
    target("plain / chunked", at_least=10.0, where={"part": "a", "logits": "peaked"}),
    target("added memory, plain / chunked", at_least=30.0, where={"part": "b"}),
    target("step / frozen forward", at_most=1.15, where={"part": "c", "logits": "peaked"}),
    target("seconds over tokens", at_most=1.1),
    target("seconds over vocabulary", at_most=1.1),
    target("bytes over tokens", at_most=0.1),
]


class Heads(torch.nn.Module):
    """The library's heads, with T around 0.9 and P around 0.9, where trained heads are found."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.policy = HeadsPolicy(AutoDecoConfig(hidden_size=hidden))
        for head, bias in ((self.policy.temperature_head, -0.2), (self.policy.top_p_head, 2.2)):
            torch.nn.init.normal_(head.out.weight, std=0.01)
            torch.nn.init.constant_(head.out.bias, bias)

    def forward(self, hidden: torch.Tensor, _logits: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """T and P `[N]` each, from hidden states brought to unit size, as a final norm would leave them."""
        hidden = torch.nn.functional.normalize(hidden.float(), dim=-1) * math.sqrt(hidden.shape[-1])
        parameters = self.policy(DecodeState(hidden))
        return parameters.temperature, parameters.top_p


def realistic_scales(tokens: int, shape: str) -> torch.Tensor:
    """Standard deviation of each position's logits `[tokens]`.

    Random weights give normal logits of one small deviation: a flat distribution, the worst case. Spreading the
    deviation over 3 to 10 gives what trained models show: mostly a clear favourite, sometimes thousands of candidates.
    """
    if shape == "flat":
        return torch.full((tokens,), 0.64)
    return torch.rand(tokens) * 7.0 + 3.0


def output_layer(vocab: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """A frozen output embedding `[vocab, hidden]`, filled in parts so that no float32 copy of it is ever made."""
    weight = torch.empty(vocab, hidden, dtype=dtype)
    for part in weight.split(8192):
        part.normal_(std=0.02)
    return weight


def with_scales(hidden: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Hidden states of unit deviation, scaled so that logits over an output layer of deviation 0.02 have `scales`."""
    return (hidden.float() * (scales / (0.02 * math.sqrt(hidden.shape[1]))).unsqueeze(1)).to(hidden.dtype)


def sample_targets(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """Targets drawn from the model itself, and the quartiles (10, 50, 90%) of what its distributions look like."""
    targets, largest, candidates, entropy = [], [], [], []
    for part in hidden.split(64):
        probs = torch.softmax((part @ weight.t()).float(), dim=-1)
        targets.append(torch.multinomial(probs, 1).squeeze(1))
        largest.append(probs.amax(1))
        candidates.append((probs > 1e-5).sum(1).float())
        entropy.append(-torch.xlogy(probs, probs).sum(1))
    points = torch.tensor([0.1, 0.5, 0.9])
    described = {
        name: [round(value, 3) for value in torch.cat(parts).cpu().quantile(points).tolist()]
        for name, parts in (("max_prob", largest), ("tokens_above_1e-5", candidates), ("entropy", entropy))
    }
    return torch.cat(targets), described


def chunked_step(hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, heads: Heads) -> None:
    """The library's loss, projection included, and its backward into the heads."""
    out = chunked_decoding_loss(hidden, targets, heads, lambda part: part @ weight.t(), EVERY_POSITION)
    out.loss.backward()


def plain_step(hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, heads: Heads) -> None:
    """Equations 1 to 3 as anyone would write them."""
    with torch.no_grad():
        logits = (hidden @ weight.t()).float()
    temperature, top_p = heads(hidden)
    probs = torch.softmax(logits / temperature.unsqueeze(1), dim=-1)
    ranked, order = probs.sort(dim=-1, descending=True)
    ranked_mask = torch.exp(-30.0 * torch.relu(ranked.cumsum(-1) - top_p.unsqueeze(1)))
    mask = torch.zeros_like(ranked_mask).scatter(-1, order, ranked_mask)
    final = probs * mask
    final = final / (final.sum(-1, keepdim=True) + 1e-8)
    loss = -torch.log(final.gather(1, targets.unsqueeze(1)) + 1e-8).mean()
    loss.backward()


STEPS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Heads], None]] = {
    "chunked": chunked_step,
    "plain": plain_step,
}


def inputs(args: argparse.Namespace, tokens: int, shape: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states `[tokens, hidden]` and the output layer `[vocab, hidden]`, the same for every process."""
    torch.manual_seed(args.seed)
    weight = output_layer(args.vocab, args.hidden, dtype).to(args.device)
    most = max(args.tokens, tokens)
    scales = realistic_scales(most, shape)[:tokens]
    return with_scales(torch.randn(most, args.hidden)[:tokens].to(dtype), scales).to(args.device), weight


def added_memory(args: argparse.Namespace) -> None:
    """Child process: one step of each size, and the bytes by which memory peaked above what was there before it."""
    found = []
    for tokens, vocab in args.sizes:
        of_size = argparse.Namespace(**{**vars(args), "vocab": vocab})
        hidden, weight = inputs(of_size, tokens, "peaked", torch.bfloat16)
        heads, targets = Heads(args.hidden).to(args.device), torch.zeros(tokens, dtype=torch.long, device=args.device)
        step = STEPS[args.measure]
        step(hidden[:2], targets[:2], weight, heads)  # libraries allocate on their first use
        with PeakMemory(args.device) as peak:
            step(hidden, targets, weight, heads)
        found.append(peak.bytes)
        del hidden, weight, heads, targets
    sys.stdout.write(json.dumps(found))


def measure_memory(args: argparse.Namespace, side: str, sizes: list[tuple[int, int]]) -> list[int]:
    """Runs `added_memory` for one side in a process of its own, for (tokens, vocabulary) each."""
    command = [sys.executable, __file__, "--measure", side, "--sizes", *(f"{t}:{v}" for t, v in sizes)]
    for name in ("hidden", "threads", "device", "seed", "tokens"):
        command += [f"--{name}", str(vars(args)[name])]
    measured: list[int] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return measured


def compare_losses(args: argparse.Namespace, shape: str) -> dict[str, Any]:
    """(a) for logits of one shape; the plain side's seconds are scaled up to as many tokens."""
    hidden, weight = inputs(args, args.tokens, shape, torch.bfloat16)
    targets, described = sample_targets(hidden, weight)
    heads, few, timer = Heads(args.hidden).to(args.device), args.plain_tokens, Timer(args.device)

    def project_only() -> None:
        for part in hidden.split(110):
            part @ weight.t()

    sides = {
        "plain": lambda: plain_step(hidden[:few], targets[:few], weight, heads),
        "chunked": lambda: chunked_step(hidden, targets, weight, heads),
        "projection": project_only,
    }
    seconds = interleaved(sides, args.rounds, timer)
    seconds["plain"] = [value * args.tokens / few for value in seconds["plain"]]
    return {"part": "a", "logits": shape, "described": described} | summary(seconds, "plain", "chunked")


def summary(seconds: dict[str, list[float]], over: str, under: str) -> dict[str, Any]:
    """Seconds of the sides, and their ratio round by round."""
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratios": {f"{over} / {under}": ratio(seconds, over, under)},
    }


def compare_memory(args: argparse.Namespace) -> dict[str, Any]:
    """(b): the plain side's bytes are scaled up to as many tokens."""
    tokens = {"plain": args.plain_tokens, "chunked": args.tokens}
    found = {side: measure_memory(args, side, [(tokens[side], args.vocab)])[0] for side in STEPS}
    times = found["plain"] / args.plain_tokens * args.tokens / max(found["chunked"], 1)
    return {
        "part": "b",
        "logits": "peaked",
        "bytes": found,
        "tokens": tokens,
        "ratios": {"added memory, plain / chunked": spread([times])},
    }


def compare_training_step(args: argparse.Namespace, shape: str, body: Any) -> dict[str, Any]:
    """(c): the training step over the frozen forward pass."""
    weight = body.embed_tokens.weight.detach()
    torch.manual_seed(args.seed)
    tokens = torch.randint(0, args.vocab, (4, args.step_tokens // 4)).to(args.device)
    scales = realistic_scales(tokens.numel(), shape).to(args.device)
    heads = Heads(args.hidden).to(args.device)
    uniform = torch.rand(tokens.numel()).to(args.device)

    @torch.no_grad()
    def hidden_states() -> torch.Tensor:
        return with_scales(body(tokens, use_cache=False).last_hidden_state.flatten(0, 1), scales)

    targets, described = sample_targets(hidden_states(), weight)

    @torch.no_grad()
    def forward_only() -> None:
        hidden_states() @ weight.t()

    def training_step() -> None:
        out = chunked_decoding_loss(
            hidden_states(), targets, heads, lambda part: part @ weight.t(), mask_uniform=uniform
        )
        out.loss.backward()

    seconds = interleaved({"step": training_step, "frozen forward": forward_only}, args.rounds, Timer(args.device))
    body_dtype = str(weight.dtype).removeprefix("torch.")
    found = {"part": "c", "logits": shape, "dtype": body_dtype, "described": described}
    return found | summary(seconds, "step", "frozen forward")


def growth(args: argparse.Namespace) -> dict[str, Any]:
    """(d): seconds and added bytes of the library's loss on peaked logits."""
    found: dict[str, Any] = {"part": "d", "logits": "peaked"}
    sizes = [("tokens", n, args.vocab) for n in args.growth_tokens]
    sizes += [("vocabulary", args.growth_rows, v) for v in args.growth_vocab]
    memories = measure_memory(args, "chunked", [(tokens, vocab) for _, tokens, vocab in sizes])
    for (over, tokens, vocab), memory in zip(sizes, memories, strict=True):
        of_size = argparse.Namespace(**{**vars(args), "vocab": vocab})
        hidden, weight = inputs(of_size, tokens, "peaked", torch.bfloat16)
        targets, _ = sample_targets(hidden, weight)
        heads = Heads(args.hidden).to(args.device)
        run = {"chunked": lambda h=hidden, t=targets, w=weight, heads=heads: chunked_step(h, t, w, heads)}
        seconds = interleaved(run, max(3, args.rounds // 2), Timer(args.device))["chunked"]
        point = {"tokens": tokens, "vocabulary": vocab, "seconds": spread(seconds), "bytes": memory}
        found.setdefault(over, []).append(point)
        print(f"(d) {tokens} tokens, {vocab} words: {shown(point['seconds'])} s, {memory / 2**20:.0f} MiB", flush=True)
    found["ratios"] = {}
    for over in ("tokens", "vocabulary"):
        points = found[over]
        amounts = [point[over] for point in points]
        found["ratios"][f"seconds over {over}"] = spread([log_slope(amounts, [p["seconds"]["median"] for p in points])])
        filled = [point for point in points if point["tokens"] >= FILLED]
        points = filled if len(filled) > 1 else points
        amounts = [point[over] for point in points]
        found["ratios"][f"bytes over {over}"] = spread([log_slope(amounts, [max(p["bytes"], 1) for p in points])])
    return found


def qwen3_body(args: argparse.Namespace, dtype: torch.dtype) -> Any:
    """A model body of Qwen3 0.6B's shape with random weights."""
    from transformers import Qwen3Config, Qwen3Model  # slow, and the processes that measure memory need none

    config = Qwen3Config(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    with default_dtype(dtype), torch.device(args.device):
        return Qwen3Model(config).eval().requires_grad_(False)


def show(cell: dict[str, Any]) -> None:
    """Prints a cell's ratios."""
    for name, value in cell["ratios"].items():
        print(f"({cell['part']}) {cell['logits']:7} {name:32} {shown(value, 2)}", flush=True)


def size(text: str) -> tuple[int, int]:
    """TOKENS:VOCABULARY."""
    tokens, vocab = text.split(":")
    return int(tokens), int(vocab)


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, rounds=7)
    for name, default in (
        ("tokens", 2048), ("plain-tokens", 256), ("vocab", 151_936), ("hidden", 1024), ("layers", 28),
        ("growth-rows", 512), ("step-tokens", 2048),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--parts", nargs="+", choices="abcd", default=list("abcd"))
    parser.add_argument("--growth-tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--growth-vocab", type=int, nargs="+", default=[16_384, 32_768, 65_536, 131_072, 262_144])
    parser.add_argument("--measure", choices=sorted(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=size, nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.plain_tokens, args.step_tokens = min(args.plain_tokens, args.tokens), min(args.step_tokens, args.tokens)
    if args.measure:
        torch.set_num_threads(args.threads)
        added_memory(args)
        return
    result = begin(args) | {"targets": TARGETS, "cells": [], "skipped": []}
    body = None
    for part in args.parts:
        if part == "c":
            body = qwen3_body(args, faster_dtype(args.hidden, 256, args.device))
        shapes = ("peaked", "flat") if part in "ac" else ("peaked",)
        for shape in shapes:
            measured = {
                "a": lambda shape=shape: compare_losses(args, shape),
                "b": lambda: compare_memory(args),
                "c": lambda shape=shape, body=body: compare_training_step(args, shape, body),
                "d": lambda: growth(args),
            }
            result["cells"].append(measured[part]())
            show(result["cells"][-1])
    write(args.json, result)


if __name__ == "__main__":
    main()
