"""Whatever a caller calls a picture -> the upright RGB picture a person would see, with Pillow, numpy and torch.

    load_image        the one place that interprets a source: PIL image, path, URL, base64, bytes, file, array, ..
    at_picture        an error about one of several pictures says which
    exif_orientation  how the camera was held

Nothing of the process is changed: no limit or format of Pillow's, no filter of `warnings`; and nothing of what is
passed in.
What is no picture is an error that says what it is; what is not read of one (further pages) is said in a warning.
"""

import base64
import binascii
import contextlib
import io
import logging
import os
import re
import struct
import threading
import urllib.parse
import warnings
import zlib
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError, features


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


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {value!r}")


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
        source = _of_datasets(source)
    if isinstance(source, Image.Image):
        return _from_pil(source, max_pixels, convert_to_srgb)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _from_array(source, max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_bytes(bytes(source), "picture given as bytes", max_pixels, convert_to_srgb)
    if isinstance(source, (str, os.PathLike)):
        return _from_text(source, max_pixels, convert_to_srgb)
    if callable(getattr(source, "read", None)):
        file_name = getattr(source, "name", None)
        name = _printable(file_name) if isinstance(file_name, str) else "picture given as file"
        return _from_bytes(_content(source, name), name, max_pixels, convert_to_srgb)
    if hasattr(source, "__array__"):  # another library's array
        return _from_array(np.asarray(source), max_pixels)
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


def _printable(name: str | bytes) -> str:
    """Short enough for a message, and of characters that any terminal or log file can be given."""
    text = os.fsdecode(name) if isinstance(name, bytes) else name
    text = text if len(text) <= 200 else f"{text[:150]}...{text[-30:]}"
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)


# ------------------------------------------------------------------------------------------------------------- sources


def _of_datasets(source: Mapping[Any, Any]) -> Any:
    """An undecoded picture of `datasets`: its bytes, or where there are none its path."""
    if not source or not set(source) <= {"bytes", "path"}:
        keys = ", ".join(sorted(map(repr, source))) or "no keys"
        raise TypeError(f"a picture must be given itself, or as a dict of 'bytes' and 'path', got one with {keys}")
    data, path = source.get("bytes"), source.get("path")
    if data is None and path is None:
        raise ValueError("a picture given as a dict of bytes and path has neither")
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
    if isinstance(data, bytes) and position and _CERTAIN_SIGNATURE.match(data, position):
        return data[position:]
    return data


_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+={0,2}\s*")
_START_AS_BASE64 = re.compile(r"\s*(iVBORw0KGgo|/9j/|R0lGOD|UklGR)")  # PNG, JPEG, GIF, WebP
_LONGEST_PATH = 4096
_LIKE_A_PATH = re.compile(r"[/\\]|\.\w{1,5}$")


def _from_text(source: "str | os.PathLike[str]", max_pixels: int | None, srgb: bool) -> Image.Image:
    text = os.fsdecode(source)
    if not isinstance(source, str):
        return _from_path(Path(text), text, max_pixels, srgb)
    if not text.strip():
        raise ValueError("a picture's path is an empty string")
    found = _SCHEME.match(text.lstrip())
    scheme = found.group().lower() if found else ""
    if scheme == "data:":
        return _from_bytes(_read_data_uri(text), "picture given as data: URI", max_pixels, srgb)
    if scheme and text.strip()[len(scheme) :].startswith("//"):
        if scheme in ("http:", "https:"):
            return _from_bytes(_fetch(text.strip()), _printable(text), max_pixels, srgb)
        if scheme != "file:":
            raise ValueError(f"{_printable(text)} cannot be fetched: only http, https, file and data: URLs are read")
    if scheme == "file:" and text.strip()[len(scheme) :].startswith("/"):
        return _from_path(_file_url_path(text.strip()), text, max_pixels, srgb)
    if len(text) < _LONGEST_PATH and _exists(text):
        return _from_path(Path(text), text, max_pixels, srgb)
    data = _base64_picture(text)
    if data is not None:
        return _from_bytes(data, "picture given as base64", max_pixels, srgb)
    if len(text) > 200 and _START_AS_BASE64.match(text):
        raise ValueError(f"picture given as base64 is no valid base64: {_printable(text)}")
    if len(text) >= _LONGEST_PATH:
        raise ValueError(f"{_printable(text)} is neither a file nor base64 of a picture ({len(text):,} characters)")
    return _from_path(Path(text), text, max_pixels, srgb)


