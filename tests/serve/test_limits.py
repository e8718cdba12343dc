"""Limits of the server, tried for real: a server on a loopback port, and clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
import torch
import uvicorn
from starlette.routing import Mount, Route

from tests.helpers.models import make_gated_zepad, make_zepad
from tests.serve.test_serve import LABELS, image_file, post
from zepad_mm.attacks import Perturbation
from zepad_mm.classifier import RobustZeroShotClassifier
from zepad_mm.serve import ServeSettings, Service, create_app
from zepad_mm.serve.gateway import AllowedHosts, host_name
from zepad_mm.serve.limits import BLOCK, Uploads
from zepad_mm.serve.page import build
from zepad_mm.serve.run import server_config

run: Any = import_module("zepad_mm.serve.run")  # the package has a function of another name
SETTINGS = ServeSettings(attack_steps=1, upload_mb=1, max_labels=5, max_label_length=20)
ADDRESS = re.compile(r"0x[0-9a-f]{6,}")
INPUTS = [None, "a cat, a dog", "photo", "universal", 8, ""]


@pytest.fixture(scope="module")
def classifier(clip_source: str) -> RobustZeroShotClassifier:
    return RobustZeroShotClassifier(make_zepad(clip_source))


@contextmanager
def running(
    classifier: RobustZeroShotClassifier, **changes: Any
) -> Iterator[tuple[httpx.Client, Service, uvicorn.Server, threading.Thread]]:
    """A server with changed settings, and a client of it."""
    service = Service(classifier, replace(SETTINGS, **changes), Perturbation(torch.zeros(3, 32, 32), 4 / 255))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(server_config(create_app(service), service.settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=30) as client:
            yield client, service, server, thread
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def client(classifier: RobustZeroShotClassifier) -> Iterator[httpx.Client]:
    with running(classifier) as (client, *_):
        yield client


@contextmanager
def silent(client: httpx.Client, count: int, first: bytes = b"") -> Iterator[list[socket.socket]]:
    """Connections that send nothing, or the beginning of a request."""
    address = (client.base_url.host, client.base_url.port)
    sockets = [socket.create_connection(address, timeout=30) for _ in range(count)]
    try:
        for one in sockets:
            one.sendall(first)
        yield sockets
    finally:
        for one in sockets:
            one.close()


def join(client: httpx.Client, session: str = "abc", function: int = 1, data: Any = None, **more: Any) -> Any:
    body = {"data": INPUTS if data is None else data, "fn_index": function, "session_hash": session, **more}
    return client.post("/gradio_api/queue/join", json=body)


@pytest.mark.parametrize("path", ["/v1/health", "/", "/docs", "/gradio_api/file=/etc/passwd"])
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "localhost.evil.example", "8.8.8.8", "", "[::2]"]
)
def test_gateway_refuses_foreign_hosts(client: httpx.Client, path: str, host: str) -> None:
    """A page whose own name resolves to this machine (DNS rebinding) can neither read nor post."""
    answer = client.get(path, headers={"Host": host})
    assert answer.status_code == 400
    assert "is not one of this server's" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("bound", "extra", "host", "allowed"),
    [
        ("127.0.0.1", (), "localhost:7860", True),
        ("127.0.0.1", (), "127.0.0.1", True),
        ("::1", (), "[::1]:7860", True),
        ("127.0.0.1", (), "LOCALHOST", True),
        ("127.0.0.1", (), "192.168.1.5", False),
        ("127.0.0.1", ("zepad.example",), "zepad.example:443", True),
        ("127.0.0.1", ("*",), "evil.example", True),
        ("0.0.0.0", (), "192.168.1.5:7860", True),
        ("0.0.0.0", (), "evil.example", False),
        ("0.0.0.0", (), socket.gethostname(), True),
        ("0.0.0.0", ("zepad.example",), "zepad.example.evil.example", False),
    ],
)
def test_allowed_hosts_are_those_of_this_machine(bound: str, extra: tuple[str, ...], host: str, allowed: bool) -> None:
    assert AllowedHosts(bound, extra).allow(host) is allowed


@pytest.mark.parametrize(
    ("host", "name"), [("a:80", "a"), ("[::1]:80", "::1"), ("::1", "::1"), ("A.b", "a.b"), ("", ""), (":80", "")]
)
def test_host_name_drops_the_port(host: str, name: str) -> None:
    assert host_name(host) == name


def test_gateway_refuses_foreign_origins(client: httpx.Client) -> None:
    own = f"http://127.0.0.1:{client.base_url.port}"
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1", "http://[", "file://"):
        for path in ("/v1/classify", "/gradio_api/queue/join", "/gradio_api/upload"):
            answer = client.post(path, headers={"Origin": origin}, data={"labels": LABELS}, files={"image": b"x"})
            assert answer.status_code == 403, (origin, path)
        assert client.get("/v1/model", headers={"Origin": origin}).status_code == 403
    assert client.get("/v1/model", headers={"Origin": own}).status_code == 200
    assert client.get("/v1/model", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}).is_error
    linked = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get("/", headers=linked).status_code == 200


def paths_of(routes: Any) -> set[str]:
    """Paths of routes and of the routers below them, with x for parameters."""
    found = set()
    for route in routes:
        router = getattr(route, "original_router", None)
        if isinstance(route, Route):
            found.add(re.sub(r"\{[^}]*\}", "x", route.path))
        elif router is not None:
            found |= paths_of(router.routes)
    return found


def test_page_routes_are_an_allow_list(client: httpx.Client, classifier: RobustZeroShotClassifier) -> None:
    """Every route of gradio answers 404, except those that the page in a browser was seen to use."""
    app = create_app(Service(classifier, SETTINGS))
    gradio = next(route.app for route in app.routes if isinstance(route, Mount) and "gradio" in str(type(route.app)))
    used = {"/", "/theme.css", "/favicon.ico", "/robots.txt", "/static/x", "/assets/x", "/openapi.json", "/docs"}
    used |= {f"/gradio_api/{name}" for name in ("upload", "queue/join", "queue/data", "run/x", "file=x")}
    tried = {path for path in paths_of(gradio.routes) if (path.rstrip("/") or "/") not in used}
    for path in tried:
        for method in ("GET", "POST"):
            assert client.request(method, path).status_code == 404, (method, path)
    for method in ("GET", "PUT", "OPTIONS", "PROPFIND"):  # the page, which is at /, does not answer for the endpoint
        answer = client.request(method, "/v1/classify")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        assert client.request(method, "/v1/nothing").json() == {"detail": "Not Found"}
    wanted = {"/gradio_api/heartbeat/x", "/config", "/gradio_api/call/x", "/gradio_api/cancel", "/monitoring"}
    assert wanted <= tried


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"fn_index": 0}, 422),  # loads an example; is joined by /run/predict
        ({"fn_index": 2}, 422),
        ({"fn_index": "1"}, 422),
        ({"data": []}, 422),
        ({"data": [None, "x" * 300, "photo", "universal", 8, ""]}, 422),
        ({"data": [None, "a, b", "photo", "\x1b[31m", 8, ""]}, 422),
        ({"data": [None, "a, b", "photo", "universal", 1e400, ""]}, 422),
        ({"data": [{"path": "/etc/passwd"}, *INPUTS[1:]]}, 422),
        ({"data": [{"path": "x", "url": "http://169.254.169.254"}, *INPUTS[1:]]}, 422),
        ({"data": [{"path": "/tmp/a\x00b"}, *INPUTS[1:]]}, 422),
        ({"session_hash": "a b"}, 422),
        ({"session_hash": None}, 422),
        ({"session_hash": "x" * 41}, 422),
        ({"data": [None, "x" * 18 * 2**20, "photo", "universal", 8, ""]}, 413),
    ],
)
def test_page_bodies_are_checked(client: httpx.Client, body: dict[str, Any], status: int) -> None:
    whole = {"data": INPUTS, "fn_index": 1, "session_hash": "abc", **body}
    sent = json.dumps(whole).replace("Infinity", "1e400")
    answer = client.post("/gradio_api/queue/join", content=sent, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert len(answer.text) < 1000
    assert "\x1b" not in answer.json()["detail"]


def test_only_examples_that_exist_are_loaded(client: httpx.Client) -> None:
    def load(number: Any) -> int:
        body = {"data": [number], "fn_index": 0, "session_hash": "abc"}
        return client.post("/gradio_api/run/predict", json=body).status_code

    first = next(number for number in range(100) if load(number) != 200)
    assert first > 2
    assert [load(number) for number in (first, 1000, -1, None)] == [422] * 4


@pytest.mark.parametrize("content", [b"", b"[" * 20_000, b'{"data": ', b"\xff", b"null", b"1"])
def test_damaged_json_is_refused(client: httpx.Client, content: bytes) -> None:
    answer = client.post("/gradio_api/queue/join", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (413, 422)


def test_unread_sessions_are_forgotten(classifier: RobustZeroShotClassifier) -> None:
    """Visitors who join and never read their results: a bounded number is remembered."""
    with running(classifier, sessions=3, queue=64) as (client, _, server, _):
        for number in range(20):
            assert join(client, f"session{number}").status_code == 200
        guard = server.config.app.page_guard
        queue = guard.blocks._queue
        deadline = time.monotonic() + 20
        while len(queue) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(guard.sessions) == ["session17", "session18", "session19"]
        assert set(queue.pending_messages_per_session) <= set(guard.sessions)
        assert set(queue.pending_event_ids_session) <= set(guard.sessions)
        assert client.get("/gradio_api/queue/data?session_hash=session0").status_code == 404
        assert client.get("/gradio_api/queue/data").status_code == 404
        with client.stream("GET", "/gradio_api/queue/data?session_hash=session19") as answer:
            assert "Choose or upload an image first." in "".join(answer.iter_text())


def test_session_that_never_reads_is_refused(
    classifier: RobustZeroShotClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zepad_mm.serve.page_requests.UNREAD", 5)
    with running(classifier, queue=100) as (client, *_):
        statuses = [join(client).status_code for _ in range(12)]
    assert statuses[0] == 200
    assert statuses[-1] == 429


def test_uploads_have_a_total(classifier: RobustZeroShotClassifier) -> None:
    with running(classifier, uploads_mb=2) as (client, _, server, _):
        statuses = [
            client.post("/gradio_api/upload", files={"files": (f"{n}.png", os.urandom(600_000))}).status_code
            for n in range(8)
        ]
        uploads = server.config.app.page_guard.uploads
        kept = sum(size for path, _, size in uploads._files() if path not in uploads._kept)
        assert statuses[0] == 200
        assert statuses[-1] == 503
        assert kept <= 2 * 2**20
        assert client.get("/").status_code == 200  # the rest goes on


def test_oldest_uploads_give_way(tmp_path: Path) -> None:
    (tmp_path / "example").write_bytes(b"x" * BLOCK)
    uploads = Uploads(tmp_path, 10 * BLOCK)
    for number in range(8):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "file").write_bytes(b"x" * BLOCK)
        os.utime(folder / "file", (number, number))
    assert uploads.make_room(3 * BLOCK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "4", "5", "6", "7", "example"]
    for file in tmp_path.glob("*/file"):
        os.utime(file)
    assert not uploads.make_room(5 * BLOCK)  # files in use stay
    assert len(list(tmp_path.glob("*/file"))) == 6


def test_silent_connections_do_not_lock_others_out(classifier: RobustZeroShotClassifier) -> None:
    with running(classifier, connections=8, page=False) as (client, *_):
        for first in (b"", b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\nX-Slow: "):
            with silent(client, 8, first):
                time.sleep(0.2)
                assert client.get("/v1/health", headers={"Connection": "close"}).status_code == 200
                assert post(client, "/v1/classify").status_code == 200


@pytest.mark.parametrize(
    "first", [b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"GET /v1/health HTTP/1.1\r\n\r\nGET"]
)
def test_requests_must_arrive_in_time(classifier: RobustZeroShotClassifier, first: bytes) -> None:
    with running(classifier, idle_s=1, page=False) as (client, *_), silent(client, 1, first) as (one,):
        begun = time.monotonic()
        while one.recv(4096):
            pass
        assert time.monotonic() - begun < 5


def test_bodies_must_arrive_in_time(classifier: RobustZeroShotClassifier) -> None:
    head = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    with (
        running(classifier, idle_s=1, page=False) as (client, *_),
        silent(client, 1, head + b"Content-Length: 1000\r\n\r\n--x\r\n") as (one,),
    ):
        assert b"408" in one.recv(4096)


def test_headers_have_a_limit(client: httpx.Client) -> None:
    with silent(client, 1, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000) as (one,):
        assert b"400" in one.recv(4096)


def test_bodies_together_have_a_limit(classifier: RobustZeroShotClassifier) -> None:
    """Bodies that arrive slowly are held in memory or on disk: all of them together are bounded."""
    head = (
        b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        b'Content-Length: 1000000\r\n\r\n--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    )
    with running(classifier, uploads_mb=1, page=False) as (client, *_), silent(client, 3, head) as slow:
        for one in slow[:2]:
            one.sendall(b"x" * 500_000)
        time.sleep(0.3)
        slow[2].sendall(b"x" * 300_000)
        assert b"503" in slow[2].recv(4096)
    assert ServeSettings().uploads_mb >= ServeSettings().upload_mb


def test_server_stops_within_the_grace_period(
    classifier: RobustZeroShotClassifier, caplog: pytest.LogCaptureFixture
) -> None:
    """Although a stream of results is open, a request computes nothing, and a body never ends."""
    with running(classifier, grace_s=1) as (client, service, server, thread), ThreadPoolExecutor(1) as pool:
        with service.limiter.slot():  # the page's request waits, so its stream stays open
            image = client.post("/gradio_api/upload", files={"files": ("a.png", image_file())}).json()[0]
            file = {"path": image, "meta": {"_type": "gradio.FileData"}}
            assert join(client, data=[file, *INPUTS[1:]]).status_code == 200
            opened = threading.Event()

            def read() -> None:
                with client.stream("GET", "/gradio_api/queue/data?session_hash=abc") as answer:
                    for _ in answer.iter_text():
                        opened.set()

            stream = pool.submit(read)
            assert opened.wait(20)
            service.limiter.close()
            begun = time.monotonic()
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
            assert time.monotonic() - begun < 5
        stream.exception(20)
    assert not any(record.exc_info for record in caplog.records)


def test_serve_runs_inside_a_running_loop(
    classifier: RobustZeroShotClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a cell of a notebook: the cell lasts until the server stops."""
    monkeypatch.setattr(RobustZeroShotClassifier, "from_pretrained", lambda *names, **options: classifier)
    servers: list[uvicorn.Server] = []
    answers: list[int] = []

    class Recorded(run._Server):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            servers.append(self)

    def ask(url: str) -> None:
        answers.append(httpx.get(f"{url}/v1/health", timeout=30).status_code)
        servers[0].should_exit = True

    async def cell() -> None:
        settings = replace(SETTINGS, page=False)
        run.serve(port=0, settings=settings, ready=lambda url: threading.Thread(target=ask, args=[url]).start())

    monkeypatch.setattr(run, "_Server", Recorded)
    asyncio.run(cell())
    assert answers == [200]


