"""One record of a data file -> one conversation: everything in it is used, or the record is refused by name.

    {"conversations": [{"from", "value"}], "image": ..}             LLaVA, InternVL, LLaMA-Factory (sharegpt)
    {"messages": [{"role", "content"}], "images": [..]}             TRL, OpenAI, ms-swift, Qwen; strings or parts
    {"prompt", "completion"}                                        TRL; strings or messages: the completion is learnt
    {"query", "response", "history", "system"}                      ms-swift
    {"instruction", "input", "output", "history", "system"}         LLaMA-Factory (alpaca)

Parts stay parts, and a video is one: `{"type": "video", "video": path}`, with `num_frames` or `fps`. A string is
searched for `<image>` marks only where the record gives pictures beside its turns; the text of a part never is.
"""

import base64
import binascii
import difflib
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from ..prompt_mono_internvl import IMAGE_MARK, place_images, read_part


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MARK = IMAGE_MARK
# Say where a record comes from, not what is to be learnt.
# fmt: off
BOOKKEEPING = (
    "id", "ids", "idx", "index", "uid", "uuid", "image_id", "question_id", "sample_id", "conversation_id", "source",
    "sources", "dataset", "dataset_name", "data_source", "data_type", "split", "category", "categories", "task",
    "task_type", "topic", "language", "lang", "model", "license", "author", "version", "width", "height", "width_list",
    "height_list", "image_size", "image_width", "image_height", "num_tokens", "token_count", "length", "timestamp",
    "created", "created_at", "metadata", "meta", "hash",
)
# fmt: on
# Forms of a record by the keys that hold its turns: those that must be there, those that may be.
FORMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "conversations": (("conversations",), ("system",)),
    "messages": (("messages",), ("system",)),
    "prompt and completion": (("prompt", "completion"), ("system",)),
    "query and response": (("query", "response"), ("history", "system")),
    "instruction and output": (("instruction", "output"), ("input", "history", "system")),
}
PICTURES = ("image", "images")
# What other trainers understand and this one does not, with what to do instead.
_VIDEO = 'a video is a part of a turn of user: {"type": "video", "video": path}'
_PREFERENCE = "preferences are not learnt here; give the answer to learn alone"
REFUSED = {
    "video": _VIDEO,
    "videos": _VIDEO,
    "audio": "the model hears nothing",
    "audios": "the model hears nothing",
    "tools": "tools are not read from training data; write them into the system prompt",
    "tool_calls": "tool calls are not read from training data; write them into the text",
    "function_call": "tool calls are not read from training data; write them into the text",
    "objects": "grounding marks are not filled in; write <ref>..</ref><box>[[..]]</box> into the text",
    "chosen": _PREFERENCE,
    "rejected": _PREFERENCE,
    "rejected_response": _PREFERENCE,
    "rejected_messages": _PREFERENCE,
    "rejected_images": _PREFERENCE,
    "label": _PREFERENCE,
}
_SOURCES = ("image", "image_url", "url", "path", "base64", "bytes", "image_pil", "input_image")
_PART_TYPES = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "image": "image",
    "image_url": "image",
    "image_pil": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
    "input_video": "video",
}
# Hints to other models or to a cache, which change nothing that is seen.
_HINTS = ("detail", "cache_control")
_LEARN = ("loss", "loss_scale", "weight", "train")
# How other models' data writes a picture's place into a text, and a picture itself (Qwen-VL's <img>FILE</img>).
_OTHER_MARKS = re.compile(r"<\|?(?:vision_start|image|img)(?:[ _-]?\w+)*\|?>|\[img(?:[ _-]?\d+)?\]", re.IGNORECASE)
_MARKS = re.compile(re.escape(MARK))
_INLINE = re.compile(r"<img>([^<>]+)</img>")


class BadSample(ValueError):
    """A record that cannot be learnt from; the message names the file, the line or place, and the reason."""


def is_empty(value: Any) -> bool:
    """Whether a column says nothing: null, NaN (how pandas writes null), or an empty string, list or mapping."""
    if isinstance(value, float):
        return value != value
    return value is None or (isinstance(value, (str, bytes, Mapping, list, tuple, np.ndarray)) and len(value) == 0)