def _exists(path: str) -> bool:
    try:
        return os.path.exists(path)
    except ValueError:
        return False


def _file_url_path(url: str) -> Path:
    host, slash, rest = url[5:].removeprefix("//").partition("/") if url[5:].startswith("//") else ("", "/", url[6:])
    if host.lower() not in ("", "localhost") or not slash:
        raise ValueError(f"{_printable(url)} names the host {host!r}: a file of this machine is file:///path/to/it")
    path = urllib.parse.unquote(f"/{rest}", errors="surrogateescape")
    # Written without escaping, a name may hold a percent sign of its own.
    path = f"/{rest}" if not _exists(path) and _exists(f"/{rest}") else path
    return Path(path[1:] if os.name == "nt" else path)


def _base64_picture(text: str) -> bytes | None:
    """The bytes of a picture whose base64 was given as it is; None for what reads as a path."""
    if len(text) < 32 or not _BASE64.fullmatch(text):
        return None
    try:
        data = decode_base64(text)
    except binascii.Error:
        return None
    # A name of 32 letters that by chance is base64 does not start as a picture does.
    return data if _SIGNATURE.match(data) else None


def decode_base64(text: str | bytes) -> bytes:
    """base64 of either alphabet, with or without padding.

    Raises:
        binascii.Error, UnicodeError: it is none.
    """
    text = "".join(text.split()).encode("ascii") if isinstance(text, str) else text
    plain = b"".join(text.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)


def _read_data_uri(uri: str) -> bytes:
    head, comma, payload = uri.strip().partition(",")
    if not comma:
        raise ValueError(f"picture given as data: URI has no comma before its data: {_printable(uri[:40])}...")
    data = urllib.parse.unquote_to_bytes(payload)
    if "base64" not in (parameter.strip().lower() for parameter in head.split(";")[1:]):
        return data
    try:
        return decode_base64(data)
    except binascii.Error as error:
        raise ValueError(f"picture given as data: URI is no valid base64: {error}") from error


def _from_path(path: Path, given: str, max_pixels: int | None, srgb: bool) -> Image.Image:
    name = _printable(given)
    if "\0" in str(path):
        raise ValueError(f"{name} is not a usable path: it holds a NUL character")
    try:
        if str(path).startswith("~") and not path.exists():
            with contextlib.suppress(RuntimeError):  # no such user: there may only be no such file
                path = path.expanduser()
        if path.is_dir():
            raise ValueError(f"{name} is a folder, not a picture")
        if not path.exists():
            hint = "" if _LIKE_A_PATH.search(name) else " (text is read as a path, a URL or base64 of a picture)"
            raise FileNotFoundError(f"no such picture: {name}{hint}")
        regular = path.is_file()
        empty = regular and path.stat().st_size == 0
    except (OSError, UnicodeError) as error:
        if isinstance(error, (FileNotFoundError, PermissionError)):
            raise
        raise ValueError(f"{name} is not a usable path: {getattr(error, 'strerror', None) or error}") from error
    if empty:
        raise ValueError(f"{name} is empty (0 bytes), not a picture")
    with path.open("rb") as file:
        if regular:
            return _from_file(file, name, max_pixels, srgb)
        data = file.read(_MAX_DOWNLOAD_BYTES + 1)  # a pipe or a device, which may never end
    if len(data) > _MAX_DOWNLOAD_BYTES:
        raise ValueError(f"{name} gives more than {_MAX_DOWNLOAD_BYTES // 2**20} MiB, too much for a picture")
    return _from_bytes(data, name, max_pixels, srgb)


