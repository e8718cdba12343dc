"""Published defences under one adaptive attack: the wrappers, the attack, the certificate, the table and its page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from reproduction.cross_defence import DEFENCES, Defence, Parts
from reproduction.cross_defence.__main__ import main
from reproduction.cross_defence.agc import random_perspective
from reproduction.cross_defence.attacks import Strength, adaptive_attack, authors_attack, share_right, transferred
from reproduction.cross_defence.csr import low_pass
from reproduction.cross_defence.images import read_rows
from reproduction.cross_defence.page import PAGE, page
from reproduction.cross_defence.smoothing import Smoothing
from tests.helpers.models import CLASSES, make_zepad, write_clip
from zepad_mm.encoders import load_clip
from zepad_mm.evaluation.subjects import EncoderWithHead
from zepad_mm.models.heads import zero_shot_head
from zepad_mm.utils.io import ASSETS

ROOT = Path(__file__).parents[2]
EPSILON = 4 / 255
WEAK = Strength(
    steps=2, opening_steps=1, margin_steps=2, random_steps=2, target_steps=1, targets=1, pgd_steps=2, draws=2
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """A tiny CLIP with its tuned copy, and images."""
    source = write_clip(tmp_path_factory.mktemp("clip"))
    encoder, text = load_clip(source)
    model, head = make_zepad(source), zero_shot_head(text, CLASSES)
    robust = model.branch("full").encoder
    return Parts(EncoderWithHead(encoder, head), EncoderWithHead(robust, head), model, images(8, 1), (encoder, robust))


def images(count: int, seed: int = 0, side: int = 32) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=DEFENCES.names())
def defence(request: pytest.FixtureRequest, parts: Parts) -> Defence:
    return DEFENCES.get(request.param)(parts).eval()


def test_defence_answers_every_image_for_itself(defence: Defence) -> None:
    batch = images(4)
    logits = defence(batch)
    assert logits.shape == (4, len(CLASSES))
    assert logits.isfinite().all()
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        defence(batch * 255)
    if not defence.random:
        torch.testing.assert_close(logits[1:2], defence(batch[1:2]), rtol=1e-3, atol=1e-3)


def test_every_path_of_a_defence_has_a_gradient(defence: Defence) -> None:
    for path in defence.paths():
        batch = images(4).requires_grad_(True)
        logits = path.model(batch)
        assert logits.shape == (4, len(CLASSES)), path.name
        (gradient,) = torch.autograd.grad(logits.log_softmax(-1)[:, 0].sum(), batch)
        assert gradient.isfinite().all(), path.name
        assert (gradient.flatten(1).abs().amax(1) > 0).all(), path.name


def test_adaptive_attack_is_at_least_as_strong_as_the_authors_one(defence: Defence, parts: Parts) -> None:
    batch = images(6, 2)
    labels = defence(batch).argmax(-1)
    made = transferred(parts, batch, labels, EPSILON, WEAK) | {"universal": batch}
    examples = authors_attack(defence, batch, labels, EPSILON, WEAK, made)
    assert float((examples - batch).abs().max()) <= EPSILON + 1e-6
    found = adaptive_attack(defence, batch, labels, EPSILON, WEAK, made)
    after = list(found.after.values())
    after = after[:-1] if defence.random else after  # the last one is scored by new answers
    assert after == sorted(after, reverse=True)
    if not defence.random:
        assert bool((found.right <= share_right(defence, examples, labels, WEAK)).all())


class Constant(nn.Module):
    """Class 1 with a given probability, whatever the image."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, batch: Tensor) -> Tensor:
        return nn.functional.one_hot((torch.rand(len(batch)) < self.probability).long(), 2).float()


def test_certificate_grows_with_the_share_of_votes_and_abstains_at_half() -> None:
    torch.manual_seed(0)
    radii = []
    for probability in (0.5, 0.8, 1.0):
        chosen, radius = Smoothing(Constant(probability), sigma=0.25).certify(images(3, side=8), draws=400)
        radii.append(float(radius.max()))
        assert probability == 0.5 or bool((chosen == 1).all())
    assert radii[0] == 0 < radii[1] < radii[2]
    assert radii[2] == pytest.approx(0.25 * 2.12, abs=0.01)  # 0.001 ** (1 / 400) is the bound without a dissenting vote


