"""Records of data files: each thing in one is used or refused, whatever trainer it was written for."""

import base64
import copy
import gzip
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from helpers_video import numbered, write_video
from mono_internvl.common.record import picture_sizes
from mono_internvl.training.data import encode_conversation
from mono_internvl.training.loading import Conversations, Key
from mono_internvl.training.records import BadSample, read_record
from mono_internvl.training.sources import FileRecords, Source, open_sources


PLATE = ROOT / "examples" / "plate.png"
BYTES = PLATE.read_bytes()
A = {"role": "assistant", "content": "2"}
Q = {"role": "user", "content": "How many?"}
PLAIN = [("user", "How many?"), ("assistant", "2")]
IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "How many?"}


def ask(*parts):
    return {"role": "user", "content": list(parts)}


def shape(messages):
    """Roles with their texts, pictures as I."""
    return [
        (m["role"], m["content"] if isinstance(m["content"], str) else [p.get("text", "I") for p in m["content"]])
        for m in messages
    ]


# ------------------------------------------------------------------------------------------------------------ pictures

SOURCES = {
    "path": "plate.png",
    "absolute": str(PLATE),
    "file": PLATE.as_uri(),
    "data": "data:image/png;base64," + base64.b64encode(BYTES).decode(),
    "raw base64": base64.b64encode(BYTES).decode(),
    "bytes": BYTES,
    "datasets, undecoded": {"bytes": BYTES, "path": "gone.png"},
    "datasets, by path": {"bytes": None, "path": "plate.png"},
    "PIL": Image.open(PLATE),
    "pathlib": PLATE,
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("place", ["record", "list", "part", "untyped part"])
def test_every_source_of_a_picture_is_seen(nano_processor, name, place):
    source = SOURCES[name]
    row = {
        "record": {"image": source, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "2"}]},
        "list": {"images": [source], "messages": [ask(IMAGE, TEXT), A]},
        "part": {"messages": [ask({"type": "image", "image": source}, TEXT), A]},
        "untyped part": {"messages": [ask({"image": source}, {"text": "?"}), A]},
    }[place]
    messages = read_record(row, PLATE.parent)
    encoded = encode_conversation(nano_processor, messages, max_tiles=1)
    with Image.open(PLATE) as plate:
        assert picture_sizes(messages) == [plate.size]
    assert len(encoded["pixel_values"]) == 1
    assert int((encoded["input_ids"] == nano_processor.image_token_id).sum()) == nano_processor.tokens_per_tile


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "plate.png"}},
        {"type": "image_url", "image_url": {"url": "plate.png", "detail": "auto"}},
        {"type": "image_url", "image_url": "plate.png"},
        {"type": "input_image", "image_url": "plate.png"},
        {"type": "image", "url": "plate.png"},
        {"type": "image", "path": "plate.png", "text": None, "image": None},
        {"type": "image", "base64": base64.b64encode(BYTES).decode()},
        {"type": "image", "bytes": BYTES},
        {"type": "image_url", "image_url": {"url": "plate.png", "detail": "high"}, "cache_control": {"type": "x"}},
        {"type": "image", "source": {"type": "url", "url": "plate.png"}},
        {"type": "image", "source": {"type": "base64", "data": base64.b64encode(BYTES).decode(), "media_type": "x"}},
    ],
)
def test_every_part_with_a_picture_is_one(part):
    (turn, _) = read_record({"messages": [ask(part, TEXT), A]}, PLATE.parent)
    assert turn["content"][0]["image"] in (str(PLATE), BYTES) and turn["content"][1] == TEXT


@pytest.mark.parametrize("key", ["video", "path", "url", "video_url"])
def test_a_part_with_a_video_is_one(key, nano_processor, tmp_path):
    """Its path starts from the record's folder; packs are planned by the tokens it will have."""
    write_video(tmp_path / "clip.avi", 20)
    part = {"type": "video_url" if key == "video_url" else "video", key: "clip.avi", "num_frames": 3, "image": None}
    messages = read_record({"messages": [ask({"type": "image", "image": PLATE}, part, TEXT), A]}, tmp_path)
    assert messages[0]["content"][1] == {"type": "video", "video": str(tmp_path / "clip.avi"), "num_frames": 3}
    example = encode_conversation(nano_processor, messages, max_tiles=4)
    with Image.open(PLATE) as plate:
        assert picture_sizes(messages) == [plate.size]
    assert len(example["pixel_values"]) == 1 + 3
    assert nano_processor.count_tokens(messages, picture_sizes(messages), max_tiles=4) == len(example["input_ids"])