def _from_bytes(data: bytes, name: str, max_pixels: int | None, srgb: bool) -> Image.Image:
    if not isinstance(data, bytes):
        raise TypeError(f"{name}: open the file in binary mode, reading it gave {type(data).__name__}")
    if not data:
        raise ValueError(f"{name} is empty (0 bytes), not a picture")
    return _from_file(io.BytesIO(data), name, max_pixels, srgb)


def _from_file(file: Any, name: str, max_pixels: int | None, srgb: bool) -> Image.Image:
    image = _open(file, name)
    with image:
        pages = _pages(image, file)
        rgb = _to_rgb(_decode(image, name, max_pixels), name, srgb)
        if pages > 1:
            kind = "pages" if image.format == "TIFF" else "frames"
            _warn(f"{name} has {pages} {kind}, of which the first is read; give the others as pictures of their own")
        return rgb.copy() if rgb is image else rgb  # not bound to the file, which is closed now


_reading = threading.Lock()


def _from_pil(image: Image.Image, max_pixels: int | None, srgb: bool) -> Image.Image:
    filename = getattr(image, "filename", "")
    name = _printable(os.fspath(filename)) if filename else f"PIL image of mode {image.mode}"
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
    _check_size(image.size, name, max_pixels)
    own = _opened_again(image, file, name) if lazy else image
    try:
        return _to_rgb(_decode(own, name, max_pixels), name, srgb)
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
        own = _open(io.BytesIO(data), name)
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
        own.getexif()[_EXIF_ORIENTATION] = exif_orientation(image, name)
    return own


def _fetch(url: str) -> bytes:
    try:
        import httpx
    except ImportError as error:
        raise ImportError("fetching a picture from a URL needs httpx: pip install httpx") from error
    name = _printable(url)
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
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise ConnectionError(f"cannot fetch {name}: {error or type(error).__name__}") from error
    return bytes(data)


# ------------------------------------------------------------------------------------------------------------- opening


def _open(file: Any, name: str) -> Any:
    """As `PIL.Image.open`, but only `max_pixels` limits a picture's size, and what is not a picture is named.

    `Image.open` measures pictures by a limit of the whole process, and warns at half of it through filters of the whole
    process; with many threads neither can be changed for one picture.
    """
    head = file.read(1024)
    if head.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        # Pillow would hand the file to Ghostscript, that is, run a program that a stranger wrote.
        raise ValueError(f"{name} is an EPS file; convert it to a picture (PNG, JPEG) first")
    profile = None
    if head.startswith(_PNG):
        file, profile = _lean_png(file)
    try:
        image, reasons = _identify(file, head[:16])
        if image is None and _is_heif(head):
            image = _open_heif(file)
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # on damaged headers the format plugins raise nearly anything
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error
    if image is None:
        what = _not_a_picture(head)
        if what is None:
            what = f"is not a picture in a format that Pillow reads{f' ({reasons[0]})' if reasons else ''}"
        raise ValueError(f"{name} {what}") from UnidentifiedImageError(name)
    if image.format == "MPEG":
        raise ValueError(f"{name} {_VIDEO}")
    if isinstance(image, ImageFile.StubImageFile) and image._load() is None:
        raise ValueError(f"{name} is a {image.format} file, {_TO_PNG}")
    if image.format == "TIFF" and int(image.tag_v2.get(254, 0)) & 1 and (330 in image.tag_v2 or 50706 in image.tag_v2):
        raise ValueError(f"{name} is a camera's raw file, of which Pillow reads only the preview; develop it first")
    if profile is not None:
        image.info["icc_profile"] = profile
    return image


