"""Messages + pictures -> `input_ids` and `pixel_values`; generated ids -> text and boxes.

Text from a user is text. A chat template mixes its own control tokens with what people typed, and a tokenizer cannot
tell them apart in the finished string. So `apply_chat_template(tokenize=True)` renders typed text between marks, and
each stretch of the result is encoded by its origin: control tokens are recognised in the template's own parts only, the
grounding tags (`<ref>`, `<box>`, `<quad>`) everywhere. Neighbouring stretches of plain text are encoded as one, exactly
as the finished string would be.

A string that comes already rendered (`processor(text=...)`) is trusted.
"""

import base64
import binascii
import itertools
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils.hub import cached_file

from .image_processing_mono_internvl import MonoInternVLImageProcessor, flatten_pictures
from .prompt_mono_internvl import IMAGE_MARK, marked_parts
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

_IMAGE_OPTIONS = ("min_tiles", "max_tiles", "use_thumbnail", "do_normalize", "max_pixels")
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
_GROUPED_OPTIONS = ("common_kwargs", "images_kwargs", "text_kwargs")

# No tag reaches over another of its kind, so that an unfinished one does not swallow the next.
_GROUNDED = re.compile(r"(?:<ref>((?:(?!</?ref>).)*)</ref>\s*)?<box>((?:(?!</?box>).)*)</box>", re.DOTALL)
_FOUR_NUMBERS = re.compile(r"\[\s*" + r"\s*,\s*".join([r"(-?\d+(?:\.\d+)?)"] * 4) + r"\s*\]")


