"""Whatever a caller calls a picture -> the upright RGB picture a person would see, with Pillow, numpy and torch."""

import base64
import binascii
import io
import logging
import os
import struct
import threading
import urllib.parse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError


logger = logging.getLogger(__name__)

DEFAULT_MAX_PIXELS = 100_000_000

_FETCH_TIMEOUT_SECONDS = 30.0
_MAX_DOWNLOAD_BYTES = 256 * 2**20
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def check_positive(name: str, value: Any) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def load_image(source: Any, *, max_pixels: int | None = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Any picture -> RGB, 8 bit, upright: what a person sees when looking at it.

    EXIF orientation is applied, transparency is laid on white, 16-bit and float pictures are scaled to 8 bit, and the
    other colour modes are converted. Of an animated file the first frame is taken; a PIL image keeps its frame.
    An RGB picture without EXIF or transparency comes back with identical pixels. The input is not changed.

    Args:
        source: PIL image; path; http(s) URL; data: URI; bytes or a binary file; numpy array HWC or HW (also CHW, where
            it cannot be meant as HWC); torch tensor CHW or HW (also HWC). Arrays hold uint8, other integers in 0..255,
            uint16, bools, or floats in 0..1, and have 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGBA) channels.
        max_pixels: width * height above which a picture is refused before it is decoded. None: only Pillow's own limit.

    Raises:
        FileNotFoundError: no such file.
        ConnectionError: the URL cannot be fetched.
        ValueError: not a picture, damaged or truncated, larger than max_pixels, array of a wrong shape or range.
        TypeError: a source of another type.
    """
    if max_pixels is not None:
        check_positive("max_pixels", max_pixels)
    if isinstance(source, Image.Image):
        filename = getattr(source, "filename", "")
        name = _shorten(os.fspath(filename)) if filename else f"PIL image of mode {source.mode}"
        return _to_rgb(_decode(source, name, max_pixels), name)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _from_array(source, max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_bytes(bytes(source), "picture given as bytes", max_pixels)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _from_bytes(_read_data_uri(source), "picture given as data: URI", max_pixels)
    if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        return _from_bytes(_fetch(source), _shorten(source), max_pixels)
    if isinstance(source, (str, os.PathLike)):
        return _from_path(source, max_pixels)
    if callable(getattr(source, "read", None)):
        file_name = getattr(source, "name", None)
        name = _shorten(file_name) if isinstance(file_name, str) else "picture given as file"
        return _from_bytes(source.read(), name, max_pixels)
    raise TypeError(
        "a picture must be a PIL image, a path, an http(s) or data: URL, bytes, a binary file, an array or a torch "
        f"tensor, got {type(source).__name__}"
    )


def _shorten(name: str | bytes) -> str:
    text = name.decode(errors="replace") if isinstance(name, bytes) else name
    return text if len(text) <= 200 else f"{text[:150]}...{text[-30:]}"


def _from_path(source: "str | os.PathLike[str]", max_pixels: int | None) -> Image.Image:
    name = _shorten(os.fspath(source))
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            raise ValueError(f"{name} is a folder, not a picture")
        if not path.exists():
            raise FileNotFoundError(f"no such picture: {name}")
        empty = path.is_file() and path.stat().st_size == 0
    except OSError as error:
        if isinstance(error, (FileNotFoundError, PermissionError)):
            raise
        raise ValueError(f"{name} is not a usable path: {error.strerror or error}") from error
    if empty:
        raise ValueError(f"{name} is empty (0 bytes), not a picture")
    with path.open("rb") as file:
        return _from_file(file, name, max_pixels)


def _from_bytes(data: bytes, name: str, max_pixels: int | None) -> Image.Image:
    if not isinstance(data, bytes):
        raise TypeError(f"{name}: open the file in binary mode, reading it gave {type(data).__name__}")
    if not data:
        raise ValueError(f"{name} is empty (0 bytes), not a picture")
    return _from_file(io.BytesIO(data), name, max_pixels)


def _from_file(file: Any, name: str, max_pixels: int | None) -> Image.Image:
    try:
        with _bomb_warnings_off():
            image = Image.open(file)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture in a format that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise ValueError(_bomb_message(name, str(error), max_pixels)) from error
    except MemoryError:
        raise
    except Exception as error:  # on damaged headers the format plugins raise nearly anything
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error
    with image:
        if image.format == "EPS":
            # Pillow would hand the file to Ghostscript, that is, run a program that a stranger wrote.
            raise ValueError(f"{name} is an EPS file; convert it to a picture (PNG, JPEG) first")
        rgb = _to_rgb(_decode(image, name, max_pixels), name)
        return rgb.copy() if rgb is image else rgb  # not bound to the file, which is closed now


def _decode(image: Image.Image, name: str, max_pixels: int | None) -> Image.Image:
    """Check the size of an opened picture, which is known before decoding, and decode it wholly."""
    _check_size(*image.size, name, max_pixels)
    limit = Image.MAX_IMAGE_PIXELS
    try:
        if limit is not None and image.width * image.height > limit:
            with _bomb_warnings_off():
                image.load()
        else:
            image.load()
    except Image.DecompressionBombError as error:  # formats that hold several pictures check again
        raise ValueError(_bomb_message(name, str(error), max_pixels)) from error
    except MemoryError:
        raise
    except Exception as error:  # on damaged data the format plugins raise nearly anything
        raise ValueError(f"{name} is damaged or truncated: {error}") from error
    _check_size(*image.size, name, max_pixels)  # some formats (ICO, ICNS) learn it by decoding
    return image


def _check_size(width: int, height: int, name: str, max_pixels: int | None) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"{name} has no pixels ({width}x{height})")
    if max_pixels is not None and width * height > max_pixels:
        raise ValueError(_bomb_message(name, f"{width}x{height} = {width * height:,} pixels", max_pixels))


def _bomb_message(name: str, size: str, max_pixels: int | None) -> str:
    limit = "off" if max_pixels is None else f"{max_pixels:,}"
    return (
        f"{name} is too large ({size.rstrip('.')}); the limit max_pixels is {limit}. Raise max_pixels for pictures you "
        f"trust (above {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels PIL.Image.MAX_IMAGE_PIXELS too)"
    )


_warnings_lock = threading.Lock()


@contextmanager
def _bomb_warnings_off() -> Iterator[None]:
    """Silence Pillow's warning at half of its limit: `max_pixels` has decided. Its hard limit still raises.

    The filters of `warnings` are global, so two threads may not be inside at once: they would restore them crosswise.
    """
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _fetch(url: str) -> bytes:
    try:
        import httpx
    except ImportError as error:
        raise ImportError("fetching a picture from a URL needs httpx: pip install httpx") from error
    name = _shorten(url)
    data = bytearray()
    try:
        with httpx.stream(
            "GET",
            url,
            timeout=_FETCH_TIMEOUT_SECONDS,
            follow_redirects=True,
            headers={"User-Agent": "mono-internvl"},  # some servers refuse the library's default one
        ) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > _MAX_DOWNLOAD_BYTES:
                    raise ValueError(
                        f"{name} sends more than {_MAX_DOWNLOAD_BYTES // 2**20} MiB, too much for a picture"
                    )
    except httpx.HTTPStatusError as error:
        raise ConnectionError(
            f"cannot fetch {name}: {error.response.status_code} {error.response.reason_phrase}"
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConnectionError(f"cannot fetch {name}: {error or type(error).__name__}") from error
    return bytes(data)


def _read_data_uri(uri: str) -> bytes:
    head, comma, payload = uri.partition(",")
    if not comma:
        raise ValueError(f"picture given as data: URI has no comma before its data: {uri[:40]}...")
    data = urllib.parse.unquote_to_bytes(payload)
    if not head.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"picture given as data: URI is no valid base64: {error}") from error


def _from_array(source: "np.ndarray | torch.Tensor", max_pixels: int | None) -> Image.Image:
    if isinstance(source, torch.Tensor):
        name, channels_first = "tensor", True
        tensor = source.detach().cpu()
        array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    else:
        name, channels_first, array = "array", False, source
    shape = list(array.shape)
    if array.ndim == 3:
        first, last = shape[0] in (1, 2, 3, 4), shape[2] in (1, 2, 3, 4)
        if first and (channels_first or not last):
            array = array.transpose(1, 2, 0)
        elif not last:
            raise ValueError(f"{name} of shape {shape} is no picture: 1 to 4 channels must come first or last")
    elif array.ndim != 2:
        raise ValueError(f"{name} of shape {shape} is no picture: it needs 2 or 3 dimensions")
    _check_size(array.shape[1], array.shape[0], f"{name} of shape {shape}", max_pixels)
    pixels = _array_to_uint8(array, f"{name} of shape {shape} and dtype {source.dtype}")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    image = Image.fromarray(np.ascontiguousarray(pixels))  # the mode follows from the channels: L, LA, RGB, RGBA
    return _to_rgb(image, name)


def _array_to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16:
        return _from_16_bit(array)
    if not np.issubdtype(array.dtype, np.integer) and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} is no picture: the dtype must be integer, float or bool")
    low, high = array.min(), array.max()
    if np.issubdtype(array.dtype, np.integer):
        if low < 0 or high > 255:
            raise ValueError(f"{name} holds {low} to {high}: integer pictures are 0..255 (or uint16)")
        return array.astype(np.uint8)
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise ValueError(f"{name} holds {low:g} to {high:g}: float pictures are 0..1; cast 0..255 to uint8")
    return np.rint(array.astype(np.float32) * 255).astype(np.uint8)


def _from_16_bit(array: np.ndarray) -> np.ndarray:
    """0..65535 -> 0..255, rounded."""
    return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _deep_gray_to_uint8(image: Image.Image, name: str) -> np.ndarray:
    """Gray pictures of more than 8 bits -> uint8 [H, W].

    The modes I (32 bit) and F do not say which value is white. A PNG or PGM has 16 bits. Otherwise the smallest of the
    usual ranges that holds all values is taken (F: 0..1; both: 0..255, 0..65535), and the values' own range after that.
    """
    array = np.asarray(image)
    if image.mode.startswith("I;16"):
        gray = _from_16_bit(array)
    elif image.mode == "I" and image.format in ("PNG", "PPM"):
        gray = _from_16_bit(array.clip(0, 65535))
    else:
        values = array.astype(np.float64)
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():
            raise ValueError(f"{name} holds values that are not finite numbers")
        if low < 0 or high > 65535:
            values, white = values - low, (high - low) or 1.0
        else:
            white = 1.0 if image.mode == "F" and high <= 1 else 255.0 if high <= 255 else 65535.0
        gray = np.rint(values / white * 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # PNG: one gray value stands for "nothing here"
        gray = np.where(array == transparent, np.uint8(255), gray)
    return gray


def exif_orientation(image: Image.Image, name: str) -> int:
    """How the camera was held, 1 to 8 (from 5 on width and height are exchanged); 1 where the EXIF data is damaged."""
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        # Damaged EXIF hides the orientation, not the picture.
        logger.debug("%s: unreadable EXIF data ignored: %s", name, error)
        return 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A decoded picture of any mode -> RGB, transparency on white, upright."""
    orientation = exif_orientation(image, name)
    try:
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            rgb = Image.fromarray(_deep_gray_to_uint8(image, name)).convert("RGB")
        elif _is_transparent(image):
            rgb = _on_white(image)
        else:
            rgb = image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, KeyError) as error:
        raise ValueError(
            f"{name} has the colour mode {image.mode}, which cannot be turned into RGB: {error}"
        ) from error
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
        rgb.info = {}  # it carries the orientation, which must not be applied twice
    return rgb


def _is_transparent(image: Image.Image) -> bool:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return True
    return image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")


def _on_white(image: Image.Image) -> Image.Image:
    # Pillow knows no direct way from premultiplied gray to RGBA.
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
