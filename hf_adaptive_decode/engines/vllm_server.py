"""A vLLM server as an engine, by its OpenAI-compatible completions; knows HTTP, nothing of how a policy decides."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from transformers import PreTrainedModel

from ..errors import UnsupportedGenerationError
from .per_request import PerRequestEngine, check_lengths
from .records import Rows

_TIMEOUT = 3600.0
# A server that adds an adapter of its own to its base leaves these requests alone; any other ignores this.
_OPT_OUT = {"adaptive_decoding": "false"}
# What the server's own generation config could say, and is not to.
_NEUTRAL = {"repetition_penalty": 1.0}


class VLLMServerEngine(PerRequestEngine):
    """
    `vllm serve BASE` on other hardware: static settings, mixtures of them a sequence, and policies that decide once.

    What decides is read off the prompts by `model`, here, so that a server never needs a policy's weights and training
    never waits for a transfer. Policies that decide at every token are refused: their decisions would be the server's,
    and HTTP does not bring back what they saw.

    Seeds and what they guarantee are those of [`VLLMEngine`].

    Args:
        model, tokenizer, batch_rows: As an [`Engine`] takes them; `batch_rows` is how many requests are under way.
        url (`str`): Where the server is, such as `"http://localhost:8000"`.
        served_model (`str`, *optional*): What the server calls the model; by default the first that it names.
        timeout (`float`): Seconds that a request may take.

    Raises:
        [`UnsupportedGenerationError`]: If the server cannot be reached, or refuses a request; with its words.
    """

    name = "vllm_server"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        batch_rows: int | None = 256,
        url: str = "http://localhost:8000",
        served_model: str | None = None,
        timeout: float = _TIMEOUT,
    ) -> None:
        super().__init__(model, tokenizer, batch_rows=batch_rows)
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"`url` is {url!r}; it has to begin with http:// or https://.")
        self._url, self._timeout, self._served = url.rstrip("/").removesuffix("/v1"), timeout, served_model

    def _run(self, rows: Rows, settings: Sequence[dict[str, Any]]) -> Iterator[dict[int, list[int]]]:
        models = self._ask("models")["data"]
        served = next((one for one in models if self._served in (None, one["id"])), None)
        if served is None:
            names = ", ".join(repr(one["id"]) for one in models)
            raise UnsupportedGenerationError(f"{self._url} serves {names}, and no model {self._served!r}.")
        if served.get("max_model_len"):
            check_lengths(rows, served["max_model_len"])
        asked = zip(rows.prompt.tolist(), rows.token_budget.tolist(), rows.keys.tolist(), settings, strict=True)
        fixed = {"model": served["id"], "return_token_ids": True, "vllm_xargs": _OPT_OUT, **_NEUTRAL}
        bodies = [
            {**fixed, "prompt": rows.prompts[place], **self._limits(budget, key), **how}
            for place, budget, key, how in asked
        ]
        with ThreadPoolExecutor(max_workers=min(len(bodies), self.batch_rows or len(bodies))) as pool:
            rows_of = {pool.submit(self._ask, "completions", body): row for row, body in enumerate(bodies)}
            try:
                for done in as_completed(rows_of):
                    yield {rows_of[done]: list(done.result()["choices"][0]["token_ids"])}
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, what: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310  # the scheme is checked above
            f"{self._url}/v1/{what}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:  # noqa: S310
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            raise UnsupportedGenerationError(f"{self._url} refused a request (HTTP {error.code}): {said}") from error
        except OSError as error:
            raise UnsupportedGenerationError(
                f"no vLLM answers at {self._url} ({error}); start one with `vllm serve BASE`, or pass another `url`."
            ) from error
