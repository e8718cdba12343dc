"""Diagnostics: signs that an attack was too weak, so that the measured robust accuracy is too high."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from zepad_mm.attacks import APGD, Attack, MomentumPGD, frozen
from zepad_mm.attacks.base import steepest
from zepad_mm.attacks.losses import margin
from zepad_mm.attacks.objective import input_gradient
from zepad_mm.evaluation.records import Attempt, Records
from zepad_mm.evaluation.report import HELD, NOT_CHECKED, OVERESTIMATED, UPPER_BOUND
from zepad_mm.evaluation.session import Session
from zepad_mm.evaluation.subjects import Row
from zepad_mm.evaluation.threats import ATTACKS, T1, T1B, T1P, T2, ThreatModel
from zepad_mm.evaluation.white_box import attack_batches, attacked_rows, own_attack
from zepad_mm.utils.text import budget_text

SWEEP = (1, 2, 4, 16)  # times the budget; at the last one no model can be robust
MOVED = 0.01  # accuracy that more steps may cost before the attack counts as unfinished
VANISHED = 0.02  # accuracy at the last budget of the sweep that still counts as none
NOISE_DRAWS = 10  # random patterns per image
TARGETS = 3  # wrong classes that the longer attack tries
FLAT = 0.05  # share of zero gradients that still counts as none


@dataclass(frozen=True)
class Check:
    """One diagnostic.

    Attributes:
        name: what was checked.
        passed: nothing suspicious was found.
        detail: the measurement, in words.
        values: the measurement, as numbers.
    """

    name: str
    passed: bool
    detail: str
    values: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_checks(session: Session, records: Records) -> list[Check]:
    """Return all checks that the threat models which ran allow."""
    checks = [_finite(session), _not_above_clean(records), _logits_not_probabilities(session)]
    if session.subject.fusion is not None:
        checks.append(_independent_of_batch(session))
    threats = {example.threat for example in session.examples}
    if any(example.algorithm == "square" for example in session.examples):
        checks.append(_square(session))
    reference = session.reference.name
    checks += [_noise_weaker(records, threat, reference) for threat in (T1, T1P) if threat.key in threats]
    if {T1.key, T1B.key} <= threats:
        checks.append(_public_attack_strong(records, reference))
    if session.settings.diagnostics_n:
        checks += [_repeatable(session), _nonzero_gradients(session)]
        if T2.key in threats:
            checks += [_noise_within_budget(session), _more_steps(session), _sweep(session), _transfer(session)]
    return checks


def _finite(session: Session) -> Check:
    broken = sum(int((~torch.isfinite(example.logits)).sum()) for example in session.examples)
    return Check("finite", broken == 0, f"{broken} logits are NaN or infinite", {"broken": float(broken)})


def _not_above_clean(records: Records) -> Check:
    """No attack may correct more answers than it breaks, beyond chance (three sigma of the changed ones)."""
    above: list[str] = []
    plain = [threat.key for threat in ATTACKS if not threat.flagged_is_right]
    for model in records.models:
        right = records.right(model, records.attempts[0])
        for attempt in records.attempts[1:]:
            if attempt.threat in plain and not attempt.control:
                attacked, clean = records.right(model, attempt), right[: attempt.n]
                gained, lost = int((attacked & ~clean).sum()), int((clean & ~attacked).sum())
                if gained - lost > 3 * math.sqrt(gained + lost):
                    above.append(f"{model} under {attempt.threat} {attempt.attack}")
    detail = (
        f"more accurate under attack than without: {', '.join(above)}" if above else "no model gains from an attack"
    )
    return Check("robust_not_above_clean", not above, detail, {"cases": float(len(above))})


def _logits_not_probabilities(session: Session) -> Check:
    """Models must return logits: probabilities saturate every loss that takes a softmax."""
    suspects = []
    for row in session.rows:
        answers = row.answer(session.clean.logits)
        if bool((answers >= 0).all()) and bool(((answers.sum(-1) - 1).abs() < 1e-3).all()):
            suspects.append(row.name)
    detail = f"probabilities, not logits: {', '.join(suspects)}" if suspects else "every model returns logits"
    return Check("outputs_are_logits", not suspects, detail, {"cases": float(len(suspects))})


def _independent_of_batch(session: Session) -> Check:
    """The fusion and the detector must judge each image by itself, not by its place in the batch or its neighbours."""
    fusion = session.fusion
    order = torch.randperm(len(session.labels), generator=session.generator("diagnostics", "order"))
    moved = 0.0
    for example in session.examples:
        logits = session.branch_logits(example.logits)
        shuffled, plain = fusion(logits[:, order]), fusion(logits)
        for one, other in ((shuffled.logits, plain.logits[order]), (shuffled.score, plain.score[order])):
            moved = max(moved, float((one - other).abs().nan_to_num(0.0).max()))
    detail = f"the same images in another order: fused logits and suspicion scores differ by {moved:.2g}"
    return Check("independent_of_batch", moved <= 1e-3, detail, {"d": moved})


def _repeatable(session: Session) -> Check:
    """A randomised model must be attacked in expectation (EOT), which T2 does not do."""
    target = session.view(session.default)
    index = _some(session, torch.ones(len(session.labels), dtype=torch.bool), "repeat")
    images = session.images[index].to(session.device)
    with torch.no_grad(), frozen(target):
        moved = float((target(images) - target(images)).abs().max())
    return Check("no_randomness", moved <= 1e-4, f"the same images twice: logits differ by {moved:.2g}", {"d": moved})


def _square(session: Session) -> Check:
    """Square uses no gradient and comes last: whatever it still breaks, the gradients did not show."""
    row = session.default
    squares = [example for example in session.examples if (example.algorithm, example.target) == ("square", row.name)]
    wrong = torch.zeros(len(session.labels), dtype=torch.bool)
    for example in squares:
        wrong |= example.attacked & (row.answer(example.logits).argmax(-1) != session.labels)
    share = int(wrong.sum()) / session.count(T2)
    passed = share <= MOVED or int(wrong.sum()) <= 1
    detail = f"Square breaks {100 * share:.1f} points more of {row.name} than all gradient attacks"
    return Check("square_not_stronger", passed, detail, {"moved": share})


def _noise_within_budget(session: Session) -> Check:
    """Images that survived the white-box attacks must survive random noise of the same size."""
    row = session.default
    survivors = session.still_right(row)
    index = _some(session, survivors, "noise")
    target, noise = session.view(row), session.generator("diagnostics", "noise draws")
    images, labels = session.images[index], session.labels[index]
    broken = torch.zeros(len(index), dtype=torch.bool)
    with torch.no_grad(), frozen(target):
        for _ in range(NOISE_DRAWS if len(index) else 0):
            signs = torch.randint(2, images.shape, generator=noise) * 2.0 - 1
            largest = session.settings.epsilon * steepest(signs, session.settings.norm)
            noisy = (images + largest).clamp(0, 1).to(session.device)
            broken |= target(noisy).argmax(-1).cpu() != labels
    moved = int(survivors.sum()) / session.count(T2) * float(broken.float().mean()) if len(index) else 0.0
    passed = moved <= MOVED or int(broken.sum()) <= 1
    detail = f"{NOISE_DRAWS} draws of random noise take {100 * moved:.1f} points more from {row.name} than T2 did"
    return Check("noise_not_stronger_than_t2", passed, detail, {"moved": moved, "n": float(len(index))})


def _attempts(records: Records, threat: ThreatModel) -> list[Attempt]:
    return [attempt for attempt in records.attempts if attempt.threat == threat.key and not attempt.control]


def _accuracy_under_best(records: Records, threat: ThreatModel, model: str) -> float:
    """Accuracy of a row under the strongest single attack of a threat model."""
    return min(float(records.right(model, attempt).float().mean()) for attempt in _attempts(records, threat))


def _noise_weaker(records: Records, threat: ThreatModel, model: str) -> Check:
    """Random noise of the same size must hurt the model that the attack was made on less than the attack does."""
    noise = next(attempt for attempt in records.attempts if attempt.threat == threat.key and attempt.control)
    under_noise = float(records.right(model, noise).float().mean())
    under_attack = _accuracy_under_best(records, threat, model)
    best = f"{100 * under_attack:.1f} % under the best {threat} attack"
    detail = f"{model}: {100 * under_noise:.1f} % under {noise.attack}, {best}"
    passed = under_attack < under_noise or under_noise == 0
    name = f"noise_weaker_than_{threat.key.lower()}"
    return Check(name, passed, detail, {"noise": under_noise, "attack": under_attack})


def _public_attack_strong(records: Records, model: str) -> Check:
    """A perturbation made on the public encoder must hurt it more than one that was made on the branches' encoders."""
    best = {threat.key: _accuracy_under_best(records, threat, model) for threat in (T1, T1B)}
    public, family = best[T1.key], best[T1B.key]
    detail = f"{model}: {100 * public:.1f} % under the best T1 attack, {100 * family:.1f} % under T1b's"
    return Check("t1_not_weaker_than_t1b", public <= family + 2 * MOVED, detail, best)


