"""CLIP image and text towers of open_clip: built-in names, the Hub, a local folder, or the embedded one.

``+WEIGHTS`` behind any of them loads a file of robust weights over that base: ``open_clip:ViT-L-14/openai+fare.pt``.
FARE and TeCoA publish ``model.visual.state_dict()``; the first TeCoA code wraps it as ``vision_encoder_state_dict``;
Delta-CLIP and open_clip's own training write the whole CLIP, perhaps under ``state_dict`` and ``module.``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torch import Tensor, nn

from zepad_mm.encoders.backends import EMBEDDED, OPEN_CLIP_WEIGHTS
from zepad_mm.encoders.base import Encoder, Preprocess, feature_dim_of
from zepad_mm.encoders.build_limits import BuildLimit
from zepad_mm.encoders.clip import TextEncoder
from zepad_mm.encoders.library_configs import (
    OPEN_CLIP_CONFIGS,
    TOKENIZER_FILES,
    WRONG_CONFIG,
    clean_transformers_config,
    cleaned_folder,
    read_config,
)
from zepad_mm.encoders.sources import FOLDER, Source
from zepad_mm.encoders.state_dict import SHOWN, load_state_dict_strict, read_foreign, summary
from zepad_mm.utils.hub import fetch
from zepad_mm.utils.io import ASSETS
from zepad_mm.utils.isolation import library_logs
from zepad_mm.utils.registry import did_you_mean

log = logging.getLogger(__name__)
EMBEDDED_CLIP = ASSETS / "clip"
COMPUTED = ("attn_mask", "input_resolution", "context_length", "vocab_size")  # stored by some, learnt by none


def load(source: Source, pretrained: bool) -> Encoder:
    """As :meth:`EncoderBackend.load`."""
    return _image_tower(_create(source, pretrained)[0], str(source))


def load_clip(source: Source, pretrained: bool) -> tuple[Encoder, TextEncoder]:
    """As :meth:`EncoderBackend.load_clip`."""
    clip, tokenizer = _create(source, pretrained, text=True)
    encoder = _image_tower(clip, str(source))
    text = TextEncoder(clip, tokenizer, str(source))
    del clip.visual  # the encoder holds it; kept here too it would be counted and moved twice
    return encoder, text


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
        raise ValueError(f"{source} wants images of {sides[0]} x {sides[1]} pixels; only square ones are supported")
    mode = cfg.get("resize_mode") or "shortest"
    if mode == "longest":
        log.warning(
            "%s was trained on padded images; here their shorter side is resized and the centre cropped", source
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


def _create(source: Source, pretrained: bool, text: bool = False) -> tuple[Any, Callable[[list[str]], Tensor]]:
    """The whole CLIP in fp32 on the CPU, and its tokenizer."""
    with _clear_errors(source), library_logs("open_clip"):
        if source.place == FOLDER or source.name == EMBEDDED:
            clip, tokenizer = _create_from_folder(source, pretrained)
        else:
            clip, tokenizer = _create_by_name(source, pretrained)
    both = not source.weights or not pretrained or load_robust_weights(clip, source.weights)
    if not both and text and _is_random(source):
        raise ValueError(
            f"{source}: {source.weights} holds the image tower alone, so the text tower would be random; name "
            f"weights of the base, e.g. open_clip:{source.name}/TAG+{source.weights}"
        )
    return clip.eval(), tokenizer


def _is_random(source: Source) -> bool:
    """Whether the base itself names no weights."""
    return not source.place and source.name != EMBEDDED and "/" not in source.name


def _create_from_folder(source: Source, pretrained: bool) -> tuple[Any, Any]:
    """From ``open_clip_config.json`` and the weights beside it, the configuration reduced to what is known here."""
    folder = EMBEDDED_CLIP if source.name == EMBEDDED and not source.place else Path(source.name)
    if not folder.is_dir():
        raise FileNotFoundError(f"{source.name!r} is no folder; expected one with open_clip files")
    if not (folder / "open_clip_config.json").is_file():
        missing = (
            "rebuild it with tools/wordnet_clip/build.py" if folder == EMBEDDED_CLIP else "expected open_clip's files"
        )
        raise FileNotFoundError(f"{folder / 'open_clip_config.json'} does not exist; {missing}")
    weights = next((name for name in OPEN_CLIP_WEIGHTS if (folder / name).is_file()), None)
    if pretrained and weights is None:
        raise FileNotFoundError(f"{folder} holds no weights: expected one of {', '.join(OPEN_CLIP_WEIGHTS)}")
    with cleaned_folder(folder, OPEN_CLIP_CONFIGS, [*([weights] if weights else []), *TOKENIZER_FILES]) as clean:
        text = read_config(clean / "open_clip_config.json")["model_cfg"]["text_cfg"]
        with BuildLimit(str(source), [clean / weights] if weights else []):
            clip = _build(f"{FOLDER}:{clean}", None, pretrained)
        return clip, _tokenizer(f"{FOLDER}:{clean}", text)


def _create_by_name(source: Source, pretrained: bool) -> tuple[Any, Any]:
    """From open_clip's own table of architectures, with the weights of a tag."""
    import open_clip

    name, tag = _name_and_tag(source)
    if pretrained and not tag and not source.weights:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)[:5]) or "none"
        raise ValueError(
            f"{source} names no weights, so it would be random; write open_clip:{name}/TAG with a tag of: {tags}; "
            "or load_encoder(..., pretrained=False) for random weights"
        )
    text = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
    replaced: dict[str, Any] = {}
    with ExitStack() as stack:
        if text.get("hf_model_name"):  # only its configuration is read: the weights are those of the tag
            folder = fetch(text["hf_model_name"], ["config.json"], required=["config.json"])
            clean = stack.enter_context(cleaned_folder(folder, {"config.json": clean_transformers_config}, []))
            replaced["text_cfg"] = {**text, "hf_model_name": str(clean), "hf_model_pretrained": False}
        clip = _build(name, tag, pretrained and bool(tag), **replaced)
    return clip, _tokenizer(name, text)


