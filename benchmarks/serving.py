"""
Tokens a second of stock vLLM with an adapter, as ratios to stock vLLM with top-p; needs vLLM beside the package.

    python benchmarks/serving.py [--json FILE] [--shape 0.6B] [--layers 4] [--batch 8] [--new-tokens 24]

Random models of Qwen3's shapes with peaked logits and a vocabulary of 151,936, two engines in one process: the base
without an adapter, and the same weights served from an adapter's folder. In each round every contender answers the
same prompts, and ratios are taken within the round. The fewer layers, the more of a step is sampling. Prefix caching is
off, so that every answer costs the same. "opted out" is the adapter's engine with top-p for every request.

    make test-vllm   # makes .venv-vllm
    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/serving.py --json benchmarks/results/serving.json
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

import torch
from measure import add_arguments, begin, interleaved, ratio, shown, spread, target, write
from models import SHAPES, build_base, configuration
from transformers import Qwen3ForCausalLM

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM, __version__
from hf_adaptive_decode.actions import ACTION_PRESETS

STOCK, SERVED = "stock, top-p", "adapter"
POLICIES: dict[str, dict[str, Any]] = {
    "heads": {},
    "token actions": {"policy": "token_actions", "actions": ACTION_PRESETS["token_math"]},
}


class ProcessorSeconds:
    """Seconds of this process's threads, which leave out what other processes take."""

    def __call__(self, run: Callable[[], Any], times: int = 1) -> float:
        """The mean of `times` calls."""
        start = time.process_time()
        for _ in range(times):
            run()
        return (time.process_time() - start) / times


def save_models(folder: Path, args: argparse.Namespace) -> None:
    """The base, and an adapter of each kind on it, as before training: heads give T = 1 and P = 0.98, actions any."""
    SHAPES[args.shape] |= {"num_hidden_layers": args.layers} if args.layers else {}
    base: Qwen3ForCausalLM = build_base(args.shape, args.vocab, torch.float32)
    base.config.max_position_embeddings = 1024
    base.save_pretrained(folder / "base")
    for name, settings in POLICIES.items():
        AutoDecoForCausalLM.from_base(str(folder / "base"), AutoDecoConfig(**settings)).save_pretrained(folder / name)


def engine(model: Path, args: argparse.Namespace) -> Any:
    """A vLLM engine in this process."""
    from vllm import LLM

    return LLM(
        model=str(model),
        dtype=args.dtype,
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=max(args.batch),
        distributed_executor_backend="uni",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=256 << 20,
        seed=args.seed,
    )


def contenders(engines: dict[str, Any], batch: int, args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Ways of answering the same prompts."""
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(args.seed)
    rows = torch.randint(1, args.vocab, (batch, args.prompt), generator=generator).tolist()
    prompts = [{"prompt_token_ids": row} for row in rows]

    def answering(name: str, **params: Any) -> Callable[[], Any]:
        sampling = SamplingParams(max_tokens=args.new_tokens, ignore_eos=True, detokenize=False, **params)
        return lambda: engines[name].generate(prompts, sampling, use_tqdm=False)

    static = {"temperature": 0.9, "top_p": 0.95}
    return {
        STOCK: answering("base", **static),
        "stock, plain": answering("base"),
        "opted out, top-p": answering("heads", **static, extra_args={"adaptive_decoding": False}),
        **{f"{SERVED}, {name}": answering(name) for name in POLICIES},
    }


def measure(engines: dict[str, Any], batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """One cell."""
    runs = contenders(engines, batch, args)
    seconds = interleaved(runs, args.rounds, ProcessorSeconds())
    # Tokens a second against tokens a second: the other's seconds stand above.
    ratios = {f"{name} / {STOCK}": ratio(seconds, STOCK, name) for name in runs if name != STOCK}
    tokens = batch * args.new_tokens
    print(f"\nbatch {batch}, {args.prompt} tokens read, {args.new_tokens} written, vocabulary {args.vocab}")
    for name in runs:
        rate = spread([tokens / value for value in seconds[name]])
        against = "" if name == STOCK else f"   {shown(ratios[f'{name} / {STOCK}'])} of stock's with top-p"
        print(f"  {name:<24}{rate['median']:8.1f} tokens a second{against}")
    return {
        "batch": batch,
        "layers": args.layers or configuration(args.shape, args.vocab).num_hidden_layers,
        "tokens_a_second": {name: spread([tokens / value for value in seconds[name]]) for name in runs},
        "ratios": ratios,
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, rounds=9, threads=1)
    parser.add_argument("--shape", choices=list(SHAPES), default="0.6B")
    parser.add_argument("--layers", type=int, default=4, help="fewer of them; 0: all of the shape's")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    result = begin(args)
    result["about"] |= {"vllm": metadata.version("vllm"), "hf_adaptive_decode": __version__}
    result["targets"] = [target(f"{SERVED}, {name} / {STOCK}", at_least=0.98) for name in POLICIES]
    with tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder), args)
        engines = {name: engine(Path(folder, name), args) for name in ("base", *POLICIES)}
        result["cells"] = [measure(engines, batch, args) for batch in args.batch]
    write(args.json, result)


if __name__ == "__main__":
    main()