def _nonzero_gradients(session: Session) -> Check:
    """The loss of each branch and of the fused answer must have a nonzero input gradient on nearly all images."""
    index = _some(session, torch.ones(len(session.labels), dtype=torch.bool), "gradients")
    values = {}
    for row in [*session.branch_rows, session.default]:
        target = session.view(row)
        with torch.enable_grad(), frozen(target):
            images = session.images[index].to(session.device).requires_grad_()
            margins = margin(target(images), session.labels[index].to(session.device))
            gradient = input_gradient(margins, images)
        flat = gradient.flatten(1).abs().amax(1) <= 1e-20
        values[row.name] = float(flat.float().mean())
    passed = all(share <= FLAT for share in values.values())
    shown = ", ".join(f"{name} {100 * share:.0f} %" for name, share in values.items())
    return Check("gradients", passed, f"images without any input gradient: {shown}", values)


def _more_steps(session: Session) -> Check:
    """A longer attack of other kinds must not break noticeably more of the images that survived T2, for any row.

    It takes so many of them that one point of accuracy is two images or more, or all there are.
    """
    factor = session.settings.diagnostics_factor
    found = {row.name: _broken_by_more(session, row) for row in _attacked_rows(session)}
    moved = {name: share for name, (share, count) in found.items()}
    # a single image may weigh more than a point: one image alone does not count
    failed = [name for name, (share, count) in found.items() if share > MOVED and count > 1]
    worst = max(moved, key=lambda name: moved[name]) if moved else session.default.name
    detail = (
        f"momentum PGD and targeted APGD with {factor} times the steps take {100 * moved[session.default.name]:.1f} "
        f"points more from {session.default.name} than T2 did, and at most {100 * moved[worst]:.1f} ({worst})"
    )
    values = {"moved": moved[session.default.name], "steps": float(session.settings.steps * factor)}
    return Check("more_steps", not failed, detail, {**values, **{f"moved:{name}": moved[name] for name in moved}})


