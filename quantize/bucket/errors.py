"""What the backends of fsspec raise, turned into our errors; no message carries a secret."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from quantize.errors import (
    CredentialsError,
    QuantizeError,
    ResourceError,
    ToolError,
    TransientError,
    UsageError,
)

TRY_AGAIN = "run the same command again"
CREDENTIALS_HINT = (
    "give this URL's backend credentials that may list, read, write and delete there "
    "(for s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
)

NO_PERMISSION = frozenset(
    {
        "botocore.NoCredentialsError",
        "botocore.PartialCredentialsError",
        "botocore.CredentialRetrievalError",
        "botocore.ProfileNotFound",
        "botocore.SSOError",
        "google.GoogleAuthError",
        "azure.ClientAuthenticationError",
        "paramiko.AuthenticationException",
        "builtins.PermissionError",
    }
)
OFTEN_PASSES = frozenset(
    {
        "botocore.HTTPClientError",
        "botocore.ConnectionError",
        "botocore.ResponseParserError",
        "aiohttp.ClientError",
        "requests.RequestException",
        "azure.ServiceRequestError",
        "paramiko.SSHException",
        "socket.gaierror",
        "builtins.ConnectionError",
        "builtins.TimeoutError",
    }
)
"""Exceptions of backends by top-level package and class; the base classes of an error count too."""
FULL = frozenset({"QuotaExceeded", "XMinioStorageFull", "XAmzStorageFull", "InsufficientStorage"})


def translate(url: str, what: str, error: Exception) -> QuantizeError:
    """The error of ours for what a backend raised while `what`; causes decide over wrappers."""
    chain = list(_causes(error))
    for cause in chain:
        answer = getattr(cause, "response", None)
        if isinstance(answer, dict) and "Error" in answer:
            return _from_answer(url, what, answer)
    said = clean(chain[-1])
    for cause in chain:
        names = {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(cause).mro()}
        number = getattr(cause, "errno", None)
        if names & NO_PERMISSION:
            return CredentialsError(f"no permission while {what}: {said}", CREDENTIALS_HINT)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            return ResourceError(f"no space while {what}: {said}", "free some space there")
        if isinstance(cause, (FileNotFoundError, NotADirectoryError, FileExistsError)):
            return UsageError(f"no such place while {what}: {said}", "correct publish.url")
        if names & OFTEN_PASSES:
            return TransientError(f"the connection failed while {what}: {said}", TRY_AGAIN)
    return ToolError(f"{type(error).__name__} while {what}: {said}", TRY_AGAIN)


def _from_answer(url: str, what: str, answer: dict[str, Any]) -> QuantizeError:
    """By S3's status and code; `answer` is the `response` of botocore's ClientError."""
    code = str(answer["Error"].get("Code", ""))
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    said = clean(answer["Error"].get("Message", ""))
    message = f"S3 answered {status} {code} while {what}: {said}".rstrip(": ")
    if code in FULL or status == 507:
        return ResourceError(message, "free some space there, or have the quota raised")
    if code == "NoSuchBucket" or status == 404:
        bucket = urlsplit(url).netloc
        return UsageError(f"{message} (no bucket {bucket}?)", "make it, or correct publish.url")
    if status in (301, 307) or code == "AuthorizationHeaderMalformed":
        return UsageError(message, "the bucket is in another region: set AWS_REGION to it")
    if code == "RequestTimeTooSkewed":
        return CredentialsError(message, "set this machine's clock")
    if status in (401, 403) or code in ("ExpiredToken", "InvalidToken", "TokenRefreshRequired"):
        return CredentialsError(message, CREDENTIALS_HINT)
    if code in ("RequestTimeout", "IncompleteBody", "BadDigest", "SlowDown", "OperationAborted"):
        return TransientError(message, TRY_AGAIN)
    if status in (408, 409, 429) or (status >= 500 and status != 501):
        return TransientError(message, TRY_AGAIN)
    return ToolError(message, "the endpoint may not be an S3 that botocore can talk to")


def clean(value: object) -> str:
    """One line for a message: no secret of the environment, no signed query, 300 characters."""
    text = re.sub(r"(\w+://[^\s?]+)\?\S+", r"\1?…", " ".join(str(value).split()))
    text = re.sub(r"(\w+://)[^\s/@]+@", r"\1", text)
    for name, secret in os.environ.items():
        if len(secret) >= 8 and re.search(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY|_KEY$", name):
            text = text.replace(secret, "…")
    return text if len(text) <= 300 else text[:299] + "…"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        yield current
        current = current.__cause__
