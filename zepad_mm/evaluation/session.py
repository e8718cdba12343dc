"""One model on one data set while it is evaluated: its members, rows and images, and the examples found so far."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from zepad_mm.attacks import Perturbation, UniversalAttack
from zepad_mm.encoders import Encoder, optimize_for_inference
from zepad_mm.evaluation.data import EvalData
from zepad_mm.evaluation.settings import EvalSettings
from zepad_mm.evaluation.stage_cache import StageCache
from zepad_mm.evaluation.subjects import UNDEFENDED, BranchView, Row, RowKind, Subject
from zepad_mm.evaluation.threats import CLEAN, T2, ThreatModel
from zepad_mm.models.fusion import Fusion
from zepad_mm.utils.distributed import Processes
from zepad_mm.utils.progress import Progress, duration, say
from zepad_mm.utils.seeding import derived_generator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One attacked version of each test image, as every member sees it.

    Attributes:
        threat: key of its threat model.
        attack: as tables show it, "algorithm@target"; "none" for the clean images.
        epsilon, norm: its budget; for a patch the share of the area.
        logits: (M, n, C).
        attacked: (n,) which images were attacked; the others were not worth it any more and are as they were.
        seconds: what it took.
        control: no attack, shown for comparison and left out of the worst case.
        algorithm: name of the attack.
        target: the row, encoder or group of branches that it was made on; "" where there is none.
    """

    threat: str
    attack: str
    epsilon: float
    logits: Tensor
    attacked: Tensor
    seconds: float
    control: bool = False
    norm: str = "linf"
    algorithm: str = ""
    target: str = ""

    @property
    def key(self) -> str:
        return f"{self.threat}/{self.attack}"


