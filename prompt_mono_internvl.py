"""Messages and `<image>` marks: what people hand over -> plain messages whose parts say where each picture stands.

    read_messages     one conversation, in the forms that clients send -> {"role", "content": str | [parts]}
    read_part         the same for one part
    frame_parts       parts with videos -> parts with their frames, each on a line of its own
    read_tools        the tools of a conversation
    marked_parts      a string whose `<image>` marks stand for pictures -> parts
    place_images      marks in front of a string that has none

A part is `{"type": "text", "text": str}`, `{"type": "image", "image": source}` or `{"type": "video", "video": source}`,
the last with `num_frames` or `fps`; `{"type": "image"}` alone is a picture that is given elsewhere. Only a string is
ever searched for marks, and only where pictures come with it.
"""

import binascii
import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import get_json_schema

from .image_loading_mono_internvl import decode_base64
from .video_mono_internvl import VIDEO_OPTIONS, check_sampling


IMAGE_MARK = "<image>"

# Keys of a message that say how to find it, not what it says.
_BOOKKEEPING = ("id", "status", "cache_control")
_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")
_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image", "image_url", "input_image", "image_pil")
_VIDEO_TYPES = ("video", "video_url", "input_video")
# Keys that hold the picture or video of a part, in the order in which they are looked at.
_SOURCE_KEYS = ("image", "image_url", "url", "path", "base64", "image_pil")
_VIDEO_KEYS = ("video", "video_url", "url", "path", "base64")
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


def frame_name(number: int) -> str:
    """What stands in front of a video's frame of this number, from 1 (InternVL's prompt)."""
    return f"Frame{number}: "


def without_picture_name(text: str) -> str:
    """The text in front of a picture without the line that names it there, `Image-1: ` or `Frame1: `."""
    return re.sub(r"(?:^|\n)(?:Image-|Frame)\d+: \Z", "", text)


def frame_parts(parts: Sequence[dict[str, Any]], counts: Iterable[int]) -> list[dict[str, Any]]:
    """The parts of a message with `{"type": "image"}` for each frame of its videos.

    A video is written as InternVL writes it, `Frame1: <image>\\nFrame2: <image>\\n`, numbered from 1 each, on lines
    of its own. A picture between a video and the first text gets a line too, as pictures in front of a message do.

    Args:
        counts: frames of each video, in order.
    """
    left, laid = iter(counts), list[dict[str, Any]]()
    seen, leading = False, True
    for place, part in enumerate(parts):
        if part["type"] == "video":
            line = "" if _line_begins(laid) else "\n"
            for number in range(1, next(left) + 1):
                laid += [{"type": "text", "text": line + frame_name(number)}, {"type": "image"}]
                line = "\n"
            seen = True
        else:
            laid.append(part)
            leading = leading and part["type"] != "text"
        stands_alone = part["type"] == "video" or (seen and leading and part["type"] == "image")
        if stands_alone and _goes_on(parts[place + 1 :]):
            laid.append({"type": "text", "text": "\n"})
    return laid


def _line_begins(laid: Sequence[Mapping[str, Any]]) -> bool:
    """Whether what comes after these parts begins a line."""
    last = next((part for part in reversed(laid) if part["type"] != "text" or part["text"]), None)
    return last is None or (last["type"] == "text" and last["text"].endswith("\n"))