def _attacked_rows(session: Session) -> list[Row]:
    return [row for row in attacked_rows(session) if row.name not in session.skipped_rows]


def _broken_by_more(session: Session, row: Row) -> tuple[float, int]:
    """The points of accuracy, and the images of the sample, that the longer attack takes from a row beyond T2."""
    settings, survivors = session.settings, session.still_right(row)
    held = int(survivors.sum()) / session.count(T2)
    needed = max(settings.diagnostics_n, math.ceil(2 * held / MOVED))
    index = _some(session, survivors, "more steps", needed)
    if len(index) == 0:
        return 0.0, 0
    left, steps, size, norm = index, settings.steps * settings.diagnostics_factor, settings.epsilon, settings.norm
    loss = "dlr" if _classes(session) >= 3 else "margin"
    for attack in (
        MomentumPGD(epsilon=size, norm=norm, steps=steps, loss=loss),
        APGD(epsilon=size, norm=norm, steps=steps, loss="targeted", targets=TARGETS),
    ):
        left = left[~_wrong(session, attack, left, f"more steps {type(attack).__name__} {row.name}", row)]
    broken = len(index) - len(left)
    return held * broken / len(index), broken


def _classes(session: Session) -> int:
    return int(session.clean.logits.shape[-1])


# checks that say nothing of a row under T2, or say it row by row
NOT_OF_T2 = ("more_steps", "robust_not_above_clean", "t1_not_weaker_than_t1b")