@pytest.mark.parametrize(
    "form",
    [
        {"labels": ["A" * 18 * 2**10]},
        {"labels": ["A" * 20] * 5},
        {"labels": ["a", "b"], "template": "A" * 10_000},
        {"labels": ["a", "b"], "label": "A" * 10_000},
        {"labels": ["a", "b"], "attack": "A" * 10_000},
        {"labels": ["a", "b"], "epsilon": "A" * 10_000},
        {"labels": ["a", "b"], "template": "A" * 20},
        {"labels": ["a", "a"], "top_k": "A" * 10_000},
        {"labels": ["a\x1b[31m\n", "a\x1b[31m\n"]},
    ],
)
def test_errors_echo_little(client: httpx.Client, form: dict[str, Any]) -> None:
    for path in ("/v1/classify", "/v1/attack"):
        answer = client.post(path, data=form, files={"image": image_file()})
        assert "A" * 101 not in answer.text
        assert len(answer.text) < 2000
        assert not ADDRESS.search(answer.text)
        assert answer.status_code in (200, 400, 422)
        assert "\x1b" not in str(answer.json())


@pytest.mark.parametrize("image", [b"", b"x", b"GIF89a", b"II*\x00" + b"\xff" * 60, image_file()[:300], b"%!PS-Adobe"])
def test_image_errors_show_no_addresses(client: httpx.Client, image: bytes) -> None:
    answer = post(client, "/v1/classify", image=image)
    assert answer.status_code == 400
    assert not ADDRESS.search(answer.text)
    assert "_io" not in answer.text
    assert answer.text.count("could not be read as an image") == 1


