"""Third-party attack libraries run on the whole defence as on any classifier."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDS = {
    "torchattacks_autoattack": "torchattacks",
    "adv_lib_apgd": "adv_lib.attacks.auto_pgd",
    "art_pgd": "art.estimators.classification",
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in (ROOT / "recipes" / "examples").glob("*.py")} == set(NEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(NEEDS))
def test_example(name: str) -> None:
    try:
        importlib.import_module(NEEDS[name])
    except ImportError as error:
        pytest.skip(f"{NEEDS[name]} is not usable here ({error}); pip install 'zepad-mm[attacks]'")
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "examples" / f"{name}.py")],
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0 <= float(done.stdout.split()[-1]) <= 1
