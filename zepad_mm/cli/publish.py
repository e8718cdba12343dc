"""``zepad card`` and ``zepad push``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zepad_mm.cli.common import Command, print_result


def _declare_card(parser: Any) -> None:
    parser.add_argument("folder", type=str, help="folder of a saved model")
    parser.add_argument("--report", type=str, default=None, help="report.json of its evaluation, or its folder")


def _card(options: Any) -> int:
    from zepad_mm.evaluation import Report
    from zepad_mm.evaluation.model_card import write_card

    write_card(options.folder, None if options.report is None else Report.load(options.report))
    path = str(Path(options.folder) / "README.md")
    print_result(options, {"out": path}, f"Written: {path}")
    return 0


CARD = Command(
    about="Write the model card of a saved model from its evaluation report.",
    example="zepad card defended --report outputs/evaluation",
    declare=_declare_card,
    run=_card,
)


def _declare_push(parser: Any) -> None:
    parser.add_argument("model", type=str, help='"embedded", or the folder of a saved model')
    parser.add_argument("repo", type=str, help="owner/name on the Hub")
    parser.add_argument("--report", type=str, default=None, help="report that the model card is written from")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--branch", type=str, default=None, help="branch of the repository (default: main)")


def _push(options: Any) -> int:
    from zepad_mm.evaluation import Report
    from zepad_mm.evaluation.model_card import eval_result_files, model_card
    from zepad_mm.models.zepad import ZePAD

    report = None if options.report is None else Report.load(options.report)
    model = ZePAD.from_pretrained(options.model)
    card = None if report is None else model_card(model.config, report)
    results = None if report is None else eval_result_files(model.config, report)
    place: dict[str, Any] = {"private": options.private or None, "branch": options.branch}
    url = model.push_to_hub(options.repo, card=card, eval_results=results, **place)
    print_result(options, {"url": url}, f"Published: {url}")
    return 0


PUSH = Command(
    about="Publish a saved model on the Hub, with its model card; log in with `hf auth login` or set HF_TOKEN.",
    example="zepad push defended owner/name --report outputs/evaluation --private",
    declare=_declare_push,
    run=_push,
)
