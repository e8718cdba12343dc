"""The one layer of limits that every request passes, whichever application answers it.

It checks who asks (the Host and Origin headers), what (the routes of the page are an allow-list), how much (bytes of
a request and of all requests together, open streams) and how long. Every refusal is JSON with a ``detail``.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse

from zepad_mm.serve.settings import ServeSettings
from zepad_mm.utils.text import quoted

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
# routes of the endpoint and its documentation; those of the page are in page_requests.py
ENDPOINT = "/v1/"
DOCS, OPENAPI = "/docs", "/openapi.json"


class RefusedError(Exception):
    """A request that is refused.

    Args:
        status: of the answer.
        detail: the reason.
    """

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class PageGuard(Protocol):
    """What the page asks of requests for its own routes; see :class:`zepad_mm.serve.page_requests.PageRequests`."""

    def body_limit(self, path: str) -> int:
        """Bytes of a request."""

    async def admit(self, scope: MutableMapping[str, Any], receiving: int) -> None:
        """Check a request before its body is read. Raises RefusedError."""

    def is_stream(self, path: str) -> bool:
        """Whether the answer stays open."""

    def has_checked_body(self, path: str) -> bool:
        """Whether :meth:`checked_body` applies."""

    async def checked_body(self, path: str, body: bytes) -> bytes:
        """The body that is handed on. Raises RefusedError."""


class Gateway:
    """ASGI middleware around the whole application.

    Args:
        app: the application.
        settings: the limits.
        host: address that the server listens on.
        page: checks of the page's routes; None: there is no page, and the application answers every route.
    """

    def __init__(self, app: Any, settings: ServeSettings, host: str, page: PageGuard | None = None) -> None:
        self.app = app
        self.settings = settings
        self.hosts = AllowedHosts(host, settings.allowed_hosts)
        self.page = page
        self.receiving = 0  # bytes of bodies that are being received
        self.streams = 0  # open streams

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await _Exchange(self, scope, receive, send).run()
        else:
            await self.app(scope, receive, send)


class AllowedHosts:
    """The names under which clients may reach the server.

    Pages of other sites cannot choose the Host header, but can let their own name resolve to this machine (DNS
    rebinding): so a name is allowed only if it is known to be of this machine.

    Args:
        bound: address that the server listens on; the loopback addresses if it is one of those.
        extra: further names; "*" allows all.
    """

    def __init__(self, bound: str, extra: Iterable[str] = ()) -> None:
        self.names = {"localhost", *(name.lower() for name in extra)}
        self.explicit = set(self.names)
        self.addresses = not _is_loopback(bound)  # IP addresses do not resolve, so they cannot be rebound
        if self.addresses:
            self.names |= {bound.lower(), socket.gethostname().lower()}

    def allow(self, host: str) -> bool:
        """Whether a Host header is one of the names, or an address of the kind that the server listens on."""
        name = host_name(host)
        if name in self.names or "*" in self.names or _is_loopback(name):
            return True
        return self.addresses and _address(name) is not None

    def same_origin(self, origin: str, host: str) -> bool:
        """Whether a page at an Origin header is one of this server's, or one of an explicitly allowed name."""
        try:
            parts = urlsplit(origin)
            ports = {"http": 80, "https": 443}
            asked = urlsplit(f"{parts.scheme}://{host}")
            same = (parts.hostname, parts.port or ports.get(parts.scheme)) == (
                asked.hostname,
                asked.port or ports.get(parts.scheme),
            )
        except ValueError:
            return False
        if parts.scheme not in ports or parts.hostname is None:
            return False
        return same or (parts.hostname in self.explicit - {"localhost"}) or "*" in self.explicit


