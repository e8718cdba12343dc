"""Pre-training: every config parses, methods train, and a killed run resumes to the same weights."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import timm
import torch

from recipes import pretrain
from reproduction import build_ssl_zoo, ssl_study
from tools import image_tower
from zepad_mm import pretraining
from zepad_mm.encoders import load_encoder
from zepad_mm.models.zepad import ZePAD
from zepad_mm.pretraining.contrastive import supervised_contrastive
from zepad_mm.pretraining.distillation import relational_loss
from zepad_mm.pretraining.redundancy import iterative_whitening, normalised_covariance
from zepad_mm.utils import progress
from zepad_mm.utils.io import read_tensors

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _configs(name: str) -> list[Path]:
    return sorted([*CONFIGS.glob(f"{name}*.yaml"), *(CONFIGS / "smoke").glob(f"{name}*.yaml")])


@pytest.mark.parametrize("name", ["ssl_study", "ssl_study_smoke"])
def test_ssl_study_config_parses(name: str):
    config = ssl_study.StudySettings.from_cli(["--config", str(ROOT / "reproduction" / "configs" / f"{name}.yaml")])
    assert set(config.evaluation.threats) == {"T1", "T1b", "T2"}


def test_unknown_key_raises(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "typo.yaml"
    path.write_text((CONFIGS / "smoke" / "pretrain.yaml").read_text() + "sede: 1\n")
    with pytest.raises(SystemExit):
        pretrain.Settings.from_cli(["--config", str(path)])
    assert "sede" in capsys.readouterr().err


def test_print_config_shows_every_setting(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        pretrain.Settings.from_cli(["--config", str(CONFIGS / "smoke" / "pretrain.yaml"), "--print_config"])
    assert "temperature: 0.2" in capsys.readouterr().out


def test_unknown_method_raises():
    with pytest.raises(ValueError, match="did you mean 'simclr'"):
        pretrain.Settings(data="embedded", out="x", method="simclear")


def test_augment_is_seeded_and_in_range():
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    views = [pretrain.augment(images, 0.2, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert views[0].shape == images.shape
    assert 0 <= float(views[0].min()) <= float(views[0].max()) <= 1
    assert torch.equal(views[0], views[1])
    weak = pretrain.augment(images, 1.0, torch.Generator().manual_seed(1), colours=False)
    assert torch.allclose(weak.sort(-1).values.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=0.1)
    assert not torch.equal(views[0], views[2])


QUICK = ["--config", str(CONFIGS / "smoke" / "pretrain.yaml"), "--n", "80", "--batch_size", "32"]
QUICK += ["--hidden_dim", "64", "--projection_dim", "16", "--queue_size", "96", "--prototypes", "24"]
PAPER = {"w_mse", "byol", "nnclr", "simclr", "moco_v2_plus", "moco_v3", "supcon", "ressl", "dino", "swav", "vibcreg"}


def test_methods_of_the_paper_are_registered():
    assert set(pretraining.METHODS) >= PAPER


@pytest.mark.parametrize("method", ["moco_v2_plus"])
def test_killed_run_resumes_to_the_same_weights(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "EVERY", -1.0)
    arguments = [*QUICK, "--method", method, "--epochs", "2"]
    report = pretrain.main([*arguments, "--out", str(tmp_path / "whole")])
    assert report["n_train"] == 72
    written = ["encoder", "log.txt", "metrics.jsonl", "pretrain.json"]
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == written
    text = (tmp_path / "whole" / "log.txt").read_text()
    assert re.search(r"pre-training by moco_v2_plus: step \d+ of \d+, about \d+ s left", text), text
    assert "epoch 2 of 2: loss" in text
    save = pretrain.save_state

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    def save_and_interrupt(*arguments) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    for stop in (interrupt, save_and_interrupt):  # the row of the epoch is written, its state not yet; and then it is
        monkeypatch.setattr(pretrain, "save_state", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain.main([*arguments, "--out", str(tmp_path / "killed")])
        with (tmp_path / "killed" / "metrics.jsonl").open("a") as metrics:
            metrics.write('{"epoch": 2, "lo')  # a kill while the next row is written
    monkeypatch.setattr(pretrain, "save_state", save)
    with pytest.raises(ValueError, match="seed"):
        pretrain.main([*arguments, "--out", str(tmp_path / "killed"), "--seed", "9"])
    pretrain.main([*arguments, "--out", str(tmp_path / "killed")])
    whole, killed = (read_tensors(tmp_path / run / "encoder" / "model.safetensors")[0] for run in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    rows = [
        [json.loads(row) for row in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "killed")
    ]
    for key in ("epoch", "loss"):
        assert [row[key] for row in rows[1]] == [row[key] for row in rows[0]]
    assert [row["epoch"] for row in rows[1]] == [1, 2]
    encoder = load_encoder(f"timm:local-dir:{tmp_path / 'whole' / 'encoder'}")
    assert encoder.preprocess.image_size == 32
    assert encoder(torch.rand(2, 3, 32, 32)).shape == (2, 256)


def test_training_continues_from_given_weights(tmp_path: Path):
    """From its own rate of 0 the encoder is the given one; both are probed, and further images join the batches."""
    torch.manual_seed(0)
    small = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}
    pixels = {"input_size": (3, 32, 32), "mean": (0.4, 0.4, 0.4), "std": (0.3, 0.3, 0.3)}
    given = timm.create_model("resnet18", num_classes=0, pretrained_cfg_overlay=pixels, **small)
    pretraining.save_encoder(given, tmp_path / "given", small)
    source = f"timm:local-dir:{tmp_path / 'given'}"
    arguments = [*QUICK, "--epochs", "1", "--initial", source, "--arch_args", json.dumps(small)]
    report = pretrain.main([*arguments, "--lr", "0", "--more_data", '["embedded"]', "--out", str(tmp_path / "run")])
    assert report["n_train"] > 72
    assert report["config"]["initial"] == "timm:local-dir:given"
    assert report["config"]["more_data"] == ["clothing"]
    assert set(report["before"]) == {"knn_accuracy", "linear_accuracy"}
    assert [json.loads(row)["epoch"] for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [0, 1]
    encoder = load_encoder(f"timm:local-dir:{tmp_path / 'run' / 'encoder'}")
    assert encoder.preprocess.mean == (0.4, 0.4, 0.4)
    weights = dict(given.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in encoder.backbone.named_parameters())
    assert not torch.equal(encoder.backbone.bn1.running_mean, given.bn1.running_mean)
    with pytest.raises(ValueError, match="--arch_args"):
        pretrain.main([*QUICK, "--initial", source, "--out", str(tmp_path / "other")])


def test_image_tower_is_written_for_the_strong_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    whole = timm.create_model(image_tower.ARCH, pretrained=False)
    weights = {name: value for name, value in whole.state_dict().items() if "num_batches" not in name}
    monkeypatch.setattr(image_tower, "image_tower_weights", lambda: weights)
    image_tower.main(["--out", str(tmp_path / "tower")])
    encoder = load_encoder(f"timm:local-dir:{tmp_path / 'tower'}")
    assert (encoder.feature_dim, encoder.preprocess.image_size) == (1280, 64)
    assert encoder.preprocess.std == pytest.approx((128 / 255,) * 3)
    images = torch.rand(1, 3, 64, 64)
    whole.reset_classifier(0)
    with torch.no_grad():
        expected = whole.eval()((images * 255 - 127) / 128)
        assert torch.allclose(encoder(images), expected, atol=1e-4)


def test_the_zoo_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")

    assert set(build_ssl_zoo.METHODS) == set(build_ssl_zoo.PAPER_LINEAR) == PAPER
    smoke = ["--config", str(CONFIGS / "smoke" / "pretrain.yaml"), "--epochs", "1", "--out", str(tmp_path / "zoo")]
    smoke += ["--result", str(tmp_path / "table")]
    build_ssl_zoo.main([*smoke, "--methods", "supcon"])
    written = (tmp_path / "zoo" / "supcon" / "pretrain.json").stat().st_mtime_ns
    record = build_ssl_zoo.main([*smoke, "--methods", "w_mse", "supcon", "--half", str(tmp_path / "half")])
    assert (tmp_path / "zoo" / "supcon" / "pretrain.json").stat().st_mtime_ns == written
    assert list(record["rows"]) == ["w_mse", "supcon"]
    whole, half = (load_encoder(f"timm:local-dir:{tmp_path / name / 'supcon' / 'encoder'}") for name in ("zoo", "half"))
    image = torch.rand(1, 3, 32, 32)
    assert torch.allclose(whole(image), half(image), atol=0.01)
    assert (tmp_path / "table.md").read_text().count("\n| ") == 3


def test_running_statistics_are_kept_on_request():
    learner = _tiny("byol").train()
    learner.keep_statistics()
    modules = [*learner.encoder.modules(), *learner.target[0].modules()]
    assert not any(module.training for module in modules if isinstance(module, torch.nn.BatchNorm2d))
    before = learner.encoder.bn1.running_mean.clone()
    learner(torch.rand(8, 3, 32, 32), torch.rand(8, 3, 32, 32), torch.zeros(8, dtype=torch.long))
    assert torch.equal(learner.encoder.bn1.running_mean, before)
    assert learner.projector.training


def _tiny(method: str) -> pretraining.Learner:
    torch.manual_seed(0)
    encoder = timm.create_model("resnet18", num_classes=0, channels=[8, 8, 16, 16], layers=[1, 1, 1, 1])
    settings = pretraining.MethodSettings(hidden_dim=32, projection_dim=8, queue_size=64, prototypes=16)
    return pretraining.make_learner(method, encoder, settings)


@pytest.mark.parametrize("method", pretraining.METHODS)
def test_every_method_reduces_its_loss(method: str):
    """On one batch the loss falls, every trained parameter gets a gradient, and the target network gets none."""
    learner = _tiny(method)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(32, 3, 32, 32, generator=generator), torch.arange(32) % 4
    views = [pretraining.augment(images, 0.5, torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        loss = learner(*views, labels)
        optimizer.zero_grad()
        loss.backward()
        missing = [n for n, p in learner.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing
        optimizer.step()
        learner.after_step(0.9)
        losses.append(float(loss.detach()))
    assert min(losses[-3:]) < losses[1]
    assert learner.target is None or not any(p.requires_grad for p in learner.target.parameters())


@pytest.mark.parametrize("method", pretraining.METHODS)
def test_losses_are_in_float32_under_mixed_precision(method: str):
    learner = _tiny(method)
    images = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = learner(images, images.flip(-1), torch.arange(32) % 4)
    loss.backward()  # the whitening of W-MSE failed here on products in bf16
    assert loss.dtype is torch.float32
    assert loss.isfinite()
    for name, parameter in learner.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("method", pretraining.METHODS)
def test_state_dict_is_complete(method: str):
    """Queues, prototypes, centres and target networks are in the state dict, or a resumed run would differ."""
    learner, views = _tiny(method), torch.rand(2, 16, 3, 32, 32)
    labels = torch.arange(16) % 4
    learner(*views, labels).backward()
    learner.after_step(0.9)
    other = _tiny(method)
    other.load_state_dict(learner.state_dict())
    losses = []
    for one in (learner, other):
        torch.manual_seed(0)  # the whitening shuffles
        losses.append(float(one(*views, labels).detach()))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("method", ["moco_v2_plus", "nnclr", "ressl"])
def test_queues_are_in_the_state_dict(method: str):
    learner, names = _tiny(method), ("bank", "bank_ptr")
    before = {name: value.clone() for name, value in learner.state_dict().items() if name.endswith(names)}
    assert len(before) == 2
    learner(torch.rand(8, 3, 32, 32), torch.rand(8, 3, 32, 32), torch.zeros(8, dtype=torch.long)).backward()
    assert all(not torch.equal(value, learner.state_dict()[name]) for name, value in before.items())


def test_supervised_contrastive_equals_the_double_sum():
    generator = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(8, 5, generator=generator), dim=1)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2, 3])  # the last one has no positive
    expected = 0.0
    for i in range(8):
        others = [a for a in range(8) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        total = sum(math.exp(float(z[i] @ z[a]) / 0.1) for a in others)
        expected -= sum(float(z[i] @ z[p]) / 0.1 - math.log(total) for p in positives) / max(1, len(positives)) / 8
    found = supervised_contrastive(z, labels, z, labels, 0, 0.1)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    halves = [supervised_contrastive(z[i : i + 4], labels[i : i + 4], z, labels, i, 0.1) for i in (0, 4)]
    assert float(sum(halves) / 2) == pytest.approx(expected, rel=1e-5)


def test_iterative_whitening_decorrelates():
    z = torch.randn(256, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.linspace(0.5, 1.5, 6))
    white = iterative_whitening(z, steps=12)
    assert torch.allclose(white.T @ white / len(z), torch.eye(6), atol=1e-2)
    assert float(normalised_covariance(white)) < 1e-4 < float(normalised_covariance(z @ torch.rand(6, 6)))


def test_relational_loss_is_lowest_for_equal_embeddings():
    keys = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    others = torch.nn.functional.normalize(torch.randn(8, 32, generator=torch.Generator().manual_seed(2)), dim=0)
    assert relational_loss(keys, keys, others, 0.04, 0.04) < relational_loss(keys.roll(1, 0), keys, others, 0.04, 0.04)


def test_w_mse_needs_more_images_than_dimensions(tmp_path: Path):
    with pytest.raises(ValueError, match="at most half of batch_size, here 16"):
        pretrain.main([*QUICK, "--method", "w_mse", "--projection_dim", "17", "--out", str(tmp_path)])


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"momentum": 2.0}, {"queue_size": 0}])
def test_bad_settings_raise(wrong: dict[str, float]):
    with pytest.raises(ValueError, match="expected"):
        pretraining.MethodSettings(**wrong)


@pytest.mark.slow
def test_ssl_study_runs_end_to_end(tmp_path: Path):
    out, result = tmp_path / "run", tmp_path / "result"
    words = ["--config", str(ROOT / "reproduction" / "configs" / "ssl_study_smoke.yaml")]
    settings = ssl_study.StudySettings.from_cli([*words, "--out", str(out), "--result", str(result)])
    ssl_study.main(settings)
    first = json.loads(result.with_suffix(".json").read_text())
    kept = {path: path.stat().st_mtime_ns for path in (out / "evaluation").rglob("report.json")}
    ssl_study.main(settings)
    finished = out / "evaluation" / "ssl" / "embedded" / "report.json"
    assert finished.stat().st_mtime_ns == kept[finished]
    report = json.loads(result.with_suffix(".json").read_text())
    assert report["rows"] == first["rows"]
    assert str(tmp_path) not in json.dumps(report)
    assert {row["threat"] for row in report["rows"]} == {"clean", "T1", "T1b", "T2"}
    assert all(0 <= row["ci_low"] <= row["accuracy"] <= row["ci_high"] <= 1 for row in report["rows"])
    assert {"ssl", "ssl/undefended", "ssl/baseline:untuned_ensemble", "ssl/zepad:rfdm"} <= {
        row["model"] for row in report["rows"]
    }
    assert {"confidence_gap", "jensen_shannon"} <= {row["score"] for row in report["detection"]}
    assert "`ssl/zepad:rfdm`" in result.with_suffix(".md").read_text()
    model = ZePAD.from_pretrained(out / "zepad-embedded")
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, len(model.class_names))


def test_records_name_no_folders():
    record = {
        "data": "/srv/x/cifar10",
        "source": "timm:local-dir:/a/b/encoder",
        "hub": "uoft-cs/cifar10",
        "n": [4 / 255],
    }
    expected = {"data": "cifar10", "source": "timm:local-dir:encoder", "hub": "uoft-cs/cifar10", "n": [4 / 255]}
    assert ssl_study.without_folders(record) == expected
