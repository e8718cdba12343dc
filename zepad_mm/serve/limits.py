"""A bound on concurrent and waiting requests."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


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
