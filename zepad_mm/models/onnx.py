"""Export of the whole defended model as one ONNX graph, compared with torch before it is kept."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from zepad_mm.models.serialization import check_float32
from zepad_mm.models.zepad import ZePAD
from zepad_mm.utils.seeding import seeded_generator

OUTPUTS = ("logits", "weights", "confidences", "score")  # a model with a gate has "gate" too
LARGEST_FILE = 1_900_000_000  # bytes; ONNX itself allows 2 GiB, the weights of a larger graph lie beside it


@dataclass(frozen=True)
class Exported:
    """The result of :func:`export_onnx`.

    Attributes:
        path: the graph; the weights of one beyond 2 GB lie beside it in ``NAME.data``.
        image_size: side in pixels of the images that it takes.
        difference: largest difference of a logit between onnxruntime and torch on the images of the check.
    """

    path: Path
    image_size: int
    difference: float


class _Graph(nn.Module):
    """The model with its evidence as a tuple, in the order of ``outputs``."""

    def __init__(self, model: ZePAD) -> None:
        super().__init__()
        self.model = model
        self.outputs = OUTPUTS if model.gate is None else (*OUTPUTS, "gate")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        decision = self.model.fuse(self.model.branch_outputs(images))
        return tuple(getattr(decision, name) for name in self.outputs)


def export_onnx(
    model: ZePAD, path: str | Path, *, image_size: int | None = None, tolerance: float = 1e-3, seed: int = 0
) -> Exported:
    """Write the fused classifier, all branches, heads and the rule, as an ONNX graph for any batch size.

    The graph takes ``images`` (B, 3, S, S) float32 in [0, 1] and gives ``logits`` (B, C), ``weights`` and
    ``confidences`` (N, B), ``score`` (B,) and, of a model with a gate, its logit ``gate`` (B,), as
    :class:`zepad_mm.models.fusion.Decision`. Preprocessing is inside.
    It does not check its input. Class names, branch names, the rule, the gate's configuration and the detector's
    threshold are in its metadata.

    Args:
        model: a defended model; for other labels call :meth:`ZePAD.set_classes` first.
        path: the file to write; it appears when the check has passed.
        image_size: S; None takes what the first branch's encoder works at, so that nothing is resized.
        tolerance: largest difference of a logit from torch on random images that is accepted.
        seed: of those images.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed; ValueError: a size below 1, a path that does not
            end in ``.onnx``, or a graph whose logits differ from torch's.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"path: expected a name that ends in .onnx, got {path.name!r}")
    size = model.branch(next(iter(model.branches))).encoder.preprocess.image_size if image_size is None else image_size
    if size < 1:
        raise ValueError(f"image_size: expected at least 1 pixel, got {size}")
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name} is missing; pip install 'zepad-mm[onnx]'") from error
    check_float32(model, "exported")
    was_training, device = model.training, model.device
    graph = _Graph(model.cpu()).eval()
    try:
        # two images: a batch of one would be taken for a constant
        program = _export_program(graph, torch.rand(2, 3, size, size, generator=seeded_generator(seed)))
        program.model.metadata_props.update(_metadata(model, size))
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
            written = Path(folder) / path.name
            program.save(written, external_data=_size_in_bytes(graph) > LARGEST_FILE)
            session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
            difference = _difference(graph, session, torch.rand(3, 3, size, size, generator=seeded_generator(seed + 1)))
            if not difference <= tolerance:
                raise ValueError(
                    f"the ONNX graph's logits differ from torch's by up to {difference:.2g}, more than {tolerance:g}; "
                    f"nothing was written to {path}. Give a larger tolerance if that is good enough"
                )
            for part in sorted(Path(folder).iterdir(), reverse=True):  # NAME.onnx.data before NAME.onnx
                os.replace(part, path.parent / part.name)
    finally:
        model.to(device).train(was_training)
    return Exported(path, size, difference)


def _export_program(graph: _Graph, images: Tensor) -> Any:
    with torch.no_grad():
        return torch.onnx.export(
            graph,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=list(graph.outputs),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )


@torch.no_grad()
def _difference(graph: nn.Module, session: Any, images: Tensor) -> float:
    """The largest difference of a logit, over another batch size than the one that was traced."""
    images = torch.cat([images, torch.zeros_like(images[:1]), torch.ones_like(images[:1])])
    theirs = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    return float((theirs - graph(images)[0]).abs().max())


def _metadata(model: ZePAD, size: int) -> dict[str, str]:
    values = {
        "class_names": list(model.class_names),
        "branches": list(model.branches),
        "fusion": {"rule": model.config.fusion, **model.fusion.rule.to_dict()},
        "gate": None if model.config.gate is None else model.config.gate.to_dict(),
        "detector": model.config.detector.to_dict(),
        "image_size": size,
    }
    return {f"zepad_mm.{name}": json.dumps(value) for name, value in values.items()}


def _size_in_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
