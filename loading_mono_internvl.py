"""Loading is strict, saving writes our layout: what a model folder holds and what is refused.

a model's folder, either layout      every weight once; missing, unexpected and mis-shaped ones are listed
a folder of LoRA adapters            its base, then the adapters over it
options of the released code         refused, with what to say instead
"""

import copy
import inspect
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import is_peft_available, logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .compat_mono_internvl import IN_FLOAT16, check_keywords
from .configuration_mono_internvl import MonoInternVLTextConfig
from .processor_loading_mono_internvl import read_settings
from .tiling_mono_internvl import TILE_OPTIONS
from .video_mono_internvl import VIDEO_OPTIONS
from .weight_mapping_mono_internvl import beyond_official, checkpoint_mapping


logger = logging.get_logger(__name__)

# Options on old model cards -> what to write.
_RELEASED_OPTIONS = {
    "use_flash_attn": "attn_implementation='flash_attention_2', or nothing for torch's own",
    "load_in_8bit": "quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
    "load_in_4bit": "quantization_config=BitsAndBytesConfig(load_in_4bit=True)",
}
# What says where a model lies; its processor lies there too.
_PLACE = ("revision", "cache_dir", "subfolder", "token", "local_files_only")
# What else `from_pretrained` reads from its keywords.
_LOADING = (
    *("dtype", "device_map", "attn_implementation", "quantization_config", "max_memory", "subfolder", "variant"),
    *("text_config", "vision_config", "image_token_id", "visual_attention_experts"),
)


class SavingMixin:
    """`save_pretrained` in our layout, or the official one."""

    config: Any

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):  # type: ignore[no-untyped-def]
        """As in transformers, but our layout is the default: `Trainer` resumes with a plain `load_state_dict`, which
        would skip every official key. `save_original_format=True` writes the official layout (v1 only).

        Raises:
            ValueError: the official layout is asked for and has no place for something; names it.
        """
        if save_original_format and (found := beyond_official(self.config)):
            raise ValueError(
                f"the official layout has no place for {', '.join(found)}; save with save_original_format=False"
            )
        if save_original_format:
            # transformers would undo only what loading did, and a model loaded in our layout stays in it.
            self._weight_conversions = checkpoint_mapping()
        kwargs["save_original_format"] = save_original_format
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


class StrictLoadingMixin:
    """`from_pretrained` of a model that answers: nothing may be missing."""

    # Modules that keep their precision when weights are quantised.
    _unquantized_modules: list[str]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):  # type: ignore[no-untyped-def]
        """As in transformers, for our layout and the official one, and strict.

        A folder of adapters is loaded over the base that it names.

        Raises:
            ValueError: weights are missing or unexpected (all are listed), unless the caller looks after them through
                `output_loading_info=True` or `ignore_mismatched_sizes=True`; an adapter's base is not named.
            TypeError: an option of the released code.
            ImportError: adapters without PEFT.
        """
        for name, instead in _RELEASED_OPTIONS.items():
            if name in kwargs:
                raise TypeError(
                    f"{name} is an option of the released code: say {instead}; docs/legacy.md has the others"
                )
        place = {name: kwargs[name] for name in _PLACE if kwargs.get(name) is not None}
        adapter_kwargs = dict(kwargs.pop("adapter_kwargs", None) or {})
        # An `Auto` class looks for adapters before it calls this, and hands over their folder and base.
        adapter, base = adapter_kwargs.pop("_adapter_model_path", None), pretrained_model_name_or_path
        # None: the weights come as `state_dict`.
        whole = base is None or os.path.isfile(os.path.join(str(base), "config.json"))
        if adapter is None and not whole and (named := adapter_base(base)):
            adapter, base = base, named
        if adapter is not None and not is_peft_available():
            raise ImportError(f"{adapter} holds adapters, which PEFT reads: pip install peft")
        config = kwargs.get("config")
        if config is not None and not isinstance(config, (str, os.PathLike, PreTrainedConfig)):
            raise TypeError(f"config must be a MonoInternVLConfig or a path, not {type(config).__name__}")
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = spare(kwargs["quantization_config"], cls._unquantized_modules)
        wants_info = kwargs.pop("output_loading_info", False)
        tolerant = wants_info or kwargs.get("ignore_mismatched_sizes", False)
        # Mis-shaped weights are listed below with the others; transformers' own error names none.
        kwargs["ignore_mismatched_sizes"] = True
        loaded: Any = super().from_pretrained(base, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        model, info = loaded
        if not tolerant:
            _refuse_gaps(base, info)
        if adapter is not None:
            _, found = put_adapter(model, adapter, adapter_kwargs)
            # What answers is the model itself, as from transformers' `load_adapter`.
            model._hf_peft_config_loaded = True
            if not tolerant:
                _refuse_gaps(adapter, found)
        model._loaded_from = [(str(base), place)] if base is not None else []
        if adapter is not None:
            model._loaded_from.insert(0, (str(adapter), place if base == pretrained_model_name_or_path else {}))
        if model.dtype == torch.float16:
            logger.warning(f"Mono-InternVL was loaded {IN_FLOAT16}; use bfloat16 or float32")
        return (model, info) if wants_info else model


def refuse_unknown(what: str, options: Mapping[str, Any]) -> None:
    """Refuse what transformers hands on to a model because neither it nor the configuration has a place for it.

    Raises:
        TypeError: names the option and where it belongs, or the nearest known one.
    """
    for name in options:
        if name in MonoInternVLTextConfig.__annotations__ or name in ("rope_scaling", "rope_theta"):
            raise TypeError(f"{name} is a value of text_config: give text_config={{{name!r}: ..}}")
        if name in (*TILE_OPTIONS, *VIDEO_OPTIONS, "max_pixels"):
            raise TypeError(f"{name} is an option of the processor and of chat, not of the model")
    own = set(inspect.signature(PreTrainedModel.from_pretrained).parameters) - {"model_args", "kwargs"}
    check_keywords(what, options, [*own, *_LOADING])


def put_adapter(model: Any, adapter: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, list[str]]]:
    """Put adapters over a model as PEFT itself does: transformers' `load_adapter` does not know all that PEFT writes
    (DoRA's magnitudes and, on older versions, whole modules, single tokens and the head).

    Returns:
        PEFT's wrapper, which can merge them into the model, and what was missing and unexpected.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils import load_peft_weights

    config = PeftConfig.from_pretrained(adapter, **options)
    config.inference_mode = True
    names = load_peft_weights(adapter, device="cpu", **options)
    _add_rows(model, names)
    wrapper = PeftModel(model, config, autocast_adapter_dtype=False)
    _materialize(wrapper)
    # Parts of an offloaded base stay where they are: PEFT would deal all of them out anew.
    placed = model.__dict__.pop("hf_device_map", None)
    try:
        found = wrapper.load_adapter(adapter, "default", is_trainable=False, autocast_adapter_dtype=False, **options)
    finally:
        if placed is not None:
            model.hf_device_map = placed
    model.eval()
    adopt_placement(model.config, adapter, options)
    # PEFT writes an embedding that was resized and trained twice, the second time under a name that it does not read.
    twice = {name for name in names if name.replace(".modules_to_save.", ".") in names.keys() - {name}}
    unexpected = [name for name in found.unexpected_keys if name not in twice]
    return wrapper, {"missing_keys": list(found.missing_keys), "unexpected_keys": unexpected}


def adopt_placement(config: Any, adapter: Any, options: Mapping[str, Any]) -> None:
    """Put a base's learnable queries where the adapters over it were trained to have them: their folder holds no
    configuration, but may hold a processor, which says it."""
    if config.num_learnable_queries:
        said = read_settings(adapter, "processor_config.json", **options)
        config.query_placement = said.get("query_placement", config.query_placement)


def _materialize(adapted: Any) -> None:
    """Adapters of offloaded layers lie where these compute: no hook would bring them, as it brings the layer's own."""
    for module in adapted.modules():
        layer = getattr(module, "base_layer", None)
        device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
        for name, inner in module.named_modules() if layer is not None else ():
            if name.split(".")[0] == "base_layer":
                continue
            for key, parameter in inner.named_parameters(recurse=False):
                if parameter.is_meta:
                    there = torch.empty_like(parameter, device="cpu" if device is None else device)
                    setattr(inner, key, torch.nn.Parameter(there, requires_grad=False))