def _identify(file: Any, prefix: bytes) -> tuple[Any, list[str]]:
    """The picture by the first format of Pillow's that takes it, or None; and why those that it resembles did not."""
    tried: set[str] = set()
    reasons = []
    for more in (None, Image.preinit, Image.init):
        if more is not None:
            more()
        for format_name in [each for each in list(Image.ID) if each not in tried]:
            tried.add(format_name)
            factory, accept = Image.OPEN[format_name]
            try:
                accepted = accept is None or accept(prefix)
                if isinstance(accepted, str):
                    reasons.append(accepted)
                elif accepted:
                    file.seek(0)
                    return factory(file, ""), reasons
            except (SyntaxError, IndexError, TypeError, struct.error) as error:
                if accept is not None:
                    reasons.append(f"{format_name}: {error}")
    return None, reasons


_PNG = b"\x89PNG\r\n\x1a\n"
_SIGNATURE = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|BM|II\*\x00|MM\x00\*|II\+\x00|MM\x00\+|....ftyp|\x00\x00\x00\x0cjP  "
    rb"|\xffO\xffQ|\x00\x00\x01\x00|\x00\x00\x00\x0cJXL |\xff\x0a|icns|8BPS|DDS |qoif|P[1-6]\s|%PDF-|<svg|<\?xml",
    re.DOTALL,
)
_CERTAIN_SIGNATURE = re.compile(rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|II\*\x00|MM\x00\*", re.DOTALL)
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_CAMERA_BRANDS = {b"crx "}
_VIDEO = "is not a picture but a video; give its frames as pictures"
_TO_PNG = "which Pillow does not read; convert it to PNG first"
_HTML = re.compile(r"(<!--.*?-->\s*|<\?xml.*?\?>\s*)*<(!doctype html|html|head|body|title|script|meta)\b", re.DOTALL)
_BINARY_KINDS = (
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL \r\n", f"is a JPEG XL picture, {_TO_PNG} (djxl)"),
    (rb".{0,1000}%PDF-", "is not a picture but a PDF document; render its pages to pictures first (pdftoppm -png)"),
    (rb"version https://git-lfs", "is not a picture but a Git LFS pointer to one; get the file itself: git lfs pull"),
    (
        rb"\x1f\x8b|PK\x03\x04|Rar!|7z\xbc\xaf|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|.{257}ustar",
        "is not a picture but an archive; unpack it first",
    ),
    (rb"\x93NUMPY", "is not a picture file but a numpy file; give the array that numpy.load reads from it"),
    (rb".{128}DICM", "is a DICOM file; read it with pydicom and give the array of its window as uint8"),
    (rb"v/1\x01|#\?RADIANCE", f"is a picture of high dynamic range, {_TO_PNG}"),
    (rb"\x1aE\xdf\xa3|RIFF....AVI |\x00\x00\x01[\xb3\xba]|FLV|\x30\x26\xb2\x75", _VIDEO),
    (rb"RIFF....WAVE|ID3|\xff[\xfb\xf3\xf2]|OggS|fLaC", "is not a picture but sound"),
)


def _brands(head: bytes) -> set[bytes]:
    """What a file of the ISO base media format (HEIC, AVIF, MP4) says it is; the first says it best."""
    if head[4:8] != b"ftyp":
        return set()
    end = min(max(int.from_bytes(head[:4], "big"), 12), len(head))
    return {head[8:12], *(head[at : at + 4] for at in range(16, end - 3, 4))}


def _is_heif(head: bytes) -> bool:
    brands = _brands(head)
    return bool(brands & _HEIF_BRANDS) or (bool(brands & {b"mif1", b"msf1", b"heif"}) and b"avif" not in brands)


def _open_heif(file: Any) -> Any:
    """A HEIC picture where pillow-heif is there, else None. Its opener is not registered: Pillow stays as it is."""
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        return None
    file.seek(0)
    try:
        return HeifImageFile(file, "")
    except SyntaxError as error:
        raise ValueError(str(error)) from error


def _not_a_picture(head: bytes) -> str | None:
    """What a file is that no format of Pillow's takes, and what to do; None where it is not known."""
    brands = _brands(head)
    if _is_heif(head):
        return "is a HEIC picture, which Pillow reads only with pillow-heif: pip install pillow-heif"
    if brands & {b"avif", b"avis"}:
        return "is an AVIF picture, which Pillow reads from version 11.3 on: pip install 'pillow>=11.3'"
    if brands & _CAMERA_BRANDS:
        return "is a camera's raw file; develop it to JPEG or PNG first"
    if brands:
        return _VIDEO
    for pattern, what in _BINARY_KINDS:
        if re.match(pattern, head, re.DOTALL):
            return what
    for encoding in ("utf-8-sig", "utf-16"):
        if encoding == "utf-16" and not head.startswith((b"\xff\xfe", b"\xfe\xff")):
            continue
        text = head.decode(encoding, "replace").strip()
        lower = text.lower()
        if re.search(r"<(\w+:)?svg[\s>]|<!doctype svg", lower):
            return "is not a picture of pixels but an SVG drawing; render it to PNG first (rsvg-convert, cairosvg)"
        if _HTML.match(lower):
            return (
                "is not a picture but an HTML page, as servers send in place of a picture that needs a login or is gone"
            )
        if text and all(char.isprintable() or char.isspace() for char in text[:200].replace("\ufffd", "\0")):
            if _base64_picture(text) is not None:
                return "is not a picture but base64 of one; decode it first, or give it as a string"
            kind = "JSON" if text[0] in "{[" else "XML" if text.startswith("<?xml") else "text"
            return f"is not a picture but {kind}, which starts {' '.join(text.split())[:60]!r}"
    return None


# PNG keeps descriptions, workflows of generators and profiles of any length; Pillow refuses what unpacks to more.
_PILLOW_UNPACKS = 2**20
_ALL_PILLOW_UNPACKS = 64 * 2**20
_WE_UNPACK = 64 * 2**20
_ORIENTATION_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type exif")


def _lean_png(file: Any) -> tuple[Any, bytes | None]:
    """A PNG without the texts and the profile that Pillow would stumble over, and that profile, unpacked.

    A file that has none is given back as it is. The two texts that may hold the orientation stay.
    """
    file.seek(8)
    chunks, texts, risky, profile = [], 0, False, None
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        start = file.tell()
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            start_of_text = file.read(min(length, 84)).partition(b"\0")[2]
            packed_text = kind == b"zTXt" or (kind == b"iTXt" and start_of_text[:1] == b"\1")
            unpacked = length * (1100 if packed_text else 1)  # deflate packs a thousandfold at most
            texts += unpacked
            risky = risky or texts > _ALL_PILLOW_UNPACKS or (packed_text and unpacked > _PILLOW_UNPACKS)
        elif kind == b"iCCP" and length < _WE_UNPACK:
            packed = file.read(length).partition(b"\0")[2][1:]
            if len(_unpack(packed, _PILLOW_UNPACKS + 1)) > _PILLOW_UNPACKS:
                profile = _unpack(packed, _WE_UNPACK)
        chunks.append((kind, start, length))
        if kind == b"IEND":
            break
        file.seek(start + length + 4)
    if not risky and profile is None:
        return file, None
    lean = io.BytesIO()
    lean.write(_PNG)
    for kind, start, length in chunks:
        if kind == b"iCCP" and profile is not None:
            continue
        file.seek(start)
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            if length < _WE_UNPACK and (text := _orientation_text(kind, file.read(length))):
                lean.write(struct.pack(">I", len(text[4:])) + text + struct.pack(">I", zlib.crc32(text)))
            continue
        file.seek(start - 8)
        lean.write(file.read(length + 12))
    return lean, profile


def _orientation_text(kind: bytes, content: bytes) -> bytes | None:
    """A text that may hold the orientation as a chunk's kind and content, unpacked."""
    keyword, _, rest = content.partition(b"\0")
    if keyword not in _ORIENTATION_TEXTS:
        return None
    if kind == b"zTXt":
        return b"tEXt" + keyword + b"\0" + _unpack(rest[1:], _WE_UNPACK)
    if kind == b"iTXt" and rest[:1] == b"\1" and rest.count(b"\0") >= 2:
        language, translated, packed = rest[2:].split(b"\0", 2)
        plain = _unpack(packed, _WE_UNPACK)
        return b"iTXt" + keyword + b"\0\0\0" + language + b"\0" + translated + b"\0" + plain
    return kind + content


def _unpack(data: bytes, at_most: int) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, at_most)
    except zlib.error:
        return b""


