"""Zero-shot classifier: outputs of transformers' pipeline, plus evidence."""

from __future__ import annotations

import copy
import io
import logging
import multiprocessing
import os
import pickle
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from transformers import pipeline

from tests.helpers import encoder_zoo as zoo
from tests.helpers.models import make_zepad
from zepad_mm import __version__
from zepad_mm.attacks import PGD
from zepad_mm.classifier import RobustZeroShotClassifier
from zepad_mm.encoders import load_clip, load_encoder
from zepad_mm.models.branch import Branch, BranchConfig
from zepad_mm.models.heads import zero_shot_head
from zepad_mm.models.zepad import DetectorConfig, ZePAD, ZePADConfig

LABELS = ["cat", "dog", "a red car"]


@pytest.fixture
def classifier(zepad: ZePAD) -> RobustZeroShotClassifier:
    return RobustZeroShotClassifier(zepad, batch_size=2)


def test_classifier_returns_ranked_scores(classifier: RobustZeroShotClassifier, images: torch.Tensor) -> None:
    one = classifier(images[0], LABELS, hypothesis_template="This is a photo of {}.")
    assert [set(answer) for answer in one] == [{"score", "label"}] * 3
    assert [answer["score"] for answer in one] == sorted((answer["score"] for answer in one), reverse=True)
    assert sum(answer["score"] for answer in one) == pytest.approx(1, abs=1e-5)
    many = classifier(images, LABELS)
    assert len(many) == 4
    assert len(classifier(images, LABELS, top_k=1)[0]) == 1
    assert classifier([], LABELS) == []


def test_classifier_accepts_every_image_type(
    classifier: RobustZeroShotClassifier, images: torch.Tensor, tmp_path: Path
) -> None:
    pil_image = to_pil_image((images[0] * 255).round().byte())
    path = tmp_path / "image.png"
    pil_image.save(path)
    pixels = torch.from_numpy(__import__("numpy").array(pil_image)).permute(2, 0, 1).float() / 255
    forms = [pil_image, str(path), path, path.read_bytes(), pixels]
    answers = [classifier(form, LABELS) for form in forms]
    assert all(answer == answers[0] for answer in answers)


def test_classifier_is_independent_of_the_batch(classifier: RobustZeroShotClassifier, images: torch.Tensor) -> None:
    """Also with images of different sizes. The tolerance allows for float rounding, which depends on the batch size."""
    large = torch.rand(3, 70, 40, generator=torch.Generator().manual_seed(0))
    mixed = classifier([images[0], large, images[1], images[2]], LABELS)
    for answer, image in zip(mixed, (images[0], large, images[1], images[2]), strict=True):
        alone = classifier(image, LABELS)
        assert [entry["label"] for entry in alone] == [entry["label"] for entry in answer]
        assert alone[0]["score"] == pytest.approx(answer[0]["score"], abs=1e-5)


def test_classifier_returns_evidence(classifier: RobustZeroShotClassifier, images: torch.Tensor) -> None:
    result = classifier(images[0], LABELS, return_evidence=True)
    evidence = result["evidence"]
    assert result["labels"] == classifier(images[0], LABELS)
    assert set(evidence["confidences"]) == set(evidence["weights"]) == {"full", "lora", "benign"}
    assert sum(evidence["weights"].values()) == pytest.approx(1, abs=1e-5)
    assert isinstance(evidence["flagged"], bool)
    assert len(evidence["undefended"]) == 3


