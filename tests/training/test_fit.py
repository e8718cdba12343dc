"""The training loop on tiny real networks: resumption to the bit, several processes, errors that help, files."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tests.helpers.models import write_clip
from zepad_mm.data import LabelledImages
from zepad_mm.defences import DEFENCES, Defence, LossParts, Student, TeCoA, make_defence
from zepad_mm.encoders import Encoder, LoraSettings, Preprocess, TextEncoder, add_lora, has_lora, load_encoder
from zepad_mm.models.heads import LinearHead, ZeroShotHead
from zepad_mm.training import (
    HeadSettings,
    TrainSettings,
    build_student,
    encode_images,
    feature_cache,
    fit,
    fresh_head,
    load_encoder_or_tuned,
    load_head,
    load_tuned,
    make_accelerator,
    train_head,
    train_head_on_features,
    validate,
    write_head,
    write_tuned,
)
from zepad_mm.training.augmentation import augment
from zepad_mm.training.student import set_training_mode
from zepad_mm.utils.io import read_tensors, write_tensors
from zepad_mm.utils.seeding import derived_generator

ROOT = Path(__file__).parents[2]
QUICK = TeCoA(epsilon=4 / 255, attack_steps=2, clean_fraction=0.5)


def tiny_encoder(seed: int = 0) -> Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
    return Encoder(backbone, Preprocess(image_size=12, mean=(0.5,) * 3, std=(0.25,) * 3), 32, "test:tiny").eval()


def tiny_student(head: str = "mlp") -> Student:
    encoder = tiny_encoder()
    if head == "zero_shot":
        text = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        return Student(encoder, ZeroShotHead.from_embeddings(text, 10.0))
    return Student(encoder, fresh_head(head, 32, 3))


def colours(n: int = 48, seed: int = 0) -> LabelledImages:
    """Images whose class is their brightest channel."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.rand(n, 3, 12, 12, generator=generator) * 0.5
    images[torch.arange(n), labels] += 0.3
    return LabelledImages(images, labels, ("red", "green", "blue"), "colours")


def quick(**changes: Any) -> TrainSettings:
    values: dict[str, Any] = {
        "steps": 9, "batch_size": 16, "lr_encoder": 1e-2, "validation_every": 4, "checkpoint_every": 3, "log_every": 1,
        "validation_attack_steps": 2, "augment": "flip_shift", "epsilon_warmup_steps": 4, "lr_warmup_steps": 2,
    }  # fmt: skip
    return TrainSettings(**{**values, **changes})


def run(
    out: Path,
    defence: Defence = QUICK,
    settings: TrainSettings | None = None,
    student: Student | None = None,
) -> tuple[Student, Any]:
    student = student or tiny_student()
    return student, fit(student, colours(), colours(24, 1), defence, settings or quick(), out=out)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", DEFENCES.names())
@pytest.mark.parametrize("augmentation", ["none", "flip_shift"])
def test_every_defence_trains_and_reports(name: str, augmentation: str, tmp_path: Path) -> None:
    student = tiny_student("linear")
    frozen_head = [parameter.clone() for parameter in student.head.parameters()]
    before = tiny_encoder()
    rng = torch.get_rng_state()
    defence = make_defence(name, {"attack_steps": 2})
    _, result = run(tmp_path, defence, quick(steps=5, augment=augmentation, selection="last"), student)
    assert torch.equal(rng, torch.get_rng_state())
    assert result.steps == 5
    assert result.best_step == 5
    assert not same(student.encoder, before)
    assert torch.equal(student.encoder.backbone[1].running_mean, before.backbone[1].running_mean)  # bn_mode eval
    moved = any(not torch.equal(a, b) for a, b in zip(frozen_head, student.head.parameters(), strict=True))
    assert moved == defence.trains_head
    steps = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert {"loss", "lr", "epsilon", "images_per_s", "gradient_norm"} <= steps[0].keys()
    checks = [line["validation"] for line in lines(tmp_path) if "validation" in line]
    assert all(check["n"] == 24 and 0 <= check["robust"] <= check["clean"] <= 1 for check in checks)


def test_fit_learns_and_follows_the_warm_ups(tmp_path: Path) -> None:
    _, result = run(tmp_path, settings=quick(steps=30, schedule="cosine"))
    assert result.validation.clean > 0.9
    assert result.validation.robust > 0.8
    steps = [line for line in lines(tmp_path) if "loss" in line]
    assert [round(line["epsilon"] * 255, 3) for line in steps[:5]] == [1, 2, 3, 4, 4]
    assert [line["lr"] for line in steps[:2]] == pytest.approx([0.005, 0.01])
    assert steps[-1]["lr"] < 1e-4


