"""``zepad evaluate``, ``zepad demo`` and ``zepad report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zepad_mm.cli.common import DATA, MODEL, Command, UsageError, budget, listed, told, written

DEMO_THREATS = ("clean", "T1", "T1b", "T2", "T3")


def _declare_evaluate(parser: Any) -> None:
    parser.add_argument("model", type=str, help=MODEL)
    parser.add_argument("--threats", type=str, default=None, help="of clean,T1,T1p,T1b,T2,T3 (default: the preset's)")
    parser.add_argument("--eps", type=str, default=None, help="budget of T2 and T3, e.g. 4/255, or 0.5 in L2")
    parser.add_argument("--norm", type=str, default="linf", help="of T2 and T3: linf, or l2, which needs --eps")
    parser.add_argument("--published", type=str, default=None, help="perturbation files of others, for T1, by comma")
    parser.add_argument("--n", type=int, default=None, help="test pictures (default: all)")
    parser.add_argument("--data", type=str, default="embedded", help=DATA)
    parser.add_argument("--out", type=str, default="outputs/evaluation", help="folder for report.json and the rest")
    parser.add_argument("--preset", type=str, default="full", help="full (a GPU or a night), or demo (minutes)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--resume", action="store_true", help="take up a run in --out that was cut off")
    parser.add_argument("--no-figures", action="store_true", help="draw nothing")


def _evaluate(options: Any) -> int:
    from zepad_mm.evaluation import PRESETS

    changes: dict[str, Any] = {"seed": options.seed, "n": options.n}
    changes["threats"] = tuple(listed(options.threats)) if options.threats else None
    if options.norm != "linf" and not options.eps:
        raise UsageError("--eps: another norm needs a budget of its own, e.g. --norm l2 --eps 0.5")
    changes["norm"], changes["epsilon"] = options.norm, budget(options.eps, options.norm) if options.eps else None
    changes["published"] = tuple(listed(options.published)) if options.published else None
    known = {**PRESETS.get(options.preset).to_dict(), **{k: v for k, v in changes.items() if v is not None}}
    settings = type(PRESETS.get(options.preset)).from_dict(known)
    return _judge(options, settings, options.data, resume=options.resume, figures=not options.no_figures)


def _judge(options: Any, settings: Any, source: str, *, resume: bool, figures: bool) -> int:
    from zepad_mm.evaluation import EvalData, evaluate
    from zepad_mm.models.zepad import ZePAD

    model = ZePAD.from_pretrained(options.model)
    data = EvalData.load(source, settings)
    if model.class_names != data.test.class_names:
        model.set_classes(data.test.class_names)
    report = evaluate(model, data=data, settings=settings, out=options.out, resume=resume)
    files = written(options.out, "report.json", "report.md", "records.parquet")
    if figures:
        from zepad_mm.evaluation.plots import write_figures

        files += map(str, write_figures(report, options.out, model, data))
    told(options, report.to_dict(), f"{report.markdown()}\nWritten: {', '.join(files)}")
    return 0


EVALUATE = Command(
    about="Judge a defended model under the threat models; write a report.",
    example="zepad evaluate embedded --preset demo --threats T1,T2 --eps 4/255 --n 200 --out outputs/evaluation",
    declare=_declare_evaluate,
    run=_evaluate,
)


def _declare_demo(parser: Any) -> None:
    parser.add_argument("--out", type=str, default="demo-out", help="folder of the report and the figures")
    parser.add_argument("--n", type=int, default=None, help="test pictures (default: the preset's; 632 ship)")
    parser.add_argument("--preset", type=str, default="demo", help="how hard the attacks are: smoke, demo or full")
    parser.add_argument("--model", type=str, default="embedded", help=MODEL)


def _demo(options: Any) -> int:
    from dataclasses import replace

    from zepad_mm.evaluation import PRESETS

    settings = PRESETS.get(options.preset)
    settings = replace(settings, threats=DEMO_THREATS, n=settings.n if options.n is None else options.n)
    return _judge(options, settings, "embedded", resume=False, figures=True)


DEMO = Command(
    about="Attack the embedded CLIP, defend it and measure it, under every threat model (minutes on a CPU).",
    example="zepad demo --out demo-out",
    declare=_declare_demo,
    run=_demo,
)


def _declare_report(parser: Any) -> None:
    parser.add_argument("reports", nargs="+", type=str, help="report.json files, or the folders they are in")
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
    about="Put reports of several data sets, seeds or models into one table.",
    example="zepad report outputs/evaluation --format md",
    declare=_declare_report,
    run=_report,
    json=False,
)
