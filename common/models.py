"""Models and processors by name, as the command line and the evaluation harnesses are given them: a folder, an adapter
over its base, a Hub id, `nano` or nothing (the bundled nano); their device and dtype.

Whatever is wrong with a model's files is one `ModelError` that names it. Nothing is printed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..compat_mono_internvl import IN_FLOAT16, cpu_has_bfloat16_units
from ..configuration_mono_internvl import MonoInternVLConfig
from ..loading_mono_internvl import adapter_base, adopt_placement, list_gaps, put_adapter
from ..modeling_mono_internvl import MonoInternVLForCausalLM
from ..processing_mono_internvl import MonoInternVLProcessor
from ..queries_mono_internvl import check_same_queries


# The nano travels with the package, beside the model's code.
BUNDLED_MODEL = Path(__file__).resolve().parent.parent
# Its name where a model has to be named: a command, a recipe, a harness.
BUNDLED_NAME = "nano"
# The name that it has for others: clients of a server, runtimes, model cards.
BUNDLED_TITLE = "mono-internvl-nano"
# A repository of the Hub; some commands take its revision too.
HUB_ID = re.compile(r"(?!\.)([\w.-]+/[\w.-]+)(?:@(.+))?")
# None: the checkpoint's own.
DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
FLOAT16 = ("float16", "fp16", "half")


class ModelError(ValueError):
    """A model folder or Hub repository that cannot be used."""


class NoSuchModel(ModelError, FileNotFoundError):
    """A name that is neither a folder nor could be a Hub id."""


def find_folder(model: str | os.PathLike[str]) -> Path | None:
    """The folder that a name means, whatever it holds, or None for a Hub id (`owner/name`, `owner/name@revision`).

    `nano`, where nothing else has that name, is the bundled model.

    Raises:
        NoSuchModel: neither; says what is allowed.
    """
    path = Path(model).expanduser()
    if str(model) and path.is_dir():  # an empty path is the working folder's
        return path
    if str(model) and os.path.lexists(path):
        what = "a file, not a model folder" if path.exists() else "a link to something that does not exist"
        raise NoSuchModel(f"no such model folder: {model} is {what}")
    if str(model) == BUNDLED_NAME:
        return BUNDLED_MODEL
    if not HUB_ID.fullmatch(str(model)):
        raise NoSuchModel(
            f"no such model folder: {model} (a Hub id looks like owner/name, the bundled model is {BUNDLED_NAME})"
        )
    return None


def title_of(model: str | os.PathLike[str] | None) -> str:
    """What a model is called where others see it: a Hub id, a folder's own name, or `BUNDLED_TITLE`.

    Raises:
        NoSuchModel: as `find_folder`.
    """
    folder = BUNDLED_MODEL if model is None else find_folder(model)
    if folder is None:
        return str(model)
    return BUNDLED_TITLE if folder.resolve() == BUNDLED_MODEL else folder.resolve().name or str(model)


def resolve_model(model: str | None) -> str:
    """What `load_model` gets: a folder that exists, of a model or of a LoRA adapter, or a Hub id.

    Nothing, or `nano` where no folder has that name, is the bundled model.

    Raises:
        ModelError: neither, or an adapter without its base; names it.
    """
    folder = BUNDLED_MODEL if model is None else find_folder(model)
    if folder is None:
        return str(model)
    if base_of_adapter(str(folder)) is None and not (folder / "config.json").is_file():
        raise ModelError(f"{model} is not a model folder: it has no config.json")
    return str(folder)


def base_of_adapter(model: str) -> str | None:
    """The base model of a folder that PEFT wrote, or None where the folder is none of an adapter.

    Raises:
        ModelError: its base is not named, or named and not there; it has no weights.
    """
    try:
        base = adapter_base(model)
    except ValueError as error:
        raise ModelError(str(error)) from error
    try:
        return None if base is None else resolve_model(base)
    except ModelError as error:
        file = Path(model) / "adapter_config.json"
        raise ModelError(
            f"{model} is a LoRA adapter on {base}: {error}; set base_model_name_or_path in {file}"
        ) from error


@contextmanager
def _naming(model: str) -> Iterator[None]:
    """Whatever goes wrong in a model's files becomes one error that names the model."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # on damaged files json, pickle, safetensors and tokenizers raise nearly anything
        reason = str(error) or type(error).__name__
        if damaged := _damaged_file(model):
            raise ModelError(f"{damaged} is damaged: {reason}") from error
        raise ModelError(reason if model in reason else f"{model}: {reason}") from error


