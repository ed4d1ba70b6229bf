"""Tiny bases and adapters in folders, engines that serve them, and what every token should have been sampled from."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM
from hf_adaptive_decode.policies import HeadsPolicy
from hf_adaptive_decode.serving.client import take_traces
from hf_adaptive_decode.types import DecodeState

VOCABULARY, HIDDEN, EOS = 160, 64, 2
TOLERANCE = 1e-3
# An engine that is collected takes the process groups of the others along.
_ALIVE: list[Any] = []
STARTS_WITHIN = 240
FOLDER = Path(tempfile.mkdtemp(prefix="served-"))
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
_KINDS = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
ACTIONS = [
    {"temperature": 0.0},
    {"temperature": 0.5, "top_p": 0.7},
    {"temperature": 1.0, "top_k": 12},
    {"temperature": 1.4, "min_p": 0.05, "top_p": 0.95},
]
POLICIES: dict[str, dict[str, Any]] = {
    "heads": {"policy": "heads"},
    "heads_statistics": {"policy": "heads", "features": ["hidden", "statistics"], "top_p_statistics": True},
    "token_actions": {"policy": "token_actions", "actions": ACTIONS, "max_token_budget": 32},
    "token_actions_masked": {
        "policy": "token_actions",
        "actions": ACTIONS,
        "max_token_budget": 32,
        "max_prob_mask": 0.5,
        "features": ["hidden", "entropy"],
    },
    "sequence_actions": {"policy": "sequence_actions", "actions": ACTIONS, "budget_features": ["samples", "tokens"]},
    "static": {"policy": "static", "actions": [{"temperature": 0.7, "top_p": 0.9}]},
    "mixture": {"policy": "static", "actions": ACTIONS, "mixture_per": "sequence", "action_weights": [1, 2, 3, 4]},
    "entropy": {"policy": "entropy", "entropy_rule": {"name": "edt", "temperature": 1.2, "theta": 0.5, "top_p": 0.9}},
}


def base_folder(family: str = "qwen3") -> Path:
    """A tiny base model, saved with sampling values of its own, which an adapter's engine may not use."""
    folder = FOLDER / family
    if not folder.exists():
        config, model = _KINDS[family]
        with torch.random.fork_rng():
            torch.manual_seed(3)
            base = model(config(**_SHAPE))
        spread = base(tiny.prompts(4, 12)).logits.std()
        with torch.no_grad():
            base.lm_head.weight.mul_(2.5 / spread)
        base.generation_config.temperature, base.generation_config.top_p = 0.3, 0.5
        base.generation_config.do_sample = True
        base.save_pretrained(folder)
    return folder


def adapter_folder(name: str, family: str = "qwen3", **settings: Any) -> Path:
    """A saved adapter whose policy differs from token to token."""
    folder = FOLDER / f"{family}-{name}"
    if not folder.exists():
        model = AutoDecoForCausalLM.from_base(base_folder(family), AutoDecoConfig(**POLICIES[name], **settings))
        spread_out(model)
        model.save_pretrained(folder)
    return folder


def spread_out(model: AutoDecoForCausalLM, seed: int = 0) -> None:
    """Random weights whose outputs differ from token to token, within what double precision and fp32 agree on."""
    policy = model.decoding_adapter
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        spread = 1.5 if name.startswith("layers.2") or ".out." in name else 1.0
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread / parameter.shape[-1] ** 0.5
    if isinstance(policy, HeadsPolicy):
        policy.top_p_head.out.bias.data.fill_(1.0)


def engine(model: Path, alone: bool = True, **settings: Any) -> Any:
    """A vLLM engine in this process; those before it are let go, unless it is not to be `alone`."""
    from vllm import LLM

    if alone:
        _ALIVE.clear()
        gc.collect()

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 16,
        "distributed_executor_backend": "uni",
        "skip_tokenizer_init": True,
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": -1,
        "seed": 0,
        "kv_cache_memory_bytes": 32 << 20,
    }
    made = LLM(model=str(model), **(defaults | settings))
    _ALIVE.append(made)
    return made


