"""Finished stages of an evaluation on disk, so that a killed run repeats at most one batch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from zepad_mm.utils.io import read_json, read_tensors, write_json, write_tensors
from zepad_mm.utils.provenance import changed_keys

BATCHES = "parts"  # sub-folder for the finished batches of the stage in progress
IDENTITY = "identity.json"


class StageCache:
    """The folder ``out/cache`` of one evaluation: a file per stage, and the batches of the stage in progress."""

    def __init__(self, out: Path) -> None:
        self.folder = out / "cache"

    def open(self, identity: dict[str, str], resume: bool) -> None:
        """Keep the stages of the same evaluation if ``resume``, else delete what is there.

        Raises:
            ValueError: the stages to resume belong to another model, other images or settings, or the folder holds
                something else.
        """
        known = self.folder / IDENTITY
        if resume and known.is_file():
            before = read_json(known)
            changed = changed_keys(before, identity)
            if changed:
                raise ValueError(
                    f"{self.folder} holds stages of another run: {', '.join(changed)} differ; "
                    "give another out folder, or leave resume off to start afresh"
                )
            return
        if self.folder.is_dir() and any(self.folder.iterdir()) and not known.is_file():
            raise ValueError(
                f"{self.folder} holds something else than stages of an evaluation; give another out folder"
            )
        for stale in self.folder.glob("*.safetensors"):
            stale.unlink()
        self.drop_batches()
        write_json(known, identity)

    def path(self, stage: str) -> Path:
        """The file of a stage."""
        name = "".join(letter if letter.isalnum() or letter in "-_@." else "_" for letter in stage)
        return self.folder / f"{name}.safetensors"

    def read(self, stage: str) -> dict[str, Tensor] | None:
        """The tensors of a finished stage, or None."""
        path = self.path(stage)
        return read_tensors(path)[0] if path.is_file() else None

    def write(self, stage: str, tensors: dict[str, Tensor]) -> None:
        """Keep a finished stage and drop its batches."""
        write_tensors(self.path(stage), tensors, {"stage": stage})
        self.drop_batches()

    def batch(self, stage: str, number: int, work: Callable[[], Tensor]) -> Tensor:
        """One batch of the stage in progress: read where an earlier run finished it, else made and kept."""
        path = self.path(f"{stage} {number}")
        path = path.parent / BATCHES / path.name
        if path.is_file():
            return read_tensors(path)[0]["part"]
        result = work()
        write_tensors(path, {"part": result})
        return result

    def drop_batches(self) -> None:
        """Delete the batches of a stage in progress."""
        shutil.rmtree(self.folder / BATCHES, ignore_errors=True)


def read_stage(out: str | Path, threat: str, attack: str) -> dict[str, Tensor]:
    """Return what a finished evaluation kept of one attack: ``logits`` (M, n, C) of its members, branches first.

    Raises FileNotFoundError when the stage was not run, or ValueError when its file is damaged.
    """
    return read_tensors(StageCache(Path(out)).path(f"{threat} {attack}"))[0]
