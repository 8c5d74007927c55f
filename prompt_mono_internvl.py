"""Messages and `<image>` marks: what people hand over -> plain messages whose parts say where each picture stands.

    read_messages     one conversation, in the forms that clients send -> {"role", "content": str | [parts]}
    marked_parts      a string whose `<image>` marks stand for pictures -> parts
    place_images      marks in front of a string that has none

A part is `{"type": "text", "text": str}` or `{"type": "image", "image": source}`; `{"type": "image"}` alone is a
picture that is given elsewhere. Only a string is ever searched for marks, and only where pictures come with it.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any


IMAGE_MARK = "<image>"

_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image", "image_url", "input_image", "image_pil")
# Keys that hold the picture of a part, in the order in which they are looked at.
_SOURCE_KEYS = ("image", "image_url", "url", "path", "base64", "image_pil")
# Hints to other models or to a cache, which change nothing that is seen.
_HINTS = ("detail", "cache_control")


def place_images(prompt: str, count: int) -> str:
    """Put marks for `count` pictures in front of a prompt that has none; check the number if it has some.

    Raises:
        ValueError: naming both counts.
    """
    marks = prompt.count(IMAGE_MARK)
    if count < 0 or (marks and marks != count):
        raise ValueError(
            f"{marks} {IMAGE_MARK} marks in the prompt, but {max(count, 0)} pictures for it; give as many as marks, "
            "those of the history included"
        )
    if marks or count == 0:
        return prompt
    if count == 1:
        return f"{IMAGE_MARK}\n{prompt}"
    return "".join(f"Image-{i + 1}: {IMAGE_MARK}\n" for i in range(count)) + prompt


def marked_parts(text: str, pictures: Sequence[Any]) -> str | list[dict[str, Any]]:
    """A string and its pictures as parts; without pictures the string as it is, in which the mark is a word.

    Pictures without a mark go in front, as `place_images` puts them. The leading text part, even an empty one, says
    that the string sets its own line breaks.

    Raises:
        ValueError: marks and pictures differ in number; names both.
    """
    if not pictures:
        return text
    first, *others = place_images(text, len(pictures)).split(IMAGE_MARK)
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}]
    for picture, following in zip(pictures, others, strict=True):
        parts += [{"type": "image", "image": picture}, {"type": "text", "text": following}]
    return parts


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """One conversation as plain messages; what is passed in is not changed.

    Args:
        messages: a sequence of mappings (or of objects with `role` and `content`). Content is a string, or a sequence
            of parts, which may be strings. Keys that are null count as absent.

    Raises:
        ValueError: something would be left out; names the message, the part and the key, and what is allowed.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not hasattr(messages, "__iter__"):
        raise ValueError(f"a conversation is a list of messages, not {type(messages).__name__}")
    found = []
    for number, message in enumerate(messages, start=1):
        where = f"message {number}"
        if not isinstance(message, Mapping):
            if not hasattr(message, "role") or not hasattr(message, "content"):
                raise ValueError(f"{where} is {type(message).__name__}; a message is a dict with 'role' and 'content'")
            message = {"role": message.role, "content": message.content}
        if not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"{where}: a message is a dict with 'role' (a string) and 'content'")
        where = f"{where} ({message['role']})"
        content = message["content"]
        if isinstance(content, Mapping) or (not isinstance(content, str) and not hasattr(content, "__iter__")):
            raise ValueError(f"{where}: content must be a string or a list of parts, not {type(content).__name__}")
        if not isinstance(content, str):
            content = [read_part(part, f"{where}, part {place}") for place, part in enumerate(content, start=1)]
        others = {key: value for key, value in message.items() if key not in ("role", "content") and value is not None}
        found.append({"role": message["role"], "content": content, **others})
    return found


def read_part(part: Any, where: str = "a part") -> dict[str, Any]:
    """One part of a message as `{"type": "text", "text"}` or `{"type": "image"[, "image"]}`.

    Raises:
        ValueError: it is neither, or holds something that would be left out.
    """
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise ValueError(f"{where} is {type(part).__name__}; a part is a dict with a 'type', such as text or image")
    given = {key: value for key, value in part.items() if value is not None}
    kind = given.pop("type", None)
    for hint in _HINTS:
        given.pop(hint, None)
    if kind is None:
        kind = (
            "text"
            if set(given) == {"text"}
            else "image"
            if len(given) == 1 and set(given) <= set(_SOURCE_KEYS)
            else None
        )
    if kind in _TEXT_TYPES:
        text = given.pop("text", None)
        if not isinstance(text, str):
            raise ValueError(f"{where}: its 'text' must be a string, not {type(text).__name__}")
        plain: dict[str, Any] = {"type": "text", "text": text}
    elif kind in _IMAGE_TYPES:
        sources = [key for key in _SOURCE_KEYS if key in given]
        if len(sources) > 1:
            raise ValueError(f"{where} names its picture more than once, by {' and '.join(sources)}; give one")
        plain = {"type": "image"}
        if sources:
            plain["image"] = _source(sources[0], given.pop(sources[0]), where)
        elif isinstance(given.get("source"), Mapping):
            plain["image"] = _anthropic_source(given.pop("source"), where)
    else:
        raise ValueError(
            f"{where} has the type {kind!r}; allowed are text and image (also {', '.join(_IMAGE_TYPES[1:])})"
        )
    if given:
        raise ValueError(f"{where} holds {', '.join(map(repr, given))}, which has no place in a part of type {kind}")
    return plain


def _source(key: str, value: Any, where: str) -> Any:
    if key == "image_url" and isinstance(value, Mapping):
        unknown = [name for name in value if name not in ("url", *_HINTS) and value[name] is not None]
        if unknown or not isinstance(value.get("url"), str):
            raise ValueError(f"{where}: an image_url part needs 'image_url': {{'url': ...}}")
        return value["url"]
    if key == "base64":
        return _decoded(value, where)
    return value


def _anthropic_source(source: Mapping[str, Any], where: str) -> Any:
    if source.get("type") == "base64" and source.get("data") is not None:
        return _decoded(source["data"], where)
    if source.get("type") == "url" and isinstance(source.get("url"), str):
        return source["url"]
    raise ValueError(f"{where}: its 'source' must be of type base64 (with 'data') or url (with 'url')")


def _decoded(encoded: Any, where: str) -> Any:
    if isinstance(encoded, str) and encoded[:5].lower() == "data:":
        return encoded
    try:
        return base64.b64decode("".join(encoded.split()) if isinstance(encoded, str) else encoded, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ValueError(f"{where}: the 'base64' of an image part is not base64: {error}") from error
