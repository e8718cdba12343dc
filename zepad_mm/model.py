"""ZePAD: branches, the rule that fuses them, and the detector; one module that any attack library can attack whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor, nn

from zepad_mm import __version__
from zepad_mm.branch import Branch, BranchConfig
from zepad_mm.checks import check_images, check_names
from zepad_mm.config import Config
from zepad_mm.encoders import (
    Encoder,
    TextEncoder,
    fingerprint,
    has_lora,
    load_clip,
    load_encoder,
    load_lora,
    what_changed,
)
from zepad_mm.files import read_json, read_tensors, write_json, write_tensors
from zepad_mm.fusion import Decision, Fusion, build
from zepad_mm.heads import HEADS, zero_shot_head
from zepad_mm.prompts import templates_of

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "zepad"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class DetectorConfig(Config):
    """When an input is called adversarial."""

    score: str = "jensen_shannon"  # a name of zepad_mm.detection.SCORES
    threshold: float | None = None  # from clean validation images; None: scores are given, nothing is flagged
    false_positive_rate: float = 0.05  # share of clean validation images above the threshold


@dataclass(frozen=True, kw_only=True)
class ZePADConfig(Config):
    """All of a defended model but its weights."""

    public_source: str  # the encoder that is defended, and that a T1 attacker knows
    branches: tuple[BranchConfig, ...]
    class_names: tuple[str, ...]
    prompts: tuple[str, ...] = ("a photo of a {}.",)  # templates of the zero-shot heads
    fusion: str = "bounded_benign"  # a name of zepad_mm.fusion.RULES
    fusion_params: dict[str, Any] = field(default_factory=dict)  # constants of the rule; missing ones are its defaults
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    storage_dtype: str = "float32"  # of the saved weights: "float32" or "float16"
    fingerprint: tuple[float, ...] = ()  # logits of a fixed picture, checked on load
    encoders: dict[str, Any] = field(default_factory=dict)  # fingerprint of each branch's encoder: says what changed
    version: str = __version__  # of zepad-mm that wrote it
    format: int = FORMAT

    def __post_init__(self) -> None:
        check_names([branch.name for branch in self.branches], "branch names")
        check_names(self.class_names)
        if self.storage_dtype not in ("float32", "float16"):
            raise ValueError(f"storage_dtype: expected 'float32' or 'float16', got {self.storage_dtype!r}")
        if self.format != FORMAT:
            raise ValueError(f"the model is of format {self.format}, this zepad-mm reads {FORMAT}; upgrade zepad-mm")


GENERATED = "<!-- written with the model, and again at each save; remove this line to keep a text of your own -->"


class ZePAD(nn.Module, ModelHubMixin, library_name="zepad-mm", tags=["adversarial-robustness", "clip"]):
    """A defended classifier.

    ``model(images)`` gives fused logits, differentiable through every branch, so that third-party attacks see the
    whole defence; ``model.decide(images)`` gives the evidence.

    Args:
        config: what it is made of.
        branches: in the order of ``config.branches``.
    """

    def __init__(self, config: ZePADConfig, branches: Sequence[Branch]) -> None:
        super().__init__()
        names = [branch.name for branch in branches]
        if names != [branch.name for branch in config.branches]:
            raise ValueError(f"branches: expected {[b.name for b in config.branches]} as in the config, got {names}")
        self.config = config
        self.branches = nn.ModuleDict({branch.name: branch for branch in branches})
        self.fusion = build(config.fusion, self.benign, config.detector.score, config.fusion_params)
        self.sharing: Callable[[], Any] = nullcontext  # around all branches; zepad_mm.sharing puts shared trunks there
        self._lazy: dict[str, Any] = {}  # what is loaded on demand and is no part of the defence
        self.eval()

    # ---- inference -------------------------------------------------------------------------------------------

    @property
    def benign(self) -> tuple[bool, ...]:
        """For each branch whether it is a benign (BMP) one."""
        return tuple(branch.role == "bmp" for branch in self.config.branches)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.config.class_names

    def branch(self, name: str) -> Branch:
        """A branch by name. Raises ValueError that lists the names."""
        if name not in self.branches:
            raise ValueError(f"no branch {name!r}; this model has {', '.join(self.branches)}")
        branch = self.branches[name]
        assert isinstance(branch, Branch)
        return branch

    def branch_logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to the logits of each branch (N, B, C)."""
        check_images(images)
        with self.sharing():
            return torch.stack([branch(images) for branch in self.branches.values()])

    def fuse(self, branch_logits: Tensor) -> Decision:
        """(N, B, C) to a :class:`Decision` by the model's rule."""
        return self.fusion(branch_logits)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to fused logits (B, C)."""
        return self.fuse(self.branch_logits(images)).logits

    @torch.no_grad()
    def decide(self, images: Tensor) -> Decision:
        """Fused logits with weights, confidences and the suspicion score; no gradients."""
        return self.fuse(self.branch_logits(images))

    def is_adversarial(self, decision: Decision) -> Tensor:
        """(B,) bool: whose score exceeds the threshold; all False where none was set."""
        threshold = self.config.detector.threshold
        if threshold is None:
            return torch.zeros_like(decision.dae_score, dtype=torch.bool)
        return decision.dae_score > threshold

    # ---- what it defends -------------------------------------------------------------------------------------

    @property
    def undefended(self) -> Branch:
        """The public encoder with its own head, as it was before the defence: what a T1 attacker knows.

        Raises ValueError for a model without zero-shot heads until :meth:`set_undefended`.
        """
        if "undefended" not in self._lazy:
            if any(branch.head != "zero_shot" for branch in self.config.branches):
                raise ValueError(
                    "the undefended encoder has no head for this task; give one: "
                    "model.set_undefended(Branch(BranchConfig(name='undefended', ...), encoder, head))"
                )
            encoder, text = self._clip()
            config = BranchConfig(name="undefended", role="bmp", source=self.config.public_source)
            head = zero_shot_head(text, self.class_names, self.config.prompts)
            self._lazy["undefended"] = Branch(config, encoder, head).eval().to(self.device)
        return self._lazy["undefended"]

    def set_undefended(self, branch: Branch) -> ZePAD:
        """Say what the undefended model is, in place: for models whose heads were trained."""
        self._lazy["undefended"] = branch.eval().to(self.device)
        return self

    @property
    def text(self) -> TextEncoder:
        """The text tower of the public CLIP. Raises ValueError when the public encoder is no CLIP."""
        return self._clip()[1]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def set_classes(self, class_names: Sequence[str], prompts: str | Sequence[str] | None = None) -> ZePAD:
        """Point the zero-shot heads at other classes, in place: another task without any training.

        Raises:
            ValueError: empty or double names, a bad template, or a branch whose head was trained.
        """
        names = tuple(check_names(class_names))
        templates = templates_of(self.config.prompts if prompts is None else prompts)
        trained = [branch.name for branch in self.config.branches if branch.head != "zero_shot"]
        if trained:
            raise ValueError(f"the heads of {', '.join(trained)} were trained for {len(self.class_names)} classes")
        if names == self.class_names and templates == self.config.prompts:
            return self
        embeddings = self.text.class_embeddings(names, templates)
        for branch in self.branches.values():
            scale = branch.head.logit_scale.item()  # type: ignore[union-attr, operator]
            branch.head = HEADS.get("zero_shot").from_embeddings(embeddings, scale).to(self.device)  # type: ignore[attr-defined]
        self.config = replace(self.config, class_names=names, prompts=templates, fingerprint=())
        self._lazy.pop("undefended", None)
        return self

    def set_fusion(self, rule: str, **params: Any) -> ZePAD:
        """Change the fusion rule, in place. Raises ValueError for an unknown rule or constant."""
        self.fusion = build(rule, self.benign, self.config.detector.score, params)
        self.config = replace(self.config, fusion=rule, fusion_params=params)
        return self

    def set_detector(self, detector: DetectorConfig) -> ZePAD:
        """Change the detector, in place."""
        self.fusion = Fusion(self.fusion.rule, self.benign, detector.score)
        self.config = replace(self.config, detector=detector)
        return self

    def _clip(self) -> tuple[Encoder, TextEncoder]:
        if "clip" not in self._lazy:
            encoder, text = load_clip(self.config.public_source)
            self._lazy["clip"] = (encoder.to(self.device), text.to(self.device))
        return self._lazy["clip"]

    # ---- on disk ---------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> ZePAD:  # type: ignore[override]
        """Load a defended model: ``"embedded"``, a folder, or a name on the Hub.

        Args:
            pretrained_model_name_or_path: see above.
            kwargs: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download`` of the Hub.

        Raises:
            FileNotFoundError: a file is missing; ValueError: a damaged or mismatched one.
        """
        name = str(pretrained_model_name_or_path)
        if name == "embedded":
            name = str(EMBEDDED_MODEL)
            if not (EMBEDDED_MODEL / "config.json").is_file():
                raise FileNotFoundError(f"{EMBEDDED_MODEL} is empty; rebuild it with scripts/build_embedded_zepad.py")
        elif Path(name).is_dir() and not (Path(name) / "config.json").is_file():
            raise FileNotFoundError(f"{name}/config.json does not exist; expected a folder by ZePAD.save_pretrained")
        if Path(name).is_dir():
            read_json(Path(name) / "config.json")  # the mixin reads it too, but names no file when it is damaged
        return super().from_pretrained(name, **kwargs)

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **injected: Any,
    ) -> ZePAD:
        unknown = sorted(set(injected) - {"config", "branches"})  # those two the mixin puts in from config.json
        if unknown:
            raise ValueError(f"from_pretrained has no argument {', '.join(unknown)}")
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                    allow_patterns=["config.json", "model.safetensors", "branches/*", "README.md"],
                )
            )
        config = ZePADConfig.from_dict(read_json(folder / "config.json"))
        tensors, _ = read_tensors(folder / "model.safetensors")
        bases: dict[str, Encoder] = {}
        branches = [_build_branch(branch, config, folder, tensors, bases) for branch in config.branches]
        model = cls(config, branches)
        model._load_strictly(tensors, folder)
        model._check_fingerprint(folder)
        return model

    def _save_pretrained(self, save_directory: Path) -> None:
        card = save_directory / "README.md"
        if card.is_file() and GENERATED in card.read_text(encoding="utf-8"):
            card.unlink()  # of the model that was here before; the mixin writes none where one lies
        dtype = getattr(torch, self.config.storage_dtype)
        tensors = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in self._trained()}
        for branch in self.branches.values():
            assert isinstance(branch, Branch)
            if branch.config.adaptation == "lora":
                _save_adapter(branch, save_directory / "branches" / branch.name, dtype)
        write_tensors(save_directory / "model.safetensors", tensors, {"format": "pt"})
        logits = [round(value, 5) for value in self._fingerprint_with(dtype)]
        # last, so that a save that was cut off is seen as no model at all
        encoders = {name: fingerprint(branch.encoder).to_dict() for name, branch in self.branches.items()}  # type: ignore[arg-type]
        record = {**self.config.to_dict(), "fingerprint": logits, "encoders": encoders}
        write_json(save_directory / "config.json", record)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> Any:
        """A short card; the full one, with figures, is written from an evaluation record."""
        from huggingface_hub import ModelCard

        rows = "\n".join(
            f"| {b.name} | {b.role} | `{b.source}` | {b.adaptation} | {b.objective} |" for b in self.config.branches
        )
        return ModelCard(
            "---\nlibrary_name: zepad-mm\ntags: [adversarial-robustness, clip, zero-shot-image-classification]\n---\n"
            f"{GENERATED}\n# ZePAD over `{self.config.public_source}`\n\n"
            "| branch | role | base | adaptation | objective |\n|---|---|---|---|---|\n"
            f"{rows}\n\nFusion: `{self.config.fusion}` {self.config.fusion_params}. "
            f"Detector: `{self.config.detector.score}`, advisory.\n\n"
            "```python\nfrom zepad_mm import ZePAD\n\nmodel = ZePAD.from_pretrained(...)\n```\n"
        )

    def _trained(self) -> list[tuple[str, Tensor]]:
        """What belongs into model.safetensors: heads, and encoders that were tuned in full."""
        pairs: list[tuple[str, Tensor]] = []
        for name, branch in self.branches.items():
            parts: Mapping[str, nn.Module] = {"head": branch.head}  # type: ignore[dict-item]
            if branch.config.adaptation == "full":  # type: ignore[union-attr]
                parts = {**parts, "encoder": branch.encoder}  # type: ignore[dict-item]
            for part, module in parts.items():
                pairs += [(f"branches.{name}.{part}.{key}", tensor) for key, tensor in module.state_dict().items()]
        return pairs

    def _load_strictly(self, tensors: dict[str, Tensor], folder: Path) -> None:
        expected = dict(self._trained())
        missing, unexpected = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        wrong = [key for key in set(expected) & set(tensors) if expected[key].shape != tensors[key].shape]
        for problem, keys in (("lacks", missing), ("has the unexpected", unexpected), ("has other shapes for", wrong)):
            if keys:
                raise ValueError(
                    f"{folder / 'model.safetensors'} {problem} {', '.join(keys[:3])}"
                    f"{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}; it does not belong to its config.json"
                )
        with torch.no_grad():
            for key, tensor in expected.items():
                tensor.copy_(tensors[key])

    def _fingerprint(self) -> list[float]:
        """Logits of a fixed picture, up to 8 classes per branch: catches another activation or preprocessing."""
        grid = torch.linspace(0, 1, 48)
        picture = torch.stack(
            [grid.view(-1, 1) * grid, 1 - grid.view(-1, 1).expand(48, 48), (grid * 6).sin().abs().expand(48, 48)]
        )
        with torch.no_grad():
            return self.branch_logits(picture[None].to(self.device))[:, 0, :8].flatten().tolist()

    def _fingerprint_with(self, dtype: torch.dtype) -> list[float]:
        """The fingerprint that the saved weights will give once they are read back."""
        if dtype == torch.float32:
            return self._fingerprint()
        rounded = copy.deepcopy(self)
        with torch.no_grad():
            for branch in rounded.branches.values():
                trained_only = branch.config.adaptation == "full"  # type: ignore[union-attr]
                for key, tensor in branch.state_dict().items():
                    if tensor.is_floating_point() and (trained_only or "lora_" in key or key.startswith("head.")):
                        tensor.copy_(tensor.to(dtype))
        return rounded._fingerprint()

    def _check_fingerprint(self, folder: Path) -> None:
        if not self.config.fingerprint:
            return
        expected, got = torch.tensor(self.config.fingerprint), torch.tensor(self._fingerprint())
        close = expected.shape == got.shape and torch.allclose(expected, got, rtol=1e-2, atol=2e-2)
        causes = what_changed(self.config.encoders, {name: self.branch(name).encoder for name in self.branches})
        if not close or causes:
            gap = float((expected - got).abs().max()) if expected.shape == got.shape else float("nan")
            causes = causes or "its base has other weights, activations (QuickGELU?), mean, std or interpolation"
            raise ValueError(
                f"{folder}: the loaded model answers a fixed picture differently than the saved one (by {gap:.3g} in "
                f"the logits): {causes}; check "
                f"{', '.join(sorted({branch.source for branch in self.config.branches}))}"
            )


def _build_branch(
    config: BranchConfig, model: ZePADConfig, folder: Path, tensors: dict[str, Tensor], bases: dict[str, Encoder]
) -> Branch:
    """The branch around its base encoder; the trained weights are filled in later, strictly."""
    if config.source not in bases:
        bases[config.source] = load_encoder(config.source)
    encoder = copy.deepcopy(bases[config.source])
    if config.adaptation == "lora":
        load_lora(encoder, folder / "branches" / config.name)
    head = HEADS.get(config.head)(encoder.feature_dim, len(model.class_names))
    return Branch(config, encoder, head).eval()


def _save_adapter(branch: Branch, folder: Path, dtype: torch.dtype) -> None:
    """The adapter in peft's own layout, so that peft alone can load it."""
    if not has_lora(branch.encoder):
        raise ValueError(f"branch {branch.name!r} is declared as LoRA but its encoder has no adapter")
    backbone: Any = branch.encoder.backbone
    # save_embedding_layers: there are none, and "auto" asks the Hub for a text model's vocabulary
    backbone.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty template
    weights = folder / "adapter_model.safetensors"
    tensors, metadata = read_tensors(weights)
    write_tensors(weights, {key: tensor.to(dtype) for key, tensor in tensors.items()}, metadata)
