"""Web page: gradio Blocks over the same :class:`Service` as the endpoint."""

from __future__ import annotations

import atexit
import html
import json
import math
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
from fastapi import FastAPI
from PIL import Image

from zepad_mm.data import load_data
from zepad_mm.encoders.prompts import PROMPTS
from zepad_mm.models.config import Policy
from zepad_mm.models.detection import GATE_SCORE
from zepad_mm.serve.limits import BusyError, Uploads, upload_folder
from zepad_mm.serve.page_requests import PageRequests
from zepad_mm.serve.service import ATTACKS, Attacked, Service, error_text, png
from zepad_mm.serve.settings import MAX_LEVELS
from zepad_mm.utils.io import ASSETS

PHOTOS = ASSETS / "photos"  # named by what they show
UPLOAD_LIFETIME_S = 3600  # uploads are deleted after an hour
GAIN = 8  # factor by which the shown perturbation is amplified
MIN_SIDE = 256  # least side in pixels of the shown images
FONTS = ("system-ui", "sans-serif")  # system fonts: the page loads nothing from other hosts
CSS = """
.verdict {padding: .7em 1em; border-radius: 8px; font-size: 1.05em; border: 1px solid var(--border-color-primary)}
.verdict.lost {background: #b91c1c; border-color: #b91c1c}
.verdict.held {background: #15703a; border-color: #15703a}
.verdict, .verdict b {color: white}
.branches {width: 100%; border: 0 !important; border-collapse: collapse; font-variant-numeric: tabular-nums}
.branches td, .branches th {padding: .35em .2em; border: 0; border-bottom: 1px solid var(--border-color-primary)}
.branches tr, .branches tbody, .branches thead {border: 0 !important}
.branches td, .branches th {text-align: right; white-space: nowrap}
.branches td:first-child, .branches th:first-child {text-align: left; white-space: normal}
.branches small {opacity: .7}
.gauge {font-size: .9em}
.gauge .bar {position: relative; height: .8em; margin: .5em 0; border-radius: .4em;
  background: linear-gradient(90deg, #0072b2 50%, #d55e00 50%)}
.gauge i {display: inline-block; width: .4em; height: 1.1em; border: 2px solid #fff; background: #000;
  border-radius: 2px; outline: 1px solid #888; vertical-align: middle; box-sizing: content-box}
.gauge i.clean {border-color: #000; background: #fff}
.gauge .bar i {position: absolute; top: -.35em; margin-left: -.4em}
.gauge .ends {display: flex; justify-content: space-between}
.pixels img {image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain}
footer {display: none !important}
"""
GAUGE_SPREAD = {GATE_SCORE: 4.0}  # distance from the threshold that takes the gauge half way to its end
SPREAD = 0.1  # of the other scores, which are probabilities or nats


def mount(app: FastAPI, service: Service) -> PageRequests:
    """Add the page at ``/`` to an application. Returns the checks of requests for it."""
    folder = upload_folder()  # before gradio asks for it
    theme = gr.themes.Default(font=list(FONTS), font_mono=["ui-monospace", "monospace"]).set(
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
    )
    page = build(service)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        css=CSS,
        theme=theme,
        max_file_size=f"{service.settings.upload_mb}mb",
        ssr_mode=False,
        show_error=False,  # of errors that are not ours; gr.Error is shown
        enable_monitoring=False,
        run_history=False,
    )
    functions = {function.name: index for index, function in page.fns.items()}
    uploads = Uploads(folder, service.settings.uploads_mb * 2**20)
    policies = _policies(service)
    examples = sum(len(block.raw_samples or ()) for block in page.blocks.values() if isinstance(block, gr.Dataset))
    run, load = functions["run"], functions["load_example"]
    return PageRequests(page, run, load, service.settings, uploads, examples, policies)


