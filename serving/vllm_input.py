"""vLLM's input side: folder -> configuration and tokenizer, request -> the ids and pixels that `generate` would get.

OwnFolders         config.json of either layout -> the configuration the engine is given
EngineSettings     choices that belong to this model: its tokenizer mode, no float16
ChatTokenizer      a chat template that tells typed text from control tokens
ChatRenderer       lets it give ids at once, because a finished string no longer shows what was typed; `max_tiles`
                   of a request
PictureProcessor   pictures -> tiles; one placeholder per picture -> as many as it has visual tokens
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from transformers import BatchFeature, PreTrainedConfig, TokenizersBackend
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams
from vllm.tokenizers.hf import get_cached_tokenizer

from ..common.engines import check_tokens
from ..configuration_mono_internvl import MonoInternVLConfig
from ..processing_mono_internvl import MonoInternVLProcessor
from ..tiling_mono_internvl import AUTO, AutoTiles
from .checkpoint import is_mono_internvl, serving_config
from .requests import PICTURE_OPTIONS, PLACEHOLDER, pictures_then_text, take_max_tiles, with_placeholders
from .vllm_plugin import TOKENIZER_MODE


# -------------------------------------------------------------------------------------------- the folder's small files


class OwnFolders:
    """Mixed into a parser of Hugging Face folders: takes those of this model, in both layouts, and no others."""

    def parse(self, model, trust_remote_code, revision=None, code_revision=None, **kwargs):  # type: ignore[no-untyped-def]
        """(config.json as a dict, configuration); for any other model what the parser says that this is mixed into."""
        try:
            config, _ = PreTrainedConfig.get_config_dict(
                model, revision=revision, token=kwargs.get("token"), local_files_only=HF_HUB_OFFLINE
            )
        except (OSError, ValueError):
            config = {}  # the other parser says what is wrong with it
        if not is_mono_internvl(config):
            return super().parse(model, trust_remote_code, revision, code_revision, **kwargs)  # type: ignore[misc]
        served = serving_config(config)
        served.name_or_path = str(model)
        return config, served


def with_own_folders(parser: type) -> type:
    """A parser that takes this model's folders and is otherwise the one given, which is left as it is."""
    if issubclass(parser, OwnFolders):
        return parser
    return type(f"OwnFolders{parser.__name__}", (OwnFolders, parser), {"__module__": __name__})


class EngineSettings(VerifyAndUpdateConfig):
    """What vLLM's options become for this model."""

    @staticmethod
    def verify_and_update_model_config(model_config) -> None:  # type: ignore[no-untyped-def]
        """Choose our tokenizer mode unless the caller named one.

        Raises:
            ValueError: float16, in which activations overflow to NaN.
        """
        if model_config.dtype == torch.float16:
            raise ValueError("Mono-InternVL overflows to NaN in float16: use --dtype bfloat16 or float32")
        if model_config.tokenizer_mode == "auto":
            model_config.tokenizer_mode = TOKENIZER_MODE


@lru_cache(maxsize=4)
def load_processor(path: str, revision: str | None) -> MonoInternVLProcessor:
    """The processor of a folder of either layout; an official `tokenizer.model` is converted once per process."""
    return MonoInternVLProcessor.from_pretrained(path, revision=revision or "main")


class ChatTokenizer:
    """Mixed into the folder's tokenizer: chats are rendered by the processor, which knows what was typed."""

    processor: MonoInternVLProcessor

    def apply_chat_template(  # type: ignore[no-untyped-def]
        self, conversation, tools=None, chat_template=None, tokenize=True, return_dict=False, **kwargs
    ):
        """As in transformers, without pictures: ids hold one placeholder for each.

        Raises:
            ValueError: tools for a template that would leave them out.
        """
        if tools and "tools" not in (chat_template or self.chat_template):  # type: ignore[attr-defined]
            raise ValueError("the chat template has no place for tools; leave them out or give a template that has")
        if not tokenize:
            return self.processor.apply_chat_template(conversation, chat_template, tools=tools, **kwargs)
        ids = self.processor.chat_token_ids(conversation, chat_template, tools=tools, **kwargs)
        return {"input_ids": ids} if return_dict else ids


class ChatTokenizersBackend(ChatTokenizer, TokenizersBackend):  # type: ignore[misc]
    """The tokenizer of every folder so far; found by its name, so that it can be pickled."""


def chat_tokenizer(processor: MonoInternVLProcessor) -> ChatTokenizer:
    """A tokenizer of its own, which the engine may set up as it likes while the processor works in other threads.

    A new object of a subclass with a copy of the state: the processor's tokenizer keeps its class, and shares nothing.
    """
    kind = type(processor.tokenizer)
    name = f"Chat{kind.__name__}"
    if name not in globals():
        globals()[name] = type(name, (ChatTokenizer, kind), {"__module__": __name__})
    tokenizer: Any = object.__new__(globals()[name])
    vars(tokenizer).update(vars(copy.deepcopy(processor.tokenizer)))
    tokenizer.processor, tokenizer.chat_template = processor, processor.chat_template
    return tokenizer