def test_a_video_of_frames_is_one(nano_processor, tmp_path):
    frames = [str(tmp_path / f"{number}.png") for number in range(12)]
    for number, frame in enumerate(frames):
        numbered(number).save(frame)
    names = [Path(frame).name for frame in frames]
    for video in (names, np.array(names, dtype=object), [Path(frame) for frame in frames]):
        messages = read_record({"messages": [ask({"video": video, "num_frames": 4}, TEXT), A]}, tmp_path)
        assert messages[0]["content"][0] == {"type": "video", "video": frames, "num_frames": 4}
    assert len(encode_conversation(nano_processor, messages, max_tiles=1)["pixel_values"]) == 4


def test_paths_of_windows_and_of_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "pics").mkdir()
    shutil.copy(PLATE, tmp_path / "pics" / "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("pics\\a.png", "~/pics/a.png"):
        (turn, _) = read_record({"messages": [Q, A], "images": [name]}, tmp_path)
        assert turn["content"][1]["image"] == str(tmp_path / "pics" / "a.png")


# --------------------------------------------------------------------------------------------------------------- forms


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"query": "a", "response": "b"}, [("user", "a"), ("assistant", "b")]),
        (
            {"query": "a", "response": "b", "history": [["x", "y"]], "system": "S", "images": []},
            [("system", "S"), ("user", "x"), ("assistant", "y"), ("user", "a"), ("assistant", "b")],
        ),
        ({"instruction": "a", "input": "i", "output": "b"}, [("user", "a\ni"), ("assistant", "b")]),
        ({"instruction": "a", "input": "", "output": "b", "history": []}, [("user", "a"), ("assistant", "b")]),
        ({"prompt": "a", "completion": "b"}, [("user", "a"), ("assistant", "b")]),
        (
            {"prompt": [Q], "completion": [A], "images": [PLATE]},
            [("user", ["", "I", "\nHow many?"]), ("assistant", "2")],
        ),
        (
            {"system": "S", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            [("system", "S"), ("user", "a"), ("assistant", "b")],
        ),
        ({"messages": [ask("How many?"), A]}, [("user", ["How many?"]), ("assistant", "2")]),
        (
            {"image": PLATE, "messages": [{"role": "system", "content": ""}, {"role": "user", "content": ""}, A]},
            [("system", ""), ("user", ["", "I", "\n"]), ("assistant", "2")],
        ),
        ({"messages": [ask("<img>a</img>"), A]}, [("user", ["<img>a</img>"]), ("assistant", "2")]),
        ({"messages": [Q, A], "images": np.array([PLATE], object)}, [("user", ["", "I", "\nHow many?"]), PLAIN[1]]),
        # A word, not a mark: in a part, and where no picture is given.
        (
            {"messages": [ask(IMAGE, {"type": "text", "text": "An <image>"}), A], "images": [PLATE]},
            [("user", ["I", "An <image>"]), ("assistant", "2")],
        ),
        ({"messages": [{"role": "user", "content": "An <image>?"}, A]}, [("user", "An <image>?"), ("assistant", "2")]),
        (
            {"messages": [Q, A], "image": None, "images": [], "tools": None, "x": ""},
            PLAIN,
        ),
        (
            {"messages": [Q, A], "image": float("nan"), "id": 3, "width": 7, "source": "s"},
            PLAIN,
        ),
        (
            {"messages": [{**Q, "name": None}, {**A, "tool_calls": [], "loss": True}]},
            PLAIN,
        ),
        (
            {"messages": [ask(TEXT), A, {"role": "user", "content": "<image>?"}, A], "images": [PLATE]},
            [("user", ["How many?"]), ("assistant", "2"), ("user", ["", "I", "?"]), ("assistant", "2")],
        ),
        (
            {"messages": [ask(TEXT), A], "images": [PLATE, PLATE]},
            [("user", ["Image-1: ", "I", "\nImage-2: ", "I", "\n", "How many?"]), ("assistant", "2")],
        ),
    ],
)
def test_forms_that_are_understood(row, expected):
    before = copy.deepcopy(row)
    assert shape(read_record(row)) == expected
    assert repr(row) == repr(before)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([], "a record is a mapping, not list"),
        ({"text": "a"}, "no conversations or messages .*it has text"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [Q, A], "conversations": [Q, A]}, "conversations as well as messages"),
        ({"messages": ["hello", "hi"]}, "turn 1: a turn is a mapping .*not str"),
        ({"messages": {"role": ["user"], "content": ["a"]}}, "messages: a list is wanted, not dict"),
        ({"messages": [Q, {"role": "tool", "content": "42"}]}, "turn 2: unknown speaker 'tool'"),
        ({"messages": [Q, {"role": "assistant", "content": None}]}, "turn 2: .*no text"),
        ({"messages": [Q, {**A, "tool_calls": [{"id": 1}]}]}, "turn 2: tool_calls: "),
        ({"messages": [Q, {**A, "loss_scale": 0.5}]}, "turn 2: loss_scale: 0.5"),
        ({"messages": [Q, {**A, "loss": "no"}]}, "turn 2: loss: 'no'"),
        ({"messages": [{**Q, "loss": True}, A]}, "turn 1: loss: only answers"),
        ({"messages": [Q, {**A, "loss": True, "weight": 0}]}, "loss and weight contradict"),
        ({"messages": [Q, {**A, "reasoning": "so"}]}, "turn 2: unknown key 'reasoning'"),
        ({"messages": [Q, {"role": "assistant", "content": 5}]}, "turn 2: .*int, not a string"),
        ({"messages": [{**Q, "from": "gpt"}, A]}, "from and role differ"),
        ({"messages": [ask({"type": "video", "video": ""}), A]}, "turn 1, part 1: a video part needs one of 'video'"),
        ({"messages": [ask({"type": "video", "video": 5}), A]}, "turn 1, part 1: 5 is no video; a path"),
        ({"messages": [ask({"type": "video", "video": ["a.png", 5]}), A]}, "part 1, frame 2: 5 is no picture"),
        ({"messages": [ask({"type": "video", "video": "a", "fps": 1, "num_frames": 2}), A]}, "part 1: .* both say"),
        ({"messages": [ask({"type": "video", "video": "a", "nframes": 2}), A]}, "part 1 holds 'nframes'"),
        ({"messages": [ask({"type": "video", "video": "a", "path": "b"}), A]}, "more than once, by video and path"),
        ({"messages": [ask({"type": "videos", "videos": ["a.mp4"]}), A]}, "part 1: videos: a video is a part"),
        ({"messages": [Q, {"role": "assistant", "content": [{"video": "a.mp4"}]}]}, "pictures and videos belong"),
        ({"messages": [ask({"type": "audio"}), A]}, "audio: the model hears nothing"),
        ({"messages": [ask({"type": "imge", "image": "a"}), A]}, "unknown type 'imge'; allowed are text"),
        ({"messages": [ask({"type": "text", "text": 5}), A]}, "part 1: text is int"),
        ({"messages": [ask({"type": "text", "text": "a", "image": "b.png"}), A]}, "part 1: unknown key 'image'"),
        (
            {"messages": [ask({"type": "image", "image": "a", "url": "b"}), A]},
            "image and url: a picture has one",
        ),
        ({"messages": [ask({"type": "image", "image": "a", "max_pixels": 9}), A]}, "part 1: unknown key 'max_pixels'"),
        ({"messages": [ask({"type": "image", "image": ""}), A]}, "part 1: '' is no picture"),
        ({"messages": [ask(7), A]}, "part 1: a part is a mapping or a string, not int"),
        ({"messages": [ask(IMAGE, TEXT), A]}, "1 <image> marks and open image parts for 0 pictures"),
        (
            {"messages": [{"role": "system", "content": [IMAGE]}, Q, A], "images": ["a"]},
            "in a turn of system",
        ),
        ({"messages": [ask({"image": "a"}), A], "images": ["a"]}, "1 pictures beside 1 in parts"),
        ({"messages": [Q, A], "images": [None]}, "images 1: None is no picture"),
        ({"messages": [Q, A], "images": [float("nan")]}, "images 1: nan is no picture"),
        ({"messages": [Q, A], "images": [7]}, "images 1: 7 is no picture"),
        ({"messages": [Q, A], "images": ["s3://a/b.png"]}, "only http, https, file and data"),
        ({"messages": [Q, A], "images": ["a"], "image": "a"}, "image and images"),
        ({"messages": [Q, A], "image_path": "a.png"}, "unknown key 'image_path'"),
        # A picture that is missing, or whose place is written as other models' data does.
        *(
            ({"messages": [{"role": "user", "content": "<image>?"}, A], "images": nothing}, "images: empty, but")
            for nothing in (None, [], "", {}, float("nan"))
        ),
        *(
            (
                {"messages": [{"role": "user", "content": f"{mark}?"}, A], "images": ["a.png"]},
                "1 pictures without a place",
            )
            for mark in ("<|vision_start|><|image_pad|><|vision_end|>", "<image_1>", "<IMAGE>", "<|image_2|>", "[IMG]")
        ),
        ({"messages": [Q, {**A, "content": "<image>"}], "images": ["a.png"]}, "'<image>' in a turn of assistant"),
        ({"messages": [Q, A], "system": "<image>", "images": ["a.png"]}, "'<image>' in a turn of system"),
        (
            {"query": "Picture 1: <img>a.png</img>?", "response": "b"},
            "turn 1: '<img>a.png</img>': pictures are not read",
        ),
        # Turns that say nothing.
        ({"messages": [Q, A, Q, {**A, "content": ""}]}, "turn 4: a turn of assistant is empty"),
        ({"system": "S", "messages": [Q, {**A, "content": " \n"}]}, "turn 2: a turn of assistant is empty"),
        ({"messages": [{"role": "user", "content": ""}, A]}, "turn 1: a turn of user is empty"),
        ({"messages": [Q, {**A, "content": [{"type": "text", "text": ""}]}]}, "turn 2: a turn of assistant is empty"),
        ({"messages": [Q, A], "imagess": ["a"]}, "did you mean images"),
        ({"messages": [Q, A], "videos": ["a.mp4"]}, "videos: a video is a part of a turn of user: "),
        ({"messages": [Q, A], "tools": [{}]}, "tools: "),
        ({"messages": [Q, A], "objects": {"bbox": [[1, 2, 3, 4]]}}, "objects: grounding"),
        ({"messages": [Q, A], "rejected_response": "b"}, "rejected_response: preferences"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen: preferences"),
        ({"prompt": "a", "completion": [A]}, "prompt and completion: both"),
        ({"prompt": "a"}, "completion: missing"),
        ({"query": "a", "response": ""}, "response: empty"),
        ({"query": "a", "response": "b", "history": [["x"]]}, "history, pair 1"),
        ({"query": "a", "response": "b", "history": [["x", None]]}, "turn 2: .*no text"),
        ({"instruction": "a", "output": "b", "input": 5}, "input: a text is wanted, not int"),
        ({"system": 5, "messages": [Q, A]}, "system: a text is wanted"),
        ({"system": "a", "messages": [{"role": "system", "content": "b"}, Q, A]}, "system prompt already"),
        ({"image": "", "messages": [{"role": "user", "content": "<image>?"}, A]}, "image: empty, but"),
        (
            {"images": ["a"], "messages": [{"role": "user", "content": "<image><image>?"}, A]},
            "2 <image> .* 1 pictures",
        ),
        ({"images": ["a"], "messages": [A]}, "no user's turn"),
    ],
)
def test_forms_that_are_refused(row, words):
    with pytest.raises(ValueError, match=words):
        read_record(row)


