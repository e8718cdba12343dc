"""Models under evaluation: which networks a model consists of, how they are combined, what a T1 attacker would use.

A :class:`Subject` is built by :func:`subject_of` from a ``ZePAD``, a source string, a ``Branch``, an encoder with a
head, or any module from images in [0, 1] to logits; or by hand, for other combinations of the same networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zepad_mm.encoders import BACKENDS, Encoder, TextEncoder, load_clip
from zepad_mm.evaluation.threats import MODEL, RowKind
from zepad_mm.models.branch import Branch, run_branches
from zepad_mm.models.config import Policy
from zepad_mm.models.fusion import Fusion, build, rule_names
from zepad_mm.models.gate import FeatureGate
from zepad_mm.models.heads import zero_shot_head
from zepad_mm.models.zepad import DetectorConfig, ZePAD
from zepad_mm.utils.images import Resize

DEFENCE = "zepad"  # name of the row of a defended model as it ships
UNDEFENDED = "undefended"
ROBUST = "robust"  # role of a robust branch
Combine = Callable[[Tensor], Tensor]  # logits (N, B, C) of N networks to one answer (B, C)


@dataclass(frozen=True)
class Row:
    """A row of the table: a model put together from networks ("members") that are run once for all rows.

    Attributes:
        name: as tables show it.
        members: which networks it needs, as indices into the members of its subject.
        combine: logits of those members (N, B, C) to one answer (B, C).
        kind: what it is.
        gated: whether ``combine`` takes the logit of the subject's gate as one more row (N + 1, B, C).
    """

    name: str
    members: tuple[int, ...]
    combine: Combine
    kind: RowKind = RowKind.BASELINE
    gated: bool = False

    @property
    def fused(self) -> bool:
        """Whether it needs more than one member."""
        return len(self.members) > 1

    def answer(self, logits: Tensor) -> Tensor:
        """Logits of all members (M, n, C), and of the gate where there is one, to those of this row (n, C)."""
        return self.combine(logits[[*self.members, -1] if self.gated else list(self.members)])


class BranchView(nn.Module):
    """Some members as one differentiable module for attacks, with what combines them unless that is None.

    Images (B, 3, H, W) to (B, C); without ``combine`` to the stacked logits (N, B, C), whose losses attacks sum. With a
    gate, which reads the features of the members, all of them branches, its logit is one more row (N + 1, B, C).
    """

    def __init__(
        self, members: Sequence[nn.Module], combine: Combine | None = None, gate: FeatureGate | None = None
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.combine = combine
        self.gate = gate

    def forward(self, images: Tensor) -> Tensor:
        if self.gate is None:
            logits = torch.stack([member(images) for member in self.members])
        else:
            branches: list[Any] = list(self.members)
            logits = run_branches(branches, [images] * len(branches), self.gate).stacked
        return logits if self.combine is None else self.combine(logits)


@dataclass(frozen=True)
class FusedAnswer:
    """The fused logits of a fusion; equal for equal fusions, so that the same rule is not attacked twice."""

    fusion: Fusion

    def __call__(self, logits: Tensor) -> Tensor:
        return self.fusion(logits).logits


def soft_vote(logits: Tensor) -> Tensor:
    """Equal-weight ensemble: log of the mean probability over members up to a constant, (N, B, C) to (B, C)."""
    return logits.log_softmax(-1).logsumexp(0)


def first_logits(logits: Tensor) -> Tensor:
    """(1, B, C) to (B, C)."""
    return logits[0]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model under evaluation.

    Attributes:
        members: name -> network from images (B, 3, H, W) in [0, 1] to logits (B, C); the branches of a fusion first.
        rows: the rows of its table; the first is the model as it ships (kind ``DEFAULT``).
        class_names: the C classes; None where they are not known, which is then not checked.
        public_encoder: what a T1 attacker has; None: T1 and T1p do not apply. Where a member is called "undefended",
            its encoder is the public one.
        fusion: of the model as it ships; None for a single network, which has no detector (no T3, no detection rows).
        detector: score and threshold of the fusion's detector.
        text: gives the text tower that made its zero-shot heads; None where there is none.
        gate: of the model as it ships, whose branches it reads; None for a model without one.
        about: what identifies the model, for the report.
    """

    members: Mapping[str, nn.Module]
    rows: tuple[Row, ...]
    class_names: tuple[str, ...] | None = None
    public_encoder: Encoder | None = None
    fusion: Fusion | None = None
    detector: DetectorConfig | None = None
    text: Callable[[], TextEncoder] | None = None
    gate: FeatureGate | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.rows or self.rows[0].kind is not RowKind.DEFAULT:
            raise ValueError("rows: expected the model as it ships first, a Row of kind RowKind.DEFAULT")
        names = [row.name for row in self.rows]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"rows: given more than once: {', '.join(twice)}")

    @property
    def device(self) -> torch.device:
        """Where its networks are; the CPU for one without parameters."""
        parameters = (parameter for member in self.members.values() for parameter in member.parameters())
        return next(parameters, torch.zeros(())).device

    @property
    def benign(self) -> tuple[bool, ...]:
        """For each branch of the fusion whether it is a benign one."""
        return tuple(self.fusion.benign) if self.fusion else ()

    def row(self, name: str, kind: RowKind, members: Sequence[str], combine: Combine = first_logits) -> Row:
        """Return a row over members given by name. Raises ValueError for a member that is not there."""
        known = list(self.members)
        for member in members:
            if member not in known:
                raise ValueError(f"row {name!r}: no member {member!r}; this model has {', '.join(known)}")
        return Row(name, tuple(known.index(member) for member in members), combine, kind)

    def with_fused_row(self, name: str, members: Sequence[str], rule: str, **params: Any) -> Subject:
        """Return the subject with one more row, of kind ``BASELINE``: a fusion rule over some of its members.

        Args:
            name: of the row, without "baseline:".
            members: names; those that are robust or benign branches keep their roles, others count as benign.
            rule: a name of ``RULES``.
            **params: its constants.
        """
        benign = [getattr(self.members.get(member), "role", None) != ROBUST for member in members]
        answer = FusedAnswer(build(rule, benign, params=params))
        return replace(self, rows=(*self.rows, self.row(f"baseline:{name}", RowKind.BASELINE, members, answer)))


