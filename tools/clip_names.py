"""Class names, synonyms and hypernyms in the training texts of the embedded CLIP, and pairs excluded as negatives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from zepad_mm.encoders.prompts import PROMPTS

# classes of tinyimagenet80 that stand in no text of the training
UNSEEN = (
    "tailed frog", "black widow", "jellyfish", "black stork", "standard poodle", "dragonfly", "chimpanzee", "abacus",
    "bathtub", "candle", "frying pan", "lampshade", "organ", "teapot", "ice cream", "acorn",
)  # fmt: skip
# ImageNet names that an image of clothes may show as well: no negatives for each other
APPAREL = (
    "sandal", "sock", "kimono", "fur coat", "poncho", "vestment", "academic gown", "bikini", "apron", "jersey", "jean",
    "trench coat", "loafer", "miniskirt", "cardigan", "sweatshirt", "swimming trunks", "running shoe", "clog",
    "cowboy boot", "cowboy hat", "sombrero", "bonnet", "gown", "hoopskirt", "overskirt", "pajama", "sarong", "suit",
    "lab coat", "maillot", "bearskin", "bathing cap", "mortarboard", "stole", "cloak", "abaya", "shower cap", "wig",
)  # fmt: skip
# everyday names and the ImageNet classes below each: ImageNet's own names do not contain the word "dog"
HYPERNYMS: dict[str, Iterable[int]] = {
    "dog": range(151, 269), "cat": range(281, 286), "bird": [*range(7, 25), *range(80, 101), *range(127, 147)],
    "fish": [*range(7), *range(389, 398)], "snake": range(52, 69), "lizard": range(38, 49), "frog": [30, 32],
    "turtle": range(33, 38), "spider": [72, 73, 74, 76, 77], "insect": range(300, 320), "butterfly": range(321, 327),
    "monkey": range(370, 383), "bear": range(294, 298), "horse": [339, 340], "deer": [351, 352, 353],
    "elephant": [385, 386], "truck": [555, 569, 675, 717, 864, 867],
    "car": [436, 468, 511, 609, 627, 656, 661, 751, 817],
    "bus": [654, 779, 874], "train": [466, 547, 705, 820], "ship": [403, 484, 510, 554, 628, 724],
    "boat": [472, 576, 625, 814, 914], "airplane": [404, 895], "guitar": [402, 546], "clock": [409, 530, 892],
    "bottle": [440, 720, 737, 898, 907], "building": [425, 497, 498, 538, 624, 663, 668, 698, 832],
    "fruit": range(948, 958), "vegetable": range(936, 948), "food": [*range(923, 936), *range(959, 966)],
    "musical instrument": [401, 402, 420, 432, 486, 513, 541, 546, 558, 566, 577, 593, 642, 683, 684, 776, 875, 889],
}  # fmt: skip
OVERLAP = (("boat", "ship"), ("food", "fruit"), ("food", "vegetable"), ("fruit", "vegetable"), ("insect", "butterfly"))
TEMPLATES = (*PROMPTS.get("photo"), "a blurry photo of a {}.", "a small {}.", "a photo of one {}.", "{}")


class Names:
    """A table of class names, one row each: those of the training sets, the rest of ImageNet's, hypernyms.

    Args:
        own: names of the training sets, the held-out ones left out. clothes: those of them that are clothes.

    Attributes:
        synonyms: the ways to write each row. imagenet: its ImageNet class, or -1.
        related: (rows, rows) bool, pairs that one image may show both. hypernym: (rows,) row of the hypernym, or -1.
        objects: number of rows that are not hypernyms.
    """

    def __init__(self, own: Sequence[str], clothes: Sequence[str]) -> None:
        self.own = len(own)
        self.synonyms: list[list[str]] = [[name] for name in own]
        self.imagenet: list[int] = [-1] * len(own)
        row_of_class = self._add_imagenet({name.lower(): row for row, name in enumerate(own) if name not in clothes})
        self.objects = len(self.synonyms)
        self.synonyms += [[name] for name in HYPERNYMS]
        self.imagenet += [-1] * len(HYPERNYMS)
        self.related = torch.eye(len(self), dtype=torch.bool)
        self.hypernym = torch.full((len(self),), -1)
        self._relate_clothes([own.index(name) for name in clothes])
        self._relate_hypernyms(row_of_class)

    def __len__(self) -> int:
        return len(self.synonyms)

    def captions(self, rows: Tensor, generator: torch.Generator) -> list[str]:
        """One random caption for each row; the first synonym, the usual word, is the most frequent."""
        draws = torch.rand(len(rows), 2, generator=generator).tolist()
        return [
            TEMPLATES[int(a * len(TEMPLATES))].format(self.synonyms[row][int(b * b * len(self.synonyms[row]))])
            for row, (a, b) in zip(rows.tolist(), draws, strict=True)
        ]

    def all_captions(self) -> list[str]:
        """All texts that training can sample."""
        return [template.format(word) for words in self.synonyms for word in words for template in TEMPLATES]

    def candidates(self, needed: Tensor, generator: torch.Generator, extra: int = 60) -> Tensor:
        """Rows to choose among: all own names, the needed ones, all hypernyms, ``extra`` random ImageNet names."""
        rest = self.own + torch.randperm(self.objects - self.own, generator=generator)[:extra]
        return torch.cat([torch.arange(self.own), needed, torch.arange(self.objects, len(self)), rest]).unique()

    def _add_imagenet(self, own: dict[str, int]) -> dict[int, int]:
        """Add ImageNet's names except the held-out ones; returns the row of each class."""
        info, row_of_class = ImageNetInfo(), {}
        banned = {name.lower() for name in UNSEEN}
        for index in range(1000):
            words = [word.strip() for word in info.index_to_description(index, detailed=False).split(",")]
            lower = [word.lower() for word in words]
            if banned.intersection(lower):
                continue
            row = next((own[word] for word in lower if word in own), len(self.synonyms))
            if row == len(self.synonyms):
                self.synonyms.append(words)
                self.imagenet.append(index)
            else:
                self.synonyms[row], self.imagenet[row] = words, index
            row_of_class[index] = row
        return row_of_class

    def _relate_clothes(self, clothes: list[int]) -> None:
        apparel = [row for row, words in enumerate(self.synonyms) if any(word.lower() in APPAREL for word in words)]
        for row in apparel:
            self.related[row, clothes] = True
            self.related[clothes, row] = True

    def _relate_hypernyms(self, row_of_class: dict[int, int]) -> None:
        row_of = {name: self.objects + index for index, name in enumerate(HYPERNYMS)}
        for name, classes in HYPERNYMS.items():
            members = torch.tensor([row_of_class[index] for index in classes if index in row_of_class])
            self.related[row_of[name], members] = True
            self.related[members, row_of[name]] = True
            self.hypernym[members] = row_of[name]
        shared = (self.related[self.objects :].float() @ self.related[self.objects :].T.float()) > 0
        self.related[self.objects :, self.objects :] |= shared
        for one, other in OVERLAP:
            self.related[row_of[one], row_of[other]] = self.related[row_of[other], row_of[one]] = True
