"""The paper's figures 2 and 3: confidence of each branch, clean and attacked, and t-SNE of the feature spaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from reproduction.paper.lines import adversarial
from reproduction.paper.study import Study
from reproduction.paper.tables import TABLES, main_lines, rows_of
from zepad_mm.encoders import optimize_for_inference
from zepad_mm.evaluation.plots import confidence_figure, save
from zepad_mm.models.fusion import rfdm_weights
from zepad_mm.training import encode_images


@TABLES.register("confidence")
def confidence(study: Study) -> dict[str, Any]:
    """Fig. 2: largest softmax of each branch, clean and attacked, where the tuning set is the task and where not."""
    victim, rows = study.config.studied[0], []
    members, attack = study.defended(victim), study.config.evaluation.universal[0]
    home, away = next(iter(study.tasks)), list(study.tasks)[-1]  # one task alone is both
    panels = {}
    for case, task in (("C-C", home), ("C-S", away)):
        for condition, images in _clean_and_attacked(study, victim, task).items():
            stacked = branch_logits(study, task, members, images)
            title = "clean" if condition == "clean" else attack
            panels[f"{case} ({task}), {title}"] = stacked
            means = stacked.softmax(-1).amax(-1).mean(1).tolist()
            rows.append(
                {"case": case, "task": task, "condition": condition, "mean": dict(zip(members, means, strict=True))}
            )
    figure = confidence_figure(panels, members, [not adversarial(name) for name in members])
    save(figure, Path(study.config.result) / "confidence.png")
    return {"rows": rows, "victim": victim}


@TABLES.register("features")
def features(study: Study) -> dict[str, Any]:
    """Fig. 3: t-SNE of the victim's features and of the three encoders', clean and attacked.

    A scatter plot proves little, so the record holds a number: the share of the 10 nearest clean points of an attacked
    one, in the full space, that are of its class.
    """
    config, victim, home = study.config, study.config.studied[0], next(iter(study.tasks))
    test = study.data(home)[2].sample(400, config.seed)
    images = _clean_and_attacked(study, victim, home, test.images)
    spaces = {
        "undefended": {kind: encode_images(study.encoder(victim), found) for kind, found in images.items()},
        "ZePAD": {kind: _weighted(study, victim, home, found) for kind, found in images.items()},
    }
    drawn = Figure(figsize=(9.6, 4.6), layout="constrained")
    FigureCanvasAgg(drawn)
    rows = []
    for panel, (name, space) in zip(drawn.subplots(1, 2), spaces.items(), strict=True):
        nearest = KNeighborsClassifier(10).fit(space["clean"].numpy(), test.labels.numpy())
        among = nearest.kneighbors(space["attacked"].numpy(), return_distance=False)
        pure = (test.labels[torch.from_numpy(among)] == test.labels[:, None]).float().mean()
        rows.append({"space": name, "same_class_among_10": float(pure), "n": len(test)})
        points = TSNE(random_state=config.seed).fit_transform(torch.cat(list(space.values())).numpy())
        for kind, marker, part in (("clean", "o", points[: len(test)]), ("attacked", "x", points[len(test) :])):
            panel.scatter(*part.T, c=test.labels.tolist(), cmap="tab10", s=9, marker=marker, linewidths=0.6, label=kind)
        panel.set_title(f"{name}: {100 * float(pure):.0f} % of an attacked image's neighbours share its class", size=9)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.legend(fontsize=7)
    save(drawn, Path(config.result) / "features.png")
    return {"rows": rows, "victim": victim}


def _clean_and_attacked(study: Study, victim: str, task: str, images: Tensor | None = None) -> dict[str, Tensor]:
    """Test images of a task, as they are and under the first T1 perturbation of the main table."""
    images = study.data(task)[2].images if images is None else images
    threats = tuple(study.config.threats)
    rows_of(study, "main", victim, main_lines(study, victim), threats=threats)  # read where it exists
    return {"clean": images, "attacked": study.perturbation("main", victim, task)(images)}


@torch.no_grad()
def branch_logits(study: Study, task: str, members: tuple[str, ...], images: Tensor) -> Tensor:
    """(N, n, C) of encoders with their heads, on the CPU."""
    fast = [optimize_for_inference(study.branch(task, name), study.config.image_size) for name in members]
    batches = [batch.to(study.device) for batch in images.split(250)]
    return torch.stack([torch.cat([branch(batch).cpu() for batch in batches]) for branch in fast])


def _weighted(study: Study, victim: str, task: str, images: Tensor) -> Tensor:
    """(n, sum of D): the three encoders' normalised features, weighted as RFDM weights their logits."""
    members = study.defended(victim)
    logits = branch_logits(study, task, members, images)
    spaces = [torch.nn.functional.normalize(encode_images(study.encoder(name), images), dim=-1) for name in members]
    return torch.cat([w[:, None] * space for w, space in zip(rfdm_weights(logits, 3.0), spaces, strict=True)], dim=1)
