"""Reward servers for tests: in a thread of this process, or as a process that can be killed."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import uvicorn
from torch import Tensor

from marval_rl.rewarding import RewardSet
from marval_rl.rewarding.serving.app import make_app
from marval_rl.rewarding.serving.protocol import Limits, pack
from marval_rl.rewarding.serving.scoring import Scorer

REWARDS = Path(__file__).with_name("remote_rewards.py")
ROOT = Path(__file__).parents[1]


@contextmanager
def thread_server(
    reward: Any,
    token: str | None = None,
    limits: Limits | None = None,
    max_waiting: int = 16,
    batch_size: int | None = None,
) -> Iterator[str]:
    """Serves a reward from a thread; yields the url."""
    scorer = Scorer(RewardSet([reward]), "cpu", limits or Limits(), batch_size)
    app = make_app(scorer, max_waiting, token)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


class ServerProcess:
    """`python -m marval_rl.rewarding.serving.server` with a reward of remote_rewards.py, on a free port."""

    def __init__(self, reward: str, *flags: str) -> None:
        self.reward, self.flags = reward, flags
        self.port = 0
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "marval_rl.rewarding.serving.server", f"{REWARDS}:{self.reward}"),
                *("--port", str(self.port), *self.flags),
            ],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        line = self.process.stdout.readline()
        assert "is served at http://" in line, line
        self.url = line.split()[-1]
        self.port = urlsplit(self.url).port
        wait_until(lambda: is_healthy(self.url))

    def kill(self) -> None:
        """As by a power cut."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.kill()


def wait_until(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def is_healthy(url: str) -> bool:
    try:
        return ask(url, "GET", "/health") == (200, {"status": "ok"})
    except OSError:
        return False


def free_url() -> str:
    """A url where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def ask(url: str, method: str, path: str, body: bytes | None = None, token: str | None = None) -> tuple[int, Any]:
    """(status, JSON) of one request."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    try:
        connection.request(method, path, body, {} if token is None else {"Authorization": f"Bearer {token}"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def body_for(images: Tensor, format: str = "uint8", **columns: list[Any]) -> bytes:
    count = len(images)
    return pack(images, ["a prompt"] * count, ["a name"] * count, [0] * count, columns, format)


def batch_for(images: Tensor) -> dict[str, Any]:
    """What a reward is called with."""
    count = len(images)
    return {
        "images": images,
        "prompts": ["a prompt"] * count,
        "class_names": ["a name"] * count,
        "class_labels": torch.zeros(count, dtype=torch.int64),
    }
