"""Contexts that leave the process as it was."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from zepad_mm.encoders import load_encoder
from zepad_mm.utils.isolation import library_logs, preserved_process_state


def test_preserved_process_state_restores_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEPAD_TEST", "before")
    root, state = logging.getLogger(), torch.get_rng_state()
    handlers = list(root.handlers)
    with preserved_process_state():
        os.environ["ZEPAD_TEST"], os.environ["ZEPAD_NEW"] = "after", "new"
        root.addHandler(logging.NullHandler())
        torch.rand(1)
    assert os.environ["ZEPAD_TEST"] == "before"
    assert "ZEPAD_NEW" not in os.environ
    assert root.handlers == handlers
    assert torch.equal(torch.get_rng_state(), state)
    with preserved_process_state(random_state=False):
        torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "code",
    [
        "from zepad_mm import RobustZeroShotClassifier, ZePAD, evaluate, load_encoder",
        "from zepad_mm.classifier import pixels_of; from PIL import Image; pixels_of(Image.new('RGB', (40, 40)))",
        "from zepad_mm.data.corruptions import corrupt; corrupt(torch.ones(1, 3, 9, 9), 'gaussian_blur', 1, None)",
        "import zepad_mm.training, zepad_mm.pretraining, zepad_mm.defend",
    ],
)
def test_imports_and_first_calls_leave_the_process_as_it_was(code: str) -> None:
    """In a fresh process: torchvision sets a variable when it is imported."""
    check = f"""
import logging, os, torch
variables, state, handlers = dict(os.environ), torch.get_rng_state(), list(logging.getLogger().handlers)
{code}
assert dict(os.environ) == variables, set(os.environ) - set(variables)
assert torch.equal(torch.get_rng_state(), state)
assert logging.getLogger().handlers == handlers
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_preserved_process_state_makes_normal_tensors() -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        with preserved_process_state():
            tensor = torch.eye(2) @ torch.eye(2)
        assert not torch.is_grad_enabled()
    assert not tensor.is_inference()
    assert tensor.dtype == torch.float32
    with torch.no_grad(), preserved_process_state():
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_preserved_process_state_knows_its_own_type_and_device(dtype: torch.dtype) -> None:
    """Users set defaults for models of their own; ours are loaded as ever."""
    expected = load_encoder("open_clip:embedded")
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        found = load_encoder("open_clip:embedded")
        assert torch.get_default_dtype() == dtype
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_library_logs_keeps_infos_off_the_root_logger(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = ModuleType("noisy.inside")
    library.logging = logging  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "noisy.inside", library)
    with caplog.at_level(logging.INFO), library_logs("noisy"):
        library.logging.info("loading")
        library.logging.warning("no weights")
    assert [(record.name, record.getMessage()) for record in caplog.records] == [("zepad_mm.noisy", "no weights")]
    assert library.logging is logging
