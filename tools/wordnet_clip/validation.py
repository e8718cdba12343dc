"""Zero-shot accuracy of the CLIP in training, on validation images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.wordnet_clip.cache import SMALL, Cached, upper
from tools.wordnet_clip.names import PHOTO
from tools.wordnet_clip.training import Training

EVERYDAY = {
    "bird", "dog", "cat", "fish", "snake", "insect", "monkey", "elephant", "boat", "bridge", "car", "clothing",
    "firearm", "furniture", "guitar", "truck", "vegetable", "fruit", "drink", "weapon",
}  # fmt: skip
FEWEST = 50  # images that an accuracy among everyday nouns needs


@torch.no_grad()
def validate(training: Training) -> dict[str, float]:
    """Top-1 with six templates of each set and part; of ImageNet's subsets also among all 1,000 classes."""
    scores = {}
    for part in ("validation", "never_read"):
        for source, images in training.images[part].items():
            image, small = (embed_images(training, training.cached[part][source], view) for view in (0, 1))
            text = class_texts(training, training.texts.sets[source])
            name = f"{source} {part}"
            scores[name] = top1(image @ text.T, images.labels.to(training.device))
            if "imagenet" in source:
                label = imagenet_class(training, source)[images.labels].to(training.device)
                scores[f"{name}, 1,000 rows"] = top1(image @ training.teacher.rows.T, label)
                scores[f"{name}, 1,000 names"] = top1(image @ class_texts(training, range(1000)).T, label)
            scores |= _among_everyday_nouns(training, name, image, source, images.labels)
            scores |= _among_everyday_nouns(training, f"{name} of {SMALL} pixels", small, source, images.labels)
    return scores


@torch.no_grad()
def embed_images(training: Training, images: Cached, view: int) -> Tensor:
    """Unit-length embeddings (N, EMBED) of one cached view of each image."""
    visual = training.clip.visual
    pooled = [upper(visual.trunk, part.to(training.device)) for part in images.middle[:, view].split(128)]
    return F.normalize(visual.head(torch.cat(pooled)), dim=-1)


@torch.no_grad()
def class_texts(training: Training, entities: Sequence[int]) -> Tensor:
    """Unit-length means (E, EMBED) of each entity's first name in six templates; zero for entities without a name."""
    templates = torch.arange(len(PHOTO))
    found = torch.zeros(len(entities), training.teacher.rows.shape[1], device=training.device)
    known = [(place, entity) for place, entity in enumerate(entities) if training.texts.entities[entity]]
    for start in range(0, len(known), 200):
        part = known[start : start + 200]
        rows = torch.tensor([training.texts.entities[entity][0] for _, entity in part])
        text = training.encode(rows.repeat_interleave(len(PHOTO)), templates.repeat(len(part)))
        found[[place for place, _ in part]] = F.normalize(text.view(len(part), len(PHOTO), -1).mean(1), dim=-1)
    return found


def imagenet_class(training: Training, source: str) -> Tensor:
    """The ImageNet class of each class of an ImageNet subset."""
    related = training.related[torch.tensor(training.texts.sets[source])][:, :1000]
    return related.float().argmax(1).cpu()


def top1(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's."""
    return round(float((logits.argmax(-1) == labels).float().mean()), 4)


def _among_everyday_nouns(
    training: Training, name: str, image: Tensor, source: str, labels: Tensor
) -> dict[str, float]:
    """Of the images of which just one everyday noun is true."""
    texts = training.texts
    words = {entity: texts.entities[entity] for entity in range(texts.broad, len(texts.entities))}
    entities = [entity for entity, rows in words.items() if rows and texts.words[rows[0]] in EVERYDAY]
    related = training.related[torch.tensor(texts.sets[source])][:, entities].cpu()[labels]
    rows = (related.sum(1) == 1).nonzero().squeeze(1)
    if len(rows) < FEWEST:
        return {}
    logits = image[rows.to(training.device)] @ class_texts(training, entities).T
    return {f"{name}, broad": top1(logits, related[rows].float().argmax(1).to(training.device))}
