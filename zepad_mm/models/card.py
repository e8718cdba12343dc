"""The card of a saved model: what is known of it without an evaluation. Imports nothing heavy."""

from __future__ import annotations

from typing import Any

from zepad_mm.encoders.sources import repositories
from zepad_mm.models.config import LEAST_GAIN, MeasuredEffect, ZePADConfig
from zepad_mm.utils.hub import card_text
from zepad_mm.utils.text import budget_text, percent

GENERATED = "<!-- written with the model, and again at each save; remove this line to keep a text of your own -->"
PLACEHOLDER = "owner/name"  # stands in a card for the name it is published under


def short_card(config: ZePADConfig) -> str:
    """A card without results; :func:`zepad_mm.evaluation.model_card.write_card` writes the one with them."""
    body = f"""\
{GENERATED}
# ZePAD over `{config.public_source}`

{describe_model(config)}

Not evaluated yet: run `zepad evaluate`, then `zepad card` writes a card from its report.

```python
from zepad_mm import ZePAD

model = ZePAD.from_pretrained("{PLACEHOLDER}")
```
"""
    return card_text(body, **card_metadata(config))


def card_metadata(config: ZePADConfig) -> dict[str, Any]:
    """What the Hub finds a model by."""
    task = "zero-shot-image-classification" if config.zero_shot else "image-classification"
    tags = ["adversarial-robustness", "zepad", *(["clip"] if config.zero_shot else [])]
    bases = repositories(config.sources)
    return {"pipeline_tag": task, "tags": tags, **({"base_model": bases} if bases else {})}


def describe_model(config: ZePADConfig) -> str:
    """Branches, fusion and detector in Markdown."""
    lines = [
        f"| {b.name} | {b.role} | `{b.source}` | {config.revisions.get(b.source, '')[:12]} | {b.adaptation} "
        f"| {b.objective} |"
        for b in config.branches
    ]
    head = "| branch | role | base | commit of the base | adaptation | objective |\n|---|---|---|---|---|---|\n"
    untuned = ", ".join(branch.name for branch in config.branches if branch.untuned)
    warning = f"**Untuned: {untuned}.** On validation no tuned weights were better than the public ones."
    if config.nothing_tuned:
        warning += " No robust branch is tuned: this model defends against nothing."
    policy = f" (policy `{config.policy}`)" if config.policy_caps else ""
    table = head + "\n".join(lines) + f"\n\nFusion: `{config.fusion}` {config.rule_params}{policy}. "
    effect = "" if config.effect is None else f"\n\n{describe_effect(config.effect)}"
    return (f"{warning}\n\n" if untuned else "") + table + f"Detector: `{config.detector.score}`, advisory.{effect}"


def weakness_warning(config: ZePADConfig) -> str:
    """What to say of a model whose tuning kept public weights, or whose defence gains nothing; empty otherwise."""
    names = ", ".join(branch.name for branch in config.branches if branch.untuned)
    if not names:
        if config.effect is None or not config.effect.is_none:
            return ""
        advice = "Tune for more steps, at another rate (train.lr_encoder) or on more images"
        return f"{describe_effect(config.effect)} {advice}"
    what = "NOTHING WAS TUNED, the model is not defended" if config.nothing_tuned else "not every branch was tuned"
    return (
        f"{what}: on validation no tuned weights of {names} were better than the public ones. Tune for more steps, at "
        "another rate (train.lr_encoder) or a smaller epsilon, or on more images"
    )


def describe_effect(effect: MeasuredEffect) -> str:
    """What the defence gained where it was made, in a sentence."""
    gain = f"{percent(effect.defended)} % right with the defence, {percent(effect.undefended)} % without it"
    where = f"{effect.n} validation images under a universal perturbation at {budget_text(effect.epsilon, 'linf')}"
    none = f" The defence has no effect: expected at least {100 * LEAST_GAIN:.0f} points more."
    return f"On {where}: {gain}.{none if effect.is_none else ''}"
