"""The card of a saved model: what is known of it without an evaluation. Imports nothing heavy."""

from __future__ import annotations

from typing import Any

from zepad_mm.encoders.sources import repositories
from zepad_mm.models.config import ZePADConfig
from zepad_mm.utils.hub import card_text

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
    return (f"{warning}\n\n" if untuned else "") + table + f"Detector: `{config.detector.score}`, advisory."
