"""Settings of an evaluation: threat models, budgets and strengths of attacks; and the presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from zepad_mm.attacks import FUSED_LOSSES, MODES, UNIVERSAL_ATTACKS
from zepad_mm.attacks.base import check_budget
from zepad_mm.data.corruptions import CORRUPTIONS, OUT_OF_DISTRIBUTION, SEVERITIES, check_severity
from zepad_mm.evaluation.threats import ATTACKS, CLEAN, T1, T1B, T1IB, T1P, T2, THREATS, threat_model
from zepad_mm.models.config import Policy
from zepad_mm.models.fusion import RULES
from zepad_mm.utils.config import Config
from zepad_mm.utils.registry import Registry

PATCHES = tuple(name for name in UNIVERSAL_ATTACKS if UNIVERSAL_ATTACKS.get(name)().norm == "patch")
STANDARD_THREATS = tuple(
    key for key in THREATS if key not in (T1P.key, T1IB.key)
)  # of the demo and of recipes/evaluate.py
# each model's own attacks, in the order in which they are worth their cost
OWN_ATTACKS = (
    "pgd_quick", "pgd", "pgd_from_t1", "pgd_momentum", "apgd_ce", "apgd", "apgd_targeted", "prompts", "patch_tokens",
    "square", "rays",
)  # fmt: skip
STRONG = ("pgd_quick", "pgd_momentum", "apgd_ce", "apgd_targeted")  # cheap first, each on what the others left
FULL_STRENGTH = ("apgd_ce", "apgd_targeted")  # what a printed T2 needs at least, on a fused model MORA too
LEAST_STEPS, LEAST_TARGETS = 20, 3  # of it
TRANSFER = ("pgd", "apgd", "mi", "di", "ti")
POOLS = ("branch", "robust_branches", "all_branches")  # on each branch; on the robust ones at once; on all at once


@dataclass(frozen=True, kw_only=True)
class EvalSettings(Config):
    """Settings of an evaluation: everything but the model and the images."""

    threats: tuple[str, ...] = (CLEAN.key, T1.key, T1B.key, T2.key)  # keys of THREATS; clean always runs
    n: int | None = None  # test images, drawn by the seed; None: all
    seed: int = 0  # of images, attacks and their order
    n_validation: int | None = 400  # clean images that set the detector's threshold; None: all
    n_surrogate: int | None = 2000  # the attacker's own images; None: all
    image_size: int | None = None  # side of the images of a named data set; None: of the public encoder
    test_split: str = "test"  # what is reported on
    validation_split: str = "validation"  # falls back to half of "train"
    surrogate_split: str = "surrogate"  # falls back to the other half of "train"; three equal names: disjoint parts
    batch_size: int = 64  # images per forward pass

    epsilon_universal: float = 10 / 255  # L-inf budget of T1 and T1b, in pixels of [0, 1]
    universal: tuple[str, ...] = ("adv_encoder", "feature_uap", "uapgd")  # T1: made on the public encoder
    universal_family: tuple[str, ...] = ("feature_uap",)  # T1b: made on each branch's encoder, and on all at once
    universal_steps: dict[str, int] = field(default_factory=dict)  # T1, per attack; others take their default
    family_steps: dict[str, int] = field(default_factory=dict)  # T1b, the same

    area: float = 0.03  # budget of T1p: the share of the area that a patch covers
    patches: tuple[str, ...] = ("adv_encoder_patch", "adv_clip")  # T1p: made on the public encoder
    published: tuple[str, ...] = ()  # T1: files of perturbations that others published, brought to T1's size and budget

    transfer: tuple[str, ...] = TRANSFER  # T1i and T1ib: names of ATTACKS
    epsilons_transfer: tuple[float, ...] = (4 / 255, 10 / 255)  # their budgets, in the norm of T2
    transfer_steps: int = 10  # gradient steps of each
    n_transfer: int | None = None  # how many of the test images they take, the first ones; None: all

    n_white_box: int | None = None  # how many of the test images T2 and T3 take, the first ones; None: all
    epsilon: float = 4 / 255  # budget of T2 and T3, in pixels of [0, 1]
    norm: Literal["linf", "l2"] = "linf"  # of T2 and T3; the budget of "l2" is a length such as 0.5
    policy: Policy | None = None  # of models with a gate; None: their own
    rules: tuple[str, ...] = ()  # fusion rules that get a row and an attack of their own; empty: all
    steps: int = 20  # gradient steps of T2 attacks, of branches and fused models alike; "fused_margin" takes 12 times
    restarts: int = 1  # of each model's own attack, on the images that survived the shared pool
    fused_restarts: int = 2  # of the losses on the fusion, on the few images that everything else left right
    own_attacks: tuple[str, ...] = STRONG  # each model's own, of OWN_ATTACKS
    adaptive: tuple[str, ...] = ("fused_margin", "mora", "average_logit", "weight_hijack")  # losses on the fusion
    prompt_sets: tuple[str, ...] = ("single", "photo", "style")  # that "prompts" attacks at once
    superclasses: tuple[int, ...] = ()  # the superclass of each class; given, T2 also attacks to leave it
    pools: tuple[str, ...] = POOLS  # what T2's shared pool is made on; see POOLS
    skip_settled: bool = False  # no own attack for a rule that is below the default already: its row says "at most"
    targets: int = 9  # wrong classes that "apgd_targeted" tries
    square_queries: int = 1000  # forward passes per image of "square" and "rays"
    evasion: tuple[str, ...] = ("selective", "lagrangian")  # T3: ways around the detector
    detector_steps: int = 20  # gradient steps of each T3 attack

    diagnostics_n: int = 48  # images that the diagnostics attack again; 0 skips those checks
    diagnostics_factor: int = 3  # how many times more steps the attack of the diagnostics gets

    corruptions: tuple[str, ...] = ()  # false alarms on everyday corruptions: names of CORRUPTIONS
    severities: tuple[int, ...] = SEVERITIES  # of those corruptions, 1 to 5
    out_of_distribution: tuple[str, ...] = ()  # false alarms on other images: names of OUT_OF_DISTRIBUTION

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_names()
        for threat in ATTACKS:
            assert threat.budget is not None
            epsilon, norm = threat.budget(self)
            check_budget(epsilon, norm)
            if epsilon == 0:
                raise ValueError("epsilon: expected a positive budget; for no attack write threats=('clean',)")
            if threat.requires and threat.key in self.threats and not threat.attacks(self):
                raise ValueError(f"{threat.requires}: expected at least one attack for {threat.key}, got none")
        for epsilon in self.epsilons_transfer:
            check_budget(epsilon, self.norm)
        least = {
            "batch_size": 1,
            "n_transfer": 1,
            "n_white_box": 1,
            "transfer_steps": 1,
            "steps": 1,
            "restarts": 1,
            "fused_restarts": 1,
            "detector_steps": 1,
            "diagnostics_factor": 1,
        }
        least |= {"n_transfer": 1, "n_white_box": 1, "transfer_steps": 1}
        least |= {"n": 1, "n_validation": 1, "n_surrogate": 1, "square_queries": 1, "targets": 1, "diagnostics_n": 0}
        for key, smallest in least.items():
            value = getattr(self, key)
            if value is not None and value < smallest:
                raise ValueError(f"{key}: expected at least {smallest}, got {value}")
        if self.corruptions and not self.severities:
            raise ValueError("severities: expected at least one of 1 to 5 for the corruptions, got none")
        for severity in self.severities:
            check_severity(severity)

    def full_strength(self, fused: bool = True) -> bool:
        """Whether T2 is strong enough to be believed of a model, which may fuse several branches.

        APGD-CE and targeted APGD with enough steps and targets; on a fused model also MORA.
        """
        enough = self.steps >= LEAST_STEPS and self.targets >= LEAST_TARGETS
        return enough and set(FULL_STRENGTH) <= set(self.own_attacks) and (not fused or "mora" in self.adaptive)

    def _check_names(self) -> None:
        """Raise ValueError unless everything named is registered and of a kind that fits."""
        for key in self.threats:
            threat_model(key)
        for registry, names in (
            (UNIVERSAL_ATTACKS, (*self.universal, *self.universal_family, *self.universal_steps, *self.family_steps)),
            (UNIVERSAL_ATTACKS, self.patches),
            (RULES, self.rules),
            (FUSED_LOSSES, self.adaptive),
            (MODES, self.evasion),
            (CORRUPTIONS, self.corruptions),
            (OUT_OF_DISTRIBUTION, self.out_of_distribution),
        ):
            for name in names:
                registry.get(name)
        for key, known in (("own_attacks", OWN_ATTACKS), ("pools", POOLS), ("transfer", TRANSFER)):
            for name in getattr(self, key):
                if name not in known:
                    raise ValueError(f"{key}: expected names of {', '.join(known)}, got {name!r}")
        for name in (*self.universal, *self.universal_family):
            if name in PATCHES:
                raise ValueError(
                    f"universal: {name!r} is a patch, whose budget is an area; name it in patches, for T1p"
                )
        for name in self.patches:
            if name not in PATCHES:
                raise ValueError(f"patches: expected names of {', '.join(PATCHES)}, got {name!r}")


# name -> settings: "smoke" shows that everything runs, "demo" takes minutes on two CPU cores, "full" a GPU or a night
PRESETS: Registry[EvalSettings] = Registry("evaluation preset")
PRESETS.register("smoke")(
    EvalSettings(
        n=24,
        n_validation=48,
        n_surrogate=64,
        universal=("adv_encoder", "feature_uap"),
        universal_steps={"adv_encoder": 2, "feature_uap": 3},
        family_steps={"feature_uap": 3},
        own_attacks=("pgd",),  # not at full strength, and the report says so
        steps=2,
        restarts=1,
        fused_restarts=1,
        transfer=("mi",),
        transfer_steps=2,
        epsilons_transfer=(4 / 255,),
        pools=("branch",),
        adaptive=("weight_hijack",),
        detector_steps=2,
        diagnostics_n=0,
        corruptions=("gaussian_noise",),
        severities=(3,),
    )
)
PRESETS.register("demo")(
    EvalSettings(
        n=300,
        n_white_box=100,
        n_transfer=100,
        n_validation=200,
        n_surrogate=512,
        universal_steps={"adv_encoder": 40, "feature_uap": 100},
        family_steps={"feature_uap": 40},
        rules=("rfdm",),
        transfer=("mi", "di"),
        epsilons_transfer=(4 / 255,),
        steps=20,
        targets=3,
        pools=(),
        skip_settled=True,
        adaptive=("fused_margin", "mora"),
        evasion=("selective",),
        detector_steps=6,
        diagnostics_n=16,
        diagnostics_factor=2,
    )
)
PRESETS.register("full")(
    EvalSettings(
        threats=tuple(THREATS),
        n_validation=None,
        n_surrogate=None,
        universal=tuple(name for name in UNIVERSAL_ATTACKS if name not in PATCHES),
        patches=PATCHES,
        universal_family=("adv_encoder", "feature_uap"),
        universal_steps={"adv_encoder": 300, "feature_uap": 1000},
        family_steps={"adv_encoder": 300, "feature_uap": 600},
        epsilons_transfer=(2 / 255, 4 / 255, 8 / 255, 10 / 255),
        transfer_steps=20,
        steps=50,
        restarts=5,
        own_attacks=OWN_ATTACKS,
        adaptive=tuple(FUSED_LOSSES),
        evasion=tuple(MODES),
        square_queries=5000,
        detector_steps=100,
        diagnostics_n=200,
        corruptions=tuple(CORRUPTIONS),
        out_of_distribution=tuple(OUT_OF_DISTRIBUTION),
    )
)
# the protocol of FARE (arXiv 2402.12336), LORE and others, so that rows stand beside theirs: APGD-CE with 5 restarts
# and targeted APGD on 9 classes, 100 steps each, 1000 images of a data set; they run none targeted on two classes
PRESETS.register("apgd_ce_t")(
    EvalSettings(
        threats=(CLEAN.key, T2.key),
        n=1000,
        n_validation=64,
        n_surrogate=64,
        steps=100,
        restarts=5,
        pools=(),
        own_attacks=("apgd_ce", "apgd_targeted"),
        adaptive=(),
        diagnostics_n=0,
    )
)
