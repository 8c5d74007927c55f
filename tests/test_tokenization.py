"""The SentencePiece reader, the InternLM2 conversion against the released tokenizer, the nano tokenizer."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from conftest import ROOT, golden
from helpers_sentencepiece import NORMAL_PIECES, bytes_field, number_field, piece_field, small_model
from mono_internvl.plates.tokenizer import (
    PROMPT_PHRASES,
    SYSTEM_PROMPT,
    builtin_texts,
    plate_world_texts,
    train_nano_tokenizer,
)
from mono_internvl.tokenization import (
    build_tokenizer,
    convert_tokenizer,
    internlm2,
    read_sentencepiece_model,
    save_tokenizer,
)
from mono_internvl.tokenization.sentencepiece_model import BYTE_PIECES, SPACE, PieceType


NAMED = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"]
ADDED = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
SPECIALS = ["<unk>", "<s>", "</s>", *NAMED, *ADDED]


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(small_model())
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers under test
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def nano() -> Tokenizer:
    return train_nano_tokenizer(plate_world_texts(plates=100))


@pytest.fixture(scope="session")
def nano_hf(nano: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("nano")
    save_tokenizer(nano, folder, model_max_length=4096)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def real_hf(internlm2_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(internlm2_folder)


@pytest.fixture(params=["nano_hf", "real_hf"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def random_texts(count: int, *, seed: int = 0) -> list[str]:
    """Text of every script, runs of spaces, control characters; no surrogates, and no U+2581, which means a space."""
    rng = random.Random(seed)
    ranges = [(0x20, 0x7F), (0x00, 0x20), (0x80, 0x600), (0x4E00, 0x9FFF), (0x1F300, 0x1FA00), (0xE000, 0x110000)]

    def character() -> str:
        if rng.random() < 0.2:
            return rng.choice((" ", "  ", "\n", "\r\n", "\t", "\u3000", "\ufeff", "\0", "e\u0301"))
        return chr(rng.randrange(*rng.choice(ranges))).replace(SPACE, " ")

    return ["".join(character() for _ in range(rng.randrange(1, 60))) for _ in range(count)]


# ----------------------------------------------------------------------------------------------------------------------
# The reader
# ----------------------------------------------------------------------------------------------------------------------


def test_reads_a_model_file(model_file: Path) -> None:
    model = read_sentencepiece_model(model_file)
    assert [piece.text for piece in model.pieces[259 : 259 + len(NORMAL_PIECES)]] == list(NORMAL_PIECES)
    assert [model.pieces[index].type for index in (0, 1, 3, 259, 270)] == [
        PieceType.UNKNOWN,
        PieceType.CONTROL,
        PieceType.BYTE,
        PieceType.NORMAL,
        PieceType.USER_DEFINED,
    ]
    assert model.pieces[260].score == -1.0
    assert model.identity_normalizer
    assert not (model.add_dummy_prefix or model.remove_extra_whitespaces or model.whitespace_suffix)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"hello, this is a text file\n" * 9, "not a SentencePiece model"),
        (b'{"model": {}}', "not a SentencePiece model"),
        (b"PK\x03\x04 a zip file", "not a SentencePiece model"),
        (bytes_field(9, b"another message"), "holds no pieces"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (small_model()[:-3], "not a SentencePiece model"),
        (small_model(model_type=1), "unigram model; only BPE"),
        (small_model(byte_pieces=BYTE_PIECES[:-2]), r"lacks 2 of the 256 byte pieces \(<0xFE>"),
        (small_model(extra=piece_field("", -1, PieceType.NORMAL)), "is empty or has no score"),
        (small_model(extra=bytes_field(1, bytes_field(1, b"\xff\xfe"))), "piece 277"),
        (small_model(extra=piece_field("ab", -1, PieceType.NORMAL)), "more than once"),
        (small_model(extra=piece_field("<img>", -1, PieceType.NORMAL)), "<img>"),
        (small_model(extra=piece_field("zz", -1, PieceType.UNUSED)), "UNUSED"),
        (small_model(reserved=("[UNUSED_TOKEN_141]",)), r"\[UNUSED_TOKEN_142\], .* are missing"),
        (small_model(normalizer=number_field(3, 0)), "remove_extra_whitespaces"),
        (small_model(normalizer=number_field(3, 0) + number_field(4, 0) + number_field(5, 0)), "escape_whitespaces"),
        (
            small_model(normalizer=number_field(3, 0) + number_field(4, 0) + bytes_field(2, b"map")),
            "normaliser other than identity",
        ),
        (small_model(extra=bytes_field(2, number_field(24, 1))), "treat_whitespace_as_suffix"),
    ],
)
def test_bad_files_are_named_in_the_error(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "some.model"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        convert_tokenizer(path, tmp_path / "out")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.model does not exist"):
        build_tokenizer(tmp_path / "nothing.model")
    with pytest.raises(ValueError, match="is a folder"):
        build_tokenizer(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# The conversion
# ----------------------------------------------------------------------------------------------------------------------


def test_small_model(model_file: Path) -> None:
    tokenizer = build_tokenizer(model_file)
    size = len(read_sentencepiece_model(model_file).pieces)
    assert [tokenizer.token_to_id(token) for token in SPECIALS] == [0, 1, 2, *range(size - 6, size + 9)]
    assert tokenizer.encode("").tokens == ["<s>"]
    # 'ab' scores above ' a', so the space stays alone until ' ab' joins it
    assert tokenizer.encode(" ab abcc", add_special_tokens=False).tokens == [f"{SPACE}ab", f"{SPACE}ab", "cc"]
    assert tokenizer.encode("abc\u00e9", add_special_tokens=False).tokens == ["abc", "<0xC3>", "<0xA9>"]
    assert tokenizer.encode("a", "b").tokens == ["<s>", "a", "b"]


def test_llama_s_prefix(tmp_path: Path) -> None:
    """A space before the text, as SentencePiece puts it there, and none of its own when decoded."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(small_model(reserved=(), normalizer=number_field(4, 0)))
    tokenizer = build_tokenizer(path, added=("<|im_end|>",))
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).tokens  # noqa: E731
    assert encode("ab") == [f"{SPACE}ab"] and encode(" ab") == [SPACE, f"{SPACE}ab"] and encode("") == []
    assert encode("b<|im_end|>ab") == [SPACE, "b", "<|im_end|>", f"{SPACE}ab"]
    for text in ("ab ca", " a", "  b\n", "\u4f60 ab"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    tokenizer = build_tokenizer(path, added=("<|im_end|>",), prefix_every_text=False)
    assert encode("ab<|im_end|>ab") == [f"{SPACE}ab", "<|im_end|>", "ab"]


FINE_TUNED = {"<loc>": 286, "</loc>": 287}


@pytest.mark.parametrize("form", ["added_tokens.json", "added_tokens_decoder", "tokenizer.json", "all, at odds"])
def test_tokens_added_in_fine_tuning_keep_their_ids(tmp_path: Path, form: str) -> None:
    """Behind 277 pieces and the nine, whichever file holds them; an official folder's `tokenizer.model` beside it."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.model").write_bytes(small_model())
    every = {**{name: 277 + i for i, name in enumerate(ADDED)}, **FINE_TUNED}
    entries = {str(i): {"content": name, "special": name != "</loc>", "normalized": False} for name, i in every.items()}
    entries["3"] = {"content": "<0x00>", "special": False}
    entries["276"] = {"content": "<|turn|>", "special": True}  # a piece that was renamed
    if form == "added_tokens.json":
        (source / form).write_text(json.dumps({**every, "<|turn|>": 276}))
        special = {"additional_special_tokens": [name for name in every if name != "</loc>"]}
        (source / "special_tokens_map.json").write_text(json.dumps({**special, "eos_token": {"content": "<|turn|>"}}))
    if form in ("added_tokens_decoder", "all, at odds"):
        settings = {"added_tokens_decoder": entries, "eos_token": "<|turn|>"}
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    if form == "all, at odds":
        (source / "added_tokens.json").write_text(json.dumps({"<stale>": 286, "<loc>": 287}))
    if form == "tokenizer.json":
        added = [{"id": int(i), **entry} for i, entry in entries.items()]
        (source / form).write_text(json.dumps({"added_tokens": added}))
    convert_tokenizer(source / "tokenizer.model", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in every} == every
    assert len(tokenizer) == 288 and tokenizer.convert_ids_to_tokens(276) == "<|turn|>"
    assert tokenizer("a<loc>b</loc>", add_special_tokens=False).input_ids == [260, 286, 261, 287]
    assert tokenizer.decode([260, 286, 287], skip_special_tokens=True) == "a</loc>"
    assert tokenizer.eos_token == ("</s>" if form == "tokenizer.json" else "<|turn|>")


def test_ids_that_no_file_names_are_reserved_and_collisions_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(small_model())
    (tmp_path / "added_tokens.json").write_text(json.dumps({**{n: 277 + i for i, n in enumerate(ADDED)}, "<far>": 290}))
    tokenizer = internlm2.tokenizer_of_model_file(tmp_path / "tokenizer.model")
    assert tokenizer.token_to_id("<far>") == 290 and tokenizer.id_to_token(289) == "<|reserved_289|>"
    (tmp_path / "added_tokens.json").write_text(json.dumps({"abc": 286}))
    with pytest.raises(ValueError, match="the token abc should have the id 286"):
        internlm2.tokenizer_of_model_file(tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<far>": "x"}))
    with pytest.raises(ValueError, match="added_tokens.json: .*'x' is not an added token"):
        internlm2.tokenizer_of_model_file(tmp_path / "tokenizer.model")


def test_renamed_and_added_tokens_can_be_chosen(model_file: Path) -> None:
    tokenizer = build_tokenizer(model_file, renamed={"[UNUSED_TOKEN_146]": "<|turn|>"}, added=["<pad>"])
    size = len(read_sentencepiece_model(model_file).pieces)
    assert (tokenizer.token_to_id("<|turn|>"), tokenizer.token_to_id("<pad>")) == (size - 1, size)
    assert tokenizer.token_to_id("<img>") is None
    assert tokenizer.token_to_id("[UNUSED_TOKEN_145]") == size - 2
    with pytest.raises(ValueError, match="<pad> occur more than once"):
        build_tokenizer(model_file, added=["<pad>", "<pad>"])


def test_progress_after_two_seconds_only(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    build_tokenizer(model_file, progress=lambda done, total: calls.append((done, total)))
    assert not calls
    monkeypatch.setattr(internlm2, "_PROGRESS_AFTER_SECONDS", -1.0)
    build_tokenizer(model_file, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][1] == len(NORMAL_PIECES)


def test_save_leaves_only_the_two_files(model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    tokenizer = convert_tokenizer(model_file, out, model_max_length=77)
    assert sorted(path.name for path in out.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["extra_special_tokens"] == [*NAMED, *ADDED]
    assert config["tokenizer_class"] == "TokenizersBackend" and config["model_max_length"] == 77
    merges = json.loads((out / "tokenizer.json").read_text())["model"]["merges"]
    assert merges and all(isinstance(merge, str) for merge in merges)
    assert Tokenizer.from_file(str(out / "tokenizer.json")).to_str() == tokenizer.to_str()


def test_goldens_of_the_released_tokenizer(real_hf: Any) -> None:
    cases = json.loads(golden("tokenizer", "encodings.json").read_text(encoding="utf-8"))
    assert len(cases) == 24
    for case in cases:
        if case["text"] != "[UNUSED_TOKEN_145]":
            assert real_hf(case["text"]).input_ids == case["ids"], case["text"]
            assert real_hf.convert_ids_to_tokens(case["ids"]) == case["tokens"]
        assert real_hf.decode(case["ids"], skip_special_tokens=True) == case["decode_skip"]


def test_golden_conversations_survive_text(real_hf: Any) -> None:
    """The ids of the released training code come back from their own text."""
    samples = json.loads(golden("tokenizer", "labels.json").read_text(encoding="utf-8"))
    assert len(samples) == 2
    for sample in samples:
        text = real_hf.decode(sample["input_ids"], skip_special_tokens=False)
        assert real_hf(text, add_special_tokens=False).input_ids == sample["input_ids"]


def test_real_special_ids(real_hf: Any) -> None:
    assert real_hf.convert_tokens_to_ids(SPECIALS) == [0, 1, 2, *range(92538, 92553)]
    assert len(real_hf) == 92553


def test_real_round_trip_beyond_the_trained_characters(real_hf: Any) -> None:
    text = "def f(x):\n\treturn  x ** 2   # 你好，世界 — Ünïcödé 😀👩‍👩‍👧\r\n" * 300
    assert real_hf.decode(real_hf(text).input_ids, skip_special_tokens=True) == text


# ----------------------------------------------------------------------------------------------------------------------
# What holds for every tokenizer of ours
# ----------------------------------------------------------------------------------------------------------------------


def test_round_trip_of_random_unicode(tokenizer: Any) -> None:
    for text in random_texts(1500):
        ids = tokenizer(text).input_ids
        assert ids[0] == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_in_trusted_text(tokenizer: Any) -> None:
    ids = tokenizer("".join(SPECIALS)).input_ids
    assert ids == [1, *tokenizer.convert_tokens_to_ids(SPECIALS)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>" + "".join(SPECIALS)
    image = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert image == len(tokenizer) - 7


def test_split_special_tokens_never_gives_a_special_id(tokenizer: Any) -> None:
    special_ids = set(tokenizer.convert_tokens_to_ids(SPECIALS))
    rng = random.Random(1)
    pieces = [*SPECIALS, "[UNUSED_TOKEN_145]", "<image>", "<", ">", "|", " ", "\n", "/", "im_end", "\u4f60", "x"]
    texts = ["".join(SPECIALS), *("".join(rng.choices(pieces, k=12)) for _ in range(300)), *random_texts(200, seed=2)]
    for text in texts:
        ids = tokenizer(text, split_special_tokens=True, add_special_tokens=False).input_ids
        assert not special_ids & set(ids), text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    # the switch holds for its call only
    assert tokenizer("<img>").input_ids == [1, tokenizer.convert_tokens_to_ids("<img>")]


def test_reserved_names_are_plain_text(tokenizer: Any) -> None:
    for name in internlm2.RENAMED_PIECES:
        ids = tokenizer(name, add_special_tokens=False).input_ids
        assert len(ids) > 1 and not set(ids) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(ids, skip_special_tokens=True) == name


def test_settings_and_saving_again(tokenizer: Any, tmp_path: Path) -> None:
    assert tokenizer.padding_side == "left"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<s>",
        "</s>",
        "</s>",
        "<unk>",
    )
    assert set(tokenizer.all_special_tokens) == set(SPECIALS)
    batch = tokenizer(["a b c d", "a"], padding=True)
    assert batch.input_ids[1][0] == 2 and batch.attention_mask[1][0] == 0
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*random_texts(100, seed=3), "".join(SPECIALS), SYSTEM_PROMPT]:
        assert again(text).input_ids == tokenizer(text).input_ids
    assert again.decode(again(" <ref>a</ref>").input_ids, skip_special_tokens=True) == " a"


# ----------------------------------------------------------------------------------------------------------------------
# nano
# ----------------------------------------------------------------------------------------------------------------------


def test_nano_ids(nano: Tokenizer) -> None:
    assert nano.get_vocab_size() == 768
    tokens = [nano.id_to_token(index) for index in range(768)]
    assert tokens[:259] == ["<unk>", "<s>", "</s>", *BYTE_PIECES]
    assert tokens[-15:] == [*NAMED, *ADDED]
    assert set(map(chr, range(0x21, 0x7F))) | {SPACE, "\n", *PROMPT_PHRASES} < set(tokens)


def test_nano_numbers_are_read_digit_by_digit(nano: Tokenizer) -> None:
    assert nano.encode(" 42", add_special_tokens=False).tokens == [SPACE, "4", "2"]
    rng = random.Random(4)
    for _ in range(500):
        text = "".join(rng.choices("0123456789 .,aetx\n[]", k=30))
        for token in nano.encode(text, add_special_tokens=False).tokens:
            assert len(token) == 1 or not any(character.isdigit() for character in token)


def test_nano_pieces_stay_inside_words(nano: Tokenizer) -> None:
    merges = json.loads(nano.to_str())["model"]["merges"]
    for left, right in merges:
        piece = left + right
        assert piece.removeprefix(SPACE).isascii() and piece.removeprefix(SPACE).isalpha(), piece
    assert nano.encode("a\n\nb", add_special_tokens=False).tokens == ["a", "\n", "\n", "b"]


def test_nano_prompts_are_short(nano: Tokenizer) -> None:
    assert len(nano.encode(SYSTEM_PROMPT, add_special_tokens=False).ids) == 4
    for word in ("system", "user", "assistant", "circle", " triangle", " purple", "yellow", "top", " left", " center"):
        assert len(nano.encode(word, add_special_tokens=False).ids) == 1, word
    assert len(nano.encode("How many squares are there?", add_special_tokens=False).ids) <= 7
    assert len(nano.encode("Where is the orange star?", add_special_tokens=False).ids) == 6


def test_nano_learns_nothing_from_special_tokens() -> None:
    tagged = [text for text in plate_world_texts(plates=20) if "<box>" in text]
    assert tagged
    bare = [text.replace("<ref>", "\n").replace("</ref>", "\n") for text in tagged]
    bare = [text.replace("<box>", "\n").replace("</box>", "\n") for text in bare]
    assert train_nano_tokenizer(tagged).to_str() == train_nano_tokenizer(bare).to_str()


def test_nano_vocab_size_limits() -> None:
    with pytest.raises(ValueError, match="must be above 373"):
        train_nano_tokenizer([], vocab_size=300)
    with pytest.raises(ValueError, match="add texts or take vocab_size="):
        train_nano_tokenizer([], vocab_size=100_000)
    assert train_nano_tokenizer([], vocab_size=512).get_vocab_size() == 512
    texts = list(builtin_texts())
    assert texts and all(texts)


def test_nano_is_deterministic(tmp_path: Path) -> None:
    """Two processes with different hash seeds write the same bytes."""
    files = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        command = [sys.executable, "-m", "mono_internvl.plates.tokenizer", str(out), "--plates", "30"]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
        files.append([(path.name, path.read_bytes()) for path in sorted(out.iterdir())])
    assert files[0] == files[1]


def test_bundled_tokenizer_is_the_nano_one() -> None:
    """The repository's own tokenizer.json has the structure that the model's ids rely on."""
    bundled = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False)
    assert bundled.convert_tokens_to_ids(SPECIALS) == [0, 1, 2, *range(len(bundled) - 15, len(bundled))]
    assert len(bundled(SYSTEM_PROMPT).input_ids) == 5
