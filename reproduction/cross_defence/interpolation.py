"""Interpolation of weights between the public encoder and its robust counterpart.

PISTOLE (openreview KOO1cDm2bt) merges such weights with masks of gradient stability, which take training data and
trajectories; without them what is left is the plain interpolation (Wortsman et al. 2022), which is measured here.
"""

from __future__ import annotations

import copy

import torch

from reproduction.cross_defence.base import DEFENCES, AuthorsAttack, Defence, Parts, Plain
from zepad_mm.encoders import Encoder
from zepad_mm.encoders.inference import optimize_for_inference
from zepad_mm.evaluation.subjects import EncoderWithHead


def interpolated(original: Encoder, robust: Encoder, share: float) -> Encoder:
    """An encoder with the weights (1 - share) original + share robust.

    Raises:
        ValueError: weights of other names or shapes, as of a LoRA branch that is not merged.
    """
    merged = copy.deepcopy(original)
    own, other = merged.state_dict(), robust.state_dict()
    wrong = [name for name in own if name not in other or own[name].shape != other[name].shape]
    if wrong or len(own) != len(other):
        raise ValueError(
            f"interpolation: expected two encoders of one architecture, got {original.source} and {robust.source}; "
            f"they differ in {', '.join(wrong[:3]) or 'the number of weights'}"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.is_floating_point():
                tensor.copy_(torch.lerp(tensor, other[name].to(tensor), share))
    return merged


class Interpolation(Plain):
    """The encoder halfway between the public and the robust weights, at the cost of one encoder."""

    attack: AuthorsAttack = "apgd_defence"


@DEFENCES.register("interpolation")
def build(parts: Parts) -> Defence:
    """One encoder, halfway between the public and the robust weights."""
    merged = interpolated(*parts.weights, share=0.5)
    folded = optimize_for_inference(merged, merged.preprocess.image_size)
    return Interpolation(EncoderWithHead(folded, parts.undefended.head))