class ChatTokenizerLoader:
    """What vLLM's tokenizer registry asks for a tokenizer."""

    @classmethod
    def from_pretrained(cls, path, *args, revision=None, truncation_side=None, **kwargs):  # type: ignore[no-untyped-def]
        tokenizer: Any = chat_tokenizer(load_processor(str(path), revision))
        tokenizer.name_or_path = str(path)
        if truncation_side is not None:
            tokenizer.truncation_side = truncation_side
        return get_cached_tokenizer(tokenizer)


class ChatRenderer(HfRenderer):
    """vLLM's renderer, which would encode the finished string; here chats become ids in one step."""

    def render_messages(self, messages, params):  # type: ignore[no-untyped-def]
        params, options = self._picture_options(params)
        conversation, prompt = super().render_messages(*self._for_our_template(messages, params))
        return conversation, self._with_options(prompt, options)

    async def render_messages_async(self, messages, params):  # type: ignore[no-untyped-def]
        params, options = self._picture_options(params)
        conversation, prompt = await super().render_messages_async(*self._for_our_template(messages, params))
        return conversation, self._with_options(prompt, options)

    def _picture_options(self, params: ChatParams) -> tuple[ChatParams, dict[str, int]]:
        """What is left for the template, and the picture options that `max_tiles` of the request stands for.

        Raises:
            ValueError: see `take_max_tiles`.
        """
        if not any(name in params.chat_template_kwargs for name in PICTURE_OPTIONS):
            return params, {}
        info: Any = self.get_mm_processor().info
        left, tiles = take_max_tiles(params.chat_template_kwargs, params.mm_processor_kwargs, info.max_tiles())
        options = {} if tiles is None else info.options_of_at_most(tiles)
        return replace(params, chat_template_kwargs=left), options

    @staticmethod
    def _with_options(prompt: Any, options: dict[str, Any]) -> Any:
        return {**prompt, "mm_processor_kwargs": options} if options and "multi_modal_data" in prompt else prompt

    def _for_our_template(self, messages: list[Any], params: ChatParams) -> tuple[list[Any], ChatParams]:
        params = replace(params, chat_template_kwargs={**params.chat_template_kwargs, "tokenize": True})
        if params.chat_template_content_format == "string" and params.chat_template is None:
            # As a string vLLM's own placeholders would be typed text; the template makes the same of parts.
            messages = [pictures_then_text(message) for message in messages]
            params = replace(params, chat_template_content_format="openai")
        return messages, params

    def _tokenize_singleton_prompt(self, prompt, params):  # type: ignore[no-untyped-def]
        return super()._tokenize_singleton_prompt(with_placeholders(prompt), params)

    async def _tokenize_singleton_prompt_async(self, prompt, params):  # type: ignore[no-untyped-def]
        return await super()._tokenize_singleton_prompt_async(with_placeholders(prompt), params)


# ------------------------------------------------------------------------------------------------------------ pictures


