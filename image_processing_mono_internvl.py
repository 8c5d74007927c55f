"""Picture -> grid -> tiles + thumbnail -> 28-px patches, with Pillow, numpy and torch alone.

One bicubic resize to cols*S x rows*S, cut row-major; a thumbnail of the whole picture goes last when there is more than
one tile; a tile is (S/28)^2 patches, normalised with the ImageNet mean.

Legend: S tile side in pixels (448), p = S // 28 patches along a side, D = 3*28*28 values of a patch.
The pixels equal the released model's bit for bit; `resize` says where the one trap is.
"""

import logging
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from .compat_mono_internvl import check_keywords
from .image_loading_mono_internvl import (
    DEFAULT_MAX_PIXELS,
    at_picture,
    channels_as_said,
    exif_orientation,
    flatten_pictures,
    load_image,
)
from .tiling_mono_internvl import (
    AUTO,
    DEFAULT_MAX_TILES,
    PATCH_DIM,
    PATCH_SIZE,
    TILE_OPTIONS,
    AutoTiles,
    check_bool,
    check_positive,
    check_tile_range,
    check_tile_size,
    choose_grid,
    count_tiles,
    patchify,
    tile_limit,
    tokens_per_tile,
    unpatchify,
)


logger = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# ----------------------------------------------------------------------------------------------------------- processor


class MonoInternVLImagesKwargs(ImagesKwargs, total=False):
    """What a processor may pass on to the image processor, beyond transformers' own names."""

    tile_size: int | None
    min_tiles: int | None
    max_tiles: int | str | None
    use_thumbnail: bool | None
    max_pixels: int | None
    convert_to_srgb: bool | None


# Names of transformers' that say how to compute, or describe what is true here anyway: no effect on the result.
_NEUTRAL = frozenset({"default_to_square", "device", "disable_grouping", "do_convert_rgb", "image_seq_length"})
# Names of transformers' for steps that are always the same here, each with what may be said of it.
_FIXED = {
    "do_resize": True,
    "do_rescale": True,
    "do_center_crop": False,
    "do_pad": False,
    "resample": Image.Resampling.BICUBIC,
    "rescale_factor": 1 / 255,
    "data_format": "channels_first",
}
# Keys that transformers itself writes into a saved configuration.
_SERVICE_KEYS = frozenset(
    {"auto_map", "feature_extractor_type", "image_processor_type", "name_or_path", "processor_class"}
)
# What `from_pretrained` and transformers' automatic classes say about where to load from, and how.
_LOADING_KEYS = frozenset(
    {
        *("revision", "code_revision", "subfolder", "token", "use_auth_token", "cache_dir", "local_files_only"),
        *("force_download", "resume_download", "proxies", "mirror", "user_agent", "image_processor_filename"),
        *("trust_remote_code", "return_unused_kwargs", "use_fast", "backend", "config"),
    }
)
_OWN_KEYS = frozenset(MonoInternVLImagesKwargs.__annotations__) - frozenset(ImagesKwargs.__annotations__) | {
    "do_normalize",
    "image_mean",
    "image_std",
}


@dataclass(frozen=True)
class Frame:
    """A picture that is one of a video's: one tile whatever the options say, without a thumbnail."""

    picture: Any


def resize(image: Image.Image, width: int, height: int, max_pixels: int | None) -> Image.Image:
    """Bicubic resize, across first and then down; to its own size it changes nothing.

    In one call Pillow 13 goes down first where that is cheaper, and rounds to other pixels than the releases before it.
    A step that changes nothing is only a copy, so two calls give the old result on every version.

    Raises:
        ValueError: what lies between the steps would hold far more pixels than max_pixels.
    """
    if max_pixels is not None and width * image.height > max(max_pixels, DEFAULT_MAX_PIXELS):
        # A strip one pixel wide and millions high passes any limit on its area, but not this far.
        raise ValueError(
            f"picture of {image.width}x{image.height} is too narrow: stretched to {width} columns it "
            f"exceeds the limit max_pixels of {max_pixels:,} pixels"
        )
    across = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return across.resize((width, height), Image.Resampling.BICUBIC)


