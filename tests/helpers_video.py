"""Videos that tests write themselves, of frames that tell their numbers."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


# Of a tile, in pixels.
SIDE = 56


def numbered(number: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A number below 256 as eight bars, dark and light, which no codec blurs."""
    bars = Image.new("L", (8, 1))
    bars.putdata([200 * (number >> bit & 1) + 20 for bit in range(8)])
    return bars.resize(size, Image.Resampling.NEAREST).convert("RGB")


def numbers(frames: list[Any]) -> list[int]:
    """Which frames of `numbered` they are."""
    found = []
    for frame in frames:
        bars = np.asarray(frame.picture.convert("L")).mean(0)[SIDE // 16 :: SIDE // 8]
        found.append(sum(1 << bit for bit in range(8) if bars[bit] > 120))
    return found


def write_video(
    path: Path | io.BytesIO,
    count: int = 30,
    size: tuple[int, int] = (64, 48),
    *,
    codec: str = "mpeg4",
    rate: int = 10,
    keys_every: int | None = None,
    format: str | None = None,
    options: dict[str, str] | None = None,
    picture: Any = numbered,
) -> Any:
    """Write `count` frames made by `picture(number, size)`; skips where PyAV or its encoder is not there."""
    av = pytest.importorskip("av", reason="needs PyAV: pip install av")
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {codec}")
    with av.open(path, "w", format=format, options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        if keys_every:
            stream.codec_context.gop_size = keys_every
        for number in range(count):
            for packet in stream.encode(av.VideoFrame.from_image(picture(number, size))):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
