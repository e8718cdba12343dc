"""The SSL recipes: every shipped configuration parses, the smoke ones run from end to end, a killed run goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightly")
ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes" / "configs"
sys.path.insert(0, str(ROOT / "recipes"))

import pretrain_ssl  # noqa: E402
import ssl_story  # noqa: E402

from zepad_mm.encoders import load_encoder  # noqa: E402
from zepad_mm.files import read_tensors  # noqa: E402
from zepad_mm.model import ZePAD  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _configs(name: str) -> list[Path]:
    return sorted([*CONFIGS.glob(f"{name}*.yaml"), *(CONFIGS / "smoke").glob(f"{name}*.yaml")])


@pytest.mark.parametrize("path", _configs("pretrain_ssl"), ids=lambda path: path.stem)
def test_pretrain_configs_parse(path: Path):
    assert isinstance(pretrain_ssl.parse(["--config", str(path)]).lr, float)


@pytest.mark.parametrize("path", _configs("ssl_story"), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_story_configs_parse(path: Path):
    config = ssl_story.parse(["--config", str(path)])
    assert isinstance(config.train, ssl_story.TrainSettings)
    assert {"undefended", "zepad", "zepad:rfdm"} <= set(ssl_story.lineup(config))


@pytest.mark.parametrize("recipe", [pretrain_ssl, ssl_story], ids=lambda recipe: recipe.__name__)
def test_unknown_keys_are_rejected(recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "typo.yaml"
    smoke = CONFIGS / "smoke" / f"{recipe.__name__}.yaml"
    path.write_text(smoke.read_text() + "sede: 1\n")
    with pytest.raises(SystemExit):
        recipe.parse(["--config", str(path)])
    assert "sede" in capsys.readouterr().err


def test_print_config_shows_every_setting(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        pretrain_ssl.parse(["--config", str(CONFIGS / "smoke" / "pretrain_ssl.yaml"), "--print_config"])
    assert "temperature: 0.2" in capsys.readouterr().out


def test_bad_method_is_named():
    with pytest.raises(ValueError, match="simclr, byol"):
        pretrain_ssl.Settings(data="embedded", out="x", method="simclear")


def test_augment_is_a_view_of_the_batch():
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    views = [pretrain_ssl.augment(images, 0.2, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert views[0].shape == images.shape
    assert 0 <= float(views[0].min()) <= float(views[0].max()) <= 1
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


@pytest.mark.parametrize("method", pretrain_ssl.METHODS)
def test_every_method_trains(method: str, tmp_path: Path):
    smoke = ["--config", str(CONFIGS / "smoke" / "pretrain_ssl.yaml"), "--n", "80", "--epochs", "1"]
    report = pretrain_ssl.main([*smoke, "--batch_size", "32", "--method", method, "--out", str(tmp_path)])
    assert report["n_train"] == 72
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["epoch"] == 1
    encoder = load_encoder(f"timm:local-dir:{tmp_path / 'encoder'}")
    assert encoder.preprocess.image_size == 32
    assert encoder(torch.rand(2, 3, 32, 32)).shape == (2, 256)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "metrics.jsonl", "pretrain.json"]


def test_killed_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    smoke = ["--config", str(CONFIGS / "smoke" / "pretrain_ssl.yaml"), "--n", "80", "--method", "byol"]
    smoke += ["--batch_size", "32", "--epochs", "2"]
    pretrain_ssl.main([*smoke, "--out", str(tmp_path / "whole")])
    save = pretrain_ssl.save_state

    def save_and_die(*arguments) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain_ssl, "save_state", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        pretrain_ssl.main([*smoke, "--out", str(tmp_path / "killed")])
    monkeypatch.setattr(pretrain_ssl, "save_state", save)
    with pytest.raises(ValueError, match="seed"):
        pretrain_ssl.main([*smoke, "--out", str(tmp_path / "killed"), "--seed", "9"])
    pretrain_ssl.main([*smoke, "--out", str(tmp_path / "killed")])
    whole, killed = (read_tensors(tmp_path / run / "encoder" / "model.safetensors")[0] for run in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.slow
def test_two_processes(tmp_path: Path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    smoke = ["recipes/pretrain_ssl.py", "--config", "recipes/configs/smoke/pretrain_ssl.yaml", "--batch_size", "32"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    arguments = ["--num_processes", "2", "--epochs", "1", "--out", str(tmp_path)]
    subprocess.run([*launch, *smoke, *arguments], cwd=ROOT, env=environment, check=True, timeout=240)
    assert json.loads((tmp_path / "pretrain.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_story_from_end_to_end(tmp_path: Path):
    out, result = tmp_path / "run", tmp_path / "result"
    command = [sys.executable, "recipes/ssl_story.py", "--config", "recipes/configs/smoke/ssl_story.yaml"]
    command += ["--out", str(out), "--result", str(result)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=240)
    first = json.loads(result.with_suffix(".json").read_text())
    finished = {path: path.stat().st_mtime_ns for path in out.glob("task-*.json")}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=240)
    assert finished == {path: path.stat().st_mtime_ns for path in out.glob("task-*.json")} != {}
    assert json.loads(result.with_suffix(".json").read_text())["rows"] == first["rows"]
    report = json.loads(result.with_suffix(".json").read_text())
    assert str(tmp_path) not in json.dumps(report)
    assert {row["threat"] for row in report["rows"]} == {"clean", "T1", "T1b", "T2"}
    assert all(0 <= row["ci_low"] <= row["accuracy"] <= row["ci_high"] <= 1 for row in report["rows"])
    own = {row["model"]: row["accuracy"] for row in report["rows"] if "pgd" in row["attack"]}
    worst = {row["model"]: row["accuracy"] for row in report["rows"] if row["attack"] == "worst"}
    assert own.keys() == worst.keys()
    assert all(worst[model] <= own[model] for model in own)
    assert {row["score"] for row in report["detection"]} == {"confidence_gap", "jensen_shannon"}
    assert "| zepad:rfdm |" in result.with_suffix(".md").read_text()
    model = ZePAD.from_pretrained(out / "zepad-clothing")
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, len(model.class_names))


def test_records_name_no_folders():
    record = {
        "data": "/srv/x/cifar10",
        "source": "timm:local-dir:/a/b/encoder",
        "hub": "uoft-cs/cifar10",
        "n": [4 / 255],
    }
    expected = {"data": "cifar10", "source": "timm:local-dir:encoder", "hub": "uoft-cs/cifar10", "n": [4 / 255]}
    assert ssl_story.without_folders(record) == expected
