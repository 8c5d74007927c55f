"""Messages in the forms that clients send, tools, and `<image>` marks: read whole or refused by name."""

import base64
import dataclasses
import itertools
import json
import types

import numpy as np
import pytest

from mono_internvl.prompt_mono_internvl import (
    IMAGE_MARK,
    frame_parts,
    marked_parts,
    place_images,
    read_messages,
    read_part,
    read_tools,
)


TEXT = {"type": "text", "text": "What?"}
DATA = b"a picture, or not"
ENCODED = base64.b64encode(DATA).decode()
URI = f"data:image/png;base64,{ENCODED}"
UNDECODED = {"bytes": DATA, "path": None}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def user(content, **others):
    return {"role": "user", "content": content, **others}


class Pydantic:
    """What pydantic's models offer."""

    def __init__(self, **fields):
        self.__dict__.update(fields)

    def __repr__(self):
        return repr(self.__dict__)

    def model_dump(self):
        return dict(self.__dict__)

    def __iter__(self):
        return iter(self.__dict__.items())


@dataclasses.dataclass
class Message:
    role: str
    content: object
    name: str | None = None


# ---- parts


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("What?", TEXT),
        (TEXT, TEXT),
        ({"type": "input_text", "text": "What?"}, TEXT),
        ({"type": "output_text", "text": "What?", "annotations": [], "logprobs": None}, TEXT),
        ({"text": "What?"}, TEXT),
        ({"type": "text", "text": "What?", "image": None, "cache_control": {"type": "ephemeral"}}, TEXT),
        ({"type": "text", "text": ""}, {"type": "text", "text": ""}),
        (Pydantic(type="text", text="What?", image_url=None), TEXT),
        (types.MappingProxyType(TEXT), TEXT),
        ({"type": "image"}, {"type": "image"}),
        ({"type": "image", "image": None, "text": None}, {"type": "image"}),
        ({"type": "image", "image": "a.png"}, {"type": "image", "image": "a.png"}),
        ({"type": "image", "image": UNDECODED}, {"type": "image", "image": UNDECODED}),
        ({"type": "image", "url": "http://x/a.png"}, {"type": "image", "image": "http://x/a.png"}),
        ({"type": "image", "path": "a.png"}, {"type": "image", "image": "a.png"}),
        ({"type": "image", "base64": ENCODED}, {"type": "image", "image": DATA}),
        ({"type": "image", "base64": ENCODED.rstrip("=")}, {"type": "image", "image": DATA}),
        ({"type": "image", "base64": f"{ENCODED[:8]}\n{ENCODED[8:]}".encode()}, {"type": "image", "image": DATA}),
        ({"type": "image", "base64": "__-_"}, {"type": "image", "image": b"\xff\xff\xbf"}),
        ({"type": "image", "base64": URI}, {"type": "image", "image": URI}),
        ({"image": "a.png"}, {"type": "image", "image": "a.png"}),
        ({"image_url": {"url": "a.png"}}, {"type": "image", "image": "a.png"}),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, {"type": "image", "image": "a.png"}),
        ({"type": "image_url", "image_url": "a.png"}, {"type": "image", "image": "a.png"}),
        ({"type": "image_url", "image_url": Pydantic(url="a.png", detail=None)}, {"type": "image", "image": "a.png"}),
        ({"type": "input_image", "image_url": "a.png", "detail": "auto"}, {"type": "image", "image": "a.png"}),
        ({"type": "image_pil", "image_pil": "a.png"}, {"type": "image", "image": "a.png"}),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ENCODED}},
         {"type": "image", "image": DATA}),
        ({"type": "image", "source": {"type": "url", "url": "a.png"}}, {"type": "image", "image": "a.png"}),
        ({"type": "video", "video": "a.mp4"}, {"type": "video", "video": "a.mp4"}),
        ({"type": "video", "path": "a.mp4", "video": None}, {"type": "video", "video": "a.mp4"}),
        ({"type": "video", "url": "http://x/a.mp4"}, {"type": "video", "video": "http://x/a.mp4"}),
        ({"type": "video", "base64": ENCODED}, {"type": "video", "video": DATA}),
        ({"type": "video", "video": ["1.png", "2.png"]}, {"type": "video", "video": ["1.png", "2.png"]}),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}}, {"type": "video", "video": "a.mp4"}),
        ({"type": "video_url", "video_url": "a.mp4", "fps": 0.5}, {"type": "video", "video": "a.mp4", "fps": 0.5}),
        ({"type": "input_video", "video_url": "a.mp4"}, {"type": "video", "video": "a.mp4"}),
        ({"video": "a.mp4"}, {"type": "video", "video": "a.mp4"}),
        ({"video": "a.mp4", "num_frames": 4}, {"type": "video", "video": "a.mp4", "num_frames": 4}),
    ],
)  # fmt: skip
def test_forms_of_a_part(part, expected):
    before = repr(part)
    assert read_part(part) == expected
    for parts in ([part], (part,), iter([part]), np.array([part, "x"], dtype=object)):
        (message,) = read_messages([user(parts)])
        assert message["content"][0] == expected
    assert repr(part) == before


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (5, "part 1 is int"),
        (None, "part 1 is NoneType"),
        ({}, "holds nothing and no 'type'"),
        ({"type": None, "txt": "x"}, "holds 'txt' and no 'type'"),
        ({"text": "x", "image": "a.png"}, "holds 'text', 'image' and no 'type'"),
        ({"type": "text"}, "text must be a string, not NoneType"),
        ({"type": "text", "text": 5}, "text must be a string, not int"),
        ({"type": "text", "text": "x", "image": "a.png"}, "holds 'image', which has no place"),
        ({"type": "image", "image": "a.png", "text": "x"}, "holds 'text'"),
        ({"type": "image", "image": "a.png", "max_pixels": 100}, "holds 'max_pixels'"),
        ({"type": "image", "image": "a.png", "url": "b.png"}, "more than once, by image and url"),
        ({"type": "image", "file_id": "f-1"}, "holds 'file_id'"),
        ({"type": "image", "base64": "@@@"}, "not base64"),
        ({"type": "image", "base64": 5}, "not base64"),
        ({"type": "image_url", "image_url": {}}, "its 'image_url' must be a URL"),
        ({"type": "image_url", "image_url": {"url": "a.png", "more": 1}}, "its 'image_url' must be a URL"),
        ({"type": "image", "source": {"type": "file", "file_id": "x"}}, "'source' must be of type base64"),
        ({"type": "image", "source": "a.png"}, "holds 'source'"),
        ({"type": "video"}, "a video part needs one of 'video', 'url', 'path', 'video_url' and 'base64'"),
        ({"type": "video", "video": "a.mp4", "path": "b.mp4"}, "its video more than once, by video and path"),
        ({"type": "video", "video": "a.mp4", "nframes": 3}, "holds 'nframes', which has no place in a part of type"),
        ({"type": "video", "video": "a.mp4", "max_tiles": 3}, "holds 'max_tiles'"),
        ({"type": "video", "image": "a.png"}, "a video part needs one of"),
        ({"type": "video", "video": "a.mp4", "num_frames": 3, "fps": 1}, "num_frames=3 and fps=1 both say"),
        ({"type": "video", "video": "a.mp4", "num_frames": 0}, "num_frames must be a whole number from 1 to 512"),
        ({"type": "video", "video": "a.mp4", "fps": "fast"}, "fps must be a positive number"),
        ({"type": "video_url", "video_url": {"uri": "a.mp4"}}, "its 'video_url' must be a URL"),
        ({"video": "a.mp4", "text": "x"}, "holds 'video', 'text' and no 'type'"),
        ({"type": "videos", "video": "a.mp4"}, "type 'videos' is not known; allowed are text, image and video"),
        ({"type": "image", "image": "a.png", "num_frames": 2}, "holds 'num_frames'"),
        ({"type": "input_audio", "input_audio": {}}, "type 'input_audio'"),
        ({"type": "refusal", "refusal": "no"}, "type 'refusal'"),
        ({"type": "tool_use", "id": "1", "name": "f", "input": {}}, "type 'tool_use'"),
        ({"type": "file", "file": {}}, "type 'file'"),
    ],
)  # fmt: skip
def test_parts_that_are_refused(part, message):
    with pytest.raises(ValueError, match=message):
        read_part(part, "part 1")
    with pytest.raises(ValueError, match=rf"message 2 \(user\), {message if message.startswith('part') else 'part 1'}"):
        read_messages([user("x"), user([part])])


