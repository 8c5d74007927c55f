"""Mono-InternVL: a monolithic multimodal LLM, one decoder that sees and writes.

Importing this package registers the model with transformers' `Auto*` classes.
"""

from contextlib import suppress

import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from .configuration_mono_internvl import MonoInternVLConfig, MonoInternVLTextConfig, MonoInternVLVisionConfig
from .image_processing_mono_internvl import MonoInternVLImageProcessor
from .modeling_mono_internvl import MonoInternVLForCausalLM, MonoInternVLModel
from .processing_mono_internvl import MonoInternVLProcessor


__version__ = "0.1.0"

if __name__ == "mono_internvl":
    # Only under its own name: pytest imports a root folder with an `__init__.py` once more, under the folder's name.
    AutoConfig.register(MonoInternVLConfig.model_type, MonoInternVLConfig, exist_ok=True)
    for _auto_class in (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        transformers.AutoModelForMultimodalLM,
    ):
        _auto_class.register(MonoInternVLConfig, MonoInternVLForCausalLM, exist_ok=True)
    AutoProcessor.register(MonoInternVLConfig, MonoInternVLProcessor, exist_ok=True)
    with suppress(ImportError):
        # Before 5.18 this class is a placeholder that wants torchvision; the processor loads ours by name.
        AutoImageProcessor.register(
            MonoInternVLConfig, slow_image_processor_class=MonoInternVLImageProcessor, exist_ok=True
        )

__all__ = [
    "MonoInternVLConfig",
    "MonoInternVLForCausalLM",
    "MonoInternVLImageProcessor",
    "MonoInternVLModel",
    "MonoInternVLProcessor",
    "MonoInternVLTextConfig",
    "MonoInternVLVisionConfig",
]
