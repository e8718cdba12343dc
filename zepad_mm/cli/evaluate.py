"""``zepad evaluate``, ``zepad demo`` and ``zepad report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zepad_mm.cli.common import (
    DATA,
    MODEL,
    Command,
    UsageError,
    budget,
    check_policy,
    declare_policy,
    output_paths,
    print_result,
    split_commas,
)

CLIPS = "open_clip:ViT-B-32/openai, hf:openai/clip-vit-base-patch32, or with robust weights open_clip:NAME/TAG+FILE"
PRESET_HELP = "full (a GPU, or a night), demo (minutes), smoke, or apgd_ce_t (the protocol of FARE)"


def _declare_evaluate(parser: Any) -> None:
    parser.add_argument(
        "model", type=str, nargs="+", help=f"{MODEL}; or the source of a CLIP: {CLIPS}; several at once"
    )
    parser.add_argument("--threats", type=str, default=None, help="keys by comma, e.g. T1,T2 (default: the preset's)")
    parser.add_argument("--eps", type=str, default=None, help="budget of T2 and T3, e.g. 4/255; with --suite several")
    parser.add_argument("--norm", type=str, default="linf", help="of T2 and T3: linf, or l2, which needs --eps")
    parser.add_argument("--published", type=str, default=None, help="files of published perturbations for T1, by comma")
    parser.add_argument("--n", type=int, default=None, help="test images of each data set (default: the preset's)")
    parser.add_argument("--data", type=str, default="embedded", help=f"{DATA}, or wds:OWNER/NAME; several by comma")
    parser.add_argument("--suite", type=str, default=None, help="data sets and budgets by name: clip13")
    parser.add_argument("--out", type=str, default="outputs/evaluation", help="folder for report.json and the rest")
    parser.add_argument("--preset", type=str, default=None, help=f"{PRESET_HELP} (default: full, or the suite's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--resume", action="store_true", help="continue a killed run in --out")
    parser.add_argument("--no-figures", action="store_true", help="draw no plots")
    declare_policy(parser)


def _evaluate(options: Any) -> int:
    if options.suite is not None:
        return _evaluate_suite(options)
    budgets = split_commas(options.eps) if options.eps else []
    if len(budgets) > 1:
        raise UsageError(f"--eps: expected one budget, got {options.eps!r}; several are for --suite")
    if options.norm != "linf" and not budgets:
        raise UsageError("--eps: another norm needs a budget of its own, e.g. --norm l2 --eps 0.5")
    changes = {"norm": options.norm, "epsilon": budget(budgets[0], options.norm) if budgets else None}
    settings = _settings(options, options.preset or "full", changes)
    sources, sets = _by_name(options.model, "model"), _by_name(split_commas(options.data), "data set")
    if len(sources) == len(sets) == 1:
        figures = not options.no_figures
        return _evaluate_one(options, options.model[0], settings, sets[0], resume=options.resume, figures=figures)
    from zepad_mm.data.loading import dataset_name
    from zepad_mm.evaluation import evaluate

    report = evaluate(
        models={source: source for source in sources},
        tasks={dataset_name(source): source for source in sets},
        settings=settings,
        out=options.out,
        resume=options.resume,
    )
    return _print_report(options, report, [])


def _evaluate_suite(options: Any) -> int:
    from zepad_mm.evaluation.suites import SUITES, evaluate_suite

    if options.norm != "linf":
        raise UsageError(f"--norm: the budgets of a suite are L-inf, got {options.norm!r}")
    report = evaluate_suite(
        {source: source for source in _by_name(options.model, "model")},
        options.suite,
        out=options.out,
        settings=_settings(options, options.preset or SUITES.get(options.suite).preset, {}),
        budgets=[budget(one) for one in split_commas(options.eps)] if options.eps else None,
        resume=options.resume,
    )
    return _print_report(options, report, [])


def _by_name(sources: list[str], what: str) -> list[str]:
    """The sources. Raises UsageError for none, or one that is given twice."""
    twice = [source for source in sources if sources.count(source) > 1]
    if twice or not sources:
        raise UsageError(f"{what}: expected different ones, got {', '.join(sources) or 'none'}")
    return sources


def _settings(options: Any, preset: str, changes: dict[str, Any]) -> Any:
    """The preset with what the options change."""
    from zepad_mm.evaluation import PRESETS

    check_policy(options)
    base = PRESETS.get(preset)
    changes |= {"seed": options.seed, "n": options.n, "policy": options.policy}
    changes["threats"] = tuple(split_commas(options.threats)) if options.threats else None
    changes["published"] = tuple(split_commas(options.published)) if options.published else None
    return type(base).from_dict({**base.to_dict(), **{k: v for k, v in changes.items() if v is not None}})


def _evaluate_one(options: Any, source: str, settings: Any, task: str, *, resume: bool, figures: bool) -> int:
    """One model on one data set, with figures."""
    from zepad_mm.data import load_class_names, load_templates
    from zepad_mm.evaluation import EvalData, evaluate
    from zepad_mm.evaluation.subjects import load_model, resize_of
    from zepad_mm.models.zepad import ZePAD

    model = load_model(source, load_class_names(task, settings.test_split), load_templates(task))
    data = EvalData.load(task, settings, resize_of(model))
    report = evaluate(model, data=data, settings=settings, out=options.out, resume=resume)
    paths = []
    if figures:
        from zepad_mm.evaluation.plots import write_figures

        paths = list(map(str, write_figures(report, options.out, model if isinstance(model, ZePAD) else None, data)))
    return _print_report(options, report, ["records.parquet", *paths])


def _print_report(options: Any, report: Any, more: list[str]) -> int:
    names = ["report.json", "report.md", *(name for name in more if "/" not in name)]
    files = [*output_paths(options.out, *names), *(name for name in more if "/" in name)]
    print_result(options, report.to_dict(), f"{report.markdown()}\nWritten: {', '.join(files)}")
    return 0


EVALUATE = Command(
    about="Evaluate defended models and plain CLIPs under the threat models; write a report.",
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
    return _evaluate_one(options, options.model, settings, "embedded", resume=False, figures=True)


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
