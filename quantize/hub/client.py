"""The Hub's own client (huggingface_hub), made ready, and its exceptions turned into our errors.

Works with huggingface_hub 1.x (httpx) and 2.x (httpx2). The client is imported inside functions,
because a plan that touches no Hub must not pay for it. Every exception becomes a class
of :mod:`quantize.errors`, and no message carries a token.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from quantize.errors import (
    CredentialsError,
    Interrupted,
    QuantizeError,
    ResourceError,
    SourceError,
    ToolError,
    TransientError,
    UsageError,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

GATED_REPOSITORY = re.compile(
    r"//[^/]+/(?:api/models/|api/(?=datasets/))?((?:datasets/)?[^/]+/[^/?]+)/"
)
"""The repository in the address of a file or of an API call."""

DEFAULT_ENDPOINT = "https://huggingface.co"
TRY_AGAIN = "run the same command again"
TIMEOUT_SECONDS = 300.0
LONGEST_WAIT_SECONDS = 60.0

FREE_STORAGE = (
    "the account's storage on the Hub is used up or must be paid for: free some, or publish to "
    "another account; then run the same command again"
)
NO_ROOM = re.compile(r"quota|storage (limit|patterns)|storage.*(exceed|reached|full)", re.I)
"""What the Hub says, with 403 and others, when an account has no storage left."""


@dataclass(frozen=True)
class Access:
    """Where the Hub is, who we are there, and how long to wait before each retry."""

    endpoint: str
    token: str | None = field(default=None, repr=False)
    retry_seconds: tuple[float, ...] = (1.0, 4.0, 16.0)

    @property
    def host(self) -> str:
        """The endpoint for messages, without a user name or password."""
        parts = urlsplit(self.endpoint)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def endpoint() -> str:
    """The Hub's address: `HF_ENDPOINT`, or the public Hub."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def access_from_environment() -> Access:
    """`HF_ENDPOINT`, and the token of `HF_TOKEN` or `hf auth login`: read here, nowhere else."""
    from huggingface_hub import get_token

    return Access(endpoint(), get_token())


def client(access: Access) -> HfApi:
    """The Hub's own client, with an explicit token or none at all, silent on the terminal."""
    from huggingface_hub import HfApi, constants, get_session
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    get_session().timeout = TIMEOUT_SECONDS  # the client's own is infinite
    # Xet is the public Hub's storage. Others speak plain LFS, which 2.x tries only when told to.
    public = urlsplit(access.endpoint).hostname == "huggingface.co"
    if not public and "HF_HUB_DISABLE_XET" not in os.environ:
        constants.HF_HUB_DISABLE_XET = True
    return HfApi(endpoint=access.endpoint, token=access.token or False)


def call(access: Access, what: str, action: Callable[[], T]) -> T:
    """`action()`, repeated after passing failures; what it raises becomes an error of ours.

    `what` completes "the Hub failed while ...". Only for actions that may be repeated.
    """
    for delay in (*access.retry_seconds, None):
        try:
            return action()
        except QuantizeError:
            raise
        except Exception as error:
            problem = translate(access, what, error)
            if delay is None or not may_repeat(problem):
                raise problem from error
            time.sleep(max(delay, retry_after_seconds(error)))
    raise AssertionError("unreachable")


def may_repeat(problem: QuantizeError) -> bool:
    """Whether it may pass by itself."""
    return isinstance(problem, TransientError)