def read_record(row: Any, root: str | Path | None = None, ignore: Collection[str] = ()) -> list[dict[str, Any]]:
    """A record as chat messages, whose content is a string or parts `{"type": "text" | "image", ..}`.

    Pictures of the record and of its parts are paths, http(s) or data: URLs, bytes or PIL images. A message that is not
    to be learnt, by its `loss`, `train` or `weight`, or as the prompt of a completion, has `"train": False`. Strings
    are stripped, as the released training code strips them; parts are left as they are.

    Args:
        root: folder that relative paths start from.
        ignore: keys that may hold anything and are not read.

    Raises:
        ValueError: the reason why it cannot be used; names the key, and the turn and part, that it is about.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"a record is a mapping, not {type(row).__name__}")
    row = {key: value for key, value in row.items() if key not in ignore}
    held = {key: value for key, value in row.items() if not is_empty(value)}
    form = _form_of(row, held)
    _refuse_unknown(held, (*FORMS[form][0], *FORMS[form][1], *PICTURES, *BOOKKEEPING), "the record")
    turns = _turns(form, held)
    messages = [_message(turn, number, root) for number, turn in enumerate(turns, start=1)]
    if "system" in held:
        if not isinstance(held["system"], str):
            raise ValueError(f"system: a text is wanted, not {type(held['system']).__name__}")
        if any(message["role"] == "system" for message in messages):
            raise ValueError("system: the turns hold a system prompt already; give one of the two")
        messages.insert(0, {"role": "system", "content": held["system"].strip()})
    pictures = _pictures(held, root)
    unnamed = [key for key in PICTURES if key in row]
    if not pictures and unnamed and count_marks(messages):
        raise ValueError(
            f"{unnamed[0]}: empty, but a turn holds an {MARK} mark; give the picture, or leave the key out (or write "
            "the turn as a part of type text) where it is a word"
        )
    return _checked(_with_pictures(messages, pictures), 0 if "system" in held else 1)


def _checked(messages: list[dict[str, Any]], first: int) -> list[dict[str, Any]]:
    """The messages, numbered from `first`, each of which says something, in this model's terms."""
    for number, message in enumerate(messages, start=first):
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        says = any(part["type"] != "text" or part["text"] for part in parts)
        # An empty system prompt is the wish for none.
        if not says and message["role"] != "system":
            raise ValueError(f"turn {number}: a turn of {message['role']} is empty")
        if message["role"] == "user" and isinstance(content, str) and (found := _INLINE.search(content)):
            raise ValueError(
                f"turn {number}: {found[0]!r:.80}: pictures are not read out of a text; write {MARK} and give the "
                "picture in images (or write the turn as a part of type text, if it is none)"
            )
    return messages


def _form_of(row: Mapping[str, Any], held: Mapping[str, Any]) -> str:
    for key in REFUSED:
        if key in held:
            raise ValueError(f"{key}: {REFUSED[key]}")
    found = [form for form, (needed, _) in FORMS.items() if any(key in held for key in needed)]
    if not found:
        empty = [key for needed, _ in FORMS.values() for key in needed if key in row]
        reason = f"{empty[0]} is empty" if empty else "it has " + (", ".join(map(str, row)) or "no keys")
        raise ValueError(f"no conversations or messages ({reason}); a record holds {', or '.join(FORMS)}")
    if len(found) > 1:
        raise ValueError(f"{' as well as '.join(found)}: which is meant? give one, or leave keys out by `ignore`")
    missing = [key for key in FORMS[found[0]][0] if key not in held]
    if missing:
        raise ValueError(f"{missing[0]}: {'empty' if missing[0] in row else 'missing'}, beside {found[0]}")
    return found[0]


def _refuse_unknown(held: Iterable[Any], known: Sequence[str], where: str) -> None:
    for key in held:
        if key in known:
            continue
        if key in REFUSED:
            raise ValueError(f"{where}: {key}: {REFUSED[key]}")
        close = difflib.get_close_matches(str(key), known, n=1)
        raise ValueError(
            f"{where}: unknown key {key!r}{f'; did you mean {close[0]}?' if close else ''} "
            "(keys that are not for training are named by `ignore`)"
        )


