"""The model card: numbers are the report's, doubts come first, and another model's report is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from tests.helpers.models import make_zepad
from zepad_mm.evaluation import Report
from zepad_mm.evaluation.model_card import _opening, eval_result_files, model_card, write_card
from zepad_mm.models.zepad import ZePADConfig
from zepad_mm.utils.io import read_json

EARLIER = Path(__file__).parent / "earlier_model"  # a model that shipped before, with its report


@pytest.fixture(scope="module")
def config() -> ZePADConfig:
    return ZePADConfig.from_dict(read_json(EARLIER / "config.json"))


@pytest.fixture(scope="module")
def report() -> Report:
    """In full: all five threats, detection, and a doubt."""
    return Report.load(EARLIER)


def changed(report: Report, **meta: Any) -> Report:
    return Report({**report.meta, **meta}, report.rows, report.detection)


def test_card_shows_the_numbers_of_the_report(config: ZePADConfig, report: Report) -> None:
    text = model_card(config, report)
    for threat in report.threats:
        row = report.row("zepad", threat)
        low, high = 100 * row["ci_low"], 100 * row["ci_high"]
        assert f"{100 * row['accuracy']:.1f} ({low:.1f}-{high:.1f})" in text
    for words in ("each made once for all images on the public encoder", "10/255", "4/255", "500 images"):
        assert words in text
    found = next(row for row in report.detection if row["score"] == "jensen_shannon" and row["threat"] == "T3")
    assert f"| {found['auroc']:.3f} | {100 * found['tpr_at_fpr1']:.1f} " in text
    effort = next(line for line in text.splitlines() if line.startswith("- T2: "))
    rows = [row for row in report.rows if (row["model"], row["threat"]) == ("zepad", "T2")]
    count = len([row for row in rows if row["attack"] != "worst" and not row["control"]])
    assert f"{count} attacks in all: " in effort
    assert "`pgd`" in effort.partition("made on")[0]
    assert "`branch:tecoa`" in effort.partition("made on")[2]
    assert report.meta["commit"] in text


def test_eval_results_name_the_data_set_on_the_hub(config: ZePADConfig, report: Report) -> None:
    """As the Hub's own parser reads them; none for data that is not there."""
    assert eval_result_files(config, report) == {}
    on_hub = changed(report, config={**report.meta["config"], "hub_data": "acme/clothes"})
    (text,) = eval_result_files(config, on_hub).values()
    entries = parse_eval_result_entries(yaml.safe_load(text))
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in entries] == [
        ("acme/clothes", threat, report.accuracy("zepad", threat)) for threat in report.threats
    ]
    assert entries[report.threats.index("T2")].notes == (
        "accuracy under T2, 4/255, worst case per image (likely overestimated); 500 images of the split test; zepad-mm"
    )
    assert ModelCard(model_card(config, on_hub)).data.eval_results[0].dataset_type == "acme/clothes"
    with pytest.raises(ValueError, match="of another model"):
        eval_result_files(replace(config, fusion="equal"), on_hub)


def test_card_metadata_has_the_results_for_the_hub(config: ZePADConfig, report: Report) -> None:
    data = ModelCard(model_card(config, report)).data
    assert data.library_name == "zepad-mm"
    assert data.pipeline_tag == "zero-shot-image-classification"
    assert [result.metric_value for result in data.eval_results] == [
        report.accuracy("zepad", threat) for threat in report.threats
    ]
    white_box = data.eval_results[report.threats.index("T2")]
    assert white_box.metric_args["n"] == 500
    assert white_box.metric_args["epsilon"] == pytest.approx(4 / 255)
    assert white_box.metric_args["ci_low"] < white_box.metric_value < white_box.metric_args["ci_high"]


def test_card_names_base_models_by_hub_repository(config: ZePADConfig) -> None:
    branches = tuple(
        replace(branch, source=source)
        for branch, source in zip(
            config.branches,
            ("open_clip:hf-hub:acme/clip@v1", "open_clip:ViT-B-32/laion2b_s34b_b79k", "timm:resnet18.a1_in1k"),
            strict=True,
        )
    )
    data = ModelCard(model_card(replace(config, branches=branches), None)).data
    assert data.base_model == ["acme/clip", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "timm/resnet18.a1_in1k"]


