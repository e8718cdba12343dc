"""Web page and HTTP endpoint: answers, refusals, a full queue, fuzzed requests, a browser."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis import checks
from torchvision.transforms.functional import to_pil_image

from tests.helpers.browser import CHROMIUM, SIZES, attack_example, chromium, running
from tests.helpers.models import make_gated_zepad, make_zepad
from zepad_mm.attacks import PGD, Perturbation
from zepad_mm.classifier import RobustZeroShotClassifier, pixels_of
from zepad_mm.serve import BusyError, ServeSettings, Service, create_app
from zepad_mm.utils.io import ASSETS

LABELS = ["cat", "dog", "a red car"]
SMALL = ServeSettings(upload_mb=1, max_pixels=200 * 200, max_labels=5, max_label_length=20, attack_steps=2, page=False)
LOCAL = "http://localhost"


@pytest.fixture(scope="module")
def service(clip_source: str) -> Service:
    delta = 4 / 255 * torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0)).sign()
    return Service(RobustZeroShotClassifier(make_zepad(clip_source)), SMALL, Perturbation(delta, 4 / 255))


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service), base_url=LOCAL) as client:
        yield client


def image_file(size: tuple[int, int] = (40, 32), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = torch.rand(3, *size, generator=torch.Generator().manual_seed(2))
    to_pil_image(pixels).save(file, kind)
    return file.getvalue()


def post(client: Any, path: str, image: bytes | None = None, **form: Any) -> Any:
    form = {"labels": LABELS, **form}
    return client.post(path, data=form, files={"image": image_file() if image is None else image})


def test_gated_models_show_their_gate_and_take_a_policy(clip_source: str) -> None:
    service = Service(RobustZeroShotClassifier(make_gated_zepad(clip_source)), SMALL)
    with TestClient(create_app(service), base_url=LOCAL) as client:
        about = client.get("/v1/model").json()
        assert (about["policy"], set(about["policies"])) == ("zero_sacrifice", {"zero_sacrifice", "white_box"})
        answers = [
            post(client, "/v1/classify", evidence="true", **more).json()["evidence"]
            for more in ({}, {"policy": "white_box"})
        ]
        assert answers[0]["gate"] == answers[1]["gate"]
        assert answers[0]["gate"]["threshold"] == 0.0
        weights = [evidence["weights"]["benign"] for evidence in answers]
        assert weights[1] == pytest.approx(weights[0] / 3, rel=1e-3)
        attacked = post(client, "/v1/attack", attack="white_box", policy="white_box").json()
        assert attacked["attacked"]["evidence"]["gate"]["logit"] != attacked["clean"]["evidence"]["gate"]["logit"]
        assert post(client, "/v1/classify", policy="black_box").status_code == 422


def test_classify_matches_the_classifier(client: TestClient, service: Service) -> None:
    answer = post(client, "/v1/classify")
    assert answer.status_code == 200
    assert answer.json()["evidence"] is None
    expected = service.classifier(image_file(), LABELS)
    assert [{key: entry[key] for key in ("score", "label")} for entry in answer.json()["labels"]] == expected
    full = post(client, "/v1/classify", evidence="true", top_k="1", template="a {}", on_adversarial="flag").json()
    assert len(full["labels"]) == 1
    assert full["labels"][0]["flagged"] is full["evidence"]["flagged"]
    assert set(full["evidence"]["weights"]) == {"full", "lora", "benign"}


@pytest.mark.parametrize("attack", ["universal", "public", "white_box"])
def test_attack_stays_within_the_budget(client: TestClient, service: Service, attack: str) -> None:
    """The returned image is within the budget, and classifying it again gives the returned answer."""
    answer = post(client, "/v1/attack", attack=attack, epsilon="6").json()
    assert answer["label"] in LABELS
    pixels = pixels_of(base64.b64decode(answer["image"]))
    clean = service.classifier.model.undefended.encoder.preprocess.resize(pixels_of(image_file())[None])[0]
    assert float((pixels - (clean * 255).round() / 255).abs().max()) <= 6 / 255 + 1e-6
    assert float((pixels - clean).abs().max()) > 2 / 255
    again = service.classifier(pixels, LABELS, return_evidence=True)
    assert again["labels"][0]["label"] == answer["attacked"]["labels"][0]["label"]
    assert again["evidence"]["score"] == pytest.approx(answer["attacked"]["evidence"]["score"], abs=1e-4)
    still = post(client, "/v1/attack", attack=attack, epsilon="0", label="dog").json()
    assert still["label"] == "dog"
    assert still["clean"]["labels"][0] == pytest.approx(still["attacked"]["labels"][0])


def test_documentation_loads_nothing_from_other_hosts(client: TestClient) -> None:
    page = client.get("/docs").text
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert {Path(path).suffix for path in loaded} == {".js", ".css", ".png"}
    assert all(path.startswith("/docs/static/") for path in loaded)
    assert all(client.get(path).status_code == 200 for path in loaded)
    assert "https://" not in page
    for path in ("/v1/classify", "/v1/attack"):  # else the browser sends all labels as one
        form = client.get("/openapi.json").json()["paths"][path]["post"]["requestBody"]["content"][
            "multipart/form-data"
        ]
        assert form["encoding"] == {"labels": {"style": "form", "explode": True}}
        assert form["schema"]
    assert "curl -s -F image=@photo.jpg" in client.get("/openapi.json").json()["info"]["description"]


def test_model_route_describes_the_model(client: TestClient, service: Service) -> None:
    assert client.get("/v1/health").json() == {"status": "ok"}
    about = client.get("/v1/model").json()
    assert about["branches"] == {"full": "robust", "lora": "robust", "benign": "benign"}
    assert about["limits"]["max_labels"] == 5
    assert set(client.get("/openapi.json").json()["paths"]) == {"/v1/health", "/v1/model", "/v1/classify", "/v1/attack"}


@pytest.mark.parametrize(
    ("image", "form", "status", "reason"),
    [
        (b"not an image", {}, 400, "could not be read as an image"),
        (b"", {}, 400, "0 bytes could not be read"),
        (image_file()[:500], {}, 400, "could not be read as an image"),
        (image_file((300, 300), "JPEG"), {}, 400, "300 x 300 pixels, more than the limit of 40,000"),
        (None, {"labels": []}, 422, "labels"),
        (None, {"labels": [""]}, 422, "at least 1 character"),
        (None, {"labels": [" "]}, 400, "non-empty strings"),
        (None, {"labels": ["a", "a"]}, 400, "given more than once: a"),
        (None, {"labels": ["x" * 21]}, 422, "at most 20 characters"),
        (None, {"labels": list("abcdef")}, 422, "at most 5"),
        (None, {"template": "photos"}, 400, "did you mean 'photo'"),
        (None, {"template": "a {} {}"}, 400, "exactly one"),
        (None, {"template": "a {x}"}, 400, "exactly one"),
        (None, {"top_k": "0"}, 422, "greater than or equal to 1"),
        (None, {"on_adversarial": "warn"}, 422, "'ignore', 'flag' or 'abstain'"),
        (None, {"attack": "apgd"}, 422, "'universal', 'public' or 'white_box'"),
        (None, {"epsilon": "17"}, 422, "less than or equal to 16"),
        (None, {"epsilon": "4/255"}, 422, "valid integer"),
        (None, {"label": "bird"}, 400, "label: expected one of ['cat', 'dog', 'a red car'], got 'bird'"),
        (None, {"topk": "1"}, 400, "'topk' is not a field of this request; expected image, labels, template, top_k"),
        (image_file() + b"\x00" * 2**20, {}, 413, "larger than 1 MB"),
    ],
)
def test_refusals_have_status_and_reason(
    client: TestClient, image: bytes | None, form: dict[str, Any], status: int, reason: str
) -> None:
    path = "/v1/attack" if {"attack", "epsilon", "label"} & set(form) else "/v1/classify"
    answer = post(client, path, image, **form)
    assert (answer.status_code, reason in json.dumps(answer.json(), ensure_ascii=False)) == (status, True), answer.text


def test_attack_needs_two_labels_and_a_form(client: TestClient) -> None:
    assert "needs at least two" in post(client, "/v1/attack", labels=["cat"]).json()["detail"]
    assert client.post("/v1/classify", json={"labels": LABELS}).status_code == 422
    assert client.post("/v1/classify", data={"labels": LABELS, "image": "text"}).status_code == 400
    assert client.post("/v1/nothing").status_code == 404
    assert client.get("/v1/classify").status_code == 405


@pytest.mark.parametrize(
    ("name", "reason"), [("topk", "'topk' is not a field"), ("top_k", "'top_k': expected in the form")]
)
def test_fields_in_the_address_are_refused(client: TestClient, name: str, reason: str) -> None:
    answer = post(client, f"/v1/classify?{name}=1")
    assert (answer.status_code, reason in answer.json()["detail"]) == (400, True), answer.text


def test_fields_given_twice_are_refused(client: TestClient) -> None:
    answer = post(client, "/v1/classify", top_k=["1", "2"])
    assert (answer.status_code, answer.json()["detail"]) == (400, "top_k: expected once, got it 2 times")
    files = [("image", ("a.png", image_file(), "image/png"))] * 2
    answer = client.post("/v1/classify", files=files, data={"labels": LABELS})
    assert (answer.status_code, answer.json()["detail"]) == (400, "image: expected once, got it 2 times")


def test_chunked_body_over_the_limit_is_refused(client: TestClient) -> None:
    def endless() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(40):
            yield b"\x00" * 2**16

    answer = client.post("/v1/classify", content=endless(), headers={"content-type": "multipart/form-data; boundary=x"})
    assert (answer.status_code, "larger than 1 MB" in answer.text) == (413, True)


def test_full_queue_answers_503(clip_source: str) -> None:
    service = Service(RobustZeroShotClassifier(make_zepad(clip_source)), ServeSettings(workers=1, queue=1, page=False))
    release, begun = threading.Event(), threading.Event()

    def occupy() -> None:
        with service.limiter.slot():
            begun.set()
            assert release.wait(60)

    with TestClient(create_app(service), base_url=LOCAL) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(occupy)
        assert begun.wait(60)
        second = pool.submit(post, client, "/v1/classify")
        deadline = time.monotonic() + 60
        while not service.limiter.is_full() and time.monotonic() < deadline:  # until the second request waits
            time.sleep(0.01)
        refused = post(client, "/v1/classify")
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "2"
        assert "the queue is full" in refused.json()["detail"]
        with pytest.raises(BusyError):
            service.classify(image_file(), LABELS)
        assert client.get("/v1/health").status_code == 200
        release.set()
        first.result(60)
        assert second.result(60).status_code == 200
        assert post(client, "/v1/classify").status_code == 200


def test_concurrent_requests_match_serial_requests(clip_source: str) -> None:
    """Attacks and classifications on four workers are bit-identical to a serial run."""
    settings = ServeSettings(workers=4, queue=32, attack_steps=2, page=False)
    service = Service(RobustZeroShotClassifier(make_zepad(clip_source)), settings)

    def one(number: int) -> Any:
        labels = [f"{name} {number}" for name in LABELS]
        if number % 2:
            return service.classify(image_file(), labels, evidence=True)
        found = service.attack(image_file(), labels, attack="white_box" if number % 4 else "public")
        return found.attacked.tolist(), found.before, found.after

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(one, range(16)))
    assert together == [one(number) for number in range(16)]
    assert not any(parameter.requires_grad for parameter in service.classifier.model.parameters())


def test_service_loads_or_crafts_a_perturbation(service: Service, clip_source: str) -> None:
    embedded = Service(RobustZeroShotClassifier.from_pretrained("embedded"))
    assert embedded.perturbation.provenance["encoders"] == ["open_clip:embedded"]
    assert embedded.perturbation.epsilon == pytest.approx(10 / 255)
    made = Service(RobustZeroShotClassifier(make_zepad(clip_source)), SMALL)
    assert made.perturbation.delta.shape == (3, 32, 32)
    assert made.perturbation is made.perturbation


def test_white_box_attack_takes_at_least_what_plain_pgd_takes() -> None:
    """On the shipped model and photos: plain PGD hardly follows the gate, and would make it look better than it is."""
    service = Service(RobustZeroShotClassifier.from_pretrained("embedded"), ServeSettings(attack_steps=5, page=False))
    truth = {"coffee": "a cup of coffee", "rocket": "a rocket"}
    labels = [*truth.values(), "a cat", "a dog"]
    task, plain, ours = service.classifier.task(labels), 0, 0
    for number, (name, label) in enumerate(truth.items()):
        found = service.attack(ASSETS / "photos" / f"{name}.jpg", labels, attack="white_box", levels=4, label=label)
        ours += found.after["labels"][0]["label"] != label
        pgd = PGD(epsilon=4 / 255, steps=5, quantize=True)
        plain += int(task.defended(pgd(task.defended, found.clean[None], torch.tensor([number]))).argmax()) != number
    assert ours >= plain
    assert ours > 0


@pytest.mark.parametrize("name", ["workers", "upload_mb", "max_labels", "attack_steps"])
def test_settings_reject_values_below_the_minimum(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        ServeSettings(**{name: 0})


def test_endpoint_withstands_schemathesis(service: Service) -> None:
    """A few examples; benchmarks/serve_fuzz.py runs more."""
    named = Service(service.classifier, replace(SMALL, allowed_hosts=("testserver",)), service.perturbation)
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(named))
    wanted = [checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance]
    asked = []

    def ask(case: Any) -> None:
        asked.append(case.path)
        case.call_and_validate(checks=wanted)

    for operation in schema.get_all_operations():
        once = settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        once(given(operation.ok().as_strategy())(ask))()
    assert set(asked) == {"/v1/health", "/v1/model", "/v1/classify", "/v1/attack"}
    assert len(asked) >= 20


@pytest.fixture(scope="module")
def address(clip_source: str) -> Iterator[str]:
    """URL of a running server with the page."""
    service = Service(RobustZeroShotClassifier(make_zepad(clip_source)), ServeSettings(attack_steps=2))
    with running(service) as url:
        yield url


def test_endpoint_works_beside_the_page(address: str) -> None:
    with httpx.Client(base_url=address, timeout=60) as client:
        assert post(client, "/v1/classify").status_code == 200
        assert "gradio" in client.get("/").text
        for path in ("/v1/classify", "/gradio_api/upload"):
            answer = client.post(path, files={"files": b"x" * (11 * 2**20)})
            assert (answer.status_code, answer.json()["detail"]) == (
                413,
                "the request is larger than 10 MB; shrink the image",
            )
        assert client.get("/gradio_api/file=/etc/passwd").status_code in (403, 404)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; apt-get install chromium")
@pytest.mark.parametrize("size", SIZES)
def test_page_works_in_a_browser(address: str, size: str, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    width, height = SIZES[size]
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": height})
        asked, page_errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: page_errors.append(str(error)))
        page.goto(address)
        button = page.locator("#run")
        page.get_by_label("Remove Image").first.wait_for(timeout=60_000)  # an example is there from the beginning
        expect(page.get_by_label("True label")).to_have_value("cat")
        page.get_by_label("Remove Image").first.click()
        button.click(timeout=60_000)
        expect(page.get_by_text("Choose or upload an image first.")).to_be_visible(timeout=30_000)

        slider = page.locator("input[type=range]")
        slider.focus()
        slider.press("ArrowRight")
        attack_example(page, "a cat, a dog, <b>a hat</b>", "white box")
        verdict, labels = page.locator("#verdict"), page.get_by_label("Labels, separated by commas")
        expect(verdict).to_contain_text("The undefended model", timeout=60_000)
        expect(verdict).to_contain_text("lagged as adversarial")
        expect(page.locator("#gauge")).to_contain_text("Suspicion score:")
        expect(page.locator("#branches tr")).to_have_count(4)
        expect(page.locator(".pixels img")).to_have_count(3)
        expect(page.get_by_text("<b>a hat</b>").first).to_be_visible()  # escaped

        photo, truth = tmp_path / "photo.jpg", page.get_by_label("True label")
        Image.new("RGB", (120, 90), "red").save(photo)
        page.get_by_label("Remove Image").first.click()
        page.locator("input[type=file]").first.set_input_files(photo)
        expect(truth).to_have_value("", timeout=30_000)  # what the example showed is no more true
        labels.fill("one")
        button.click()
        expect(page.get_by_text('Write under "True label"')).to_be_visible(timeout=30_000)
        truth.fill("red")
        button.click()
        expect(page.get_by_text("an attack needs at least two")).to_be_visible(timeout=30_000)
        labels.fill("red, blue")
        button.click()
        expect(verdict.get_by_text("red").or_(verdict.get_by_text("blue")).first).to_be_visible(timeout=60_000)

        assert page.evaluate("document.documentElement.scrollWidth") <= width  # no horizontal overflow
        assert page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert not page_errors
        own = ("data:", "blob:", address)
        assert [url for url in asked if not url.startswith(own)] == []  # no request to other hosts
