"""The server's one scoring thread and the bounded queue before it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from marval_rl.errors import RewardError
from marval_rl.rewarding import RewardSet
from marval_rl.rewarding.serving.protocol import Limits, unpack

Result = TypeVar("Result")


class ScoringQueue:
    """Runs one job at a time, in the order they came.

    max_waiting  requests that may wait while one is worked on; each holds its body in memory

    Used from one event loop: `enter`, then `run`, then `leave`.
    """

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring")
        self._inside = 0

    def enter(self) -> bool:
        """Take a place; False if all are taken."""
        if self._inside > self.max_waiting:
            return False
        self._inside += 1
        return True

    def leave(self) -> None:
        self._inside -= 1

    async def run(self, job: Callable[[], Result], abandoned: threading.Event) -> Result | None:
        """The job's result, or None if `abandoned` was set before its turn came."""
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, lambda: None if abandoned.is_set() else job()
        )


class Scorer:
    """Scores the body of a request with a reward.

    rewards     a set of one reward
    device      where its images are put
    batch_size  images a call of the reward; None for all of a request at once
    """

    def __init__(self, rewards: RewardSet, device: str, limits: Limits, batch_size: int | None) -> None:
        self.rewards = rewards
        self.name = rewards.names[0]
        self.device = torch.device(device)
        self.limits = limits
        self.batch_size = batch_size

    def __call__(self, body: bytes) -> list[float | None]:
        """One score an image; None where the reward leaves it out.

        Raises RequestTooLarge, ValueError for a body that cannot be scored, and RewardError.
        """
        request = unpack(body, self.limits)
        count = len(request.images)
        size = self.batch_size or count
        scores: list[float | None] = []
        for start in range(0, count, size):
            part = slice(start, start + size)
            images = request.images[part].to(self.device)
            try:
                found = self.rewards.score(
                    images=images,
                    prompts=request.prompts[part],
                    class_labels=torch.tensor(request.class_labels[part], device=self.device),
                    class_names=request.class_names[part],
                    columns={name: values[part] for name, values in request.columns.items()},
                )
            except RewardError as error:
                if size >= count:
                    raise
                raise RewardError(f"{error} (samples counted from {start}, by --batch_size {size})") from error
            scores += [None if score != score else score for score in found.components[self.name].tolist()]
        return scores
