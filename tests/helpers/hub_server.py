"""A local Hub server on 127.0.0.1: enough of its HTTP interface for the real huggingface_hub client, both ways.

It keeps everything in memory, refuses as the Hub refuses (status, ``X-Error-Code``), and misbehaves on request: cuts a
download off, or serves other bytes than it promised. Pushes take the plain LFS way: clients must set
``HF_HUB_DISABLE_XET``, since with hf_xet installed they would not ask the server which way it wants.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

LFS = (".safetensors", ".bin", ".parquet", ".png", ".tar")


@dataclass
class Repo:
    """Every commit is a whole tree; branches and tags are names of commits."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, tree: Mapping[str, bytes], branch: str = "main") -> str:
        about = f"{len(self.commits)} {branch} {sorted((name, _sha1(data)) for name, data in tree.items())}"
        commit = hashlib.sha1(about.encode()).hexdigest()
        self.commits[commit] = dict(tree)
        self.refs[branch] = commit
        return commit

    def find(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit names."""
        return self.refs.get(revision, revision if revision in self.commits else None)


class Hub:
    """The state of the server.

    Attributes:
        url: what ``HF_ENDPOINT`` is set to.
        repos: "org/name", or "datasets/org/name", to the repository.
        tokens: token to the user or organisation who may read and write what is theirs.
        cut: file name to the number of bytes after which the next download of it breaks off, once.
        replaced: file name to bytes that are served instead, under the checksum of the true ones.
        seen: method, path and Range header of every request.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, str] = {}
        self.cut: dict[str, int] = {}
        self.replaced: dict[str, bytes] = {}
        self.seen: list[tuple[str, str, str | None]] = []
        self.lfs: dict[str, bytes] = {}

    def put(self, name: str, files: Mapping[str, bytes] | Path, *, private: bool = False, branch: str = "main") -> str:
        """Publish files or a folder, and return the commit."""
        if isinstance(files, Path):
            files = {str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        return self.repos.setdefault(name, Repo(private)).commit(files, branch)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        return repo.commits[repo.find(revision) or ""]

    def downloads(self, file: str) -> list[str | None]:
        """The Range headers of the downloads of a file so far."""
        return [part for method, path, part in self.seen if method == "GET" and path.endswith(f"/{file}")]


class RefusedError(Exception):
    """An error response of the Hub."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    # ---- permissions -----------------------------------------------------------------------------------------

    def _user(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            raise RefusedError(401, message="Invalid credentials in Authorization header")
        return user

    def _forbidden(self, name: str) -> str:
        """Include the request headers, as a misconfigured proxy might: the client copies them into its error."""
        return f"no permission to write to {name} with {self.headers['Authorization']}"

    def _repo(self, name: str, write: bool = False) -> Repo:
        user, owner = self._user(), name.removeprefix("datasets/").split("/")[0]
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and user != owner):
            # the Hub does not say whether it exists, and tells the anonymous to log in
            raise RefusedError(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if write and user is None:
            raise RefusedError(401, message="Invalid username or password.")
        if write and user != owner:
            raise RefusedError(403, message=self._forbidden(name))
        return repo

    def _tree(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self._repo(name)
        commit = repo.find(revision)
        if commit is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repo.commits[commit]

    # ---- reading ---------------------------------------------------------------------------------------------

    def _info(self, name: str, revision: str = "main") -> None:
        commit, tree = self._tree(name, revision)
        about = {"id": name.removeprefix("datasets/"), "sha": commit, "private": self.hub.repos[name].private}
        self._json({**about, "siblings": [{"rfilename": path} for path in tree], "tags": [], "downloads": 0})

    def _list(self, name: str, revision: str) -> None:
        _, tree = self._tree(name, revision)
        entries: list[dict[str, Any]] = []
        for path, data in tree.items():
            entry = {"type": "file", "path": path, "size": len(data), "oid": _sha1(data)}
            if path.endswith(LFS):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self._json(entries)

    def _file(self, name: str, revision: str, path: str, body: bool) -> None:
        commit, tree = self._tree(name, revision)
        if path not in tree:
            raise RefusedError(404, "EntryNotFound", f"Entry not found: {path}")
        data = tree[path]
        etag = hashlib.sha256(data).hexdigest() if path.endswith(LFS) else _sha1(data)
        if body:  # the metadata that HEAD gives are those of the true file
            data = self.hub.replaced.get(path, data)
        start = 0
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(wanted[1])
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        part = data[start:]
        cut = self.hub.cut.pop(path, None) if body else None
        self._send(206 if start else 200, part if cut is None else part[:cut], headers, len(part), body)
        if cut is not None:
            self.close_connection = True

    # ---- writing ---------------------------------------------------------------------------------------------

    def _create(self) -> None:
        user, asked = self._user(), self._body()
        if user is None:
            raise RefusedError(401, message="Invalid username or password.")
        owner = asked["organization"] or user
        prefix = "datasets/" if asked.get("type") == "dataset" else ""
        name = f"{prefix}{owner}/{asked['name']}"
        if owner != user:
            raise RefusedError(403, message=self._forbidden(name))
        status = 409 if name in self.hub.repos else 200
        repo = self.hub.repos.setdefault(name, Repo(asked.get("visibility") == "private" or bool(asked.get("private"))))
        if not repo.commits:
            repo.commit({".gitattributes": b""})
        self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name}, status)

    def _branch(self, name: str, branch: str) -> None:
        repo = self._repo(name, write=True)
        asked = self._body()
        if branch in repo.refs:
            raise RefusedError(409, message="Reference already exists")
        repo.refs[branch] = repo.find(asked.get("startingPoint", "main")) or repo.refs["main"]
        self._json({})

    def _preupload(self, name: str, revision: str) -> None:
        self._repo(name, write=True)
        _, tree = self._tree(name, revision)
        answers = []
        for file in self._body()["files"]:
            lfs = file["path"].endswith(LFS)
            known = tree.get(file["path"])
            oid = None if known is None else hashlib.sha256(known).hexdigest() if lfs else _sha1(known)
            mode = "lfs" if lfs else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def _lfs_batch(self, name: str) -> None:
        self._repo(name, write=True)
        objects = []
        for asked in self._body()["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.lfs:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str) -> None:
        data = self._raw()
        if hashlib.sha256(data).hexdigest() != oid:
            raise RefusedError(400, message="the bytes do not match their checksum")
        self.hub.lfs[oid] = data
        self._json({})

    def _commit(self, name: str, revision: str) -> None:
        repo = self._repo(name, write=True)
        _, before = self._tree(name, revision)
        tree = dict(before)
        for line in self._raw().splitlines():
            step = json.loads(line)
            value = step["value"]
            if step["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif step["key"] == "lfsFile":
                tree[value["path"]] = self.hub.lfs[value["oid"]]
            elif step["key"] == "deletedFile":
                del tree[value["path"]]
        commit = repo.commit(tree, revision)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": "", "pullRequestUrl": None})

    def _validate(self) -> None:
        """The metadata of a card, checked as far as the client's own classes and the Hub's rules for names go."""
        from huggingface_hub import DatasetCard, ModelCard

        asked = self._body()
        card = (DatasetCard if asked["repoType"] == "dataset" else ModelCard)(asked["content"])
        bases = card.data.to_dict().get("base_model", [])
        errors = [
            {"message": f'"base_model" with value "{base}" is not valid'}
            for base in ([bases] if isinstance(bases, str) else bases)
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", base)
        ]
        warnings = [] if card.data.to_dict() else [{"message": "empty or missing yaml metadata in repo card"}]
        self._json({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    # ---- HTTP ------------------------------------------------------------------------------------------------

    def _answer(self) -> None:
        path, method = unquote(urlsplit(self.path).path).lstrip("/"), self.command
        self.hub.seen.append((method, path, self.headers.get("Range")))
        repo = r"(?P<name>(?:datasets/)?[^/]+/[^/]+?)"
        api = r"api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"
        table = {
            ("POST", r"api/repos/create"): lambda m: self._create(),
            ("POST", r"api/validate-yaml"): lambda m: self._validate(),
            ("GET", rf"{api}"): lambda m: self._info(_name(m)),
            ("GET", rf"{api}/revision/(?P<rev>.+)"): lambda m: self._info(_name(m), m["rev"]),
            ("GET", rf"{api}/tree/(?P<rev>[^/]+)"): lambda m: self._list(_name(m), m["rev"]),
            ("POST", rf"{api}/branch/(?P<rev>.+)"): lambda m: self._branch(_name(m), m["rev"]),
            ("POST", rf"{api}/preupload/(?P<rev>.+)"): lambda m: self._preupload(_name(m), m["rev"]),
            ("POST", rf"{api}/commit/(?P<rev>.+)"): lambda m: self._commit(_name(m), m["rev"]),
            ("POST", rf"{repo}\.git/info/lfs/objects/batch"): lambda m: self._lfs_batch(m["name"]),
            ("PUT", r"lfs/(?P<oid>[0-9a-f]{64})"): lambda m: self._lfs_put(m["oid"]),
            ("GET", rf"{repo}/resolve/(?P<rev>[^/]+)/(?P<path>.+)"): lambda m: self._file(
                m["name"], m["rev"], m["path"], method == "GET"
            ),
        }
        try:
            for (verb, pattern), work in table.items():
                if verb == method.replace("HEAD", "GET") and (found := re.fullmatch(pattern, path)):
                    return work(found)
            raise RefusedError(404, message=f"this Hub has no {method} {path}")
        except RefusedError as error:
            self._json({"error": error.message}, error.status, {"X-Error-Code": error.code}, error.message)

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815

    def _raw(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _body(self) -> Any:
        return json.loads(self._raw() or b"{}")

    def _json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None, error: str = "") -> None:
        data = json.dumps(value).encode()
        headers = {"Content-Type": "application/json", **(headers or {})}
        if error:
            headers["X-Error-Message"] = error
        self._send(status, data, headers, len(data), self.command != "HEAD")

    def _send(self, status: int, data: bytes, headers: Mapping[str, str], length: int, body: bool) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        if status >= 400:  # what was posted may not have been read
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Log nothing to stderr."""


def _name(match: re.Match[str]) -> str:
    return ("datasets/" if match["kind"] == "datasets" else "") + match["id"]


def _sha1(data: bytes) -> str:
    """Return the git blob hash of the bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a Hub on a free port of 127.0.0.1 until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})  # type: ignore[assignment]
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def reached_through(hub: Hub, cache: Path) -> Iterator[None]:
    """Point this process's huggingface_hub client at ``hub``; it read its environment when it was imported.

    Processes of their own do the same with :func:`environment`.
    """
    from huggingface_hub import constants, hf_api
    from transformers.utils import hub as of_transformers

    ours = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": True,
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in ours.items():
            patch.setattr(constants, key, value)
        # made once for a process, with the address of then; transformers 5.0 uses the Hub's own
        own = getattr(of_transformers, "hf_api", None)
        for shared in (hf_api.api, *([own()] if own else [])):
            patch.setattr(shared, "endpoint", hub.url)
        yield


def environment(hub: Hub, cache: Path) -> dict[str, str]:
    """Return the same settings as an environment for another process."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
