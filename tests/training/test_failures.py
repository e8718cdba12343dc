"""Failures of a tuning run: a clear error, and an intact last checkpoint."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.training.test_fit import (
    QUICK,
    colours,
    fresh_head,
    quick,
    run,
    same,
    tiny_encoder,
    tiny_student,
)
from zepad_mm.data import open_images
from zepad_mm.defences import Defence, LossParts, Student, TeCoA, make_defence
from zepad_mm.training import fit
from zepad_mm.utils.io import read_tensors
from zepad_mm.utils.locks import claim
from zepad_mm.utils.stopping import Stopped


def _killed(out: Path) -> None:
    original, calls = TeCoA.loss, [0]

    def loss(self: TeCoA, student: Student, batch: Any, attacked: Tensor) -> LossParts:
        calls[0] += 1
        if calls[0] == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, student, batch, attacked)

    TeCoA.loss = loss  # type: ignore[method-assign]
    run(out)


def test_fit_killed_by_sigkill_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path / "killed",))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    resumed, _ = run(tmp_path / "killed")
    assert same(whole, resumed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_fit_saves_the_step_and_stops_on_a_signal(number: int, tmp_path: Path) -> None:
    original, calls = TeCoA.loss, [0]

    def loss(self: TeCoA, student: Student, batch: Any, attacked: Tensor) -> LossParts:
        calls[0] += 1
        if calls[0] == 5:
            signal.raise_signal(number)
        return original(self, student, batch, attacked)

    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TeCoA, "loss", loss)
        with pytest.raises(Stopped, match=r"SIG(INT|TERM): step 5 of 9 is saved in .*same settings to go on"):
            run(tmp_path / "parts")
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers
    _, about = read_tensors(tmp_path / "parts" / "checkpoint.safetensors")
    assert json.loads(about["about"])["position"]["step"] == 5
    assert not list((tmp_path / "parts").glob(".*"))
    resumed, _ = run(tmp_path / "parts")
    whole, _ = run(tmp_path / "whole")
    assert same(whole, resumed)
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("parts", "whole")]
    assert [json.loads(row)["step"] for row in rows[0]] == [json.loads(row)["step"] for row in rows[1]]


def test_fit_refuses_a_folder_that_another_run_uses(tmp_path: Path) -> None:
    with claim(tmp_path / "run"), pytest.raises(ValueError, match="run is in use by another run"):
        run(tmp_path / "run")


@pytest.mark.parametrize(
    ("defence", "settings", "key"),
    [
        (TeCoA(epsilon=8 / 255, attack_steps=2, clean_fraction=0.5), {}, "defence.epsilon"),
        (QUICK, {"lr_encoder": 2e-2}, "settings.lr_encoder"),
        (QUICK, {"steps": 20}, "settings.steps"),
        (make_defence("clean"), {}, "defence.attack_steps|defence.clean_fraction|defence.epsilon|defence.name"),
    ],
)
def test_fit_names_the_changed_setting_on_resume(
    defence: Defence, settings: dict[str, Any], key: str, tmp_path: Path
) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match=f"({key}) = .*now"):
        run(tmp_path, defence, quick(**settings))
    with pytest.raises(ValueError, match="resume='auto'"):
        run(tmp_path, settings=quick(resume="never"))
    run(tmp_path, settings=quick(checkpoint_every=100, log_every=5))  # these settings may change


def test_fit_refuses_other_starting_weights_on_resume(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match="encoder_checksum"):
        run(tmp_path, student=Student(tiny_encoder(1), fresh_head("mlp", 32, 3)))


def test_fit_names_a_damaged_checkpoint(tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is not a complete"):
        run(tmp_path)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_fit_saves_the_batch_of_a_non_finite_loss(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = TeCoA.loss, [0]

    def loss(self: TeCoA, student: Student, batch: Any, attacked: Tensor) -> LossParts:
        calls[0] += 1
        parts = original(self, student, batch, attacked)
        if calls[0] < 5:
            return parts
        if what == "loss":
            return LossParts(parts.total * float("nan"), parts.parts)
        return LossParts(parts.total + (parts.total - parts.total.detach()).sqrt(), parts.parts)  # inf * 0

    with monkeypatch.context() as patch:
        patch.setattr(TeCoA, "loss", loss)
        with pytest.raises(FloatingPointError, match=rf"the {what} is (nan|inf) at step 5 \(rows \d+, .* of colours"):
            run(tmp_path)
    batch, about = read_tensors(tmp_path / "nonfinite-5.safetensors")
    data = colours()
    assert torch.equal(batch["labels"], data.labels[batch["indices"]])
    assert float((batch["attacked"] - batch["images"]).abs().max()) <= QUICK.epsilon + 1e-6
    saved = json.loads(about["about"])
    assert (saved["step"], saved["what"], saved["name"], saved["seed"]) == (5, what, "tecoa", 0)
    resumed, _ = run(tmp_path)
    whole, _ = run(tmp_path / "whole")
    assert same(whole, resumed)


def _run_with_limited_files(out: Path, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        run(out)
    except OSError as error:
        (out.parent / "error").write_text(str(error))
        os._exit(3)


def test_fit_keeps_the_last_checkpoint_when_the_disk_is_full(tmp_path: Path) -> None:
    """A file size limit ends the write of a checkpoint, as a disk quota does: the previous file stays."""
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TeCoA, "loss", _raising(5, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(out)
    before = (out / "checkpoint.safetensors").read_bytes()
    process = multiprocessing.get_context("fork").Process(target=_run_with_limited_files, args=(out, len(before) // 2))
    process.start()
    process.join(60)
    assert process.exitcode == 3
    message = (tmp_path / "error").read_text()
    assert "checkpoint.safetensors could not be written" in message
    assert "what was there before is intact" in message
    assert (out / "checkpoint.safetensors").read_bytes() == before
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    resumed, _ = run(out)
    whole, _ = run(tmp_path / "whole")
    assert same(whole, resumed)


def _raising(call: int, error: BaseException) -> Any:
    original, calls = TeCoA.loss, [0]

    def loss(self: TeCoA, student: Student, batch: Any, attacked: Tensor) -> LossParts:
        calls[0] += 1
        if calls[0] == call:
            raise error
        return original(self, student, batch, attacked)

    return loss


def test_fit_names_a_missing_image_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    data = colours()
    for number, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        folder = tmp_path / "data" / "train" / data.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        levels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(levels).save(folder / f"{number}.png")
    stored = open_images(str(tmp_path / "data"), "train", 12)
    missing, hidden = tmp_path / "data" / "train" / "red" / "0.png", tmp_path / "0.png"
    settings, out = quick(), tmp_path / "run"

    class LosesImage(type(stored)):  # type: ignore[misc]
        def fetch(self, indices: Tensor) -> Tensor:
            if (out / "checkpoint.safetensors").is_file() and missing.exists():
                missing.rename(hidden)
            return super().fetch(indices)

    lost = LosesImage(**vars(stored))
    with pytest.raises(ValueError, match=r"row \d+ .*could not be read as an image: No such file"):
        fit(tiny_student(), lost, None, QUICK, settings, out=out)
    hidden.rename(missing)
    resumed, whole = tiny_student(), tiny_student()
    fit(resumed, stored, None, QUICK, settings, out=out)
    fit(whole, stored, None, QUICK, settings, out=tmp_path / "whole")
    assert same(whole, resumed)


DEAD_RANK = """
import os, signal, sys
from tests.training.test_failures import TeCoA, run
original, calls = TeCoA.loss, [0]
def loss(self, student, batch, attacked):
    calls[0] += 1
    if calls[0] == 7 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, student, batch, attacked)