# Layers, previews and gain maps (PSD, MPO, ICNS) are no pages.
_OF_FRAMES = frozenset({"GIF", "WEBP", "PNG", "AVIF", "HEIF", "DCX", "FLI"})


def _pages(image: Any, file: Any) -> int:
    """Pages or frames of an opened file. What is damaged further on ends the count, not the picture."""
    try:
        if image.format == "TIFF":
            return _tiff_pages(file)
        return image.n_frames if image.format in _OF_FRAMES and getattr(image, "is_animated", False) else 1
    except Exception as error:  # on damaged data the format plugins raise nearly anything
        logger.debug("frames of a %s: %s", image.format, error)
        return 1


def _tiff_pages(file: Any) -> int:
    """Pages of a TIFF, smaller copies of a page not counted. (Pillow would make room for each to count them.)"""
    position = file.tell()
    file.seek(0)
    head = file.read(16)
    order, big = "<" if head[:2] == b"II" else ">", 43 in (head[2], head[3])
    offset, number, entry = ("Q", "Q", 20) if big else ("I", "H", 12)

    def read(form: str) -> int:
        return struct.unpack(order + form, file.read(struct.calcsize(order + form)))[0]

    file.seek(8 if big else 4)
    seen: set[int] = set()
    pages = 0
    try:
        while (at := read(offset)) and at not in seen:
            seen.add(at)
            file.seek(at)
            entries = [file.read(entry) for _ in range(min(read(number), 65535))]
            values = {struct.unpack(order + "H", one[:2])[0]: one[12 if big else 8 :] for one in entries}
            pages += not struct.unpack(order + "I", values.get(254, bytes(4))[:4])[0] & 1
    except struct.error:
        pass  # cut off behind the pages found
    file.seek(position)
    return pages