def test_card_starts_with_failed_diagnostics(config: ZePADConfig, report: Report) -> None:
    text = model_card(config, report)
    banner = text.index("likely overestimated.**")
    assert banner < text.index("## Use") < text.index("## Robustness")
    assert report.meta["warnings"][0] in text[banner : text.index("## Use")]
    assert all("likely overestimated" in r.metric_name for r in ModelCard(text).data.eval_results[1:])
    passed = [{**check, "passed": True} for check in report.meta["diagnostics"]]
    sure = model_card(config, changed(report, warnings=[], diagnostics=passed))
    assert "overestimated" not in sure


def test_card_has_plain_words_before_tables(config: ZePADConfig, report: Report) -> None:
    text = model_card(config, report)
    places = [text.index(f"## {name}") for name in ("Use", "What holds", "Warnings", "In plain words", "Limitations")]
    assert places == sorted(places)
    assert places[-1] < text.index("\n| ")
    assert "A zero-shot image classifier, `open_clip:embedded`, with a defence" in text
    assert "2 robust copies of its encoder answer beside the public one." in text
    for cap, share in (
        (0.7, " beside the public one: the more an image looks attacked"),
        (0.0, ", the public one has no"),
    ):
        gated = replace(config, fusion="gated", branches=config.branches[1:], fusion_params={"cap": cap})
        assert f"A robust copy of its encoder answers{share}" in _opening(gated)
    assert 'pipeline("robust-zero-shot-image-classification", model="owner/name")' in text
    words = report.markdown()
    assert words.index("A budget such as 4/255") < words.index("## In plain words") < words.index("\n| ")


def test_card_lists_what_was_not_measured(config: ZePADConfig, report: Report) -> None:
    kept = Report(report.meta, [row for row in report.rows if row["threat"] in ("clean", "T1")])
    text = model_card(config, kept)
    assert "**No white-box attack was run.**" in text
    assert text.index("Not measured: ") < text.index("T1b (") < text.index("T2 (")
    assert "## Detection" not in text
    alarm = {"score": "jensen_shannon", "kind": "corruption", "name": "fog", "severity": 5, "flagged_at_fpr5": 0.5}
    clean = {**alarm, "kind": "clean", "name": "clean", "severity": None}
    text = model_card(config, changed(report, false_alarms=[clean, alarm]))
    assert "under `fog` (severity 5) it flags 50.0 %" in text
    text = model_card(replace(config, class_names=("a", "b")), report)
    assert "other classes than it is saved with: dress, hat" in text
    assert "Not evaluated yet" in model_card(config, None)


def test_card_refuses_the_report_of_another_model(config: ZePADConfig, report: Report) -> None:
    with pytest.raises(ValueError, match="another model than the card: fusion, fusion_params differ"):
        model_card(replace(config, fusion="rfdm", fusion_params={}), report)
    moved = tuple(value + 1 for value in config.fingerprint)
    with pytest.raises(ValueError, match=r"weights \(fingerprint\) differ"):
        model_card(replace(config, fingerprint=moved), report)
    with pytest.raises(ValueError, match="which model it is of"):
        model_card(config, changed(report, config={}))


def test_write_card_writes_into_a_model_folder(clip_source: str, tmp_path: Path) -> None:
    model = make_zepad(clip_source)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        write_card(tmp_path, None)
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.unlink()
    write_card(tmp_path, None)
    assert "others cannot load" not in card.read_text()
    card.write_text("written by hand")
    with pytest.raises(FileExistsError, match="move it away"):
        write_card(tmp_path, None)
    assert card.read_text() == "written by hand"


def test_write_card_takes_a_new_report(clip_source: str, tmp_path: Path, images: Any) -> None:
    """Beside the committed report: what ``evaluate`` writes today has everything that the card needs."""
    import torch

    from zepad_mm.data import LabelledImages
    from zepad_mm.evaluation import EvalData, EvalSettings, evaluate

    model = make_zepad(clip_source)
    model.save_pretrained(tmp_path)
    part = LabelledImages(images, torch.tensor([0, 1, 2, 0]), model.class_names, "noise")
    settings = EvalSettings(threats=("clean", "T2", "T3"), steps=1, restarts=1, detector_steps=1, diagnostics_n=0)
    report = evaluate(model, data=EvalData(part, part, part), settings=settings, out=tmp_path / "report")
    write_card(tmp_path, report)
    text = (tmp_path / "README.md").read_text()
    assert "4 images of `noise`" in text
    assert "is a local path: others cannot load this model" in text
    write_card(tmp_path, Report.load(tmp_path / "report"))
    assert (tmp_path / "README.md").read_text() == text
    # a model that is saved again is another model: its numbers are removed
    model.set_fusion("equal").save_pretrained(tmp_path)
    assert "Not evaluated yet" in (tmp_path / "README.md").read_text()
