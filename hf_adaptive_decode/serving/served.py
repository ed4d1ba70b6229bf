"""An adapter in a worker: its policy, and the hidden states its model left; knows rows, nothing of either runner."""

from __future__ import annotations

import inspect
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ..budget import MAX_BUDGET
from ..configuration import AutoDecoConfig
from ..errors import AdapterLoadError
from ..hub.store import check_shape, load_into, locate, read_policy
from ..nucleus import row_maxima
from ..policies import DecodingPolicy
from ..policies.action_policy import ActionPolicy
from ..randomness import row_key, row_uniforms
from ..request_slots import HeldDecisions, Slot, Slots
from ..types import DecodeState, Observation
from ..warping import warp_logits
from .records import Recorder
from .requests import RequestSettings, read_settings

_ACTION_STREAM = 0
# Of requests that have ended or were put off, where the runner does not say which: so many may be put off at once.
_MAX_AWAY = 1 << 15
_OF_NO_EFFECT = {
    "policy_dropout",
    "detach_temperature",
    "base_model_name_or_path",
    "base_model_revision",
    "base_fingerprint",
    "format_version",
    "library_version",
}
# By engine: vLLM makes V1's processors before the model, in the same process.
_SERVED: weakref.WeakValueDictionary[str, ServedAdapter] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Rows:
    """
    Requests' rows, as tensors on the device, all of shape `[N]` and `torch.long`.

    Args:
        slots: Places in the tables of what was decided.
        budget: Token budget b.
        samples: Parallel budget B.
        keys: Of their random numbers.
    """

    slots: torch.Tensor
    budget: torch.Tensor
    samples: torch.Tensor
    keys: torch.Tensor


@dataclass(frozen=True)
class Steps:
    """
    Where the rows are in their requests, as tensors on the device of shape `[N]`.

    Args:
        tokens (`torch.long`): Tokens that the request has generated.
        first (`torch.bool`): Whether what is decided now holds for policies that decide once.
        counted (`torch.bool`, *optional*): Whether a token will come of the row; all of them by default.
    """

    tokens: torch.Tensor
    first: torch.Tensor
    counted: torch.Tensor | None = None


@dataclass(frozen=True)
class Request:
    """A request that the adapter decides for: its settings, its place, its budgets, and its key."""

    settings: RequestSettings
    slot: Slot
    budget: int
    key: int

    @property
    def columns(self) -> tuple[int, int, int, int]:
        """What [`Rows`] holds of it."""
        return self.slot.index, self.budget, self.settings.samples or 1, self.key


