"""A native or an official folder, local or from the Hub -> the processor's image processor and tokenizer."""

import inspect
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig
from transformers.utils.hub import cached_file

from .compat_mono_internvl import check_keywords
from .image_processing_mono_internvl import MonoInternVLImageProcessor


logger = logging.getLogger(__name__)


_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download", "proxies")
# What transformers' automatic classes read themselves or hand to every part, and what a script for other models says.
_LOADING_OPTIONS = frozenset(
    {
        *_HUB_OPTIONS,
        *("trust_remote_code", "code_revision", "chat_template", "use_fast", "backend", "config", "dtype"),
        *("torch_dtype", "device_map", "return_unused_kwargs", "use_auth_token", "user_agent", "commit_hash"),
    }
)
_TOKENIZER_OPTIONS = (
    *("padding_side", "truncation_side", "model_max_length", "clean_up_tokenization_spaces", "extra_special_tokens"),
    *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"),
    *("padding", "max_length", "truncation", "pad_to_multiple_of", "add_bos_token", "add_eos_token"),
)


def _image_processor_options() -> list[str]:
    names = inspect.signature(MonoInternVLImageProcessor.__init__).parameters
    return [name for name in names if name not in ("self", "kwargs")]


def read_settings(path: str, name: str, **kwargs: Any) -> dict[str, Any]:
    """A JSON file of a folder or a Hub id; empty where there is none."""
    options = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **options)
    return json.loads(Path(found).read_text(encoding="utf-8")) if found else {}


def load_image_processor(path: str, **kwargs: Any) -> MonoInternVLImageProcessor:
    """Ours if the folder has one; else from an official `config.json`, which holds the tiling. Options override it."""
    chosen = {name: kwargs[name] for name in _image_processor_options() if kwargs.get(name) is not None}
    for name in ("processor_config.json", "preprocessor_config.json"):
        settings = read_settings(path, name, **kwargs)
        settings = settings.get("image_processor", settings)
        if settings.get("image_processor_type") == MonoInternVLImageProcessor.__name__:
            return MonoInternVLImageProcessor(**{**settings, **chosen})
    config = read_settings(path, "config.json", **kwargs)
    vision = config.get("vision_config", {})
    official = {
        "tile_size": config.get("force_image_size") or vision.get("image_size", 448),
        "min_tiles": config.get("min_dynamic_patch", 1),
        "max_tiles": config.get("max_dynamic_patch", 12),
        "use_thumbnail": config.get("use_thumbnail", True),
    }
    return MonoInternVLImageProcessor(**{**official, **chosen})


def load_tokenizer(path: str, **kwargs: Any) -> Any:
    """`tokenizer.json` as it is; an official folder's `tokenizer.model` is converted (needs the installed package)."""
    options = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
    settings = {key: kwargs[key] for key in _TOKENIZER_OPTIONS if key in kwargs}
    if cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **options):
        # tokenizer_config.json names the class. Without a config AutoTokenizer reads config.json and, where this file
        # runs as remote code, warns that it does not know the type.
        config = PreTrainedConfig()
        return AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False, **options, **settings)
    model_file = cached_file(path, "tokenizer.model", _raise_exceptions_for_missing_entries=False, **options)
    if model_file is None:
        raise ValueError(f"{path} has neither tokenizer.json nor tokenizer.model")
    try:
        from mono_internvl.tokenization import convert_tokenizer
    except ImportError as error:
        raise ImportError(
            f"{path} has only a tokenizer.model: install this package, or convert it once where it is installed: "
            f"mono-internvl tokenizer {model_file} {path}"
        ) from error
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        # They lie beside it then, also from the Hub, and hold the tokens that fine-tuning added.
        cached_file(path, name, _raise_exceptions_for_missing_entries=False, **options)
    logger.info("converting %s, which takes seconds; `mono-internvl tokenizer` does it once and for all", model_file)
    with tempfile.TemporaryDirectory() as folder:
        convert_tokenizer(model_file, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **settings)
    tokenizer.name_or_path = str(path)
    return tokenizer


def load_parts(kind: str, path: str, **kwargs: Any) -> list[Any]:
    """Image processor and tokenizer of a processor of this class name, unless they are given.

    Raises:
        TypeError: an option that neither part knows; names the nearest known one.
    """
    kwargs = {name: value for name, value in kwargs.items() if value is not None and not name.startswith("_")}
    given = {name: kwargs.pop(name, None) for name in ("image_processor", "tokenizer")}
    check_keywords(
        f"{kind}.from_pretrained",
        [name for name in kwargs if name not in _LOADING_OPTIONS],
        [*_image_processor_options(), *_TOKENIZER_OPTIONS, "chat_template", "revision", "subfolder"],
    )
    # Asked whether they are None, since a tokenizer's truth is its number of words.
    for name, load in (("image_processor", load_image_processor), ("tokenizer", load_tokenizer)):
        if given[name] is None:
            given[name] = load(path, **kwargs)
    return list(given.values())
