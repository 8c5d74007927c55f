"""Whatever a caller calls a picture -> the upright RGB picture a person would see, with Pillow, numpy and torch.

    load_image        the one place that interprets a source: PIL image, path, URL, base64, bytes, file, array, ..
    flatten_pictures  pictures in any nesting -> a list
    at_picture        an error about one of several pictures says which

Nothing of the process is changed: no limit or format of Pillow's, no filter of `warnings`; and nothing of what is
passed in.
What is no picture is an error that says what it is; what is not read of one (further pages) is said in a warning.
"""

import binascii
import contextlib
import io
import logging
import os
import re
import threading
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile

from .image_files_mono_internvl import (
    CERTAIN_SIGNATURE,
    base64_picture,
    count_pages,
    decode,
    decode_base64,
    open_picture,
)
from .image_pixels_mono_internvl import (
    DEFAULT_MAX_PIXELS,
    EXIF_ORIENTATION,
    array_to_rgb,
    check_size,
    exif_orientation,
    printable,
    to_rgb,
    warn,
)
from .tiling_mono_internvl import check_bool, check_positive


logger = logging.getLogger(__name__)


_FETCH_TIMEOUT_SECONDS = 30.0
_MAX_DOWNLOAD_BYTES = 256 * 2**20
FETCH_HEADERS = {"User-Agent": "mono-internvl"}  # some servers refuse the library's default one


