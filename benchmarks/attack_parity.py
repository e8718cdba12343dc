"""Compare T2 with AutoAttack and MORA, and our attacks with those of torchattacks and adv-lib, on any model.

    pip install "zepad-mm[attacks]" && pip install --no-deps torchattacks
    python -m benchmarks.attack_parity --model embedded --data embedded --epsilon 4/255 --n 500

Attacks the whole defence and its best branch. All attacks get the same network, folded for inference, as an evaluation
folds it. ``--published FILE`` adds attacks that others published and this repository does not hold: a Python file with
``ATTACKS``, name -> ``attack(network, parts, images, labels, epsilon)`` to adversarial images, each run on what the
earlier ones left; and ``ABOUT``, which says where the code is from. ``network`` maps images to logits (B, C), ``parts``
to a list of (B, C): those of each branch and then the fused ones.

Adds its results to ``results/parity.json`` and writes ``results/parity.md``. A killed run resumes.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.parity_page import AUTO, COLUMN, FEW, PUBLISHED, bits, markdown
from zepad_mm import ZePAD
from zepad_mm.attacks import APGD, PGD, Attack, Square, frozen
from zepad_mm.cli.common import budget
from zepad_mm.data import load_class_names, load_templates
from zepad_mm.evaluation import PRESETS, EvalData, EvalSettings, Subject, subject_of
from zepad_mm.evaluation.session import Session
from zepad_mm.evaluation.subjects import DEFENCE, BranchView, FusedAnswer, Row, RowKind, load_model, resize_of
from zepad_mm.evaluation.threats import CLEAN, T2
from zepad_mm.evaluation.universal import run_clean
from zepad_mm.evaluation.white_box import QUICK_STEPS, run_white_box
from zepad_mm.utils.io import read_json, write_json, write_text
from zepad_mm.utils.provenance import provenance

OUT = Path(__file__).parents[1] / "results" / "parity.json"
BATCH = 64  # a power of two, so that torchattacks' mean over the batch is exact
PEERS = ("torchattacks", "adv-lib")

Model = Callable[[Tensor], Tensor]
Run = Callable[[Tensor, Tensor], Tensor]  # images, labels to adversarial images


@dataclass(frozen=True)
class Target:
    """What is attacked: the whole defence or one network, as a subject whose only row it is."""

    name: str
    subject: Subject
    data: EvalData
    settings: EvalSettings

    def first(self, n: int) -> Target:
        """The same with the first images alone."""
        test = self.data.test.subset(range(min(n, len(self.data.test))))
        return replace(self, data=replace(self.data, test=test))

    def session(self) -> Session:
        return Session(self.subject, self.data, self.settings)

    def column(self) -> tuple[Tensor, dict[str, int]]:
        """Which images stay right under T2 as an evaluation runs it, (n,) bool, and how many each attack took."""
        session = self.session()
        with torch.inference_mode(False), frozen(BranchView(list(session.members.values()))):
            run_clean(session)
            run_white_box(session)
        session.finish()
        attacked = {example.attack: int(example.attacked.sum()) for example in session.examples[1:]}
        return session.still_right(session.default), attacked


def alone(subject: Subject) -> Subject:
    """The subject with its first row and the members of that row alone."""
    row = subject.rows[0]
    members = {name: subject.members[name] for name in list(subject.members)[: len(row.members)]}
    return replace(subject, members=members, rows=(row,), public_encoder=None, text=None)


def defence_alone(model: ZePAD) -> Subject:
    """A defence as it ships, without the undefended model, which may have no head for the task."""
    members = {f"branch:{name}": branch for name, branch in model.branches.items()}
    gated, rule = model.gate is not None, FusedAnswer(model.fusion)
    row = Row(DEFENCE, tuple(range(len(members))), rule, RowKind.DEFAULT, gated)
    return Subject(
        members=members,
        rows=(row,),
        class_names=model.class_names,
        fusion=model.fusion,
        detector=model.config.detector,
        gate=model.gate,
    )


def targets(model: Any, data: EvalData, settings: EvalSettings, branch: str | None) -> Iterator[Target]:
    """The model as it ships and, of a defence, the branch of that name, by default the best under a quick attack."""
    names = data.test.class_names
    if not isinstance(model, ZePAD):
        yield Target("model", alone(subject_of(model, class_names=names)), data, settings)
        return
    images, labels = data.test.images[:BATCH], data.test.labels[:BATCH]
    quick = PGD(epsilon=settings.epsilon, steps=QUICK_STEPS)

    def kept(name: str) -> int:
        network = model.branch(name).eval()
        return int(right(network, quick(network, images, labels), labels).sum())

    yield Target("whole defence", defence_alone(model), data, settings)
    if branch == "none":
        return
    best = branch or max((about.name for about in model.config.branches), key=kept)
    yield Target(f"branch {best}", alone(subject_of(model.branch(best), class_names=names)), data, settings)


@torch.no_grad()
def right(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    """(n,) bool: whether each prediction is right."""
    return torch.cat([model(part).argmax(-1) for part in images.split(BATCH)]) == labels


# ---- the attacks ---------------------------------------------------------------------------------------------------


def in_sequence(attacks: list[Attack], model: Model) -> Run:
    """Run attacks in sequence, each on the images that the earlier ones left right."""

    def run(images: Tensor, labels: Tensor) -> Tensor:
        worst = images.clone()
        for attack in attacks:
            left = right(model, worst, labels).nonzero()[:, 0]
            worst[left] = attack(model, images[left], labels[left])
        return worst

    return run


def peers(network: Model, config: dict[str, Any], classes: int) -> dict[str, Run]:
    """Our attacks and those of other libraries at the same settings."""
    import torchattacks
    from adv_lib.attacks.auto_pgd import apgd

    epsilon, steps, queries = config["epsilon"], config["steps"], config["queries"]

    def ours(loss: str) -> APGD:
        return APGD(epsilon=epsilon, steps=steps, loss=loss)

    def theirs(loss: str) -> Run:
        return lambda images, labels: apgd(
            network, images, labels, epsilon, norm=float("inf"), n_iter=steps, loss_function=loss
        )

    parts = [
        torchattacks.APGD(network, eps=epsilon, steps=steps, loss="ce"),
        torchattacks.APGDT(network, eps=epsilon, steps=steps, n_classes=classes),
        torchattacks.Square(network, eps=epsilon, n_queries=queries),
    ]
    worst = [ours("ce"), ours("targeted"), Square(epsilon=epsilon, queries=queries)]
    return {
        "zepad_mm apgd-ce + apgd-t + square": in_sequence(worst, network),
        "torchattacks apgd-ce + apgd-t + square": torchattacks.MultiAttack(parts),
        "zepad_mm apgd-ce": in_sequence([ours("ce")], network),
        "adv_lib apgd-ce": theirs("ce"),
        "zepad_mm apgd-dlr": in_sequence([ours("dlr")], network),
        "adv_lib apgd-dlr": theirs("dlr"),
    }


def auto_attack(network: Model, epsilon: float, classes: int) -> Run:
    """torchattacks' AutoAttack as it comes: apgd-ce and apgd-t of 10 steps, fab-t, and 5000 queries of square."""
    import torchattacks

    return torchattacks.AutoAttack(network, eps=epsilon, n_classes=classes, seed=0)