class _Exchange:
    """One request and its answer, held to the limits."""

    def __init__(self, gateway: Gateway, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self.gateway = gateway
        self.settings = gateway.settings
        self.scope = scope
        self.path: str = scope["path"]
        own = self.path in (DOCS, OPENAPI) or self.path.startswith((ENDPOINT, f"{DOCS}/"))
        self.page = None if own else gateway.page
        # not FastAPI's max_body_size: that is one limit for all routes, and bounds neither all bodies together nor time
        self.limit = self.page.body_limit(self.path) if self.page else self.settings.upload_mb * 2**20
        self._receive, self._send = receive, send
        self.received = 0
        self.complete = False  # the whole body has arrived
        self.started = False  # the answer has begun
        self.refusal: RefusedError | None = None
        self.deadline = asyncio.get_running_loop().time() + self.settings.idle_s

    async def run(self) -> None:
        streams = 0
        try:
            self._check_headers()
            if self.page is not None:
                await self.page.admit(self.scope, self.gateway.receiving)
                streams = int(self.page.is_stream(self.path))
            if streams and self.gateway.streams >= max(1, self.settings.connections // 4):
                raise RefusedError(503, "too many open streams; try again in a few seconds")
            self.gateway.streams += streams
            receive: Receive = self.receive
            if self.page is not None and self.page.has_checked_body(self.path):
                receive = await self._checked_body(self.page)
            await self.gateway.app(self.scope, receive, self.send)
        except RefusedError as error:
            self.refusal = self.refusal or error
        except asyncio.CancelledError:  # by uvicorn after the grace period, which would log a traceback
            self.refusal = RefusedError(503, "the server is stopping")
        except Exception:
            if self.refusal is None:
                raise
        finally:
            self.gateway.receiving -= self.received
            self.gateway.streams -= streams
        if self.refusal is not None and not self.started:
            headers = {"Retry-After": "2"} if self.refusal.status == 503 else None
            answer = JSONResponse({"detail": self.refusal.detail}, self.refusal.status, headers=headers)
            await answer(self.scope, self._receive, self._send_in_time)

    def _check_headers(self) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in self.scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.gateway.hosts.allow(host):
            raise RefusedError(
                400, f"the host {quoted(host)} is not one of this server's; to allow it: --allowed-hosts NAME"
            )
        foreign = origin is not None and not self.gateway.hosts.same_origin(origin, host)
        embedded = headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate"
        if foreign or (origin is None and embedded):
            raise RefusedError(403, "requests from pages of another origin are refused")
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > self.limit:
            raise self._too_large()

    def _too_large(self) -> RefusedError:
        size = f"{self.limit / 2**20:.3g} MB" if self.limit >= 2**20 else f"{self.limit:,} bytes"
        hint = "; shrink the image" if self.limit >= 2**20 else ""
        return RefusedError(413, f"the request is larger than {size}{hint}")

    async def receive(self) -> Message:
        """The next part of the request, unless it is too much or too late."""
        if self.complete:  # the application waits for the client to leave
            return await self._receive()
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self._receive()
            size = len(message.get("body", b""))
            self.received += size
            self.gateway.receiving += size
            if self.received > self.limit:
                raise self._too_large()
            if self.gateway.receiving > self.settings.uploads_mb * 2**20:
                raise RefusedError(503, "too much is being uploaded; try again in a few seconds")
        except TimeoutError:
            self.refusal = RefusedError(408, f"the request did not arrive within {self.settings.idle_s} seconds")
            raise self.refusal from None
        except RefusedError as error:
            self.refusal = error  # applications may take it for a damaged form
            raise
        self.complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def _checked_body(self, page: PageGuard) -> Receive:
        body = bytearray()
        while not self.complete:
            body += (await self.receive()).get("body", b"")
        checked = await page.checked_body(self.path, bytes(body))
        headers = [(name, value) for name, value in self.scope["headers"] if name != b"content-length"]
        self.scope["headers"] = [*headers, (b"content-length", str(len(checked)).encode())]
        messages = [{"type": "http.request", "body": checked, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await self._receive()

        return replay

    async def send(self, message: Message) -> None:
        """Hand on the answer, unless it was refused; errors of the page get a reason of ours."""
        if message["type"] == "http.response.start" and self.page is not None and message["status"] >= 400:
            self.refusal = self.refusal or RefusedError(message["status"], _phrase(message["status"]))
        if self.refusal is None or self.started:
            self.started = True
            await self._send_in_time(message)

    async def _send_in_time(self, message: Message) -> None:
        async with asyncio.timeout(self.settings.idle_s):
            await self._send(message)


def host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.rpartition(":")[0] if name.count(":") == 1 else name


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _is_loopback(name: str) -> bool:
    address = _address(name)
    return name.lower() == "localhost" or (address is not None and address.is_loopback)


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "refused"
