"""Files and folders that are the old ones or the new ones, whenever a run is killed, and locks that end with it."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import timm
import torch

from tests.evaluation.test_tables import report
from tests.helpers.models import make_zepad, write_clip
from zepad_mm.attacks import load_adversarial, save_adversarial
from zepad_mm.encoders import LoraSettings, add_lora, load_encoder
from zepad_mm.models.zepad import DetectorConfig, ZePAD
from zepad_mm.pretraining.checkpoint import save_encoder
from zepad_mm.training import fresh_head, load_head, load_tuned, write_tuned
from zepad_mm.utils import atomic
from zepad_mm.utils.atomic import SAVED, STAGING, complete_folder, replacing, replacing_folder
from zepad_mm.utils.io import append_line, write_text
from zepad_mm.utils.locks import RUN_LOCK, claim

CHANGES = ("replace", "rename", "unlink", "rmdir")  # calls that change what a reader sees


def _in_child(work: Callable[[], object]) -> int | None:
    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with suppress(OSError):
            work()
            os._exit(0)
        os._exit(3)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    return process.exitcode


def _killed_at(change: int, work: Callable[[], object]) -> int | None:
    """Do ``work`` in a process that is killed before its ``change``-th move of a file."""

    def run() -> None:
        count = [0]
        for name in CHANGES:
            original = getattr(Path, name)

            def counted(self: Path, *args: object, original: Callable = original, **options: object) -> object:
                count[0] += 1
                if count[0] > change:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(self, *args, **options)

            setattr(Path, name, counted)
        work()

    return _in_child(run)


def _write_pair(folder: Path, text: str) -> None:
    with replacing_folder(folder) as staged:
        write_text(staged / "a.json", text)
        write_text(staged / "inner" / "b.txt", text)


def _read_pair(folder: Path) -> set[str]:
    complete_folder(folder)
    return {(folder / "a.json").read_text(), (folder / "inner" / "b.txt").read_text()}


def test_replacing_folder_killed_at_any_change_is_old_or_new(tmp_path: Path) -> None:
    found = []
    for change in range(30):
        folder = tmp_path / str(change)
        _write_pair(folder, "old")
        code = _killed_at(change, lambda folder=folder: _write_pair(folder, "new"))  # type: ignore[misc]
        content = _read_pair(folder)
        assert len(content) == 1
        found.append(content.pop())
        _write_pair(folder, "next")
        atomic._cleaned.clear()
        _write_pair(folder, "next")
        assert sorted(path.name for path in folder.iterdir()) == ["a.json", "inner"]
        if code == 0:
            break
    assert found[0] == "old"
    assert found[-1] == "new"
    assert found == sorted(found, reverse=True)


def _fill(folder: Path, model: ZePAD, threshold: float) -> None:
    model.set_detector(DetectorConfig(threshold=threshold)).save_pretrained(folder)


def _encoder_with_head(folder: Path, source: str, seed: int, adaptation: str = "full") -> None:
    encoder = load_encoder(source)
    if adaptation == "lora":
        add_lora(encoder, LoraSettings(rank=2))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if adaptation == "full":
                parameter.mul_(1 + seed / 100)
            elif "lora_" in name:
                parameter.fill_(seed / 100)
    head = fresh_head("linear", encoder.feature_dim, 3, seed)
    write_tuned(folder, encoder, {"seed": seed}, (head, ("a", "b", "c")))


@pytest.mark.parametrize("room", [None, 200, 5000])
def test_saving_over_a_model_that_fails_leaves_the_old_one(room: int | None, tmp_path: Path) -> None:
    """By a kill while files are written, and moved into place, and by a quota."""
    model, folder = make_zepad(write_clip(tmp_path)), tmp_path / "model"
    _fill(folder, model, 0.5)

    def save() -> None:
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        _fill(folder, model, 0.7)

    changes = [8, 11, 13] if room is None else [10**6]
    for change in changes:
        assert _killed_at(change, save) == (-signal.SIGKILL if room is None else 3)
        threshold = ZePAD.from_pretrained(folder).config.detector.threshold
        assert threshold in ((0.5, 0.7) if room is None else (0.5,))
    _fill(folder, model, 0.9)
    assert ZePAD.from_pretrained(folder).config.detector.threshold == 0.9


@pytest.mark.parametrize("kinds", [("full", "full"), ("full", "lora")])
def test_saving_over_a_tuned_encoder_that_is_killed_leaves_encoder_and_head_of_one_run(
    kinds: tuple[str, str], tmp_path: Path
) -> None:
    source = write_clip(tmp_path)
    heads = {}
    for seed in (1, 2):
        _encoder_with_head(tmp_path / str(seed), source, seed, kinds[seed - 1])
        heads[seed] = load_head(tmp_path / str(seed) / "head.safetensors")[0].state_dict()["layer.weight"]
    weights = {seed: load_tuned(tmp_path / str(seed)).state_dict() for seed in (1, 2)}
    folder = tmp_path / "out"
    _encoder_with_head(folder, source, 1, kinds[0])
    for change in (4, 7):
        assert _killed_at(change, lambda: _encoder_with_head(folder, source, 2, kinds[1])) == -signal.SIGKILL
        found = load_tuned(folder).state_dict()
        seed = next(seed for seed in (1, 2) if _same(found, weights[seed]))
        assert torch.equal(load_head(folder / "head.safetensors")[0].state_dict()["layer.weight"], heads[seed])


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_adversarial_images_of_a_killed_save_are_all_there_or_none(tmp_path: Path) -> None:
    images = torch.full((3, 3, 4, 4), 51 / 255)
    found = []
    for change in range(12):
        folder = tmp_path / str(change)
        code = _killed_at(change, lambda folder=folder: save_adversarial(folder, images))  # type: ignore[misc]
        try:
            found.append(len(load_adversarial(folder).images))
        except FileNotFoundError:
            found.append(0)
            atomic._cleaned.clear()
            save_adversarial(folder, images[:1])
            assert sorted(path.name for path in folder.iterdir()) == ["000000.png", "adversarial.json"]
        if code == 0:
            break
    assert set(found) == {0, 3}
    assert found == sorted(found)


def _pretrained(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    sizes = {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]}
    save_encoder(timm.create_model("resnet18", num_classes=0, **sizes), folder, sizes)


def _evaluated(folder: Path, seed: int) -> None:
    report(seed=seed).save(folder)


@pytest.mark.parametrize("write", [_pretrained, _evaluated])
def test_writing_over_earlier_results_that_is_killed_leaves_those_of_one_run(
    write: Callable[[Path, int], None], tmp_path: Path
) -> None:
    contents = []
    for seed in (1, 2):
        write(tmp_path / str(seed), seed)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / str(seed)).iterdir()})
    folder = tmp_path / "out"
    write(folder, 1)
    for change in range(2, 9, 2):
        _killed_at(change, lambda: write(folder, 2))
        complete_folder(folder)
        found = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
        assert found in contents, change
    atomic._cleaned.clear()
    write(folder, 2)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents[1]


def test_replaced_files_have_the_mode_of_the_umask_and_replace_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a.json").symlink_to(outside / "kept")
    (folder / "inner").symlink_to(outside)
    (folder / "log").symlink_to(outside / "kept")
    before = os.umask(0o077)
    try:
        _write_pair(folder, "new")
        write_text(folder / "single", "x")
    finally:
        os.umask(before)
    assert [path.name for path in outside.iterdir()] == ["kept"]
    assert (outside / "kept").read_text() == "kept"
    for name in ("a.json", "inner/b.txt", "single"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    with pytest.raises(OSError, match=r"log could not be written \(it is a symbolic link"):
        append_line(folder / "log", "line")


def test_an_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        with replacing(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"/a could not be written \(No space left on device\).* is intact"):
        full(tmp_path / "a")
    message = rf"{tmp_path}/set/a could not be written \(No space"
    with pytest.raises(OSError, match=message), replacing_folder(tmp_path / "set") as staged:
        full(staged / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/a could not be written \((File exists|Not a directory)"):
        write_text(tmp_path / "file" / "a", "x")
    assert not list(tmp_path.rglob(".*"))


def test_unfinished_files_of_a_live_process_are_kept(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("mine")
        assert _in_child(lambda: write_text(tmp_path / "b", "other")) == 0
        assert temporary.parent.name.startswith(STAGING)
    assert (tmp_path / "a").read_text() == "mine"
    assert not (tmp_path / SAVED).exists()


def test_claim_names_the_folder_of_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zepad_mm.utils.locks.os.write", full)
    with (
        pytest.raises(OSError, match=r"run could not be written to .*No space left on device"),
        claim(tmp_path / "run"),
    ):
        pass
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())  # nor does the lock stay


def test_claim_refuses_a_second_run_and_ends_with_a_killed_one(tmp_path: Path) -> None:
    refused = pytest.raises(ValueError, match=rf"in use by another run \(process {os.getpid()} on .*another output")
    with claim(tmp_path), refused, claim(tmp_path):
        pass

    def die() -> None:
        with claim(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert _in_child(die) == -signal.SIGKILL
    assert (tmp_path / RUN_LOCK).is_file()
    with claim(tmp_path):
        pass
    assert not (tmp_path / RUN_LOCK).exists()
