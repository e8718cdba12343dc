"""CLIP image and text towers of open_clip: built-in names, the Hub, a local folder, or the embedded one.

``+WEIGHTS`` behind any of them loads a file of robust weights over that base: ``open_clip:ViT-L-14/openai+fare.pt``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zepad_mm.encoders.base import ENCODERS, Encoder, Preprocess, feature_dim_of
from zepad_mm.encoders.clip import CLIPS, ClipKind, TextEncoder
from zepad_mm.encoders.robust_weights import load_over, split_weights
from zepad_mm.utils.io import ASSETS

log = logging.getLogger(__name__)
EMBEDDED_CLIP = ASSETS / "clip"


@ENCODERS.register("open_clip")
def _load(rest: str, pretrained: bool) -> Encoder:
    return _image_tower(_create(rest, pretrained)[0], f"open_clip:{rest}")


def _load_clip(rest: str, pretrained: bool) -> tuple[Encoder, TextEncoder]:
    clip, tokenizer = _create(rest, pretrained)
    encoder = _image_tower(clip, f"open_clip:{rest}")
    text = TextEncoder(clip, tokenizer, f"open_clip:{rest}")
    del clip.visual  # the encoder holds it; kept here too it would be counted and moved twice
    return encoder, text


CLIPS.register("open_clip")(ClipKind(load=_load_clip, has_text=lambda rest: True))


class _FirstOutput(nn.Module):
    """A tower that also gives its tokens (CoCa's) as one that gives the pooled feature alone."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        return self.tower(pixels)[0]


def _image_tower(clip: Any, source: str) -> Encoder:
    from open_clip.model import get_model_preprocess_cfg  # open_clip keeps the training statistics on the tower

    cfg = get_model_preprocess_cfg(clip)
    sides = (cfg["size"],) * 2 if isinstance(cfg["size"], int) else tuple(cfg["size"])
    if sides[0] != sides[1]:
        raise ValueError(f"{source} wants pictures of {sides[0]} x {sides[1]} pixels; only square ones are supported")
    mode = cfg.get("resize_mode") or "shortest"
    if mode == "longest":
        log.warning(
            "%s was trained on padded pictures; here their shorter side is resized and the centre cropped", source
        )
    preprocess = Preprocess(
        image_size=sides[0],
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation="bilinear" if cfg.get("interpolation") == "bilinear" else "bicubic",  # as open_clip reads it
        resize_mode="squash" if mode == "squash" else "shortest",
        centre="round",
    )
    tower = _FirstOutput(clip.visual) if getattr(clip.visual, "output_tokens", False) else clip.visual
    return Encoder(tower, preprocess, feature_dim_of(tower, sides[0]), source).eval()


def _create(rest: str, pretrained: bool) -> tuple[Any, Callable[[list[str]], Tensor]]:
    """The whole CLIP in fp32 on the CPU, and its tokenizer."""
    import open_clip

    base, weights = split_weights(rest)
    name, tag = _name_and_tag(base)
    if name.startswith("local-dir:") and not Path(name.removeprefix("local-dir:")).is_dir():
        raise FileNotFoundError(f"{name.removeprefix('local-dir:')!r} is no folder; expected one with open_clip files")
    with _clear_errors(base), nullcontext() if pretrained else _no_warning_of_random_weights():
        clip = open_clip.create_model(
            name, pretrained=tag, precision="fp32", load_weights=pretrained, weights_only=True
        )
        tokenizer = open_clip.get_tokenizer(name)
    if weights and pretrained:
        load_over(clip, weights)
    return clip.eval(), tokenizer


def _name_and_tag(rest: str) -> tuple[str, str | None]:
    import open_clip

    if rest == "embedded":
        if not (EMBEDDED_CLIP / "open_clip_config.json").is_file():
            raise FileNotFoundError(f"{EMBEDDED_CLIP} is empty; rebuild it with tools/build_clip.py")
        return f"local-dir:{EMBEDDED_CLIP}", None
    if rest.startswith(("hf-hub:", "local-dir:")):
        return rest, None
    name, _, tag = rest.partition("/")
    if name not in open_clip.list_models():
        from difflib import get_close_matches

        near = get_close_matches(name, open_clip.list_models(), n=3)
        raise ValueError(
            f"open_clip has no model {name!r}{'; near: ' + ', '.join(near) if near else ''}. "
            "Write open_clip:NAME/TAG as in open_clip.list_pretrained(), hf-hub:org/repo or local-dir:PATH"
        )
    return name, tag or None


@contextmanager
def _no_warning_of_random_weights() -> Iterator[None]:
    """open_clip warns that weights are random where that is what was asked for."""

    def wanted(record: logging.LogRecord) -> bool:
        return "No pretrained weights loaded" not in record.getMessage()

    logging.getLogger().addFilter(wanted)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(wanted)


@contextmanager
def _clear_errors(rest: str) -> Any:
    """A truncated or foreign checkpoint says so in one line, whatever the reader below called it."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, EOFError, RuntimeError, KeyError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"open_clip:{rest} could not be loaded, the checkpoint is damaged or of another model: {first_line}"
        ) from error