class Segment(NamedTuple):
    """A stretch of a rendered prompt. `origin`: template, user (anyone's typed text) or answer (the assistant's)."""

    text: str
    origin: str


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
        return (self.image_processor.tile_size // 28) ** 2

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
        """Our two parts, from a native folder or an official one. (Asked for by name: transformers' automatic image
        processor class wants torchvision before 5.18, and an official folder names code that is not ours.)"""
        kwargs = {name: value for name, value in kwargs.items() if name not in ("trust_remote_code", "_from_auto")}
        return [
            load_image_processor(pretrained_model_name_or_path, **kwargs),
            _load_tokenizer(pretrained_model_name_or_path, **kwargs),
        ]

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
            text: one or several prompts; each `<IMG_CONTEXT>` (or a run of them, already expanded) is a picture.
                Control tokens in it are recognised: use `apply_chat_template` for text that people typed.
            return_tensors: `"pt"`, `"np"` or None.
            max_tiles, min_tiles, use_thumbnail, do_normalize, max_pixels: see the image processor; the pictures of one
                prompt share `max_tiles`, each gets max(1, max_tiles // pictures).
            padding, padding_side, max_length, truncation, pad_to_multiple_of, add_special_tokens: as in tokenizers;
                several prompts as tensors are padded by default, on the tokenizer's side (left).
            return_mm_token_type_ids: add `mm_token_type_ids`, 1 at visual tokens.

        Returns:
            `input_ids`, `attention_mask` int64 [B, T], and, with pictures, `pixel_values` [tiles, patches, 3*28*28].
            Without text only `pixel_values`, each picture with a whole budget of tiles.

        Raises:
            ValueError: placeholders and pictures differ in number, truncation would cut a picture, unknown option.
        """
        if text is None and images is None:
            raise ValueError("give text, images or both")
        options = self._collect_options(kwargs)
        return_tensors = options.pop("return_tensors", return_tensors)
        if text is None:
            image_options = {key: options[key] for key in _IMAGE_OPTIONS if key in options}
            features = self.image_processor(images, return_tensors=return_tensors, **image_options)
            return BatchFeature({"pixel_values": features["pixel_values"]})
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
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        """Render a conversation, and with `tokenize=True` encode it with its pictures.

        Args:
            conversation: messages `{"role", "content"}`, or a list of such lists. Content is a string or a list of
                `{"type": "text", "text"}`, `{"type": "image", "image" | "url" | "path" | "base64"}` and OpenAI's
                `{"type": "image_url", "image_url"}`. With `tokenize=True` typed text, that of `documents` included,
                never becomes a control token; `<ref>`, `<box>` and `<quad>` are content and do.
            return_assistant_tokens_mask: add `assistant_masks`, 1 at each answer and its `<|im_end|>`.
            processor_kwargs: options of `__call__`; they may also be given directly.
            **kwargs: `add_generation_prompt`, `continue_final_message`, and the template's own variables.

        Returns:
            The rendered string(s); with `tokenize=True` the `input_ids`, or with `return_dict=True` all inputs; one
            conversation is a batch of one.

        Raises:
            ValueError: a message the template refuses or that is not of the form above, or what `__call__` refuses.
        """
        known = (*_IMAGE_OPTIONS, *_TEXT_OPTIONS, *_GROUPED_OPTIONS)
        direct = {name: kwargs.pop(name) for name in known if name in kwargs}
        # Newer transformers sanitise on request; here it is always so.
        kwargs.pop("sanitize_control_tokens", None)
        if not isinstance(conversation, (list, tuple)):
            raise ValueError(f"a conversation is a list of messages, not {type(conversation).__name__}")
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        conversations = conversation if batched else [conversation]
        if not tokenize:
            rendered = [self._render(messages, chat_template, kwargs) for messages in conversations]
            return rendered if batched else rendered[0]
        options = self._collect_options({**direct, **(processor_kwargs or {})})
        return_tensors = options.pop("return_tensors", return_tensors)
        add_bos = options.pop("add_special_tokens", True)
        prompts, pictures = [], []
        for messages in conversations:
            messages, images = _take_images(messages)
            prompt = self._render_by_origin(messages, chat_template, kwargs)
            prompts.append(self._with_bos(prompt) if add_bos else prompt)
            pictures.append(images)
        inputs = self._encode_batch(
            prompts,
            pictures,
            options,
            None if return_tensors == "auto" else return_tensors,
            self._vocabulary(chat_template),
            answer_mask=return_assistant_tokens_mask,
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
        copies, _ = _take_images(messages, with_sources=False)
        prompt = self._with_bos(self._render_by_origin(copies, chat_template, variables))
        return self._encode(prompt, tokens, self._vocabulary(chat_template))[0]

    def _render(self, messages: Sequence[dict[str, Any]], chat_template: str | None, variables: dict[str, Any]) -> str:
        """Render one conversation, which may be empty; it is not changed."""
        # Older transformers write into the messages.
        copies = [dict(message) if isinstance(message, dict) else message for message in messages]
        try:
            return super().apply_chat_template([copies], chat_template, tokenize=False, **variables)[0]
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def _render_by_origin(
        self, messages: list[dict[str, Any]], chat_template: str | None, variables: dict[str, Any]
    ) -> list[Segment]:
        """Render one conversation and tell what of it was typed, and by whom.

        Typed text is rendered between marks. They must not change what the template does, so the result is compared
        with the plain one. White space at the ends, which templates look at and trim, stays outside of the marks; an
        answer's is first tried inside, because it belongs to the answer.
        """
        control = self._vocabulary(chat_template).control_pattern
        for message in messages:
            if control.search(message["role"]):
                raise ValueError(f"a message's role holds a control token: {message['role']!r}")
        plain = self._render(messages, chat_template, variables)
        documents = variables.get("documents")
        user, assistant, close = _unused_characters(3, [plain, *_strings(messages), *_strings(documents)])
        for trimmed in (False, True):

            def marked(value: Any, opening: str, trimmed: bool = trimmed) -> Any:
                if isinstance(value, str):
                    body = value.strip() if trimmed or opening == user else value
                    before, _, after = value.partition(body) if body else (value, "", "")
                    return f"{before}{opening}{body}{close}{after}" if body else value
                if isinstance(value, (list, tuple)):
                    return [marked(item, opening) for item in value]
                if isinstance(value, dict):
                    return {k: v if k in ("role", "type") else marked(v, opening) for k, v in value.items()}
                return value

            rendered = self._render(
                [marked(message, assistant if message["role"] == "assistant" else user) for message in messages],
                chat_template,
                variables if documents is None else {**variables, "documents": marked(documents, user)},
            )
            segments = _split_at_marks(rendered, {user: "user", assistant: "answer"}, close)
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

    def _collect_options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Flat and grouped options as one dict; an unknown one is an error."""
        options: dict[str, Any] = {}
        for name, value in given.items():
            if name in _GROUPED_OPTIONS:
                options.update(value or {})
        options.update({name: value for name, value in given.items() if name not in _GROUPED_OPTIONS})
        # What transformers' pipelines and trainers send along without a meaning here.
        for name in ("videos", "audio", "return_token_type_ids", "device"):
            if options.get(name) is None or name in ("return_token_type_ids", "device"):
                options.pop(name, None)
        unknown = [name for name in options if name not in (*_IMAGE_OPTIONS, *_TEXT_OPTIONS, "return_tensors")]
        if unknown:
            raise ValueError(
                f"unknown option {', '.join(unknown)}; allowed are {', '.join((*_IMAGE_OPTIONS, *_TEXT_OPTIONS))}"
            )
        return options

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
        wanted = [sum(len(_runs(segment.text)) for segment in prompt) for prompt in prompts]
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
        for prompt, images in zip(prompts, pictures, strict=True):
            tokens = None
            if images:
                features = self.image_processor(
                    images, return_tensors="pt", **self.share_tiles(image_options, len(images))
                )
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
            data["mm_token_type_ids"] = [[int(i == self.image_token_id) for i in row] for row in data["input_ids"]]
        if options.get("return_attention_mask") is False:
            data.pop("attention_mask")
        if pixels:
            stacked = torch.cat(pixels)
            data["pixel_values"] = stacked if return_tensors == "pt" else stacked.numpy()
        return BatchFeature(data, tensor_type=return_tensors)

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
        for text, origin in prompt:
            template = origin == "template"
            table, pattern = (
                (vocabulary.fixed, vocabulary.template_pattern)
                if template
                else (vocabulary.content, vocabulary.content_pattern)
            )
            for i, piece in enumerate(pattern.split(text)):
                if piece == "" and i % 2 == 0:
                    continue
                if i % 2:
                    ends = template and answered and table[piece] == end_of_turn
                    pieces.append((table[piece], origin == "answer" or ends))
                else:
                    pieces.append((piece, origin == "answer"))
                answered = False
            answered = origin == "answer"
        if tokens is not None:
            pieces = _expand(pieces, tokens, vocabulary.image_token_id)

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
        if padding not in (True, False, "longest", "max_length", "do_not_pad"):
            raise ValueError(
                f"padding={padding!r} is not known; allowed are True, False, longest, max_length, do_not_pad"
            )
        side = options.get("padding_side") or self.tokenizer.padding_side
        if side not in ("left", "right"):
            raise ValueError(f"padding_side={side!r} is not known; allowed are left and right")
        target = 0
        if padding == "max_length":
            if options.get("max_length") is None:
                raise ValueError("padding='max_length' needs max_length")
            target = options["max_length"]
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

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Visual tokens and tiles of pictures given by (height, width), each with a whole budget of tiles."""
        if image_sizes is None:
            return MultiModalData()
        names = ("min_tiles", "max_tiles", "use_thumbnail")
        options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        tiles = [self.image_processor.get_number_of_tiles(height, width, **options) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[count * self.tokens_per_tile for count in tiles], num_image_patches=tiles
        )


def _expand(
    pieces: list[tuple[int | str, bool]], tokens: list[int], image_token_id: int
) -> list[tuple[int | str, bool]]:
    """One placeholder (or an already expanded run of them) per picture -> as many as it has visual tokens."""
    out: list[tuple[int | str, bool]] = []
    picture, i = 0, 0
    while i < len(pieces):
        if pieces[i][0] != image_token_id:
            out.append(pieces[i])
            i += 1
            continue
        run = i
        while i < len(pieces) and pieces[i][0] == image_token_id:
            i += 1
        if picture < len(tokens):
            if i - run not in (1, tokens[picture]):
                raise ValueError(
                    f"picture {picture + 1} has {tokens[picture]} visual tokens, "
                    f"but the text holds {i - run} placeholders for it; give 1 or {tokens[picture]}"
                )
            out += [(image_token_id, False)] * tokens[picture]
        picture += 1
    if picture != len(tokens):
        raise ValueError(f"{picture} image placeholders in the text for {len(tokens)} pictures; they must match")
    return out


def _runs(text: str) -> list[str]:
    return re.findall(f"(?:{re.escape(IMAGE_TOKEN)})+", text)


def _take_images(
    messages: Sequence[dict[str, Any]], with_sources: bool = True
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Copies of the messages whose image parts hold nothing but their type, and the pictures in order.

    Raises:
        ValueError: a message, part or text is not of the form that `apply_chat_template` describes.
    """
    images: list[Any] = []
    copies = []
    for message in messages:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError("a message is a dict with 'role' and 'content'")
        role, content = message["role"], message["content"]
        if not isinstance(role, str):
            raise ValueError(f"a message's role must be a string, not {type(role).__name__}")
        if isinstance(content, str):
            copies.append(dict(message))
            continue
        if not isinstance(content, (list, tuple)):
            raise ValueError(
                f"a {role} message's content must be a string or a list of parts, not {type(content).__name__}"
            )
        parts: list[Any] = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("image", "image_url"):
                images.append(_image_source(part) if with_sources else None)
                parts.append({"type": "image"})
            elif kind is None:
                raise ValueError(f"a {role} message's part must be a dict with a 'type', such as text or image")
            elif kind == "text" and not isinstance(part.get("text"), str):
                raise ValueError(f"a {role} message's text must be a string, not {type(part.get('text')).__name__}")
            else:
                parts.append(part)
        copies.append({**message, "content": parts})
    return copies, images


def _image_source(part: dict[str, Any]) -> Any:
    if part["type"] == "image_url":
        source = part.get("image_url")
        source = source.get("url") if isinstance(source, dict) else source
        if not isinstance(source, str):
            raise ValueError("an image_url part needs 'image_url': {'url': ...}")
        return source
    for key in ("image", "url", "path"):
        if part.get(key) is not None:
            return part[key]
    encoded = part.get("base64")
    if encoded is None:
        raise ValueError("an image part needs one of 'image', 'url', 'path' and 'base64'")
    if isinstance(encoded, str) and encoded[:5].lower() == "data:":
        return encoded
    try:
        return base64.b64decode("".join(encoded.split()) if isinstance(encoded, str) else encoded, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ValueError(f"the 'base64' of an image part is not base64: {error}") from error


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


def _split_at_marks(rendered: str, openings: dict[str, str], close: str) -> list[Segment] | None:
    """Cut a rendered string at its marks; None where they are not in pairs. Neighbours of one origin become one."""
    segments: list[Segment] = []
    origin = "template"
    for piece in re.split(f"([{''.join(openings)}{close}])", rendered):
        if piece in openings:
            if origin != "template":
                return None
            origin = openings[piece]
        elif piece == close:
            if origin == "template":
                return None
            origin = "template"
        elif piece and segments and segments[-1].origin == origin:
            segments[-1] = Segment(segments[-1].text + piece, origin)
        elif piece:
            segments.append(Segment(piece, origin))
    return segments if origin == "template" else None


def _read_json(path: str, name: str, **kwargs: Any) -> dict[str, Any]:
    options = {
        key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only", "subfolder") if key in kwargs
    }
    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **options)
    return json.loads(Path(found).read_text(encoding="utf-8")) if found else {}


def load_image_processor(path: str, **kwargs: Any) -> MonoInternVLImageProcessor:
    """Ours if the folder has one; else from an official `config.json`, which holds the tiling. Options override it."""
    chosen = {name: kwargs[name] for name in ("tile_size", *_IMAGE_OPTIONS) if kwargs.get(name) is not None}
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
    options = {
        key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only", "subfolder") if key in kwargs
    }
    settings = {key: kwargs[key] for key in ("padding_side", "model_max_length") if key in kwargs}
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
