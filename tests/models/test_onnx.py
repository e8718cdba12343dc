"""Defended models as ONNX graphs under onnxruntime, and compiled."""

from __future__ import annotations

import builtins
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.models import CLASSES, make_gated_zepad
from zepad_mm.models.onnx import OUTPUTS, Exported, export_onnx
from zepad_mm.models.zepad import ZePAD

SIZE = 48  # not the encoder's 32: the antialiased resize is part of the graph


@pytest.fixture(scope="module")
def model(clip_source: str) -> ZePAD:
    return make_gated_zepad(clip_source)


@pytest.fixture(scope="module")
def exported(model: ZePAD, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_onnx(model, tmp_path_factory.mktemp("onnx") / "model.onnx", image_size=SIZE)


@pytest.mark.parametrize("batch", [1, 5])
def test_export_onnx_matches_torch(model: ZePAD, exported: Exported, batch: int) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    images = torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    decision, names = model.decide(images), [*OUTPUTS, "gate"]
    for name, theirs in zip(names, session.run(names, {"images": images.numpy()}), strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), getattr(decision, name), atol=1e-4, rtol=1e-4)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["zepad_mm.class_names"]) == list(CLASSES)
    rule = {"rule": "gated", "threshold": 0.0, "sharpness": 2.0, "cap": 0.9, "robust_scale": 1.0}
    assert json.loads(about["zepad_mm.fusion"]) == rule
    assert json.loads(about["zepad_mm.gate"])["seen_attacks"] == ["feature_uap"]


def louder(model: ZePAD) -> ZePAD:
    """The same model with a larger scale in every head."""
    other = copy.deepcopy(model)
    for branch in other.branches.values():
        branch.head.logit_scale.mul_(1.5)  # type: ignore[union-attr, operator]
    return other


def test_export_onnx_discards_a_graph_that_differs(
    model: ZePAD, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx_ir

    from zepad_mm.models import onnx as export

    class Other:
        """The graph of a model with other branches, in the place of this one's."""

        model = onnx_ir.load(exported.path)

        def save(self, path: Path, external_data: bool) -> None:
            onnx_ir.save(self.model, path)

    other = louder(model)
    monkeypatch.setattr(export, "_export_program", lambda graph, images: Other())
    with pytest.raises(ValueError, match=r"differ from torch's by up to .* nothing was written"):
        export_onnx(other, tmp_path / "model.onnx", image_size=SIZE)
    assert list(tmp_path.iterdir()) == []
    assert exported.difference <= 1e-3


def test_export_onnx_errors_name_the_reason(model: ZePAD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"ends in \.onnx, got 'model'"):
        export_onnx(model, tmp_path / "model")
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        export_onnx(model, tmp_path / "model.onnx", image_size=0)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"onnxruntime is missing; pip install 'zepad-mm\[onnx\]'"):
        export_onnx(model, tmp_path / "model.onnx")


def test_zepad_compiles_with_its_gradient(model: ZePAD) -> None:
    """Traced and differentiated by the compiler; code generation is left to torch."""
    compiled = torch.compile(model, backend="aot_eager")
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))
    gradients = []
    for call in (model, compiled):
        pixels = images.clone().requires_grad_(True)
        call(pixels).logsumexp(-1).sum().backward()
        assert pixels.grad is not None
        gradients.append(pixels.grad)
    torch.testing.assert_close(compiled(images), model(images), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)
    assert gradients[0].abs().max() > 0
