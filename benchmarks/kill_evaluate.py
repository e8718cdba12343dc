#!/usr/bin/env python
"""Kill an evaluation and a crafting run with SIGKILL at random moments; resumed runs must give the same result.

    python -m benchmarks.kill_evaluate --kills 20 --out results/kill.json

The model, images and attacks are those of ``zepad evaluate embedded --preset smoke``; crafting is
``zepad attack``, which saves no intermediate state: it is killed and restarted.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.helpers.kill_and_resume import kill_and_resume_repeatedly
from zepad_mm.evaluation import Records, Report
from zepad_mm.utils.io import read_tensors, write_json
from zepad_mm.utils.provenance import provenance

ZEPAD = [sys.executable, "-c", "import sys; from zepad_mm.cli import main; sys.exit(main())"]
EVALUATE = ["evaluate", "embedded", "--preset", "smoke", "--threats", "clean,T1,T2,T3", "--n", "12", "--no-figures"]
EVALUATE += ["--resume"]
ATTACK = ["attack", "open_clip:embedded", "--attack", "feature_uap", "--steps", "40", "--n", "200"]


def outcome(folder: Path) -> tuple[Any, ...]:
    """Return all that must not change: rows without seconds, detection, and every prediction."""
    report, records = Report.load(folder), Records.load(folder)
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in report.rows]
    answers = {key: classes.tolist() for key, classes in records.predictions.items()}
    return rows, report.detection, answers, {key: mask.tolist() for key, mask in records.flagged.items()}


def perturbation(path: Path) -> list[float]:
    return read_tensors(path)[0]["delta"].flatten().tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of kills of the evaluation, and of crafting")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--out", type=Path, default=Path("outputs/kill.json"), help="file of the result")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        evaluation = kill_and_resume_repeatedly(
            [*ZEPAD, *EVALUATE], Path(name) / "evaluation", options.kills, moments, outcome, "evaluate"
        )
        crafting = kill_and_resume_repeatedly(
            [*ZEPAD, *ATTACK], Path(name) / "crafting", options.kills, moments, perturbation, "attack"
        )
    config = {"kills": options.kills, "evaluation": " ".join(EVALUATE), "crafting": " ".join(ATTACK)}
    found = {"evaluation": evaluation, "crafting": crafting}
    write_json(options.out, {"meta": provenance(seed=options.seed, config=config), **found})
    print(found)
    sys.exit(evaluation["different"] + crafting["different"])


if __name__ == "__main__":
    main()
