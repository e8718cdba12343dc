"""The paper's tables on random encoders and a few images, and the document written from them."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from reproduction.paper import (
    document,
    join,
    lines,
    records,
    run,
    sections_clean,
    sections_strong,
    sections_white_box,
    study,
)
from reproduction.paper.records import read_compact
from reproduction.paper.sections import SECTIONS, STRONG_SECTIONS, verdict
from reproduction.paper.tables import TABLES
from zepad_mm.pretraining import save_encoder
from zepad_mm.utils.io import write_json

ROOT = Path(__file__).parents[2]

TINY = {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1], "zero_init_last": False}
SMALL = """
data: embedded
downstream: [embedded]
pretrain_args: []
victims: [first, second]
studied: [first]
adv_au: second
adv_au_for_itself: first
more_adv_au: [first]
image_size: 32
n_tune: 32
n_validation: 16
n_head: 32
n_selection: 4
evaluation:
  {n: 16, n_validation: 16, n_surrogate: 16, universal: [feature_uap, l4a_base], diagnostics_n: 0,
   universal_steps: {feature_uap: 1, l4a_base: 1}, family_steps: {feature_uap: 1}}
tunings:
  gen_af: {defence: gen_af, options: {attack_steps: 1}}
  gen_af_stage_2: {defence: clean, after: gen_af}
  clean: {defence: clean}
  clean_own: {defence: clean, half: own}
  pgd_at: {defence: tecoa, options: {attack_steps: 1}}
  fare: {defence: fare, options: {attack_steps: 1}, train: {selection: last}}
  fare_labels: {defence: fare, options: {attack_steps: 1, label_weight: 1}, head: probe, train: {selection: last}}
  half_clean: {defence: tecoa, options: {attack_steps: 1, clean_fraction: 0.5}}
  released: {defence: gen_af_released, options: {attack_steps: 1}}
train: {steps: 1, batch_size: 16, validation_attack_steps: 1, bn_mode: train, samples: 0}
head: {epochs: 1}
white_box:
  {threats: [clean, T1, T1b, T2, T3], n: 8, n_validation: 8, n_surrogate: 16, universal: [feature_uap],
   universal_steps: {feature_uap: 1}, family_steps: {feature_uap: 1}, steps: 1, restarts: 1, diagnostics_n: 0,
   adaptive: [], evasion: [selective], detector_steps: 1, pools: [branch]}
threads: 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every table, made from untrained encoders instead of the zoo's."""
    folder = tmp_path_factory.mktemp("paper")
    for seed, name in enumerate(("zoo/first", "zoo/second", "out/bmp")):
        torch.manual_seed(seed)
        overlay = {"input_size": (3, 32, 32), "crop_mode": "squash", "crop_pct": 1.0}
        network = timm.create_model("resnet18", num_classes=0, pretrained_cfg_overlay=overlay, **TINY)
        save_encoder(network, folder / name / "encoder", TINY)
        write_json(folder / name / "pretrain.json", {})
    (folder / "small.yaml").write_text(SMALL)
    run.main(run.PaperSettings.from_cli(arguments(folder)))
    return folder


def arguments(folder: Path) -> list[str]:
    where = ["--out", str(folder / "out"), "--zoo", str(folder / "zoo"), "--result", str(folder / "results" / "paper")]
    return ["--config", str(folder / "small.yaml"), *where]


