"""
Cost of the rollout engine, as ratios to transformers' plain `generate` sampling on the same prompts.

    python benchmarks/rollout.py [--json FILE] [--parts a b c d] [--batch 16 64] [--pairs 5] [--threads 2]

(a) at fixed length (nothing ends a row, so that all make the same number of tokens), on a random Qwen3 of the 0.6B's
    shape with peaked logits and on the testbed's base model: `decode` with plain T = 1, and with a per-token action
    policy that records its decisions for training.
(b) on the testbed with real ends: there `decode` drops ended rows, which `generate` carries along as padding. Plain
    sampling draws from the same distribution in all three; the policy's texts are of other lengths.
(c) on the testbed: what a training step costs beyond its rollout (loss, gradients, optimiser and the Trainer's own
    work), as a part of the rollout.
(d) where rows differ 8 times in length: per-row token budgets, a few of them 8 times the others', and more rows than
    are decoded at once. `decode` with new rows in the places of those that end ("refilled"), against batch after batch,
    whose ended rows are dropped ("dropped") or carried along ("kept"). All three make the same tokens.

In each round the decoders take turns, and a ratio is taken within the round, so that a slow minute hits them all.
"whole" is all of a call, where `decode` reads each prompt once and `generate` once a sample; "step" is a call less one
of a single token, over the steps between.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from measure import target
from models import LOGIT_SPREAD, SHAPES
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback, logging

from hf_adaptive_decode import (
    AutoDecoConfig,
    REINFORCEDecodingTrainer,
    REINFORCEDecodingTrainingArguments,
    __version__,
)
from hf_adaptive_decode.actions import ACTION_PRESETS
from hf_adaptive_decode.engines.rollout import Rows, decode
from hf_adaptive_decode.policies import DecodingPolicy, build_policy
from hf_adaptive_decode.randomness import row_key
from hf_adaptive_decode.testbed import build_problems, load_base_model, load_tokenizer, testbed_reward

PLAIN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
Run = Callable[[int], int]


def build_shaped(args: argparse.Namespace, layers: int | None = None) -> Any:
    """A random model whose distributions are as peaked as a trained model's."""
    torch.manual_seed(0)
    layers = layers or args.layers
    shape = {**SHAPES[args.shape], **({"num_hidden_layers": layers} if layers else {})}
    config = Qwen3Config(vocab_size=args.vocab, num_key_value_heads=4, head_dim=128, tie_word_embeddings=True, **shape)
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(LOGIT_SPREAD / model.lm_head.weight.norm(dim=1).mean())
    return model


def action_policy(model: Any, preset: str) -> DecodingPolicy:
    """A fresh per-token policy, which takes its actions uniformly."""
    hidden = model.get_output_embeddings().weight.shape[1]
    config = AutoDecoConfig(policy="token_actions", actions=ACTION_PRESETS[preset], hidden_size=hidden)
    return build_policy(config).eval()


class Workload:
    """Prompts and samples for one model, and ways of decoding them: functions of new tokens that give tokens made."""

    def __init__(self, model: Any, prompts: list[list[int]], samples: int, ends: set[int], actions: str) -> None:
        self.model, self.samples, self.ends = model, samples, ends
        self.prompts = prompts
        self.calls = 0
        width = max(map(len, prompts))
        self.ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        plain = build_policy(AutoDecoConfig(policy="static", actions=[{"temperature": 1.0}])).eval()
        policy = action_policy(model, actions)
        self.runs: dict[str, Run] = {
            "generate": self.generate,
            "decode, T=1": lambda tokens: self.decode(plain, tokens),
            "decode, actions": lambda tokens: self.decode(policy, tokens, records="decisions"),
        }
        if ends:
            self.runs["decode, T=1, rows kept"] = lambda tokens: self.decode(plain, tokens, drops_ended=False)

    def generate(self, tokens: int) -> int:
        """Transformers' own sampling."""
        how = {"num_return_sequences": self.samples, "eos_token_id": sorted(self.ends) or None, "pad_token_id": 0}
        found = self.model.generate(self.ids, attention_mask=self.mask, max_new_tokens=tokens, **PLAIN, **how)
        new = found[:, self.ids.shape[1] :]
        ended = torch.isin(new, torch.tensor(sorted(self.ends), dtype=torch.long))
        return int((ended.cumsum(1) - ended.long() == 0).sum())

    def decode(self, policy: DecodingPolicy, tokens: int, **how: Any) -> int:
        """The rollout engine."""
        prompt = torch.arange(len(self.prompts)).repeat_interleave(self.samples)
        self.calls += 1
        keys = torch.tensor([row_key(self.calls, row) for row in range(len(prompt))])
        rows = Rows(
            self.prompts, prompt, torch.full(prompt.shape, tokens), torch.full(prompt.shape, self.samples), keys
        )
        return int(decode(self.model, policy, rows, ends=self.ends, pad=0, **how).lengths.sum())


