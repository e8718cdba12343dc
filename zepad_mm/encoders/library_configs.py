"""Configurations of models, reduced to the keys that we know before a library reads them.

Libraries hand what stands in a configuration to constructors as keyword arguments. Some of these load other
repositories, read other files or run code that came with a model. So nothing but known keys gets through here, and a
library sees a folder (:func:`cleaned_folder`) that holds the reduced configurations, the weights and the tokenizer.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from zepad_mm.utils.config import convert_value
from zepad_mm.utils.hub import MODEL_TYPE
from zepad_mm.utils.io import WRONG_CONTENT, read_json
from zepad_mm.utils.registry import did_you_mean

DEEPEST = 12  # nested dictionaries and lists
MOST_LAYERS = 1000  # of any key that counts layers, blocks or stages
LARGEST = 2**31 - 1  # integer
LARGEST_SIDE, MOST_PATCHES = 8192, 2**16  # of images, in pixels
COUNTS = re.compile(r"layers?$|layers_|depths?$|blocks?$|stages?$")
Clean = Callable[[dict[str, Any], str], dict[str, Any]]
TOKENIZER_FILES = ("*.json", "*.txt", "*.model")  # other configurations are reduced, or left out
WRONG_CONFIG = WRONG_CONTENT  # what libraries raise where a value has the right type and makes no sense to them


@contextmanager
def cleaned_folder(folder: Path, configs: Mapping[str, Clean], links: Sequence[str]) -> Iterator[Path]:
    """A temporary folder with the configurations of ``folder``, each reduced, and links to files of known kinds.

    Args:
        folder: of a model.
        configs: name of a JSON file -> what reduces it; a file that does not exist is left out.
        links: patterns of all other files that a library may read: weights, vocabularies. Never ``*.py``.

    Raises:
        ValueError: a configuration that is no dictionary, or that asks for what is refused here.
    """
    with TemporaryDirectory(prefix="zepad-model-") as name:
        clean = Path(name)
        for file, reduce in configs.items():
            if (folder / file).is_file():
                values = read_config(folder / file)
                (clean / file).write_text(json.dumps(reduce(values, str(folder / file))), encoding="utf-8")
        for pattern in links:
            for path in sorted(folder.glob(pattern)):
                if path.is_file() and path.name not in {**configs, **dict.fromkeys(NOT_LINKED)}:
                    (clean / path.name).unlink(missing_ok=True)
                    (clean / path.name).symlink_to(path.resolve())
        try:
            yield clean
        except (ValueError, FileNotFoundError, ImportError) as error:
            if name not in str(error):
                raise
            raise type(error)(str(error).replace(name, str(folder))) from error


def read_config(path: Path) -> dict[str, Any]:
    """A JSON dictionary of plain values within the limits. Raises ValueError that names the file and the key."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a dictionary, got {type(values).__name__}")
    check_values(values, str(path))
    return values


def check_values(values: Any, where: str, depth: int = 0) -> None:
    """Raise ValueError that names the key of a number out of bounds, NaN, infinity, or values nested too deep."""
    if depth > DEEPEST:
        raise ValueError(f"{where}: nested more than {DEEPEST} deep")
    if isinstance(values, dict | list | tuple):
        pairs = values.items() if isinstance(values, dict) else ((None, value) for value in values)
        for key, value in pairs:
            inside = where if key is None else f"{where}: {str(key)[:60]}"
            numbers = value if isinstance(value, list) else [value]
            if isinstance(key, str) and COUNTS.search(key) and _largest(numbers) > MOST_LAYERS:
                raise ValueError(f"{inside}: expected at most {MOST_LAYERS}, got {_largest(numbers):.3g}")
            check_values(value, inside if depth < 4 else where, depth + 1)
    elif isinstance(values, float) and not math.isfinite(values):
        raise ValueError(f"{where}: expected a finite number, got {values}")
    elif isinstance(values, int) and abs(values) > LARGEST:
        raise ValueError(f"{where}: expected a number up to {LARGEST}, got one of {values.bit_length()} bits")


def _largest(numbers: Sequence[Any]) -> float:
    """The largest of the numbers among the values; 0 without any."""
    found = [min(value, 10**18) for value in numbers if isinstance(value, int | float)]
    return max(found, default=0)


