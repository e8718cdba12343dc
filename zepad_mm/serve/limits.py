"""How much at once: a queue that says when it is full, and requests that are cut off when they are too long."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LINGER = 4  # refused requests are read on, and thrown away, to this many times the limit ...
LINGER_SECONDS = 10.0  # ... and this long: a connection that is closed on unread bytes loses the answer too


class BusyError(Exception):
    """All workers are at work and the queue is full: try again later."""


class Desk:
    """Lets ``workers`` threads work at the same time and ``queue`` more wait.

    Args:
        workers, queue: see above.
    """

    def __init__(self, workers: int, queue: int) -> None:
        self._workers = threading.BoundedSemaphore(workers)
        self._places = threading.BoundedSemaphore(workers + queue)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a worker. Raises BusyError at once when the queue is full."""
        if not self._places.acquire(blocking=False):
            raise BusyError("all workers are busy and the queue is full; try again in a few seconds")
        try:
            with self._workers:
                yield
        finally:
            self._places.release()


class BodyLimit:
    """ASGI middleware that answers 413 to requests beyond ``limit`` bytes, before they lie on the disk.

    Args:
        app: what is protected.
        limit: bytes.
    """

    def __init__(self, app: Any, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limit:
            await self._discard(receive)
            await self._refuse(send)
            return
        read, refused = 0, False

        async def counted() -> Message:
            nonlocal read, refused
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.limit and not refused:  # its length was not declared, or not as it is
                refused = True
                if message.get("more_body"):
                    await self._discard(receive)
                await self._refuse(send)
            return {"type": "http.disconnect"} if refused else message

        async def once(message: Message) -> None:
            if not refused:
                await send(message)

        try:
            await self.app(scope, counted, once)
        except Exception:
            if not refused:  # the app stumbles over the end that we made
                raise

    async def _refuse(self, send: Send) -> None:
        from fastapi.responses import JSONResponse

        detail = f"the request is larger than {self.limit / 2**20:.3g} MB; shrink the picture"
        answer = JSONResponse({"detail": detail}, 413, headers={"Connection": "close"})
        await send({"type": "http.response.start", "status": 413, "headers": answer.raw_headers})
        await send({"type": "http.response.body", "body": bytes(answer.body)})

    async def _discard(self, receive: Receive) -> None:
        read, more = 0, True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while more and read <= LINGER * self.limit:
                    message = await receive()
                    read += len(message.get("body", b""))
                    more = message.get("more_body", False)
