"""A SentencePiece file written by hand, field by field, independently of the reader."""

import struct

from mono_internvl.tokenization import internlm2
from mono_internvl.tokenization.sentencepiece_model import BYTE_PIECES, SPACE, PieceType


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def bytes_field(number: int, payload: bytes) -> bytes:
    """A field of bytes, of text or of a message."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def number_field(number: int, value: int) -> bytes:
    """A field of a whole number or a truth value."""
    return _varint(number << 3) + _varint(value)


def piece_field(text: str, score: float, kind: PieceType) -> bytes:
    """One entry of the vocabulary, as a field of the model."""
    fields = bytes_field(1, text.encode()) + _varint(2 << 3 | 5) + struct.pack("<f", score)
    return bytes_field(1, fields if kind == PieceType.NORMAL else fields + number_field(3, kind))


NORMAL_PIECES = (SPACE, "a", "b", "c", "ab", f"{SPACE}a", f"{SPACE}ab", "abc", "1", "\n", "\0")


def small_model(
    *,
    model_type: int = 2,
    byte_pieces: tuple[str, ...] = BYTE_PIECES,
    reserved: tuple[str, ...] = tuple(internlm2.RENAMED_PIECES),
    extra: bytes = b"",
    normalizer: bytes = number_field(3, 0) + number_field(4, 0),
) -> bytes:
    """A whole file of 277 pieces in InternLM2's structure, or with something wrong in it."""
    pieces = [piece_field("<unk>", 0, PieceType.UNKNOWN)]
    pieces += [piece_field(text, 0, PieceType.CONTROL) for text in ("<s>", "</s>")]
    pieces += [piece_field(text, 0, PieceType.BYTE) for text in byte_pieces]
    pieces += [piece_field(text, -index, PieceType.NORMAL) for index, text in enumerate(NORMAL_PIECES)]
    pieces += [piece_field(text, 0, PieceType.USER_DEFINED) for text in ("cc", *reserved)]
    return b"".join(pieces) + extra + bytes_field(2, number_field(3, model_type)) + bytes_field(3, normalizer)
