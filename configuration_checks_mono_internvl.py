"""What the values of a configuration must be; asked once, when it is made."""

import difflib
import math
from collections.abc import Collection, Iterable
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Rope type -> the numbers that it needs. All but `dynamic` have the same frequencies at every length.
ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "dynamic": ("factor",),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


# Where a block of learnable queries stands, see `MonoInternVLConfig`.
QUERY_PLACEMENTS = ("image", "question")
# Which attention projections have a bias, as `attention_bias` says it -> their letters.
BIASED_PROJECTIONS: dict[bool | str, str] = {False: "", True: "qkvo", "qkv": "qkv", "o": "o"}


def check_choice(where: str, config: Any, name: str, allowed: Collection[Any]) -> None:
    """Raise a ValueError that names the field unless its value is one of those allowed; 1 and 0 are no truth values."""
    value = getattr(config, name)
    if not any(value == one and type(value) is type(one) for one in allowed):
        listed = ", ".join(one if isinstance(one, str) else repr(one) for one in allowed)
        raise ValueError(f"{where}{name}={value!r} must be one of {listed}")


def check_numbers(where: str, config: Any, names: Iterable[str], kind: Any = int) -> None:
    """Raise a ValueError that names the first of `names` that is not a positive number of its kind."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, kind) or isinstance(value, bool) or not value > 0:
            wanted = "integer" if kind is int else "number"
            raise ValueError(f"{where}: {name}={value!r} must be a positive {wanted}")


def warn_of_misspelt(where: str, config: Any, given: Iterable[str]) -> None:
    """One warning for each key that is kept but not read and that looks like one that is.

    Files of other versions hold keys that nothing here reads, so a key that is not known is no error.
    """
    fields = fields_of(type(config))
    for name in given:
        if name not in fields and not hasattr(PreTrainedConfig, name):
            close = difflib.get_close_matches(name, fields, n=1, cutoff=0.8)
            if close:
                logger.warning(f"{where}: {name} is not known and changes nothing; did you mean {close[0]}?")


def without_unused(values: dict[str, Any], switch: str, names: Iterable[str]) -> dict[str, Any]:
    """A written configuration without `names` where `switch` is off: a model without a part does not name it."""
    return values if values.get(switch) else {name: value for name, value in values.items() if name not in names}


def fields_of(config_class: type[PreTrainedConfig]) -> list[str]:
    """The names that a configuration class has of its own."""
    return [name for name in config_class.__annotations__ if not name.startswith("_")]


def check_placement(count: Any, placement: Any) -> None:
    """Raise a ValueError where a number of learnable queries or their place is not one that there is."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"num_learnable_queries={count!r} must be an integer that is not negative")
    if placement not in QUERY_PLACEMENTS:
        raise ValueError(f"query_placement={placement!r} must be one of {', '.join(QUERY_PLACEMENTS)}")
    if count == 0 and placement != "image":
        raise ValueError(f"query_placement={placement!r} needs num_learnable_queries")


def check_grids(count: int, grids: Any) -> list[int]:
    """The sides of the grids of `count` learnable queries, at least one; `grids` None: the default.

    Raises:
        ValueError: they do not fit; names both.
    """
    if grids is None:
        grids = [8, 6] if count == 100 else [math.isqrt(count)]
    whole = isinstance(grids, (list, tuple)) and all(type(side) is int and side > 0 for side in grids)
    if not whole or sum(side * side for side in grids) != count:
        raise ValueError(f"query_grids={grids!r} must be sides of squares of {count} queries together")
    return list(grids)


def check_queries(config: Any) -> list[int] | None:
    """The sides of the grids of a configuration's learnable queries; None where there are none.

    Raises:
        ValueError: number, grids, place or placeholder do not fit; names what is there and what is allowed.
    """
    count, grids, token = config.num_learnable_queries, config.query_grids, config.query_token_id
    check_placement(count, config.query_placement)
    if count == 0:
        if grids or token is not None:
            raise ValueError(f"query_grids={grids!r} and query_token_id={token!r} need num_learnable_queries")
        return None
    grids = check_grids(count, grids)
    text = config.text_config
    taken = [config.image_token_id, config.image_start_token_id, config.image_end_token_id, *config.stop_token_ids]
    for other in (text.bos_token_id, text.eos_token_id, text.pad_token_id):
        taken += other if isinstance(other, list) else [other]
    if type(token) is not int or not 0 <= token < text.vocab_size or token in taken:
        raise ValueError(
            f"query_token_id={token!r} must be an id of its own in the vocabulary of {text.vocab_size}, none of a "
            f"picture's, of padding, or that begins or ends a text: the placeholder of the {count} learnable queries"
        )
    return grids


def check_rope(parameters: dict[str, Any]) -> str:
    """The rope type of `rope_parameters`.

    Raises:
        ValueError: a type that is not known, or a number that it needs is missing; names it and what is allowed.
    """
    kind = parameters.get("rope_type") or "default"
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError(
            f"text_config: partial_rotary_factor={parameters['partial_rotary_factor']} is not supported, only 1"
        )
    if kind not in ROPE_NUMBERS:
        raise ValueError(f"text_config: rope type {kind!r} is not known; allowed are {', '.join(ROPE_NUMBERS)}")
    for name in ROPE_NUMBERS[kind]:
        value = parameters.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f"text_config: rope type {kind} needs {name} as a positive number, not {value!r}")
    return kind


def context_length(config: Any) -> int:
    """Positions that a decoder reaches. Of `dynamic` and `linear`, and mostly of `yarn`, files say how many there are
    before they are stretched, of the other types how many in the end."""
    rope, length = config.rope_parameters, config.max_position_embeddings
    if rope["rope_type"] in ("dynamic", "linear"):
        return int(length * rope["factor"])
    if rope["rope_type"] == "yarn":
        return max(length, int(rope["original_max_position_embeddings"] * rope["factor"]))
    return length
