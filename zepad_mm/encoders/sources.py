"""The base encoders below a defence: where on the Hub they lie, and how one revision of them is read.

Only what was trained is stored with a model; the rest is fetched again, so that which commit it was has to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from zepad_mm.utils.hub import Access, fetch
from zepad_mm.utils.registry import Registry


@dataclass(frozen=True, kw_only=True)
class HubBase:
    """The files of a base encoder on the Hub."""

    repo_id: str
    weights: tuple[str, ...]  # the first of these that is there
    required: tuple[str, ...] = ()  # what must be there beside
    extras: tuple[str, ...] = ()  # patterns of what is fetched with it where it is there: a tokenizer
    revision: str | None = None  # that the source itself names
    local: Callable[[Path], str] | None = None  # the source that reads the fetched folder; None: see ``tag``
    tag: tuple[str, str] | None = None  # name and tag in open_clip's table


# encoder kind -> (what follows the colon) -> HubBase, or None for what does not come from the Hub
BASES: Registry[Callable[[str], HubBase | None]] = Registry("kind of base encoder on the Hub")


@BASES.register("open_clip")
def _open_clip(rest: str) -> HubBase | None:
    if rest == "embedded" or rest.startswith("local-dir:"):
        return None
    import open_clip

    pickled = "open_clip_pytorch_model.bin"
    if rest.startswith("hf-hub:"):
        repo_id, revision = _split(rest)
        return HubBase(
            repo_id=repo_id,
            weights=("open_clip_model.safetensors", pickled),
            required=("open_clip_config.json",),
            extras=("*.json", "*.txt", "*.model"),
            revision=revision,
            local=lambda folder: f"open_clip:local-dir:{folder}",
        )
    name, _, tag = rest.partition("/")
    place = (open_clip.get_pretrained_cfg(name, tag) or {}).get("hf_hub", "")
    if not place:
        return None
    repo_id, _, file = place.rpartition("/")
    weights = (file,) if file else ("open_clip_model.safetensors", pickled)
    return HubBase(repo_id=repo_id, weights=weights, tag=(name, tag))


@BASES.register("hf")
def _hf(rest: str) -> HubBase | None:
    if rest.startswith("local-dir:") or rest.count("/") > 1 or rest.endswith("@"):
        return None  # the last two are mistakes, which the encoders tell of
    repo_id, revision = _split(rest)
    return HubBase(
        repo_id=repo_id,
        weights=("model.safetensors", "pytorch_model.bin"),
        required=("config.json",),
        extras=("*.json", "*.txt", "*.model"),
        revision=revision,
        local=lambda folder: f"hf:local-dir:{folder}",
    )


@BASES.register("timm")
def _timm(rest: str) -> HubBase | None:
    if rest.startswith("local-dir:"):
        return None
    import timm

    repo_id, revision = _split(rest)
    if not rest.startswith("hf-hub:"):
        config: Any = timm.get_pretrained_cfg(rest) if timm.is_model(rest.partition(".")[0]) else None
        if config is None or not config.hf_hub_id or config.hf_hub_filename:
            return None
        repo_id, revision = config.hf_hub_id, None
    return HubBase(
        repo_id=repo_id,
        weights=("model.safetensors", "pytorch_model.bin"),
        required=("config.json",),
        revision=revision,
        local=lambda folder: f"timm:local-dir:{folder}",
    )


def hub_base(source: str) -> HubBase | None:
    """Where a source lies on the Hub; None for one that does not, or that this cannot tell of."""
    kind, rest, over = _parts(source)
    misspelt = over == "+"  # left to the loader, before anything is fetched
    return BASES.get(kind)(rest) if kind in BASES and not misspelt else None


def is_local(source: str) -> bool:
    """Whether a folder or file of this machine is part of the source, so that nobody else can load it."""
    kind, rest, over = _parts(source)
    return kind == "ssl" or rest.startswith("local-dir:") or bool(over)


def repositories(sources: Iterable[str]) -> list[str]:
    """The names on the Hub of those sources that have one, each once."""
    return list(dict.fromkeys(base.repo_id for base in map(hub_base, sources) if base is not None))


def known_revision(source: str) -> str | None:
    """The commit of a base as it lies in the client's cache, from which it was loaded; None where that is unknown."""
    from huggingface_hub import try_to_load_from_cache

    base = hub_base(source)
    if base is None:
        return None
    for name in (*base.required, *base.weights):
        path = try_to_load_from_cache(base.repo_id, name, revision=base.revision)
        if isinstance(path, str):
            return Path(path).parents[name.count("/")].name
    return None


def known_revisions(sources: Iterable[str]) -> dict[str, str]:
    """Source to commit, for those where it is known."""
    found = {source: known_revision(source) for source in sources}
    return {source: revision for source, revision in found.items() if revision}


@contextmanager
def at_revision(source: str, revision: str | None, access: Access, weights: bool = True) -> Iterator[str]:
    """Within the block the source that is given loads ``source`` as it was at a commit, from this disk alone.

    Args:
        source: as for :func:`zepad_mm.encoders.load_encoder`; what is not on the Hub passes through.
        revision: None takes what the source names, or the main branch.
        access: of the Hub.
        weights: without them nothing is fetched here: the loaders look for a configuration themselves.

    Raises:
        What :func:`zepad_mm.utils.hub.fetch` raises.
    """
    base = hub_base(source)
    if base is None or not weights:
        yield source
        return
    folder, file = _fetched(base, revision or base.revision, access)
    if base.local is not None:
        yield base.local(folder) + _parts(source)[2]
        return
    assert base.tag is not None
    with _read_from(*base.tag, file):
        yield source


def _fetched(base: HubBase, revision: str | None, access: Access) -> tuple[Path, Path]:
    for name in base.weights:
        files = [*base.required, *base.extras, name]
        folder = fetch(base.repo_id, files, required=base.required, revision=revision, access=access)
        if (folder / name).is_file():
            return folder, folder / name
    raise FileNotFoundError(
        f"{base.repo_id} (commit {folder.name[:12]}) holds no weights: expected one of {', '.join(base.weights)}"
    )


_table = Lock()


@contextmanager
def _read_from(name: str, tag: str, weights: Path) -> Iterator[None]:
    """open_clip knows no revisions, but reads a tag's weights from the file that its table names, if it does."""
    import open_clip

    entry = open_clip.get_pretrained_cfg(name, tag)
    with _table:
        entry["file"] = str(weights)
        try:
            yield
        finally:
            entry.pop("file", None)


def _parts(source: str) -> tuple[str, str, str]:
    """``kind:rest+FILE``: the kind, the base, and the file of other weights over it, with its plus."""
    kind, _, rest = source.partition(":")
    if rest.startswith("local-dir:"):
        return kind, rest, ""
    rest, plus, over = rest.partition("+")
    return kind, rest, plus + over


def _split(rest: str) -> tuple[str, str | None]:
    """``hf-hub:org/repo@revision`` in its parts."""
    repo_id, _, revision = rest.removeprefix("hf-hub:").partition("@")
    return repo_id, revision or None
