"""WordNet's nouns and the ImageNet classes below or near each of them: what the text tower learns from."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from timm.data import ImageNetInfo

WORDNET = Path("/usr/share/wordnet")
HOW_TO_GET = "apt-get install wordnet-base (Debian), or give --wordnet the folder with data.noun and index.noun"
MOST_CLASSES = 120  # a noun above more ImageNet classes than this says too little about what an image shows
MOST_STEPS = 3  # up to the nearest ancestor with ImageNet classes
MOST_SENSES = 6
# photos of these show what stands on the right; WordNet has no such relation
SHOWN_WITH = {"person": ("clothing",), "face": ("person", "clothing")}


@dataclass
class Synset:
    """A noun synset: its lemmas, gloss, parents and children, by offset."""

    offset: int
    lemmas: tuple[str, ...]
    gloss: str
    parents: tuple[int, ...]
    children: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Prototype:
    """The ImageNet classes a noun stands for, and how far away they are.

    Attributes:
        classes: indices of ImageNet classes. steps: 0 if they are below the noun, else steps up to their ancestor.
    """

    classes: tuple[int, ...]
    steps: int


class WordNet:
    """The noun database of WordNet 3.0 with ImageNet's 1,000 classes placed in it.

    Args:
        folder: holds ``data.noun``, ``index.noun`` and ``noun.exc``.

    Raises:
        FileNotFoundError: the folder holds no WordNet; the message says how to get it.
    """

    def __init__(self, folder: Path = WORDNET) -> None:
        if not (folder / "data.noun").is_file():
            raise FileNotFoundError(f"{folder} has no data.noun; {HOW_TO_GET}")
        self.synsets = {synset.offset: synset for synset in _read_synsets(folder / "data.noun")}
        for synset in self.synsets.values():
            for parent in synset.parents:
                self.synsets[parent].children.append(synset.offset)
        self.senses = _read_senses(folder / "index.noun")
        self.counts = _read_counts(folder / "cntlist.rev")
        info = ImageNetInfo()
        self.class_synsets = [int(info.index_to_label_name(index)[1:]) for index in range(1000)]

    @cached_property
    def below(self) -> dict[int, frozenset[int]]:
        """The ImageNet classes at or below each synset."""
        found: dict[int, set[int]] = {}
        for index, offset in enumerate(self.class_synsets):
            for above in self.ancestors(offset):
                found.setdefault(above, set()).add(index)
        return {offset: frozenset(classes) for offset, classes in found.items()}

    def ancestors(self, offset: int) -> dict[int, int]:
        """All hypernyms of a synset with their distance; the synset itself at distance 0."""
        seen, queue = {offset: 0}, deque([offset])
        while queue:
            here = queue.popleft()
            for parent in self.synsets[here].parents:
                if parent not in seen:
                    seen[parent] = seen[here] + 1
                    queue.append(parent)
        return seen

    def prototype(self, offset: int) -> Prototype | None:
        """The classes at or below the synset, else below its nearest ancestors; None where those are too many."""
        distances = self.ancestors(offset)
        shown_with = self._shown_with(offset)
        for steps in range(MOST_STEPS + 1):
            nearest = [above for above, distance in distances.items() if distance == steps and above in self.below]
            if nearest or shown_with:
                classes = shown_with.union(*(self.below[above] | self._shown_with(above) for above in nearest))
                return Prototype(tuple(sorted(classes)), steps) if len(classes) <= MOST_CLASSES else None
        return None

    def look_up(self, name: str) -> tuple[int, Prototype] | None:
        """The synset and prototype of a name: as it stands, in the singular, by its last word.

        Of its first senses the one nearest to ImageNet's classes; an early sense counts half a step for each rank.
        """
        words = name.lower().replace("-", " ").split()
        candidates = [" ".join(words), name.lower(), _singular(" ".join(words)), words[-1], _singular(words[-1])]
        for candidate in candidates:
            found = []
            for rank, offset in enumerate(self.senses.get(candidate.replace(" ", "_"), ())[:MOST_SENSES]):
                prototype = self.prototype(offset)
                if prototype is not None:
                    found.append((prototype.steps + rank / 2, rank, offset, prototype))
            if found:
                return min(found)[2:]
        return None

    def related(self, one: int, other: int) -> bool:
        """Whether one of two synsets is the other or stands above it."""
        return one in self.ancestors(other) or other in self.ancestors(one)

    def _shown_with(self, offset: int) -> frozenset[int]:
        others = next((others for word, others in SHOWN_WITH.items() if self.senses[word][0] == offset), ())
        return frozenset().union(*(self.below[self.senses[other][0]] for other in others))


def _read_synsets(path: Path) -> list[Synset]:
    synsets = []
    for line in path.read_text(encoding="latin-1").splitlines():
        if line.startswith("  "):  # the licence
            continue
        data, _, gloss = line.partition(" | ")
        fields = data.split()
        words = int(fields[3], 16)
        lemmas = tuple(fields[4 + 2 * index].replace("_", " ") for index in range(words))
        pointers = fields[4 + 2 * words + 1 :]
        parents = [int(pointers[i + 1]) for i in range(0, len(pointers) - 3, 4) if pointers[i] in ("@", "@i")]
        synsets.append(Synset(int(fields[0]), lemmas, gloss.split(";")[0].strip(), tuple(parents)))
    return synsets


def _read_senses(path: Path) -> dict[str, tuple[int, ...]]:
    senses = {}
    for line in path.read_text(encoding="latin-1").splitlines():
        if not line.startswith("  "):
            fields = line.split()
            senses[fields[0]] = tuple(int(offset) for offset in fields[-int(fields[2]) :])
    return senses


def _read_counts(path: Path) -> dict[str, int]:
    """How often each noun was tagged in WordNet's corpora, over all senses."""
    counts: dict[str, int] = {}
    if path.is_file():
        for line in path.read_text(encoding="latin-1").splitlines():
            key, _, count = line.split()
            word, _, rest = key.partition("%")
            if rest.startswith("1:"):
                counts[word] = counts.get(word, 0) + int(count)
    return counts


def _singular(name: str) -> str:
    for ending, replacement in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("sses", "ss"), ("s", "")):
        if name.endswith(ending) and len(name) > len(ending) + 2:
            return name.removesuffix(ending) + replacement
    return name