def _goes_on(parts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a line of something else follows that does not begin with a break of its own."""
    following = next((part for part in parts if part["type"] != "text" or part["text"]), None)
    if following is None or following["type"] == "video":
        return False
    return following["type"] != "text" or not following["text"].startswith("\n")


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """One conversation as plain messages; what is passed in is not changed.

    Args:
        messages: a sequence of mappings, or of objects with `role` and `content` (dataclasses and pydantic models too).
            Content is a string, or a sequence of parts, which may be strings. Keys that are null count as absent. An
            assistant that calls tools may have no content.

    Returns:
        `{"role": str, "content": str | [parts]}`, with the other keys that say something. `tool_calls` are
        `{"type": "function", "function": {"name", "arguments"}}`, whose arguments are a dict or JSON as a string.

    Raises:
        ValueError: something would be left out; names the message, the part and the key, and what is allowed.
    """
    messages = getattr(messages, "messages", messages)
    if isinstance(messages, (str, bytes, Mapping)) or not hasattr(messages, "__iter__"):
        raise ValueError(f"a conversation is a list of messages, not {type(messages).__name__}")
    found: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []  # the calls that wait for their results
    for number, given in enumerate(messages, start=1):
        message = _fields(given)
        if message is None:
            raise ValueError(
                f"message {number} is {type(given).__name__}; a message is a dict with 'role' and 'content'"
            )
        message = {key: value for key, value in message.items() if value is not None or key == "content"}
        role = message.pop("role", None)
        if not isinstance(role, str):
            wrong = f"its role must be a string, not {type(role).__name__}; " if "content" in message else ""
            raise ValueError(f"message {number}: {wrong}a message is a dict with 'role' and 'content'")
        where = f"message {number} ({role})"
        calls = _read_calls(message, where)
        if calls and role != "assistant":
            raise ValueError(f"{where} calls tools; only an assistant does")
        others = {key: value for key, value in message.items() if key != "content" and _says_anything(key, value)}
        if "name" in others and not isinstance(others["name"], str):
            raise ValueError(f"{where}: its name must be a string, not {type(others['name']).__name__}")
        plain = {"role": role, "content": _read_content(message, where, bool(calls)), **others}
        if calls:
            plain["tool_calls"], asked = calls, list(calls)
        elif role in ("tool", "function"):
            _match_result(plain, asked, where)
        else:
            asked = []
        found.append(plain)
    return found


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """The tools of a conversation as JSON schemas; none at all is None.

    Args:
        tools: a sequence of schemas `{"type": "function", "function": {"name", ..}}`, of the functions alone, or of
            Python functions with type hints and a docstring.

    Raises:
        ValueError: a tool is neither, or is one that its provider runs (a web search, ..).
    """
    if tools is None:
        return None
    if isinstance(tools, (str, bytes, Mapping)) or not hasattr(tools, "__iter__"):
        raise ValueError(f"tools must be a list of tools, not {type(tools).__name__}")
    found = []
    for number, tool in enumerate(tools, start=1):
        schema = get_json_schema(tool) if callable(tool) and not isinstance(tool, Mapping) else _fields(tool)
        if schema is None:
            raise ValueError(f"tool {number} is {type(tool).__name__}; a tool is a function or its JSON schema")
        function = schema.get("function", schema)
        if schema.get("type", "function") != "function" or not isinstance(function, Mapping):
            raise ValueError(f"tool {number} is of type {schema.get('type')!r}; allowed are functions")
        if not isinstance(function.get("name"), str):
            raise ValueError(f"tool {number} has no name; a tool is {{'type': 'function', 'function': {{'name', ..}}}}")
        found.append(dict(schema))
    return found or None


def check_message_keys(messages: Sequence[Mapping[str, Any]], known: Any) -> None:
    """Refuse what a template would leave out of plain messages; `known`: whether it reads a key.

    Raises:
        ValueError: names the message, the key and the nearest known one.
    """
    for number, message in enumerate(messages, start=1):
        for key in message:
            if key in ("role", "content", "tool_call_id") or known(key):
                continue
            close = difflib.get_close_matches(str(key), _MESSAGE_KEYS, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"message {number} ({message['role']}) holds {key!r}{hint}, which the chat template has no place for"
            )


def _fields(value: Any) -> dict[str, Any] | None:
    """A mapping, or the fields of an object that stands for one; None for anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return dict(value.model_dump())
    if hasattr(value, "role") and hasattr(value, "content"):
        own = [key for key in getattr(value, "__dict__", ()) if not key.startswith("_")]
        return {key: getattr(value, key) for key in dict.fromkeys((*own, *_MESSAGE_KEYS)) if hasattr(value, key)}
    return None


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, bytes, Mapping, list, tuple)) and len(value) == 0)


