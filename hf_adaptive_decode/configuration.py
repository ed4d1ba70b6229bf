"""The settings of one adapter, as saved in its `config.json`; knows nothing of weights, models or hosts."""

from __future__ import annotations

import json
import os
import warnings
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ._version import __version__
from .configuration_checks import (
    check_actions,
    check_entropy_rule,
    check_prior,
    fail,
    is_int,
    is_number,
    is_released_format,
    is_revision,
)
from .errors import AdapterConfigError
from .features import FEATURES

FORMAT_VERSION = 1
HEADS = ("temperature", "top_p")
POLICY_NAMES = ("heads", "token_actions", "sequence_actions", "static", "entropy")
BUDGETS = ("tokens", "samples")
# What each policy is told of the budget unless the config says otherwise.
_TOLD = {"token_actions": ["tokens"], "sequence_actions": ["samples"]}
MAX_CONFIG_BYTES = 1 << 20
# What transformers itself puts into a config's constructor; its other settings mean nothing for an adapter, and some
# (a billion labels) are dangerous in a downloaded file.
_INHERITED = {"architectures", "model_type", "transformers_version", "name_or_path", "_name_or_path"}
# What some releases of transformers 5 write into every config, though it says how to run a model and not what it is.
_RUNTIME = {"attn_implementation", "experts_implementation", "output_attentions"}
_MAX_WIDTH = 1 << 16