def build(service: Service) -> gr.Blocks:
    """The page."""
    examples, names = _examples()

    def run(
        path: str | None,
        labels: str,
        template: str,
        attack: str,
        levels: float,
        label: str,
        policy: Policy | None = None,
    ) -> tuple[Any, ...]:
        if path is None:
            raise gr.Error("Choose or upload an image first.", print_exception=False)
        candidate_labels = [part.strip() for part in labels.split(",") if part.strip()]
        if not label.strip():
            raise gr.Error(
                'Write under "True label" what the image shows: one of the labels. The attack moves away from it.',
                print_exception=False,
            )
        try:
            result = service.attack(
                Path(path),
                candidate_labels,
                template,
                attack=attack,
                levels=int(levels),
                label=label.strip(),
                policy=policy,
            )
        except (ValueError, BusyError) as error:
            # messages are shown as HTML
            reason = html.escape(error_text(error).replace(path, Path(path).name))
            raise gr.Error(reason, print_exception=False) from error
        return _outputs(service, result)

    with gr.Blocks(title="zepad", analytics_enabled=False, delete_cache=(UPLOAD_LIFETIME_S, UPLOAD_LIFETIME_S)) as page:
        gr.Markdown(
            f"# zepad\n`{service.classifier.model.config.public_source}`, attacked and defended. Choose an image, say "
            "what it shows and among which labels to choose, and see what an attack does to the public encoder and to "
            "the defended one. An attacker who knows the whole defence (white box) still often succeeds."
        )
        with gr.Row():
            with gr.Column(min_width=300):
                image = gr.Image(
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    label="Image",
                    height=280,
                    elem_classes="pixels",
                )
                label = gr.Textbox(
                    names[0], label="True label: what the image shows", info="One of the labels; the attack moves away "
                    "from it.",
                )  # fmt: skip
                labels = gr.Textbox(", ".join(names), label="Labels, separated by commas", lines=2)
                attack = gr.Radio(
                    [(name.replace("_", " "), name) for name in ATTACKS],
                    value="public",  # changes the answer of nearly every example, so that the first click shows it
                    label="Attack",
                    info=". ".join(
                        f"{name.replace('_', ' ').capitalize()}: {about}" for name, about in ATTACKS.items()
                    ),
                )
                levels = gr.Slider(0, MAX_LEVELS, value=8, step=1, label="Epsilon: levels of 255 a pixel may change by")
                policies = [_policy_input(service)] if _policies(service) else []
                with gr.Accordion("More", open=False):
                    template = gr.Dropdown(
                        PROMPTS.names(), value="photo", label="Prompts: a set, or a template with one {}",
                        allow_custom_value=True,
                    )  # fmt: skip
                button = gr.Button("Attack and classify", variant="primary", elem_id="run")
                gallery = gr.Examples([[path] for path in examples], inputs=[image], label="Example images")
            with gr.Column(min_width=300):
                verdict = gr.HTML(label="Verdict")
                gauge = gr.HTML(label="Suspicion")
                with gr.Row():
                    attacked = _image_output("Attacked", ["download", "fullscreen"])
                    added = _image_output(f"Added, x{GAIN}", ["fullscreen"])
                gr.Markdown("### Undefended")
                with gr.Row():
                    plain_before, plain_after = _score_output("Clean"), _score_output("Attacked")
                gr.Markdown("### Defended")
                with gr.Row():
                    safe_before, safe_after = _score_output("Clean"), _score_output("Attacked")
                gr.Markdown("### Branches, clean → attacked")
                branches = gr.HTML(label="Branches")
        button.click(
            run,
            [image, labels, template, attack, levels, label, *policies],
            [verdict, gauge, attacked, added, plain_before, plain_after, safe_before, safe_after, branches],
            api_visibility="private",
            concurrency_limit=service.settings.workers,
            show_progress="minimal",
            scroll_to_output=True,  # on a phone the answer is below the fold
        )
        # in the browser: the first example is there when the page opens; examples bring their true label, uploads none
        page.load(None, js="() => document.querySelector('.gallery-item')?.click()")
        gallery.dataset.click(None, gallery.dataset, label, js=f"number => {json.dumps(names)}[number]")
        image.upload(None, None, label, js="() => ''")
    page.state_session_capacity = service.settings.sessions
    return page.queue(max_size=service.settings.queue + service.settings.workers, api_open=False)


def _policies(service: Service) -> tuple[str, ...]:
    """The policies that the page offers: those of a model that has several."""
    caps = tuple(service.classifier.model.config.policy_caps)
    return caps if len(caps) > 1 else ()


def _policy_input(service: Service) -> gr.Radio:
    return gr.Radio(
        [(name.replace("_", " "), name) for name in _policies(service)],
        value=service.classifier.model.config.policy,
        label="Policy",
        info="Zero sacrifice keeps the accuracy on clean images. White box gives the public encoder less say, against "
        "attackers who know the defence.",
    )


def _image_output(label: str, buttons: list[Any]) -> gr.Image:
    return gr.Image(
        label=label, interactive=False, format="png", height=220, min_width=140, elem_classes="pixels", buttons=buttons
    )


def _score_output(label: str) -> gr.Label:
    return gr.Label(label=label, num_top_classes=3, min_width=140)


def _outputs(service: Service, result: Attacked) -> tuple[Any, ...]:
    difference = (0.5 + GAIN * (result.attacked - result.clean)).clamp(0, 1)
    plain = [answer["evidence"]["undefended"] for answer in (result.before, result.after)]
    safe = [answer["labels"] for answer in (result.before, result.after)]
    return (
        _verdict(result),
        _gauge(result.before["evidence"], result.after["evidence"]),
        _enlarged(result.attacked),
        _enlarged(difference),
        *({entry["label"]: entry["score"] for entry in answer} for answer in (*plain, *safe)),
        _branches(service, result),
    )


