"""Image models of transformers: CLIP and SigLIP with their text towers, DINO, ViT, MAE, ConvNeXt, ResNet and their kin.

``hf:org/name``, ``hf:org/name@revision`` or ``hf:local-dir:PATH``. Whatever ``AutoModel`` builds and gives a pooled
output is an encoder (where there is no trained pooler: the class token, else the mean of the tokens); what also has
text features is a CLIP.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from zepad_mm.encoders.backends import HF_WEIGHTS, hf_repository
from zepad_mm.encoders.base import Encoder, feature_dim_of
from zepad_mm.encoders.build_limits import BuildLimit
from zepad_mm.encoders.clip import TextEncoder
from zepad_mm.encoders.huggingface_preprocess import preprocess_of
from zepad_mm.encoders.library_configs import TOKENIZER_FILES, TRANSFORMERS_CONFIGS, WRONG_CONFIG, cleaned_folder
from zepad_mm.encoders.sources import FOLDER, Source, weight_files
from zepad_mm.encoders.state_dict import summary
from zepad_mm.utils.hub import fetch

log = logging.getLogger(__name__)
LONGEST = 300  # letters of a library's message in ours


class HFBackbone(nn.Module):
    """A model of transformers, from normalised pixels (B, 3, S, S) to one feature vector per image (B, D)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.interpolate = False  # the position embeddings, for another image size than the model's own

    def inputs(self, pixels: Tensor) -> dict[str, Any]:
        """What the model is called with."""
        if self.interpolate:
            return {"pixel_values": pixels, "interpolate_pos_encoding": True}
        return {"pixel_values": pixels}

    def set_image_size(self, image_size: int) -> None:
        """Adapts to another image size: a ViT whose library can do so interpolates its position embeddings."""
        ask = getattr(self.model, "get_image_features", self.model.forward)
        self.interpolate = "interpolate_pos_encoding" in inspect.signature(ask).parameters

    def forward(self, pixels: Tensor) -> Tensor:
        ask = getattr(self.model, "get_image_features", self.model)
        output = ask(**self.inputs(pixels))
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            tokens = output.last_hidden_state
            if tokens.ndim == 4:
                pooled = tokens.mean((2, 3))
            else:
                pooled = tokens[:, 0] if self._has_class_token() else tokens.mean(1)
        return pooled.flatten(1)  # convolutional networks pool to (B, D, 1, 1)

    def _has_class_token(self) -> bool:
        names = (name.rsplit(".", 1)[-1] for name, _ in self.model.named_parameters())
        return any(name in ("cls_token", "class_token", "class_embedding") for name in names)


class MAEBackbone(HFBackbone):
    """A masked auto-encoder that masks nothing and keeps the order of the patches: the same answer at every call."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        model.config.mask_ratio = 0.0

    def inputs(self, pixels: Tensor) -> dict[str, Any]:
        patches = (pixels.shape[-1] // self.model.config.patch_size) ** 2
        order = torch.arange(patches, device=pixels.device, dtype=torch.float32)
        return {**super().inputs(pixels), "noise": order.expand(len(pixels), -1)}


class NaFlexBackbone(HFBackbone):
    """SigLIP 2 of flexible resolution, at the largest square that it takes: pixels are cut into patches here."""

    def __init__(self, model: Any, patch_size: int) -> None:
        super().__init__(model)
        self.patch_size = patch_size

    def inputs(self, pixels: Tensor) -> dict[str, Tensor]:
        size, side = self.patch_size, pixels.shape[-1] // self.patch_size
        # (B, 3, side * size, side * size) to (B, side * side, size * size * 3), colour last
        patches = pixels.unflatten(2, (side, size)).unflatten(4, (side, size)).permute(0, 2, 4, 3, 5, 1)
        whole = torch.ones(len(pixels), side * side, dtype=torch.int32, device=pixels.device)
        shapes = torch.full((len(pixels), 2), side, dtype=torch.long, device=pixels.device)
        return {
            "pixel_values": patches.flatten(3).flatten(1, 2),
            "pixel_attention_mask": whole,
            "spatial_shapes": shapes,
        }


class HFTextTower(nn.Module):
    """The text tower of a CLIP of transformers, with the methods that :class:`TextEncoder` calls."""

    def __init__(self, model: Any, logit_scale: Tensor, logit_bias: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.logit_scale = nn.Parameter(logit_scale.detach().reshape(()), requires_grad=False)
        self.logit_bias = None if logit_bias is None else nn.Parameter(logit_bias.detach().reshape(()), False)

    def encode_text(self, tokens: Any) -> Tensor:
        """A batch of the model's own tokenizer to embeddings (N, D)."""
        return self.model.get_text_features(**tokens).pooler_output


