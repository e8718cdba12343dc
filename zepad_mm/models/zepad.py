"""ZePAD: branches, the rule that fuses them, and the detector; one module that any attack library can attack whole."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from zepad_mm.encoders import Encoder, SharedTrunk, TextEncoder, load_clip
from zepad_mm.encoders.prompts import templates_of
from zepad_mm.encoders.sources import is_local, known_revisions
from zepad_mm.models.branch import Branch, BranchConfig, BranchOutputs, run_branches
from zepad_mm.models.card import PLACEHOLDER
from zepad_mm.models.config import DetectorConfig, Policy, ZePADConfig
from zepad_mm.models.folded import FoldedEncoders
from zepad_mm.models.fusion import GATED_RULE, Decision, Fusion, build
from zepad_mm.models.gate import FeatureGate
from zepad_mm.models.heads import HEADS, zero_shot_head
from zepad_mm.models.serialization import (
    ADAPTERS,
    EMBEDDED_MODEL,
    check_float32,
    find_model_folder,
    read_model,
    write_model,
)
from zepad_mm.utils.hub import RESULTS_FILE, Access, push_folder
from zepad_mm.utils.io import write_text
from zepad_mm.utils.isolation import preserved_process_state
from zepad_mm.utils.names import check_names
from zepad_mm.utils.validation import check_images

log = logging.getLogger(__name__)

__all__ = ["EMBEDDED_MODEL", "DetectorConfig", "ZePAD", "ZePADConfig"]


class ZePAD(nn.Module, ModelHubMixin, library_name="zepad-mm", tags=["adversarial-robustness", "clip"]):
    """A defended classifier.

    ``model(images)`` gives fused logits (B, C), differentiable through every branch, so that third-party attacks see
    the whole defence; ``model.decide(images)`` gives a :class:`~zepad_mm.models.fusion.Decision` without gradients.
    Images are (B, 3, H, W) in [0, 1].

    Args:
        config: branches, classes, fusion rule and detector.
        branches: in the order of ``config.branches``.
        gate: reads the features of all branches; None: the model has none. Its own configuration counts, not that of
            ``config``.
    """

    gate: FeatureGate | None

    def __init__(self, config: ZePADConfig, branches: Sequence[Branch], gate: FeatureGate | None = None) -> None:
        super().__init__()
        names = [branch.name for branch in branches]
        if names != [branch.name for branch in config.branches]:
            raise ValueError(f"branches: expected {[b.name for b in config.branches]} as in the config, got {names}")
        # now, while the client's cache still holds what the encoders were loaded from
        self.config = replace(config, revisions={**known_revisions(config.sources), **config.revisions})
        self.branches = nn.ModuleDict({branch.name: branch for branch in branches})
        self.set_gate(gate)
        self.config = replace(self.config, fingerprint=config.fingerprint)
        self._trunks: list[SharedTrunk] = []
        self._folded = FoldedEncoders()
        self._lazy: dict[str, Any] = {}  # what is loaded on demand and is no part of the defence
        self._access = Access()
        self.eval()

    # ---- inference -------------------------------------------------------------------------------------------

    @property
    def benign(self) -> tuple[bool, ...]:
        """For each branch whether it is benign."""
        return self.config.benign

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.config.class_names

    def branch(self, name: str) -> Branch:
        """A branch by name. Raises ValueError that lists the names."""
        if name not in self.branches:
            raise ValueError(f"no branch {name!r}; this model has {', '.join(self.branches)}")
        branch = self.branches[name]
        assert isinstance(branch, Branch)
        return branch

    def branch_outputs(
        self, images: Tensor | Mapping[str, Tensor], heads: Mapping[str, nn.Module] | None = None
    ) -> BranchOutputs:
        """Features and logits of each branch, differentiable.

        Args:
            images: (B, 3, H, W) in [0, 1]; or the same images once for each branch, resized for its encoder.
            heads: branch name to the head to use in place of the branch's own.

        Raises:
            ValueError: images of other shapes or ranges.
        """
        resized = images if isinstance(images, Mapping) else dict.fromkeys(self.branches, images)
        for one in {id(tensor): tensor for tensor in resized.values()}.values():
            check_images(one)
        branches = {name: self.branch(name) for name in self.branches}
        others = None if heads is None else [heads[name] for name in branches]
        with self.shared_blocks_run_once():
            encoders = [self._encoder(name, resized[name]) for name in branches]
            own = [resized[name] for name in branches]
            return run_branches(list(branches.values()), own, self.gate, others, encoders)

    def _encoder(self, name: str, images: Tensor) -> Encoder:
        """The encoder of a branch; a faster copy where an attack asks for gradients and nothing is shared."""
        encoder = self.branch(name).encoder
        return encoder if self._trunks else self._folded.get(name, encoder, images)

    def branch_logits(self, images: Tensor) -> Tensor:
        """The logits (N, B, C) of :meth:`branch_outputs`; with a gate (N + 1, B, C), see :func:`gate.with_gate`."""
        return self.branch_outputs(images).stacked

    def fuse(self, outputs: BranchOutputs | Tensor, policy: Policy | None = None) -> Decision:
        """:meth:`branch_outputs` or :meth:`branch_logits` to a :class:`Decision` by the model's rule.

        Args:
            outputs: of the branches.
            policy: as for :meth:`set_policy`, for this call alone; None: the model's own.
        """
        return self.fusion_for(policy)(outputs.stacked if isinstance(outputs, BranchOutputs) else outputs)

    def fusion_for(self, policy: Policy | None) -> Fusion:
        """The fusion by a policy, as for :meth:`set_policy`; None: the model's own. The model is not changed."""
        return self.fusion if policy is None else self._fusion_of(self._with_policy(policy))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to fused logits (B, C)."""
        return self.fuse(self.branch_logits(images)).logits

    @torch.no_grad()
    def decide(self, images: Tensor) -> Decision:
        """Fused logits with weights, confidences and the suspicion score; no gradients."""
        return self.fuse(self.branch_logits(images))

    def is_adversarial(self, decision: Decision) -> Tensor:
        """(B,) bool: whose score exceeds the threshold; all False where none was set."""
        threshold = self.config.detector.threshold
        if threshold is None:
            return torch.zeros_like(decision.score, dtype=torch.bool)
        return decision.score > threshold

    def share_trunk(self) -> list[SharedTrunk]:
        """Hold weights that several branches have in common once, in place; answers, files and attacks stay the same.

        Branches of one source that are untouched or adapted by LoRA share its weights. Blocks below the first adapter
        (``LoraSettings(first_block=...)``) run once for all of them. Fully tuned branches stay as they are.

        Returns:
            One trunk for each source with at least two such branches; empty where there is nothing to share.
        """
        groups: dict[str, list[Encoder]] = {}
        for branch in map(self.branch, self.branches):
            if branch.config.adaptation != "full":
                groups.setdefault(branch.config.source, []).append(branch.encoder)
        self._trunks = [SharedTrunk(encoders) for encoders in groups.values() if len(encoders) > 1]
        for trunk in self._trunks:
            log.info("%d branches share %d of %d blocks", len(trunk.encoders), trunk.shared_blocks, trunk.blocks)
        return list(self._trunks)

    @contextmanager
    def shared_blocks_run_once(self) -> Iterator[None]:
        """Context in which all encoders are called on the same images, and run the blocks they share once."""
        with ExitStack() as stack:
            for trunk in self._trunks:
                stack.enter_context(trunk.once())
            yield

    # ---- what it defends -------------------------------------------------------------------------------------

    @property
    @preserved_process_state()
    def undefended(self) -> Branch:
        """The public encoder with its own head, as it was before the defence: what a T1 attacker knows.

        Raises ValueError for a model without zero-shot heads until :meth:`set_undefended`.
        """
        if "undefended" not in self._lazy:
            if any(branch.head != "zero_shot" for branch in self.config.branches):
                raise ValueError(
                    "the undefended encoder has no head for this task; give one: "
                    "model.set_undefended(Branch(BranchConfig(name='undefended', ...), encoder, head))"
                )
            encoder, text = self._clip()
            for branch in self.branches.values():  # an unchanged branch is the public encoder: hold it once
                if branch.config.adaptation == "none" and branch.config.source == self.config.public_source:  # type: ignore[union-attr]
                    encoder = branch.encoder  # type: ignore[assignment]
            config = BranchConfig(name="undefended", role="benign", source=self.config.public_source)
            head = zero_shot_head(text, self.class_names, self.config.prompts)
            self._lazy["undefended"] = Branch(config, encoder, head).eval().to(self.device)
        return self._lazy["undefended"]

    @preserved_process_state()
    def set_undefended(self, branch: Branch) -> ZePAD:
        """Set the undefended model, in place: for models whose heads were trained."""
        self._lazy["undefended"] = branch.eval().to(self.device)
        return self

    @property
    def text(self) -> TextEncoder:
        """The text tower of the public CLIP. Raises ValueError when the public encoder is no CLIP."""
        return self._clip()[1]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def set_classes(self, class_names: Sequence[str], prompts: str | Sequence[str] | None = None) -> ZePAD:
        """Point the zero-shot heads at other classes, in place: another task without any training.

        Raises:
            ValueError: empty or double names, a bad template, or a branch whose head was trained.
        """
        names = tuple(check_names(class_names, fold_case=False))
        templates = templates_of(self.config.prompts if prompts is None else prompts)
        trained = [branch.name for branch in self.config.branches if branch.head != "zero_shot"]
        if trained:
            raise ValueError(f"the heads of {', '.join(trained)} were trained for {len(self.class_names)} classes")
        if names == self.class_names and templates == self.config.prompts:
            return self
        self.config.warn_untuned_classes(names)
        with preserved_process_state():
            embeddings = self.text.class_embeddings(names, templates)
            for branch in self.branches.values():
                scale = branch.head.logit_scale.item()  # type: ignore[union-attr, operator]
                branch.head = HEADS.get("zero_shot").from_embeddings(embeddings, scale).to(self.device)  # type: ignore[attr-defined]
        self.config = replace(self.config, class_names=names, prompts=templates, fingerprint=())
        self._lazy.pop("undefended", None)
        return self

    def set_fusion(self, rule: str, **params: Any) -> ZePAD:
        """Change the fusion rule, in place. Raises ValueError for an unknown rule or constant."""
        return self._configure(replace(self.config, fusion=rule, fusion_params=params))

    def set_detector(self, detector: DetectorConfig) -> ZePAD:
        """Replace the detector's settings, in place. Raises ValueError for a score that the model does not have."""
        return self._configure(replace(self.config, detector=detector))

    def set_gate(self, gate: FeatureGate | None) -> ZePAD:
        """Set or remove the gate, in place; the rule "gated" and the score "feature_gate" read it.

        Raises:
            ValueError: a gate for other features, or none where the rule or the detector needs one.
        """
        if gate is not None:
            gate.check_fits([self.branch(name).encoder.feature_dim for name in self.branches], self.benign)
            gate = gate.eval()
        self._configure(replace(self.config, gate=None if gate is None else gate.config, fingerprint=()))
        self.gate = None if gate is None else gate.to(self.device)
        return self

    def set_policy(self, policy: Policy) -> ZePAD:
        """Choose one of the two caps of the benign weight, in place and without training.

        Args:
            policy: "zero_sacrifice" keeps the clean accuracy and holds against attackers who do not know the defence;
                "white_box" has the smaller cap, with which the fusion is as robust as its best robust branch.

        Raises:
            ValueError: another name, or a model without the rule "gated" or without a cap for this policy.
        """
        return self._configure(self._with_policy(policy))

    def _with_policy(self, policy: Policy) -> ZePADConfig:
        changed = replace(self.config, policy=policy)  # checks the name
        if changed.fusion != GATED_RULE or policy not in changed.policy_caps:
            known = ", ".join(changed.policy_caps) or "none"
            raise ValueError(
                f"policy {policy!r}: expected a model with the rule {GATED_RULE!r} and a cap for it; this one has the "
                f"rule {changed.fusion!r} and the policies: {known}"
            )
        return changed

    @staticmethod
    def _fusion_of(config: ZePADConfig) -> Fusion:
        return build(config.fusion, config.benign, config.detector.score, config.rule_params, config.gate)

    def _configure(self, config: ZePADConfig) -> ZePAD:
        """Take over a configuration with another rule, detector, gate or policy."""
        self.fusion = self._fusion_of(config)
        self.config = config
        return self

    @preserved_process_state()
    def _clip(self) -> tuple[Encoder, TextEncoder]:
        if "clip" not in self._lazy:
            source = self.config.public_source
            encoder, text = load_clip(source, revision=self.config.revisions.get(source), access=self._access)
            self._lazy["clip"] = (encoder.to(self.device), text.to(self.device))
        return self._lazy["clip"]

    # ---- on disk and on the Hub ------------------------------------------------------------------------------

    @classmethod
    @preserved_process_state()
    def from_pretrained(  # type: ignore[override]  # our own errors from the first file on, and no other arguments
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> ZePAD:
        """Load a defended model, frozen, and, at the revisions it was made on, the base encoders below it.

        Args:
            pretrained_model_name_or_path: ``"embedded"``, a folder, or a name on the
                Hub, ``owner/name``.
            revision: branch, tag or commit on the Hub; None is the main branch.
            token: for what is private; None takes the one of ``hf auth login``.
            cache_dir: where downloads are kept; None is the client's own.
            local_files_only: read from the cache alone.
            force_download: fetch again what the cache holds.

        Raises:
            FileNotFoundError: no such folder, repository, revision or file, or not in the cache while offline;
            PermissionError: private, and no token that opens it; ValueError: a damaged or mismatched file;
            ConnectionError: the Hub is out of order.
        """
        access = Access(
            token=token, cache_dir=cache_dir, local_files_only=local_files_only, force_download=force_download
        )
        model = cls(*read_model(find_model_folder(pretrained_model_name_or_path, revision, access), access))
        model.requires_grad_(False)  # attacks by loss.backward() fill no .grad, and encoders are folded
        # for bases that are read when they are asked for; without the token, which has no place in a pickled model
        model._access = replace(access, token=None, force_download=False)
        return model

    def save_pretrained(self, save_directory: str | Path, *, card: str | None = None) -> None:  # type: ignore[override]
        """Write what was trained into a folder, with a card.

        Args:
            save_directory: made if missing; a card written by a user is kept.
            card: the text of ``README.md``, by :func:`~zepad_mm.evaluation.model_card.model_card` for instance;
                None: a short one.

        Raises:
            OSError: no room, or no right to write; the message names the file, and a model that was there is intact.
        """
        check_float32(self, "saved")
        # not by the mixin, which deletes the old config.json before it writes anything
        branches = {name: self.branch(name) for name in self.branches}
        write_model(save_directory, self.config, branches, self.gate, card)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        commit_message: str = "Upload a defended encoder",
        card: str | None = None,
        eval_results: Mapping[str, str] | None = None,
    ) -> str:
        """Publish what :meth:`save_pretrained` writes; see :func:`zepad_mm.utils.hub.push_folder`.

        Args:
            card: as for :meth:`save_pretrained`.
            eval_results: names and texts of files by :func:`~zepad_mm.evaluation.model_card.eval_result_files`.

        Returns:
            The address of the commit.

        Raises:
            ValueError: a base encoder of this machine alone: others could not load the model.
        """
        alone = [source for source in self.config.sources if is_local(source)]
        if alone:
            raise ValueError(
                f"{', '.join(alone)}: only what was trained is published, and this base encoder is on this machine "
                "alone; push it first, and build the model on KIND:hf-hub:owner/name"
            )
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, card=card)
            written = Path(folder) / "README.md"
            write_text(written, written.read_text(encoding="utf-8").replace(PLACEHOLDER, repo_id))
            for name, text in (eval_results or {}).items():
                write_text(Path(folder) / name, text)
            old = (f"{ADAPTERS}/*", RESULTS_FILE)  # of branches and weights that the model no longer has
            access: dict[str, Any] = {"private": private, "token": token, "branch": branch}
            return push_folder(folder, repo_id, message=commit_message, replaces=old, **access)
