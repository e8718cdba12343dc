"""One conversion of images for every path, and the resize rule."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from tests.helpers.models import CLASSES, make_zepad, write_clip
from zepad_mm.classifier import RobustZeroShotClassifier, pixels_of
from zepad_mm.data import load_data, open_images, stream_images
from zepad_mm.defend import DefendSettings, _load_splits
from zepad_mm.encoders import Preprocess
from zepad_mm.evaluation import EvalData, EvalSettings
from zepad_mm.evaluation.subjects import resize_of
from zepad_mm.training import DataSettings
from zepad_mm.utils.images import Resize, as_resize, read_image, to_tensor

RAMP = np.linspace(0, 1, 256).reshape(16, 16)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray((RAMP * 255).astype(np.uint8)), "PNG", exif=exif)


def grey_palette() -> Image.Image:
    return Image.fromarray((RAMP * 255).astype(np.uint8)).convert("P")


def with_alpha(mode: str) -> Image.Image:
    image = Image.fromarray((RAMP * 255).astype(np.uint8)).convert(mode)
    image.putalpha(7)
    return image


GREY = torch.tensor(RAMP, dtype=torch.float32).expand(3, -1, -1)
RED = torch.eye(3)[0].expand(16, 16, 3).movedim(2, 0)
FILES = {
    "8-bit grey": (encoded(Image.fromarray((RAMP * 255).astype(np.uint8)), "PNG"), GREY),
    "16-bit PNG": (encoded(Image.fromarray((RAMP * 65535).astype(np.uint16)), "PNG"), GREY),
    "16-bit TIFF": (encoded(Image.fromarray((RAMP * 65535).astype(np.uint16)), "TIFF"), GREY),
    "float TIFF": (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), GREY),
    "palette": (encoded(grey_palette(), "PNG"), GREY),
    "palette with transparency": (encoded(grey_palette(), "PNG", transparency=bytes(range(256))), GREY),
    "grey and alpha": (encoded(with_alpha("L"), "PNG"), GREY),
    "alpha": (encoded(with_alpha("RGB"), "PNG"), GREY),
    "CMYK": (encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF"), RED),
    "bilevel": (encoded(Image.new("1", (16, 16), 1), "PNG"), torch.ones(3, 16, 16)),
    "EXIF orientation": (rotated(), GREY.rot90(-1, (1, 2))),
    "animation": (
        encoded(Image.new("L", (16, 16), 255), "GIF", save_all=True, append_images=[Image.new("L", (16, 16), 0)]),
        torch.ones(3, 16, 16),
    ),
}  # fmt: skip
REFUSED = {
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n", "expected one of the formats PNG, JPEG"),
    "32-bit integers": (encoded(Image.new("I", (16, 16), 70000), "TIFF"), "mode is 'I'"),
    "floats beyond 1": (encoded(Image.new("F", (16, 16), 200.0), "TIFF"), r"from 200 to 200; expected \[0, 1\]"),
    "NaN": (encoded(Image.new("F", (16, 16), float("nan")), "TIFF"), r"expected \[0, 1\]"),
    "truncated": (encoded(Image.effect_noise((99, 99), 50), "PNG")[:120], "could not be read as an image"),
    "a page": (b"<html>404</html>", "expected one of the formats"),
    "nothing": (b"", "could not be read as an image: (expected one|the file is empty)"),
    "too large": (encoded(Image.new("1", (9500, 9500)), "PNG"), r"9500 x 9500 pixels, more than the limit"),
}


def stored(content: bytes, folder: Path) -> None:
    """A class folder and a parquet file with the image as its row 1."""
    good = FILES["8-bit grey"][0]
    for number, data in enumerate((good, content)):
        path = folder / "folders" / "train" / "a" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "folders" / "train" / "b").mkdir()
    (folder / "folders" / "train" / "b" / "0.png").write_bytes(good)
    rows = [{"bytes": data, "path": None} for data in (good, content)]
    features = Features({"image": ImageFeature(decode=False), "label": ClassLabel(names=["a"])})
    table = Dataset.from_dict({"image": rows, "label": [0, 0]}, features).cast_column("image", ImageFeature())
    (folder / "parquet").mkdir()
    table.to_parquet(folder / "parquet" / "train.parquet")


def paths_of(content: bytes, folder: Path) -> dict[str, Any]:
    """Every way of reading the image at 16 pixels, as functions."""
    stored(content, folder)
    file = folder / "folders" / "train" / "a" / "1.png"
    rule = Resize(image_size=16)
    return {
        "read_image": lambda: read_image(file, "it", rule),
        "path": lambda: rule.resize(pixels_of(file)[None])[0],
        "bytes": lambda: rule.resize(pixels_of(content)[None])[0],
        "folder in memory": lambda: load_data(str(folder / "folders"), "train", rule).images[1],
        "folder on disk": lambda: open_images(str(folder / "folders"), "train", rule).fetch(torch.tensor([1]))[0],
        "parquet in memory": lambda: load_data(str(folder / "parquet"), "train", rule).images[1],
        "parquet on disk": lambda: open_images(str(folder / "parquet"), "train", 16).fetch(torch.tensor([1]))[0],
        "parquet streamed": lambda: streamed(str(folder / "parquet"), rule),
    }


def streamed(source: str, rule: Resize) -> torch.Tensor:
    rows = stream_images(source, "train", rule, shuffle_buffer=1).rows(0, 1, 0)
    return [next(rows)[0] for _ in range(2)][1]


@pytest.mark.parametrize("kind", list(FILES))
def test_every_path_gives_the_same_pixels(kind: str, tmp_path: Path) -> None:
    content, expected = FILES[kind]
    read = {name: function() for name, function in paths_of(content, tmp_path).items()}
    for name, pixels in read.items():
        assert torch.equal(pixels, read["read_image"]), name
    torch.testing.assert_close(read["read_image"], expected, atol=1 / 255, rtol=0)


@pytest.mark.parametrize("kind", list(REFUSED))
def test_every_path_refuses_by_name_what_is_not_converted(kind: str, tmp_path: Path) -> None:
    content, message = REFUSED[kind]
    for name, read in paths_of(content, tmp_path).items():
        with pytest.raises(ValueError, match=message) as error:
            read()
        assert "0x" not in str(error.value), name
        if "folder" in name:
            assert str(Path("a") / "1.png") in str(error.value)
        if "parquet" in name:
            assert "row 1" in str(error.value) or "row 2" in str(error.value)


def test_pil_images_are_converted_as_their_files_are() -> None:
    for content, _ in FILES.values():
        with Image.open(io.BytesIO(content)) as image:
            assert torch.equal(to_tensor(image), pixels_of(content))
    with pytest.raises(ValueError, match="EPS, which is a program"):
        pixels_of(Image.open(io.BytesIO(REFUSED["EPS"][0])))


@pytest.mark.parametrize("mode", ["squash", "shortest"])
def test_data_and_classifier_show_the_encoder_the_same_pixels(mode: Any, tmp_path: Path) -> None:
    """An image that is not square: evaluated, calibrated on and classified."""
    folder = tmp_path / "clip"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8)
    stored(encoded(Image.fromarray(noise), "PNG"), tmp_path)
    model = make_zepad(write_clip(folder))
    classifier, encoder = RobustZeroShotClassifier(model), model.undefended.encoder
    size = encoder.preprocess.image_size
    rule = Preprocess(
        image_size=size, mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode=mode,
        resize_size=None if mode == "squash" else size + 8,
    )  # fmt: skip
    for one in (encoder, *(branch.encoder for branch in model.branches.values())):
        one.preprocess = rule
    resize = resize_of(model)
    assert resize == rule.geometry
    settings = EvalSettings(threats=("clean",), test_split="train", validation_split="train")
    evaluated = EvalData.load(str(tmp_path / "folders"), settings, resize).test.images
    path = tmp_path / "folders" / "train" / "a" / "1.png"
    assert torch.equal(evaluated[1], rule.resize(pixels_of(path)[None])[0])
    assert classifier(path, CLASSES) == classifier(evaluated[1], CLASSES)
    assert torch.equal(rule.resize(evaluated), evaluated)
    tuned, _ = DataSettings(source=str(tmp_path / "folders"), validation_split="train").load(0, encoder.preprocess)
    assert torch.equal(tuned.fetch(torch.arange(len(tuned))), evaluated)
    _, calibrated = _load_splits(str(tmp_path / "folders"), DefendSettings(), encoder.preprocess)
    assert any(torch.equal(image, shown) for image in calibrated.images for shown in evaluated)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 997)])
def test_resize_crops_thin_images_before_it_enlarges_them(size: tuple[int, int]) -> None:
    column = torch.linspace(0, 1, max(size))
    image = column.expand(1, 3, min(size), -1) if size[0] < size[1] else column[:, None].expand(1, 3, -1, min(size))
    found = Resize(image_size=224, resize_mode="shortest", resize_size=256).resize(image)
    assert found.shape == (1, 3, 224, 224)
    assert float(found.mean()) == pytest.approx(0.5, abs=1e-3)


def test_resize_crops_first_where_the_libraries_crop_last(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.rand(1, 3, 5, 200, generator=torch.Generator().manual_seed(0))
    for rule in (
        Resize(image_size=16, resize_mode="shortest"),
        Resize(image_size=16, resize_mode="shortest", resize_size=19, centre="round", interpolation="bilinear"),
    ):
        found = rule.resize(image)
        with monkeypatch.context() as patch:
            patch.setattr("zepad_mm.utils.images.WIDEST", 1e9)
            torch.testing.assert_close(found, rule.resize(image), atol=1e-4, rtol=0)


def test_rule_at_another_size_keeps_the_crop_to_the_encoder() -> None:
    preprocess = Preprocess(
        image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode="shortest", resize_size=20, centre="round"
    )
    assert preprocess.at(None) == preprocess.at(16) == preprocess.geometry
    assert preprocess.at(8) == Resize(image_size=8, resize_mode="shortest", centre="round")
    assert as_resize(8) == Resize(image_size=8)
    with pytest.raises(ValueError, match="at least 1 x 1 pixels"):
        preprocess.resize(torch.zeros(1, 3, 0, 4))
