"""Requests for the page's own routes: an allow-list, with checked bodies and a bound on what gradio remembers."""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from gradio import Blocks
from pydantic import BaseModel, Field, StringConstraints, ValidationError

from zepad_mm.serve.gateway import RefusedError
from zepad_mm.serve.limits import Uploads
from zepad_mm.serve.settings import MAX_LEVELS, ServeSettings

JOIN, EXAMPLE, RESULTS, UPLOAD = (
    f"/gradio_api/{name}" for name in ("queue/join", "run/predict", "queue/data", "upload")
)
READ = ("/", "/theme.css", "/favicon.ico", "/robots.txt")
READ_BELOW = ("/assets/", "/static/", "/gradio_api/file=")
SESSION = r"^[A-Za-z0-9]{1,40}$"
UNREAD = 200  # messages of one session that nobody reads
KNOWN_UPLOADS = 10_000
BYTES = 12  # of a character in JSON, at most
ROOM = 2**20  # bytes of the images that an answer shows
THEME = re.compile(rb"__theme=(dark|light|system)")


class PageRequests:
    """Checks of requests for the routes of a gradio page; see :class:`zepad_mm.serve.gateway.PageGuard`.

    Args:
        blocks: the page.
        run: index of the function that attacks and classifies.
        example: index of the function that loads an example image.
        settings: the limits.
        uploads: the folder of gradio's files.
        examples: how many example images there are.
        policies: that the page offers; empty: it offers no choice.
    """

    def __init__(
        self,
        blocks: Blocks,
        run: int,
        example: int,
        settings: ServeSettings,
        uploads: Uploads,
        examples: int,
        policies: Sequence[str] = (),
    ) -> None:
        self.blocks = blocks
        self.settings = settings
        self.uploads = uploads
        self.text = 2 * settings.max_labels * (settings.max_label_length + 2)  # the service says what is too long
        self.models = {JOIN: _run_model(run, self.text, policies), EXAMPLE: _example_model(example, examples)}
        self.sessions: OrderedDict[str, None] = OrderedDict()

    def body_limit(self, path: str) -> int:
        """Bytes of a request."""
        return self.settings.upload_mb * 2**20 if path == UPLOAD else BYTES * 3 * self.text + 4096

    def is_stream(self, path: str) -> bool:
        """Whether the answer stays open."""
        return path == RESULTS

    def has_checked_body(self, path: str) -> bool:
        """Whether :meth:`checked_body` applies."""
        return path in self.models

    async def admit(self, scope: MutableMapping[str, Any], receiving: int) -> None:
        """Check a request before its body is read. Raises RefusedError for any other route than the page uses."""
        path, read = scope["path"], scope["method"] in ("GET", "HEAD")
        if read and path == RESULTS:
            self._check_session(scope["query_string"])
        elif read and (path in READ or path.startswith(READ_BELOW)):
            query = scope["query_string"]
            scope["query_string"] = query if path != "/" or THEME.fullmatch(query) else b""
        elif scope["method"] == "POST" and path == UPLOAD:
            scope["query_string"] = b""  # gradio would keep the progress of uploads that nobody follows
            await self._make_room(receiving + self._declared(scope))
            if len(self.blocks.upload_file_set) > KNOWN_UPLOADS:  # a list of names that gradio only adds to
                self.blocks.upload_file_set.clear()
        elif scope["method"] != "POST" or path not in self.models:
            raise RefusedError(404, "Not Found")

    async def checked_body(self, path: str, body: bytes) -> bytes:
        """The fields of a request that the page's functions need, checked. Raises RefusedError."""
        try:
            found: Any = self.models[path].model_validate_json(body)
        except ValidationError as error:
            raise RefusedError(422, validation_text(error.errors(include_url=False))) from None
        if path == JOIN:
            image = found.data[0]
            if image is not None and not self._is_upload(image.path):
                raise RefusedError(422, "image: expected a file that was uploaded; upload it again")
            await self._make_room(ROOM)
            await self._remember(found.session_hash)
        return found.model_dump_json(by_alias=True).encode()

    def _is_upload(self, path: str) -> bool:
        return path.isprintable() and Path(path).resolve().is_relative_to(self.uploads.folder)

    def _declared(self, scope: MutableMapping[str, Any]) -> int:
        declared = dict(scope["headers"]).get(b"content-length", b"")
        return int(declared) if declared.isdigit() else self.body_limit(UPLOAD)

    async def _make_room(self, wanted: int) -> None:
        if not await asyncio.to_thread(self.uploads.make_room, wanted):
            raise RefusedError(503, "the server holds too many uploads; try again in a minute")

    def _check_session(self, query: bytes) -> None:
        name, _, value = query.decode("latin-1").partition("=")
        if name != "session_hash" or value not in self.sessions:
            raise RefusedError(404, "this session is unknown or was forgotten; reload the page")

    async def _remember(self, session: str) -> None:
        """Keep a bounded number of sessions, each with a bounded number of unread messages."""
        queue = self.blocks._queue
        messages = queue.pending_messages_per_session.get(session)
        if messages is not None and messages.qsize() > UNREAD:
            raise RefusedError(429, "this session does not read its results")
        self.sessions[session] = None
        self.sessions.move_to_end(session)
        while len(self.sessions) > self.settings.sessions:
            oldest, _ = self.sessions.popitem(last=False)
            await queue.clean_events(session_hash=oldest)
            queue.pending_messages_per_session.pop(oldest, None)
            queue.pending_event_ids_session.pop(oldest, None)


class _File(BaseModel):
    path: Annotated[str, StringConstraints(max_length=1000)]
    orig_name: Annotated[str, StringConstraints(max_length=255)] | None = None
    meta: dict[Literal["_type"], Literal["gradio.FileData"]] = {"_type": "gradio.FileData"}


def _run_model(function: int, text: int, policies: Sequence[str]) -> type[BaseModel]:
    """The request that runs the page's function: image, labels, template, attack, levels, true label, any policy."""
    line = Annotated[str, StringConstraints(max_length=text)]
    attack = Literal["universal", "public", "white_box"]
    levels = Annotated[float, Field(ge=0, le=MAX_LEVELS)]
    fields: tuple[Any, ...] = (_File | None, line, line, attack, levels, line)
    if policies:
        fields = (*fields, Literal[*policies])

    class Run(BaseModel):
        data: tuple[*fields]  # type: ignore[valid-type]
        fn_index: Literal[function]  # type: ignore[valid-type]
        trigger_id: int | None = None
        session_hash: Annotated[str, StringConstraints(pattern=SESSION)]

    return Run


def _example_model(function: int, count: int) -> type[BaseModel]:
    """The request that loads an example image by its number."""

    class Example(BaseModel):
        data: tuple[Annotated[int, Field(ge=0, lt=count)]]
        fn_index: Literal[function]  # type: ignore[valid-type]
        trigger_id: int | None = None
        session_hash: Annotated[str, StringConstraints(pattern=SESSION)]

    return Example


def validation_text(errors: Any) -> str:
    """What is wrong with the fields of a request, without their values."""
    return "; ".join(f"{'.'.join(map(str, error['loc'])) or 'body'}: {error['msg']}"[:200] for error in errors[:5])
