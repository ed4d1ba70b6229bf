"""
What the first epoch computed of a frozen base, kept for the later ones; knows the base and the losses, no Trainer.

Hidden states depend on nothing that learns, so a row of the data has the same ones in every epoch. Rows go by their
numbers, which run on from one data set to the next, so that a batch says by itself which data set it is of.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from transformers import PreTrainedModel, TrainerCallback

from ..errors import AdaptiveDecodeError, EpochCacheSpaceError
from ..hub.bases import fingerprint
from ..hub.peft_layers import active_lora
from ..losses import (
    IGNORE_INDEX,
    SKETCH_FIELDS,
    SKETCH_VERSION,
    DecodingLossConfig,
    DecodingLossOutput,
    Sketch,
    chunked_decoding_loss,
    concatenated,
    sketch_rows,
    sketched_decoding_loss,
)
from ..losses.chunked import Predict
from ..losses.sketch import LARGEST_TEMPERATURE
from ..policies import DecodingPolicy
from ..projection import Projection
from .epoch_cache_options import ROW_COLUMN
from .row_store import Field, RowStore

logger = logging.getLogger(__name__)

_VALUES_A_WEIGHT = 16
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_ROWS_AT_ONCE = 1000


def numbered(datasets: Mapping[str, Any]) -> dict[str, Any]:
    """
    Tokenised data sets whose rows have numbers, those of each behind those of the last one.

    Raises:
        [`AdaptiveDecodeError`]: If one of them is a stream, whose rows have none.
    """
    start, found = 0, {}
    for name, dataset in datasets.items():
        if not hasattr(dataset, "__len__"):
            raise AdaptiveDecodeError(
                f"`epoch_cache` is set and the data set {name!r} is a stream, whose rows cannot be numbered; load it "
                "without streaming, or set `epoch_cache=None`."
            )
        numbers = range(start, start + len(dataset))
        if hasattr(dataset, "add_column"):
            found[name] = dataset.add_column(ROW_COLUMN, list(numbers))
        else:
            found[name] = [{**row, ROW_COLUMN: number} for row, number in zip(dataset, numbers, strict=True)]
        start = numbers.stop
    return found


class EpochCache:
    """
    The hidden states, and for `"distribution"` the sketched logits, of every position with a target.

    Args:
        kind (`str`): `"distribution"` or `"hidden"`.
        folder (`Path`): A file `NAME.safetensors` in it for each data set.
        model ([`AutoDecoForCausalLM`]): The model; its policy must not read logits if these are sketched.
        projection ([`Projection`]): Of that model. It runs once, on two tokens, for the precision of hidden states.
        datasets (mapping of `str` to data set): From [`numbered`].
        precision (`str`): Of the computation around the base, which may be another than its weights'.

    Raises:
        [`AdaptiveDecodeError`]: If the policy needs logits, or reaches temperatures that a sketch does not.
        [`EpochCacheSpaceError`]: If the disk has no room.
    """

    def __init__(
        self,
        kind: str,
        folder: Path,
        model: PreTrainedModel,
        projection: Projection,
        datasets: Mapping[str, Any],
        precision: str,
    ) -> None:
        self._kind, self._projection = kind, projection
        if kind == "distribution":
            _check_policy(model.decoding_adapter)
        first = next(iter(next(iter(datasets.values()))))
        ids = torch.tensor([first["input_ids"][:2]], device=model.device)
        hidden = projection.hidden_states(input_ids=ids, attention_mask=torch.ones_like(ids))
        self.device = hidden.device
        fields = {"hidden": Field(hidden.dtype, (hidden.shape[-1],))}
        identity = {"kind": kind, "precision": precision, "base": _base_digest(model)}
        if kind == "distribution":
            fields |= {name: Field(dtype, shape) for name, (dtype, shape) in SKETCH_FIELDS.items()}
            identity["sketch"] = str(SKETCH_VERSION)
        self._stores, self._starts, start = [], [], 0
        for name, dataset in datasets.items():
            counts, digest = _targets(dataset)
            path = folder / f"{quote(name, safe='')}.safetensors"
            self._stores.append(RowStore(path, counts, fields, {**identity, "data": digest}))
            self._starts.append(start)
            start += len(counts)
        self.bytes_a_position = sum(field.bytes for field in fields.values())
        self._open(folder)

    def has(self, rows: torch.Tensor) -> bool:
        """Whether all of a batch's rows `[B]` are kept."""
        store, own = self._find(rows)
        return store.has(own)

    def loss(
        self,
        rows: torch.Tensor,
        targets: torch.Tensor,
        predict: Predict,
        config: DecodingLossConfig,
        *,
        mask_uniform: torch.Tensor | None,
        num_items: int | torch.Tensor | None,
    ) -> DecodingLossOutput:
        """
        The decoding loss of rows that are kept.

        Args:
            rows (`torch.Tensor` of shape `[B]`, long): Their numbers.
            targets (`torch.Tensor` of shape `[N]`, long): Of their positions, without -100.
            predict, config, num_items: As [`chunked_decoding_loss`] takes them.
            mask_uniform (`torch.Tensor` of shape `[N]`, *optional*): As there, of these positions.
        """
        store, own = self._find(rows)
        values = {name: value.to(self.device) for name, value in store.read(own).items()}
        hidden = values.pop("hidden")
        if self._kind == "distribution":
            sketch = Sketch(**values)
            return sketched_decoding_loss(
                hidden, sketch, predict, config, mask_uniform=mask_uniform, num_items=num_items
            )
        project = self._projection.logits
        return chunked_decoding_loss(
            hidden, targets, predict, project, config, mask_uniform=mask_uniform, num_items=num_items
        )

    def recorder(self) -> Recorder:
        """What sees a batch's logits while its loss is taken."""
        return Recorder(self._kind == "distribution")

    def keep(self, rows: torch.Tensor, hidden: torch.Tensor, recorder: Recorder) -> None:
        """
        Keeps a batch.

        Args:
            rows (`torch.Tensor` of shape `[B]`, long): The numbers of its rows.
            hidden (`torch.Tensor` of shape `[N, H]`): Of the positions with a target, row by row.
            recorder ([`Recorder`]): That has seen the logits of these positions in the same order.
        """
        store, own = self._find(rows)
        store.write(own, {"hidden": hidden, **recorder.values()})

    def commit(self) -> None:
        """Brings to disk what is not there yet, for a run that goes on from here after a crash."""
        for store in self._stores:
            store.commit()

    def _find(self, rows: torch.Tensor) -> tuple[RowStore, torch.Tensor]:
        rows = rows.cpu()
        index = int(np.searchsorted(self._starts, int(rows[0]), side="right")) - 1
        return self._stores[index], rows - self._starts[index]

    def _open(self, folder: Path) -> None:
        missing = [store for store in self._stores if not store.is_there()]
        for store in missing:
            if store.path.exists():
                logger.warning(
                    "The epoch cache %s was made from other data, another base, precision or version; it is made anew.",
                    store.path,
                )
                store.path.unlink()
        needed, free = sum(store.bytes for store in missing), _free(folder)
        if needed > free:
            raise self._no_room(needed, free, folder)
        if missing:
            positions = sum(store.positions for store in missing)
            logger.warning(
                "The epoch cache takes %s bytes of %s free ones in %s: %s positions, %s bytes each.",
                *(f"{needed:,}", f"{free:,}", folder, f"{positions:,}", f"{self.bytes_a_position:,}"),
            )
        try:
            for store in self._stores:
                store.open()
                logger.info(
                    "The epoch cache %s holds %s positions in %s bytes (%s a position); %s of %s rows are filled.",
                    *(store.path, f"{store.positions:,}", f"{store.bytes:,}", f"{self.bytes_a_position:,}"),
                    *(f"{store.rows_filled:,}", f"{store.rows:,}"),
                )
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise self._no_room(needed, free, folder) from error

    def _no_room(self, needed: int, free: int, folder: Path) -> EpochCacheSpaceError:
        smaller = 'take epoch_cache="hidden", which keeps less, ' if self._kind == "distribution" else ""
        return EpochCacheSpaceError(
            f"The epoch cache needs {needed:,} bytes and {folder} has {free:,} bytes free, or takes no such file. "
            f"Set `epoch_cache_dir` to a folder on another disk, {smaller}lower `max_length`, or go without: "
            "`epoch_cache=None`."
        )