def test_keys_to_ignore_are_named_by_the_source(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [Q, A], "score": 0.5}))
    with pytest.raises(BadSample, match="a.jsonl, line 1: the record: unknown key 'score'.*ignore"):
        FileRecords(tmp_path / "a.jsonl")[0]
    (source,) = open_sources([{"path": tmp_path / "a.jsonl", "ignore": ["score"]}])
    assert source.records[0].messages == [Q, A]


# -------------------------------------------------------------------------------------------------- what is learnt


def learnt(processor, row):
    labels = encode_conversation(processor, read_record(row))["labels"]
    return processor.tokenizer.decode(labels[labels >= 0])


@pytest.mark.parametrize("option", [{"loss": False}, {"train": 0}, {"weight": 0.0}, {"loss_scale": 0}])
def test_an_answer_that_is_not_to_be_learnt_is_not(nano_processor, option):
    first, second = {"role": "assistant", "content": "red"}, {"role": "assistant", "content": "blue"}
    assert learnt(nano_processor, {"messages": [Q, {**first, **option}, Q, second]}) == "blue<|im_end|>"
    assert learnt(nano_processor, {"messages": [Q, first, Q, {**second, **option}]}) == "red<|im_end|>"
    assert learnt(nano_processor, {"prompt": [Q, first, Q], "completion": [second]}) == "blue<|im_end|>"
    with pytest.raises(ValueError, match="no answer to learn"):
        learnt(nano_processor, {"messages": [Q, {**first, **option}]})


