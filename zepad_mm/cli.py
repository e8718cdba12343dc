"""The command ``zepad``: parses, calls the library, prints. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zepad_mm import __version__

USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    PermissionError,
    IsADirectoryError,
)


class UsageError(Exception):
    """Something in the command line that cannot be meant."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 for a user's error, told in one line on stderr."""
    from jsonargparse import ArgumentError

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        parser = _parser()
        given = list(sys.argv[1:] if arguments is None else arguments)
        if not given:
            parser.print_help()
            return 0
        settings = parser.parse_args(given)
        options = settings[settings.command]
        logging.basicConfig(level=logging.WARNING if options.quiet else logging.INFO, format="%(message)s")
        for noisy in ("httpx", "huggingface_hub", "matplotlib", "datasets"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        return COMMANDS[settings.command](options)
    except (ArgumentError, UsageError, *USER_ERRORS) as error:
        message = " ".join(str(getattr(error, "message", None) or error).split())
        print(f"zepad: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("zepad: stopped; evaluate takes up where it was with --resume", file=sys.stderr)
        return 130


def budget(text: str) -> float:
    """An L-inf budget in pixels of [0, 1]: "4/255" or "0.0157". Raises ValueError for "8"."""
    top, slash, bottom = str(text).partition("/")
    try:
        value = float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"--eps: expected a budget such as 4/255 or 0.0157, got {text!r}") from None
    if not 0 < value <= 1:
        raise ValueError(f"--eps: expected a budget above 0 and at most 1, in pixels of [0, 1], got {text!r}; 8/255?")
    return value


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _parser() -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="zepad",
        description="Defend pre-trained image encoders against downstream-agnostic attacks, and measure it honestly.",
        exit_on_error=False,
        version=__version__,
    )
    commands = parser.add_subcommands(dest="command", required=True)

    evaluate = _command("Judge a defended model under the threat models; write a report.")
    evaluate.add_argument("model", type=str, help='"embedded", a folder, or a name on the Hub')
    evaluate.add_argument("--threats", type=str, default=None, help="of clean,T1,T1b,T2,T3 (default: the preset's)")
    evaluate.add_argument("--eps", type=str, default=None, help="L-inf budget of T2 and T3, e.g. 4/255")
    evaluate.add_argument("--n", type=int, default=None, help="test pictures (default: all)")
    evaluate.add_argument("--data", type=str, default="embedded", help='"embedded", a folder, or a name on the Hub')
    evaluate.add_argument("--out", type=str, default="outputs/evaluation", help="folder for report.json and the rest")
    evaluate.add_argument("--preset", type=str, default="full", help="full (a GPU or a night), or demo (minutes)")
    evaluate.add_argument("--seed", type=int, default=0, help="of everything random")
    evaluate.add_argument("--resume", action="store_true", help="take up a run in --out that was cut off")
    evaluate.add_argument("--no-figures", action="store_true", help="draw nothing")
    commands.add_subcommand("evaluate", evaluate)

    classify = _command("Classify pictures among labels of your own.")
    classify.add_argument("model", type=str, help='"embedded", a folder, or a name on the Hub')
    classify.add_argument("images", nargs="+", type=str, help="files or URLs")
    classify.add_argument("--labels", type=str, required=True, help='what it may be, e.g. "a cat,a dog"')
    classify.add_argument("--top", type=int, default=None, help="show that many labels")
    classify.add_argument("--evidence", action="store_true", help="show what each branch says, and the suspicion")
    commands.add_subcommand("classify", classify)

    attack = _command("Make a universal perturbation on an encoder, for tests of your own.")
    attack.add_argument("encoder", type=str, help="a source, e.g. open_clip:embedded or timm:resnet18.a1_in1k")
    attack.add_argument("--attack", type=str, default="feature_uap", help="its name; an unknown one lists all")
    attack.add_argument("--data", type=str, default="embedded", help='"embedded", a folder, or a name on the Hub')
    attack.add_argument("--split", type=str, default=None, help='default "surrogate" for embedded, else "train"')
    attack.add_argument("--eps", type=str, default=None, help="budget; of a patch the area (default: the attack's)")
    attack.add_argument("--n", type=int, default=1000, help="pictures to make it on")
    attack.add_argument("--steps", type=int, default=None, help="optimiser steps (default: the attack's)")
    attack.add_argument("--image-size", type=int, default=64, help="side of the perturbation in pixels")
    attack.add_argument("--seed", type=int, default=0, help="of everything random")
    attack.add_argument("--out", type=str, default="outputs/perturbation.safetensors", help="file to write")
    commands.add_subcommand("attack", attack)

    report = _command("Put reports of several data sets, seeds or models into one table.", json=False)
    report.add_argument("reports", nargs="+", type=str, help="report.json files, or the folders they are in")
    report.add_argument("--format", type=str, default="md", help="md, latex (booktabs), csv or json")
    report.add_argument("--out", type=str, default=None, help="file to write (default: print it)")
    commands.add_subcommand("report", report)

    doctor = _command("Show versions and devices, and what is missing.")
    commands.add_subcommand("doctor", doctor)
    return parser