def sampling(**settings: Any) -> Any:
    """Full-vocabulary logprobs of every token."""
    from vllm import SamplingParams

    return SamplingParams(**({"logprobs": -1, "ignore_eos": True, "detokenize": False, "max_tokens": 12} | settings))


@dataclass(frozen=True)
class Asked:
    """A request: its prompt and its parameters."""

    prompt: list[int]
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def extra(self) -> dict[str, Any]:
        return self.params.get("extra_args") or {}


def run(llm: Any, asked: list[Asked]) -> list[Any]:
    """The engine's outputs, in order."""
    prompts = [{"prompt_token_ids": one.prompt} for one in asked]
    return llm.generate(prompts, [sampling(**one.params) for one in asked], use_tqdm=False)


class Truth:
    """What each token of a completion should have been sampled from, computed with transformers and numpy alone."""

    def __init__(self, adapter: Path, family: str = "qwen3") -> None:
        self.model = AutoDecoForCausalLM.from_pretrained(adapter, base_folder(family))
        self.policy = self.model.decoding_adapter

    def logprobs(self, one: Asked, tokens: list[int], actions: list[int] | None) -> np.ndarray:
        """`[tokens, V]`, teacher-forced; the policy's own `actions` where it draws them."""
        ids = torch.tensor([[*one.prompt, *tokens]])
        hidden, logits = tiny.hidden_and_logits(self.model, ids)
        first = len(one.prompt) - 1
        hidden, logits = hidden[0, first:-1], logits[0, first:-1]
        if one.params.get("temperature") == 0:
            return log_softmax(logits.double().numpy())
        if one.extra.get("adaptive_decoding") is False:
            fixed = {name: one.params[name] for name in ("temperature", "top_p") if name in one.params}
            return np.stack([warp(row, **fixed) for row in logits.double().numpy()])
        return np.stack(
            [
                warp(row, **how)
                for row, how in zip(logits.double().numpy(), self._how(one, hidden, logits, actions), strict=True)
            ]
        )

    def _how(self, one: Asked, hidden: Any, logits: Any, actions: list[int] | None) -> list[dict[str, float]]:
        count = len(hidden)
        if self.policy.config.policy == "heads" and not self.policy.needs_logits:
            temperature, top_p = tiny.heads_by_hand(self.policy, hidden)
            return [{"temperature": t, "top_p": p} for t, p in zip(temperature.tolist(), top_p.tolist(), strict=True)]
        if actions:
            return [{"temperature": 0.0} if action < 0 else self.policy.config.actions[action] for action in actions]
        budget = one.extra.get("token_budget", one.params.get("max_tokens", 12))
        state = DecodeState(hidden, logits, torch.arange(budget, budget - count, -1).clamp(min=1))
        parameters = {k: v for k, v in vars(self.policy(state)).items() if v is not None and k != "action"}
        rows = {name: torch.as_tensor(values).expand(count).tolist() for name, values in parameters.items()}
        return [{name: values[row] for name, values in rows.items()} for row in range(count)]

    def sure(self, one: Asked, tokens: list[int]) -> list[bool]:
        """Where the base's largest probability is above the policy's `max_prob_mask`."""
        _, logits = tiny.hidden_and_logits(self.model, torch.tensor([[*one.prompt, *tokens]]))
        found = logits[0, len(one.prompt) - 1 : -1].softmax(-1).amax(-1)
        return (found > self.policy.config.max_prob_mask).tolist()

    def action_probabilities(self, one: Asked, tokens: list[int]) -> torch.Tensor:
        """π(a | state) at each of the tokens, `[tokens, actions]`."""
        ids = torch.tensor([[*one.prompt, *tokens]])
        hidden, logits = tiny.hidden_and_logits(self.model, ids)
        rows = slice(len(one.prompt) - 1, -1)
        budget = one.extra.get("token_budget", one.params.get("max_tokens", 12))
        left = torch.arange(budget, budget - len(tokens), -1).clamp(min=1)
        samples = torch.full_like(left, one.extra.get("parallel_budget", 1))
        state = DecodeState(hidden[0, rows], logits[0, rows], left, samples)
        return self.policy.action_logits(self.policy.observe(state)).softmax(-1)


