"""Evaluations on the Hub: a data set repository of the records, with the report as its card.

Beside report.py and records.py, since it needs both, and the Hub client that neither needs.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from zepad_mm.evaluation.records import FILE, Records
from zepad_mm.evaluation.report import JSON, MARKDOWN, Report
from zepad_mm.utils.hub import Access, card_text, fetch, push_folder
from zepad_mm.utils.io import write_text

FILES = (JSON, MARKDOWN, FILE)


def push_report(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
) -> str:
    """Publish ``report.json``, ``report.md`` and ``records.parquet`` of an evaluation as a data set.

    Args:
        folder: the ``out`` of :func:`zepad_mm.evaluate`.
        repo_id, private, token, branch: see :func:`zepad_mm.utils.hub.push_folder`.

    Returns:
        The URL of the commit.

    Raises:
        FileNotFoundError: one of the files is missing; ValueError: damaged, or records of another run than the report.
    """
    folder = Path(folder)
    report, records = Report.load(folder), Records.load(folder)
    if records.rows() != report.rows:
        raise ValueError(f"{folder}: {FILE} gives other rows than {JSON}; they are of different evaluations")
    card = card_text(
        report.markdown() + f"\nLoad it: `Report.load(fetch_report({repo_id!r}))` of `zepad_mm.evaluation`.\n",
        tags=["adversarial-robustness", "evaluation", "zepad"],
        configs=[{"config_name": "default", "data_files": FILE}],
    )
    with TemporaryDirectory() as copy:
        for name in (JSON, FILE):
            shutil.copyfile(folder / name, Path(copy) / name)
        write_text(Path(copy) / MARKDOWN, report.markdown())
        write_text(Path(copy) / "README.md", card)
        message = "Upload an evaluation"
        return push_folder(
            copy, repo_id, private=private, token=token, branch=branch, message=message, repo_type="dataset"
        )


def fetch_report(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Return the folder of a published evaluation, for ``Report.load`` and ``Records.load``; see ``hub.fetch``."""
    access = Access(token=token, cache_dir=cache_dir, local_files_only=local_files_only, force_download=force_download)
    return fetch(repo_id, FILES, required=(JSON, FILE), revision=revision, access=access, repo_type="dataset")
