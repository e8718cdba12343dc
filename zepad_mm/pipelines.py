"""Defended models as entries of transformers: ``import zepad_mm.pipelines`` registers them.

``AutoConfig`` and ``AutoModel`` then read the folders that :meth:`ZePAD.save_pretrained` writes, here or on the Hub.
``pipeline("robust-zero-shot-image-classification")`` answers as :class:`RobustZeroShotClassifier`. All of the code is
in this package: none comes with a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, Pipeline, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.pipelines import PIPELINE_REGISTRY

from zepad_mm.classifier import RobustZeroShotClassifier, pixels_of
from zepad_mm.models.config import ZePADConfig
from zepad_mm.models.zepad import EMBEDDED_MODEL, ZePAD
from zepad_mm.utils.hub import MODEL_TYPE
from zepad_mm.utils.registry import did_you_mean

__all__ = ["TASK", "PretrainedZePAD", "PretrainedZePADConfig", "RobustZeroShotImageClassificationPipeline"]

TASK = "robust-zero-shot-image-classification"
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")  # as of ZePAD.from_pretrained
# what pipeline() and the auto classes pass on that says nothing of a model without code and adapters of its own
IGNORED = ("_from_auto", "_from_pipeline", "adapter_kwargs", "code_revision", "trust_remote_code")
OF_A_CALL = ("hypothesis_template", "top_k", "return_evidence", "on_adversarial", "policy")


class PretrainedZePADConfig(PreTrainedConfig):
    """The ``config.json`` of a defended model, as transformers reads it.

    Attributes:
        zepad: the configuration; None where the keys of none were given.
    """

    model_type = MODEL_TYPE

    def __init__(self, **values: Any) -> None:
        own = {name: values.pop(name) for name in ZePADConfig.__dataclass_fields__ if name in values}
        zepad = ZePADConfig.from_dict(own) if set(own) - {"model_type"} else None
        if zepad is not None:
            values["id2label"] = dict(enumerate(zepad.class_names))
            values["label2id"] = {name: index for index, name in enumerate(zepad.class_names)}
        super().__init__(**values)
        self.zepad = zepad

    def to_dict(self) -> dict[str, Any]:
        """What stands in ``config.json``."""
        return dict(super().to_dict()) if self.zepad is None else self.zepad.to_dict()

    to_diff_dict = to_dict


class PretrainedZePAD(PreTrainedModel):
    """A defended model with the methods of transformers' models.

    ``model(images).logits`` are the fused logits (B, C) of images (B, 3, H, W) in [0, 1], resized or not: the encoders
    resize and normalise.

    Args:
        config: of the model.
        zepad: the model, whose weights are trained and loaded by the other methods of this package.
    """

    config_class = PretrainedZePADConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: PretrainedZePADConfig, zepad: ZePAD | None = None) -> None:
        if zepad is None:
            raise ValueError("a defended model is not built from a configuration alone; write from_pretrained(...)")
        super().__init__(config)
        self.zepad = zepad

    @classmethod
    def around(cls, zepad: ZePAD) -> PretrainedZePAD:
        """A defended model that is loaded already."""
        return cls(PretrainedZePADConfig(**zepad.config.to_dict()), zepad).eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        dtype: str | torch.dtype | None = None,
        **given: Any,
    ) -> PretrainedZePAD:
        """Load a defended model: ``"embedded"``, a folder, or a name on the Hub.

        Args:
            pretrained_model_name_or_path: as for :meth:`ZePAD.from_pretrained`.
            config: as the auto classes read it; the model reads the same file again.
            dtype: precision of the encoders; None and "auto": float32.
            given: ``cache_dir``, ``force_download``, ``local_files_only``, ``revision``, ``token``.

        Raises:
            ValueError: another argument, such as a device map or a quantization; and as for
                :meth:`ZePAD.from_pretrained`.
        """
        unknown = [name for name in given if name not in HUB + IGNORED and given[name] is not None]
        if unknown:
            raise ValueError(
                f"{unknown[0]}: expected one of {', '.join(('dtype', *HUB))}{did_you_mean(unknown[0], HUB)}; move the "
                "model with model.to(device), or write pipeline(..., device=device)"
            )
        zepad = ZePAD.from_pretrained(
            pretrained_model_name_or_path, **{name: given[name] for name in HUB if given.get(name) is not None}
        )
        if dtype not in (None, "auto"):
            RobustZeroShotClassifier(zepad).to(dtype=dtype)
        return cls.around(zepad)

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        """(B, 3, H, W) in [0, 1] to the fused logits (B, C), differentiable through the whole defence."""
        return ImageClassifierOutput(logits=self.zepad(pixel_values))

    def save_pretrained(self, save_directory: str | Path, **given: Any) -> None:
        """As :meth:`ZePAD.save_pretrained`."""
        self.zepad.save_pretrained(save_directory, **given)

    def push_to_hub(self, repo_id: str, **given: Any) -> str:
        """As :meth:`ZePAD.push_to_hub`."""
        return self.zepad.push_to_hub(repo_id, **given)


class RobustZeroShotImageClassificationPipeline(Pipeline):
    """:class:`RobustZeroShotClassifier` as a pipeline; built by ``pipeline("robust-zero-shot-image-classification")``.

    A list of images gives a list of answers; a data set of torch or a generator is a stream, read one batch at a time.
    All that the classifier's call takes is given here or when the pipeline is built: ``hypothesis_template``,
    ``top_k``, ``return_evidence``, ``on_adversarial``, ``policy``.

    Args:
        model: a :class:`PretrainedZePAD` or a :class:`ZePAD`.
        given: of :class:`transformers.Pipeline`, such as ``device`` and ``batch_size``; and of a call.
    """

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, model: PretrainedZePAD | ZePAD, **given: Any) -> None:
        model = PretrainedZePAD.around(model) if isinstance(model, ZePAD) else model
        if not isinstance(model, PretrainedZePAD):
            raise ValueError(f"model: expected a defended model of zepad-mm, got a {type(model).__name__}")
        self.classifier = RobustZeroShotClassifier(model.zepad)
        super().__init__(model=model, **given)

    def __call__(self, image: Any, candidate_labels: Any = None, **given: Any) -> Any:
        """Classify one image, a list, or a stream, as :meth:`RobustZeroShotClassifier.__call__`.

        Args:
            image: a PIL image, path, URL, array or tensor; a list of these; a generator or a data set of torch.
            candidate_labels: at least one; None: those that the pipeline was built with.
            given: see the class.

        Raises:
            ValueError: no labels, an unknown argument, or an image that cannot be read.
        """
        if candidate_labels is not None:
            given["candidate_labels"] = candidate_labels
        if "candidate_labels" not in {**self._forward_params, **given}:
            raise ValueError('candidate_labels: expected at least one label, such as ["a cat", "a dog"], got none')
        return super().__call__(image, **given)

    def _sanitize_parameters(self, **given: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        known = ("candidate_labels", *OF_A_CALL)
        for name in given:
            if name not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}{did_you_mean(name, known)}")
        return {}, given, {}

    def preprocess(self, input_: Any, **_: Any) -> dict[str, Any]:
        """An image as a tensor (3, H, W) in [0, 1]."""
        return {"image": pixels_of(input_)}

    def _forward(self, input_tensors: dict[str, Any], **given: Any) -> Any:
        return self.classifier(input_tensors["image"], given.pop("candidate_labels"), **given)

    def postprocess(self, model_outputs: Any, **_: Any) -> Any:
        """The answer as it is: the classifier ranks the labels."""
        return model_outputs

    def get_iterator(
        self, inputs: Any, num_workers: int, batch_size: int, _: Any, forward_params: Any, __: Any
    ) -> Iterator[Any]:
        """Answers to a list, a data set or a generator, one batch at a time. Raises ValueError for workers."""
        if num_workers:
            raise ValueError(f"num_workers: images are read in this process, got {num_workers}; leave it out")
        given = dict(forward_params)
        images = inputs if isinstance(inputs, Iterator) else (inputs[index] for index in range(len(inputs)))
        classifier = RobustZeroShotClassifier(self.classifier.model, batch_size)
        return classifier(images, given.pop("candidate_labels"), **given)

    def save_pretrained(self, save_directory: str | Path, **given: Any) -> None:
        """The model, as :meth:`ZePAD.save_pretrained`; no file with code is written."""
        self.model.save_pretrained(save_directory, **given)

    def push_to_hub(self, repo_id: str, **given: Any) -> str:
        """The model, as :meth:`ZePAD.push_to_hub`."""
        return str(self.model.push_to_hub(repo_id, **given))


AutoConfig.register(MODEL_TYPE, PretrainedZePADConfig, exist_ok=True)
AutoModel.register(PretrainedZePADConfig, PretrainedZePAD, exist_ok=True)
if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
    PIPELINE_REGISTRY.register_pipeline(
        TASK,
        RobustZeroShotImageClassificationPipeline,
        pt_model=PretrainedZePAD,
        default={"model": (str(EMBEDDED_MODEL), None)},
        type="multimodal",
    )
