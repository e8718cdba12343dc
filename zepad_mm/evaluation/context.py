"""One evaluation in progress: who is judged, on which pictures, and what has been worked out so far."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from zepad_mm.encoders import Encoder, optimize_for_inference
from zepad_mm.evaluation.data import EvalData
from zepad_mm.evaluation.settings import EvalSettings
from zepad_mm.models.branch import Branch
from zepad_mm.models.fusion import RULES, Fusion, build
from zepad_mm.models.zepad import ZePAD
from zepad_mm.utils.distributed import Processes
from zepad_mm.utils.io import read_json, read_tensors, write_json, write_tensors
from zepad_mm.utils.seeding import derived_generator

log = logging.getLogger(__name__)

UNDEFENDED = "undefended"
PARTS = "parts"  # folder in the cache for the finished batches of the stage in progress


@dataclass(frozen=True)
class Row:
    """A line of the table: a model put together from networks ("members") that are run once for all rows.

    Attributes:
        name: ``undefended``, ``branch:<name>``, ``baseline:<name>``, ``zepad`` or ``zepad:<rule>``.
        members: which networks it needs, as indices.
        combine: their logits (N, B, C) to one answer (B, C).
        fused: more than one member.
    """

    name: str
    members: tuple[int, ...]
    combine: Callable[[Tensor], Tensor]

    @property
    def fused(self) -> bool:
        return len(self.members) > 1

    def answer(self, logits: Tensor) -> Tensor:
        """Logits of all members (M, n, C) to those of this row (n, C)."""
        return self.combine(logits[list(self.members)])


class Through(nn.Module):
    """What an attacker differentiates: some members and, unless None, what combines them.

    Images (B, 3, H, W) to (B, C); without ``combine`` to the stacked logits (N, B, C), whose losses attacks sum.
    """

    def __init__(self, members: list[nn.Module], combine: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(members)
        self.combine = combine

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.stack([part(images) for part in self.parts])
        return logits if self.combine is None else self.combine(logits)


@dataclass(frozen=True)
class Example:
    """One attacked version of each test picture, as every member sees it.

    Attributes:
        threat, attack: names; ``attack`` is "none" for the clean pictures.
        epsilon, norm: its budget; for a patch the share of the area.
        logits: (M, n, C).
        attacked: (n,) which pictures were attacked; the others were no longer worth it and are as they were.
        seconds: what it took.
        control: no attack, shown for comparison and left out of the worst case.
    """

    threat: str
    attack: str
    epsilon: float
    logits: Tensor
    attacked: Tensor
    seconds: float
    control: bool = False
    norm: str = "linf"

    @property
    def key(self) -> str:
        return f"{self.threat}/{self.attack}"


class Session:
    """Members, rows, pictures and a store of finished stages.

    Args:
        model: the defence.
        data: the pictures.
        settings: what to run.
        baselines: further models to judge beside it, name -> module from images to logits.
        out: where finished stages are kept; None keeps them in memory only.
        resume: take up the stages that an earlier run left in ``out``.
        processes: those that share the batches; all must see ``out``, and only the first one writes stages.
    """

    def __init__(
        self,
        model: ZePAD,
        data: EvalData,
        settings: EvalSettings,
        baselines: Mapping[str, nn.Module],
        out: Path | None,
        resume: bool,
        processes: Processes,
    ) -> None:
        self.model, self.data, self.settings, self.out, self.processes = model, data, settings, out, processes
        members: dict[str, nn.Module] = {
            **{f"branch:{name}": branch for name, branch in model.branches.items()},
            UNDEFENDED: model.undefended,
            **{f"baseline:{name}": module for name, module in baselines.items()},
        }
        side = data.test.images.shape[-1]
        self.members = {name: optimize_for_inference(member, side) for name, member in members.items()}
        self.rows = _rows(model, self.members, settings)
        self.device = model.device
        self.images, self.labels = data.test.images, data.test.labels
        self.examples: list[Example] = []
        self.settled: list[str] = []  # rows that were not attacked themselves, being behind the default already
        self.deltas: dict[str, Tensor] = {}  # universal perturbations by "attack@where", (3, H, W)
        self.bar = tqdm(total=0, disable=None if processes.first else True, unit="stage", desc="evaluate")
        self._twins: dict[int, int] = {}  # member -> an earlier one that is the same network
        if out is not None and processes.first:
            self._open_cache(out / "cache", self._identity(members), resume)
        processes.agreed(None)  # nobody begins before old stages are gone

    # ---- who and what ----------------------------------------------------------------------------------------

    @property
    def default(self) -> Row:
        """The row of the model as it ships."""
        return next(row for row in self.rows if row.name == "zepad")

    @property
    def branch_rows(self) -> list[Row]:
        return [row for row in self.rows if row.name.startswith("branch:")]

    @property
    def fused_rows(self) -> list[Row]:
        return [row for row in self.rows if row.fused]

    def through(self, row: Row) -> Through:
        """A row as one differentiable module."""
        return Through(self.parts(row.members), row.combine)

    def parts(self, members: tuple[int, ...]) -> list[nn.Module]:
        """The networks at these indices."""
        modules = list(self.members.values())
        return [modules[index] for index in members]

    def encoder(self, name: str) -> Encoder:
        """The encoder of a branch, or of the undefended model."""
        branch = self.members[name]
        assert isinstance(branch, Branch)
        return branch.encoder

    def twins(self, row: Row) -> Row | None:
        """An earlier row that gives the same answers to everything, so that it needs no attack of its own."""
        for other in self.rows:
            if other is row:
                return None
            if row.fused and other.fused and row.combine == other.combine:
                return other
            same = {self._twins.get(index, index) for index in (*row.members, *other.members)}
            if not row.fused and not other.fused and len(same) == 1:
                return other
        return None

    @property
    def clean(self) -> Example:
        return self.examples[0]

    def add(self, example: Example) -> Example:
        """Keep an example, and look for members that turn out to be one network once the clean ones are there."""
        if not torch.isfinite(example.logits).all():
            log.warning("%s: a model answers NaN or infinity", example.key)
        self.examples.append(example)
        if example.threat == "clean":
            for index in range(len(example.logits)):
                for earlier in range(index):
                    if torch.equal(example.logits[index], example.logits[earlier]):
                        self._twins.setdefault(index, earlier)
        return example

    def still_right(self, row: Row, threats: tuple[str, ...] = ("T2",)) -> Tensor:
        """(n,) bool: right on the clean picture and under every attack of these threats so far."""
        right = torch.ones(len(self.labels), dtype=torch.bool)
        for example in self.examples:
            if example.threat == "clean" or (example.threat in threats and not example.control):
                right &= row.answer(example.logits).argmax(-1) == self.labels
        return right

    # ---- the work --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, images: Tensor, attacked: Tensor | None = None) -> Tensor:
        """Logits of all members (M, n, C). With ``attacked`` (n,), ``images`` are those pictures alone."""
        parts = images.split(self.settings.batch_size) if len(images) else ()
        distinct = [member for index, member in enumerate(self.members.values()) if index not in self._twins]
        scored = self.processes.shared([partial(self._logits, member, part) for member in distinct for part in parts])
        rest, fresh = iter(scored), list[Tensor]()
        for index in range(len(self.members)):
            if index in self._twins:
                fresh.append(fresh[self._twins[index]])
            else:
                empty = torch.empty(0, len(self.model.class_names))
                fresh.append(torch.cat(list(islice(rest, len(parts)))) if parts else empty)
        logits = torch.stack(fresh)
        if attacked is None:
            return logits
        full = self.clean.logits.clone()
        full[:, attacked] = logits
        return full

    @torch.no_grad()
    def _logits(self, member: nn.Module, images: Tensor) -> Tensor:
        return member(images.to(self.device)).float().cpu()

    def stage(self, name: str, work: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``work`` gives, with its ``seconds``; taken from the cache where an earlier run finished it."""
        path = None if self.out is None else _stage_file(self.out, name)
        self.bar.set_postfix_str(name)
        kept = None
        if path is not None and self.processes.first and path.is_file():
            log.info("%s: taken from %s", name, path)
            kept, _ = read_tensors(path)
        result = self.processes.agreed(kept)
        if result is None:
            started = time.perf_counter()
            result = work()
            result["seconds"] = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
            log.info("%s: %.1f s", name, float(result["seconds"]))
            if path is not None and self.processes.first:
                write_tensors(path, result, {"stage": name})
                shutil.rmtree(path.parent / PARTS, ignore_errors=True)  # the whole is there now
            result = self.processes.agreed(result)
            assert result is not None
        self.bar.update()
        return result

    def part(self, name: str, number: int, work: Callable[[], Tensor]) -> Tensor:
        """One batch of a stage; taken from the cache where an earlier run, cut off within the stage, finished it."""
        if self.out is None:
            return work()
        path = _stage_file(self.out, f"{name} {number}")
        path = path.parent / PARTS / path.name
        if path.is_file():
            return read_tensors(path)[0]["part"]
        result = work()
        write_tensors(path, {"part": result})
        return result

    def finish(self) -> None:
        """Close the bar, and drop batches of what is no stage."""
        self.bar.close()
        if self.out is not None and self.processes.first:
            shutil.rmtree(self.out / "cache" / PARTS, ignore_errors=True)

    def generator(self, *purpose: int | str) -> torch.Generator:
        """A CPU generator for one purpose: the same whatever ran before."""
        return derived_generator(self.settings.seed, *purpose)

    def _open_cache(self, folder: Path, identity: dict[str, str], resume: bool) -> None:
        """Raises ValueError when the stages to resume belong to another model, other pictures or settings."""
        known = folder / "identity.json"
        if resume and known.is_file():
            before = read_json(known)
            changed = sorted(key for key in identity if before.get(key) != identity[key])
            if changed:
                raise ValueError(
                    f"{folder} holds stages of another run: {', '.join(changed)} differ; "
                    "give another out folder, or leave resume off to start afresh"
                )
            return
        if folder.is_dir() and any(folder.iterdir()) and not known.is_file():
            raise ValueError(f"{folder} holds something else than stages of an evaluation; give another out folder")
        for stale in folder.glob("*.safetensors"):
            stale.unlink()
        shutil.rmtree(folder / PARTS, ignore_errors=True)
        write_json(known, identity)

    def _identity(self, members: Mapping[str, nn.Module]) -> dict[str, str]:
        """What a stage depends on, each as a short hash; of the members as they are, before folding rounds them."""
        state = hashlib.blake2b(digest_size=16)
        for name, member in members.items():
            for key, tensor in member.state_dict().items():
                state.update(f"{name}.{key}".encode())
                state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        pictures = hashlib.blake2b(digest_size=16)
        for part in (self.data.test, self.data.validation, self.data.surrogate):
            pictures.update(part.images.contiguous().numpy().tobytes())
            pictures.update(part.labels.contiguous().numpy().tobytes())
        fusion = f"{self.model.fusion!r} {self.model.config.detector!r}"
        return {
            "weights": state.hexdigest(),
            "pictures": pictures.hexdigest(),
            "fusion": fusion,
            "settings": json.dumps(self.settings.to_dict(), sort_keys=True),
        }