def _turns(form: str, held: Mapping[str, Any]) -> list[Any]:
    if form in ("conversations", "messages"):
        return _list(held[form], form)
    if form == "prompt and completion":
        prompt, completion = held["prompt"], held["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        if isinstance(prompt, str) or isinstance(completion, str):
            raise ValueError("prompt and completion: both are texts, or both are lists of messages")
        asked = [{**turn, "train": False} if _is_answer(turn) else turn for turn in _list(prompt, "prompt")]
        return [*asked, *_list(completion, "completion")]
    turns: list[Any] = []
    for number, pair in enumerate(_list(held.get("history", []), "history"), start=1):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"history, pair {number}: [question, answer] is wanted, not {pair!r:.80}")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    if form == "query and response":
        question, answer = held["query"], held["response"]
    else:
        question, answer = held["instruction"], held["output"]
        if "input" in held:
            for key in ("instruction", "input"):
                if not isinstance(held[key], str):
                    raise ValueError(f"{key}: a text is wanted, not {type(held[key]).__name__}")
            question = f"{question}\n{held['input']}"
    return [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _list(value: Any, name: str) -> list[Any]:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name}: a list is wanted, not {type(value).__name__}")
    return list(value)


def _is_answer(turn: Any) -> bool:
    return isinstance(turn, Mapping) and ROLES.get(str(turn.get("role", turn.get("from")))) == "assistant"


def _one_of(turn: Mapping[str, Any], first: str, second: str, where: str) -> Any:
    """The value of two names for one thing; null where neither is given."""
    found = [turn[key] for key in (first, second) if turn.get(key) is not None]
    if len(found) == 2 and found[0] != found[1]:
        raise ValueError(f"{where}: {first} and {second} differ; give one")
    return found[0] if found else None


def _message(turn: Any, number: int, root: str | Path | None) -> dict[str, Any]:
    where = f"turn {number}"
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where}: a turn is a mapping with role and content, not {type(turn).__name__}")
    who = _one_of(turn, "from", "role", where)
    if not isinstance(who, str) or who not in ROLES:
        raise ValueError(f"{where}: unknown speaker {who!r}; allowed are {', '.join(ROLES)}")
    role = ROLES[who]
    held = [key for key, value in turn.items() if not is_empty(value)]
    _refuse_unknown(held, ("from", "role", "value", "content", *_LEARN, "id", "index", "timestamp"), where)
    content = _one_of(turn, "value", "content", where)
    if isinstance(content, str):
        message: dict[str, Any] = {"role": role, "content": content.strip()}
    elif isinstance(content, (list, tuple, np.ndarray)) and len(content):
        parts = [_part(part, f"{where}, part {k}", root) for k, part in enumerate(content, start=1)]
        if role != "user" and any(part["type"] != "text" for part in parts):
            raise ValueError(f"{where}: a picture in a turn of {role}; pictures and videos belong into turns of user")
        message = {"role": role, "content": parts}
    elif content is None or isinstance(content, (list, tuple, np.ndarray)):
        raise ValueError(f"{where}: a turn of {who} has no text")
    else:
        raise ValueError(f"{where}: the text of {who} is {type(content).__name__}, not a string or a list of parts")
    learns = {key: _learns(turn[key], f"{where}: {key}") for key in _LEARN if not is_empty(turn.get(key))}
    if len(set(learns.values())) > 1:
        raise ValueError(f"{where}: {' and '.join(learns)} contradict each other")
    if learns and role != "assistant" and any(learns.values()):
        raise ValueError(f"{where}: {next(iter(learns))}: only answers are learnt, this is a turn of {role}")
    if role == "assistant" and False in learns.values():
        message["train"] = False
    return message


