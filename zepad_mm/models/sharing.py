"""Let the branches of a defended model that stand on one frozen encoder hold it once and run its lower blocks once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from zepad_mm.encoders import SharedTrunk
from zepad_mm.models.branch import Branch
from zepad_mm.models.zepad import ZePAD

log = logging.getLogger(__name__)


class _Sharing:
    """All trunks of a model as one context; an object, not a closure, so that copies of the model have their own."""

    def __init__(self, trunks: Sequence[SharedTrunk]) -> None:
        self.trunks = list(trunks)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with ExitStack() as stack:
            for trunk in self.trunks:
                stack.enter_context(trunk.once())
            yield


def share_trunk(model: ZePAD) -> list[SharedTrunk]:
    """Tie what the branches have in common, in place; the model answers, saves and is attacked as before.

    Branches of one source that are untouched or adapted by LoRA share its weights; blocks below the first adapter
    (``LoraSettings(first_block=...)``) run once for all of them. Branches tuned in full stay as they are.

    Returns:
        One trunk for each source with two such branches or more; empty where there is nothing to share.
    """
    groups: dict[str, list[Branch]] = {}
    for name in model.branches:
        branch = model.branch(name)
        if branch.config.adaptation != "full":
            groups.setdefault(branch.config.source, []).append(branch)
    trunks = [SharedTrunk([branch.encoder for branch in group]) for group in groups.values() if len(group) > 1]
    model.sharing = _Sharing(trunks)
    for trunk in trunks:
        log.info("%d branches share %d of %d blocks", len(trunk.encoders), trunk.shared_blocks, trunk.blocks)
    return trunks
