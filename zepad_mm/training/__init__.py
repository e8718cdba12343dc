"""Training: one loop for every tuning objective, heads and gates on frozen features, and what they leave on disk."""

from zepad_mm.training.artifacts import load_gate, load_head, load_tuned, write_gate, write_head, write_tuned
from zepad_mm.training.cost import CostEstimate, estimate_cost
from zepad_mm.training.dataloader import size_of
from zepad_mm.training.feature_cache import encode_images
from zepad_mm.training.gate import train_gate
from zepad_mm.training.gate_settings import GateSettings
from zepad_mm.training.heads import HeadResult, HeadSettings, fresh_head, train_head, train_head_on_features
from zepad_mm.training.loop import FitResult, fit
from zepad_mm.training.settings import DataSettings, TrainSettings
from zepad_mm.training.student import ADAPTATIONS, build_student, load_encoder_or_tuned
from zepad_mm.training.tune import Tuned, TuneSettings, make_student, tune
from zepad_mm.training.validation import Validation, validate
from zepad_mm.utils.distributed import make_accelerator

__all__ = [
    "ADAPTATIONS",
    "CostEstimate",
    "DataSettings",
    "FitResult",
    "GateSettings",
    "HeadResult",
    "HeadSettings",
    "TrainSettings",
    "TuneSettings",
    "Tuned",
    "Validation",
    "build_student",
    "encode_images",
    "estimate_cost",
    "fit",
    "fresh_head",
    "load_encoder_or_tuned",
    "load_gate",
    "load_head",
    "load_tuned",
    "make_accelerator",
    "make_student",
    "size_of",
    "train_gate",
    "train_head",
    "train_head_on_features",
    "tune",
    "validate",
    "write_gate",
    "write_head",
    "write_tuned",
]
