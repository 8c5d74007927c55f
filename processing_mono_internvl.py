"""Messages + pictures -> `input_ids` and `pixel_values`; generated ids -> text and boxes.

Text from a user is text. A chat template mixes its own control tokens with what people typed, and a tokenizer cannot
tell them apart in the finished string. So `apply_chat_template(tokenize=True)` renders typed text between marks, and
each stretch of the result is encoded by its origin: control tokens are recognised in the template's own parts only, the
grounding tags (`<ref>`, `<box>`, `<quad>`) everywhere. Neighbouring stretches of plain text are encoded as one, exactly
as the finished string would be.

A string that comes already rendered (`processor(text=...)`) is trusted.
"""

import functools
import inspect
import itertools
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import AudioKwargs, MultiModalData, ProcessorMixin, TextKwargs, VideosKwargs
from transformers.utils.chat_template_utils import render_jinja_template
from transformers.utils.hub import cached_file

from .compat_mono_internvl import check_keywords
from .image_loading_mono_internvl import prefixed
from .image_processing_mono_internvl import MonoInternVLImageProcessor, MonoInternVLImagesKwargs, flatten_pictures
from .prompt_mono_internvl import IMAGE_MARK, check_message_keys, marked_parts, read_messages, read_tools
from .tiling_mono_internvl import TILE_OPTIONS
from .vocabulary_mono_internvl import (
    IMAGE_END,
    IMAGE_START,
    IMAGE_TOKEN,
    AnswerDecoder,
    Vocabulary,
    checked_backend,
    vocabulary_of,
)


logger = logging.getLogger(__name__)

# Candidates for the marks around typed text: characters without a meaning of their own.
_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))

_IMAGE_OPTIONS = frozenset(MonoInternVLImagesKwargs.__annotations__) - {"return_tensors"}
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
_GROUPED_OPTIONS = ("common_kwargs", "images_kwargs", "text_kwargs", "videos_kwargs", "audio_kwargs")
_OPTIONS = frozenset({*_IMAGE_OPTIONS, *_TEXT_OPTIONS, "return_tensors"})
# What a person may mean; named where an option is not known.
_SAID = ("max_pixels", "do_normalize", *TILE_OPTIONS, *_TEXT_OPTIONS, "return_tensors", "images")
# What a tokenizer may have been made with, as a default of its own.
_TOKENIZER_DEFAULTS = ("padding", "max_length", "truncation", "pad_to_multiple_of")
# transformers' names for what this processor does not give. Its pipelines and trainers send them along unset.
_UNREAD = frozenset({*VideosKwargs.__annotations__, *AudioKwargs.__annotations__, "videos", "audio"})
_UNREAD |= {"load_audio_from_video", "return_metadata", "use_audio_in_video", "fps", "num_frames"}
_UNREAD -= _OPTIONS
_UNWRITTEN = frozenset({*TextKwargs.__annotations__, "return_text_replacement_offsets"}) - _OPTIONS
_PADDINGS = (True, False, "longest", "max_length", "do_not_pad")
_TRUNCATIONS = (True, False, "longest_first", "only_first", "do_not_truncate")
_IGNORED_ONCE: set[str] = set()

# A template says by these which of its text is an answer.
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_OPENS, _CLOSES = "mono_internvl_answer_opens", "mono_internvl_answer_closes"

# No tag reaches over another of its kind, so that an unfinished one does not swallow the next.
_GROUNDED = re.compile(r"(?:<ref>((?:(?!</?ref>).)*)</ref>\s*)?<box>((?:(?!</?box>).)*)</box>", re.DOTALL)
_FOUR_NUMBERS = re.compile(r"\[\s*" + r"\s*,\s*".join([r"(-?\d+(?:\.\d+)?)"] * 4) + r"\s*\]")


class Segment(NamedTuple):
    """A stretch of a rendered prompt. `origin`: template, user (anyone's typed text) or answer (the assistant's typed
    text). `learnt`: whether the template says that an assistant writes it; None where it says nothing of the kind."""

    text: str
    origin: str
    learnt: bool | None = None


class MonoInternVLInputs(BatchFeature):
    """The processor's tensors. Labels that are put among them never hold placeholders, whose targets become -100.

    Others' collators copy the ids (TRL's for pictures, most in tutorials), and not every loss over their labels is the
    model's own: TRL's fused head, its DFT and label smoothing count what they are given.
    """

    image_token_id: int | None = None

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "labels" and self.image_token_id is not None:
            if isinstance(value, torch.Tensor):
                ids = self.data.get("input_ids")
                # In place, as whoever made the labels may go on changing them; but not where they are the ids.
                shared = isinstance(ids, torch.Tensor) and value.data_ptr() == ids.data_ptr()
                value = (value.clone() if shared else value).masked_fill_(value.eq(self.image_token_id), -100)
            else:
                value = self._without_placeholders(value)
        super().__setitem__(key, value)

    def _without_placeholders(self, labels: Any) -> Any:
        if hasattr(labels, "tolist"):
            labels = labels.tolist()
        if isinstance(labels, (list, tuple)):
            return [self._without_placeholders(label) for label in labels]
        return -100 if labels == self.image_token_id else labels


class GroundedBox(NamedTuple):
    """A `<ref>` with one of its boxes, in pixels of the original picture."""

    label: str
    box: tuple[float, float, float, float]


