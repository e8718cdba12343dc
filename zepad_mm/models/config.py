"""Configurations of defended models, their branches and gates. Imports nothing heavy: a model card needs no weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from zepad_mm import __version__
from zepad_mm.utils.config import Config, convert_value
from zepad_mm.utils.hub import MODEL_TYPE
from zepad_mm.utils.names import check_names
from zepad_mm.utils.registry import check_choice
from zepad_mm.utils.text import quoted

FORMAT = 1
CONFIG = "config.json"  # the file that holds a ZePADConfig
GATED_RULE = "gated"  # the fusion rule that needs a model with a gate
BUILT_IN_HEADS = ("linear", "mlp", "zero_shot")  # of zepad_mm.models.heads.HEADS
MOST_HIDDEN = 65_536  # hidden units that a file may ask for
LEAST_GAIN = 0.05  # of accuracy under attack, below which a defence is said to have no effect

Role = Literal["robust", "benign"]
Adaptation = Literal["none", "full", "lora"]
Policy = Literal["zero_sacrifice", "white_box"]


@dataclass(frozen=True, kw_only=True)
class BranchConfig(Config):
    """What a branch is made of, enough to build it again around the saved weights."""

    name: str  # unique within a model
    role: Role  # "robust": tuned on adversarial images; "benign": never
    source: str  # where the base encoder comes from, e.g. "open_clip:embedded"
    adaptation: Adaptation = "none"  # "none": the base as it is; "full": all weights tuned; "lora": an adapter
    head: str = "zero_shot"  # a name of zepad_mm.models.heads.HEADS
    objective: str = ""  # how it was tuned, for the model card
    untuned: bool = False  # it was to be tuned, and no tuned weights were better on validation than the public ones

    def __post_init__(self) -> None:
        if str(self.role) in ("mpae", "bmp"):
            raise ValueError(
                f"branch {self.name!r}: expected a role of {get_args(Role)}, got {self.role!r}. In files by an older "
                "zepad-mm change the role 'mpae' to 'robust' and 'bmp' to 'benign' in config.json"
            )
        super().__post_init__()
        if not self.name or "." in self.name or "/" in self.name:
            raise ValueError(f"branch name {self.name!r}: expected a non-empty name without '.' and '/'")
        if self.head not in BUILT_IN_HEADS:
            from zepad_mm.models.heads import HEADS  # here, because it needs torch

            HEADS.get(self.head)


@dataclass(frozen=True, kw_only=True)
class GateConfig(Config):
    """Everything of a gate except its weights."""

    kind: Literal["learned", "cosine"] = "learned"  # "cosine": mean cosine distance, nothing is trained
    hidden: int = 128  # hidden units of the learned gate
    dropout: float = 0.2  # while it is trained
    threshold: float | None = None  # z at which the benign weight is half its cap; None: not calibrated yet
    sharpness: float = 2.0  # how steeply the benign weight falls at the threshold, per unit of z
    cap: float = 1.0  # largest weight of the benign branches together, unless a policy of the model sets another
    robust_scale: float = 1.0  # factor on the robust logits: below 1, a robust branch overrules where it is sure
    false_alarm_rate: float = 0.05  # share of clean calibration images above the threshold
    seen_attacks: tuple[str, ...] = ()  # kinds of attacks in its training, for the report

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.hidden <= MOST_HIDDEN:
            raise ValueError(f"hidden: expected 1 to {MOST_HIDDEN} units, got {self.hidden}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a share in [0, 1), got {self.dropout}")
        for name in ("sharpness", "robust_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("cap", "false_alarm_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share in [0, 1], got {getattr(self, name)}")

    @property
    def calibrated_threshold(self) -> float:
        """The threshold. Raises ValueError for a gate that has none."""
        if self.threshold is None:
            raise ValueError(
                "the gate has no threshold; calibrate it on clean images, or give one: GateConfig(threshold=...)"
            )
        return self.threshold


@dataclass(frozen=True, kw_only=True)
class DetectorConfig(Config):
    """When an input is flagged as adversarial."""

    score: str = "jensen_shannon"  # a name of zepad_mm.models.detection.SCORES
    threshold: float | None = None  # from clean validation images; None: scores are given, nothing is flagged
    false_positive_rate: float = 0.05  # share of clean validation images above the threshold

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None:
            convert_value(float, self.threshold, "threshold")
        if not 0 <= convert_value(float, self.false_positive_rate, "false_positive_rate") <= 1:
            raise ValueError(f"false_positive_rate: expected a share in [0, 1], got {self.false_positive_rate}")


@dataclass(frozen=True, kw_only=True)
class MeasuredEffect(Config):
    """What a defence gained where it was made: accuracies on validation images under a universal perturbation.

    The perturbation is made on the public encoder. Where the images have no labels, the public encoder's answers to the
    clean images take their place.
    """

    undefended: float  # of the public encoder, in [0, 1]
    defended: float
    n: int
    epsilon: float  # L-inf, in pixels of [0, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("undefended", "defended", "epsilon"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"effect.{name}: expected a number in [0, 1], got {getattr(self, name)}")
        if self.n < 1:
            raise ValueError(f"effect.n: expected at least 1 image, got {self.n}")

    @property
    def is_none(self) -> bool:
        """Whether the defence gained less than :data:`LEAST_GAIN`."""
        return self.defended - self.undefended < LEAST_GAIN


@dataclass(frozen=True, kw_only=True)
class ZePADConfig(Config):
    """Everything of a defended model except its weights."""

    public_source: str  # the encoder that is defended, and that a T1 attacker knows
    branches: tuple[BranchConfig, ...]
    class_names: tuple[str, ...]
    prompts: tuple[str, ...] = ("a photo of a {}.",)  # templates of the zero-shot heads
    fusion: str = "bounded_benign"  # a name of zepad_mm.models.fusion.RULES
    fusion_params: dict[str, Any] = field(default_factory=dict)  # constants of the rule; missing ones are its defaults
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    gate: GateConfig | None = None  # of the feature gate; None: the model has none
    policy: Policy = "zero_sacrifice"  # against attackers who do not know the defence, or "white_box" against all
    policy_caps: dict[str, float] = field(default_factory=dict)  # policy -> largest benign weight of the rule "gated"
    effect: MeasuredEffect | None = None  # measured by zepad_mm.defend; None: not measured
    revisions: dict[str, str] = field(default_factory=dict)  # source -> commit of the base, where it is known
    tuned_names: tuple[str, ...] = ()  # all that the robust branches know; empty: tuned to keep other names too
    storage_dtype: Literal["float32", "float16"] = "float32"  # of the saved weights
    fingerprint: tuple[float, ...] = ()  # logits of a fixed image, checked on load
    encoders: dict[str, Any] = field(default_factory=dict)  # fingerprint of each branch's encoder, to name what changed
    version: str = __version__  # of zepad-mm that wrote it
    format: int = FORMAT
    model_type: Literal["zepad"] = MODEL_TYPE  # by which transformers knows the file; see zepad_mm.pipelines

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names([branch.name for branch in self.branches], "branch names")
        check_names(self.class_names, fold_case=False)
        for policy, cap in self.policy_caps.items():
            check_choice("policy_caps", policy, get_args(Policy))
            if not 0 <= cap <= 1:
                raise ValueError(f"policy_caps.{policy}: expected a share in [0, 1], got {cap}")
        if self.format != FORMAT:
            raise ValueError(f"the model is of format {self.format}, this zepad-mm reads {FORMAT}; upgrade zepad-mm")

    @property
    def benign(self) -> tuple[bool, ...]:
        """For each branch whether it is benign."""
        return tuple(branch.role == "benign" for branch in self.branches)

    @property
    def rule_params(self) -> dict[str, Any]:
        """Constants of the rule, with the cap that the policy sets."""
        if self.fusion != GATED_RULE or self.policy not in self.policy_caps:
            return self.fusion_params
        return {"cap": self.policy_caps[self.policy], **self.fusion_params}

    @property
    def sources(self) -> tuple[str, ...]:
        """Every base encoder, each once, the public one first."""
        return tuple(dict.fromkeys((self.public_source, *(branch.source for branch in self.branches))))

    def warn_untuned_classes(self, names: Sequence[str]) -> None:
        """Warn about class names that the robust branches were not tuned on, where they were tuned by labels."""
        known = {name.lower() for name in self.tuned_names}
        untuned = [name for name in names if name.lower() not in known]
        if known and untuned:
            few = ", ".join(map(quoted, untuned[:3])) + (", ..." if len(untuned) > 3 else "")
            warnings.warn(
                f"the robust branches were tuned by labels on {len(known)} classes and may have forgotten others: "
                f"{few}. "
                "Evaluate on images of your own, or tune by 'fare', which keeps other classes (zepad "
                "defend --defences fare)",
                stacklevel=3,
            )

    @property
    def nothing_tuned(self) -> bool:
        """Whether every robust branch is the public encoder still, so that the model defends nothing."""
        robust = [branch for branch in self.branches if branch.role == "robust"]
        return bool(robust) and all(branch.untuned for branch in robust)

    @property
    def zero_shot(self) -> bool:
        """Whether all heads are zero-shot, so that any class names can be set."""
        return all(branch.head == "zero_shot" for branch in self.branches)