class Recorder:
    """
    Sketches the chunks of logits that a loss goes through.

    Args:
        sketches (`bool`): Whether it does, or lets them pass.
    """

    def __init__(self, sketches: bool) -> None:
        self._sketches = sketches
        self._parts: list[Sketch] = []

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """A chunk: `[C, V]` and `[C]`."""
        if self._sketches:
            self._parts.append(sketch_rows(logits, targets))

    def values(self) -> dict[str, torch.Tensor]:
        """The fields of all rows seen."""
        return dict(vars(concatenated(self._parts))) if self._parts else {}


class CommitCallback(TrainerCallback):
    """
    Brings a cache to disk whenever the Trainer brings itself there.

    Args:
        cache ([`EpochCache`]): The cache.
    """

    def __init__(self, cache: EpochCache) -> None:
        self._cache = cache

    def on_save(self, *_args: Any, **_kwargs: Any) -> None:
        """Behind a checkpoint."""
        self._cache.commit()

    on_epoch_end = on_evaluate = on_train_end = on_save


def _check_policy(policy: DecodingPolicy) -> None:
    if policy.needs_logits:
        raise AdaptiveDecodeError(
            f'`epoch_cache` is "distribution" and the policy {policy.config.policy!r} with the features '
            f'{policy.config.features} reads logits, which a sketch does not hold; take epoch_cache="hidden".'
        )
    largest = policy.config.temperature_range[1]
    if "temperature" in policy.config.heads and largest > LARGEST_TEMPERATURE:
        raise AdaptiveDecodeError(
            f'`epoch_cache` is "distribution" and `temperature_range` ends at {largest:g}; sketches of logits are made '
            f'for temperatures up to {LARGEST_TEMPERATURE:g}. Take epoch_cache="hidden".'
        )


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def _targets(dataset: Any) -> tuple[list[int], str]:
    """How many positions of each row have a target, and a digest of all token ids and labels."""
    digest, counts = hashlib.blake2b(digest_size=16), []
    for ids, labels in _id_rows(dataset):
        counts.append(int((labels[1:] != IGNORE_INDEX).sum()))
        digest.update(np.int64(ids.size).tobytes())
        digest.update(ids.tobytes())
        digest.update(labels.tobytes())
    return counts, digest.hexdigest()