def _damaged_file(model: str) -> Path | None:
    """The first weight file of a local folder that safetensors cannot open."""
    for path in sorted(Path(model).glob("*.safetensors")) if os.path.isdir(model) else []:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return path
    return None


def load_config(model: str) -> MonoInternVLConfig:
    """The configuration of what `resolve_model` returned."""
    base = base_of_adapter(model)
    with _naming(base or model):
        config = MonoInternVLConfig.from_pretrained(base or model)
    if base is not None:
        with _naming(model):
            adopt_placement(config, model, {})
    return config


def load_processor(model: str) -> MonoInternVLProcessor:
    """The processor of what `resolve_model` returned; an adapter's folder may have one of its own."""
    if not (Path(model) / "tokenizer_config.json").is_file():
        model = base_of_adapter(model) or model
    with _naming(model):
        return MonoInternVLProcessor.from_pretrained(model)


def load_model(
    model: str, *, device: str = "auto", dtype: str = "auto", image_token_id: int | None = None
) -> tuple[MonoInternVLForCausalLM, MonoInternVLProcessor]:
    """Model and processor of what `resolve_model` returned, on the device, ready to answer.

    Raises:
        ModelError: files are missing or damaged, or tokenizer and config disagree; names the model.
        ValueError: no such device or dtype.
    """
    check_dtype(dtype)
    place = _choose_device(device)
    config, processor = load_config(model), load_processor(model)
    if image_token_id is not None:
        config.image_token_id = image_token_id
    if processor.image_token_id != config.image_token_id:
        raise ModelError(
            f"{model}: <IMG_CONTEXT> is token {processor.image_token_id} of its tokenizer, but the model looks for "
            f"{config.image_token_id}; pass --image-token-id {processor.image_token_id}"
        )
    try:
        check_same_queries(config, processor)
    except ValueError as error:
        raise ModelError(f"{model}: {error}") from error
    base = base_of_adapter(model)
    chosen = _choose_dtype(dtype, place, config)
    with _naming(base or model):
        loaded = MonoInternVLForCausalLM.from_pretrained(base or model, config=config, dtype=chosen)
    if base is not None:
        with _naming(model):
            loaded = with_adapter(loaded, model)
    if loaded.dtype == torch.float16:
        loaded = loaded.to(torch.float32 if place.type == "cpu" else torch.bfloat16)
    return loaded.to(place).eval(), processor  # type: ignore[arg-type]


def with_adapter(model: MonoInternVLForCausalLM, folder: str) -> MonoInternVLForCausalLM:
    """The model with an adapter's weights merged into its own, so that it runs as fast as without.

    Raises:
        ModelError: PEFT is not installed, or the adapter does not fit; what is missing or left over is named.
    """
    try:
        adapted, gaps = put_adapter(model, folder, {})
    except ImportError as error:
        raise ModelError(f"{folder} is a LoRA adapter, which PEFT reads: pip install peft") from error
    if problems := list_gaps(gaps):
        raise ModelError(f"{folder} does not fit its base: {problems}")
    return adapted.merge_and_unload()


def check_dtype(dtype: str) -> None:
    """Refuse what the model cannot run in; before anything is loaded.

    Raises:
        ValueError: float16, or not one of `DTYPES`.
    """
    if dtype in FLOAT16:
        raise ValueError(f"dtype {dtype} is refused: the model would run {IN_FLOAT16}; use bfloat16 or float32")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError:
        place = None
    if place is None or place.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {device!r} is not one of auto, cpu, cuda, cuda:N, mps")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device}: this machine has {torch.cuda.device_count()} CUDA devices that torch sees")
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps: torch sees no Apple GPU on this machine")
    return place


def _choose_dtype(dtype: str, place: torch.device, config: MonoInternVLConfig) -> torch.dtype:
    """The checkpoint's own, but no float16, and no bfloat16 where the CPU is slow in it."""
    if (given := DTYPES[dtype]) is not None:
        return given
    if config.dtype == torch.float32 or (place.type == "cpu" and not cpu_has_bfloat16_units()):
        return torch.float32
    return torch.bfloat16
