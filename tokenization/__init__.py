"""From InternLM2's SentencePiece file to `tokenizer.json`."""

from .internlm2 import (
    build_tokenizer,
    convert_tokenizer,
    save_tokenizer,
    tokenizer_from_pieces,
    tokenizer_of_model_file,
)
from .sentencepiece_model import Piece, PieceType, SentencePieceModel, read_sentencepiece_model


__all__ = [
    "Piece",
    "PieceType",
    "SentencePieceModel",
    "build_tokenizer",
    "convert_tokenizer",
    "read_sentencepiece_model",
    "save_tokenizer",
    "tokenizer_from_pieces",
    "tokenizer_of_model_file",
]
