"""Picture -> grid -> tiles + thumbnail -> 28-px patches, with Pillow, numpy and torch alone.

    load_image     whatever the caller has -> the RGB picture a person would see
    choose_grid    its size -> (cols, rows), the grid of square tiles nearest to its aspect ratio
    MonoInternVLImageProcessor
                   one bicubic resize to cols*S x rows*S, cut row-major; a thumbnail of the whole picture goes last
                   when there is more than one tile; a tile is (S/28)^2 patches, normalised with the ImageNet mean
    patchify       the same cut for tiles that already are a tensor

Legend: S tile side in pixels (448), p = S // 28 patches along a side, D = 3*28*28 values of a patch.
The pixels equal the released model's bit for bit; see the comment in `_resize` for the one trap.
"""

import base64
import binascii
import functools
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
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs


logger = logging.getLogger(__name__)

PATCH_SIZE = 28
PATCH_DIM = 3 * PATCH_SIZE * PATCH_SIZE
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
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


# ---------------------------------------------------------------------------------------------------------------- grid


@functools.lru_cache(maxsize=256)
def _candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (cols, rows) with min_tiles <= cols*rows <= max_tiles, ordered by their product.

    Grids of equal product keep the order in which CPython walks a set filled in this very sequence: that is how
    the released model came by its order, and the order decides ties. (Hashes of small-integer tuples are not salted.)
    """
    grids = set()
    for n in range(min_tiles, max_tiles + 1):
        for cols in range(1, n + 1):
            for rows in range(-(-min_tiles // cols), min(n, max_tiles // cols) + 1):
                grids.add((cols, rows))
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def choose_grid(
    width: int, height: int, *, tile_size: int = 448, min_tiles: int = 1, max_tiles: int = 12
) -> tuple[int, int]:
    """The grid of tiles for a picture: the one whose aspect ratio is nearest to the picture's.

    Args:
        width, height: size of the picture in pixels.
        tile_size: side of a tile in pixels; it matters on exact ties only.
        min_tiles, max_tiles: allowed range of cols * rows, thumbnail not counted.

    Returns:
        (cols, rows). On an exact tie the grid with more tiles wins if the picture covers more than half of its area.

    Raises:
        ValueError: a size is not positive, or not 1 <= min_tiles <= max_tiles.
    """
    if width < 1 or height < 1:
        raise ValueError(f"width and height of a picture must be at least 1 pixel, got {width}x{height}")
    _check_positive("tile_size", tile_size)
    _check_tile_range(min_tiles, max_tiles)
    aspect = width / height
    best, best_distance = (1, 1), float("inf")
    for cols, rows in _candidate_grids(int(min_tiles), int(max_tiles)):
        distance = abs(aspect - cols / rows)
        covers_half = width * height > 0.5 * tile_size * tile_size * cols * rows
        if distance < best_distance or (distance == best_distance and covers_half):
            best, best_distance = (cols, rows), distance
    return best


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _check_tile_range(min_tiles: int, max_tiles: int) -> None:
    _check_positive("min_tiles", min_tiles)
    _check_positive("max_tiles", max_tiles)
    if min_tiles > max_tiles:
        raise ValueError(f"min_tiles must not exceed max_tiles, got min_tiles={min_tiles} and max_tiles={max_tiles}")


# ------------------------------------------------------------------------------------------------------------- patches


def patchify(tiles: torch.Tensor) -> torch.Tensor:
    """Cut square tiles into 28-px patches: [N, 3, S, S] -> [N, (S//28)**2, 3*28*28], same dtype and device.

    Patches are row-major; inside a patch the order is (channel, row, column), as a flattened 28x28 convolution kernel.

    Raises:
        ValueError: not [N, 3, S, S], or S is not a positive multiple of 28. N may be 0.
    """
    if tiles.ndim != 4 or tiles.shape[1] != 3 or tiles.shape[2] != tiles.shape[3]:
        raise ValueError(f"tiles must be [N, 3, S, S], got {list(tiles.shape)}")
    n, _, side, _ = tiles.shape
    if side < PATCH_SIZE or side % PATCH_SIZE:
        raise ValueError(f"the side of a tile must be a positive multiple of {PATCH_SIZE} px, got {side}")
    p = side // PATCH_SIZE
    cut = tiles.reshape(n, 3, p, PATCH_SIZE, p, PATCH_SIZE).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(n, p * p, PATCH_DIM)


def unpatchify(patches: torch.Tensor) -> torch.Tensor:
    """Inverse of `patchify`: [N, p*p, 3*28*28] -> [N, 3, p*28, p*28].

    Raises:
        ValueError: the last dimension is not 3*28*28, or the number of patches is no square.
    """
    if patches.ndim != 3 or patches.shape[2] != PATCH_DIM:
        raise ValueError(f"patches must be [N, p*p, {PATCH_DIM}], got {list(patches.shape)}")
    n, count, _ = patches.shape
    p = round(count**0.5)
    if p < 1 or p * p != count:
        raise ValueError(f"a square tile has a square number of patches, got {count}")
    grid = patches.reshape(n, p, p, 3, PATCH_SIZE, PATCH_SIZE).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(n, 3, p * PATCH_SIZE, p * PATCH_SIZE)


# ------------------------------------------------------------------------------------------------------------- loading


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
        _check_positive("max_pixels", max_pixels)
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


# ----------------------------------------------------------------------------------------------------------- processor


class MonoInternVLImagesKwargs(ImagesKwargs, total=False):
    """What a processor may pass on to the image processor, beyond transformers' own names."""

    tile_size: int | None
    min_tiles: int | None
    max_tiles: int | None
    use_thumbnail: bool | None
    max_pixels: int | None


# Names of transformers' that say how to compute, or describe what is true here anyway: no effect on the result.
_NEUTRAL_KWARGS = frozenset(
    {"data_format", "device", "disable_grouping", "do_convert_rgb", "image_seq_length", "input_data_format"}
)
# Keys that transformers itself writes into a saved configuration.
_SERVICE_KEYS = frozenset(
    {"auto_map", "feature_extractor_type", "image_processor_type", "name_or_path", "processor_class"}
)


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Bicubic resize, across first and then down.

    In one call Pillow 13 goes down first where that is cheaper, and rounds to other pixels than the releases before it.
    A step that changes nothing is only a copy, so two calls give the old result on every version.
    """
    across = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return across.resize((width, height), Image.Resampling.BICUBIC)


class MonoInternVLImageProcessor(BaseImageProcessor):
    """Pictures -> normalised patches of tiles, ready for the model.

    Args:
        tile_size: side S of a tile in pixels, a multiple of 28.
        min_tiles, max_tiles: allowed tiles of one picture, thumbnail not counted.
        use_thumbnail: append the whole picture, resized to one tile, where a picture has more than one tile.
        do_normalize: float32 `(x / 255 - mean) / std`; otherwise the raw uint8 values.
        image_mean, image_std: per channel, for values in 0..1.
        max_pixels: pictures with more pixels are refused; None leaves the limit to Pillow.
        **kwargs: keys of other image processors are ignored, those of transformers' bookkeeping are kept.

    Raises:
        ValueError: tile_size is no multiple of 28, not 1 <= min_tiles <= max_tiles, or a wrong mean or std.
    """

    valid_kwargs = MonoInternVLImagesKwargs

    def __init__(
        self,
        tile_size: int = 448,
        min_tiles: int = 1,
        max_tiles: int = 12,
        use_thumbnail: bool = True,
        do_normalize: bool = True,
        image_mean: "tuple[float, ...] | list[float]" = IMAGENET_MEAN,
        image_std: "tuple[float, ...] | list[float]" = IMAGENET_STD,
        max_pixels: int | None = DEFAULT_MAX_PIXELS,
        **kwargs: Any,
    ) -> None:
        _check_positive("tile_size", tile_size)
        if tile_size % PATCH_SIZE:
            raise ValueError(f"tile_size must be a multiple of {PATCH_SIZE}, got {tile_size}")
        _check_tile_range(min_tiles, max_tiles)
        if max_pixels is not None:
            _check_positive("max_pixels", max_pixels)
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            if not isinstance(values, (list, tuple)) or len(values) != 3:
                raise ValueError(f"{name} must be three numbers, got {values!r}")
        if not all(value > 0 for value in image_std):
            raise ValueError(f"image_std must be positive, got {image_std!r}")
        unknown = [
            k for k in kwargs if k not in _SERVICE_KEYS and k not in ImagesKwargs.__annotations__ and k[0] != "_"
        ]
        if unknown:
            logger.warning("%s ignores unknown options: %s", type(self).__name__, ", ".join(sorted(unknown)))
        super().__init__(**{key: value for key, value in kwargs.items() if key in _SERVICE_KEYS})
        self.tile_size = int(tile_size)
        self.min_tiles = int(min_tiles)
        self.max_tiles = int(max_tiles)
        self.use_thumbnail = bool(use_thumbnail)
        self.do_normalize = bool(do_normalize)
        self.image_mean = [float(value) for value in image_mean]
        self.image_std = [float(value) for value in image_std]
        self.max_pixels = None if max_pixels is None else int(max_pixels)

    @property
    def patches_per_tile(self) -> int:
        """(S // 28) ** 2: the visual tokens of one tile."""
        return (self.tile_size // PATCH_SIZE) ** 2

    def preprocess(
        self,
        images: Any,
        *,
        min_tiles: int | None = None,
        max_tiles: int | None = None,
        use_thumbnail: bool | None = None,
        do_normalize: bool | None = None,
        max_pixels: int | None = None,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tile pictures and cut the tiles into patches. An option left at None is the one the processor was made with.

        Args:
            images: one picture, a list, or nested lists (flattened, order kept) of anything `load_image` takes; an
                array of four dimensions is a batch of pictures.
            min_tiles, max_tiles: tiles of each picture. A max_tiles below the processor's min_tiles lowers that too.
            return_tensors: "pt", "np" or None (as "np", with `num_tiles` as a list).

        Returns:
            pixel_values: [tiles, patches, 3*28*28] of all pictures in order, float32 normalised, or uint8 with
                do_normalize=False. No pictures: [0, patches, 3*28*28].
            num_tiles: [images], int64, thumbnail counted.

        Raises:
            TypeError: an unknown option. ValueError: an option that does not apply, or a wrong value.
            FileNotFoundError, ConnectionError, ValueError, TypeError: see `load_image`.
        """
        self._check_call_kwargs(kwargs)
        low, high = self._tile_range(min_tiles, max_tiles)
        thumbnail = self.use_thumbnail if use_thumbnail is None else use_thumbnail
        limit = self.max_pixels if max_pixels is None else max_pixels
        normalized = self.do_normalize if do_normalize is None else do_normalize
        dtype = torch.float32 if normalized else torch.uint8
        sources = flatten_pictures(images)
        patches, num_tiles = [], []
        for index, source in enumerate(sources):
            try:
                image = load_image(source, max_pixels=limit)
                patches.append(self._to_patches(image, low, high, thumbnail, limit, dtype))
            except ValueError as error:
                if len(sources) == 1:
                    raise
                raise ValueError(f"picture {index + 1} of {len(sources)}: {error}") from error
            num_tiles.append(len(patches[-1]))
        if len(patches) == 1:
            values = patches[0]
        else:
            empty = torch.empty((0, self.patches_per_tile, PATCH_DIM), dtype=dtype)
            values = torch.cat([empty, *patches])
        if normalized:
            self._normalize(values)
        # Plain Python numbers would become float32 where the list is empty.
        data = {"pixel_values": values.numpy(), "num_tiles": np.asarray(num_tiles, dtype=np.int64)}
        if return_tensors is None:
            data["num_tiles"] = num_tiles  # type: ignore[assignment]
        return BatchFeature(data, tensor_type=return_tensors)

    def fetch_images(self, image_url_or_urls: Any, max_pixels: int | None = None) -> Any:
        """transformers' hook that loads the pictures of a prompt, nesting kept: here each goes through `load_image`."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item, max_pixels) for item in image_url_or_urls]
        if isinstance(image_url_or_urls, (np.ndarray, torch.Tensor)) and image_url_or_urls.ndim == 4:
            return [self.fetch_images(item, max_pixels) for item in image_url_or_urls]
        return load_image(image_url_or_urls, max_pixels=self.max_pixels if max_pixels is None else max_pixels)

    def get_number_of_tiles(
        self,
        height: int,
        width: int,
        *,
        max_tiles: int | None = None,
        min_tiles: int | None = None,
        use_thumbnail: bool | None = None,
    ) -> int:
        """Tiles of a picture of this size in pixels (as `load_image` returns it, so upright), thumbnail counted."""
        low, high = self._tile_range(min_tiles, max_tiles)
        cols, rows = choose_grid(width, height, tile_size=self.tile_size, min_tiles=low, max_tiles=high)
        thumbnail = self.use_thumbnail if use_thumbnail is None else use_thumbnail
        return cols * rows + int(thumbnail and cols * rows > 1)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """`get_number_of_tiles` under the name that transformers and the engines call."""
        options = images_kwargs or {}
        names = ("max_tiles", "min_tiles", "use_thumbnail")
        return self.get_number_of_tiles(height, width, **{name: options.get(name) for name in names})

    def _check_call_kwargs(self, kwargs: dict[str, Any]) -> None:
        own = [name for name in MonoInternVLImagesKwargs.__annotations__ if name not in ImagesKwargs.__annotations__]
        for key, value in kwargs.items():
            if key not in MonoInternVLImagesKwargs.__annotations__:
                allowed = ", ".join(sorted([*own, "do_normalize", "return_tensors"]))
                raise TypeError(f"{type(self).__name__} got an unexpected option '{key}'; allowed are {allowed}")
            fixed = getattr(self, key, None) if key in ("tile_size", "image_mean", "image_std") else None
            same = list(value) == fixed if isinstance(value, (list, tuple)) else value == fixed
            if value is not None and key not in _NEUTRAL_KWARGS and not same:
                raise ValueError(
                    f"'{key}' cannot be changed in a call, got {value!r}; make another {type(self).__name__}"
                )

    def _tile_range(self, min_tiles: int | None, max_tiles: int | None) -> tuple[int, int]:
        high = self.max_tiles if max_tiles is None else max_tiles
        _check_positive("max_tiles", high)
        low = min(self.min_tiles, high) if min_tiles is None else min_tiles
        _check_tile_range(low, high)
        return low, high

    def _to_patches(
        self,
        image: Image.Image,
        min_tiles: int,
        max_tiles: int,
        use_thumbnail: bool,
        max_pixels: int | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """RGB picture -> 0..255 in `dtype`, [tiles, patches, 3*28*28]; one copy from the resized to the patches."""
        side, p = self.tile_size, self.tile_size // PATCH_SIZE
        cols, rows = choose_grid(*image.size, tile_size=side, min_tiles=min_tiles, max_tiles=max_tiles)
        if max_pixels is not None and cols * side * image.height > max(max_pixels, DEFAULT_MAX_PIXELS):
            # A strip one pixel wide and millions high passes any limit on its area, but not this far.
            raise ValueError(
                f"picture of {image.width}x{image.height} is too narrow: stretched to {cols * side} columns it "
                f"exceeds the limit max_pixels of {max_pixels:,} pixels"
            )
        count = cols * rows
        out = torch.empty((count + int(use_thumbnail and count > 1), p * p, PATCH_DIM), dtype=dtype)
        _cut(_resize(image, cols * side, rows * side), out[:count], cols, rows, p)
        if len(out) > count:
            _cut(_resize(image, side, side), out[count:], 1, 1, p)
        return out

    def _normalize(self, values: torch.Tensor) -> None:
        """float32 0..255 [tiles, patches, D], in place, in the reference's order: with 1/255 it would be 1 ulp off."""
        mean = torch.tensor(self.image_mean, dtype=torch.float32)[:, None]
        std = torch.tensor(self.image_std, dtype=torch.float32)[:, None]
        values.view(-1, 3, PATCH_SIZE * PATCH_SIZE).div_(255).sub_(mean).div_(std)


def _cut(image: Image.Image, out: torch.Tensor, cols: int, rows: int, p: int) -> None:
    """Write the patches of a picture of rows x cols tiles into `out`, [rows*cols, p*p, 3*28*28] of any dtype."""
    pixels = torch.from_numpy(np.array(image)).view(rows, p, PATCH_SIZE, cols, p, PATCH_SIZE, 3)
    out.view(rows, cols, p, p, 3, PATCH_SIZE, PATCH_SIZE).copy_(pixels.permute(0, 3, 1, 4, 6, 2, 5))


def flatten_pictures(images: Any) -> list[Any]:
    """Pictures in any nesting of sequences, iterators and 4-D arrays (frames) as one list, in order."""
    if isinstance(images, (list, tuple, Iterator)):
        return [source for item in images for source in flatten_pictures(item)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(cast(Any, images))
    return [images]


MonoInternVLImageProcessor.register_for_auto_class("AutoImageProcessor")