class AutoDecoConfig(PreTrainedConfig):
    """
    Settings of a decoding adapter.

    Args:
        policy (`str`, defaults to `"heads"`):
            `"heads"`: temperature and top-p per token (AutoDeco, section 2.2). `"token_actions"`, `"sequence_actions"`:
            one of `actions` per token or per prompt (Adaptive Decoding, section 2). `"static"`: fixed parameters, or a
            mixture of them. `"entropy"`: temperature by a rule from the entropy of the distribution to be sampled.
        heads (sequence of `str`, defaults to `("temperature", "top_p")`):
            Which heads a `"heads"` policy has; a parameter without a head is left off.
        head_hidden_size (`int`, defaults to 256):
            Width of a head's hidden layer.
        top_p_head_hidden_size (`int`, *optional*):
            That of the top-p head, where it is another one.
        features (sequence of `str`, defaults to `("hidden",)`):
            What the policy sees: the hidden state (`"hidden"`); max p, entropy, variance and top-5 mass of the
            distribution to be sampled (`"statistics"`); or its entropy alone (`"entropy"`).
        top_p_statistics (`bool`, defaults to `False`):
            Whether the top-p head alone also sees such statistics of that distribution at the predicted temperature, as
            AutoDeco's released heads do; see [`~features.scaled_statistics`].
        detach_temperature (`bool`, defaults to `False`):
            Whether the top-p head sees the temperature without sending gradient back through it.
        temperature_range (`tuple` of two `float`, defaults to `(0.0, 2.0)`):
            Open interval that the temperature head's sigmoid is stretched over.
        top_p_range (`tuple` of two `float`, defaults to `(0.0, 1.0)`):
            The same for the top-p head.
        actions (list of `dict`, *optional*):
            Sampling configurations with keys among `temperature`, `top_k`, `top_p`, `min_p`; temperature 0 is greedy.
        action_weights (list of `float`, *optional*):
            Probability of each action in a `"static"` mixture; uniform when `None`.
        mixture_per (`str`, defaults to `"token"`):
            What a `"static"` mixture draws an action for: each `"token"`, or each `"sequence"`, which then keeps it.
        entropy_rule (`dict`, *optional*):
            What an `"entropy"` policy does, see [`EntropyPolicy`]: `{"name": "edt", "temperature": T0, "theta": θ}`
            (with `"base"`, 0.8 unless given), or `{"name": "dynatemp", "low": .., "high": ..}` (with `"exponent"`, 1
            unless given); either with an optional `"top_p"`.
        budget_features (sequence of `str`, *optional*):
            What an action policy knows of the budget, among `"tokens"` (b_t) and `"samples"` (B); an empty list makes
            the twin without a budget. By default b_t per token and B per sequence.
        max_token_budget (`int`, defaults to 1024): Largest remaining token budget that an action policy tells apart.
        max_parallel_budget (`int`, defaults to 64): Largest number of samples that an action policy tells apart.
        policy_hidden_size (`int`, defaults to 128): Width of an action policy's two hidden layers.
        policy_dropout (`float`, defaults to 0.1): Their dropout in training.
        action_temperature (`float`, defaults to 1.0): Divides an action policy's logits.
        deterministic (`bool`, defaults to `False`): Whether an action policy takes its likeliest action.
        max_prob_mask (`float`, *optional*):
            Where the base's largest probability is above this, the policy (not `"sequence_actions"`) does not decide.
        masked_steps (`str`, defaults to `"greedy"`):
            How such a token is decoded: `"greedy"`, or `"prior"`, with the likeliest action of `action_prior`.
        action_prior (list of `dict`, *optional*):
            Where an action policy starts: entries `{"samples": B, "probabilities": [one an action]}`.
        pooling (`str`, defaults to `"last"`):
            What of the prompt a `"sequence_actions"` policy reads: the last token's hidden state, or their `"mean"`.
        base_model_name_or_path (`str`, *optional*): Folder or Hub id of the frozen base model.
        base_model_revision (`str`, *optional*): Its commit.
        hidden_size (`int`, *optional*): Width of the base's output embedding; filled in by `from_base`.
        vocab_size (`int`, *optional*): Rows of the base's output embedding; filled in by `from_base`.
        base_fingerprint (`str`, *optional*): Digest of the base's architecture settings.
        format_version (`int`): Layout of the adapter's files; a newer one than this library knows is refused.

    Raises:
        [`AdapterConfigError`]: If a setting is unknown, out of range, or at odds with another.
    """

    model_type = "autodeco"

    def __init__(
        self,
        policy: str = "heads",
        heads: tuple[str, ...] | list[str] = HEADS,
        head_hidden_size: int = 256,
        top_p_head_hidden_size: int | None = None,
        features: tuple[str, ...] | list[str] = ("hidden",),
        top_p_statistics: bool = False,
        detach_temperature: bool = False,
        temperature_range: tuple[float, float] | list[float] = (0.0, 2.0),
        top_p_range: tuple[float, float] | list[float] = (0.0, 1.0),
        actions: list[dict[str, float]] | None = None,
        action_weights: list[float] | None = None,
        mixture_per: str = "token",
        entropy_rule: dict[str, Any] | None = None,
        budget_features: tuple[str, ...] | list[str] | None = None,
        max_token_budget: int = 1024,
        max_parallel_budget: int = 64,
        policy_hidden_size: int = 128,
        policy_dropout: float = 0.1,
        action_temperature: float = 1.0,
        deterministic: bool = False,
        max_prob_mask: float | None = None,
        masked_steps: str = "greedy",
        action_prior: list[dict[str, Any]] | None = None,
        pooling: str = "last",
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        hidden_size: int | None = None,
        vocab_size: int | None = None,
        base_fingerprint: str | None = None,
        format_version: int = FORMAT_VERSION,
        library_version: str = __version__,
        **kwargs: Any,
    ) -> None:
        self.policy, self.heads = policy, heads
        self.head_hidden_size, self.top_p_head_hidden_size = head_hidden_size, top_p_head_hidden_size
        self.features, self.top_p_statistics = features, top_p_statistics
        self.detach_temperature = detach_temperature
        self.temperature_range, self.top_p_range = temperature_range, top_p_range
        self.actions = actions
        self.action_weights, self.mixture_per = action_weights, mixture_per
        self.entropy_rule = entropy_rule
        self.budget_features = _TOLD.get(str(policy), []) if budget_features is None else budget_features
        self.max_token_budget, self.max_parallel_budget = max_token_budget, max_parallel_budget
        self.policy_hidden_size, self.policy_dropout = policy_hidden_size, policy_dropout
        self.action_temperature = action_temperature
        self.deterministic = deterministic
        self.max_prob_mask = max_prob_mask
        self.masked_steps, self.action_prior = masked_steps, action_prior
        self.pooling = pooling
        self.base_model_name_or_path, self.base_model_revision = base_model_name_or_path, base_model_revision
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.base_fingerprint = base_fingerprint
        self.format_version, self.library_version = format_version, library_version
        _check(self)
        self.heads, self.features, self.budget_features = list(heads), list(features), list(self.budget_features)
        self.temperature_range, self.top_p_range = list(temperature_range), list(top_p_range)
        super().__init__(**_inherited(kwargs))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As of any config; how the base is to be run is what the caller says, never what a file does."""
        made = super().from_dict(config_dict, **kwargs)
        for name in _RUNTIME & kwargs.keys():
            setattr(made[0] if isinstance(made, tuple) else made, f"_{name}", kwargs[name])
        return made


def absorbed_settings(config: PreTrainedConfig | None) -> dict[str, Any]:
    """How to run the base: what the Auto classes took from their caller and put into the adapter's config."""
    if config is None:
        return {}
    taken = {name: getattr(config, f"_{name}", None) for name in sorted(_RUNTIME)}
    return {name: value for name, value in taken.items() if value}