def test_classifier_rejects_input(classifier: RobustZeroShotClassifier, images: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="candidate_labels: the list is empty"):
        classifier(images, [])
    with pytest.raises(ValueError, match=r"write \['cat'\]"):
        classifier(images, "cat")
    with pytest.raises(ValueError, match="exactly one"):
        classifier(images, LABELS, hypothesis_template="a photo of {} and {}")
    with pytest.raises(ValueError, match="unknown prompt set"):
        classifier(images, LABELS, hypothesis_template="fotos")
    with pytest.raises(ValueError, match="write images / 255"):
        classifier(images * 255, LABELS)
    with pytest.raises(ValueError, match="top_k"):
        classifier(images, LABELS, top_k=0)
    broken = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(broken, "PNG")
    (tmp_path / "cut.png").write_bytes(broken.getvalue()[:40])
    for bad in (tmp_path / "cut.png", b"not an image", "/nowhere/at/all.png"):
        with pytest.raises(ValueError, match="could not be read as an image"):
            classifier(bad, LABELS)
    with pytest.raises(ValueError, match="got dict"):
        classifier([{}], LABELS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": "data:image/png;base64," + "A" * 9999}, "data URLs are not read"),
        ({"images": "x" * 9999}, "File name too long"),
        ({"images": torch.zeros(3, 8, 8, device="meta")}, "without values"),
        ({"candidate_labels": None}, "candidate_labels: expected a list of strings, got None"),
        ({"candidate_labels": {"a", "b"}}, "has no order"),
        ({"hypothesis_template": 3}, "prompts: expected a named set"),
        ({"hypothesis_template": [None]}, "prompts: expected a named set"),
        ({"top_k": 1.5}, "top_k: expected a whole number"),
        ({"top_k": "2"}, "top_k: expected a whole number"),
    ],
)
def test_classifier_names_arguments_of_a_wrong_type(
    classifier: RobustZeroShotClassifier, images: torch.Tensor, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        classifier(**{"images": images[0], "candidate_labels": LABELS, **given})
    assert len(str(error.value)) < 500
    with pytest.raises(ValueError, match="batch_size: expected a whole number"):
        RobustZeroShotClassifier(classifier.model, batch_size="8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype: expected torch\.float32"):
        classifier.to(dtype="bfloat16")  # type: ignore[arg-type]


def test_classifier_reads_floats_of_every_byte_order(classifier: RobustZeroShotClassifier) -> None:
    array = np.random.default_rng(0).random((64, 64, 3), np.float32)
    expected = classifier(array, LABELS)
    for other in (array.astype(">f4"), array.astype(np.longdouble), array.astype("<f8")):
        found = classifier(other, LABELS)
        assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
        assert found[0]["score"] == pytest.approx(expected[0]["score"], abs=1e-4)
    file = io.BytesIO()
    Image.fromarray((array * 255).astype(np.uint8)).save(file, "PNG")
    assert classifier(memoryview(file.getvalue()), LABELS) == classifier(file.getvalue(), LABELS)


def _hf_clip(folder: Path, kind: str = "hf: CLIP") -> tuple[RobustZeroShotClassifier, str]:
    """A classifier with one untuned branch around a transformers CLIP, and the folder of that CLIP."""
    source = zoo.ZOO[kind](folder).source
    encoder, text = load_clip(source)
    branch = BranchConfig(name="plain", role="benign", source=source)
    config = ZePADConfig(public_source=source, branches=(branch,), class_names=("a",), prompts=("{}",))
    model = ZePAD(config, [Branch(branch, encoder, zero_shot_head(text, ["a"], ["{}"]))])
    return RobustZeroShotClassifier(model), source.removeprefix("hf:local-dir:")


@pytest.mark.parametrize("kind", ["hf: CLIP", "hf: SigLIP"])
def test_classifier_matches_the_transformers_pipeline(kind: str, tmp_path: Path) -> None:
    """Same types, keys and order for one image and for several, and the same scores on the same CLIP."""
    ours, folder = _hf_clip(tmp_path, kind)
    theirs = pipeline("zero-shot-image-classification", model=folder, device="cpu")
    if kind == "hf: SigLIP":
        # texts of this small one end at 40 tokens; the pipeline pads to the 64 of the public ones
        theirs._preprocess_params["tokenizer_kwargs"] = {"max_length": 40}
    generator = torch.Generator().manual_seed(0)
    pil_images = [to_pil_image(torch.rand(3, *size, generator=generator)) for size in ((40, 56), (90, 33), (64, 64))]
    template = "{}"
    for given in (pil_images[0], pil_images):
        expected = theirs(given, candidate_labels=LABELS, hypothesis_template=template)
        answer = ours(given, LABELS, hypothesis_template=template)
        assert type(answer) is type(expected)
        rows = [(answer, expected)] if given is pil_images[0] else list(zip(answer, expected, strict=True))
        for mine, other in rows:
            assert [list(entry) for entry in mine] == [list(entry) for entry in other]
            assert [entry["label"] for entry in mine] == [entry["label"] for entry in other]
            assert {type(entry["score"]) for entry in mine} == {float}
            for one, two in zip(mine, other, strict=True):
                assert one["score"] == pytest.approx(two["score"], abs=5e-3)  # the pipeline resizes uint8


def test_classifier_accepts_arrays(classifier: RobustZeroShotClassifier, images: torch.Tensor) -> None:
    levels = (images * 255).round().byte()
    expected = classifier(levels.float() / 255, LABELS)
    colour_last = levels.permute(0, 2, 3, 1).numpy()
    forms: list[Any] = [levels, levels.numpy(), colour_last, list(colour_last), tuple(colour_last / 255)]
    for form in forms:
        for answer, wanted in zip(classifier(form, LABELS), expected, strict=True):
            assert [entry["label"] for entry in answer] == [entry["label"] for entry in wanted]
            assert answer[0]["score"] == pytest.approx(wanted[0]["score"], abs=1e-5)
    assert classifier(colour_last[0], LABELS) == classifier(levels[0], LABELS)
    grey = colour_last[0, :, :, 0]
    assert classifier(grey, LABELS) == classifier(Image.fromarray(grey), LABELS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_classifier_reads_image_formats(classifier: RobustZeroShotClassifier, kind: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, kind)
    assert len(classifier(file.getvalue(), LABELS)) == 3


def test_classifier_applies_exif_orientation(classifier: RobustZeroShotClassifier, images: torch.Tensor) -> None:
    pil_image = to_pil_image(images[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    pil_image.save(file, "PNG", exif=exif)
    assert classifier(file.getvalue(), LABELS) == classifier(pil_image.rotate(-90), LABELS)
    file.seek(0)
    assert classifier(file, LABELS) == classifier(pil_image.rotate(-90), LABELS)


def test_classifier_reads_urls(
    classifier: RobustZeroShotClassifier, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    to_pil_image(images[0]).save(file, "PNG")

    agents: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404 if "missing" in self.path else 200)
            agents.append(self.headers["User-Agent"])
            self.end_headers()
            self.wfile.write(file.getvalue() if "image" in self.path else b"<html>")

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert classifier(f"{url}/image.png", LABELS) == classifier(file.getvalue(), LABELS)
        for path in ("/an image.png", "/image é.png", "/%C3%A9image.png?size=1&x=a b", "/image.png#top"):
            assert classifier(url + path, LABELS) == classifier(file.getvalue(), LABELS)
        assert set(agents) == {f"zepad-mm/{__version__}"}
        refused = "could not be fetched: the server answered 404 Not Found"
        for path, message in (("/missing.png", refused), ("/page.html", "could not be read as an image")):
            with pytest.raises(ValueError, match=message):
                classifier(url + path, LABELS)
        monkeypatch.setattr("zepad_mm.classifier.images.MAX_BYTES", 100)
        with pytest.raises(ValueError, match="is larger than"):
            classifier(f"{url}/image.png", LABELS)
        server.shutdown()


def test_classifier_answers_the_good_images_and_names_the_damaged(
    classifier: RobustZeroShotClassifier, images: torch.Tensor, tmp_path: Path
) -> None:
    good, cut = tmp_path / "good.png", tmp_path / "cut.png"
    to_pil_image(images[0]).save(good)
    cut.write_bytes(good.read_bytes()[:60])
    given = [cut, good, tmp_path / "missing.png", b"", good, cut, cut]  # also a batch of damaged ones alone
    answers = classifier(given, LABELS, return_errors=True, return_evidence=True)
    alone = classifier(good, LABELS, return_evidence=True)
    assert [type(answer) for answer in answers] == [
        ValueError,
        dict,
        ValueError,
        ValueError,
        dict,
        ValueError,
        ValueError,
    ]
    assert answers[1]["labels"][0]["score"] == pytest.approx(alone["labels"][0]["score"], abs=1e-5)
    assert "cut.png' could not be read" in str(answers[0])
    assert "missing.png' could not be read" in str(answers[2])
    assert isinstance(classifier(cut, LABELS, return_errors=True), ValueError)
    with pytest.raises(ValueError, match=r"image 0: .*cut\.png' could not be read"):
        classifier(given, LABELS)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 5_000)])
def test_classifier_reads_thin_images(classifier: RobustZeroShotClassifier, size: tuple[int, int]) -> None:
    assert len(classifier(Image.new("RGB", size, "red"), LABELS)) == 3


@pytest.mark.parametrize("damage", [io.BytesIO(b"junk"), b"junk", b"GIF89a" + b"\xff" * 9, io.BytesIO(), b""])
def test_image_errors_are_said_once(classifier: RobustZeroShotClassifier, damage: Any) -> None:
    with pytest.raises(ValueError, match="could not be read") as raised:
        classifier(damage, LABELS)
    assert str(raised.value).count("could not be read") == 1
    assert "object at" not in str(raised.value)


def test_classifier_streams_batch_by_batch(classifier: RobustZeroShotClassifier, images: torch.Tensor) -> None:
    read = []

    def pil_images() -> Iterator[torch.Tensor]:
        for index, image in enumerate(images):
            read.append(index)
            yield image

    answers = classifier(pil_images(), LABELS)
    assert read == []
    first = next(answers)
    assert read == [0, 1]  # batches of two
    assert [first, *answers] == classifier(images, LABELS)
    with pytest.raises(ValueError, match="candidate_labels"):
        classifier(pil_images(), [])  # at once, not when the first result is asked for


def test_classifier_streams_a_datasets_column(classifier: RobustZeroShotClassifier, images: torch.Tensor) -> None:
    pil_images = [to_pil_image((image * 255).round().byte()) for image in images]
    table = datasets.Dataset.from_dict({"image": pil_images}, features=datasets.Features({"image": datasets.Image()}))
    expected = classifier(pil_images, LABELS)
    for column in (table["image"], table.to_iterable_dataset()["image"]):
        answers = classifier(column, LABELS)
        assert iter(answers) is answers
        assert list(answers) == expected


def test_classifier_flags_or_abstains(classifier: RobustZeroShotClassifier, images: torch.Tensor) -> None:
    plain = classifier(images, LABELS)
    scores = [found["evidence"]["score"] for found in classifier(images, LABELS, return_evidence=True)]
    middle = sorted(scores)[1]
    classifier.model.set_detector(DetectorConfig(threshold=middle))
    suspicious = [score > middle for score in scores]
    assert sorted(suspicious) == [False, False, True, True]
    assert classifier(images, LABELS) == plain
    flagged = classifier(images, LABELS, on_adversarial="flag")
    assert [{entry["flagged"] for entry in answer} for answer in flagged] == [{flag} for flag in suspicious]
    silent = classifier(images, LABELS, on_adversarial="abstain", return_evidence=True)
    for answer, flag, wanted in zip(silent, suspicious, plain, strict=True):
        assert answer["labels"] == ([] if flag else wanted)
        assert answer["evidence"]["flagged"] is flag
        assert len(answer["evidence"]["undefended"]) == 3
    with pytest.raises(ValueError, match="on_adversarial: expected one of ignore, flag, abstain, got 'warn'"):
        classifier(images, LABELS, on_adversarial="warn")


def test_classifier_is_thread_safe(classifier: RobustZeroShotClassifier, images: torch.Tensor) -> None:
    """Eight threads with different labels get bit-identical results to a serial run, lazy text tower included."""
    tasks = [([f"{name} {index}" for name in ("cat", "dog", "car")], images[index % 4]) for index in range(40)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda task: classifier(task[1], task[0], return_evidence=True), tasks))
    assert together == [classifier(image, labels, return_evidence=True) for labels, image in tasks]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_classifier_can_be_copied(classifier: RobustZeroShotClassifier, images: torch.Tensor, copied: Any) -> None:
    """Before and after the lazy text tower is loaded, and with shared weights; joblib and spawn pickle it."""
    expected = classifier(images, LABELS, return_evidence=True)
    # of the same batch size: the rounding of folded encoders depends on it
    fresh = RobustZeroShotClassifier(classifier.model, batch_size=classifier.batch_size)
    assert copied(fresh)(images, LABELS, return_evidence=True) == expected
    classifier.model.share_trunk()
    twin = copied(classifier)
    assert twin(images, LABELS, return_evidence=True) == classifier(images, LABELS, return_evidence=True)
    assert twin(images, ["bird", "fish"]) == classifier(images, ["bird", "fish"])
    assert twin._text_lock is not classifier._text_lock