def test_the_records_system_prompt_is_in_the_prompt(nano_processor):
    rows = [
        {"system": "In French.", "messages": [Q, A]},
        {"messages": [{"role": "system", "content": "In French."}, Q, A]},
    ]
    first, second = (encode_conversation(nano_processor, read_record(row))["input_ids"].tolist() for row in rows)
    assert first == second and "In French." in nano_processor.tokenizer.decode(first)


# ------------------------------------------------------------------------------------------------------------ any form


def any_record(rng: random.Random, sources: list) -> tuple[dict, int]:
    """A record of some form with some pictures, sometimes spoilt, and the number of pictures it names."""
    given: list = []
    turns = []
    for _ in range(rng.randint(1, 3)):
        kind = rng.choice(["string", "marks", "inline", "open", "word"])
        count = rng.randint(1, 2)
        picked = [rng.choice(sources) for _ in range(count)]
        if kind == "string":
            content = "How many?"
        elif kind == "marks":
            content = "<image> and " * count
            given += picked
        elif kind == "inline":
            key = rng.choice(["image", "url", "path"])
            content = [{"type": "image", key: str(PLATE)} for _ in picked] + [TEXT]
        elif kind == "open":
            content = [IMAGE] * count + [{"type": "text", "text": "an <image>"}]
            given += picked
        else:
            content = [{"type": "text", "text": "<image> is a word"}]
        turns += [{"role": "user", "content": content}, dict(A)]
    if rng.random() < 0.2:
        given = given[1:] if rng.random() < 0.5 else [*given, rng.choice(sources)]
    row: dict = {rng.choice(["messages", "conversations"]): turns}
    if given or rng.random() < 0.5:
        row["images"] = given
    if rng.random() < 0.2:
        row[rng.choice(["videos", "image_url", "pixels", "tools"])] = ["a"]
    if rng.random() < 0.2:
        spoilt = rng.choice(turns)
        spoilt[rng.choice(["content", "role", "extra", "loss"])] = rng.choice(
            [None, 5, float("nan"), [], {}, "x", [None]]
        )
    # Counted at the end: a spoilt turn may have lost its own.
    parts = [part for turn in turns if isinstance(turn["content"], list) for part in turn["content"] if part]
    inline = sum(part["type"] == "image" and len(part) > 1 for part in parts)
    return row, len(given) + inline