def _says_anything(key: str, value: Any) -> bool:
    return not _is_empty(value) and key not in _BOOKKEEPING and (key, value) != ("type", "message")


def _read_content(message: Mapping[str, Any], where: str, calls: bool) -> str | list[dict[str, Any]]:
    content = message.get("content")
    if content is None and calls:
        return ""
    if "content" not in message:
        raise ValueError(f"{where} has no content; a message is a dict with 'role' and 'content'")
    if isinstance(content, str):
        return content
    if content is None or isinstance(content, (bytes, Mapping)) or not hasattr(content, "__iter__"):
        raise ValueError(f"{where}: content must be a string or a list of parts, not {type(content).__name__}")
    return [read_part(part, f"{where}, part {place}") for place, part in enumerate(content, start=1)]


def _read_calls(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Take an assistant's calls out of its message, by the newer and the older key of OpenAI's."""
    given = message.pop("tool_calls", None)
    older = message.pop("function_call", None)
    given = [] if given is None else given
    if isinstance(given, (str, bytes, Mapping)) or not hasattr(given, "__iter__"):
        raise ValueError(f"{where}: tool_calls must be a list of calls, not {type(given).__name__}")
    calls = []
    for number, call in enumerate([*given, *([] if older is None else [older])], start=1):
        at = f"{where}, call {number}"
        fields = _fields(call) or {}
        wrapped = "function" in fields
        function = (_fields(fields["function"]) or {}) if wrapped else fields
        if not isinstance(function.get("name"), str):
            raise ValueError(f"{at}: a call is {{'type': 'function', 'function': {{'name', 'arguments'}}}}")
        if fields.get("type", "function") != "function":
            raise ValueError(f"{at} is of type {fields['type']!r}; allowed is function")
        outside = ("type", "id", "index")
        known = ("name", "arguments") if wrapped else ("name", "arguments", *outside)
        unread = [key for key, value in function.items() if key not in known and not _is_empty(value)]
        if wrapped:
            unread += [k for k, value in fields.items() if k not in (*outside, "function") and not _is_empty(value)]
        if unread:
            raise ValueError(f"{at} holds {unread[0]!r}; a call has a name and arguments")
        name, arguments = function["name"], function.get("arguments")
        calls.append({"type": "function", "function": {"name": name, "arguments": _read_arguments(arguments, at)}})
        if fields.get("id") is not None:
            calls[-1]["id"] = fields["id"]
    return calls


def _read_arguments(arguments: Any, where: str) -> Any:
    if _is_empty(arguments):
        return {}
    if isinstance(arguments, Mapping):
        return dict(arguments)
    try:
        is_object = isinstance(json.loads(arguments), dict)
    except (TypeError, ValueError):
        is_object = False
    if not is_object:
        raise ValueError(f"{where}: its arguments must be a dict, or a JSON object as a string, not {arguments!r}")
    return arguments


def _match_result(message: dict[str, Any], asked: list[dict[str, Any]], where: str) -> None:
    """A prompt tells the results of several calls apart by their order alone, so it must be that of the calls."""
    identity, name = message.get("tool_call_id"), message.get("name")
    if not asked:
        return
    call = asked.pop(0)
    expected = (call.get("id"), call["function"]["name"])
    for said, wanted in zip((identity, name), expected, strict=True):
        if said is not None and wanted is not None and said != wanted:
            raise ValueError(
                f"{where} is the result of {said!r}, but {wanted!r} was called here; keep the calls' order"
            )


def read_part(part: Any, where: str = "a part") -> dict[str, Any]:
    """One part of a message as `{"type": "text", "text"}`, `{"type": "image"[, "image"]}` or `{"type": "video",
    "video"[, "num_frames" | "fps"]}`.

    Raises:
        ValueError: it is none of them, or holds something that would be left out.
    """
    if isinstance(part, str):
        return {"type": "text", "text": part}
    fields = _fields(part)
    if fields is None:
        raise ValueError(f"{where} is {type(part).__name__}; a part is a dict with a 'type', such as text or image")
    given = {key: value for key, value in fields.items() if value is not None and key not in _HINTS}
    kind = given.pop("type", None)
    if kind is None:
        if set(given) == {"text"}:
            kind = "text"
        elif len(given) == 1 and set(given) <= set(_SOURCE_KEYS):
            kind = "image"
        elif "video" in given and set(given) <= {"video", *VIDEO_OPTIONS}:
            kind = "video"
        else:
            held = ", ".join(map(repr, given)) or "nothing"
            raise ValueError(f"{where} holds {held} and no 'type'; give it one, text, image or video")
    plain: dict[str, Any]
    if kind in _TEXT_TYPES:
        text = given.pop("text", None)
        if not isinstance(text, str):
            raise ValueError(f"{where}: its text must be a string, not {type(text).__name__}")
        plain = {"type": "text", "text": text}
    elif kind in _IMAGE_TYPES:
        plain = {"type": "image"}
        if key := _named_once(given, _SOURCE_KEYS, "picture", where):
            plain["image"] = _source(key, given.pop(key), where)
        elif isinstance(given.get("source"), Mapping):
            plain["image"] = _anthropic_source(given.pop("source"), where)
    elif kind in _VIDEO_TYPES:
        plain = _read_video(given, where)
    else:
        raise ValueError(
            f"{where}: type {kind!r} is not known; allowed are text, image and video (also "
            f"{', '.join((*_TEXT_TYPES[1:], *_IMAGE_TYPES[1:], *_VIDEO_TYPES[1:]))})"
        )
    left = [key for key, value in given.items() if not _is_empty(value)]
    if left:
        raise ValueError(f"{where} holds {', '.join(map(repr, left))}, which has no place in a part of type {kind}")
    return plain


def _named_once(given: Mapping[str, Any], keys: Sequence[str], what: str, where: str) -> str | None:
    """The one of these keys that a part has, or None."""
    held = [key for key in keys if key in given]
    if len(held) > 1:
        raise ValueError(f"{where} names its {what} more than once, by {' and '.join(held)}; give one")
    return held[0] if held else None


def _read_video(given: dict[str, Any], where: str) -> dict[str, Any]:
    """Take the video of a part, and what it says of its frames, out of what it holds."""
    key = _named_once(given, _VIDEO_KEYS, "video", where)
    if key is None:
        raise ValueError(f"{where}: a video part needs one of 'video', 'url', 'path', 'video_url' and 'base64'")
    plain = {"type": "video", "video": _source(key, given.pop(key), where)}
    plain |= {name: given.pop(name) for name in VIDEO_OPTIONS if name in given}
    try:
        check_sampling(plain.get("num_frames"), plain.get("fps"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return plain


def _source(key: str, value: Any, where: str) -> Any:
    if key in ("image_url", "video_url"):
        link = _fields(value)
        if link is not None:
            unread = [name for name in link if name not in ("url", *_HINTS) and link[name] is not None]
            value = None if unread else link.get("url")
        if not isinstance(value, str):
            raise ValueError(f"{where}: its {key!r} must be a URL, or {{'url': ...}}")
        return value
    return _decoded(value, where) if key == "base64" else value


def _anthropic_source(source: Mapping[str, Any], where: str) -> Any:
    unread = [key for key in source if key not in ("type", "data", "url", "media_type") and source[key] is not None]
    if source.get("type") == "base64" and source.get("data") is not None and not unread:
        return _decoded(source["data"], where)
    if source.get("type") == "url" and isinstance(source.get("url"), str) and not unread:
        return source["url"]
    raise ValueError(f"{where}: its 'source' must be of type base64 (with 'data') or url (with 'url')")


def _decoded(encoded: Any, where: str) -> Any:
    """The bytes of base64 of either alphabet, with or without padding; a data: URI as it is."""
    if isinstance(encoded, str) and encoded[:5].lower() == "data:":
        return encoded
    try:
        return decode_base64(encoded)
    except (AttributeError, UnicodeError, binascii.Error, ValueError) as error:
        raise ValueError(f"{where}: its 'base64' is not base64: {error}") from error