def test_fit_keeps_the_best_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate that ruins the network: the selected weights are the untuned ones, and the result says so."""
    student = tiny_student("zero_shot")
    untuned = tiny_student("zero_shot")
    student.head.text = untuned.head.text = untuned.encoder(colours().images).detach().view(16, 3, 32).mean(0)
    _, result = run(tmp_path, settings=quick(lr_encoder=1000.0, weight_decay=0.0), student=student)
    assert result.best_step == 0
    assert same(student, untuned)
    assert result.validation == validate(untuned, colours(24, 1), epsilon=4 / 255, attack_steps=2)


def crash_at(monkeypatch: pytest.MonkeyPatch, call: int, error: Exception) -> None:
    original, calls = TeCoA.loss, [0]

    def loss(self: TeCoA, student: Student, batch: Any, attacked: Tensor) -> LossParts:
        calls[0] += 1
        if calls[0] == call:
            raise error
        return original(self, student, batch, attacked)

    monkeypatch.setattr(TeCoA, "loss", loss)


@pytest.mark.parametrize("call", [1, 3, 6, 9])
@pytest.mark.parametrize("bn_mode", ["eval", "train"])
def test_fit_resumes_bit_for_bit(call: int, bn_mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = quick(bn_mode=bn_mode, selection="last")
    whole, expected = run(tmp_path / "whole", settings=settings)
    with monkeypatch.context() as patch:
        crash_at(patch, call, KeyboardInterrupt())  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", settings=settings)
    torch.rand(7)  # the state of the global generator does not matter
    resumed, result = run(tmp_path / "parts", settings=settings)
    assert same(whole, resumed)
    assert (result.steps, result.best_step, result.validation) == (
        expected.steps, expected.best_step, expected.validation,
    )  # fmt: skip
    first, second = lines(tmp_path / "whole"), lines(tmp_path / "parts")
    drop = ("images_per_s",)
    assert [{k: v for k, v in line.items() if k not in drop} for line in first] == [
        {k: v for k, v in line.items() if k not in drop} for line in second
    ]
    # asked again, a finished run is read, not repeated
    again, _ = run(tmp_path / "parts", settings=settings)
    assert same(whole, again)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [
        "best-9.safetensors", "checkpoint.safetensors", "log.txt", "metrics.jsonl", "samples",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["tecoa", "fare"])
def test_accumulation_gives_the_same_step(name: str, tmp_path: Path) -> None:
    defence = make_defence(name, {"attack_steps": 2, "random_start": False})
    losses = []
    for count in (1, 4):
        settings = quick(steps=4, accumulation=count, augment="none")
        run(tmp_path / str(count), defence, settings, tiny_student("linear"))  # without dropout
        losses.append([line["loss"] for line in lines(tmp_path / str(count)) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    with pytest.raises(ValueError, match=r"gen_af compares the images of a batch"):
        run(tmp_path / "a", make_defence("gen_af"), quick(accumulation=2))
    with pytest.raises(ValueError, match=r"bn_mode='train' normalises over the images"):
        run(tmp_path / "b", QUICK, quick(accumulation=2, bn_mode="train"))
    with pytest.raises(ValueError, match="a batch of 16 has no 3 equal parts"):
        quick(accumulation=3)


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"compile": "aot_eager"}])
def test_performance_settings_change_no_result(changes: dict[str, Any], timm_source: str, tmp_path: Path) -> None:
    defence, settings, losses = make_defence("fare", {"attack_steps": 1}), {"steps": 2, "augment": "none"}, []
    for out, more in (("plain", {}), ("changed", changes)):
        student = build_student(timm_source, colours(), "full", "probe")
        run(tmp_path / out, defence, quick(**settings, **more), student)
        losses.append([line["loss"] for line in lines(tmp_path / out) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_clean_targets_are_cached_for_other_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:

    defence, kept = make_defence("fare", {"attack_steps": 1}), tmp_path / "kept"
    settings = quick(augment="none", steps=3, cache_dir=str(kept))
    first, _ = run(tmp_path / "first", defence, settings)
    (file,) = kept.iterdir()
    with monkeypatch.context() as patch:
        patch.delattr(feature_cache, "encode_images")  # nothing is encoded again
        second, _ = run(tmp_path / "second", defence, settings)
    assert same(first, second)
    other = Student(tiny_encoder(1), fresh_head("linear", 32, 3))
    run(tmp_path / "other", defence, settings, other)
    assert len(list(kept.iterdir())) == 2
    features = read_tensors(file)[0]["features"].clone()  # what is read is a view of the file
    assert features.shape == (48, 32)
    written = file.read_bytes()
    for number, wrong in enumerate((None, features[:-1], features[:, :-1], features.double())):
        if wrong is None:
            file.write_bytes(written[:50])
        else:
            write_tensors(file, {"features": wrong})
        caplog.clear()
        third, _ = run(tmp_path / f"third-{number}", defence, settings)
        assert same(first, third)
        assert "is recomputed" in caplog.text
        assert torch.equal(read_tensors(file)[0]["features"], features)
    with pytest.raises(ValueError, match="set augment='none'"):
        run(tmp_path / "augmented", defence, quick(cache_dir=str(kept)))


def test_text_embeddings_are_cached_for_other_runs(
    clip_source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data, kept = colours(8), tmp_path / "kept"

    def head(source: str = clip_source, data: LabelledImages = data, **more: Any) -> Tensor:
        return build_student(source, data, cache_dir=str(kept), **more).head.text

    expected = build_student(clip_source, data).head.text
    assert torch.equal(head(), expected)
    (file,) = kept.iterdir()
    with monkeypatch.context() as patch:
        patch.delattr(TextEncoder, "forward")  # nothing is encoded again
        assert torch.equal(head(), expected)
    written = file.read_bytes()
    for wrong in (None, expected[:2], expected[:, :5], expected.half()):
        if wrong is None:
            file.write_bytes(written[:50])
        else:
            write_tensors(file, {"features": wrong})
        caplog.clear()
        assert torch.equal(head(), expected)
        assert "is recomputed" in caplog.text
        torch.testing.assert_close(read_tensors(file)[0]["features"], expected)
    (tmp_path / "other").mkdir()
    other = write_clip(tmp_path / "other", seed=1)
    for changes in ({"prompts": "single"}, {"source": other}, {"data": replace(data, class_names=("a", "b", "c"))}):
        assert not torch.equal(head(**changes), expected)
    assert len(list(kept.iterdir())) == 4
    quick_gelu = json.loads((tmp_path / "other" / "open_clip_config.json").read_text())
    quick_gelu["model_cfg"]["quick_gelu"] = True
    (tmp_path / "other" / "open_clip_config.json").write_text(json.dumps(quick_gelu))
    assert torch.equal(head(other), build_student(other, data).head.text)  # the same weights, another function
    assert len(list(kept.iterdir())) == 5


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_trackers_receive_the_metrics(tracker: str, tmp_path: Path) -> None:
    pytest.importorskip(tracker)
    script = f"""
