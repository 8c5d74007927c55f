"""Decoded pixels of any mode, depth and colour space -> an upright 8-bit RGB picture, transparency on white.

to_rgb            a decoded PIL image
array_to_rgb      a numpy array or torch tensor
exif_orientation  how the camera was held
"""

import io
import logging
import os
import struct
import warnings
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageCms, features


logger = logging.getLogger(__name__)


DEFAULT_MAX_PIXELS = 100_000_000
EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def printable(name: str | bytes) -> str:
    """Short enough for a message, and of characters that any terminal or log file can be given."""
    text = os.fsdecode(name) if isinstance(name, bytes) else name
    text = text if len(text) <= 200 else f"{text[:150]}...{text[-30:]}"
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


def warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)


def check_white(name: str, highest: int) -> None:
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
    warn(message.format("dark, and read so"))


def check_size(size: tuple[int, int], name: str, max_pixels: int | None) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"{name} has no pixels ({width}x{height})")
    limit = max_pixels
    if limit is None and Image.MAX_IMAGE_PIXELS is not None:
        limit = 2 * Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(bomb_message(name, f"{width}x{height} = {width * height:,} pixels", max_pixels))


def bomb_message(name: str, size: str, max_pixels: int | None) -> str:
    limit = "off, but Pillow has one (PIL.Image.MAX_IMAGE_PIXELS)" if max_pixels is None else f"{max_pixels:,}"
    return (
        f"{name} is too large ({size.rstrip('.')}); the limit max_pixels is {limit}. Give a higher max_pixels for "
        "pictures you trust"
    )


def array_to_rgb(source: Any, max_pixels: int | None) -> Image.Image:
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
    check_size((array.shape[1], array.shape[0]), f"{name} of shape {shape}", max_pixels)
    pixels = _array_to_uint8(array, f"{name} of shape {shape} and dtype {source.dtype}")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    image = Image.fromarray(np.ascontiguousarray(pixels))  # the mode follows from the channels: L, LA, RGB, RGBA
    return to_rgb(image, name)


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
        check_white(name, int(array.max()))
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
            check_white(name, int(array.max()))
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
                check_white(name, int(high))
        gray = np.rint(values / white * 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # PNG: one gray value stands for "nothing here"
        gray = np.where(array == transparent, np.uint8(255), gray)
    return gray


def exif_orientation(image: Image.Image, name: str) -> int:
    """How the camera was held, 1 to 8 (from 5 on width and height are exchanged); 1 where the EXIF data is damaged."""
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        # Damaged EXIF hides the orientation, not the picture.
        logger.debug("%s: unreadable EXIF data ignored: %s", name, error)
        return 1


def to_rgb(image: Image.Image, name: str, srgb: bool = False) -> Image.Image:
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
        warn(f"the colour profile of {name} cannot be applied, its colours are read without: {error}")
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