# ------------------------------------------------------------------------------------------------------------ decoding


def _decode(image: Any, name: str, max_pixels: int | None) -> Any:
    """Check the size of an opened picture, which is known before decoding, and decode it wholly."""
    _check_size(image.size, name, max_pixels)
    deep = _is_deep_colour(image)
    try:
        if image.format == "TIFF" and image.tile and image.width * image.height > (Image.MAX_IMAGE_PIXELS or 0):
            # Pillow would check against its own limit again while it makes room; `max_pixels` has decided.
            image.im = Image.new(image.mode, getattr(image, "_tile_size", image.size)).im
        image.load()
    except Image.DecompressionBombError as error:  # formats that hold several pictures check again
        raise ValueError(_bomb_message(name, str(error), max_pixels)) from error
    except MemoryError:
        raise
    except Exception as error:  # on damaged data the format plugins raise nearly anything
        raise ValueError(f"{name} is damaged or truncated: {error}") from error
    _check_size(image.size, name, max_pixels)  # some formats (ICO, ICNS) learn it by decoding
    if deep:
        highest = max(int(high) for _, high in image.getextrema()[: 1 if image.mode == "LA" else 3])
        _check_white(name, highest * 256)  # Pillow keeps the upper 8 bits
    return image


def _is_deep_colour(image: Any) -> bool:
    """Whether a file holds 16 bits per channel of which Pillow keeps the upper 8."""
    if image.mode not in ("RGB", "RGBA", "LA"):
        return False
    return any(";16" in str(tile[3]) for tile in getattr(image, "tile", None) or ())