def test_toasts_hold_no_html(classifier: RobustZeroShotClassifier, tmp_path: Path) -> None:
    page = build(Service(classifier, SETTINGS))
    run = next(function.fn for function in page.fns.values() if function.name == "run")
    path = tmp_path / "image.png"
    path.write_bytes(image_file())
    attack = "<img src=x onerror=alert(1)>"
    twice = f"{attack[:18]},{attack[:18]}"
    for labels, template, label in ((twice, "photo", attack[:18]), ("a,b", "<b>x", "a"), ("a,b", "photo", attack)):
        with pytest.raises(gr.Error) as raised:
            run(str(path), labels, template, "universal", 8, label)
        assert "<" not in raised.value.message
        assert "&lt;" in raised.value.message


def test_page_offers_the_policies_of_a_gated_model(clip_source: str, tmp_path: Path) -> None:
    service = Service(RobustZeroShotClassifier(make_gated_zepad(clip_source)), SETTINGS)
    app = create_app(service)
    assert app.page_guard is not None
    run = next(function.fn for function in app.page_guard.blocks.fns.values() if function.name == "run")  # type: ignore[attr-defined]
    path = tmp_path / "image.png"
    path.write_bytes(image_file())
    policies = ("zero_sacrifice", "white_box")
    outputs = [run(str(path), "a,b", "photo", "public", 2, "a", policy) for policy in policies]
    assert outputs[0][-1] != outputs[1][-1]  # the weights of the branches
    with pytest.raises(gr.Error, match="True label"):
        run(str(path), "a,b", "photo", "public", 2, " ")
    checked, inputs = app.page_guard.models["/gradio_api/queue/join"], [*INPUTS, "white_box"]
    for data, accepted in ((inputs, True), (INPUTS, False), ([*INPUTS, "black_box"], False)):
        body = {"data": data, "fn_index": 1, "session_hash": "abc"}
        if accepted:
            checked.model_validate(body)
        else:
            with pytest.raises(ValueError, match="data"):
                checked.model_validate(body)


