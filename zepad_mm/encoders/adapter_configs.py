"""The configuration of an adapter, reduced to what peft may build and what can be merged exactly."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from zepad_mm.encoders.library_configs import keep_known

SMALL_RANK = 64  # a default that no layer has is harmless
ADAPTER = {  # what changes how an adapter is built, and can be merged exactly
    "r": int,
    "lora_alpha": float,
    "lora_dropout": float,
    "target_modules": str | tuple[str, ...],
    "exclude_modules": str | tuple[str, ...],
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "use_rslora": bool,
    "use_dora": bool,
    "lora_bias": bool,
    "layers_to_transform": int | tuple[int, ...],
    "layers_pattern": str | tuple[str, ...],
    "init_lora_weights": bool | str,
}
ADAPTER_NOTES = ("peft_version", "auto_mapping", "inference_mode", "revision", "task_type", "runtime_config")
PATTERN = re.compile(r"[\w.\-^$|()\[\]\\*+?:]{0,400}")
NESTED_REPEAT = re.compile(r"[*+?}]\)*[*+{]|\\\d|\(\?[^:]|\)[*+?{]")  # may take exponential time
MOST_REPEATS = 3
FEW_PATTERNS = 64  # peft tries every one on every module


def clean_adapter_config(values: dict[str, Any], tensors: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments of peft's ``LoraConfig``, with ``base_model_name_or_path``.

    Args:
        values: ``adapter_config.json``.
        tensors: of the adapter; no rank may be larger than theirs.
        where: the folder.

    Raises:
        ValueError: no LoRA, a kind of it that cannot be merged exactly, or a rank that no tensor has.
    """
    where = f"{where}/adapter_config.json"
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type: expected 'LORA', got {values.get('peft_type')!r:.80}")
    if values.get("bias", "none") != "none":
        raise ValueError(
            f"{where}: bias: expected 'none', got {values['bias']!r:.80}; biases are not part of an adapter"
        )
    base = values.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{where}: base_model_name_or_path: expected a name, got {type(base).__name__}")
    beside = {"peft_type", "bias", "base_model_name_or_path", *ADAPTER_NOTES}
    for key, value in values.items():  # of kinds of LoRA that are not used, as peft writes them
        if key not in ADAPTER and key not in beside and not _is_idle(key, value):
            raise ValueError(f"{where}: {key}: {value!r:.60} is not supported; merge the adapter with peft first")
    clean = keep_known({key: value for key, value in values.items() if key in ADAPTER}, ADAPTER, where)
    start = clean.pop("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in ("gaussian", "orthogonal"):
        raise ValueError(
            f"{where}: init_lora_weights: {start!r:.60} changes the base; convert the adapter with peft first"
        )
    for key in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        patterns = clean.get(key) or ()
        if not isinstance(patterns, str) and len(patterns) > max(FEW_PATTERNS, len(tensors)):
            raise ValueError(f"{where}: {key}: got {len(patterns):,} entries for {len(tensors)} tensors")
        _check_patterns(patterns if isinstance(patterns, str) else tuple(patterns), f"{where}: {key}")
    largest = max(
        (min(tensor.shape) for name, tensor in tensors.items() if "lora_A" in name and tensor.ndim), default=0
    )
    ranks = {
        "r": clean.get("r", 8),
        **{f"rank_pattern {name}": rank for name, rank in (clean.get("rank_pattern") or {}).items()},
    }
    for key, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= max(largest, SMALL_RANK):
            raise ValueError(
                f"{where}: {key}: expected a rank of 1 to {largest}, as its tensors have, got {rank!r:.40}"
            )
    for key, alpha in (clean.get("alpha_pattern") or {}).items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise ValueError(f"{where}: alpha_pattern {key}: expected a number, got {alpha!r:.40}")
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in clean.items()}
    return {**lists, "base_model_name_or_path": base}


def _is_idle(key: str, value: Any) -> bool:
    """Whether a value leaves a part of LoRA unused: empty, or what peft writes by default."""
    from peft import LoraConfig

    return not value or value == getattr(LoraConfig(), key, None)


def _check_patterns(patterns: str | Sequence[Any], where: str) -> None:
    """Raise ValueError for what is no regular expression, or one that could take very long on names of modules."""
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        slow = isinstance(pattern, str) and (
            NESTED_REPEAT.search(pattern)
            or sum(map(pattern.count, "*+")) > MOST_REPEATS
            or not PATTERN.fullmatch(pattern)
        )
        if not isinstance(pattern, str) or slow:
            raise ValueError(f"{where}: expected names of modules or a simple pattern, got {pattern!r:.80}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{where}: {pattern!r:.80} is no regular expression: {error}") from error
