"""What an engine's workers can be asked to do with their adapter, by name and with plain data; knows no policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .served import ServedAdapter


class AdapterWorker:
    """Methods that the plugin adds to vLLM's worker, for `LLM.collective_rpc(NAME, args=...)`."""

    vllm_config: Any

    def load_decoding_adapter(self, path: str) -> None:
        """
        Replaces the policy's weights while the engine runs; requests under way go on with them.

        Args:
            path (`str`): An adapter's folder, or a safetensors file with its policy's tensors, where the worker runs.
        """
        self._decoding_adapter().load(path)

    def replace_decoding_adapter(self, path: str) -> None:
        """
        Replaces the policy, by one of whatever kind, while no request is under way.

        Args:
            path (`str`): An adapter's folder, where the worker runs.
        """
        self._decoding_adapter().replace(path)

    def take_decoding_traces(self, tags: list[str]) -> dict[str, list[dict[str, Any]]]:
        """What was decided for requests with these values of `decoding_trace`; see [`~records.Recorder.take`]."""
        return self._decoding_adapter().recorder.take(tags)

    def _decoding_adapter(self) -> ServedAdapter:
        from .served import served_by

        return served_by(self.vllm_config.instance_id)