def _inherited(given: dict[str, Any]) -> dict[str, Any]:
    """Of the settings that are not ours, those that transformers may have; the rest is dropped, with a warning."""
    kept = {
        name: value
        for name, value in given.items()
        # What runs a model (an attention may be code from the Hub) is for the caller to say, not for a file.
        if name in _INHERITED or (name.startswith("_") and name.lstrip("_") not in _RUNTIME)
    }
    unknown = sorted(set(given) - set(kept) - set(vars(PreTrainedConfig())) - _RUNTIME)
    # A released checkpoint's config holds its base's, and the Auto classes make one of these of it before it is read.
    if unknown and not is_released_format({"model_type": AutoDecoConfig.model_type, **given}):
        warnings.warn(f"settings that this version does not know are dropped: {', '.join(unknown)}.", stacklevel=3)
    for name in _INHERITED & set(kept) - {"architectures"}:
        if not isinstance(kept[name], str | os.PathLike | None):
            fail(name, kept[name], "a string")
    return {**kept, "architectures": ["AutoDecoForCausalLM"]}  # whatever a file claims


def _check(config: AutoDecoConfig) -> None:
    version = config.format_version
    if not is_int(version, 1, 1 << 30):
        fail("format_version", version, "a positive whole number")
    if version > FORMAT_VERSION:
        raise AdapterConfigError(
            f"the adapter has format_version {version} (written by hf_adaptive_decode {config.library_version}); this "
            f"version ({__version__}) reads up to {FORMAT_VERSION}: pip install -U hf_adaptive_decode"
        )
    if config.policy not in POLICY_NAMES:
        fail("policy", config.policy, f"one of {', '.join(POLICY_NAMES)}")
    for name in ("head_hidden_size", "top_p_head_hidden_size", "policy_hidden_size"):
        value = vars(config)[name]
        if not is_int(value, 1, _MAX_WIDTH) and not (value is None and name == "top_p_head_hidden_size"):
            fail(name, value, f"a whole number from 1 to {_MAX_WIDTH}")
    for name in ("hidden_size", "vocab_size"):
        value = vars(config)[name]
        if value is not None and not is_int(value, 1, 1 << 24):
            fail(name, value, "a positive whole number below 2^24")
    for name in ("detach_temperature", "deterministic", "top_p_statistics"):
        if not isinstance(vars(config)[name], bool):
            fail(name, vars(config)[name], "true or false")
    _check_budgets(config)
    for name in ("base_model_name_or_path", "base_model_revision", "base_fingerprint", "library_version"):
        value = vars(config)[name]
        if value is not None and not isinstance(value, str):
            fail(name, value, "a string")
    if not is_revision(config.base_model_revision or "main"):
        fail("base_model_revision", config.base_model_revision, "a branch, a tag or a commit, and no path")
    _check_heads(config)
    _check_actions(config)
    _check_baselines(config)


def _check_heads(config: AutoDecoConfig) -> None:
    for name, allowed in (("heads", HEADS), ("features", FEATURES)):
        value = vars(config)[name]
        ok = isinstance(value, list | tuple) and value and all(isinstance(v, str) and v in allowed for v in value)
        if not ok or len(set(value)) != len(value):
            fail(name, value, f"a list of one or more of {allowed}, each once")
    for name in ("top_p_statistics", "top_p_head_hidden_size"):
        if vars(config)[name] and (config.policy != "heads" or "top_p" not in config.heads):
            raise AdapterConfigError(
                f'`{name}` is for a top-p head; policy "{config.policy}" with `heads` {config.heads} has none.'
            )
    for name, top in (("temperature_range", 100.0), ("top_p_range", 1.0)):
        value = vars(config)[name]
        ok = isinstance(value, list | tuple) and len(value) == 2 and all(is_number(v) for v in value)
        if not ok or not 0 <= value[0] < value[1] <= top:
            fail(name, value, f"two numbers low < high within [0, {top:g}]")


