"""Any backbone of timm, by name, from the Hub, or from a folder written by ``timm.models.save_for_hf``."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any, get_args

from zepad_mm.encoders.backends import TIMM_WEIGHTS
from zepad_mm.encoders.base import Encoder, Preprocess, feature_dim_of
from zepad_mm.encoders.build_limits import BuildLimit
from zepad_mm.encoders.library_configs import TIMM_CONFIGS, WRONG_CONFIG, cleaned_folder, read_config
from zepad_mm.encoders.sources import FOLDER, Source
from zepad_mm.utils.atomic import complete_folder
from zepad_mm.utils.images import Interpolation
from zepad_mm.utils.registry import did_you_mean

log = logging.getLogger(__name__)


def load(source: Source, pretrained: bool) -> Encoder:
    """As :meth:`EncoderBackend.load`."""
    import timm

    if source.place == FOLDER:
        folder = Path(source.name)
        complete_folder(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{source.name}/config.json does not exist; expected a folder by timm's save_for_hf"
            )
        backbone = _create_from_folder(source, folder, pretrained)
    elif not timm.is_model(source.name.partition(".")[0]):
        near = did_you_mean(source.name.partition(".")[0], timm.list_models())
        raise ValueError(f"timm has no model {source.name!r}{near or '.'} See timm.list_models()")
    else:
        backbone = _create(source, source.name, timm.get_pretrained_cfg(source.name), pretrained)
    return _encoder(backbone, source)


def _create_from_folder(source: Source, folder: Path, pretrained: bool) -> Any:
    """From timm's ``config.json``, reduced to what is known here, and the weights beside it."""
    found = next((name for name in TIMM_WEIGHTS if (folder / name).is_file()), None)
    if pretrained and found is None:
        raise FileNotFoundError(f"{folder} holds no weights: expected one of {', '.join(TIMM_WEIGHTS)}")
    with cleaned_folder(folder, TIMM_CONFIGS, [found] if found else []) as clean:
        about = read_config(clean / "config.json")
        config = SimpleNamespace(num_classes=about.get("num_classes", about["pretrained_cfg"].get("num_classes", 1000)))
        with BuildLimit(str(source), [clean / found] if found else []):
            return _create(source, f"{FOLDER}:{clean}", config, pretrained)


def _create(source: Source, name: str, config: Any, pretrained: bool) -> Any:
    """The backbone without its classifier.

    With weights the classifier is made too and then dropped: without it, timm would load any part of the weights.
    """
    import timm
    from safetensors import SafetensorError

    try:
        if not pretrained:
            return timm.create_model(name, pretrained=False, num_classes=0)
        backbone: Any = timm.create_model(name, pretrained=True, num_classes=config.num_classes)
        backbone.reset_classifier(0)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError, *WRONG_CONFIG) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{source} could not be loaded: {first_line}") from error
    return backbone


def _encoder(backbone: Any, source: Source) -> Encoder:
    import timm

    config = timm.data.resolve_model_data_config(backbone)
    # mean and std come from the config; the size from the model, because the config still says 224 for a ViT
    # that was built for another size
    patch_embed = getattr(backbone, "patch_embed", None)
    size = getattr(patch_embed, "img_size", None) or config["input_size"][-2:]
    if size[0] != size[1]:
        raise ValueError(f"{source} wants images of {size[0]} x {size[1]} pixels; only square ones are supported")
    mode = config.get("crop_mode") or "center"
    if mode == "border" or config["interpolation"] not in get_args(Interpolation):
        log.warning(
            "%s was trained on %s, %s images; here: centre crop, bicubic", source, mode, config["interpolation"]
        )
    preprocess = Preprocess(
        image_size=int(size[0]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"] if config["interpolation"] in get_args(Interpolation) else "bicubic",
        resize_mode="squash" if mode == "squash" else "shortest",
        resize_size=math.floor(int(size[0]) / config["crop_pct"]),
        centre="round",
    )
    return Encoder(backbone, preprocess, feature_dim_of(backbone, preprocess.image_size), str(source))