def measure(run: Run, network: Model, target: Target, before: Tensor | None = None) -> dict[str, Any]:
    """Which images stay right, the CPU seconds, and the largest change of a pixel.

    ``before`` (n,) bool: the images that earlier attacks left, the only ones that are attacked.
    """
    images, labels = target.data.test.images, target.data.test.labels
    kept = torch.ones(len(labels), dtype=torch.bool) if before is None else before.clone()
    index = kept.nonzero()[:, 0]
    torch.manual_seed(0)
    begun = time.process_time()
    adversarial = run(images[index], labels[index]).detach() if len(index) else images[index]
    seconds = time.process_time() - begun
    change = float((adversarial - images[index]).abs().max()) if len(index) else 0.0
    if change > target.settings.epsilon + 1e-6 or not bool(((adversarial >= 0) & (adversarial <= 1)).all()):
        raise ValueError(f"an attack left its budget: a pixel changed by {change:.6f}")
    if len(index):
        kept[index] = right(network, adversarial, labels[index])
    return outcome(kept, seconds) | {"attacked": len(index), "largest_change": change}


def outcome(kept: Tensor, seconds: float) -> dict[str, Any]:
    """One result, with the images that stay right as hexadecimal bits, the first image first."""
    bits = "".join(str(int(bit)) for bit in kept)
    return {
        "n": len(kept),
        "accuracy": float(kept.float().mean()),
        "cpu_seconds": round(seconds, 2),
        "right": f"{int(bits, 2):0{(len(bits) + 3) // 4}x}",
    }


