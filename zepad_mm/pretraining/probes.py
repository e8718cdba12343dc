"""Quality of frozen features: nearest-neighbour and linear accuracy."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from zepad_mm.data import LabelledImages
from zepad_mm.pretraining.base import Learner


@torch.no_grad()
def probe(learner: Learner, train: LabelledImages, held_out: LabelledImages, device: torch.device) -> dict[str, float]:
    """Held-out accuracy of a cosine kNN (k = 20, T = 0.07) and of ridge regression on the frozen features."""
    learner.eval()
    sets = [
        (torch.cat([learner.features(x.to(device)).float().cpu() for x, _ in data.batches(500)]), data.labels)
        for data in (train, held_out)
    ]
    learner.train()
    (features, labels), (queries, truth) = sets
    onehot = F.one_hot(labels, len(train.class_names)).float()
    similarity = F.normalize(queries, dim=1) @ F.normalize(features, dim=1).T
    nearest = similarity.topk(min(20, len(labels)))
    votes = ((nearest.values / 0.07).exp().unsqueeze(-1) * onehot[nearest.indices]).sum(1)
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    inputs = torch.cat([(features - mean) / std, torch.ones(len(features), 1)], 1)
    query_inputs = torch.cat([(queries - mean) / std, torch.ones(len(queries), 1)], 1)
    gram = inputs.T @ inputs + 1e-3 * len(inputs) * torch.eye(inputs.shape[1])
    linear = query_inputs @ torch.linalg.solve(gram, inputs.T @ onehot)
    return {
        "knn_accuracy": float((votes.argmax(1) == truth).float().mean()),
        "linear_accuracy": float((linear.argmax(1) == truth).float().mean()),
    }
