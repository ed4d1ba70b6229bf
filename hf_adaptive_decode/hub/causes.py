"""What an error of the Hub's client means and what to do about it; knows errors, nothing of adapters."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from huggingface_hub import errors
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# Of the library that the client sends its requests with, whichever that is; raised as such where no answer came.
_RequestError: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
CLIENT_ERRORS = (EntryNotFoundError, _RequestError, OSError, ValueError)
_LOG_IN = "log in with `hf auth login`, or pass `token=`"


def why_unread(error: BaseException, repo_id: str, revision: str | None) -> str:
    """A sentence about why nothing could be downloaded from a repository, and the next step."""
    for cause in _chain(error):
        if isinstance(cause, HFValidationError):
            return f"{cause} Check the spelling of the folder or the Hub id."
        if isinstance(cause, GatedRepoError):
            return f"the repository is gated. Ask for access on its page, then {_LOG_IN} of the account that has it."
        if isinstance(cause, RepositoryNotFoundError):
            return f"there is no such repository, or it is private. Check {repo_id!r}; if it is private, {_LOG_IN}."
        if isinstance(cause, RevisionNotFoundError):
            return f"it has no branch, tag or commit {str(revision)!r}. Pass another `revision=`."
        if isinstance(cause, OfflineModeIsEnabled | FileNotFoundError) and cause.__cause__ is None:
            return (
                f"{_first_line(cause)} Load it once with the network (without `HF_HUB_OFFLINE=1` and "
                "`local_files_only=True`), which keeps it in the cache, or pass a folder."
            )
        common = _of_any_request(cause)
        if common:
            return common
    return _ended(str(error))


def why_unsent(error: BaseException, repo_id: str) -> str:
    """A sentence about why nothing could be uploaded to a repository, and the next step."""
    for cause in _chain(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE=1 is set, which forbids it. Unset it."
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code == 403:
            return (
                f"the Hub forbids it: {_first_line(cause.server_message or cause)} The token has to have the write "
                f"scope, and its account has to be allowed to write to {repo_id!r}."
            )
        if isinstance(cause, RepositoryNotFoundError):
            return f"the Hub knows no repository {repo_id!r} that this token may see: {_LOG_IN} of its owner."
        if isinstance(cause, RevisionNotFoundError):
            return f"{repo_id!r} has no such branch or pull request: {_first_line(cause.server_message or cause)}"
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (413, 507):
            return f"the Hub has no room for it: {_first_line(cause.server_message or cause)}"
        common = _of_any_request(cause)
        if common:
            return common
    return _ended(str(error))


def _of_any_request(cause: BaseException) -> str | None:
    if isinstance(cause, LocalTokenNotFoundError):
        return f"there is no token: {_LOG_IN}."
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        if status == 401:
            return f"the Hub does not accept the token (401): {_LOG_IN} that is valid."
        if status == 429 or status >= 500:
            return f"the Hub answers {status}: {_first_line(cause.server_message or cause)} Try again later."
        return _ended(str(cause))
    if isinstance(cause, _RequestError):
        return f"the Hub cannot be reached ({type(cause).__name__}: {cause}). Check the connection and try again."
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full ({cause}). Make room on it."
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what caused it, outermost first: the client wraps what stopped an upload."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def _first_line(error: object) -> str:
    return _ended(next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__))


def _ended(text: str) -> str:
    """With a full stop, since a sentence follows."""
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."
