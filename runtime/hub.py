"""Files of the Hugging Face Hub: from the local cache, or downloaded with retries, or an error of one line.

    path = fetch("gpt2", "config.json", what="download gpt2", advice="connect to the network")

Everything goes through huggingface_hub, so HF_ENDPOINT, HF_HOME, HF_TOKEN, proxies and HF_HUB_OFFLINE work.
"""

import contextlib
import errno
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

ANSWER_S = 10  # to connect, and to be answered
PATIENCE_S = 25  # in which requests that fail are repeated
STALLED_S = 30  # after which a download that receives nothing is given up
LONGEST_DELAY_S = 60  # between two tries, unless the Hub asks for more
SAID_S = 3  # shorter waits are not worth a line
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

Result = TypeVar("Result")


def started(call: Callable[[], Result]) -> "Future[Result]":
    """Run a call in a daemon thread, which no process waits for when it ends."""
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def retrying(call: Callable[[], Result], what: str, advice: str, patience_s: float) -> Result:
    """Return what `call` returns; repeat it during an outage, with growing delays that are said.

    The delay that the Hub asks for is respected. Raises FileNotFoundError if the Hub refuses the request,
    ConnectionError when `patience_s` of trying and waiting would be exceeded, and OSError if this machine
    cannot write the files.
    """
    raise_temporary_errors()
    spent, delay = 0.0, 1.0
    while True:
        begun = time.monotonic()
        try:
            return call()
        except Exception as error:  # the client library's errors have no common base class
            if isinstance(error, ValueError) and not isinstance(error, OSError):
                raise
            cause = telling(error)
            reason = f"{type(cause).__name__}: {first_line(cause)}"
            if not is_outage(cause):
                raise lasting(cause, f"cannot {what}", reason, advice) from error
            asked = asked_wait(cause)
            wait = max(delay, asked)
            # A download that fails after hours does not mean an outage of hours.
            spent += min(time.monotonic() - begun, STALLED_S) + wait
            if spent > patience_s:
                if asked:
                    reason += f"; the Hub asks to wait {asked:,.0f} s"
                raise ConnectionError(f"cannot {what} ({reason}): {advice}") from error
        if wait > SAID_S:
            left = patience_s - spent + wait
            tqdm.write(f"cannot {what} ({reason}): trying again in {wait:.0f} s, for up to {left:.0f} s")
        time.sleep(wait)
        delay = min(2 * delay, LONGEST_DELAY_S)


@cache
def raise_temporary_errors() -> None:
    """Make huggingface_hub raise errors that may pass, which `retrying` then waits for.

    By itself it waits as long as the Hub asks, which may be hours, in some of its requests only. Raises
    ValueError for the huggingface_hub of transformers 4, which uses a different HTTP client.
    """
    try:
        from huggingface_hub import get_session, hf_raise_for_status, set_client_factory
    except ImportError as error:
        fix = "pip install -r requirements.txt"
        raise ValueError(f"this huggingface_hub is too old for downloads: {fix}") from error

    def check(response) -> None:
        if is_temporary(response.status_code):
            hf_raise_for_status(response)

    usual = get_session()
    hooks = {**usual.event_hooks, "response": [*usual.event_hooks["response"], check]}
    like_usual = dict(follow_redirects=usual.follow_redirects, timeout=usual.timeout)
    # The library closes its client after some errors, and makes a new one.
    set_client_factory(lambda: type(usual)(event_hooks=hooks, **like_usual))


def is_temporary(status: int) -> bool:
    """Return whether an HTTP status is about the server's state, not about the request."""
    return status in (408, 429) or status >= 500


def telling(error: BaseException) -> BaseException:
    """Return the error that tells why a call has failed: the first in the chain of causes that is not just
    "there is no such file", which the client libraries raise for outages as well."""
    each: BaseException | None = error
    while each:
        if not isinstance(each, FileNotFoundError) or each.filename:
            return each
        each = each.__cause__ or each.__context__
    return error


def first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")


def is_outage(error: BaseException) -> bool:
    """Return whether the same call may succeed later."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError

    if constants.HF_HUB_OFFLINE or is_of_this_machine(error):
        return False
    if (response := getattr(error, "response", None)) is not None:
        return is_temporary(response.status_code)
    # Errors of the network are an OSError, RuntimeError (of hf_xet) or the HTTP client's own.
    return isinstance(error, OSError | RuntimeError | HTTPError) and not isinstance(error, FileNotFoundError)


def is_of_this_machine(error: BaseException) -> bool:
    """Return whether an error is about a file or disk of this machine."""
    return isinstance(error, OSError) and bool(error.filename or error.errno in DISK_FULL)


def lasting(error: BaseException, what: str, reason: str, advice: str) -> OSError:
    """Return the error of one line for one that waiting does not help."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return OSError(error.errno, f"{what}: {error.strerror}")
    if is_of_this_machine(error):
        return OSError(f"{what} ({reason}): set HF_HOME to a folder that can be written")
    return FileNotFoundError(f"{what} ({reason}): {advice}")


def asked_wait(error: BaseException) -> float:
    """Return the seconds for which the HTTP response of an error asks to wait, or 0."""
    from huggingface_hub.utils import parse_ratelimit_headers

    if (response := getattr(error, "response", None)) is None:
        return 0.0
    limit, value = parse_ratelimit_headers(response.headers), response.headers.get("Retry-After", "")
    if limit and response.status_code == 429 and not limit.remaining:  # successes have this header as well
        return float(limit.reset_in_seconds)
    if value.isdecimal():
        return float(value)
    with contextlib.suppress(KeyError, TypeError, ValueError):  # a date, by the server's clock
        wait = parsedate_to_datetime(value) - parsedate_to_datetime(response.headers["Date"])
        return max(wait.total_seconds(), 0.0)
    return 0.0


def fetch(
    repo: str, path: str, *, what: str, advice: str, repo_type: str = "model", revision: str = "main"
) -> Path:
    """Return the local copy of a file on the Hub; a cached one needs no network.

    Without an answer, this fails within a minute; huggingface_hub alone would try for several. Raises
    FileNotFoundError if the Hub refuses or lacks the file, and ConnectionError if it cannot be reached.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError

    where = dict(repo_type=repo_type, revision=revision)
    with contextlib.suppress(LocalEntryNotFoundError):
        return Path(hf_hub_download(repo, path, local_files_only=True, **where))
    url = hf_hub_url(repo, path, **where)
    retrying(lambda: get_hf_file_metadata(url, timeout=ANSWER_S), what, advice, PATIENCE_S)
    received = [time.monotonic()]

    class Bar(tqdm):
        def update(self, n: float = 1) -> bool | None:
            received[0] = time.monotonic()
            return super().update(n)

    def get() -> Path:
        return Path(hf_hub_download(repo, path, tqdm_class=Bar, **where))

    download = started(lambda: retrying(get, what, advice, PATIENCE_S))
    while not download.done():
        with contextlib.suppress(TimeoutError):
            download.exception(timeout=1)
        if time.monotonic() - received[0] > STALLED_S:
            raise ConnectionError(f"cannot {what} (nothing arrived for {STALLED_S} s): {advice}")
    return download.result()