def _check_white(name: str, highest: int) -> None:
    """Values of 8, 10, 12 or 14 bits in 16 are as good as black; what is meant by white cannot be known."""
    bits = next((bits for bits in (8, 10, 12, 14) if 0 < highest < 2**bits), None)
    if bits is None:
        return
    white = 2**bits - 1
    message = (
        f"{name} holds 16-bit values of at most {highest}, where white is 65535: {{}}. If {white} means white, give an "
        f"array of it as uint8: (array / {white} * 255).astype('uint8')"
    )
    if bits < 14:
        raise ValueError(message.format("nearly black, as data of fewer bits looks"))
    _warn(message.format("dark, and read so"))


def _check_size(size: tuple[int, int], name: str, max_pixels: int | None) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"{name} has no pixels ({width}x{height})")
    limit = max_pixels
    if limit is None and Image.MAX_IMAGE_PIXELS is not None:
        limit = 2 * Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(_bomb_message(name, f"{width}x{height} = {width * height:,} pixels", max_pixels))


def _bomb_message(name: str, size: str, max_pixels: int | None) -> str:
    limit = "off, but Pillow has one (PIL.Image.MAX_IMAGE_PIXELS)" if max_pixels is None else f"{max_pixels:,}"
    return (
        f"{name} is too large ({size.rstrip('.')}); the limit max_pixels is {limit}. Give a higher max_pixels for "
        "pictures you trust"
    )


# -------------------------------------------------------------------------------------------------------------- pixels


def _from_array(source: Any, max_pixels: int | None) -> Image.Image:
    if isinstance(source, torch.Tensor):
        name, channels_first = "tensor", True
        array = _tensor_values(source)
    else:
        name, channels_first, array = "array", False, source
        if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
            raise ValueError(f"masked array of shape {list(array.shape)}: say what its masked pixels are (filled)")
    shape = list(array.shape)
    if array.ndim == 3:
        first, last = shape[0] in (1, 2, 3, 4), shape[2] in (1, 2, 3, 4)
        if first and (channels_first or not last):
            array = array.transpose(1, 2, 0)
        elif not last:
            raise ValueError(f"{name} of shape {shape} is no picture: 1 to 4 channels must come first or last")
    elif array.ndim == 4:
        raise ValueError(f"{name} of shape {shape} is several pictures: give each by itself, {name}[0] and so on")
    elif array.ndim != 2:
        raise ValueError(f"{name} of shape {shape} is no picture: it needs 2 or 3 dimensions")
    _check_size((array.shape[1], array.shape[0]), f"{name} of shape {shape}", max_pixels)
    pixels = _array_to_uint8(array, f"{name} of shape {shape} and dtype {source.dtype}")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    image = Image.fromarray(np.ascontiguousarray(pixels))  # the mode follows from the channels: L, LA, RGB, RGBA
    return _to_rgb(image, name)


def _tensor_values(tensor: torch.Tensor) -> np.ndarray:
    try:
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    except (RuntimeError, TypeError) as error:  # without data (meta), sparse, quantised
        what = f"tensor of shape {list(tensor.shape)}, {tensor.dtype}, {tensor.layout} on {tensor.device}"
        raise ValueError(f"{what} cannot be read as pixels: {str(error).splitlines()[0]}") from error


def _array_to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16:
        _check_white(name, int(array.max()))
        return _from_16_bit(array)
    if not np.issubdtype(array.dtype, np.integer) and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} is no picture: the dtype must be integer, float or bool")
    low, high = array.min(), array.max()
    if np.issubdtype(array.dtype, np.integer):
        if low < 0 or high > 255:
            raise ValueError(f"{name} holds {low} to {high}: integer pictures are 0..255 (or uint16, 0..65535)")
        return array.astype(np.uint8)
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise ValueError(f"{name} holds {low:g} to {high:g}: float pictures are 0..1; cast 0..255 to uint8")
    return np.rint(array.astype(np.float32) * 255).astype(np.uint8)