def verdicts(session: Session, checks: Sequence[Check]) -> dict[str, str]:
    """Return for each row what the diagnostics say of its accuracy under T2; empty where T2 did not run."""
    if all(example.threat != T2.key for example in session.examples):
        return {}
    found = next((check.values for check in checks if check.name == "more_steps"), {})
    general = any(not check.passed for check in checks if check.name not in NOT_OF_T2)
    stated = {}
    for row in session.rows:
        moved = found.get(f"moved:{(session.equivalent_row(row) or row).name}")
        if row.name in session.skipped_rows:
            stated[row.name] = UPPER_BOUND
        elif not session.still_right(row).any():
            stated[row.name] = HELD  # no attack can leave fewer
        elif moved is None:
            stated[row.name] = NOT_CHECKED
        else:
            stated[row.name] = OVERESTIMATED if general or moved > MOVED else HELD
    return stated


def _sweep(session: Session) -> Check:
    """With a growing budget the accuracy must go to zero; otherwise gradients are masked."""
    every_image = torch.ones(len(session.labels), dtype=torch.bool)
    index, settings = _some(session, every_image, "sweep"), session.settings
    values = {}
    surviving = index
    for factor in SWEEP:
        epsilon = settings.epsilon * factor if settings.norm == "l2" else min(settings.epsilon * factor, 1.0)
        budget = budget_text(epsilon, settings.norm)
        attack = own_attack(session, "apgd", epsilon=epsilon, steps=settings.steps * settings.diagnostics_factor)
        wrong = _wrong(session, attack, surviving, f"sweep {budget}")
        surviving = surviving[~wrong]  # a larger budget breaks what a smaller one broke
        values[budget] = len(surviving) / len(index)
    last = list(values.values())[-1]
    shown = ", ".join(f"{100 * held:.0f} % at {name}" for name, held in values.items())
    return Check("budget_sweep", last <= VANISHED, f"{session.default.name} with a growing budget: {shown}", values)


def _transfer(session: Session) -> Check:
    """Examples transferred from branches must not break more images than the attack through the whole model."""
    row = session.default
    index = _some(session, session.still_right(row, threats=()), "transfer")
    if len(index) == 0:
        return Check("transfer_not_stronger", True, "no image is right without an attack", {})
    attack = own_attack(session, "pgd_momentum")
    own = _wrong(session, attack, index, "transfer")
    best, name = 0.0, "none"
    for example in session.examples:
        if example.threat == T2.key and bool(example.attacked[index].any()) and example.target != row.name:
            wrong = row.answer(example.logits).argmax(-1) != session.labels
            if float(wrong[index].float().mean()) > best:
                best, name = float(wrong[index].float().mean()), example.attack
    share = float(own.float().mean())
    passed = best <= share + MOVED or (best - share) * len(index) <= 1
    detail = f"on the same images {name} breaks {100 * best:.1f} %, the attack through {row.name} {100 * share:.1f} %"
    return Check("transfer_not_stronger", passed, detail, {"transfer": best, "white_box": share})


def _some(session: Session, mask: Tensor, purpose: str, most: int | None = None) -> Tensor:
    """At most ``most``, or ``diagnostics_n``, indices of a (n,) mask, drawn by the seed."""
    index = mask.nonzero()[:, 0]
    order = torch.randperm(len(index), generator=session.generator("diagnostics", purpose))
    return index[order[: most or session.settings.diagnostics_n]].sort().values


def _wrong(session: Session, attack: Attack, index: Tensor, purpose: str, row: Row | None = None) -> Tensor:
    """(k,) bool: under this attack a row, or the model as it ships, is wrong on the images at ``index``."""
    if len(index) == 0:
        return torch.zeros(0, dtype=torch.bool)
    target = session.view(row or session.default)
    attacked = attack_batches(session, attack, target, index, purpose)
    with torch.no_grad():
        parts = attacked.split(session.settings.batch_size)
        answers = torch.cat([target(part.to(session.device)).argmax(-1).cpu() for part in parts])
    return answers != session.labels[index]
