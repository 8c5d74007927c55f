"""What a prompt costs, without its pixels: a mixin of the processor, for engines, samplers and whoever plans.

share_tiles                   the rule by which the pictures of one prompt share its tiles
count_tokens                  tokens of a conversation whose pictures are known by their sizes alone
chat_token_ids                its ids where an engine holds the pictures
_get_num_multimodal_tokens    what transformers and the engines ask
"""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

from transformers.processing_utils import MultiModalData

from .chat_template_mono_internvl import (
    ALWAYS_VARIABLES,
    render_by_origin,
    template_extras,
    template_source,
    template_variables,
)
from .compat_mono_internvl import check_keywords
from .conversation_mono_internvl import read_conversations, with_queries
from .encoding_mono_internvl import encode
from .image_processing_mono_internvl import Frame
from .processing_options_mono_internvl import is_read
from .tiling_mono_internvl import TILE_OPTIONS, AutoTiles
from .video_mono_internvl import VIDEO_OPTIONS, count_frames


class CountingMixin:
    """For a processor with `image_processor`, `tokenizer` and a vocabulary."""

    image_processor: Any
    tokenizer: Any
    chat_template: Any
    num_learnable_queries: int
    query_placement: str

    def share_tiles(self, image_options: dict[str, Any], count: int, frames: int = 0) -> dict[str, Any]:
        """The `count` pictures of one prompt share its budget of tiles, of which each frame of a video takes one.

        Of "auto" it is the number that it never exceeds which is shared.
        """
        budget = image_options.get("max_tiles", self.image_processor.max_tiles)
        share = max(1, (self.image_processor.tile_limit(budget) - frames) // max(count, 1))
        if count + frames <= 1:
            return image_options
        shared = {**image_options, "max_tiles": share if isinstance(budget, Integral) else AutoTiles(share)}
        if "min_tiles" in shared:
            shared["min_tiles"] = min(shared["min_tiles"], shared["max_tiles"])
        return shared

    def count_tokens(
        self,
        messages: Sequence[dict[str, Any]],
        sizes: Sequence[tuple[int, int]],
        *,
        max_tiles: int | str | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
    ) -> int:
        """Tokens of one conversation, as `apply_chat_template(..., tokenize=True)` would give, without its pixels.

        Args:
            messages: as there; pictures are not opened, and of videos only what says how many frames they have.
            sizes: width and height in pixels of each picture as it is seen (EXIF rotation applied); frames of videos
                have none.
            max_tiles: budget of the conversation's pictures; default: the image processor's.
            num_frames, fps: of its videos, as in `apply_chat_template`.

        Raises:
            ValueError: sizes and pictures differ in number (both are named), or what `apply_chat_template` refuses.
        """

        def tokens(pictures: Sequence[Any]) -> list[int]:
            frames = sum(isinstance(picture, Frame) for picture in pictures)
            if len(pictures) - frames != len(sizes):
                raise ValueError(f"{len(pictures) - frames} pictures in the messages for {len(sizes)} sizes")
            options = self.share_tiles({} if max_tiles is None else {"max_tiles": max_tiles}, len(sizes), frames)
            left = iter(sizes)
            tiles = [1 if isinstance(picture, Frame) else self._tiles(next(left), options) for picture in pictures]
            return [count * self.image_processor.patches_per_tile for count in tiles]

        return len(self._ids_without_pixels(messages, None, {}, tokens, {"num_frames": num_frames, "fps": fps}))

    def _read(self, *conversations: Any) -> list[tuple[list[dict[str, Any]], list[tuple[str, Any]]]]:
        """`read_conversations`, with the places of learnable queries where there are some."""
        found = read_conversations(*conversations)
        if not self.num_learnable_queries:
            return found
        return [(with_queries(messages, self.query_placement), pictures) for messages, pictures in found]

    def _tiles(self, size: Sequence[int], options: dict[str, Any]) -> int:
        return self.image_processor.get_number_of_tiles(size[1], size[0], **options)

    def _ids_without_pixels(
        self,
        messages: Sequence[dict[str, Any]],
        chat_template: str | None,
        variables: dict[str, Any],
        tokens: Callable[[Sequence[Any]], list[int]] | None,
        sampling: dict[str, Any],
    ) -> list[int]:
        """One conversation's ids, pictures unopened. `tokens`: its pictures, each None or a `Frame` -> visual tokens of
        each; None leaves placeholders as they stand."""
        source = template_source(self.chat_template, chat_template)
        variables = {name: value for name, value in variables.items() if value is not None}
        check_keywords("the chat template", variables, [*template_variables(source), *ALWAYS_VARIABLES])
        extras = template_extras(source, variables.pop("tools", None), variables.pop("documents", None))
        variables = {**variables, **extras}

        ((plain, pictures),) = self._read([messages], False, None, source, frame_counter(sampling))
        vocabulary = self._vocabulary(source)  # type: ignore[attr-defined]
        rendered = render_by_origin(self.tokenizer, plain, source, variables, vocabulary)
        prompt = self._with_bos(rendered)  # type: ignore[attr-defined]
        counts = None if tokens is None else tokens([picture for _, picture in pictures])
        return encode(prompt, counts, vocabulary, self.num_learnable_queries)[0]

    def chat_token_ids(
        self, messages: Sequence[dict[str, Any]], chat_template: str | None = None, **variables: Any
    ) -> list[int]:
        """The `input_ids` of one conversation whose pictures an engine holds: one placeholder stands for each.

        Image parts need only their type; otherwise as `apply_chat_template` with `tokenize=True`, and as safe.
        """
        return self._ids_without_pixels(messages, chat_template, variables, None, {})

    def _get_num_multimodal_tokens(self, image_sizes: Sequence[Any] | None = None, **kwargs: Any) -> MultiModalData:
        """Visual tokens and tiles of pictures given by (height, width): each a prompt of its own with a whole budget of
        tiles, or in lists, of which each is a prompt whose pictures share it. Flat results, in order.

        Raises:
            TypeError: an unknown option.
        """
        given = {name: value for name, value in kwargs.items() if is_read(name, value, "_get_num_multimodal_tokens")}
        options = {name: given[name] for name in TILE_OPTIONS if name in given}
        if image_sizes is None:
            return MultiModalData()
        tiles = []
        for entry in image_sizes:
            sizes: Any = entry if len(entry) and isinstance(entry[0], Sequence) else [entry]
            shared = self.share_tiles(options, len(sizes))
            tiles += [self._tiles((width, height), shared) for height, width in sizes]
        tokens = [count * self.image_processor.patches_per_tile for count in tiles]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=tiles)


def frame_counter(options: dict[str, Any]) -> Callable[[dict[str, Any]], list[Frame]]:
    """What gives as many frames as a part's video will have, without their pictures."""
    return lambda part: [Frame(None)] * count_frames(part["video"], **sampling_of(part, options))


def sampling_of(part: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """How a video is sampled: as its part says, and where it says nothing as the call does."""
    own = {name: part[name] for name in VIDEO_OPTIONS if name in part}
    return own or {name: options[name] for name in VIDEO_OPTIONS if options.get(name) is not None}
