"""AutoDeco, Table 3: FLOPs, latency and memory by prompt length, with and without heads."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from typing import Any

import torch
from lab import Experiment, Lab, Outcome, main
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM
from hf_adaptive_decode.evaluation.table import markdown_table

EXPERIMENT = Experiment(
    "autodeco_table3",
    "AutoDeco, Table 3",
    "Heads cost next to nothing: the same FLOPs, 4 MB, and one or two per cent of latency, whatever the "
    "prompt's length.",
    "R1-Distill-Qwen-7B, 1,000 tokens: latency +3.3 % at 1k to +1.1 % at 24k prompt tokens, memory +4 MB, FLOPs equal",
)
LENGTHS, NEW_TOKENS, ROUNDS = (256, 1024, 4096), 16, 5
# Standard deviation of the logits; about half of the mass then lies on the most likely token.
_LOGIT_SPREAD = 7.0
# A real vocabulary on a body that a CPU carries through 4,096 tokens.
SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32_768,
}


def model_of(base: str | None) -> Any:
    """A randomly initialised model of `SHAPE` with peaked logits, or the base that was asked for, wrapped."""
    torch.manual_seed(0)
    if base is None:
        inner = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
        with torch.no_grad():
            # Random weights give flat logits, as no trained model has: there a nucleus is half the vocabulary.
            inner.lm_head.weight.mul_(_LOGIT_SPREAD / inner.lm_head.weight.norm(dim=1).mean())
    else:
        inner = AutoModelForCausalLM.from_pretrained(base)
    return AutoDecoForCausalLM.from_base(inner.eval(), AutoDecoConfig(policy="heads")).eval()


def generate(model: Any, length: int, adaptive: bool) -> None:
    """One generation of `NEW_TOKENS` tokens."""
    ids = torch.arange(length).remainder(1000)[None] + 100
    how: dict[str, Any] = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    ids, mask = ids.to(model.device), torch.ones_like(ids).to(model.device)
    if adaptive:
        model.generate(ids, attention_mask=mask, **how)
        return
    with model.disable_adapter():
        model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, **how)


def measure(base: str | None, length: int) -> dict[str, Any]:
    """FLOPs, and seconds of interleaved rounds, by whether the adapter is active."""
    model = model_of(base)
    found: dict[str, Any] = {"prompt_tokens": length, "new_tokens": NEW_TOKENS, "rounds": ROUNDS}
    for name, adaptive in (("default", False), ("heads", True)):
        with FlopCounterMode(display=False) as counter:
            generate(model, length, adaptive)
        found[f"flops_{name}"] = counter.get_total_flops()
    times: dict[str, list[float]] = {"default": [], "heads": []}
    for number in range(ROUNDS):
        order = [("default", False), ("heads", True)]
        for name, adaptive in order if number % 2 else order[::-1]:
            started = time.perf_counter()
            generate(model, length, adaptive)
            times[name].append(time.perf_counter() - started)
    ratios = sorted(heads / default for heads, default in zip(times["heads"], times["default"], strict=True))
    for name, values in times.items():
        found[f"seconds_{name}"] = sorted(values)[ROUNDS // 2]
    found |= {"latency_ratio": ratios[ROUNDS // 2], "latency_ratio_low": ratios[0], "latency_ratio_high": ratios[-1]}
    found["adapter_mb"] = sum(p.numel() * p.element_size() for p in model.decoding_adapter.parameters()) / 2**20
    return found


def peak(base: str | None, length: int, adaptive: bool) -> float:
    """Peak resident memory in MB of a process that generates once."""
    code = f"import autodeco_table3 as t; t.generate(t.model_of({base!r}), {length}, {adaptive}); print(t.own_peak())"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=__file__.rpartition("/")[0]
    )
    return float(done.stdout.split()[-1])


def own_peak() -> float:
    """Of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(lab: Lab) -> Outcome:
    """All lengths; latency is the median of interleaved pairs."""
    lines = []
    for length in LENGTHS:
        line = measure(lab.base_name, length)
        line |= {f"peak_mb_{n}": peak(lab.base_name, length, a) for n, a in (("default", False), ("heads", True))}
        lines.append({"kind": "cost", "experiment": EXPERIMENT.name, **line})
    rows = [
        [
            f"{line['prompt_tokens']:,}",
            f"{line['flops_default']:.4e} / {line['flops_heads']:.4e}",
            f"{line['seconds_default']:.2f} / {line['seconds_heads']:.2f}",
            f"{line['latency_ratio']:.3f} ({line['latency_ratio_low']:.3f} to {line['latency_ratio_high']:.3f})",
            f"{line['peak_mb_default']:.0f} / {line['peak_mb_heads']:.0f}",
        ]
        for line in lines
    ]
    header = ["prompt tokens", "FLOPs, default / heads", "seconds", "ratio, median (range)", "peak memory [MB]"]
    flops = max(line["flops_heads"] / line["flops_default"] for line in lines)
    ratios = [line["latency_ratio"] for line in lines]
    why = (
        f"{NEW_TOKENS} new tokens on a CPU by a model of random weights with peaked logits, over Qwen3's words. FLOPs "
        f"at most {100 * (flops - 1):.2f} % more; the heads weigh {lines[0]['adapter_mb']:.1f} MB; latency "
        f"{100 * (min(ratios) - 1):+.1f} to {100 * (max(ratios) - 1):+.1f} %. Ratios vary by some per cent."
    )
    sign = "same" if max(ratios) < 1.05 and flops < 1.01 else "opposite"
    return Outcome(markdown_table(header, rows), sign, why, lines)


if __name__ == "__main__":
    main(EXPERIMENT, run)