def bits_of(result: dict[str, Any]) -> Tensor:
    """(n,) bool, the images that stayed right."""
    return torch.tensor([bit == "1" for bit in bits(result)])


def column(target: Target) -> dict[str, Any]:
    """T2 as an evaluation runs it, folding the network and scoring the clean images included."""
    begun = time.process_time()
    kept, attacks = target.column()
    return outcome(kept, time.process_time() - begun) | {"attacks": attacks}


def pgd_difference(model: Model, images: Tensor, labels: Tensor, config: dict[str, Any]) -> dict[str, Any]:
    """The difference of the last iterates of our PGD and torchattacks', without random start."""
    import torchattacks

    images, labels = images[:BATCH], labels[:BATCH]
    size, steps = config["epsilon"], config["steps"]
    step = size / 4
    theirs = torchattacks.PGD(model, eps=size, alpha=step, steps=steps, random_start=False)(images, labels)
    seen: list[Tensor] = []

    def recorded(images: Tensor) -> Tensor:
        seen.append(images.detach().clone())
        return model(images)

    attack = PGD(epsilon=size, steps=steps, step_size=step, loss="ce", random_start=False, stop_when_wrong=False)
    attack(recorded, images, labels)
    gap = (seen[-1] - theirs).abs()  # our attack scores its last iterate last
    return {
        "n": len(images),
        "largest_difference": float(gap.max()),
        "unequal_pixels": float((gap > 1e-6).float().mean()),
    }


def parts_of(session: Session) -> Callable[[Tensor], list[Tensor]] | None:
    """The logits of each branch of the defence and the fused ones; None for a single network."""
    if session.subject.fusion is None:
        return None
    inputs, fuse = session.fusion_inputs(), session.fusion

    def parts(images: Tensor) -> list[Tensor]:
        outputs = inputs(images)
        decision = fuse(outputs)
        return [*outputs[: len(decision.weights)], decision.logits]

    return parts


# ---- one run -------------------------------------------------------------------------------------------------------


