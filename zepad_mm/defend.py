"""Put a defence around a public CLIP: with published robust weights, or with branches tuned here.

:func:`defend` does in one call what recipes/tune.py and tools/build_zepad.py do in steps that can be launched on many
GPUs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from zepad_mm.attacks import FeatureUAP
from zepad_mm.data import LabelledImages, SplitNotFoundError, load_data
from zepad_mm.defences import DEFENCES, make_defence
from zepad_mm.encoders import Encoder, LoraSettings, TextEncoder, has_lora, load_clip, load_encoder
from zepad_mm.encoders.prompts import templates_of
from zepad_mm.models.branch import Adaptation, Branch, BranchConfig, Role
from zepad_mm.models.card import describe_effect, weakness_warning
from zepad_mm.models.config import MeasuredEffect
from zepad_mm.models.detection import GATE_SCORE
from zepad_mm.models.heads import zero_shot_head
from zepad_mm.models.zepad import ZePAD, ZePADConfig
from zepad_mm.selection import select_detector, select_fusion, select_policies
from zepad_mm.training import (
    GateSettings,
    TrainSettings,
    Tuned,
    TuneSettings,
    encode_images,
    make_accelerator,
    train_gate,
    tune,
)
from zepad_mm.utils.config import Config
from zepad_mm.utils.distributed import claim_together
from zepad_mm.utils.images import Resize
from zepad_mm.utils.io import write_json
from zepad_mm.utils.names import check_names
from zepad_mm.utils.validation import check_epsilon

log = logging.getLogger(__name__)

BRANCHES_FOLDER = "tuned"  # holds a folder for each tuned branch, beside the model that is made of them
FEWEST, ENOUGH = 64, 100  # training images of a gate; images of a folder without splits that leave as many
UNIVERSAL = 10 / 255  # budget of the universal perturbation that detector and effect are measured on
NAMES = ("person", "animal", "plant", "vehicle", "building", "food", "clothing", "furniture", "tool", "landscape")


# a few steps of everything: weak, and a few minutes for a small CLIP on a CPU
QUICK_GATE = GateSettings(
    n=256, corruptions=("gaussian_noise", "gaussian_blur", "contrast", "crop_flip"), corrupted_views=1,
    universal=("feature_uap", "adv_encoder"), held_out=None, universal_steps=15, universal_views=1,
    per_image=("pgd:feature_l2",), per_image_n=64, per_image_steps=4, stopped_n=64,
    rounds=1, round_n=32, round_steps=4, steps=200,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DefendSettings(Config):
    """How :func:`defend` tunes and selects; the defaults need no labels."""

    defences: tuple[str, ...] = ("fare",)  # one robust branch is tuned by each
    defence_options: dict[str, Any] = field(  # name of a defence -> its fields; unknown ones are refused
        default_factory=lambda: {
            "fare": {
                "attack_steps": 2,
                "scale_free": True,
                "rho": 0.2,
                "clean_fraction": 0.2,
                "universal_share": 0.4,
            },
            "tecoa": {"attack_steps": 2, "clean_fraction": 0.25},
            "gen_af": {"attack_steps": 2, "topology_weight": 2.0},
        }
    )
    epsilon: float = 4 / 255  # L-inf budget of the tuning and of the selection of the rule, in pixels of [0, 1]
    tune_benign: bool = False  # False: the benign branch is the public encoder as it is; True needs labels
    adaptation: Literal["full", "lora"] = "lora"  # tune all weights (full) or an adapter (lora)
    lora: LoraSettings = field(default_factory=lambda: LoraSettings(rank=16, alpha=32.0))
    prompts: str = "photo"  # prompt set or template of the zero-shot heads
    image_size: int | None = None  # side that images are stored and attacked at; None: that of the encoder
    n_train: int | None = None  # training images; None: all
    n_validation: int | None = 512  # images that select weights, rule and threshold; None: all
    gate: GateSettings | None = field(default_factory=GateSettings)  # how the feature gate is trained; None: no gate
    selection_steps: int = 10  # of each attack that the fusion rules are compared under
    detector_steps: int = 300  # of the universal perturbation that the detector's scores are compared on
    train: TrainSettings = field(
        default_factory=lambda: TrainSettings(
            steps=700, batch_size=64, lr_encoder=1e-3, lr_warmup_steps=30, epsilon_warmup_steps=150,
            validation_every=100, augment="flip_shift", channels_last=True,
        )
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_epsilon(self.epsilon)
        for name in check_names(self.defences, "defences"):
            if DEFENCES.get(name).role == "benign":
                raise ValueError(f"defences: {name!r} tunes benign branches, which tune_benign=True adds; leave it out")
        for name in sorted(self.defence_options):
            DEFENCES.get(name)
        templates_of(self.prompts)


def quick_settings() -> DefendSettings:
    """Settings that show within minutes how the defence is made; it is a weak one."""
    settings = DefendSettings()
    few = {"steps": 40, "batch_size": 16, "lr_warmup_steps": 4, "epsilon_warmup_steps": 10}
    some = {"n_train": 256, "n_validation": 64, "selection_steps": 2, "detector_steps": 20}
    return replace(settings, **some, gate=QUICK_GATE, train=replace(settings.train, **few))  # type: ignore[arg-type]


def defend(
    source: str,
    *,
    robust: Sequence[str] = (),
    data: str | None = None,
    out: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    settings: DefendSettings | None = None,
) -> ZePAD:
    """Put a defence around a public CLIP.

    With ``robust`` nothing is tuned: these encoders are the robust branches and the public one is the benign branch.
    Without, one branch is tuned by each of ``settings.defences``, by default one that needs no labels; a killed call
    resumes when it is repeated with the same arguments. The fusion rule, its constants and the detector's threshold
    are then selected on validation images; without ``data`` the default rule is kept, and nothing is flagged. Labels,
    where there are some, are used for that selection; without, the answers of the public CLIP take their place. On
    images a feature gate is trained, and the rule is "gated", with a cap of the benign weight for each policy.

    Args:
        source: the public CLIP, e.g. ``"open_clip:ViT-B-32/openai"`` or ``"hf:openai/clip-vit-base-patch32"``.
        robust: sources of robust image encoders in the same embedding space, e.g.
            ``["open_clip:ViT-B-32/openai+fare.pt"]``.
        data: ``"embedded"``, a folder of images, class folders or parquet files, or a name on the Hub: splits ``train``
            and ``validation``; where there is no ``validation`` a tenth of ``train`` is held out. Tuning without it
            takes the embedded images.
        out: folder that the tuned branches, then the model are written to; needed for tuning.
        class_names: initial class names of the model; None: those of ``data``. ``set_classes`` changes them.
        settings: everything else.

    Raises:
        ValueError: no CLIP, tuning without ``out``, robust encoders of another embedding width, or a folder that holds
            branches tuned with other settings or is in use by another run. FileNotFoundError: data or weights that do
            not exist.
    """
    with nullcontext() if out is None else claim_together(out):
        return _defend(source, robust, data, out, class_names, settings or DefendSettings())


def _defend(
    source: str,
    robust: Sequence[str],
    data: str | None,
    out: str | Path | None,
    class_names: Sequence[str] | None,
    settings: DefendSettings,
) -> ZePAD:
    if not robust and out is None:
        raise ValueError("out: tuning takes long and is resumed from a folder; give one, e.g. out='defended'")
    if isinstance(robust, str):
        raise ValueError(f"robust: expected a list of sources, got the string {robust!r}; write [{robust!r}]")
    encoder, text = load_clip(source)
    splits = None
    if data is not None or not robust:
        splits = _named_splits(data or "embedded", settings, encoder, text)
    if robust:
        branches = _load_robust_branches(source, robust, encoder)
    else:
        assert splits is not None
        folder = Path(out or "") / BRANCHES_FOLDER
        branches = _train_branches(source, encoder, splits, settings, folder, make_accelerator())
    requested = tuple(check_names(class_names)) if class_names else None
    names = splits[0].class_names if splits else requested or NAMES  # rules are compared on the classes of the data
    config = ZePADConfig(
        public_source=source,
        branches=tuple(branch for branch, _ in branches),
        class_names=names,
        prompts=templates_of(settings.prompts),
        tuned_names=() if robust or any(DEFENCES.get(name).keeps_features for name in settings.defences) else names,
    )
    model = ZePAD(
        config, [Branch(branch, tower, zero_shot_head(text, names, settings.prompts)) for branch, tower in branches]
    )
    if splits is None:
        log.warning("no data: the fusion rule is the default one, and nothing will be flagged as adversarial")
    else:
        detection = _train_gate(model, *splits, settings, out)
        _select_fusion_and_threshold(model, *splits, settings, detection)
    model.set_classes(requested or names)
    if out is not None:
        model.save_pretrained(out)
    if weakness := weakness_warning(model.config):
        log.warning(weakness)
    return model


def tune_branches(
    source: str,
    *,
    out: str | Path,
    data: str = "embedded",
    settings: DefendSettings | None = None,
    accelerator: Accelerator | None = None,
) -> None:
    """Tune the branches of :func:`defend` on several processes.

    All processes call this, then one of them calls :func:`defend`, which finds the branches in ``out``. Arguments and
    errors as there; ``accelerator``: None makes one.
    """
    settings = settings or DefendSettings()
    encoder, text = load_clip(source)
    splits = _named_splits(data, settings, encoder, text)
    _train_branches(source, encoder, splits, settings, Path(out) / BRANCHES_FOLDER, accelerator or make_accelerator())


def _named_splits(
    source: str, settings: DefendSettings, public: Encoder, text: TextEncoder
) -> tuple[LabelledImages, LabelledImages]:
    """Training and validation images; without labels they get the names and answers of :data:`NAMES`."""
    train, validation = _load_splits(source, settings, public.preprocess)
    if settings.gate is not None and len(train) < FEWEST:
        needed = f"a gate needs at least {FEWEST}, with what is held out about {ENOUGH}"
        log.warning("%s has %d training images, too few for a gate: %s", source, len(train), needed)
    if train.class_names:
        return train, validation
    log.info("%s has no labels: rule and threshold are chosen by the public CLIP's own answers", source)
    head = zero_shot_head(text, NAMES, settings.prompts)
    answers = head(encode_images(public, validation.images).to(head.text)).argmax(-1).cpu()
    return replace(train, class_names=NAMES), replace(validation, class_names=NAMES, labels=answers)


def _load_splits(source: str, settings: DefendSettings, resize: Resize) -> tuple[LabelledImages, LabelledImages]:
    """Training and validation images, disjoint, with their labels where they have any."""
    size, seed = resize.at(settings.image_size), settings.train.seed
    train = load_data(source, "train", size, settings.n_train, seed, labelled=False)
    try:
        return train, load_data(source, "validation", size, settings.n_validation, seed, labelled=False)
    except SplitNotFoundError as error:
        if len(train) < 2:
            raise ValueError(
                f"data: expected at least 2 images, and about {ENOUGH} for a gate, got {len(train)} in {source}"
            ) from None
        log.info("%s; a tenth of 'train' is held out for validation", str(error).partition(";")[0])
        train, held_out = train.split(0.1, seed)
        return train, held_out.sample(settings.n_validation, seed)


def _check_labels(splits: tuple[LabelledImages, LabelledImages], settings: DefendSettings) -> None:
    """Raise ValueError where images without labels are to be tuned on in a way that reads them."""
    names = [*settings.defences, *(["clean"] if settings.tune_benign else [])]
    needing = [name for name in names if make_defence(name, settings.defence_options.get(name)).needs_labels]
    if needing and bool((splits[0].labels < 0).any()):
        raise ValueError(
            f"data: {splits[0].name} has no labels, which {', '.join(needing)} (clean: tune_benign) need; sort the "
            "images into a folder for each class, or write defences=('fare',), tune_benign=False and no label_weight"
        )


def _load_robust_branches(source: str, robust: Sequence[str], public: Encoder) -> list[tuple[BranchConfig, Encoder]]:
    """A branch for each published robust encoder, and the public one as the benign branch."""
    branches = []
    for number, weights in enumerate(robust, start=1):
        encoder = load_encoder(weights)
        if encoder.feature_dim != public.feature_dim:
            raise ValueError(
                f"{weights} gives {encoder.feature_dim} features, {source} gives {public.feature_dim}: its text "
                "embeddings do not fit; expected robust weights of the same CLIP"
            )
        config = BranchConfig(name=f"robust{number}", role="robust", source=weights, objective="as published")
        branches.append((config, encoder))
    return [*branches, _public_branch(source, public)]


def _train_branches(
    source: str,
    public: Encoder,
    splits: tuple[LabelledImages, LabelledImages],
    settings: DefendSettings,
    folder: Path,
    accelerator: Accelerator,
) -> list[tuple[BranchConfig, Encoder]]:
    """A branch tuned by each defence, and a benign one; what an earlier call left in ``folder`` is loaded."""
    _check_labels(splits, settings)
    branches = []
    for name in settings.defences:
        tuning = _tuning_of(name, source, settings)
        tuned = tune(tuning, *splits, out=folder / name, accelerator=accelerator)
        objective = f"{name} at {settings.epsilon * 255:.3g}/255"
        branches.append(_tuned_branch(name, "robust", source, tuned, objective))
    if not settings.tune_benign:
        return [*branches, _public_branch(source, public)]
    tuning = _tuning_of("clean", source, settings)
    tuned = tune(tuning, *splits, out=folder / "benign", accelerator=accelerator)
    return [*branches, _tuned_branch("benign", "benign", source, tuned, "clean tuning")]


def _public_branch(source: str, public: Encoder) -> tuple[BranchConfig, Encoder]:
    return BranchConfig(name="benign", role="benign", source=source, objective="none"), public


def _tuned_branch(name: str, role: Role, source: str, tuned: Tuned, objective: str) -> tuple[BranchConfig, Encoder]:
    encoder = tuned.encoder.cpu()
    adaptation: Adaptation = "lora" if has_lora(encoder) else "full"
    if tuned.untuned:
        objective = f"untuned: {objective} kept the public weights"
    config = BranchConfig(
        name=name, role=role, source=source, adaptation=adaptation, objective=objective, untuned=tuned.untuned
    )
    return config, encoder


def _tuning_of(defence: str, source: str, settings: DefendSettings) -> TuneSettings:
    """How the branch of one defence is tuned; "clean" is the benign one."""
    options = dict(settings.defence_options.get(defence, {}))
    train_settings = settings.train
    if DEFENCES.get(defence).role == "benign":
        train_settings = replace(train_settings, selection="clean", validation_epsilon=0.0, epsilon_warmup_steps=0)
    else:
        options.setdefault("epsilon", settings.epsilon)
        if DEFENCES.get(defence).keeps_features:  # validation prefers the untuned weights for many steps
            train_settings = replace(train_settings, selection="last")
    return TuneSettings(
        source=source,
        adaptation=settings.adaptation,
        lora=settings.lora,
        head="zero_shot",
        prompts=settings.prompts,
        defence=defence,
        defence_options=options,
        settings=train_settings,
    )


def _train_gate(
    model: ZePAD, train: LabelledImages, validation: LabelledImages, settings: DefendSettings, out: str | Path | None
) -> float | None:
    """Train the gate around the branches on the training images, calibrate it on both, and set it; in place.

    Returns the threshold of its score for detection; None where there is no gate.
    """
    if settings.gate is None or model.config.nothing_tuned or len(train) < FEWEST:
        return None
    device = make_accelerator().device
    own, others = ([model.branch(name) for name, benign in zip(model.branches, model.benign, strict=True)
                    if benign == wanted] for wanted in (True, False))  # fmt: skip
    benign, *robust = (branch.encoder.to(device) for branch in (own[0], *others))
    public = model.undefended.encoder.to(device) if settings.tune_benign else None
    head: Any = own[0].head
    folder = None if out is None else Path(out) / BRANCHES_FOLDER / "gate"
    gate, record = train_gate(
        benign, robust, {"train": train}, settings.gate, calibration={"validation": validation}, public=public,
        directions=head.text, out=folder, progress=True,
    )  # fmt: skip
    model.to("cpu").set_gate(gate)
    if public is not None:
        public.cpu()
    if folder is not None:
        write_json(folder / "gate.json", record)
    return float(record["thresholds"]["detection"])


def _select_fusion_and_threshold(
    model: ZePAD,
    train: LabelledImages,
    validation: LabelledImages,
    settings: DefendSettings,
    detection: float | None,
) -> None:
    """Select fusion rule and detector on validation images; the detector's perturbation is made on training images.

    ``detection`` is the threshold of the gate's score, where it is the one that is selected.
    """
    selection = select_fusion(
        model, validation, epsilon=settings.epsilon, steps=settings.selection_steps, seed=settings.train.seed
    )
    log.info("fusion: %s, clean accuracy %.1f %%", selection.chosen.key, 100 * selection.chosen.clean)
    if model.gate is not None:
        log.info("gated instead; largest benign weight by policy: %s", select_policies(model, selection))
    size = validation.images.shape[-1]
    attack = FeatureUAP(epsilon=UNIVERSAL, image_size=size, steps=settings.detector_steps, seed=settings.train.seed)
    attacked = attack.fit(model.undefended.encoder, train.images)(validation.images)
    _measure_effect(model, attacked, validation.labels)
    detected = select_detector(model, validation, attacked)
    if model.config.detector.score == GATE_SCORE:
        model.set_detector(replace(model.config.detector, threshold=detection))
    detector = model.config.detector
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in detected.items())
    threshold = "none" if detector.threshold is None else f"{detector.threshold:.4g}"
    log.info("detector: suspicion score %s, threshold %s", detector.score, threshold)
    log.info("detected at 5 %% false positives: %s", shares)


@torch.no_grad()
def _measure_effect(model: ZePAD, attacked: Tensor, labels: Tensor) -> None:
    """Set what the model and the public encoder answer right of the attacked validation images; in place."""

    def share_right(network: nn.Module) -> float:
        answers = torch.cat([network(part).argmax(-1) for part in attacked.split(64)])
        return float((answers == labels).float().mean())

    undefended, defended = share_right(model.undefended), share_right(model)
    effect = MeasuredEffect(undefended=undefended, defended=defended, n=len(labels), epsilon=UNIVERSAL)
    model.config = replace(model.config, effect=effect)
    if not effect.is_none:  # of which the last warning tells
        log.info("%s", describe_effect(effect))
