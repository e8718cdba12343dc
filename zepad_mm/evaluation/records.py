"""Who answered what on every picture under every attack: all that the table says can be recomputed from here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zepad_mm.evaluation.context import Session
from zepad_mm.evaluation.metrics import flipped_when_right, fooling_rate, share
from zepad_mm.utils.io import replacing

FILE = "records.parquet"
WORST = "worst"
# whose examples a threat's worst case is taken over, beside the clean pictures: who knows more may still do less
INCLUDED = {"T1": ("T1",), "T1p": ("T1p",), "T1b": ("T1", "T1b"), "T2": ("T2",), "T3": ("T2", "T3")}


@dataclass(frozen=True)
class Attempt:
    """One attack in the records; see :class:`zepad_mm.evaluation.context.Example`."""

    threat: str
    attack: str
    epsilon: float
    attacked: int
    seconds: float
    control: bool
    norm: str = "linf"

    @property
    def key(self) -> str:
        return f"{self.threat}/{self.attack}"


@dataclass(frozen=True)
class Records:
    """Predictions per sample.

    Attributes:
        dataset: name of the pictures.
        pictures: (n,) hashes of the pixels, so that nobody has to trust an order.
        labels: (n,) true classes.
        attempts: the attacks; the clean pictures come first.
        predictions: (model, attempt key) -> (n,) classes.
        flagged: attempt key -> (n,) bool, what the detector of the model as it ships says.
        settled: models whose T2 figure is an upper bound, since they were not attacked themselves.
    """

    dataset: str
    pictures: Sequence[str]
    labels: Tensor
    attempts: Sequence[Attempt]
    predictions: dict[tuple[str, str], Tensor]
    flagged: dict[str, Tensor]
    settled: Sequence[str] = ()

    @classmethod
    def of(cls, session: Session, threshold: float) -> Records:
        """From a finished session; ``threshold`` is the detector's."""
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
                )
            )
            for row in session.rows:
                predictions[row.name, example.key] = row.answer(example.logits).argmax(-1)
            decision = session.model.fusion(example.logits[list(session.default.members)])
            flagged[example.key] = decision.score > threshold
        pictures = [hashlib.blake2b(image.numpy().tobytes(), digest_size=8).hexdigest() for image in session.images]
        name, settled = session.data.test.name, tuple(session.settled)
        return cls(name, pictures, session.labels, attempts, predictions, flagged, settled)

    @property
    def models(self) -> list[str]:
        """The rows, in the order of the table."""
        return list(dict.fromkeys(model for model, _ in self.predictions))

    def right(self, model: str, attempt: Attempt) -> Tensor:
        """(n,) bool: right under this attack; for T3, right or flagged."""
        right = self.predictions[model, attempt.key] == self.labels
        return right | self.flagged[attempt.key] if attempt.threat == "T3" else right

    def worst(self, model: str, threat: str) -> Tensor:
        """(n,) bool: right on the clean picture and under every attack of the threat; for T3, right or flagged."""
        members = [a for a in self.attempts if a.threat in ("clean", *INCLUDED.get(threat, ())) and not a.control]
        right = [self.predictions[model, attempt.key] == self.labels for attempt in members]
        if threat == "T3":
            right = [mask | self.flagged[attempt.key] for mask, attempt in zip(right, members, strict=True)]
        return torch.stack(right).all(0)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of report.json."""
        rows = []
        threats = list(dict.fromkeys(attempt.threat for attempt in self.attempts))
        for model in self.models:
            for threat in threats:
                if threat == "T3" and model != "zepad":
                    continue
                attempts = [attempt for attempt in self.attempts if attempt.threat == threat]
                rows += [self._row(model, attempt) for attempt in attempts]
                if threat == "T3":
                    rows.append(self._clean_with_rejection(model))
                if threat != "clean":
                    rows.append(self._worst_row(model, threat, attempts))
        return rows

    def _row(self, model: str, attempt: Attempt) -> dict[str, Any]:
        clean, now = self.predictions[model, self.attempts[0].key], self.predictions[model, attempt.key]
        return {
            **self._figures(model, attempt.attack, attempt, self.right(model, attempt)),
            "seconds": attempt.seconds,
            "asr": fooling_rate(clean, now),
            "asr_correct": flipped_when_right(clean, now, self.labels),
            "attacked": attempt.attacked,
            "control": attempt.control,
        }

    def _worst_row(self, model: str, threat: str, attempts: Sequence[Attempt]) -> dict[str, Any]:
        clean = self.predictions[model, self.attempts[0].key]
        changed, wrong = torch.zeros(2, len(self.labels), dtype=torch.bool)
        for attempt in self.attempts:
            if attempt.threat in INCLUDED[threat] and not attempt.control:
                changed |= self.predictions[model, attempt.key] != clean
                wrong |= self.predictions[model, attempt.key] != self.labels
        right = clean == self.labels
        return {
            **self._figures(model, WORST, attempts[0], self.worst(model, threat)),
            "seconds": round(sum(attempt.seconds for attempt in attempts), 3),
            "asr": share(changed).value,
            "asr_correct": share(wrong[right]).value if bool(right.any()) else None,
            "attacked": len(self.labels),
            "control": False,
            "upper_bound": threat == "T2" and model in self.settled,
        }

    def _clean_with_rejection(self, model: str) -> dict[str, Any]:
        """What the detector costs without an attack: right and not flagged."""
        key = self.attempts[0].key
        accepted = (self.predictions[model, key] == self.labels) & ~self.flagged[key]
        extra = {"seconds": 0.0, "asr": None, "asr_correct": None, "attacked": 0, "control": True}
        unattacked = replace(self.attempts[0], threat="T3")
        return {**self._figures(model, "none", unattacked, accepted), **extra}

    def _figures(self, model: str, attack: str, attempt: Attempt, right: Tensor) -> dict[str, Any]:
        held = share(right)
        low, high = held.interval
        return {
            "model": model,
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
        """Write ``records.parquet``: one line per picture, one column per model and attack."""
        import pyarrow
        import pyarrow.parquet

        columns: dict[str, Any] = {"index": range(len(self.labels)), "picture": list(self.pictures)}
        columns["label"] = self.labels.tolist()
        for (model, key), classes in self.predictions.items():
            columns[f"{model}|{key}"] = classes.tolist()
        for key, mask in self.flagged.items():
            columns[f"flagged|{key}"] = mask.tolist()
        arrays = {name: pyarrow.array(list(values)) for name, values in columns.items()}
        attempts = [vars(attempt) for attempt in self.attempts]
        about = {"dataset": self.dataset, "attempts": attempts, "settled": list(self.settled)}
        table = pyarrow.table(arrays).replace_schema_metadata({"zepad-mm": json.dumps(about)})
        with replacing(Path(folder) / FILE) as path:
            pyarrow.parquet.write_table(table, path)

    @classmethod
    def load(cls, folder: str | Path) -> Records:
        """Read what :meth:`save` wrote. Raises FileNotFoundError; ValueError for a damaged or foreign file."""
        import pyarrow
        import pyarrow.parquet

        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; expected the records of an evaluation")
        try:
            table = pyarrow.parquet.read_table(path)
            about = json.loads(table.schema.metadata[b"zepad-mm"])
        except (pyarrow.ArrowInvalid, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{path} is no complete record of an evaluation: {error!r}") from error
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        predictions, flagged = {}, {}
        for name, values in columns.items():
            first, _, key = name.partition("|")
            if first == "flagged" and key:
                flagged[key] = torch.tensor(values)
            elif key:
                predictions[first, key] = torch.tensor(values)
        attempts = [Attempt(**attempt) for attempt in about["attempts"]]
        labels, settled = torch.tensor(columns["label"]), tuple(about["settled"])
        return cls(about["dataset"], columns["picture"], labels, attempts, predictions, flagged, settled)
