"""Command line: errors, JSON output, and runs on small networks."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers.hub_server import environment, running_hub
from tests.helpers.models import make_gated_zepad, make_zepad, write_embedded_at
from zepad_mm import __version__
from zepad_mm.attacks import Perturbation
from zepad_mm.cli import COMMANDS, budget, main
from zepad_mm.models.zepad import DetectorConfig, ZePAD
from zepad_mm.utils.stopping import NO_EFFECT


@pytest.fixture(scope="module")
def saved(clip_source: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A defended model on disk."""
    folder = tmp_path_factory.mktemp("model")
    make_zepad(clip_source).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Class folders of random images."""
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("test", 3)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = (torch.rand(32, 32, 3, generator=generator) * 255).byte().numpy()
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return str(folder)


@pytest.mark.parametrize(("text", "value"), [("4/255", 4 / 255), ("0.0157", 0.0157), ("8/255", 8 / 255), ("1", 1.0)])
def test_budget_parses_fractions_and_decimals(text: str, value: float) -> None:
    assert budget(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["8", "0", "-1/255", "4/0", "four", "", "nan", "4/255/2"])
def test_budget_rejects_bad_values(text: str) -> None:
    with pytest.raises(ValueError, match="--eps: expected a budget"):
        budget(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "invalid choice"),
        (["evaluate"], "model"),
        (["evaluate", "embedded", "--eps", "8"], "got '8'; write e.g. 8/255"),
        (["evaluate", "embedded", "--norm", "l2"], "--eps: another norm needs a budget"),
        (["evaluate", "embedded", "--norm", "l1", "--eps", "0.5"], "norm: expected one of linf, l2"),
        (["evaluate", "embedded", "--n", "many"], "many"),
        (["evaluate", "embedded", "--threats", "T9"], "unknown threat 'T9'"),
        (["evaluate", "embedded", "--preset", "dmo"], "did you mean 'demo'"),
        (["evaluate", "./nowhere"], "nowhere"),
        (["classify", "embedded", "no.png", "--labels", "a,b"], "no.png does not exist"),
        (["classify", "embedded", __file__, "--labels", ","], "--labels: expected names"),
        (["classify", "embeded", __file__, "--labels", "a,b"], "did you mean 'embedded'?"),
        (["classify", "./nowhere", __file__, "--labels", "a,a"], "--labels: "),  # before the model is looked for
        (["classify", "./nowhere", __file__, "--labels", "a,b", "--template", "fotos"], "did you mean 'photo'"),
        (["classify", "./nowhere", __file__, "--labels", "a,b", "--top", "0"], "--top: expected a positive number"),
        (["classify", "./nowhere", str(Path(__file__).parent), "--labels", "a,b"], "holds no image"),
        (["attack"], "encoders: expected at least one source"),
        (["attack", "open_clap:embedded"], "did you mean 'open_clip'"),
        (["attack", "open_clip:embedded", "--attack", "uapp"], "unknown universal attack"),
        (["classify", "embedded", __file__, "--labels", "dress,hat"], "could not be read as an image"),
        (["classify", "embedded", __file__, "--labels", "a,b", "--on-adversarial", "warn"], "expected one of ignore"),
        (["classify", "embedded", __file__, "--labels", "a,b", "--template", "fotos"], "did you mean 'photo'"),
        (["defend", "open_clip:embedded"], "out"),
        (["defend", "timm:resnet18", "--out", "x"], "zero-shot heads need a CLIP"),
        (["defend", "open_clip:embedded", "--out", "x", "--defences", "tecao"], "did you mean 'tecoa'"),
        (["defend", "open_clip:embedded", "--out", "x", "--steps", "0"], "steps: expected at least 1"),
        (["card", "./nowhere"], "nowhere/config.json does not exist"),
        (["card", "./nowhere", "--report", "./nowhere"], "nowhere"),
        (["push", "./nowhere", "owner/name"], "nowhere"),
        (["demo", "--preset", "dmo"], "did you mean 'demo'"),
        (["demo", "--n", "0"], "n: expected at least 1"),
        (["serve", "embedded", "--workers", "0"], "workers: expected at least 1"),
        (["serve", "embedded", "--host", "203.0.113.1"], "cannot listen on 203.0.113.1:7860"),
        (["serve", "embedded", "--perturbation", "./nowhere"], "nowhere does not exist"),
        (["serve", "./nowhere", "--port", "0"], "nowhere"),
        (["serve", "embedded", "--port", "http"], "port: expected int, got http"),
        (["classify", "embedded", __file__], "the following arguments are required: --labels"),
        (["classify"], "the following arguments are required: model, images, --labels"),
        (["defend"], "the following arguments are required: source, --out"),
        (["report"], "the following arguments are required: reports"),
        (["classify", "embedded:", __file__, "--labels", "a,b"], "did you mean 'embedded'?"),
        (["classify", "out/nowhere", __file__, "--labels", "a,b"], "As a folder: there is no 'out/nowhere' here"),
        (["defend", "embedded:", "--out", "x"], "did you mean 'open_clip:embedded'?"),
        (["classify", "embedded", __file__, "--labels", "caf\udce9,b"], "is not valid Unicode"),
        (["classify", "./nowhere", __file__, "--labels", "a,b", "--device", "cudaa"], "device: expected one of cpu"),
        (["classify", "open_clip:embedded", __file__, "--labels", "a,b"], "is an encoder without a defence; expected"),
        (["classify", "", __file__, "--labels", "a,b"], "model: expected 'embedded', a folder, or owner/name"),
        (
            ["classify", "https://huggingface.co/a/b", __file__, "--labels", "a,b"],
            "is the address of a page; write 'a/b'",
        ),
        (["serve", "embedded", "--port", "99999"], "port: expected a number from 0 (a free one) to 65535, got 99999"),
        (["attack", "open_clip:embedded", "--out", __file__ + "/x.safetensors"], "/x.safetensors could not be written"),
        (["attack", "open_clip:embedded", "--image-size", "0"], "image_size: expected at least 1 pixel, got 0"),
        (["evaluate", "embedded", "--preset", "smoke", "--out", __file__], "a file is where a folder is expected"),
        (["evaluate", "embedded", "--preset", "smoke", "--out", ""], "out: expected the path of a folder"),
        (["defend", "open_clip:embedded", "--out", ""], "out: expected the path of a folder"),
        (["attack", "open_clip:embedded", "--out", ""], "out: expected the path of a folder"),
    ],
)
def test_user_error_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("zepad: ")
    assert message in said.err
    assert said.err.count("\n") == 1


def test_doctor_reports_versions_and_assets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["zepad-mm"] == __version__
    assert found["shipped"]["clothing"]
    main(["doctor"])
    assert "torch" in capsys.readouterr().out


def test_evaluate_on_class_folders(saved: str, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The classes of the folders replace those of the saved model."""
    out = tmp_path / "out"
    words = [
        "evaluate",
        saved,
        "--data",
        photos,
        "--threats",
        "T2",
        "--eps",
        "2/255",
        "--n",
        "5",
        "--out",
        str(out),
    ]
    words += ["--preset", "smoke"]
    assert main([*words, "--json", "--quiet"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "report.json").read_text())
    assert printed["meta"]["config"]["model"]["class_names"] == ["cat", "dog"]
    assert {row["epsilon"] for row in printed["rows"] if row["threat"] == "T2"} == {2 / 255}
    assert {row["n"] for row in printed["rows"]} == {5}
    for name in ("report.md", "records.parquet", "accuracy.png", "confidence.png"):
        assert (out / name).is_file()
    assert main([*words, "--resume", "--no-figures", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("# Robustness on")


def test_classify_prints_labels_and_evidence(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = tmp_path / "red.png"
    Image.new("RGB", (40, 30), "red").save(photo)
    assert main(["classify", saved, str(photo), str(photo), "--labels", "cat, dog", "--json", "--evidence"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert [answer["image"] for answer in answers] == [str(photo)] * 2
    assert {one["label"] for one in answers[0]["answer"]["labels"]} == {"cat", "dog"}
    assert set(answers[0]["answer"]["evidence"]["confidences"]) == {"full", "lora", "benign"}
    assert main(["classify", saved, str(photo), "--labels", "cat,dog", "--top", "1", "--evidence"]) == 0
    assert "flagged" in capsys.readouterr().out


def test_one_label_is_no_choice(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As where labels are separated by semicolons: the answer would be 100 % of the whole text."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    for labels, warns in (("a cat;a dog", True), ("a cat,a dog", False)):
        with warnings.catch_warnings():
            warnings.simplefilter("always")  # whatever PYTHONWARNINGS says
            assert main(["classify", saved, str(tmp_path / "a.png"), "--labels", labels]) == 0
        assert ("got one label, which is always the answer" in capsys.readouterr().err) == warns


def test_classify_takes_a_policy(
    clip_source: str, saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "red.png"
    Image.new("RGB", (40, 30), "red").save(photo)
    make_gated_zepad(clip_source).save_pretrained(tmp_path / "gated")
    words = ["classify", str(tmp_path / "gated"), str(photo), "--labels", "cat,dog", "--evidence"]
    weights = []
    for policy in ("zero_sacrifice", "white_box"):
        assert main([*words, "--policy", policy, "--json"]) == 0
        weights.append(json.loads(capsys.readouterr().out)[0]["answer"]["evidence"]["weights"]["benign"])
    assert weights[1] == pytest.approx(weights[0] / 3, rel=1e-3)
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "  weight of the branches: full " in said
    assert "the benign weight is halved at 0.00)" in said
    assert "(feature_gate), not flagged: the threshold is 0.000" in said
    for given, policy, message in (
        (words[1], "black_box", "--policy: expected one of"),
        (saved, "white_box", "the rule"),
    ):
        assert main(["classify", given, str(photo), "--labels", "cat,dog", "--policy", policy]) == 2
        assert message in capsys.readouterr().err


def test_classify_reads_folders_and_names_damaged_files(
    saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.png", "deep/b.JPG", "\x1b[31mc.png"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / name)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "deep" / "d.jfif", "JPEG")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "LICENCE").write_text("no image")
    (tmp_path / "deep" / "._b.JPG").write_bytes(b"left by another system")
    words = ["classify", saved, str(tmp_path), "--labels", "cat,dog"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out.count("cat") == 4
    assert "left out what is no image: 1 without a suffix, 1 .txt" in caplog.text
    assert "\x1b" not in said.out + said.err
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:50])
    assert main([*words, "--json"]) == 2
    said = capsys.readouterr()
    answers = {Path(entry["image"]).name: entry for entry in json.loads(said.out)}
    assert "cut.png' could not be read" in answers["cut.png"]["error"]
    assert len(answers["b.JPG"]["answer"]) == 2
    assert "1 of 5 images could not be read" in said.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["doctor"]) == 2
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert said.count("\n") == 1


def test_attack_writes_a_perturbation(
    clip_source: str, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "delta.safetensors"
    words = ["attack", clip_source, "--data", photos, "--eps", "6/255", "--steps", "2", "--image-size", "32"]
    assert main([*words, "--out", str(out), "--json", "--quiet"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["epsilon"] == pytest.approx(6 / 255)
    assert Perturbation.load(out, 6 / 255).delta.shape == (3, 32, 32)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_attack_reads_a_config_file_and_several_encoders(
    clip_source: str, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "attack.yaml"
    config.write_text(f"encoders: [{clip_source!r}]\nattack: uapgd\ndata: {photos}\nsteps: 2\nimage_size: 32\nn: 8\n")
    words = ["attack", "--config", str(config), "--out", str(tmp_path / "out"), "--json", "--quiet"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["encoders"] == [clip_source]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"uapgd.safetensors", "uapgd.png"}
    small = "open_clip:embedded?image_size=64"
    assert main([*words, "--encoders", json.dumps([clip_source, small]), "--steps", "1"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["encoders"], about["steps"]) == ([clip_source, small], 1)
    assert main([*words, "--encoders", small, "--steps", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["encoders"] == [small]
    config.write_text("epsilom: 0.1\n")
    assert main(words) == 2
    assert "epsilom" in capsys.readouterr().err


def test_classify_abstains_and_flags(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = tmp_path / "red.png"
    Image.new("RGB", (40, 30), "red").save(photo)
    model = ZePAD.from_pretrained(saved)
    model.set_detector(DetectorConfig(threshold=-1.0))
    model.save_pretrained(tmp_path / "strict")
    words = ["classify", str(tmp_path / "strict"), str(photo), "--labels", "cat,dog", "--template", "a {}"]
    assert main([*words, "--on-adversarial", "abstain"]) == 0
    assert "no answer: it looks adversarial" in capsys.readouterr().out
    assert main([*words, "--on-adversarial", "flag", "--top", "1"]) == 0
    assert "(looks adversarial)" in capsys.readouterr().out


def test_serve_names_the_missing_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("zepad_mm.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "embedded"]) == 2
    assert "zepad serve needs fastapi: pip install 'zepad-mm[serve]'" in capsys.readouterr().err


# options that make the examples of --help fast; a later option overrides an earlier one
SMALLER = {
    "attack": ["--steps", "2", "--n", "16"],
    "defend": ["--steps", "2", "--n", "16", "--n-validation", "8", "--batch-size", "4", "--defences", "tecoa"],
    "evaluate": ["--preset", "smoke", "--threats", "clean", "--n", "4", "--no-figures"],
    "demo": ["--preset", "smoke", "--n", "4", "--model", "small"],
}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    Image.new("RGB", (60, 80), "red").save(folder / "photo.jpg")
    write_embedded_at(32, folder / "small")
    ZePAD.from_pretrained("embedded").save_pretrained(folder / "defended")
    return folder


def example_of(name: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The words after ``zepad`` in the example that its help shows."""
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    line = capsys.readouterr().out.partition("example:")[2].strip().splitlines()[0]
    assert line == COMMANDS[name].example
    words = shlex.split(line)
    assert words[:2] == ["zepad", name]
    return words[1:]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("serve", "push")])
def test_example_of_the_help_runs(
    name: str,
    examples: Path,
    clip_source: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Commands share one folder: report and card read the output of evaluate."""
    monkeypatch.chdir(examples)
    if name in ("report", "card") and not Path("outputs/evaluation/report.json").is_file():
        assert main([*example_of("evaluate", capsys), *SMALLER["evaluate"], "--quiet"]) == 0
    if name == "defend":
        shutil.rmtree(examples / "defended")
    words = [*example_of(name, capsys), *SMALLER.get(name, []), "--quiet"]
    if name == "defend":  # a small CLIP: seconds, where the embedded one takes minutes
        words[words.index("open_clip:embedded")] = clip_source
    try:
        # two steps of tuning do not beat the public weights
        expected = {"doctor": (0, 1), "defend": (NO_EFFECT,)}.get(name, (0,))
        assert main([*words, "--json"] if COMMANDS[name].json else words) in expected
        said, errors = capsys.readouterr()
        assert name != "defend" or "NOTHING WAS TUNED" in errors.splitlines()[-1]
        assert json.loads(said) if COMMANDS[name].json else said
    finally:
        if name == "defend":
            ZePAD.from_pretrained("embedded").save_pretrained(examples / "defended")


def test_example_of_push_runs(examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against a local Hub, in a new process: the client reads the address of the Hub at import."""
    words = [word for word in example_of("push", capsys) if word not in ("--report", "outputs/evaluation")]
    with running_hub() as hub:
        hub.tokens["key"] = "owner"
        variables = {
            **os.environ,
            **environment(hub, tmp_path),
            "HF_TOKEN": "key",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        }
        command = [sys.executable, "-m", "zepad_mm.cli", *words, "--json", "--quiet"]
        done = subprocess.run(
            command, env=variables, cwd=examples, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert hub.url in json.loads(done.stdout)["url"]
        assert "config.json" in hub.files("owner/name")
        assert hub.repos["owner/name"].private
        variables["HF_TOKEN"] = "no-key"
        refused = subprocess.run(
            command, env=variables, cwd=examples, capture_output=True, text=True, timeout=120, check=False
        )
        assert refused.returncode == 2
        assert refused.stderr.startswith("zepad: ")
        assert "no-key" not in refused.stderr + refused.stdout


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_example_of_serve_runs(
    stop: signal.Signals, capsys: pytest.CaptureFixture[str], examples: Path, tmp_path: Path
) -> None:
    """The server stops on Ctrl-C and SIGTERM, and leaves no uploads behind."""
    words = [*example_of("serve", capsys), "--port", "0", "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "zepad_mm.cli", *words],
        stdout=subprocess.PIPE,
        text=True,
        cwd=examples,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{url}/v1/health", timeout=60) as answer:
            assert json.load(answer) == {"status": "ok"}
        assert list(tmp_path.glob("zepad-*"))
        process.send_signal(stop)
        assert process.wait(60) == 130
    assert not list(tmp_path.glob("zepad-*"))
