"""What a caller may say to the processor: options that are taken, and those refused or ignored, by name."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import GenerationConfig
from transformers.processing_utils import AudioKwargs, TextKwargs, VideosKwargs

from .compat_mono_internvl import check_keywords
from .image_processing_mono_internvl import MonoInternVLImagesKwargs
from .tiling_mono_internvl import TILE_OPTIONS, check_max_tiles
from .video_mono_internvl import VIDEO_OPTIONS, check_sampling


logger = logging.getLogger(__name__)


IMAGE_OPTIONS = frozenset(MonoInternVLImagesKwargs.__annotations__) - {"return_tensors"}
_TEXT_OPTIONS = (
    "add_special_tokens",
    "padding",
    "padding_side",
    "max_length",
    "truncation",
    "pad_to_multiple_of",
    "return_mm_token_type_ids",
    "return_attention_mask",
)
_GROUPS = {"images_kwargs": IMAGE_OPTIONS, "text_kwargs": _TEXT_OPTIONS, "videos_kwargs": VIDEO_OPTIONS}
_GROUPED_OPTIONS = ("common_kwargs", "images_kwargs", "text_kwargs", "videos_kwargs", "audio_kwargs")
_OPTIONS = frozenset({*IMAGE_OPTIONS, *_TEXT_OPTIONS, *VIDEO_OPTIONS, "return_tensors"})
# What a person may mean; named where an option is not known.
_SAID = ("max_pixels", "do_normalize", *TILE_OPTIONS, *VIDEO_OPTIONS, *_TEXT_OPTIONS, "return_tensors", "images")
# What a tokenizer may have been made with, as a default of its own.
_TOKENIZER_DEFAULTS = ("padding", "max_length", "truncation", "pad_to_multiple_of")
# transformers' names for what this processor does not give. Its pipelines and trainers send them along unset.
_UNREAD = frozenset({*VideosKwargs.__annotations__, *AudioKwargs.__annotations__, "videos", "audio"})
_UNREAD |= {"load_audio_from_video", "return_metadata", "use_audio_in_video"}
_UNREAD -= _OPTIONS
_UNWRITTEN = frozenset({*TextKwargs.__annotations__, "return_text_replacement_offsets"}) - _OPTIONS
_PADDINGS = (True, False, "longest", "max_length", "do_not_pad")
_TRUNCATIONS = (True, False, "longest_first", "only_first", "do_not_truncate")
_IGNORED_ONCE: set[str] = set()


def is_read(name: str, value: Any, what: str, said: Iterable[str] = ()) -> bool:
    """Whether an option is one that is used. What transformers' own callers send along unset, or where it cannot
    matter, is not.

    Raises:
        TypeError: nobody knows it. ValueError: transformers knows it, but this processor does not give it.
    """
    if name in _OPTIONS:
        return value is not None
    if name == "do_sample_frames" and value is False:
        raise ValueError("do_sample_frames=False is not given: say num_frames, as many as the video has")
    if name in _UNREAD:
        if name == "do_sample_frames" or value is None or value is False:
            return False
        raise ValueError(
            f"{name}={value!r} is not known here: a video is a part of a message, {{'type': 'video', 'video': ..}}, "
            "with num_frames or fps; sound is not heard"
        )
    if name in _UNWRITTEN:
        if not value or name == "verbose":
            return False
        if name == "return_token_type_ids":
            _ignore(name, "the model has no token types")
            return False
        raise ValueError(f"{name}={value!r} is not given by this processor")
    if name in vars(GenerationConfig()):
        _ignore(name, "it belongs to generate; a pipeline takes it in generate_kwargs")
        return False
    check_keywords(what, [name], (*_SAID, *said))
    return False


def _ignore(name: str, reason: str) -> None:
    if name not in _IGNORED_ONCE:
        _IGNORED_ONCE.add(name)
        logger.warning("the processor ignores %s: %s", name, reason)


def collect_options(
    tokenizer: Any, image_processor: Any, given: dict[str, Any], what: str, said: Iterable[str] = ()
) -> dict[str, Any]:
    """Flat and grouped options as one dict; None is as good as not given. `said`: what else may have been meant.

    Raises:
        TypeError: an unknown option. ValueError: given twice, or something that this processor does not give.
    """
    groups = _groups(given)
    options: dict[str, Any] = {}
    for place, group in {"": given, **groups}.items():
        if not isinstance(group, Mapping):
            raise ValueError(f"{place} must be a dict of options, not {type(group).__name__}")
        own: Iterable[str] = _GROUPS.get(place, _OPTIONS)
        for name, value in group.items():
            if place == "audio_kwargs" and value is not None:
                raise ValueError(f"{name} in {place}: sound is not heard")
            if not is_read(name, value, place or what, said):
                continue
            if name not in own and name != "return_tensors":
                raise ValueError(f"{name} does not belong into {place}; give it directly")
            if name in options and options[name] != value:
                raise ValueError(f"{name} is given twice, {options[name]!r} and {value!r} in {place}")
            options[name] = value
    return_tensors = options.get("return_tensors")
    if return_tensors not in (None, "pt", "np"):
        raise ValueError(f"return_tensors={return_tensors!r} is not known; allowed are 'pt', 'np' and None")
    made_with = getattr(tokenizer, "init_kwargs", {})
    defaults = {name: made_with[name] for name in _TOKENIZER_DEFAULTS if made_with.get(name) is not None}
    padding = options.get("padding", defaults.get("padding"))
    if "max_length" in options and "truncation" not in options and padding != "max_length":
        raise ValueError("max_length alone changes nothing: give truncation=True, or padding='max_length'")
    unusual = {name: options[name] for name in options if name in IMAGE_OPTIONS and name not in _SAID}
    if unusual:
        image_processor([], **unusual)  # refuses what it would refuse beside a picture
    check_sampling(options.get("num_frames"), options.get("fps"))
    if "max_tiles" in options:
        check_max_tiles(options["max_tiles"])
    options = {**defaults, **options}
    _check_lengths(options)
    return options


def _groups(given: dict[str, Any]) -> dict[str, Any]:
    """The groups among the options, taken out of them; those inside of `processor_kwargs` too."""
    groups = {name: given.pop(name) or {} for name in (*_GROUPED_OPTIONS, "processor_kwargs") if name in given}
    if "processor_kwargs" in groups:
        inner = dict(groups.pop("processor_kwargs"))
        for name in _GROUPED_OPTIONS:
            if inner.get(name):
                if groups.get(name):
                    raise ValueError(f"{name} is given twice, directly and in processor_kwargs")
                groups[name] = inner[name]
            inner.pop(name, None)
        groups["processor_kwargs"] = inner
    return groups


def _check_lengths(options: dict[str, Any]) -> None:
    for name, allowed in (("padding", _PADDINGS), ("truncation", _TRUNCATIONS)):
        if name in options and options[name] not in allowed:
            raise ValueError(f"{name}={options[name]!r} is not known; allowed are {', '.join(map(str, allowed))}")
    if options.get("padding_side") not in (None, "left", "right"):
        raise ValueError(f"padding_side={options['padding_side']!r} is not known; allowed are left and right")
    for name in ("max_length", "pad_to_multiple_of"):
        value = options.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
