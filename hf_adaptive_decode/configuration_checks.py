"""What the values of an adapter's settings may be; knows values, nothing of configs as a whole, policies or files."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any, NoReturn, cast

from .errors import AdapterConfigError, SamplingParameterError
from .types import SamplingParameters
from .warping import check_scalars

ACTION_FIELDS = ("temperature", "top_k", "top_p", "min_p")
# The numbers of each rule: lowest, highest, and what holds where one is left out (`None`: it has to be given).
ENTROPY_RULES: dict[str, dict[str, tuple[float, float, float | None]]] = {
    "edt": {"temperature": (0.0, 100.0, None), "base": (1e-3, 1.0, 0.8), "theta": (0.0, 100.0, None)},
    "dynatemp": {"low": (0.0, 100.0, None), "high": (0.0, 100.0, None), "exponent": (1e-2, 100.0, 1.0)},
}
_OF_EVERY_RULE: dict[str, tuple[float, float, float | None]] = {"top_p": (0.0, 1.0, 1.0)}
# What the configs of AutoDeco's released checkpoints have and ours do not.
_RELEASED_CLASS = "AutoDecoModelForCausalLM"
_RELEASED_SETTINGS = {"enable_temperature_head", "enable_top_p_head", "use_enhanced_features"}
# Of git's names those that are nothing else to a file system or in an address.
_REVISION = re.compile(r"\w[\w.+@-]*(/[\w.+@-]+)*")
_MAX_ACTIONS = 4096
_MAX_PRIORS = 64


def is_released_format(settings: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of a checkpoint as AutoDeco's authors released them, rather than an adapter's."""
    if settings.get("model_type") != "autodeco" or "policy" in settings or "format_version" in settings:
        return False
    named = settings.get("architectures")
    return (isinstance(named, list) and _RELEASED_CLASS in named) or bool(_RELEASED_SETTINGS & set(settings))


def fail(name: str, value: object, wanted: str) -> NoReturn:
    """Raises [`AdapterConfigError`] that names a setting, its value and what it has to be."""
    raise AdapterConfigError(f"`{name}` is {value!r}; it has to be {wanted}.")


def is_int(value: object, low: int, high: int) -> bool:
    """Whether `value` is a whole number from `low` to `high`."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: object) -> bool:
    """Whether `value` is a finite number."""
    # Compared rather than converted: a JSON file may hold whole numbers that no float does.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_revision(value: str) -> bool:
    """Whether `value` may be a branch, tag or commit, which caches make folders of."""
    return ".." not in value and _REVISION.fullmatch(value) is not None


def check_actions(actions: Any, weights: Any) -> None:
    """Raises [`AdapterConfigError`] unless `actions` are sampling configurations, with `weights` that fit or `None`."""
    if not isinstance(actions, list | tuple) or not 1 <= len(actions) <= _MAX_ACTIONS:
        fail("actions", actions, f"a list of 1 to {_MAX_ACTIONS} sampling configurations")
    for index, action in enumerate(actions):
        if not isinstance(action, dict):
            fail(f"actions[{index}]", action, "a dict")
        unknown = sorted(map(str, set(action) - set(ACTION_FIELDS)))
        if unknown:
            fail(f"actions[{index}]", action, f"a dict with keys among {ACTION_FIELDS}, without {unknown}")
        wrong = [name for name, value in action.items() if not is_number(value)]
        if wrong:
            fail(f"actions[{index}]", action, f"a dict of numbers; leave {wrong[0]!r} out to switch it off")
        try:
            check_scalars(SamplingParameters(**cast(dict[str, Any], action)))
        except (SamplingParameterError, TypeError) as error:
            raise AdapterConfigError(f"actions[{index}]: {error}") from error
    if weights is not None and not _are_weights(weights, len(actions)):
        fail("action_weights", weights, f"{len(actions)} numbers of at least 0, one an action, not all 0")


def check_prior(prior: Any, actions: int) -> None:
    """Raises [`AdapterConfigError`] unless `prior` is `None` or gives each B once, with `actions` probabilities."""
    if prior is None:
        return
    if not isinstance(prior, list | tuple) or not 1 <= len(prior) <= _MAX_PRIORS:
        fail("action_prior", prior, f"a list of 1 to {_MAX_PRIORS} entries")
    wanted = f'{{"samples": B, "probabilities": [{actions} numbers of at least 0, not all 0]}}, each B once'
    for index, entry in enumerate(prior):
        fields = isinstance(entry, dict) and set(entry) == {"samples", "probabilities"}
        if not fields or not is_int(entry["samples"], 1, 1 << 24) or not _are_weights(entry["probabilities"], actions):
            fail(f"action_prior[{index}]", entry, wanted)
    if len({entry["samples"] for entry in prior}) < len(prior):
        fail("action_prior", prior, wanted)


def check_entropy_rule(rule: Any) -> None:
    """Raises [`AdapterConfigError`] unless `rule` is one of `ENTROPY_RULES` with all of its numbers in range."""
    name = rule.get("name") if isinstance(rule, dict) else None
    if not isinstance(name, str) or name not in ENTROPY_RULES:
        fail("entropy_rule", rule, f'a dict whose "name" is one of {", ".join(ENTROPY_RULES)}')
    numbers = ENTROPY_RULES[name] | _OF_EVERY_RULE
    needed = {field for field, (_, _, default) in numbers.items() if default is None}
    given = set(rule) - {"name"}
    if given - set(numbers) or needed - given:
        fail(
            "entropy_rule", rule, f'"{name}" with {sorted(needed)} and nothing else but {sorted(set(numbers) - needed)}'
        )
    for field in sorted(given):
        low, high, _ = numbers[field]
        if not is_number(rule[field]) or not low <= rule[field] <= high:
            fail(f"entropy_rule[{field!r}]", rule[field], f"a number from {low:g} to {high:g}")
    if name == "dynatemp" and rule["low"] > rule["high"]:
        fail("entropy_rule", rule, '"dynatemp" with low <= high')


def complete_rule(rule: dict[str, Any]) -> dict[str, Any]:
    """A checked rule with what it leaves out."""
    numbers = ENTROPY_RULES[rule["name"]] | _OF_EVERY_RULE
    return {field: default for field, (_, _, default) in numbers.items()} | rule


def _are_weights(value: Any, length: int) -> bool:
    """Whether `value` is a list of `length` numbers that can be made to sum to 1."""
    ok = isinstance(value, list | tuple) and len(value) == length and all(map(is_number, value))
    return ok and min(value) >= 0 and 0 < sum(value) < float("inf")
