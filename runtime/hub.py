"""Files of the Hugging Face Hub: from the local cache, or downloaded with retries, or an error of one line.

    path = fetch("gpt2", "config.json", what="download gpt2", advice="connect to the network")

Everything goes through huggingface_hub, so HF_ENDPOINT, HF_HOME, HF_TOKEN, proxies and HF_HUB_OFFLINE work.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

REFUSED = (401, 403, 404)  # HTTP statuses
REFUSALS = ("OfflineModeIsEnabled", "DatasetNotFoundError", "LocalEntryNotFoundError")  # without a status
ANSWER_S = 10  # to connect, and to be answered
PATIENCE_S = 25  # in which requests that fail are repeated
STALLED_S = 30  # after which a download that receives nothing is given up

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
    """Return what `call` returns; repeat it after temporary errors, with growing delays.

    The delay that the Hub asks for (Retry-After) is respected. Raises FileNotFoundError if the Hub refuses
    the request, and ConnectionError when `patience_s` of trying and waiting would be exceeded.
    """
    spent, delay = 0.0, 1.0
    while True:
        begun = time.monotonic()
        try:
            return call()
        except Exception as error:  # the client library's errors have no common base class
            if isinstance(error, ValueError) and not isinstance(error, OSError):
                raise
            if type(error).__name__ == "LocalEntryNotFoundError" and isinstance(error.__cause__, Exception):
                error = error.__cause__  # the network fails, and the cache lacks the file
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            response = getattr(error, "response", None)
            status = getattr(response, "status_code", None)
            if status in REFUSED or any(name in reason for name in REFUSALS):
                raise FileNotFoundError(f"cannot {what} ({reason}): {advice}") from error
            wait = max(delay, retry_after(response))
            spent += time.monotonic() - begun + wait
            if spent > patience_s:
                raise ConnectionError(f"cannot {what} ({reason}): {advice}") from error
        time.sleep(wait)
        delay *= 2


def retry_after(response: object) -> float:
    """Return the seconds for which an HTTP response asks to wait, or 0."""
    with contextlib.suppress(AttributeError, TypeError, ValueError):  # it may also be a date
        return max(float(response.headers.get("Retry-After")), 0.0)
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

    download = started(lambda: hf_hub_download(repo, path, tqdm_class=Bar, **where))
    while not download.done():
        with contextlib.suppress(TimeoutError):
            download.exception(timeout=1)
        if time.monotonic() - received[0] > STALLED_S:
            raise ConnectionError(f"cannot {what} (nothing arrived for {STALLED_S} s): {advice}")
    return Path(retrying(download.result, what, advice, patience_s=0))
