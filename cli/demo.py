"""`mono-internvl demo`: a chat page in the browser."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from .common import (
    DEFAULT_MAX_PIXELS,
    DeviceOption,
    DtypeOption,
    ImageTokenOption,
    MaxPixelsOption,
    ModelOption,
    check_dtype,
    load_model,
    note,
    status,
)


def demo(
    model: ModelOption = None,
    host: Annotated[str, typer.Option(metavar="HOST", help="0.0.0.0 lets other machines in")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="PORT")] = 7860,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_pixels: MaxPixelsOption = DEFAULT_MAX_PIXELS,
    image_token_id: ImageTokenOption = None,
) -> None:
    """Chat in the browser: pictures, streaming, tiles, boxes. Needs no network. Ctrl-C ends it."""
    check_dtype(dtype)
    # Asked before gradio is imported: the page works without a network and sends nothing.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    with status("loading"):
        from mono_internvl.common.models import resolve_model
        from mono_internvl.serving.demo import build_page, launch_page
    folder = resolve_model(model)

    loaded, processor = load_model(folder, device=device, dtype=dtype, image_token_id=image_token_id)
    processor.image_processor.max_pixels = max_pixels
    page = build_page(loaded, processor, title=model or "The bundled nano: plain shapes and numbers")
    note(f"{launch_page(page, host, port)}  (Ctrl-C ends)")
    page.block_thread()
