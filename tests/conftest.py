"""Fixtures shared by all tests, and the environment of the processes that tests start."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.helpers.models import make_zepad, write_clip
from zepad_mm.models.zepad import ZePAD

ROOT = Path(__file__).parents[1]
# processes that tests start import the package, the recipes and the helpers from this checkout, wherever they run
os.environ["PYTHONPATH"] = str(ROOT)
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell that starts the tests in the background has them ignore SIGINT, and so the processes that they start
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def both_cores(tmp_path_factory: pytest.TempPathFactory):
    """One at a time, whatever worker: processes that wait for each other crawl where two such tests share the cores."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "both_cores.lock"):
        yield


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """A folder by its name, filled by the first worker that asks for it; the others wait for it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        path, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(path, ignore_errors=True)  # what a worker left that failed
                path.mkdir()
                make(path)
                done.touch()
        return path

    return folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test's random weights are the same whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def clip_source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def zepad(clip_source: str) -> ZePAD:
    return make_zepad(clip_source)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