def _command(description: str, json: bool = True) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description=description, exit_on_error=False)
    if json:
        parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def _evaluate(options: Any) -> int:
    from zepad_mm.evaluation import PRESETS, EvalData, evaluate
    from zepad_mm.model import ZePAD

    changes: dict[str, Any] = {"seed": options.seed, "n": options.n}
    changes["threats"] = tuple(_listed(options.threats)) if options.threats else None
    changes["epsilon"] = budget(options.eps) if options.eps else None
    known = {**PRESETS.get(options.preset).to_dict(), **{k: v for k, v in changes.items() if v is not None}}
    settings = type(PRESETS.get(options.preset)).from_dict(known)
    model = ZePAD.from_pretrained(options.model)
    data = EvalData.load(options.data, settings)
    if model.class_names != data.test.class_names:
        model.set_classes(data.test.class_names)
    report = evaluate(model, data=data, settings=settings, out=options.out, resume=options.resume)
    files = [Path(options.out) / name for name in ("report.json", "report.md", "records.parquet")]
    if not options.no_figures:
        from zepad_mm.plots import write_figures

        files += write_figures(report, options.out, model, data)
    if options.json:
        print(json.dumps(report.to_dict()))
    else:
        print(report.markdown())
        print("Written: " + ", ".join(map(str, files)))
    return 0


def _classify(options: Any) -> int:
    labels = _listed(options.labels)
    if not labels:
        raise UsageError('--labels: expected names separated by commas, e.g. --labels "a cat,a dog"')
    for image in options.images:
        if "://" not in image and not Path(image).is_file():
            raise UsageError(f"{image} does not exist; expected a picture file or a URL")
    from zepad_mm.classifier import RobustZeroShotClassifier

    classifier = RobustZeroShotClassifier.from_pretrained(options.model)
    answers = classifier(options.images, labels, top_k=options.top, return_evidence=options.evidence)
    if options.json:
        print(json.dumps([{"image": i, "answer": a} for i, a in zip(options.images, answers, strict=True)]))
        return 0
    for image, answer in zip(options.images, answers, strict=True):
        found = answer["labels"] if options.evidence else answer
        print(f"{image}: " + ", ".join(f"{one['label']} {100 * one['score']:.1f} %" for one in found))
        if options.evidence:
            evidence = answer["evidence"]
            sure = ", ".join(f"{name} {value:.2f}" for name, value in evidence["confidences"].items())
            flag = "flagged as adversarial" if evidence["flagged"] else "not flagged"
            print(f"  confidence: {sure}; suspicion {evidence['dae_score']:.3f}, {flag}")
            print(f"  undefended: {evidence['undefended'][0]['label']}")
    return 0


def _attack(options: Any) -> int:
    from dataclasses import replace

    from zepad_mm.attacks import UNIVERSAL_ATTACKS
    from zepad_mm.data import load_data
    from zepad_mm.encoders import load_encoder

    made = UNIVERSAL_ATTACKS.get(options.attack)(image_size=options.image_size, seed=options.seed)
    made = made if options.eps is None else replace(made, epsilon=budget(options.eps))
    made = made if options.steps is None else replace(made, steps=options.steps)
    encoder = load_encoder(options.encoder)
    split = options.split or ("surrogate" if options.data == "embedded" else "train")
    pictures = load_data(options.data, split, options.image_size, options.n, options.seed)
    perturbation = made.fit(encoder, pictures.images, progress=not options.quiet)
    perturbation.save(options.out)
    about = {"out": options.out, "epsilon": perturbation.epsilon, **perturbation.provenance}
    print(json.dumps(about) if options.json else f"Written: {options.out} ({perturbation!r})")
    return 0


def _report(options: Any) -> int:
    from zepad_mm.evaluation import Report
    from zepad_mm.evaluation.tables import FORMATS, entries
    from zepad_mm.files import write_text

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


def _doctor(options: Any) -> int:
    from importlib.metadata import PackageNotFoundError, requires, version

    from zepad_mm.provenance import commit, hardware, versions

    missing = []
    try:
        wanted = [line for line in requires("zepad-mm") or [] if "extra ==" not in line]
    except PackageNotFoundError:
        wanted = []
    for line in wanted:
        name = line.split(";")[0]
        name = "".join(letter if letter.isalnum() or letter in "-_." else " " for letter in name).split()[0]
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(line)
    assets = Path(__file__).parent / "assets"
    shipped = {
        name: (assets / name).is_dir() and any((assets / name).iterdir()) for name in ("clip", "clothing", "zepad")
    }
    numbers = versions()
    found = {"commit": commit(), "hardware": hardware(), "versions": numbers, "shipped": shipped, "missing": missing}
    if options.json:
        print(json.dumps(found))
    else:
        for name, number in numbers.items():
            print(f"{name:18} {number}")
        print(f"{'commit':18} {found['commit']}\n{'hardware':18} {found['hardware']}")
        for name, there in shipped.items():
            print(f"{'shipped ' + name:18} {'there' if there else 'MISSING: reinstall, or rebuild it with scripts/'}")
        print("missing packages   " + (", ".join(missing) or "none"))
    return 0 if not missing and all(shipped.values()) else 1


COMMANDS = {"evaluate": _evaluate, "classify": _classify, "attack": _attack, "report": _report, "doctor": _doctor}

if __name__ == "__main__":
    sys.exit(main())