import sys
from tests.training.test_fit import *
settings = quick(steps=4, selection="last")
accelerator = make_accelerator(tracker={tracker!r}, folder={str(tmp_path)!r})
fit(tiny_student(), colours(), colours(24, 1), QUICK, settings, out={str(tmp_path / "run")!r}, accelerator=accelerator)
accelerator.end_training()
"""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120, capture_output=True)
    if tracker == "trackio":
        import sqlite3

        with sqlite3.connect(tmp_path / "trackio" / "zepad.db") as database:
            rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by step")]
        assert {"loss", "validation/robust"} <= {key for row in rows for key in row}
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "zepad")).Reload()
    expected = [line["loss"] for line in lines(tmp_path / "run") if "loss" in line]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(expected, rel=1e-5)
    assert "validation/robust" in events.Tags()["scalars"]
    assert events.Tags()["images"]


def test_samples_show_clean_and_attacked(tmp_path: Path) -> None:
    run(tmp_path / "run", settings=quick(samples=3))
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == ["4.png", "8.png", "9.png"]
    from PIL import Image

    with Image.open(tmp_path / "run" / "samples" / "9.png") as sheet:
        assert sheet.size == (3 * 13 + 1, 3 * 13 + 1)
    run(tmp_path / "none", settings=quick(samples=0))
    assert not (tmp_path / "none" / "samples").exists()
    with pytest.raises(ValueError, match="none, tensorboard, trackio, got 'wandb'"):
        make_accelerator(tracker="wandb")


def test_fare_encodes_each_image_once_with_the_original_and_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defence, settings = make_defence("fare", {"attack_steps": 2}), quick(augment="none", selection="last")
    seen: list[int] = []
    from zepad_mm.training import feature_cache

    def counting(encoder: Encoder, images: Tensor, *rest: Any) -> Tensor:
        seen.append(len(images))
        assert same(encoder, tiny_encoder())
        return encode_images(encoder, images, *rest)

    monkeypatch.setattr(feature_cache, "encode_images", counting)
    whole, _ = run(tmp_path / "whole", defence, settings)
    assert seen == [48]  # 9 steps of 16 are three passes
    run(tmp_path / "short", defence, quick(augment="none", steps=2))
    assert seen == [48, 32]
    out = tmp_path / "whole"
    (out / "checkpoint.safetensors").unlink()
    again, _ = run(out, defence, settings)
    assert same(whole, again)


def test_fit_rejects_impossible_runs_before_the_first_step(tmp_path: Path) -> None:
    data = colours()
    with pytest.raises(ValueError, match="batch_size: expected at most the 48 training images, got 64; give more"):
        run(tmp_path, settings=quick(batch_size=64))
    student = tiny_student("zero_shot")
    student.encoder.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        run(tmp_path, student=student)
    wrong = LabelledImages(data.images, data.labels + 1, data.class_names, "shifted")
    with pytest.raises(ValueError, match="labels from 1 to 3 for a head of 3 classes"):
        fit(tiny_student(), wrong, None, QUICK, quick(), out=tmp_path)
    large = LabelledImages(data.images * 255, data.labels, data.class_names, "large")
    with pytest.raises(ValueError, match="images / 255"):
        fit(tiny_student(), large, None, QUICK, quick(), out=tmp_path)
    with pytest.raises(ValueError, match="bn_mode"):
        run(tmp_path, settings=quick(bn_mode="train"), student=Student(add_lora(tiny_encoder()), nn.Linear(32, 3)))
    with pytest.raises(ValueError, match="asked for 2 processes, running as 1"):
        make_accelerator(2)
    for bad in ({"schedule": "linear"}, {"batch_size": 0}, {"grad_clip": -1.0}, {"validation_epsilon": 8.0}):
        with pytest.raises(ValueError, match=next(iter(bad)).removeprefix("validation_")):
            quick(**bad)
    assert not list(tmp_path.iterdir())


def test_fit_keeps_the_last_weights_without_validation(tmp_path: Path) -> None:
    student = tiny_student()
    result = fit(student, colours(), None, QUICK, quick(), out=tmp_path)
    assert result.validation is None
    assert result.best_step == 9


def test_lora_trains_only_the_adapter(tmp_path: Path) -> None:
    encoder = add_lora(tiny_encoder(), LoraSettings(rank=2))
    base = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    _, result = run(
        tmp_path, settings=quick(selection="last"), student=Student(encoder, tiny_student("zero_shot").head)
    )
    assert result.best_step == 9
    changed = {name for name, tensor in encoder.state_dict().items() if not torch.equal(tensor, base[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_set_training_mode() -> None:
    student = tiny_student()
    set_training_mode(student, "eval")
    assert not student.encoder.backbone[1].training
    assert student.head.training
    student.encoder.requires_grad_(False)
    set_training_mode(student, "train")
    assert not student.encoder.training


@pytest.mark.parametrize("kind", ["flip_shift", "photo"])
def test_augmentation_does_not_depend_on_the_number_of_processes(kind: str) -> None:
    images = colours(8).images
    one = augment(images, kind, derived_generator(0, "augment", 3), slice(0, 8, 1))
    assert not torch.equal(one, images)
    assert one.shape == images.shape
    assert 0 <= float(one.min()) <= float(one.max()) <= 1
    for rank in (0, 1):
        part = augment(images[rank::2], kind, derived_generator(0, "augment", 3), slice(rank, 8, 2))
        torch.testing.assert_close(part, one[rank::2])
    flipped = augment(images, "flip", derived_generator(0, "augment", 3), slice(0, 8, 1))
    assert all(torch.equal(f, i) or torch.equal(f, i.flip(-1)) for f, i in zip(flipped, images, strict=True))


def one_of_two(out: Path, accelerator: Accelerator) -> None:
    """What each of the processes does, and what one process does alone."""
    for name, options in (("tecoa", {"clean_fraction": 0.5}), ("fare", {})):
        student = tiny_student("linear").double()  # so that the order of sums turns no sign of a gradient
        train, held = (replace(data, images=data.images.double()) for data in (colours(), colours(23, 1)))
        defence = make_defence(name, {"attack_steps": 2, "random_start": False, **options})
        settings = quick(
            validation_attack_steps=1, augment="none" if name == "fare" else "flip_shift", selection="last"
        )
        fit(student, train, held, defence, settings, out=out / name, accelerator=accelerator)
        weights = torch.cat([p.detach().flatten() for p in student.parameters()])
        spread = accelerator.gather(weights[None])
        assert torch.equal(spread[0], spread[-1]), "ranks disagree"
        features = encode_images(student.encoder, held.images, 4, accelerator)
        assert torch.allclose(features, student.encoder(held.images).float(), atol=1e-5)


TWO_RANKS = """
import sys
from pathlib import Path
from tests.training.test_fit import make_accelerator, one_of_two
one_of_two(Path(sys.argv[1]), make_accelerator(2))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("both_cores")
def test_two_processes_give_the_curve_and_metrics_of_one(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS.format(root=str(ROOT), tests=str(ROOT / "tests")))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    line = [*launch, "--main_process_port", "0", str(script), str(tmp_path / "two")]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one_of_two(tmp_path / "one", make_accelerator(1))
    for name in ("tecoa", "fare"):
        one, two = lines(tmp_path / "one" / name), lines(tmp_path / "two" / name)
        assert [line["step"] for line in one] == [line["step"] for line in two]
        for first, second in zip(one, two, strict=True):
            if "loss" in first:
                assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
            else:
                assert first["validation"]["n"] == 23
                assert first["validation"] == second["validation"]


