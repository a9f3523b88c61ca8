"""The HTTP interface of a reward: POST /score, GET /health, GET /version."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from marval_rl import __version__
from marval_rl.errors import RewardError
from marval_rl.rewarding import RewardSet
from marval_rl.rewarding.serving.protocol import PROTOCOL, Limits, RequestTooLarge, too_many_bytes, unpack

BODY_SECONDS = 60  # the longest that a body may take to arrive, while it holds a place
RETRY_SECONDS = 1


class Scorer:
    """Scores the body of a request with a reward.

    Args:
        rewards: A set of one reward.
        device: Where its images are put.
        batch_size: Images per call of the reward; None for all images of a request at once.
    """

    def __init__(self, rewards: RewardSet, device: str, limits: Limits, batch_size: int | None) -> None:
        self.rewards = rewards
        [self.name] = rewards.names
        self.device = torch.device(device)
        self.limits = limits
        self.batch_size = batch_size

    def __call__(self, body: bytes) -> list[float | None]:
        """Returns one score per image; None where the reward leaves it out.

        Raises:
            RequestTooLarge: For more images or bytes than the limits allow.
            ValueError: For a body that cannot be scored.
            RewardError: For a reward that fails.
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


def make_app(scorer: Scorer, max_waiting: int, token: str | None) -> FastAPI:
    """Returns the application around one reward, which scores one request at a time, in the order they came.

    Args:
        max_waiting: Requests that may wait while one is scored; each holds its body in memory.
        token: What every request but /health must bring; None for none.
    """
    app = FastAPI(title="marval-rl reward", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring")
    num_accepted = 0  # requests that are scored or wait

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/version")
    async def version(request: Request) -> Any:
        if not _is_allowed(request, token):
            return _wrong_token()
        return {
            "package": __version__,
            "protocol": PROTOCOL,
            "reward": scorer.name,
            "differentiable": False,  # no gradient is sent
            "max_images": scorer.limits.max_images,
            "max_bytes": scorer.limits.max_bytes,
        }

    @app.post("/score")
    async def score(request: Request) -> JSONResponse:
        nonlocal num_accepted
        if not _is_allowed(request, token):
            await _discard(request)
            return _wrong_token()
        if num_accepted > max_waiting:
            await _discard(request)
            return _error(503, f"busy: {max_waiting} requests wait already", {"Retry-After": str(RETRY_SECONDS)})
        num_accepted += 1
        try:
            return await _score(request, scorer, executor)
        except (TimeoutError, ClientDisconnect):
            return _error(408, f"the body did not arrive within {BODY_SECONDS} s")
        finally:
            num_accepted -= 1

    return app


async def _score(request: Request, scorer: Scorer, executor: ThreadPoolExecutor) -> JSONResponse:
    try:
        body = await _read(request, scorer.limits.max_bytes)
        if body is None:
            raise too_many_bytes(scorer.limits)
        async with _abandoned(request) as abandoned:
            scores = await asyncio.get_running_loop().run_in_executor(
                executor, lambda: None if abandoned.is_set() else scorer(body)
            )
    except RequestTooLarge as error:
        return _error(413, str(error))
    except ValueError as error:
        return _error(400, str(error))
    except RewardError as error:
        return _error(422, str(error))
    return JSONResponse({"scores": scores})  # nobody reads what comes after an abandoned request


async def _read(request: Request, limit: int) -> bytes | None:
    """Returns the body, or None if it is longer than limit.

    It is received to its end in any case, for a client that is still sending would not see the answer; bytes beyond
    the limit are not kept.
    """
    chunks: list[bytes] = []
    size = 0
    async with asyncio.timeout(BODY_SECONDS):
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                chunks.clear()
            else:
                chunks.append(chunk)
    return None if size > limit else b"".join(chunks)


async def _discard(request: Request) -> None:
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        await _read(request, 0)


@contextlib.asynccontextmanager
async def _abandoned(request: Request) -> AsyncIterator[threading.Event]:
    """An event that is set when the client goes away: it will ask again, so nobody waits for these scores."""
    event = threading.Event()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        event.set()

    task = asyncio.create_task(watch())
    try:
        yield event
    finally:
        task.cancel()


def _is_allowed(request: Request, token: str | None) -> bool:
    if token is None:
        return True
    given = request.headers.get("authorization", "")
    return hmac.compare_digest(given.encode(), f"Bearer {token}".encode())  # in constant time


def _wrong_token() -> JSONResponse:
    return _error(401, "missing or wrong token", {"WWW-Authenticate": "Bearer"})


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": message}, status, headers)
