"""Encoders that share one frozen backbone: weights are held once, blocks below all adapters run once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from zepad_mm.encoders.attention import unfuse_attention
from zepad_mm.encoders.base import Encoder, feature_dim_of

# of the current call in this thread: output of the shared blocks, by trunk
_RUNNING: ContextVar[dict[int, Tensor | None] | None] = ContextVar("hidden states of shared trunks", default=None)
_NUMBERS = itertools.count()
PEFT = (("base_model.model.", ""), (".base_layer.", "."))


class SharedTrunk:
    """Ties the frozen weights of encoders loaded from one source, and runs the blocks they share once.

    Made once, after adapters are in place; ``with trunk.once():`` around calls of the encoders on the same images runs
    the first ``shared_blocks`` blocks for the first of them only. Outside of it each encoder runs by itself as
    before, so attacks on one branch and saving are unaffected. Thread-safe: shared outputs belong to the call. Not with
    gradient checkpointing, which would run a block again after the call.

    Args:
        encoders: at least two, of the same source; frozen but for their LoRA adapters (one may have none).

    Raises:
        ValueError: encoders of several sources, other weights under the same name, or gradient checkpointing.

    Attributes:
        shared_blocks: number of blocks below every adapter; 0 where an adapter sits at the stem.
        blocks: number of blocks in the stack.
    """

    def __init__(self, encoders: Sequence[Encoder]) -> None:
        self._number = next(_NUMBERS)
        self.encoders = list(encoders)
        sources = sorted({encoder.source for encoder in self.encoders})
        if len(self.encoders) < 2 or len(sources) != 1:
            raise ValueError(
                f"a shared trunk needs at least two encoders of one source, got {len(encoders)} of {sources}"
            )
        if any(uses_gradient_checkpointing(encoder) for encoder in self.encoders):
            raise ValueError("a shared trunk cannot recompute; first set_gradient_checkpointing(encoder, False)")
        for encoder in self.encoders:
            unfuse_attention(encoder.backbone)  # adapters need it; so the names and weights are the same everywhere
        self._tie_frozen_weights()
        stacks = [blocks_of(encoder.backbone) for encoder in self.encoders]
        self.blocks = min(len(stack) for stack in stacks)
        own = [{id(p) for p in _own_parameters(encoder, self.encoders)} for encoder in self.encoders]
        reach = [_first_own_block(*parts) for parts in zip(self.encoders, stacks, own, strict=True)]
        # the last block stays with each encoder, where the shared output enters
        self.shared_blocks = max(0, min(*reach, self.blocks - 1))
        if self.shared_blocks:
            for index, stack in enumerate(stacks):
                for block in stack[: self.shared_blocks] if index else []:
                    block.forward = functools.partial(_run_unless_computed, block, type(block).forward, self._number)
                first = stack[self.shared_blocks]
                first.forward = functools.partial(_resume_from_shared, first, type(first).forward, self._number)

    def _tie_frozen_weights(self) -> None:
        first = _frozen(self.encoders[0])
        for encoder in self.encoders[1:]:
            for name, (module, leaf, tensor) in _frozen(encoder).items():
                if name not in first:
                    continue
                kept = first[name][2]
                if kept.shape != tensor.shape or not torch.equal(kept, tensor):
                    raise ValueError(
                        f"{encoder.source}: {name} differs between the encoders; only frozen ones, adapted by LoRA, "
                        "share a trunk, not those tuned in full"
                    )
                table = module._parameters if leaf in module._parameters else module._buffers
                table[leaf] = kept  # type: ignore[index,assignment]

    @contextmanager
    def once(self) -> Iterator[None]:
        """Context in which all encoders take the same images, and the shared blocks run for the first alone."""
        outer = _RUNNING.get() or {}
        token = _RUNNING.set({**outer, self._number: None})
        try:
            yield
        finally:
            _RUNNING.reset(token)

    def __call__(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [0, 1] to the features (B, D) of each encoder."""
        with self.once():
            return [encoder(images) for encoder in self.encoders]


def blocks_of(backbone: nn.Module) -> list[Any]:
    """The stack of blocks that makes up most of a backbone. Raises ValueError where there is none."""
    stacks = [
        list(module)
        for module in backbone.modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) > 1
        and len({type(child) for child in module}) == 1
    ]
    if not stacks:
        raise ValueError(f"{type(backbone).__name__} has no stack of equal blocks; it cannot share a trunk")
    return max(stacks, key=lambda stack: sum(p.numel() for block in stack for p in block.parameters()))


def uses_gradient_checkpointing(encoder: Encoder) -> bool:
    """Whether gradient checkpointing is on anywhere in the backbone."""
    names = ("grad_checkpointing", "gradient_checkpointing")
    return any(getattr(module, name, False) is True for module in encoder.backbone.modules() for name in names)


def shares_trunk(encoder: Encoder) -> bool:
    """Whether blocks of the encoder belong to a :class:`SharedTrunk`."""
    ours = (_run_unless_computed, _resume_from_shared)
    return any(getattr(module.__dict__.get("forward"), "func", None) in ours for module in encoder.backbone.modules())


def _frozen(encoder: Encoder) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """Every tensor except the adapters', by its name without them: (module, name in the module, tensor)."""
    found = {}
    for path, module in encoder.backbone.named_modules():
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            name = f"{path}.{leaf}".lstrip(".")
            if tensor is None or "lora_" in name:
                continue
            for old, new in PEFT:
                name = name.replace(old, new)
            found[name] = (module, leaf, tensor)
    return found


def _own_parameters(encoder: Encoder, encoders: Sequence[Encoder]) -> list[Tensor]:
    others = {id(p) for other in encoders if other is not encoder for p in other.parameters()}
    return [p for p in encoder.parameters() if id(p) not in others]


def _first_own_block(encoder: Encoder, stack: Sequence[nn.Module], own: set[int]) -> int:
    """Index of the first block with a parameter of this encoder alone; the number of blocks if there is none."""
    place = {block: index for index, block in enumerate(stack)}
    now, met = -1, len(stack)

    def enter(module: nn.Module, inputs: Any) -> None:
        nonlocal now, met
        now = place.get(module, now)
        if met == len(stack) and any(id(p) in own for p in module._parameters.values()):
            met = now

    hooks = [module.register_forward_pre_hook(enter) for module in encoder.backbone.modules()]
    try:
        feature_dim_of(encoder.backbone, encoder.preprocess.image_size)
    finally:
        for hook in hooks:
            hook.remove()
    return max(0, met)


def _run_unless_computed(block: nn.Module, forward: Any, trunk: int, hidden: Tensor, *rest: Any, **more: Any) -> Any:
    """Forward of a shared block in a later encoder: skipped once the first encoder has computed it."""
    running = _RUNNING.get()
    if running is not None and running.get(trunk) is not None:
        return hidden
    return forward(block, hidden, *rest, **more)


def _resume_from_shared(block: nn.Module, forward: Any, trunk: int, hidden: Tensor, *rest: Any, **more: Any) -> Any:
    """Forward of the first block behind the shared ones: the first encoder stores its input, the later ones take it."""
    running = _RUNNING.get()
    if running is not None and trunk in running:
        if running[trunk] is None:
            running[trunk] = hidden
        hidden = running[trunk]  # type: ignore[assignment]
    return forward(block, hidden, *rest, **more)
