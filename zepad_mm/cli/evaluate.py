"""``zepad evaluate``, ``zepad demo`` and ``zepad report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zepad_mm.cli.common import DATA, MODEL, Command, UsageError, budget, output_paths, print_result, split_commas


def _declare_evaluate(parser: Any) -> None:
    parser.add_argument("model", type=str, help=f"{MODEL}; or the source of a CLIP, e.g. open_clip:embedded")
    parser.add_argument("--threats", type=str, default=None, help="keys by comma, e.g. T1,T2 (default: the preset's)")
    parser.add_argument("--eps", type=str, default=None, help="budget of T2 and T3, e.g. 4/255, or 0.5 in L2")
    parser.add_argument("--norm", type=str, default="linf", help="of T2 and T3: linf, or l2, which needs --eps")
    parser.add_argument("--published", type=str, default=None, help="files of published perturbations for T1, by comma")
    parser.add_argument("--n", type=int, default=None, help="test images (default: all)")
    parser.add_argument("--data", type=str, default="embedded", help=DATA)
    parser.add_argument("--out", type=str, default="outputs/evaluation", help="folder for report.json and the rest")
    parser.add_argument("--preset", type=str, default="full", help="full (a GPU, or a night), demo (minutes) or smoke")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--resume", action="store_true", help="continue a killed run in --out")
    parser.add_argument("--no-figures", action="store_true", help="draw no plots")


def _evaluate(options: Any) -> int:
    from zepad_mm.evaluation import PRESETS

    changes: dict[str, Any] = {"seed": options.seed, "n": options.n}
    changes["threats"] = tuple(split_commas(options.threats)) if options.threats else None
    if options.norm != "linf" and not options.eps:
        raise UsageError("--eps: another norm needs a budget of its own, e.g. --norm l2 --eps 0.5")
    changes["norm"], changes["epsilon"] = options.norm, budget(options.eps, options.norm) if options.eps else None
    changes["published"] = tuple(split_commas(options.published)) if options.published else None
    values = {**PRESETS.get(options.preset).to_dict(), **{k: v for k, v in changes.items() if v is not None}}
    settings = type(PRESETS.get(options.preset)).from_dict(values)
    return _evaluate_and_print(options, settings, options.data, resume=options.resume, figures=not options.no_figures)


def _evaluate_and_print(options: Any, settings: Any, source: str, *, resume: bool, figures: bool) -> int:
    from zepad_mm.data import load_class_names
    from zepad_mm.evaluation import EvalData, evaluate
    from zepad_mm.evaluation.subjects import load_model, resize_of
    from zepad_mm.models.zepad import ZePAD

    model = load_model(options.model, load_class_names(source, settings.test_split))
    data = EvalData.load(source, settings, resize_of(model))
    report = evaluate(model, data=data, settings=settings, out=options.out, resume=resume)
    files = output_paths(options.out, "report.json", "report.md", "records.parquet")
    if figures:
        from zepad_mm.evaluation.plots import write_figures

        defence = model if isinstance(model, ZePAD) else None
        files += map(str, write_figures(report, options.out, defence, data))
    print_result(options, report.to_dict(), f"{report.markdown()}\nWritten: {', '.join(files)}")
    return 0


EVALUATE = Command(
    about="Evaluate a defended model, or a plain CLIP, under the threat models; write a report.",
    example="zepad evaluate embedded --preset demo --threats T1,T2 --eps 4/255 --n 200 --out outputs/evaluation",
    declare=_declare_evaluate,
    run=_evaluate,
)


def _declare_demo(parser: Any) -> None:
    parser.add_argument("--out", type=str, default="demo-out", help="folder of the report and the plots")
    parser.add_argument("--n", type=int, default=None, help="test images (default: the preset's; 632 ship)")
    parser.add_argument("--preset", type=str, default="demo", help="strength of the attacks: smoke, demo or full")
    parser.add_argument("--model", type=str, default="embedded", help=MODEL)


def _demo(options: Any) -> int:
    from dataclasses import replace

    from zepad_mm.evaluation.settings import PRESETS, STANDARD_THREATS

    settings = PRESETS.get(options.preset)
    settings = replace(settings, threats=STANDARD_THREATS, n=settings.n if options.n is None else options.n)
    return _evaluate_and_print(options, settings, "embedded", resume=False, figures=True)


DEMO = Command(
    about="Evaluate the embedded CLIP with and without its defence (minutes on a CPU).",
    example="zepad demo --out demo-out",
    declare=_declare_demo,
    run=_demo,
)


def _declare_report(parser: Any) -> None:
    parser.add_argument("reports", nargs="+", type=str, help="report.json files, or their folders")
    parser.add_argument("--format", type=str, default="md", help="md, latex (booktabs), csv or json")
    parser.add_argument("--out", type=str, default=None, help="file to write (default: print it)")


def _report(options: Any) -> int:
    from zepad_mm.evaluation import Report
    from zepad_mm.evaluation.tables import FORMATS, entries
    from zepad_mm.utils.io import write_text

    render = FORMATS.get(options.format)
    reports = {}
    for given in options.reports:
        name = str(Path(given).parent if Path(given).name == "report.json" else Path(given))
        if name in reports:
            raise UsageError(f"{given} is given twice; expected different reports")
        reports[name] = Report.load(given)
    text = render(entries(reports))
    if options.out is None:
        print(text, end="")
    else:
        write_text(options.out, text)
        print(f"Written: {options.out}")
    return 0


REPORT = Command(
    about="Show reports of several data sets, seeds or models in one table.",
    example="zepad report outputs/evaluation --format md",
    declare=_declare_report,
    run=_report,
    json=False,
)