class MonoInternVLImageProcessor(BaseImageProcessor):
    """Pictures -> normalised patches of tiles, ready for the model.

    Args:
        tile_size: side S of a tile in pixels, a multiple of 28.
        min_tiles, max_tiles: allowed tiles of one picture, thumbnail not counted. max_tiles="auto" never enlarges: at
            most max(1, round(width * height / tile_size ** 2)) tiles, and 12.
        use_thumbnail: append the whole picture, resized to one tile, where a picture has more than one tile.
        do_normalize: float32 `(x / 255 - mean) / std`; otherwise the raw uint8 values.
        image_mean, image_std: per channel, for values in 0..1.
        max_pixels: pictures with more pixels are refused; None leaves the limit to Pillow.
        convert_to_srgb: apply the ICC profile that a picture has. The released model saw pictures without.
        **kwargs: keys of transformers' bookkeeping are kept. Names of other image processors' options (`do_resize`,
            `size`, ..) may say what is done here anyway.

    Raises:
        TypeError: an unknown option; the nearest known one is named.
        ValueError: tile_size is no multiple of 28, not 1 <= min_tiles <= max_tiles, a wrong mean or std, or an option
            of other image processors that asks for something else.
    """

    valid_kwargs = MonoInternVLImagesKwargs

    def __init__(
        self,
        tile_size: int = 448,
        min_tiles: int = 1,
        max_tiles: int | str = DEFAULT_MAX_TILES,
        use_thumbnail: bool = True,
        do_normalize: bool = True,
        image_mean: "tuple[float, ...] | list[float]" = IMAGENET_MEAN,
        image_std: "tuple[float, ...] | list[float]" = IMAGENET_STD,
        max_pixels: int | None = DEFAULT_MAX_PIXELS,
        convert_to_srgb: bool = False,
        **kwargs: Any,
    ) -> None:
        check_tile_size(tile_size)
        check_tile_range(min_tiles, max_tiles)
        if max_pixels is not None:
            check_positive("max_pixels", max_pixels)
        for name, value in (
            ("use_thumbnail", use_thumbnail),
            ("do_normalize", do_normalize),
            ("convert_to_srgb", convert_to_srgb),
        ):
            check_bool(name, value)
        bookkeeping = {key: value for key, value in kwargs.items() if key in _SERVICE_KEYS or key[0] == "_"}
        others = {key: value for key, value in kwargs.items() if key not in bookkeeping}
        check_keywords(type(self).__name__, others, _OWN_KEYS | set(ImagesKwargs.__annotations__) - {"return_tensors"})
        super().__init__(**{key: value for key, value in bookkeeping.items() if key in _SERVICE_KEYS})
        self.tile_size = int(tile_size)
        self.min_tiles = int(min_tiles)
        self.max_tiles = int(max_tiles) if isinstance(max_tiles, Integral) else AUTO
        self.use_thumbnail = bool(use_thumbnail)
        self.do_normalize = bool(do_normalize)
        self.image_mean = _three_numbers("image_mean", image_mean)
        self.image_std = _three_numbers("image_std", image_std)
        self.max_pixels = None if max_pixels is None else int(max_pixels)
        self.convert_to_srgb = bool(convert_to_srgb)
        self._check_fixed(others)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; an option in `kwargs` that does not exist is refused.

        A file of another image processor's (an official folder has CLIP's) gives what the two have in common; a key
        that nobody knows is named in a warning.

        Raises:
            TypeError: an unknown option, unless `return_unused_kwargs` asks for such. ValueError: see the constructor.
        """
        options = [key for key in kwargs if key not in _LOADING_KEYS and key[0] != "_"]
        if not kwargs.get("return_unused_kwargs"):
            check_keywords(cls.__name__, options, _OWN_KEYS | set(ImagesKwargs.__annotations__))
        settings = dict(image_processor_dict)
        kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or cls.__name__
        foreign = frozenset() if kind == cls.__name__ else frozenset(ImagesKwargs.__annotations__) - _OWN_KEYS
        known = _OWN_KEYS | _SERVICE_KEYS | set(ImagesKwargs.__annotations__)
        unknown = sorted(key for key in settings if key not in known and key[0] != "_")
        if unknown:
            logger.warning("%s ignores unknown options of its file: %s", cls.__name__, ", ".join(unknown))
        settings = {key: value for key, value in settings.items() if key not in foreign and key not in unknown}
        return super().from_dict(settings, **kwargs)

    @property
    def patches_per_tile(self) -> int:
        """The visual tokens of one tile."""
        return tokens_per_tile(self.tile_size)

    def preprocess(
        self,
        images: Any,
        *,
        min_tiles: int | None = None,
        max_tiles: "int | str | AutoTiles | None" = None,
        use_thumbnail: bool | None = None,
        do_normalize: bool | None = None,
        max_pixels: int | None = None,
        convert_to_srgb: bool | None = None,
        image_mean: Any = None,
        image_std: Any = None,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tile pictures and cut the tiles into patches. An option left at None is the one the processor was made with.

        Args:
            images: one picture, a list, or nested lists (flattened, order kept) of anything `load_image` takes; an
                array of four dimensions is a batch of pictures; a `Frame` is one tile. Nothing of it is changed.
            min_tiles, max_tiles: tiles of each picture. A max_tiles below the processor's min_tiles lowers that too.
                "auto" never enlarges a picture, and never exceeds the processor's max_tiles.
            return_tensors: "pt", "np" or None (as "np", with `num_tiles` as a list).
            **kwargs: transformers' `device` (of "pt" tensors, which are computed on the CPU) and `input_data_format`
                (of arrays: "channels_first" or "channels_last"); others may say what is done here anyway.

        Returns:
            pixel_values: [tiles, patches, 3*28*28] of all pictures in order, float32 normalised, or uint8 with
                do_normalize=False. No pictures: [0, patches, 3*28*28].
            num_tiles: [images], int64, thumbnail counted.

        Raises:
            TypeError: an unknown option. ValueError: an option that does not apply, or a wrong value.
            FileNotFoundError, ConnectionError, ValueError, TypeError: see `load_image`; of several pictures the message
                says which.
        """
        if kwargs:
            check_keywords(type(self).__name__, kwargs, MonoInternVLImagesKwargs.__annotations__)
            self._check_fixed(kwargs)
        low, high = self._tile_range(min_tiles, max_tiles)
        thumbnail = _chosen("use_thumbnail", use_thumbnail, self.use_thumbnail)
        normalized = _chosen("do_normalize", do_normalize, self.do_normalize)
        srgb = _chosen("convert_to_srgb", convert_to_srgb, self.convert_to_srgb)
        limit = self.max_pixels if max_pixels is None else max_pixels
        mean = self.image_mean if image_mean is None else _three_numbers("image_mean", image_mean)
        std = self.image_std if image_std is None else _three_numbers("image_std", image_std)
        dtype = torch.float32 if normalized else torch.uint8
        sources = flatten_pictures(images)
        patches, num_tiles = [], []
        for index, source in enumerate(sources):
            least, most, source = (1, 1, source.picture) if isinstance(source, Frame) else (low, high, source)
            try:
                image = load_image(
                    channels_as_said(source, kwargs.get("input_data_format")),
                    max_pixels=limit,
                    convert_to_srgb=srgb,
                )
                patches.append(self._to_patches(image, least, most, thumbnail, limit, dtype))
            except (ValueError, TypeError, OSError, ImportError) as error:
                if len(sources) == 1:
                    raise
                raise at_picture(error, index + 1, len(sources)) from error
            num_tiles.append(len(patches[-1]))
        if len(patches) == 1:
            values = patches[0]
        else:
            empty = torch.empty((0, self.patches_per_tile, PATCH_DIM), dtype=dtype, device="cpu")
            values = torch.cat([empty, *patches])
        if normalized:
            _normalize(values, mean, std)
        # Plain Python numbers would become float32 where the list is empty.
        data = {"pixel_values": values.numpy(), "num_tiles": np.asarray(num_tiles, dtype=np.int64)}
        if return_tensors is None:
            data["num_tiles"] = num_tiles  # type: ignore[assignment]
        features = BatchFeature(data, tensor_type=return_tensors)
        device = kwargs.get("device")
        if device is not None and return_tensors == "pt":
            features.to(device)  # in place
        return features

    def fetch_images(self, image_url_or_urls: Any, max_pixels: int | None = None) -> Any:
        """transformers' hook that loads the pictures of a prompt, nesting kept: here each goes through `load_image`."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item, max_pixels) for item in image_url_or_urls]
        if getattr(image_url_or_urls, "ndim", 0) == 4:
            return [self.fetch_images(item, max_pixels) for item in image_url_or_urls]
        limit = self.max_pixels if max_pixels is None else max_pixels
        return load_image(image_url_or_urls, max_pixels=limit, convert_to_srgb=self.convert_to_srgb)

    def get_number_of_tiles(
        self,
        height: int,
        width: int,
        *,
        max_tiles: "int | str | AutoTiles | None" = None,
        min_tiles: int | None = None,
        use_thumbnail: bool | None = None,
    ) -> int:
        """Tiles of a picture of this size in pixels (as `load_image` returns it, so upright), thumbnail counted."""
        cols, rows = self.grid_of(width, height, max_tiles=max_tiles, min_tiles=min_tiles)
        thumbnail = self.use_thumbnail if use_thumbnail is None else use_thumbnail
        return count_tiles(cols, rows, thumbnail)

    def grid_of(
        self,
        width: int,
        height: int,
        *,
        max_tiles: "int | str | AutoTiles | None" = None,
        min_tiles: int | None = None,
    ) -> tuple[int, int]:
        """(cols, rows) of a picture of this size in pixels, as `load_image` returns it."""
        low, high = self._tile_range(min_tiles, max_tiles)
        return choose_grid(width, height, tile_size=self.tile_size, min_tiles=low, max_tiles=high)

    def tile_limit(self, max_tiles: "int | str | AutoTiles | None" = None) -> int:
        """The most tiles that a picture may get, thumbnail not counted; "auto" keeps within this processor's number."""
        own = tile_limit(self.max_tiles)
        return own if max_tiles is None else tile_limit(max_tiles, own)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """`get_number_of_tiles` under the name that transformers and the engines call."""
        options = images_kwargs or {}
        return self.get_number_of_tiles(height, width, **{name: options.get(name) for name in TILE_OPTIONS})

    def _check_fixed(self, options: dict[str, Any]) -> None:
        """Refuse options of other image processors that ask for something else than what is done here."""
        side = self.tile_size
        for key, value in options.items():
            if value is None or key in _NEUTRAL or key in _OWN_KEYS - {"tile_size"}:
                continue
            if key == "input_data_format":
                if value not in ("channels_first", "channels_last"):
                    raise ValueError(f"input_data_format must be channels_first or channels_last, got {value!r}")
            elif key == "tile_size":
                if value != side:
                    raise ValueError(
                        f"'tile_size' cannot be changed in a call, got {value!r}; make another {type(self).__name__}"
                    )
            elif key == "size":
                if value != side and value not in ([side, side], (side, side)) and not _is_square(value, side):
                    raise ValueError(f"'size' is no option here, got {value!r}: tiles are {side} px, see tile_size")
            elif key not in _FIXED or value != _FIXED[key]:
                fixed = f", only {_FIXED[key]!r}" if key in _FIXED else ""
                raise ValueError(f"'{key}' is no option of {type(self).__name__}{fixed}, got {value!r}")

    def _tile_range(self, min_tiles: int | None, max_tiles: Any) -> tuple[int, int | AutoTiles]:
        limit = self.tile_limit(max_tiles)
        low = min(self.min_tiles, limit) if min_tiles is None else min_tiles
        check_tile_range(low, limit)
        counted = isinstance(self.max_tiles if max_tiles is None else max_tiles, Integral)
        return low, limit if counted else AutoTiles(limit)

    def _to_patches(
        self,
        image: Image.Image,
        min_tiles: int,
        max_tiles: int | AutoTiles,
        use_thumbnail: bool,
        max_pixels: int | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """RGB picture -> 0..255 in `dtype`, [tiles, patches, 3*28*28]; one copy from the resized to the patches."""
        side, p = self.tile_size, self.tile_size // PATCH_SIZE
        cols, rows = choose_grid(*image.size, tile_size=side, min_tiles=min_tiles, max_tiles=max_tiles)
        count = cols * rows
        tiles = count_tiles(cols, rows, use_thumbnail)
        out = torch.empty((tiles, self.patches_per_tile, PATCH_DIM), dtype=dtype, device="cpu")
        _cut(resize(image, cols * side, rows * side, max_pixels), out[:count], cols, rows, p)
        if tiles > count:
            _cut(resize(image, side, side, max_pixels), out[count:], 1, 1, p)
        return out


def _normalize(values: torch.Tensor, mean: list[float], std: list[float]) -> None:
    """float32 0..255 [tiles, patches, D], in place, in the reference's order: with 1/255 it would be 1 ulp off."""
    means = torch.tensor(mean, dtype=torch.float32, device="cpu")[:, None]
    stds = torch.tensor(std, dtype=torch.float32, device="cpu")[:, None]
    values.view(-1, 3, PATCH_SIZE * PATCH_SIZE).div_(255).sub_(means).div_(stds)


def _cut(image: Image.Image, out: torch.Tensor, cols: int, rows: int, p: int) -> None:
    """Write the patches of a picture of rows x cols tiles into `out`, [rows*cols, p*p, 3*28*28] of any dtype."""
    pixels = torch.from_numpy(np.array(image)).view(rows, p, PATCH_SIZE, cols, p, PATCH_SIZE, 3)
    out.view(rows, cols, p, p, 3, PATCH_SIZE, PATCH_SIZE).copy_(pixels.permute(0, 3, 1, 4, 6, 2, 5))


def _chosen(name: str, value: Any, default: bool) -> bool:
    if value is None:
        return default
    check_bool(name, value)
    return bool(value)


def _is_square(value: Any, side: int) -> bool:
    get = getattr(value, "get", None)
    return get is not None and get("height") == get("width") == side


def _three_numbers(name: str, values: Any) -> list[float]:
    """A value per channel; one number stands for all three."""
    single = isinstance(values, (int, float)) and not isinstance(values, bool)
    try:
        numbers = [float(values)] * 3 if single else [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 3 or isinstance(values, str) or not np.isfinite(numbers).all():
        raise ValueError(f"{name} must be three numbers, got {values!r}")
    if name == "image_std" and not all(number > 0 for number in numbers):
        raise ValueError(f"image_std must be positive, got {values!r}")
    return numbers


MonoInternVLImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "Frame",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MonoInternVLImageProcessor",
    "MonoInternVLImagesKwargs",
    "PATCH_DIM",
    "PATCH_SIZE",
    "at_picture",
    "choose_grid",
    "exif_orientation",
    "flatten_pictures",
    "load_image",
    "patchify",
    "unpatchify",
]