class MonoInternVLProcessor(ProcessorMixin):
    """Image processor and tokenizer in one.

    Args:
        image_processor: makes tiles and patches.
        tokenizer: a fast tokenizer with InternLM2's control tokens and `<img>`, `</img>`, `<IMG_CONTEXT>`.
        chat_template: default is the `internlm2-chat` template beside this file.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template: str | None = None, **kwargs: Any):
        if chat_template is None:
            beside = Path(__file__).with_name("chat_template.jinja")
            chat_template = beside.read_text(encoding="utf-8") if beside.exists() else None
        self.image_token, self.image_start, self.image_end = IMAGE_TOKEN, IMAGE_START, IMAGE_END
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        if tokenizer is not None:
            checked_backend(tokenizer)

    def _vocabulary(self, chat_template: str | None = None) -> Vocabulary:
        """The tokenizer's tokens as they are now; `chat_template` beside the processor's own."""
        own = self.chat_template if isinstance(self.chat_template, dict) else {"": self.chat_template or ""}
        return vocabulary_of(self.tokenizer, "".join([chat_template or "", *own.values()]))

    @property
    def image_token_id(self) -> int:
        """The id of `<IMG_CONTEXT>`."""
        return self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    @property  # type: ignore[misc]
    def image_token_ids(self) -> list[int]:  # type: ignore[override]
        """The ids of `<IMG_CONTEXT>`, `<img>` and `</img>`."""
        return self.tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, IMAGE_START, IMAGE_END])

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile."""
        return self.image_processor.patches_per_tile

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an answer: `</s>`, `<|im_end|>`, `<|im_start|>`."""
        return [self.tokenizer.eos_token_id, *self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])]

    @property
    def unused_input_names(self) -> list[str]:
        return ["num_tiles"]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    # ---- loading

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):  # type: ignore[no-untyped-def]
        """Our two parts, from a native folder or an official one, unless they are given. (Asked for by name:
        transformers' automatic image processor class wants torchvision before 5.18, and an official folder names code
        that is not ours.)

        Raises:
            TypeError: an option that neither part knows; names the nearest known one.
        """
        kwargs = {name: value for name, value in kwargs.items() if value is not None and not name.startswith("_")}
        given = {name: kwargs.pop(name, None) for name in ("image_processor", "tokenizer")}
        check_keywords(
            f"{cls.__name__}.from_pretrained",
            [name for name in kwargs if name not in _LOADING_OPTIONS],
            [*_image_processor_options(), *_TOKENIZER_OPTIONS, "chat_template", "revision", "subfolder"],
        )
        # Asked whether they are None, since a tokenizer's truth is its number of words.
        for name, load in (("image_processor", load_image_processor), ("tokenizer", _load_tokenizer)):
            if given[name] is None:
                given[name] = load(pretrained_model_name_or_path, **kwargs)
        return list(given.values())

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):  # type: ignore[no-untyped-def]
        """As in transformers; `preprocessor_config.json`, which some engines look for, is written too."""
        os.makedirs(save_directory, exist_ok=True)
        self.image_processor.save_pretrained(save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    # ---- encoding

    def __call__(  # type: ignore[no-untyped-def,override]
        self,
        images=None,
        text: str | list[str] | None = None,
        *,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Encode rendered prompts and their pictures.

        Args:
            images: a picture, a list for one prompt or for all in order, or one list per prompt.
            text: one or several prompts; each `<IMG_CONTEXT>` is a picture, with `<img>` and `</img>` around it or
                without, and so is a run of as many as the picture has visual tokens. Control tokens in it are
                recognised: use `apply_chat_template` for text that people typed.
            return_tensors: `"pt"`, `"np"` or None.
            max_tiles, min_tiles, use_thumbnail, do_normalize, max_pixels: see the image processor; the pictures of one
                prompt share `max_tiles`, each gets max(1, max_tiles // pictures).
            padding, padding_side, max_length, truncation, pad_to_multiple_of, add_special_tokens: as in tokenizers;
                several prompts as tensors are padded by default, on the tokenizer's side (left). Padding to
                `max_length` without one pads to the tokenizer's.
            return_mm_token_type_ids: add `mm_token_type_ids`, 1 at visual tokens.
            common_kwargs, images_kwargs, text_kwargs: the same options in groups.
            device: where `pixel_values` go.

        Returns:
            `input_ids`, `attention_mask` int64 [B, T], and, with pictures, `pixel_values` [tiles, patches, 3*28*28].
            Without text only `pixel_values`, each picture with a whole budget of tiles.

        Raises:
            TypeError: an unknown option; names the nearest known one.
            ValueError: placeholders and pictures differ in number, truncation would cut a picture, an option of a wrong
                value, in the wrong group, or given twice.
        """
        if text is None and images is None:
            raise ValueError("give text, images or both")
        options = self._collect_options({"return_tensors": return_tensors, **kwargs}, "the processor")
        return_tensors = options.pop("return_tensors", None)
        if text is None:
            image_options = {key: options[key] for key in _IMAGE_OPTIONS if key in options}
            features = self.image_processor(images, return_tensors=return_tensors, **image_options)
            return BatchFeature({"pixel_values": self._placed(features["pixel_values"], options)})
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(prompt, str) for prompt in texts):
            raise ValueError("text must be a string or a list of at least one string")
        add_bos = options.pop("add_special_tokens", True)
        prompts = [[Segment(prompt, "template")] for prompt in texts]
        if add_bos:
            prompts = [self._with_bos(prompt) for prompt in prompts]
        pictures = self._per_prompt(images, prompts)
        return self._encode_batch(prompts, pictures, options, return_tensors, self._vocabulary())

    def apply_chat_template(  # type: ignore[no-untyped-def,override]
        self,
        conversation,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        return_assistant_tokens_mask: bool = False,
        tools: Any = None,
        documents: Any = None,
        images: Any = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        """Render a conversation, and with `tokenize=True` encode it with its pictures.

        Args:
            conversation: messages `{"role", "content"}`, or a list of such lists; `read_messages` says in which forms.
                Content is a string or a list of `{"type": "text", "text"}` and `{"type": "image", "image" | "url" |
                "path" | "base64"}`; several pictures in one part (frames, a list) are a part each. With `tokenize=True`
                typed text, that of tools and documents included, never becomes a control token; `<ref>`, `<box>`,
                `<quad>` and tokens that were added to the tokenizer are content and do.
            chat_template: another template than the processor's own.
            return_assistant_tokens_mask: add `assistant_masks`, 1 where the template says that an assistant writes
                (`{% generation %}`; else at each answer and its `<|im_end|>`), pictures excepted.
            tools: schemas or Python functions, written as InternLM2 has them.
            documents: for templates that have a place for them.
            images: pictures for parts that hold none, in order; one list per conversation where there are several.
            add_generation_prompt: open the answer.
            continue_final_message: leave the last message open, to be continued.
            processor_kwargs: options of `__call__`; they may also be given directly.
            **kwargs: the template's own variables.

        Returns:
            The rendered string(s); with `tokenize=True` the `input_ids`, or with `return_dict=True` all inputs; one
            conversation is a batch of one.

        Raises:
            TypeError: an option that neither `__call__` nor the template knows; names the nearest known one.
            ValueError: a message that is not understood or that the template refuses or would leave something out of,
                tools or documents for a template without a place for them, or what `__call__` refuses.
        """
        source = self._template_source(chat_template)
        given, variables = self._sort_keywords(kwargs, _template_variables(source))
        given = {"return_tensors": None if return_tensors == "auto" else return_tensors, **given}
        processor_kwargs = dict(processor_kwargs or {})
        beside = processor_kwargs.pop("images", None)
        if images is not None and beside is not None:
            raise ValueError("images are given twice, directly and in processor_kwargs")
        options = self._collect_options(
            {**given, "processor_kwargs": processor_kwargs},
            "apply_chat_template",
            (*_ALWAYS_VARIABLES, "chat_template", "return_dict", "return_assistant_tokens_mask"),
        )
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "continue_final_message goes on with the last message and add_generation_prompt begins one"
            )
        if return_assistant_tokens_mask and tokenize and not return_dict:
            raise ValueError("assistant_masks are returned beside the ids: give return_dict=True")
        variables["add_generation_prompt"] = add_generation_prompt
        variables["continue_final_message"] = continue_final_message
        variables.update(self._extras(source, tools, documents))
        conversations, batched = _conversations(conversation)
        found = self._read(conversations, batched, images if beside is None else beside, source)
        if not tokenize:
            rendered = [_render(self.tokenizer, messages, source, variables) for messages, _ in found]
            return rendered if batched else rendered[0]
        return_tensors = options.pop("return_tensors", None)
        add_bos = options.pop("add_special_tokens", True)
        vocabulary = self._vocabulary(source)
        prompts, pictures = [], []
        for number, (messages, sources) in enumerate(found, start=1):
            missing = [place for place, picture in sources if picture is None]
            if missing:
                where = f"conversation {number}, {missing[0]}" if batched else missing[0]
                raise ValueError(f"{where}: an image part needs one of 'image', 'url', 'path' and 'base64', or images=")
            prompt = self._render_by_origin(messages, source, variables, vocabulary, return_assistant_tokens_mask)
            prompts.append(self._with_bos(prompt) if add_bos else prompt)
            pictures.append([picture for _, picture in sources])
        inputs = self._encode_batch(
            prompts, pictures, options, return_tensors, vocabulary, answer_mask=return_assistant_tokens_mask
        )
        return inputs if return_dict else inputs["input_ids"]

    def count_tokens(
        self, messages: Sequence[dict[str, Any]], sizes: Sequence[tuple[int, int]], *, max_tiles: int | None = None
    ) -> int:
        """Tokens of one conversation, as `apply_chat_template(..., tokenize=True)` would give, without its pixels.

        Args:
            messages: as there; pictures are not opened.
            sizes: width and height in pixels of each picture as it is seen (EXIF rotation applied).
            max_tiles: budget of the conversation's pictures; default: the image processor's.
        """
        options = self.share_tiles({} if max_tiles is None else {"max_tiles": max_tiles}, len(sizes))
        tiles = [self.image_processor.get_number_of_tiles(height, width, **options) for width, height in sizes]
        return len(self._ids_without_pixels(messages, None, {}, [count * self.tokens_per_tile for count in tiles]))

    def _ids_without_pixels(
        self,
        messages: Sequence[dict[str, Any]],
        chat_template: str | None,
        variables: dict[str, Any],
        tokens: list[int] | None,
    ) -> list[int]:
        """One conversation's ids, pictures unopened; `tokens` as for `_encode`."""
        source = self._template_source(chat_template)
        variables = {name: value for name, value in variables.items() if value is not None}
        check_keywords("the chat template", variables, [*_template_variables(source), *_ALWAYS_VARIABLES])
        extras = self._extras(source, variables.pop("tools", None), variables.pop("documents", None))
        variables = {**variables, **extras}
        ((plain, _),) = self._read([messages], False, None, source)
        vocabulary = self._vocabulary(source)
        prompt = self._with_bos(self._render_by_origin(plain, source, variables, vocabulary))
        return self._encode(prompt, tokens, vocabulary)[0]

    def _template_source(self, chosen: str | None) -> str:
        """The text of the template that is meant: one of the processor's by its name, or `chosen` itself."""
        own = self.chat_template
        if isinstance(own, dict):
            if chosen is not None and chosen not in own:
                return chosen
            if (chosen or "default") not in own:
                raise ValueError(f"there are several chat templates; name one of {', '.join(own)} by chat_template")
            return own[chosen or "default"]
        if chosen is None and own is None:
            raise ValueError("this processor has no chat template; give one by chat_template")
        return (own or "") if chosen is None else chosen

    def _extras(self, source: str, tools: Any, documents: Any) -> dict[str, Any]:
        """Tools and documents as a template gets them.

        Raises:
            ValueError: it would leave them out.
        """
        extras = {"tools": read_tools(tools), "documents": None if documents is None else list(documents) or None}
        for name, value in extras.items():
            if value is not None and name not in _template_variables(source):
                raise ValueError(
                    f"the chat template has no place for {name}; leave them out, or give a template that has one"
                )
        return {name: value for name, value in extras.items() if value is not None}

    def _read(
        self, conversations: Sequence[Any], batched: bool, images: Any, source: str
    ) -> list[tuple[list[dict[str, Any]], list[tuple[str, Any]]]]:
        """Plain messages of each conversation, with a part for each picture, and where the pictures stand and what they
        are (None where that is not said)."""
        read = [read_messages(messages) for messages in conversations]
        for messages in read:
            check_message_keys(messages, functools.partial(_template_reads, source))
        found = [_take_images(messages) for messages in read]
        if images is None:
            return found
        groups = [images]
        if batched:
            if not isinstance(images, (list, tuple)) or len(images) != len(found):
                raise ValueError(f"images must be one list per conversation, {len(found)} of them")
            groups = list(images)
        filled = []
        for (messages, sources), group in zip(found, groups, strict=True):
            left = [] if group is None else flatten_pictures(group)
            wanted = sum(picture is None for _, picture in sources)
            if wanted != len(left):
                raise ValueError(f"{wanted} image parts without a picture for {len(left)} images; they must match")
            given = iter(left)
            filled.append((messages, [(at, next(given) if picture is None else picture) for at, picture in sources]))
        return filled

    def _render_by_origin(
        self,
        messages: list[dict[str, Any]],
        source: str,
        variables: dict[str, Any],
        vocabulary: Vocabulary,
        answer_mask: bool = False,
    ) -> list[Segment]:
        """Render one conversation and tell what of it was typed, and by whom; with `answer_mask` also what the template
        says that an assistant writes.

        Typed text is rendered between marks. They must not change what the template does, so the result is compared
        with the plain one. White space at the ends, which templates look at and trim, stays outside of the marks; an
        answer's is first tried inside, because it belongs to the answer.
        """
        control = vocabulary.control_pattern
        for message in messages:
            if control.search(message["role"]):
                raise ValueError(f"a message's role holds a control token: {message['role']!r}")
        plain = _render(self.tokenizer, messages, source, variables)
        with_answers = _with_answer_marks(source) if answer_mask else None
        user, assistant, close, opens, closes = _unused_characters(
            5, [plain, *_strings(messages), *_strings(variables)]
        )
        learnt = {opens: True, closes: False} if with_answers else {}

        def marked(value: Any, opening: str, trimmed: bool, sparing: bool = False) -> Any:
            """`sparing`: mark only what holds a control token, because the template may compare the others."""
            if isinstance(value, str):
                if sparing and not control.search(value):
                    return value
                body = value.strip() if trimmed or opening == user else value
                before, _, after = value.partition(body) if body else (value, "", "")
                return f"{before}{opening}{body}{close}{after}" if body else value
            if isinstance(value, (list, tuple)):
                return [marked(item, opening, trimmed, sparing) for item in value]
            if isinstance(value, Mapping):
                return {
                    marked(key, user, True, True): marked(
                        item, opening, trimmed, sparing or (isinstance(item, str) and key in ("role", "type"))
                    )
                    for key, item in value.items()
                }
            return value

        content: dict[str, Any] = {
            name: marked(variables[name], user, True) for name in ("tools", "documents") if name in variables
        }
        others = {name: marked(value, user, True, True) for name, value in variables.items() if name not in content}
        if with_answers:
            others.update({_OPENS: opens, _CLOSES: closes})
        for trimmed in (False, True):
            rendered = _render(
                self.tokenizer,
                [
                    marked(message, assistant if message["role"] == "assistant" else user, trimmed)
                    for message in messages
                ],
                with_answers or source,
                {**others, **content},
            )
            segments = _split_at_marks(rendered, {user: "user", assistant: "answer"}, close, learnt)
            if segments is not None and "".join(segment.text for segment in segments) == plain:
                return segments
        raise ValueError(
            "the chat template changes typed text so that its origin cannot be followed; if you trust all of the "
            "messages, render them with tokenize=False and encode the result with processor(text=...)"
        )

    def _with_bos(self, prompt: list[Segment]) -> list[Segment]:
        """Put `<s>` in front unless the prompt, not its user, has it there."""
        bos = self.tokenizer.bos_token or ""
        begun = bool(prompt) and prompt[0].origin == "template" and prompt[0].text.startswith(bos)
        return prompt if begun else [Segment(bos, "template"), *prompt]

    @staticmethod
    def conversation(turns: Sequence[tuple[str, str | None]], images: Sequence[Any]) -> list[dict[str, Any]]:
        """(prompt, answer) pairs, whose prompts mark pictures by `<image>`, to messages; an answer of None is left out.

        Without pictures the mark is a word.

        Raises:
            ValueError: marks and pictures differ in number.
        """
        marks = sum(prompt.count(IMAGE_MARK) for prompt, _ in turns)
        if images and marks != len(images):
            raise ValueError(f"{marks} {IMAGE_MARK} marks for {len(images)} pictures; they must match")
        left, messages = list(images), []
        for prompt, answer in turns:
            count = prompt.count(IMAGE_MARK) if images else 0
            content = marked_parts(prompt, left[:count])
            left = left[count:]
            messages.append({"role": "user", "content": content})
            if answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return messages

    def _sort_keywords(self, given: dict[str, Any], variables: frozenset[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Keywords of `apply_chat_template`: options of `__call__`, and variables that the template reads."""
        for_template = {name: value for name, value in given.items() if name in variables}
        # Newer transformers sanitise on request; here it is always so.
        options = {k: v for k, v in given.items() if k not in variables and k != "sanitize_control_tokens"}
        return options, for_template

    def _collect_options(self, given: dict[str, Any], what: str, said: Iterable[str] = ()) -> dict[str, Any]:
        """Flat and grouped options as one dict; None is as good as not given. `said`: what else may have been meant.

        Raises:
            TypeError: an unknown option. ValueError: given twice, or something that this processor does not give.
        """
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
        options: dict[str, Any] = {}
        for place, group in {"": given, **groups}.items():
            if not isinstance(group, Mapping):
                raise ValueError(f"{place} must be a dict of options, not {type(group).__name__}")
            own = {"images_kwargs": _IMAGE_OPTIONS, "text_kwargs": _TEXT_OPTIONS}.get(place, _OPTIONS)
            for name, value in group.items():
                if place in ("videos_kwargs", "audio_kwargs") and value is not None:
                    raise ValueError(f"{name} in {place}: videos and sound are not read; give frames as pictures")
                if not _is_read(name, value, place or what, said):
                    continue
                if name not in own and name != "return_tensors":
                    raise ValueError(f"{name} does not belong into {place}; give it directly")
                if name in options and options[name] != value:
                    raise ValueError(f"{name} is given twice, {options[name]!r} and {value!r} in {place}")
                options[name] = value
        return_tensors = options.get("return_tensors")
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors={return_tensors!r} is not known; allowed are 'pt', 'np' and None")
        made_with = getattr(self.tokenizer, "init_kwargs", {})
        defaults = {name: made_with[name] for name in _TOKENIZER_DEFAULTS if made_with.get(name) is not None}
        padding = options.get("padding", defaults.get("padding"))
        if "max_length" in options and "truncation" not in options and padding != "max_length":
            raise ValueError("max_length alone changes nothing: give truncation=True, or padding='max_length'")
        unusual = {name: options[name] for name in options if name in _IMAGE_OPTIONS and name not in _SAID}
        if unusual:
            self.image_processor([], **unusual)  # refuses what it would refuse beside a picture
        options = {**defaults, **options}
        self._check_lengths(options)
        return options

    @staticmethod
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

    @staticmethod
    def _placed(pixels: Any, options: dict[str, Any]) -> Any:
        device = options.get("device")
        return pixels.to(device) if device is not None and isinstance(pixels, torch.Tensor) else pixels

    def _per_prompt(self, images: Any, prompts: list[list[Segment]]) -> list[list[Any] | None]:
        """Deal pictures out to prompts; None for a prompt means that its pictures were not given at all."""
        if images is None:
            return [None] * len(prompts)
        if isinstance(images, (list, tuple)) and any(isinstance(group, (list, tuple)) for group in images):
            if not all(group is None or isinstance(group, (list, tuple)) for group in images):
                raise ValueError("images mixes pictures with lists of pictures; give one list per prompt")
            if len(images) != len(prompts):
                raise ValueError(
                    f"{len(images)} lists of pictures for {len(prompts)} prompts; give one list per prompt"
                )
            return [flatten_pictures(group or []) for group in images]
        images = flatten_pictures(images)
        if len(prompts) == 1:
            return [images]
        runs = [[run.count(IMAGE_TOKEN) for segment in prompt for run in _runs(segment.text)] for prompt in prompts]
        wanted = [sum(lengths) for lengths in runs]
        if sum(wanted) != len(images):
            wanted = [len(lengths) for lengths in runs]  # expanded already
        if sum(wanted) != len(images):
            raise ValueError(
                f"{sum(wanted)} image placeholders in the prompts for {len(images)} pictures; they must match"
            )
        left = iter(images)
        return [[next(left) for _ in range(count)] for count in wanted]

    def _encode_batch(
        self,
        prompts: list[list[Segment]],
        pictures: Sequence[list[Any] | None],
        options: dict[str, Any],
        return_tensors: str | None,
        vocabulary: Vocabulary,
        *,
        answer_mask: bool = False,
    ) -> BatchFeature:
        image_options = {key: options[key] for key in _IMAGE_OPTIONS if options.get(key) is not None}
        rows: dict[str, list[list[int]]] = {"input_ids": [], "assistant_masks": []}
        pixels = []
        for number, (prompt, images) in enumerate(zip(prompts, pictures, strict=True), start=1):
            tokens = None
            if images:
                shared = self.share_tiles(image_options, len(images))
                try:
                    features = self.image_processor(images, return_tensors="pt", **shared)
                except (OSError, TypeError, ValueError) as error:
                    if len(prompts) == 1:
                        raise
                    raise prefixed(error, f"prompt {number} of {len(prompts)}") from error
                pixels.append(features["pixel_values"])
                tokens = [int(tiles) * self.tokens_per_tile for tiles in features["num_tiles"]]
            elif images is not None:
                tokens = []
            ids, answers = self._encode(prompt, tokens, vocabulary)
            if options.get("truncation") not in (None, False, "do_not_truncate"):
                ids, answers = self._truncate(ids, answers, options.get("max_length"))
            rows["input_ids"].append(ids)
            rows["assistant_masks"].append(answers)

        data: dict[str, Any] = self._pad(rows, options, return_tensors)
        if not answer_mask:
            data.pop("assistant_masks")
        if options.get("return_mm_token_type_ids"):
            placeholder = vocabulary.image_token_id
            data["mm_token_type_ids"] = [[int(i == placeholder) for i in row] for row in data["input_ids"]]
        if options.get("return_attention_mask") is False:
            data.pop("attention_mask")
        if pixels:
            stacked = torch.cat(pixels)
            data["pixel_values"] = self._placed(stacked, options) if return_tensors == "pt" else stacked.numpy()
        inputs = MonoInternVLInputs(data, tensor_type=return_tensors)
        inputs.image_token_id = vocabulary.image_token_id
        return inputs

    def share_tiles(self, image_options: dict[str, Any], count: int) -> dict[str, Any]:
        """The pictures of one prompt share its budget of tiles."""
        budget = image_options.get("max_tiles", self.image_processor.max_tiles)
        if count <= 1 or not isinstance(budget, int) or budget < 1:  # the image processor refuses a wrong one
            return image_options
        shared = {**image_options, "max_tiles": max(1, budget // count)}
        if "min_tiles" in shared:
            shared["min_tiles"] = min(shared["min_tiles"], shared["max_tiles"])
        return shared

    def _truncate(self, ids: list[int], answers: list[int], limit: int | None) -> tuple[list[int], list[int]]:
        limit = self.tokenizer.model_max_length if limit is None else limit
        excess = len(ids) - limit
        if excess <= 0:
            return ids, answers
        kept, removed = slice(0, limit), ids[limit:]
        if self.tokenizer.truncation_side == "left":
            kept, removed = slice(excess, None), ids[:excess]
        if not set(self.image_token_ids).isdisjoint(removed):
            raise ValueError(
                f"truncation to max_length={limit} would cut a picture out of a prompt of {len(ids)} tokens; "
                "raise max_length or lower max_tiles"
            )
        return ids[kept], answers[kept]

    def _encode(
        self, prompt: Iterable[Segment], tokens: list[int] | None, vocabulary: Vocabulary
    ) -> tuple[list[int], list[int]]:
        """Segments -> ids, and 1 where an answer or its `<|im_end|>` is.

        `tokens`: visual tokens of each picture; None leaves placeholders as they stand.
        """
        end_of_turn = vocabulary.control["<|im_end|>"]
        pieces: list[tuple[int | str, bool]] = []
        answered = False
        pictures = vocabulary.image_token_ids
        for text, origin, learnt in prompt:
            template = origin == "template"
            table, pattern = (
                (vocabulary.fixed, vocabulary.template_pattern)
                if template
                else (vocabulary.content, vocabulary.content_pattern)
            )
            for i, piece in enumerate(pattern.split(text)):
                if piece == "" and i % 2 == 0:
                    continue
                token = table[piece] if i % 2 else piece
                if learnt is None:
                    written = origin == "answer" or (template and answered and token == end_of_turn)
                else:
                    written = learnt and token not in pictures
                pieces.append((token, written))
                answered = False
            answered = origin == "answer"
        if tokens is not None:
            pieces = _expand(pieces, tokens, vocabulary)

        ids: list[int] = []
        answers: list[int] = []
        for is_text, run in itertools.groupby(pieces, key=lambda piece: isinstance(piece[0], str)):
            if not is_text:
                for token, is_answer in run:
                    ids.append(token)  # type: ignore[arg-type]
                    answers.append(int(is_answer))
                continue
            text, owned = "", bytearray()
            for part, is_answer in run:
                text += part  # type: ignore[operator]
                owned += bytes([is_answer]) * len(part)  # type: ignore[arg-type]
            encoded = vocabulary.encode(text)
            ids += encoded.ids
            answers += [int(any(owned[start : max(end, start + 1)])) for start, end in encoded.offsets]
        return ids, answers

    def _pad(
        self, rows: dict[str, list[list[int]]], options: dict[str, Any], return_tensors: str | None
    ) -> dict[str, list[list[int]]]:
        """Pad all rows alike; adds `attention_mask`."""
        lengths = [len(ids) for ids in rows["input_ids"]]
        padding = options.get("padding")
        if padding is None:
            padding = return_tensors is not None
        side = options.get("padding_side") or self.tokenizer.padding_side
        target = 0
        if padding == "max_length":
            target = options.get("max_length") or self.tokenizer.model_max_length
            if target > _NO_LIMIT:
                raise ValueError("padding='max_length' needs max_length; the tokenizer has none of its own")
        elif padding and padding != "do_not_pad":
            target = max(lengths)
        elif return_tensors is not None and len(set(lengths)) > 1:
            raise ValueError(f"prompts of {min(lengths)} to {max(lengths)} tokens make no tensor without padding")
        multiple = options.get("pad_to_multiple_of") or 1
        target = -(-target // multiple) * multiple

        def padded(row: list[int], filler: int) -> list[int]:
            missing = [filler] * max(target - len(row), 0)
            return missing + row if side == "left" else row + missing

        return {
            "input_ids": [padded(row, self.tokenizer.pad_token_id) for row in rows["input_ids"]],
            "attention_mask": [padded([1] * length, 0) for length in lengths],
            "assistant_masks": [padded(row, 0) for row in rows["assistant_masks"]],
        }

    # ---- decoding

    def answer_decoder(self, *, keep_grounding_tags: bool = False) -> AnswerDecoder:
        """A function `(ids) -> str`: an answer's text up to a stop token, stripped, without control tokens. Its
        `pieces()` decodes ids as they come, each once."""
        return AnswerDecoder(self._vocabulary(), self.stop_token_ids, keep_grounding_tags=keep_grounding_tags)

    def parse_boxes(self, answer: str, width: int, height: int) -> list[GroundedBox]:
        """Boxes in an answer that kept its tags, in pixels of a picture of `width` x `height`.

        The model writes `<ref>name</ref><box>[[x1, y1, x2, y2], ...]</box>` with integers 0..1000 relative to the whole
        picture; what lies outside is moved to the edge, and corners are put in order. Boxes without a `<ref>` get an
        empty label; what is not four numbers is skipped.
        """
        found = []
        for label, boxes in _GROUNDED.findall(answer):
            for numbers in _FOUR_NUMBERS.findall(boxes):
                x1, y1, x2, y2 = (min(max(float(number), 0.0), 1000.0) / 1000 for number in numbers)
                (left, right), (top, bottom) = sorted((x1, x2)), sorted((y1, y2))
                found.append(GroundedBox(label.strip(), (left * width, top * height, right * width, bottom * height)))
        return found

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens: bool = True, **kwargs: Any):  # type: ignore[no-untyped-def]
        """Texts of generated rows, for transformers' pipelines."""
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    # ---- engines

    def chat_token_ids(
        self, messages: Sequence[dict[str, Any]], chat_template: str | None = None, **variables: Any
    ) -> list[int]:
        """The `input_ids` of one conversation whose pictures an engine holds: one placeholder stands for each.

        Image parts need only their type; otherwise as `apply_chat_template` with `tokenize=True`, and as safe.
        """
        return self._ids_without_pixels(messages, chat_template, variables, None)

    def _get_num_multimodal_tokens(self, image_sizes: Sequence[Any] | None = None, **kwargs: Any) -> MultiModalData:
        """Visual tokens and tiles of pictures given by (height, width): each a prompt of its own with a whole budget of
        tiles, or in lists, of which each is a prompt whose pictures share it. Flat results, in order.

        Raises:
            TypeError: an unknown option.
        """
        given = {name: value for name, value in kwargs.items() if _is_read(name, value, "_get_num_multimodal_tokens")}
        options = {name: given[name] for name in TILE_OPTIONS if name in given}
        if image_sizes is None:
            return MultiModalData()
        tiles = []
        for entry in image_sizes:
            sizes: Any = entry if len(entry) and isinstance(entry[0], Sequence) else [entry]
            shared = self.share_tiles(options, len(sizes))
            tiles += [self.image_processor.get_number_of_tiles(height, width, **shared) for height, width in sizes]
        return MultiModalData(
            num_image_tokens=[count * self.tokens_per_tile for count in tiles], num_image_patches=tiles
        )


def _expand(
    pieces: list[tuple[int | str, bool]], tokens: list[int], vocabulary: Vocabulary
) -> list[tuple[int | str, bool]]:
    """One placeholder (or an already expanded run of them) per picture -> as many as it has visual tokens, between
    `<img>` and `</img>`."""
    image, start, end = vocabulary.image_token_ids
    total = sum(piece == image for piece, _ in pieces)
    out: list[tuple[int | str, bool]] = []
    picture, i = 0, 0
    while i < len(pieces):
        if pieces[i][0] != image:
            out.append(pieces[i])
            i += 1
            continue
        run = i
        while i < len(pieces) and pieces[i][0] == image:
            i += 1
        length = i - run
        while length:
            if picture >= len(tokens):
                picture += 1 if total == len(tokens) else length
                break
            count = tokens[picture]
            # Where there are as many placeholders as pictures, each is one.
            taken = 1 if total == len(tokens) or i - run == 1 else count
            if taken > length:
                raise ValueError(
                    f"picture {picture + 1} has {count} visual tokens, "
                    f"but the text holds {length} placeholders for it; give 1 or {count}"
                )
            length -= taken
            if out[-1:] != [(start, False)]:
                out.append((start, False))
            out += [(image, False)] * count
            if length or pieces[i : i + 1] != [(end, False)]:
                out.append((end, False))
            picture += 1
    if picture != len(tokens):
        raise ValueError(
            f"{picture} image placeholders in the text for {len(tokens)} pictures; they must match "
            f"({IMAGE_TOKEN} stands for a picture)"
        )
    return out


def _runs(text: str) -> list[str]:
    return re.findall(f"(?:{re.escape(IMAGE_TOKEN)})+", text)


def _conversations(conversation: Any) -> tuple[list[Any], bool]:
    """One conversation or several as a list of them, and whether they were several."""
    if hasattr(conversation, "messages"):
        return [conversation], False
    if isinstance(conversation, (str, bytes, Mapping)) or not hasattr(conversation, "__iter__"):
        raise ValueError(f"a conversation is a list of messages, not {type(conversation).__name__}")
    entries = list(conversation)
    several = [hasattr(entry, "messages") or _is_sequence(entry) for entry in entries]
    if any(several) and not all(several):
        raise ValueError("several conversations are lists of messages; one of them is not")
    return (entries, True) if any(several) else ([entries], False)


def _is_sequence(value: Any) -> bool:
    return not isinstance(value, (str, bytes, Mapping)) and hasattr(value, "__iter__") and not hasattr(value, "role")


def _take_images(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[tuple[str, Any]]]:
    """Plain messages whose image parts hold nothing but their type, one for each picture; and where each picture stands
    and what it is, None where its part does not say.

    Raises:
        ValueError: a part holds an empty list of pictures.
    """
    pictures: list[tuple[str, Any]] = []
    plain = []
    for number, message in enumerate(messages, start=1):
        if isinstance(message["content"], str):
            plain.append(message)
            continue
        parts: list[Any] = []
        for place, part in enumerate(message["content"], start=1):
            if part["type"] != "image":
                parts.append(part)
                continue
            where = f"message {number} ({message['role']}), part {place}"
            held = flatten_pictures(part["image"]) if "image" in part else [None]
            if not held:
                raise ValueError(f"{where}: it holds no picture")
            parts += [{"type": "image"} for _ in held]
            pictures += [(where, picture) for picture in held]
        plain.append({**message, "content": parts})
    return plain, pictures


# ---- templates

_ALWAYS_VARIABLES = ("add_generation_prompt", "continue_final_message", "tools", "documents", "sanitize_control_tokens")
# A tokenizer without a longest text has a number beyond this one.
_NO_LIMIT = 10**9


def _render(tokenizer: Any, messages: list[dict[str, Any]], source: str, variables: dict[str, Any]) -> str:
    """Render one conversation, which may be empty; it is not changed."""
    # Older transformers write into the messages.
    copies = [dict(message) for message in messages]
    try:
        options = {**tokenizer.special_tokens_map, **variables}
        rendered: Any = render_jinja_template([copies], chat_template=source, **options)[0]
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error
    return rendered[0]


@functools.lru_cache(maxsize=16)
def _with_answer_marks(source: str) -> str | None:
    """The template with variables in place of `{% generation %}` and its end; None where it has none.

    transformers counts the characters inside instead, in a counter that all threads share before 5.24.
    """

    def marked(tag: re.Match[str]) -> str:
        before, is_end, after = tag.groups()
        if is_end:
            return f"{{%{before} if true %}}{{{{ {_CLOSES} }}}}{{% endif %}}{{% endwith {after}%}}"
        return f"{{%{before} with %}}{{{{ {_OPENS} }}}}{{% if true %}}{{% endif {after}%}}"

    found, count = _GENERATION.subn(marked, source)
    return found if count else None


@functools.lru_cache(maxsize=16)
def _template_variables(source: str) -> frozenset[str]:
    """What a template reads of what it is given. One that cannot be parsed is refused where it is rendered."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(_with_answer_marks(source) or source)))
    except jinja2.TemplateError:
        return frozenset(re.findall(r"\w+", source))


@functools.lru_cache(maxsize=256)
def _template_reads(source: str, key: str) -> bool:
    """Whether a template may read a key of a message: it is written there outside of comments."""
    return re.search(rf"\b{re.escape(key)}\b", re.sub(r"\{#.*?#\}", "", source, flags=re.DOTALL)) is not None


# ---- options


def _is_read(name: str, value: Any, what: str, said: Iterable[str] = ()) -> bool:
    """Whether an option is one that is used. What transformers' own callers send along unset, or where it cannot
    matter, is not.

    Raises:
        TypeError: nobody knows it. ValueError: transformers knows it, but this processor does not give it.
    """
    if name in _OPTIONS:
        return value is not None
    if name in _UNREAD:
        if value is None or value is False:
            return False
        raise ValueError(f"{name}={value!r}: videos and sound are not read; give a video's frames as pictures")
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


def _strings(value: Any) -> Iterator[str]:
    """All strings in nested lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _unused_characters(count: int, texts: Iterable[str]) -> list[str]:
    """Private-use characters that occur in none of the texts."""
    used = set().union(*texts)
    free = (character for code in itertools.chain(*_PRIVATE_USE) if (character := chr(code)) not in used)
    found = list(itertools.islice(free, count))
    if len(found) < count:
        raise ValueError("the messages hold every private-use character there is")
    return found


def _split_at_marks(
    rendered: str, openings: dict[str, str], close: str, learnt: dict[str, bool]
) -> list[Segment] | None:
    """Cut a rendered string at its marks; None where they are not in pairs. Neighbours of one origin become one.

    `learnt`: the marks around what an assistant writes, if the template says so.
    """
    segments: list[Segment] = []
    origin, writes = "template", False if learnt else None
    for piece in re.split(f"([{''.join((*openings, close, *learnt))}])", rendered):
        if piece in openings:
            if origin != "template":
                return None
            origin = openings[piece]
        elif piece == close:
            if origin == "template":
                return None
            origin = "template"
        elif piece in learnt:
            if origin != "template":
                return None
            writes = learnt[piece]
        elif piece and segments and segments[-1][1:] == (origin, writes):
            segments[-1] = Segment(segments[-1].text + piece, origin, writes)
        elif piece:
            segments.append(Segment(piece, origin, writes))
    return segments if origin == "template" else None


# ---- loading

_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download", "proxies")
# What transformers' automatic classes read themselves or hand to every part, and what a script for other models says.
_LOADING_OPTIONS = frozenset(
    {
        *_HUB_OPTIONS,
        *("trust_remote_code", "code_revision", "chat_template", "use_fast", "backend", "config", "dtype"),
        *("torch_dtype", "device_map", "return_unused_kwargs", "use_auth_token", "user_agent", "commit_hash"),
    }
)
_TOKENIZER_OPTIONS = (
    *("padding_side", "truncation_side", "model_max_length", "clean_up_tokenization_spaces", "extra_special_tokens"),
    *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"),
    *("padding", "max_length", "truncation", "pad_to_multiple_of", "add_bos_token", "add_eos_token"),
)


def _image_processor_options() -> list[str]:
    names = inspect.signature(MonoInternVLImageProcessor.__init__).parameters
    return [name for name in names if name not in ("self", "kwargs")]


def _read_json(path: str, name: str, **kwargs: Any) -> dict[str, Any]:
    options = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **options)
    return json.loads(Path(found).read_text(encoding="utf-8")) if found else {}


def load_image_processor(path: str, **kwargs: Any) -> MonoInternVLImageProcessor:
    """Ours if the folder has one; else from an official `config.json`, which holds the tiling. Options override it."""
    chosen = {name: kwargs[name] for name in _image_processor_options() if kwargs.get(name) is not None}
    for name in ("processor_config.json", "preprocessor_config.json"):
        settings = _read_json(path, name, **kwargs)
        settings = settings.get("image_processor", settings)
        if settings.get("image_processor_type") == MonoInternVLImageProcessor.__name__:
            return MonoInternVLImageProcessor(**{**settings, **chosen})
    config = _read_json(path, "config.json", **kwargs)
    vision = config.get("vision_config", {})
    official = {
        "tile_size": config.get("force_image_size") or vision.get("image_size", 448),
        "min_tiles": config.get("min_dynamic_patch", 1),
        "max_tiles": config.get("max_dynamic_patch", 12),
        "use_thumbnail": config.get("use_thumbnail", True),
    }
    return MonoInternVLImageProcessor(**{**official, **chosen})


def _load_tokenizer(path: str, **kwargs: Any) -> Any:
    """`tokenizer.json` as it is; an official folder's `tokenizer.model` is converted (needs the installed package)."""
    options = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
    settings = {key: kwargs[key] for key in _TOKENIZER_OPTIONS if key in kwargs}
    if cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **options):
        # tokenizer_config.json names the class. Without a config AutoTokenizer reads config.json and, where this file
        # runs as remote code, warns that it does not know the type.
        config = PreTrainedConfig()
        return AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False, **options, **settings)
    model_file = cached_file(path, "tokenizer.model", _raise_exceptions_for_missing_entries=False, **options)
    if model_file is None:
        raise ValueError(f"{path} has neither tokenizer.json nor tokenizer.model")
    try:
        from mono_internvl.tokenization import convert_tokenizer
    except ImportError as error:
        raise ImportError(
            f"{path} has only a tokenizer.model: install this package, or convert it once where it is installed: "
            f"mono-internvl tokenizer {model_file} {path}"
        ) from error
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        # They lie beside it then, also from the Hub, and hold the tokens that fine-tuning added.
        cached_file(path, name, _raise_exceptions_for_missing_entries=False, **options)
    logger.info("converting %s, which takes seconds; `mono-internvl tokenizer` does it once and for all", model_file)
    with tempfile.TemporaryDirectory() as folder:
        convert_tokenizer(model_file, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **settings)
    tokenizer.name_or_path = str(path)
    return tokenizer


MonoInternVLProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["GroundedBox", "MonoInternVLProcessor"]
