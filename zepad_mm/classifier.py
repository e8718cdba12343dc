"""Zero-shot classification that stands up to downstream-agnostic perturbations, shaped like transformers' pipeline."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zepad_mm.checks import check_images, check_names
from zepad_mm.data import to_tensor
from zepad_mm.heads import ZeroShotHead
from zepad_mm.model import ZePAD
from zepad_mm.prompts import templates_of

Labels = list[dict[str, Any]]


class RobustZeroShotClassifier:
    """Images and candidate labels in, scores out.

    Args:
        model: a defended CLIP, all of whose heads are zero-shot.
        batch_size: images per forward pass.

    Raises:
        ValueError: a branch with a trained head, which cannot answer for other labels.
    """

    def __init__(self, model: ZePAD, batch_size: int = 32) -> None:
        trained = [branch.name for branch in model.config.branches if branch.head != "zero_shot"]
        if trained:
            raise ValueError(f"zero-shot classification needs zero-shot heads; {', '.join(trained)} have trained ones")
        self.model = model.eval()
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(cls, name: str | Path, *, batch_size: int = 32, **hub: Any) -> RobustZeroShotClassifier:
        """From ``"embedded"``, a folder or the Hub; ``hub`` as for :meth:`ZePAD.from_pretrained`."""
        return cls(ZePAD.from_pretrained(name, **hub), batch_size)

    def to(self, device: str | torch.device) -> RobustZeroShotClassifier:
        """Move the model."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        images: Any,
        candidate_labels: Sequence[str],
        *,
        hypothesis_template: str | Sequence[str] = "photo",
        top_k: int | None = None,
        return_evidence: bool = False,
    ) -> Any:
        """Classify one image or many.

        Args:
            images: a PIL picture, path, URL, bytes, (3, H, W) or (B, 3, H, W) tensor in [0, 1], or a list of these.
            candidate_labels: what it may be; at least one.
            hypothesis_template: a template with one ``{}``, several, or a named prompt set.
            top_k: keep that many best labels.
            return_evidence: give ``{"labels", "evidence"}`` with the branch confidences, the fusion weights, the
                suspicion score, whether it is flagged, and what the undefended encoder says.

        Returns:
            ``[{"score", "label"}, ...]``, best first, for one image; a list of those for many. Scores sum to 1.

        Raises:
            ValueError: no labels, a template without ``{}``, or pixels out of range.
        """
        names = check_names(candidate_labels, "candidate_labels")
        templates = templates_of(hypothesis_template)
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: expected a positive number, got {top_k}")
        device = self.model.device
        embeddings = self.model.text.class_embeddings(names, templates).to(device)
        single, pictures = _as_list(images)
        results: list[Any] = []
        for batch in _same_size_batches(pictures, self.batch_size):
            pixels = batch.to(device)
            features = {name: branch.encoder(pixels) for name, branch in self._branches()}
            logits = torch.stack([self._head(name, embeddings)(features[name]) for name in features])
            decision = self.model.fuse(logits)
            scores = decision.logits.softmax(-1)
            answers = [_ranked(row, names, top_k) for row in scores.cpu()]
            if return_evidence:
                before = self.model.undefended.encoder(pixels)
                scale = self.model.undefended.head.logit_scale.item()  # type: ignore[union-attr, operator]
                plain = ZeroShotHead.from_embeddings(embeddings, scale)(before).softmax(-1).cpu()
                flags = self.model.is_adversarial(decision)
                results += [
                    {
                        "labels": answer,
                        "evidence": {
                            "confidences": dict(zip(features, decision.confidences[:, i].tolist(), strict=True)),
                            "weights": dict(zip(features, decision.weights[:, i].tolist(), strict=True)),
                            "dae_score": float(decision.dae_score[i]),
                            "flagged": bool(flags[i]),
                            "undefended": _ranked(plain[i], names, top_k),
                        },
                    }
                    for i, answer in enumerate(answers)
                ]
            else:
                results += answers
        return results[0] if single else results

    def _branches(self) -> Iterator[tuple[str, Any]]:
        yield from self.model.branches.items()

    def _head(self, name: str, embeddings: Tensor) -> ZeroShotHead:
        return ZeroShotHead.from_embeddings(embeddings, self.model.branch(name).head.logit_scale.item())  # type: ignore[union-attr, operator]


def _ranked(scores: Tensor, names: Sequence[str], top_k: int | None) -> Labels:
    order = scores.argsort(descending=True)[:top_k]
    return [{"score": float(scores[i]), "label": names[int(i)]} for i in order]


def _as_list(images: Any) -> tuple[bool, Iterable[Any]]:
    """(whether it was a single image, an iterable of images)."""
    if isinstance(images, Tensor):
        single = images.ndim == 3
        return single, list(check_images(images[None] if single else images))
    if isinstance(images, str | bytes | Path) or hasattr(images, "convert"):
        return True, [images]
    return False, images


def _load(image: Any) -> Tensor:
    """Anything that is a picture to (3, H, W) in [0, 1]."""
    from PIL import Image, UnidentifiedImageError
    from transformers.image_utils import load_image

    if isinstance(image, Tensor):
        return check_images(image[None])[0]
    try:
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        elif isinstance(image, str | Path):
            image = load_image(str(image))
    except (UnidentifiedImageError, OSError, ValueError) as error:
        what = f"{len(image)} bytes" if isinstance(image, bytes) else repr(str(image))
        raise ValueError(f"{what} could not be read as a picture: {error}") from error
    if not hasattr(image, "convert"):
        raise ValueError(f"expected a PIL picture, path, URL, bytes or tensor, got {type(image).__name__}")
    return to_tensor(image)


def _same_size_batches(pictures: Iterable[Any], size: int) -> Iterator[Tensor]:
    """Stacks of at most ``size`` consecutive pictures of one shape, so that nobody is resized for a neighbour."""
    pending: list[Tensor] = []
    for picture in map(_load, pictures):
        if pending and (len(pending) == size or pending[0].shape != picture.shape):
            yield torch.stack(pending)
            pending = []
        pending.append(picture)
    if pending:
        yield torch.stack(pending)
