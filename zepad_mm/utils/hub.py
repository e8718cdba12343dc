"""Download and upload of whole folders on the Hugging Face Hub, with checksums and clear errors.

The client's errors are replaced, not chained: a server's answer may contain a token, which must never reach a log.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from zepad_mm import __version__

LIBRARY = "zepad-mm"
MODEL_TYPE: Literal["zepad"] = "zepad"  # in the config.json of defended models; see zepad_mm.pipelines
# formats that run code when they are opened; what is pushed from here is safetensors, JSON, text, images, parquet
EVAL_RESULTS = ".eval_results"  # folder of a model's results, which the Hub shows on its page and beside the data set
RESULTS_FILE = f"{EVAL_RESULTS}/zepad-mm.yaml"
PICKLES = (".bin", ".ckpt", ".joblib", ".npz", ".pickle", ".pkl", ".pt", ".pth")


@dataclass(frozen=True, kw_only=True)
class Access:
    """Access to the Hub, the same for a model and for its base encoders."""

    token: str | bool | None = field(default=None, repr=False)  # None: the one of `hf auth login`, if any
    cache_dir: str | Path | None = None  # None: the client's own
    local_files_only: bool = False  # the cache or nothing
    force_download: bool = False  # download again what the cache holds


def fetch(
    repo_id: str,
    files: Sequence[str],
    *,
    required: Sequence[str] = (),
    revision: str | None = None,
    access: Access | None = None,
    repo_type: str = "model",
) -> Path:
    """Files of a repository, from the cache or the network; the folder's name is the commit they are of.

    Args:
        repo_id: ``owner/name``.
        files: names or patterns.
        required: names without which the repository is not what it should be.
        revision: branch, tag or commit; None is the main branch.
        access: token, cache and the rest.
        repo_type: "model" or "dataset".

    Raises:
        FileNotFoundError: no such repository, revision or file, or not in the cache while the Hub may not be asked.
        PermissionError: private or gated, and no token that opens it.
        ValueError: a file whose bytes do not match its checksum.
        ConnectionError: the Hub is out of order.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    access = access or Access()
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise FileNotFoundError(
            f"{repo_id!r} is neither a folder here nor a name on the Hub, which is written owner/name"
        ) from None
    with _clear_errors(repo_id, revision, access):
        snapshot = snapshot_download(
            repo_id,
            repo_type=repo_type,
            revision=revision,
            token=access.token,
            cache_dir=access.cache_dir,
            local_files_only=access.local_files_only,
            force_download=access.force_download,
            allow_patterns=list(files),
            library_name=LIBRARY,
            library_version=__version__,
        )
    folder = Path(snapshot)
    missing = [name for name in required if not (folder / name).is_file()]
    if missing and (barred := barred_from_hub(access)):
        raise FileNotFoundError(
            f"{_name_with_revision(repo_id, revision)} is not, or not all of it, in the cache: "
            f"{', '.join(missing[:3])} is missing, and {barred}; fetch it once while online"
        )
    if missing:
        raise FileNotFoundError(
            f"{_name_with_revision(repo_id, revision)} has no {', '.join(missing)} (commit {folder.name[:12]}); "
            "is it the right repository, and pushed to its end?"
        )
    _check_bytes(folder, files, repo_id)
    return folder


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    message: str = "Upload with zepad-mm",
    repo_type: str = "model",
    replaces: Sequence[str] = (),
) -> str:
    """Push a folder, as one commit where the client can; the repository and the branch are made where missing.

    Args:
        folder: holds a card, ``README.md``; no format that could run code when opened.
        repo_id: ``owner/name``.
        private: None leaves a repository as it is, and makes a new one public unless its owner's default differs.
        token: None takes the one of ``hf auth login``; it needs the right to write.
        branch: None is the main branch.
        message: of the commit.
        repo_type: "model" or "dataset".
        replaces: patterns of what is deleted there if it is not in ``folder``.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: no folder, or no card in it; ValueError: a bad name or card, or pickles in the folder;
        PermissionError: no token, or one without the right; ConnectionError: the Hub is out of reach.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    if not (folder / "README.md").is_file():
        raise FileNotFoundError(
            f"{folder}/README.md does not exist; what is published needs a card that says what it is"
        )
    pickles = sorted(path.name for path in folder.rglob("*") if path.suffix.lower() in PICKLES)
    if pickles:
        raise ValueError(f"{folder} holds {', '.join(pickles[:3])}: publish safetensors, not files that can run code")
    api = HfApi(token=token, library_name=LIBRARY, library_version=__version__)
    with _clear_errors(repo_id, branch, Access(token=token), write=True):
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(repo_id, branch=branch, repo_type=repo_type, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            revision=branch,
            commit_message=message,
            ignore_patterns=["cache/*", *map(glob.escape, _hidden_files(folder))],
            delete_patterns=list(replaces),
        )
    return str(commit.commit_url)


def _hidden_files(folder: Path) -> list[str]:
    """What is not pushed, by path: unfinished files, which begin with a dot, and whatever else is hidden."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    hidden = (path for path in paths if any(part.startswith(".") for part in path.parts if part != EVAL_RESULTS))
    return [path.as_posix() for path in hidden]