class ServedAdapter:
    """
    Decides for the rows of a worker's model.

    Args:
        policy ([`DecodingPolicy`]): On the model's device, in evaluation mode.
        source (`str`): Where it came from, for messages.
        engine (`str`): Id of the engine; what runs in it finds the adapter by it.
        seed (`int`): Of the random numbers of requests that have no seed of their own.
        device (`torch.device`): The model's.
    """

    def __init__(self, policy: DecodingPolicy, source: str, engine: str, seed: int, device: torch.device) -> None:
        self.policy, self.source = policy, source
        self._device = device
        self.recorder = Recorder()
        self.slots = Slots()
        self._held = HeldDecisions()
        self._seed, self._requests = seed, 0
        self._hidden: torch.Tensor | None = None
        self._read = 0
        # Where the runner has names for requests: of those in its slots, of those in the batch, of the others.
        self.ids: dict[int, str] = {}
        self._running: dict[str, Request] = {}
        self._away: OrderedDict[str, Request] = OrderedDict()
        _SERVED[engine] = self

    def hear(self, hidden: torch.Tensor) -> None:
        """Keeps the hidden states `[rows, H]` of the logits that come next."""
        self._hidden, self._read = hidden, 0

    def next_hidden(self, rows: int) -> torch.Tensor:
        """The hidden states of the next `rows` rows of logits: a large batch is sampled in parts."""
        if self._hidden is None or self._read + rows > self._hidden.shape[0]:
            raise AdapterLoadError(
                f"{rows} rows of logits came without their hidden states; this version of vLLM computes logits in a "
                "way that the adapter does not know."
            )
        self._read += rows
        return self._hidden[self._read - rows : self._read]

    def request(self, settings: RequestSettings, max_tokens: int | None, seed: int | None, owner: Any) -> Request:
        """A new request; `owner` tells later whether a place is its own."""
        self._requests += 1
        key = row_key(self._seed, "request", self._requests) if seed is None else row_key(seed)
        budget = settings.token_budget or max_tokens or MAX_BUDGET
        request = Request(settings, self.slots.take(owner), budget, key)
        self.policy.warn_beyond(settings.token_budget, settings.samples)
        self.recorder.enter(request.slot.index, settings)
        return request

    def enter(self, place: int, params: Any) -> Request:
        """The request whose id stands in `ids` at this place of the runner's; it may have been here before."""
        name = self.ids[place]
        request = self._away.pop(name, None)
        if request is None:
            request = self.request(read_settings(params.extra_args), params.max_tokens, params.seed, owner=name)
        self.recorder.come_back(request.slot.index)
        self._running[name] = request
        return request

    def leave(self, name: str) -> None:
        """The request has ended or was put off."""
        request = self._running.pop(name, None)
        if request is None:
            return
        self.recorder.leave(request.slot.index)
        self._away[name] = request
        while len(self._away) > _MAX_AWAY:
            self._away.popitem(last=False)

    @torch.no_grad()
    def warp(self, logits: torch.Tensor, hidden: torch.Tensor, steps: Steps, rows: Rows, inplace: bool) -> torch.Tensor:
        """
        Logits `[N, V]` → warped logits `[N, V]`, `torch.float32`. Nothing waits for an accelerator.

        Args:
            logits (`torch.Tensor` of shape `[N, V]`): With what is forbidden at -inf.
            hidden (`torch.Tensor` of shape `[N, H]`): Input of the output embedding.
            steps ([`Steps`]): Where they are in their requests.
            rows ([`Rows`]): Whose rows they are.
            inplace (`bool`): Whether the logits may be overwritten.
        """
        maxima = row_maxima(logits)
        state = DecodeState(
            hidden,
            logits,
            (rows.budget - steps.tokens).clamp(min=1),
            rows.samples,
            uniform=row_uniforms(rows.keys, steps.tokens, _ACTION_STREAM) if self.policy.has_actions else None,
            maxima=maxima,
        )
        seen: Observation | None = None
        if isinstance(self.policy, ActionPolicy):
            parameters, seen = self.policy.decide(state)
        else:
            parameters = self.policy(state)
        if self.policy.decides_once:
            parameters = self._held.keep(parameters, rows.slots, steps.first)
        self.recorder.add(rows.slots, steps.tokens, steps.counted, parameters, seen)
        return warp_logits(logits, parameters, inplace=inplace, maxima=maxima)

    def load(self, path: str) -> None:
        """
        Replaces the policy's weights, from an adapter's folder or a safetensors file; its settings stay.

        Raises:
            [`AdapterLoadError`]: If the file does not hold this policy's tensors, or the folder another policy's.
        """
        weights = Path(path)
        if not path.endswith(".safetensors"):
            files = locate(path)
            found = files.read_config()
            if _decides_by(found) != _decides_by(self.policy.config):
                raise AdapterLoadError(
                    f"the adapter {path!r} has other settings than the one that is served, {self.source!r}; start the "
                    "engine with it."
                )
            weights = files.weights
        load_into(self.policy, weights)

    def replace(self, path: str) -> None:
        """
        Takes another policy, whatever its settings; requests that are under way would go on by it.

        Raises:
            [`AdapterLoadError`]: If the folder holds no adapter, or one of another shape.
        """
        files = locate(path)
        config = files.read_config()
        own = self.policy.config
        check_shape(config, cast(int, own.hidden_size), cast(int, own.vocab_size), path, "the engine's base")
        self.policy = read_served(path, config, files, self._device)
        self.source = path


def served_by(engine: str) -> ServedAdapter:
    """
    The adapter of an engine, once its model has been made.

    Raises:
        [`AdapterLoadError`]: If the model was made without one.
    """
    adapter = _SERVED.get(engine)
    if adapter is None:
        raise AdapterLoadError("the engine's model was made without an adapter.")
    return adapter


def read_served(source: str, config: AutoDecoConfig, files: Any, device: torch.device) -> DecodingPolicy:
    """An adapter's policy on a device, whatever default device and dtype vLLM has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            policy = read_policy(files, config)
    finally:
        torch.set_default_dtype(before)
    return policy.to(device).eval().requires_grad_(False)


def _decides_by(config: AutoDecoConfig) -> dict[str, Any]:
    """The settings that say how a policy decides, rather than where it came from or how it was trained."""
    names = set(inspect.signature(AutoDecoConfig.__init__).parameters) - _OF_NO_EFFECT - {"self", "kwargs"}
    return {name: vars(config)[name] for name in names}
