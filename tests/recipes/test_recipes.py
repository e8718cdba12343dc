"""Every recipe runs on the embedded default by its smoke config."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zepad_mm.defences import make_defence
from zepad_mm.utils.config import Config
from zepad_mm.utils.stopping import NO_EFFECT

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "recipes" / "configs" / "smoke"
OWN_TESTS = {"pretrain"}  # run in test_pretraining_recipes.py
OWN_TESTS |= {"train_heads", "train_gate"}  # run in tests/training
# recipe -> options that leave less to do
LESS = {"evaluate": ["--n", "4", "--threats", "[clean]"], "defend": ["--n", "4", "--threats", "[clean]"]}
LESS |= {"attack": ["--n", "16", "--steps", "2"], "tune": ["--data.n_train", "32", "--settings.batch_size", "16"]}


CONFIGS = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))


def recipe_of(config: Path) -> Any:
    """The module of the recipe that a configuration is named after."""
    names = sorted((path.stem for path in (ROOT / "recipes").glob("*.py")), key=len, reverse=True)
    name = next(name for name in names if config.stem.startswith(name))
    if name == "pretrain":
        pytest.importorskip("lightly")
    return importlib.import_module(f"recipes.{name}")


def settings_of(recipe: Any) -> type[Config]:
    """The class of a recipe's settings."""
    return recipe.Settings if hasattr(recipe, "Settings") else recipe.Recipe


