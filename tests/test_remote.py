"""The reward `remote`: nothing lost, nothing mixed, and a server that is slow, busy, gone, back, or no such server."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import urllib3
from marval_rl.rewards.remote import Remote
from remote_rewards import arguments, brightness, expected, number
from remote_servers import ServerProcess, batch_for, free_url, thread_server

from marval_rl.errors import RewardError
from marval_rl.rewarding import RewardSet
from marval_rl.rewarding.serving import client as client_module
from marval_rl.rewarding.serving.protocol import Limits

IMAGES = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
BYTES = (IMAGES * 255).round() / 255


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv("MARVAL_RL_REWARD_TOKEN", raising=False)


@pytest.fixture
def impatient(monkeypatch):
    """Tries follow each other soon."""
    monkeypatch.setattr(client_module, "LONGEST_DELAY", 0.2)
    monkeypatch.setattr(client_module, "FIRST_DELAY", 0.02)


def scores_of(remote: Remote, **arguments):
    return asyncio.run(remote(**arguments))


def said(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("remote reward: ")]


# Scores


@pytest.fixture(scope="module")
def server():
    with ServerProcess("number_in_a_lean_process", "--max_waiting", "64") as server:
        yield server


def test_ten_thousand_images_of_eight_clients_at_once_are_neither_lost_nor_reordered(server, capsys):
    def client(which: int) -> int:
        """Scores every eighth image in batches of 250, in an order of its own; returns how many."""
        numbers = torch.arange(which, 10_000, 8)
        numbers = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(which))]
        remote = Remote(server.url, images_per_request=24)
        for part in numbers.split(250):
            assert scores_of(remote, **arguments(part)) == expected(part)
        return len(numbers)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(client, range(8))) == 10_000
    assert said(capsys) == []


def test_the_same_through_a_server_that_is_busy_all_the_time(impatient):
    numbers = torch.arange(200)
    with thread_server(number, max_waiting=0) as url:
        assert scores_of(Remote(url, images_per_request=10, concurrency=8), **arguments(numbers)) == expected(numbers)


@pytest.mark.parametrize(("format", "pixels"), [("uint8", BYTES), ("png", BYTES), ("float32", IMAGES)])
def test_formats(format, pixels):
    with thread_server(brightness) as url:
        found = scores_of(Remote(url, format=format, images_per_request=3), **batch_for(IMAGES))
    assert found == pytest.approx(pixels.mean(dim=(1, 2, 3)).tolist(), abs=1e-7)
    assert (found == IMAGES.mean(dim=(1, 2, 3)).tolist()) is (format == "float32")


def test_no_more_requests_at_a_time_than_asked_for():
    busy, most, lock = 0, 0, threading.Lock()

    def answer(handler) -> tuple[int, bytes]:
        nonlocal busy, most
        with lock:
            busy, most = busy + 1, max(most, busy + 1)
        time.sleep(0.05)
        with lock:
            busy -= 1
        return 200, b'{"scores": [1.0]}'

    with strange_server(answer) as (url, _):
        assert scores_of(Remote(url, images_per_request=1, concurrency=3), **batch_for(IMAGES)) == [1.0] * 10
    assert most == 3


def test_gradients_are_refused_before_anything_is_sent():
    rewards = RewardSet([Remote(free_url())])
    assert not rewards.differentiable
    batch = batch_for(IMAGES.clone().requires_grad_())
    with pytest.raises(ValueError, match="reward 'Remote' is not differentiable"):
        rewards.score(**batch, with_grad=True)


# What another try does not change


def test_an_error_message_of_the_server_is_passed_on_at_once():
    calls = []

    def picky(*, images, **columns):
        calls.append(len(images))
        if (images > 0.999).any():
            raise ValueError("too bright for me")
        return [0.5] * len(images)

    images = BYTES * 0.9
    images[7] = 1.0
    with thread_server(picky) as url:
        remote = Remote(url, images_per_request=3, concurrency=1)
        message = r"status 422, reward 'picky' raised ValueError: too bright for me \(images 6 to 8 of the batch\)"
        with pytest.raises(RewardError, match=f"{url} refuses: {message}"):
            scores_of(remote, **batch_for(images))
    assert calls in ([3, 3, 3], [3, 3, 3, 1])  # the next may be on its way already


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            Limits(max_images=5),
            "status 413, the request has 10 images, but at most 5 are allowed; send fewer per request",
        ),
        (Limits(max_bytes=400), "status 413, the request has more than 400 bytes, .*; send fewer images per request"),
    ],
)
def test_requests_that_are_too_large(limits, message):
    with thread_server(brightness, limits=limits) as url, pytest.raises(RewardError, match=message):
        scores_of(Remote(url), **batch_for(IMAGES))


def test_tokens(monkeypatch):
    with thread_server(brightness, token="sesame") as url:
        for token in (None, "sesam"):
            with pytest.raises(RewardError, match="status 401, missing or wrong token"):
                scores_of(Remote(url, token=token), **batch_for(IMAGES))
        assert len(scores_of(Remote(url, token="sesame"), **batch_for(IMAGES))) == 10
        monkeypatch.setenv("MARVAL_RL_REWARD_TOKEN", "sesame")
        assert len(scores_of(Remote(url), **batch_for(IMAGES))) == 10
        with pytest.raises(RewardError, match="status 401"):
            scores_of(Remote(url, token="sesam"), **batch_for(IMAGES))


@contextmanager
def strange_server(answer):
    """A server of another kind: `answer(handler)` -> (status, body). Yields the url and the list of what was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            status, body = answer(self)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b'{"scores": [1, 2]}', "gave 2 scores for 10 images"),
        (200, b'{"scores": 3}', "is it a server of marval-rl"),
        (200, b"<html>", "is it a server of marval-rl"),
        (200, b"[]", "is it a server of marval-rl"),
        (200, b'{"scores": [1, 2, 3, 4, 5, 6, 7, 8, 9, NaN]}', "the score of sample 9 is nan"),
        (200, b'{"scores": [1, 2, 3, "4", 5, 6, 7, 8, 9, 10]}', "the score of sample 3 is '4'"),
        (404, b"not found", "status 404, Not Found"),
        (500, b"Internal Server Error", "status 500, Internal Server Error"),
    ],
)
def test_answers_that_are_not_scores_are_refused_at_once(status, body, message):
    with strange_server(lambda handler: (status, body)) as (url, asked):
        with pytest.raises(RewardError, match=message):
            RewardSet([Remote(f"{url}/behind/a/proxy/")]).score(**batch_for(IMAGES))
        assert asked == ["/behind/a/proxy/score"]


