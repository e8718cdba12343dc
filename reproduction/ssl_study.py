"""ZePAD's unimodal story from one configuration to one table: pre-train, tune once, fit heads per task, attack, count.

Three SSL encoders: a public victim, a public auxiliary one, and a benign one that no attacker saw. The first two are
tuned adversarially, once, on a labelled part of ``data``; for every set of ``downstream`` only heads are trained, on
clean images. Attackers of T1 know the untouched victim and unlabelled pictures; T1b knows the other encoders too; T2
knows everything. Checkpoints are selected, and thresholds set, on validation images alone.

Run first: ``pip install 'zepad-mm[ssl]'``. ``victim``, ``adv_au`` and ``bmp`` are encoder sources as for
``load_encoder``, or configurations of ``recipes/pretrain.py`` in ``recipes/configs``, which are then run where needed.

    CPU, 1 GPU  python -m reproduction.ssl_study --config reproduction/configs/ssl_study.yaml
    8 GPUs      accelerate launch --multi_gpu --num_processes 8 reproduction/ssl_study.py --config ...
    2 nodes     torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
                    reproduction/ssl_study.py --config ...

Pre-training, tuning and encoding are shared by all processes; attacks and the table are the first one's. What is done
stays done, task by task: a killed run goes on where it was. Writes ``result.json``, ``result.md``, and under ``out``
the encoders, the tuning runs, the perturbations, and one ``ZePAD`` model per task, for ``ZePAD.from_pretrained``.
"""

from __future__ import annotations

import copy
import functools
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jsonargparse import ArgumentParser, DefaultHelpFormatter
from torch import Tensor
from tqdm import tqdm

from recipes import pretrain
from zepad_mm import training
from zepad_mm.attacks import PGD, UNIVERSAL_ATTACKS, Perturbation
from zepad_mm.data import LabelledImages, load_data
from zepad_mm.defences import make_defence
from zepad_mm.encoders import Encoder, load_encoder, optimize_for_inference
from zepad_mm.evaluation.metrics import detect, fooling_rate, paper_rule_accuracy, share
from zepad_mm.models import fusion
from zepad_mm.models.branch import Branch, BranchConfig
from zepad_mm.models.detection import SCORES
from zepad_mm.models.zepad import ZePAD, ZePADConfig
from zepad_mm.training import (
    HeadSettings,
    TrainSettings,
    TuneSettings,
    encode_images,
    fresh_head,
    make_accelerator,
    train_head_on_features,
)
from zepad_mm.utils.io import read_json, write_json, write_text
from zepad_mm.utils.provenance import provenance

