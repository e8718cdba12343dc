"""CLIP image and text towers of open_clip: built-in names, the Hub, a local folder, or the embedded one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zepad_mm.checks import check_names
from zepad_mm.encoders.base import ENCODERS, Encoder, Preprocess, feature_dim_of, parse_source
from zepad_mm.prompts import clean_name, templates_of

EMBEDDED_CLIP = Path(__file__).parents[1] / "assets" / "clip"


class TextEncoder(nn.Module):
    """The text tower of a CLIP with its tokenizer and logit scale.

    Attributes:
        logit_scale: the factor CLIP multiplies cosines with before the softmax (about 100 for public models).
    """

    def __init__(self, clip: Any, tokenizer: Callable[[list[str]], Tensor], source: str) -> None:
        super().__init__()
        self.tower = clip
        self.tokenizer = tokenizer
        self.source = source
        self.logit_scale = float(clip.logit_scale.detach().exp())
        self._cache: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = {}

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """N texts to unit-length embeddings (N, D). Raises ValueError for an empty list."""
        texts = check_names(texts, "texts") if not isinstance(texts, list) or not texts else texts
        device = next(self.tower.parameters()).device
        rows = [
            F.normalize(self.tower.encode_text(self.tokenizer(texts[start : start + 256]).to(device)), dim=-1)
            for start in range(0, len(texts), 256)
        ]
        return torch.cat(rows)

    @torch.no_grad()
    def class_embeddings(self, class_names: Sequence[str], prompts: str | Sequence[str] = "photo") -> Tensor:
        """Prompt-ensembled class embeddings (C, D): unit-length mean over the templates of unit-length embeddings.

        Kept for the next call with the same names and templates: a text is never encoded twice.
        """
        names = [clean_name(name) for name in check_names(class_names)]
        templates = templates_of(prompts)
        key = (tuple(names), templates)
        if key not in self._cache:
            embeddings = self([template.format(name) for name in names for template in templates])
            mean = embeddings.view(len(names), len(templates), -1).mean(dim=1)
            self._cache[key] = F.normalize(mean, dim=-1)
        return self._cache[key]


def load_clip(source: str, pretrained: bool = True) -> tuple[Encoder, TextEncoder]:
    """Both towers of a CLIP: the image tower as an :class:`Encoder`, the text tower for zero-shot heads.

    Args:
        source: as for :func:`load_encoder`, of kind ``open_clip``.
        pretrained: load the weights.

    Raises:
        ValueError: another kind, an unknown name, or a damaged checkpoint; FileNotFoundError: no such folder.
    """
    parsed = parse_source(source)
    if parsed.kind != "open_clip":
        raise ValueError(f"zero-shot heads need a CLIP: expected a source of kind open_clip, got {source!r}")
    clip, tokenizer = _create(parsed.rest, pretrained)
    encoder = _image_tower(clip, source)
    text = TextEncoder(clip, tokenizer, source).eval()
    del clip.visual  # the encoder holds it; kept here too it would be counted and moved twice
    return encoder, text


@ENCODERS.register("open_clip")
def _load(rest: str, pretrained: bool) -> Encoder:
    return _image_tower(_create(rest, pretrained)[0], f"open_clip:{rest}")


def _image_tower(clip: Any, source: str) -> Encoder:
    from open_clip.model import get_model_preprocess_cfg  # open_clip keeps the training statistics on the tower

    cfg = get_model_preprocess_cfg(clip)
    size = cfg["size"] if isinstance(cfg["size"], int) else cfg["size"][0]
    preprocess = Preprocess(
        image_size=size,
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation=cfg.get("interpolation", "bicubic"),
        resize_mode=cfg.get("resize_mode", "shortest"),
    )
    return Encoder(clip.visual, preprocess, feature_dim_of(clip.visual, size), source).eval()


def _create(rest: str, pretrained: bool) -> tuple[Any, Callable[[list[str]], Tensor]]:
    """The whole CLIP in fp32 on the CPU, and its tokenizer."""
    import open_clip

    name, tag = _name_and_tag(rest)
    if name.startswith("local-dir:") and not Path(name.removeprefix("local-dir:")).is_dir():
        raise FileNotFoundError(f"{name.removeprefix('local-dir:')!r} is no folder; expected one with open_clip files")
    with _clear_errors(rest), nullcontext() if pretrained else _no_warning_of_random_weights():
        clip = open_clip.create_model(
            name, pretrained=tag, precision="fp32", load_weights=pretrained, weights_only=True
        )
        return clip.eval(), open_clip.get_tokenizer(name)


def _name_and_tag(rest: str) -> tuple[str, str | None]:
    import open_clip

    if rest == "embedded":
        if not (EMBEDDED_CLIP / "open_clip_config.json").is_file():
            raise FileNotFoundError(f"{EMBEDDED_CLIP} is empty; rebuild it with scripts/build_default_clip.py")
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