def warp(logits: np.ndarray, temperature: float = 1.0, top_k: float = 0, top_p: float = 1.0, min_p: float = 0.0) -> Any:
    """Log-probabilities of one row, by sorting it: temperature, top-k, top-p, min-p in double precision."""
    if temperature == 0:
        return np.where(np.arange(len(logits)) == logits.argmax(), 0.0, -np.inf)
    scores = logits / temperature
    order = np.argsort(-scores, kind="stable")
    kept = np.ones(len(scores), dtype=bool)
    if top_k:
        kept[order[int(top_k) :]] = False
    if top_p < 1:
        sorted_mass = np.exp(log_softmax(np.where(kept, scores, -np.inf)))[order]
        before = np.cumsum(sorted_mass) - sorted_mass
        kept[order[before >= top_p]] = False
        kept[order[0]] = True
    if min_p:
        mass = np.exp(log_softmax(np.where(kept, scores, -np.inf)))
        kept &= mass >= min_p * mass.max()
    return log_softmax(np.where(kept, scores, -np.inf))


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    top = scores.max(-1, keepdims=True)
    return scores - top - np.log(np.exp(scores - top).sum(-1, keepdims=True))


def full_logprobs(completion: Any) -> np.ndarray:
    """`[tokens, V]` of a completion that asked for all of them."""
    return np.array([[row[token].logprob for token in range(VOCABULARY)] for row in completion.logprobs])


def differences(found: np.ndarray, wanted: np.ndarray) -> tuple[float, int]:
    """The largest difference where both are finite, and how many tokens only one of them allows."""
    both = np.isfinite(found) & np.isfinite(wanted)
    return float(np.abs(found[both] - wanted[both]).max()), int((np.isfinite(found) != np.isfinite(wanted)).sum())


def hold_against_truth(truth: Truth, llm: Any, asked: list[Asked], outputs: list[Any]) -> int:
    """Every token's full log-probabilities are the truth's, and it is one of those allowed; how many there were."""
    tags = [one.extra.get("decoding_trace") for one in asked]
    traces = take_traces(llm, [tag for tag in tags if tag])
    worst, mismatches, rows = 0.0, 0, 0
    for one, output, tag in zip(asked, outputs, tags, strict=True):
        for number, completion in enumerate(output.outputs):
            tokens = list(completion.token_ids)
            action = traces[tag][number].parameters.action if tag else None
            actions = None if action is None else action.tolist()
            # Drafts behind the end of a completion have been decided for, too.
            actions = None if actions is None else actions[: len(tokens)]
            assert actions is None or len(actions) == len(tokens)
            if actions is not None and truth.policy.config.max_prob_mask is not None:
                assert [action < 0 for action in actions] == truth.sure(one, tokens)
            wanted = truth.logprobs(one, tokens, actions)
            found = full_logprobs(completion)
            difference, mismatched = differences(found, wanted)
            worst, mismatches, rows = max(worst, difference), mismatches + mismatched, rows + len(tokens)
            assert np.isfinite(found[np.arange(len(tokens)), tokens]).all()
    assert worst <= TOLERANCE, worst
    assert mismatches == 0
    return rows


@contextmanager
def running_server(model: Path, log: Path, *options: str) -> Iterator[tuple[str, Path]]:
    """`vllm serve`, on a free port: its address, and where it logs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", *options]
    # Two processes, as anywhere: only tests put the engine into theirs.
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + STARTS_WITHIN
        while not is_up(address):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        yield address, log
    finally:
        process.terminate()
        process.wait(timeout=60)


def is_up(address: str) -> bool:
    """Whether a server answers."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