@dataclass(frozen=True)
class Fused:
    """The answer of a fusion; equal for equal rules, so that the same rule is not attacked twice."""

    fusion: Fusion

    def __call__(self, logits: Tensor) -> Tensor:
        return self.fusion(logits).logits


def soft_vote(logits: Tensor) -> Tensor:
    """Equal-weight ensemble: log of the mean probability over members, (N, B, C) to (B, C)."""
    return logits.log_softmax(-1).logsumexp(0)


def only(logits: Tensor) -> Tensor:
    """(1, B, C) to (B, C)."""
    return logits[0]


def _rows(model: ZePAD, members: Mapping[str, nn.Module], settings: EvalSettings) -> list[Row]:
    """The table's lines: the model as it ships comes first, so that its attacks serve the others."""
    branches = tuple(index for index, name in enumerate(members) if name.startswith("branch:"))
    rows = [Row("zepad", branches, Fused(model.fusion))]
    for rule in settings.rules or tuple(RULES):
        fusion = build(rule, model.benign, model.config.detector.score)
        rows.append(Row(f"zepad:{rule}", branches, Fused(fusion)))
    rows.append(Row("baseline:equal", branches, soft_vote))
    rows += [Row(name, (index,), only) for index, name in enumerate(members)]
    return rows


def read_stage(out: str | Path, threat: str, attack: str) -> dict[str, Tensor]:
    """What a finished evaluation kept of one attack: ``logits`` (M, n, C) of the branches, then the other members.

    Raises FileNotFoundError when the stage was not run, or ValueError when its file is damaged.
    """
    return read_tensors(_stage_file(Path(out), f"{threat} {attack}"))[0]


def _stage_file(out: Path, stage: str) -> Path:
    name = "".join(letter if letter.isalnum() or letter in "-_@." else "_" for letter in stage)
    return out / "cache" / f"{name}.safetensors"
