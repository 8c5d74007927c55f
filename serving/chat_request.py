"""The body of a chat completion -> what `chat` is asked. Whatever would have no effect is refused, by its name.

`ChatRequest` says which fields there are; `read_question` checks the conversation and brings its pictures.
"""

import asyncio
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..compat_mono_internvl import check_keywords
from ..image_files_mono_internvl import open_picture
from ..image_pixels_mono_internvl import check_size
from ..prompt_mono_internvl import read_messages
from ..tiling_mono_internvl import AUTO, AutoTiles
from .answer_line import Question
from .picture_sources import PictureSources
from .requests import take_max_tiles


# All pictures of a request have so long to arrive.
_FETCH_SECONDS = 60.0
# What OpenAI's API knows and this server does not do, with the values that ask for nothing. null is always one.
_ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "store": (False,),
    "reasoning_effort": ("none",),
    "audio": (),
    "prediction": (),
    "verbosity": (),
    "web_search_options": (),
}
# What is wrong is said of every one up to here.
_MAX_MESSAGES = 10_000
_DETAILS = ("auto", "high", "low")

Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_read(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        left = {name: value for name, value in data.items() if value is not None}
        for name, nothing in _ASKS_FOR_NOTHING.items():
            if name in left and name not in cls.model_fields and left.pop(name) not in nothing:
                allowed = " or ".join(["null", *map(repr, nothing)])
                raise ValueError(f"{name} is not supported by this server; leave it out (allowed is {allowed})")
        try:
            unknown = [name for name in left if name not in cls.model_fields]
            check_keywords("the request", unknown[:3], cls.model_fields)
        except TypeError as error:
            raise ValueError(str(error)) from error
        return left


class StreamOptions(_Body):
    """How an answer is streamed."""

    include_usage: bool = False


class ChatRequest(_Body):
    """A chat completion, as OpenAI's API writes it.

    Sampling is asked for by a temperature above 0 or a top_p below 1; otherwise the likeliest tokens are taken.
    `skip_special_tokens: false` keeps `<ref>` and `<box>`, and `chat_template_kwargs` takes max_tiles, as in vLLM.
    """

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=_MAX_MESSAGES)]
    model: str | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2, allow_inf_nan=False)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    # For the caller's books; they say nothing about the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None

    @model_validator(mode="after")
    def _agrees(self) -> "ChatRequest":
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens say the same and differ; give one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are of streamed answers; set stream to true or leave them out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which the answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def generation(self) -> dict[str, Any]:
        """What `chat` is told of generation."""
        longest = self.max_completion_tokens or self.max_tokens
        options: dict[str, Any] = {"keep_grounding_tags": not self.skip_special_tokens}
        if longest is not None:
            options["max_new_tokens"] = longest
        if self.temperature == 0:
            return options
        if self.temperature is not None:
            options["temperature"] = self.temperature
        # Clients send a top_p of 1 along, which leaves nothing out and asks for nothing.
        if self.top_p is not None and (self.top_p < 1 or self.temperature is not None):
            options["top_p"] = self.top_p
        return options


@dataclass(frozen=True)
class Limits:
    """What a model can read, and what a server lets it read.

    Attributes:
        context: most tokens of a conversation.
        tile_tokens: least tokens of a picture.
        token_characters: most characters of typed text that a token stands for.
        sources: where pictures may come from.
        max_pixels: of all pictures of a request together, so that they cannot fill the memory.
        max_tiles: of all pictures of a request together; None: the model's.
        most_tiles: what that allows; a request may ask for fewer.
    """

    context: int
    tile_tokens: int
    token_characters: int
    sources: PictureSources
    max_pixels: int
    max_tiles: int | str | None
    most_tiles: int


async def read_question(request: ChatRequest, limits: Limits) -> Question:
    """The question of a request, its pictures fetched and their sizes known, not decoded.

    Raises:
        ValueError: what is wrong with the conversation or a picture, with its place.
        OSError: a picture that cannot be fetched.
    """
    for number, message in enumerate(request.messages, start=1):
        _check_text(message, f"message {number}")
    messages = read_messages(request.messages)
    if messages[-1]["role"] != "user":
        raise ValueError(f"the last message is the {messages[-1]['role']}'s; an answer is given to a user's")
    if others := [key for key in messages[-1] if key not in ("role", "content")]:
        raise ValueError(f"message {len(messages)} (user) holds {others[0]!r}; a question has a role and content")
    _check_length(messages, limits)
    places = _places(messages)
    one_tile = _wants_one_tile(request.messages, places)
    least = len(places) * limits.tile_tokens
    if least >= limits.context:
        limit = f"this model's limit of {limits.context}"
        raise ValueError(f"{len(places)} pictures or videos are at least {least} tokens, more than {limit}")
    try:
        pictures = await asyncio.wait_for(_read(messages, places, limits.sources), _FETCH_SECONDS)
    except asyncio.TimeoutError as error:
        raise ConnectionError(f"the pictures did not arrive within {_FETCH_SECONDS:.0f} s") from error
    await asyncio.to_thread(_check_pixels, places, pictures, limits.max_pixels)
    # Only bytes are handed on: `chat` would read a path.
    for place, data in zip(places, pictures, strict=True):
        messages[place.message]["content"][place.part][place.kind] = data
    options = {**request.generation, "max_pixels": limits.max_pixels}
    if (max_tiles := _max_tiles(request, one_tile, limits)) is not None:
        options["max_tiles"] = max_tiles
    last = messages[-1]["content"]
    parts = [{"type": "text", "text": last}] if isinstance(last, str) else last
    return Question(parts, messages[:-1], options, request.stops, request.seed)