VIDEO, PICTURE = {"type": "video", "video": "a.mp4"}, {"type": "image"}


def shown(parts):
    """Parts as one string with marks, pictures in front on lines of their own as the template puts them."""
    text, leading = "", True
    for place, part in enumerate(parts):
        text += part["text"] if part["type"] == "text" else IMAGE_MARK
        leading = leading and part["type"] == "image"
        following = parts[place + 1] if place + 1 < len(parts) else None
        if leading and following and not following.get("text", "").startswith("\n"):
            text += "\n"
    return text


@pytest.mark.parametrize(
    ("parts", "counts", "expected"),
    [
        ([VIDEO, "Q"], [2], "Frame1: <image>\nFrame2: <image>\nQ"),
        ([VIDEO, "\nQ"], [1], "Frame1: <image>\nQ"),
        (["Q", VIDEO], [2], "Q\nFrame1: <image>\nFrame2: <image>"),
        (["Q\n", VIDEO], [1], "Q\nFrame1: <image>"),
        (["Q", VIDEO, "R"], [1], "Q\nFrame1: <image>\nR"),
        ([VIDEO, VIDEO, "Q"], [2, 1], "Frame1: <image>\nFrame2: <image>\nFrame1: <image>\nQ"),
        (["A", VIDEO, "B", VIDEO, "Q"], [1, 1], "A\nFrame1: <image>\nB\nFrame1: <image>\nQ"),
        ([PICTURE, VIDEO, "Q"], [1], "<image>\nFrame1: <image>\nQ"),
        ([VIDEO, PICTURE, "Q"], [1], "Frame1: <image>\n<image>\nQ"),
        ([VIDEO, PICTURE, PICTURE, "Q"], [1], "Frame1: <image>\n<image>\n<image>\nQ"),
        ([PICTURE, VIDEO, PICTURE, "Q"], [1], "<image>\nFrame1: <image>\n<image>\nQ"),
        (["A", PICTURE, VIDEO, "Q"], [1], "A<image>\nFrame1: <image>\nQ"),
        (["A", VIDEO, PICTURE, "Q"], [1], "A\nFrame1: <image>\n<image>Q"),  # in a text a picture stands where it is put
        (["", VIDEO, "", "Q"], [1], "Frame1: <image>\nQ"),
        ([VIDEO], [1], "Frame1: <image>"),
        ([VIDEO, ""], [1], "Frame1: <image>"),
    ],
)
def test_frames_stand_on_lines_of_their_own(parts, counts, expected):
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    before = repr(parts)
    assert shown(frame_parts(parts, counts)) == expected
    assert repr(parts) == before


