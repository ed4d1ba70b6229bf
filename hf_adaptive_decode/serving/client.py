"""Asks a running engine for its adapter's traces and gives it new weights; it imports no engine itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load

from ..types import Observation, SamplingParameters


@dataclass(frozen=True)
class RequestTrace:
    """
    What was decided for one sequence of `L` tokens.

    Args:
        parameters ([`SamplingParameters`]): Fields of shape `[L]`; `action` for policies that have actions.
        observation ([`Observation`], *optional*): What the policy saw, where `decoding_observation` asked for it.
    """

    parameters: SamplingParameters
    observation: Observation | None = None


def take_traces(llm: Any, tags: Sequence[str]) -> dict[str, list[RequestTrace]]:
    """
    What was decided for requests of these tags; the engine keeps it no longer.

    Args:
        llm (`vllm.LLM`): Whose requests had `extra_args={"decoding_trace": TAG}`.
        tags (sequence of `str`): Their tags.

    Returns:
        `dict` of tag to one [`RequestTrace`] a sequence, in the order of `n`; an empty list for an unknown tag. Under
        speculative decoding a trace may be longer than the completion, by drafts behind its end.
    """
    found = llm.collective_rpc("take_decoding_traces", args=(list(tags),))
    records = next((of_worker for of_worker in found if any(of_worker.values())), found[0])
    return {tag: [_trace(record) for record in records[tag]] for tag in tags}


def load_adapter(llm: Any, path: str | os.PathLike[str]) -> None:
    """
    New weights for the policy of a running engine: an adapter's folder, or a safetensors file of its tensors.

    Raises:
        `Exception`: As the engine passes a worker's [`AdapterLoadError`] on.
    """
    llm.collective_rpc("load_decoding_adapter", args=(os.fspath(path),))


def replace_adapter(llm: Any, path: str | os.PathLike[str]) -> None:
    """
    Another policy for a running engine between two requests, of whatever kind: an adapter's folder on the same base.

    Raises:
        `Exception`: As the engine passes a worker's [`AdapterLoadError`] on.
    """
    llm.collective_rpc("replace_decoding_adapter", args=(os.fspath(path),))


def _trace(record: dict[str, Any]) -> RequestTrace:
    columns = {name: torch.tensor(record[name], dtype=torch.float32) for name in ("temperature", "top_p", "min_p")}
    action = torch.tensor(record["action"], dtype=torch.long) if record["action"] else None
    parameters = SamplingParameters(top_k=torch.tensor(record["top_k"], dtype=torch.long), action=action, **columns)
    seen = record.get("observation")
    return RequestTrace(parameters, None if seen is None else Observation(**load(seen)))
