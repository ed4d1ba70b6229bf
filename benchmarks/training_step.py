"""
Time and memory of one supervised training step, as ratios to a plain implementation and to the frozen forward pass.

    python benchmarks/training_step.py [--json FILE] [--tokens 2048] [--vocab 151936] [--hidden 1024] [--pairs 5]

(a) chunked loss (projection, loss, backward into the heads) against the equations as written: full logits, full sort,
    autograd. Both start from the same hidden states and use the same frozen output layer and the same heads.
(b) memory that each adds: peak resident set less the resident set just before, each in a process of its own.
(c) a training step with a frozen body of Qwen3 0.6B's shape against that model's forward pass alone.

The two sides of a ratio alternate, pair by pair, so that a slow minute hits both. Ratios are medians of the pairs' own
ratios with their minimum and maximum. Weights are random; see `realistic_scales` for what that means for the logits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3Model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_adaptive_decode import AutoDecoConfig, DecodeState
from hf_adaptive_decode.losses import DecodingLossConfig, chunked_decoding_loss
from hf_adaptive_decode.policies import HeadsPolicy

# What (a) and (b) compare is the loss of every position, so that both sides do the same work.
EVERY_POSITION = DecodingLossConfig(dft_weight="off", easy_token_mask_ratio=0.0)


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
        name: [round(value, 3) for value in torch.cat(parts).quantile(points).tolist()]
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
    torch.manual_seed(0)
    weight = output_layer(args.vocab, args.hidden, dtype)
    scales = realistic_scales(args.tokens, shape)[:tokens]
    return with_scales(torch.randn(args.tokens, args.hidden)[:tokens].to(dtype), scales), weight


def added_memory(args: argparse.Namespace) -> None:
    """Child process: runs one step and writes the bytes by which the resident set peaked above its start."""
    tokens = args.plain_tokens if args.measure == "plain" else args.tokens
    hidden, weight = inputs(args, tokens, "peaked", torch.bfloat16)
    heads, targets = Heads(args.hidden), torch.zeros(tokens, dtype=torch.long)
    STEPS[args.measure](hidden[:2], targets[:2], weight, heads)  # libraries allocate on their first use
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    STEPS[args.measure](hidden, targets, weight, heads)
    sys.stdout.write(json.dumps({"bytes": resident("VmHWM") - before, "tokens": tokens}))


def resident(field: str) -> int:
    """A field of this process's memory accounting, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory can only be measured on Linux.")


def measure_memory(args: argparse.Namespace, side: str) -> dict[str, int]:
    """Runs `added_memory` for one side in a process of its own."""
    command = [sys.executable, __file__, "--measure", side]
    for name in ("tokens", "plain_tokens", "vocab", "hidden", "threads"):
        command += [f"--{name.replace('_', '-')}", str(vars(args)[name])]
    measured: dict[str, int] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return measured


def pairs(first: Callable[[], None], second: Callable[[], None], count: int) -> list[tuple[float, float]]:
    """Seconds of both, alternating, after one untimed run of each."""
    timed = []
    for round_number in range(count + 1):
        seconds = []
        for step in (first, second):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        if round_number:
            timed.append((seconds[0], seconds[1]))
    return timed


def summary(timed: list[tuple[float, float]], scale_first: float = 1.0) -> dict[str, Any]:
    """Medians, and the range of the pairs' ratios; the first side's seconds are multiplied by `scale_first`."""
    ratios = [scale_first * first / second for first, second in timed]
    return {
        "first_s": scale_first * statistics.median(first for first, _ in timed),
        "second_s": statistics.median(second for _, second in timed),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "pairs": timed,
    }


def compare_losses(args: argparse.Namespace, shape: str) -> dict[str, Any]:
    """(a) for logits of one shape."""
    hidden, weight = inputs(args, args.tokens, shape, torch.bfloat16)
    targets, described = sample_targets(hidden, weight)
    heads = Heads(args.hidden)
    few = args.plain_tokens

    def project_only() -> None:
        for part in hidden.split(110):
            part @ weight.t()

    timed = pairs(
        lambda: plain_step(hidden[:few], targets[:few], weight, heads),
        lambda: chunked_step(hidden, targets, weight, heads),
        args.pairs,
    )
    start = time.perf_counter()
    project_only()
    return {"logits": described, "projection_s": time.perf_counter() - start, **summary(timed, args.tokens / few)}


