"""`model.chat(images, prompt)`: conversation -> inputs -> `generate` -> text.

Nothing that is passed in is changed, consumed or kept: the model's dtype and mode, configurations, histories, files.
"""

import contextlib
import copy
import functools
import inspect
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.utils import GenerationMixin
from transformers.utils import logging

from .compat_mono_internvl import IN_FLOAT16, check_keywords, cpu_has_bfloat16_units
from .configuration_checks_mono_internvl import context_length
from .conversation_mono_internvl import History, conversation, grown_history
from .image_processing_mono_internvl import flatten_pictures
from .queries_mono_internvl import check_same_queries
from .streaming_mono_internvl import AnswerStreamer, check_streamer, ended_on_failure


logger = logging.get_logger(__name__)

_LEGACY = "this is how the released code was called; docs/legacy.md says what to write instead"
# What only the released code's `chat` and `batch_chat` were given.
_RELEASED_OPTIONS = frozenset(
    {
        *("pixel_values", "question", "questions", "num_patches_list", "num_patches_lists"),
        *("image_counts", "IMG_START_TOKEN", "IMG_END_TOKEN", "IMG_CONTEXT_TOKEN", "verbose"),
    }
)
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
# What would make `generate` return more than `chat` can.
_RICHER_OUTPUTS = (
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
)


def _as_called_here(chat: Callable) -> Callable:
    """Point the released code's way of calling to the page about it, and end a waiting streamer where a call fails.

    It stands around `chat` because Python itself refuses what lacks an argument.
    """

    @functools.wraps(chat)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with ended_on_failure(kwargs.get("streamer")):
            released = sorted(_RELEASED_OPTIONS.intersection(kwargs))
            if released or len(args) > 2 or any(hasattr(given, "convert_tokens_to_ids") for given in args):
                what = f", not {', '.join(released)}" if released else ""
                raise TypeError(f"chat takes (images, prompt) and named options{what}; {_LEGACY}")
            return chat(self, *args, **kwargs)

    return call


