"""Source strings, and the backends that load what they name.

A source is written ``KIND:REST``, in full ``KIND:[PLACE:]NAME[@REVISION][+WEIGHTS][?OPTIONS]``; every kind takes the
option ``image_size=N``. :func:`parse_source` is the one place that reads this text; what a source is (a CLIP, a file of
this machine, a repository on the Hub) is answered by the :class:`EncoderBackend` of its kind.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from zepad_mm.utils.hub import Access, barred_from_hub, fetch
from zepad_mm.utils.io import read_json
from zepad_mm.utils.registry import Registry, shorten

if TYPE_CHECKING:
    from zepad_mm.encoders.base import Encoder
    from zepad_mm.encoders.clip import TextEncoder

HUB, FOLDER = "hf-hub", "local-dir"  # the places that a source can name
LARGEST_IMAGE = 1024  # pixels; a source may stand in a file that somebody else wrote
_IMAGE_SIZE = re.compile(r"\?image_size=(-?\d+)$")
_OPTION = re.compile(r"\?\w+=?[^/?+]*$")
INDEX = ".index.json"  # of a model whose weights lie in several files
SHARD = re.compile(r"[\w-][\w.-]*\.(safetensors|bin)")


@dataclass(frozen=True)
class Source:
    """A parsed source string; ``str()`` writes it again.

    Attributes:
        kind: the library, a name of :data:`BACKENDS`.
        name: what the library calls the model, a repository (``owner/name``), a folder or a file.
        place: ``"hf-hub"``, ``"local-dir"``, or empty where the kind itself says where names lie.
        revision: branch, tag or commit on the Hub; None is the main branch.
        weights: a file of other weights, loaded over the model; empty for none.
        options: ``KEY=VALUE&KEY=VALUE`` for a checkpoint.
        image_size: in pixels, another than the encoder's own; None for its own. Checkpoints have it in ``options``.
    """

    kind: str
    name: str
    place: str = ""
    revision: str | None = None
    weights: str = ""
    options: str = ""
    image_size: int | None = None

    def __str__(self) -> str:
        place = f"{self.place}:" if self.place else ""
        revision = "" if self.revision is None else f"@{self.revision}"
        weights, options = (mark + text if text else "" for mark, text in (("+", self.weights), ("?", self.options)))
        options += "" if self.image_size is None else f"?image_size={self.image_size}"
        return f"{self.kind}:{place}{self.name}{revision}{weights}{options}"


@dataclass(frozen=True, kw_only=True)
class HubFiles:
    """The files of a base encoder on the Hub."""

    repo_id: str
    weights: tuple[str, ...]  # the first of these that exists
    required: tuple[str, ...] = ()  # what must exist beside it
    extras: tuple[str, ...] = ()  # patterns of what is fetched with it where it exists: a tokenizer
    revision: str | None = None  # named by the source itself
    tag: tuple[str, str] | None = None  # name and tag in open_clip's table; None: the fetched folder is loaded


class EncoderBackend(ABC):
    """The encoders of one library: what its sources name, where they lie on the Hub, and how they are loaded.

    To add a kind, write one file with a sub-class, register an instance of it in :data:`BACKENDS` and import the file
    in ``zepad_mm/encoders/__init__.py`` (which imports no torch: let methods import what loads; those that come with
    the package are in ``backends.py``). A small model of the kind in ``tests/helpers/encoder_zoo.py`` runs every test.
    """

    has_clips = False  # some sources of this kind have a text tower
    names_are_repositories = False  # NAME is owner/name on the Hub, with @REVISION
    takes_weights = False  # NAME+FILE loads other weights over the model
    reads_file = False  # NAME is the path of a checkpoint, with ?OPTIONS

    @abstractmethod
    def load(self, source: Source, pretrained: bool) -> Encoder:
        """The image encoder, on the CPU; randomly initialised unless ``pretrained``.

        Raises:
            ValueError: unknown model or damaged weights. FileNotFoundError: no such folder or file.
        """

    def load_clip(self, source: Source, pretrained: bool) -> tuple[Encoder, TextEncoder]:
        """Image and text tower, for kinds with ``has_clips``.

        Raises ValueError where there is no text tower, else as :meth:`load`.
        """
        raise ValueError(f"zero-shot heads need a CLIP: {source} has no text tower")

    def has_text(self, source: Source) -> bool:
        """Whether :meth:`load_clip` takes the source, decided without reading weights."""
        return False

    def hub_files(self, source: Source) -> HubFiles | None:
        """Where the source lies on the Hub; None for one that does not, or where this is unknown."""
        return None


# kind -> its backend
BACKENDS: Registry[EncoderBackend] = Registry("encoder kind")


def parse_source(text: str) -> Source:
    """The parts of a source string; of an unregistered kind only its name is read.

    Raises ValueError that shows how a source is written.
    """
    kind, separator, rest = str(text).partition(":")
    if not separator or not rest:
        hint = "; did you mean 'open_clip:embedded'?" if str(text).rstrip(":").lower() == "embedded" else ""
        raise ValueError(
            f"encoder source {shorten(text)}: expected KIND:NAME with KIND one of {', '.join(BACKENDS)}, "
            "e.g. 'open_clip:ViT-B-32/laion2b_s34b_b79k', 'hf:facebook/dinov2-small', 'timm:resnet18.a1_in1k' or "
            f"'ssl:checkpoint.ckpt'{hint}"
        )
    if kind not in BACKENDS:  # encoders of a user's own; loading them raises
        return Source(kind, rest)
    backend = BACKENDS.get(kind)
    if backend.reads_file:
        name, _, options = (rest, "", "") if Path(rest).is_file() else rest.partition("?")
        return Source(kind, name, options=options)
    rest, image_size = _split_image_size(rest)
    base, weights = _split_weights(kind, rest) if backend.takes_weights else (rest, "")
    place, separator, name = base.partition(":")
    if not separator or place not in (HUB, FOLDER):
        place, name = "", base
    revision = None
    if place == HUB or (not place and backend.names_are_repositories):
        name, at, tail = name.partition("@")
        if at and not tail:
            raise ValueError(f"{text}: expected {kind}:ORG/NAME@REVISION with a branch, a tag or a commit behind the @")
        revision = tail or None
    return Source(kind, name, place, revision, weights, image_size=image_size)


def with_image_size(text: str, image_size: int | None) -> str:
    """The source string at another image size; as it is for None. Raises ValueError for a size out of range."""
    if image_size is None:
        return text
    check_image_size(image_size)
    source = parse_source(text)
    if source.kind in BACKENDS and BACKENDS.get(source.kind).reads_file:
        others = [option for option in source.options.split("&") if option and not option.startswith("image_size=")]
        return str(replace(source, options="&".join([*others, f"image_size={image_size}"])))
    return str(replace(source, image_size=image_size))


def check_image_size(image_size: int) -> int:
    """The image size, if it is a number of pixels within reach."""
    if isinstance(image_size, bool) or not isinstance(image_size, int) or not 1 <= image_size <= LARGEST_IMAGE:
        raise ValueError(f"image_size: expected a whole number of pixels from 1 to {LARGEST_IMAGE}, got {image_size!r}")
    return image_size


def _split_image_size(rest: str) -> tuple[str, int | None]:
    """``"NAME?image_size=N"`` as its two parts; None where there is no size. Raises ValueError for other options."""
    if (found := _IMAGE_SIZE.search(rest)) is not None:
        return rest[: found.start()], check_image_size(int(found.group(1)))
    if (other := _OPTION.search(rest)) is not None and not Path(rest.rpartition(":")[2]).exists():
        raise ValueError(
            f"encoder source {shorten(rest)}: expected the option ?image_size=N, got {other.group()!r}; N is a whole "
            "number of pixels, e.g. ?image_size=224"
        )
    return rest, None


def _split_weights(kind: str, rest: str) -> tuple[str, str]:
    """``"BASE+FILE"`` as its two parts; the second is empty where there is none.

    A folder whose own name has a ``+`` stays whole.
    """

    def is_folder(base: str) -> bool:
        place, _, name = base.partition(":")
        return place == FOLDER and Path(name).is_dir()

    if "+" not in rest or is_folder(rest):
        return rest, ""
    # the first split whose left side is a folder: either side may hold a + of its own
    cuts = [index for index, letter in enumerate(rest) if letter == "+"]
    cut = next((index for index in cuts if is_folder(rest[:index])), cuts[0])
    base, weights = rest[:cut], rest[cut + 1 :]
    if not base or not weights:
        raise ValueError(f"{kind}:{rest}: expected {kind}:BASE+FILE, e.g. 'open_clip:ViT-L-14/openai+fare.pt'")
    return base, weights


def hub_files(source: Source) -> HubFiles | None:
    """Where a source lies on the Hub; None for one that does not, or where this is unknown."""
    return BACKENDS.get(source.kind).hub_files(source) if source.kind in BACKENDS else None


def is_local(source: str) -> bool:
    """Whether a folder or file of this machine is part of the source, so that nobody else can load it."""
    parsed = parse_source(source)
    reads_file = parsed.kind in BACKENDS and BACKENDS.get(parsed.kind).reads_file
    return reads_file or parsed.place == FOLDER or bool(parsed.weights)


def repositories(sources: Iterable[str]) -> list[str]:
    """The names on the Hub of those sources that have one, each once."""
    found = (hub_files(parse_source(source)) for source in sources)
    return list(dict.fromkeys(files.repo_id for files in found if files is not None))


def known_revision(source: str) -> str | None:
    """The commit of a base in the client's cache, from which it was loaded; None where that is unknown."""
    from huggingface_hub import try_to_load_from_cache

    files = hub_files(parse_source(source))
    if files is None:
        return None
    for name in (*files.required, *files.weights):
        path = try_to_load_from_cache(files.repo_id, name, revision=files.revision)
        if isinstance(path, str):
            return Path(path).parents[name.count("/")].name
    return None


