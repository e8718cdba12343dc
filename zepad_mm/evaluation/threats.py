"""Threat models, what each attacker knows and may do, and the kinds of rows. Every other module reads them from here.

To add a threat model, add it to :data:`THREATS`, write the function that runs its attacks (``universal.py`` or
``white_box.py``) and name that function in ``engine.STAGES``. Imports nothing heavy, so that reports are read at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

from zepad_mm.utils.registry import Registry

WORST = "worst"  # name of the attack in rows of the per-sample worst case
MODEL = "model"  # name of the row of a model without a defence of ours


class RowKind(StrEnum):
    """What a row of the table is, in the order in which tables show them."""

    UNDEFENDED = "undefended"  # the public encoder with its own head
    DEFAULT = "default"  # the model as it ships
    BRANCH = "branch"  # one branch alone
    BASELINE = "baseline"  # a model for comparison
    RULE = "rule"  # the branches under another fusion rule


if TYPE_CHECKING:
    from zepad_mm.evaluation.settings import EvalSettings

Budget = tuple[float, str]  # size and norm: "linf" and "l2" in pixels of [0, 1], "patch" as a share of the area


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """One attacker.

    Attributes:
        key: its name in settings, files and tables.
        title: heading of its table.
        description: what the attacker knows and does, in plain words.
        attacker: the same as the subject of a sentence.
        budget: settings to the size and norm of the perturbation; None without an attack.
        attacks: settings to the names of the attacks that it runs.
        counts: threat models whose examples count for the worst case of a row, beside the clean images. An
            attacker who knows more can still do less.
        universal: one perturbation for all images; otherwise each image is attacked by itself.
        images: settings to the number of images that it takes, the first of the test images; None: all of them.
        needs: what a model must have for this threat model to apply.
        requires: the setting that must name at least one attack.
        default_only: only the model as it ships gets a row.
        flagged_is_right: an image that the detector flags counts as answered right.
    """

    key: str
    title: str
    description: str
    attacker: str = ""
    budget: Callable[[EvalSettings], Budget] | None = None
    attacks: Callable[[EvalSettings], tuple[str, ...]] = lambda settings: ()
    counts: tuple[str, ...] = ()
    universal: bool = False
    images: Callable[[EvalSettings], int | None] = lambda settings: None
    needs: Literal["", "public encoder", "undefended model", "branches", "detector"] = ""
    requires: str = ""
    default_only: bool = False
    flagged_is_right: bool = False

    def __str__(self) -> str:
        return self.key


CLEAN = ThreatModel(key="clean", title="Without an attack", description="no attack")
T1 = ThreatModel(
    key="T1",
    title="T1: universal perturbations, each made once for all images on the public encoder",
    description="universal perturbations, each made once for all images on the public encoder (the paper's setting)",
    attacker="An attacker who knows only the public encoder",
    budget=lambda settings: (settings.epsilon_universal, "linf"),
    attacks=lambda settings: (*settings.published, *settings.universal),
    counts=("T1",),
    universal=True,
    needs="public encoder",
    requires="universal",
)
T1P = ThreatModel(
    key="T1p",
    title="T1p: patches, each made once for all images on the public encoder",
    description="patches, each made once for all images on the public encoder",
    attacker="An attacker who puts patches, each made once on the public encoder, on every image",
    budget=lambda settings: (settings.area, "patch"),
    attacks=lambda settings: settings.patches,
    counts=("T1p",),
    universal=True,
    needs="public encoder",
    requires="patches",
)
T1B = ThreatModel(
    key="T1b",
    title="T1b: universal perturbations, each made once for all images on the defence's own encoders",
    description="universal perturbations, each made once for all images on the defence's own encoders",
    attacker="An attacker who also has the defence's encoders, but makes each perturbation once for all images,",
    budget=lambda settings: (settings.epsilon_universal, "linf"),
    attacks=lambda settings: settings.universal_family,
    counts=("T1", "T1b"),
    universal=True,
    needs="branches",
)
T1I = ThreatModel(
    key="T1i",
    title="T1i: each image attacked on the public encoder",
    description="each image is attacked on the public encoder with the class names alone, and transferred",
    attacker="An attacker who attacks each image, but knows only the public encoder and the class names,",
    budget=lambda settings: (max(settings.epsilons_transfer), settings.norm),
    attacks=lambda settings: settings.transfer,
    counts=("T1i",),
    images=lambda settings: settings.n_transfer,
    needs="undefended model",
    requires="transfer",
)
T1IB = ThreatModel(
    key="T1ib",
    title="T1ib: each image attacked on each branch of the defence",
    description="each image is attacked on one branch of the defence at a time, and transferred",
    attacker="An attacker who attacks each image on one branch of the defence at a time",
    budget=lambda settings: (max(settings.epsilons_transfer), settings.norm),
    attacks=lambda settings: settings.transfer,
    counts=("T1i", "T1ib"),
    images=lambda settings: settings.n_transfer,
    needs="branches",
    requires="transfer",
)
T2 = ThreatModel(
    key="T2",
    title="T2: white-box attack on each image",
    description="white-box attack: everything is known, each image is attacked through the whole defence",
    attacker="An attacker who knows everything and attacks each image",
    budget=lambda settings: (settings.epsilon, settings.norm),
    attacks=lambda settings: (*settings.own_attacks, *settings.adaptive),
    counts=("T2",),
    images=lambda settings: settings.n_white_box,
)
T3 = ThreatModel(
    key="T3",
    title="T3: white-box attack that also evades the detector",
    description="white-box attack that also evades the detector: succeeds when the answer is wrong and not flagged",
    attacker="An attacker who knows everything, the detector included, and attacks each image",
    budget=lambda settings: (settings.epsilon, settings.norm),
    attacks=lambda settings: settings.evasion,
    counts=("T2", "T3"),
    images=lambda settings: settings.n_white_box,
    needs="detector",
    default_only=True,
    flagged_is_right=True,
)

# key -> threat model, from weak to strong
THREATS: dict[str, ThreatModel] = {threat.key: threat for threat in (CLEAN, T1, T1P, T1B, T1I, T1IB, T2, T3)}
ATTACKS = tuple(threat for threat in THREATS.values() if threat is not CLEAN)
UNIVERSAL = tuple(threat.key for threat in ATTACKS if threat.universal)

_names: Registry[ThreatModel] = Registry("threat")
for _threat in THREATS.values():
    _names.register(_threat.key)(_threat)


def threat_model(key: str) -> ThreatModel:
    """Return the threat model of this key. Raises ValueError that lists the keys and suggests the nearest."""
    return _names.get(key)


def strength(key: str) -> int:
    """Return the place of a threat model from weak to strong; unknown ones come last."""
    return list(THREATS).index(key) if key in THREATS else len(THREATS)
