"""Run the server."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from zepad_mm.attacks import Perturbation
from zepad_mm.classifier import RobustZeroShotClassifier
from zepad_mm.serve.endpoint import create_app
from zepad_mm.serve.service import Service
from zepad_mm.serve.settings import ServeSettings


def serve(
    model: str | Path = "embedded",
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str | None = None,
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
        classifier = RobustZeroShotClassifier.from_pretrained(model, device=device)
        app = create_app(Service(classifier, settings, given))
        config = uvicorn.Config(
            app, log_level="warning", limit_concurrency=settings.connections, timeout_keep_alive=60, server_header=False
        )
        if ready is not None:
            shown = "[" + host + "]" if ":" in host else host
            ready(f"http://{shown}:{listener.getsockname()[1]}")
        uvicorn.Server(config).run(sockets=[listener])


def _listening_socket(host: str, port: int) -> socket.socket:
    """A listening socket: clients that connect while the model is loading wait."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error}; choose another with --host and --port") from error
    return listener
