"""What goes wrong between here and the hub: what is tried again, and one sentence for each of the others."""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from checkpoint_files import human_size
from errors import CheckpointError
from huggingface_hub import errors as hub
from requests import exceptions  # the HTTP library of huggingface_hub below 1.0

if TYPE_CHECKING:
    from hub_repository import Repository

log = logging.getLogger("checkpoint.hub")

RETRY_WAITS_SECONDS: tuple[float, ...] = (1, 2, 4)  # between tries; starts again whenever bytes have arrived

ELSEWHERE = "use --offline if the cache holds the model, or give a local folder"
PASS_TOKEN = "pass a token with --token-file or HF_TOKEN"

LOST_CONNECTIONS = (
    *(exceptions.ConnectionError, exceptions.Timeout, exceptions.ChunkedEncodingError),
    *(ConnectionError, TimeoutError),
)
Result = TypeVar("Result")


def retry(call: Callable[[], Result], repository: Repository, bytes_there: Callable[[], int] = lambda: 0) -> Result:
    """`call()`, again after errors that may pass: huggingface_hub retries neither the listing nor a broken body."""
    waits = iter(RETRY_WAITS_SECONDS)
    while True:
        bytes_before = bytes_there()
        try:
            return call()
        except Exception as error:
            if bytes_there() > bytes_before:
                waits = iter(RETRY_WAITS_SECONDS)
            wait = next(waits, None)
            if wait is None or not _may_pass(error):
                raise
            log.warning("%s: %s; trying again in %g s", repository.endpoint, _reason(error), wait)
            time.sleep(wait)


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, LOST_CONNECTIONS):
        return not isinstance(error, (exceptions.SSLError, exceptions.ProxyError))  # each is a ConnectionError
    response = getattr(error, "response", None)
    status = response.status_code if response is not None else 0
    return status >= 500 or (status == 403 and not _is_from_hub(response))


def _is_from_hub(response: Any) -> bool:
    """Whether the hub itself answered, and not the store that it redirects to, whose signed addresses expire."""
    path = urlsplit(str(response.url)).path
    return path.startswith("/api/") or "/resolve/" in path


def _reason(error: BaseException) -> str:
    """A few words for a failed request; the HTTP library's own text is a nest of class names."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code}"
    text = f"{type(error).__name__} {error}"
    for signs, words in (
        ("NameResolutionError", "its name cannot be resolved"),
        ("ProxyError", "the proxy does not let it through"),
        ("SSL", "no TLS connection, or a certificate that is not trusted"),
        ("refused", "connection refused"),
        ("unreachable", "network unreachable"),
        ("timed out|Timeout", "no answer in time"),
        ("IncompleteRead|Connection broken|Connection aborted|reset by peer", "connection lost"),
    ):
        if re.search(signs, text):
            return words
    return type(error).__name__


# --- sentences


def explain(error: BaseException, repository: Repository, what: str, bytes_to_come: int = 0) -> CheckpointError:
    """One sentence for whatever huggingface_hub or the file system raised while `what` was fetched."""
    while isinstance(error, hub.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # "cannot find the file in the cache" stands before the reason
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in str(error):
        return disk_full(repository, bytes_to_come)
    response = getattr(error, "response", None)
    sentence = _without_answer if response is None else _answered
    return CheckpointError(sentence(error, repository, what))


def disk_full(repository: Repository, bytes_to_come: int) -> CheckpointError:
    return CheckpointError(
        f"the disk of {str(repository.cache)!r} is too full for {repository.id!r}: {human_size(bytes_to_come)} are to "
        f"come and {human_size(repository.free_bytes)} are free; make room, or set HF_HOME to a folder on a larger disk"
    )


def _answered(error: Any, repository: Repository, what: str) -> str:
    response, status = error.response, error.response.status_code
    said = " ".join(response.headers.get("X-Error-Message", "").split())[:200]
    endpoint, repo_id, page = repository.endpoint, repository.id, f"{repository.endpoint}/{repository.id}"
    token = f"the token of {repository.token_origin}"

    if isinstance(error, hub.GatedRepoError):
        if not repository.token:
            return f"{repo_id!r} is gated; accept its licence at {page}, then {PASS_TOKEN}"
        return (
            f"{repo_id!r} is gated, and {token} has no access; accept its licence at {page} with that token's account, "
            "and let the token read gated repositories"
        )
    if isinstance(error, hub.RevisionNotFoundError):
        rule = "it must be a branch, a tag or a commit"
        return f"{repo_id!r} has no revision {repository.revision!r}; {rule}, see {page}/commits"
    if isinstance(error, hub.EntryNotFoundError):
        return f"{endpoint} lists {what} but does not have it; choose another revision"
    if status >= 500:
        return f"{endpoint} is in trouble (HTTP {status}, several tries); try later, {ELSEWHERE}"
    if not _is_from_hub(response):
        store = urlsplit(str(response.url)).netloc
        return f"{what} could not be fetched: {store} answers HTTP {status}; run again, or {ELSEWHERE}"
    if status == 401 and "credentials" in said:
        return f"{endpoint} does not know {token}; it is mistyped, expired or revoked, make a new one"
    if status in (401, 404) or isinstance(error, hub.RepositoryNotFoundError):
        advice = f"let {token} read it" if repository.token else PASS_TOKEN
        where = f"is not a folder here, and on {endpoint} it does not exist or is private"
        return f"{repo_id!r} {where}; check the name, or {advice}"
    or_token = "" if repository.token else f", or {PASS_TOKEN}"
    if status == 403:
        rights = f" and the rights of {token}" if repository.token else or_token
        return f"{endpoint} does not give out {what}{f' ({said})' if said else ''}; see {page}{rights}"
    if status == 429:
        return f"{endpoint} limits requests from here (HTTP 429); wait some minutes{or_token}"
    return f"{what} could not be fetched: {endpoint} answers HTTP {status}; run again, or {ELSEWHERE}"


def _without_answer(error: BaseException, repository: Repository, what: str) -> str:
    endpoint = repository.endpoint
    if isinstance(error, OSError) and error.errno is not None:
        return f"the cache {str(repository.cache)!r} cannot be used: {error.strerror}; choose another with HF_HOME"
    if isinstance(error, (exceptions.MissingSchema, exceptions.InvalidSchema, exceptions.InvalidURL)):
        return f"HF_ENDPOINT {endpoint!r} is not an address; it must look like https://host"
    if isinstance(error, (exceptions.JSONDecodeError, KeyError, TypeError, hub.FileMetadataError)):
        return (
            f"{endpoint} does not answer as a Hugging Face hub does; check HF_ENDPOINT, and whether a proxy or login "
            f"page stands between, or {ELSEWHERE}"
        )
    if isinstance(error, (exceptions.RequestException, *LOST_CONNECTIONS)):
        tries = ", also after several tries" if _may_pass(error) else ""
        return f"{endpoint} cannot be reached for {what}: {_reason(error)}{tries}; check network and proxy, {ELSEWHERE}"
    said = re.sub(r"\?\S+", "", " ".join(str(error).split()))[:200]  # no signatures of download addresses
    return f"{what} could not be fetched ({said or type(error).__name__}); run again, or {ELSEWHERE}"
