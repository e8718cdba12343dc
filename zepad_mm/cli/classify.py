"""``zepad classify``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zepad_mm.cli.common import (
    MODEL,
    Command,
    UsageError,
    check_policy,
    declare_policy,
    print_result,
    split_labels,
)
from zepad_mm.utils.image_files import SUFFIXES, entries
from zepad_mm.utils.registry import check_choice
from zepad_mm.utils.text import printable


def _declare(parser: Any) -> None:
    parser.add_argument("model", type=str, help=MODEL)
    parser.add_argument("images", nargs="+", type=str, help="files, folders or URLs")
    parser.add_argument("--labels", type=str, required=True, help='candidate labels, e.g. "a cat,a dog"')
    parser.add_argument(
        "--template", type=str, default="photo", help='prompt set, or a template such as "a photo of {}"'
    )
    parser.add_argument("--top", type=int, default=None, help="number of labels to show")
    parser.add_argument("--evidence", action="store_true", help="show branch confidences and the suspicion score")
    parser.add_argument("--on-adversarial", type=str, default="ignore", help="ignore, flag or abstain")
    parser.add_argument("--device", type=str, default=None, help="e.g. cuda (default: the CPU)")
    declare_policy(parser)


def _run(options: Any) -> int:
    labels, images = split_labels(options.labels), _files(options.images)
    _check(options, labels)
    from zepad_mm.classifier import RobustZeroShotClassifier

    classifier = RobustZeroShotClassifier.from_pretrained(options.model, device=options.device, policy=options.policy)
    answers = classifier(
        images,
        labels,
        hypothesis_template=options.template,
        top_k=options.top,
        return_evidence=options.evidence,
        on_adversarial=options.on_adversarial,
        return_errors=True,
    )
    pairs = list(zip(images, answers, strict=True))
    errors = [answer for answer in answers if isinstance(answer, ValueError)]
    if len(errors) == len(images):
        raise errors[0]
    lines = [
        printable(line)
        for image, answer in pairs
        if not isinstance(answer, ValueError)
        for line in _lines(image, answer, options.evidence)
    ]
    values = [
        {"image": image, "error": str(answer)} if isinstance(answer, ValueError) else {"image": image, "answer": answer}
        for image, answer in pairs
    ]
    print_result(options, values, "\n".join(lines))
    if not errors:
        return 0
    for error in errors:
        print(printable(f"zepad: {error}"), file=sys.stderr)
    print(f"zepad: {len(errors)} of {len(images)} images could not be read", file=sys.stderr)
    return 2


def _files(given: Sequence[str]) -> list[str]:
    """Files and URLs, and the image files of folders in place of those. Raises UsageError for anything else."""
    images: list[str] = []
    for image in given:
        path = Path(image)
        if path.is_dir():
            direct, inside = entries(path)
            found = sorted([*direct, *(file for files in inside.values() for file in files)])
            if not found:
                raise UsageError(f"{image} holds no image; expected files that end in {', '.join(SUFFIXES)}")
            images += found
        elif "://" in image or path.is_file():
            images.append(image)
        else:
            raise UsageError(f"{image} does not exist; expected an image file, a folder of images or a URL")
    return images


def _check(options: Any, labels: Sequence[str]) -> None:
    """What can be wrong with the options, before a model is loaded."""
    from zepad_mm.encoders.prompts import templates_of
    from zepad_mm.utils.names import check_names

    check_names(labels, "--labels")
    if len(labels) == 1:
        warnings.warn('--labels: got one label, which is always the answer; write several: "a cat,a dog"', stacklevel=2)
    templates_of(options.template)
    check_policy(options)
    check_choice("--on-adversarial", options.on_adversarial, ("ignore", "flag", "abstain"))
    if options.top is not None and options.top < 1:
        raise UsageError(f"--top: expected a positive number, got {options.top}")


def _lines(image: str, answer: Any, with_evidence: bool) -> list[str]:
    labels = answer["labels"] if with_evidence else answer
    scores = ", ".join(f"{entry['label']} {100 * entry['score']:.1f} %" for entry in labels)
    suspicious = " (looks adversarial)" if labels and labels[0].get("flagged") else ""
    lines = [f"{image}: {scores or 'no answer: it looks adversarial'}{suspicious}"]
    if with_evidence:
        evidence = answer["evidence"]
        confidences = ", ".join(f"{name} {value:.2f}" for name, value in evidence["confidences"].items())
        weights = ", ".join(f"{name} {100 * weight:.0f} %" for name, weight in evidence["weights"].items())
        lines += [f"  confidence: {confidences}", f"  weight of the branches: {weights}{_gate(evidence['gate'])}"]
        lines.append(f"  suspicion score: {evidence['score']:.3f} ({evidence['detector']}), {_flag(evidence)}")
        lines.append(f"  undefended: {evidence['undefended'][0]['label']}")
    return lines


def _flag(evidence: Any) -> str:
    if evidence["threshold"] is None:
        return "and the model has no threshold: nothing is flagged"
    verdict = "flagged as adversarial" if evidence["flagged"] else "not flagged"
    return f"{verdict}: the threshold is {evidence['threshold']:.3f}"


def _gate(gate: Any) -> str:
    if gate is None:
        return ""
    half = "" if gate["threshold"] is None else f"; the benign weight is halved at {gate['threshold']:.2f}"
    return f" (gate {gate['logit']:.2f}{half})"


CLASSIFY = Command(
    about="Classify images among candidate labels.",
    example='zepad classify embedded photo.jpg --labels "a dress,a hat,shoes" --evidence',
    declare=_declare,
    run=_run,
)
