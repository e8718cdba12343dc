"""Which files of a folder belong to which split and class: by their place alone, never guessed from other words.

Parquet files are named by their split (``train.parquet``, ``train-0.parquet``, ``train-00000-of-00002.parquet``), in
the folder or in ``data/``. Image files lie in class folders, in split folders or not::

    FOLDER/train/cat/1.jpg   FOLDER/test/dog/7.jpg    a folder for each split, in it one for each class
    FOLDER/cat/1.jpg         FOLDER/dog/7.jpg         class folders: split here, see ``held_out_splits``
    FOLDER/train/1.jpg       FOLDER/1.jpg             no classes, where no labels are needed

Split folders have the spellings of ``SPELLINGS``, in any case. Folders inside class folders belong to the class.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from zepad_mm.utils.image_files import SUFFIXES, entries
from zepad_mm.utils.names import check_names

log = logging.getLogger(__name__)

SPELLINGS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
    "surrogate": ("surrogate",),
}
SHARES = {"test": 0.2, "validation": 0.1}  # of the images of each class, where a folder has no splits; the rest: train
LAYOUT = """expected one of
    FOLDER/train/CLASS/IMAGE and FOLDER/test/CLASS/IMAGE (also validation/)
    FOLDER/CLASS/IMAGE, which is split here
    FOLDER/IMAGE, without classes, where no labels are needed
    FOLDER/train-00000-of-00001.parquet and so on"""
# folders that are meant as splits and not named as one: test_images, training set, train1
SPLIT_LIKE = re.compile(
    rf"({'|'.join(name for names in SPELLINGS.values() for name in names)})"
    r"[ _.-]?(images?|imgs?|photos?|pictures?|pics?|sets?|data|files?|split|\d+)",
    re.IGNORECASE,
)
PARQUET = re.compile(r"(?P<split>.+?)(-(?P<number>\d+)(-of-(?P<total>\d+))?)?\.parquet", re.IGNORECASE)


class SplitNotFoundError(FileNotFoundError):
    """The dataset is there and has no such split."""


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a split, in the order of their paths.

    Attributes:
        paths: of the files.
        labels: class index of each; None without class folders.
        class_names: names of the class folders of all splits, sorted.
    """

    paths: tuple[str, ...]
    labels: tuple[int, ...] | None
    class_names: tuple[str, ...]


def split_of(name: str) -> str:
    """The split that a folder or file of this name holds: itself, unless it is another spelling."""
    lower = name.lower()
    return next((split for split, spellings in SPELLINGS.items() if lower in spellings), lower)


