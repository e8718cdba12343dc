"""Trains the text tower on prototypes, then both towers on images; each stage resumes from its last checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.wordnet_clip.cache import LOWER, Cached, cache, training_views, upper, validation_views
from tools.wordnet_clip.images import Images
from tools.wordnet_clip.model import Teacher
from tools.wordnet_clip.names import TEMPLATES, Texts
from zepad_mm.utils.io import read_tensors, write_tensors

TEXT_SHARES = (0.4, 0.3, 0.27, 0.03)  # of a batch: ImageNet's names, nouns above classes, nouns near classes, glosses
IMAGE_SHARES = {"imagenet20": 0.25, "tinyimagenet80": 0.35, "caltech69": 0.25, "clothing": 0.15}
ROW_SCALE = 20.0  # of cosines between texts and classifier rows in the cross-entropy
BROAD = 0.3  # share of images whose target is a broad noun
EMA = 0.998
ALSO_TRUE = -1e4  # logit of another name that is true of the image


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Sizes and rates of the two stages."""

    image_size: int = 128
    text_steps: int = 3000
    text_batch: int = 768
    text_rate: float = 2e-3
    finish_rounds: int = 2  # each has its own schedule and starts from the last one's weights
    finish_steps: int = 1000  # of a round
    finish_batch: int = 192
    tower_rate: float = 2e-4
    projection_rate: float = 2e-4
    finish_text_rate: float = 3e-4
    names_per_step: int = 500
    nouns_per_step: int = 192
    text_every: int = 4  # steps between updates of the text tower; its embeddings are reused between them
    views: int = 8  # cached views of each training image
    distill: float = 1.5
    keep: float = 4.0
    seed: int = 0