def card_text(body: str, **data: Any) -> str:
    """A card: metadata (with the library's name) above, Markdown below."""
    from huggingface_hub import ModelCardData  # the widest of its kind; takes a data set's fields too

    return f"---\n{ModelCardData(library_name=LIBRARY, **data).to_yaml()}\n---\n\n{body.strip()}\n"


def _check_bytes(folder: Path, files: Sequence[str], repo_id: str) -> None:
    """Compare the bytes of each file with the checksum that the cache names it by, which the client does not.

    That is the SHA-256 of large files, git's SHA-1 of small ones, on some mirrors the plain SHA-1. A cache without
    symbolic links keeps none of them.
    """
    from huggingface_hub.utils import filter_repo_objects

    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink()]
    for name in filter_repo_objects(names, allow_patterns=list(files)):
        path = folder / name
        expected = path.readlink().name
        found = _checksums(path, len(expected))
        if found and expected not in found:
            raise ValueError(
                f"{name} of {repo_id} is damaged: its bytes have the checksum {found[0][:12]}, expected "
                f"{expected[:12]}; fetch it again with force_download=True, or delete {path.resolve()}"
            )


def _checksums(path: Path, digits: int) -> list[str]:
    """The checksums that a cache may name a file by, for a name of that many hexadecimal digits."""
    from huggingface_hub.utils.sha import git_hash, sha_fileobj

    if digits == 64:
        with path.open("rb") as file:
            return [sha_fileobj(file).hex()]
    if digits == 40:
        data = path.read_bytes()
        return [git_hash(data), hashlib.sha1(data, usedforsecurity=False).hexdigest()]
    return []


@contextmanager
def _clear_errors(repo_id: str, revision: str | None, access: Access, write: bool = False) -> Iterator[None]:
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        yield
    except (OSError, HTTPError, HFValidationError, RuntimeError) as error:
        # uploads wrap what went wrong in a RuntimeError
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        clear = _translate_error(cause, _name_with_revision(repo_id, revision), access, write)
        if clear is None:
            raise
        raise clear from None


def _translate_error(error: BaseException, name: str, access: Access, write: bool) -> Exception | None:
    """The client's error as one that names the fix; None for errors that are not about the Hub, such as a full disk."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    log_in = "log in with `hf auth login`, or give token="
    cache = f" {access.cache_dir}" if access.cache_dir else ""
    barred = barred_from_hub(access) or "the Hub cannot be reached"
    refused = "the token is not accepted" if access.token else "a token is needed, or the stored one is not accepted"
    down = f"answered {status}" if status else f"cannot be reached ({type(error).__name__})"
    # the first that holds; the client's classes are narrow before wide
    table: list[tuple[bool, type[Exception], str]] = [
        (isinstance(error, HFValidationError), ValueError, "is no name on the Hub, which is written owner/name"),
        (
            isinstance(error, LocalEntryNotFoundError),
            FileNotFoundError,
            f"is not, or not all of it, in the cache{cache}, and {barred}; fetch it once while online",
        ),
        (isinstance(error, OfflineModeIsEnabled), ConnectionError, "is out of reach with HF_HUB_OFFLINE=1; unset it"),
        (
            isinstance(error, RevisionNotFoundError),
            FileNotFoundError,
            "does not exist; a revision is a branch, a tag or a whole commit, and None the main branch",
        ),
        (
            isinstance(error, GatedRepoError),
            PermissionError,
            f"is gated: ask for access on its page, then {log_in} of that account",
        ),
        (
            isinstance(error, RepositoryNotFoundError) and status == 404,
            FileNotFoundError,
            "does not exist, or is private and not open to the account that the token is of",
        ),
        (
            isinstance(error, RepositoryNotFoundError),
            PermissionError,
            f"is private or does not exist; check the name and, if it is private, {log_in}",
        ),
        (status == 401, PermissionError, f"is not open: {refused}; make one in your account's settings, and {log_in}"),
        (
            status == 403,
            PermissionError,
            f"may not be {'written to' if write else 'read'} with this token; use one that has the right",
        ),
        (isinstance(error, HTTPError), ConnectionError, f"is out of reach: the Hub {down}; try again later"),
        (
            "Consistency check" in str(error),
            ValueError,
            "is damaged: a file arrived with another size than the Hub promised; fetch it again",
        ),
    ]
    return next((kind(f"{name} {text}") for holds, kind, text in table if holds), None)


def barred_from_hub(access: Access) -> str:
    """Why the Hub may not be asked, in words; empty where it may."""
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        return "HF_HUB_OFFLINE=1 is set"
    return "local_files_only is set" if access.local_files_only else ""


def _name_with_revision(repo_id: str, revision: str | None) -> str:
    return repo_id if revision is None else f"{repo_id} at revision {revision!r}"