def _add_rows(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Give the base the rows for new tokens that an adapter brings (PEFT saves embedding and head once resized)."""
    name = re.compile(r"(embed_tokens|lm_head)(\.modules_to_save)?(\.base_layer)?\.weight$")
    rows = max((weight.shape[0] for key, weight in weights.items() if name.search(key)), default=0)
    if rows > model.get_input_embeddings().weight.shape[0]:
        # All of them come with the adapter, so that none has to be drawn well.
        model.resize_token_embeddings(rows, mean_resizing=False)


def list_gaps(info: Mapping[str, Any]) -> str:
    """What a load left missing, unexpected or mis-shaped, for a message; empty where it left nothing."""
    problems = [
        f"{len(keys)} {kind}: {', '.join(sorted(str(key) for key in keys))}"
        for kind in ("missing", "unexpected", "mismatched")
        if (keys := info.get(f"{kind}_keys"))
    ]
    return "; ".join(problems).replace(" mismatched:", " mis-shaped:")


def _refuse_gaps(name: Any, info: Mapping[str, Any]) -> None:
    """Raise a ValueError that lists what a load left missing, unexpected or mis-shaped."""
    if text := list_gaps(info):
        raise ValueError(f"{name} does not hold this model's weights; {text}")


def spare(quantization: Any, modules: list[str]) -> Any:
    """A copy of a quantisation config that leaves `modules` as they are, unless it names its own."""
    if not isinstance(quantization, (dict, QuantizationConfigMixin)):
        raise TypeError(f"quantization_config must be one of transformers' configs, not {type(quantization).__name__}")
    if isinstance(quantization, dict):
        quantization = AutoQuantizationConfig.from_dict(quantization)
    quantization = copy.copy(quantization)
    for name in ("modules_to_not_convert", "llm_int8_skip_modules"):
        if getattr(quantization, name, modules) is None:
            setattr(quantization, name, list(modules))
    return quantization


def adapter_base(folder: str | os.PathLike[str]) -> str | None:
    """The model that a folder of adapter weights, as PEFT writes it, was trained on; None where it is no such folder.

    A relative name is meant from where one stands, or from the adapter's folder, with which the base may travel.

    Raises:
        ValueError: the base is not named, or the weights are not there; names the file.
    """
    place = Path(folder)
    file = place / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not base:
        raise ValueError(f"{file} does not name the model that the adapter was trained on: set base_model_name_or_path")
    if not any((place / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise ValueError(f"{folder} holds an adapter's configuration but no adapter_model.safetensors")
    for candidate in (Path(base).expanduser(), place / base):
        if candidate.resolve() != place.resolve() and (candidate / "config.json").is_file():
            return str(candidate)
    return str(base)
