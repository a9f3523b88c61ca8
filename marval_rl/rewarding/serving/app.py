"""The HTTP interface of a reward: POST /score, GET /health, GET /version."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import threading
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from marval_rl import __version__
from marval_rl.errors import RewardError
from marval_rl.rewarding.serving.protocol import PROTOCOL, RequestTooLarge, too_many_bytes
from marval_rl.rewarding.serving.scoring import Scorer, ScoringQueue

BODY_SECONDS = 60  # the longest that a body may take to arrive, while it holds a place
RETRY_SECONDS = 1


def make_app(scorer: Scorer, max_waiting: int, token: str | None) -> FastAPI:
    """The application around one reward. token: what every request but /health must bring; None for none."""
    app = FastAPI(title="marval-rl reward", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    queue = ScoringQueue(max_waiting)

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
            "differentiable": False,  # no gradient comes over the wire
            "max_images": scorer.limits.max_images,
            "max_bytes": scorer.limits.max_bytes,
        }

    @app.post("/score")
    async def score(request: Request) -> JSONResponse:
        if not _is_allowed(request, token):
            await _discard(request)
            return _wrong_token()
        if not queue.enter():
            await _discard(request)
            return _error(503, f"busy: {max_waiting} requests wait already", {"Retry-After": str(RETRY_SECONDS)})
        try:
            return await _score(request, scorer, queue)
        except (TimeoutError, ClientDisconnect):
            return _error(408, f"the body did not arrive within {BODY_SECONDS} s")
        finally:
            queue.leave()

    return app


async def _score(request: Request, scorer: Scorer, queue: ScoringQueue) -> JSONResponse:
    try:
        body = await _read(request, scorer.limits.max_bytes)
        if body is None:
            raise too_many_bytes(scorer.limits)
        async with _abandoned(request) as abandoned:
            scores = await queue.run(partial(scorer, body), abandoned)
    except RequestTooLarge as error:
        return _error(413, str(error))
    except ValueError as error:
        return _error(400, str(error))
    except RewardError as error:
        return _error(422, str(error))
    return JSONResponse({"scores": scores})  # nobody reads what comes after an abandoned request


async def _read(request: Request, limit: int) -> bytes | None:
    """The body, or None if it is longer than limit.

    It is received to its end in any case, for a client that is still sending would not see the answer; what is beyond
    the limit is not kept.
    """
    chunks, size = [], 0
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
