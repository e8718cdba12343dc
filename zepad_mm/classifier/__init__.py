"""Robust zero-shot classification with the interface of transformers' pipeline."""

from zepad_mm.classifier.classifier import ON_ADVERSARIAL, RobustZeroShotClassifier, Task
from zepad_mm.classifier.images import MAX_PIXELS, pixels_of

__all__ = ["MAX_PIXELS", "ON_ADVERSARIAL", "RobustZeroShotClassifier", "Task", "pixels_of"]