def stages(
    target: Target, config: dict[str, Any], published: dict[str, Any], done: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name of each measurement on a target and what makes it, in their order; ``done`` are those made so far."""
    session = target.session()
    network, parts = session.view(session.default), parts_of(session)
    few, size = target.first(config["few"]), config["epsilon"]
    classes = len(target.data.test.class_names)
    yield COLUMN, partial(column, target)
    left: Tensor | None = None
    for name, attack in published.items():
        label = f"{PUBLISHED}{name}"
        yield label, partial(measure, partial(attack_with, attack, network, parts, size), network, target, left)
        if label in done:
            left = bits_of(done[label])
    if not config["few"]:
        return
    yield FEW, partial(column, few)
    yield AUTO, partial(measure, auto_attack(network, size, classes), network, few)
    if parts is None:
        for name, run in peers(network, config, classes).items():
            yield name, partial(measure, run, network, few)


def attack_with(attack: Any, network: Model, parts: Any, size: float, images: Tensor, labels: Tensor) -> Tensor:
    """Run a published attack, whose arguments the text of this program names."""
    return attack(network, parts, images, labels, size)


def load_published(path: Path | None) -> tuple[dict[str, Any], str]:
    """The attacks of a file and where they are from. Raises ValueError for a file without them."""
    if path is None:
        return {}, ""
    spec = importlib.util.spec_from_file_location("published_attacks", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--published: expected a Python file, got {path.name}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("ATTACKS", "ABOUT"):
        if not hasattr(module, name):
            raise ValueError(f"--published: {path.name} has no {name}; see the text of this program")
    return module.ATTACKS, module.ABOUT


def version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="as for zepad evaluate")
    parser.add_argument("--data", default="embedded", help="data set, as for zepad evaluate")
    parser.add_argument("--epsilon", default="4/255", help="L-inf budget")
    parser.add_argument("--branch", default=None, help="also attacked (default: the best); or none")
    parser.add_argument("--preset", default="demo", help="evaluation preset whose T2 is compared")
    parser.add_argument("--n", type=int, default=500, help="test images")
    parser.add_argument("--few", type=int, default=100, help="test images for torchattacks and adv-lib; 0: without")
    parser.add_argument("--steps", type=int, default=20, help="gradient steps per run and target at equal settings")
    parser.add_argument("--queries", type=int, default=200, help="queries of Square at equal settings")
    parser.add_argument("--published", type=Path, default=None, help="file with attacks that others published")
    parser.add_argument("--about", default="", help="how the model was made, for the page")
    parser.add_argument("--stages", type=int, default=None, help="measurements to make (default: all); a rerun resumes")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


def main() -> None:
    given = parse()
    torch.set_num_threads(1)
    attacks, source = load_published(given.published)
    size = budget(given.epsilon)
    settings = replace(
        PRESETS.get(given.preset),
        threats=(CLEAN.key, T2.key),
        epsilon=size,
        n=given.n,
        n_white_box=None,
        n_transfer=None,
        n_validation=1,
        n_surrogate=1,
        batch_size=BATCH,
    )
    model = load_model(given.model, load_class_names(given.data, settings.test_split), load_templates(given.data))
    shown = next(iter(model.branches.values())) if isinstance(model, ZePAD) else model
    data = EvalData.load(given.data, settings, resize_of(shown))
    config = {
        "model": Path(given.model).name,
        "data": Path(given.data).name,
        "epsilon": size,
        "n": len(data.test),
        "few": min(given.few, len(data.test)),
        "preset": given.preset,
        "steps": given.steps,
        "queries": given.queries,
        "published": source,
        "about": given.about,
    }
    page = read_json(given.out) if given.out.is_file() else {}
    runs = page.get("runs", [])
    record = next((run for run in runs if run["meta"]["config"] == config), None)
    if record is None:
        record = {"meta": provenance(seed=0, config=config), "targets": {}}
        record["meta"]["versions"] |= {name: version_of(name) for name in PEERS}
        runs.append(record)
    made = 0
    for target in targets(model, data, settings, given.branch):
        found = record["targets"].setdefault(target.name, {"stages": {}})
        if "pgd" not in found:
            session = target.session()
            network, test = session.view(session.default), data.test
            found["clean"] = float(right(network, test.images, test.labels).float().mean())
            found["pgd"] = pgd_difference(network, test.images, test.labels, config)
            write_json(given.out, {"runs": runs})
        for name, work in stages(target, config, attacks, found["stages"]):
            if name not in found["stages"]:
                if given.stages is not None and made >= given.stages:
                    break
                made += 1
                found["stages"][name] = work()
                write_json(given.out, {"runs": runs})
            result = found["stages"][name]
            print(target.name, name, {key: result[key] for key in result if key != "right"}, flush=True)
    write_text(given.out.with_suffix(".md"), markdown(runs))


if __name__ == "__main__":
    main()
