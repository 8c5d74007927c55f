"""The bytes of a picture file -> a decoded PIL image, with no limit or format of Pillow's changed for the process.

open_picture      as `PIL.Image.open`; what is no picture is an error that says what it is
decode            its pixels, within `max_pixels`
count_pages       pages of a TIFF, frames of an animation
base64_picture    the bytes of a picture that was given as base64
"""

import base64
import binascii
import io
import logging
import re
import struct
import zlib
from typing import Any

from PIL import Image, ImageFile, UnidentifiedImageError

from .image_pixels_mono_internvl import bomb_message, check_size, check_white


logger = logging.getLogger(__name__)


_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+={0,2}\s*")


def base64_picture(text: str) -> bytes | None:
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


def open_picture(file: Any, name: str) -> Any:
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
CERTAIN_SIGNATURE = re.compile(rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|II\*\x00|MM\x00\*", re.DOTALL)
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_CAMERA_BRANDS = {b"crx "}
_VIDEO = (
    "is not a picture but a video; give its frames as pictures, or it as a part of a message: "
    "{'type': 'video', 'video': ..}"
)
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
            if base64_picture(text) is not None:
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


def count_pages(image: Any, file: Any) -> int:
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


def decode(image: Any, name: str, max_pixels: int | None) -> Any:
    """Check the size of an opened picture, which is known before decoding, and decode it wholly."""
    check_size(image.size, name, max_pixels)
    deep = _is_deep_colour(image)
    try:
        if image.format == "TIFF" and image.tile and image.width * image.height > (Image.MAX_IMAGE_PIXELS or 0):
            # Pillow would check against its own limit again while it makes room; `max_pixels` has decided.
            image.im = Image.new(image.mode, getattr(image, "_tile_size", image.size)).im
        image.load()
    except Image.DecompressionBombError as error:  # formats that hold several pictures check again
        raise ValueError(bomb_message(name, str(error), max_pixels)) from error
    except MemoryError:
        raise
    except Exception as error:  # on damaged data the format plugins raise nearly anything
        raise ValueError(f"{name} is damaged or truncated: {error}") from error
    check_size(image.size, name, max_pixels)  # some formats (ICO, ICNS) learn it by decoding
    if deep:
        highest = max(int(high) for _, high in image.getextrema()[: 1 if image.mode == "LA" else 3])
        check_white(name, highest * 256)  # Pillow keeps the upper 8 bits
    return image


def _is_deep_colour(image: Any) -> bool:
    """Whether a file holds 16 bits per channel of which Pillow keeps the upper 8."""
    if image.mode not in ("RGB", "RGBA", "LA"):
        return False
    return any(";16" in str(tile[3]) for tile in getattr(image, "tile", None) or ())