def known_revisions(sources: Iterable[str]) -> dict[str, str]:
    """Source to commit, for those where it is known."""
    found = {source: known_revision(source) for source in sources}
    return {source: revision for source, revision in found.items() if revision}


@contextmanager
def at_revision(source: Source, revision: str | None, access: Access, weights: bool = True) -> Iterator[Source]:
    """Context whose value is a source that loads ``source`` as it was at a commit, from this disk alone.

    Args:
        source: what is not on the Hub passes through.
        revision: None takes what the source names, or the main branch.
        access: of the Hub.
        weights: False fetches the configurations alone, and nothing where the library knows the architecture.

    Raises:
        What :func:`zepad_mm.utils.hub.fetch` raises.
    """
    files = hub_files(source)
    named = files is not None and not source.place and not BACKENDS.get(source.kind).names_are_repositories
    if files is None or (named and not weights):
        yield source
        return
    if not weights:
        wanted = [*files.required, *files.extras]
        folder = fetch(
            files.repo_id, wanted, required=files.required, revision=revision or files.revision, access=access
        )
        yield replace(source, place=FOLDER, name=str(folder), revision=None)
        return
    folder, file = _fetch_weights(files, revision or files.revision, access)
    if files.tag is None:
        yield replace(source, place=FOLDER, name=str(folder), revision=None)
        return
    with _read_tag_from(*files.tag, file):
        yield source