def _check_budgets(config: AutoDecoConfig) -> None:
    told = config.budget_features
    if not isinstance(told, list | tuple) or any(name not in BUDGETS for name in told) or len(set(told)) != len(told):
        fail("budget_features", told, f"a list of names among {BUDGETS}, each at most once")
    for name in ("max_token_budget", "max_parallel_budget"):
        if not is_int(vars(config)[name], 2, 1 << 24):
            fail(name, vars(config)[name], "a whole number from 2 to 2^24")
    decides_once = config.policy == "sequence_actions" or config.mixture_per == "sequence"
    if config.max_prob_mask is not None and (decides_once or config.policy == "entropy"):
        why = "decides once for all of them" if decides_once else "sees by itself where the model is sure"
        raise AdapterConfigError(f'`max_prob_mask` judges tokens, and policy "{config.policy}" {why}; leave it out.')
    for name, allowed in (("masked_steps", ("greedy", "prior")), ("pooling", ("last", "mean"))):
        if vars(config)[name] not in allowed:
            fail(name, vars(config)[name], f"one of {allowed}")
    if config.pooling == "mean" and config.policy != "sequence_actions":
        raise AdapterConfigError(f'`pooling="mean"` is for policy "sequence_actions"; this one is "{config.policy}".')
    if config.masked_steps == "prior" and not config.action_prior:
        raise AdapterConfigError('`masked_steps="prior"` needs an `action_prior` to take the action from.')
    bounds = {"policy_dropout": (0, 0.99), "action_temperature": (1e-3, 1e3), "max_prob_mask": (0, 1)}
    for name, (low, high) in bounds.items():
        value = vars(config)[name]
        if value is None and name == "max_prob_mask":
            continue
        if not is_number(value) or not low <= value <= high:
            fail(name, value, f"a number from {low} to {high}")


def _check_actions(config: AutoDecoConfig) -> None:
    if config.policy not in ("heads", "entropy") and not config.actions:
        raise AdapterConfigError(
            f'policy "{config.policy}" needs `actions`, a list of at least one sampling configuration such as '
            '[{"temperature": 0.7, "top_p": 0.9}].'
        )
    if config.actions is not None:
        check_actions(config.actions, config.action_weights)
        check_prior(config.action_prior, len(config.actions))


def _check_baselines(config: AutoDecoConfig) -> None:
    """The settings that only policies without weights have."""
    if config.mixture_per not in ("token", "sequence"):
        fail("mixture_per", config.mixture_per, "one of ('token', 'sequence')")
    if config.mixture_per == "sequence" and config.policy != "static":
        raise AdapterConfigError(f'`mixture_per="sequence"` is for policy "static"; this one is "{config.policy}".')
    if (config.entropy_rule is not None) != (config.policy == "entropy"):
        raise AdapterConfigError(
            f'`entropy_rule` is {config.entropy_rule!r}; policy "entropy" needs one and the others take none, and this '
            f'one is "{config.policy}".'
        )
    if config.entropy_rule is not None:
        check_entropy_rule(config.entropy_rule)


def read_config(path: str | os.PathLike[str]) -> AutoDecoConfig:
    """
    Reads an adapter's `config.json` without trusting it.

    Raises:
        [`AdapterConfigError`]: If the file is over 1 MiB, is no JSON object, is no adapter's, or holds a bad setting.
    """
    values = read_settings(path)
    if values.get("model_type") != AutoDecoConfig.model_type:
        raise AdapterConfigError(
            f"{path} has model_type {values.get('model_type')!r}; a decoding adapter's is 'autodeco'. Is this the "
            "folder of a base model? Wrap that with `AutoDecoForCausalLM.from_base`."
        )
    if is_released_format(values):
        raise AdapterConfigError(
            f"{path} is of AutoDeco's released format, whose settings are not an adapter's; make an adapter of it: "
            "`hf-adaptive-decode convert SOURCE TARGET --to adapter`."
        )
    config: AutoDecoConfig = AutoDecoConfig.from_dict(values)
    return config


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """
    The settings in a `config.json`, unchecked but for their number.

    Raises:
        [`AdapterConfigError`]: If the file is over 1 MiB or is no JSON object.
    """
    if os.path.getsize(path) > MAX_CONFIG_BYTES:
        raise AdapterConfigError(f"{path} has {os.path.getsize(path)} bytes; an adapter's config has at most 1 MiB.")
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except (ValueError, RecursionError) as error:
        raise AdapterConfigError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise AdapterConfigError(f"{path} holds a JSON {type(values).__name__}; an adapter's config is an object.")
    return values


AutoConfig.register(AutoDecoConfig.model_type, AutoDecoConfig, exist_ok=True)