def test_pictures_in_are_pictures_out_or_an_error(nano_processor):
    rng, used, refused, encoded = random.Random(0), 0, 0, 0
    sources = [str(PLATE), BYTES, {"bytes": BYTES, "path": None}, Image.open(PLATE)]
    for _ in range(400):
        row, pictures = any_record(rng, sources)
        try:
            messages = read_record(row)
        except ValueError:
            refused += 1
            continue
        parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
        assert sum("image" in part for part in parts) == sum(p["type"] == "image" for p in parts) == pictures, row
        used += 1
        if used % 10 == 0 and len(row) < 3:
            ids = encode_conversation(nano_processor, messages, max_tiles=max(pictures, 1))["input_ids"]
            assert int((ids == nano_processor.image_token_id).sum()) >= pictures * nano_processor.tokens_per_tile
            encoded += 1
    assert used > 100 and refused > 100 and encoded > 10


# --------------------------------------------------------------------------------------------------------------- files


def test_files_as_other_tools_write_them(tmp_path):
    line = json.dumps({"messages": [Q, A]})
    odd = json.dumps({"messages": [{"role": "user", "content": "a\u2028b\u0085c\x0cd"}, A]}, ensure_ascii=False)
    files = {
        "bom.jsonl": (line.encode("utf-8-sig"), 1),
        "bom.json": (f"[{line}]".encode("utf-8-sig"), 1),
        "only_bom_first.jsonl": (b"\xef\xbb\xbf\n" + line.encode(), 1),
        "blank.jsonl": (f"\n{line}\r\n\n  \n{line}\n\n".encode(), 2),
        "odd.jsonl": (f"{odd}\n{odd}".encode(), 2),
        "CAPITALS.JSONL": (line.encode(), 1),
        "CAPITALS.JSON": (f"[{line}]".encode(), 1),
        "lines.json": (f"{line}\n{line}\n".encode(), 2),
        "one.json": (line.encode(), 1),
        "nan.jsonl": (line.replace("{", '{"id": NaN, "image": NaN, ', 1).encode(), 1),
    }
    for name, (content, count) in files.items():
        (tmp_path / name).write_bytes(content)
        (source,) = open_sources([tmp_path / name])
        assert len(source.records) == count, name
        assert source.records[count - 1].messages[1] == A, name
    assert FileRecords(tmp_path / "odd.jsonl")[1].messages[0]["content"] == "a\u2028b\u0085c\x0cd"
    assert FileRecords(tmp_path / "nan.jsonl")[0].where.endswith("line 1")


