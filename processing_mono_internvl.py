"""Messages + pictures -> `input_ids` and `pixel_values`; generated ids -> text and boxes.

A conversation is read (`conversation_`), rendered and cut by who wrote what (`chat_template_`), and encoded stretch by
stretch (`encoding_`), so that typed text never becomes a control token. A string that comes already rendered
(`processor(text=...)`) is trusted.
"""

import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .chat_template_mono_internvl import (
    ALWAYS_VARIABLES,
    Segment,
    render,
    render_by_origin,
    template_extras,
    template_source,
    template_variables,
)
from .configuration_checks_mono_internvl import check_placement, without_unused
from .conversation_mono_internvl import (
    check_given,
    list_conversations,
    marked_conversation,
)
from .counting_mono_internvl import CountingMixin, frame_counter, sampling_of
from .encoding_mono_internvl import MonoInternVLInputs, deal_out, encode, pad, placed, truncate
from .image_loading_mono_internvl import prefixed
from .image_processing_mono_internvl import Frame
from .processing_options_mono_internvl import IMAGE_OPTIONS, collect_options
from .processor_loading_mono_internvl import load_parts
from .video_mono_internvl import VIDEO_OPTIONS, read_frames
from .vocabulary_mono_internvl import (
    IMAGE_END,
    IMAGE_START,
    IMAGE_TOKEN,
    QUERY_TOKEN,
    AnswerDecoder,
    Vocabulary,
    checked_backend,
    vocabulary_of,
)


logger = logging.getLogger(__name__)


# No tag reaches over another of its kind, so that an unfinished one does not swallow the next.
_GROUNDED = re.compile(r"(?:<ref>((?:(?!</?ref>).)*)</ref>\s*)?<box>((?:(?!</?box>).)*)</box>", re.DOTALL)
_FOUR_NUMBERS = re.compile(r"\[\s*" + r"\s*,\s*".join([r"(-?\d+(?:\.\d+)?)"] * 4) + r"\s*\]")


class GroundedBox(NamedTuple):
    """A `<ref>` with one of its boxes, in pixels of the original picture."""

    label: str
    box: tuple[float, float, float, float]