def _answers(classifier: RobustZeroShotClassifier, images: torch.Tensor, answers: Any) -> None:
    answers.put(classifier(images, LABELS))


@pytest.mark.slow
def test_classifier_works_in_a_spawned_process(classifier: RobustZeroShotClassifier, images: torch.Tensor) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_answers, args=(classifier, images, answers))
    process.start()
    found = answers.get(timeout=120)
    process.join(60)
    assert process.exitcode == 0
    for one, other in zip(found, classifier(images, LABELS), strict=True):
        assert [entry["label"] for entry in one] == [entry["label"] for entry in other]
        assert [entry["score"] for entry in one] == pytest.approx([entry["score"] for entry in other], abs=1e-5)


def test_classifier_of_transformers_can_be_copied(tmp_path: Path, images: torch.Tensor) -> None:
    classifier, _ = _hf_clip(tmp_path)
    assert pickle.loads(pickle.dumps(classifier))(images, LABELS) == classifier(images, LABELS)


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)]
)
def test_classifier_used_in_any_mode_can_be_attacked(clip_source: str, images: torch.Tensor, mode: Any) -> None:
    """What is kept of the first call, the cached texts among it, is neither inference tensors nor half precision."""
    expected = RobustZeroShotClassifier(make_zepad(clip_source)).task(LABELS).defended(images)
    classifier = RobustZeroShotClassifier(make_zepad(clip_source))
    with mode():
        classifier(images, LABELS, return_evidence=True)
        task = classifier.task(LABELS)
        encoder = load_encoder(clip_source)
        classifier.model.set_classes(LABELS)
    assert torch.equal(task.defended(images), expected)
    for view in (task.defended, classifier.task(LABELS).defended, task.undefended, classifier.model, encoder):
        pixels = images.clone().requires_grad_()
        assert torch.autograd.grad(view(pixels).sum(), pixels)[0].abs().sum() > 0
    assert not any(parameter.is_inference() for parameter in classifier.model.parameters())