class Training:
    """The CLIP in training with its texts, images and teacher.

    Args:
        clip: from :func:`tools.wordnet_clip.model.build_clip`. texts: of :mod:`tools.wordnet_clip.names`.
        images: part -> source -> images. work: folder of the checkpoints. device: "cpu" or "cuda".
    """

    def __init__(
        self, clip: Any, texts: Texts, images: dict[str, dict[str, Images]], recipe: Recipe, work: Path, device: str
    ) -> None:
        self.clip, self.texts, self.images, self.recipe = clip.to(device), texts, images, recipe
        self.work, self.device = work, torch.device(device)
        self.teacher = Teacher().to(device)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.mixtures = texts.mixtures.float().to(device)
        self.prototypes = F.normalize(self.mixtures @ self.teacher.rows, dim=-1)
        self.related = texts.related.to(device)
        self.readable = torch.tensor([bool(rows) for rows in texts.entities], device=device)
        self.by_group = [(texts.group == group).nonzero().squeeze(1) for group in range(4)]
        self.mean_feature = torch.empty(0)
        self.seconds: dict[str, float] = {}
        self.cached: dict[str, dict[str, Cached]] = {}
        self.step, self.kept_texts = 0, (torch.empty(0), torch.empty(0))

    # ---- stages

    def start_finish(self) -> None:
        """Caches views of all images and initialises the image tower and its projection."""
        recipe = self.recipe
        for part, sources in self.images.items():
            side, folder = recipe.image_size, self.work / "cache"
            views = training_views(side, recipe.views) if part == "train" else validation_views(side)
            self.cached[part] = {
                source: cache(images, self.teacher, views, folder / f"{source}-{part}", recipe.seed)
                for source, images in sources.items()
            }
        means = [cached.features[:400].mean(0) for cached in self.cached["train"].values()]
        self.mean_feature = torch.stack(means).mean(0).to(self.device)
        self._start_projection(self.mean_feature)

    def text_stage(self) -> None:
        """The text tower learns the prototypes of all nouns; no image is looked at."""
        recipe = self.recipe
        tower = [parameter for name, parameter in self.clip.named_parameters() if not name.startswith("visual.")]
        groups = [{"params": tower, "lr": recipe.text_rate, "weight_decay": 0.01}]
        self._run("text", recipe.text_steps, groups, lambda: self._noun_loss(recipe.text_batch))

    def finish_stage(self, number: int) -> None:
        """A round in which both towers learn from images, names, the teacher's answers and the prototypes."""
        recipe = self.recipe
        visual = self.clip.visual
        texts = [parameter for key, parameter in self.clip.named_parameters() if not key.startswith("visual.")]
        groups = [
            {"params": self._tuned_parameters(visual.trunk), "lr": recipe.tower_rate, "weight_decay": 0.02},
            {"params": list(visual.head.parameters()), "lr": recipe.projection_rate, "weight_decay": 0.0},
            {"params": texts, "lr": recipe.finish_text_rate, "weight_decay": 0.01},
        ]
        self.generator.manual_seed(recipe.seed + number)
        self.step = 0
        self._run(f"finish-{number}", recipe.finish_steps, groups, self._finish_loss, average=True)

    @staticmethod
    def _tuned_parameters(trunk: Any) -> list[nn.Parameter]:
        return [*trunk.blocks[LOWER:].parameters(), *trunk.conv_head.parameters(), *trunk.bn2.parameters()]

    def _run(
        self, stage: str, steps: int, groups: list[dict[str, Any]], loss_of_step: Any, average: bool = False
    ) -> None:
        """AdamW with warm-up and cosine decay; a checkpoint now and then, the moving average kept at the end."""
        done = self.work / f"{stage}.safetensors"
        if done.is_file():
            self._load_model(done)
            return
        started = time.time()
        torch.backends.cudnn.benchmark = self.device.type == "cuda"
        trained = [parameter for group in groups for parameter in group["params"]]
        self.clip.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        peaks = [group["lr"] for group in groups]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peaks, total_steps=steps, pct_start=0.08)
        mean = [parameter.detach().clone() for parameter in trained] if average else []
        first = self._resume(stage, optimiser, schedule, trained, mean)
        for step in range(first, steps):
            loss, parts = loss_of_step()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                self.clip.logit_scale.clamp_(max=4.6052)
            if average:
                torch._foreach_lerp_(
                    mean, [parameter.detach() for parameter in trained], 1 - min(EMA, step / (step + 50))
                )
            if (step + 1) % max(1, steps // 15) == 0 or step < 2:
                shown = " ".join(f"{key} {float(value):.3f}" for key, value in parts.items())
                print(f"{stage} {step + 1}/{steps} {time.time() - started:.0f} s: {shown}", flush=True)
                self._checkpoint(stage, step + 1, optimiser, trained, mean)
        if average:
            for parameter, averaged in zip(trained, mean, strict=True):
                parameter.data.copy_(averaged)
        torch.backends.cudnn.benchmark = False
        self.seconds[stage] = time.time() - started
        write_tensors(done, self.clip.state_dict(), {"seconds": f"{self.seconds[stage]:.1f}"})
        (self.work / f"{stage}.checkpoint.safetensors").unlink(missing_ok=True)

    # ---- losses

    def _noun_loss(self, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """1 - cosine to the prototype, and cross-entropy over the classifier's rows."""
        rows = torch.cat(
            [
                group[torch.randint(len(group), (int(batch * share),), generator=self.generator)]
                for group, share in zip(self.by_group, TEXT_SHARES, strict=True)
            ]
        )
        templates = torch.randint(len(TEMPLATES), (len(rows),), generator=self.generator)
        templates[self.texts.group[rows] == 3] = TEMPLATES.index("{}")
        text = self.encode(rows, templates)
        target = self.texts.target[rows].to(self.device)
        weight = self.texts.weight[rows].to(self.device)
        weight = weight / weight.mean()
        near = 1 - (text * self.prototypes[target]).sum(-1)
        wanted = self.mixtures[target] / self.mixtures[target].sum(-1, keepdim=True)
        row_loss = -(wanted * F.log_softmax(ROW_SCALE * text @ self.teacher.rows.T, dim=-1)).sum(-1)
        loss = (weight * (near + 0.3 * row_loss)).mean()
        return loss, {"cosine": 1 - near.mean().detach(), "rows": row_loss.mean().detach()}

    def _finish_loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        image, features, teacher_logits, entities = self._image_batch()
        image = F.normalize(image.float(), dim=-1)
        kept = F.normalize((features - self.mean_feature) @ self.teacher.directions.T, dim=-1)
        with_texts = self.step % self.recipe.text_every == 0
        self.step += 1
        if with_texts:
            candidates, text = self._candidate_texts(entities)
            self.kept_texts = (candidates, text.detach())
        candidates, text = (candidates, text) if with_texts else self.kept_texts
        known = torch.isin(entities, candidates)
        image, kept, teacher_logits, entities = image[known], kept[known], teacher_logits[known], entities[known]
        scale = self.clip.logit_scale.exp()
        logits = scale * image @ text.T
        named = self._named_loss(logits, candidates, entities)
        classes = candidates < 1000
        ids = candidates[classes]
        teacher = F.softmax(teacher_logits[:, ids], dim=-1)
        distilled = -(teacher * F.log_softmax(logits[:, classes], dim=-1)).sum(-1).mean()
        distilled = distilled + (teacher * teacher.clamp_min(1e-8).log()).sum(-1).mean()
        feature = 1 - (image * kept).sum(-1).mean()
        recipe = self.recipe
        loss = named + recipe.distill * distilled + recipe.keep * feature
        parts = {"named": named, "distilled": distilled, "feature": feature}
        if with_texts:
            rows = self.teacher.rows[ids] @ text[classes].T
            parts["rows"] = F.cross_entropy(ROW_SCALE * 1.5 * rows, torch.arange(len(ids), device=self.device))
            parts["nouns"], _ = self._noun_loss(recipe.nouns_per_step)
            loss = loss + 0.5 * parts["rows"] + parts["nouns"]
        return loss, {key: value.detach() for key, value in parts.items()} | {"scale": scale.detach()}

    def _image_batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embeddings (B, EMBED), the teacher's features (B, 1280) and logits (B, 1000), entities (B,)."""
        middle, features, entities = [], [], []
        for source, images in self.cached["train"].items():
            n = int(self.recipe.finish_batch * IMAGE_SHARES[source])
            rows = torch.randint(len(images.labels), (n,), generator=self.generator)
            view = torch.randint(images.middle.shape[1], (n,), generator=self.generator)
            middle.append(images.middle[rows, view])
            features.append(images.features[rows])
            entities.append(torch.tensor(self.texts.sets[source])[images.labels[rows]])
        pooled = upper(self.clip.visual.trunk, torch.cat(middle).to(self.device))
        known = torch.cat(features).to(self.device)
        with torch.no_grad():
            logits = self.teacher.network.classifier(known)
        return self.clip.visual.head(pooled), known, logits, torch.cat(entities).to(self.device)

    def _named_loss(self, logits: Tensor, candidates: Tensor, entities: Tensor) -> Tensor:
        """Cross-entropy against the image's name or, at times, a broad noun above it; other true names are left out."""
        broad = self.related[entities].clone()
        broad[:, : self.texts.broad] = False
        broad &= self.readable
        chance = broad.float() + 1e-9
        drawn = torch.multinomial(chance, 1).squeeze(1)
        wanted = torch.rand(len(entities), generator=self.generator).to(self.device) < BROAD
        target = torch.where(wanted & broad.any(1), drawn, entities)
        place = torch.full((len(self.readable),), -1, device=self.device)
        place[candidates] = torch.arange(len(candidates), device=self.device)
        also_true = (self.related[target] | self.related[entities])[:, candidates]
        also_true = also_true.scatter(1, place[target].unsqueeze(1), False)
        return F.cross_entropy(logits.masked_fill(also_true, ALSO_TRUE), place[target])

    # ---- batches

    def _candidate_texts(self, entities: Tensor) -> tuple[Tensor, Tensor]:
        """Entities to choose among, one caption of each: some of ImageNet's, all of the sets, all broad ones."""
        readable = self.readable.cpu()
        chosen = torch.zeros(len(readable), dtype=torch.bool)
        chosen[torch.randperm(1000, generator=self.generator)[: self.recipe.names_per_step]] = True
        chosen[1000:] = True
        chosen[entities.cpu()] = True
        candidates = (chosen & readable).nonzero().squeeze(1)
        draws = torch.rand(len(candidates), 2, generator=self.generator)
        rows = []
        for entity, draw in zip(candidates.tolist(), draws[:, 0].tolist(), strict=True):
            words = self.texts.entities[entity]
            rows.append(words[int(draw * draw * len(words))])
        templates = (draws[:, 1] ** 1.5 * len(TEMPLATES)).long()
        return candidates.to(self.device), self.encode(torch.tensor(rows), templates)

    def encode(self, rows: Tensor, templates: Tensor) -> Tensor:
        """Unit-length embeddings (B, EMBED) of texts in templates."""
        tokens = self.texts.compose(rows, templates)
        tokens = tokens[:, : int((tokens != 0).sum(1).max())].to(self.device)
        # bfloat16 speeds up matrix products on CPUs too; plain attention is the fastest for so few tokens
        with torch.autocast(self.device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            text = encode_text(self.clip, tokens)
        return F.normalize(text.float(), dim=-1)

    # ---- the start

    @torch.no_grad()
    def _start_projection(self, mean: Tensor) -> None:
        self.clip.visual.trunk.load_state_dict(
            {key: value for key, value in self.teacher.network.state_dict().items() if "classifier" not in key}
        )
        projection = self.clip.visual.head.proj
        projection.weight.copy_(self.teacher.directions)
        projection.bias.copy_(-(self.teacher.directions @ mean))

    # ---- checkpoints

    def _checkpoint(self, stage: str, step: int, optimiser: Any, trained: list[Any], mean: list[Tensor]) -> None:
        tensors = {f"model.{key}": value for key, value in self.clip.state_dict().items()}
        for index, parameter in enumerate(trained):
            for key, value in optimiser.state[parameter].items():
                tensors[f"optimiser.{index}.{key}"] = value
        tensors |= {f"mean.{index}": value for index, value in enumerate(mean)}
        tensors["generator"] = self.generator.get_state()
        write_tensors(self.work / f"{stage}.checkpoint.safetensors", tensors, {"step": str(step)})

    def _resume(self, stage: str, optimiser: Any, schedule: Any, trained: list[Any], mean: list[Tensor]) -> int:
        path = self.work / f"{stage}.checkpoint.safetensors"
        if not path.is_file():
            return 0
        tensors, metadata = read_tensors(path)
        self.clip.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        state = optimiser.state_dict()
        for key, value in tensors.items():
            if key.startswith("optimiser."):
                _, index, name = key.split(".", 2)
                state["state"].setdefault(int(index), {})[name] = value
        optimiser.load_state_dict(state)
        for number, averaged in enumerate(mean):
            averaged.copy_(tensors[f"mean.{number}"])
        self.generator.set_state(tensors["generator"])
        for _ in range(int(metadata["step"])):
            schedule.step()
        return int(metadata["step"])

    def _load_model(self, path: Path) -> None:
        tensors, metadata = read_tensors(path)
        if path.stem == "text":  # the image tower starts afresh, from its own weights
            tensors = {key: value for key, value in tensors.items() if not key.startswith("visual.")}
            tensors |= {key: value for key, value in self.clip.state_dict().items() if key.startswith("visual.")}
        self.clip.load_state_dict(tensors)
        self.seconds[path.stem] = float(metadata["seconds"])


def encode_text(clip: Any, tokens: Tensor) -> Tensor:
    """What ``clip.encode_text`` gives, for tokens without the padding that all of them share at the end."""
    length = tokens.shape[1]
    hidden = clip.token_embedding(tokens) + clip.positional_embedding[:length]
    hidden = clip.ln_final(clip.transformer(hidden, attn_mask=clip.attn_mask[:length, :length]))
    return hidden[torch.arange(len(tokens), device=tokens.device), tokens.argmax(-1)] @ clip.text_projection
