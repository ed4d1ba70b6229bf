"""Checkpoints of adapters that are whole or not there; knows the Trainer's files, no loss and no rollout."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import sort_checkpoints

from ..engines.lockstep import Lockstep
from ..errors import AdaptiveDecodeError
from ..hub.card import add_training
from ..hub.card_text import TrainingFacts
from ..hub.peft_layers import set_lora_training
from ..hub.peft_weights import restore_peft
from ..hub.store import WEIGHTS_FILE, load_into
from ..modeling import AutoDecoForCausalLM
from .processes import count_own
from .sharded_base import BaseSharding

_STAGING = ".saving"
_STATE_FILE = "trainer_state.json"


class AdapterTrainer(Trainer):
    """
    A [`~transformers.Trainer`] whose checkpoints hold an adapter in place of a model.

    A checkpoint is written beside the others under another name, brought to disk and renamed at the end, so that a
    killed process leaves either the whole of it or nothing that counts as one.

    Args:
        model ([`AutoDecoForCausalLM`]): The model. A LoRA of its base goes into checkpoints, too.
        train_peft (`bool`, defaults to `False`): Whether that LoRA learns; if not, it stands still like the base.
        kwargs: As [`~transformers.Trainer`] takes them.

    Attributes:
        lockstep ([`Lockstep`]): For code of one's own that runs the model in a launched training: a base that is parted
            over processes runs in all of them or not at all.

    Raises:
        [`AdapterConfigError`]: If there is no LoRA to train, or it is none that can be saved.
        [`AdaptiveDecodeError`]: If a LoRA is to be trained in a base that is parted over processes.
    """

    _is_staging = False
    _sharding: BaseSharding | None = None

    def __init__(self, model: PreTrainedModel, *, train_peft: bool = False, **kwargs: Any) -> None:
        set_lora_training(model, train_peft)
        with _passing_as_trainable(model):
            super().__init__(model=model, **kwargs)
        self.lockstep = Lockstep()
        if self._sharding is not None and self._sharding.parts:
            if train_peft:
                raise AdaptiveDecodeError(
                    "`train_peft` is set, and the launcher's config parts the base over processes (ZeRO-3 or FSDP2); "
                    "a LoRA learns where every process holds the base: launch with examples/accelerate/ddp.yaml."
                )
            self._sharding.shard(model, self.accelerator)
            self.lockstep = Lockstep(model, self.accelerator.device)

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's, which need not know of a base that is parted over processes."""
        self._sharding = BaseSharding.asked(self.args)
        with contextlib.nullcontext() if self._sharding is None else self._sharding.hidden():
            super().create_accelerator_and_postprocess()

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        asked = cast(dict[str, Any], super()._build_accelerator_args(**kwargs))
        return asked if self._sharding is None else asked | {"deepspeed_plugin": None, "fsdp_plugin": None}

    def _move_model_to_device(self, model: nn.Module, device: Any) -> None:
        if self._sharding is None or not self._sharding.parts:  # else each process brings its part there
            super()._move_model_to_device(model, device)

    def objective(self) -> str | None:
        """What is learned on, in words for the card."""
        return None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the adapter, and says in its card how it was trained."""
        super().save_model(output_dir, _internal_call)
        # A checkpoint's card would be written at every save, and nobody reads it.
        if self.args.should_save and not _internal_call:
            data: Any = self.train_dataset
            size = f"{len(data):,} examples" if hasattr(data, "__len__") else None
            facts = TrainingFacts(size, self.objective(), self.state.global_step, self.args.seed)
            add_training(str(output_dir or self.args.output_dir), facts)

    def own_rows(self, batch: Any, count: int) -> Any:
        """A batch with its first `count` rows alone, and nothing of those that another process has, too."""
        raise NotImplementedError

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """As the Trainer's, each row once: see [`~processes.count_own`]."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if batches:
            batches[-1] = self._own(batches[-1])
        return batches, self._get_num_items_in_batch(batches, device)

    def _own(self, batch: Any) -> Any:
        rows = len(batch) if isinstance(batch, list) else len(batch["labels"])
        own = count_own(self.accelerator, rows)
        return batch if own == rows else self.own_rows(batch, own)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, each row once."""
        return super().prediction_step(model, self._own(inputs), *args, **kwargs)

    def save_extra_state(self, folder: Path) -> None:
        """Writes what the trainer keeps beyond the Trainer's own state; nothing by default."""

    def load_extra_state(self, folder: Path) -> None:
        """Reads what [`~save_extra_state`] wrote."""

    def _get_output_dir(self, trial: Any) -> str:
        folder = cast(str, super()._get_output_dir(trial=trial))
        return os.path.join(folder, _STAGING) if self._is_staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        staging, name = run / _STAGING, f"checkpoint-{self.state.global_step}"
        try:
            self._stage_and_publish(model, trial, run, staging, name)
        except (OSError, RuntimeError) as error:  # torch raises the latter where a disk is full
            shutil.rmtree(staging / name, ignore_errors=True)
            with contextlib.suppress(OSError):
                staging.rmdir()
            whole = sort_checkpoints(str(run), use_mtime=True)
            last = f"the last whole one is {Path(whole[-1]).name}" if whole else "there is none before it"
            raise OSError(f"{run / name} could not be written: {error}. To resume, make room; {last}.") from error

    def _stage_and_publish(self, model: nn.Module, trial: Any, run: Path, staging: Path, name: str) -> None:
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._is_staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_staging = False
        is_best = self.state.best_model_checkpoint == str(staging / name)
        if is_best:
            self.state.best_model_checkpoint = str(run / name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.save_extra_state(staging / name)
            if is_best:
                self.state.save_to_json(str(staging / name / _STATE_FILE))
            _publish(staging / name, run / name, staging / "replaced")
            self._discard_surplus(run, staging)
            shutil.rmtree(staging)
        self.accelerator.wait_for_everyone()

    def _discard_surplus(self, run: Path, staging: Path) -> None:
        """As `rotate_checkpoints` chooses; each is moved away first, so that none is ever there in part."""
        limit, ordered = self.args.save_total_limit, sort_checkpoints(str(run), use_mtime=True)
        if limit is None or limit <= 0:
            return
        kept = {ordered[-1], str(self.state.best_model_checkpoint)} & set(ordered)
        spare = [checkpoint for checkpoint in ordered if checkpoint not in kept]
        for checkpoint in spare[: max(0, len(ordered) - max(limit, len(kept)))]:
            os.rename(checkpoint, staging / Path(checkpoint).name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = cast(AutoDecoForCausalLM, model if model is not None else self.model)
        restore_peft(cast(PreTrainedModel, target), resume_from_checkpoint)
        load_into(target.decoding_adapter, Path(resume_from_checkpoint, WEIGHTS_FILE))
        self.load_extra_state(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(os.fspath(self.state.best_model_checkpoint))


@contextmanager
def _passing_as_trainable(model: PreTrainedModel) -> Iterator[None]:
    """Within it a quantised model does not look so: the Trainer refuses it, but what learns here is not quantised."""
    is_quantized = vars(model).get("is_quantized", False)
    if is_quantized:
        model.is_quantized = False
    try:
        yield
    finally:
        if is_quantized:
            model.is_quantized = True


def _publish(staged: Path, final: Path, replaced: Path) -> None:
    """Renames a folder once everything in it is on disk; one that has the name already makes way, as a whole."""
    for path in staged.rglob("*"):
        _flush(path)
    _flush(staged)
    if final.exists():
        os.rename(final, replaced)
    os.rename(staged, final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
