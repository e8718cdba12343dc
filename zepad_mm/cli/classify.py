"""``zepad classify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zepad_mm.cli.common import MODEL, Command, UsageError, print_result, split_labels


def _declare(parser: Any) -> None:
    parser.add_argument("model", type=str, help=MODEL)
    parser.add_argument("images", nargs="+", type=str, help="files or URLs")
    parser.add_argument("--labels", type=str, required=True, help='candidate labels, e.g. "a cat,a dog"')
    parser.add_argument(
        "--template", type=str, default="photo", help='prompt set, or a template such as "a photo of {}"'
    )
    parser.add_argument("--top", type=int, default=None, help="number of labels to show")
    parser.add_argument("--evidence", action="store_true", help="show branch confidences and the suspicion score")
    parser.add_argument("--on-adversarial", type=str, default="ignore", help="ignore, flag or abstain")
    parser.add_argument("--device", type=str, default=None, help="e.g. cuda (default: the CPU)")


def _run(options: Any) -> int:
    labels = split_labels(options.labels)
    for image in options.images:
        if "://" not in image and not Path(image).is_file():
            raise UsageError(f"{image} does not exist; expected an image file or a URL")
    from zepad_mm.classifier import RobustZeroShotClassifier

    classifier = RobustZeroShotClassifier.from_pretrained(options.model, device=options.device)
    answers = classifier(
        options.images,
        labels,
        hypothesis_template=options.template,
        top_k=options.top,
        return_evidence=options.evidence,
        on_adversarial=options.on_adversarial,
    )
    pairs = list(zip(options.images, answers, strict=True))
    lines = (line for image, answer in pairs for line in _lines(image, answer, options.evidence))
    print_result(options, [{"image": image, "answer": answer} for image, answer in pairs], "\n".join(lines))
    return 0


def _lines(image: str, answer: Any, with_evidence: bool) -> list[str]:
    labels = answer["labels"] if with_evidence else answer
    scores = ", ".join(f"{entry['label']} {100 * entry['score']:.1f} %" for entry in labels)
    suspicious = " (looks adversarial)" if labels and labels[0].get("flagged") else ""
    lines = [f"{image}: {scores or 'no answer: it looks adversarial'}{suspicious}"]
    if with_evidence:
        evidence = answer["evidence"]
        confidences = ", ".join(f"{name} {value:.2f}" for name, value in evidence["confidences"].items())
        flag = {None: "no threshold", True: "flagged as adversarial", False: "not flagged"}[evidence["flagged"]]
        lines.append(f"  confidence: {confidences}; suspicion {evidence['score']:.3f}, {flag}")
        lines.append(f"  undefended: {evidence['undefended'][0]['label']}")
    return lines


CLASSIFY = Command(
    about="Classify images among candidate labels.",
    example='zepad classify embedded photo.jpg --labels "a dress,a hat,shoes" --evidence',
    declare=_declare,
    run=_run,
)
