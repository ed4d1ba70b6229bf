"""
What the experiments share: a base model, domains, adapters that are trained once, and one evaluation folder.

    python examples/experiments/run_all.py --output experiments_output
    python examples/experiments/autodeco_table1.py --base Qwen/Qwen3-0.6B --dataset math=DATA.jsonl code=OTHER.jsonl

Each script is one table or figure of a paper: `EXPERIMENT` says which, and `run(lab)` returns what came of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_adaptive_decode import (
    AutoDecoConfig,
    AutoDecoForCausalLM,
    REINFORCEDecodingTrainer,
    REINFORCEDecodingTrainingArguments,
)
from hf_adaptive_decode.cli.heads_run import heads_arguments, heads_trainer, solutions
from hf_adaptive_decode.evaluation import Evaluation, Task, evaluate_decoding, load_task
from hf_adaptive_decode.evaluation.results import label
from hf_adaptive_decode.evaluation.table import format_interval, markdown_table
from hf_adaptive_decode.evaluation.tasks import PRESETS
from hf_adaptive_decode.hub.store import load_adapter
from hf_adaptive_decode.testbed import build_problems, load_base_model, load_tokenizer

# The testbed's families of problems in the part of the papers' domains: chains of sums, and search for an answer that
# can be checked. What is trained on one and measured on the other is out of its domain.
DOMAINS = {"math": "testbed:calc+run", "code": "testbed:coin+sign", "all": "testbed"}
TYPES = {"math": ["calc", "run"], "code": ["coin", "sign"], "all": None}
TEMPERATURES = [{"temperature": t} for t in (0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)]
# For a whole completion, where heat needs a nucleus.
SEQUENCE_ACTIONS = [
    *({"temperature": t} for t in (0.0, 0.5, 0.75, 1.0, 1.25)),
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.25, "top_p": 0.9},
    {"temperature": 1.5, "top_p": 0.8},
]


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults take the whole driver about an hour of one CPU core."""

    validation: int = 200
    test: int = 400
    samples: int = 8
    heads_problems: int = 1000
    heads_steps: int = 250
    policy_steps: int = 60
    policy_prompts: int = 64
    token_budget: int = 48
    sequence_budget: int = 28


@dataclass(frozen=True)
class Trained:
    """
    An adapter, and how its training went.

    Args:
        policy ([`DecodingPolicy`]): In evaluation mode.
        log (list of `dict`): The trainer's `log_history`.
        folder (`Path`): Where it is saved.
    """

    policy: Any
    log: list[dict[str, Any]]
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """
    What came of an experiment.

    Args:
        ours (`str`): The table or the pictures, in Markdown.
        sign (`str`): `"same"`, `"opposite"`, `"no difference"` or `"not comparable"`: ours beside the paper's.
        why (`str`): What makes it so, in a sentence or two.
        lines (list of `dict`): The JSON Lines behind every number of `ours`.
    """

    ours: str
    sign: str
    why: str
    lines: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Experiment:
    """
    One table or figure of a paper.

    Args:
        name (`str`): The script's.
        what (`str`): `"AutoDeco, Table 1"`.
        claim (`str`): What the paper shows there, in our words.
        paper (`str`): Its figures, in a line.
    """

    name: str
    what: str
    claim: str
    paper: str


