"""Students: an encoder with a head, built from the names in a configuration and prepared for training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from zepad_mm.data import LabelledImages
from zepad_mm.defences.base import Student
from zepad_mm.encoders import (
    Encoder,
    LoraSettings,
    add_lora,
    is_clip,
    load_clip,
    load_encoder,
    set_gradient_checkpointing,
)
from zepad_mm.encoders.attention import use_fast_attention
from zepad_mm.models.heads import ZeroShotHead
from zepad_mm.training.artifacts import TUNED_RECORD, load_tuned
from zepad_mm.training.feature_cache import class_embeddings, encode_images
from zepad_mm.training.heads import HeadSettings, fresh_head, train_head_on_features
from zepad_mm.training.settings import TrainData, TrainSettings
from zepad_mm.utils.atomic import complete_folder
from zepad_mm.utils.registry import check_choice
from zepad_mm.utils.seeding import derived_seed, seeded

ADAPTATIONS = ("full", "lora")


def build_student(
    source: str,
    train: TrainData,
    adaptation: str = "full",
    head: str = "auto",
    *,
    prompts: str = "photo",
    lora: LoraSettings | None = None,
    seed: int = 0,
    cache_dir: str | None = None,
    device: torch.device | None = None,
) -> Student:
    """A student: the encoder to tune and the head it is tuned under.

    Args:
        source: as for ``load_encoder``.
        train: names the classes; fits the head where it is "probe".
        adaptation: "full" trains all of the encoder, "lora" an adapter.
        head: "zero_shot" (frozen text embeddings of the class names, CLIPs only), "mlp" or "linear" (fresh, trains
            along), "probe" (linear, fitted to the untuned encoder first, then frozen: what FARE on an encoder without
            text needs), or "auto": zero-shot for CLIPs, the paper's MLP for all else.
        prompts: set or template for the zero-shot head.
        lora: rank and targets.
        seed: for fresh weights.
        cache_dir: folder that keeps the text embeddings of a zero-shot head for other runs; None keeps nothing.
        device: where the training images are encoded for a probe; None: where the encoder is.

    Raises:
        ValueError: unknown adaptation or head, or a zero-shot head for an encoder without a text tower.
    """
    check_choice("adaptation", adaptation, ADAPTATIONS)
    kind = ("zero_shot" if is_clip(source) else "mlp") if head == "auto" else head
    encoder, module = _with_head(source, train, kind, prompts, seed, cache_dir, device)
    encoder.requires_grad_(True)
    if adaptation == "lora":
        with seeded(next(encoder.parameters()).device, derived_seed(seed, "lora")):
            add_lora(encoder, lora)
    return Student(encoder, module)


def _with_head(
    source: str,
    train: TrainData,
    kind: str,
    prompts: str,
    seed: int,
    cache_dir: str | None,
    device: torch.device | None,
) -> tuple[Encoder, nn.Module]:
    classes = len(train.class_names)
    if kind == "zero_shot":
        encoder, text = load_clip(source)
        embeddings = class_embeddings(text, train.class_names, prompts, encoder.feature_dim, cache_dir)
        return encoder, ZeroShotHead.from_embeddings(embeddings, text.logit_scale)
    encoder = load_encoder(source)
    if kind == "probe":
        if not isinstance(train, LabelledImages):
            raise ValueError("head: a probe is fitted to images in memory; use data.storage='memory' or head='mlp'")
        probe = fresh_head("linear", encoder.feature_dim, classes, seed)
        home, settings = next(encoder.parameters()).device, HeadSettings(seed=seed)
        features = encode_images(encoder.to(device or home), train.images, settings.batch_size)
        train_head_on_features(probe, features.to(home), train.labels, settings)
        encoder.to(home)
        return encoder, probe.requires_grad_(False)
    return encoder, fresh_head(kind, encoder.feature_dim, classes, seed)


def leave_inference_mode(module: nn.Module) -> None:
    """Replace tensors that were made in inference mode, which take no gradients, by copies, in place."""
    with torch.inference_mode(False):
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and parameter.is_inference():
                    part._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.is_inference():
                    part._buffers[name] = buffer.clone()


def load_encoder_or_tuned(source: str) -> Encoder:
    """An encoder from a source string, or from a folder that :func:`write_tuned` wrote."""
    complete_folder(source)
    return load_tuned(source) if (Path(source) / TUNED_RECORD).is_file() else load_encoder(source)


def freeze_unused(encoder: Encoder) -> None:
    """Freeze the parameters that features do not depend on, such as mask tokens, in place.

    They get no gradient, so that nothing changes on one process; several would wait for these gradients.
    """
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    if not trained:
        return
    encoder.eval()
    size = encoder.preprocess.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    with torch.enable_grad():
        features = encoder(torch.full((1, 3, height, width), 0.5, device=trained[0].device))
        gradients = torch.autograd.grad(features.float().sum(), trained, allow_unused=True)
    for parameter, gradient in zip(trained, gradients, strict=True):
        if gradient is None:
            parameter.requires_grad_(False)


def make_optimizer(student: Student, settings: TrainSettings) -> torch.optim.Optimizer:
    """One optimiser over what requires a gradient, with a rate for the encoder and one for the head."""
    groups = [
        {"params": [p for p in module.parameters() if p.requires_grad], "lr": rate}
        for module, rate in ((student.encoder, settings.lr_encoder), (student.head, settings.lr_head))
    ]
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind([group for group in groups if group["params"]], weight_decay=settings.weight_decay)


def apply_performance_settings(student: Student, settings: TrainSettings) -> None:
    """Set what changes speed and memory but not the function: attention, layout, recomputation, compilation.

    Raises ValueError for an encoder that cannot recompute.
    """
    use_fast_attention(student.encoder)
    if settings.channels_last:
        student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if settings.gradient_checkpointing:
        set_gradient_checkpointing(student.encoder)
    if settings.compile != "no":
        student.encoder.backbone.compile(backend=settings.compile)


def set_training_mode(student: Student, bn_mode: str) -> None:
    """Set train mode on what trains; BN keeps its running statistics unless ``bn_mode`` is "train"."""
    student.train()
    for module in (student.encoder, student.head):
        if not any(parameter.requires_grad for parameter in module.parameters()):
            module.eval()
    if bn_mode == "eval":
        for module in student.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