def compare_training_step(args: argparse.Namespace, shape: str, body: Qwen3Model) -> dict[str, Any]:
    """(c): second / first is the training step over the frozen forward pass."""
    weight = body.embed_tokens.weight.detach()
    tokens = torch.randint(0, args.vocab, (4, args.tokens // 4))
    scales = realistic_scales(tokens.numel(), shape)
    heads = Heads(args.hidden)
    uniform = torch.rand(tokens.numel())

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

    timed = pairs(training_step, forward_only, args.pairs)
    return {"logits": described, **summary(timed)}


def qwen3_body(args: argparse.Namespace, dtype: torch.dtype) -> Qwen3Model:
    """A model body of Qwen3 0.6B's shape with random weights."""
    config = Qwen3Config(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=3 * args.hidden, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    body = Qwen3Model(config).eval().requires_grad_(False)
    torch.set_default_dtype(default)
    return body


def faster_dtype(args: argparse.Namespace) -> torch.dtype:
    """bfloat16 or float32, whichever multiplies the model's own matrices faster on this processor."""
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        left, right = torch.randn(256, args.hidden).to(dtype), torch.randn(3 * args.hidden, args.hidden).to(dtype)
        runs = []
        for _ in range(20):
            start = time.perf_counter()
            left @ right.t()
            runs.append(time.perf_counter() - start)
        seconds[dtype] = statistics.median(runs)
    return min(seconds, key=lambda dtype: seconds[dtype])


def report(results: dict[str, Any]) -> str:
    """The results as a plain table, ratios last."""
    lines = [
        f"{results['tokens']} tokens, vocabulary {results['vocab']}, {results['threads']} threads; "
        f"load average at the start {results['load_average_at_start']:.1f}"
    ]
    lines.append(
        f"The plain side ran on {results['plain_tokens']} tokens (its memory forbids more) and is scaled linearly."
    )
    for shape, part in results["logits"].items():
        lines.append(f"{shape} logits, 10/50/90%: {part}")
    lines.append(f"{'':34}{'one (s)':>10}{'other (s)':>10}{'ratio':>8}   min-max")
    for name, part in results["times"].items():
        lines.append(
            f"{name:34}{part['first_s']:>10.2f}{part['second_s']:>10.2f}{part['ratio']:>8.2f}"
            f"   {part['ratio_min']:.2f}-{part['ratio_max']:.2f}"
        )
    for name, part in results["memory"].items():
        lines.append(f"added memory, {name:<21}{part['bytes'] / 2**20:>9.0f} MiB for {part['tokens']} tokens")
    for name, value in results["ratios"].items():
        lines.append(f"{name} = {value:.2f}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    for name, default in (
        ("tokens", 2048), ("plain-tokens", 256), ("vocab", 151_936), ("hidden", 1024), ("pairs", 5), ("threads", 2)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    parser.add_argument("--parts", default="abc", help="which of (a), (b) and (c) to measure; default: %(default)s")
    parser.add_argument("--measure", choices=sorted(STEPS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.plain_tokens = min(args.plain_tokens, args.tokens)
    torch.set_num_threads(args.threads)
    if args.measure:
        added_memory(args)
        return

    results: dict[str, Any] = {name: vars(args)[name] for name in ("tokens", "plain_tokens", "vocab", "threads")}
    results["load_average_at_start"] = os.getloadavg()[0]
    times, results["logits"] = {}, {}
    for shape in ("peaked", "flat") if "a" in args.parts else ():
        times[f"(a) plain / chunked, {shape}"] = compare_losses(args, shape)
        results["logits"][shape] = times[f"(a) plain / chunked, {shape}"]["logits"]
    memory = {side: measure_memory(args, side) for side in STEPS} if "b" in args.parts else {}
    if "c" in args.parts:
        dtype = faster_dtype(args)
        results["body_dtype"] = str(dtype)
        body = qwen3_body(args, dtype)
        for shape in ("peaked", "flat"):
            times[f"(c) step / frozen forward, {shape}"] = compare_training_step(args, shape, body)
            results["logits"][f"{shape}, model"] = times[f"(c) step / frozen forward, {shape}"]["logits"]
    results |= {"times": times, "memory": memory}
    results["ratios"] = {name: part["ratio"] for name, part in times.items()}
    if memory:
        plain_bytes = memory["plain"]["bytes"] / memory["plain"]["tokens"] * args.tokens
        results["ratios"]["(b) added memory, plain / chunked"] = plain_bytes / memory["chunked"]["bytes"]
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    sys.stdout.write(report(results))


if __name__ == "__main__":
    main()
