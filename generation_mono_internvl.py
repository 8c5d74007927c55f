"""Every place where `generate` needs to know that prompts hold pictures, and why.

    compile once for all lengths      `generate`: a static cache's length is rounded up
    never emit a placeholder          `_get_logits_processor`
    keep the mask of visual tokens    `prepare_inputs_for_generation`
    beams repeat tiles in groups      `_expand_inputs_for_generation`
    chunks of a prompt                `_prefill`
    continuous batching               `init_continuous_batching`, `generate_batch`: text only, and as `generate` answers

The names with an underscore are transformers' own; it has no public way to these places. The tests of generation fail
where a version renames one.
"""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F
from transformers.generation import utils as generation_utils
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import SuppressTokensLogitsProcessor
from transformers.generation.utils import GenerationMixin

from .compat_mono_internvl import CACHE, check_keywords, one_cache
from .image_processing_mono_internvl import patchify


# Keys that are not there yet cost little in a step, 100 MB of memory a row at the 2B model's size.
STATIC_CACHE_STEP = 1024


class SuppressPlaceholders(SuppressTokensLogitsProcessor):
    """It looks at each score alone, so rows of several prompts may come joined, as in continuous batching."""

    supports_continuous_batching = True


class MonoInternVLGenerationMixin(GenerationMixin):
    """`generate` for a model whose prompts hold pictures."""

    def generate(self, inputs=None, generation_config=None, **kwargs):  # type: ignore[no-untyped-def,override]
        """As in transformers; never emits `<IMG_CONTEXT>`, `<img>` or `</img>`. `generation_config` may be a dict."""
        if isinstance(generation_config, Mapping):
            generation_config = self.generation_config_of(generation_config)
        # Either name of the cache; transformers takes the one of its version.
        cache = one_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        if cache is not None:
            kwargs[CACHE] = cache
        if kwargs.get("pixel_values") is None:
            # transformers would encode a picture that is explicitly None.
            kwargs.pop("pixel_values", None)
        elif kwargs.get("cache_implementation", getattr(generation_config, "cache_implementation", None)) == "paged":
            raise ValueError("continuous batching (cache_implementation='paged') takes text only, not pixel_values")
        self._round_static_cache(inputs, generation_config, kwargs)
        return super().generate(inputs, generation_config=generation_config, **kwargs)  # type: ignore[misc]

    def _round_static_cache(self, inputs: torch.Tensor | None, config: Any, kwargs: dict[str, Any]) -> None:
        """A static cache as long as a multiple of `STATIC_CACHE_STEP`, unless `max_cache_len` is given.

        Its length is a shape of the compiled step: without this each longer prompt would compile it anew.
        """

        def option(name: str) -> Any:
            given = kwargs.get(name, getattr(config, name, None))
            return getattr(self.generation_config, name, None) if given is None else given  # type: ignore[attr-defined]

        if option("cache_implementation") not in ("static", "offloaded_static") or option("max_cache_len") is not None:
            return
        prompt = next((x for x in (inputs, *map(kwargs.get, ("input_ids", "inputs_embeds"))) if x is not None), None)
        if prompt is None:
            return
        new_tokens = option("max_new_tokens")
        length = (option("max_length") or 0) if new_tokens is None else prompt.shape[1] + new_tokens
        kwargs["max_cache_len"] = -(-max(length, prompt.shape[1] + 1) // STATIC_CACHE_STEP) * STATIC_CACHE_STEP

    def answer_ends(self, processor: Any) -> list[int]:
        """Ids that end an answer: the processor's stop tokens and those of the generation configuration."""
        own = self.generation_config.eos_token_id  # type: ignore[attr-defined]
        own = own if isinstance(own, list) else [own]
        return list(dict.fromkeys([*processor.stop_token_ids, *(token for token in own if token is not None)]))

    def generation_config_of(self, options: Mapping[str, Any]) -> GenerationConfig:
        """A `GenerationConfig` of plain options.

        Raises:
            TypeError: an option that it does not have.
        """
        check_keywords("generation_config", options, vars(GenerationConfig()))
        return GenerationConfig(**options)

    def _get_logits_processor(self, generation_config, *args, **kwargs):  # type: ignore[no-untyped-def,override]
        found = super()._get_logits_processor(generation_config, *args, **kwargs)  # type: ignore[misc]
        stops = generation_config.eos_token_id
        stops = set(stops) if isinstance(stops, (list, tuple)) else {stops}
        forbidden = [token for token in self.config.image_token_ids if token not in stops]  # type: ignore[attr-defined]
        device = self.device.type if self.device.type != "meta" else "cpu"  # type: ignore[attr-defined]
        found.append(SuppressPlaceholders(forbidden, device=device))
        return found

    def prepare_inputs_for_generation(  # type: ignore[no-untyped-def,override]
        self, input_ids, inputs_embeds=None, is_first_iteration=False, **kwargs
    ):
        mask = kwargs.pop("visual_token_mask", None)
        for name in ("tokenizer", "assistant_tokenizer"):
            # transformers needs them for stop strings and assistants, and lets them through to here.
            kwargs.pop(name, None)
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if mask is not None and (is_first_iteration or not kwargs.get("use_cache", True)):
            current = inputs["inputs_embeds"] if inputs.get("inputs_embeds") is not None else inputs["input_ids"]
            # Without a cache the sequence grows by text; with one, only its uncached end is this call's input.
            grown = max(current.shape[1] - mask.shape[1], 0)
            inputs["visual_token_mask"] = F.pad(mask, (0, grown))[:, -current.shape[1] :]
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):  # type: ignore[no-untyped-def]
        """Beams and several sequences: repeat each row's tiles as a group, in the order of the repeated rows."""
        pixels, encoded = model_kwargs.pop("pixel_values", None), model_kwargs.pop("mm_encoder_outputs", None)
        embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("visual_token_mask")
        if expand_size > 1 and (pixels is not None or encoded):
            if mask is None:
                ids = None if input_ids is None or input_ids.shape[1] == 0 else input_ids
                mask = self.model.get_placeholder_mask(ids, embeds)  # type: ignore[attr-defined]
            tokens_per_row = mask.sum(-1).tolist()
            if pixels is not None:
                pixels = patchify(pixels) if pixels.dim() == 4 else pixels
                pixels = _repeat_groups(pixels, [n // pixels.shape[1] for n in tokens_per_row], expand_size)
            if encoded and encoded.get("image") is not None:
                image = copy.copy(encoded["image"])
                rows = image.pooler_output
                rows = torch.cat([row.reshape(-1, row.shape[-1]) for row in rows])
                image["pooler_output"] = _repeat_groups(rows, tokens_per_row, expand_size).unsqueeze(0)
                image["last_hidden_state"] = None
                encoded = {**encoded, "image": image}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pixels is not None:
            model_kwargs["pixel_values"] = pixels
        if encoded is not None:
            model_kwargs["mm_encoder_outputs"] = encoded
        return input_ids, model_kwargs

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):  # type: ignore[no-untyped-def]
        has_images = model_kwargs.get("pixel_values") is not None or model_kwargs.get("mm_encoder_outputs")
        if generation_config.prefill_chunk_size is not None and has_images:
            # What no version can do comes first: the other reason would send its reader to a newer one for nothing.
            if self.config.num_learnable_queries:  # type: ignore[attr-defined]
                raise ValueError("prefill_chunk_size may cut a block of learnable queries in two; leave it out")
            if not hasattr(generation_utils, "_slice_mm_encoder_output"):
                raise ValueError(
                    "prefill_chunk_size with pictures needs transformers >= 5.23; "
                    "older ones give each chunk all pictures"
                )
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    # ---- continuous batching

    def init_continuous_batching(self, generation_config=None, *args, **kwargs):  # type: ignore[no-untyped-def,override]
        """As in transformers; what `generation_config` leaves open is taken from the model, as in `generate`."""
        if isinstance(generation_config, Mapping):
            generation_config = self.generation_config_of(generation_config)
        if generation_config is not None:
            generation_config = copy.deepcopy(generation_config)
            generation_config.update(defaults_only=True, **self.generation_config.to_dict())  # type: ignore[union-attr]
        return super().init_continuous_batching(generation_config, *args, **kwargs)  # type: ignore[misc]

    def generate_batch(self, inputs, generation_config=None, **kwargs):  # type: ignore[no-untyped-def,override]
        """As in transformers: prompts of text, answered together, each as `generate` answers it alone.

        Args:
            inputs: one list (or 1-D tensor) of token ids per prompt, without padding.
            generation_config: a `GenerationConfig` or a dict.
            **kwargs: transformers' options of this method, and any option of a generation config.

        Raises:
            ValueError: a prompt with pictures (transformers has no interface for them here), or not of ids.
            TypeError: an unknown option.
        """
        if isinstance(inputs, Mapping):
            if inputs.get("pixel_values") is not None:
                raise ValueError(_NO_PICTURES)
            raise ValueError("generate_batch takes a list of prompts, each a list of token ids, not a dict of inputs")
        prompts = [row.tolist() if isinstance(row, torch.Tensor) else row for row in inputs]
        for number, prompt in enumerate(prompts):
            if not isinstance(prompt, (list, tuple)) or not all(type(token) is int for token in prompt) or not prompt:
                raise ValueError(f"prompt {number} of generate_batch is not a list of token ids: {str(prompt)[:60]!r}")
            if not {self.config.image_token_id, self.config.query_token_id}.isdisjoint(prompt):  # type: ignore[attr-defined]
                raise ValueError(f"prompt {number}: {_NO_PICTURES}")
        own = set(inspect.signature(GenerationMixin.generate_batch).parameters) - {"self", "inputs", "kwargs"}
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in own}
        if isinstance(generation_config, Mapping):
            generation_config = self.generation_config_of(generation_config)
        config = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        check_keywords("generate_batch", options, [*vars(config), *own])
        config.update(**options)  # type: ignore[union-attr]
        config.update(defaults_only=True, **self.generation_config.to_dict())  # type: ignore[union-attr]
        return super().generate_batch(prompts, generation_config=config, **kwargs)  # type: ignore[misc]


_NO_PICTURES = (
    "continuous batching takes text only, transformers has no way to give it pictures; use generate for this prompt"
)


def _repeat_groups(rows: torch.Tensor, sizes: list[int], times: int) -> torch.Tensor:
    """Split [n, ...] into consecutive groups and repeat each group `times` times: a b -> a a b b."""
    if sum(sizes) != rows.shape[0]:
        raise ValueError(f"{rows.shape[0]} rows of pictures for {sum(sizes)} places in the input; they must match")
    return torch.cat([group for group in rows.split(sizes) for _ in range(times)])