@pytest.mark.slow
def test_run_makes_every_table_once(folder: Path) -> None:
    written = {path.stem for path in (folder / "results" / "paper").glob("*.json")}
    assert written == set(TABLES)
    main = read_compact(folder / "results" / "paper" / "main.json")
    full = json.loads((folder / "out" / "records" / "main.json").read_text())
    assert [row["accuracy"] for row in full["rows"]] == pytest.approx([row["accuracy"] for row in main["rows"]])
    assert all(0 <= row["ci_low"] <= row["accuracy"] <= row["ci_high"] <= 1 for row in main["rows"])
    assert {row["threat"] for row in main["rows"]} == {"clean", "T1", "T1b"}
    assert {row["victim"] for row in main["rows"]} == {"first", "second"}
    assert str(folder) not in json.dumps(main)
    kept = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.safetensors")}
    run.main(run.PaperSettings.from_cli([*arguments(folder), "--tables", "[main, fusion]"]))
    again = read_compact(folder / "results" / "paper" / "main.json")
    assert again["rows"] == main["rows"]
    assert kept == {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.safetensors")}


@pytest.mark.slow
def test_gated_runs_on_single_victims_are_joined(folder: Path) -> None:
    gate = """
more_data: [embedded]
n_more: 16
n_clean: 20
surrogate_data: embedded
seeds: [1]
threats: [T1]
gate:
  {n: 40, corrupted_views: 1, universal: [feature_uap], held_out: l4a_base, universal_steps: 1, per_image_n: 4,
   stopped_n: 2, per_image_steps: 1, rounds: 1, round_n: 4, round_steps: 1, steps: 2}
"""
    (folder / "gated.yaml").write_text(
        SMALL.replace("fare: {defence: fare,", "fare: {defence: fare, more: true,") + gate
    )
    where = ["--config", str(folder / "gated.yaml"), "--zoo", str(folder / "zoo"), "--out", str(folder / "gated")]
    where += ["--bmp", f"timm:local-dir:{folder / 'out' / 'bmp' / 'encoder'}"]
    for victim, tables, papers, further in (
        ("first", "[main, clean, white_box, seeds, ablation]", "null", "[0.01568627450980392, 0.00784313725490196]"),
        ("second", "[main, clean]", "[]", "[]"),
    ):
        words = [word for key in ("victims", "studied", "repeated") for word in (f"--{key}", f"[{victim}]")]
        words += ["--tables", tables, "--paper_victims", papers, "--white_box_epsilons", further]
        run.main(run.PaperSettings.from_cli([*where, *words, "--result", str(folder / f"of_{victim}")]))
    (folder / "of_first" / "figure.png").write_bytes(b"picture")
    join.main([str(folder / "of_first"), str(folder / "of_second"), "--out", str(folder / "joined")])
    assert (folder / "joined" / "figure.png").read_bytes() == b"picture"
    main = read_compact(folder / "joined" / "main.json")
    assert {(row["victim"], row["model"]) for row in main["rows"]} == {
        ("first", "undefended"), ("first", "paper's"), ("first", "paper's tuning, our rule"),
        ("first", "ours: tuned victim alone"), ("first", "ours"),
        ("second", "undefended"), ("second", "ours: tuned victim alone"), ("second", "ours"),
    }  # fmt: skip
    config = main["meta"]["config"]
    assert config["victims"] == config["repeated"] == ["first", "second"] == list(main["gates"])
    assert config["paper_victims"] == ["first"]
    assert len(config["white_box_epsilons"]) == 2  # those of the first victim
    assert main["members"]["second"]["ours"] == ["second+fare", "second"]
    assert {row["model"] for row in main["detection"] if row["score"] == "feature_gate"} == {"ours"}
    reports = read_compact(folder / "joined" / "white_box.json")["reports"]
    titles = ["first, ours, white_box", "first, ours", "first, the paper's"]
    assert list(reports) == [name for title in titles for name in (title, f"{title} at 2/255")]
    assert {row["epsilon"] for row in reports["first, ours at 2/255"]["rows"] if row["threat"] == "T2"} == {0.0078}
    # under the policy white_box no weight is left for the victim itself
    held = {row["model"]: row["accuracy"] for row in reports["first, ours, white_box"]["rows"] if row["threat"] == "T2"}
    assert held["zepad"] == held["branch:first_fare"]
    for section in (sections_strong.strong_main, sections_strong.strong_detection):
        assert "eached: " in section(main)
    white_box = sections_white_box.strong_white_box(read_compact(folder / "joined" / "white_box.json"))
    budgets = white_box.split("### At ")[1:]
    assert [budget.partition("\n")[0] for budget in budgets] == ["4/255", "2/255"]
    for budget in budgets:
        assert [line.split(" | ")[0] for line in budget.splitlines() if line.startswith("| first")] == [
            f"| {title}" for title in titles
        ]
        assert "of 1 victim" in budget

    seeds = read_compact(folder / "joined" / "seeds.json")
    shown = sections_strong.strong_seeds(seeds)
    assert "seeds 0, 1;" in shown
    assert shown.count(" ± ") == 2 * 6
    assert {row["seed"] for row in seeds["detection"]} == {0, 1}
    assert set(seeds["tuning"]) == {"first+fare", "first+fare@1"}
    first = [row for row in seeds["rows"] if row["seed"] == 0]
    assert first == [
        {**row, "seed": 0} for row in main["rows"] if row["victim"] == "first" and "paper" not in row["model"]
    ]
    clean = read_compact(folder / "joined" / "clean.json")
    assert {row["n"] for row in clean["rows"]} == {20}
    assert {row["threat"] for row in clean["rows"]} == {"clean"}
    base = {row["victim"]: row["accuracy"] for row in clean["rows"] if row["model"] == "undefended"}
    assert list(base) == ["first", "second"]
    for row in clean["rows"]:
        assert (row["gained"] - row["lost"]) / 20 == pytest.approx(row["accuracy"] - base[row["victim"]], abs=1e-4)
    shown = sections_clean.strong_clean(clean)
    assert "paper's" not in sections_clean.strong_clean(clean, ("ours",))
    assert "BA of ours is at least the undefended BA less 0.5 points in" in shown
    assert shown.count("\n| second | ") == 1  # the paper's design is not measured for it
    gated, attack = folder / "gated", "embedded/perturbations/feature_uap@undefended"
    for one, other, same in (
        (f"evaluations/test/main-first/{attack}", f"evaluations/test/main-first-1/{attack}", True),
        ("tuned/first+fare/encoder", "tuned/first+fare@1/encoder", False),
        ("gates/first/gate", "gates/first@1/gate", False),
        ("heads/embedded/first+fare", "heads/embedded/first+fare@1", False),
        ("heads/embedded/first", "heads/embedded/first@1", False),
    ):
        pair = [load_file(gated / f"{name}.safetensors") for name in (one, other)]
        assert all(torch.equal(pair[0][key], pair[1][key]) for key in pair[0]) == same
    ablation = read_compact(folder / "joined" / "ablation.json")
    assert list(ablation["members"]["first"])[-1] == "ours"
    assert {"ours, cap 1", "ours, RFDM instead of the gate"} <= {row["model"] for row in ablation["rows"]}
    for option, value in (("n", "41"), ("robust_scale", "0.6")):
        words = [*where, "--result", str(folder / "x"), f"--gate.{option}", value]
        config = run.PaperSettings.from_cli(words)
        with pytest.raises(ValueError, match=f"gates/first belongs to a run with {option} = .*other settings"):
            study.Study(config).gate("first")
    with pytest.raises(ValueError, match="choice is for a study without a gate"):
        TABLES.get("choice")(study.Study(config))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a", ("a", "", None, False)),
        ("a@0", ("a", "", 0, False)),
        ("a+fare", ("a", "fare", None, False)),
        ("a+fare@12=", ("a", "fare", 12, True)),
    ],
)
def test_names_of_encoders_are_read(name: str, expected: tuple[str, str, int | None, bool]) -> None:
    assert lines.parts(name) == expected