class Lab:
    """
    Trains what experiments ask for once, and measures it in one folder, so that no baseline is sampled twice.

    Args:
        output (`Path`): Where adapters, completions, pictures and results go.
        base (`str`, *optional*): Folder or Hub id of a base model; the embedded one by default.
        datasets (mapping, *optional*): By domain a preset's name with `=PATH`, or a file or Hub id of `prompt` and
            `solution`; the testbed's families by default.
        sizes ([`Sizes`]): How much of everything.
        seed (`int`): Seeds data, training and sampling.
        other (`str`, *optional*): Folder or Hub id of a second base model.
    """

    def __init__(
        self,
        output: Path,
        base: str | None = None,
        datasets: Mapping[str, str] | None = None,
        sizes: Sizes | None = None,
        seed: int = 0,
        other: str | None = None,
    ) -> None:
        self._other = other
        self.output, self.base_name, self.datasets = output, base, dict(datasets or {})
        self.sizes, self.seed = sizes or Sizes(), seed
        self.tokenizer: Any = load_tokenizer() if base is None else AutoTokenizer.from_pretrained(base)
        self._base: Any = None
        self._tasks: dict[str, Task] = {}
        output.mkdir(parents=True, exist_ok=True)

    @property
    def is_testbed(self) -> bool:
        """Whether the problems are the embedded ones."""
        return not self.datasets

    def base(self) -> Any:
        """A fresh copy of the base model."""
        if self.base_name is None:
            return load_base_model()
        return AutoModelForCausalLM.from_pretrained(self.base_name).eval()

    @property
    def model(self) -> Any:
        """The base model that everything is measured with."""
        if self._base is None:
            self._base = self.base()
        return self._base

    def other(self) -> Lab | None:
        """The same on the second base model, in a folder of its own; `None` if there is none."""
        if self._other is None:
            return None
        folder = self.output / "other-base"
        return Lab(folder, self._other, self.datasets, self.sizes, self.seed)

    def task(self, domain: str) -> Task:
        """Validation and test problems of a domain (`math`, `code`, `all`), or of a testbed type such as `coin`."""
        if domain not in self._tasks:
            how = {"validation": self.sizes.validation, "test": self.sizes.test, "seed": self.seed}
            if self.is_testbed:
                name, source = DOMAINS.get(domain, f"testbed:{domain}"), None
            else:
                name, _, source = self._dataset(domain).partition("=")
                name, source = (name, source or None) if name in PRESETS else (domain, source or name)
            self._tasks[domain] = load_task(name, source, **how)
        return self._tasks[domain]

    def _dataset(self, domain: str) -> str:
        if domain not in self.datasets:
            raise ValueError(f"there is no data set for the domain {domain!r}; pass --dataset {domain}=NAME_OR_FILE.")
        return self.datasets[domain]

    def training_problems(self, domain: str, count: int) -> list[dict[str, Any]]:
        """Problems to train on, none of which is measured on."""
        if self.is_testbed:
            return build_problems("train", count, types=TYPES.get(domain, [domain]), seed=self.seed)
        rows = [dict(row) for row in self.task(domain).validation]
        # Half of what is not reported on; the other half chooses baselines.
        return rows[::2][:count]

    def heads(self, domain: str, name: str = "heads", **config: Any) -> Trained:
        """Temperature and top-p heads, trained on verified solutions of a domain (AutoDeco, section 2.1)."""
        sizes = self.sizes

        def train(folder: Path) -> Any:
            args = heads_arguments(
                folder / "training",
                max_steps=sizes.heads_steps,
                per_device_train_batch_size=64 if self.is_testbed else 4,
                logging_steps=max(1, sizes.heads_steps // 25),
                seed=self.seed,
            )
            settings = AutoDecoConfig(policy="heads", **config)
            trainer = heads_trainer(self.base(), self.tokenizer, self.solutions(domain), args, settings)
            trainer.train()
            return trainer.model, trainer.state.log_history

        return self.adapter(f"{name}-{domain}", {"domain": domain, **config}, train)

    def solutions(self, domain: str) -> list[dict[str, Any]]:
        """Completions of the base model itself that the reward has verified."""
        path = self.output / "solutions" / f"{domain}-{self.sizes.heads_problems}-{self.seed}.jsonl"
        problems = self.training_problems(domain, self.sizes.heads_problems)
        how = {"token_budget": self.sizes.token_budget, "seed": self.seed, "batch_rows": 1024}
        return solutions(path, self.base(), self.tokenizer, problems, self.task(domain).reward, **how)

    def policy(
        self,
        domain: str,
        name: str,
        config: Mapping[str, Any],
        *,
        budgets: Sequence[int],
        parallel: Sequence[int] = (1,),
        **changed: Any,
    ) -> Trained:
        """An action policy, trained by REINFORCE on the rewards of a domain (Adaptive Decoding, section 2)."""
        sizes = self.sizes

        def train(folder: Path) -> Any:
            torch.manual_seed(self.seed)
            settings = {"max_token_budget": max(64, *budgets), "max_parallel_budget": 8, **config}
            model = AutoDecoForCausalLM.from_base(self.base(), AutoDecoConfig(**settings))
            args = REINFORCEDecodingTrainingArguments(
                **{
                    "output_dir": str(folder / "training"),
                    "max_steps": sizes.policy_steps,
                    "per_device_train_batch_size": sizes.policy_prompts,
                    "num_generations": 8 if max(parallel) < 8 else 16,
                    "budget": list(budgets),
                    "parallel_budget": list(parallel),
                    "reward_aggregation": "pass@B" if max(parallel) > 1 else "mean",
                    "entropy_coef": 0.01,
                    "learning_rate": 5e-3,
                    "logging_steps": max(1, sizes.policy_steps // 20),
                    "save_strategy": "no",
                    "report_to": "none",
                    "use_cpu": not torch.cuda.is_available(),
                    "seed": self.seed,
                    **changed,
                }
            )
            problems = self.training_problems(domain, 4000)
            reward, tokenizer = self.task(domain).reward, self.tokenizer
            trainer = REINFORCEDecodingTrainer(model, reward, args, problems, processing_class=tokenizer)
            trainer.train()
            return model, trainer.state.log_history

        asked = {"domain": domain, **config, "budgets": list(budgets), "parallel": list(parallel), **changed}
        return self.adapter(f"{name}-{domain}", asked, train)

    def adapter(self, name: str, asked: Mapping[str, Any], train: Callable[[Path], Any]) -> Trained:
        """The policy that `train` makes, or the one that it made when it was asked for before."""
        asked = {**asked, **asdict(self.sizes), "seed": self.seed, "base": self.base_name}
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:8]
        folder = self.output / "adapters" / f"{name}-{digest}"
        if not (folder / "log.json").exists():
            started = time.perf_counter()
            model, log = train(folder)
            model.eval().save_pretrained(folder)
            entry = {"log": log, "seconds": time.perf_counter() - started, "asked": asked}
            (folder / "log.json").write_text(json.dumps(entry, default=str), encoding="utf-8")
        log = json.loads((folder / "log.json").read_text(encoding="utf-8"))["log"]
        return Trained(load_adapter(folder, self.model), log, folder)

    def evaluate(self, domains: str | Sequence[str], adapters: Mapping[str, Any], **how: Any) -> Evaluation:
        """[`evaluate_decoding`] on the test problems of one or several domains."""
        named = [domains] if isinstance(domains, str) else list(domains)
        how = {"samples": self.sizes.samples, "token_budgets": self.sizes.token_budget, "batch_rows": 2048, **how}
        tasks = [self.task(domain) for domain in named]
        folder = self.output / "evaluation"
        return evaluate_decoding(self.model, self.tokenizer, tasks, adapters, folder=folder, seeds=(self.seed,), **how)

    def picture(self, name: str) -> Path:
        """Where a picture goes."""
        path = self.output / "pictures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def gain_table(found: Evaluation, *metrics: str) -> str:
    """Every decoder at some metrics in per cent, with the adapter's paired gain over it."""
    header = ["", *metrics, *(f"gain at {metric}" for metric in metrics)]
    rows: dict[str, list[str]] = {}
    several = len({line["task"] for line in found.measures}) > 1
    for line in found.measures:
        # What was chosen for another k has no place in a table of these.
        if line["for_k"] is not None and all(not metric.endswith(f"@{line['for_k']}") for metric in metrics):
            continue
        name = f"{line['task']}: {label(line)}" if several else label(line)
        gains = [format_interval(line["gain"][metric], sign=True) if "gain" in line else "" for metric in metrics]
        rows.setdefault(name, [name, *(format_interval(line[metric]) for metric in metrics), *gains])
    return markdown_table(header, list(rows.values()))


def sign_of(gains: Sequence[Mapping[str, float]], papers: int = 1) -> str:
    """`"same"` if all gains have the paper's sign beyond their intervals, `"opposite"` if one has the other."""
    signed = [(papers * gain["mean"], min(papers * gain["low"], papers * gain["high"])) for gain in gains]
    if all(low > 0 for _, low in signed):
        return "same"
    opposite = any(max(papers * gain["low"], papers * gain["high"]) < 0 for gain in gains)
    return "opposite" if opposite else "no difference"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The flags that every experiment takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="folder or Hub id of a base model; the embedded one by default")
    parser.add_argument(
        "--dataset", nargs="+", default=[], metavar="DOMAIN=NAME", help="for each of math, code and all: a preset of "
        "`load_task` (gsm8k, math, aime, humaneval, mbpp), with =PATH for a local file"
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("experiments_output"), help="adapters, results, pictures")
    parser.add_argument(
        "--other-base",
        help="a second base model, for tables that are about other models; one of the testbed comes from "
        "`python -m hf_adaptive_decode.testbed.train --seed 1 --output DIR`",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    for name, value in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    return parser


def lab_from(options: argparse.Namespace) -> Lab:
    """The lab that the flags ask for."""
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    sizes = Sizes(**{name: getattr(options, name) for name in asdict(Sizes())})
    datasets = dict(one.split("=", 1) for one in options.dataset)
    return Lab(options.output, options.base, datasets, sizes, options.seed, options.other_base)


def main(experiment: Experiment, run: Callable[[Lab], Outcome]) -> None:
    """Runs one experiment from the command line and prints its section."""
    lab = lab_from(arguments(f"{experiment.what}: {experiment.claim}").parse_args())
    print(section(experiment, record(lab, experiment, run(lab))))


def record(lab: Lab, experiment: Experiment, outcome: Outcome) -> Outcome:
    """Writes the JSON Lines behind an outcome."""
    path = lab.output / "results" / f"{experiment.name}.jsonl"
    Evaluation(outcome.lines).save(path)
    return outcome


def section(experiment: Experiment, outcome: Outcome) -> str:
    """An experiment's part of RESULTS.md."""
    return "\n".join(
        [
            f"## {experiment.what}",
            "",
            experiment.claim,
            "",
            f"**Paper:** {experiment.paper}",
            "",
            f"**Ours** ([lines](results/{experiment.name}.jsonl)):",
            "",
            outcome.ours,
            "",
            f"**Sign:** {outcome.sign}. {outcome.why}",
        ]
    )
