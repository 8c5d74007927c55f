"""A request in the forms that vLLM takes -> the parts and placeholders of this model. Needs no vLLM."""

from collections.abc import Mapping
from typing import Any

from ..processing_mono_internvl import IMAGE_TOKEN
from ..tiling_mono_internvl import AUTO, TILE_OPTIONS, check_positive


PLACEHOLDER = f"<img>{IMAGE_TOKEN}</img>"
PICTURE_OPTIONS = (*TILE_OPTIONS, "max_pixels")


def take_max_tiles(
    template_kwargs: Mapping[str, Any], processor_kwargs: Mapping[str, Any] | None, most: int
) -> tuple[dict[str, Any], int | str | None]:
    """A chat's `chat_template_kwargs` -> the same without `max_tiles`, and that.

    A server takes these from any client, `mm_processor_kwargs` only from trusted ones: work that a stranger asks for
    must not be more than the server's own. Fewer tiles are less.

    Args:
        most: the tiles that the server gives a request.

    Raises:
        ValueError: more than those, neither a whole number of at least 1 nor "auto", another option of pictures, or
            `mm_processor_kwargs` beside it.
    """
    left = {name: value for name, value in template_kwargs.items() if name != "max_tiles"}
    if others := [name for name in PICTURE_OPTIONS if name in left]:
        raise ValueError(f"chat_template_kwargs: of the pictures' options only max_tiles, not {', '.join(others)}")
    tiles = template_kwargs.get("max_tiles")
    if tiles is None:
        return left, None
    if tiles != AUTO:
        check_positive("max_tiles", tiles)
    if processor_kwargs:
        raise ValueError(
            "max_tiles is in chat_template_kwargs and there are mm_processor_kwargs: give it once, among the latter"
        )
    if tiles == AUTO:
        # Of a request it keeps within the server's number.
        return left, AUTO
    if tiles > most:
        raise ValueError(f"max_tiles={tiles} is more than the {most} that this server gives a request")
    return left, int(tiles)


def pictures_then_text(message: Any) -> Any:
    """What the content format "string" means: the pictures, and the texts as lines."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, (list, tuple)):
        return message
    texts: list[Any] = []
    others: list[Any] = []
    for part in content:
        is_text = isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str))
        (texts if is_text else others).append(part)
    joined = "\n".join(part if isinstance(part, str) else part["text"] for part in texts)
    return {**message, "content": [*others, *([{"type": "text", "text": joined}] if texts else [])]}


def with_placeholders(prompt: Any) -> Any:
    """A raw prompt whose `<image>` marks are as many as its pictures, with the model's placeholders instead."""
    text, pictures = prompt.get("prompt"), (prompt.get("multi_modal_data") or {}).get("image")
    if not isinstance(text, str) or pictures is None or IMAGE_TOKEN in text:
        return prompt
    several = isinstance(pictures, (list, tuple)) or getattr(pictures, "ndim", 0) == 4
    if text.count("<image>") != (len(pictures) if several else 1):
        return prompt
    return {**prompt, "prompt": text.replace("<image>", PLACEHOLDER)}