def test_head_on_cached_features(tmp_path: Path) -> None:
    encoder, head, data = tiny_encoder(), fresh_head("mlp", 32, 3, seed=1), colours(96)
    calls = [0]
    encoder.register_forward_hook(lambda module, inputs, output: calls.__setitem__(0, calls[0] + len(output)))
    result = train_head(encoder, head, data, HeadSettings(epochs=10, batch_size=32))
    assert calls[0] == 96
    assert result.losses[-1] < result.losses[0]
    assert result.train_accuracy > 0.9
    second = fresh_head("mlp", 32, 3, seed=1)
    train_head(encoder, second, data, HeadSettings(epochs=10, batch_size=32))
    assert same(head, second)
    write_head(tmp_path / "head.safetensors", head, data.class_names)
    loaded, names = load_head(tmp_path / "head.safetensors")
    assert same(head.eval(), loaded)
    assert names == data.class_names
    with pytest.raises(ValueError, match="no parameters to train"):
        train_head(encoder, ZeroShotHead(32, 3), data)
    with pytest.raises(ValueError, match="labels from 0 to 2 for a head of 2"):
        train_head(encoder, fresh_head("linear", 32, 2), data)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (5.0, 0.01), (300.0, 40.0)])
def test_head_training_takes_features_of_any_mean_and_scale(kind: str, mean: float, spread: float) -> None:
    data = colours(96)
    plain = encode_images(tiny_encoder(), data.images, 32)
    features, head = mean + spread * plain, fresh_head(kind, 32, 3, seed=1)
    assert train_head_on_features(head, features, data.labels, HeadSettings(batch_size=32)).train_accuracy > 0.9
    usual = fresh_head(kind, 32, 3, seed=1)
    train_head_on_features(usual, plain, data.labels, HeadSettings(batch_size=32))
    assert torch.allclose(head(features).softmax(-1), usual(plain).softmax(-1), atol=0.02)


