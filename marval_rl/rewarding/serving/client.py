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
from urllib.parse import urlsplit

from marval_rl.errors import RewardError

BUSY = 503
PASSING = (408, 429, 502, BUSY, 504)  # statuses that another try may change
FIRST_DELAY = 0.25  # seconds, doubled with each failure
LONGEST_DELAY = 15.0
SPEAK_EVERY = 60.0  # seconds between two lines about a server that is away

# What the standard library raises while a server is absent, dies, or is too slow.
PASSING_ERRORS = (OSError, http.client.HTTPException)


class Outage:
    """What the concurrent requests to one server know together about its being away; says so on stderr.

    max_wait  seconds without any answer after which `failed` gives up
    """

    def __init__(self, url: str, max_wait: float) -> None:
        self.url = url
        self.max_wait = max_wait
        self._lock = threading.Lock()
        self._since: float | None = None  # when it went away
        self._answered = float("-inf")
        self._said = float("-inf")
        self._announced = False  # whether a line said that it is away

    def failed(self, started: float, reason: str, busy: bool) -> float:
        """Note that a request, sent at `started`, failed for `reason`; returns the seconds that are left to wait.

        Raises RewardError when none are.
        """
        with self._lock:
            now = time.monotonic()
            begins = self._since is None
            if self._since is None:
                self._since = max(started, self._answered)
            waited = now - self._since
            if waited >= self.max_wait:
                raise RewardError(
                    f"{self.url} did not score for {waited:.0f} s (last: {reason}); see to the server, or wait longer "
                    f"(max_wait is {self.max_wait:g} s)"
                )
            # A server that is merely busy may be so at every step of a run.
            if now - self._said >= SPEAK_EVERY or (begins and not busy):
                self._say(f"does not score ({reason}); waited {waited:.0f} of {self.max_wait:.0f} s")
                self._said, self._announced = now, True
            return self.max_wait - waited

    def answered(self) -> None:
        with self._lock:
            self._answered = time.monotonic()
            if self._announced and self._since is not None:
                self._say(f"scores again, after {self._answered - self._since:.0f} s")
            self._since, self._announced = None, False

    def _say(self, text: str) -> None:
        print(f"remote reward: {self.url} {text}", file=sys.stderr, flush=True)


class RewardClient:
    """Asks one server.

    url       http://HOST:PORT or https://..., with a path in front of /score if a proxy needs one
    token     sent as a bearer token; None for none
    timeout   seconds that one try waits for the server
    max_wait  seconds without any answer after which a server that is away counts as lost

    Raises ValueError for a url of another form.
    """

    def __init__(self, url: str, token: str | None, timeout: float, max_wait: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ValueError(f"the url of a remote reward must look like http://host:port, not {url!r}")
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.outage = Outage(self.url, max_wait)
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path.rstrip("/")
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    def score(self, body: bytes, stop: threading.Event) -> list[Any]:
        """The scores that the server gives for a packed request, as they came.

        stop  ends the waiting when it is set, by a RewardError

        Raises RewardError for what another try would not change, and when the server stays away for `max_wait`.
        """
        delay = FIRST_DELAY
        while True:
            started = time.monotonic()
            pause = delay * random.uniform(0.5, 1)  # apart, for many processes may have lost the server together
            try:
                status, headers, answer = self._post(body)
            except ssl.SSLCertVerificationError as error:
                raise RewardError(f"{self.url} is not trusted: {error}") from error
            except PASSING_ERRORS as error:
                left = self.outage.failed(started, _describe(error, self.timeout), busy=False)
            else:
                if status not in PASSING:
                    self.outage.answered()
                    return self._scores(status, answer)
                left = self.outage.failed(started, _error_text(status, answer), busy=status == BUSY)
                if headers.get("Retry-After", "").isdecimal():
                    pause = max(pause, int(headers["Retry-After"]) * random.uniform(0.5, 1))
            if stop.wait(min(pause, left, LONGEST_DELAY)):
                raise RewardError(f"the request to {self.url} was given up")
            delay = min(2 * delay, LONGEST_DELAY)

    def _post(self, body: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
        # A connection a request: one that is kept would be found closed after every long training step.
        connection = self._kind(self._host, self._port, timeout=self.timeout)
        headers = {**self._headers, "Content-Type": "application/octet-stream", "Connection": "close"}
        try:
            try:
                connection.request("POST", f"{self._path}/score", body, headers)
            except (BrokenPipeError, ConnectionResetError):
                if connection.sock is None:
                    raise
                # Refused before all was sent; the answer says why.
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def _scores(self, status: int, answer: bytes) -> list[Any]:
        if status != 200:
            raise RewardError(f"{self.url} refuses: {_error_text(status, answer)}")
        scores = _read_json(answer).get("scores")
        if not isinstance(scores, list):
            raise RewardError(f"{self.url} answers, but not with scores: is it a server of marval-rl?")
        return scores


def _error_text(status: int, answer: bytes) -> str:
    said = _read_json(answer).get("error") or http.client.responses.get(status, "")
    return f"status {status}, {said}"


def _read_json(answer: bytes) -> dict[str, Any]:
    """The JSON object in an answer; an empty one where there is none."""
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _describe(error: Exception, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within the timeout of {timeout:g} s"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
