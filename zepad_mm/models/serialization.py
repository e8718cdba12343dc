"""Saving and loading of defended models: what was trained, and references to the base encoders.

``config.json`` (what it is made of, and a fingerprint of its answers), ``model.safetensors`` (heads, encoders tuned in
full, the gate), ``branches/NAME/`` (adapters, loadable by peft alone).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zepad_mm.encoders import Encoder, has_lora, load_encoder, load_lora
from zepad_mm.encoders.fingerprint import describe_changes, fingerprint
from zepad_mm.encoders.lora import check_saved_adapter
from zepad_mm.encoders.sources import BACKENDS
from zepad_mm.encoders.state_dict import load_state_dict_strict
from zepad_mm.models.branch import Branch
from zepad_mm.models.card import GENERATED, short_card
from zepad_mm.models.config import CONFIG, BranchConfig, ZePADConfig
from zepad_mm.models.gate import FeatureGate, gate_for
from zepad_mm.models.heads import HEADS
from zepad_mm.utils.atomic import complete_folder, replacing_folder
from zepad_mm.utils.hub import Access, fetch
from zepad_mm.utils.io import ASSETS, read_json, read_tensors, write_json, write_tensors, write_text
from zepad_mm.utils.locks import output_folder
from zepad_mm.utils.registry import did_you_mean, shorten
from zepad_mm.utils.wrappers import unwrapped

EMBEDDED_MODEL = ASSETS / "zepad"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
WEIGHTS, ADAPTERS, CARD = "model.safetensors", "branches", "README.md"


def find_model_folder(name: str | Path, revision: str | None, access: Access) -> Path:
    """The folder of a model: the embedded one, one on this disk, or one fetched from the Hub.

    Raises:
        FileNotFoundError: there is none; ValueError: a revision of what has none; else as ``hub.fetch``.
    """
    if not isinstance(name, str | Path) or not str(name):
        raise ValueError(f"model: expected 'embedded', a folder, or owner/name on the Hub, got {shorten(name)}")
    name = str(name)
    if url := re.match(r"https?://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", name):
        raise ValueError(f"{shorten(name)} is the address of a page; write {url[1]!r}")
    if name != "embedded" and not Path(name).is_dir():
        kind, _, rest = name.partition(":")
        known = [f"{known}:{rest}" for known in BACKENDS] if rest else ["embedded"]
        if rest and kind in BACKENDS:
            raise ValueError(
                f"{name!r} is an encoder without a defence; expected a defended model: zepad defend {name} --out "
                f"FOLDER makes one, and zepad evaluate {name} evaluates it as it is"
            )
        hint = "" if "/" in kind else did_you_mean(name, known)
        if hint or "/" not in name:  # before the Hub is asked for it
            raise FileNotFoundError(f"{name!r} is neither a folder here nor a name on the Hub (owner/name){hint}")
        files = (CONFIG, WEIGHTS, f"{ADAPTERS}/*", "README.md")
        try:
            return fetch(name, files, required=(CONFIG, WEIGHTS), revision=revision, access=access)
        except (FileNotFoundError, PermissionError, ConnectionError) as error:
            if revision is None and HUB_NAME.fullmatch(name):  # it may be meant as a path
                raise type(error)(f"{error}. As a folder: there is no {name!r} here") from None
            raise
    if revision is not None:
        raise ValueError(f"revision: {name} is no repository on the Hub and has no revisions; leave revision out")
    if name == "embedded":
        if not (EMBEDDED_MODEL / CONFIG).is_file():
            raise FileNotFoundError(f"{EMBEDDED_MODEL} is empty; rebuild it with tools/build_zepad.py")
        return EMBEDDED_MODEL
    complete_folder(name)
    if not (Path(name) / CONFIG).is_file():
        raise FileNotFoundError(f"{name}/{CONFIG} does not exist; expected a folder by ZePAD.save_pretrained")
    return Path(name)


def read_model(folder: Path, access: Access) -> tuple[ZePADConfig, list[Branch], FeatureGate | None]:
    """The branches and the gate as they were saved, around base encoders of the recorded revisions.

    Raises:
        ValueError: damaged, mismatched, or a fingerprint that differs from the saved one; else as ``hub.fetch``.
    """
    config = ZePADConfig.from_dict(read_json(folder / CONFIG))
    tensors, _ = read_tensors(folder / WEIGHTS)
    bases: dict[str, Encoder] = {}
    branches = {branch.name: _build_branch(branch, config, folder, bases, access) for branch in config.branches}
    hint = f"it does not belong to its {CONFIG}"
    gate = None
    if config.gate is not None:
        widths = [branch.encoder.feature_dim for branch in branches.values()]
        gate = gate_for(widths, config.benign, config.gate).eval()
    load_state_dict_strict(dict(_trained_tensors(branches, gate)), tensors, str(folder / WEIGHTS), hint)
    _check_fingerprint(config, branches, gate, folder)
    return config, list(branches.values()), gate


def write_model(
    folder: str | Path,
    config: ZePADConfig,
    branches: Mapping[str, Branch],
    gate: FeatureGate | None = None,
    card: str | None = None,
) -> None:
    """Write what was trained and a card. The folder holds the old model whole or the new one whole at any moment.

    A card that a user wrote is kept. Compiled or parallel modules are written under their plain names.
    """
    with unwrapped(*branches.values()):
        _write_model(output_folder(folder), config, branches, gate, card)


def _write_model(
    folder: Path, config: ZePADConfig, branches: Mapping[str, Branch], gate: FeatureGate | None, card: str | None
) -> None:
    dtype = getattr(torch, config.storage_dtype)
    tensors = {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for key, tensor in _trained_tensors(branches, gate)
    }
    logits = [round(value, 5) for value in _fingerprint_with(branches, gate, dtype)]
    encoders = {name: fingerprint(branch.encoder).to_dict() for name, branch in branches.items()}
    complete_folder(folder)
    with replacing_folder(folder) as staged:
        for branch in branches.values():
            if branch.config.adaptation != "lora" and has_lora(branch.encoder):
                raise ValueError(
                    f"branch {branch.name!r} is declared as {branch.config.adaptation!r}, but its encoder has an "
                    "adapter; declare it as 'lora', or write merge_lora(branch.encoder) where it was tuned in full"
                )
            if branch.config.adaptation == "lora":
                _save_adapter(branch, staged / ADAPTERS / branch.name, dtype)
        write_tensors(staged / WEIGHTS, tensors, {"format": "pt"})
        write_json(staged / CONFIG, {**config.to_dict(), "fingerprint": logits, "encoders": encoders})
        if not _has_own_card(folder):
            write_text(staged / CARD, short_card(config) if card is None else card)


def _has_own_card(folder: Path) -> bool:
    """Whether a user wrote the card; one that was generated is replaced with the model that it describes."""
    card = folder / CARD
    return card.is_file() and GENERATED not in card.read_text(encoding="utf-8", errors="replace")


def check_float32(model: nn.Module, done: str) -> None:
    """Raise ValueError for a model that was cast to another type: its rounded weights are not those that are kept."""
    types = sorted({str(parameter.dtype) for parameter in model.parameters()} - {"torch.float32"})
    if types:
        raise ValueError(
            f"the model has weights in {', '.join(types)}; models are {done} in float32: load it without a cast, or "
            "write model.to(torch.float32) first, which keeps the rounded weights"
        )


def _build_branch(
    config: BranchConfig, model: ZePADConfig, folder: Path, bases: dict[str, Encoder], access: Access
) -> Branch:
    """The branch around its base encoder; the trained weights are filled in later, strictly."""
    if config.source not in bases:
        revision = model.revisions.get(config.source)
        bases[config.source] = load_encoder(config.source, revision=revision, access=access)
    encoder = copy.deepcopy(bases[config.source])
    if config.adaptation == "lora":
        load_lora(encoder, folder / ADAPTERS / config.name)
    head = HEADS.get(config.head)(encoder.feature_dim, len(model.class_names))
    return Branch(config, encoder, head).eval()


def _save_adapter(branch: Branch, folder: Path, dtype: torch.dtype) -> None:
    """The adapter in peft's own layout, so that peft alone can load it."""
    if not has_lora(branch.encoder):
        raise ValueError(f"branch {branch.name!r} is declared as LoRA but its encoder has no adapter")
    check_saved_adapter(branch.encoder)
    backbone: Any = branch.encoder.backbone
    # save_embedding_layers: there are none, and "auto" asks the Hub for a text model's vocabulary
    backbone.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty template
    weights = folder / "adapter_model.safetensors"
    tensors, metadata = read_tensors(weights)
    write_tensors(weights, {key: tensor.to(dtype) for key, tensor in tensors.items()}, metadata)


