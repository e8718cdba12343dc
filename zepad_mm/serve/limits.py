"""Bounds of the server: concurrent requests, connections that wait, and the folder of uploads."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from uvicorn.protocols.http.h11_impl import H11Protocol

BLOCK = 4096  # bytes that a file takes at least
IN_USE_S = 60  # files younger than this are not deleted


@cache
def upload_folder() -> Path:
    """A folder of this process alone, removed with it; gradio finds it by an environment variable at every use."""
    folder = TemporaryDirectory(prefix="zepad-uploads-")
    atexit.register(folder.cleanup)
    os.environ["GRADIO_TEMP_DIR"] = folder.name
    return Path(folder.name).resolve()


class Uploads:
    """The files below a folder, of which the oldest give way to new ones.

    Args:
        folder: what lies in it already is kept.
        limit: bytes of all files.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._kept = {path for path, _, _ in self._files()}

    def make_room(self, wanted: int) -> bool:
        """Delete the oldest files until ``wanted`` more bytes fit. Returns False when they do not."""
        files = sorted(self._files(), key=lambda file: file[1])
        total = sum(size for _, _, size in files)
        for path, changed, size in files:
            if total + wanted <= self.limit:
                break
            if path in self._kept or time.time() - changed < IN_USE_S:
                continue
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                path.parent.rmdir()
            total -= size
        return total + wanted <= self.limit

    def _files(self) -> list[tuple[Path, float, int]]:
        """(path, time of change, bytes on disk) of each file."""
        found = []
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = Path(folder) / name
                try:
                    status = path.lstat()
                except FileNotFoundError:  # deleted meanwhile
                    continue
                found.append((path, status.st_mtime, max(status.st_size, BLOCK)))
        return found


class TimedProtocol(H11Protocol):
    """HTTP/1.1 in which a request must arrive within ``timeout_keep_alive`` seconds, on a new connection too.

    uvicorn itself begins to count after the first answer. When all connections are in use, a new one takes the place
    of the one that has waited longest for its request.
    """

    _expiry: asyncio.TimerHandle | None = None
    waiting_since: float | None = None  # None while a request is answered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._make_room()
        self._wait()

    def data_received(self, data: bytes) -> None:
        answered = self.cycle
        super().data_received(data)
        if self.cycle is not answered and not self.cycle.response_complete:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        self._wait()
        answered = self.cycle
        super().on_response_complete()  # may begin the next request
        if self.cycle is not answered:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._stop_waiting()
        self.waiting_since = self.loop.time()
        self._expiry = self.loop.call_later(self.timeout_keep_alive, self.transport.close)

    def _stop_waiting(self) -> None:
        self.waiting_since = None
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def _make_room(self) -> None:
        if self.limit_concurrency is None or len(self.connections) < self.limit_concurrency:
            return
        waiting = [other for other in self.connections if getattr(other, "waiting_since", None) is not None]
        if waiting:
            longest = min(waiting, key=lambda other: other.waiting_since)  # type: ignore[union-attr]
            longest.transport.abort()  # type: ignore[union-attr]
            self.connections.discard(longest)


class BusyError(Exception):
    """All workers are busy and the queue is full, or the server is stopping."""


class RequestLimiter:
    """Lets ``workers`` threads compute at the same time and ``queue`` more wait.

    Args:
        workers: threads that compute at the same time.
        queue: threads that may wait for a worker.
    """

    def __init__(self, workers: int, queue: int) -> None:
        self._workers = threading.BoundedSemaphore(workers)
        self._admitted = threading.BoundedSemaphore(workers + queue)
        self._closed = False

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Hold a worker for the block, waiting for one if needed. Raises BusyError at once when the queue is full."""
        if not self._admitted.acquire(blocking=False):
            raise BusyError("all workers are busy and the queue is full; try again in a few seconds")
        try:
            with self._workers:
                if self._closed:
                    raise BusyError("the server is stopping")
                yield
        finally:
            self._admitted.release()

    def close(self) -> None:
        """Refuse the requests that wait and those that come, so that a stopping server does not compute them."""
        self._closed = True

    def is_full(self) -> bool:
        """Whether the next request would be refused."""
        if self._admitted.acquire(blocking=False):
            self._admitted.release()
            return False
        return True
