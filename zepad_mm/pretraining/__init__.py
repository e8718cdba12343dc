"""Self-supervised pre-training: the paper's eleven methods and two more, one class each (extra: ``ssl``)."""

from zepad_mm.pretraining.augmentation import augment
from zepad_mm.pretraining.base import METHODS, Learner, MethodSettings, make_learner, probe
from zepad_mm.pretraining.checkpoint import load_state, save_encoder, save_state
from zepad_mm.pretraining.contrastive import NNCLR, MoCoV2Plus, MoCoV3, SimCLR, SupCon, SwAV
from zepad_mm.pretraining.distillation import BYOL, DINO, ReSSL
from zepad_mm.pretraining.redundancy import WMSE, BarlowTwins, VIbCReg, VICReg

__all__ = [
    "BYOL",
    "DINO",
    "METHODS",
    "NNCLR",
    "WMSE",
    "BarlowTwins",
    "Learner",
    "MethodSettings",
    "MoCoV2Plus",
    "MoCoV3",
    "ReSSL",
    "SimCLR",
    "SupCon",
    "SwAV",
    "VICReg",
    "VIbCReg",
    "augment",
    "load_state",
    "make_learner",
    "probe",
    "save_encoder",
    "save_state",
]
