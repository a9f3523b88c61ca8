"""Reward servers for tests: in a thread of this process, or as a process that can be killed."""

from __future__ import annotations

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
import urllib3
import uvicorn
from torch import Tensor

from marval_rl.rewarding import RewardSet
from marval_rl.rewarding.serving.app import Scorer, make_app
from marval_rl.rewarding.serving.protocol import Limits, pack

REWARDS = Path(__file__).with_name("remote_rewards.py")
ROOT = Path(__file__).parents[1]


class ThreadServer:
    """Serves a reward from a thread of this process; may be stopped and started again on its port."""

    def __init__(
        self,
        reward: Any,
        token: str | None = None,
        limits: Limits | None = None,
        max_waiting: int = 16,
        batch_size: int | None = None,
    ) -> None:
        self.app = make_app(Scorer(RewardSet([reward]), "cpu", limits or Limits(), batch_size), max_waiting, token)
        self.port = 0
        self.start()

    def start(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_level="error", timeout_graceful_shutdown=5))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()
        wait_until(lambda: self.server.started)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.listener.close()


@contextmanager
def thread_server(reward: Any, **settings: Any) -> Iterator[str]:
    """Yields the url of a ThreadServer."""
    server = ThreadServer(reward, **settings)
    try:
        yield server.url
    finally:
        server.stop()


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
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def is_healthy(url: str) -> bool:
    try:
        return ask(url, "GET", "/health") == (200, {"status": "ok"})
    except urllib3.exceptions.HTTPError:
        return False


def free_url() -> str:
    """A url where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def ask(url: str, method: str, path: str, body: bytes | None = None, token: str | None = None) -> tuple[int, Any]:
    """(status, JSON) of one request."""
    headers = {"Connection": "close"} if token is None else {"Connection": "close", "Authorization": f"Bearer {token}"}
    response = urllib3.request(method, url + path, body=body, headers=headers, retries=False, timeout=30)
    return response.status, response.json()


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