def _verdict(result: Attacked) -> str:
    """What both models say of the attacked image, held against the true label."""
    truth = html.escape(result.label)
    both = result.before, result.after
    models = {
        "The undefended model": [answer["evidence"]["undefended"] for answer in both],
        "The defended model": [answer["labels"] for answer in both],
    }
    lines = []
    for name, answers in models.items():
        clean, attacked = (html.escape(answer[0]["label"]) for answer in answers)
        says = f"still says <b>{truth}</b>"
        if attacked != truth:
            says = f"says <b>{attacked}</b> instead of <b>{truth}</b>"
        if clean != truth:
            says = f"says <b>{clean}</b> instead of <b>{truth}</b> without any attack, and <b>{attacked}</b> under it"
        lines.append(f"{name} {says}.")
    flag = {
        None: "This model has no threshold: nothing is flagged.",
        True: "The attacked image is flagged as adversarial.",
        False: "The attacked image is not flagged as adversarial.",
    }[result.after["evidence"]["flagged"]]
    held = result.after["labels"][0]["label"] == result.label
    kind, title = ("held", "The defence holds.") if held else ("lost", "The defence does not hold.")
    if result.before["labels"][0]["label"] != result.label:  # nothing to defend
        title = f"The defended model is wrong without any attack{', and right under this one' if held else ''}."
    lines += [flag, *(f"Warning: {html.escape(error_text(text))}." for text in result.warnings)]
    return f'<div class="verdict {kind}" id="verdict"><b>{title}</b><br>{"<br>".join(lines)}</div>'


def _gauge(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The suspicion scores of the clean and the attacked image on a bar, with the threshold in its middle."""
    scores = {"clean": before["score"], "attacked": after["score"]}
    text = "Suspicion score: " + ", ".join(
        f'<i class="{name}"></i> {name} {score:.2f}' for name, score in scores.items()
    )
    threshold, gate = after["threshold"], after["gate"]
    if threshold is None:
        return f'<div class="gauge" id="gauge">{text}</div>'
    text += f"; flagged above {threshold:.2f}"
    if gate is not None and after["detector"] != GATE_SCORE:
        text += f"; gate: clean {before['gate']['logit']:.2f}, attacked {gate['logit']:.2f}"
    spread = GAUGE_SPREAD.get(after["detector"], SPREAD)
    places = {name: 50 + 100 * math.atan((score - threshold) / spread) / math.pi for name, score in scores.items()}
    marks = "".join(f'<i class="{name}" style="left: {place:.1f}%"></i>' for name, place in places.items())
    ends = '<div class="ends"><span>looks clean</span><span>looks attacked</span></div>'
    return f'<div class="gauge" id="gauge">{text}<div class="bar">{marks}</div>{ends}</div>'


def _branches(service: Service, result: Attacked) -> str:
    rows = []
    for branch in service.classifier.model.config.branches:
        cells = []
        for kind in ("confidences", "weights"):
            clean, attacked = (answer["evidence"][kind][branch.name] for answer in (result.before, result.after))
            cells.append(f"<td>{clean:.2f} → {attacked:.2f}</td>")
        rows.append(f"<tr><td>{html.escape(branch.name)} <small>{branch.role}</small></td>{''.join(cells)}</tr>")
    head = "<tr><th>Branch</th><th>Confidence</th><th>Weight</th></tr>"
    return f'<table class="branches" id="branches">{head}{"".join(rows)}</table>'


def _enlarged(image: Any) -> Image.Image:
    """The image enlarged by whole pixels, so that the perturbation is visible."""
    import io

    small = Image.open(io.BytesIO(png(image)))
    factor = max(1, -(-MIN_SIDE // small.width))
    return small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)


def _examples() -> tuple[list[str], tuple[str, ...]]:
    """Photos and one embedded test image per class, in files that live as long as the process; and what they show."""
    import io

    data = load_data("embedded", "test")
    folder = TemporaryDirectory(prefix="zepad-")
    atexit.register(folder.cleanup)
    photos = sorted(PHOTOS.glob("*.jpg"))
    paths = [str(shutil.copy(photo, folder.name)) for photo in photos]
    for number, name in enumerate(data.class_names):
        row = int((data.labels == number).nonzero()[0])
        path = Path(folder.name) / f"{name}.png"
        Image.open(io.BytesIO(png(data.images[row]))).save(path)
        paths.append(str(path))
    return paths, (*(photo.stem.replace("_", " ") for photo in photos), *data.class_names)
