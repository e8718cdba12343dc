"""Lazy import, strict configs, registries, atomic files, prompts and data sources."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from PIL import Image

import zepad_mm
from zepad_mm.data import LabelledImages, load_data, load_embedded, to_tensor
from zepad_mm.encoders.prompts import clean_name, templates_of
from zepad_mm.utils.config import Config
from zepad_mm.utils.io import read_json, read_tensors, replacing, write_json, write_tensors
from zepad_mm.utils.registry import Registry


def test_the_top_level_is_lazy() -> None:
    code = (
        "import sys, zepad_mm; "
        "heavy = {'torch', 'transformers', 'open_clip', 'timm', 'datasets', 'peft'} & set(sys.modules); "
        "assert not heavy, heavy; assert zepad_mm.__version__; assert 'ZePAD' in dir(zepad_mm)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    for name in zepad_mm.__all__:
        assert getattr(zepad_mm, name) is not None
    with pytest.raises(AttributeError, match="public names"):
        zepad_mm.Zepad  # noqa: B018


def test_registry_errors_suggest_names() -> None:
    registry: Registry[int] = Registry("number")
    registry.register("one")(1)
    with pytest.raises(ValueError, match="registered already"):
        registry.register("one")(2)
    with pytest.raises(ValueError, match="unknown number 'onne'; did you mean 'one'"):
        registry.get("onne")
    assert list(registry) == ["one"]
    assert "two" not in registry


@dataclass(frozen=True, kw_only=True)
class Inner(Config):
    rate: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Outer(Config):
    name: str
    sizes: tuple[int, ...] = (1,)
    inner: Inner = field(default_factory=Inner)
    limit: float | None = None
    layers: int | str | None = None


def test_config_is_strict() -> None:
    config = Outer(name="a", sizes=(1, 2), inner=Inner(rate=1.0), limit=3.0)
    assert Outer.from_dict(config.to_dict()) == config
    assert Outer.from_dict({"name": "a", "inner": {"rate": 1}}).inner.rate == 1.0
    assert [Outer.from_dict({"name": "a", "layers": v}).layers for v in (3, "last", None)] == [3, "last", None]
    for bad, message in (
        ({"name": "a", "inner": {"raet": 1}}, "Inner has no key 'raet'; did you mean 'rate'"),
        ({}, "lacks the keys 'name'"),
        ({"name": 3}, "wants str"),
        ({"name": "a", "layers": 1.5}, "wants int"),
        ({"name": "a", "sizes": "12"}, "wants a list"),
        ({"name": "a", "inner": {"rate": "1e-3"}}, "wants float"),
        ({"name": "a", "inner": 3}, "wants a dictionary"),
    ):
        with pytest.raises(ValueError, match=message):
            Outer.from_dict(bad)


def test_replacing_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def killed() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("killed here")

    with pytest.raises(RuntimeError):
        killed()
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}


def test_write_tensors_accepts_shared_memory(tmp_path: Path) -> None:
    row = torch.arange(4.0)
    write_tensors(tmp_path / "a.safetensors", {"row": row, "same": row, "slice": row[1:3]})
    read, _ = read_tensors(tmp_path / "a.safetensors")
    assert {key: tensor.tolist() for key, tensor in read.items()} == {
        "row": [0, 1, 2, 3],
        "same": [0, 1, 2, 3],
        "slice": [1, 2],
    }


def test_prompts() -> None:
    assert templates_of("single") == ("a photo of a {}.",)
    assert templates_of("a {}") == ("a {}",)
    assert clean_name(" T_shirt  red") == "T shirt red"
    with pytest.raises(ValueError, match="the list is empty"):
        templates_of([])


def test_data_from_class_folders_and_parquet(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        for name, colour in (("red_ball", "red"), ("blue", "blue")):
            folder = tmp_path / "folders" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (20 + index, 10), colour).save(folder / f"{index}.png")
    data = load_data(str(tmp_path / "folders"), "train", image_size=16)
    assert data.class_names == ("blue", "red ball")
    assert data.images.shape == (6, 3, 16, 16)
    assert set(data.labels.tolist()) == {0, 1}
    torch.testing.assert_close(data.images[data.labels == 1].mean((0, 2, 3)), torch.tensor([1.0, 0.0, 0.0]))
    with pytest.raises(FileNotFoundError, match="neither a folder here nor reachable"):
        load_data("no-such-owner/no-such-set", "train")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_data(str(tmp_path / "nowhere"), "train")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "train-0.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match="not a complete parquet file"):
        load_data(str(tmp_path / "cut"), "train")
    with pytest.raises(FileNotFoundError, match="no split 'test'; it has train"):
        load_data(str(tmp_path / "cut"), "test")


def test_embedded_splits_are_disjoint() -> None:
    seen: dict[bytes, str] = {}
    for split in ("surrogate", "train", "validation", "test"):
        images, labels = load_embedded(split)
        assert images.shape[1:] == (3, 64, 64)
        assert set(labels.tolist()) == set(range(10))
        for image in images:
            key = (image * 255).byte().numpy().tobytes()
            assert seen.setdefault(key, split) == split
    assert len(load_embedded("test")[0]) >= 500
    few, _ = load_embedded("test", n=7)
    assert len(few) == 7
    with pytest.raises(ValueError, match="positive"):
        load_embedded("test", n=0)
    with pytest.raises(FileNotFoundError, match="no split 'tset'"):
        load_embedded("tset")


def test_sample_depends_on_the_seed() -> None:
    data = LabelledImages(torch.rand(10, 3, 2, 2), torch.arange(10), ("a",), "x")
    assert data.sample(4, seed=1).labels.tolist() == data.sample(4, seed=1).labels.tolist()
    assert data.sample(4, seed=1).labels.tolist() != data.sample(4, seed=2).labels.tolist()
    assert len(data.sample(None)) == 10
    assert [len(y) for _, y in data.batches(4)] == [4, 4, 2]
    assert to_tensor(Image.new("L", (3, 2))).shape == (3, 2, 3)
