"""The feature gate: how likely an image was attacked, from the features that the original and robust encoders give.

Robust encoders that were tuned to keep the original's features on clean images (FARE) move little under an attack made
on the original; the original moves far. What both say about one image is enough to tell, without labels or class
names, so that one gate serves every task. Its logit z is the suspicion score ``feature_gate`` and sets the weight of
the benign branches in the fusion rule ``gated``. It is differentiable, so that every white-box attack goes through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zepad_mm.models.config import GateConfig

T = TypeVar("T")
COSINE_FACTOR = 5.0  # brings the cosine, one number, to the scale of the many small entries of unit features


class FeatureGate(nn.Module):
    """Features of the benign branch and of the robust branches to the logit z: higher for images that look attacked.

    The learned gate is a small network on unit features, their differences and cosines (where the widths are equal) and
    the logarithm of the ratio of their norms. It computes in float32 whatever the type of features and weights.

    Args:
        benign_width: D0, width of the benign branch's features.
        robust_widths: Di, widths of the robust branches' features.
        config: kind, size and calibration.

    Raises:
        ValueError: no robust branch, or the cosine of features of different width.

    Attributes:
        mean, std: (F,) by which the inputs are standardised; 0 and 1 until :meth:`fit_scale`. Learned gates only.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, benign_width: int, robust_widths: Sequence[int], config: GateConfig | None = None) -> None:
        super().__init__()
        self.config = config or GateConfig()
        self.benign_width, self.robust_widths = benign_width, tuple(robust_widths)
        if not self.robust_widths:
            raise ValueError("gate: expected the width of at least one robust branch, got none")
        if self.config.kind == "cosine":
            if any(width != benign_width for width in self.robust_widths):
                raise ValueError(
                    f"gate: the cosine needs features of equal width, got {benign_width} of the benign branch and "
                    f"{', '.join(map(str, self.robust_widths))} of the robust ones; use GateConfig(kind='learned')"
                )
            return
        self.register_buffer("mean", torch.zeros(self.input_width))
        self.register_buffer("std", torch.ones(self.input_width))
        self.hidden = nn.Linear(self.input_width, self.config.hidden)
        self.out = nn.Linear(self.config.hidden, 1)

    @property
    def input_width(self) -> int:
        """F, width of :meth:`inputs`."""
        equal = sum(width == self.benign_width for width in self.robust_widths)
        return self.benign_width + sum(self.robust_widths) + equal * (self.benign_width + 1) + len(self.robust_widths)

    def inputs(self, benign: Tensor, robust: Sequence[Tensor]) -> Tensor:
        """What the learned gate reads, (B, F) in float32, before it is standardised.

        Args:
            benign: (B, D0) features a.
            robust: (B, Di) features b of each robust branch.

        Raises:
            ValueError: features of another number or width than the gate was made for.
        """
        self._check(benign, robust)
        a, norm = _unit(benign)
        parts = [a]
        for features in robust:
            b, other = _unit(features)
            parts += [b, (other / norm).log()]
            if b.shape[-1] == a.shape[-1]:
                parts += [a - b, COSINE_FACTOR * (a * b).sum(-1, keepdim=True)]
        return torch.cat(parts, dim=-1)

    def forward(self, benign: Tensor, robust: Sequence[Tensor]) -> Tensor:
        """(B, D0) and a (B, Di) for each robust branch to z (B,), float32. Raises ValueError as :meth:`inputs`."""
        if torch.is_autocast_enabled(benign.device.type):
            with torch.autocast(benign.device.type, enabled=False):
                return self._logit(benign, robust)
        return self._logit(benign, robust)

    def logit(self, inputs: Tensor) -> Tensor:
        """(B, F) of :meth:`inputs` to z (B,): for training on cached inputs. Learned gates only."""
        standard = (inputs.float() - self.mean.float()) / self.std.float()
        hidden = F.relu(F.linear(standard, self.hidden.weight.float(), self.hidden.bias.float()))
        hidden = F.dropout(hidden, self.config.dropout, self.training)
        return F.linear(hidden, self.out.weight.float(), self.out.bias.float()).squeeze(-1)

    @torch.no_grad()
    def fit_scale(self, inputs: Tensor) -> None:
        """Set ``mean`` and ``std`` of each entry from the inputs (n, F) of training images, in place.

        An entry that hardly varies on them is not blown up: no ``std`` is below a tenth of their mean.
        """
        std, mean = torch.std_mean(inputs.float(), dim=0)
        self.mean.copy_(mean)
        self.std.copy_(std.clamp_min(max(float(std.mean()) * 0.1, 1e-6)))

    def read(self, features: Sequence[Tensor], benign: Sequence[bool]) -> Tensor:
        """Features (B, D) of every branch and its role to z (B,); of several benign branches the first one counts."""
        return self(features[list(benign).index(True)], robust_of(features, benign))

    def weight(self, z: Tensor) -> Tensor:
        """The benign weight (B,) in [0, cap] for z (B,). Raises ValueError for a gate without a threshold."""
        return gate_weight(z, self.config.calibrated_threshold, self.config.sharpness, self.config.cap)

    def check_fits(self, widths: Sequence[int], benign: Sequence[bool]) -> None:
        """Raise ValueError unless it was made for branches of these feature widths and roles."""
        own = (self.benign_width, *self.robust_widths)
        got = tuple([width for width, kind in zip(widths, benign, strict=True) if kind][:1] + robust_of(widths, benign))
        if got != own:
            raise ValueError(f"gate: made for features of widths {own}, the benign branch first; the model has {got}")

    def _logit(self, benign: Tensor, robust: Sequence[Tensor]) -> Tensor:
        if self.config.kind == "learned":
            return self.logit(self.inputs(benign, robust))
        self._check(benign, robust)
        a = _unit(benign)[0]
        return torch.stack([1 - (a * _unit(features)[0]).sum(-1) for features in robust]).mean(0)

    def _check(self, benign: Tensor, robust: Sequence[Tensor]) -> None:
        got = (benign.shape[-1], *(features.shape[-1] for features in robust))
        expected = (self.benign_width, *self.robust_widths)
        if got != expected:
            raise ValueError(f"gate: expected features of widths {expected}, the benign branch first, got {got}")


