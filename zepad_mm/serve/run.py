"""Run the server."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from zepad_mm.attacks import Perturbation
from zepad_mm.classifier import RobustZeroShotClassifier
from zepad_mm.models.config import Policy
from zepad_mm.serve.endpoint import create_app
from zepad_mm.serve.limits import TimedProtocol
from zepad_mm.serve.service import Service
from zepad_mm.serve.settings import ServeSettings

MAX_HEADERS = 16 * 1024  # bytes of the head of a request

LAST_PORT = 2**16 - 1


def serve(
    model: str | Path = "embedded",
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str | None = None,
    policy: Policy | None = None,
    perturbation: str | Path | None = None,
    settings: ServeSettings | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve a model until interrupted.

    Args:
        model: as for ``RobustZeroShotClassifier.from_pretrained``.
        host: address to listen on; the default is reachable from this machine only.
        port: 0 takes a free one.
        device: None is the CPU.
        policy: of requests that name none: "zero_sacrifice" or "white_box"; None: the model's own.
        perturbation: file of ``zepad attack``, for the attack "universal".
        settings: limits.
        ready: called with the URL once the server accepts connections.

    Raises:
        ValueError: the port is taken or the host is not an address of this machine; errors of loading the model.
    """
    settings = settings or ServeSettings()
    given = None if perturbation is None else Perturbation.load(perturbation)
    listener = _listening_socket(host, port)
    with listener:
        classifier = RobustZeroShotClassifier.from_pretrained(model, device=device, policy=policy)
        service = Service(classifier, settings, given)
        server = _Server(server_config(create_app(service, host), settings), service)
        if ready is not None:
            shown = "[" + host + "]" if ":" in host else host
            ready(f"http://{shown}:{listener.getsockname()[1]}")
        try:
            _run(server, listener)
        finally:
            service.limiter.close()


def server_config(app: FastAPI, settings: ServeSettings) -> uvicorn.Config:
    """The configuration of uvicorn for an application with these limits."""
    return uvicorn.Config(
        app,
        http=TimedProtocol,
        ws="none",
        log_level="warning",
        limit_concurrency=settings.connections,
        h11_max_incomplete_event_size=MAX_HEADERS,
        timeout_keep_alive=settings.idle_s,
        timeout_graceful_shutdown=settings.grace_s,
        server_header=False,
    )


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    """Run the server until it is stopped; in a thread of its own where this one runs an event loop, as in Jupyter."""
    run = partial(server.run, sockets=[listener])
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        run()
        return
    with server.capture_signals():
        thread = threading.Thread(target=run, name="zepad-serve", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(0.2)
        finally:
            server.should_exit = True
            thread.join()


class _Server(uvicorn.Server):
    """A server that refuses waiting requests as soon as a signal asks it to stop."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.limiter.close()
        super().handle_exit(sig, frame)


def _listening_socket(host: str, port: int) -> socket.socket:
    """A listening socket: clients that connect while the model is loading wait."""
    if not 0 <= port <= LAST_PORT:  # the system would take the remainder
        raise ValueError(f"port: expected a number from 0 (a free one) to {LAST_PORT}, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error}; choose another with --host and --port") from error
    return listener