def _fetch_weights(files: HubFiles, revision: str | None, access: Access) -> tuple[Path, Path]:
    """The fetched folder, and the file of weights in it; of a sharded model its index, all shards beside it."""
    for name in files.weights:
        wanted = [*files.required, *files.extras, name]
        folder = fetch(files.repo_id, wanted, required=files.required, revision=revision, access=access)
        if not (folder / name).is_file():
            continue
        if name.endswith(INDEX):
            shards = shards_of(folder / name)
            folder = fetch(files.repo_id, [*wanted, *shards], required=shards, revision=revision, access=access)
        return folder, folder / name
    if barred := barred_from_hub(access):
        raise FileNotFoundError(
            f"{files.repo_id} is not, or not all of it, in the cache: its weights are missing, and {barred}; fetch it "
            "once while online"
        )
    raise FileNotFoundError(
        f"{files.repo_id} (commit {folder.name[:12]}) holds no weights: expected one of {', '.join(files.weights)}"
    )


def shards_of(index: Path) -> list[str]:
    """The files that the index of a sharded model names. Raises ValueError for one that is damaged."""
    about = read_json(index)
    names = about.get("weight_map") if isinstance(about, dict) else None
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index}: expected a dictionary with a 'weight_map', as save_pretrained writes it")
    found = list(dict.fromkeys(names.values()))
    for name in found:
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise ValueError(f"{index}: weight_map: expected names of files beside it, got {shorten(name)}")
    return found


def weight_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of the weights in a folder, the first of ``names`` that exists; with an index first, then its shards.

    Raises FileNotFoundError for a missing shard.
    """
    name = next((name for name in names if (folder / name).is_file()), None)
    if name is None:
        return []
    if not name.endswith(INDEX):
        return [folder / name]
    shards = [folder / shard for shard in shards_of(folder / name)]
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder / name} names {', '.join(missing[:3])}, not all of it in that folder")
    return [folder / name, *shards]


_open_clip_table = Lock()


@contextmanager
def _read_tag_from(name: str, tag: str, weights: Path) -> Iterator[None]:
    """open_clip knows no revisions, but reads the weights of a tag from the file that its table names, if any."""
    import open_clip

    entry: Any = open_clip.get_pretrained_cfg(name, tag)
    with _open_clip_table:
        entry["file"] = str(weights)
        try:
            yield
        finally:
            entry.pop("file", None)