def translate(access: Access, what: str, error: Exception) -> QuantizeError:
    """The error of ours for what the client raised; its cause decides where it only wraps."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if "/xet-write-token/" in str(error) and "404" in str(error):  # from hf_xet, in its own words
        return UsageError(
            f"{access.host} has no Xet storage, but HF_HUB_DISABLE_XET says to use it ({what})",
            "unset HF_HUB_DISABLE_XET, or set it to 1: files then travel by LFS",
        )
    transport = HfHubHTTPError.__bases__[0]  # HTTPError of httpx (1.x) or httpx2 (2.x)
    for cause in _causes(error):
        if isinstance(cause, Interrupted):  # a signal, which the client took for a failed upload
            raise cause
        if isinstance(cause, QuantizeError):
            return cause
        if isinstance(cause, HfHubHTTPError):
            return _from_answer(access, what, cause)
        if isinstance(cause, OfflineModeIsEnabled):
            return ResourceError(
                f"{what} needs {access.host}, but HF_HUB_OFFLINE forbids it",
                "unset HF_HUB_OFFLINE, or use a local folder",
            )
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return ResourceError(f"no space left on the disk while {what}", "free some space")
        if isinstance(cause, (transport, ConnectionError, TimeoutError, json.JSONDecodeError)):
            reason = clean(access, cause) or type(cause).__name__
            return TransientError(f"{access.host} failed while {what}: {reason}", TRY_AGAIN)
        if isinstance(cause, HFValidationError):
            return UsageError(f"{what}: {clean(access, cause)}", "correct the repository's name")
        if isinstance(cause, ValueError) and "Invalid metadata in README.md" in str(cause):
            return SourceError(f"the Hub rejects the card: {clean(access, cause)}")
        if isinstance(cause, ValueError) and "LFS batch API returned errors" in str(cause):
            message = f"{access.host} refused a file while {what}: {clean(access, cause)}"
            if NO_ROOM.search(str(cause)):
                return ResourceError(message, FREE_STORAGE)
            return ToolError(message, TRY_AGAIN)
    reason = f"{type(error).__name__}: {clean(access, error)}"
    if isinstance(error, OSError) and error.errno is None:  # sizes that differ after a download
        return TransientError(f"{access.host} failed while {what}: {reason}", TRY_AGAIN)
    return ToolError(f"huggingface_hub failed while {what}: {reason}", TRY_AGAIN)


def _from_answer(access: Access, what: str, error: Any) -> QuantizeError:
    """By status code; `error` is the client's HfHubHTTPError."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status: int = error.response.status_code
    said = clean(access, error.server_message or "")
    message = f"{access.host} answered {status} while {what}" + (f": {said}" if said else "")
    if isinstance(error, GatedRepoError):
        page = GATED_REPOSITORY.search(str(error.response.url))
        where = f"at {access.host}/{page[1]}" if page else "on its page"
        hint = f"accept its terms {where}, and set HF_TOKEN to a token of that account"
        return CredentialsError(message, hint)
    if status == 401 and access.token is not None:
        return CredentialsError(
            f"{message} (the token is wrong, expired or revoked)",
            "set HF_TOKEN, or run `hf auth login`, with a new token; then run the same command "
            "again: nothing that was finished is repeated",
        )
    if isinstance(error, RepositoryNotFoundError):
        hint = "check the name; a private repository needs an HF_TOKEN that may read it"
        return SourceError(f"{message} (no such repository, or a private one)", hint)
    if isinstance(error, (RevisionNotFoundError, EntryNotFoundError)) or status == 404:
        return SourceError(f"{message} (no such revision or file)", "check the name")
    if status in (402, 413, 507) or (status in (400, 403, 422) and NO_ROOM.search(said)):
        return ResourceError(message, FREE_STORAGE)
    if status in (401, 403):
        return CredentialsError(message, "set HF_TOKEN to a token with the permission for this")
    if status in (408, 409, 412, 425, 429) or status >= 500:
        return TransientError(message, TRY_AGAIN)
    return ToolError(message, TRY_AGAIN)


def retry_after_seconds(error: BaseException) -> float:
    """What the server asks to wait (`Retry-After` in seconds), at most a minute; 0 if nothing."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        asked = response.headers.get("Retry-After", "") if response is not None else ""
        if re.fullmatch("[0-9]{1,9}", asked):
            return min(float(asked), LONGEST_WAIT_SECONDS)
    return 0.0


def clean(access: Access, value: object) -> str:
    """One line for a message: no token, no signed query of a URL, at most 300 characters."""
    text = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1?…", " ".join(str(value).split()))
    if access.token:
        text = text.replace(access.token, "…")
    return text if len(text) <= 300 else text[:299] + "…"


def _causes(error: BaseException) -> list[BaseException]:
    """The error, what it was raised from, and so on; wrappers come first."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__
    return chain