def test_head_training_takes_features_that_do_not_differ() -> None:
    head, labels = fresh_head("linear", 32, 3), torch.arange(6) % 3
    train_head_on_features(head, torch.full((6, 32), 7.3), labels, HeadSettings(epochs=2))
    assert head.input_layer.weight.abs().max() < 1  # not divided by the rounding error of the spread


def test_head_training_leaves_other_kinds_of_heads_alone() -> None:
    class Normalised(LinearHead):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return self.layer(10 * torch.nn.functional.normalize(features, dim=-1))

    data, head = colours(96), Normalised(32, 3)
    features = encode_images(tiny_encoder(), data.images, 32)
    assert train_head_on_features(head, features, data.labels, HeadSettings(batch_size=32)).train_accuracy > 0.9


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_load_tuned_restores_the_encoder(adaptation: str, timm_source: str, tmp_path: Path) -> None:
    data = colours(16)
    student = build_student(timm_source, data, adaptation, "linear")
    settings = quick(steps=2, batch_size=8, lr_encoder=1e-3, selection="last")
    fit(student, data, None, TeCoA(attack_steps=1), settings, out=tmp_path / "run")
    write_tuned(tmp_path / "tuned", student.encoder, {"defence": {"name": "tecoa"}})
    loaded = load_encoder_or_tuned(str(tmp_path / "tuned"))
    assert has_lora(loaded) == (adaptation == "lora")
    with torch.no_grad():
        torch.testing.assert_close(loaded(data.images), student.encoder.eval()(data.images))
        assert not torch.allclose(load_encoder(timm_source)(data.images), loaded(data.images), atol=1e-4)
    about = json.loads((tmp_path / "tuned" / "tuned.json").read_text())
    assert about["source"] == timm_source
    assert about["adaptation"] == adaptation
    assert about["defence"] == {"name": "tecoa"}
    assert {"commit", "versions", "hardware"} <= about.keys()


