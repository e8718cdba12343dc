"""Robust zero-shot classification: any image, any labels, with the interface of transformers' pipeline."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zepad_mm.classifier.images import MAX_PIXELS, as_iterable, pixels_of
from zepad_mm.defend import DefendSettings, defend
from zepad_mm.encoders.prompts import templates_of
from zepad_mm.models.branch import BranchOutputs, encode
from zepad_mm.models.config import Policy
from zepad_mm.models.fusion import Decision
from zepad_mm.models.heads import ZeroShotHead
from zepad_mm.models.zepad import ZePAD
from zepad_mm.utils.images import Resize
from zepad_mm.utils.isolation import preserved_process_state
from zepad_mm.utils.names import check_names
from zepad_mm.utils.validation import check_count, check_device


@dataclass(frozen=True)
class Task:
    """Zero-shot heads for one set of labels. The model is not changed: many tasks may share it at the same time.

    Attributes:
        model: the defended model.
        names: the labels in the order of the logits.
        heads: branch name to its zero-shot head for these labels.
        undefended_head: the zero-shot head of the undefended encoder.
        policy: as for :meth:`ZePAD.set_policy`; None: the model's own.
        logit_bias: of a SigLIP, whose scores are a sigmoid for each label; None: scores are a softmax over the labels.
    """

    model: ZePAD
    names: tuple[str, ...]
    heads: Mapping[str, ZeroShotHead]
    undefended_head: ZeroShotHead
    policy: Policy | None = None
    logit_bias: float | None = None

    def branch_logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to the logits of each branch (N, B, C); as :meth:`ZePAD.branch_logits`."""
        return self.model.branch_outputs(images, self.heads).stacked

    def fuse(self, outputs: BranchOutputs | Tensor) -> Decision:
        """As :meth:`ZePAD.fuse`, by the policy of the task."""
        return self.model.fuse(outputs, self.policy)

    def decide(self, images: Tensor) -> Decision:
        """(B, 3, H, W) in [0, 1] to a Decision with fused logits (B, C); differentiable."""
        return self.fuse(self.branch_logits(images))

    def defended(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to fused logits (B, C), the target of a white-box attack."""
        return self.decide(images).logits

    def undefended(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to the logits of the undefended encoder (B, C)."""
        return self.undefended_head(encode(self.model.undefended.encoder, images))

    def scores(self, logits: Tensor, level: Tensor | None = None) -> Tensor:
        """Logits (B, C) to the score of each label in [0, 1], in the same order (B, C).

        Args:
            logits: of one encoder, or fused.
            level: (B,), for a SigLIP the log-sum-exp that the logits should have; None: theirs. A rule that mixes
                probabilities keeps the differences of logits and loses their level, on which a sigmoid depends.
        """
        if self.logit_bias is None:
            return logits.softmax(-1)
        if level is not None:
            logits = logits.log_softmax(-1) + level.unsqueeze(-1)
        return (logits + self.logit_bias).sigmoid()

    def fused_scores(self, decision: Decision, branch_logits: Tensor) -> Tensor:
        """Scores (B, C) of a decision on branch logits (N, B, C).

        For a SigLIP at the branches' own level, each by its weight: where one branch answers alone, or all agree, they
        are what its sigmoid gives.
        """
        return self.scores(decision.logits, (decision.weights * branch_logits.logsumexp(-1)).sum(0))


Labels = list[dict[str, Any]]
ON_ADVERSARIAL = ("ignore", "flag", "abstain")


class RobustZeroShotClassifier:
    """Scores for images and candidate labels. Thread-safe.

    Args:
        model: a defended CLIP whose heads are all zero-shot. Its heads and classes are not changed.
        batch_size: images per forward pass.
        max_pixels: width times height beyond which a file is refused before it is decoded.
        policy: "zero_sacrifice" or "white_box", as for :meth:`ZePAD.set_policy`; None: the model's own.

    Raises:
        ValueError: a branch has a trained head, which is tied to its labels, or the model has no such policy.
    """

    def __init__(
        self, model: ZePAD, batch_size: int = 32, max_pixels: int = MAX_PIXELS, policy: Policy | None = None
    ) -> None:
        trained = [branch.name for branch in model.config.branches if branch.head != "zero_shot"]
        if trained:
            raise ValueError(f"zero-shot classification needs zero-shot heads; {', '.join(trained)} have trained ones")
        self.model = model.eval() if policy is None else model.eval().set_policy(policy)
        self.batch_size = check_count(batch_size, "batch_size")
        self.max_pixels = check_count(max_pixels, "max_pixels")
        self._text_lock = threading.Lock()  # tokenizers, embedding cache and lazy loading are not thread-safe

    def __getstate__(self) -> dict[str, Any]:
        # locks cannot be copied, so that a copy, in another process perhaps, gets one of its own
        return {name: value for name, value in vars(self).items() if name != "_text_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _text_lock=threading.Lock())

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        batch_size: int = 32,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        policy: Policy | None = None,
        **hub: Any,
    ) -> RobustZeroShotClassifier:
        """Load from ``"embedded"``, a folder or the Hub.

        Args:
            name: ``"embedded"``, a folder, or a name on the Hub.
            batch_size: images per forward pass.
            device, dtype: as for :meth:`to`.
            policy: "zero_sacrifice" or "white_box"; None: the model's own.
            hub: as for :meth:`ZePAD.from_pretrained`.
        """
        check_device(device)  # before a model is loaded
        return cls(ZePAD.from_pretrained(name, **hub), batch_size, policy=policy).to(device, dtype)

    @classmethod
    def defend(
        cls,
        source: str,
        *,
        robust: Sequence[str] = (),
        data: str | None = None,
        out: str | Path | None = None,
        settings: DefendSettings | None = None,
        batch_size: int = 32,
    ) -> RobustZeroShotClassifier:
        """Build a defended classifier from a public CLIP, with ready robust weights or by tuning.

        Args:
            source, robust, data, out, settings: as for :func:`zepad_mm.defend.defend`.
            batch_size: images per forward pass.
        """
        return cls(defend(source, robust=robust, data=data, out=out, settings=settings), batch_size)

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> RobustZeroShotClassifier:
        """Move the model, in place.

        Args:
            device: None leaves the device.
            dtype: precision of the branches' encoders: torch.float32, float16 or bfloat16. Images are
                always resized, texts encoded, and heads and fusion computed in float32. None leaves the precision.

        Raises:
            ValueError: the dtype is not floating point.
        """
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype: expected torch.float32, torch.float16 or torch.bfloat16, got {dtype!r}")
        check_device(device)
        for branch in self.model.branches.values():
            branch.encoder.to(dtype=dtype)  # type: ignore[union-attr, operator]
        self.model.to(device)
        return self

    def task(
        self,
        candidate_labels: Sequence[str],
        hypothesis_template: str | Sequence[str] = "photo",
        policy: Policy | None = None,
    ) -> Task:
        """Logits of the defended and the undefended model for a set of labels, e.g. for custom attacks.

        Text embeddings are cached for the last 64 label sets. ``policy`` applies to this task alone.

        Raises:
            ValueError: no labels, empty or duplicate ones, or a template without ``{}``.
        """
        names = check_names(candidate_labels, "candidate_labels")
        self.model.config.warn_untuned_classes(names)
        templates = templates_of(hypothesis_template)
        with self._text_lock, preserved_process_state():  # tasks made in inference mode can be attacked later
            text, device = self.model.text, self.model.device
            embeddings = text.to(device).class_embeddings(names, templates).to(device)
            self.model.undefended.encoder.to(device)  # loaded lazily, perhaps before the model was moved
            scales = {name: self.model.branch(name).head.logit_scale for name in self.model.branches}
            heads = {name: ZeroShotHead.from_embeddings(embeddings, float(scale)) for name, scale in scales.items()}  # type: ignore[arg-type]
            undefended_head = ZeroShotHead.from_embeddings(embeddings, text.logit_scale)
            bias = text.logit_bias if text.sigmoid else None
        return Task(self.model, tuple(names), heads, undefended_head, policy, bias)

    def __call__(
        self,
        images: Any,
        candidate_labels: Sequence[str],
        *,
        hypothesis_template: str | Sequence[str] = "photo",
        top_k: int | None = None,
        return_evidence: bool = False,
        on_adversarial: str = "ignore",
        return_errors: bool = False,
        policy: Policy | None = None,
    ) -> Any:
        """Classify one image, many, or a stream of them.

        Args:
            images: a PIL image, path, URL, the bytes of a file, an open file, a uint8 or [0, 1] array or tensor; or
                many: a list or tuple of these, a (B, 3, H, W) tensor, a (B, H, W, 3) array; or a stream: any other
                iterable, such as a generator or a column of ``datasets``.
            candidate_labels: at least one.
            hypothesis_template: a template with one ``{}``, several, or a named prompt set.
            top_k: number of best labels to return; None: all.
            return_evidence: return ``{"labels", "evidence"}`` for each image, with the branch confidences, the fusion
                weights, the suspicion score with its name (``detector``) and the ``threshold`` above which it flags
                (None: the model has none), whether it is flagged (None as well), the gate's logit with the value at
                which it halves the benign weight (None: the model has no gate), and the labels of the undefended
                encoder.
            on_adversarial: treatment of images whose suspicion score exceeds the model's threshold. "ignore": nothing;
                "flag": every label gets a third key, "flagged"; "abstain": no labels, ``[]``.
            return_errors: an image that cannot be read has its ValueError in place of an answer; False: it is raised.
            policy: for this call alone, "zero_sacrifice" or "white_box"; None: the model's own.

        Returns:
            ``[{"score", "label"}, ...]``, best first, for one image, as transformers'
            zero-shot-image-classification pipeline; a list of those for many; an iterator over those for a stream,
            which is read one batch at a time. Scores sum to 1, except those of a SigLIP: they are a sigmoid for each
            label, as in the pipeline. The other images of a batch change a result by float rounding only.

        Raises:
            ValueError: no labels, a template without ``{}``, an unreadable image, pixels out of range, or a model
                without the threshold that ``on_adversarial`` needs.
        """
        if top_k is not None:
            top_k = check_count(top_k, "top_k")
        if on_adversarial not in ON_ADVERSARIAL:
            raise ValueError(f"on_adversarial: expected one of {', '.join(ON_ADVERSARIAL)}, got {on_adversarial!r}")
        if on_adversarial != "ignore" and self.model.config.detector.threshold is None:
            raise ValueError(
                f"on_adversarial={on_adversarial!r} needs a threshold, and this model has none; choose one on "
                "clean images: zepad_mm.selection.select_detector"
            )
        task = self.task(candidate_labels, hypothesis_template, policy)
        single, stream = as_iterable(images)
        wanted = _Wanted(top_k, return_evidence, on_adversarial, return_errors)
        answers = self._answers(task, stream, single, wanted)
        if single:
            return next(answers)
        return list(answers) if isinstance(images, list | tuple | Tensor) or hasattr(images, "dtype") else answers

    def _answers(self, task: Task, stream: Iterable[Any], single: bool, wanted: _Wanted) -> Iterator[Any]:
        encoders = {name: self.model.branch(name).encoder for name in self.model.branches}
        if wanted.evidence:
            encoders[""] = self.model.undefended.encoder  # no branch has an empty name
        geometries = {name: encoder.preprocess.geometry for name, encoder in encoders.items()}
        for batch in self._batches(stream, set(geometries.values()), single, wanted.errors):
            resized = {name: batch.images[geometry] for name, geometry in geometries.items() if batch.images}
            answers = iter(self._classify(task, resized, wanted) if resized else ())
            for index in range(batch.size):
                yield batch.errors[index] if index in batch.errors else next(answers)

    @torch.no_grad()
    def _classify(self, task: Task, resized: Mapping[str, Tensor], wanted: _Wanted) -> list[Any]:
        """The answers to a batch that is resized for each branch, and under the name "" for the undefended encoder."""
        branches = {name: images for name, images in resized.items() if name}
        outputs = self.model.branch_outputs(branches, task.heads)
        decision = task.fuse(outputs)
        scores = task.fused_scores(decision, outputs.logits).cpu()
        decision = _on_cpu(decision)
        flags = self.model.is_adversarial(decision).tolist()
        answers: list[Any] = []
        for row, flagged in zip(scores, flags, strict=True):
            answer = _ranked(row, task.names, wanted.top_k)
            if wanted.on_adversarial == "flag":
                answer = [{**entry, "flagged": flagged} for entry in answer]
            answers.append([] if wanted.on_adversarial == "abstain" and flagged else answer)
        if not wanted.evidence:
            return answers
        undefended = self._undefended_scores(task, outputs, resized[""])
        return [
            {
                "labels": answer,
                "evidence": {
                    **self._evidence(decision, index, flags[index]),
                    "undefended": _ranked(undefended[index], task.names, wanted.top_k),
                },
            }
            for index, answer in enumerate(answers)
        ]

    def _undefended_scores(self, task: Task, outputs: BranchOutputs, images: Tensor) -> Tensor:
        encoder = self.model.undefended.encoder
        for name, features in zip(self.model.branches, outputs.features, strict=True):
            if self.model.branch(name).encoder is encoder:  # an untuned benign branch: its features are there
                return task.scores(task.undefended_head(features)).cpu()
        return task.scores(task.undefended(images)).cpu()

    def _evidence(self, decision: Decision, index: int, flagged: bool) -> dict[str, Any]:
        names = list(self.model.branches)
        return {
            "confidences": dict(zip(names, decision.confidences[:, index].tolist(), strict=True)),
            "weights": dict(zip(names, decision.weights[:, index].tolist(), strict=True)),
            "score": float(decision.score[index]),
            "detector": self.model.config.detector.score,
            "threshold": self.model.config.detector.threshold,
            "flagged": None if self.model.config.detector.threshold is None else flagged,
            "gate": self._gate_evidence(decision, index),
        }

    def _gate_evidence(self, decision: Decision, index: int) -> dict[str, float | None] | None:
        """The gate's logit and the value at which it halves the weight of the benign branches."""
        if decision.gate is None or self.model.config.gate is None:
            return None
        return {"logit": float(decision.gate[index]), "threshold": self.model.config.gate.threshold}

    def _batches(
        self, stream: Iterable[Any], geometries: set[Resize], single: bool, keep_errors: bool
    ) -> Iterator[_Batch]:
        """Batches by geometry; each image is resized by itself, so that images of all sizes share a batch."""
        numbered = enumerate(stream)
        while chunk := list(islice(numbered, self.batch_size)):
            rows: list[dict[Resize, Tensor]] = []
            errors: dict[int, ValueError] = {}
            for index, (number, image) in enumerate(chunk):
                try:
                    pixels = pixels_of(image, self.max_pixels)
                    rows.append({geometry: geometry.resize(pixels[None])[0] for geometry in geometries})
                except ValueError as error:
                    if single or keep_errors:
                        errors[index] = error
                    else:
                        raise ValueError(f"image {number}: {error}") from error
            if single and errors and not keep_errors:
                raise errors[0]
            yield _Batch(len(chunk), self._stacked(rows), errors)

    def _stacked(self, rows: list[dict[Resize, Tensor]]) -> dict[Resize, Tensor]:
        """One tensor for each geometry, on the model's device; nothing without rows."""
        return {
            geometry: torch.stack([row[geometry].to(first.device) for row in rows]).to(self.model.device)
            for geometry, first in (rows[0] if rows else {}).items()
        }


@dataclass(frozen=True)
class _Wanted:
    """What a call asks for; see :meth:`RobustZeroShotClassifier.__call__`."""

    top_k: int | None
    evidence: bool
    on_adversarial: str
    errors: bool


@dataclass(frozen=True)
class _Batch:
    """``size`` images: resized by each geometry, without those that could not be read; and the errors of the latter."""

    size: int
    images: dict[Resize, Tensor]
    errors: dict[int, ValueError]


def _ranked(scores: Tensor, names: Sequence[str], top_k: int | None) -> Labels:
    order = scores.argsort(descending=True, stable=True)[:top_k].tolist()
    return [{"score": float(scores[i]), "label": names[i]} for i in order]


def _on_cpu(decision: Decision) -> Decision:
    parts = {name: part for name, part in vars(decision).items() if part is not None}
    return replace(decision, **{name: part.cpu() for name, part in parts.items()})
