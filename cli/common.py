"""What the commands share: options, errors as one line, progress on stderr, quiet loading."""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer


if TYPE_CHECKING:
    from rich.console import Console

    from mono_internvl.modeling_mono_internvl import MonoInternVLForCausalLM
    from mono_internvl.processing_mono_internvl import MonoInternVLProcessor


# Reading less than this takes under two seconds: no bar.
_QUIET_BYTES = 1 << 30
# The library's own, repeated here because help and usage errors must not wait for it (tests/test_cli.py compares them).
DTYPES = ("auto", "bfloat16", "float32")
FLOAT16 = ("float16", "fp16", "half")
DEFAULT_MAX_PIXELS = 100_000_000
HTTP_LIBRARIES = ("httpx2", "httpx")
_LONGEST_MESSAGE = 600

ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="model folder or Hub id  [default: the bundled nano]")
]
MaxTilesOption = Annotated[
    Any,  # int | str | None, of which typer reads no union
    typer.Option(
        parser=lambda text: read_max_tiles(text),
        metavar="N|auto",
        help="most tiles of the pictures; auto enlarges none  [default: the model's]",
    ),
]
# For files of other runtimes, which count alone.
MaxTilesNumberOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="most tiles of a picture  [default: the model's]")
]
MaxPixelsOption = Annotated[int, typer.Option(min=1, metavar="N", help="refuse pictures with more pixels")]
DeviceOption = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps")]
DtypeOption = Annotated[str, typer.Option(metavar="DTYPE", help=", ".join(DTYPES))]
ImageTokenOption = Annotated[
    int | None,
    typer.Option(min=0, metavar="ID", help="id of <IMG_CONTEXT>, for official checkpoints with another vocabulary"),
]


def read_max_tiles(text: Any) -> int | str:
    """The number of `--max-tiles`, or "auto".

    Raises:
        typer.BadParameter: neither; click names the option.
    """
    word = str(text).strip()
    if word == "auto":
        return word
    if not (word.isascii() and word.isdigit() and int(word)):
        raise typer.BadParameter(f"{word!r} is not allowed: give auto or a whole number of at least 1")
    return int(word)


# ------------------------------------------------------------------------------------------------------------ messages


_debug = False


def set_debug(debug: bool) -> None:
    global _debug
    _debug = debug
    if not debug:
        warnings.simplefilter("ignore")


def user_errors() -> tuple[type[BaseException], ...]:
    """What a user's input, files, network or memory can raise; anything else is a bug and keeps its traceback."""
    # Asked for only when something is raised, when the modules are loaded already or cannot have raised.
    by_module = (
        *(("safetensors", "SafetensorError"), ("torch", "OutOfMemoryError")),
        *((library, "HTTPError") for library in HTTP_LIBRARIES),
    )
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


def load_model(model: str, **options: Any) -> tuple[MonoInternVLForCausalLM, MonoInternVLProcessor]:
    """`mono_internvl.common.models.load_model`, with a spinner, or with the bars of those who read the files."""
    with status("loading"):
        from mono_internvl.common import models

        quiet_libraries()
        has_bars = _show_bars_of(models.base_of_adapter(model) or model)
    with nullcontext() if has_bars else status("loading"):
        return models.load_model(model, **options)


def check_dtype(dtype: str) -> None:
    """Refuse a dtype before anything is read.

    Raises:
        typer.BadParameter: not a known name. ValueError: float16, with its reason.
    """
    if dtype in FLOAT16:
        from mono_internvl.common import models

        models.check_dtype(dtype)
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype} is not one of {', '.join(DTYPES)}", param_hint="--dtype")


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