def load(source: Source, pretrained: bool) -> Encoder:
    """As :meth:`EncoderBackend.load`."""
    with _cleaned(source, pretrained) as folder:
        model = _create(source, folder, pretrained)
        if _is_clip_class(type(model)):
            model = _half(model, "text")
        return _image_tower(model, source, folder)


def load_clip(source: Source, pretrained: bool) -> tuple[Encoder, TextEncoder]:
    """As :meth:`EncoderBackend.load_clip`."""
    with _cleaned(source, pretrained) as folder:
        return _load_clip(source, folder, pretrained)


def has_text(source: Source) -> bool:
    """As :meth:`EncoderBackend.has_text`."""
    from transformers import MODEL_MAPPING

    with _cleaned(source, pretrained=False) as folder:
        return _is_clip_class(MODEL_MAPPING.get(type(_config(source, folder)), None))


def _load_clip(source: Source, folder: Path, pretrained: bool) -> tuple[Encoder, TextEncoder]:
    from transformers import AutoTokenizer

    model = _create(source, folder, pretrained)
    if not _is_clip_class(type(model)) or not hasattr(model, "logit_scale"):
        raise ValueError(
            f"zero-shot heads need a CLIP: {source} is a {type(model).__name__}, which has no text tower to score with"
        )
    with _clear_errors(source, "its tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    config = model.config
    # as the zero-shot pipeline of transformers: SigLIP has learnt to read padded texts
    padding = "max_length" if "siglip" in config.model_type else True
    length = config.text_config.max_position_embeddings
    # no local function, which could not be pickled
    tokenize: Any = partial(tokenizer, padding=padding, max_length=length, truncation=True, return_tensors="pt")
    text = HFTextTower(_half(model, "vision"), model.logit_scale, getattr(model, "logit_bias", None))
    return _image_tower(_half(model, "text"), source, folder), TextEncoder(text, tokenize, str(source))


def _is_clip_class(model: Any) -> bool:
    return hasattr(model, "get_image_features") and hasattr(model, "get_text_features")


def _half(model: Any, without: str) -> Any:
    """The model without its ``text`` or ``vision`` half, sharing the other half's weights; the scale goes with neither.

    A copy of the shell: ``get_image_features`` and ``get_text_features`` stay the library's own code.
    """
    shell = copy.copy(model)
    drop = {"text": ("text_model", "text_projection"), "vision": ("vision_model", "visual_projection")}[without]
    shell._modules = {name: module for name, module in model._modules.items() if name not in drop}
    shell._parameters = {}
    if len(shell._modules) == len(model._modules):
        raise ValueError(f"{type(model).__name__} keeps its towers under unknown names: {', '.join(model._modules)}")
    return shell


def _image_tower(model: Any, source: Source, folder: Path) -> Encoder:
    from transformers import AutoImageProcessor

    with _clear_errors(source, "its image processor (preprocessor_config.json)"):
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        config = getattr(model.config, "vision_config", model.config)
        preprocess = preprocess_of(processor, config, str(source))
    if config.model_type == "vit_mae":
        backbone: HFBackbone = MAEBackbone(model)
    elif config.model_type == "siglip2_vision_model":
        backbone = NaFlexBackbone(model, config.patch_size)
    else:
        backbone = HFBackbone(model)
    backbone.eval()
    try:
        width = feature_dim_of(backbone, preprocess.image_size)
    except (TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{source}: {type(model).__name__} gives no features of images, {preprocess.image_size} pixels: {error}"
        ) from error
    return Encoder(backbone, preprocess, width, str(source)).eval()


@contextmanager
def _cleaned(source: Source, pretrained: bool) -> Iterator[Path]:
    """A folder with the weights, the vocabulary and the reduced configurations of a model; all that is read of it."""
    if source.place == FOLDER:
        folder = Path(source.name)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{source.name}/config.json does not exist; expected a folder by save_pretrained")
    else:  # with weights the whole model has been fetched already
        files = ("config.json", "preprocessor_config.json")
        folder = fetch(hf_repository(source), files, required=files[:1], revision=source.revision)
    links = [path.name for path in weight_files(folder, HF_WEIGHTS)] if pretrained else []
    if pretrained and not links:
        raise FileNotFoundError(f"{source}: {folder} holds no weights: expected one of {', '.join(HF_WEIGHTS)}")
    with cleaned_folder(folder, TRANSFORMERS_CONFIGS, [*links, *TOKENIZER_FILES]) as clean:
        yield clean


def _config(source: Source, folder: Path) -> Any:
    from transformers import AutoConfig

    with _clear_errors(source, "its config.json"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _create(source: Source, folder: Path, pretrained: bool) -> Any:
    """The model in fp32 on the CPU. Raises ValueError when weights are missing; the log names those left out."""
    from transformers import AutoModel

    config = _config(source, folder)
    with _clear_errors(source, "its weights"), BuildLimit(str(source), weight_files(folder, HF_WEIGHTS)):
        if not pretrained:
            model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
            pooler = getattr(model, "pooler", None)
            if pooler is not None and pooler.state_dict() and not _publishes_pooler(config):
                model.pooler = None  # as below: with and without weights it is the same architecture
            return model
        with _quiet():
            model, report = AutoModel.from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    pooler = [key for key in missing if key.startswith("pooler.")]
    if pooler:
        # classifiers are published without one; a fresh one would be random, and another at every load
        log.warning("%s has no weights for %s: the class token is taken instead", source, ", ".join(pooler))
        model.pooler = None
        missing = [key for key in missing if key not in pooler]
    wrong = sorted(str(entry) for entry in report["mismatched_keys"])
    if missing or wrong:
        raise ValueError(
            f"{source} lacks {', '.join([*missing, *wrong][:3])} of {type(model).__name__} ({len(missing)} missing, "
            f"{len(wrong)} of another shape); its weights do not belong to its config.json"
        )
    if unexpected:
        log.warning("%s: left out %s, unknown to %s", source, summary(unexpected), type(model).__name__)
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers shows a bar and a table for each model that it reads; what matters of them is logged here."""
    from transformers.utils import logging as library

    shown, verbosity = library.is_progress_bar_enabled(), library.get_verbosity()
    library.disable_progress_bar()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if shown:
            library.enable_progress_bar()


def _publishes_pooler(config: Any) -> bool:
    """Whether the class that wrote the weights has a pooler; weights are not read."""
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if not inspect.isclass(found) or not issubclass(found, transformers.PreTrainedModel):
            raise ValueError(f"architectures: expected names of models of transformers, got {name!r:.80}")
        with torch.device("meta"):
            writer = found(config)
        if not any("pooler." in key for key in writer.state_dict()):
            return False
    return True


@contextmanager
def _clear_errors(source: Source, what: str) -> Iterator[None]:
    """Translate errors of transformers into one line that names the source."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    damaged = (SafetensorError, StrictDataclassError, UnpicklingError, RuntimeError, ValueError, EOFError)
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(f"{source}: {what} not found: {_first_line(error)}") from error
    except ImportError as error:  # SigLIP's tokenizer wants sentencepiece
        raise ImportError(f"{source}: {what} needs another package: {_first_line(error)}") from error
    except (*damaged, *WRONG_CONFIG) as error:
        raise ValueError(f"{source}: {what} cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (" ".join(map(str.strip, lines[:2])) if lines[0].endswith(":") else lines[0])[:LONGEST]
