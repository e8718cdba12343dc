"""Any backbone of timm, by name, from the Hub, or from a folder written by ``timm.models.save_for_hf``."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import get_args

from zepad_mm.encoders.base import ENCODERS, Encoder, Interpolation, Preprocess, feature_dim_of

log = logging.getLogger(__name__)


@ENCODERS.register("timm")
def _load(rest: str, pretrained: bool) -> Encoder:
    import timm

    if rest.startswith("local-dir:"):
        folder = Path(rest.removeprefix("local-dir:"))
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder}/config.json does not exist; expected a folder by timm's save_for_hf")
    elif not rest.startswith("hf-hub:") and not timm.is_model(rest.split(".", maxsplit=1)[0]):
        near = timm.list_models(f"*{rest.split('_', maxsplit=1)[0].split('.', maxsplit=1)[0]}*")[:5]
        raise ValueError(f"timm has no model {rest!r}; near: {', '.join(near) or 'none'}. See timm.list_models()")
    try:
        backbone = timm.create_model(rest, pretrained=pretrained, num_classes=0)
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"timm:{rest} could not be loaded: {first_line}") from error
    config = timm.data.resolve_model_data_config(backbone)
    # mean and std come from the config; the size from the model, because the config still says 224 for a ViT
    # that was built for another size
    patch_embed = getattr(backbone, "patch_embed", None)
    size = getattr(patch_embed, "img_size", None) or config["input_size"][-2:]
    mode = config.get("crop_mode") or "center"
    if mode == "border" or config["interpolation"] not in get_args(Interpolation):
        log.warning(
            "timm:%s was trained on %s, %s pictures; here: centre crop, bicubic", rest, mode, config["interpolation"]
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
    return Encoder(backbone, preprocess, feature_dim_of(backbone, preprocess.image_size), f"timm:{rest}")