def _trained_tensors(branches: Mapping[str, Branch], gate: FeatureGate | None) -> list[tuple[str, Tensor]]:
    """What belongs into model.safetensors: heads, encoders that were tuned in full, and the gate."""
    pairs: list[tuple[str, Tensor]] = []
    for name, branch in branches.items():
        parts: dict[str, nn.Module] = {"head": branch.head}
        if branch.config.adaptation == "full":
            parts["encoder"] = branch.encoder
        for part, module in parts.items():
            pairs += [(f"branches.{name}.{part}.{key}", tensor) for key, tensor in module.state_dict().items()]
    return pairs + ([] if gate is None else [(f"gate.{key}", tensor) for key, tensor in gate.state_dict().items()])


def _fingerprint(branches: Sequence[Branch], gate: FeatureGate | None) -> list[float]:
    """Logits of a fixed image, up to 8 classes per branch, then the gate's: catches another activation or resizing."""
    grid = torch.linspace(0, 1, 48)
    image = torch.stack(
        [grid.view(-1, 1) * grid, 1 - grid.view(-1, 1).expand(48, 48), (grid * 6).sin().abs().expand(48, 48)]
    )
    device = next(branches[0].parameters()).device
    with torch.no_grad():
        features = [branch.encoder(image[None].to(device)) for branch in branches]
        logits = torch.stack([branch.logits(own) for branch, own in zip(branches, features, strict=True)])
        values = logits[:, 0, :8].flatten().tolist()
        return values if gate is None else [*values, float(gate.read(features, [b.role == "benign" for b in branches]))]