class PictureInfo(BaseProcessingInfo):
    """Sizes that vLLM plans with."""

    def get_hf_config(self) -> MonoInternVLConfig:
        return self.ctx.get_hf_config(MonoInternVLConfig)

    def get_hf_processor(self, **kwargs: object) -> MonoInternVLProcessor:
        """
        Raises:
            ValueError: the tokenizer's control tokens are not those of the configuration; as `check_tokens`.
        """
        model = self.ctx.model_config
        processor = load_processor(model.model, model.revision)
        check_tokens(self.get_hf_config(), processor, model.model)
        return processor

    def parse_mm_data(self, mm_data, **kwargs):  # type: ignore[no-untyped-def]
        """
        Raises:
            ValueError: a tensor, which vLLM takes for embeddings.
        """
        pictures = mm_data.get("image")
        first = pictures[0] if isinstance(pictures, (list, tuple)) and pictures else pictures
        if isinstance(first, torch.Tensor) and not self.ctx.get_mm_config().enable_mm_embeds:
            raise ValueError(
                f"the picture is a tensor of shape {list(first.shape)}, which vLLM takes for embeddings; give a PIL "
                "image or a numpy array [height, width, channels]"
            )
        return super().parse_mm_data(mm_data, **kwargs)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def tile_options(self, kwargs: Mapping[str, object]) -> dict[str, Any]:
        """The server's and the request's `mm_processor_kwargs` as options of the image processor.

        Raises:
            ValueError: an option that is not one of `PICTURE_OPTIONS`.
        """
        options = self.ctx.get_merged_mm_kwargs(kwargs)
        unknown = [name for name in options if name not in PICTURE_OPTIONS]
        if unknown:
            raise ValueError(
                f"mm_processor_kwargs: {', '.join(unknown)} not known; allowed are {', '.join(PICTURE_OPTIONS)}"
            )
        if options.get("max_tiles") == AUTO:
            # Of a request it keeps within the server's number, which it takes the place of.
            server = self.ctx.get_merged_mm_kwargs({}).get("max_tiles")
            options["max_tiles"] = AutoTiles(self.get_hf_processor().image_processor.tile_limit(server))
        return options

    def max_tiles(self) -> int:
        """The most tiles of a request that asks for nothing."""
        return self.get_hf_processor().image_processor.tile_limit(self.tile_options({}).get("max_tiles"))

    def options_of_at_most(self, tiles: int | str) -> dict[str, Any]:
        """`mm_processor_kwargs` of a request for fewer tiles; they come before the server's `min_tiles`."""
        if isinstance(tiles, str):
            return {"max_tiles": tiles}
        low = self.tile_options({}).get("min_tiles", 1)
        return {"max_tiles": tiles} if low <= tiles else {"max_tiles": tiles, "min_tiles": tiles}

    def largest_picture(self) -> tuple[int, int]:
        """(width, height) of a picture that gets every tile there is: one row of `max_tiles` squares."""
        side = self.get_hf_processor().image_processor.tile_size
        return self.max_tiles() * side, side

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        processor = self.get_hf_processor()
        width, height = self.largest_picture()
        options = {name: value for name, value in self.tile_options({}).items() if name != "max_pixels"}
        tiles = processor.image_processor.get_number_of_tiles(height, width, **options)
        return {"image": tiles * processor.tokens_per_tile}


class LargestInputs(BaseDummyInputsBuilder[PictureInfo]):
    """The inputs that vLLM measures memory with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, MultiModalDummyOptions]
    ) -> MultiModalDataDict:
        width, height = self.info.largest_picture()
        count, overrides = mm_counts.get("image", 0), mm_options.get("image")
        images = self._get_dummy_images(width=width, height=height, num_images=count, overrides=overrides)  # type: ignore[arg-type]
        return {"image": images}


class PictureProcessor(BaseMultiModalProcessor[PictureInfo]):
    """Pictures of a request -> `pixel_values` [tiles, patches, 3*28*28] and `num_tiles` [pictures]."""

    def apply(self, inputs, timing_ctx):  # type: ignore[no-untyped-def]
        """Share the request's tiles among its pictures, as `MonoInternVLProcessor` does.

        Each picture is then made, and cached, on its own; its share is part of the cache's key.

        A run of placeholders, as the released code writes it, stands for one picture, as it does in the processor.

        Raises:
            ValueError: the prompt's placeholders, or their runs, are not one for each picture; says what to write.
        """
        pictures = inputs.mm_data_items.get_all_counts().get("image", 0)
        token, ids = self.info.get_hf_config().image_token_id, inputs.prompt
        if (placeholders := ids.count(token)) != pictures:
            one_each = [id for i, id in enumerate(ids) if id != token or i == 0 or ids[i - 1] != token]
            if one_each.count(token) != pictures:
                raise ValueError(
                    f"{placeholders} image placeholders in the prompt for {pictures} pictures: write {PLACEHOLDER} "
                    "where each picture stands, once for each; a chat template of your own must loop over a message's "
                    "parts and write that for each part of type image"
                )
            inputs = replace(inputs, prompt=one_each)
        options = self.info.tile_options(inputs.hf_processor_mm_kwargs)
        shared = self.info.get_hf_processor().share_tiles(options, pictures)
        return super().apply(replace(inputs, hf_processor_mm_kwargs=shared), timing_ctx)

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        options = self.info.tile_options(hf_kwargs)
        features = self.info.get_hf_processor().image_processor(hf_data["images"], return_tensors="pt", **options)
        return BatchFeature(
            {
                "pixel_values": features["pixel_values"].to(self.info.ctx.model_config.dtype),
                "num_tiles": torch.as_tensor(features["num_tiles"]),
            }
        )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        tiles = hf_inputs.get("num_tiles", torch.empty(0, dtype=torch.int64))
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", tiles),
            "num_tiles": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        processor = self.info.get_hf_processor()

        def visual_tokens(picture: int) -> list[int]:
            tiles = out_mm_kwargs["image"][picture]["num_tiles"].data
            return [processor.image_token_id] * (int(tiles) * processor.tokens_per_tile)

        return [PromptReplacement(modality="image", target=[processor.image_token_id], replacement=visual_tokens)]
