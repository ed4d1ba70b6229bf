"""
Latency of adaptive decoding, as ratios to the same model's plain sampling and to static temperature with top-p.

    python benchmarks/decoding.py [--json FILE] [--batch 1 8] [--new-tokens 16] [--pairs 7] [--threads 2]

A Qwen3 of the 0.6B's shape with random weights, whose output layer is scaled so that the distributions are as peaked as
a trained model's (the table says how peaked). In each round the decoders take turns, and a ratio is taken within the
round, so that a slow minute hits them all. Prefill is timed apart and subtracted: figures are per new token.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, logging

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM, __version__

SHAPES = {
    "0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
}
# Standard deviation of the logits; about half of the mass then lies on the most likely token.
LOGIT_SPREAD = 7.0
STATIC = {"temperature": 0.8, "top_p": 0.95}


def build(shape: str, vocab: int, dtype: torch.dtype) -> AutoDecoForCausalLM:
    """A random model with peaked logits and heads that choose T and P around the static setting."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab, num_key_value_heads=4, head_dim=128, tie_word_embeddings=True, **SHAPES[shape]
    )
    base = Qwen3ForCausalLM(config).to(dtype).eval()
    base.generation_config.eos_token_id = None
    base.generation_config.pad_token_id = 0
    with torch.no_grad():
        # The final norm gives unit components, so a logit's spread is the norm of its row.
        base.lm_head.weight.mul_(LOGIT_SPREAD / base.lm_head.weight.float().norm(dim=1).mean())
    model = AutoDecoForCausalLM.from_base(base, AutoDecoConfig(policy="heads"))
    with torch.no_grad():
        for head, bias in ((model.decoding_adapter.temperature_head, -0.4), (model.decoding_adapter.top_p_head, 3.0)):
            head.out.weight.normal_(std=0.1)
            head.out.bias.fill_(bias)
    return model


def decoders(model: AutoDecoForCausalLM) -> dict[str, Any]:
    """Name to a function of (prompt, new tokens)."""
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def base(settings: dict[str, float]) -> Any:
        def run(prompt: torch.Tensor, tokens: int) -> Any:
            with model.disable_adapter():
                return model.generate(prompt, do_sample=True, max_new_tokens=tokens, **{**off, **settings})

        return run

    return {
        "plain sampling": base({}),
        "static T + top-p": base(STATIC),
        "adaptive heads": lambda prompt, tokens: model.generate(prompt, max_new_tokens=tokens),
    }


def seconds_per_token(run: Any, prompt: torch.Tensor, tokens: int) -> float:
    """Time of `tokens` steps after the first, over their number."""
    times = []
    for count in (1, tokens + 1):
        start = time.perf_counter()
        run(prompt, count)
        times.append(time.perf_counter() - start)
    return (times[1] - times[0]) / tokens


def measure(model: AutoDecoForCausalLM, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Rounds in which every decoder runs once; ratios within a round."""
    prompt = torch.randint(1, model.config.vocab_size, (batch, args.prompt_tokens))
    runs = decoders(model)
    for run in runs.values():
        run(prompt, 2)
    rounds = []
    for number in range(args.pairs):
        names = list(runs)[number % 3 :] + list(runs)[: number % 3]
        rounds.append({name: seconds_per_token(runs[name], prompt, args.new_tokens) for name in names})
    result: dict[str, Any] = {"batch": batch}
    for name in runs:
        result[f"{name}, ms a token"] = round(1e3 * statistics.median(r[name] for r in rounds), 2)
    for name in ("plain sampling", "static T + top-p"):
        ratios = [r["adaptive heads"] / r[name] for r in rounds]
        spread = [round(value, 3) for value in (statistics.median(ratios), min(ratios), max(ratios))]
        result[f"adaptive / {name}"] = {"median": spread[0], "min": spread[1], "max": spread[2]}
    return result


def peakedness(model: AutoDecoForCausalLM) -> list[float]:
    """The 10, 50 and 90 % points of the largest probability over 64 positions."""
    with torch.no_grad():
        logits = model(torch.randint(1, model.config.vocab_size, (1, 64))).logits[0].float()
    top = logits.softmax(-1).amax(-1)
    return [round(float(v), 3) for v in top.quantile(torch.tensor([0.1, 0.5, 0.9]))]


def main() -> None:
    """Prints a table and its ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="0.6B")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    model = build(args.shape, args.vocab, getattr(torch, args.dtype))
    top = peakedness(model)
    print(f"{args.shape}-shaped Qwen3, vocabulary {args.vocab}, {args.dtype}, {args.threads} threads")
    print(f"largest probability, 10/50/90 % points: {top}; static baseline: {STATIC}")
    results = []
    for batch in args.batch:
        results.append(measure(model, batch, args))
        for name, value in results[-1].items():
            print(f"  {name}: {value}", flush=True)
    if args.json:
        about = {"torch": torch.__version__, "hf_adaptive_decode": __version__, "machine": platform.platform()}
        settings = {name: str(value) for name, value in vars(args).items()}
        args.json.write_text(json.dumps({"about": about, "settings": settings, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
