"""Reward: whatever a server gives that `marval-rl rewards serve` started, here or on another machine."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from torch import Tensor

from marval_rl.errors import RewardError
from marval_rl.rewarding.serving.client import RewardClient
from marval_rl.rewarding.serving.protocol import FORMATS, pack
from marval_rl.rewarding.serving.server import read_token


class Remote:
    """The scores of a reward in another process, which may have its own environment, machine and GPU.

    url                 of the server, such as http://127.0.0.1:8000
    timeout             seconds for one try of one request. One that is too short makes the server score in vain.
    max_wait            seconds without any answer after which a server that is away counts as lost
    concurrency         requests at a time
    images_per_request  images of a request; a batch is split into so many
    format              how images are sent: "uint8" (whole bytes; scores move by as little as rounding to 1/255 does),
                        "png" (the same, compressed) or "float32" (every bit, four times the size)
    token               the server's token; None takes $MARVAL_RL_REWARD_TOKEN, if it is set

    While the server is refused, too slow or busy, requests are repeated, less and less often, and stderr says so.
    Nothing is asked of the server before the first batch.

    Raises ValueError for arguments that do not fit; in use RewardError, for a server that stays away and for what
    trying again would not change.
    """

    differentiable = False  # no gradient comes over the wire

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
        self.client = RewardClient(url, read_token(token), timeout, max_wait)
        self.concurrency = concurrency
        self.images_per_request = images_per_request
        self.format = format

    def __call__(
        self,
        *,
        images: Tensor,
        prompts: list[str],
        class_labels: Tensor,
        class_names: list[str],
        completions: Tensor | None = None,
        **columns: Sequence[Any],
    ) -> list[float | None]:
        """Images [B, 3, H, W] in 0..1 and lists of length B -> B scores, None where the server's reward leaves an image
        out. Columns must be text, numbers, lists and the like: what JSON carries."""
        stop = threading.Event()

        def score(start: int) -> list[float | None]:
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
                raise RewardError(
                    f"{error} (images {start} to {start + len(images[part]) - 1} of the batch)"
                ) from error
            if len(scores) != len(images[part]):
                raise RewardError(f"{self.client.url} gave {len(scores)} scores for {len(images[part])} images")
            return scores

        executor = ThreadPoolExecutor(self.concurrency, thread_name_prefix="remote-reward")
        try:
            futures = [executor.submit(score, start) for start in range(0, len(images), self.images_per_request)]
            wait(futures, return_when=FIRST_EXCEPTION)
            failed = [future for future in futures if future.done() and future.exception() is not None]
            return [value for future in failed or futures for value in future.result()]
        finally:  # also by Ctrl-C: what waits for the server must not outlive the batch
            stop.set()
            executor.shutdown(wait=False, cancel_futures=True)