def parquet_files(folder: Path, split: str) -> list[Path] | None:
    """The parquet files of a split, in order; None in a folder without parquet files.

    Raises:
        SplitNotFoundError: no file of this split. ValueError: two spellings of it, or a missing part.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".parquet")
    if not files and (folder / "data").is_dir():
        files = sorted(path for path in (folder / "data").iterdir() if path.suffix.lower() == ".parquet")
    if not files:
        return None
    matches = {path: match for path in files if (match := PARQUET.fullmatch(path.name))}
    exact = [path for path, match in matches.items() if match["split"] == split]
    chosen = exact or [path for path, match in matches.items() if split_of(match["split"]) == split_of(split)]
    if not chosen:
        available = sorted({match["split"] for match in matches.values()})
        raise SplitNotFoundError(f"dataset {str(folder)!r} has no split {split!r}; it has {', '.join(available)}")
    spellings = sorted({matches[path]["split"] for path in chosen})
    if len(spellings) > 1:
        raise ValueError(f"{folder}: {' and '.join(spellings)} both name the split {split!r}; keep one of them")
    _check_parts(folder, split, [matches[path] for path in chosen])
    return sorted(chosen, key=lambda path: (int(matches[path]["number"] or 0), path.name))


def _check_parts(folder: Path, split: str, parts: list[re.Match[str]]) -> None:
    """Raise ValueError unless the files of a split are all the parts of one export."""
    totals = {int(part["total"]) for part in parts if part["total"]}
    if totals and totals != {len(parts)}:
        raise ValueError(
            f"{folder}: {parts[0].string} is one of {max(totals)} parts of the split {split!r}, and {len(parts)} are "
            "there; fetch the others, and keep the parts of one export"
        )
    if len(parts) == 1:
        return
    numbers = sorted(int(part["number"]) if part["number"] else -1 for part in parts)
    if numbers != list(range(numbers[0], numbers[0] + len(parts))) or numbers[0] not in (0, 1):
        raise ValueError(
            f"{folder}: the files {', '.join(part.string for part in parts[:5])} of the split {split!r} are not the "
            "parts of one export: expected a single file, or numbers without a gap; fetch the missing ones, and delete "
            "those of another export"
        )


def image_files(folder: Path, split: str) -> ImageFiles:
    """The image files of a split.

    Raises:
        FileNotFoundError: no image. SplitNotFoundError: none of this split. ValueError: a layout that can be read in
            two ways.
    """
    direct, inside = entries(folder)
    if not direct and not inside:
        deeper = next(folder.glob("*/*.parquet"), None)
        where = "" if deeper is None else f" ({deeper.parent.name}/{deeper.name} is one level down)"
        raise FileNotFoundError(f"{folder} holds no image ({', '.join(SUFFIXES)}) and no parquet file{where}; {LAYOUT}")
    if direct and inside:
        raise ValueError(
            f"{folder} holds both images ({Path(direct[0]).name}) and folders of images ({', '.join(sorted(inside))}); "
            f"move or delete the images; {LAYOUT}"
        )
    splits = _split_folders(folder, inside, split)
    if splits is None:
        return _held_out(folder, direct, inside, split)
    if split_of(split) not in splits:
        raise SplitNotFoundError(f"dataset {str(folder)!r} has no split {split!r}; it has {', '.join(splits)}")
    contents = {key: entries(folder / name) for key, name in splits.items()}
    chosen = splits[split_of(split)]
    direct, classes = contents[split_of(split)]
    if direct and classes:
        raise ValueError(
            f"{folder / chosen} holds both images ({Path(direct[0]).name}) and class folders "
            f"({', '.join(sorted(classes)[:5])}); move or delete the images; {LAYOUT}"
        )
    if not classes:
        return ImageFiles(tuple(direct), None, ())
    names = check_names(sorted({name for _, names in contents.values() for name in names}), "class folders")
    _check_same_classes(folder, splits, {key: set(found) for key, (_, found) in contents.items()})
    return _labelled(classes, names)


def _check_same_classes(folder: Path, splits: dict[str, str], classes: dict[str, set[str]]) -> None:
    """Raise ValueError where a split has class folders, and none of them is one of the training images."""
    for key, names in classes.items():
        if names and classes.get("train") and not names & classes["train"]:
            raise ValueError(
                f"{folder}: {splits[key]} holds the folders {', '.join(sorted(names)[:5])}, and {splits['train']} "
                f"{', '.join(sorted(classes['train'])[:5])}: no class in common. Sort the images of {splits[key]} into "
                f"folders of the same names; {LAYOUT}"
            )


def _split_folders(folder: Path, inside: dict[str, list[str]], split: str) -> dict[str, str] | None:
    """Split to the name of its folder; None where the folders are classes. Raises ValueError where it may be both."""
    known = [name for name in inside if split_of(name) in SPELLINGS]
    other = sorted(set(inside) - set(known))
    nested = {name: bool(entries(folder / name)[1]) for name in inside}
    asked = split_of(split) in [name.lower() for name in other]
    if not known and not asked:
        if meant := [name for name in other if SPLIT_LIKE.fullmatch(name)]:
            raise ValueError(
                f"{folder / meant[0]}: is {meant[0]!r} a split or a class? Rename it to train, validation or test if "
                f"it is a split; {LAYOUT}"
            )
        deep = [name for name in other if nested[name]]
        if deep and any(split_of(name) in SPELLINGS for name in entries(folder / deep[0])[1]):
            raise ValueError(f"{folder / deep[0]} holds the splits: give that folder; {LAYOUT}")
        if deep:
            raise ValueError(
                f"{folder / deep[0]} holds folders of images: is {deep[0]!r} a split or a class? Rename it to train, "
                f"validation or test if it is a split; move its images up if it is a class; {LAYOUT}"
            )
        return None
    if other and not all(nested.values()):
        raise ValueError(
            f"{folder} holds folders named like splits ({', '.join(sorted(known)) or split}) beside others "
            f"({', '.join(other[:5])}): are they splits or classes? {LAYOUT}"
        )
    found: dict[str, str] = {}
    for name in sorted(inside):
        if split_of(name) in found:
            raise ValueError(
                f"{folder}: {found[split_of(name)]} and {name} both name the split {split_of(name)!r}; keep one of them"
            )
        found[split_of(name)] = name
    return found


def _held_out(folder: Path, direct: list[str], inside: dict[str, list[str]], split: str) -> ImageFiles:
    """A split of a folder without splits."""
    if split not in (*SHARES, "train"):
        raise SplitNotFoundError(
            f"dataset {str(folder)!r} has no splits, so that train, validation and test are made here; got {split!r}"
        )
    made = {name: held_out_splits(folder, paths) for name, paths in (inside or {"": direct}).items()}
    counts = ", ".join(f"{sum(len(one[name]) for one in made.values())} {name}" for name in ("train", *SHARES))
    _log_once(folder, counts)
    chosen = {name: splits[split] for name, splits in made.items()}
    if not any(chosen.values()):
        raise SplitNotFoundError(
            f"dataset {str(folder)!r} has no splits and too few images to make a split {split!r}: each class needs at "
            f"least 3; {LAYOUT}"
        )
    return _labelled(chosen, sorted(inside)) if inside else ImageFiles(tuple(chosen[""]), None, ())


@lru_cache  # each split that is read would log it
def _log_once(folder: Path, counts: str) -> None:
    log.info("%s has no splits, so they are made by the SHA-256 of the paths: %s", folder, counts)


def held_out_splits(folder: Path, paths: Iterable[str]) -> dict[str, list[str]]:
    """The files of one class by split, by a fixed rule: the same on every machine and in every command.

    The files are ordered by the SHA-256 of their path in the folder. The first 20 % are "test", the next 10 %
    "validation", the others "train"; of three files or more each split gets at least one, of fewer all are "train".
    """

    def digest(path: str) -> bytes:
        return hashlib.sha256(Path(path).relative_to(folder).as_posix().encode()).digest()

    order, begin, splits = sorted(paths, key=digest), 0, {}
    for name, share in SHARES.items():
        end = begin + (max(1, round(share * len(order))) if len(order) >= 3 else 0)
        splits[name] = sorted(order[begin:end])
        begin = end
    return {**splits, "train": sorted(order[begin:])}


def _labelled(classes: dict[str, list[str]], names: list[str]) -> ImageFiles:
    check_names(names, "class folders")
    index = {name: number for number, name in enumerate(names)}
    rows = [(path, index[name]) for name in sorted(classes) for path in classes[name]]
    return ImageFiles(tuple(path for path, _ in rows), tuple(label for _, label in rows), tuple(names))
