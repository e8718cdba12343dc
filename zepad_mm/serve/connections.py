"""Connections that wait: each for a bounded time, and none keeps others out."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


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
