"""Records per sample: what every model answered on every image under every attack, and the rows that follow from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zepad_mm.evaluation.metrics import flipped_when_right, fooling_rate, share
from zepad_mm.evaluation.session import Session
from zepad_mm.evaluation.threats import CLEAN, T2, T3, THREATS, WORST, RowKind
from zepad_mm.utils.atomic import complete_folder, replacing
from zepad_mm.utils.io import damage_of

FILE = "records.parquet"


@dataclass(frozen=True)
class Attempt:
    """One attack in the records; see :class:`zepad_mm.evaluation.session.Example`."""

    threat: str
    attack: str
    epsilon: float
    attacked: int
    seconds: float
    control: bool
    norm: str = "linf"
    algorithm: str = ""
    target: str = ""
    n: int | None = None  # images that it was tried on, the first of the test images; None: all

    @property
    def key(self) -> str:
        return f"{self.threat}/{self.attack}"


def pixel_hashes(images: Tensor) -> list[str]:
    """A hash of the pixels of each image of (n, 3, H, W)."""
    return [hashlib.blake2b(image.numpy().tobytes(), digest_size=8).hexdigest() for image in images.cpu()]


@dataclass(frozen=True)
class Records:
    """Predictions per sample.

    Attributes:
        dataset: name of the data set.
        images: (n,) hashes of the pixels, which identify the images whatever their order.
        labels: (n,) true classes.
        attempts: the attacks; the clean images come first.
        predictions: (model, attempt key) -> (n,) classes.
        flagged: attempt key -> (n,) bool, what the detector of the model as it ships flags; empty without a detector.
        kinds: model -> kind of its row, of ``RowKind``.
        skipped: models whose T2 accuracy is an upper bound, since they were not attacked themselves.
        full_strength: whether T2's attacks were strong enough for what is called T2.
        seen_attacks: kinds of attacks in the training of the model's gate; None for a model without one.
        verdicts: model -> what the diagnostics say of its T2 accuracy; empty before they ran.
    """

    dataset: str
    images: Sequence[str]
    labels: Tensor
    attempts: Sequence[Attempt]
    predictions: dict[tuple[str, str], Tensor]
    flagged: dict[str, Tensor]
    kinds: Mapping[str, str]
    skipped: Sequence[str] = ()
    full_strength: bool = True
    seen_attacks: Sequence[str] | None = None
    verdicts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, session: Session) -> Records:
        """Return the records of a finished session."""
        predictions, flagged, attempts = {}, {}, []
        for example in session.examples:
            attempts.append(
                Attempt(
                    example.threat,
                    example.attack,
                    example.epsilon,
                    int(example.attacked.sum()),
                    round(example.seconds, 3),
                    example.control,
                    example.norm,
                    example.algorithm,
                    example.target,
                    session.count(THREATS[example.threat]),
                )
            )
            for row in session.rows:
                predictions[row.name, example.key] = row.answer(example.logits).argmax(-1)
            if session.subject.fusion is not None:
                decision = session.fusion(session.branch_logits(example.logits))
                flagged[example.key] = decision.score > session.threshold
        return cls(
            session.data.test.name,
            pixel_hashes(session.images),
            session.labels,
            attempts,
            predictions,
            flagged,
            {row.name: str(row.kind) for row in session.rows},
            tuple(session.skipped_rows),
            session.settings.full_strength(session.subject.fusion is not None),
            None if session.gate is None else tuple(session.gate.config.seen_attacks),
        )

    @property
    def models(self) -> list[str]:
        """Names of the rows, in the order of the table."""
        return list(dict.fromkeys(model for model, _ in self.predictions))

    def right(self, model: str, attempt: Attempt) -> Tensor:
        """(n,) bool, of the images that were attacked: right under this attack; for T3, right or flagged."""
        return self._right(model, attempt, attempt.threat)[: attempt.n]

    def worst(self, model: str, threat: str, epsilon: float | None = None) -> Tensor:
        """(n,) bool, of the images that the threat model takes: right on the clean image and under every attack.

        With ``epsilon`` under those of at most this budget.
        """
        counted = self.counted(threat, epsilon)
        images = min((attempt.n for attempt in counted if attempt.n), default=len(self.labels))
        right = [self._right(model, attempt, threat) for attempt in (self.attempts[0], *counted)]
        return torch.stack(right).all(0)[:images]

    def counted(self, threat: str, epsilon: float | None = None) -> list[Attempt]:
        """The attacks that count for the worst case of a threat model, at this budget or a smaller one."""
        return [
            attempt
            for attempt in self.attempts
            if attempt.threat in _counts(threat)
            and not attempt.control
            and (epsilon is None or attempt.epsilon <= epsilon * (1 + 1e-9))
        ]

    def _right(self, model: str, attempt: Attempt, threat: str) -> Tensor:
        right = self.predictions[model, attempt.key] == self.labels
        return right | self.flagged[attempt.key] if THREATS[threat].flagged_is_right else right

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of report.json."""
        rows = []
        threats = list(dict.fromkeys(attempt.threat for attempt in self.attempts))
        for model in self.models:
            for threat in threats:
                if THREATS[threat].default_only and self.kinds[model] != RowKind.DEFAULT:
                    continue
                attempts = [attempt for attempt in self.attempts if attempt.threat == threat]
                rows += [self._row(model, attempt) for attempt in attempts]
                if THREATS[threat].flagged_is_right:
                    rows.append(self._clean_with_rejection(model))
                if threat != CLEAN.key:
                    for epsilon in sorted({attempt.epsilon for attempt in attempts}, reverse=True):
                        rows.append(self._worst_row(model, threat, [a for a in attempts if a.epsilon == epsilon]))
        return rows

    def _row(self, model: str, attempt: Attempt) -> dict[str, Any]:
        clean, now = self.predictions[model, self.attempts[0].key], self.predictions[model, attempt.key]
        return {
            **self._accuracy(model, attempt.attack, attempt, self.right(model, attempt)),
            "seconds": attempt.seconds,
            "asr": fooling_rate(clean[: attempt.n], now[: attempt.n]),
            "asr_correct": flipped_when_right(clean[: attempt.n], now[: attempt.n], self.labels[: attempt.n]),
            "attacked": attempt.attacked,
            "control": attempt.control,
            "algorithm": attempt.algorithm,
            "target": attempt.target,
            **self._seen(attempt),
        }

    def _seen(self, attempt: Attempt) -> dict[str, Any]:
        """Whether the kind of an attack was in the training of the model's gate, where it has one."""
        if self.seen_attacks is None or attempt.control or attempt.threat == CLEAN.key:
            return {}
        return {"seen": attempt.algorithm in self.seen_attacks}

    def _worst_row(self, model: str, threat: str, attempts: Sequence[Attempt]) -> dict[str, Any]:
        clean = self.predictions[model, self.attempts[0].key]
        changed, wrong = torch.zeros(2, len(self.labels), dtype=torch.bool)
        counted, held = self.counted(threat, attempts[0].epsilon), self.worst(model, threat, attempts[0].epsilon)
        for attempt in counted:
            changed |= self.predictions[model, attempt.key] != clean
            wrong |= self.predictions[model, attempt.key] != self.labels
        changed, wrong, right = changed[: len(held)], wrong[: len(held)], (clean == self.labels)[: len(held)]
        strength = {"strength": "full" if self.full_strength else "reduced"} if threat == T2.key else {}
        verdict = {"verdict": self.verdicts[model]} if threat == T2.key and model in self.verdicts else {}
        return {
            **self._accuracy(model, WORST, attempts[0], held),
            "seconds": round(sum(attempt.seconds for attempt in attempts), 3),
            "asr": share(changed).value,
            "asr_correct": share(wrong[right]).value if bool(right.any()) else None,
            "attacked": len(held),
            "control": False,
            "upper_bound": threat == T2.key and model in self.skipped,
            **strength,
            **verdict,
        }

    def _clean_with_rejection(self, model: str) -> dict[str, Any]:
        """The cost of the detector without an attack: right and not flagged."""
        key = self.attempts[0].key
        accepted = (self.predictions[model, key] == self.labels) & ~self.flagged[key]
        extra = {"seconds": 0.0, "asr": None, "asr_correct": None, "attacked": 0, "control": True}
        unattacked = replace(self.attempts[0], threat=T3.key)
        images = min((attempt.n for attempt in self.counted(T3.key) if attempt.n), default=len(self.labels))
        return {**self._accuracy(model, "none", unattacked, accepted[:images]), **extra}

    def _accuracy(self, model: str, attack: str, attempt: Attempt, right: Tensor) -> dict[str, Any]:
        held = share(right)
        low, high = held.interval
        return {
            "model": model,
            "kind": self.kinds[model],
            "attack": attack,
            "threat": attempt.threat,
            "epsilon": attempt.epsilon,
            "norm": attempt.norm,
            "dataset": self.dataset,
            "n": held.n,
            "accuracy": held.value,
            "ci_low": low,
            "ci_high": high,
        }

    def save(self, folder: str | Path) -> None:
        """Write ``records.parquet``: one line per image, one column per model and attack."""
        import pyarrow
        import pyarrow.parquet

        columns: dict[str, Any] = {"index": range(len(self.labels)), "image": list(self.images)}
        columns["label"] = self.labels.tolist()
        for (model, key), classes in self.predictions.items():
            columns[f"{model}|{key}"] = classes.tolist()
        for key, mask in self.flagged.items():
            columns[f"flagged|{key}"] = mask.tolist()
        arrays = {name: pyarrow.array(list(values)) for name, values in columns.items()}
        attempts = [vars(attempt) for attempt in self.attempts]
        about: dict[str, Any] = {"dataset": self.dataset, "attempts": attempts, "skipped": list(self.skipped)}
        about |= {"kinds": dict(self.kinds), "full_strength": self.full_strength, "verdicts": dict(self.verdicts)}
        about["seen_attacks"] = None if self.seen_attacks is None else list(self.seen_attacks)
        table = pyarrow.table(arrays).replace_schema_metadata({"zepad-mm": json.dumps(about)})
        with replacing(Path(folder) / FILE) as path:
            pyarrow.parquet.write_table(table, path)

    @classmethod
    def load(cls, folder: str | Path) -> Records:
        """Read what :meth:`save` wrote. Raises FileNotFoundError, or ValueError for a damaged or other file."""
        import pyarrow
        import pyarrow.parquet

        complete_folder(folder)
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; expected the records of an evaluation")
        try:
            table = pyarrow.parquet.read_table(path)
            about = json.loads(table.schema.metadata[b"zepad-mm"])
        except (pyarrow.ArrowInvalid, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{path} is not a complete record of an evaluation: {error!r}") from error
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        with damage_of(path):
            predictions, flagged = {}, {}
            for name, values in columns.items():
                first, _, key = name.partition("|")
                if first == "flagged" and key:
                    flagged[key] = torch.tensor(values)
                elif key:
                    predictions[first, key] = torch.tensor(values)
            attempts = [Attempt(**attempt) for attempt in about["attempts"]]
            return cls(
                about["dataset"],
                columns["image"],
                torch.tensor(columns["label"]),
                attempts,
                predictions,
                flagged,
                about["kinds"],
                tuple(about["skipped"]),
                about.get("full_strength", True),
                about.get("seen_attacks"),
                about.get("verdicts", {}),
            )


def _counts(threat: str) -> tuple[str, ...]:
    return THREATS[threat].counts