# ---- messages


@pytest.mark.parametrize(
    "message",
    [
        user("Q"),
        user("Q", name=None, tool_calls=None, id="msg_1", status="completed", type="message"),
        types.MappingProxyType(user("Q")),
        types.SimpleNamespace(role="user", content="Q"),
        type("Message", (), {"role": "user", "content": "Q"})(),
        Message("user", "Q"),
        Pydantic(role="user", content="Q", refusal=None),
        user(np.str_("Q")),
    ],
)
def test_forms_of_a_message(message):
    expected = [user("Q")]
    for conversation in ([message], (message,), np.array([message, None], dtype=object)[:1], iter([message])):
        assert read_messages(conversation) == expected
    assert read_messages(types.SimpleNamespace(messages=[message])) == expected


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "list of messages, not str"),
        ({"role": "user", "content": "x"}, "list of messages, not dict"),
        (None, "list of messages, not NoneType"),
        (["hello"], "message 1 is str"),
        ([None], "message 1 is NoneType"),
        ([{"content": "x"}], "message 1: its role must be a string"),
        ([{"role": 5, "content": "x"}], "role must be a string, not int"),
        ([{"role": "user"}], r"message 1 \(user\) has no content"),
        ([user(None)], "content must be a string or a list of parts, not NoneType"),
        ([user(5)], "content must be .* not int"),
        ([user(b"x")], "content must be .* not bytes"),
        ([user(TEXT)], "content must be .* not dict"),
        ([user("x", name=5)], "its name must be a string"),
        ([user("x", tool_calls=[CALL])], "only an assistant"),
        ([{"role": "assistant", "content": None}], "not NoneType"),
        ([{"role": "assistant", "tool_calls": []}], "has no content"),
        ([{"role": "assistant", "tool_calls": CALL}], "tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": ["f"]}], "call 1: a call is"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}], "call 1: a call is"),
        ([{"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}], "call 1 is of type 'custom'"),
        ([{"role": "assistant", "tool_calls": [{**CALL, "extra": 1}]}], "holds 'extra'"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}], "JSON object"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}], "JSON object"),
    ],
)  # fmt: skip
def test_messages_that_are_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        read_messages(messages)