def test_loading_and_classifying_leave_the_process_as_it_was(clip_source: str, images: torch.Tensor) -> None:
    model = make_zepad(clip_source)
    state, variables, handlers = torch.get_rng_state(), dict(os.environ), list(logging.getLogger().handlers)
    RobustZeroShotClassifier(model)(images, LABELS, return_evidence=True)
    RobustZeroShotClassifier.from_pretrained("embedded")
    load_encoder(clip_source)
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(os.environ) == variables
    assert logging.getLogger().handlers == handlers


def test_classifier_caches_text_embeddings_with_a_bound(
    classifier: RobustZeroShotClassifier, images: torch.Tensor
) -> None:
    classifier.task(["builds the head of the undefended model"])
    text = classifier.model.text
    seen: list[int] = []
    encode = text.tower.encode_text
    text.tower.encode_text = lambda tokens: seen.append(len(tokens)) or encode(tokens)
    for _ in range(3):
        classifier(images, LABELS)
    assert seen == [len(LABELS) * 6]
    classifier(images, LABELS, hypothesis_template="single")
    assert seen == [len(LABELS) * 6, len(LABELS)]
    for index in range(100):
        classifier.task([f"label {index}"], "single")
    assert len(text._cache) == 64


def test_task_is_differentiable(classifier: RobustZeroShotClassifier, images: torch.Tensor) -> None:
    """Gradients reach the images, so a task can be attacked."""
    task = classifier.task(LABELS)
    scores = task.defended(images).softmax(-1)
    answers = classifier(images, LABELS)
    assert [LABELS[int(i)] for i in scores.argmax(-1)] == [answer[0]["label"] for answer in answers]
    for view in (task.defended, task.undefended):
        attacked = PGD(epsilon=8 / 255, steps=2)(view, images, scores.argmax(-1))
        assert not torch.equal(attacked, images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_classifier_runs_in_half_precision(clip_source: str, images: torch.Tensor, dtype: torch.dtype) -> None:
    full = RobustZeroShotClassifier(make_zepad(clip_source))
    half = RobustZeroShotClassifier(make_zepad(clip_source)).to("cpu", dtype)
    assert next(half.model.branch("full").encoder.parameters()).dtype == dtype
    for one, two in zip(full(images, LABELS), half(images, LABELS, return_evidence=True), strict=True):
        assert one[0]["score"] == pytest.approx(two["labels"][0]["score"], abs=0.05)
    with pytest.raises(ValueError, match=r"expected torch\.float32"):
        half.to(dtype=torch.int8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_classifier_runs_on_a_gpu(clip_source: str, images: torch.Tensor) -> None:
    """Also after the text tower was loaded on the CPU."""
    classifier = RobustZeroShotClassifier(make_zepad(clip_source))
    expected = classifier(images, LABELS, return_evidence=True)
    for one, two in zip(expected, classifier.to("cuda")(images.cuda(), LABELS, return_evidence=True), strict=True):
        assert one["labels"][0]["score"] == pytest.approx(two["labels"][0]["score"], abs=1e-3)


def _bomb(side: int) -> bytes:
    """A small PNG whose header claims a huge size."""
    file = io.BytesIO()
    Image.new("1", (9, 9)).save(file, "PNG")
    header = b"IHDR" + struct.pack(">II", side, side) + file.getvalue()[24:29]
    return file.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + file.getvalue()[33:]


def test_classifier_refuses_unusable_images(
    classifier: RobustZeroShotClassifier, images: torch.Tensor, tmp_path: Path
) -> None:
    png = io.BytesIO()
    to_pil_image(images[0]).resize((300, 300)).save(png, "PNG")
    jpeg = io.BytesIO()
    to_pil_image(images[0]).resize((300, 300)).save(jpeg, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(jpeg.getvalue()[:800])
    late = Image.open(io.BytesIO(png.getvalue()[:-9000]))  # opened lazily and truncated
    for bad, message in (
        (png.getvalue()[:-9000], "could not be read as an image"),
        (jpeg.getvalue()[:800], "could not be read as an image"),
        (str(tmp_path / "cut.jpg"), r"cut.jpg' could not be read as an image"),
        (late, "could not be read as an image"),
        (b"", "0 bytes could not be read as an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "could not be read as an image"),
        (_bomb(30000), "decompression bomb|30000 x 30000 pixels"),
        (Image.new("I", (9, 9)), "integers of unknown range"),
        (np.zeros((9, 9, 4), np.uint8), r"drop alpha with array\[..., :3\]"),
        (np.zeros((9, 9, 3), np.uint16), "expected 8-bit levels"),
        (np.zeros((9, 9, 3), np.int64), "expected an array of uint8"),
        (np.full((9, 9, 3), 7.0), "write images / 255"),
        (np.full((9, 9, 3), np.nan), "NaN or infinity"),
        (torch.full((3, 9, 9), float("nan")), "NaN or infinity"),
        (torch.zeros(4, 9, 9), r"drop alpha with images\[:, :3\]"),
        (torch.zeros(9, 9, 3), "colour last"),
        (torch.zeros(3, 0, 9), "has no pixels"),
        (torch.zeros(3, 9, 9, dtype=torch.int32), r"images.float\(\) / 255"),
        (np.zeros((0, 9, 3), np.uint8), "has no pixels"),
        (3, "got int"),
        (None, "got NoneType"),
        ({"image": 1}, "got dict"),
    ):
        with pytest.raises(ValueError, match=message):
            classifier(bad, LABELS)
    with pytest.raises(ValueError, match=r"image 1: .*could not be read"):
        classifier([images[0], b"not an image"], LABELS)
    small = RobustZeroShotClassifier(classifier.model, max_pixels=100)
    with pytest.raises(ValueError, match="has 300 x 300 pixels, more than the limit of 100"):
        small(png.getvalue(), LABELS)
    for template in ("a {x} {}", "{", "{} {:>99999999}", "{}}", "{!r}", "{0}"):
        with pytest.raises(ValueError, match=r"exactly one|unknown prompt set"):
            classifier(images, LABELS, hypothesis_template=template)
    with pytest.raises(ValueError, match="batch_size"):
        RobustZeroShotClassifier(classifier.model, batch_size=0)