def load_image(
    source: Any, *, max_pixels: int | None = DEFAULT_MAX_PIXELS, convert_to_srgb: bool = False
) -> Image.Image:
    """Any picture -> RGB, 8 bit, upright: what a person sees when looking at it.

    EXIF orientation is applied, transparency is laid on white, 16-bit and float pictures are scaled to 8 bit, and the
    other colour modes are converted. Of an animated file the first frame is taken, of a TIFF the first page (a warning
    counts the others); a PIL image keeps its frame. An RGB picture without EXIF or transparency comes back with
    identical pixels. The input is not changed: a PIL image is not even loaded, a file keeps its position.

    Args:
        source: PIL image; path (`~` too); http(s) or `file://` URL; data: URI; base64 of a picture as a string; bytes
            or a binary file; `{"bytes", "path"}` as `datasets` has it; numpy array HWC or HW (also CHW, where it cannot
            be meant as HWC); torch tensor CHW or HW (also HWC), on any device. Arrays hold uint8, other integers in
            0..255, uint16 with white at 65535, bools, or floats in 0..1, and have 1 (gray), 2 (gray, alpha), 3 (RGB)
            or 4 (RGBA) channels.
        max_pixels: width * height above which a picture is refused before it is decoded. None: only Pillow's own limit.
        convert_to_srgb: apply an embedded ICC profile. The released model saw pictures without.

    Raises:
        FileNotFoundError: no such file.
        ConnectionError: the URL cannot be fetched.
        ValueError: not a picture, damaged or truncated, larger than max_pixels, array of a wrong shape or range, 16-bit
            values that are nearly black because white is not at 65535.
        TypeError: a source of another type.
    """
    if max_pixels is not None:
        check_positive("max_pixels", max_pixels)
    check_bool("convert_to_srgb", convert_to_srgb)
    if isinstance(source, Mapping):
        source = bytes_or_path(source)
    if isinstance(source, Image.Image):
        return _from_pil(source, max_pixels, convert_to_srgb)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return array_to_rgb(source, max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_bytes(bytes(source), "picture given as bytes", max_pixels, convert_to_srgb)
    if isinstance(source, (str, os.PathLike)):
        return _from_text(source, max_pixels, convert_to_srgb)
    if callable(getattr(source, "read", None)):
        file_name = getattr(source, "name", None)
        name = printable(file_name) if isinstance(file_name, str) else "picture given as file"
        return _from_bytes(_content(source, name), name, max_pixels, convert_to_srgb)
    if hasattr(source, "__array__"):  # another library's array
        return array_to_rgb(np.asarray(source), max_pixels)
    raise TypeError(
        "a picture must be a PIL image, a path, an http(s), file: or data: URL, base64, bytes, a binary file, an array "
        f"or a torch tensor, got {type(source).__name__}"
    )


def prefixed(error: Exception, prefix: str) -> Exception:
    """The same kind of error with a prefix before its message; an error of no common kind as it is."""
    kinds = (
        FileNotFoundError,
        PermissionError,
        ConnectionError,
        OSError,
        ValueError,
        TypeError,
        ImportError,
    )
    kind = next((kind for kind in kinds if isinstance(error, kind)), None)
    return error if kind is None else kind(f"{prefix}: {error}")


def at_picture(error: Exception, number: int, count: int) -> Exception:
    """The same kind of error, whose message says which of several pictures it is about."""
    return error if count == 1 else prefixed(error, f"picture {number} of {count}")


def flatten_pictures(images: Any) -> list[Any]:
    """Pictures in any nesting of sequences, iterators, arrays of objects and 4-D arrays (frames) as one list, in order.

    A file is one picture, though Python can iterate over it.
    """
    if isinstance(images, (str, bytes, bytearray, memoryview)) or hasattr(images, "read"):
        return [images]
    nested = isinstance(images, (list, tuple, Sequence, Iterator)) or getattr(images, "ndim", 0) >= 4
    if nested or (isinstance(images, np.ndarray) and images.dtype == object and images.ndim):
        return [source for item in images for source in flatten_pictures(item)]
    return [images]


def channels_as_said(source: Any, layout: Any) -> Any:
    """An array whose channels are where `layout` says; without, `load_image` judges by the shape."""
    if layout is None or not isinstance(source, (np.ndarray, torch.Tensor)) or source.ndim != 3:
        return source
    channels = source.shape[0 if layout == "channels_first" else 2]
    if channels not in (1, 2, 3, 4):
        raise ValueError(f"array of shape {list(source.shape)} has {channels} channels where {layout} puts them")
    if isinstance(source, torch.Tensor):
        return source if layout == "channels_first" else source.permute(2, 0, 1)
    return source if layout == "channels_last" else source.transpose(1, 2, 0)


# ------------------------------------------------------------------------------------------------------------- sources


def bytes_or_path(source: Mapping[Any, Any], what: str = "picture") -> Any:
    """An undecoded picture (or video) of `datasets`: its bytes, or where there are none its path."""
    if not source or not set(source) <= {"bytes", "path"}:
        keys = ", ".join(sorted(map(repr, source))) or "no keys"
        raise TypeError(f"a {what} must be given itself, or as a dict of 'bytes' and 'path', got one with {keys}")
    data, path = source.get("bytes"), source.get("path")
    if data is None and path is None:
        raise ValueError(f"a {what} given as a dict of bytes and path has neither")
    return path if data is None else data


def _content(file: Any, name: str) -> Any:
    """The picture in a binary file, whose position stays as it is. What cannot seek is read on from where it stands."""
    if getattr(file, "closed", False) is True:
        raise ValueError(f"{name} is a closed file; give it open, or its path")
    try:
        position = file.tell()
        file.seek(0)
    except (AttributeError, OSError):
        return file.read()
    try:
        data = file.read()
    finally:
        file.seek(position)
    # A picture that starts just here, behind others in the same file, is the one that is meant.
    if isinstance(data, bytes) and position and CERTAIN_SIGNATURE.match(data, position):
        return data[position:]
    return data


_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)
_START_AS_BASE64 = re.compile(r"\s*(iVBORw0KGgo|/9j/|R0lGOD|UklGR)")  # PNG, JPEG, GIF, WebP
_LONGEST_PATH = 4096
_LIKE_A_PATH = re.compile(r"[/\\]|\.\w{1,5}$")


def _from_text(source: "str | os.PathLike[str]", max_pixels: int | None, srgb: bool) -> Image.Image:
    found, name = located(source)
    if isinstance(found, bytes):
        return _from_bytes(found, name, max_pixels, srgb)
    with found.open("rb") as file:
        return _from_file(file, name, max_pixels, srgb)