def test_difference_of_clean_accuracy_has_a_paired_interval() -> None:
    gain, low, high = sections_clean.difference({"n": 998, "gained": 29.5, "lost": 9.5})
    assert gain == pytest.approx(100 * 20 / 998)
    assert (low + high) / 2 == pytest.approx(2.0)
    assert (high - low) / 2 == pytest.approx(100 * 1.96 * ((0.04 - 0.02**2) / 1000) ** 0.5)
    low, high = sections_clean.difference({"n": 100, "gained": 0, "lost": 0})[1:]
    assert low < 0 < high


def test_records_of_one_victim_are_joined_once(folder: Path) -> None:
    record = read_compact(folder / "results" / "paper" / "main.json")
    with pytest.raises(ValueError, match="each victim in one of them, got first, second in two"):
        join.joined([record, record])


@pytest.mark.parametrize("seeds", ["[]", "[0]", "[1, 1]"])
def test_seeds_differ_from_each_other_and_from_that_of_the_study(folder: Path, seeds: str) -> None:
    with pytest.raises(ValueError, match=r"none the seed of the study \(0\)"):
        run.PaperSettings.from_cli([*arguments(folder), "--repeated", "[first]", "--seeds", seeds])


@pytest.mark.parametrize("rows", [1, records.LONG - 1, records.LONG])
def test_records_are_read_as_they_were_written(tmp_path: Path, rows: int) -> None:
    table = [
        {"victim": "ab"[i % 2], "model": f"m{i}", "n": i, "asr": i / 8, "policy": [None, "x"][i % 2]}
        for i in range(rows)
    ]
    records.write_columns(tmp_path / "table.json", {"rows": table, "note": {"words": "kept"}})
    assert read_compact(tmp_path / "table.json") == {"rows": table, "note": {"words": "kept"}}
    written = (tmp_path / "table.json").read_text()
    assert written.count('"a"') == (1 if rows >= records.LONG else (rows + 1) // 2)


def test_records_of_different_settings_are_not_joined(folder: Path) -> None:
    one, other = (read_compact(folder / "results" / "paper" / "main.json") for _ in range(2))
    other["meta"]["config"]["seed"] = 1
    with pytest.raises(ValueError, match="but seed differ"):
        join.joined([one, other])


def test_one_victim_of_a_table_is_not_joined_with_another(folder: Path) -> None:
    record = read_compact(folder / "results" / "paper" / "cost.json")
    assert join.joined([record])["rows"] == record["rows"]
    with pytest.raises(ValueError, match="got those of first, first"):
        join.joined([record, record])


def test_document_contains_every_table(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "paper_strong").mkdir()
    for name in ("baselines", "ablation", "released", "fusion", "confidence", "features", "cost"):
        shutil.copy(folder / "results" / "paper" / f"{name}.json", tmp_path / "paper_strong")
    shutil.copytree(folder / "results" / "paper", tmp_path / "paper")
    text = document.document(tmp_path)
    for title, path, _ in (*STRONG_SECTIONS, *SECTIONS):
        assert (f"## {title}\n" in text) == (tmp_path / path).is_file()
        assert (title in text.partition("Not measured on these encoders: ")[2]) or (tmp_path / path).is_file()
    assert "(../results/paper_strong/confidence.png)" in text
    assert "| without BMP | 84.5 / 72.5 |" in text
    assert "reached" in text


def test_tracked_files_are_small() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    sizes = {name: (ROOT / name).stat().st_size for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
    assert sum(sizes.values()) < 45e6
    assert {name for name, size in sizes.items() if size > 8 * 2**20} == {
        "zepad_mm/assets/clip/open_clip_model.safetensors"
    }
    assert not {name for name, size in sizes.items() if name.startswith("results/") and size > 300_000}


def test_committed_document_matches_the_results() -> None:
    assert document.DOCUMENT.read_text(encoding="utf-8") == document.document(document.RESULTS)


@pytest.mark.parametrize("name", ["small", "strong", "full"])
def test_paper_config_parses(name: str) -> None:
    config = run.PaperSettings.from_cli(["--config", str(ROOT / "reproduction" / "paper" / f"{name}.yaml")])
    assert config.tuning in config.tunings
    assert {config.adv_au, config.adv_au_for_itself, *config.more_adv_au, *config.studied, *config.repeated} <= {
        *config.victims, config.adv_au_for_itself
    }  # fmt: skip


def test_attacker_of_other_tasks_may_have_images_of_another_set(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train" / "only").mkdir(parents=True)
    for shade in range(20):
        Image.new("RGB", (32, 32), (shade, 0, 0)).save(tmp_path / "train" / "only" / f"{shade}.png")
    config = run.PaperSettings.from_cli([*arguments(folder), "--data", str(tmp_path)])
    plain = study.Study(config).eval_data("embedded")
    other = study.Study(replace(config, surrogate_data="embedded")).eval_data("embedded")
    assert plain.surrogate.class_names == ("only",)
    assert other.surrogate.class_names == other.test.class_names
    assert len(other.surrogate) == 16
    at_home = study.Study(replace(config, data="embedded", surrogate_data=str(tmp_path))).eval_data("embedded")
    assert at_home.surrogate.class_names == at_home.test.class_names


def test_encoder_missing_from_the_zoo_is_named(folder: Path) -> None:
    config = run.PaperSettings.from_cli(arguments(folder))
    with pytest.raises(FileNotFoundError, match="--methods third"):
        study.Study(config).encoder("third")


def test_verdict_requires_robustness_and_clean_accuracy() -> None:
    def row(model: str, threat: str, accuracy: float) -> dict:
        return {
            "model": model,
            "threat": threat,
            "attack": "none" if threat == "clean" else "worst",
            "accuracy": accuracy,
        }

    rows = [row("undefended", "clean", 0.7), row("branch:a", "clean", 0.5), row("branch:bmp", "clean", 0.7)]
    rows += [row("branch:a", "T2", 0.3), row("branch:bmp", "T2", 0.0), row("undefended", "T2", 0.0)]
    assert verdict([*rows, row("zepad", "clean", 0.6), row("zepad", "T2", 0.295)]).startswith("Reached")
    assert verdict([*rows, row("zepad", "clean", 0.59), row("zepad", "T2", 0.3)]).startswith("NOT")
    assert verdict([*rows, row("zepad", "clean", 0.7), row("zepad", "T2", 0.28)]).startswith("NOT")
