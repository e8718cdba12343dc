"""Randomised smoothing with its certificate (Cohen, Rosenfeld and Kolter, ICML 2019)."""

from __future__ import annotations

import torch
from scipy.stats import beta, norm
from torch import Tensor, nn

from reproduction.cross_defence.base import DEFENCES, AuthorsAttack, Defence, Parts, Path
from zepad_mm.utils.validation import check_images


class Smoothing(Defence):
    """Answers with the class that most noisy copies of an image get.

    Pixels with noise are clamped to [0, 1] before the encoder, which is then part of the base classifier, so that the
    certificate holds. Cohen et al. train the base classifier on noise; a CLIP is taken as it is here. The attackers
    take gradients of the mean probability over noisy copies, new ones at each step.

    Args:
        model: images in [0, 1] to logits.
        sigma: standard deviation of the noise, in pixels of [0, 1].
        views: noisy copies for an answer.
    """

    attack: AuthorsAttack = "apgd_defence"
    random = True
    averages = True

    def __init__(self, model: nn.Module, sigma: float = 0.12, views: int = 16) -> None:
        super().__init__()
        self.model, self.sigma, self.views = model, sigma, views

    def forward(self, images: Tensor) -> Tensor:
        """The logarithm of each class's share of the votes, (B, C); autograd sees the mean probability instead."""
        logits = self._noisy_logits(images, self.views)
        soft = logits.softmax(-1).mean(0).clamp_min(1e-6).log()
        votes = nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(soft).mean(0)
        return soft + (votes.clamp_min(1e-6).log() - soft).detach()

    def paths(self) -> list[Path]:
        views = min(4, self.views)

        def soft(images: Tensor) -> Tensor:
            return self._noisy_logits(images, views).softmax(-1).mean(0).clamp_min(1e-12).log()

        return [Path("mean probability, EOT", soft, False, views)]

    @torch.no_grad()
    def certify(self, images: Tensor, draws: int = 500, first: int = 32, alpha: float = 0.001) -> tuple[Tensor, Tensor]:
        """The class (B,) and the certified L2 radius (B,), in pixels of [0, 1]; 0 where it abstains.

        With probability 1 - ``alpha`` no perturbation below the radius changes the class of the smoothed model.

        Args:
            draws: noisy copies for the bound.
            first: noisy copies that choose the class.
            alpha: probability of a wrong certificate, per image.
        """
        chosen = self._votes(images, first).argmax(-1)
        count = self._votes(images, draws).gather(-1, chosen[:, None])[:, 0].cpu().numpy()
        low = beta.ppf(alpha, count, draws - count + 1)  # Clopper-Pearson; NaN without a vote
        radius = torch.from_numpy(self.sigma * norm.ppf(low)).nan_to_num(0.0).clamp_min(0).float()
        return chosen, radius.to(images.device)

    def _votes(self, images: Tensor, draws: int) -> Tensor:
        """(B, C) how many of so many noisy copies get each class."""
        total: Tensor | int = 0
        for start in range(0, draws, self.views):
            logits = self._noisy_logits(images, min(self.views, draws - start))
            total = total + nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
        assert isinstance(total, Tensor)
        return total

    def _noisy_logits(self, images: Tensor, views: int) -> Tensor:
        """(V, B, C)."""
        copies = check_images(images).repeat(views, 1, 1, 1)
        noisy = (copies + self.sigma * torch.randn_like(copies)).clamp(0, 1)
        return self.model(noisy).unflatten(0, (views, len(images)))


@DEFENCES.register("smoothing")
def build(parts: Parts) -> Defence:
    """Smoothing around the public CLIP, at the smallest noise of the paper."""
    return Smoothing(parts.undefended)


@DEFENCES.register("smoothing_robust")
def build_robust(parts: Parts) -> Defence:
    """Smoothing around the robust encoder, which bears noise better."""
    return Smoothing(parts.robust)
