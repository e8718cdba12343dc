"""From a public CLIP to a defended one: ready robust weights or freshly tuned branches, then rule and threshold.

:func:`defend` does in one call what recipes/tune.py, recipes/tune_bmp.py and tools/build_zepad.py do in
steps that can be launched on many GPUs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from zepad_mm.attacks import FeatureUAP
from zepad_mm.data import LabelledImages, load_data
from zepad_mm.defences import DEFENCES, make_defence
from zepad_mm.encoders import Encoder, LoraSettings, has_lora, load_clip, load_encoder
from zepad_mm.encoders.prompts import templates_of
from zepad_mm.models.branch import Adaptation, Branch, BranchConfig, Role
from zepad_mm.models.heads import zero_shot_head
from zepad_mm.models.zepad import ZePAD, ZePADConfig
from zepad_mm.selection import select_detector, select_fusion
from zepad_mm.training import TrainSettings, build_student, fit, load_tuned, make_accelerator, write_tuned
from zepad_mm.utils.config import Config
from zepad_mm.utils.io import read_json
from zepad_mm.utils.validation import check_epsilon, check_names

log = logging.getLogger(__name__)

TUNED = "tuned"  # folder of the parts, beside the model that is made of them
NAMES = ("person", "animal", "plant", "vehicle", "building", "food", "clothing", "furniture", "tool", "landscape")


@dataclass(frozen=True, kw_only=True)
class DefendSettings(Config):
    """How :func:`defend` tunes and chooses; the defaults follow the LoRA branch of the shipped model."""

    defences: tuple[str, ...] = ("tecoa", "gen_af")  # one robust branch is tuned by each
    defence_options: dict[str, Any] = field(  # name of a defence -> its fields; unknown ones are refused
        default_factory=lambda: {
            "tecoa": {"attack_steps": 2, "clean_fraction": 0.25},
            "gen_af": {"attack_steps": 2, "topology_weight": 2.0},
        }
    )
    epsilon: float = 4 / 255  # L-inf budget that branches are tuned for and the rule is chosen at, in pixels of [0, 1]
    tune_benign: bool = True  # False: the benign branch is the public encoder as it is
    adaptation: Literal["full", "lora"] = "lora"
    lora: LoraSettings = field(default_factory=lambda: LoraSettings(rank=16, alpha=32.0))
    prompts: str = "photo"  # prompt set or template of the zero-shot heads
    image_size: int | None = None  # side that pictures are stored and attacked at; None: that of the encoder
    n_train: int | None = None  # training images; None: all
    n_validation: int | None = 512  # pictures that choose weights, rule and threshold; None: all
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
            DEFENCES.get(name)
        strangers = sorted(set(self.defence_options) - set(DEFENCES))
        if strangers:
            DEFENCES.get(strangers[0])
        templates_of(self.prompts)


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
    Without, one branch is tuned by each of ``settings.defences``, and a benign one on clean pictures; killed, it
    resumes where it was when called again the same way. The fusion rule, its constants and the detector's threshold
    are then chosen on validation pictures; without ``data`` the default rule is kept, and nothing is ever flagged.

    Args:
        source: the public CLIP, e.g. ``"open_clip:ViT-B-32/openai"`` or ``"hf:openai/clip-vit-base-patch32"``.
        robust: sources of ready robust image towers in the same embedding space, e.g.
            ``["open_clip:ViT-B-32/openai+fare.pt"]``.
        data: ``"embedded"``, a folder of parquet files or of class folders, or a name on the Hub: splits ``train`` and
            ``validation``; where there is no ``validation`` a tenth of ``train`` is held out. Tuning without it takes
            the embedded pictures.
        out: folder that the model, and before that its parts, are written to; needed for tuning.
        class_names: what the model answers at first; None: the classes of ``data``. ``set_classes`` changes them.
        settings: everything else.

    Raises:
        ValueError: no CLIP, tuning without ``out``, robust encoders of another embedding width, or a folder that holds
            parts made with other settings. FileNotFoundError: data or weights that are not there.
    """
    settings = settings or DefendSettings()
    if not robust and out is None:
        raise ValueError("out: tuning takes long and is resumed from a folder; give one, e.g. out='defended'")
    if isinstance(robust, str):
        raise ValueError(f"robust: expected a list of sources, got the string {robust!r}; write [{robust!r}]")
    encoder, text = load_clip(source)
    pictures = None
    if data is not None or not robust:
        pictures = _splits(data or "embedded", settings, encoder.preprocess.image_size)
    if robust:
        parts = _ready(source, robust, encoder)
    else:
        assert pictures is not None
        parts = _tuned(source, encoder, pictures, settings, Path(out or "") / TUNED, make_accelerator())
    wanted = tuple(check_names(class_names)) if class_names else None
    names = pictures[0].class_names if pictures else wanted or NAMES  # rules are compared on the classes of the data
    config = ZePADConfig(
        public_source=source,
        branches=tuple(branch for branch, _ in parts),
        class_names=names,
        prompts=templates_of(settings.prompts),
        tuned_names=() if robust or _keep(settings) else names,
    )
    model = ZePAD(
        config, [Branch(branch, tower, zero_shot_head(text, names, settings.prompts)) for branch, tower in parts]
    )
    if pictures is None:
        log.warning("no data: the fusion rule is the default one, and nothing will be flagged as adversarial")
    else:
        _choose(model, *pictures, settings)
    model.set_classes(wanted or names)
    if out is not None:
        model.save_pretrained(out)
    return model


