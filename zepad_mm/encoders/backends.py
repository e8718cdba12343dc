"""The kinds of encoders that come with this package: what their sources name, and where they lie on the Hub.

Imports nothing heavy: the module that loads a kind is imported when an encoder is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zepad_mm.encoders.library_configs import TOKENIZER_FILES
from zepad_mm.encoders.sources import BACKENDS, FOLDER, HUB, EncoderBackend, HubFiles, Source

if TYPE_CHECKING:
    from zepad_mm.encoders.base import Encoder
    from zepad_mm.encoders.clip import TextEncoder

EMBEDDED = "embedded"  # the CLIP that is shipped with this package
OPEN_CLIP_WEIGHTS = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.safetensors"),
    *("open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"),
)
HF_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TIMM_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class OpenClipBackend(EncoderBackend):
    """CLIPs of open_clip; every one has a text tower."""

    has_clips = True
    takes_weights = True

    def load(self, source: Source, pretrained: bool) -> Encoder:
        from zepad_mm.encoders import open_clip

        return open_clip.load(source, pretrained)

    def load_clip(self, source: Source, pretrained: bool) -> tuple[Encoder, TextEncoder]:
        from zepad_mm.encoders import open_clip

        return open_clip.load_clip(source, pretrained)

    def has_text(self, source: Source) -> bool:
        return True

    def hub_files(self, source: Source) -> HubFiles | None:
        if source.place == FOLDER or source.name == EMBEDDED:
            return None
        weights = OPEN_CLIP_WEIGHTS[:2]
        if source.place == HUB:
            return HubFiles(
                repo_id=source.name,
                weights=weights,
                required=("open_clip_config.json",),
                extras=TOKENIZER_FILES,
                revision=source.revision,
            )
        import open_clip  # here, because it takes seconds and not every source needs it

        name, _, tag = source.name.partition("/")
        place = (open_clip.get_pretrained_cfg(name, tag) or {}).get("hf_hub", "")
        if not place:
            return None
        repo_id, _, file = place.rpartition("/")
        return HubFiles(repo_id=repo_id, weights=(file,) if file else weights, tag=(name, tag))


class HuggingFaceBackend(EncoderBackend):
    """Image models of transformers; those with text features are CLIPs."""

    has_clips = True
    names_are_repositories = True

    def load(self, source: Source, pretrained: bool) -> Encoder:
        from zepad_mm.encoders import huggingface

        return huggingface.load(source, pretrained)

    def load_clip(self, source: Source, pretrained: bool) -> tuple[Encoder, TextEncoder]:
        from zepad_mm.encoders import huggingface

        return huggingface.load_clip(source, pretrained)

    def has_text(self, source: Source) -> bool:
        from zepad_mm.encoders import huggingface

        return huggingface.has_text(source)

    def hub_files(self, source: Source) -> HubFiles | None:
        if source.place == FOLDER:
            return None
        return HubFiles(
            repo_id=hf_repository(source),
            weights=HF_WEIGHTS,
            required=("config.json",),
            extras=TOKENIZER_FILES,
            revision=source.revision,
        )


class TimmBackend(EncoderBackend):
    """Image models of timm, without their classifiers."""

    def load(self, source: Source, pretrained: bool) -> Encoder:
        from zepad_mm.encoders import timm

        return timm.load(source, pretrained)

    def hub_files(self, source: Source) -> HubFiles | None:
        repo_id: str | None = source.name if source.place == HUB else None
        if not source.place:
            import timm

            known = timm.is_model(source.name.partition(".")[0])
            config: Any = timm.get_pretrained_cfg(source.name) if known else None
            repo_id = config.hf_hub_id if config is not None and not config.hf_hub_filename else None
        if not repo_id:
            return None
        return HubFiles(
            repo_id=repo_id,
            weights=TIMM_WEIGHTS,
            required=("config.json",),
            revision=source.revision,
        )


class SSLBackend(EncoderBackend):
    """Checkpoints of self-supervised learning."""

    reads_file = True

    def load(self, source: Source, pretrained: bool) -> Encoder:
        from zepad_mm.encoders import ssl_checkpoints

        return ssl_checkpoints.load(source, pretrained)


BACKENDS.register("hf")(HuggingFaceBackend())
BACKENDS.register("open_clip")(OpenClipBackend())
BACKENDS.register("ssl")(SSLBackend())
BACKENDS.register("timm")(TimmBackend())


def hf_repository(source: Source) -> str:
    """The name on the Hub. Raises ValueError for what can be none."""
    if source.name.count("/") > 1 or not source.name.strip("/"):
        raise ValueError(
            f"{source}: expected hf:ORG/NAME, hf:ORG/NAME@REVISION or hf:local-dir:PATH, "
            "e.g. 'hf:facebook/dinov2-small'"
        )
    return source.name