def _id_rows(dataset: Any) -> Iterator[tuple[Any, Any]]:
    columns = ("input_ids", "labels")
    if hasattr(dataset, "with_format"):
        parts = dataset.with_format("numpy", columns=list(columns)).iter(batch_size=_ROWS_AT_ONCE)
        rows = (row for part in parts for row in zip(*(part[name] for name in columns), strict=True))
    else:
        rows = (tuple(row[name] for name in columns) for row in dataset)
    for ids, labels in rows:
        yield np.asarray(ids, dtype=np.int64), np.asarray(labels, dtype=np.int64)


def _base_digest(model: PreTrainedModel) -> str:
    """The architecture, the LoRA that acts, and of every frozen weight its bits' sum and a few numbers."""
    lora = active_lora(model)
    digest = hashlib.blake2b(f"{fingerprint(model)} {lora.name if lora else None}".encode(), digest_size=16)
    learning = {id(p) for module in model.modules() if isinstance(module, DecodingPolicy) for p in module.parameters()}
    for name, weight in model.named_parameters():
        if id(weight) in learning:
            continue
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.device.type != "meta" and weight.numel():  # what is offloaded has no numbers here
            flat = weight.detach().contiguous().flatten()
            few = flat[:: max(1, flat.numel() // _VALUES_A_WEIGHT)].contiguous().view(torch.uint8).cpu()
            digest.update(few.numpy().tobytes())
            digest.update(str(int(flat.view(torch.uint8).sum(dtype=torch.int64))).encode())
    return digest.hexdigest()
