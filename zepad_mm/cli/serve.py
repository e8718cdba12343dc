"""``zepad serve``."""

from __future__ import annotations

from typing import Any

from zepad_mm.cli.common import MODEL, Command, UsageError, told


def _declare(parser: Any) -> None:
    parser.add_argument("model", type=str, default="embedded", nargs="?", help=MODEL)
    parser.add_argument("--host", type=str, default="127.0.0.1", help="0.0.0.0 lets the whole network in")
    parser.add_argument("--port", type=int, default=7860, help="0 takes a free one")
    parser.add_argument("--device", type=str, default=None, help="e.g. cuda (default: the CPU)")
    parser.add_argument("--workers", type=int, default=1, help="requests that are computed at the same time")
    parser.add_argument("--queue", type=int, default=16, help="requests that may wait; more are answered 503")
    parser.add_argument("--perturbation", type=str, default=None, help="file of zepad attack (default: one is made)")
    parser.add_argument("--no-page", action="store_true", help="the HTTP endpoint alone")


def _run(options: Any) -> int:
    try:
        from zepad_mm.serve import ServeSettings, serve
    except ModuleNotFoundError as error:
        raise UsageError(f"zepad serve needs {error.name}: pip install 'zepad-mm[serve]'") from error
    settings = ServeSettings(workers=options.workers, queue=options.queue, page=not options.no_page)

    def ready(url: str) -> None:
        told(options, {"url": url}, f"Serving {options.model} on {url} (endpoint: {url}/docs); stop it with Ctrl-C")

    serve(
        options.model,
        host=options.host,
        port=options.port,
        device=options.device,
        perturbation=options.perturbation,
        settings=settings,
        ready=ready,
    )
    return 0


SERVE = Command(
    about="Serve a page and an HTTP endpoint, on this machine alone unless told otherwise.",
    example="zepad serve embedded --port 7860",
    declare=_declare,
    run=_run,
)