def test_other_keys_stay():
    """A template may read them; the processor refuses those that its template does not."""
    (message,) = read_messages([user("Q", name="Bob", images=["a.png"], weight=0, empty=[], none=None)])
    assert message == user("Q", name="Bob", images=["a.png"], weight=0)
    chatty = types.SimpleNamespace(role="assistant", content="A", reasoning_content="hm", _hidden=1)
    assert read_messages([chatty]) == [{"role": "assistant", "content": "A", "reasoning_content": "hm"}]


# ---- tools


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        (CALL, {"x": 1}),
        ({"id": "1", **CALL}, {"x": 1}),
        ({"name": "f", "arguments": {"x": 1}}, {"x": 1}),
        ({"index": 0, "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}, '{"x":1}'),
        ({"function": {"name": "f", "arguments": ""}}, {}),
        ({"function": {"name": "f"}}, {}),
        (Pydantic(id=None, type="function", function=Pydantic(name="f", arguments="{}")), "{}"),
    ],
)
def test_forms_of_a_call(call, arguments):
    messages = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "assistant", "content": None, "tool_calls": (call,)},
    ]
    for message in read_messages(messages):
        assert message["content"] == ""
        (found,) = message["tool_calls"]
        assert found["function"] == {"name": "f", "arguments": arguments}
    older = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    (message,) = read_messages([older])
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]


def test_results_come_in_the_order_of_the_calls():
    calls = [{"id": name, "function": {"name": name, "arguments": "{}"}} for name in "ab"]

    def results(*identities, key="tool_call_id"):
        return [{"role": "tool", key: identity, "content": "1"} for identity in identities]

    start = [user("Q"), {"role": "assistant", "content": "", "tool_calls": calls}]
    for key in ("tool_call_id", "name"):
        assert len(read_messages([*start, *results("a", "b", key=key), user("more")])) == 5
        assert len(read_messages([*start, *results("a", key=key)])) == 3
        with pytest.raises(ValueError, match=r"message 3 \(tool\) is the result of 'b', but 'a' was called"):
            read_messages([*start, *results("b", "a", key=key)])
    # Nothing to compare with.
    assert len(read_messages(results("b", "a"))) == 2
    assert len(read_messages([*start, *results("a", "b"), user("more"), *results("z")])) == 6