def _from_16_bit(array: np.ndarray, white: int = 65535) -> np.ndarray:
    """0..white -> 0..255, rounded."""
    return ((array.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)


def _deep_gray_to_uint8(image: Image.Image, name: str) -> np.ndarray:
    """Gray pictures of more than 8 bits -> uint8 [H, W].

    The modes I (32 bit) and F do not say which value is white. A PNG or PGM has 16 bits, a TIFF says whether it has 12.
    Otherwise the smallest of the usual ranges that holds all values is taken (F: 0..1; both: 0..255, 0..65535), and the
    values' own range after that.
    """
    array = np.asarray(image)
    bits = getattr(image, "tag_v2", {}).get(258, (16,))
    if image.mode.startswith("I;16") and bits in (12, (12,)):
        gray = _from_16_bit(array.clip(0, 4095), white=4095)
    elif image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        if image.format != "PPM":  # which names its white
            _check_white(name, int(array.max()))
        gray = _from_16_bit(array.clip(0, 65535))
    else:
        values = array.astype(np.float64)
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():
            raise ValueError(
                f"{name} holds values that are not finite numbers; give an array in which they are replaced "
                "(numpy.nan_to_num)"
            )
        if low < 0 or high > 65535:
            values, white = values - low, (high - low) or 1.0
        else:
            white = 1.0 if image.mode == "F" and high <= 1 else 255.0 if high <= 255 else 65535.0
            if white == 65535.0:
                _check_white(name, int(high))
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


def _to_rgb(image: Image.Image, name: str, srgb: bool = False) -> Image.Image:
    """A decoded picture of any mode -> RGB, transparency on white, upright; `srgb`: by its colour profile."""
    orientation = exif_orientation(image, name)
    profile = image.info.get("icc_profile") if srgb else None
    try:
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = Image.fromarray(_deep_gray_to_uint8(image, name))
        if profile:
            image = _by_profile(image, profile, name)
        rgb = _on_white(image) if _is_transparent(image) else image
        rgb = rgb if rgb.mode == "RGB" else rgb.convert("RGB")
    except (OSError, KeyError) as error:
        raise ValueError(
            f"{name} has the colour mode {image.mode}, which cannot be turned into RGB: {error}"
        ) from error
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
        rgb.info = {}  # it carries the orientation, which must not be applied twice
    return rgb


def _by_profile(image: Image.Image, profile: bytes, name: str) -> Image.Image:
    """A picture's colours, described by an ICC profile, as sRGB in RGB, or RGBA where it is transparent."""
    if not features.check("littlecms2"):
        raise ImportError("convert_to_srgb needs a Pillow with LittleCMS; the wheels of PyPI have it")
    alpha = _rgba(image).getchannel("A") if _is_transparent(image) else None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space == "GRAY" and image.mode in ("1", "L", "LA", "La"):
            mode = "L"
        elif space == "RGB" and image.mode not in ("CMYK", "LAB"):
            mode = "RGB"
        elif (space, image.mode) in (("CMYK", "CMYK"), ("Lab", "LAB")):
            mode = image.mode
        else:
            raise ValueError(f"it describes {space}, the picture is {image.mode}")
        colours = _rgba(image).convert("RGB") if alpha is not None else image
        converted = ImageCms.profileToProfile(
            colours.convert(mode),
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        _warn(f"the colour profile of {name} cannot be applied, its colours are read without: {error}")
        return image
    converted = cast(Image.Image, converted)
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _is_transparent(image: Image.Image) -> bool:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return True
    return image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")


def _rgba(image: Image.Image) -> Image.Image:
    # Pillow knows no direct way from premultiplied gray to RGBA.
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _on_white(image: Image.Image) -> Image.Image:
    rgba = _rgba(image)
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