def keep_known(values: Any, known: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values converted to the types of ``known`` (key -> type hint). Raises ValueError for any other key."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a dictionary, got {type(values).__name__}")
    for key in values:
        if key not in known:
            near = did_you_mean(key, list(known))
            raise ValueError(f"{where} has the key {str(key)[:80]!r}, which is not read here{near}")
    return {
        key: convert_value(known[key], value, f"{where}.{key}") for key, value in values.items() if value is not None
    }


# ---- open_clip -------------------------------------------------------------------------------------------------

TOKENIZER_ARGUMENTS = {
    "clean": str,
    "strip_sep_token": bool,
    "language": str | None,
    "additional_special_tokens": tuple[str, ...] | None,
    "reduction_mask": str,
}
LAYER_ARGUMENTS: dict[str, dict[str, Any]] = {  # of activations and norms
    "act_kwargs": {"approximate": str},
    "norm_kwargs": {"eps": float, "elementwise_affine": bool, "bias": bool},
}
OPEN_CLIP_PREPROCESS = {
    "size": int | tuple[int, ...],
    "mode": str,
    "mean": tuple[float, ...],
    "std": tuple[float, ...],
    "interpolation": str,
    "resize_mode": str,
    "fill_color": int,
}


def clean_open_clip_config(values: dict[str, Any], where: str) -> dict[str, Any]:
    """``open_clip_config.json`` with the keys of open_clip's own model configurations.

    Raises:
        ValueError: an unknown key, a wrong type, or a text tower of another repository.
    """
    from open_clip.coca_model import MultimodalCfg
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    if "model_cfg" not in values:
        raise ValueError(f"{where} lacks the key 'model_cfg'; expected a folder written by open_clip")
    towers = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg, "multimodal_cfg": MultimodalCfg}
    known = dict.fromkeys(towers, dict) | {
        "embed_dim": int,
        "quick_gelu": bool,
        "custom_text": bool,
        "init_logit_scale": float,
        "init_logit_bias": float,
        "nonscalar_logit_scale": bool,
    }
    model = keep_known(values["model_cfg"], known, f"{where}: model_cfg")
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in model:
            raise ValueError(f"{where}: model_cfg lacks the key {key!r}")
    for name, tower in towers.items():
        if name in model:
            model[name] = _clean_tower(model[name], tower, f"{where}: model_cfg.{name}")
    preprocess = keep_known(values.get("preprocess_cfg") or {}, OPEN_CLIP_PREPROCESS, f"{where}: preprocess_cfg")
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def _clean_tower(values: dict[str, Any], tower: type, where: str) -> dict[str, Any]:
    """The configuration of one tower of open_clip."""
    import timm

    hints = typing.get_type_hints(tower)
    hints |= dict.fromkeys((*LAYER_ARGUMENTS, "tokenizer_kwargs"), dict) | {"mlp_ratio": float}
    clean = keep_known(values, hints, where)
    arguments: dict[str, Mapping[str, Any]] = {**LAYER_ARGUMENTS, "tokenizer_kwargs": TOKENIZER_ARGUMENTS}
    for key, known in arguments.items():
        if key in clean:
            clean[key] = keep_known(clean[key], known, f"{where}.{key}")
    if clean.get("hf_model_name"):
        raise ValueError(
            f"{where}.hf_model_name: the text tower of another repository is not loaded "
            f"({clean['hf_model_name']!r:.80}), "
            "because nothing says its revision; use open_clip's own name for such a model, open_clip:NAME/TAG"
        )
    clean = {key: value for key, value in clean.items() if not key.startswith("hf_model")}
    name = clean.get("timm_model_name")
    if name and not (re.fullmatch(r"[\w.]+", name) and timm.is_model(name)):
        raise ValueError(f"{where}.timm_model_name: expected a name of timm.list_models(), got {name!r:.80}")
    return clean | ({"timm_model_pretrained": False} if "timm_model_pretrained" in clean else {})


# ---- timm ------------------------------------------------------------------------------------------------------

TIMM = {"architecture": str, "num_classes": int, "num_features": int, "global_pool": Any, "model_args": dict}
TIMM_DATA = (
    *("input_size", "test_input_size", "min_input_size", "fixed_input_size", "interpolation", "crop_pct"),
    *("test_crop_pct", "crop_mode", "mean", "std", "num_classes", "label_offset", "pool_size", "test_pool_size"),
    *("first_conv", "classifier", "tag"),
)
TIMM_CONTROL = {  # arguments of timm's functions that choose what is loaded, or how
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn"),
    *("checkpoint_path", "cache_dir", "device", "dtype", "self", "args", "kwargs", "num_classes", "in_chans"),
}


