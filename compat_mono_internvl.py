"""What differs between the versions of transformers that this model runs on, 5.17 to 5.24; each choice stands here.

CACHE                 the key-value cache's name in outputs and masks: `past_key_values`, from 5.24 on `cache`
cache_of, one_cache   the cache of an output, and of a call that may give it by either name
causal_mask           `create_causal_mask` with the cache under the name that is wanted
update_cache          writing keys and values, also into the paged cache of continuous batching
check_keywords, checked_keywords
                      an unknown keyword is an error that names the nearest known one, never swallowed
IN_FLOAT16            why float16 is refused
cpu_has_bfloat16_units
                      what only private names of torch say about this CPU
"""

import dataclasses
import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.generic import TransformersKwargs


logger = logging.get_logger(__name__)

NEWEST_TESTED = "5.24.0"
# What every refusal and warning of float16 says.
IN_FLOAT16 = "in float16, in which this model's activations overflow to NaN"

_FIELDS = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
CACHE = "cache" if "cache" in _FIELDS else "past_key_values"

# What continuous batching passes to a forward, by the names of all versions (its own TypedDict is not imported: it
# brings the whole engine with it).
PAGED_KEYWORDS = frozenset(
    {
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "max_seqlen_q",
        "max_seqlen_k",
        "read_index",
        "write_index",
        "logits_indices",
        "block_table",
        "logits_processor_args",
        "is_causal",
        "use_cache",
        "cache",
    }
)
# What transformers hands to a model whatever the model is: `TransformersKwargs`, the paged arguments, the ones its own
# decorators read, and what its loss takes.
FORWARD_KEYWORDS = frozenset(
    {
        *TransformersKwargs.__annotations__,
        *PAGED_KEYWORDS,
        *("return_dict", "debug_io", "debug_io_dir", "prune_layers", "shift_labels", "ignore_index", "kernel_options"),
    }
)


class CacheNames:
    """An output whose cache has both names; from 5.24 on transformers gives the older one itself."""

    # The checker reads the newest transformers, where `cache` is a field.
    if CACHE == "past_key_values" and not TYPE_CHECKING:

        @property
        def cache(self) -> Any:
            return self.past_key_values


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache of a call that may name it either way.

    Raises:
        ValueError: both are given.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one thing; give one of them")
    return past_key_values if cache is None else cache


def cache_of(output: Any) -> Any:
    """The cache in a model's output, without the deprecation warning of its older name."""
    return getattr(output, CACHE)


def causal_mask(config: Any, inputs_embeds: torch.Tensor, attention_mask: Any, cache: Any, position_ids: Any) -> Any:
    """transformers' causal mask for the attention backend in `config`."""
    if CACHE == "past_key_values" and not isinstance(cache, Cache):
        cache = None  # a paged cache has masks of its own, and older versions do not know it here
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        **{CACHE: cache},
    )


def is_paged(cache: Any) -> bool:
    """Whether this is continuous batching's cache, which belongs to several prompts of one row."""
    return cache is not None and not isinstance(cache, Cache)


def update_cache(
    cache: Any, key: torch.Tensor, value: torch.Tensor, layer: int, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write a layer's keys and values [B, kv_heads, T, D] and return all it holds, [B, kv_heads, S, D].

    A paged cache reads and changes `kwargs`, which go on to the attention function. Before 5.24 that function does the
    writing itself and finds the cache there.
    """
    if not is_paged(cache):
        return cache.update(key, value, layer)
    if CACHE == "past_key_values":
        kwargs["cache"] = cache
        return key, value
    return cache.update(key, value, layer, kwargs=kwargs)


def check_keywords(what: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Refuse keywords that nothing would read.

    Raises:
        TypeError: names each, the nearest that is known, and all that are.
    """
    known = sorted(name for name in allowed if not name.startswith("_"))
    unknown = [name for name in given if name not in known]
    if not unknown:
        return
    hints = []
    for name in unknown:
        close = difflib.get_close_matches(name, known, n=1)
        hints.append(f"{name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    # A list that nobody reads is left out.
    listed = f"; allowed are {', '.join(known)}" if len(known) <= 40 else ""
    raise TypeError(f"{what} got an unknown option {', '.join(hints)}{listed}")


def checked_keywords(forward: Callable) -> Callable:
    """Let a forward refuse what it would swallow: keywords that are neither its own nor `FORWARD_KEYWORDS`."""
    known = frozenset(inspect.signature(forward).parameters) - {"self", "kwargs"} | FORWARD_KEYWORDS

    @functools.wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not known.issuperset(kwargs):
            check_keywords(f"{type(self).__name__}.forward", kwargs, known)
        return forward(self, *args, **kwargs)

    return checked


def register_causal_lm(model_type: str, class_name: str) -> None:
    """Name the class in transformers' table of causal language models.

    `Trainer` shifts the labels for label smoothing only where it finds the class's name there; elsewhere its loss would
    be that of the token itself, without a word. An entry of this table alone loads nothing.
    """
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(model_type, class_name)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)\.?(\d*)", version)
    return tuple(int(number or 0) for number in found.groups()) if found else ()


def warn_if_untested(version: str = transformers.__version__) -> None:
    """One warning where the installed transformers is newer than any that this model was tested with."""
    if _numbers(version) > _numbers(NEWEST_TESTED):
        logger.warning(
            f"transformers {version} is newer than {NEWEST_TESTED}, the newest that Mono-InternVL was tested with; if "
            f"answers look wrong, install transformers=={NEWEST_TESTED}"
        )


warn_if_untested()


# torch has no public name for either. Where one is gone, "no units" would make every CPU compute in float32.
_BFLOAT16_CHECKS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")


def cpu_has_bfloat16_units() -> bool:
    """Whether matrix products in bfloat16 are fast on this CPU (x86 AMX or AVX512-BF16)."""
    gone = [name for name in _BFLOAT16_CHECKS if not hasattr(torch.cpu, name)]
    if gone:
        logger.warning_once(
            f"torch {torch.__version__} has no torch.cpu.{' or '.join(gone)} any more: whether this CPU is fast in "
            "bfloat16 is not known, and it is taken for slow; give a dtype yourself"
        )
    return any(getattr(torch.cpu, name)() for name in _BFLOAT16_CHECKS if name not in gone)
