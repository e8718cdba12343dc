"""Tuned encoders, heads and gates on disk: weights or adapter, with the record of the tuning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from zepad_mm.encoders import Encoder, has_lora, load_encoder, load_lora
from zepad_mm.encoders.build_limits import BuildLimit
from zepad_mm.encoders.fingerprint import Fingerprint, differences, fingerprint
from zepad_mm.encoders.lora import check_saved_adapter
from zepad_mm.encoders.state_dict import load_state_dict_strict
from zepad_mm.models.gate import FeatureGate, GateConfig
from zepad_mm.models.heads import HEADS
from zepad_mm.utils.atomic import complete_folder, replacing_folder
from zepad_mm.utils.config import Config
from zepad_mm.utils.io import damage_of, parse_metadata, read_json, read_tensors, write_json, write_tensors
from zepad_mm.utils.provenance import origin
from zepad_mm.utils.registry import check_choice
from zepad_mm.utils.wrappers import unwrap, unwrapped

FORMAT = "zepad-mm tuned encoder 2"
HEAD_FORMAT = "zepad-mm head 1"
GATE_FORMAT = "zepad-mm gate 1"
TUNED_RECORD = "tuned.json"
WEIGHTS = "encoder.safetensors"
HEAD = "head.safetensors"
ADAPTER = "adapter"


@dataclass(frozen=True, kw_only=True)
class HeadAbout(Config):
    """What a file of a head says of it."""

    kind: str  # a name of zepad_mm.models.heads.HEADS
    feature_dim: int  # D, width of its input
    num_classes: int  # C
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feature_dim < 1 or self.num_classes < 1:
            raise ValueError(
                f"feature_dim and num_classes: expected at least 1, got {self.feature_dim} and {self.num_classes}"
            )


def write_tuned(
    folder: str | Path, encoder: Encoder, record: dict[str, Any], head: tuple[nn.Module, Sequence[str]] | None = None
) -> None:
    """Write what was trained: ``encoder.safetensors``, or for LoRA ``adapter/`` in peft's own layout; ``tuned.json``.

    The folder holds the old encoder whole or the new one whole at any moment.

    Args:
        folder: made if absent.
        encoder: from ``load_encoder``, tuned. Compiled or parallel modules are written under their plain names.
        record: JSON-able: defence, settings, data, metrics. Source, adaptation and provenance are added.
        head: a head that was trained along and its class names, for ``head.safetensors``.
    """
    encoder = cast(Encoder, unwrap(encoder))
    with unwrapped(encoder), replacing_folder(folder) as staged:
        adapted = has_lora(encoder)
        if adapted:
            check_saved_adapter(encoder)
            backbone: Any = encoder.backbone
            # save_embedding_layers: "auto" would ask the Hub for a text model's vocabulary
            backbone.save_pretrained(str(staged / ADAPTER), safe_serialization=True, save_embedding_layers=False)
        else:
            write_tensors(staged / WEIGHTS, dict(encoder.state_dict()), {"format": FORMAT, "source": encoder.source})
        if head is not None:
            write_head(staged / HEAD, *head)
        about = {
            "format": FORMAT,
            "source": encoder.source,
            "adaptation": "lora" if adapted else "full",
            "fingerprint": fingerprint(encoder).to_dict(),
            **origin(),
            **record,
        }
        write_json(staged / TUNED_RECORD, about)


def load_tuned(folder: str | Path) -> Encoder:
    """The encoder that :func:`write_tuned` wrote, in eval mode.

    Raises:
        FileNotFoundError: no such folder or file. ValueError: damaged, missing or unknown weights, or an encoder whose
            features differ from those when it was written (another base, preprocessing or activation).
    """
    folder = Path(folder)
    complete_folder(folder)
    if not (folder / TUNED_RECORD).is_file():
        raise FileNotFoundError(f"{folder / TUNED_RECORD} does not exist; expected a folder written by recipes/tune.py")
    about = read_json(folder / TUNED_RECORD)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{folder / TUNED_RECORD} is no {FORMAT!r}; it was written by another program or version")
    with damage_of(folder / TUNED_RECORD):
        source, adaptation, saved = about["source"], about["adaptation"], Fingerprint.from_dict(about["fingerprint"])
        check_choice("adaptation", adaptation, ("full", "lora"))
    if adaptation == "lora":
        encoder = load_lora(load_encoder(source), folder / ADAPTER)
    else:
        encoder = load_encoder(source, pretrained=False)
        tensors, _ = read_tensors(folder / WEIGHTS)
        load_state_dict_strict(encoder.state_dict(), tensors, str(folder / WEIGHTS), f"it does not fit {source}")
    causes = differences(saved, encoder, tolerance=2e-3)
    if causes:
        raise ValueError(
            f"{folder}: the encoder gives other features than when it was written: {'; '.join(causes)}. "
            f"Is {source} still the same model?"
        )
    return encoder.eval()


def write_head(path: str | Path, head: nn.Module, class_names: Sequence[str]) -> None:
    """Write a registered head with its kind, size and class names."""
    head = unwrap(head)
    kinds = [kind for kind in HEADS if type(head) is HEADS.get(kind)]
    if not kinds:
        raise ValueError(f"{type(head).__name__} is not registered in HEADS; known: {', '.join(HEADS)}")
    feature_dim, num_classes = _head_size(head)
    about = HeadAbout(kind=kinds[0], feature_dim=feature_dim, num_classes=num_classes, class_names=tuple(class_names))
    with unwrapped(head):
        write_tensors(path, dict(head.state_dict()), {"format": HEAD_FORMAT, "head": json.dumps(about.to_dict())})


def load_head(path: str | Path) -> tuple[nn.Module, tuple[str, ...]]:
    """A head in eval mode and the names of its classes. Raises ValueError for a damaged or foreign file."""
    complete_folder(Path(path).parent)
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != HEAD_FORMAT:
        raise ValueError(f"{path} is no {HEAD_FORMAT!r}")
    about = HeadAbout.from_dict(parse_metadata(metadata, "head", path))
    with damage_of(path), BuildLimit(str(path), [Path(path)]):
        head = HEADS.get(about.kind)(about.feature_dim, about.num_classes)
    load_state_dict_strict(head.state_dict(), tensors, str(path), f"it does not fit a {about.kind} head")
    return head.eval(), about.class_names


def write_gate(path: str | Path, gate: FeatureGate) -> None:
    """Write a gate with its configuration and the widths of the features that it reads."""
    about = {
        "benign_width": gate.benign_width,
        "robust_widths": list(gate.robust_widths),
        "config": gate.config.to_dict(),
    }
    write_tensors(path, dict(gate.state_dict()), {"format": GATE_FORMAT, "gate": json.dumps(about)})


def load_gate(path: str | Path) -> FeatureGate:
    """A gate in eval mode. Raises ValueError for a damaged or foreign file."""
    complete_folder(Path(path).parent)
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != GATE_FORMAT:
        raise ValueError(f"{path} is no {GATE_FORMAT!r}; write it with recipes/train_gate.py")
    about = json.loads(metadata["gate"])
    gate = FeatureGate(about["benign_width"], about["robust_widths"], GateConfig.from_dict(about["config"]))
    load_state_dict_strict(gate.state_dict(), tensors, str(path), "it does not fit its own configuration")
    return gate.eval().requires_grad_(False)


def _head_size(head: nn.Module) -> tuple[int, int]:
    linears = [module for module in head.modules() if isinstance(module, nn.Linear)]
    if linears:
        return linears[0].in_features, linears[-1].out_features
    text: Tensor = head.get_buffer("text")
    return text.shape[1], text.shape[0]