def weather(place: str):
    """Look up the weather.

    Args:
        place: Where.
    """


def test_forms_of_tools():
    schema = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    assert read_tools(None) is None and read_tools([]) is None
    assert read_tools([schema, schema["function"]]) == [schema, schema["function"]]
    assert read_tools((Pydantic(**schema),)) == [schema]
    (made,) = read_tools([weather])
    assert made["function"]["name"] == "weather" and "place" in made["function"]["parameters"]["properties"]
    for wrong, message in (
        ("weather", "list of tools"),
        (schema, "list of tools"),
        (["weather"], "tool 1 is str"),
        ([schema, {"type": "web_search"}], "tool 2 is of type 'web_search'"),
        ([{"type": "function", "function": {}}], "tool 1 has no name"),
    ):
        with pytest.raises(ValueError, match=message):
            read_tools(wrong)


# ---- marks


def test_marks_and_pictures():
    assert marked_parts("What does <image> do?", []) == "What does <image> do?"
    for text, pictures in itertools.product(
        ["", "Q", "<image>", "a<image>b", "<image><image>", "x <image>\n<image> y"], [[1], [1, 2], [1, 2, 3]]
    ):
        marks = text.count(IMAGE_MARK)
        if marks and marks != len(pictures):
            for function, given in ((marked_parts, pictures), (place_images, len(pictures))):
                with pytest.raises(
                    ValueError, match=f"{marks} <image> marks in the prompt, but {len(pictures)} pictures"
                ):
                    function(text, given)
            continue
        parts = marked_parts(text, pictures)
        placed = place_images(text, len(pictures))
        assert [part["image"] for part in parts if part["type"] == "image"] == pictures
        assert "".join(part.get("text", IMAGE_MARK) for part in parts) == placed
        assert placed.endswith(text) and placed.count(IMAGE_MARK) == len(pictures)
    assert place_images("Q", 1) == "<image>\nQ"
    assert place_images("Q", 2) == "Image-1: <image>\nImage-2: <image>\nQ"
    with pytest.raises(ValueError, match="pictures"):
        place_images("Q", -1)


def test_parts_are_never_searched_for_marks():
    (message,) = read_messages([user([{"type": "text", "text": "a <image> b"}, {"type": "image", "image": 1}])])
    assert message["content"][0]["text"] == "a <image> b" and len(message["content"]) == 2


def test_every_piece_of_a_conversation_comes_out():
    """Conversations of all forms: pictures in, pictures out, in their order, and every text."""
    text_forms = [lambda t: t, lambda t: {"type": "text", "text": t}, lambda t: {"text": t, "image": None}]
    picture_forms = [
        lambda p: {"type": "image", "image": p},
        lambda p: {"type": "image_url", "image_url": {"url": p}},
        lambda p: {"image": p},
        lambda p: Pydantic(type="input_image", image_url=p, detail="auto"),
    ]
    counter = itertools.count()
    for choice in itertools.product(text_forms, picture_forms, (list, tuple, lambda x: np.array(x, dtype=object))):
        text_form, picture_form, container = choice
        said, seen, messages = [], [], []
        for role in ("system", "user", "assistant", "user"):
            texts = [f"text {next(counter)}" for _ in range(2)]
            picture = f"{next(counter)}.png"
            parts = [text_form(texts[0]), picture_form(picture), text_form(texts[1])]
            messages.append({"role": role, "content": container(parts)})
            said += texts
            seen.append(picture)
        found = [part for message in read_messages(container(messages)) for part in message["content"]]
        assert [part["text"] for part in found if part["type"] == "text"] == said
        assert [part["image"] for part in found if part["type"] == "image"] == seen
        json.dumps(found)