def test_files_that_cannot_be_read_say_why(tmp_path):
    line = json.dumps({"messages": [{"role": "user", "content": "图片里有什么"}, A]}, ensure_ascii=False)
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        for name in ("u.jsonl", "u.json"):
            (tmp_path / name).write_text(line, encoding=encoding)
            with pytest.raises(ValueError, match=f"{name} is UTF-16"):
                FileRecords(tmp_path / name)
    (tmp_path / "g.jsonl").write_text(line, encoding="gbk")
    with pytest.raises(BadSample, match="g.jsonl, line 1: not UTF-8"):
        FileRecords(tmp_path / "g.jsonl")[0]
    (tmp_path / "g.json").write_text(line, encoding="gbk")
    with pytest.raises(ValueError, match="g.json is not UTF-8"):
        FileRecords(tmp_path / "g.json")
    (tmp_path / "n.json").write_text("5")
    with pytest.raises(ValueError, match="a list of records or one record, found int"):
        FileRecords(tmp_path / "n.json")
    (tmp_path / "d.jsonl").write_text("[" * 100_000)
    with pytest.raises(BadSample, match="d.jsonl, line 1: .*recursion"):
        FileRecords(tmp_path / "d.jsonl")[0]


def test_a_key_that_stands_twice_is_named(tmp_path):
    turns = json.dumps([Q, A])
    twice = [
        (f'{{"messages": {turns}, "image": "a.png", "image": "b.png"}}', "'image'"),
        (f'{{"messages": [{{"role": "user", "content": "a", "content": "b"}}, {json.dumps(A)}]}}', "'content'"),
    ]
    for line, key in twice:
        (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [Q, A]}) + "\n" + line)
        with pytest.raises(BadSample, match=f"a.jsonl, line 2: the key {key} stands twice"):
            FileRecords(tmp_path / "a.jsonl")[1]
        (tmp_path / "a.json").write_text(f"[{json.dumps({'messages': [Q, A]})}, {line}]")
        records = FileRecords(tmp_path / "a.json")
        assert records[0].messages == [Q, A]
        with pytest.raises(BadSample, match=f"a.json, record 1: the key {key} stands twice"):
            records[1]
    entry = json.dumps({"root": str(tmp_path), "annotation": "a.jsonl"})
    (tmp_path / "meta.json").write_text(f'{{"a": {entry}, "a": {entry}}}')
    with pytest.raises(ValueError, match="meta.json: the key 'a' stands twice"):
        open_sources([tmp_path / "meta.json"])


