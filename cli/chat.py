"""`mono-internvl chat [PICTURES...] PROMPT`: one question, or a conversation when there is no prompt."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    DEFAULT_MAX_PIXELS,
    DeviceOption,
    DtypeOption,
    ImageTokenOption,
    MaxPixelsOption,
    MaxTilesOption,
    ModelOption,
    check_dtype,
    load_model,
    note,
    one_line,
    report,
    status,
    user_errors,
)


if TYPE_CHECKING:
    from PIL import Image


# What people hand to a model that sees: a name that ends so was meant as a file, with spaces in it or not.
_FILE_ENDING = re.compile(
    r"\S\.(?:png|jpe?g|jpe|jfif|webp|gif|bmp|tiff?|p[bgnp]m|avif|hei[cf]|jp2|jxl|ico|svg|psd|dng|cr2|nef|raw|pdf|docx?|"
    r"pptx?|xlsx?|txt|mp4|mov|avi|mkv|webm|zip)$",
    re.IGNORECASE,
)
# One word of ASCII that ends like any file, starts like a path, has a separator, or is a pattern that matched nothing.
_FILE_WORD = re.compile(
    r"(?=[!-~]+$)(?:.*[^.\d]\.(?=[a-z0-9]*[a-z])[a-z0-9]{2,5}|\.{0,2}[/\\].*|~.*|[a-z]:\\.*|[^?=]*[/\\][^?=]*|[^?=]*\*[^?=]*)$",
    re.IGNORECASE,
)
_HELP = "/image PATH adds a picture to the next question, /reset starts anew, /quit or Ctrl-D ends"


def chat(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="PICTURES... PROMPT", help="files or URLs, then the prompt; without it a dialogue"),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option("-i", "--image", metavar="PICTURE", help="a picture; instead of the words in front, one each"),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("-p", "--prompt", metavar="PROMPT", help="the prompt, whatever it looks like; - is stdin"),
    ] = None,
    literal: Annotated[
        bool, typer.Option("--literal", help="<image> in the prompt is a word; pictures go in front")
    ] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="system prompt  [default: the model's]")] = None,
    model: ModelOption = None,
    max_tiles: MaxTilesOption = None,
    min_tiles: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="fewest tiles of a picture  [default: the model's]")
    ] = None,
    thumbnail: Annotated[
        bool | None, typer.Option("--thumbnail/--no-thumbnail", help="the whole picture as the last of several tiles")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="longest answer in tokens")] = 1024,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="sample the answer; 0 takes the likeliest tokens")
    ] = 0.0,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, metavar="P", help="sample from this share of the probability")
    ] = None,
    draw: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="write the picture with the boxes of the answer")
    ] = None,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="print the answer as it grows  [default: on terminals]")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_pixels: MaxPixelsOption = DEFAULT_MAX_PIXELS,
    image_token_id: ImageTokenOption = None,
) -> None:
    """Ask about pictures, or just talk.

    mono-internvl chat plate.png "How many circles are there?"
    """
    names, prompt = read_words(words or [], image or [], prompt)
    check_dtype(dtype)
    if not math.isfinite(temperature):
        raise typer.BadParameter("it must be a finite number", param_hint="--temperature")
    if top_p is not None and temperature == 0:
        raise typer.BadParameter("it needs --temperature above 0", param_hint="--top-p")
    if draw is not None and len(names) != 1:
        raise typer.BadParameter(f"it needs exactly one picture, got {len(names)}", param_hint="--draw")
    interactive = prompt is None and sys.stdin.isatty()
    if draw is not None and interactive:
        raise typer.BadParameter("it needs a prompt", param_hint="--draw")
    with status("loading"):
        from mono_internvl.common.drawing import draw_boxes
        from mono_internvl.common.files import check_picture_output, written_whole
        from mono_internvl.common.models import resolve_model
        from mono_internvl.modeling_mono_internvl import place_images

        if draw is not None:
            check_picture_output(draw)
        pictures = [_load_named(name, max_pixels) for name in names]
    if prompt is None and not interactive:
        prompt = _read_prompt()
    if prompt is not None and not prompt.strip():
        raise ValueError("the prompt is empty; ask something")
    if prompt is not None and pictures and not literal:
        try:
            place_images(prompt, len(pictures))
        except ValueError as error:
            raise ValueError(f"{error}; where <image> is a word of the prompt, say --literal") from error
    loaded, processor = load_model(resolve_model(model), device=device, dtype=dtype, image_token_id=image_token_id)
    processor.image_processor.max_pixels = max_pixels
    options: dict[str, Any] = {"max_tiles": max_tiles, "max_new_tokens": max_new_tokens, "processor": processor}
    given = {"system": system, "min_tiles": min_tiles, "use_thumbnail": thumbnail}
    options |= {name: value for name, value in given.items() if value is not None}
    if temperature > 0:
        options |= {"do_sample": True, "temperature": temperature, "top_p": 1.0 if top_p is None else top_p}
    if stream is None:
        stream = sys.stdout.isatty()

    if prompt is None:
        converse(loaded.chat, pictures, options, stream, max_pixels, literal)
        return
    asked = as_text(prompt) if literal else prompt
    answer, _ = ask(loaded.chat, pictures, asked, {**options, "keep_grounding_tags": draw is not None}, stream)
    if draw is not None:
        boxes = processor.parse_boxes(answer, *pictures[0].size)
        with written_whole(draw) as temporary:
            draw_boxes(pictures[0], boxes).save(temporary)
        note(f"{len(boxes)} boxes drawn to {draw}" if boxes else f"no box in the answer; {draw} is the plain picture")


def read_words(words: list[str], images: list[str], prompt: str | None) -> tuple[list[str], str | None]:
    """Pictures and prompt of the command line; None for a prompt that is still to come.

    Raises:
        typer.BadParameter: pictures are given in both ways, or a word is left over.
        ValueError: a file was meant where a prompt would stand, or the other way round; names it.
    """
    if prompt is not None:
        names = words
        prompt = _read_prompt() if prompt == "-" else prompt
    else:
        names, prompt = split_words(words)
        prompt = _read_prompt() if prompt == "-" else prompt
    if images and names:
        raise typer.BadParameter(f"{names[0]!r}: with --image every picture needs an --image of its own")
    return images or names, prompt


def split_words(words: list[str]) -> tuple[list[str], str | None]:
    """Pictures and prompt; the last word is the prompt unless it names a file, there or not.

    Raises:
        typer.BadParameter: the prompt stands before a picture.
    """
    if words and names_file(words[-1]):
        names, prompt = words, None
    else:
        names, prompt = words[:-1], words[-1] if words else None
    for name in names:
        if not names_file(name) and any(space in name for space in " \n?"):
            raise typer.BadParameter(f"{name!r} is not a picture; pictures come first, then one prompt, in quotes")
    return names, prompt


def names_file(word: str) -> bool:
    """Whether a word of the command line was meant as a file or URL: nothing such is ever taken for a prompt."""
    bare = word.strip().strip("'\"")
    if re.match(r"[a-z][a-z0-9+.-]+://\S+$|data:image/", bare, re.IGNORECASE):
        return True
    try:
        if bare and os.path.lexists(Path(bare).expanduser()):
            return True
    except (OSError, ValueError, RuntimeError):
        return False  # too long or otherwise impossible for a file
    return "\n" not in bare and bool(_FILE_ENDING.search(bare) or _FILE_WORD.match(bare))


def as_text(prompt: str) -> list[dict[str, str]]:
    """A prompt in which `<image>` is a word; `chat` puts the pictures in front."""
    return [{"type": "text", "text": prompt}]


def _read_prompt() -> str:
    """The prompt on standard input.

    Raises:
        ValueError: it is not text, or the name of a file.
    """
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError("standard input is not text; it holds the prompt, and pictures are given as files") from error
    if "\0" in text:
        raise ValueError("standard input is not text; it holds the prompt, and pictures are given as files")
    if not any(space in text.strip() for space in " \n\t") and names_file(text):
        raise ValueError(
            f"standard input holds the prompt, but it names a file: {text.strip()}; pictures are words of the command "
            "(if it is the prompt, give it with --prompt)"
        )
    return text


def _load_named(name: str, max_pixels: int) -> Image.Image:
    """`load_picture` for a word of the command line; where it may have been meant otherwise, the error says so."""
    if name == "-":
        raise ValueError("- is no picture: pictures are files or URLs; as the last word it is the prompt on stdin")
    try:
        return load_picture(name, max_pixels)
    except (ValueError, OSError) as error:
        if _FILE_ENDING.search(name) and " " not in name:
            raise
        hint = "if it is the prompt, give it with --prompt" if names_file(name) else "the prompt is one word, in quotes"
        raise ValueError(f"{one_line(error)} ({hint})") from error


def load_picture(name: str, max_pixels: int) -> Image.Image:
    """The RGB picture of a file or URL; errors name it."""
    from mono_internvl.image_processing_mono_internvl import load_image

    return load_image(name, max_pixels=max_pixels)


def ask(
    chat_method: Callable[..., Any],
    pictures: list[Any],
    prompt: str | list[dict[str, str]],
    options: dict[str, Any],
    stream: bool,
    history: list[Any] | None = None,
) -> tuple[str, list[Any]]:
    """Print the answer on stdout, in pieces with `stream`; returns it and the history with it."""
    with status("thinking") as stop:

        def show(piece: str) -> None:
            stop()
            sys.stdout.write(piece)
            sys.stdout.flush()

        answer, history = chat_method(
            pictures, prompt, history=history, return_history=True, streamer=show if stream else None, **options
        )
        stop()
    typer.echo("" if stream else answer)
    return answer, history


def converse(
    chat_method: Callable[..., Any],
    pictures: list[Any],
    options: dict[str, Any],
    stream: bool,
    max_pixels: int,
    literal: bool = False,
) -> None:
    """Questions from the terminal until it ends; a mistake costs a line, not the conversation."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() gains editing and recall)
    note(_HELP)
    pictures, history = list(pictures), []  # type: ignore[var-annotated]
    while True:
        try:
            line = _read_line().strip()
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("")
            continue
        command, _, rest = line.partition(" ")
        if not line:
            continue
        try:
            if command == "/quit":
                return
            if command == "/reset":
                pictures, history = [], []
            elif command == "/image":
                pictures.append(load_picture(_path_of(rest), max_pixels))
                note(f"picture {len(pictures)}: {pictures[-1].width} x {pictures[-1].height} px")
            elif command == "/help" or re.fullmatch(r"/[a-z]*", line):
                note(_HELP)
            elif command.startswith(("/", "~/")) and "/" in command[1:] or names_file(line):
                # A file dropped on the terminal, or named as on the command line.
                raise ValueError(f"{line} names a file: /image PATH adds a picture; a question has another beginning")
            else:
                asked = as_text(line) if literal else line
                _, history = ask(chat_method, pictures, asked, options, stream, history)
        except KeyboardInterrupt:
            note("\nstopped; this question is forgotten")
        except user_errors() as error:
            report(one_line(error))


def _path_of(text: str) -> str:
    """A path as typed, or as a terminal pastes it: in quotes, or with its spaces escaped.

    Raises:
        ValueError: there is none.
    """
    text = text.strip()
    if not text:
        raise ValueError("/image needs a file or URL")
    with contextlib.suppress(ValueError, OSError):
        (path,) = shlex.split(text)
        if text[0] in "'\"" or Path(path).expanduser().exists():
            return path
    return text


def _read_line() -> str:
    if sys.stdout.isatty():
        return input("> ")
    # stdout is for answers.
    typer.echo("> ", nl=False, err=True)
    return input()