def test_columns_that_cannot_be_sent_are_named():
    remote = Remote(free_url())
    for value in (torch.zeros(1), float("nan"), {1, 2}):
        with pytest.raises(ValueError, match="the column 'extra' cannot be sent to a remote reward"):
            scores_of(remote, **batch_for(IMAGES), extra=[value] * 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "localhost:8000"}, "must look like http://host:port, not 'localhost:8000'"),
        ({"url": "ftp://localhost"}, "must look like http://host:port"),
        ({"url": "http://user:word@localhost"}, "must look like http://host:port"),
        ({"format": "jpeg"}, "unknown format 'jpeg'; known: uint8, png, float32"),
        ({"concurrency": 0}, "concurrency must be at least 1, not 0"),
        ({"images_per_request": 0}, "images_per_request must be at least 1, not 0"),
        ({"timeout": 0}, "timeout must be positive"),
        ({"max_wait": -1}, "max_wait not negative"),
        ({"token": ""}, "must be printable ASCII without spaces, not empty"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Remote(**{"url": "http://localhost:8000", **arguments})


# What waiting may change


def test_a_server_that_is_too_slow_at_first(impatient, capsys):
    calls = []

    def slow_at_first(*, images, **columns):
        calls.append(len(images))
        time.sleep(0.6 if len(calls) == 1 else 0)
        return images.mean(dim=(1, 2, 3))

    with thread_server(slow_at_first) as url:
        remote = Remote(url, timeout=0.3, max_wait=10)
        assert scores_of(remote, **batch_for(BYTES)) == pytest.approx(BYTES.mean(dim=(1, 2, 3)).tolist())
        lines = said(capsys)
    assert f"{url} does not score (no answer within the timeout of 0.3 s); waited 0 of 10 s" in lines[0]
    assert f"{url} scores again" in lines[1] and len(lines) == 2


def test_a_server_that_is_killed_and_started_again(server, impatient, capsys):
    numbers = torch.arange(1, 13)
    remote = Remote(server.url, images_per_request=1, concurrency=2)
    with ThreadPoolExecutor(1) as pool:
        scores = pool.submit(scores_of, remote, **arguments(numbers, seconds=0.2))
        time.sleep(0.5)  # some images are scored by now, two are on their way
        server.kill()
        time.sleep(0.3)
        assert not scores.done()
        server.start()
        assert scores.result(timeout=30) == expected(numbers)
    lines = said(capsys)
    assert len(lines) == 2 and "does not score (" in lines[0] and "scores again, after" in lines[1]


def test_a_server_that_stays_away(impatient, capsys):
    url = free_url()
    start = time.monotonic()
    with pytest.raises(
        RewardError, match=rf"{url} did not score for \d s \(last: ConnectionRefusedError: .*max_wait is 0.5 s"
    ):
        scores_of(Remote(url, max_wait=0.5), **batch_for(IMAGES))
    assert 0.5 <= time.monotonic() - start < 3
    assert len(said(capsys)) == 1


def test_a_server_that_is_away_for_long_is_spoken_of_each_minute(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(client_module.time, "monotonic", lambda: clock[0])
    outage = client_module.Outage("http://here", max_wait=600)
    for clock[0] in (1.0, 2.0, 40.0, 60.0, 61.0, 100.0, 125.0, 130.0):
        outage.failed(1.0, "away", busy=False)
    outage.answered()
    waited = [line.partition("waited ")[2] for line in said(capsys)[:-1]]
    assert waited == ["0 of 600 s", "60 of 600 s", "124 of 600 s"]


def test_a_busy_server_is_not_spoken_of_at_every_step(impatient, monkeypatch, capsys):
    busy = iter([True, False] * 3)

    def answer(handler) -> tuple[int, bytes]:
        return (503, b'{"error": "busy"}') if next(busy) else (200, b'{"scores": [1.0]}')

    with strange_server(answer) as (url, _):
        remote = Remote(url)
        for _ in range(3):
            assert scores_of(remote, **batch_for(IMAGES[:1])) == [1.0]
    assert len(said(capsys)) == 2  # once that it waits, once that it continues


def test_an_answer_in_between_restarts_the_waiting(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(client_module.time, "monotonic", lambda: clock[0])
    outage = client_module.Outage("http://here", max_wait=10)
    for clock[0] in (1.0, 6.0):
        assert outage.failed(0.0, "away", busy=False) == 10 - clock[0]
    outage.answered()
    clock[0] = 12.0
    assert outage.failed(5.0, "away", busy=False) == 4  # away since the last answer, not since this try began
    clock[0] = 16.0
    with pytest.raises(RewardError, match="did not score for 10 s"):
        outage.failed(15.0, "away", busy=False)


def test_what_has_failed_is_not_tried_on(impatient):
    remote = Remote(free_url(), max_wait=60, concurrency=2, images_per_request=1)
    calls = []

    def refuse(*_):
        calls.append(None)
        if len(calls) >= 5:
            raise RewardError("enough")
        raise urllib3.exceptions.ProtocolError

    remote.client._post = refuse
    with pytest.raises(RewardError, match="enough"):
        scores_of(remote, **batch_for(IMAGES))
    time.sleep(0.1)  # a request may be on its way
    tries = len(calls)
    time.sleep(0.5)
    assert tries == len(calls) <= 6