def tune_branches(
    source: str,
    *,
    out: str | Path,
    data: str = "embedded",
    settings: DefendSettings | None = None,
    accelerator: Accelerator | None = None,
) -> None:
    """The part of :func:`defend` that is worth many processes: all of them call this, then one calls :func:`defend`,
    which finds the branches in ``out``. Arguments and errors as there; ``accelerator``: None makes one."""
    settings = settings or DefendSettings()
    encoder, _ = load_clip(source)
    pictures = _splits(data, settings, encoder.preprocess.image_size)
    _tuned(source, encoder, pictures, settings, Path(out) / TUNED, accelerator or make_accelerator())


def _keep(settings: DefendSettings) -> bool:
    """Whether a robust branch is tuned in a way that names it was not tuned under survive."""
    return any(DEFENCES.get(name).keeps_features for name in settings.defences)


def _splits(source: str, settings: DefendSettings, image_size: int) -> tuple[LabelledImages, LabelledImages]:
    """Training and validation pictures, disjoint."""
    size, seed = settings.image_size or image_size, settings.train.seed
    train = load_data(source, "train", size, settings.n_train, seed)
    try:
        return train, load_data(source, "validation", size, settings.n_validation, seed)
    except (FileNotFoundError, ValueError) as error:
        log.info("%s; a tenth of 'train' is held out for validation", error)
    rest, held = train.split(0.1, seed)
    return rest, held.sample(settings.n_validation, seed)


def _ready(source: str, robust: Sequence[str], public: Encoder) -> list[tuple[BranchConfig, Encoder]]:
    parts = []
    for number, ready in enumerate(robust, start=1):
        tower = load_encoder(ready)
        if tower.feature_dim != public.feature_dim:
            raise ValueError(
                f"{ready} gives {tower.feature_dim} features, {source} gives {public.feature_dim}: its text embeddings "
                "do not fit; expected robust weights of the same CLIP"
            )
        branch = BranchConfig(name=f"robust{number}", role="robust", source=ready, objective="as published")
        parts.append((branch, tower))
    return [*parts, (BranchConfig(name="benign", role="benign", source=source, objective="none"), public)]