def _fingerprint_with(branches: Mapping[str, Branch], gate: FeatureGate | None, dtype: torch.dtype) -> list[float]:
    """The fingerprint that the saved weights will give once they are read back."""
    if dtype == torch.float32:
        return _fingerprint(list(branches.values()), gate)
    rounded = [copy.deepcopy(branch) for branch in branches.values()]
    with torch.no_grad():
        for branch in rounded:
            trained_only = branch.config.adaptation == "full"
            for key, tensor in branch.state_dict().items():
                if tensor.is_floating_point() and (trained_only or "lora_" in key or key.startswith("head.")):
                    tensor.copy_(tensor.to(dtype))
    return _fingerprint(rounded, None if gate is None else copy.deepcopy(gate).to(dtype))


def _check_fingerprint(
    config: ZePADConfig, branches: Mapping[str, Branch], gate: FeatureGate | None, folder: Path
) -> None:
    if not config.fingerprint:
        return
    expected, got = torch.tensor(config.fingerprint), torch.tensor(_fingerprint(list(branches.values()), gate))
    close = expected.shape == got.shape and torch.allclose(expected, got, rtol=1e-2, atol=2e-2)
    causes = describe_changes(config.encoders, {name: branch.encoder for name, branch in branches.items()})
    if not close or causes:
        causes = causes or "its base has other weights, activations (QuickGELU?), mean, std or interpolation"
        gap = float((expected - got).abs().max()) if expected.shape == got.shape else float("nan")
        bases = (f"{s} at {config.revisions[s][:12]}" if s in config.revisions else s for s in config.sources)
        raise ValueError(
            f"{folder}: the loaded model answers a fixed image differently than the saved one (by {gap:.3g} in "
            f"the logits): {causes}; check {', '.join(bases)}"
        )
