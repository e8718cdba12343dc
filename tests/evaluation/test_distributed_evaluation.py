"""Two processes share the batches of an evaluation and give the report of one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.toy_defence import SETTINGS, defended, eval_data
from zepad_mm.evaluation import Records, Report, evaluate

ROOT = Path(__file__).parents[2]
FEW = replace(
    SETTINGS,
    threats=("clean", "T1", "T2"),
    batch_size=8,
    n=16,
    n_validation=16,
    rules=("rfdm",),
    pools=("branch",),
    adaptive=("average_logit",),
    universal_steps={"feature_uap": 3},
    family_steps={"feature_uap": 3},
    steps=2,
    diagnostics_n=0,
)
SCRIPT = """
import sys
from pathlib import Path
from tests.evaluation.test_distributed_evaluation import *
from zepad_mm.training import make_accelerator
out, accelerator = Path(sys.argv[1]), make_accelerator(2)
evaluate(defended(), data=eval_data(), settings=FEW, out=out, accelerator=accelerator)
(out / f"process-{accelerator.process_index}").touch()
accelerator.end_training()
"""


def without_clock(report: Report) -> tuple[object, ...]:
    """Everything in a report that does not depend on the clock."""
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in report.rows]
    kept = {key: value for key, value in report.meta.items() if key in ("certificate", "false_alarms", "diagnostics")}
    return rows, report.detection, kept


@pytest.mark.slow
@pytest.mark.usefixtures("both_cores")
def test_two_processes_give_the_report_of_one(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    line = [*launch, "--main_process_port", "0", str(script), str(tmp_path / "two")]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "two").glob("process-*"))) == 2
    one = evaluate(defended(), data=eval_data(), settings=FEW, out=tmp_path / "one")
    assert (
        without_clock(Report.load(tmp_path / "two"))
        == without_clock(Report.load(tmp_path / "one"))
        == without_clock(one)
    )
    first, second = (Records.load(tmp_path / name) for name in ("one", "two"))
    assert list(first.images) == list(second.images)
    assert all((first.predictions[key] == second.predictions[key]).all() for key in first.predictions)
    assert not (tmp_path / "two" / "cache" / "parts").exists()
