"""Keeps what was decided for requests that ask for it until somebody takes it; knows slots, no engine or policy."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from safetensors.torch import save

from ..types import Observation, SamplingParameters, is_per_row
from .requests import RequestSettings

# Decided, and not taken, for so many requests at most; the oldest go first.
_MAX_KEPT = 1 << 14
_PARAMETERS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
_UNCOUNTED = -1
_log = logging.getLogger("vllm.hf_adaptive_decode")


@dataclass
class _Record:
    """What was decided for one request, by step: later ones replace earlier ones, whose token did not count."""

    settings: RequestSettings
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Batch:
    """One call's decisions, on their way to the host."""

    slots: torch.Tensor
    steps: torch.Tensor
    columns: dict[str, torch.Tensor]


class Recorder:
    """Decisions by slot while requests run, by tag from then on."""

    def __init__(self) -> None:
        self._records: dict[int, _Record] = {}
        self._in_batch: set[int] = set()
        self._tags: dict[str, list[_Record]] = {}
        self._kept = 0
        self._batches: list[_Batch] = []

    def enter(self, slot: int, settings: RequestSettings) -> None:
        """A new request has this slot from now on."""
        if slot in self._records:
            self.leave(slot)
            del self._records[slot]
        if not settings.is_traced:
            return
        record = self._records[slot] = _Record(settings)
        self._in_batch.add(slot)
        if settings.trace is not None:
            self._tags.setdefault(settings.trace, []).append(record)
            self._kept += 1
            while self._kept > _MAX_KEPT:
                self._kept -= len(self._tags.pop(next(iter(self._tags))))

    def leave(self, slot: int) -> None:
        """The request of a slot is not in the batch any more: it has ended, or was put off."""
        if slot not in self._in_batch:
            return
        self._settle()
        self._in_batch.remove(slot)
        record = self._records[slot]
        if record.settings.logs_trace:
            _log.info("decoding trace: %s", json.dumps(_columns(record)))

    def come_back(self, slot: int) -> None:
        """A request that was put off goes on."""
        if slot in self._records:
            self._in_batch.add(slot)

    def add(
        self,
        slots: torch.Tensor,
        steps: torch.Tensor,
        counted: torch.Tensor | None,
        parameters: SamplingParameters,
        seen: Observation | None,
    ) -> None:
        """
        Notes what was decided, if any request has asked for it. Nothing waits for an accelerator.

        Args:
            slots, steps (`torch.Tensor` of shape `[N]`, `torch.long`): Which token of which request.
            counted (`torch.Tensor` of shape `[N]`, `torch.bool`, *optional*): Which of them a token will come of.
            parameters ([`SamplingParameters`]): What was decided, fields of shape `[N]` or scalars.
            seen ([`Observation`], *optional*): What the policy saw.
        """
        if not self._in_batch:
            return
        columns = {name: value for name, value in vars(parameters).items() if value is not None}
        if seen is not None and any(self._records[slot].settings.observes for slot in self._in_batch):
            columns |= {f"seen.{f.name}": v for f in fields(seen) if (v := getattr(seen, f.name)) is not None}
        rows = len(slots)
        steps = steps if counted is None else torch.where(counted, steps, _UNCOUNTED)
        kept = {
            name: (value if is_per_row(value) else torch.full((rows,), value)).to("cpu", non_blocking=True)
            for name, value in columns.items()
        }
        self._batches.append(_Batch(slots.to("cpu", non_blocking=True), steps.to("cpu", non_blocking=True), kept))

    def take(self, tags: list[str]) -> dict[str, list[dict[str, Any]]]:
        """What was decided for the requests of each tag, one record a sequence; it is kept no longer."""
        self._settle()
        taken = {tag: self._tags.pop(tag, []) for tag in tags}
        self._kept -= sum(map(len, taken.values()))
        return {tag: [_columns(record) for record in records] for tag, records in taken.items()}

    def _settle(self) -> None:
        if not self._batches:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for batch in self._batches:
            for row, (slot, step) in enumerate(zip(batch.slots.tolist(), batch.steps.tolist(), strict=True)):
                if slot in self._in_batch and step != _UNCOUNTED:
                    record = self._records[slot]
                    own = {n: v[row] for n, v in batch.columns.items()}
                    record.steps[step] = own if record.settings.observes else _without_seen(own)
        self._batches.clear()


def _without_seen(own: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in own.items() if not name.startswith("seen.")}


def _columns(record: _Record) -> dict[str, Any]:
    """Plain data, which passes between processes without a pickle."""
    steps = [record.steps[step] for step in sorted(record.steps)]
    found: dict[str, Any] = {
        name: [step[name].item() if name in step else off for step in steps] for name, off in _PARAMETERS.items()
    }
    found["action"] = [step["action"].item() for step in steps if "action" in step]
    seen = [name for name in (steps[0] if steps else {}) if name.startswith("seen.")]
    if seen:
        stacked = {name.removeprefix("seen."): torch.stack([step[name] for step in steps]) for name in seen}
        found["observation"] = save(stacked)
    return found
