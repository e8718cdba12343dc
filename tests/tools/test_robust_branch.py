"""The pack of training images, and a robust branch that is tuned on it for a few steps."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from tools import pack_images, packed_gate, robust_branch
from tools.wordnet_clip.images import PACKED
from zepad_mm.encoders import load_encoder
from zepad_mm.training import load_gate, load_tuned
from zepad_mm.utils.io import read_json, write_tensors

NAMES = ["cat", "dog"]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every source with two classes, and a test split that is not an image and so must not be read."""
    root = tmp_path_factory.mktemp("sets")
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=NAMES)})
    draw = torch.Generator().manual_seed(0)
    for source in pack_images.SOURCES:
        (root / source).mkdir()
        (root / source / "test-0.parquet").write_bytes(b"never read")
        held = PACKED.get(source, (0, 0))[1]
        side = 144 if held == 0 else 64
        splits = {"train": 2 * (held + 5), **({"validation": 6} if held == 0 else {})}
        if source == "clothing":
            splits |= {"surrogate": 4, "train": 6}
        for split, count in splits.items():
            rows = []
            for _ in range(count):
                buffer = io.BytesIO()
                coarse = (torch.rand(8, 8, 3, generator=draw) * 255).byte().numpy()
                Image.fromarray(coarse).resize((side, side)).save(buffer, "JPEG")
                rows.append({"bytes": buffer.getvalue(), "path": None})
            table = Dataset.from_dict({"image": rows, "label": [row % 2 for row in range(count)]}, features)
            table.to_parquet(root / source / f"{split}-0.parquet")
    return root


@pytest.fixture(scope="module")
def packed(data_root: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_images, "ASSETS", data_root)  # where the photos of clothes are
        pack_images.pack(data_root, data_root / "images.parquet")
    return data_root / "images.parquet"


def test_pack_holds_training_and_validation_images_of_every_source(
    packed: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, validation = (pack_images.unpack(packed, part, 64) for part in ("train", "validation"))
    assert train.class_names == tuple(NAMES)
    for part, counts in ((train, [8, 8, 8, 8]), (validation, [80, 30, 6, 6])):
        assert part.pixels.shape[1:] == (3, 64, 64)
        assert part.pixels.dtype == torch.uint8
        assert torch.bincount(part.source).tolist() == counts
        assert torch.equal(torch.bincount(part.of("clothing").labels), torch.tensor([counts[3] // 2] * 2))
    size = packed.stat().st_size
    monkeypatch.setattr(pack_images, "ASSETS", data_root)
    small = pack_images.pack(data_root, data_root / "small.parquet", quality=30, largest=0.8 * size / 1e6)
    assert small < 0.85 * size
    pack_images.pack(data_root, data_root / "exact.parquet", pack_images.AS_IT_IS, parts=("gate", "validation"))
    files = pq.read_table(data_root / "exact.parquet")["image"].to_pylist()
    assert all(file.startswith(b"\xff\xd8") for file in files)  # the JPEG files themselves
    assert pack_images.unpack(data_root / "exact.parquet", "gate", 64).pixels.shape[1:] == (3, 64, 64)
    few = pack_images.unpack(data_root / "small.parquet", "validation", 64)
    assert len(few.labels) == len(validation.labels)


def test_mosaic_holds_four_images(packed: Path) -> None:
    train = pack_images.unpack(packed, "train", 64)
    made = pack_images.mosaics(train, 5, torch.Generator().manual_seed(0))
    assert made.shape == (5, 3, 64, 64)
    small = pack_images._to_side(train.pixels, 32)
    quarter = made[3, :, 32:, :32]
    assert any(torch.equal(quarter, one) for one in small)


def test_robust_branch_is_tuned_and_read_back(
    packed: Path, clip_source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, text = ["--clip", clip_source], "rho=0.1,universal_share=0.5,universal_count=2"
    start = load_encoder(clip_source).state_dict()
    write_tensors(tmp_path / "start.safetensors", start, {})
    few = ["--start", str(tmp_path / "start.safetensors"), "--mosaics", "4"]
    few += ["--steps", "2", "--batch-size", "4", "--attack-steps", "1", "--limit", "8"]
    words = ["robust_branch", *clip, "--images", str(packed), "--out", str(tmp_path), *few]
    monkeypatch.setattr("sys.argv", [*words, "--only", text])
    (tmp_path / "work").mkdir()
    robust_branch.main()
    setting = robust_branch.Setting.parse(text)
    found = read_json(tmp_path / "work" / f"{setting.name}.json")
    assert found["settings"]["steps"] == 2
    assert set(found["validation"]) == set(pack_images.SOURCES)
    assert {"original", "clean", "universal", "transfer", "own"} <= found["validation"]["imagenet20"].keys()
    assert robust_branch.choose({setting.name: found}) == setting.name
    weights, out = tmp_path / f"{setting.name}.safetensors", tmp_path / "tuned"
    monkeypatch.setattr("sys.argv", ["robust_branch", *clip, "--weights", str(weights), "--out", str(out)])
    robust_branch.main()
    gate = tmp_path / "gate"
    paths = ["--robust", str(out), "--images", str(packed), "--out", str(gate)]
    monkeypatch.setattr("sys.argv", ["packed_gate", *paths, "--public", clip_source, "--limit", "8"])
    packed_gate.main()
    assert load_gate(gate / "gate.safetensors").config.threshold is not None
    assert {"mosaics", "caltech69 validation"} <= read_json(gate / "gate.json")["images"].keys()
    public, tuned = load_tuned(out), robust_branch.read_weights(clip_source, weights)
    assert all(torch.equal(a, b) for a, b in zip(public.parameters(), tuned.parameters(), strict=True))
    halfway = ["--start", str(tmp_path / "start.safetensors"), "--share", "0.5", "--out", str(tmp_path / "halfway")]
    monkeypatch.setattr("sys.argv", ["robust_branch", *clip, "--weights", str(weights), *halfway])
    robust_branch.main()
    name, weight = next(iter(tuned.named_parameters()))
    mean = (start[name] + weight) / 2
    assert torch.allclose(load_tuned(tmp_path / "halfway").state_dict()[name], mean, atol=1e-6)
    monkeypatch.setattr("sys.argv", ["robust_branch", *clip, "--weights", str(weights), "--out", "x", "--share", "0.5"])
    with pytest.raises(SystemExit, match="together with --start"):
        robust_branch.main()


def test_choice_is_the_most_robust_setting_that_loses_little() -> None:
    def setting(clean: float, robust: float) -> dict[str, dict[str, dict[str, float]]]:
        one = {"original": 0.8, "clean": clean, "universal": robust, "own": robust}
        return {"validation": {"imagenet20": one, "caltech69": one}}

    found = {"weak": setting(0.79, 0.3), "good": setting(0.74, 0.5), "lossy": setting(0.6, 0.6)}
    assert robust_branch.choose(found) == "good"
    assert robust_branch.choose({"lossy": found["lossy"]}) == "lossy"
    assert robust_branch.choose({}) is None
