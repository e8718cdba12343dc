"""The evaluation doubts itself: signs that an attack was too weak, so that the robustness shown is too high."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from zepad_mm.attacks import APGD, Attack, frozen
from zepad_mm.attacks.base import steepest
from zepad_mm.attacks.losses import margin
from zepad_mm.attacks.objective import input_gradient
from zepad_mm.evaluation.context import Session
from zepad_mm.evaluation.records import Records
from zepad_mm.evaluation.white_box import own_attack, strike
from zepad_mm.utils.validation import budget_text

SWEEP = (1, 2, 4, 16)  # times the budget; at the last, nothing can hold
MOVED = 0.01  # accuracy that more steps may cost before the attack counts as unfinished
VANISHED = 0.02  # accuracy at the last budget of the sweep that still counts as none
NOISE_DRAWS = 10  # random patterns per picture
TARGETS = 3  # wrong classes that the longer attack tries
FLAT = 0.05  # share of zero gradients that still counts as none


@dataclass(frozen=True)
class Check:
    """One doubt.

    Attributes:
        name: what was looked at.
        passed: nothing suspicious.
        detail: the figures, in words.
        values: the figures.
    """

    name: str
    passed: bool
    detail: str
    values: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_checks(session: Session, records: Records) -> list[Check]:
    """All checks that the threats which ran allow."""
    checks = [_finite(session), _not_above_clean(records), _plain_logits(session), _each_on_its_own(session)]
    threats = {example.threat for example in session.examples}
    if any(example.attack.startswith("square@") for example in session.examples):
        checks.append(_square(session))
    checks += [_noise(records, threat) for threat in ("T1", "T1p") if threat in threats]
    if {"T1", "T1b"} <= threats:
        checks.append(_public_attack_strong(records))
    if session.settings.diagnostics_n:
        checks += [_repeatable(session), _flat_gradients(session)]
        if "T2" in threats:
            checks += [_noise_within_budget(session), _more_steps(session), _sweep(session), _transfer(session)]
    return checks


def _finite(session: Session) -> Check:
    broken = sum(int((~torch.isfinite(example.logits)).sum()) for example in session.examples)
    return Check("finite", broken == 0, f"{broken} answers are NaN or infinite", {"broken": float(broken)})


def _not_above_clean(records: Records) -> Check:
    """No attack may put more answers right than wrong, beyond what chance does (three sigma of the changed ones)."""
    above: list[str] = []
    for model in records.models:
        clean = records.right(model, records.attempts[0])
        for attempt in records.attempts[1:]:
            if attempt.threat in ("T1", "T1p", "T1b", "T2") and not attempt.control:
                attacked = records.right(model, attempt)
                gained, lost = int((attacked & ~clean).sum()), int((clean & ~attacked).sum())
                if gained - lost > 3 * math.sqrt(gained + lost):
                    above.append(f"{model} under {attempt.threat} {attempt.attack}")
    detail = (
        f"more accurate under attack than without: {', '.join(above)}" if above else "no model gains from an attack"
    )
    return Check("robust_not_above_clean", not above, detail, {"cases": float(len(above))})


def _plain_logits(session: Session) -> Check:
    """Probabilities in place of logits saturate every loss that takes a softmax."""
    suspects = []
    for row in session.rows:
        answers = row.answer(session.clean.logits)
        if bool((answers >= 0).all()) and bool(((answers.sum(-1) - 1).abs() < 1e-3).all()):
            suspects.append(row.name)
    detail = f"probabilities, not logits: {', '.join(suspects)}" if suspects else "every model answers with logits"
    return Check("outputs_are_logits", not suspects, detail, {"cases": float(len(suspects))})


def _each_on_its_own(session: Session) -> Check:
    """A fusion or detector that answers by place in the batch peeks: at labels in that order, or at the neighbours."""
    fusion, members = session.model.fusion, list(session.default.members)
    order = torch.randperm(len(session.labels), generator=session.generator("diagnostics", "order"))
    moved = 0.0
    for example in session.examples:
        logits = example.logits[members]
        there, here = fusion(logits[:, order]), fusion(logits)
        for one, other in ((there.logits, here.logits[order]), (there.score, here.score[order])):
            moved = max(moved, float((one - other).abs().nan_to_num(0.0).max()))
    detail = f"the same pictures in another order: fused answers and suspicion scores differ by {moved:.2g}"
    return Check("pictures_judged_alone", moved <= 1e-3, detail, {"d": moved})


def _repeatable(session: Session) -> Check:
    """A model that answers the same pictures differently must be attacked in expectation (EOT), which T2 does not."""
    target = session.through(session.default)
    index = _some(session, torch.ones(len(session.labels), dtype=torch.bool), "repeat")
    images = session.images[index].to(session.device)
    with torch.no_grad(), frozen(target):
        moved = float((target(images) - target(images)).abs().max())
    return Check("no_randomness", moved <= 1e-4, f"the same pictures twice: logits differ by {moved:.2g}", {"d": moved})


def _square(session: Session) -> Check:
    """Square sees no gradient and comes last: what it still breaks, the gradient did not show."""
    row = session.default
    squares = [example for example in session.examples if example.attack == f"square@{row.name}"]
    wrong = torch.zeros(len(session.labels), dtype=torch.bool)
    for example in squares:
        wrong |= example.attacked & (row.answer(example.logits).argmax(-1) != session.labels)
    share = float(wrong.float().mean())
    passed = share <= MOVED or int(wrong.sum()) <= 1
    detail = f"Square breaks {100 * share:.1f} points more of zepad than all gradient attacks"
    return Check("square_not_stronger", passed, detail, {"moved": share})


def _noise_within_budget(session: Session) -> Check:
    """What survived the white-box attacks must survive random signs of the same size."""
    row = session.default
    survivors = session.still_right(row)
    index = _some(session, survivors, "noise")
    target, noise = session.through(row), session.generator("diagnostics", "noise draws")
    images, labels = session.images[index], session.labels[index]
    broken = torch.zeros(len(index), dtype=torch.bool)
    with torch.no_grad(), frozen(target):
        for _ in range(NOISE_DRAWS if len(index) else 0):
            signs = torch.randint(2, images.shape, generator=noise) * 2.0 - 1
            largest = session.settings.epsilon * steepest(signs, session.settings.norm)
            noisy = (images + largest).clamp(0, 1).to(session.device)
            broken |= target(noisy).argmax(-1).cpu() != labels
    moved = float(survivors.float().mean()) * float(broken.float().mean()) if len(index) else 0.0
    passed = moved <= MOVED or int(broken.sum()) <= 1
    detail = f"{NOISE_DRAWS} draws of random noise take {100 * moved:.1f} points more from zepad than T2 did"
    return Check("noise_not_stronger_than_t2", passed, detail, {"moved": moved, "n": float(len(index))})


def _noise(records: Records, threat: str) -> Check:
    """Random signs, or random pixels, of the same size must hurt the undefended model less than what was made on it."""
    model = "undefended"
    tried = [attempt for attempt in records.attempts if attempt.threat == threat]
    noise = next(attempt for attempt in tried if attempt.control)
    attacks = [attempt for attempt in tried if not attempt.control]
    under_noise = float(records.right(model, noise).float().mean())
    under_attack = min(float(records.right(model, attempt).float().mean()) for attempt in attacks)
    detail = f"undefended: {100 * under_noise:.1f} % under {noise.attack}, {100 * under_attack:.1f} % under {threat}"
    passed = under_attack < under_noise or under_noise == 0
    return Check(f"noise_weaker_than_{threat.lower()}", passed, detail, {"noise": under_noise, "attack": under_attack})


def _public_attack_strong(records: Records) -> Check:
    """Made on the public encoder itself, a perturbation must hit it harder than one that was made on its kin."""
    model = "undefended"
    best = {
        threat: min(
            float(records.right(model, attempt).float().mean())
            for attempt in records.attempts
            if attempt.threat == threat and not attempt.control
        )
        for threat in ("T1", "T1b")
    }
    passed = best["T1"] <= best["T1b"] + 2 * MOVED
    detail = f"undefended: {100 * best['T1']:.1f} % under the best T1 attack, {100 * best['T1b']:.1f} % under T1b's"
    return Check("t1_not_weaker_than_t1b", passed, detail, best)


def _flat_gradients(session: Session) -> Check:
    """Share of pictures on which the loss of a branch, or of the fused answer, has no input gradient at all."""
    index = _some(session, torch.ones(len(session.labels), dtype=torch.bool), "gradients")
    values = {}
    for row in [*session.branch_rows, session.default]:
        target = session.through(row)
        with torch.enable_grad(), frozen(target):
            images = session.images[index].to(session.device).requires_grad_()
            margins = margin(target(images), session.labels[index].to(session.device))
            gradient = input_gradient(margins, images)
        flat = gradient.flatten(1).abs().amax(1) <= 1e-20
        values[row.name] = float(flat.float().mean())
    passed = all(share <= FLAT for share in values.values())
    shown = ", ".join(f"{name} {100 * share:.0f} %" for name, share in values.items())
    return Check("gradients", passed, f"pictures without any input gradient: {shown}", values)


def _more_steps(session: Session) -> Check:
    """A longer attack of another kind must not bring the accuracy of what survived T2 down noticeably."""
    settings, row = session.settings, session.default
    survivors = session.still_right(row)
    held = float(survivors.float().mean())
    index = _some(session, survivors, "more steps")
    steps = settings.steps * settings.diagnostics_factor
    attack = APGD(epsilon=settings.epsilon, norm=settings.norm, steps=steps, loss="targeted", targets=TARGETS)
    broken = _wrong(session, attack, index, "more steps")
    moved = held * float(broken.float().mean()) if len(index) else 0.0
    # on a sample, a single picture may weigh more than a point: only what exceeds chance counts
    passed = moved <= MOVED or int(broken.sum()) <= 1
    detail = f"targeted APGD with {steps} steps takes {100 * moved:.1f} points more from zepad than T2 did"
    return Check("more_steps", passed, detail, {"moved": moved, "steps": float(steps), "n": float(len(index))})


def _sweep(session: Session) -> Check:
    """With a growing budget the accuracy must go to zero, or the attack does not see through the defence."""
    everybody = torch.ones(len(session.labels), dtype=torch.bool)
    index, settings = _some(session, everybody, "sweep"), session.settings
    values = {}
    alive = index
    for factor in SWEEP:
        epsilon = settings.epsilon * factor if settings.norm == "l2" else min(settings.epsilon * factor, 1.0)
        budget = budget_text(epsilon, settings.norm)
        attack = own_attack(session, "apgd", epsilon=epsilon, steps=settings.steps * settings.diagnostics_factor)
        wrong = _wrong(session, attack, alive, f"sweep {budget}")
        alive = alive[~wrong]  # what a smaller budget broke, a larger one breaks
        values[budget] = len(alive) / len(index)
    last = list(values.values())[-1]
    shown = ", ".join(f"{100 * held:.0f} % at {name}" for name, held in values.items())
    return Check("budget_sweep", last <= VANISHED, f"zepad with a growing budget: {shown}", values)


def _transfer(session: Session) -> Check:
    """Examples made on parts must not break more than the attack through the whole, on the same pictures."""
    row = session.default
    index = _some(session, session.still_right(row, threats=()), "transfer")
    if len(index) == 0:
        return Check("transfer_not_stronger", True, "no picture is right without an attack", {})
    attack = own_attack(session, "pgd")
    own = _wrong(session, attack, index, "transfer")
    best, name = 0.0, "none"
    for example in session.examples:
        if example.threat == "T2" and bool(example.attacked[index].any()) and not example.attack.endswith("@zepad"):
            wrong = row.answer(example.logits).argmax(-1) != session.labels
            if float(wrong[index].float().mean()) > best:
                best, name = float(wrong[index].float().mean()), example.attack
    share = float(own.float().mean())
    passed = best <= share + MOVED or (best - share) * len(index) <= 1
    detail = f"on the same pictures {name} breaks {100 * best:.1f} %, the attack through zepad {100 * share:.1f} %"
    return Check("transfer_not_stronger", passed, detail, {"transfer": best, "white_box": share})


def _some(session: Session, mask: Tensor, purpose: str) -> Tensor:
    """At most ``diagnostics_n`` indices of a (n,) mask, drawn by the seed."""
    index = mask.nonzero()[:, 0]
    order = torch.randperm(len(index), generator=session.generator("diagnostics", purpose))
    return index[order[: session.settings.diagnostics_n]].sort().values


def _wrong(session: Session, attack: Attack, index: Tensor, purpose: str) -> Tensor:
    """(k,) bool: this attack on the model as it ships makes it wrong about the pictures at ``index``."""
    if len(index) == 0:
        return torch.zeros(0, dtype=torch.bool)
    target = session.through(session.default)
    attacked = strike(session, attack, target, index, purpose)
    with torch.no_grad():
        parts = attacked.split(session.settings.batch_size)
        answers = torch.cat([target(part.to(session.device)).argmax(-1).cpu() for part in parts])
    return answers != session.labels[index]