def test_load_tuned_names_what_is_damaged(timm_source: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tuned\.json"):
        load_tuned(tmp_path)
    encoder = load_encoder(timm_source)
    write_tuned(tmp_path, encoder, {})
    tensors, metadata = read_tensors(tmp_path / "encoder.safetensors")
    first = sorted(tensors)[0]
    write_tensors(tmp_path / "encoder.safetensors", {k: v for k, v in tensors.items() if k != first}, metadata)
    with pytest.raises(ValueError, match=first):
        load_tuned(tmp_path)
    write_tensors(tmp_path / "encoder.safetensors", {k: v * 3 for k, v in tensors.items()}, metadata)
    with pytest.raises(ValueError, match="other features"):
        load_tuned(tmp_path)


def test_build_student_rejects_unknown_names(timm_source: str) -> None:
    with pytest.raises(ValueError, match="full, lora, got 'dora'"):
        build_student(timm_source, colours(8), "dora")
    with pytest.raises(ValueError, match="kind open_clip"):
        build_student(timm_source, colours(8), head="zero_shot")
    probe = build_student(timm_source, colours(24), head="probe")
    assert not any(parameter.requires_grad for parameter in probe.head.parameters())


def load_recipe(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


RECIPES = ("defend", "train_heads", "tune")


@pytest.mark.parametrize("name", RECIPES)
def test_from_cli_rejects_an_unknown_key(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text((ROOT / "recipes" / "configs" / "smoke" / f"{name}.yaml").read_text() + "\nlerning_rate: 1\n")
    with pytest.raises(SystemExit):
        load_recipe(name).Recipe.from_cli(["--config", str(path)])
    assert "lerning_rate" in capsys.readouterr().err


def test_recipes_run_one_after_the_other(timm_source: str, tmp_path: Path) -> None:
    """The smoke configurations, on a smaller encoder."""
    smoke = ROOT / "recipes" / "configs" / "smoke"
    small = ["--settings.steps", "2", "--settings.batch_size", "8", "--data.n_train", "16", "--data.n_validation", "8"]
    benign = ["--defence", "clean", "--defence_options", "{}", "--settings.selection", "clean"]
    module = load_recipe("tune")
    for name, more in (("robust", []), ("benign", benign)):
        args = ["--config", str(smoke / "tune.yaml"), "--out", str(tmp_path / name), "--source", timm_source]
        module.main(module.Recipe.from_cli([*args, *small, *more]))
        about = json.loads((tmp_path / name / "tuned.json").read_text())
        assert about["steps"] == 2
        assert about["validation"]["n"] == 8
        load_tuned(tmp_path / name)
        load_head(tmp_path / name / "head.safetensors")
    encoders = {"undefended": timm_source, "robust": str(tmp_path / "robust"), "benign": str(tmp_path / "benign")}
    args = ["--config", str(smoke / "train_heads.yaml"), "--out", str(tmp_path / "heads")]
    args += ["--encoders", json.dumps(encoders), "--data.n_train", "24", "--data.n_validation", "8"]
    module = load_recipe("train_heads")
    module.main(module.Recipe.from_cli(args))
    rows = json.loads((tmp_path / "heads" / "heads.json").read_text())["heads"]
    assert rows.keys() == encoders.keys()
    for name in encoders:
        load_head(tmp_path / "heads" / f"{name}.safetensors")