def test_recipes_have_a_smoke_config() -> None:
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.py")}
    assert recipes == {path.stem for path in SMOKE.glob("*.yaml")}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_config_parses(path: Path) -> None:
    recipe = recipe_of(path)
    settings = settings_of(recipe).from_cli(["--config", str(path)])
    assert type(settings).from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    if hasattr(settings, "defence"):
        make_defence(settings.defence, settings.defence_options)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_config_header_names_its_recipe(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch line is accepted by the recipe; a measured cost names the file it comes from."""
    monkeypatch.chdir(ROOT)
    recipe, relative = recipe_of(path), str(path.relative_to(ROOT))
    assert path.read_text().startswith("# ")
    comments = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
    header = dict(re.findall(r"^([\w ]+?): +(.+)$", "\n".join(comments).replace("\\\n", ""), re.M))
    assert "Run first" in header
    if path.parent == SMOKE:
        assert f"python recipes/{path.stem}.py --config {relative}" in comments
        return
    needed = ["Run first", "CPU", "one GPU", "8 GPUs", "2 nodes"]
    assert [key for key in header if key in needed] == needed
    for devices in needed[1:]:
        found = re.search(r"recipes/(\w+)\.py (.+)", header[devices])
        if found is None:
            assert header[devices] == "the same" or "one process" in header[devices]
            continue
        assert f"recipes.{found[1]}" == recipe.__name__
        assert f"--config {relative}" in found[2]
        settings_of(recipe).from_cli(found[2].split())
    for cost in {"Memory", "Time"} & set(header):
        sources = re.findall(r"[\w/]+\.json", header[cost])
        assert any((ROOT / source).is_file() for source in sources) or header[cost].endswith("estimated by --plan")


@pytest.mark.parametrize("recipe", sorted(path.stem for path in SMOKE.glob("*.yaml") if path.stem not in OWN_TESTS))
def test_recipe_runs_its_smoke_config(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.chdir(ROOT)
    words = ["--config", f"recipes/configs/smoke/{recipe}.yaml", "--out", str(out), *LESS.get(recipe, [])]
    monkeypatch.setattr(sys, "argv", [f"recipes/{recipe}.py", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(f"recipes/{recipe}.py", run_name="__main__")
    printed, errors = capsys.readouterr()
    assert ended.value.code in (0, NO_EFFECT), errors
    weak = any(text in printed for text in ("than the public ones", "has no effect"))  # a few steps improve little
    assert (ended.value.code == NO_EFFECT) == weak
    assert any(out.rglob("*.json")) or any(out.rglob("*.safetensors"))


ALL_ON_TWO = """
import sys
import accelerate
from recipes import defend, pretrain, train_heads, tune
accelerate.Accelerator.end_training = lambda self: None  # it would end the process group of the next recipe
few = ["--settings.steps", "2", "--settings.batch_size", "8", "--data.n_train", "16", "--data.n_validation", "8"]
few += ["--source", "open_clip:embedded?image_size=32"]
small = ["--settings.train.steps", "1", "--settings.n_train", "32", "--n", "4", "--threats", "[clean]"]
small += ["--source", "open_clip:embedded?image_size=32"]
few_heads = ["--data.n_train", "32", "--data.n_validation", "16", "--settings.epochs", "1"]
for recipe, more in ((tune, few), (train_heads, few_heads), (defend, small)):
    name = recipe.__name__.rpartition('.')[2]
    common = ["--config", f"recipes/configs/smoke/{{name}}.yaml", "--out", f"{{sys.argv[1]}}/{{name}}"]
    recipe.main(recipe.Recipe.from_cli([*common, *more, "--processes", "2"]))
smoke = ["--config", "recipes/configs/smoke/pretrain.yaml", "--n", "64", "--batch_size", "16", "--epochs", "1"]
pretrain.main([*smoke, "--num_processes", "2", "--out", f"{{sys.argv[1]}}/pretrain"])
"""


@pytest.mark.slow
@pytest.mark.usefixtures("both_cores")
def test_recipes_run_on_two_processes(tmp_path: Path) -> None:
    """All that know of processes, one after the other in one launch."""
    pytest.importorskip("lightly")
    script = tmp_path / "all.py"
    script.write_text(ALL_ON_TWO.format(root=str(ROOT), recipes=str(ROOT / "recipes")))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launch, "--main_process_port", "0", str(script), str(tmp_path)],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "tune" / "tuned.json").read_text())["processes"] == 2
    assert json.loads((tmp_path / "pretrain" / "pretrain.json").read_text())["processes"] == 2
    assert (tmp_path / "train_heads").is_dir()
    assert (tmp_path / "defend" / "evaluation" / "report.json").is_file()
    assert "Robustness" in (tmp_path / "defend" / "README.md").read_text()


def test_recipe_names_an_unknown_key(tmp_path: Path) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text("out: somewhere\nepsilom: 0.1\n")
    done = subprocess.run(
        [sys.executable, "recipes/attack.py", "--config", str(config)],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode != 0
    assert "epsilom" in done.stderr


def test_committed_report_belongs_to_the_committed_model() -> None:
    path = ROOT / "results" / "demo" / "report.json"
    if not path.is_file():
        pytest.skip("the shipped model is not measured yet: scripts/demo --out results/demo")
    report = json.loads(path.read_text())
    shipped = json.loads((ROOT / "zepad_mm" / "assets" / "zepad" / "config.json").read_text())
    measured = report["meta"]["config"]["model"]
    assert {k: measured[k] for k in ("fusion", "fusion_params")} == {k: shipped[k] for k in ("fusion", "fusion_params")}
    assert measured["detector"] == shipped["detector"]
    assert min(row["n"] for row in report["rows"] if row["threat"] == "clean") >= 300


def test_embedded_assets_are_small_and_licensed() -> None:
    assets = ROOT / "zepad_mm" / "assets"
    files = [path for path in assets.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40 * 2**20
    assert (assets / "clip" / "open_clip_model.safetensors").stat().st_size <= 18e6
    for folder in sorted({path.parent.relative_to(assets).parts[0] for path in files}):
        assert (assets / folder / "README.md").read_text().strip()
    goals = {row["data"]: row for row in json.loads((assets / "clip" / "build.json").read_text())["rows"]}
    assert goals["imagenet20 test, 20 names"]["accuracy"] >= 0.75
    assert goals["clothing144 test, 10 names"]["accuracy"] >= 0.65
    assert goals["ImageNet photos, 1,000 names"]["accuracy"] >= 0.45


def test_source_never_unpickles_or_runs_remote_code() -> None:
    for path in (ROOT / "zepad_mm").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"trust_remote_code[\"']?\s*[=:](?!False)", text), path
        assert "import pickle" not in text, path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path