def _build(name: str, tag: str | None, pretrained: bool, **replaced: Any) -> Any:
    import open_clip

    with nullcontext() if pretrained else _no_warning_of_random_weights():
        return open_clip.create_model(
            name,
            pretrained=tag,
            precision="fp32",
            load_weights=pretrained,
            require_pretrained=pretrained,
            pretrained_text=False,
            weights_only=True,
            **replaced,
        )


def _tokenizer(name: str, text: dict[str, Any]) -> Any:
    import open_clip

    if not text.get("hf_tokenizer_name"):
        return open_clip.get_tokenizer(name)
    return open_clip.get_tokenizer(name, trust_remote_code=False)  # else it asks on standard input


def _name_and_tag(source: Source) -> tuple[str, str | None]:
    """What open_clip calls the model, and its tag."""
    import open_clip

    name, _, tag = source.name.partition("/")
    if name not in open_clip.list_models():
        near = did_you_mean(name, [EMBEDDED, *open_clip.list_models()])
        raise ValueError(
            f"open_clip has no model {name!r}{near or '.'} "
            "Write open_clip:NAME/TAG as in open_clip.list_pretrained(), hf-hub:org/repo or local-dir:PATH"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag and not open_clip.get_pretrained_cfg(name, tag) and not Path(tag).is_file():
        raise ValueError(
            f"open_clip has no weights {tag!r} of {name}{did_you_mean(tag, tags) or '.'} Known: {', '.join(tags)}"
        )
    return name, tag or None


def load_robust_weights(clip: Any, path: str | Path) -> bool:
    """Replace the weights of an open_clip model by those in a file, in place and strictly; whether of both towers.

    A file of the whole CLIP replaces both towers, one of the image tower leaves the text tower as it is. What the file
    holds beside is named in one warning.

    Raises:
        FileNotFoundError: no such file. ValueError: the file fits neither the model nor its image tower.
    """
    tensors = read_foreign(path)
    tensors = {name: tensor for name, tensor in tensors.items() if name.rsplit(".", 1)[-1] not in COMPUTED}
    nearest = ""
    for target, what in ((clip, "the whole CLIP"), (clip.visual, "the image tower")):
        own: dict[str, Tensor] = target.state_dict()
        for prefix in _prefixes(tensors, own):
            missing = [name for name in own if prefix + name not in tensors]
            if missing:
                nearest = f"under {prefix!r} it lacks {', '.join(missing[:SHOWN])} of {what}, {len(missing)} in all"
                continue
            inside = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            load_state_dict_strict(own, inside, str(path), "it is of another model than this base")
            left = [name for name in tensors if not name.startswith(prefix)]
            if left:
                log.warning("%s: took %d tensors for %s and left out %s", path, len(own), what, summary(left))
            return target is clip
    raise ValueError(
        f"{path} does not fit {type(clip.visual).__name__} of this base: "
        f"{nearest or f'it holds {summary(tensors)[:200]}'}; "
        "expected an open_clip state dict or that of its image tower"
    )


def _prefixes(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """What may stand before the names of ``own`` in the file, found by their most telling name."""
    telling = max(own, key=len)
    ends = [name[: -len(telling)] for name in tensors if name.endswith(telling)]
    return sorted({prefix for prefix in ends if not prefix or prefix.endswith(".")}, key=len)


@contextmanager
def _no_warning_of_random_weights() -> Iterator[None]:
    """open_clip warns that weights are random where that is what was asked for."""

    def wanted(record: logging.LogRecord) -> bool:
        return "No pretrained weights loaded" not in record.getMessage()

    log_of_library = logging.getLogger("zepad_mm.open_clip")  # by library_logs
    log_of_library.addFilter(wanted)
    try:
        yield
    finally:
        log_of_library.removeFilter(wanted)


@contextmanager
def _clear_errors(source: Source) -> Iterator[None]:
    """Translate the errors of damaged and foreign checkpoints into one line that names the source."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError, *WRONG_CONFIG) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{source} could not be loaded, the checkpoint is damaged or of another model: {first_line}"
        ) from error
