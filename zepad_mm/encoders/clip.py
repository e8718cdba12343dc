"""Text towers of CLIPs, and the loader of both towers, whichever library a CLIP comes from."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zepad_mm.encoders.base import Encoder
from zepad_mm.encoders.image_size import set_image_size
from zepad_mm.encoders.prompts import clean_name, templates_of
from zepad_mm.encoders.sources import BACKENDS, at_revision, parse_source, with_image_size
from zepad_mm.encoders.state_dict import check_weights
from zepad_mm.utils.hub import Access
from zepad_mm.utils.isolation import preserved_process_state
from zepad_mm.utils.names import check_names

CACHED_SETS = 64  # sets of class names whose embeddings a text tower keeps


class TextEncoder(nn.Module):
    """The text tower of a CLIP with its tokenizer and logit scale.

    Args:
        tower: has ``encode_text(tokens) -> (N, D)``, ``logit_scale`` (its logarithm) and perhaps ``logit_bias``.
        tokenizer: N texts to what ``encode_text`` takes, with a ``.to(device)``.
        source: as for :func:`load_clip`.

    Attributes:
        logit_scale: the factor CLIP multiplies cosines with before the softmax (about 100 for public models).
        logit_bias: what SigLIP adds to scaled cosines before its sigmoid; 0 elsewhere. One number for all classes:
            softmax, argmax, margins and every fusion rule are the same without it, so zero-shot heads leave it out.
        sigmoid: whether it was trained with a sigmoid for each text, as SigLIP, in place of a softmax over texts.
    """

    def __init__(self, tower: Any, tokenizer: Callable[[list[str]], Any], source: str) -> None:
        super().__init__()
        self.tower = tower
        self.tokenizer = tokenizer
        self.source = source
        self.logit_scale = float(tower.logit_scale.detach().exp())
        bias = getattr(tower, "logit_bias", None)
        self.sigmoid = bias is not None
        self.logit_bias = 0.0 if bias is None else float(bias.detach())
        self._cache: OrderedDict[tuple[tuple[str, ...], tuple[str, ...]], tuple[Tensor, list[str]]] = OrderedDict()

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """N texts to unit-length embeddings (N, D). Raises ValueError for an empty list."""
        texts = check_names(texts, "texts") if isinstance(texts, str) or not texts else list(texts)
        device = next(self.tower.parameters()).device
        rows = [
            F.normalize(self.tower.encode_text(self.tokenizer(texts[start : start + 256]).to(device)), dim=-1)
            for start in range(0, len(texts), 256)
        ]
        return torch.cat(rows)

    @torch.no_grad()
    def class_embeddings(self, class_names: Sequence[str], prompts: str | Sequence[str] = "photo") -> Tensor:
        """Prompt-ensembled class embeddings (C, D): unit-length mean over the templates of unit-length embeddings.

        Kept for the next call with the same names and templates; of many such sets the last CACHED_SETS. Warns of names
        that the tokenizer cuts off, or that differ in case alone and have the same embedding. Raises ValueError for
        other names that are the same to it.
        """
        names = [clean_name(name) for name in check_names(class_names, fold_case=False)]
        templates = templates_of(prompts)
        key = (tuple(names), templates)
        if key not in self._cache:
            messages = self._check_tokens(names, templates)
            with preserved_process_state(), torch.no_grad():  # kept, so never inference tensors nor of half precision
                embeddings = self([template.format(name) for name in names for template in templates])
                mean = embeddings.view(len(names), len(templates), -1).mean(dim=1)
                self._cache[key] = F.normalize(mean, dim=-1), messages
            if len(self._cache) > CACHED_SETS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        embeddings, messages = self._cache[key]
        for text in messages:
            warnings.warn(text, stacklevel=3)
        return embeddings

    def _check_tokens(self, names: list[str], templates: tuple[str, ...]) -> list[str]:
        """What to warn of: names cut off or that differ in case alone. Raises ValueError for other equal tokens."""
        messages: list[str] = []
        shortest, longest = min(templates, key=len), max(templates, key=len)
        rows = self._tokens([shortest.format(name) for name in names])
        first: dict[tuple[int, ...], str] = {}
        for name, row in zip(names, rows, strict=True):
            if first.setdefault(row, name) is name:
                continue
            same = (
                f"class names: {first[row]!r:.100} and {name!r:.100} are the same tokens to {self.source}; "
                "give names that differ in letters and within the tokens that it reads"
            )
            if first[row].casefold() != name.casefold():
                raise ValueError(same)
            messages.append(f"{same}: every image is taken for the first of them")
        whole = rows if shortest == longest else self._tokens([longest.format(name) for name in names])
        width, short = max(map(len, whole)), self._tokens(["a"])[0]
        padded = len(short) == width
        full = [i for i, row in enumerate(whole) if len(row) == width and not (padded and row[-1] == short[-1])]
        # a text that is cut off has the same tokens without its last letter
        shorter = self._tokens([longest.format(names[index])[:-1] for index in full])
        cut = [names[index] for index, row in zip(full, shorter, strict=True) if row == whole[index]]
        if cut:
            messages.append(
                f"{len(cut)} of {len(names)} class names are cut off: {self.source} reads {len(whole[0])} tokens of a "
                f"text, and {cut[0]!r:.100} with its prompt {longest!r:.100} is longer; shorten it"
            )
        return messages

    def _tokens(self, texts: list[str]) -> list[tuple[int, ...]]:
        """The token ids of each text, without the padding that depends on the batch."""
        rows: list[tuple[int, ...]] = []
        for start in range(0, len(texts), 4096):
            tokens = self.tokenizer(texts[start : start + 4096])
            if isinstance(tokens, Tensor):
                rows += map(tuple, tokens.tolist())
                continue
            masks = tokens.get("attention_mask", torch.ones_like(tokens["input_ids"])).bool()
            rows += [tuple(ids[mask].tolist()) for ids, mask in zip(tokens["input_ids"], masks, strict=True)]
        return rows


def load_clip(
    source: str,
    pretrained: bool = True,
    *,
    image_size: int | None = None,
    revision: str | None = None,
    access: Access | None = None,
) -> tuple[Encoder, TextEncoder]:
    """Both towers of a CLIP: the image tower as an :class:`Encoder`, the text tower for zero-shot heads.

    Args:
        source: as for :func:`load_encoder`, of kind ``open_clip`` or ``hf``.
        pretrained, image_size, revision, access: as for :func:`load_encoder`.

    Raises:
        ValueError: another kind, an unknown name, no text tower, or a damaged checkpoint; FileNotFoundError: no such
            folder.
    """
    source = with_image_size(source, image_size)
    parsed = parse_source(source)
    backend = BACKENDS.get(parsed.kind)
    if not backend.has_clips:
        kinds = " or ".join(kind for kind in reversed(BACKENDS.names()) if BACKENDS.get(kind).has_clips)
        raise ValueError(f"zero-shot heads need a CLIP: expected a source of kind {kinds}, got {source!r}")
    with preserved_process_state(pretrained), at_revision(parsed, revision, access or Access(), pretrained) as local:
        encoder, text = backend.load_clip(local, pretrained)
    for tower in (encoder, text):
        check_weights(tower, source)
    encoder.source = text.source = source
    if parsed.image_size is not None:
        set_image_size(encoder, parsed.image_size)
    return encoder.eval(), text.eval()


def is_clip(source: str) -> bool:
    """Whether :func:`load_clip` takes the source, decided by its kind and, for ``hf``, by its config alone."""
    parsed = parse_source(source)
    return BACKENDS.get(parsed.kind).has_text(parsed)