def clean_timm_config(values: dict[str, Any], where: str) -> dict[str, Any]:
    """timm's ``config.json`` without labels, and without any place that weights could be taken from.

    Raises:
        ValueError: an unknown architecture, or arguments that are none of the architecture.
    """
    import timm

    data = values.get("pretrained_cfg", values)
    if not isinstance(data, dict):
        raise ValueError(f"{where}: pretrained_cfg: expected a dictionary, got {type(data).__name__}")
    name = values.get("architecture")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.]+", name) or not timm.is_model(name):
        near = did_you_mean(name, timm.list_models())
        raise ValueError(f"{where}: architecture: expected a name of timm.list_models(), got {name!r:.80}{near}")
    hints = typing.get_type_hints(timm.models.PretrainedCfg)
    hints |= {"input_size": tuple[int, ...], "classifier": str | tuple[str, ...], "first_conv": str | tuple[str, ...]}
    known = {key: hints[key] for key in TIMM_DATA}
    data = keep_known({key: value for key, value in data.items() if key in known}, known, f"{where}: pretrained_cfg")
    for key in ("input_size", "test_input_size", "min_input_size"):
        if key in data and (len(data[key]) != 3 or data[key][0] != 3 or min(data[key]) < 1):
            raise ValueError(f"{where}: pretrained_cfg.{key}: expected [3, height, width], got {list(data[key])}")
    clean = {key: convert_value(hint, values[key], f"{where}: {key}") for key, hint in TIMM.items() if key in values}
    arguments = {key: value for key, value in (clean.pop("model_args", None) or {}).items() if key != "num_classes"}
    if arguments.pop("in_chans", 3) != 3:
        raise ValueError(f"{where}: model_args.in_chans: expected 3, images in colour")
    allowed = _timm_arguments(name)
    for key, value in arguments.items():
        if key not in allowed:
            raise ValueError(f"{where}: model_args has {str(key)[:80]!r}, which is no argument of {name}")
        _check_plain(value, f"{where}: model_args.{key}")
    return {**clean, "pretrained_cfg": data, **({"model_args": arguments} if arguments else {})}


def _timm_arguments(name: str) -> set[str]:
    """The arguments of the classes that stand in the file of an architecture, without those that load anything."""
    import timm

    module = sys.modules[timm.models.model_entrypoint(name.partition(".")[0]).__module__]
    classes = [part for part in vars(module).values() if inspect.isclass(part) and part.__module__.startswith("timm")]
    found = {key for part in classes for key in inspect.signature(part.__init__).parameters}
    return (found | {"img_size"}) - TIMM_CONTROL


def _check_plain(value: Any, where: str) -> None:
    """Raise ValueError unless the value is a number, a word or None, or a list of such."""
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, list | tuple):
            _check_plain(item, where)
        elif item is not None and not isinstance(item, bool | int | float | str):
            raise ValueError(f"{where}: expected a number, a word or a list of them, got {type(item).__name__}")


# ---- transformers ----------------------------------------------------------------------------------------------

NOT_HERE = {  # kinds that hand over to another library, or load a part from another repository
    *("timm_wrapper", "timm_backbone", "vision-encoder-decoder", "encoder-decoder", "speech-encoder-decoder", "rag"),
}
OF_ANOTHER_REPOSITORY = ("backbone", "use_pretrained_backbone", "use_timm_backbone", "backbone_kwargs")
NESTED = ("text_config", "vision_config", "text_config_dict", "vision_config_dict")
ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
TRANSFORMERS_BESIDE = {"model_type", "architectures", "tokenizer_class", *ROPE, *NESTED}
LABELS = ("id2label", "label2id")
NOT_LINKED = ("config.json", "adapter_config.json", "generation_config.json", "open_clip_config.json")