class MonoInternVLChatMixin:
    """`chat` for a model that has `generate`."""

    @_as_called_here
    @torch.no_grad()
    def chat(
        self,
        images: Any,
        prompt: str | list[dict[str, Any]],
        *,
        system: str | None = None,
        history: Sequence[Any] | None = None,
        return_history: bool = False,
        max_tiles: int | str | None = None,
        min_tiles: int | None = None,
        use_thumbnail: bool | None = None,
        max_pixels: int | None = None,
        convert_to_srgb: bool | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        streamer: Any = None,
        keep_grounding_tags: bool = False,
        processor: Any = None,
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        **generate_kwargs: Any,
    ) -> str | tuple[str, History]:
        """Ask a question about pictures, or without any.

        Args:
            images: all pictures of the conversation in order: anything `load_image` takes, a list of such, frames as
                one array [frames, H, W, C] or tensor [frames, C, H, W], or None.
            prompt: the question. In a string `<image>` marks a picture's place; pictures without a mark go in front of
                it; without any picture the word is a word. A list of content parts (`{"type": "text", "text"}`,
                `{"type": "image"}`, `{"type": "video", "video": path}`) says itself where they stand and is never
                searched for marks.
            system: the system prompt; default: the template's.
            history: earlier (prompt, answer) pairs, or messages `{"role", "content"}`; as an earlier call returned it,
                or your own. Prompts keep their marks.
            return_history: also return the history with this turn, in the form it came in (pairs by default).
            max_tiles, min_tiles, use_thumbnail, max_pixels, convert_to_srgb: of the pictures, see the image processor;
                several share `max_tiles`, "auto" enlarges none. Default: the processor's.
            num_frames, fps: how many frames of each video, see `read_frames`; default: 8.
            streamer: gets the answer as it grows: a `transformers` text streamer, or a callable that takes `str`.
                Pieces are whole characters and join to the answer. A bare streamer (`put`, `end`) gets ids. It is ended
                also where the call fails.
            keep_grounding_tags: leave `<ref>` and `<box>` in the answer.
            processor: default is the one that lies where the weights came from.
            generation_config, **generate_kwargs: as for `generate`; greedy with at most 1,024 new tokens by default. A
                sampling option (temperature above 0, top_p, ..) asks for sampling; temperature 0 is greedy.

        Returns:
            The answer up to `<|im_end|>`, stripped; with `return_history`, (answer, history).

        Raises:
            TypeError: an unknown option (the nearest known one is named), or the released code's way of calling.
            ValueError: empty prompt, marks and pictures that do not match, a history of another form, options that
                contradict each other or that a text cannot answer, a conversation that is too long, float16.
        """
        self._check_dtype()
        check_streamer(streamer)
        options = self._generation_options(generation_config, generate_kwargs)
        processor = self._processor_for(processor)
        pictures = _listed(images)
        if isinstance(history, np.ndarray):
            history = history.tolist()
        turns, current, asked = conversation(prompt, pictures, history)
        messages = _with_system(system, [*turns, current])
        image_options = {
            "max_tiles": max_tiles,
            "min_tiles": min_tiles,
            "use_thumbnail": use_thumbnail,
            "max_pixels": max_pixels,
            "convert_to_srgb": convert_to_srgb,
            "num_frames": num_frames,
            "fps": fps,
        }
        inputs = self._encoded(processor, messages, image_options)
        prompt_length = inputs["input_ids"].shape[1]
        self._check_length(prompt_length, options)
        answer_text = processor.answer_decoder(keep_grounding_tags=keep_grounding_tags)
        options = self._with_tokens(options, processor)
        if streamer is not None:
            takes_text = callable(streamer) or hasattr(streamer, "on_finalized_text")
            options["streamer"] = AnswerStreamer(streamer, answer_text) if takes_text else streamer
        with evaluating(self):
            sequences = self.generate(**inputs, **options)  # type: ignore[attr-defined]
        answer = answer_text(sequences[0, prompt_length:].tolist())
        if not return_history:
            return answer
        return answer, grown_history(history, asked, answer)

    def batch_chat(self, *args: Any, **kwargs: Any) -> None:
        """The released code's name for several prompts at once.

        Raises:
            TypeError: always; it says where to read on.
        """
        raise TypeError(f"there is no batch_chat here: {_LEGACY}")

    def extract_feature(self, *args: Any, **kwargs: Any) -> None:
        """The released code's name for `get_image_features`.

        Raises:
            TypeError: always; it says where to read on.
        """
        raise TypeError(f"extract_feature is get_image_features here: {_LEGACY}")

    def _check_dtype(self) -> None:
        dtype, device = self.dtype, self.device  # type: ignore[attr-defined]
        if dtype == torch.float16:
            raise ValueError(f"chat does not run {IN_FLOAT16}: use bfloat16 or float32")
        casts = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        if casts and torch.get_autocast_dtype(device.type) == torch.float16:
            raise ValueError(f"chat does not run under autocast {IN_FLOAT16}: use bfloat16")
        if device.type == "cpu" and dtype == torch.bfloat16 and not cpu_has_bfloat16_units():
            logger.warning_once(
                "this CPU has no bfloat16 matrix units, and chat is about four times faster here in float32: load the "
                "model with dtype=torch.float32, or call model.float() if it may stay so"
            )

    def _generation_options(self, config: Any, given: dict[str, Any]) -> dict[str, Any]:
        """What `generate` gets: the caller's options over a configuration's, over greedy with 1,024 tokens."""
        known = set(vars(GenerationConfig())) | set(inspect.signature(GenerationMixin.generate).parameters)
        known |= {"tokenizer", "assistant_tokenizer"}
        known -= {"self", "inputs", "kwargs", "generation_config"}
        own = set(inspect.signature(MonoInternVLChatMixin.chat).parameters) - {"self", "legacy", "generate_kwargs"}
        check_keywords("chat", given, known | own)
        options = dict(given)
        if isinstance(config, Mapping):
            check_keywords("generation_config", config, vars(GenerationConfig()))
            options = {**config, **options}
        elif isinstance(config, GenerationConfig):
            options["generation_config"] = config = copy.deepcopy(config)
        elif config is not None:
            raise TypeError(f"generation_config must be a GenerationConfig or a dict, not {type(config).__name__}")
        base = config if isinstance(config, GenerationConfig) else GenerationConfig()
        own = self.generation_config  # type: ignore[attr-defined]

        def value_of(name: str) -> Any:
            return options.get(name, getattr(base, name, None))

        richer = [name for name in _RICHER_OUTPUTS if value_of(name)]
        richer += [name for name in ("num_return_sequences",) if (value_of(name) or 1) > 1]
        if richer:
            raise ValueError(f"chat returns one answer as text and has no place for {', '.join(richer)}: use generate")
        # The model's own configuration may ask for them, for `generate`.
        options |= {name: False for name in _RICHER_OUTPUTS if getattr(own, name, False)}
        if (own.num_return_sequences or 1) > 1:
            options["num_return_sequences"] = 1
        for name in ("max_new_tokens", "max_length"):
            length = value_of(name)
            if length is not None and (not isinstance(length, Integral) or isinstance(length, bool) or length < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {length!r}")
        if value_of("max_new_tokens") is None and value_of("max_length") is None and value_of("max_time") is None:
            options["max_new_tokens"] = own.max_new_tokens or 1024
        _check_stops(value_of("stop_strings"))
        for name in ("stopping_criteria", "logits_processor"):
            if not isinstance(options.get(name, []), (list, tuple)):
                raise TypeError(f"{name} must be a list, not {type(options[name]).__name__}")
        options = _sampling_decided(options, base)
        if isinstance(config, GenerationConfig):
            # Beside a configuration transformers wants no options of one.
            config.update(**{name: options.pop(name) for name in list(options) if hasattr(config, name)})
        return options

    def _with_tokens(self, options: dict[str, Any], processor: Any) -> dict[str, Any]:
        """The options with the ids that end an answer and fill up, and the tokenizer that stop strings need."""
        own = self.generation_config  # type: ignore[attr-defined]
        tokens = {
            "eos_token_id": self.answer_ends(processor),  # type: ignore[attr-defined]
            "pad_token_id": processor.tokenizer.pad_token_id,
        }
        config = options.get("generation_config")
        if config is None:
            options = {**tokens, **options}
        else:
            config.update(**{name: value for name, value in tokens.items() if getattr(config, name) is None})
        if any(strings is not None for strings in (options.get("stop_strings"), own.stop_strings)) or (
            config is not None and config.stop_strings is not None
        ):
            options.setdefault("tokenizer", processor.tokenizer)
        return options

    def _processor_for(self, processor: Any) -> Any:
        if processor is None:
            processor = self._load_processor()
        for name in ("apply_chat_template", "answer_decoder", "image_token_id"):
            if not hasattr(processor, name):
                raise TypeError(f"processor must be a MonoInternVLProcessor, not {type(processor).__name__}")
        expected = self.config.image_token_id  # type: ignore[attr-defined]
        if processor.image_token_id != expected:
            raise ValueError(
                f"<IMG_CONTEXT> is token {processor.image_token_id} of the processor, but the model looks for "
                f"{expected}; load it with image_token_id={processor.image_token_id}, or give the model's own processor"
            )
        check_same_queries(self.config, processor)  # type: ignore[attr-defined]
        return processor

    def _load_processor(self) -> Any:
        """The processor of the folder or Hub id this model came from, loaded once."""
        with _PROCESSOR_LOCK:
            if self._processor is None:
                from .processing_mono_internvl import MonoInternVLProcessor

                places = self._processor_places()
                if not places:
                    raise ValueError("this model was not loaded from a folder or the Hub: pass processor= to chat")
                for number, (place, options) in enumerate(places, start=1):
                    try:
                        self._processor = MonoInternVLProcessor.from_pretrained(place, **options)
                        break
                    except (OSError, ValueError) as error:
                        # A folder of adapters need not hold a processor; its base does.
                        if number == len(places):
                            kind = OSError if isinstance(error, OSError) else ValueError
                            raise kind(f"{error}; save the processor beside the model, or pass it to chat") from error
            return self._processor

    def _processor_places(self) -> list[tuple[str, dict[str, Any]]]:
        """Where to look for the processor, with the options (revision, ..) that the weights were loaded with."""
        if self._loaded_from:
            return self._loaded_from
        name = self.config._name_or_path  # type: ignore[attr-defined]
        return [(name, {})] if name else []

    # Set by `from_pretrained` and `_load_processor`.
    _loaded_from: list[tuple[str, dict[str, Any]]] = []
    _processor: Any = None

    def _input_device(self) -> torch.device:
        """Where inputs belong: with the embedding, which an offloading hook may run elsewhere than its weight lies."""
        embedding = self.get_input_embeddings()  # type: ignore[attr-defined]
        hook = getattr(embedding, "_hf_hook", None)
        for one in getattr(hook, "hooks", None) or [hook]:
            if getattr(one, "execution_device", None) is not None:
                return torch.device(one.execution_device)  # type: ignore[union-attr]
        device = next(embedding.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

    def _encoded(self, processor: Any, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> Any:
        return processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={name: value for name, value in options.items() if value is not None},
        ).to(self._input_device(), self.dtype)  # type: ignore[attr-defined]

    def _check_length(self, prompt_length: int, options: Mapping[str, Any]) -> None:
        text = self.config.text_config  # type: ignore[attr-defined]
        limit = context_length(text)
        if prompt_length >= limit:
            raise ValueError(
                f"the conversation has {prompt_length} tokens, more than this model's limit of {limit}; "
                "shorten it or lower max_tiles (num_frames of a video)"
            )
        config = options.get("generation_config")
        longest = options.get("max_length", getattr(config, "max_length", None))
        new = options.get("max_new_tokens", getattr(config, "max_new_tokens", None))
        if longest is not None and new is None and prompt_length >= longest:
            raise ValueError(
                f"max_length={longest} counts the prompt, which has {prompt_length} tokens; give max_new_tokens instead"
            )
        if prompt_length + (new or 0) > limit:
            logger.info("the answer may reach the model's limit of %d tokens", limit)


def _listed(images: Any) -> list[Any]:
    """The pictures of a call in order.

    Raises:
        ValueError: one of them is None, or what was given holds none.
    """
    pictures = [] if images is None else flatten_pictures(images)
    for place, picture in enumerate(pictures, start=1):
        if picture is None:
            raise ValueError(f"picture {place} of {len(pictures)} is None")
    if not pictures and images is not None and not isinstance(images, (list, tuple)):
        # Frames of a video that gave none, or an iterator that somebody else has read to its end.
        raise ValueError(f"images is {type(images).__name__} without a picture in it; for none give None or []")
    return pictures


def _with_system(system: str | None, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages behind a system prompt.

    Raises:
        ValueError: it is no string, or the messages have one already.
    """
    if system is None:
        return messages
    if not isinstance(system, str):
        raise ValueError(f"system must be a string, not {type(system).__name__}")
    if any(message["role"] == "system" for message in messages):
        raise ValueError("the history has a system message already; leave system out")
    return [{"role": "system", "content": system}, *messages]


# -------------------------------------------------------------------------------------------------------- generation


def _sampling_decided(options: dict[str, Any], base: GenerationConfig) -> dict[str, Any]:
    """Greedy unless sampling is asked for, by `do_sample` or by an option that only sampling has.

    Raises:
        ValueError: the options say both.
    """

    def value_of(name: str) -> Any:
        # A configuration that says itself that it does not sample means its other settings to wait.
        return options.get(name, None if base.do_sample is False else getattr(base, name, None))

    asked = [name for name in _SAMPLING if value_of(name) is not None]
    temperature, do_sample = value_of("temperature"), options.get("do_sample", base.do_sample)
    if do_sample not in (None, True, False):
        raise ValueError(f"do_sample must be True or False, got {do_sample!r}")
    for name, value in (("temperature", temperature), ("top_p", value_of("top_p"))):
        if value is not None and (not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value)):
            raise ValueError(f"{name} must be a number, got {value!r}")
        if value is not None and value < 0:
            raise ValueError(f"{name} must not be negative, got {value!r}")
        if name in options and value is not None:
            options = {**options, name: float(value)}
    if (value_of("top_p") or 0.0) > 1:
        raise ValueError(f"top_p is a share of the probability and at most 1, got {value_of('top_p')!r}")
    if temperature == 0:
        if do_sample:
            raise ValueError("temperature=0 takes the likeliest tokens and do_sample=True samples: give one of them")
        others = [name for name in asked if name != "temperature"]
        if others:
            raise ValueError(f"temperature=0 takes the likeliest tokens, so {', '.join(others)} cannot matter")
        asked, do_sample = [], False
    if asked and do_sample is False:
        raise ValueError(f"do_sample=False takes the likeliest tokens, so {', '.join(asked)} cannot matter")
    if asked or do_sample:
        return {**options, "do_sample": True}
    # A checkpoint's sampling settings mean nothing here, and transformers would warn about them.
    return {**options, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _check_stops(stops: Any) -> None:
    """Raise ValueError unless it is a string, or several; an empty one would end every answer, or none."""
    listed = [stops] if isinstance(stops, str) else stops
    if listed is not None and (
        not isinstance(listed, (list, tuple)) or not listed or not all(isinstance(s, str) and s for s in listed)
    ):
        raise ValueError(f"stop_strings must be a string or a list of strings, none of them empty, got {stops!r}")


_PROCESSOR_LOCK = threading.Lock()
_MODES_LOCK = threading.Lock()
# Models in training mode that are answering: how many answers are under way, and which modules to set back.
_answering: "weakref.WeakKeyDictionary[torch.nn.Module, tuple[int, list[torch.nn.Module]]]" = (
    weakref.WeakKeyDictionary()
)


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode while a block runs; afterwards each module is in the mode it was in.

    Several threads may be inside: the first one in switches, the last one out switches back.
    """
    with _MODES_LOCK:
        count, trained = _answering.get(model, (0, []))
        if count == 0:
            trained = [module for module in model.modules() if module.training]
            for module in trained:
                module.training = False
        _answering[model] = (count + 1, trained)
    try:
        yield
    finally:
        with _MODES_LOCK:
            count, trained = _answering.pop(model)
            if count > 1:
                _answering[model] = (count - 1, trained)
            else:
                for module in trained:
                    module.training = True
