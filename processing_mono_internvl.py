"""Messages + pictures -> `input_ids` and `pixel_values`; generated ids -> text and boxes.

Text from a user is text. A chat template mixes its own control tokens with what people typed, and a tokenizer cannot
tell them apart in the finished string. So `apply_chat_template(tokenize=True)` renders the template around stand-ins for
the typed text, and each stretch of the result is encoded by its origin: control tokens are recognised in the template's
own parts only, the grounding tags (`<ref>`, `<box>`, `<quad>`) everywhere. Neighbouring stretches of plain text are
encoded as one, exactly as the finished string would be.

A string that comes already rendered (`processor(text=...)`) is trusted.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils.hub import cached_file

from .image_processing_mono_internvl import MonoInternVLImageProcessor


IMAGE_START, IMAGE_END, IMAGE_TOKEN = "<img>", "</img>", "<IMG_CONTEXT>"
GROUNDING_TAGS = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
IMAGE_MARK = "<image>"
# Bound a stand-in for typed text; private-use characters that no template contains.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"

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
        if tokenizer is not None:
            vocabulary = tokenizer.get_vocab()
            needed = (IMAGE_TOKEN, IMAGE_START, IMAGE_END, "<|im_start|>", "<|im_end|>")
            absent = [token for token in needed if token not in vocabulary]
            if absent:
                raise ValueError(f"the tokenizer lacks {', '.join(absent)}: it is not one of Mono-InternVL's")
            self.image_token_id = vocabulary[IMAGE_TOKEN]
            self._control_ids = {token: vocabulary[token] for token in tokenizer.all_special_tokens}
            self._grounding_ids = {tag: vocabulary[tag] for tag in GROUNDING_TAGS if tag in vocabulary}
            self._control_pattern = _alternatives(self._control_ids)
            self._grounding_pattern = _alternatives(self._grounding_ids)
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile."""
        return (self.image_processor.tile_size // 28) ** 2

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an answer: `</s>`, `<|im_end|>`, `<|im_start|>`."""
        return [self.tokenizer.eos_token_id, self._control_ids["<|im_end|>"], self._control_ids["<|im_start|>"]]

    @property
    def image_token_ids(self) -> list[int]:
        return [self.image_token_id, self._control_ids[IMAGE_START], self._control_ids[IMAGE_END]]

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
        return [_load_image_processor(pretrained_model_name_or_path, **kwargs),
                _load_tokenizer(pretrained_model_name_or_path, **kwargs)]  # fmt: skip

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

        Raises:
            ValueError: placeholders and pictures differ in number, truncation would cut a picture, unknown option.
        """
        if text is None and images is None:
            raise ValueError("give text, images or both")
        options = self._collect_options(kwargs)
        if text is None:
            image_options = {key: options[key] for key in _IMAGE_OPTIONS if key in options}
            return self.image_processor(images, return_tensors=return_tensors, **image_options)
        single = isinstance(text, str)
        texts = [text] if single else list(text)  # type: ignore[list-item,arg-type]
        if not all(isinstance(prompt, str) for prompt in texts):
            raise ValueError("text must be a string or a list of strings")
        add_bos = options.pop("add_special_tokens", True)
        bos = self.tokenizer.bos_token or ""
        prompts = [[Segment(bos + p if add_bos and not p.startswith(bos) else p, "template")] for p in texts]
        return self._encode_batch(prompts, self._per_prompt(images, prompts), options, return_tensors)

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
                `{"type": "text", "text"}` and `{"type": "image", "image" | "url" | "path" | "base64"}`. Typed text never
                becomes a control token; `<ref>`, `<box>` and `<quad>` are content and do.
            return_assistant_tokens_mask: add `assistant_masks`, 1 at each answer and its `<|im_end|>`.
            processor_kwargs: options of `__call__`; they may also be given directly.
            **kwargs: `add_generation_prompt`, `continue_final_message`, and the template's own variables.

        Returns:
            The rendered string(s); with `tokenize=True` the `input_ids`, or with `return_dict=True` all inputs.
        """
        known = (*_IMAGE_OPTIONS, *_TEXT_OPTIONS, *_GROUPED_OPTIONS)
        direct = {name: kwargs.pop(name) for name in known if name in kwargs}
        # Newer transformers sanitise on request; here it is always so.
        kwargs.pop("sanitize_control_tokens", None)
        if not tokenize:
            return super().apply_chat_template(conversation, chat_template, tokenize=False, **kwargs)
        options = self._collect_options({**direct, **(processor_kwargs or {})})
        return_tensors = options.pop("return_tensors", return_tensors)
        options.pop("add_special_tokens", None)
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        prompts, pictures = [], []
        for messages in conversation if batched else [conversation]:
            typed: list[Segment] = []
            stand_ins, images = _take_out(messages, typed)
            rendered = super().apply_chat_template(stand_ins, chat_template, tokenize=False, **kwargs)
            prompts.append(_put_back(rendered, typed))
            pictures.append(images)
        inputs = self._encode_batch(
            prompts,
            pictures,
            options,
            None if return_tensors == "auto" else return_tensors,
            answer_mask=return_assistant_tokens_mask,
            unpack=not batched,
        )
        return inputs if return_dict else inputs["input_ids"]

    def conversation(self, turns: Sequence[tuple[str, str | None]], images: Sequence[Any]) -> list[dict[str, Any]]:
        """(prompt, answer) pairs, whose prompts mark pictures by `<image>`, to messages; an answer of None is left out.

        Raises:
            ValueError: marks and pictures differ in number.
        """
        marks = sum(prompt.count(IMAGE_MARK) for prompt, _ in turns)
        if marks != len(images):
            raise ValueError(f"{marks} {IMAGE_MARK} marks for {len(images)} pictures; they must match")
        left, messages = iter(images), []
        for prompt, answer in turns:
            first, *others = prompt.split(IMAGE_MARK)
            # The leading text, even empty, says that the prompt sets its own line breaks.
            parts: list[dict[str, Any]] = [{"type": "text", "text": first}]
            for text in others:
                parts += [{"type": "image", "image": next(left)}, {"type": "text", "text": text}]
            messages.append({"role": "user", "content": parts})
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
        if not isinstance(images, (list, tuple)):
            images = [images]
        if images and all(isinstance(group, (list, tuple)) for group in images):
            if len(images) != len(prompts):
                raise ValueError(
                    f"{len(images)} lists of pictures for {len(prompts)} prompts; give one list per prompt"
                )
            return [list(group) for group in images]
        if len(prompts) == 1:
            return [list(images)]
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
        *,
        answer_mask: bool = False,
        unpack: bool = False,
    ) -> BatchFeature:
        image_options = {key: options[key] for key in _IMAGE_OPTIONS if options.get(key) is not None}
        rows: dict[str, list[list[int]]] = {"input_ids": [], "assistant_masks": []}
        pixels = []
        for prompt, images in zip(prompts, pictures, strict=True):
            tokens = None
            if images:
                features = self.image_processor(
                    images, return_tensors="pt", **self._share_tiles(image_options, len(images))
                )
                pixels.append(features["pixel_values"])
                tokens = [int(tiles) * self.tokens_per_tile for tiles in features["num_tiles"]]
            elif images is not None:
                tokens = []
            ids, answers = self._encode(prompt, tokens)
            limit = options.get("max_length") if options.get("truncation") else None
            if limit is not None and len(ids) > limit:
                if self.image_token_id in ids[limit:]:
                    raise ValueError(
                        f"truncation to max_length={limit} would cut a picture out of a prompt of {len(ids)} tokens; "
                        "raise max_length or lower max_tiles"
                    )
                ids, answers = ids[:limit], answers[:limit]
            rows["input_ids"].append(ids)
            rows["assistant_masks"].append(answers)

        data = self._pad(rows, options, return_tensors)
        if not answer_mask:
            data.pop("assistant_masks")
        if options.get("return_mm_token_type_ids"):
            data["mm_token_type_ids"] = [[int(i == self.image_token_id) for i in row] for row in data["input_ids"]]
        if options.get("return_attention_mask") is False:
            data.pop("attention_mask")
        if unpack and return_tensors is None:
            data = {name: value[0] for name, value in data.items()}
        if pixels:
            stacked = torch.cat(pixels)
            data["pixel_values"] = stacked if return_tensors == "pt" else stacked.numpy()
        return BatchFeature(data, tensor_type=return_tensors)

    def _share_tiles(self, image_options: dict[str, Any], count: int) -> dict[str, Any]:
        """The pictures of one prompt share its budget of tiles."""
        budget = image_options.get("max_tiles") or self.image_processor.max_tiles
        share = max(1, budget // count)
        least = image_options.get("min_tiles") or self.image_processor.min_tiles
        return {**image_options, "max_tiles": share, "min_tiles": min(least, share) if count > 1 else least}

    def _encode(self, prompt: Iterable[Segment], tokens: list[int] | None) -> tuple[list[int], list[int]]:
        """Segments -> ids, and 1 where an answer or its `<|im_end|>` is.

        `tokens`: visual tokens of each picture; None leaves placeholders as they stand.
        """
        end_of_turn = self._control_ids["<|im_end|>"]
        pieces: list[tuple[int | str, bool]] = []
        answered = False
        for text, origin in prompt:
            template = origin == "template"
            table, pattern = (
                (self._control_ids, self._control_pattern)
                if template
                else (self._grounding_ids, self._grounding_pattern)
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
            pieces = self._expand(pieces, tokens)

        ids: list[int] = []
        answers: list[int] = []
        i = 0
        while i < len(pieces):
            value, is_answer = pieces[i]
            if isinstance(value, int):
                ids.append(value)
                answers.append(int(is_answer))
                i += 1
                continue
            text, spans = "", []
            while i < len(pieces) and isinstance(pieces[i][0], str):
                if pieces[i][1]:
                    spans.append((len(text), len(text) + len(pieces[i][0])))  # type: ignore[arg-type]
                text += pieces[i][0]  # type: ignore[operator]
                i += 1
            encoded = self.tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
            )
            ids += encoded["input_ids"]
            for start, end in encoded["offset_mapping"]:
                answers.append(int(any(max(start, a) < min(max(end, start + 1), b) for a, b in spans)))
        return ids, answers

    def _expand(self, pieces: list[tuple[int | str, bool]], tokens: list[int]) -> list[tuple[int | str, bool]]:
        """One placeholder (or an already expanded run of them) per picture -> as many as it has visual tokens."""
        out: list[tuple[int | str, bool]] = []
        picture, i = 0, 0
        while i < len(pieces):
            if pieces[i][0] != self.image_token_id:
                out.append(pieces[i])
                i += 1
                continue
            run = i
            while i < len(pieces) and pieces[i][0] == self.image_token_id:
                i += 1
            if picture < len(tokens):
                if i - run not in (1, tokens[picture]):
                    raise ValueError(
                        f"picture {picture + 1} has {tokens[picture]} visual tokens, "
                        f"but the text holds {i - run} placeholders for it; give 1 or {tokens[picture]}"
                    )
                out += [(self.image_token_id, False)] * tokens[picture]
            picture += 1
        if picture != len(tokens):
            raise ValueError(f"{picture} image placeholders in the text for {len(tokens)} pictures; they must match")
        return out

    def _pad(
        self, rows: dict[str, list[list[int]]], options: dict[str, Any], return_tensors: str | None
    ) -> dict[str, list[list[int]]]:
        """Pad all rows alike; adds `attention_mask`."""
        lengths = [len(ids) for ids in rows["input_ids"]]
        padding = options.get("padding")
        if padding is None:
            padding = return_tensors is not None and len(set(lengths)) > 1
        side = options.get("padding_side") or self.tokenizer.padding_side
        target = 0
        if padding == "max_length":
            if options.get("max_length") is None:
                raise ValueError("padding='max_length' needs max_length")
            target = options["max_length"]
        elif padding and padding != "do_not_pad":
            target = max(lengths)
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

    def answer_decoder(self, *, keep_grounding_tags: bool = False) -> Callable[..., str]:
        """A function `(ids, partial=False) -> str`: an answer's text up to its first stop token, without control tokens.

        A character whose bytes have not all come is left out. The text is stripped; with `partial=True` only its end is
        held back, so that later calls extend earlier ones.
        """
        stops = set(self.stop_token_ids)
        dropped = {i for token, i in self._control_ids.items() if token not in GROUNDING_TAGS}
        if not keep_grounding_tags:
            dropped |= set(self._grounding_ids.values())

        def decode(ids: list[int], partial: bool = False) -> str:
            end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
            kept = [token for token in ids[:end] if token not in dropped]
            kept = kept[: len(kept) - self._pending_bytes(kept)]
            return self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False).strip()

        return decode

    def _pending_bytes(self, ids: list[int]) -> int:
        """How many byte pieces at the end begin a UTF-8 character that is not finished."""
        tail = bytearray()
        for token in reversed(self.tokenizer.convert_ids_to_tokens(ids[-4:])):
            match = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
            if match is None:
                break
            tail.insert(0, int(match[1], 16))
        for length in range(1, min(len(tail), 3) + 1):
            lead = tail[-length]
            if lead >= 0xC0:
                needed = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
                return length if length < needed else 0
            if lead < 0x80:
                return 0
        return 0

    def parse_boxes(self, answer: str, width: int, height: int) -> list[GroundedBox]:
        """Boxes in an answer that kept its tags, in pixels of a picture of `width` x `height`.

        The model writes `<ref>name</ref><box>[[x1, y1, x2, y2], ...]</box>` with integers 0..1000 relative to the whole
        picture. Boxes without a `<ref>` get an empty label; what is not four numbers is skipped.
        """
        found = []
        for label, boxes in re.findall(r"(?:<ref>(.*?)</ref>\s*)?<box>(.*?)</box>", answer, flags=re.DOTALL):
            for numbers in re.findall(r"\[\s*([\d.]+)\s*,\s*([\d.]+)\s*,\s*([\d.]+)\s*,\s*([\d.]+)\s*\]", boxes):
                x1, y1, x2, y2 = (min(float(number), 1000.0) / 1000 for number in numbers)
                found.append(GroundedBox(label.strip(), (x1 * width, y1 * height, x2 * width, y2 * height)))
        return found

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens: bool = True, **kwargs: Any):  # type: ignore[no-untyped-def]
        """Texts of generated rows, for transformers' pipelines."""
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    # ---- engines

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Visual tokens and tiles of pictures given by (height, width), each with a whole budget of tiles."""
        if image_sizes is None:
            return MultiModalData()
        options = {name: kwargs[name] for name in ("min_tiles", "max_tiles") if kwargs.get(name) is not None}
        tiles = [self.image_processor.get_number_of_tiles(height, width, **options) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[count * self.tokens_per_tile for count in tiles], num_image_patches=tiles
        )


def _alternatives(table: dict[str, int]) -> re.Pattern[str]:
    """A pattern that splits text at the table's keys and keeps them (odd places of `split`)."""
    if not table:
        return re.compile(r"((?!))")
    return re.compile("(" + "|".join(re.escape(key) for key in sorted(table, key=len, reverse=True)) + ")")


def _runs(text: str) -> list[str]:
    return re.findall(f"(?:{re.escape(IMAGE_TOKEN)})+", text)


def _take_out(messages: Sequence[dict[str, Any]], typed: list[Segment]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Copy messages with a stand-in for each typed text, which is added to `typed`; also the pictures, in order."""
    images: list[Any] = []

    def stand_in(text: Any, role: str) -> str:
        if not isinstance(text, str):
            raise ValueError(f"a {role} message's text must be a string, not {type(text).__name__}")
        if text == "":
            return ""
        typed.append(Segment(text, "answer" if role == "assistant" else "user"))
        # A line break in front matters to the template (pictures stand on their own lines), so it stays visible.
        return ("\n" if text.startswith("\n") else "") + f"{_OPEN}{len(typed) - 1}{_CLOSE}"

    copies = []
    for message in messages:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError("a message is a dict with 'role' and 'content'")
        role, content = message["role"], message["content"]
        if isinstance(content, str):
            copies.append({**message, "content": stand_in(content, role)})
            continue
        parts = []
        for part in content:
            if part.get("type") == "text":
                parts.append({"type": "text", "text": stand_in(part["text"], role)})
            elif part.get("type") == "image":
                source = next(
                    (part[key] for key in ("image", "url", "path", "base64") if part.get(key) is not None), None
                )
                if source is None:
                    raise ValueError("an image part needs one of 'image', 'url', 'path' and 'base64'")
                images.append(source)
                parts.append({"type": "image"})
            else:
                parts.append(dict(part))
        copies.append({**message, "content": parts})
    return copies, images


def _put_back(rendered: str, typed: list[Segment]) -> list[Segment]:
    """Cut a rendered string at its stand-ins."""
    segments = []
    for i, piece in enumerate(re.split(f"{_OPEN}(\\d+){_CLOSE}", _guard_line_breaks(rendered, typed))):
        segments.append(typed[int(piece)] if i % 2 else Segment(piece, "template"))
    return [segment for segment in segments if segment.text]


def _guard_line_breaks(rendered: str, typed: list[Segment]) -> str:
    """Drop the visible line break of a stand-in whose text brings its own."""

    def once(match: re.Match[str]) -> str:
        return match[0][1:] if typed[int(match[2])].text.startswith("\n") and match[1] else match[0]

    return re.sub(f"(\n?){_OPEN}(\\d+){_CLOSE}", once, rendered)


def _read_json(path: str, name: str, **kwargs: Any) -> dict[str, Any]:
    options = {
        key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only", "subfolder") if key in kwargs
    }
    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **options)
    return json.loads(Path(found).read_text(encoding="utf-8")) if found else {}


def _load_image_processor(path: str, **kwargs: Any) -> MonoInternVLImageProcessor:
    """Ours if the folder has one; else from an official `config.json`, which holds the tiling."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        settings = _read_json(path, name, **kwargs)
        settings = settings.get("image_processor", settings)
        if settings.get("image_processor_type") == MonoInternVLImageProcessor.__name__:
            return MonoInternVLImageProcessor(**settings)
    config = _read_json(path, "config.json", **kwargs)
    vision = config.get("vision_config", {})
    return MonoInternVLImageProcessor(
        tile_size=config.get("force_image_size") or vision.get("image_size", 448),
        min_tiles=config.get("min_dynamic_patch", 1),
        max_tiles=config.get("max_dynamic_patch", 12),
        use_thumbnail=config.get("use_thumbnail", True),
    )


def _load_tokenizer(path: str, **kwargs: Any) -> Any:
    """`tokenizer.json` as it is; an official folder's `tokenizer.model` is converted (needs the installed package)."""
    options = {
        key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only", "subfolder") if key in kwargs
    }
    if cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **options):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
    model_file = cached_file(path, "tokenizer.model", _raise_exceptions_for_missing_entries=False, **options)
    if model_file is None:
        raise ValueError(f"{path} has neither tokenizer.json nor tokenizer.model")
    try:
        from mono_internvl.tokenization import load_tokenizer
    except ImportError as error:
        raise ImportError(
            f"{path} has only a tokenizer.model: install this package, or run `mono-internvl tokenizer {model_file} {path}`"
        ) from error
    return load_tokenizer(model_file)


MonoInternVLProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["GroundedBox", "MonoInternVLProcessor"]