BENIGN = (False, False, True)
DEFENDED = ("victim_tuned", "adv_au_tuned", "bmp")
WARNINGS = (
    "one seed",
    "small encoders, briefly pre-trained: compare rows with each other, not with papers",
    "T2 is one PGD run through each row plus all rows' examples, no APGD and no Square: an upper bound",
    "wall_s is that of the last start; pretraining and tuning have their own",
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The whole story. Its defaults are those of shipped configurations, not of the paper."""

    data: str  # D_ft, tuned on once; its first half is public (tuning, attackers), its second half the defender's
    downstream: list[str]  # tasks, each a set with the splits train and test
    out: str  # folder for everything but the table
    result: str  # where the table goes, without a suffix: RESULT.json and RESULT.md
    victim: str = "pretrain_ssl_victim.yaml"  # encoder source, or a configuration that makes it
    adv_au: str = "pretrain_ssl_adv_au.yaml"
    bmp: str = "pretrain_ssl_bmp.yaml"
    pretrain_args: list[str] = field(default_factory=list)  # further arguments for those configurations
    image_size: int = 32  # side that all pictures are brought to, and attacked at
    n_tune: int | None = None  # tuning images, of the public half less its last tenth, which is validation
    n_validation: int = 1000  # at most
    n_head: int | None = None  # images that heads are trained on
    n_test: int = 2000  # test images for T1
    n_white_box: int = 500  # of those, the ones for T2
    n_surrogate: int = 2000  # the attacker's unlabelled pictures, of the public half
    defence: str = "gen_af"  # ZePAD's objective; gen_af_released for the authors' code as it is, or any other
    defence_options: dict[str, Any] = field(default_factory=dict)  # its constants
    train: TrainSettings = field(default_factory=TrainSettings)  # of both tunings and of the clean control
    head: HeadSettings = field(default_factory=HeadSettings)
    rule: str = "bounded_benign"  # fusion of the row "zepad"
    rule_options: dict[str, Any] = field(default_factory=dict)
    universal: list[str] = field(default_factory=lambda: ["adv_encoder", "feature_uap"])  # T1 attacks
    universal_steps: int = 300
    universal_epsilon: float = 10 / 255
    epsilon: float = 4 / 255  # of T2
    pgd_steps: int = 20
    seed: int = 0
    threads: int | None = None  # torch threads on the CPU; None leaves the default


@dataclass(frozen=True)
class Line:
    """A row of the table: which branches, and how their stacked logits (N, B, C) become an answer (B, C)."""

    members: tuple[str, ...]
    fuse: Callable[[Tensor], Tensor]


def lineup(config: Settings) -> dict[str, Line]:
    """All rows: the undefended victim, each branch, the controls, and the fusions."""

    def fused(rule: str, members: tuple[str, ...], benign: tuple[bool, ...], **options: Any) -> Line:
        built = fusion.build(rule, benign, params=options)
        return Line(members, lambda logits: built(logits).logits)

    def single(name: str) -> Line:
        return Line((name,), lambda logits: logits[0])

    return {
        "undefended": single("victim"),
        **{f"branch:{name}": single(name) for name in DEFENDED},
        "baseline:mpae": fused("bounded_benign", DEFENDED[:2], BENIGN[:2]),
        "baseline:clean_finetuned": single("victim_clean"),
        "baseline:untuned_ensemble": fused("equal", ("victim", "adv_au", "bmp"), (True, True, True)),
        "zepad:equal": fused("equal", DEFENDED, BENIGN),
        "zepad:rfdm": fused("rfdm", DEFENDED, BENIGN),
        "zepad": fused(config.rule, DEFENDED, BENIGN, **config.rule_options),
    }


@functools.cache
def whole(source: str, split: str, image_size: int) -> LabelledImages:
    return load_data(source, split, image_size)


def public_rows(config: Settings) -> tuple[Tensor, Tensor]:
    """(tuning, validation) rows of ``data``: the first half, whose last tenth no encoder ever trained on."""
    half = len(whole(config.data, "train", config.image_size)) // 2
    border = half - max(1, half // 10)
    return torch.arange(border), torch.arange(border, half)


def task_data(config: Settings, source: str) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
    """(train, validation, test) of a task; its validation images trained neither head nor encoder."""
    pool = whole(source, "train", config.image_size)
    if source == config.data:
        held_out = public_rows(config)[1]
    else:
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(config.seed))
        held_out = order[: max(1, len(pool) // 10)]
    rest = torch.ones(len(pool), dtype=torch.bool)
    rest[held_out] = False
    test = whole(source, "test", config.image_size).sample(config.n_test, config.seed)
    validation = pool.subset(held_out).sample(config.n_validation, config.seed)
    return pool.subset(rest.nonzero()[:, 0]).sample(config.n_head, config.seed), validation, test


def source_of(config: Settings, role: str, accelerator: Accelerator) -> str:
    """The source string of an encoder, pre-trained first where it is given as a configuration."""
    given = getattr(config, role)
    if not given.endswith(".yaml"):
        return given
    folder = Path(config.out) / role
    if not (folder / "pretrain.json").is_file():
        path = Path(given) if Path(given).is_file() else Path(__file__).parent / "configs" / given
        threads = ["--threads", str(config.threads)] if config.threads else []
        where = ["--data", config.data, "--out", str(folder), "--image_size", str(config.image_size)]
        pretrain.main(["--config", str(path), *where, *threads, *config.pretrain_args])
    accelerator.wait_for_everyone()
    return f"timm:local-dir:{folder / 'encoder'}"


def tune(config: Settings, name: str, source: str, accelerator: Accelerator) -> tuple[Encoder, dict[str, Any]]:
    """The encoder tuned on D_ft under a fresh MLP head that is then thrown away, and the record of its validation."""
    pool = whole(config.data, "train", config.image_size)
    train_rows, validation_rows = public_rows(config)
    train = pool.subset(train_rows).sample(config.n_tune, config.seed)
    validation = pool.subset(validation_rows).sample(config.n_validation, config.seed)
    defence, options = config.defence, config.defence_options
    if name.endswith("clean"):
        defence, options = "clean", {"epsilon": make_defence(defence, options).epsilon}
    tuning = TuneSettings(
        source=source,
        head="mlp",
        defence=defence,
        defence_options=options,
        settings=replace(config.train, seed=config.seed),
    )
    tuned = training.tune(tuning, train, validation, out=Path(config.out) / name, accelerator=accelerator)
    record = {key: tuned.record[key] for key in ("steps", "best_step", "validation", "seconds")}
    return tuned.encoder, {"objective": defence, **record}


def craft(config: Settings, encoders: dict[str, Encoder], device: torch.device) -> dict[tuple[str, str], Perturbation]:
    """(threat, attack) to a universal perturbation; made once, then read from ``out``."""
    pictures = whole(config.data, "train", config.image_size).subset(public_rows(config)[0])
    images = pictures.sample(config.n_surrogate, config.seed + 1).images.to(device)
    plan: dict[tuple[str, str], list[str]] = {("T1", name): ["victim"] for name in config.universal}
    plan[("T1b", "feature_uap on bmp")] = ["bmp"]
    plan[("T1b", "feature_uap on all branches")] = list(DEFENDED)
    found = {}
    for (threat, name), known in plan.items():
        path = Path(config.out) / f"{threat}-{name.replace(' ', '-')}.safetensors"
        if not path.is_file():
            attack = UNIVERSAL_ATTACKS.get(name.split()[0])(
                epsilon=config.universal_epsilon,
                steps=config.universal_steps,
                image_size=config.image_size,
                seed=config.seed,
            )
            attack.fit({key: encoders[key] for key in known}, images, progress=True).save(path)
        found[threat, name] = Perturbation.load(path, config.universal_epsilon)
    return found


def fit_branches(
    config: Settings, encoders: dict[str, Encoder], train: LabelledImages, accelerator: Accelerator
) -> dict[str, Branch]:
    """Every encoder with a clean MLP head for one task; nothing asks for gradients any more."""
    branches = {}
    for name, encoder in encoders.items():
        features = encode_images(encoder, train.images, 500, accelerator)
        head = fresh_head("mlp", encoder.feature_dim, len(train.class_names), config.head.seed)
        train_head_on_features(head, features, train.labels, config.head)
        tuned = name.endswith(("_tuned", "_clean"))
        about = BranchConfig(
            name=name,
            role="robust" if name in DEFENDED[:2] else "benign",
            source=encoder.source,
            adaptation="full" if tuned else "none",
            head="mlp",
            objective=(config.defence if name in DEFENDED else "clean") if tuned else "",
        )
        branches[name] = Branch(about, encoder, head).to(accelerator.device).eval().requires_grad_(False)
    return branches


class Bench:
    """One task: its branches, its test images, and the rows found so far."""

    def __init__(self, config: Settings, branches: dict[str, Branch], validation: LabelledImages, test: LabelledImages):
        self.config, self.validation, self.test = config, validation, test
        self.branches = {name: optimize_for_inference(branch, config.image_size) for name, branch in branches.items()}
        self.device = next(branches["bmp"].parameters()).device
        self.lines, self.rows, self.detection = lineup(config), [], []
        self.clean = self.logits(test.images)

    @torch.no_grad()
    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Each branch's logits (B, C)."""
        batches = [batch.to(self.device) for batch in images.split(500)]
        return {name: torch.cat([branch(x).cpu() for x in batches]) for name, branch in self.branches.items()}

    def answer(self, model: str, logits: dict[str, Tensor]) -> Tensor:
        """(B,) predicted classes."""
        line = self.lines[model]
        return line.fuse(torch.stack([logits[name] for name in line.members])).argmax(-1)

    def record(self, model: str, attack: str, threat: str, epsilon: float, right: Tensor, **more: Any) -> None:
        found = share(right)
        low, high = found.interval
        row = {"model": model, "attack": attack, "threat": threat, "epsilon": epsilon, "norm": "linf"}
        row |= {"dataset": self.test.name, "n": found.n, "accuracy": found.value}
        self.rows.append(row | {"ci_low": low, "ci_high": high, "seconds": None} | more)

    def universal(self, perturbations: dict[tuple[str, str], Perturbation]) -> None:
        """BA, and under each perturbation RA and ASR (share of answers that changed, right or wrong)."""
        labels = self.test.labels
        for model in self.lines:
            self.record(model, "none", "clean", 0.0, self.answer(model, self.clean) == labels)
        for (threat, name), perturbation in perturbations.items():
            attacked = self.logits(perturbation(self.test.images))
            seconds = perturbation.provenance["wall_s"]
            for model in self.lines:
                answers = self.answer(model, attacked)
                changed = fooling_rate(self.answer(model, self.clean), answers)
                epsilon, right = self.config.universal_epsilon, answers == labels
                self.record(model, name, threat, epsilon, right, seconds=seconds, asr=changed)
            self.detect(threat, name, self.clean, attacked)

    def white_box(self) -> None:
        """PGD on the margin through each row, then the worst over everybody's examples for each image."""
        order = torch.randperm(len(self.test), generator=torch.Generator().manual_seed(self.config.seed))
        chosen = order[: self.config.n_white_box].sort().values
        test = self.test.subset(chosen)
        pool, attack = {}, PGD(epsilon=self.config.epsilon, steps=self.config.pgd_steps, loss="margin")
        for model in tqdm(self.lines, f"T2 {test.name}"):
            began, line = time.perf_counter(), self.lines[model]

            def through(images: Tensor, line: Line = line) -> Tensor:
                return line.fuse(torch.stack([self.branches[name](images) for name in line.members]))

            generator = torch.Generator().manual_seed(self.config.seed)
            examples = [
                attack(through, x.to(self.device), y.to(self.device), generator=generator).cpu()
                for x, y in test.batches(250)
            ]
            pool[model] = self.logits(torch.cat(examples))
            right = self.answer(model, pool[model]) == test.labels
            seconds = round(time.perf_counter() - began, 1)
            self.record(model, f"pgd-{attack.steps} margin", "T2", attack.epsilon, right, seconds=seconds)
        clean = {name: logits[chosen] for name, logits in self.clean.items()}
        for model in self.lines:
            survived = [self.answer(model, logits) == test.labels for logits in (clean, *pool.values())]
            self.record(model, "worst", "T2", attack.epsilon, torch.stack(survived).all(0))
        self.detect("T2", f"pgd-{attack.steps} margin", clean, pool["zepad"])

    def detect(self, threat: str, attack: str, clean: dict[str, Tensor], attacked: dict[str, Tensor]) -> None:
        """How well each score tells clean from attacked images, one to one; thresholds from clean validation images."""
        if not hasattr(self, "reference"):
            self.reference = self.logits(self.validation.images)
        for name in ("confidence_gap", "jensen_shannon"):
            before, after, reference = (
                SCORES.get(name)(torch.stack([logits[key] for key in DEFENDED]), BENIGN)
                for logits in (clean, attacked, self.reference)
            )
            found = detect(reference, before, after)
            row: dict[str, Any] = {"model": "zepad", "score": name, "threat": threat, "attack": attack}
            row |= {key: getattr(found, key) for key in ("auroc", "tpr_at_fpr1", "tpr_at_fpr5")}
            row["accuracy_paper_rule"] = paper_rule_accuracy(before, after) if name == "confidence_gap" else None
            self.detection.append(row | {"n": len(before) + len(after), "dataset": self.test.name})


def assemble(config: Settings, public: str, branches: dict[str, Branch], test: LabelledImages) -> None:
    """Save the defence of one task as a model of its own."""
    parts = [copy.copy(branches[name]) for name in DEFENDED]
    about = ZePADConfig(
        public_source=public,
        branches=tuple(part.config for part in parts),
        class_names=test.class_names,
        fusion=config.rule,
        fusion_params=config.rule_options,
    )
    ZePAD(about, parts).save_pretrained(Path(config.out) / f"zepad-{test.name}")


def markdown(report: dict[str, Any]) -> str:
    """The record as tables: one per task, and one for the detectors."""
    meta = report["meta"]
    text = [f"# The unimodal story\n\nSeed {meta['seed']}, commit {meta['commit']}, {meta['wall_s']:.0f} s, "]
    text[0] += f"{meta['hardware']}. Written by `reproduction/ssl_study.py`; accuracies in %, 95 % Wilson intervals."
    for dataset in dict.fromkeys(row["dataset"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["dataset"] == dataset]
        columns = list(dict.fromkeys((row["threat"], row["attack"], row["epsilon"], row["n"]) for row in rows))
        titles = [f"{threat} {name}, {eps * 255:.3g}/255, n = {n}" for threat, name, eps, n in columns]
        text.append(f"\n## {dataset}\n\n| model | {' | '.join(titles)} |\n|{'---|' * (len(titles) + 1)}")
        for model in dict.fromkeys(row["model"] for row in rows):
            cells = []
            for column in columns:
                (row,) = (r for r in rows if r["model"] == model and (r["threat"], r["attack"]) == column[:2])
                changed = f", ASR {row['asr'] * 100:.1f}" if "asr" in row else ""
                interval = f"{row['ci_low'] * 100:.0f}-{row['ci_high'] * 100:.0f}"
                cells.append(f"{row['accuracy'] * 100:.1f} ({interval}){changed}")
            text.append(f"| {model} | {' | '.join(cells)} |")
    text.append(
        "\n## Detection\n\n| task | threat | attack | score | AUROC | TPR at 1 / 5 % FPR | paper's rule |\n|"
        + "---|" * 7
    )
    for row in report["detection"]:
        rule = "-" if row["accuracy_paper_rule"] is None else f"{row['accuracy_paper_rule'] * 100:.1f}"
        rates = f"{row['tpr_at_fpr1'] * 100:.1f} / {row['tpr_at_fpr5'] * 100:.1f}"
        cells = (row["dataset"], row["threat"], row["attack"], row["score"], f"{row['auroc'] * 100:.1f}", rates, rule)
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def run(config: Settings) -> dict[str, Any]:
    """The story; returns what RESULT.json holds (nothing on the other processes)."""
    began = time.time()
    if config.threads:
        torch.set_num_threads(config.threads)
    accelerator = make_accelerator()
    torch.manual_seed(config.seed)
    sources = {role: source_of(config, role, accelerator) for role in ("victim", "adv_au", "bmp")}
    encoders = {role: load_encoder(source) for role, source in sources.items()}
    tunings = {}
    for name in ("victim_tuned", "adv_au_tuned", "victim_clean"):
        source = sources[name.rsplit("_", 1)[0]]
        encoders[name], tunings[name] = tune(config, name, source, accelerator)
    for encoder in encoders.values():
        encoder.to(accelerator.device).eval().requires_grad_(False)
    perturbations = craft(config, encoders, accelerator.device) if accelerator.is_main_process else {}
    report: dict[str, Any] = {"meta": {}, "rows": [], "detection": []}
    identity = without_folders({**asdict(config), "result": "", "threads": 0, "downstream": []})
    for source in config.downstream:
        finished = Path(config.out) / f"task-{re.sub(r'[^A-Za-z0-9]+', '-', Path(source).name)}.json"
        known = read_json(finished) if finished.is_file() else {}
        if known.get("identity") != identity:
            train, validation, test = task_data(config, source)
            branches = fit_branches(config, encoders, train, accelerator)
            if accelerator.is_main_process:
                bench = Bench(config, branches, validation, test)
                bench.universal(perturbations)
                bench.white_box()
                assemble(config, sources["victim"], branches, test)
                known = {"identity": identity, "rows": bench.rows, "detection": bench.detection}
                write_json(finished, known)
            accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            report["rows"] += known["rows"]
            report["detection"] += known["detection"]
    if not accelerator.is_main_process:
        return {}
    pretraining = {
        role: read_json(path)
        for role in ("victim", "adv_au", "bmp")
        if (path := Path(sources[role].removeprefix("timm:local-dir:")).parent / "pretrain.json").is_file()
    }
    report["meta"] = without_folders(
        {
            **provenance(seed=config.seed, config=asdict(config)),
            "wall_s": round(time.time() - began, 1),
            "warnings": WARNINGS,
            "pretraining": pretraining,
            "tuning": tunings,
        }
    )
    write_json(f"{config.result}.json", report)
    write_text(f"{config.result}.md", markdown(report))
    print(markdown(report))
    return report


def without_folders(value: Any) -> Any:
    """The same with absolute paths cut to their last part: a record names no machine's folders."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    return re.sub(r"(?<![\w.-])/\S*/", "", value) if isinstance(value, str) else value


def parse(arguments: list[str] | None = None) -> Settings:
    """Settings from the command line and a ``--config`` file; unknown keys are errors."""
    parser = ArgumentParser(description=__doc__, formatter_class=DefaultHelpFormatter)
    parser.add_argument("--config", action="config", help="YAML file with the settings below")
    parser.add_class_arguments(Settings)
    parsed = parser.instantiate_classes(parser.parse_args(arguments)).as_dict()
    parsed.pop("config")
    return Settings(**parsed)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    return run(parse(arguments))


if __name__ == "__main__":
    main()
