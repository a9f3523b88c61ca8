"""The client of a reward server: one request, repeated for as long as the server is away and may come back."""

from __future__ import annotations

import http.client
import json
import random
import ssl
import sys
import threading
import time
from typing import Any

import urllib3
from urllib3.util import parse_url

from marval_rl.errors import RewardError

BUSY = 503
PASSING = (408, 429, 502, BUSY, 504)  # statuses that another try may change
FIRST_DELAY = 0.25  # seconds, doubled with each failure
LONGEST_DELAY = 15.0
LINE_EVERY = 60.0  # seconds between two lines about a server that is away


class Outage:
    """The time since a server last answered any of the concurrent requests to it; reports on stderr.

    Args:
        max_wait: Seconds without any answer after which `failed` gives up.
    """

    def __init__(self, url: str, max_wait: float) -> None:
        self.url = url
        self.max_wait = max_wait
        self._lock = threading.Lock()
        self._since: float | None = None  # when it went away
        self._last_answer = float("-inf")
        self._last_line = float("-inf")
        self._announced = False  # whether a line said that it is away

    def failed(self, started: float, reason: str, busy: bool) -> float:
        """Notes that a request, sent at `started`, failed for `reason`; returns the seconds that are left to wait.

        Raises:
            RewardError: When no time is left.
        """
        with self._lock:
            now = time.monotonic()
            begins = self._since is None
            if self._since is None:
                self._since = max(started, self._last_answer)
            waited = now - self._since
            if waited >= self.max_wait:
                raise RewardError(
                    f"{self.url} did not score for {waited:.0f} s (last: {reason}); check the server, or wait longer "
                    f"(max_wait is {self.max_wait:g} s)"
                )
            # A server that is merely busy may be so at every step of a run.
            if now - self._last_line >= LINE_EVERY or (begins and not busy):
                self._print(f"does not score ({reason}); waited {waited:.0f} of {self.max_wait:.0f} s")
                self._last_line, self._announced = now, True
            return self.max_wait - waited

    def answered(self) -> None:
        with self._lock:
            self._last_answer = time.monotonic()
            if self._announced and self._since is not None:
                self._print(f"scores again, after {self._last_answer - self._since:.0f} s")
            self._since, self._announced = None, False

    def _print(self, text: str) -> None:
        print(f"remote reward: {self.url} {text}", file=sys.stderr, flush=True)


class RewardClient:
    """Sends requests to one server.

    Args:
        url: http://HOST:PORT or https://..., with a path in front of /score if a proxy needs one.
        token: Sent as a bearer token; None for none.
        timeout: Seconds that one try waits for the server.
        max_wait: Seconds without any answer after which a server that is away counts as lost.
        concurrency: Requests that are sent at the same time, at most.

    Raises:
        ValueError: For a url of another form.
    """

    def __init__(self, url: str, token: str | None, timeout: float, max_wait: float, concurrency: int) -> None:
        parts = parse_url(url)
        if parts.scheme not in ("http", "https") or not parts.host or parts.query or parts.auth:
            raise ValueError(f"the url of a remote reward must look like http://host:port, not {url!r}")
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.outage = Outage(self.url, max_wait)
        # A connection for each request: one that is kept would be found closed after every long training step.
        headers = {"Content-Type": "application/octet-stream", "Connection": "close"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        self._pool = urllib3.PoolManager(maxsize=concurrency, headers=headers, timeout=timeout, retries=False)

    def score(self, body: bytes, stop: threading.Event) -> list[Any]:
        """Returns the scores that the server gives for a packed request, unchecked.

        Args:
            stop: Ends the waiting when it is set, by a RewardError.

        Raises:
            RewardError: For what another try would not change, and when the server stays away for `max_wait`.
        """
        delay = FIRST_DELAY
        while True:
            started = time.monotonic()
            pause = delay * random.uniform(0.5, 1)  # apart, for many processes may have lost the server together
            try:
                response = self._post(body)
            except urllib3.exceptions.LocationValueError:  # a host that cannot be
                raise
            except urllib3.exceptions.HTTPError as error:
                if isinstance(error.__context__, ssl.SSLCertVerificationError):
                    raise RewardError(f"{self.url} is not trusted: {error.__context__}") from error
                left = self.outage.failed(started, _describe(error, self.timeout), busy=False)
            else:
                if response.status not in PASSING:
                    self.outage.answered()
                    return self._scores(response)
                left = self.outage.failed(started, _error_text(response), busy=response.status == BUSY)
                retry_after = response.headers.get("Retry-After", "")
                if retry_after.isdecimal():
                    pause = max(pause, int(retry_after) * random.uniform(0.5, 1))
            if stop.wait(min(pause, left, LONGEST_DELAY)):
                raise RewardError(f"the request to {self.url} was given up")
            delay = min(2 * delay, LONGEST_DELAY)

    def _post(self, body: bytes) -> urllib3.BaseHTTPResponse:
        return self._pool.request("POST", f"{self.url}/score", body=body, redirect=False)

    def _scores(self, response: urllib3.BaseHTTPResponse) -> list[Any]:
        if response.status != 200:
            raise RewardError(f"{self.url} refuses: {_error_text(response)}")
        scores = _read_json(response.data).get("scores")
        if not isinstance(scores, list):
            raise RewardError(f"{self.url} answers, but not with scores: is it a server of marval-rl?")
        return scores


def _error_text(response: urllib3.BaseHTTPResponse) -> str:
    reason = _read_json(response.data).get("error") or http.client.responses.get(response.status, "")
    return f"status {response.status}, {reason}"


def _read_json(answer: bytes) -> dict[str, Any]:
    """The JSON object in an answer; an empty one where there is none."""
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _describe(error: urllib3.exceptions.HTTPError, timeout: float) -> str:
    cause = error.__context__ or error  # what the operating system said, without urllib3's words around it
    if isinstance(cause, TimeoutError):
        return f"no answer within the timeout of {timeout:g} s"
    return f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
