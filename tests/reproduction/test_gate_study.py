"""The gate study on a tiny CLIP and a few images, from the command to its page."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from reproduction import gate_study, gate_tables
from tests.helpers.models import make_zepad, write_clip
from zepad_mm.attacks import Perturbation
from zepad_mm.models.gate import FeatureGate, GateConfig
from zepad_mm.training import write_gate, write_tuned
from zepad_mm.utils.io import read_json


def perturbations(folder: Path) -> None:
    """Small perturbations under the names of the attacks, so that none is crafted."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for name in gate_study.UNIVERSAL:
        delta = (torch.rand(3, 32, 32, generator=generator) - 0.5) * 0.06
        Perturbation(delta, gate_study.UNIVERSAL_EPSILON).save(folder / f"{name}.safetensors")
    for name in gate_study.PATCHES:
        patch = torch.rand(3, 6, 6, generator=generator)
        Perturbation(patch, 0.04, "patch").save(folder / f"{name}.safetensors")


def kept(folder: Path) -> dict[Path, int]:
    """Files of the caches, and when they were written."""
    return {path: path.stat().st_mtime_ns for path in (folder / "work").glob("*/cache/*.safetensors")}


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    source = write_clip(tmp_path)
    robust = make_zepad(source).branch("full").encoder
    write_tuned(tmp_path / "tuned", robust, {"role": "robust"})
    width = robust.feature_dim
    gate = FeatureGate(width, (width,), GateConfig(threshold=0.0, hidden=8, seen_attacks=("ssp",)))
    (tmp_path / "seed0").mkdir()
    write_gate(tmp_path / "seed0" / "gate.safetensors", gate)
    perturbations(tmp_path / "work" / "perturbations")
    words = [
        *("--clip", source, "--robust", str(tmp_path / "tuned"), "--gates", str(tmp_path / "seed0/gate.safetensors")),
        *("--data-root", str(tmp_path), "--work", str(tmp_path / "work")),
        *("--out", str(tmp_path / "gate.json"), "--sets", "clothing", "--n", "8", "--epsilons", "4"),
        *("--transfer", "pgd_stopped", "--white-box-n", "4", "--steps", "3", "--targeted-steps", "2"),
        *("--white-box-caps", "0", "1", "--batch-size", "4"),
    ]
    monkeypatch.setattr(sys, "argv", ["gate_study", *words])
    return tmp_path


def test_the_command_measures_resumes_and_its_page_shows_the_record(
    command: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--prepare"])
    gate_study.main()
    assert not (command / "gate.json").exists()
    monkeypatch.setattr(sys, "argv", sys.argv[:-1])
    made = kept(command)
    assert len(made) > 10
    gate_study.main()
    assert made.items() <= kept(command).items()  # what --prepare made is read
    first = read_json(command / "gate.json")
    rows = first["sets"]["clothing"]["rows"]
    assert [row["threat"] for row in rows].count("T1") == len(gate_study.UNIVERSAL) + len(gate_study.PATCHES)
    for row in rows:
        if row["threat"] != "T2":  # at cap 0 the benign branch has no weight
            assert row["gates"]["seed0"]["by_cap"][0] == row["robust"]
    white_box = [row["right"] for row in rows if row["threat"] == "T2"]
    assert len(white_box) == 2
    assert all(right == sorted(right, reverse=True) for right in white_box)
    assert "/" not in first["command"].replace("DIR", "")

    made = kept(command)
    gate_study.main()
    assert read_json(command / "gate.json")["sets"] == first["sets"]
    assert made == kept(command)

    page = gate_tables.render(first)
    assert "| clothing | 10" in page
    assert page.count("pgd_stopped 4/255") == 1

    further = command / "further.json"
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--universal", "--white-box-sets", "--out", str(further)])
    gate_study.main()
    rows = read_json(further)["sets"]["clothing"]["rows"]
    assert {row["threat"] for row in rows} == {"clean", "T1i", "corruption"}
    assert gate_tables.render(first, read_json(further)).count("pgd_stopped 4/255") == 2