def clean_transformers_config(values: dict[str, Any], where: str, model_type: str | None = None) -> dict[str, Any]:
    """``config.json`` of transformers with the keys that the class of its ``model_type`` declares.

    Raises:
        ValueError: a model type that transformers does not know (its code would come with the model), or one that
            loads parts from elsewhere.
    """
    from transformers import CONFIG_MAPPING

    kind = values.get("model_type", model_type)
    if kind == MODEL_TYPE:
        raise ValueError(
            f"{where} is of a defended model, expected one of an encoder; write ZePAD.from_pretrained(...)"
        )
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        own = " and brings code of its own, which is never run here" if "auto_map" in values else ""
        raise ValueError(f"{where}: the model_type {str(kind)[:80]!r} is unknown to transformers{own}")
    if kind in NOT_HERE:
        raise ValueError(f"{where}: a model_type of {kind!r} is not supported; for models of timm write timm:NAME")
    declared = CONFIG_MAPPING[kind]
    known = {*inspect.signature(declared.__init__).parameters, *declared.attribute_map, *TRANSFORMERS_BESIDE}
    clean = {key: value for key, value in values.items() if key in known and key not in (*LABELS, "self", "kwargs")}
    _check_class_name(clean.get("tokenizer_class"), f"{where}: tokenizer_class")
    for key in OF_ANOTHER_REPOSITORY:
        if clean.get(key):
            raise ValueError(f"{where}: {key}: a part of another repository is not loaded; leave the key out")
    for key, value in list(clean.items()):
        if isinstance(value, dict):
            inner = value.get("model_type")
            part = getattr(declared, "sub_configs", {}).get(key.removesuffix("_dict"))
            if inner is not None or part is not None:
                default = getattr(part, "model_type", None) or None
                clean[key] = clean_transformers_config(value, f"{where}: {key}", default)
            elif key not in ROPE:
                del clean[key]
    return clean


def clean_tokenizer_config(values: dict[str, Any], where: str) -> dict[str, Any]:
    """``tokenizer_config.json`` without code, other files, and templates of chats."""
    dropped = ("auto_map", "chat_template", "name_or_path", "special_tokens_map_file", "tokenizer_file", "trust")
    files = ("_file", "_path", "_dir")
    clean = {
        key: value
        for key, value in values.items()
        if key not in dropped and not key.endswith(files) and not key.startswith("trust")
    }
    _check_class_name(clean.get("tokenizer_class"), f"{where}: tokenizer_class")
    return clean


def clean_config_of_tokenizer(values: dict[str, Any], where: str) -> dict[str, Any]:
    """What a tokenizer reads of ``config.json``; nothing where the model itself is of another library."""
    try:
        return clean_transformers_config(values, where)
    except ValueError:
        return {}


def _check_class_name(name: Any, where: str) -> None:
    if name is not None and (not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name)):
        raise ValueError(f"{where}: expected the name of a class, got {name!r:.80}")


PROCESSOR = {
    *("image_processor_type", "feature_extractor_type", "do_resize", "size", "resample", "do_center_crop"),
    *("crop_size", "crop_pct", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    *("do_convert_rgb", "max_num_patches", "patch_size", "do_pad"),
}


def clean_processor_config(values: dict[str, Any], where: str) -> dict[str, Any]:
    """``preprocessor_config.json`` with the steps that :mod:`zepad_mm.encoders.huggingface_preprocess` knows."""
    clean = {key: value for key, value in values.items() if key in PROCESSOR}
    for key in ("image_processor_type", "feature_extractor_type"):
        _check_class_name(clean.get(key), f"{where}: {key}")
    for key in ("size", "crop_size", "patch_size"):  # their processor runs once on a small image
        sides = clean.get(key)
        if _largest(list(sides.values()) if isinstance(sides, dict) else [sides]) > LARGEST_SIDE:
            raise ValueError(f"{where}: {key}: expected at most {LARGEST_SIDE} pixels, got {sides!r:.80}")
    if _largest([clean.get("max_num_patches")]) > MOST_PATCHES:
        raise ValueError(f"{where}: max_num_patches: expected at most {MOST_PATCHES}")
    return clean


# ---- peft ------------------------------------------------------------------------------------------------------

TOKENIZER_CONFIGS: dict[str, Clean] = {"tokenizer_config.json": clean_tokenizer_config}
OPEN_CLIP_CONFIGS: dict[str, Clean] = {
    "open_clip_config.json": clean_open_clip_config,
    "config.json": clean_config_of_tokenizer,
    **TOKENIZER_CONFIGS,
}
TIMM_CONFIGS: dict[str, Clean] = {"config.json": clean_timm_config}
TRANSFORMERS_CONFIGS: dict[str, Clean] = {
    "config.json": clean_transformers_config,
    "preprocessor_config.json": clean_processor_config,
    **TOKENIZER_CONFIGS,
}