def located(source: "str | os.PathLike[str]", what: str = "picture") -> "tuple[Path | bytes, str]":
    """What a text points to, and its name for messages: the path of a file, or the bytes of a URL, a data: URI, a
    pipe, or of a picture's base64.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: see `load_image`; `what` says what was expected there.
    """
    text = os.fsdecode(source)
    if not isinstance(source, str):
        return _checked_path(Path(text), text, what)
    if not text.strip():
        raise ValueError(f"a {what}'s path is an empty string")
    found = _SCHEME.match(text.lstrip())
    scheme = found.group().lower() if found else ""
    if scheme == "data:":
        return read_data_uri(text, what), f"{what} given as data: URI"
    if scheme and text.strip()[len(scheme) :].startswith("//"):
        if scheme in ("http:", "https:"):
            return _fetch(text.strip(), what), printable(text)
        if scheme != "file:":
            raise ValueError(f"{printable(text)} cannot be fetched: only http, https, file and data: URLs are read")
    if scheme == "file:" and text.strip()[len(scheme) :].startswith("/"):
        return _checked_path(file_url_path(text.strip()), text, what)
    if (len(text) < _LONGEST_PATH and _exists(text)) or what != "picture":
        return _checked_path(Path(text), text, what)
    data = base64_picture(text)
    if data is not None:
        return data, "picture given as base64"
    if len(text) > 200 and _START_AS_BASE64.match(text):
        raise ValueError(f"picture given as base64 is no valid base64: {printable(text)}")
    if len(text) >= _LONGEST_PATH:
        raise ValueError(f"{printable(text)} is neither a file nor base64 of a picture ({len(text):,} characters)")
    return _checked_path(Path(text), text, what)


def _exists(path: str) -> bool:
    try:
        return os.path.exists(path)
    except ValueError:
        return False


def file_url_path(url: str) -> Path:
    """The path in a `file:` URL of this machine.

    Raises:
        ValueError: it names another host.
    """
    host, slash, rest = url[5:].removeprefix("//").partition("/") if url[5:].startswith("//") else ("", "/", url[6:])
    if host.lower() not in ("", "localhost") or not slash:
        raise ValueError(f"{printable(url)} names the host {host!r}: a file of this machine is file:///path/to/it")
    path = urllib.parse.unquote(f"/{rest}", errors="surrogateescape")
    # Written without escaping, a name may hold a percent sign of its own.
    path = f"/{rest}" if not _exists(path) and _exists(f"/{rest}") else path
    return Path(path[1:] if os.name == "nt" else path)


def read_data_uri(uri: str, what: str) -> bytes:
    """The bytes in a `data:` URI; `what` says what they should be.

    Raises:
        ValueError: no comma, or no valid base64.
    """
    head, comma, payload = uri.strip().partition(",")
    if not comma:
        raise ValueError(f"{what} given as data: URI has no comma before its data: {printable(uri[:40])}...")
    data = urllib.parse.unquote_to_bytes(payload)
    if "base64" not in (parameter.strip().lower() for parameter in head.split(";")[1:]):
        return data
    try:
        return decode_base64(data)
    except binascii.Error as error:
        raise ValueError(f"{what} given as data: URI is no valid base64: {error}") from error


def _checked_path(path: Path, given: str, what: str) -> "tuple[Path | bytes, str]":
    name = printable(given)
    if "\0" in str(path):
        raise ValueError(f"{name} is not a usable path: it holds a NUL character")
    try:
        if str(path).startswith("~") and not path.exists():
            with contextlib.suppress(RuntimeError):  # no such user: there may only be no such file
                path = path.expanduser()
        if path.is_dir():
            raise ValueError(f"{name} is a folder, not a {what}")
        if not path.exists():
            plain = what != "picture" or _LIKE_A_PATH.search(name)
            hint = "" if plain else " (text is read as a path, a URL or base64 of a picture)"
            raise FileNotFoundError(f"no such {what}: {name}{hint}")
        regular = path.is_file()
        empty = regular and path.stat().st_size == 0
    except (OSError, UnicodeError) as error:
        if isinstance(error, (FileNotFoundError, PermissionError)):
            raise
        raise ValueError(f"{name} is not a usable path: {getattr(error, 'strerror', None) or error}") from error
    if empty:
        raise ValueError(f"{name} is empty (0 bytes), not a {what}")
    if regular:
        return path, name
    with path.open("rb") as file:
        data = file.read(_MAX_DOWNLOAD_BYTES + 1)  # a pipe or a device, which may never end
    if len(data) > _MAX_DOWNLOAD_BYTES:
        raise ValueError(f"{name} gives more than {_MAX_DOWNLOAD_BYTES // 2**20} MiB, too much for a {what}")
    return data, name


