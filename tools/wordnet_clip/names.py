"""Every text that the CLIP reads in training: nouns of WordNet, ImageNet's names, names of the training sets."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from timm.data import ImageNetInfo
from torch import Tensor

from tools.wordnet_clip.tokenizer import build_tokenizer, choose_merges, words_of
from tools.wordnet_clip.wordnet import WordNet
from zepad_mm.utils.io import read_json, read_tensors, write_json, write_tensors

CONTEXT = 24  # tokens of a text
VOCABULARY = 12288
LONGEST_NAME = 12  # tokens; the longest template takes the rest
# never read in any text of the training, nor their synonyms; their images are not trained on
NEVER_READ = {
    "caltech69": ("gerenuk", "euphonium", "ketch boat", "hawksbill turtle", "ewer", "mayfly"),
    "tinyimagenet80": ("tailed frog", "black stork", "standard poodle", "abacus", "acorn", "lampshade"),
}
UNSEEN = NEVER_READ["tinyimagenet80"]
PHOTO = (
    "a photo of a {}.", "a picture of a {}.", "a photo of the {}.", "a cropped photo of a {}.",
    "a close-up photo of a {}.", "a {}.",
)  # fmt: skip
TEMPLATES = (
    *PHOTO, "{}", "This is a photo of {}.", "a photo of {}.", "a photo of one {}.", "a photo of an {}.", "an {}.",
    "a blurry photo of a {}.", "a small {}.", "a good photo of a {}.", "the {}.", "a bright photo of the {}.",
    "a picture of the {}.", "an image of a {}.", "a drawing of a {}.", "a painting of a {}.",
)  # fmt: skip
BARE = TEMPLATES.index("{}")
# class names of clothes and ImageNet's classes below these nouns are no negatives for each other
APPAREL = ("clothing", "footwear", "headdress", "garment", "neckwear")
BROAD_COUNT = 3  # how often a broad noun was tagged in WordNet's corpora at least


@dataclass
class Texts:
    """All texts as tokens, with what they stand for.

    Attributes:
        words: the texts. tokens: (N, 20), padded with 0. lengths: (N,).
        target: (N,) row in ``mixtures``. weight: (N,) of the text in the loss. group: (N,) 0 ImageNet's names,
            1 nouns with classes below them, 2 other nouns, 3 glosses, 4 names without a target.
        mixtures: (T, 1000) which ImageNet classes a text stands for.
        entities: what an image may be called, each a list of texts: ImageNet's 1,000 classes, then the names of the
            training sets, then broad nouns. related: (E, E) pairs that one image may show both.
        sets: class names of each set as entities. broad: the first broad entity.
    """

    words: list[str]
    tokens: Tensor
    lengths: Tensor
    target: Tensor
    weight: Tensor
    group: Tensor
    mixtures: Tensor
    entities: list[list[int]]
    related: Tensor
    sets: dict[str, list[int]]
    broad: int
    prefixes: Tensor
    suffixes: Tensor

    def save(self, folder: Path) -> None:
        """Writes ``texts.safetensors`` and ``texts.json``."""
        names = ("tokens", "lengths", "target", "weight", "group", "mixtures", "related", "prefixes", "suffixes")
        tensors = {name: getattr(self, name) for name in names}
        tensors["tokens"] = tensors["tokens"].short()
        write_tensors(folder / "texts.safetensors", tensors)
        write_json(
            folder / "texts.json",
            {name: getattr(self, name) for name in ("words", "entities", "sets", "broad")},
        )

    @classmethod
    def load(cls, folder: Path) -> Texts:
        """Reads what :meth:`save` wrote."""
        tensors: dict[str, Any] = read_tensors(folder / "texts.safetensors")[0]
        tensors["tokens"] = tensors["tokens"].long()
        return cls(**tensors, **read_json(folder / "texts.json"))

    def compose(self, texts: Tensor, templates: Tensor) -> Tensor:
        """(B, CONTEXT) tokens of texts in templates, with start and end."""
        place = torch.arange(CONTEXT).expand(len(texts), -1)
        prefix, suffix = self.prefixes[templates], self.suffixes[templates]
        ahead, behind = (prefix != 0).sum(1, keepdim=True), (suffix != 0).sum(1, keepdim=True)
        length = torch.minimum(self.lengths[texts].unsqueeze(1), CONTEXT - ahead - behind)
        middle = self._pick(self.tokens[texts], place - ahead)
        after = self._pick(suffix, place - ahead - length)
        result = torch.where(
            place < ahead, self._pick(prefix, place), torch.where(place < ahead + length, middle, after)
        )
        return torch.where(place < ahead + length + behind, result, 0)

    @staticmethod
    def _pick(tokens: Tensor, place: Tensor) -> Tensor:
        return tokens.gather(1, place.clamp(0, tokens.shape[1] - 1))


def collect(wordnet: WordNet, sets: dict[str, tuple[str, ...]]) -> tuple[Texts, list[tuple[str, str]]]:
    """All texts of the training and the merges of their tokenizer.

    Args:
        wordnet: the nouns. sets: class names of each training set.
    """
    collector = _Collector(wordnet, sets)
    collector.add_imagenet()
    collector.add_nouns()
    collector.add_sets()
    collector.add_broad()
    return collector.finish()


class _Collector:
    def __init__(self, wordnet: WordNet, sets: dict[str, tuple[str, ...]]) -> None:
        self.wordnet, self.sets = wordnet, sets
        never = [name for names in NEVER_READ.values() for name in names]
        self.banned = re.compile(r"\b(" + "|".join(map(re.escape, never)) + r")s?\b", re.IGNORECASE)
        self.banned_synsets = self._banned_synsets(never)
        self.rows: dict[str, int] = {}
        self.about: list[tuple[frozenset[int], float, int]] = []  # classes, weight, group
        self.entities: list[list[int]] = []
        self.synset: list[int] = []  # of each entity
        self.is_clothing: list[bool] = []
        self.class_of: dict[str, set[int]] = {}
        self.set_rows: dict[str, list[int]] = {}

    def add_imagenet(self) -> None:
        """ImageNet's 1,000 classes: WordNet's lemmas and open_clip's names; a name of two classes stands for both."""
        info = ImageNetInfo()
        names: list[list[str]] = []
        for index, offset in enumerate(self.wordnet.class_synsets):
            lemmas = [word.strip() for word in info.index_to_description(index, detailed=False).split(",")]
            public = open_clip.IMAGENET_CLASSNAMES[index]
            names.append([] if offset in self.banned_synsets else list(dict.fromkeys([lemmas[0], public, *lemmas[1:]])))
            for name in lemmas:
                self.class_of.setdefault(name.lower(), set()).add(index)
        meaning: dict[str, set[int]] = {}
        for index, words in enumerate(names):
            for word in words:
                meaning.setdefault(word.lower(), set()).add(index)
        for offset, words in zip(self.wordnet.class_synsets, names, strict=True):
            rows = []
            for rank, word in enumerate(words):
                row = self._add(word, frozenset(meaning[word.lower()]), 1.0 if rank < 2 else 0.5, 0)
                rows += [row] if row is not None else []
            self._entity(rows, offset, False)

    def add_nouns(self) -> None:
        """Every lemma with ImageNet relatives, and the glosses of their synsets."""
        for lemma, count in self._lemmas().items():
            found = self.wordnet.look_up(lemma)
            if found is None or found[0] in self.banned_synsets:
                continue
            _, prototype = found
            weight = (1 + min(count, 100) ** 0.5 / 3) / (1 + prototype.steps)
            group = 1 if prototype.steps == 0 else 2
            self._add(lemma, frozenset(prototype.classes), weight, group)
            if prototype.steps <= 1 and " " not in lemma:
                self._add(_plural(lemma), frozenset(prototype.classes), weight / 2, group)
        for offset, synset in self.wordnet.synsets.items():
            near = self.wordnet.prototype(offset)
            if near is not None and near.steps <= 1 and offset not in self.banned_synsets:
                self._add(synset.gloss, frozenset(near.classes), 0.5 / (1 + near.steps), 3)

    def add_sets(self) -> None:
        """Names of the training sets; those without ImageNet relatives are learned from images alone."""
        known: dict[str, int] = {}
        for source, names in self.sets.items():
            self.set_rows[source] = []
            for name in names:
                if name not in known:
                    known[name] = self._add_own(source, name)
                self.set_rows[source].append(known[name])

    def add_broad(self) -> None:
        """Common nouns above the entities so far: what people call a dalmatian is a dog."""
        above: Counter[int] = Counter()
        for offset in self.synset:
            above.update(set(self.wordnet.ancestors(offset)) if offset >= 0 else ())
        self.broad = len(self.entities)
        for offset in sorted(above):
            prototype = self.wordnet.prototype(offset)
            if prototype is None or len(prototype.classes) < 2 or offset in self.wordnet.class_synsets:
                continue
            rows = []
            for lemma in self.wordnet.synsets[offset].lemmas:
                found = self.wordnet.look_up(lemma)
                common = self.wordnet.counts.get(lemma.lower().replace(" ", "_"), 0) >= BROAD_COUNT
                if common and found is not None and found[0] == offset and lemma.lower() in self.rows:
                    rows.append(self.rows[lemma.lower()])
            if rows:
                self._entity(rows, offset, False)

    def finish(self) -> tuple[Texts, list[tuple[str, str]]]:
        """The texts as tokens."""
        weights: defaultdict[str, float] = defaultdict(float)
        for text, (_, weight, group) in zip(self.rows, self.about, strict=True):
            for word in words_of(text):
                weights[word] += weight * (0.2 if group == 3 else 5 if group in (0, 4) else 1)
        for template in TEMPLATES:
            for word in dict.fromkeys(words_of(template)):
                weights[word] += 1e6
        merges = choose_merges(weights, VOCABULARY)
        tokenizer = build_tokenizer(merges, CONTEXT)
        tokenizer.no_padding()
        tokenizer.no_truncation()

        def tokens(texts: Iterable[str], special: bool = False) -> list[list[int]]:
            return [encoded.ids for encoded in tokenizer.encode_batch(list(texts), add_special_tokens=special)]

        start, end = tokens([""], True)[0]
        longest = [20 if group == 3 else LONGEST_NAME for _, _, group in self.about]
        names = [row[:most] for row, most in zip(tokens(self.rows), longest, strict=True)]
        parts = [template.split("{}") for template in TEMPLATES]
        mixtures = list(dict.fromkeys(classes for classes, _, _ in self.about))
        place = {classes: row for row, classes in enumerate(mixtures)}
        matrix = torch.zeros(len(mixtures), 1000)
        for row, classes in enumerate(mixtures):
            matrix[row, list(classes)] = 1.0
        texts = Texts(
            words=list(self.rows),
            tokens=_padded(names, 20),
            lengths=torch.tensor([len(row) for row in names]),
            target=torch.tensor([place[classes] for classes, _, _ in self.about]),
            weight=torch.tensor([weight for _, weight, _ in self.about]),
            group=torch.tensor([group for _, _, group in self.about]),
            mixtures=matrix.half(),
            entities=self.entities,
            related=self._related(),
            sets=self.set_rows,
            broad=self.broad,
            prefixes=_padded([[start, *row] for row in tokens(before for before, _ in parts)], 12),
            suffixes=_padded([[*row, end] for row in tokens(after for _, after in parts)], 4),
        )
        return texts, merges

    def _add(self, text: str, classes: frozenset[int], weight: float, group: int) -> int | None:
        key = text.lower()
        if self.banned.search(key) or not key:
            return None
        if key not in self.rows:
            self.rows[key] = len(self.rows)
            self.about.append((classes, weight, group))
        return self.rows[key]

    def _add_own(self, source: str, name: str) -> int:
        classes = self.class_of.get(name.lower()) if source != "clothing" else None
        found = self.wordnet.look_up(name)
        nearest = -1 if found is None else found[0]
        offset = self.wordnet.class_synsets[min(classes)] if classes else nearest
        exact = found is not None and (name.lower() in self.rows or found[1].steps == 0)
        target = frozenset(classes or (found[1].classes if found is not None and exact else ()))
        row = self._add(name, target, 1.0, 0 if classes else 1 if exact else 4)
        return self._entity([] if row is None else [row], offset, source == "clothing")

    def _entity(self, rows: list[int], offset: int, clothing: bool) -> int:
        self.entities.append(rows)
        self.synset.append(offset)
        self.is_clothing.append(clothing)
        return len(self.entities) - 1

    def _lemmas(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for offset, synset in self.wordnet.synsets.items():
            if self.wordnet.prototype(offset) is not None:
                for lemma in synset.lemmas:
                    found[lemma.lower()] = self.wordnet.counts.get(lemma.lower().replace(" ", "_"), 0)
        return found

    def _banned_synsets(self, names: list[str]) -> set[int]:
        return {offset for name in names for offset in self.wordnet.senses.get(name.lower().replace(" ", "_"), ())}

    def _related(self) -> Tensor:
        above = [set(self.wordnet.ancestors(offset)) if offset >= 0 else set() for offset in self.synset]
        related = torch.eye(len(self.entities), dtype=torch.bool)
        at: dict[int, list[int]] = {}
        for entity, offset in enumerate(self.synset):
            at.setdefault(offset, []).append(entity)
        for entity, offsets in enumerate(above):
            for offset in offsets:
                others = at.get(offset, [])
                related[entity, others] = True
                related[others, entity] = True
        apparel = {self.wordnet.senses[word][0] for word in APPAREL}
        worn = [e for e, offsets in enumerate(above) if offsets & apparel and not self.is_clothing[e]]
        own = [e for e, clothing in enumerate(self.is_clothing) if clothing]
        for entity in own:
            related[entity, own] = False
            related[entity, worn] = True
            related[worn, entity] = True
            related[entity, entity] = True
        return related


def _padded(rows: list[list[int]], width: int) -> Tensor:
    return torch.tensor([[*row[:width], *([0] * (width - len(row)))] for row in rows])


def _plural(word: str) -> str:
    if re.search(r"(s|x|ch|sh)$", word):
        return word + "es"
    return re.sub(r"([^aeiou])y$", r"\1ie", word) + "s"


def save_merges(merges: list[tuple[str, str]], path: Path) -> None:
    """Writes the merges of the tokenizer."""
    write_json(path, [list(merge) for merge in merges])


def load_merges(path: Path) -> list[tuple[str, str]]:
    """Reads the merges of the tokenizer."""
    return [(one, other) for one, other in json.loads(path.read_text())]