if "--die" in sys.argv:
    TeCoA.loss = loss
run(__import__("pathlib").Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("both_cores")
def test_fit_ends_when_another_process_dies(tmp_path: Path) -> None:
    script = tmp_path / "dead.py"
    script.write_text(DEAD_RANK)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command = [*launch, str(tmp_path / "run"), "--die"]
    # alone, the other process would wait half an hour (gloo's timeout); torchrun ends it after 30 s
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    _, about = read_tensors(tmp_path / "run" / "checkpoint.safetensors")
    assert json.loads(about["about"])["position"]["step"] == 6
    _, result = run(tmp_path / "run")  # resumes, here with one process
    assert result.steps == 9


STOPPED_RANKS = """
import sys, time
from pathlib import Path
from tests.training.test_failures import TeCoA, run
from zepad_mm.utils.stopping import run_program
original, calls = TeCoA.loss, [0]
def loss(self, student, batch, attacked):
    calls[0] += 1
    if calls[0] == 4:
        Path(sys.argv[1], "ready").touch()
    if calls[0] >= 4:
        time.sleep(0.5)
    return original(self, student, batch, attacked)
TeCoA.loss = loss
code = run_program(lambda: run(Path(sys.argv[1], "run")))
Path(sys.argv[1], f"code-{code}-of-{__import__('os').environ['RANK']}").touch()
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("both_cores")
def test_fit_on_two_processes_saves_and_stops_on_sigterm(tmp_path: Path) -> None:
    """The signal reaches the launcher alone, as from a scheduler; both processes save one step and end with 130."""
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED_RANKS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    process = subprocess.Popen([*launch, str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode != 0
    assert sorted(path.name for path in tmp_path.glob("code-*")) == ["code-130-of-0", "code-130-of-1"], errors[-3000:]
    assert "start it again with the same settings to go on" in errors
    _, about = read_tensors(tmp_path / "run" / "checkpoint.safetensors")
    step = json.loads(about["about"])["position"]["step"]
    assert 3 <= step < 9
    _, result = run(tmp_path / "run")  # resumes, here with one process
    assert result.steps == 9