class MonoInternVLProcessor(CountingMixin, ProcessorMixin):
    """Image processor and tokenizer in one.

    Args:
        image_processor: makes tiles and patches.
        tokenizer: a fast tokenizer with `<img>`, `</img>`, `<IMG_CONTEXT>` and tokens that mark turns (`TURNS`).
        chat_template: default is the template beside this file, `internlm2-chat` or that of another base.
        num_learnable_queries, query_placement: the model's, see `MonoInternVLConfig`.

    Raises:
        ValueError: the tokenizer lacks tokens, those that the chat template marks turns with among them; named.
    """

    def __init__(  # type: ignore[no-untyped-def]
        self,
        image_processor=None,
        tokenizer=None,
        chat_template: str | None = None,
        num_learnable_queries: int = 0,
        query_placement: str = "image",
        **kwargs: Any,
    ):
        if chat_template is None:
            beside = Path(__file__).with_name("chat_template.jinja")
            chat_template = beside.read_text(encoding="utf-8") if beside.exists() else None
        self.image_token, self.image_start, self.image_end = IMAGE_TOKEN, IMAGE_START, IMAGE_END
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        if tokenizer is not None:
            checked_backend(tokenizer, self._own_templates())
        check_placement(num_learnable_queries, query_placement)
        self.num_learnable_queries, self.query_placement = num_learnable_queries, query_placement
        if num_learnable_queries and tokenizer is not None and self.query_token_id is None:
            raise ValueError(f"num_learnable_queries={num_learnable_queries} need {QUERY_TOKEN} in the tokenizer")

    def _vocabulary(self, chat_template: str | None = None) -> Vocabulary:
        """The tokenizer's tokens as they are now; `chat_template` beside the processor's own."""
        return vocabulary_of(self.tokenizer, (chat_template or "") + self._own_templates())

    def _own_templates(self) -> str:
        own = self.chat_template if isinstance(self.chat_template, dict) else {"": self.chat_template or ""}
        return "".join(own.values())

    @property
    def image_token_id(self) -> int:
        """The id of `<IMG_CONTEXT>`."""
        return self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    @property  # type: ignore[misc]
    def image_token_ids(self) -> list[int]:  # type: ignore[override]
        """The ids of `<IMG_CONTEXT>`, `<img>` and `</img>`."""
        return self.tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, IMAGE_START, IMAGE_END])

    @property
    def query_token_id(self) -> int | None:
        """The id of `<QUERY_CONTEXT>` where there are learnable queries."""
        return checked_backend(self.tokenizer).token_to_id(QUERY_TOKEN) if self.num_learnable_queries else None

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile."""
        return self.image_processor.patches_per_tile

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an answer: the tokenizer's own (`</s>`) and those of turns (`<|im_end|>`, `<|im_start|>`)."""
        ends = dict.fromkeys([self.tokenizer.eos_token_id, *self._vocabulary().end_ids])
        return [token for token in ends if token is not None]

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
        return load_parts(cls.__name__, pretrained_model_name_or_path, **kwargs)

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        names = ("num_learnable_queries", "query_placement")
        return without_unused(super().to_dict(*args, **kwargs), names[0], names)

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
        options = collect_options(
            self.tokenizer, self.image_processor, {"return_tensors": return_tensors, **kwargs}, "the processor"
        )
        if given := [name for name in VIDEO_OPTIONS if name in options]:
            raise ValueError(f"{given[0]} is for videos, which stand in messages: call apply_chat_template")
        return_tensors = options.pop("return_tensors", None)
        if text is None:
            image_options = {key: options[key] for key in IMAGE_OPTIONS if key in options}
            features = self.image_processor(images, return_tensors=return_tensors, **image_options)
            return BatchFeature({"pixel_values": placed(features["pixel_values"], options)})
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(prompt, str) for prompt in texts):
            raise ValueError("text must be a string or a list of at least one string")
        add_bos = options.pop("add_special_tokens", True)
        prompts = [[Segment(prompt, "template")] for prompt in texts]
        if add_bos:
            prompts = [self._with_bos(prompt) for prompt in prompts]
        pictures = deal_out(images, prompts)
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
                Content is a string or a list of `{"type": "text", "text"}`, `{"type": "image", "image" | "url" |
                "path" | "base64"}` and `{"type": "video", "video" | "url" | "path"}`, of whose frames each is a picture
                of one tile; several pictures in one image part are a part each. With `tokenize=True` typed text, that
                of tools and documents included, never becomes a control token; `<ref>`, `<box>`, `<quad>` and tokens
                that were added to the tokenizer are content and do.
            chat_template: another template than the processor's own.
            return_assistant_tokens_mask: add `assistant_masks`, 1 where the template says that an assistant writes
                (`{% generation %}`; else at each answer and its `<|im_end|>`), pictures excepted.
            tools: schemas or Python functions, written as InternLM2 has them.
            documents: for templates that have a place for them.
            images: pictures for parts that hold none, in order; one list per conversation where there are several.
            add_generation_prompt: open the answer.
            continue_final_message: leave the last message open, to be continued.
            processor_kwargs: options of `__call__`, and `num_frames` or `fps` of the videos, of which what a part says
                itself comes first (`read_frames`); they may also be given directly.
            **kwargs: the template's own variables.

        Returns:
            The rendered string(s); with `tokenize=True` the `input_ids`, or with `return_dict=True` all inputs; one
            conversation is a batch of one.

        Raises:
            TypeError: an option that neither `__call__` nor the template knows; names the nearest known one.
            ValueError: a message that is not understood or that the template refuses or would leave something out of,
                tools or documents for a template without a place for them, or what `__call__` refuses.
        """
        source = template_source(self.chat_template, chat_template)
        given, variables = self._sort_keywords(kwargs, template_variables(source))
        given = {"return_tensors": None if return_tensors == "auto" else return_tensors, **given}
        processor_kwargs = dict(processor_kwargs or {})
        beside = processor_kwargs.pop("images", None)
        if images is not None and beside is not None:
            raise ValueError("images are given twice, directly and in processor_kwargs")
        options = collect_options(
            self.tokenizer,
            self.image_processor,
            {**given, "processor_kwargs": processor_kwargs},
            "apply_chat_template",
            (*ALWAYS_VARIABLES, "chat_template", "return_dict", "return_assistant_tokens_mask"),
        )
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "continue_final_message goes on with the last message and add_generation_prompt begins one"
            )
        if return_assistant_tokens_mask and tokenize and not return_dict:
            raise ValueError("assistant_masks are returned beside the ids: give return_dict=True")
        variables |= {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        variables.update(template_extras(source, tools, documents))
        conversations, batched = list_conversations(conversation)
        frames_of = self._frame_reader(options) if tokenize else frame_counter(options)
        found = self._read(conversations, batched, images if beside is None else beside, source, frames_of)
        if not tokenize:
            rendered = [render(self.tokenizer, messages, source, variables) for messages, _ in found]
            return rendered if batched else rendered[0]
        return_tensors = options.pop("return_tensors", None)
        add_bos = options.pop("add_special_tokens", True)
        vocabulary = self._vocabulary(source)
        prompts, pictures = [], []
        for number, (messages, sources) in enumerate(found, start=1):
            check_given(sources, f"conversation {number}, " if batched else "")
            prompt = render_by_origin(
                self.tokenizer, messages, source, variables, vocabulary, return_assistant_tokens_mask
            )
            prompts.append(self._with_bos(prompt) if add_bos else prompt)
            pictures.append([picture for _, picture in sources])
        inputs = self._encode_batch(
            prompts, pictures, options, return_tensors, vocabulary, answer_mask=return_assistant_tokens_mask
        )
        return inputs if return_dict else inputs["input_ids"]

    def _with_bos(self, prompt: list[Segment]) -> list[Segment]:
        """Put `<s>` in front unless the prompt, not its user, has it there."""
        bos = self.tokenizer.bos_token or ""
        begun = bool(prompt) and prompt[0].origin == "template" and prompt[0].text.startswith(bos)
        return prompt if begun else [Segment(bos, "template"), *prompt]

    conversation = staticmethod(marked_conversation)

    def _sort_keywords(self, given: dict[str, Any], variables: frozenset[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Keywords of `apply_chat_template`: options of `__call__`, and variables that the template reads."""
        for_template = {name: value for name, value in given.items() if name in variables}
        # Newer transformers sanitise on request; here it is always so.
        options = {k: v for k, v in given.items() if k not in variables and k != "sanitize_control_tokens"}
        return options, for_template

    def _frame_reader(self, options: dict[str, Any]) -> Callable[[dict[str, Any]], list[Frame]]:
        """What makes frames of a part with a video, under the options of a call."""
        used = {"max_pixels": self.image_processor.max_pixels, "convert_to_srgb": self.image_processor.convert_to_srgb}
        used |= {name: options[name] for name in used if options.get(name) is not None}

        def frames_of(part: dict[str, Any]) -> list[Frame]:
            return read_frames(part["video"], side=self.image_processor.tile_size, **used, **sampling_of(part, options))

        return frames_of

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
        image_options = {key: options[key] for key in IMAGE_OPTIONS if options.get(key) is not None}
        rows: dict[str, list[list[int]]] = {"input_ids": [], "assistant_masks": []}
        pixels = []
        for number, (prompt, images) in enumerate(zip(prompts, pictures, strict=True), start=1):
            tokens = None
            if images:
                frames = sum(isinstance(image, Frame) for image in images)
                shared = self.share_tiles(image_options, len(images) - frames, frames)
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
            ids, answers = encode(prompt, tokens, vocabulary, self.num_learnable_queries)
            if options.get("truncation") not in (None, False, "do_not_truncate"):
                ids, answers = truncate(self.tokenizer, vocabulary.visual_ids, ids, answers, options.get("max_length"))
            rows["input_ids"].append(ids)
            rows["assistant_masks"].append(answers)

        data: dict[str, Any] = pad(self.tokenizer, rows, options, return_tensors)
        if not answer_mask:
            data.pop("assistant_masks")
        if options.get("return_mm_token_type_ids"):
            placeholder = vocabulary.image_token_id
            data["mm_token_type_ids"] = [[int(i == placeholder) for i in row] for row in data["input_ids"]]
        if options.get("return_attention_mask") is False:
            data.pop("attention_mask")
        if pixels:
            stacked = torch.cat(pixels)
            data["pixel_values"] = placed(stacked, options) if return_tensors == "pt" else stacked.numpy()
        inputs = MonoInternVLInputs(data, tensor_type=return_tensors)
        placeholders = (vocabulary.image_token_id, self.query_token_id)
        inputs.placeholder_ids = tuple(token for token in placeholders if token is not None)
        return inputs

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


MonoInternVLProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["GroundedBox", "MonoInternVLProcessor"]