class PerturbationStore:
    """Universal perturbations that several evaluations of one study share: the same attack on the same networks and
    images is made once.

    Args:
        folder: where they are kept; None keeps them in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._made: dict[str, Perturbation] = {}

    def get(
        self,
        name: str,
        attack: UniversalAttack,
        encoders: Mapping[str, Encoder],
        images: Tensor,
        generator: torch.Generator,
    ) -> Perturbation:
        """Return the perturbation of this attack on these encoders and surrogate images; crafted if it is not there."""
        digest = hashlib.blake2b(f"{name} {attack!r}".encode(), digest_size=8)
        digest.update(str(generator.initial_seed()).encode())
        for encoder in encoders.values():
            _hash_state(digest, "", encoder)
        _hash_tensor(digest, images)
        key = digest.hexdigest()
        if key in self._made:
            return self._made[key]
        path = None if self.folder is None else self.folder / f"{name.replace(':', '_')}-{key}.safetensors"
        if path is not None and path.is_file():
            perturbation = Perturbation.load(path, attack.epsilon)
        else:
            perturbation = attack.fit(encoders, images, generator=generator)
            if path is not None:
                perturbation.save(path)
        self._made[key] = perturbation
        return perturbation


class Session:
    """Members, rows, images, and the examples found so far.

    Args:
        subject: the model.
        data: the images.
        settings: what to run.
        out: where finished stages are kept; None keeps them in memory only.
        resume: continue from the stages that an earlier run left in ``out``.
        processes: those that share the batches; all must see ``out``, and only the first one writes stages.
        perturbations: universal perturbations shared with other sessions.
    """

    def __init__(
        self,
        subject: Subject,
        data: EvalData,
        settings: EvalSettings,
        out: Path | None = None,
        resume: bool = False,
        processes: Processes | None = None,
        perturbations: PerturbationStore | None = None,
    ) -> None:
        self.subject, self.data, self.settings, self.out = subject, data, settings, out
        self.processes = processes or Processes()
        self.perturbations = perturbations or PerturbationStore()
        self.device, self.rows = subject.device, list(subject.rows)
        self.images, self.labels = data.test.images, data.test.labels
        side = self.images.shape[-1]
        self.members = {name: optimize_for_inference(member, side) for name, member in subject.members.items()}
        self.examples: list[Example] = []
        self.skipped_rows: list[str] = []  # not attacked themselves: below the default already
        self.deltas: dict[tuple[str, str], Tensor] = {}  # (algorithm, target) -> universal perturbation (3, H, W)
        self.threshold = float("inf")  # of the detector; set once the validation images are scored
        self.bar = Progress(total=0, disable=None if self.processes.first else True, unit="stage", desc="evaluation")
        self.finished, self.worked = 0, list[float]()  # stages, and the seconds of those not from the cache
        self._equal_members: dict[int, int] = {}  # member -> an earlier one that is the same network
        self._public = None if UNDEFENDED in self.members else subject.public_encoder
        # without gradients of its own in attacks, as the copies
        self.gate = None if subject.gate is None else copy.deepcopy(subject.gate).eval().requires_grad_(False)
        if self._public is not None:
            self._public = optimize_for_inference(self._public, side)
        self.cache = None if out is None else StageCache(out)
        if self.cache is not None and self.processes.first:
            self.cache.open(self._identity(), resume)
        self.processes.broadcast(None)  # no process starts before old stages are deleted

    # ---- rows and members --------------------------------------------------------------------------------------

    @property
    def default(self) -> Row:
        """The row of the model as it ships."""
        return self.rows[0]

    @property
    def reference(self) -> Row:
        """The row that T1's attacks were made for: the undefended model, or the model itself where there is none."""
        return next((row for row in self.rows if row.kind is RowKind.UNDEFENDED), self.default)

    @property
    def branch_rows(self) -> list[Row]:
        return [row for row in self.rows if row.kind is RowKind.BRANCH]

    @property
    def fused_rows(self) -> list[Row]:
        return [row for row in self.rows if row.fused]

    @property
    def fusion(self) -> Fusion:
        """The fusion of the model as it ships; only for a subject that has one."""
        assert self.subject.fusion is not None
        return self.subject.fusion

    def view(self, row: Row) -> BranchView:
        """A row as one differentiable module."""
        return BranchView(self.networks(row.members), row.combine, self.gate if row.gated else None)

    def branch_view(self, members: tuple[int, ...]) -> BranchView:
        """Some members side by side, without a fusion."""
        return BranchView(self.networks(members))

    def fusion_inputs(self) -> BranchView:
        """What the fusion of the model as it ships reads: its branches side by side, and its gate."""
        return BranchView(self.networks(self.default.members), None, self.gate)

    def networks(self, members: tuple[int, ...]) -> list[nn.Module]:
        """The networks at these indices."""
        modules = list(self.members.values())
        return [modules[index] for index in members]

    def encoder(self, name: str) -> Encoder:
        """The encoder of a branch, or the public encoder for "undefended"."""
        encoder = self._public if name == UNDEFENDED and self._public else getattr(self.members[name], "encoder", None)
        if not isinstance(encoder, Encoder):
            raise ValueError(f"{name}: this model has no encoder of its own to make a perturbation on")
        return encoder

    def equivalent_row(self, row: Row) -> Row | None:
        """Return an earlier row that answers the same on everything, so that this one needs no attack of its own."""
        for other in self.rows:
            if other is row:
                return None
            if row.fused and other.fused and row.members == other.members and row.combine == other.combine:
                return other
            same = {self._equal_members.get(index, index) for index in (*row.members, *other.members)}
            if not row.fused and not other.fused and len(same) == 1:
                return other
        return None

    # ---- examples ----------------------------------------------------------------------------------------------

    @property
    def clean(self) -> Example:
        return self.examples[0]

    def add(self, example: Example) -> Example:
        """Keep an example; from the clean one, find members that are the same network."""
        if not torch.isfinite(example.logits).all():
            log.warning("%s: a model returns non-finite logits", example.key)
        self.examples.append(example)
        if example.threat == CLEAN.key:
            for index in range(len(self.members)):
                for earlier in range(index):
                    if torch.equal(example.logits[index], example.logits[earlier]):
                        self._equal_members.setdefault(index, earlier)
        return example

    def still_right(self, row: Row, threats: tuple[str, ...] = (T2.key,)) -> Tensor:
        """(n,) bool: of the images that T2 takes, those right on the clean one and under these threats so far."""
        right = self.scope(T2)
        for example in self.examples:
            if example.threat == CLEAN.key or (example.threat in threats and not example.control):
                right &= row.answer(example.logits).argmax(-1) == self.labels
        return right

    def count(self, threat: ThreatModel) -> int:
        """How many of the test images a threat model takes, the first ones."""
        return min(threat.images(self.settings) or len(self.labels), len(self.labels))

    def scope(self, threat: ThreatModel) -> Tensor:
        """(n,) bool: the images that a threat model takes."""
        return torch.arange(len(self.labels)) < self.count(threat)

    def branch_logits(self, logits: Tensor) -> Tensor:
        """Logits of :meth:`score` to what the fusion of the model as it ships reads.

        The logits of its branches (N, n, C), and the logit of its gate where it has one, (N + 1, n, C).
        """
        return logits[[*self.default.members, -1] if self.gate is not None else list(self.default.members)]

    # ---- work --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, images: Tensor, attacked: Tensor | None = None) -> Tensor:
        """Logits of all members (M, n, C), and of the gate as the last row (M + 1, n, C) for a model that has one.

        With ``attacked`` (n,), ``images`` are those images alone.
        """
        batches = images.split(self.settings.batch_size) if len(images) else ()
        units = self._scored_together()
        works = [partial(self._logits, view, batch) for view in units.values() for batch in batches]
        scored = iter(self.processes.shared(works))
        found = dict[int, Tensor]()
        for members in units:
            empty = torch.empty(len(members), 0, len(self.data.test.class_names))
            found |= zip(members, torch.cat([empty, *islice(scored, len(batches))], dim=1), strict=True)
        rows = range(len(self.members) + (self.gate is not None))
        logits = torch.stack([found[self._equal_members.get(index, index)] for index in rows])
        if attacked is None:
            return logits
        full = self.clean.logits.clone()
        full[:, attacked] = logits
        return full

    def _scored_together(self) -> dict[tuple[int, ...], BranchView]:
        """The distinct members, each as a view of its own; branches that the gate reads together, its row last."""
        units = {}
        if self.gate is not None:
            units[(*self.default.members, len(self.members))] = self.fusion_inputs()
        done = {index for members in units for index in members}
        for index in range(len(self.members)):
            if index not in self._equal_members and index not in done:
                units[index,] = self.branch_view((index,))
        return units

    @torch.no_grad()
    def _logits(self, member: nn.Module, images: Tensor) -> Tensor:
        return member(images.to(self.device)).float().cpu()

    def stage(self, name: str, work: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return what ``work`` gives, with its ``seconds``; from the cache where an earlier run finished it."""
        self.bar.set_postfix_str(plain_name(name))
        kept = self.cache.read(name) if self.cache is not None and self.processes.first else None
        if kept is not None:
            say(log, "%s: from the cache", plain_name(name))
        result = self.processes.broadcast(kept)
        if result is None:
            started = time.perf_counter()
            result = work()
            result["seconds"] = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
            self._log_stage(name, float(result["seconds"]))
            if self.cache is not None and self.processes.first:
                self.cache.write(name, result)
            result = self.processes.broadcast(result)
            assert result is not None
        self.finished += 1
        self.bar.update()
        return result

    def _log_stage(self, name: str, seconds: float) -> None:
        """Log a stage that was worked on, and the time left if the others take as long."""
        self.worked.append(seconds)
        done, total = self.finished + 1, int(self.bar.total or 0)
        mean = sum(self.worked) / len(self.worked)
        left = f"; stage {done} of {total}, about {duration(mean * (total - done))} left" if total > done else ""
        say(log, "%s: %.1f s%s", plain_name(name), seconds, left)

    def batch(self, stage: str, number: int, work: Callable[[], Tensor]) -> Tensor:
        """One batch of a stage; from the cache where an earlier run, killed within the stage, finished it."""
        return work() if self.cache is None else self.cache.batch(stage, number, work)

    def finish(self) -> None:
        """Close the progress bar, and drop batches that belong to no stage."""
        self.bar.close()
        if self.cache is not None and self.processes.first:
            self.cache.drop_batches()

    def generator(self, *purpose: int | str) -> torch.Generator:
        """A CPU generator for one purpose: the same whatever ran before."""
        return derived_generator(self.settings.seed, *purpose)

    def _identity(self) -> dict[str, str]:
        """What a stage depends on, each as a short hash; of the members as they are, before folding rounds them."""
        state = hashlib.blake2b(digest_size=16)
        for name, member in self.subject.members.items():
            _hash_state(state, f"{name}.", member)
        if self.gate is not None:
            _hash_state(state, "gate.", self.gate)
        if self._public is not None and self.subject.public_encoder is not None:
            _hash_state(state, "public.", self.subject.public_encoder)
        pixels = hashlib.blake2b(digest_size=16)
        for part in (self.data.test, self.data.validation, self.data.surrogate):
            _hash_tensor(pixels, part.images)
            _hash_tensor(pixels, part.labels)
        rows = ", ".join(f"{row.name}{row.members}" for row in self.rows)
        return {
            "weights": state.hexdigest(),
            "images": pixels.hexdigest(),
            "rows": rows,
            "fusion": f"{self.subject.fusion!r} {self.subject.detector!r}",
            "settings": json.dumps(self.settings.to_dict(), sort_keys=True),
        }


def plain_name(stage: str) -> str:
    """The key of a stage in words: ``T2 apgd@zepad`` is "T2: apgd on zepad"."""
    threat, _, attack = stage.partition(" ")
    words = attack.replace("_", " ").replace("@", " on ")
    return "clean images" if stage == "clean none" else f"{threat}: {words}" if attack else f"{threat} images"


def _hash_state(digest: hashlib.blake2b, prefix: str, module: nn.Module) -> None:
    for key, tensor in module.state_dict().items():
        digest.update(f"{prefix}{key}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def _hash_tensor(digest: hashlib.blake2b, tensor: Tensor) -> None:
    digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
