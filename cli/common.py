"""What the commands share: errors as one line, quiet loading, files written whole, fonts that are always there."""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer


if TYPE_CHECKING:
    import torch
    from PIL import ImageFont
    from rich.console import Console

    from ..configuration_mono_internvl import MonoInternVLConfig
    from ..modeling_mono_internvl import MonoInternVLForCausalLM
    from ..processing_mono_internvl import MonoInternVLProcessor


# The nano travels with the package, beside the model's code.
BUNDLED_MODEL = Path(__file__).resolve().parent.parent
# Reading less than this takes under two seconds: no bar.
_QUIET_BYTES = 1 << 30
_LONGEST_MESSAGE = 600
_DTYPES = ("auto", "bfloat16", "float32")

ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="model folder or Hub id  [default: the bundled nano]")
]
MaxTilesOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="most tiles of the pictures  [default: the model's]")
]
MaxPixelsOption = Annotated[int, typer.Option(min=1, metavar="N", help="refuse pictures with more pixels")]
DeviceOption = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps")]
DtypeOption = Annotated[str, typer.Option(metavar="DTYPE", help=", ".join(_DTYPES))]
ImageTokenOption = Annotated[
    int | None,
    typer.Option(min=0, metavar="ID", help="id of <IMG_CONTEXT>, for official checkpoints with another vocabulary"),
]
DEFAULT_MAX_PIXELS = 100_000_000


# ------------------------------------------------------------------------------------------------------------ messages


class ModelError(ValueError):
    """A model folder or Hub repository that cannot be used."""


_debug = False


def set_debug(debug: bool) -> None:
    global _debug
    _debug = debug
    if not debug:
        warnings.simplefilter("ignore")


def user_errors() -> tuple[type[BaseException], ...]:
    """What a user's input, files, network or memory can raise; anything else is a bug and keeps its traceback."""
    # Asked for only when something is raised, when the modules are loaded already or cannot have raised.
    by_module = (("safetensors", "SafetensorError"), ("torch", "OutOfMemoryError"), ("httpx", "HTTPError"))
    found = [getattr(sys.modules[module], name) for module, name in by_module if module in sys.modules]
    return (ValueError, OSError, ImportError, MemoryError, pickle.UnpicklingError, *found)


def one_line(error: BaseException) -> str:
    """An error's message on one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError):
        text = f"out of memory ({text})"
    if len(text) > _LONGEST_MESSAGE:
        text = f"{text[: _LONGEST_MESSAGE - 100]} ... {text[-60:]} (the whole message: --debug)"
    return text


def report(error: BaseException | str) -> None:
    typer.echo(f"error: {one_line(error) if isinstance(error, BaseException) else error}", err=True)


def note(text: str) -> None:
    typer.echo(text, err=True)


def stderr_console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def progress_bar(what: str, total: int | None = None) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, on terminals only; yields `update(done, total)`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = stderr_console()
    if not console.is_terminal:
        # A disabled bar of older rich still prints an empty line.
        yield lambda done, total: None
        return
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def status(what: str) -> Iterator[Callable[[], None]]:
    """A spinner on stderr, on terminals only, until the block ends or the function it yields is called."""
    spinner = stderr_console().status(what)
    spinner.start()
    try:
        yield spinner.stop
    finally:
        spinner.stop()


# -------------------------------------------------------------------------------------------------------------- models


def resolve_model(model: str | None) -> str:
    """What `load_model` gets: a folder that exists, of a model or of a LoRA adapter, or a Hub id.

    Raises:
        ModelError: neither, or an adapter without its base; names it.
    """
    if model is None:
        return str(BUNDLED_MODEL)
    path = Path(model).expanduser()
    if path.is_dir():
        if base_of_adapter(str(path)) is None and not (path / "config.json").is_file():
            raise ModelError(f"{model} is not a model folder: it has no config.json")
        return str(path)
    if path.exists():
        raise ModelError(f"{model} is a file, not a model folder")
    is_hub_id = model.count("/") == 1 and not model.startswith(("/", ".", "~")) and not model.endswith("/")
    if not is_hub_id or "\\" in model:
        raise ModelError(f"no such model folder: {model} (a Hub id looks like owner/name)")
    return model


def base_of_adapter(model: str) -> str | None:
    """The base model of a folder that PEFT wrote, or None where the folder is none of an adapter.

    Raises:
        ModelError: its base is not named, or named and not there; it has no weights.
    """
    if not (Path(model) / "adapter_config.json").is_file():
        # Before torch and transformers are imported for it.
        return None
    from ..loading_mono_internvl import adapter_base

    try:
        base = adapter_base(model)
    except ValueError as error:
        raise ModelError(one_line(error)) from error
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
        reason = one_line(error)
        if damaged := _damaged_file(model):
            raise ModelError(f"{damaged} is damaged: {reason}") from error
        raise ModelError(reason if model in reason else f"{model}: {reason}") from error


def _damaged_file(model: str) -> Path | None:
    """The first weight file of a local folder that safetensors cannot open."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(Path(model).glob("*.safetensors")) if os.path.isdir(model) else []:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return path
    return None