@pytest.mark.parametrize("holds", [True, False])
def test_page_holds_the_answers_against_the_true_label(
    classifier: RobustZeroShotClassifier, holds: bool, tmp_path: Path
) -> None:
    """Success is to say what the image shows, not to say what was said before the attack."""
    page = build(Service(classifier, SETTINGS, Perturbation(torch.zeros(3, 32, 32), 4 / 255)))
    run = next(function.fn for function in page.fns.values() if function.name == "run")  # type: ignore[attr-defined]
    path = tmp_path / "image.png"
    path.write_bytes(image_file())
    answer = classifier(path, ["cat", "dog"])[0]["label"]
    truth = answer if holds else {"cat": "dog", "dog": "cat"}[answer]
    verdict, gauge, *_ = run(str(path), "cat,dog", "photo", "universal", 4, truth)
    assert ("The defence holds." in verdict) == ("verdict held" in verdict) == holds
    assert ("The defended model is wrong without any attack." in verdict) != holds  # no failure of the defence
    assert "The defence does not hold." not in verdict
    assert ("without any attack" in verdict.partition("The defended model")[2]) != holds
    assert gauge.count('style="left: ') == 2  # the scores of both images on the bar
    for _ in range(2):  # also of label sets whose embeddings are kept
        assert (
            "Warning: 1 of 2 class names are cut off"
            in run(str(path), "cat,<b>a very long hat", "photo", "universal", 4, "cat")[0]
        )


def test_log_lines_hold_no_control_characters(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    raw = "a\x1b[31m\nERROR"
    with caplog.at_level(logging.DEBUG):
        post(client, "/v1/classify", labels=[raw, "b"])
        post(client, "/v1/classify", labels=[raw, raw])
        post(client, "/v1/attack", template=raw, label=raw)
        join(client, data=[None, raw, raw, "universal", 8, raw])
        client.get(f"/gradio_api/file={raw}".replace("\n", "%0a").replace("\x1b", "%1b"))
    for record in caplog.records:
        assert "\x1b" not in record.getMessage()
        assert "\nERROR" not in record.getMessage()
