"""Activations of an encoder's layers by forward hooks, for attacks on layers rather than on the output."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from zepad_mm.attacks.base import Model, modules_of

Layer = str | float


class Activations:
    """Outputs of selected layers of one or several encoders; a context manager that removes its hooks on exit.

    Args:
        encoders: modules, or functions and partials that refer to modules by name.
        layers: dotted names of modules, e.g. "backbone.trunk.layer1", or depths from 0 (first) to 1 (last) among the
            encoder's blocks (see :func:`blocks_of`).

    Raises:
        ValueError: a function without a module, an unknown name, or a depth outside [0, 1].
    """

    def __init__(self, encoders: Sequence[Model], layers: Sequence[Layer]) -> None:
        self._encoders = encoders
        self._outputs: dict[int, list[Tensor]] = {}
        self._targets = []
        for which, encoder in enumerate(encoders):
            roots = modules_of(encoder)
            if not roots:
                raise ValueError(
                    f"encoder: this attack targets layers and needs a torch.nn.Module to hook, got {encoder!r:.80}; "
                    "pass the module itself, or a function that calls one"
                )
            self._targets += [(which, find_layer(root, layer)) for root in roots for layer in layers]
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for place, (_, module) in enumerate(self._targets):
            self._handles.append(module.register_forward_hook(self._record(place)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs.clear()

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Activations of images (B, 3, H, W) in [0, 1], one tensor per encoder (or module in it) and layer."""
        self._outputs.clear()
        for encoder in self._encoders:
            encoder(images)
        missing = [place for place in range(len(self._targets)) if place not in self._outputs]
        if missing:
            raise ValueError(
                f"layers: {type(self._targets[missing[0]][1]).__name__} is not run by its encoder, or its output is "
                "no tensor; name another module of encoder.named_modules()"
            )
        return [self._outputs[place][-1] for place in range(len(self._targets))]

    def _record(self, place: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, Tensor):
                # a copy: the next layer may work in place, e.g. ReLU(inplace=True)
                self._outputs.setdefault(place, []).append(output * 1)

        return hook


def find_layer(root: nn.Module, layer: Layer) -> nn.Module:
    """The module of a dotted name, or of a depth in [0, 1] among the blocks. Raises ValueError for neither."""
    if isinstance(layer, str):
        names = dict(root.named_modules())
        if layer not in names:
            from difflib import get_close_matches

            near = get_close_matches(layer, names, n=3)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise ValueError(f"layers: {type(root).__name__} has no module {layer!r}{hint}")
        return names[layer]
    if not 0 <= layer <= 1:
        raise ValueError(f"layers: expected a depth from 0 (first block) to 1 (last), or a module's name, got {layer}")
    blocks = blocks_of(root)
    return blocks[round(layer * (len(blocks) - 1))]


def blocks_of(root: nn.Module) -> list[nn.Module]:
    """The blocks of an encoder in order: residual blocks, transformer blocks or single layers.

    Blocks are the members with parameters of its ``nn.Sequential`` and ``nn.ModuleList`` containers; nested containers
    are expanded. Without any container: all layers with parameters.
    """
    blocks: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        inside = isinstance(module, nn.Sequential | nn.ModuleList)
        for child in module.children():
            if isinstance(child, nn.Sequential | nn.ModuleList) or not inside:
                walk(child)
            elif next(child.parameters(), None) is not None:
                blocks.append(child)

    walk(root)
    if blocks:
        return blocks
    leaves = [
        m for m in root.modules() if not any(True for _ in m.children()) and next(m.parameters(), None) is not None
    ]
    if not leaves:
        raise ValueError(f"layers: {type(root).__name__} has no layer with weights to attack")
    return leaves


def mean_square(activation: Tensor) -> Tensor:
    """Mean squared activation, a scalar."""
    return activation.square().mean()