def test_packed_files_are_named_as_such(tmp_path):
    for name in ("p.jsonl", "p.json"):
        (tmp_path / name).write_bytes(gzip.compress(b"{}"))
        with pytest.raises(ValueError, match=f"{name} is packed .gzip.: unpack it"):
            open_sources([tmp_path / name])


def test_parquet_and_decoded_pictures(tmp_path, nano_processor):
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": [Q, A], "images": [Image.open(PLATE)]}, {"messages": [Q, A], "images": None}]
    columns = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "images": datasets.features.Sequence(datasets.Image()),
        }
    )
    table = datasets.Dataset.from_list(rows, features=columns)
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.save_to_disk(tmp_path / "saved")
    for records in (FileRecords(tmp_path / "a.parquet"), FileRecords(tmp_path / "saved")):
        tiles = [
            len(encode_conversation(nano_processor, records[i].messages, max_tiles=1)["pixel_values"]) for i in (0, 1)
        ]
        assert tiles == [1, 0]
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="b.parquet cannot be read"):
        FileRecords(tmp_path / "b.parquet")


# ---------------------------------------------------------------------------------------------------------- exceptions


class Failing:
    """Records of which each raises what its place says."""

    name, ordered = "failing.jsonl", False
    kinds = (
        StopIteration,
        IndexError,
        KeyError,
        AttributeError,
        TypeError,
        RecursionError,
        StopAsyncIteration,
        GeneratorExit,
        MemoryError,
        OSError,
    )

    def __len__(self):
        return len(self.kinds)

    def __getitem__(self, index):
        raise self.kinds[index]("inside")


@pytest.mark.parametrize("index", range(len(Failing.kinds)))
def test_no_exception_of_a_record_is_anything_but_a_bad_sample(nano_processor, index):
    conversations = Conversations([Source(Failing())], nano_processor, max_tiles=1, max_length=400)
    with pytest.raises(BadSample, match=f"failing.jsonl, record {index}.*inside") as caught:
        conversations[Key(0, index)]
    assert isinstance(caught.value.__cause__, Failing.kinds[index])
    assert conversations.length_of(Key(0, index)) == 1
    skipping = Conversations([Source(Failing())], nano_processor, max_tiles=1, max_length=400, skip_bad=True)
    assert isinstance(skipping[Key(0, index)][1], BadSample)


def test_a_file_ends_like_a_list_and_its_bad_records_do_not_end_it(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [Q, A]}) + "\n[]\n")
    records = FileRecords(tmp_path / "a.jsonl")
    with pytest.raises(IndexError):
        records[2]
    with pytest.raises(BadSample, match="line 2"):
        list(records)


def test_an_answer_before_the_first_question_is_left_out_with_a_word(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [A, Q, A]}))
    assert FileRecords(tmp_path / "a.jsonl")[0].messages == [Q, A]
    assert "a.jsonl, line 1: an answer before the first question" in caplog.text


def test_a_mark_without_a_picture_is_a_word_and_is_told(tmp_path, caplog):
    question = {"role": "user", "content": "An <image>?"}
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"messages": [question, A]})] * 2))
    records = FileRecords(tmp_path / "a.jsonl")
    assert records[0].messages == records[1].messages == [question, A]
    assert caplog.text.count("a.jsonl, line 1: a question holds <image>") == 1 and "line 2" not in caplog.text