def _check_length(messages: Sequence[Mapping[str, Any]], limits: Limits) -> None:
    """Raise ValueError for a text that is too long however it is cut into tokens: that would take minutes to learn."""
    characters = 0
    for message in messages:
        content = message["content"]
        texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
        characters += sum(map(len, texts))
    if characters > limits.context * limits.token_characters:
        raise ValueError(
            f"the conversation has {characters:,} characters, more than this model's limit of {limits.context} tokens"
        )


class _Place(NamedTuple):
    """Which part of which message (from 0) is an "image" or a "video", and how to say so."""

    message: int
    part: int
    kind: str
    name: str


def _places(messages: Sequence[Mapping[str, Any]]) -> list[_Place]:
    return [
        _Place(number, place, part["type"], f"message {number + 1} ({message['role']}), part {place + 1}")
        for number, message in enumerate(messages)
        if not isinstance(message["content"], str)
        for place, part in enumerate(message["content"])
        if part["type"] != "text"
    ]


async def _read(
    messages: Sequence[Mapping[str, Any]], places: Sequence[_Place], sources: PictureSources
) -> list[bytes]:
    read, left = [], sources.max_bytes
    for place in places:
        source = messages[place.message]["content"][place.part].get(place.kind)
        data = await sources.read(source, place.name, "video" if place.kind == "video" else "picture")
        left -= len(data)
        if left < 0:
            limit = f"the {sources.max_bytes:,} bytes that a request may have (--max-body)"
            raise ValueError(f"{place.name}: up to here the pictures have more than {limit}")
        read.append(data)
    return read


def _check_pixels(places: Sequence[_Place], pictures: Sequence[bytes], max_pixels: int) -> None:
    """Each picture is one, and all of them fit; their files say how large they are. A video's frames are made small one
    after the other."""
    total = 0
    for place, data in zip(places, pictures, strict=True):
        if place.kind != "image":
            continue
        with open_picture(io.BytesIO(data), f"{place.name}: the picture") as image:
            check_size(image.size, f"{place.name}: the picture", max_pixels)
            total += image.width * image.height
        if total > max_pixels:
            limit = f"the {max_pixels:,} that a request may have (--max-pixels)"
            raise ValueError(f"{place.name}: up to here the pictures have {total:,} pixels, more than {limit}")


def _wants_one_tile(given: Sequence[Mapping[str, Any]], places: Sequence[_Place]) -> bool:
    """Whether the pictures are asked for in low detail, which is one tile each, as a video's frames are anyway.

    Raises:
        ValueError: a detail that is not known, or several: a request's pictures share their tiles.
    """
    low = []
    for place in places:
        part = given[place.message]["content"][place.part]
        link = part.get("image_url")
        detail = (link.get("detail") if isinstance(link, Mapping) else None) or part.get("detail") or "auto"
        if detail not in _DETAILS:
            raise ValueError(f"{place.name}: detail {detail!r} is not known; allowed are {', '.join(_DETAILS)}")
        low += [detail == "low"] * (place.kind == "image")
    if any(low) and not all(low):
        raise ValueError("all pictures of a request share their tiles: give each the detail low, or none of them")
    return bool(low) and all(low)


def _max_tiles(request: ChatRequest, one_tile: bool, limits: Limits) -> Any:
    """What `chat` is told of tiles: what the request asks for, else what the server was started with."""
    left, asked = take_max_tiles(request.chat_template_kwargs or {}, None, limits.most_tiles)
    if left:
        raise ValueError(f"chat_template_kwargs: {next(iter(left))!r} is not known; allowed is max_tiles")
    if asked is not None and one_tile:
        raise ValueError(
            "the detail low is one tile a picture, and chat_template_kwargs gives max_tiles; give one of them"
        )
    if one_tile:
        return 1
    if asked is None:
        return limits.max_tiles
    return AutoTiles(limits.most_tiles) if asked == AUTO else asked


def _check_text(value: Any, where: str) -> None:
    """JSON can write half of a character, which no text holds."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: half of a surrogate pair at character {error.start} is no text") from error
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _check_text(key, where)
            _check_text(inner, where)
    elif isinstance(value, list):
        for inner in value:
            _check_text(inner, where)
