"""Where each picture of a conversation stands.

    conversation          `chat`: history + prompt + pictures -> messages, every picture in its place
    grown_history         the history with one turn more
    read_conversations    `apply_chat_template`: messages -> plain ones, and each picture with its place
    with_queries          plain messages with the places of learnable queries
    marked_conversation   (prompt, answer) pairs with `<image>` marks + pictures -> messages

Nothing that is passed in is changed.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .chat_template_mono_internvl import template_reads
from .image_loading_mono_internvl import flatten_pictures, prefixed
from .image_processing_mono_internvl import Frame
from .prompt_mono_internvl import (
    IMAGE_MARK,
    check_message_keys,
    frame_parts,
    marked_parts,
    place_images,
    read_messages,
    without_picture_name,
)


# As messages name their speakers, and others' code too.
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "human", "ai", "gpt", "bot"})
History = list[tuple[Any, str]] | list[dict[str, Any]]


def conversation(
    prompt: str | list[dict[str, Any]], pictures: Sequence[Any], history: Sequence[Any] | None
) -> tuple[list[dict[str, Any]], dict[str, Any], Any]:
    """The messages before this turn and this turn's, every picture in its place; and this turn's prompt as a history
    keeps it: marked, without the pictures that were given beside it.

    Raises:
        ValueError: the prompt is empty or neither a string nor parts; the history is neither pairs nor messages; places
            and pictures differ in number (both are named).
    """
    messages = _history_messages(history)
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError("the prompt is empty; ask something")
    elif not isinstance(prompt, (list, tuple)) or not all(isinstance(part, Mapping) for part in prompt):
        raise ValueError(
            "the prompt must be a string or a list of content parts such as {'type': 'text', 'text': ...}, not "
            + (
                f"a list of {type(prompt[0]).__name__}"
                if isinstance(prompt, (list, tuple)) and prompt
                else repr(prompt)
            )
        )
    (current,) = read_messages([{"role": "user", "content": prompt}])
    if not _says_something(current["content"]):
        raise ValueError("the prompt is empty; ask something")

    left = list(pictures)
    wanted = sum(_places(message, bool(left)) for message in messages)
    own = _places(current, bool(left))
    if isinstance(prompt, str) and left:
        place_images(prompt, len(left) - wanted)  # it checks the number of marks
    if own == 0 and len(left) > wanted:
        own = len(left) - wanted
        if not isinstance(current["content"], str):
            # The same layout as in front of a string.
            front: list[Any] = list(marked_parts("", left[wanted:]))
            front = [{"type": "image"} if part["type"] == "image" else part for part in front]
            current = {**current, "content": [*front, *current["content"]]}
    if wanted + own != len(left):
        raise ValueError(
            f"{wanted + own} places for pictures in the conversation ({wanted} of them in the history), but "
            f"{len(left)} pictures; images are all pictures of the conversation, as many as places"
        )
    filled = []
    for message in messages:
        count = _places(message, bool(pictures))
        filled.append(_filled(message, left[:count]))
        left = left[count:]
    turn = _filled(current, left)
    if not isinstance(prompt, str):
        return filled, turn, current["content"]
    if isinstance(turn["content"], str):
        # Without a picture the word `<image>` is a word, and must stay one when a later turn brings pictures.
        return filled, turn, [{"type": "text", "text": prompt}] if IMAGE_MARK in prompt else prompt
    marked = (part["text"] if part["type"] == "text" else IMAGE_MARK for part in turn["content"])
    return filled, turn, "".join(marked)


def _history_messages(history: Sequence[Any] | None) -> list[dict[str, Any]]:
    if history is None:
        return []
    if isinstance(history, (str, bytes, Mapping)) or not isinstance(history, Sequence):
        raise ValueError(
            f"history must be a list of (prompt, answer) pairs or of messages, not {type(history).__name__}"
        )
    if not history:
        return []
    if _is_pair(history) and all(isinstance(item, str) for item in history):
        raise ValueError("history must be a list of (prompt, answer) pairs: put this one pair into a list")
    pairs = [_is_pair(turn) for turn in history]
    if all(pairs) and all(isinstance(turn[0], str) and turn[0].lower() in _ROLES for turn in history):
        raise ValueError(
            f"history has (role, text) pairs, the first by {history[0][0]!r}; write messages "
            "{'role': .., 'content': ..}, or (prompt, answer) pairs"
        )
    for number, turn in enumerate(history, start=1):
        content = turn[0] if _is_pair(turn) else turn.get("content") if isinstance(turn, Mapping) else None
        if isinstance(content, tuple) and content and all(isinstance(entry, str) for entry in content):
            # Parts may be strings, but a tuple of them is how Gradio keeps a file; its path is no text.
            raise ValueError(
                f"entry {number} of the history holds {content!r}: a file is a part "
                f"{{'type': 'image', 'image': {content[0]!r}}}, and several texts are a list"
            )
    if not any(pairs):
        if not all(isinstance(turn, Mapping) or hasattr(turn, "role") for turn in history):
            raise ValueError(
                "history must be a list of (prompt, answer) pairs or of messages {'role', 'content'}; "
                f"its first entry is {str(history[0])[:80]!r}"
            )
        return read_messages(list(history))
    messages: list[dict[str, Any]] = []
    for number, (turn, is_pair) in enumerate(zip(history, pairs, strict=True), start=1):
        if not is_pair:
            raise ValueError(f"history mixes (prompt, answer) pairs with other things: entry {number} is no pair")
        asked, answered = turn
        if not isinstance(answered, str):
            raise ValueError(f"turn {number} of the history has no answer: its second entry is {answered!r}, no string")
        if not isinstance(asked, str) and not isinstance(asked, (list, tuple)):
            raise ValueError(f"turn {number} of the history has no prompt: its first entry is {asked!r}, no string")
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return read_messages(messages)


def _is_pair(turn: Any) -> bool:
    return isinstance(turn, (list, tuple)) and len(turn) == 2 and not isinstance(turn[0], Mapping)


def _says_something(content: Any) -> bool:
    if isinstance(content, str):
        return bool(content.strip())
    return any(part["type"] != "text" or part["text"].strip() for part in content)


def _places(message: dict[str, Any], marks_count: bool) -> int:
    """Places for pictures that are given elsewhere: image parts that hold none, and in a user's string its marks."""
    content = message["content"]
    if isinstance(content, str):
        return content.count(IMAGE_MARK) if marks_count and message["role"] == "user" else 0
    return sum(part["type"] == "image" and "image" not in part for part in content or ())


