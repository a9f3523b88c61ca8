"""Reward: the scores of a server that `marval-rl rewards serve` started, here or on another machine."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from marval_rl.errors import RewardError
from marval_rl.rewarding.serving.client import RewardClient
from marval_rl.rewarding.serving.protocol import FORMATS, pack
from marval_rl.rewarding.serving.server import read_token


class Remote:
    """The scores of a reward in another process, which may have its own environment, machine and GPU.

    While the server refuses connections, is too slow or is busy, requests are repeated, less and less often, with a
    message on stderr. No request is sent before the first batch.

    Args:
        url: Of the server, such as http://127.0.0.1:8000.
        timeout: Seconds for one try of one request. Too short a timeout wastes the server's work.
        max_wait: Seconds without any answer after which a server that is away counts as lost.
        concurrency: Requests that are sent at the same time.
        images_per_request: Images per request; a batch is split into requests of this size.
        format: How images are sent: "uint8" (whole bytes; scores move as little as by rounding to 1/255), "png" (the
            same, compressed) or "float32" (every bit, four times the size).
        token: The server's token; None takes $MARVAL_RL_REWARD_TOKEN, if it is set.

    Raises:
        ValueError: For arguments that are not valid.
        RewardError: When called, for a server that stays away and for what another try would not change.
    """

    differentiable = False  # no gradient is sent

    def __init__(
        self,
        url: str,
        timeout: float = 60,
        max_wait: float = 600,
        concurrency: int = 4,
        images_per_request: int = 32,
        format: str = "uint8",
        token: str | None = None,
    ) -> None:
        if format not in FORMATS:
            raise ValueError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
        for name, value in (("concurrency", concurrency), ("images_per_request", images_per_request)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if timeout <= 0 or max_wait < 0:
            raise ValueError(f"timeout must be positive and max_wait not negative, not {timeout} and {max_wait}")
        self.client = RewardClient(url, read_token(token), timeout, max_wait, concurrency)
        self.concurrency = concurrency
        self.images_per_request = images_per_request
        self.format = format
        self._executors: dict[int, ThreadPoolExecutor] = {}

    async def __call__(
        self,
        *,
        images: Tensor,
        prompts: list[str],
        class_labels: Tensor,
        class_names: list[str],
        completions: Tensor | None = None,
        **columns: Sequence[Any],
    ) -> list[float | None]:
        """Scores images [B, 3, H, W] in 0..1 with lists of length B -> B scores, None where the server's reward leaves
        an image out. Columns must be what JSON can hold: text, numbers, lists."""
        stop, failed = threading.Event(), threading.Event()

        def score(start: int) -> list[float | None]:
            if failed.is_set():  # another request of the batch: nobody will read these scores
                return []
            part = slice(start, start + self.images_per_request)
            body = pack(
                images[part],
                prompts[part],
                class_names[part],
                class_labels[part].tolist(),
                {name: values[part] for name, values in columns.items()},
                self.format,
            )
            try:
                scores = self.client.score(body, stop)
            except RewardError as error:
                failed.set()
                raise RewardError(
                    f"{error} (images {start} to {start + len(images[part]) - 1} of the batch)"
                ) from error
            if len(scores) != len(images[part]):
                raise RewardError(f"{self.client.url} gave {len(scores)} scores for {len(images[part])} images")
            return scores

        starts = range(0, len(images), self.images_per_request)
        requests = [asyncio.get_running_loop().run_in_executor(self._threads(), score, start) for start in starts]
        try:
            return [value for scores in await asyncio.gather(*requests) for value in scores]
        finally:  # also by Ctrl-C: requests in flight must not outlive the batch
            stop.set()
            for request in requests:
                request.cancel()

    def _threads(self) -> ThreadPoolExecutor:
        """As many as requests at the same time, for all batches that wait; in each process its own, since threads do
        not survive a fork."""
        if os.getpid() not in self._executors:
            self._executors[os.getpid()] = ThreadPoolExecutor(self.concurrency, thread_name_prefix="remote-reward")
        return self._executors[os.getpid()]