def load_config(model: str) -> MonoInternVLConfig:
    """The configuration of what `resolve_model` returned."""
    from ..configuration_mono_internvl import MonoInternVLConfig

    quiet_libraries()
    model = base_of_adapter(model) or model
    with _naming(model):
        return MonoInternVLConfig.from_pretrained(model)


def load_processor(model: str) -> MonoInternVLProcessor:
    """The processor of what `resolve_model` returned; an adapter's folder may have one of its own."""
    from ..processing_mono_internvl import MonoInternVLProcessor

    quiet_libraries()
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
        ValueError: no such device, or float16.
    """
    import torch

    from ..modeling_mono_internvl import MonoInternVLForCausalLM

    check_dtype(dtype)
    place = _choose_device(device)
    with status("loading"):
        config = load_config(model)
        processor = load_processor(model)
    if image_token_id is not None:
        config.image_token_id = image_token_id
    if processor.image_token_id != config.image_token_id:
        raise ModelError(
            f"{model}: <IMG_CONTEXT> is token {processor.image_token_id} of its tokenizer, but the model looks for "
            f"{config.image_token_id}; pass --image-token-id {processor.image_token_id}"
        )
    base = base_of_adapter(model)
    has_bars = _show_bars_of(base or model)
    chosen = _choose_dtype(dtype, place, config)
    with _naming(base or model), nullcontext() if has_bars else status("loading"):
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
    from ..loading_mono_internvl import list_gaps, put_adapter

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
        ValueError: float16. typer.BadParameter: not a known name.
    """
    if dtype in ("float16", "fp16", "half"):
        raise ValueError("dtype float16 is refused: activations overflow to NaN in it; use bfloat16 or float32")
    if dtype not in _DTYPES:
        raise typer.BadParameter(f"{dtype} is not one of {', '.join(_DTYPES)}", param_hint="--dtype")


def _choose_device(device: str) -> torch.device:
    import torch

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
    import torch

    from ..modeling_mono_internvl import cpu_has_bfloat16_units

    if dtype != "auto":
        return getattr(torch, dtype)
    if config.dtype == torch.float32 or (place.type == "cpu" and not cpu_has_bfloat16_units()):
        return torch.float32
    return torch.bfloat16


def quiet_libraries() -> None:
    if _debug:
        return
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()  # each retry would be a line


def _show_bars_of(model: str) -> bool:
    """The bars of transformers and the Hub client stay only where there is something to wait for."""
    import transformers

    files = [path for ending in ("*.safetensors", "*.bin") for path in Path(model).glob(ending)]
    small = os.path.isdir(model) and sum(path.stat().st_size for path in files) < _QUIET_BYTES
    if small or not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
        return False
    return True


# --------------------------------------------------------------------------------------------------------------- files


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` with the same ending, renamed to `path` when the block succeeds."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_output(path: Path) -> None:
    """Refuse, before the work, a file that could not be written after it.

    Raises:
        FileNotFoundError: its folder is not there. IsADirectoryError, PermissionError: as they say.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: no such folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} cannot be written: it is a folder")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {folder} allows no new files")


def check_picture_output(path: Path) -> None:
    """Refuse, before the work, a name that Pillow cannot write or a folder that is not there.

    Raises:
        ValueError: the ending. OSError: see `check_output`.
    """
    from PIL import Image

    Image.init()
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{path} cannot be written: its ending must be that of a picture, such as .png or .jpg")
    check_output(path)


def font(size: int, text: str = "") -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font; for text outside Latin-1 a system font that has it, if one is found."""
    from PIL import ImageFont

    if any(ord(character) > 0xFF for character in text):
        for name in ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "PingFang.ttc", "msyh.ttc", "DejaVuSans.ttf"):
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError):
        # A Pillow built without FreeType: a small bitmap font.
        return ImageFont.load_default()
