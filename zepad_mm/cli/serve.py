"""``zepad serve``."""

from __future__ import annotations

import sys
from typing import Any

from zepad_mm.cli.common import MODEL, Command, UsageError, check_policy, declare_policy, print_result
from zepad_mm.cli.settings_options import SettingsOptions
from zepad_mm.utils.stopping import STOPPED, exit_at_once

SERVE_OPTIONS = SettingsOptions(
    "serve/settings.py:ServeSettings",
    {
        "--workers": "workers",
        "--queue": "queue",
        "--upload-mb": "upload_mb",
        "--uploads-mb": "uploads_mb",
        "--allowed-hosts": "allowed_hosts",
        "--no-page": "page",
    },
)


def _declare(parser: Any) -> None:
    parser.add_argument("model", type=str, default="embedded", nargs="?", help=MODEL)
    parser.add_argument("--host", type=str, default="127.0.0.1", help="0.0.0.0 opens it to the whole network")
    parser.add_argument("--port", type=int, default=7860, help="0 takes a free one")
    parser.add_argument("--device", type=str, default=None, help="e.g. cuda (default: the CPU)")
    parser.add_argument("--perturbation", type=str, default=None, help="file of zepad attack (default: one is made)")
    declare_policy(parser)
    SERVE_OPTIONS.declare(parser)


def _run(options: Any) -> int:
    check_policy(options)
    try:
        from zepad_mm.serve import ServeSettings, serve
    except ModuleNotFoundError as error:
        raise UsageError(f"zepad serve needs {error.name}: pip install 'zepad-mm[serve]'") from error

    def ready(url: str) -> None:
        text = f"Serving {options.model} on {url} (endpoint: {url}/docs); stop it with Ctrl-C"
        print_result(options, {"url": url}, text)

    try:
        serve(
            options.model,
            host=options.host,
            port=options.port,
            device=options.device,
            policy=options.policy,
            perturbation=options.perturbation,
            settings=ServeSettings(**SERVE_OPTIONS.given(options)),
            ready=ready,
        )
    except KeyboardInterrupt:  # once the grace period is over; a request may still compute
        print("zepad: stopped", file=sys.stderr)
        exit_at_once(STOPPED)
    return 0


SERVE = Command(
    about="Serve a page and an HTTP endpoint, by default to this machine only.",
    example="zepad serve embedded --port 7860",
    declare=_declare,
    run=_run,
)
