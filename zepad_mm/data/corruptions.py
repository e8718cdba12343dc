"""Unattacked images that a detector should not flag: everyday corruptions, and out-of-distribution images.

Kinds and severities are those of Tiny ImageNet-C, made for 64 pixels: Hendrycks and Dietterich, "Benchmarking Neural
Network Robustness to Common Corruptions and Perturbations", ICLR 2019, and ImageNet-C/create_c/make_tinyimagenet_c.py
of hendrycks/robustness. On larger images the same blur and JPEG quality do less harm.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
from torch import Tensor, nn

from zepad_mm.utils.images import read_image, to_pil
from zepad_mm.utils.isolation import import_isolated
from zepad_mm.utils.registry import Registry
from zepad_mm.utils.validation import check_images

SEVERITIES = (1, 2, 3, 4, 5)
FUNCTIONAL = "torchvision.transforms.functional"

Corruption = Callable[[Tensor, int, torch.Generator], Tensor]
OutOfDistribution = Callable[[Tensor, torch.Generator], Tensor]

# name -> corruption(images (B, 3, H, W) in [0, 1], severity 1..5, CPU generator) -> images of that shape and range
CORRUPTIONS: Registry[Corruption] = Registry("corruption")
# name -> function(images (B, 3, H, W) in [0, 1], CPU generator) -> as many images that show no class at all
OUT_OF_DISTRIBUTION: Registry[OutOfDistribution] = Registry("kind of out-of-distribution image")


def corrupt(images: Tensor, name: str, severity: int, generator: torch.Generator) -> Tensor:
    """Return corrupted images (B, 3, H, W) in [0, 1]. Raises ValueError for an unknown name or severity."""
    return CORRUPTIONS.get(name)(check_images(images), check_severity(severity), generator)


def check_severity(severity: int) -> int:
    """Return the severity. Raises ValueError unless it is one of 1, 2, 3, 4, 5."""
    if isinstance(severity, bool) or severity not in SEVERITIES:
        raise ValueError(f"severities: expected whole numbers from 1 (slight) to 5 (heavy), got {severity!r}")
    return severity


@CORRUPTIONS.register("gaussian_noise")
def gaussian_noise(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Independent noise on every value."""
    deviation = (0.04, 0.08, 0.12, 0.15, 0.18)[severity - 1]
    noise = torch.randn(images.shape, generator=generator).to(images)
    return (images + deviation * noise).clamp(0, 1)


@CORRUPTIONS.register("gaussian_blur")
def gaussian_blur(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Blur by half a pixel to one and a half; the edge is continued outwards."""
    sigma = (0.5, 0.75, 1.0, 1.25, 1.5)[severity - 1]
    reach = int(4 * sigma + 0.5)
    wide = nn.functional.pad(images, (reach,) * 4, mode="replicate")
    blur = import_isolated(FUNCTIONAL).gaussian_blur
    return blur(wide, [2 * reach + 1] * 2, [sigma] * 2)[..., reach:-reach, reach:-reach].clamp(0, 1)


@CORRUPTIONS.register("jpeg")
def jpeg(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Compressed as JPEG and decoded."""
    quality = (65, 58, 50, 40, 25)[severity - 1]
    read = []
    for image in images.cpu():
        file = io.BytesIO()
        to_pil(image).save(file, "JPEG", quality=quality)
        read.append(read_image(file, "the compressed image"))
    return torch.stack(read).to(images) if read else images


@CORRUPTIONS.register("brightness")
def brightness(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """The value of HSV raised; hue and saturation stay, so that each pixel is scaled, and black turns grey."""
    more = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    value = images.amax(1, keepdim=True)
    raised = (value + more).clamp_max(1)
    return torch.where(value > 0, images * raised / value.clamp_min(1e-12), raised).clamp(0, 1)


@CORRUPTIONS.register("contrast")
def contrast(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Every channel moved towards its mean over the image."""
    left = (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]
    mean = images.mean((2, 3), keepdim=True)
    return ((images - mean) * left + mean).clamp(0, 1)


@OUT_OF_DISTRIBUTION.register("uniform_noise")
def uniform_noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Noise only, as in ODIN (Liang et al., ICLR 2018)."""
    return torch.rand(images.shape, generator=generator).to(images)


@OUT_OF_DISTRIBUTION.register("phase_scrambled")
def phase_scrambled(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images' own amplitude spectrum and mean colour with random phases: their texture without their shapes.

    The phases are those of white noise, one draw for the three channels, so that the colours stay in step (the "phase
    noise" of Geirhos et al., NeurIPS 2018, at full width).
    """
    noise = torch.randn(len(images), 1, *images.shape[2:], generator=generator).to(images)
    turn = torch.fft.rfft2(noise).angle()
    turn[..., 0, 0] = 0  # the mean: otherwise half of the images would be negatives
    spectrum = torch.fft.rfft2(images) * torch.polar(torch.ones_like(turn), turn)
    return torch.fft.irfft2(spectrum, s=images.shape[2:]).clamp(0, 1)
