"""The library's errors, one base class for all of them; knows nothing of where they are raised."""

from __future__ import annotations


class AdaptiveDecodeError(Exception):
    """Base class of every error this library raises on purpose."""


class AdapterConfigError(AdaptiveDecodeError, ValueError):
    """An adapter's settings contradict each other, name something unknown, or come from a newer format."""


class AdapterLoadError(AdaptiveDecodeError, ValueError):
    """An adapter's files are missing, damaged, unsafe, or made for another base model."""


class BudgetError(AdaptiveDecodeError, ValueError):
    """A budget is not a positive whole number of tokens or samples, or does not fit the batch."""


class SamplingParameterError(AdaptiveDecodeError, ValueError):
    """A sampling parameter is outside its range."""


class LogitsError(AdaptiveDecodeError, ValueError):
    """The model produced logits that no decoder can sample from (NaN, +inf, or nothing left to sample)."""


class UnsupportedGenerationError(AdaptiveDecodeError, ValueError):
    """A generation mode in which the adapter could not act as trained."""


class UnknownAdapterError(AdaptiveDecodeError, KeyError):
    """No adapter, or another one already, goes by a name; the message lists those that do."""

    __str__ = Exception.__str__  # a KeyError shows its message in quotes


class PushError(AdaptiveDecodeError):
    """
    An adapter did not get to the Hub; the message says why, where it is kept, and how to send it again.

    Attributes:
        folder (`str`, *optional*): Where the adapter is kept; `None` if it could not be written either.
        repo_id (`str`): Where it should have gone.
    """

    def __init__(self, message: str, folder: str | None, repo_id: str) -> None:
        super().__init__(message)
        self.folder, self.repo_id = folder, repo_id


class EpochCacheSpaceError(AdaptiveDecodeError, OSError):
    """The disk has no room for what training was to keep between epochs; the message says how much is missing where."""


class MissingExtraError(AdaptiveDecodeError, ImportError):
    """An optional dependency is not installed; the message holds the install command."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"`{package}` is needed for this and is not installed: pip install 'hf_adaptive_decode[{extra}]'"
        )
