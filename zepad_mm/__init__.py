"""zepad-mm: defend pre-trained image encoders against downstream-agnostic adversarial examples.

The public names are loaded on first use, so that ``import zepad_mm`` stays cheap: it imports neither torch nor
transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from zepad_mm.classifier import RobustZeroShotClassifier
    from zepad_mm.encoders import load_encoder
    from zepad_mm.evaluation import evaluate
    from zepad_mm.models.zepad import ZePAD

_HOMES = {
    "RobustZeroShotClassifier": "zepad_mm.classifier",
    "ZePAD": "zepad_mm.models.zepad",
    "evaluate": "zepad_mm.evaluation",
    "load_encoder": "zepad_mm.encoders",
}

__all__ = ["RobustZeroShotClassifier", "ZePAD", "__version__", "evaluate", "load_encoder"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'zepad_mm' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
