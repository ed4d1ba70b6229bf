"""Trains one adapter in a folder of its own, from wherever it was left; knows no flags, no data and no policy."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .launched import is_main, main_first

RECORD_FILE = "run.json"
_STATE_FILE = "trainer_state.json"


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
        self.resume = resume
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
        """Writes the record, where it is the main process; returns the checkpoint to go on from, if there is one."""
        self.record |= {"finished": False, "log": []}
        if not self.resume and is_main():
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
        if is_main():
            write_whole(self.training / RECORD_FILE, json.dumps(self.record, indent=2) + "\n")


def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """
    Writes a file under another name first, so that a killed process leaves all of it or what was there before.

    Args:
        path (`Path`): The file.
        text (`str` or iterable of `str`): All of it, or its parts, which may be more than the memory holds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}")
    try:
        with staged.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines([text] if isinstance(text, str) else text)
        os.replace(staged, path)
    except OSError as error:
        staged.unlink(missing_ok=True)  # room for whatever else is to be saved
        raise OSError(f"{path} could not be written: {error}") from error


def step_of(checkpoint: str) -> int:
    """How many steps a checkpoint has behind it."""
    return int(checkpoint.rpartition("-")[2])


def digest(rows: Iterable[Any]) -> str:
    """What tells data from other data: SHA-256 over its rows."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()


def train_in(
    run: RunFolder,
    model: Any,
    make_trainer: Callable[[], Any],
    *,
    shown: tuple[str, ...] = ("loss",),
    data: Callable[[], str] | None = None,
    settle: Callable[[Any], None] | None = None,
) -> Any:
    """
    The trained policy, which is also saved with card and tokenizer; of a finished run it is only loaded.

    Args:
        run ([`RunFolder`]): Where.
        model ([`~transformers.PreTrainedModel`]): The base model, which becomes an adaptive one.
        make_trainer (`Callable`): Makes the trainer of a fresh adapter on it, if there is anything to train.
        shown (`tuple` of `str`): Which of what it logs stands beside its progress bar.
        data (`Callable`, *optional*): Says, after training, what was trained on, for the card.
        settle (`Callable`, *optional*): Called with the adaptive model once it is trained, before it is saved.
    """
    from transformers import TrainerState
    from transformers.trainer import TRAINING_ARGS_NAME

    from ..hub.card import add_training
    from ..hub.card_text import TrainingFacts
    from ..modeling import AutoDecoForCausalLM

    if run.finished:
        return AutoDecoForCausalLM.from_pretrained(run.adapter, base_model=model).eval().decoding_adapter
    trainer = make_trainer()
    adaptive = trainer.model
    _show_in_bar(trainer, shown)
    with main_first(trainer.args):
        checkpoint = run.begin()
    if checkpoint is not None and 0 < trainer.args.max_steps <= step_of(checkpoint):
        # Killed behind the last step. The Trainer, told to go on from there, would take one more.
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = TrainerState.load_from_json(str(Path(checkpoint, _STATE_FILE)))
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    if settle is not None:
        settle(adaptive)
    adaptive.eval()
    trainer.save_model(str(run.adapter))
    # The Trainer's own note to itself is a pickle, and nothing that an adapter needs.
    if is_main():
        (run.adapter / TRAINING_ARGS_NAME).unlink(missing_ok=True)
    if data is not None and is_main():
        facts = TrainingFacts(data(), trainer.objective(), trainer.state.global_step, trainer.args.seed)
        add_training(run.adapter, facts)
    run.finish(trainer.state.log_history)
    return adaptive.decoding_adapter


def _show_in_bar(trainer: Any, shown: tuple[str, ...]) -> None:
    """Puts what is logged beside the progress bar, and so leaves standard output to results."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    class Bar(ProgressCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            values = {name: f"{logs[name]:.3f}" for name in shown if isinstance((logs or {}).get(name), float)}
            if self.training_bar is not None and values:
                self.training_bar.set_postfix(values)

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Bar())