def _from_bytes(data: bytes, name: str, max_pixels: int | None, srgb: bool) -> Image.Image:
    if not isinstance(data, bytes):
        raise TypeError(f"{name}: open the file in binary mode, reading it gave {type(data).__name__}")
    if not data:
        raise ValueError(f"{name} is empty (0 bytes), not a picture")
    return _from_file(io.BytesIO(data), name, max_pixels, srgb)


def _from_file(file: Any, name: str, max_pixels: int | None, srgb: bool) -> Image.Image:
    image = open_picture(file, name)
    with image:
        pages = count_pages(image, file)
        rgb = to_rgb(decode(image, name, max_pixels), name, srgb)
        if pages > 1:
            kind = "pages" if image.format == "TIFF" else "frames"
            warn(f"{name} has {pages} {kind}, of which the first is read; give the others as pictures of their own")
        return rgb.copy() if rgb is image else rgb  # not bound to the file, which is closed now


_reading = threading.Lock()


def _from_pil(image: Image.Image, max_pixels: int | None, srgb: bool) -> Image.Image:
    filename = getattr(image, "filename", "")
    name = printable(os.fspath(filename)) if filename else f"PIL image of mode {image.mode}"
    file = getattr(image, "fp", None)
    tiles = isinstance(image, ImageFile.ImageFile) and bool(image.tile)
    # Some formats (WebP, AVIF) have no tiles until they are loaded.
    held = vars(image).get("_im", vars(image).get("im"))
    lazy = tiles or (isinstance(image, ImageFile.ImageFile) and held is None)
    try:
        closed = tiles and (file is None or file.closed)
    except (AttributeError, ValueError):
        closed = False
    if closed:
        raise ValueError(
            f"{name}: the file of this PIL image was closed before its pixels were read; give the path, or call load() "
            "on it while the file is open"
        )
    check_size(image.size, name, max_pixels)
    own = _opened_again(image, file, name) if lazy else image
    try:
        return to_rgb(decode(own, name, max_pixels), name, srgb)
    except ValueError as error:
        if "closed" in str(error):
            raise ValueError(f"{name}: this PIL image was closed; give its path, or a copy() made before") from error
        raise


def _opened_again(image: Any, file: Any, name: str) -> Any:
    """A picture of our own for a PIL image that is not loaded yet: loading closes files, turns and changes modes."""
    try:
        with _reading:  # one position for all threads that were given this image
            position = file.tell()
            try:
                file.seek(0)
                data = file.read()
            finally:
                file.seek(position)
        own = open_picture(io.BytesIO(data), name)
        if image.tell():
            own.seek(image.tell())
        if own.mode != image.mode or own.size != image.size:
            own.draft(image.mode, image.size)
    except (ValueError, EOFError, OSError, AttributeError):
        return image
    if (own.format, own.mode, own.size) != (image.format, image.mode, image.size):
        return image  # the caller has chosen something that a new one does not know, such as an icon's size
    for key in ("exif", "transparency", "icc_profile"):  # the caller may have edited them
        if key in image.info:
            own.info[key] = image.info[key]
        else:
            own.info.pop(key, None)
    if getattr(image, "_exif", None) is not None and image.format != "TIFF":
        own.getexif()[EXIF_ORIENTATION] = exif_orientation(image, name)
    return own


def _fetch(url: str, what: str) -> bytes:
    try:
        import httpx
    except ImportError as error:
        raise ImportError(f"fetching a {what} from a URL needs httpx: pip install httpx") from error
    name = printable(url)
    data = bytearray()
    try:
        with httpx.stream(
            "GET",
            url,
            timeout=_FETCH_TIMEOUT_SECONDS,
            follow_redirects=True,
            headers=FETCH_HEADERS,
        ) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > _MAX_DOWNLOAD_BYTES:
                    raise ValueError(
                        f"{name} sends more than {_MAX_DOWNLOAD_BYTES // 2**20} MiB, too much for a {what}"
                    )
    except httpx.HTTPStatusError as error:
        raise ConnectionError(
            f"cannot fetch {name}: {error.response.status_code} {error.response.reason_phrase}"
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise ConnectionError(f"cannot fetch {name}: {error or type(error).__name__}") from error
    return bytes(data)
