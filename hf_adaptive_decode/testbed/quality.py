"""Measures a base model on the testbed: teacher-forced accuracy by sort of token, pass@k by type of problem; it knows
static settings and the hand-written rule, and no learned policy.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .corpus import FORK_KINDS, generate_corpus
from .forks import ForkRule
from .problems import TYPES, VOCABULARY
from .tasks import build_problems, is_correct, split_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Setting = Mapping[str, float]

REPORT_SETTINGS: Final[dict[str, Setting]] = {
    "greedy": {"temperature": 0.0},
    "T=0.5": {"temperature": 0.5},
    "T=0.75": {"temperature": 0.75},
    "T=1": {"temperature": 1.0},
    "T=0.75, top-p 0.9": {"temperature": 0.75, "top_p": 0.9},
    "T=1, top-p 0.8": {"temperature": 1.0, "top_p": 0.8},
}
# The rule for one sample: commit to the favourite signs, but never to the bare answer or to a first guess.
FORK_TEMPERATURES: Final = {"opening": 2.0, "guess": 1.25, "sign": 0.0}


def mode_accuracy(model: PreTrainedModel, documents: int = 400, seed: int = 1) -> dict[str, float]:
    """
    How often the likeliest token is the right one, by sort of token, on the author's texts about validation prompts.

    Args:
        model (`PreTrainedModel`): The base model.
        documents (`int`): How many texts.
        seed (`int`): Seeds the author.
    """
    import torch

    index = {word: i for i, word in enumerate(VOCABULARY)}
    hits: dict[str, list[bool]] = defaultdict(list)
    texts = generate_corpus(seed, lambda prompt: split_of(prompt) == "validation")
    for problem, completion in itertools.islice(texts, documents):
        prompt = [index[word] for word in problem.prompt.split()]
        ids = torch.tensor([[*prompt, *(index[token.text] for token in completion)]], device=model.device)
        with torch.no_grad():
            modes = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].argmax(dim=-1).tolist()
        for token, mode in zip(completion, modes, strict=True):
            if token.kind not in FORK_KINDS:
                hits[token.kind].append(VOCABULARY[mode] == token.right)
    return {kind: sum(found) / len(found) for kind, found in sorted(hits.items())}


def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Mapping[str, Any]],
    setting: Setting,
    samples: int = 1,
    max_new_tokens: int = 48,
    batch_rows: int = 512,
    fork_temperatures: Mapping[str, float] | None = None,
) -> list[list[str]]:
    """
    `samples` completions of every row, in the order of the rows, decoded with their `<eos>`.

    Args:
        model (`PreTrainedModel`): The base model.
        tokenizer (`PreTrainedTokenizerFast`): Its tokenizer.
        rows (`Sequence[Mapping]`): Rows of `build_problems`.
        setting (`Mapping[str, float]`): Keyword arguments of `generate`; a temperature of 0 is greedy.
        samples (`int`): Completions of each row.
        max_new_tokens (`int`): The token budget.
        batch_rows (`int`): Completions drawn at once.
        fork_temperatures (`Mapping[str, float]`, *optional*): Use the hand-written rule instead of `setting`.
    """
    import torch

    greedy = fork_temperatures is None and setting["temperature"] == 0
    sampling: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, **setting}
    if fork_temperatures is not None:
        sampling |= {"temperature": 1.0, "top_p": 1.0}
    drawn = 1 if greedy else samples
    # Rows of one type end at about the same time, so sorting by type saves steps.
    order = sorted(range(len(rows)), key=lambda i: str(rows[i]["type"]))
    size = max(batch_rows // drawn, 1)
    completions: list[list[str]] = [[] for _ in rows]
    for chunk in (order[i : i + size] for i in range(0, len(order), size)):
        inputs = tokenizer([rows[i]["prompt"] for i in chunk], return_tensors="pt", padding=True).to(model.device)
        width = inputs["input_ids"].shape[1]
        if fork_temperatures is not None:
            sampling["logits_processor"] = [ForkRule([rows[i]["type"] for i in chunk], width, fork_temperatures)]
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, num_return_sequences=drawn, **sampling)
        texts = tokenizer.batch_decode(out[:, width:])
        for position, i in enumerate(chunk):
            completions[i] = texts[position * drawn : (position + 1) * drawn] * (samples // drawn)
    return completions


def pass_rates(
    rows: Sequence[Mapping[str, Any]], completions: Sequence[Sequence[str]], k: int = 1, budget: int | None = None
) -> dict[str, float]:
    """
    Mean unbiased pass@k, 1 - C(n - c, k) / C(n, k), by type and over all types alike (`"all"`).

    Args:
        rows (`Sequence[Mapping]`): The problems.
        completions (`Sequence[Sequence[str]]`): n completions of each, from `sample_completions`.
        k (`int`): How many of the n one may try.
        budget (`int`, *optional*): Count a completion only if it ended within this many tokens.
    """
    by_type: dict[str, list[float]] = {kind: [] for kind in TYPES}
    for row, texts in zip(rows, completions, strict=True):
        cut = texts if budget is None else [" ".join(text.split()[:budget]) for text in texts]
        n, c = len(cut), sum(is_correct(row["prompt"], text) for text in cut)
        by_type[row["type"]].append(1.0 - math.comb(n - c, k) / math.comb(n, k))
    rates = {kind: sum(values) / len(values) for kind, values in by_type.items() if values}
    return {**rates, "all": sum(rates.values()) / len(rates)}


def measure_quality(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: int = 300,
    samples: int = 4,
    max_new_tokens: int = 48,
    settings: Mapping[str, Setting] | None = None,
) -> dict[str, Any]:
    """
    The quality report of a base model on validation problems.

    Args:
        model (`PreTrainedModel`): The base model.
        tokenizer (`PreTrainedTokenizerFast`): Its tokenizer.
        problems (`int`): How many validation problems.
        samples (`int`): Completions of each problem and setting.
        max_new_tokens (`int`): The token budget.
        settings (`Mapping[str, Setting]`, *optional*): The static settings, by default `REPORT_SETTINGS`.
    """
    import torch

    rows = build_problems("validation", problems)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        passed = {
            name: pass_rates(rows, sample_completions(model, tokenizer, rows, setting, samples, max_new_tokens))
            for name, setting in (REPORT_SETTINGS if settings is None else settings).items()
        }
        by_rule = sample_completions(
            model, tokenizer, rows, {}, samples, max_new_tokens, fork_temperatures=FORK_TEMPERATURES
        )
    passed["hand-written rule"] = pass_rates(rows, by_rule)
    return {
        "split": "validation",
        "problems": problems,
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "mode_accuracy": mode_accuracy(model),
        "pass@1": passed,
    }


def format_report(report: Mapping[str, Any]) -> str:
    """
    The report as two Markdown tables, in per cent.

    Args:
        report (`Mapping`): What `measure_quality` returned.
    """
    lines = ["| token | mode accuracy |", "|---|---|"]
    lines += [f"| {kind} | {100 * value:.1f} |" for kind, value in report["mode_accuracy"].items()]
    columns = (*TYPES, "all")
    lines += ["", f"| pass@1, budget {report['max_new_tokens']} | {' | '.join(columns)} |", "|---" * 6 + "|"]
    for name, rates in report["pass@1"].items():
        lines.append(f"| {name} | " + " | ".join(f"{100 * rates.get(kind, math.nan):.1f}" for kind in columns) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """
    The command line, `python -m hf_adaptive_decode.testbed.quality`.

    Args:
        argv (`list[str]`, *optional*): The arguments, by default the process's own.
    """
    parser = argparse.ArgumentParser(prog="python -m hf_adaptive_decode.testbed.quality", description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a checkpoint (default: the shipped one)")
    parser.add_argument("--problems", type=int, default=400, help="validation problems (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="token budget (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    arguments = parser.parse_args(argv)
    if arguments.problems < len(TYPES) or arguments.max_new_tokens < 1:
        parser.error(f"--problems must be at least {len(TYPES)} and --max-new-tokens at least 1")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from . import BASE_MODEL_PATH

    torch.set_num_threads(1)
    folder = arguments.model or BASE_MODEL_PATH
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    report = measure_quality(model, tokenizer, arguments.problems, max_new_tokens=arguments.max_new_tokens)
    print(format_report(report))  # noqa: T201
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