def _filled(message: dict[str, Any], pictures: list[Any]) -> dict[str, Any]:
    """The message with its pictures in their places."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": marked_parts(content, pictures)} if pictures else message
    left = iter(pictures)
    parts = [
        {**part, "image": next(left)} if part["type"] == "image" and "image" not in part else part for part in content
    ]
    return {**message, "content": parts}


def grown_history(history: Sequence[Any] | None, asked: Any, answer: str) -> History:
    """The history with this turn, in its form."""
    given = list(history or [])
    if given and not _is_pair(given[0]):
        return [*given, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return [*(tuple(turn) for turn in given), (asked, answer)]


# ------------------------------------------------------------------------------------------ for the processor


def list_conversations(conversation: Any) -> tuple[list[Any], bool]:
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


def read_conversations(
    conversations: Sequence[Any],
    batched: bool,
    images: Any,
    source: str,
    frames_of: Callable[[dict[str, Any]], list[Frame]],
) -> list[tuple[list[dict[str, Any]], list[tuple[str, Any]]]]:
    """Plain messages of each conversation, with a part for each picture, and where the pictures stand and what they
    are (None where that is not said). `frames_of`: a part with a video -> its frames, each a picture of its own."""
    read = [read_messages(messages) for messages in conversations]
    for messages in read:
        check_message_keys(messages, functools.partial(template_reads, source))
    found = []
    for number, messages in enumerate(read, start=1):
        found.append(_take_images(messages, frames_of, f"conversation {number}, " if batched else ""))
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


def with_queries(messages: list[dict[str, Any]], placement: str) -> list[dict[str, Any]]:
    """Plain messages with a part `{"type": "queries"}` for each block of learnable queries (BREEN, arXiv 2503.12446).

    `image`: behind each picture. `question`: behind a message with pictures comes another by the same speaker, which
    begins with one block and says the words of the first again, without names of pictures and frames. An answer is not
    said again: the pictures of an assistant's message have their blocks behind them.
    """
    placed: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        parts = content if isinstance(content, list) else []
        if not any(part["type"] == "image" for part in parts):
            placed.append(message)
        elif placement == "image" or message["role"] == "assistant":
            grown: list[dict[str, Any]] = []
            for part in parts:
                grown += [part, {"type": "queries"}] if part["type"] == "image" else [part]
            placed.append({**message, "content": grown})
        else:
            # As one text, whose own new line in front is the one that a picture's words begin on.
            words = ""
            for part in parts:
                words = without_picture_name(words) if part["type"] == "image" else words + part["text"]
            words = words.lstrip("\n")
            repeated = [{"type": "text", "text": words}] if words else []
            placed += [message, {**message, "content": [{"type": "queries"}, *repeated]}]
    return placed


def _take_images(
    messages: list[dict[str, Any]], frames_of: Callable[[dict[str, Any]], list[Frame]], of: str
) -> tuple[list[dict[str, Any]], list[tuple[str, Any]]]:
    """Plain messages whose image parts hold nothing but their type, one for each picture and each frame of a video; and
    where each stands and what it is, None where its part does not say.

    Raises:
        ValueError: a part holds an empty list of pictures; or a video cannot be read, by the place of its part behind
            `of`, which says of which conversation.
    """
    pictures: list[tuple[str, Any]] = []
    plain = []
    for number, message in enumerate(messages, start=1):
        if isinstance(message["content"], str):
            plain.append(message)
            continue
        parts: list[Any] = []
        counts: list[int] = []
        for place, part in enumerate(message["content"], start=1):
            where = f"message {number} ({message['role']}), part {place}"
            if part["type"] == "video":
                try:
                    frames = frames_of(part)
                except (ValueError, TypeError, OSError, ImportError) as error:
                    raise prefixed(error, of + where) from error
                counts.append(len(frames))
                pictures += [(where, frame) for frame in frames]
            if part["type"] != "image":
                parts.append(part)
                continue
            held = flatten_pictures(part["image"]) if "image" in part else [None]
            if not held:
                raise ValueError(f"{where}: it holds no picture")
            parts += [{"type": "image"} for _ in held]
            pictures += [(where, picture) for picture in held]
        plain.append({**message, "content": frame_parts(parts, counts) if counts else parts})
    return plain, pictures


def check_given(pictures: Sequence[tuple[str, Any]], where: str) -> None:
    """Raise ValueError where a part for a picture, by its place, has none; `where` says of which conversation."""
    for place, picture in pictures:
        if picture is None:
            raise ValueError(
                f"{where}{place}: an image part needs one of 'image', 'url', 'path' and 'base64', or images="
            )


def marked_conversation(turns: Sequence[tuple[str, str | None]], images: Sequence[Any]) -> list[dict[str, Any]]:
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
