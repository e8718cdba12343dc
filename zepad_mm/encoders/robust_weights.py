"""Robust weights as they are published: a whole open_clip state dict, or its image tower alone, over a base CLIP.

FARE and TeCoA publish ``model.visual.state_dict()``; the first TeCoA code wraps it as ``vision_encoder_state_dict``;
Delta-CLIP and open_clip's own training write the whole CLIP, perhaps under ``state_dict`` and ``module.``.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from zepad_mm.encoders.state_dict import SHOWN, load_state_dict_strict, read_foreign, summary

log = logging.getLogger(__name__)

COMPUTED = ("attn_mask", "input_resolution", "context_length", "vocab_size")  # stored by some, learnt by none


def load_robust_weights(clip: Any, path: str | Path) -> None:
    """Replace the weights of an open_clip model by those in a file, in place and strictly.

    A file of the whole CLIP replaces both towers, one of the image tower leaves the text tower as it is. What the file
    holds beside is named in one warning.

    Raises:
        FileNotFoundError: no such file. ValueError: the file fits neither the model nor its image tower.
    """
    tensors = read_foreign(path)
    tensors = {name: tensor for name, tensor in tensors.items() if name.rsplit(".", 1)[-1] not in COMPUTED}
    nearest = ""
    for target, what in ((clip, "the whole CLIP"), (clip.visual, "the image tower")):
        own: dict[str, Tensor] = target.state_dict()
        for prefix in _prefixes(tensors, own):
            missing = [name for name in own if prefix + name not in tensors]
            if missing:
                nearest = f"under {prefix!r} it lacks {', '.join(missing[:SHOWN])} of {what}, {len(missing)} in all"
                continue
            inside = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            load_state_dict_strict(own, inside, str(path), "it is of another model than this base")
            left = [name for name in tensors if not name.startswith(prefix)]
            if left:
                log.warning("%s: took %d tensors for %s and left out %s", path, len(own), what, summary(left))
            return
    raise ValueError(
        f"{path} does not fit {type(clip.visual).__name__} of this base: "
        f"{nearest or f'it holds {summary(tensors)[:200]}'}; "
        "expected an open_clip state dict or that of its image tower"
    )


def _prefixes(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """What may stand before the names of ``own`` in the file, found by their most telling name."""
    telling = max(own, key=len)
    ends = [name[: -len(telling)] for name in tensors if name.endswith(telling)]
    return sorted({prefix for prefix in ends if not prefix or prefix.endswith(".")}, key=len)