def _learns(value: Any, where: str) -> bool:
    if isinstance(value, (bool, int, float, np.bool_, np.number)) and value in (0, 1):
        return bool(value)
    raise ValueError(f"{where}: {value!r:.60} is not supported; an answer is learnt (true, 1) or not (false, 0)")


def _part(part: Any, where: str, root: str | Path | None) -> dict[str, Any]:
    """A part in any form as `{"type": "text", "text"}`, as `{"type": "image"}`, with `image` if it is given here, or as
    `{"type": "video", "video"}`, with what it says of its frames."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise ValueError(f"{where}: a part is a mapping or a string, not {type(part).__name__}")
    held = {key: value for key, value in part.items() if value is not None and key != "type"}
    kind = part.get("type")
    if kind is None:
        # Qwen's parts: the key tells.
        kinds = [key for key in ("text", "video", *_SOURCES, *REFUSED) if key in held]
        kind = kinds[0] if kinds else None
        kind = "image" if kind in _SOURCES else kind
    if kind in REFUSED and kind not in _PART_TYPES:
        raise ValueError(f"{where}: {kind}: {REFUSED[kind]}")
    if not isinstance(kind, str) or kind not in _PART_TYPES:
        raise ValueError(f"{where}: unknown type {kind!r}; allowed are {', '.join(_PART_TYPES)}")
    for hint in _HINTS:
        held.pop(hint, None)
    if _PART_TYPES[kind] == "video":
        part = read_part({"type": kind, **{key: value for key, value in held.items() if not is_empty(value)}}, where)
        return {**part, "video": _video(part["video"], where, root)}
    if _PART_TYPES[kind] == "image" and isinstance(held.get("source"), Mapping):
        # Anthropic's: checked and decoded where every message is.
        held["image"] = read_part({"type": "image", "source": held.pop("source")}, where)["image"]
    known = ("text",) if _PART_TYPES[kind] == "text" else _SOURCES
    _refuse_unknown([key for key, value in held.items() if key in known or not is_empty(value)], known, where)
    if known == ("text",):
        if not isinstance(held.get("text"), str):
            raise ValueError(f"{where}: text is {type(held.get('text')).__name__}, not a string")
        return {"type": "text", "text": held["text"]}
    sources = [(key, value) for key, value in held.items() if key in _SOURCES]
    if len(sources) > 1:
        raise ValueError(f"{where}: {' and '.join(key for key, _ in sources)}: a picture has one source")
    if not sources:
        return {"type": "image"}
    return {"type": "image", "image": _source(sources[0][1], where, root, raw=sources[0][0] == "base64")}


def _video(value: Any, where: str, root: str | Path | None) -> Any:
    """A video's source, or its frames' sources; a relative path starts from `root`."""
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.dtype == object):
        return [_source(frame, f"{where}, frame {k}", root) for k, frame in enumerate(value, start=1)]
    return value if isinstance(value, np.ndarray) else _source(value, where, root, what="video")


def _pictures(held: Mapping[str, Any], root: str | Path | None) -> list[Any]:
    given = [key for key in PICTURES if key in held]
    if len(given) > 1:
        raise ValueError("image and images: give the pictures in one of them")
    if not given:
        return []
    found = held[given[0]]
    if isinstance(found, np.ndarray) and found.dtype == object:
        # How pandas holds a list.
        found = found.tolist()
    several = list(found) if isinstance(found, (list, tuple)) else [found]
    return [_source(picture, f"{given[0]} {k}", root) for k, picture in enumerate(several, start=1)]


def _source(value: Any, where: str, root: str | Path | None, raw: bool = False, what: str = "picture") -> Any:
    """A picture's source as `load_image` takes it, or a video's; a relative path starts from `root`."""
    if isinstance(value, Mapping):
        # The undecoded pictures of `datasets`, ms-swift's and OpenAI's {"url"}.
        held = {key: v for key, v in value.items() if v is not None and key not in _HINTS}
        if set(held) == {"bytes", "path"}:
            # The path is the name the bytes once had.
            held.pop("path")
        allowed = ("bytes", "path", "url", "base64")
        _refuse_unknown(held, allowed, where)
        if len(held) != 1:
            raise ValueError(f"{where}: {' and '.join(held) or 'nothing'} given; one of {', '.join(allowed)} is wanted")
        ((key, value),) = held.items()
        return _source(value, where, root, raw=key == "base64", what=what)
    if isinstance(value, Image.Image) and what == "picture":
        return value
    if isinstance(value, (bytes, bytearray, memoryview)) and len(value):
        return bytes(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value.strip():
        given = repr(value) if is_empty(value) or isinstance(value, (int, float)) else type(value).__name__
        last = "bytes or a PIL image" if what == "picture" else "bytes or a list of frames"
        raise ValueError(f"{where}: {given} is no {what}; a path, URL, data: URI, {last} is wanted")
    if value[:5].lower() == "data:" or value[:8].lower().startswith(("http://", "https://")):
        return value
    if raw:
        return _decoded(value, where)
    if value[:7].lower() == "file://":
        return unquote(urlsplit(value).path)
    if "://" in value:
        raise ValueError(f"{where}: {value!r:.120}: only http, https, file and data: URLs are read")
    folder = Path() if root is None else Path(root)
    try:
        path = folder / Path(value).expanduser()
        if "\\" in value and not path.exists() and (folder / value.replace("\\", "/")).exists():
            # Written on Windows.
            path = folder / value.replace("\\", "/")
        if len(value) < 200 or path.exists():
            return str(path)
    except OSError:
        # Too long for a name.
        pass
    return _decoded(value, where)


def _decoded(value: str, where: str) -> bytes:
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where}: {value[:60]!r}...: neither a file nor base64 ({error})") from error


def count_marks(messages: Sequence[Mapping[str, Any]]) -> int:
    """`<image>` marks in the strings that users wrote."""
    return sum(
        message["content"].count(MARK)
        for message in messages
        if message["role"] == "user" and isinstance(message["content"], str)
    )


def _with_pictures(messages: list[dict[str, Any]], pictures: list[Any]) -> list[dict[str, Any]]:
    """The record's own pictures put where its marks and parts want them."""
    images = [p for m in messages if isinstance(m["content"], list) for p in m["content"] if p["type"] == "image"]
    open_places = [part for part in images if "image" not in part]
    marks = count_marks(messages) if pictures else 0
    if not pictures and not open_places:
        return messages
    if marks + len(open_places) != len(pictures):
        if marks or open_places or len(images) > len(open_places):
            raise ValueError(
                f"{marks + len(open_places)} {MARK} marks and open image parts for {len(pictures)} pictures"
                if len(images) == len(open_places)
                else f"{len(pictures)} pictures beside {len(images) - len(open_places)} in parts, and "
                f"{marks + len(open_places)} marks for them"
            )
        for message in messages:
            # It means a place that is not taken for one, which pictures in front would hide.
            text = message["content"] if isinstance(message["content"], str) else ""
            found = (_OTHER_MARKS.search(text) if message["role"] == "user" else None) or _MARKS.search(text)
            if found:
                raise ValueError(
                    f"{found[0]!r} in a turn of {message['role']}, and {len(pictures)} pictures without a place; "
                    f"write {MARK} into turns of user where they belong"
                )
        # Without a mark pictures come first, as in `chat`.
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise ValueError(f"{len(pictures)} pictures and no user's turn")
        if isinstance(first["content"], str):
            first["content"] = _split(place_images(first["content"], len(pictures)), iter(pictures))
        else:
            first["content"] = [*_split(place_images("", len(pictures)), iter(pictures)), *first["content"]]
        return messages
    left = iter(pictures)
    for message in messages:
        if isinstance(message["content"], list):
            for part in message["content"]:
                if part["type"] == "image" and "image" not in part:
                    part["image"] = next(left)
        elif message["role"] == "user" and MARK in message["content"]:
            message["content"] = _split(message["content"], left)
    return messages


def _split(text: str, pictures: Any) -> list[dict[str, Any]]:
    first, *others = text.split(MARK)
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}]
    for other in others:
        parts += [{"type": "image", "image": next(pictures)}, {"type": "text", "text": other}]
    return parts
