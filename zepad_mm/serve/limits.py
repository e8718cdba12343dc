"""A bound on concurrent and waiting requests, and the 413 answer to requests that are too large.

FastAPI itself counts the bytes of a request (``FastAPI(max_body_size=...)``).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

from fastapi.responses import JSONResponse

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class BusyError(Exception):
    """All workers are busy and the queue is full."""


class RequestLimiter:
    """Lets ``workers`` threads compute at the same time and ``queue`` more wait.

    Args:
        workers: threads that compute at the same time.
        queue: threads that may wait for a worker.
    """

    def __init__(self, workers: int, queue: int) -> None:
        self._workers = threading.BoundedSemaphore(workers)
        self._admitted = threading.BoundedSemaphore(workers + queue)

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Hold a worker for the block, waiting for one if needed. Raises BusyError at once when the queue is full."""
        if not self._admitted.acquire(blocking=False):
            raise BusyError("all workers are busy and the queue is full; try again in a few seconds")
        try:
            with self._workers:
                yield
        finally:
            self._admitted.release()

    def is_full(self) -> bool:
        """Whether the next request would be refused."""
        if self._admitted.acquire(blocking=False):
            self._admitted.release()
            return False
        return True


class ExplainTooLarge:
    """ASGI middleware that replaces FastAPI's bare 413 by JSON that says what the limit is.

    FastAPI answers a request of declared length in plain text, before any exception handler sees it.

    Args:
        app: the application.
        max_body_size: limit in bytes, for the message.
    """

    def __init__(self, app: Any, max_body_size: int) -> None:
        self.app = app
        self.detail = f"the request is larger than {max_body_size / 2**20:.3g} MB; shrink the image"

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        replaced = False

        async def explain(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] == 413:
                replaced = True
                await JSONResponse({"detail": self.detail}, 413)(scope, receive, send)
            elif not replaced:
                await send(message)

        await self.app(scope, receive, explain)