def gate_for(widths: Sequence[int], benign: Sequence[bool], config: GateConfig | None = None) -> FeatureGate:
    """A gate for branches of these feature widths and roles. Raises ValueError without a branch of each role."""
    if True not in benign:
        raise ValueError("gate: expected a benign branch beside the robust ones, got none")
    return FeatureGate(widths[list(benign).index(True)], robust_of(widths, benign), config)


def robust_of(values: Sequence[T], benign: Sequence[bool]) -> list[T]:
    """The values of the robust branches."""
    return [value for value, own in zip(values, benign, strict=True) if not own]


def with_gate(branch_logits: Tensor, z: Tensor | None) -> Tensor:
    """Branch logits (N, B, C) and z (B,) as one tensor (N + 1, B, C) for fusion rules, scores and attacks.

    Its last row is z, repeated over the classes. Without a gate (None) the branch logits as they are.
    """
    if z is None:
        return branch_logits
    return torch.cat([branch_logits, z.to(branch_logits.dtype).view(1, -1, 1).expand_as(branch_logits[:1])])


def gate_weight(z: Tensor, threshold: float, sharpness: float, cap: float) -> Tensor:
    """cap * sigmoid(sharpness * (threshold - z)): the benign weight (B,), smooth and falling in z."""
    return cap * torch.sigmoid(sharpness * (threshold - z))


def _unit(features: Tensor) -> tuple[Tensor, Tensor]:
    """Unit features (B, D) and their norms (B, 1), in float32; finite for features of zero norm."""
    features = features.float()
    norm = features.square().sum(-1, keepdim=True).add(1e-12).sqrt()
    return features / norm, norm
