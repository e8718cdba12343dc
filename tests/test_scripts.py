"""The examples for third-party attack libraries and the benchmarks run, at a small size."""

from __future__ import annotations

import importlib
import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks import kill_tune, parity_page

ROOT = Path(__file__).parents[1]
NEEDS = {
    "torchattacks_apgd": "torchattacks",
    "adv_lib_apgd": "adv_lib.attacks.auto_pgd",
    "art_pgd": "art.estimators.classification",
}


def test_examples_are_all_listed_here() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(NEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(NEEDS))
def test_example_prints_an_accuracy(name: str) -> None:
    try:
        importlib.import_module(NEEDS[name])
    except ImportError as error:
        pytest.skip(f"{NEEDS[name]} is not usable here ({error}); pip install 'zepad-mm[attacks]'")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0 <= float(done.stdout.split()[-1]) <= 1


@pytest.mark.slow
def test_attack_parity_writes_its_record(tmp_path: Path) -> None:
    for module in ("torchattacks", "adv_lib.attacks.auto_pgd"):
        pytest.importorskip(module, exc_type=ImportError)
    published = tmp_path / "published.py"
    published.write_text("ABOUT = 'none'\nATTACKS = {'nothing': lambda network, parts, images, labels, size: images}\n")
    small = ["--n", "8", "--few", "4", "--steps", "2", "--queries", "2", "--stages", "3", "--preset", "smoke"]
    small += ["--branch", "none", "--published", str(published), "--out", str(tmp_path / "parity.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for _ in range(2):  # the second run finds everything done
        done = subprocess.run(
            [sys.executable, "benchmarks/attack_parity.py", *small],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "parity.json").read_text())["runs"][0]["targets"]["whole defence"]
    assert found["pgd"]["largest_difference"] == 0
    assert list(found["stages"]) == ["T2", "published: nothing", "T2, few images"]
    assert "Whole defence" in (tmp_path / "parity.md").read_text()


def test_parity_summary_compares_with_the_union_and_the_cost() -> None:
    def result(right: str, seconds: float) -> dict[str, object]:
        share = right.count("1") / len(right)
        return {"right": f"{int(right, 2):x}", "n": len(right), "accuracy": share, "cpu_seconds": seconds}

    stages = {
        parity_page.COLUMN: result("0011001100", 9.0),
        "published: a": result("1111100000", 5.0),
        "published: b": result("0111000000", 5.0),  # on what the first one left: the union
        parity_page.FEW: result("00110", 2.0),
        parity_page.AUTO: result("00111", 8.0),
    }
    said = parity_page.summary(stages)
    assert said["above_union"] == pytest.approx(0.1)
    assert (said["only_ours_breaks"], said["only_theirs_breaks"]) == (1, 2)
    assert said["cost_ratio"] == 4
    assert said["above_auto"] == pytest.approx(-0.2)
    pgd = {"largest_difference": 0.0, "unequal_pixels": 0.0}
    said_so = "\n".join(parity_page.sentences({"stages": stages, "pgd": pgd}))
    assert "10.0 points above" in said_so
    assert "MORE THAN" in said_so  # a limit that does not hold is written large
    assert "LESS THAN" not in said_so


COUNTING = """
import sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
begun = (out / "begun").exists()
(out / "begun").touch()
time.sleep({seconds})
(out / "count").write_text("other" if begun and {differs} else "same")
"""


@pytest.mark.parametrize("differs", [False, True])
def test_kill_and_resume_counts_different_results(
    differs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.helpers.kill_and_resume import kill_and_resume_repeatedly

    words = [sys.executable, "-c", COUNTING.format(seconds=0.3, differs=differs)]
    moments = random.Random(0)
    found = kill_and_resume_repeatedly(words, tmp_path, 2, moments, lambda out: (out / "count").read_text(), "counting")
    assert found["kills"] == 2
    assert (found["different"] > 0) == differs


LAUNCHER = """
import subprocess, sys, time
from pathlib import Path
late = "import sys, time; time.sleep(4); open(sys.argv[1], 'w')"
worker = subprocess.Popen([sys.executable, "-c", late, {late!r}], start_new_session=True)
Path({pid!r}).write_text(str(worker.pid))
time.sleep(60)
"""


def test_kill_reaches_the_workers_of_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun gives each worker its own session; a surviving worker would finish what another resumes."""
    from tests.helpers.kill_and_resume import kill

    late, pid = tmp_path / "late", tmp_path / "pid"
    assert kill([sys.executable, "-c", LAUNCHER.format(late=str(late), pid=str(pid))], 2)
    worker = int(pid.read_text())
    assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE
    assert not late.exists()


@pytest.mark.slow
def test_kill_tune_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ["--data.n_train", "16", "--data.n_validation", "8", "--settings.batch_size", "8"]
    monkeypatch.setattr(kill_tune, "TUNE", [*kill_tune.TUNE, *few])
    words = ["kill_tune", "--kills", "0", "--steps", "2", "--processes", "1", "--out", str(tmp_path / "tune.json")]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="0"):
        kill_tune.main()
    found = json.loads((tmp_path / "tune.json").read_text())
    assert found["1 process(es)"] == {"kills": 0, "runs": 0, "different": 0, "after_a_checkpoint": 0}


def test_demo_retune_calls_a_program_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = runpy.run_path(str(ROOT / "scripts" / "demo.py"))
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: calls.append(command))
    assert demo["retune"](tmp_path) == tmp_path / "model"
    ((_, flag, module, *options),) = calls
    assert flag == "-m"
    monkeypatch.setattr(sys, "argv", [module, *options])
    parsed = importlib.import_module(module).parse_options()
    assert (parsed.out, parsed.work) == (tmp_path / "model", tmp_path / "tuned")


def test_cost_of_the_gate_is_measured_on_the_shipped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gate_cost", "--small", "--out", str(tmp_path / "cost.json")])
    runpy.run_module("benchmarks.gate_cost", run_name="__main__")
    ratios = json.loads((tmp_path / "cost.json").read_text())["ratios"]
    assert set(ratios) == {"defended / undefended", "gate / defended", "gradient / gradient of an optimised copy"}
    assert 0 < ratios["gate / defended"] < 1