def test_filter_and_perspective_keep_what_they_should() -> None:
    flat = torch.full((2, 3, 16, 16), 0.5)
    torch.testing.assert_close(low_pass(flat, 4.0), flat)
    assert float(low_pass(images(2, side=16), 2.0).std()) < float(images(2, side=16).std())
    torch.testing.assert_close(random_perspective(images(2, side=16), 0.0), images(2, side=16), rtol=0, atol=1e-4)
    assert float(random_perspective(torch.ones(2, 3, 16, 16), 0.5).mean()) < 1  # black outside


def test_table_is_measured_packed_resumed_and_written(tmp_path: Path, parts: Parts) -> None:
    clip = parts.undefended.encoder.source
    parts.defended.save_pretrained(tmp_path / "model")
    main(["--data-root", str(ASSETS), "--tasks", "clothing", "--n", "4", "--pack", str(tmp_path / "images.parquet")])
    rows = read_rows(tmp_path / "images.parquet", "clothing", "test")
    assert rows.files == read_rows(ASSETS, "clothing", "test").sample(4, 0).files
    words = [
        "--model",
        str(tmp_path / "model"),
        "--clip",
        clip,
        "--images",
        str(tmp_path / "images.parquet"),
        "--smoke",
    ]
    words += [
        "--tasks",
        "clothing",
        "--n",
        "4",
        "--defences",
        "undefended",
        "robust",
        "ours",
        "smoothing",
        "model/lora",
    ]
    words += [
        "--out",
        str(tmp_path / "r.json"),
        "--docs",
        str(tmp_path / "r.md"),
        "--figure",
        str(tmp_path / "r.png"),
        "--work",
        str(tmp_path / "work"),
    ]
    main(words)
    record = json.loads((tmp_path / "r.json").read_text())
    columns = {(cell["defence"], cell["column"], cell["epsilon"]) for cell in record["cells"]}
    assert {("ours", "clean", None), ("ours", "T1", 10 / 255), ("ours", "adaptive", 1 / 255)} <= columns
    assert ("model/lora", "authors", EPSILON) in columns
    assert ("ours", "authors", EPSILON) in columns
    assert all(cell["n"] == 4 and cell["ci_low"] <= cell["accuracy"] <= cell["ci_high"] for cell in record["cells"])
    assert "| this project's model" in (tmp_path / "r.md").read_text()
    assert (tmp_path / "r.png").stat().st_size > 10_000
    cells = record["cells"]
    main([*words, "--epsilons", "4/255", "--out", str(tmp_path / "strong.json")])
    strong = json.loads((tmp_path / "strong.json").read_text())["cells"]
    assert [cell for cell in cells if cell["epsilon"] != 1 / 255] == strong  # what is there is not measured again
    left = next((tmp_path / "work" / "cells").glob("*ours*base*"))
    left.unlink()
    main(words)
    again = json.loads((tmp_path / "r.json").read_text())["cells"]
    timed = ("seconds", "ms_per_image")
    assert [{key: value for key, value in cell.items() if key not in timed} for cell in again] == [
        {key: value for key, value in cell.items() if key not in timed} for cell in record["cells"]
    ]
    with pytest.raises(ValueError, match="seed"):
        main([*words, "--seed", "1"])
    for wrong, message in (
        (["--defences", "nothing"], "nothing"),
        (["--caps", "2"], r"caps: expected shares in \[0, 1\], got 2.0"),
        (["--n", "0"], "n: expected at least 1, got 0"),
        (["--images", str(tmp_path / "none")], "expected a folder of parquet folders"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            main([*words, *wrong])


@pytest.mark.skipif(not PAGE.is_file(), reason="the table is measured on a GPU")
def test_committed_page_is_that_of_the_committed_record() -> None:
    record = json.loads((ROOT / "results" / "cross_defence.json").read_text())
    assert PAGE.read_text() == page(record)