# With one thread, a processor's seconds leave out what others take.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(run: Run, tokens: int, clock: Callable[[], float]) -> tuple[float, int]:
    """Seconds and completion tokens of one call."""
    start = clock()
    made = run(tokens)
    return clock() - start, made


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def measure(workload: Workload, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Rounds in which every decoder runs once; ratios within a round."""
    runs, clock = workload.runs, CLOCKS[args.clock]
    for run in runs.values():
        run(2)
    rounds: list[dict[str, tuple[float, float, int]]] = []
    for number in range(args.pairs):
        turn = number % len(runs)
        taken = {}
        for name in [*list(runs)[turn:], *list(runs)[:turn]]:
            first, _ = timed(runs[name], 1, clock)
            whole, made = timed(runs[name], tokens, clock)
            taken[name] = (whole, (whole - first) / max(tokens - 1, 1), made)
        rounds.append(taken)
    result: dict[str, Any] = {"rows": len(workload.prompts) * workload.samples, "new_tokens": tokens}
    for name in runs:
        result[f"{name}, s a call"] = round(statistics.median(r[name][0] for r in rounds), 4)
        result[f"{name}, tokens made"] = round(statistics.mean(r[name][2] for r in rounds))
    for name in [name for name in runs if name != "generate"]:
        result[f"{name} / generate, whole"] = spread([r[name][0] / r["generate"][0] for r in rounds])
        if not workload.ends:  # with real ends a "step" is of as many rows as are left
            result[f"{name} / generate, step"] = spread([r[name][1] / r["generate"][1] for r in rounds])
    return result


def fixed_length(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Part (a)."""
    results = []
    models: dict[str, Any] = {f"{args.shape} shape": build_shaped(args), "testbed": load_base_model()}
    for name, model in models.items():
        model.generation_config.eos_token_id = None
        tokens = args.testbed_tokens if name == "testbed" else args.new_tokens
        for batch in args.testbed_batch if name == "testbed" else args.batch:
            # Row by row a token more or less, so that there is padding.
            prompts = max(1, batch // args.samples)
            lengths = [max(1, args.prompt_tokens - index) for index in range(prompts)]
            texts = [torch.randint(2, model.config.vocab_size, (length,)).tolist() for length in lengths]
            work = Workload(model, texts, min(args.samples, batch), set(), args.actions)
            results.append({"part": "a", "model": name, **measure(work, tokens, args)})
            show(results[-1])
    return results


def real_ends(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Part (b)."""
    model, tokenizer = load_base_model(), load_tokenizer()
    results = []
    for batch in args.testbed_batch:
        problems = build_problems("validation", max(1, batch // args.samples))
        prompts = [tokenizer(row["prompt"])["input_ids"] for row in problems]
        work = Workload(model, prompts, min(args.samples, batch), {tokenizer.eos_token_id}, args.actions)
        results.append({"part": "b", "model": "testbed", **measure(work, args.testbed_budget, args)})
        show(results[-1])
    return results


class StepTimer(TrainerCallback):
    """Seconds of each training step, and of its rollout as the trainer logs it."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.rollouts: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops it."""
        self.steps.append(time.perf_counter() - self.started)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Reads the rollout's share."""
        self.rollouts += [logs["seconds/rollout"]] if "seconds/rollout" in logs else []


def training_steps(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Part (c)."""
    timer = StepTimer()
    config = AutoDecoConfig(policy="token_actions", actions=ACTION_PRESETS[args.actions])
    with tempfile.TemporaryDirectory() as folder:
        settings = REINFORCEDecodingTrainingArguments(
            output_dir=folder,
            max_steps=args.updates + 1,
            per_device_train_batch_size=args.prompts,
            num_generations=args.samples,
            budget=args.testbed_tokens,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        data = {"train_dataset": build_problems("train", 400), "processing_class": load_tokenizer()}
        how = {"decoding_config": config, "callbacks": [timer]}
        REINFORCEDecodingTrainer(load_base_model(), testbed_reward, settings, **data, **how).train()
    # The first step also makes the optimiser.
    pairs = list(zip(timer.steps, timer.rollouts, strict=True))[1:]
    ratios = {"update / rollout": spread([(step - rollout) / rollout for step, rollout in pairs])}
    row = {"part": "c", "model": "testbed", "rows": args.prompts * args.samples, "new_tokens": args.testbed_tokens}
    show(row | ratios)
    return [row | ratios]


class MixedLengths:
    """Rows with token budgets of two sizes in a random order, and ways of decoding them, at most `batch` at once."""

    def __init__(self, model: Any, batch: int, short: int, args: argparse.Namespace) -> None:
        self.model = model
        count = args.batches * batch
        generator = torch.Generator().manual_seed(0)
        budget = torch.full((count,), short)
        budget[torch.randperm(count, generator=generator)[: int(count * args.long_share)]] = 8 * short
        lengths = [max(1, args.prompt_tokens - index % 8) for index in range(-(-count // args.samples))]
        prompts = [[2 + index % 7] * length for index, length in enumerate(lengths)]
        prompt = torch.arange(len(prompts)).repeat_interleave(args.samples)[:count]
        keys = torch.tensor([row_key(row) for row in range(count)])
        self.rows = Rows(prompts, prompt, budget, torch.full_like(budget, args.samples), keys)
        self.policy = build_policy(AutoDecoConfig(policy="static", actions=[{"temperature": 1.0}])).eval()
        parts = [self.rows.select(part) for part in torch.arange(count).split(batch)]
        self.runs: dict[str, Run] = {
            "refilled": lambda _: self.decode(self.rows, batch_rows=batch),
            # The next batch begins when the last row of the one before has ended.
            "dropped": lambda _: sum(self.decode(part) for part in parts),
            "kept": lambda _: sum(self.decode(part, drops_ended=False) for part in parts),
        }

    def decode(self, rows: Rows, **how: Any) -> int:
        """The rollout engine."""
        return int(decode(self.model, self.policy, rows, ends=set(), pad=0, **how).lengths.sum())


def mixed_lengths(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Part (d)."""
    results, clock = [], CLOCKS[args.clock]
    cut = f", {args.mixed_layers} layers" if args.mixed_layers else ""
    cells = [(f"{args.shape} shape{cut}", build_shaped, args.mixed_batch, args.short_tokens)]
    cells += [("testbed", lambda *_: load_base_model(), args.testbed_mixed_batch, args.testbed_short_tokens)]
    for name, build, batches, short in cells:
        model = build(args, args.mixed_layers) if batches else None
        for batch in batches:
            model.generation_config.eos_token_id = None
            work = MixedLengths(model, batch, short, args)
            rounds: list[dict[str, float]] = []
            for number in range(args.mixed_rounds + 1):
                turn = number % len(work.runs)
                taken = {}
                for way in [*list(work.runs)[turn:], *list(work.runs)[:turn]]:
                    taken[way], _ = timed(work.runs[way], 0, clock)
                rounds += [taken] if number else []  # the first one warms up
            row: dict[str, Any] = {"part": "d", "model": name, "rows": batch, "new_tokens": 8 * short}
            for way in work.runs:
                seconds = statistics.median(taken[way] for taken in rounds)
                row[f"{way}, tokens a second"] = round(int(work.rows.token_budget.sum()) / seconds, 1)
            for way in ("dropped", "kept"):
                ratios = [taken[way] / taken["refilled"] for taken in rounds]
                row[f"tokens a second, refilled / {way}"] = spread(ratios)
            results.append(row)
            show(row)
    return results


def show(result: dict[str, Any]) -> None:
    """Prints one measurement."""
    print(f"({result['part']}) {result['model']}, {result['rows']} rows, {result['new_tokens']} new tokens at most")
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"  {name:40} {value['median']:.3f} ({value['min']:.3f} to {value['max']:.3f})", flush=True)
        elif "," in name:
            print(f"  {name:40} {value}", flush=True)


TARGETS = [
    target("tokens a second, refilled / kept", at_least=1.8),
    target("update / rollout", at_most=0.05),
]
PARTS = {"a": fixed_length, "b": real_ends, "c": training_steps, "d": mixed_lengths}


def main() -> None:
    """Prints tables and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", choices=SHAPES, default="0.6B")
    parser.add_argument("--layers", type=int, help="fewer than the shape has: the loop then weighs more")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--samples", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--testbed-batch", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--testbed-tokens", type=int, default=48, help="at fixed length")
    parser.add_argument("--testbed-budget", type=int, default=80, help="with real ends")
    parser.add_argument("--prompts", type=int, default=96, help="prompts of a training step")
    parser.add_argument("--updates", type=int, default=10, help="training steps to time")
    parser.add_argument("--mixed-batch", type=int, nargs="+", default=[16], help="part (d): rows at once")
    parser.add_argument("--mixed-layers", type=int, help="part (d): fewer than the shape has, to save time")
    parser.add_argument("--testbed-mixed-batch", type=int, nargs="+", default=[64])
    parser.add_argument("--short-tokens", type=int, default=8, help="of most rows; the others make 8 times as many")
    parser.add_argument("--testbed-short-tokens", type=int, default=16)
    parser.add_argument("--long-share", type=float, default=0.2)
    parser.add_argument("--batches", type=int, default=6, help="as many rows wait as fill these")
    parser.add_argument("--mixed-rounds", type=int, default=7)
    parser.add_argument("--actions", choices=ACTION_PRESETS, default="token_math")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    results = [row for part in args.parts for row in PARTS[part](args)]
    if args.json:
        about = {"torch": torch.__version__, "hf_adaptive_decode": __version__, "machine": platform.platform()}
        settings = {name: str(value) for name, value in vars(args).items()}
        args.json.write_text(
            json.dumps({"about": about, "settings": settings, "targets": TARGETS, "results": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    sys.exit(main())