def subject_of(
    model: Any,
    *,
    class_names: Sequence[str] | None = None,
    rules: Sequence[str] = (),
    baselines: Mapping[str, nn.Module] | None = None,
    public_encoder: Encoder | None = None,
    policy: Policy | None = None,
) -> Subject:
    """Return any model as a :class:`Subject`.

    Args:
        model: a ``ZePAD``; a source string of a defended model ("embedded", a folder, a Hub name) or of a CLIP
            ("open_clip:embedded"), which is pointed at ``class_names``; a ``Branch``; a pair (encoder, head); a module
            from images in [0, 1] to logits; or a Subject, to which only ``baselines`` are added.
        class_names: what zero-shot heads of a source string answer.
        rules: fusion rules that get a row, for a ZePAD; empty: all.
        baselines: further models for comparison, from images to logits.
        public_encoder: what a T1 attacker has. A ZePAD names its own; the encoder of a source string, of a pair or
            of a branch without adaptation is public itself.
        policy: of a ZePAD with a gate, as for ``ZePAD.set_policy``; None: its own. Other models have none.

    Raises:
        TypeError: something else; ValueError: unknown names, or a source without a text tower and without a head.
    """
    if isinstance(model, Subject):
        subject = model
    elif isinstance(model, str | Path):
        return subject_of(
            load_model(model, class_names), class_names=class_names, rules=rules, baselines=baselines,
            public_encoder=public_encoder, policy=policy,
        )  # fmt: skip
    elif isinstance(model, ZePAD):
        return _defence(model, rules, baselines or {}, policy)
    elif isinstance(model, tuple) and len(model) == 2:
        encoder, head = model
        subject = _single(EncoderWithHead(encoder, head), class_names, public_encoder or encoder)
    elif isinstance(model, nn.Module) and not isinstance(model, Encoder):
        if isinstance(model, Branch) and model.config.adaptation == "none":
            public_encoder = public_encoder or model.encoder
        subject = _single(model, class_names, public_encoder)
    else:
        raise TypeError(
            f"model: expected a ZePAD, a source string, a Branch, a pair (encoder, head), a Subject or a module from "
            f"images to logits, got {type(model).__name__}"
        )
    return _with_baselines(subject, baselines or {})


def resize_of(model: Any) -> Resize | None:
    """The resize rule of a model's public encoder; None where it has no encoder of ours."""
    if isinstance(model, Subject):
        model = model.public_encoder
    elif isinstance(model, ZePAD):
        model = model.undefended.encoder
    elif isinstance(model, tuple) and model:
        model = model[0]
    preprocess = getattr(getattr(model, "encoder", model), "preprocess", None)
    return preprocess.geometry if isinstance(preprocess, Resize) else None


