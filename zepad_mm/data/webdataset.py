"""Zero-shot data sets in the form of CLIP_benchmark: tar shards of images, class names and prompt templates.

A source is ``wds:OWNER/NAME``, ``wds:OWNER/NAME@REVISION`` (a branch, tag or commit of the Hub) or ``wds:FOLDER``, laid
out as https://github.com/LAION-AI/CLIP_benchmark writes it::

    classnames.txt                          one name a line, in the order of the labels
    zeroshot_classification_templates.txt   one template a line, with {c} for the name
    test/nshards.txt                        number of shards
    test/0.tar  test/1.tar  ...             s0000000.webp, s0000000.cls, ...

The packaged builder ``webdataset`` of ``datasets`` reads the shards. Members other than images, class indices and plain
text are refused before anything is decoded, pickles among them.
"""

from __future__ import annotations

import logging
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from zepad_mm.data.folders import SplitNotFoundError
from zepad_mm.encoders.prompts import templates_of
from zepad_mm.utils.hub import fetch
from zepad_mm.utils.names import clean_name

log = logging.getLogger(__name__)

PREFIX = "wds:"
NAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
IMAGES = ("webp", "png", "jpg", "jpeg")
MEMBERS = (*IMAGES, "cls", "txt", "json")  # what a shard may hold
COMMIT = re.compile("[0-9a-f]{40}")
MAX_SHARDS = 10_000


@dataclass(frozen=True)
class Webdataset:
    """A source, parsed.

    Attributes:
        name: ``owner/name`` on the Hub, or the path of a folder.
        revision: branch, tag or commit on the Hub; None is the main branch.
    """

    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, source: str) -> Webdataset | None:
        """The source if it starts with ``wds:``, else None. Raises ValueError where no name follows."""
        if not source.startswith(PREFIX):
            return None
        name, _, revision = source.removeprefix(PREFIX).partition("@")
        if not name or (source.endswith("@")):
            raise ValueError(f"data set {source!r}: expected wds:OWNER/NAME, wds:OWNER/NAME@REVISION or wds:FOLDER")
        return cls(name, revision or None)

    def __str__(self) -> str:
        return PREFIX + self.name + (f"@{self.revision}" if self.revision else "")

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return Path(self.name).expanduser().is_dir() or self.name.startswith((".", "/", "~"))

    def pinned(self) -> Webdataset:
        """The same at the commit that its revision names now. Raises what :func:`zepad_mm.utils.hub.fetch` raises."""
        return self if self.is_local else replace(self, revision=self._folder([NAMES]).name)

    def class_names(self) -> list[str]:
        """The class names, in the order of the labels; a repeated one gets a number, as in "missile 2".

        ImageNet's usual names hold "missile" and "sunglasses" twice. Equal names would be equal answers, of which the
        second is never given.
        """
        names = [clean_name(line) for line in _lines(self._folder([NAMES]) / NAMES)]
        seen: Counter[str] = Counter()
        found = []
        for name in names:
            seen[name.casefold()] += 1
            count = seen[name.casefold()]
            found.append(name if count == 1 else f"{name} {count}")
            if count > 1:
                log.info("%s: class %r is there %d times; this one is called %r", self, name, count, found[-1])
        return found

    def templates(self) -> tuple[str, ...]:
        """The prompt templates, with ``{}`` for the class name. Raises ValueError for a template without a place."""
        lines = _lines(self._folder([TEMPLATES]) / TEMPLATES)
        return templates_of([line.replace("{c}", "{}") for line in lines])

    def shards(self, split: str) -> list[Path]:
        """The tar files of a split, their members checked.

        Raises:
            SplitNotFoundError: no such split. FileNotFoundError: no such repository, or a missing shard.
            ValueError: a damaged shard, or one with other members than images, class indices and text.
        """
        counted = f"{split}/nshards.txt"
        folder = self._folder([counted], required=())
        if not (folder / counted).is_file():
            raise SplitNotFoundError(f"dataset {str(self)!r} has no split {split!r}: there is no {counted}")
        text = (folder / counted).read_text(encoding="utf-8").strip()
        if not text.isdigit() or not 1 <= int(text) <= MAX_SHARDS:
            raise ValueError(f"{folder / counted}: expected the number of shards, 1 to {MAX_SHARDS}, got {text[:40]!r}")
        names = [f"{split}/{number}.tar" for number in range(int(text))]
        folder = replace(self, revision=self.revision if self.is_local else folder.name)._folder(names)
        for name in names:
            _check_members(folder / name)
        return [folder / name for name in names]

    def _folder(self, files: Sequence[str], required: Sequence[str] | None = None) -> Path:
        """The folder that holds these files. Raises FileNotFoundError where one of ``required`` (None: all) lacks."""
        required = files if required is None else required
        if not self.is_local:
            load = _fetch_once if COMMIT.fullmatch(self.revision or "") else _fetch_once.__wrapped__
            return load(self.name, self.revision, tuple(files), tuple(required))
        folder = Path(self.name).expanduser()
        for name in required:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} does not exist; expected the files of a webdataset there")
        return folder


@lru_cache(maxsize=1000)
def _fetch_once(name: str, revision: str | None, files: tuple[str, ...], required: tuple[str, ...]) -> Path:
    """Fetch files; those of a commit once in a process, since each call compares the checksums of all shards."""
    return fetch(name, files, required=required, revision=revision, repo_type="dataset")


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty; expected one entry a line")
    return lines


def _check_members(shard: Path) -> None:
    """Raise ValueError for a member that is neither an image nor a class index nor text, and for a damaged shard."""
    try:
        with tarfile.open(shard, mode="r:") as archive:
            for member in archive:
                kind = member.name.rpartition(".")[2].lower()
                if member.isdir():
                    continue
                if not member.isfile() or kind not in MEMBERS:
                    raise ValueError(
                        f"{shard} holds {member.name!r}; expected files that end in .{', .'.join(MEMBERS)}, since "
                        "others may run code when they are decoded"
                    )
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{shard} is no complete tar file ({error}); download it again") from error
