"""The page in a real browser."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from zepad_mm.serve import Service, create_app
from zepad_mm.serve.run import server_config

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@contextmanager
def running(service: Service) -> Iterator[str]:
    """URL of a server in a thread of this process; it ends with the block."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(server_config(create_app(service), service.settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def attack_example(page: Any, labels: str, attack: str) -> None:
    """Attack the first example image, and wait for the verdict."""
    page.locator(".gallery-item").first.click()
    page.get_by_label("Remove Image").first.wait_for(timeout=60_000)  # the image is there
    page.get_by_label("Labels, separated by commas").fill(labels)
    page.get_by_label("True label").fill(labels.split(",", maxsplit=1)[0])
    page.get_by_label(attack, exact=True).first.check()  # a policy may have the same name
    page.locator("#run").click()
    page.locator("#verdict").wait_for(timeout=60_000)