def _tuned(
    source: str,
    public: Encoder,
    pictures: tuple[LabelledImages, LabelledImages],
    settings: DefendSettings,
    folder: Path,
    accelerator: Accelerator,
) -> list[tuple[BranchConfig, Encoder]]:
    parts = []
    for name in settings.defences:
        tower = _tune(source, name, pictures, settings, folder / name, accelerator)
        objective = f"{name} at {settings.epsilon * 255:.3g}/255"
        parts.append((_config(name, "robust", source, tower, objective), tower))
    if not settings.tune_benign:
        return [*parts, (BranchConfig(name="benign", role="benign", source=source, objective="none"), public)]
    tower = _tune(source, "clean", pictures, settings, folder / "benign", accelerator)
    return [*parts, (_config("benign", "benign", source, tower, "clean tuning"), tower)]


def _config(name: str, role: Role, source: str, tower: Encoder, objective: str) -> BranchConfig:
    adaptation: Adaptation = "lora" if has_lora(tower) else "full"
    return BranchConfig(name=name, role=role, source=source, adaptation=adaptation, objective=objective)


def _tune(
    source: str,
    name: str,
    pictures: tuple[LabelledImages, LabelledImages],
    settings: DefendSettings,
    folder: Path,
    accelerator: Accelerator,
) -> Encoder:
    """One encoder by one defence, or what an earlier call left of it."""
    train, validation = pictures
    options = dict(settings.defence_options.get(name, {}))
    how = settings.train
    if name == "clean":
        how = replace(how, selection="clean", validation_epsilon=0.0, epsilon_warmup_steps=0)
    else:
        options.setdefault("epsilon", settings.epsilon)
    defence = make_defence(name, options)
    recipe = {
        "source": source,
        "adaptation": settings.adaptation,
        "lora": settings.lora.to_dict(),
        "defence": {"name": name, **defence.to_dict()},
        "prompts": settings.prompts,
        "data": {"name": train.name, "n_train": len(train), "n_validation": len(validation)},
        "train": how.to_dict(),
    }
    if (folder / "tuned.json").is_file():
        if read_json(folder / "tuned.json").get("recipe") != json.loads(json.dumps(recipe)):
            raise ValueError(f"{folder} holds an encoder tuned with other settings; give another out, or delete it")
        log.info("%s: there already", folder)
        return load_tuned(folder)
    log.info("%s: tuning by %s, %s steps", folder, name, how.steps or f"{how.epochs} epochs of")
    student = build_student(
        source,
        train,
        settings.adaptation,
        "zero_shot",
        prompts=settings.prompts,
        lora=settings.lora,
        seed=how.seed,
        cache_dir=how.cache_dir,
    )
    result = fit(student, train, validation, defence, how, out=folder / "run", accelerator=accelerator)
    figures = result.validation.to_dict() if result.validation else None
    record = {"recipe": recipe, "steps": result.steps, "best_step": result.best_step, "validation": figures}
    student.encoder.cpu()
    if accelerator.is_main_process:
        write_tuned(folder, student.encoder, {**record, "seconds": round(result.seconds, 1)})
    accelerator.wait_for_everyone()
    return student.encoder.requires_grad_(False)


def _choose(model: ZePAD, train: LabelledImages, validation: LabelledImages, settings: DefendSettings) -> None:
    """The fusion rule and the detector, on validation pictures; the perturbation is made on training pictures."""
    selection = select_fusion(
        model, validation, epsilon=settings.epsilon, steps=settings.selection_steps, seed=settings.train.seed
    )
    log.info("fusion: %s, right on %.1f %% clean", selection.chosen.key, 100 * selection.chosen.clean)
    size = validation.images.shape[-1]
    attack = FeatureUAP(epsilon=10 / 255, image_size=size, steps=settings.detector_steps, seed=settings.train.seed)
    caught = select_detector(model, validation, attack.fit(model.undefended.encoder, train.images)(validation.images))
    log.info("detector: %s; caught at 5 %% false alarms: %s", model.config.detector, caught)
