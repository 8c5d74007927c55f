"""A SentencePiece model file, read as what it is: a protobuf message.

The `sentencepiece` library is not needed, and not every release of it opens InternLM2's file (one piece is a literal
NUL). The few fields used here are declared at run time in a descriptor pool of their own, so no generated `_pb2`
module has to match the installed protobuf, and no other library's registration of the same message can clash.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any


BYTE_PIECES = tuple(f"<0x{value:02X}>" for value in range(256))
SPACE = "\u2581"  # SentencePiece writes a space as this character


class PieceType(IntEnum):
    """`ModelProto.SentencePiece.Type` of sentencepiece_model.proto."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place in the list."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class SentencePieceModel:
    """The part of a model file that decides how text is split.

    Attributes:
        pieces: the vocabulary, in the order of the ids.
        add_dummy_prefix: a space is put before the text.
        remove_extra_whitespaces: runs of spaces shrink to one, and those at the ends go.
        identity_normalizer: the text is not rewritten by a character map (NFKC and the like).
        whitespace_suffix: a space ends a piece instead of beginning it.
    """

    pieces: tuple[Piece, ...]
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    identity_normalizer: bool
    whitespace_suffix: bool


_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
_BPE = 2

# field numbers and defaults of sentencepiece_model.proto, which is proto2: an absent field has its default
_MESSAGES: dict[str, list[tuple[str, int, str, str]]] = {
    "SentencePiece": [("piece", 1, "bytes", ""), ("score", 2, "float", ""), ("type", 3, "int32", "1")],
    "TrainerSpec": [("model_type", 3, "int32", "1"), ("treat_whitespace_as_suffix", 24, "bool", "false")],
    "NormalizerSpec": [
        ("precompiled_charsmap", 2, "bytes", ""),
        ("add_dummy_prefix", 3, "bool", "true"),
        ("remove_extra_whitespaces", 4, "bool", "true"),
        ("escape_whitespaces", 5, "bool", "true"),
    ],
    "ModelProto": [
        ("pieces", 1, "repeated SentencePiece", ""),
        ("trainer_spec", 2, "SentencePiece.TrainerSpec", ""),
        ("normalizer_spec", 3, "SentencePiece.NormalizerSpec", ""),
    ],
}


@functools.lru_cache(maxsize=1)
def _message_classes() -> dict[str, type[Any]]:
    """The message classes, made from `_MESSAGES` (protobuf 4.22 to 7).

    All are kept, not only `ModelProto`: protobuf before 4.25 does not hold the classes of inner messages and reads
    freed memory once they are collected.
    """
    try:
        from google.protobuf import (  # type: ignore[import-untyped, unused-ignore]
            descriptor_pb2,
            descriptor_pool,
            message_factory,
        )
    except ImportError as error:
        raise ImportError("reading a SentencePiece model needs protobuf: pip install protobuf") from error

    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="mono_internvl/sentencepiece_model.proto", package="mono_internvl.sentencepiece", syntax="proto2"
    )
    scalar_types = {
        "bytes": field_type.TYPE_BYTES,
        "float": field_type.TYPE_FLOAT,
        "int32": field_type.TYPE_INT32,
        "bool": field_type.TYPE_BOOL,
    }
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for name, number, kind, default in fields:
            field = message.field.add(name=name, number=number)
            if kind in scalar_types:
                field.label, field.type = field_type.LABEL_OPTIONAL, scalar_types[kind]
                if default:
                    field.default_value = default
            else:
                field.label = field_type.LABEL_REPEATED if kind.startswith("repeated") else field_type.LABEL_OPTIONAL
                field.type = field_type.TYPE_MESSAGE
                field.type_name = f".mono_internvl.sentencepiece.{kind.split()[-1].split('.')[-1]}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"mono_internvl.sentencepiece.{name}"))
        for name in _MESSAGES
    }


def read_sentencepiece_model(model_file: str | os.PathLike[str]) -> SentencePieceModel:
    """Reads a SentencePiece BPE model with byte fallback.

    Args:
        model_file: path of a `tokenizer.model`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a SentencePiece model, is not BPE, or lacks byte pieces.
    """
    path = Path(model_file)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a SentencePiece model file such as {path / 'tokenizer.model'}")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a SentencePiece model file")
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{path} is empty; expected a SentencePiece model file")
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    return parse_sentencepiece_model(data, name=str(path))


def parse_sentencepiece_model(data: bytes, *, name: str = "the model") -> SentencePieceModel:
    """Reads the bytes of a SentencePiece BPE model; `name` stands for it in errors. Raises ValueError as above."""
    proto_class = _message_classes()["ModelProto"]
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]

    proto = proto_class()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise ValueError(f"{name} is not a SentencePiece model: {error}") from error
    # the protobuf format skips what it does not know, so a foreign file may parse as an empty message
    if not proto.pieces:
        raise ValueError(f"{name} is not a SentencePiece model: it holds no pieces")
    model_type = proto.trainer_spec.model_type
    if model_type != _BPE:
        kind = _MODEL_TYPES.get(model_type, f"type {model_type}")
        raise ValueError(f"{name} is a SentencePiece {kind} model; only BPE models can be converted")

    pieces = []
    for index, proto_piece in enumerate(proto.pieces):
        try:
            text = proto_piece.piece.decode("utf-8")
            piece_type = PieceType(proto_piece.type)
        except ValueError as error:
            raise ValueError(f"{name} is not a SentencePiece model: piece {index}: {error}") from error
        if not text or not math.isfinite(proto_piece.score):
            raise ValueError(f"{name}: piece {index} ({text!r}, score {proto_piece.score}) is empty or has no score")
        pieces.append(Piece(text, proto_piece.score, piece_type))
    byte_texts = {piece.text for piece in pieces if piece.type == PieceType.BYTE}
    missing = [text for text in BYTE_PIECES if text not in byte_texts]
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} of the 256 byte pieces ({missing[0]}, ...); "
            "it must be trained with byte_fallback"
        )
    normalizer = proto.normalizer_spec
    if not normalizer.escape_whitespaces:
        raise ValueError(f"{name} keeps spaces as they are (escape_whitespaces is off); this is not supported")
    return SentencePieceModel(
        pieces=tuple(pieces),
        add_dummy_prefix=normalizer.add_dummy_prefix,
        remove_extra_whitespaces=normalizer.remove_extra_whitespaces,
        identity_normalizer=not normalizer.precompiled_charsmap,
        whitespace_suffix=proto.trainer_spec.treat_whitespace_as_suffix,
    )
