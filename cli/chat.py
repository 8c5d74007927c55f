"""`mono-internvl chat [PICTURES...] PROMPT`: one question, or a conversation when there is no prompt."""

from __future__ import annotations

import contextlib
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
    check_picture_output,
    font,
    load_model,
    note,
    one_line,
    report,
    resolve_model,
    status,
    user_errors,
    written_whole,
)


if TYPE_CHECKING:
    from PIL import Image

    from ..processing_mono_internvl import GroundedBox


_PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".heic")
_HELP = "/image PATH adds a picture to the next question, /reset starts anew, /quit or Ctrl-D ends"
_BOX_COLORS = ("#ff4d4f", "#36cfc9", "#ffc53d", "#9254de", "#73d13d", "#4096ff")


def chat(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="PICTURES... PROMPT", help="files or URLs, then the prompt; without it a dialogue"),
    ] = None,
    model: ModelOption = None,
    max_tiles: MaxTilesOption = None,
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
    names, prompt = split_words(words or [])
    check_dtype(dtype)
    if top_p is not None and temperature == 0:
        raise typer.BadParameter("it needs --temperature above 0", param_hint="--top-p")
    if draw is not None and len(names) != 1:
        raise typer.BadParameter(f"it needs exactly one picture, got {len(names)}", param_hint="--draw")
    interactive = prompt is None and sys.stdin.isatty()
    if draw is not None and interactive:
        raise typer.BadParameter("it needs a prompt", param_hint="--draw")
    if prompt is None and not interactive:
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise ValueError("the prompt is empty; ask something")
    if draw is not None:
        check_picture_output(draw)

    with status("loading"):
        pictures = [load_picture(name, max_pixels) for name in names]
        if prompt is not None:
            from ..modeling_mono_internvl import place_images

            place_images(prompt, len(pictures))
    loaded, processor = load_model(resolve_model(model), device=device, dtype=dtype, image_token_id=image_token_id)
    processor.image_processor.max_pixels = max_pixels
    options: dict[str, Any] = {"max_tiles": max_tiles, "max_new_tokens": max_new_tokens, "processor": processor}
    if temperature > 0:
        options |= {"do_sample": True, "temperature": temperature, "top_p": 1.0 if top_p is None else top_p}
    if stream is None:
        stream = sys.stdout.isatty()

    if prompt is None:
        converse(loaded.chat, pictures, options, stream, max_pixels)
        return
    answer, _ = ask(loaded.chat, pictures, prompt, {**options, "keep_grounding_tags": draw is not None}, stream)
    if draw is not None:
        boxes = processor.parse_boxes(answer, *pictures[0].size)
        with written_whole(draw) as temporary:
            draw_boxes(pictures[0], boxes).save(temporary)
        note(f"{len(boxes)} boxes drawn to {draw}" if boxes else f"no box in the answer; {draw} is the plain picture")


def split_words(words: list[str]) -> tuple[list[str], str | None]:
    """Pictures and prompt; the last word is the prompt unless it is a picture's name.

    Raises:
        typer.BadParameter: the prompt stands before a picture.
    """
    if words and _names_picture(words[-1]):
        names, prompt = words, None
    else:
        names, prompt = words[:-1], words[-1] if words else None
    for name in names:
        if not _names_picture(name) and any(space in name for space in " \n?"):
            raise typer.BadParameter(f"{name!r} is not a picture; pictures come first, then one prompt, in quotes")
    return names, prompt


def _names_picture(word: str) -> bool:
    if word.lower().startswith(("http://", "https://", "data:image/")):
        return " " not in word
    try:
        if Path(word).expanduser().is_file():
            return True
    except (OSError, ValueError):
        return False  # too long or otherwise impossible for a file
    return word.lower().endswith(_PICTURE_ENDINGS) and " " not in word


def load_picture(name: str, max_pixels: int) -> Image.Image:
    """The RGB picture of a file or URL; errors name it."""
    from PIL import Image

    from ..image_processing_mono_internvl import load_image

    # The named limit decides alone; Pillow's own, twice MAX_IMAGE_PIXELS, would stop what was allowed here.
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)
    return load_image(name, max_pixels=max_pixels)


def ask(
    chat_method: Callable[..., Any],
    pictures: list[Any],
    prompt: str,
    options: dict[str, Any],
    stream: bool,
    history: list[tuple[str, str]] | None = None,
) -> tuple[str, list[tuple[str, str]]]:
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
    chat_method: Callable[..., Any], pictures: list[Any], options: dict[str, Any], stream: bool, max_pixels: int
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
                pictures.append(load_picture(rest.strip().strip("'\""), max_pixels))
                note(f"picture {len(pictures)}: {pictures[-1].width} x {pictures[-1].height} px")
            elif command == "/help" or (command.startswith("/") and "/" not in command[1:]):
                note(_HELP)
            else:
                _, history = ask(chat_method, pictures, line, options, stream, history)
        except KeyboardInterrupt:
            note("\nstopped; this question is forgotten")
        except user_errors() as error:
            report(one_line(error))


def _read_line() -> str:
    if sys.stdout.isatty():
        return input("> ")
    # stdout is for answers.
    typer.echo("> ", nl=False, err=True)
    return input()


def draw_boxes(picture: Image.Image, boxes: list[GroundedBox]) -> Image.Image:
    """A copy of an RGB picture with labelled boxes; line and letters follow its size."""
    from PIL import ImageDraw

    drawn = picture.copy()
    canvas = ImageDraw.Draw(drawn)
    width, height = picture.size
    line = max(2, round(min(width, height) / 160))
    size = max(12, min(48, round(min(width, height) / 22)))
    pad = max(2, size // 4)
    for i, (label, box) in enumerate(boxes):
        color = _BOX_COLORS[i % len(_BOX_COLORS)]
        x1, x2 = sorted(min(max(x, 0), width - 1) for x in (box[0], box[2]))
        y1, y2 = sorted(min(max(y, 0), height - 1) for y in (box[1], box[3]))
        canvas.rectangle((x1, y1, x2, y2), outline=color, width=line)
        if not label:
            continue
        letters = font(size, label)
        left, top, right, bottom = canvas.textbbox((0, 0), label, font=letters)
        tag_width, tag_height = right - left + 2 * pad, bottom - top + 2 * pad
        # Above the box, or inside it where there is no room above; never outside the picture.
        x = max(0, min(x1, width - tag_width))
        y = y1 - tag_height if y1 >= tag_height else min(y1, max(0, height - tag_height))
        canvas.rectangle((x, y, x + tag_width, y + tag_height), fill=color)
        canvas.text((x + pad - left, y + pad - top), label, font=letters, fill="black")
    return drawn
