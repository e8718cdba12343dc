"""Views of a row that attacks differentiate in place of the row itself: with other prompts, or its patch tokens."""

from __future__ import annotations

from torch import nn

from zepad_mm.encoders import Encoder
from zepad_mm.encoders.prompts import templates_of
from zepad_mm.encoders.spatial import SpatialFeatures
from zepad_mm.evaluation.session import Session
from zepad_mm.evaluation.subjects import BranchView, EncoderWithHead, Row, first_logits
from zepad_mm.models.branch import Branch
from zepad_mm.models.heads import ZeroShotHead, zero_shot_head


def can_change_prompts(session: Session, row: Row) -> bool:
    """Whether a row answers by zero-shot heads whose text tower is at hand."""
    subject = session.subject
    heads = [getattr(network, "head", None) for network in session.networks(row.members)]
    known = subject.text is not None and subject.class_names is not None
    return known and all(isinstance(head, ZeroShotHead) for head in heads)


def with_prompts(session: Session, row: Row) -> BranchView:
    """A row whose zero-shot heads are made from all prompt sets of the settings at once.

    Its images fool the meaning of a class rather than one wording of it.
    """
    subject = session.subject
    assert subject.text is not None
    assert subject.class_names is not None
    templates = tuple(dict.fromkeys(text for name in session.settings.prompt_sets for text in templates_of(name)))
    head = zero_shot_head(subject.text(), subject.class_names, templates).to(session.device)
    view = session.view(row)
    view.members = nn.ModuleList([_with_head(network, head) for network in view.members])
    return view


def has_encoder(session: Session, row: Row) -> bool:
    """Whether a row of one network has an encoder of ours."""
    return isinstance(getattr(session.networks(row.members)[0], "encoder", None), Encoder)


def on_patch_tokens(session: Session, row: Row) -> BranchView:
    """The patch tokens (T, B, D) of a row of one network (VEAttack, Mei et al. 2025)."""
    tokens = SpatialFeatures(_encoder(session.networks(row.members)[0]))
    return BranchView([tokens], first_logits)


def _with_head(network: nn.Module, head: nn.Module) -> nn.Module:
    if isinstance(network, Branch):  # which a gate reads by its role
        return Branch(network.config, network.encoder, head)
    return EncoderWithHead(_encoder(network), head)


def _encoder(network: nn.Module) -> Encoder:
    encoder = getattr(network, "encoder", None)
    assert isinstance(encoder, Encoder)
    return encoder