class EncoderWithHead(nn.Module):
    """Images (B, 3, H, W) in [0, 1] to logits (B, C), by an encoder and a head."""

    def __init__(self, encoder: Encoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


def is_encoder_source(model: str | Path) -> bool:
    """Whether a string is the source of an encoder ("open_clip:...") and not the name of a defended model."""
    kind, separator, _ = str(model).partition(":")
    return bool(separator) and kind in BACKENDS


def load_model(
    model: str | Path, class_names: Sequence[str] | None, prompts: Sequence[str] | None = None
) -> ZePAD | tuple[Encoder, nn.Module]:
    """Load a defended model, or a CLIP with a zero-shot head, and point zero-shot heads at the class names.

    Args:
        model: a folder, a Hub name, "embedded", or the source of a CLIP.
        class_names: what zero-shot heads answer; None leaves those of a defended model.
        prompts: templates of the data set; None: the defended model's own, or "photo" for a CLIP.

    Raises:
        FileNotFoundError: no such model; ValueError: an encoder without a text tower, or class names that are missing.
    """
    if is_encoder_source(model):
        if class_names is None:
            raise ValueError(f"{model}: expected class names for its zero-shot head, got none")
        encoder, text = load_clip(str(model))
        return encoder, zero_shot_head(text, class_names, "photo" if prompts is None else prompts)
    defence = ZePAD.from_pretrained(model)
    if class_names is not None and all(branch.head == "zero_shot" for branch in defence.config.branches):
        defence.set_classes(class_names, prompts)
    return defence


def _defence(model: ZePAD, rules: Sequence[str], baselines: Mapping[str, nn.Module], policy: Policy | None) -> Subject:
    """A ZePAD: the model as it ships, every other rule, the plain ensemble, each branch, and the undefended encoder."""
    branches = {f"branch:{name}": branch for name, branch in model.branches.items()}
    fused = tuple(range(len(branches)))
    members: dict[str, nn.Module] = {**branches, UNDEFENDED: model.undefended}
    members |= {f"baseline:{name}": module for name, module in baselines.items()}
    gate, shipped = model.config.gate, model.fusion_for(policy)
    rows = [Row(DEFENCE, fused, FusedAnswer(shipped), RowKind.DEFAULT, gate is not None)]
    for rule in rules or rule_names(gate is not None and gate.threshold is not None):
        fusion = build(rule, model.benign, model.config.detector.score, gate=gate)
        rows.append(Row(f"{DEFENCE}:{rule}", fused, FusedAnswer(fusion), RowKind.RULE, gate is not None))
    rows.append(Row("baseline:equal", fused, soft_vote))
    kinds = [RowKind.BRANCH] * len(branches) + [RowKind.UNDEFENDED] + [RowKind.BASELINE] * len(baselines)
    rows += [Row(name, (index,), first_logits, kinds[index]) for index, name in enumerate(members)]
    return Subject(
        members=members,
        rows=tuple(rows),
        class_names=model.class_names,
        public_encoder=model.undefended.encoder,
        fusion=shipped,
        detector=model.config.detector,
        text=(lambda: model.text) if all(branch.head == "zero_shot" for branch in model.config.branches) else None,
        gate=model.gate,
        about={**model.config.to_dict(), **({"policy": policy} if policy else {})},
    )


def _single(model: nn.Module, class_names: Sequence[str] | None, public_encoder: Encoder | None) -> Subject:
    """One network from images to logits."""
    about: dict[str, Any] = {"kind": type(model).__name__}
    encoder = getattr(model, "encoder", None)
    if isinstance(encoder, Encoder):
        about["source"] = encoder.source
    if isinstance(model, Branch):
        about["branch"] = model.config.to_dict()
    return Subject(
        members={MODEL: model.eval()},
        rows=(Row(MODEL, (0,), first_logits, RowKind.DEFAULT),),
        class_names=None if class_names is None else tuple(class_names),
        public_encoder=public_encoder,
        about=about,
    )


def _with_baselines(subject: Subject, baselines: Mapping[str, nn.Module]) -> Subject:
    members = {**subject.members, **{f"baseline:{name}": module for name, module in baselines.items()}}
    first = len(subject.members)
    rows = [Row(name, (first + index,), first_logits) for index, name in enumerate(list(members)[first:])]
    return replace(subject, members=members, rows=(*subject.rows, *rows))
