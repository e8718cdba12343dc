"""Limits of a server."""

from __future__ import annotations

from dataclasses import dataclass

from zepad_mm.utils.config import Config

MAX_LEVELS = 16  # largest budget on offer, in levels of 255


@dataclass(frozen=True, kw_only=True)
class ServeSettings(Config):
    """Limits of a server; requests beyond them are refused with a reason."""

    workers: int = 1  # requests computed at the same time; torch uses all cores for each
    queue: int = 16  # requests that may wait for a worker; more are answered 503
    connections: int = 256  # open connections; the next one ends the one that has waited longest, or is answered 503
    upload_mb: int = 10  # size of a request
    uploads_mb: int = 512  # size of all uploads: those being received, and those kept on disk for the page
    max_pixels: int = 25_000_000  # width times height of an image
    max_labels: int = 50  # candidate labels
    max_label_length: int = 100  # characters of a label, and of a template
    attack_steps: int = 20  # gradient steps of an attack on an image; a white box takes up to twelve times as many
    sessions: int = 128  # visitors of the page whose results are kept; the oldest are forgotten
    idle_s: int = 20  # seconds in which a request must arrive, and a client must read
    grace_s: int = 5  # seconds that open requests have when the server stops
    allowed_hosts: tuple[str, ...] = ()  # further names under which clients reach the server; * allows all
    page: bool = True  # False: the HTTP endpoint alone

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in self.limits().items():
            least = 0 if name == "queue" else 1
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")

    def limits(self) -> dict[str, int]:
        """The numbers among the settings."""
        return {name: value for name, value in self.to_dict().items() if name not in ("allowed_hosts", "page")}
