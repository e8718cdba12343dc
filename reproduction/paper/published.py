"""The paper's published results, for the column next to ours. Second-hand unless stated otherwise; accuracies in %."""

from __future__ import annotations

# setting -> (undefended, ZePAD); means over the eleven SSL methods
MAIN = {
    "BA, ImageNet to SVHN": (66.41, 94.59),
    "RA, CIFAR-10 to SVHN": (13.11, 86.97),
    "RA, ImageNet to SVHN": (12.79, 85.84),
    "RA, CIFAR-10 to STL-10": (None, 73.19),
    "RA, CIFAR-10 to ANIMALS-10": (None, 73.94),
}
LARGEST_GAIN = {"BA": 29.20, "RA": 73.86}  # the abstract's

# DINO pre-trained on CIFAR-10, tuned on CIFAR-10, tested on ANIMALS-10: BA, RA, ASR
ABLATION = {
    "undefended": (85.01, 35.46, 63.35),
    "without tuning": (90.84, 59.40, 38.89),
    "without the second MPAE encoder": (91.57, 70.35, 26.71),
    "without BMP": (84.51, 72.47, 19.36),
    "full, as the paper": (91.66, 74.71, 21.99),
}

# SimCLR pre-trained on ImageNet-100, tuned and tested on STL-10, AdvEncoder: BA, RA
BASELINES = {
    "undefended": (81.99, 35.58),
    "PGD-AT, its own head": (22.19, 19.04),
    "TRADES, its own head": (50.79, 50.66),
    "MART, its own head": (42.79, 42.36),
    "Gen-AF, both stages": (68.69, 62.28),
    "paper's": (82.07, 73.26),
}

DETECTION = {"C-C": 82.52, "C-S": 79.04}  # accuracy of the rule gap > 0.1: tuning set = task; ANIMALS-10

# every system, component and result of the paper: item, description, state here, where
STATE = (
    ("ZePAD", "the whole defence", "works", "`zepad_mm.ZePAD`, tables 1 to 7"),
    ("DAE", "downstream-agnostic adversarial example", "works", "thirteen attacks, `results/dae_attacks.md`"),
    ("Task-specific adversarial fine-tuning", "PGD-AT, TRADES, MART, Gen-AF", "works", "table 2"),
    ("One tuning for many tasks", "tuned once, then clean heads per task", "works", "table 1 S: four of five tasks"),
    ("MPAE-Branch", "two adversarially tuned encoders", "works", "table 3"),
    ("AdvAu models (Fig. S2)", "how many auxiliary encoders", "works", "table 5"),
    ("BMP-Branch", "benign encoder on local data", "works", "table 1; ours has one tuned with labels"),
    ("RFDM", "confidence-weighted logits", "works; not robust to a white-box attack", "tables 5, 6 and 6 S"),
    ("Sensitivity to data characteristics", "more confident where trained", "measured", "figure 2"),
    (
        "DAE detection from confidence",
        "gap > 0.1",
        "works as published; not as well; the gate does",
        "tables 7 and 7 S",
    ),
    ("Persistent robustness", "tuning set is not the task", "measured", "tables 1 and 1 S"),
    ("11 SSL methods", "pre-trained encoders", "works", "both zoos; table 1 S has all eleven"),
    (
        "6 data sets",
        "CIFAR-10, STL-10, ANIMALS-10, GTSRB, ImageNet-20, SVHN",
        "in part",
        "two available, two substitutes",
    ),
    ("+29.20 BA, +73.86 RA", "the abstract's gains", "not reached at this scale", "summary and table 1 S"),
    ("BA, RA, ASR", "metrics", "works", "all tables"),
    (
        "CLIP",
        "the idea on a CLIP",
        "works; tuning with labels forgets other class names, FARE keeps them",
        "tables 9 and 9 a",
    ),
    ("Fig. 1", "overview", "works", "README"),
    ("Fig. 2", "confidence distributions", "measured", "figure 2 below"),
    ("Fig. 3", "t-SNE", "measured", "figure 3 below"),
    ("Fig. S1", "white-box attack, four attacks", "measured", "tables 6 and 6 S"),
    ("Figs. S3, S4", "unknown content", "open", "their content is not known"),
    (
        "Full scale",
        "ResNet-18, 64 px, eleven victims, three seeds",
        "open",
        "needs a GPU; `reproduction/paper/full.yaml`",
    ),
)
