"""Registries of named implementations."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zepad_mm.attacks import UNIVERSAL_ATTACKS
from zepad_mm.evaluation import PRESETS
from zepad_mm.utils.registry import Registry, load_plugins

ROOT = Path(__file__).parents[2]


def test_registry_errors_suggest_names() -> None:
    registry: Registry[int] = Registry("number")
    registry.register("one")(1)
    with pytest.raises(ValueError, match="registered already"):
        registry.register("one")(2)
    with pytest.raises(ValueError, match="unknown number 'onne'; did you mean 'one'"):
        registry.get("onne")
    assert list(registry) == ["one"]
    assert "two" not in registry


def test_broken_plugin_is_logged_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Plugins of installed packages are loaded when a name is unknown; the package of examples/ is one of them."""
    about = tmp_path / "zepad_mm_plugins-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: zepad-mm-plugins\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[zepad_mm.plugins]\nbroken = broken_plugin\nstripes = zepad_mm_stripes\n")
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('no such card')\n")
    for folder in (ROOT / "examples" / "plugin", tmp_path):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(UNIVERSAL_ATTACKS, "_entries", dict(UNIVERSAL_ATTACKS._entries))
    load_plugins.cache_clear()
    try:
        attack = UNIVERSAL_ATTACKS.get("stripes")(epsilon=0.1, image_size=8)
    finally:
        load_plugins.cache_clear()
        sys.modules.pop("zepad_mm_stripes", None)
    found = attack.fit(lambda images: images.flatten(1), torch.rand(2, 3, 8, 8))
    assert found.delta.abs().max() == pytest.approx(0.1)
    assert "the plugin broken (broken_plugin) could not be loaded: no such card" in caplog.text
    assert "stripes" not in list(PRESETS.get("full").universal)


@pytest.mark.slow
def test_example_plugin_installs(tmp_path: Path, clip_source: str) -> None:
    pytest.importorskip("setuptools")
    package = shutil.copytree(ROOT / "examples" / "plugin", tmp_path / "plugin")
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    install = [sys.executable, "-m", "pip", "install", "-q", *offline, "--target", str(tmp_path / "site"), str(package)]
    subprocess.run(install, check=True, timeout=120)
    words = ["attack", clip_source, "--attack", "stripes", "--n", "4", "--out", str(tmp_path / "stripes.safetensors")]
    paths = os.pathsep.join([os.environ["PYTHONPATH"], str(tmp_path / "site")])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "zepad_mm.cli", *words, "--quiet"], check=True, env=environment, timeout=200)
    assert (tmp_path / "stripes.safetensors").is_file()
