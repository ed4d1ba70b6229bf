"""Trains one action policy in a folder of its own, from wherever it was left; knows no flags and no particular task."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RECORD_FILE = "run.json"


class RunFolder:
    """
    What has come of a training run: `adapter`, `training` with its checkpoints, and in there a record of its arguments.

    Args:
        folder (`Path`): Where all of it lies.
        arguments (`dict`): All that the trained policy depends on, of JSON's types.
        resume (`bool`): Whether to go on with what is there. Without, it is deleted once training begins.

    Raises:
        `ValueError`: If a run with other arguments is to be resumed, or one whose record is damaged.
    """

    def __init__(self, folder: Path, arguments: dict[str, Any], resume: bool) -> None:
        self.adapter, self.training = folder / "adapter", folder / "training"
        self.record: dict[str, Any] = {"arguments": arguments, "finished": False, "log": []}
        self._resume = resume
        if resume:
            self._read()

    @property
    def finished(self) -> bool:
        """Whether the adapter is there, as far as it was to be trained."""
        return bool(self.record["finished"]) and self.adapter.is_dir()

    def _read(self) -> None:
        path = self.training / RECORD_FILE
        advice = "choose another --output, or pass --no-resume to start over."
        if not path.exists():
            if self._checkpoints():
                raise ValueError(f"{self.training} has checkpoints and no {RECORD_FILE} that says of what; {advice}")
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            there, finished, log = dict(found["arguments"]), bool(found["finished"]), list(found["log"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); {advice}") from error
        asked = self.record["arguments"]
        other = [name for name in sorted({*there, *asked}) if there.get(name) != asked.get(name)]
        if other:
            named = [f"`{name}` is {there.get(name)!r:.80} there and {asked.get(name)!r:.80} here" for name in other]
            raise ValueError(f"{self.training} holds a run with other arguments: {'; '.join(named)}; {advice}")
        self.record |= {"finished": finished, "log": log}

    def begin(self) -> str | None:
        """Writes the record; returns the checkpoint to go on from, if there is one."""
        self.record |= {"finished": False, "log": []}
        if not self._resume:
            for path in self._checkpoints():
                shutil.rmtree(path)
        self._write()
        return max(map(str, self._checkpoints()), key=step_of, default=None)

    def finish(self, log: list[dict[str, Any]]) -> None:
        """Notes that the adapter is there, and how training went."""
        self.record |= {"finished": True, "log": log}
        self._write()

    def _checkpoints(self) -> list[Path]:
        found = self.training.glob("checkpoint-*")
        return [path for path in found if path.is_dir() and path.name.removeprefix("checkpoint-").isdigit()]

    def _write(self) -> None:
        self.training.mkdir(parents=True, exist_ok=True)
        # Under another name first, so that a killed process leaves one record or the other.
        staged = self.training / f".{RECORD_FILE}"
        staged.write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")
        os.replace(staged, self.training / RECORD_FILE)


def step_of(checkpoint: str) -> int:
    """How many steps a checkpoint has behind it."""
    return int(checkpoint.rpartition("-")[2])


def train_in(
    run: RunFolder,
    model: Any,
    tokenizer: Any,
    config: Callable[[], Any],
    arguments: Any,
    reward: Callable[..., Any],
    problems: Sequence[dict[str, Any]],
    deterministic: bool = False,
) -> Any:
    """
    The trained policy, which is also saved with the tokenizer; of a finished run it is only loaded.

    Args:
        run ([`RunFolder`]): Where.
        model ([`~transformers.PreTrainedModel`]), tokenizer: The base model, which may become an adaptive one.
        config (`Callable`): Makes the fresh adapter's [`AutoDecoConfig`], if there is anything to train.
        arguments ([`REINFORCEDecodingTrainingArguments`]): Those of the trainer.
        reward (`Callable`), problems (sequence of `dict`): What to train on.
        deterministic (`bool`): Whether the policy takes its likeliest actions once it is trained.
    """
    import torch

    from ..hub.store import WEIGHTS_FILE, load_adapter, load_into
    from ..modeling import AutoDecoForCausalLM

    if run.finished:
        return load_adapter(run.adapter, model)
    fresh = config()
    torch.manual_seed(arguments.seed)
    adaptive = AutoDecoForCausalLM.from_base(model, fresh)
    trainer = _trainer(adaptive, tokenizer, arguments, reward, problems)
    checkpoint = run.begin()
    if checkpoint is not None and step_of(checkpoint) >= arguments.max_steps:
        # Killed behind the last step. The Trainer, told to go on from there, would take one more.
        load_into(adaptive.decoding_adapter, Path(checkpoint, WEIGHTS_FILE))
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    policy: Any = adaptive.decoding_adapter
    # Not before: a policy that always takes its likeliest action has nothing to learn from.
    policy.deterministic = policy.config.deterministic = adaptive.decoding_config.deterministic = deterministic
    adaptive.eval()
    trainer.save_model(str(run.adapter))
    run.finish(trainer.state.log_history)
    return policy


def _trainer(model: Any, tokenizer: Any, arguments: Any, reward: Callable[..., Any], problems: Any) -> Any:
    """A trainer whose bar shows the reward, and that leaves standard output to results."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from ..training import REINFORCEDecodingTrainer

    class RewardBar(ProgressCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            shown = {name: f"{logs[name]:.3f}" for name in ("reward", "objective") if name in (logs or {})}
            if self.training_bar is not None and shown:
                self.training_bar.set_postfix(shown)

    trainer = REINFORCEDecodingTrainer(model, reward, arguments, problems, processing_class=tokenizer)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(RewardBar())
    return trainer


def static_rates(
    model: Any,
    tokenizer: Any,
    problems: Sequence[dict[str, Any]],
    reward: Callable[..., Any],
    actions: Sequence[dict[str, float]],
    token_budgets: Sequence[int],
    parallel_budgets: Sequence[int],
    **how: Any,
) -> np.ndarray:
    """pass@B of each action alone, as the mean over problems and token budgets, `[parallel budgets, actions]`."""
    from ..actions import describe
    from ..evaluation import Decoder, run_decoder

    rates = []
    for action in actions:
        decoder = Decoder(f"prior: {describe(action)}", action)
        found = [run_decoder(model, tokenizer, problems, reward, decoder, token_budget=b, **how) for b in token_budgets]
        rates.append([np.mean([one.pass_at(parallel) for one in found]) for parallel in parallel_budgets])
    return np.array(rates).T


def prior_entries(
    rates: np.ndarray, parallel_budgets: Sequence[int], probability: float, told_samples: bool
) -> list[dict[str, Any]]:
    """
    An `action_prior` with `probability` on the best action for each B and the rest spread evenly over the others.

    A policy that is not told B gets one entry for all of them, since its start would tell it otherwise.
    """
    if not told_samples:
        rates, parallel_budgets = rates.mean(axis=0, keepdims=True), parallel_budgets[:1]
    others = (1 - probability) / max(1, rates.shape[1] - 1)
    entries = []
    for parallel, of_actions in zip(parallel_budgets, rates, strict=True):
        best = int(of_actions.argmax())
        chances = [probability if action == best else others for action in range(len(of_actions))]
        entries.append({"samples": parallel, "probabilities": chances})
    return entries
