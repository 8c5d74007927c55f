"""A tokenizer -> the lists that llama.cpp's SentencePiece tokenizer (`tokenizer.ggml.model` "llama") is made of.

That tokenizer joins the two neighbours whose union is a token of the highest score, leftmost first, until none is left,
and spells the rest in bytes: SentencePiece's BPE, so a token's score is minus its place among the merges. It cuts
control tokens (where asked to) and user-defined tokens out of the text first, as ours does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from gguf import TokenType

from ..tokenization.sentencepiece_model import BYTE_PIECES, SPACE
from ..vocabulary_mono_internvl import checked_backend


# Of tokens that no merge makes: below every merge's.
_NO_MERGE = -1e6
_SHOWN = 5


@dataclass(frozen=True)
class GgufVocabulary:
    """One entry an id.

    Attributes:
        tokens: UTF-8; spaces are U+2581, but in user-defined tokens, which are looked for in the text as typed.
        scores: the higher, the earlier it is joined.
        types: `gguf.TokenType`.
    """

    tokens: list[bytes]
    scores: list[float]
    types: list[int]


def gguf_vocabulary(tokenizer: Any, rows: int) -> GgufVocabulary:
    """The vocabulary of a transformers tokenizer; ids up to `rows` that it has no token for are unused.

    Raises:
        ValueError: the tokenizer is not InternLM2's kind (SentencePiece BPE with byte fallback that keeps the text as
            it is), or has more tokens than the model rows; says what differs.
    """
    backend = checked_backend(tokenizer)
    content = json.loads(backend.to_str())
    _check_kind(content)
    names = {i: text for text, i in content["model"]["vocab"].items()}
    added = {i: (token.content, token.special) for i, token in backend.get_added_tokens_decoder().items()}
    names |= {i: text for i, (text, _) in added.items()}
    if max(names) >= rows:
        raise ValueError(f"the tokenizer has the id {max(names)}, the model only {rows} rows")
    ranks = _ranks(content["model"], {text for text, _ in added.values()})
    unknown, bytes_ = content["model"]["unk_token"], set(BYTE_PIECES)
    tokens, scores, types = [], [], []
    for i in range(rows):
        text = names.get(i)
        if text is None or "\0" in text:
            # llama.cpp ends a token at the first NUL and calls an empty one so; a NUL in a text is spelt <0x00>.
            text, kind = f"[EMPTY_{i}]", TokenType.UNUSED
        elif text == unknown:
            kind = TokenType.UNKNOWN
        elif i in added and added[i][1]:
            kind = TokenType.CONTROL
        elif i in added:
            text, kind = text.replace(SPACE, " "), TokenType.USER_DEFINED
        elif text in bytes_:
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        tokens.append(text.encode())
        scores.append(float(-ranks[text]) if text in ranks else _NO_MERGE)
        types.append(int(kind))
    if len(set(tokens)) != len(tokens):
        twice = sorted({token.decode() for token in tokens if tokens.count(token) > 1})
        raise ValueError(f"the tokens {', '.join(map(repr, twice[:_SHOWN]))} would occur twice in the file")
    return GgufVocabulary(tokens, scores, types)


def _check_kind(content: dict[str, Any]) -> None:
    """Refuse a tokenizer that llama.cpp's SentencePiece tokenizer does not do as it does."""
    model = content["model"]
    missing = [piece for piece in BYTE_PIECES if piece not in model.get("vocab", {})]
    found = {
        f"is of the kind {model.get('type')}, not BPE": model.get("type") != "BPE",
        "does not spell what it has no token for in bytes (byte_fallback)": not model.get("byte_fallback"),
        f"lacks byte tokens such as {missing[0] if missing else ''}": bool(missing),
        "skips merges for whole words (ignore_merges)": bool(model.get("ignore_merges")),
        "has no unknown token": model.get("unk_token") is None,
        "cuts the text into words or puts a space before it (pre_tokenizer)": content.get("pre_tokenizer") is not None,
        "rewrites the text (normalizer)": content.get("normalizer")
        != {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    }
    if problems := [what for what, is_so in found.items() if is_so]:
        raise ValueError(
            f"the tokenizer cannot be written: it {' and '.join(problems)}; only InternLM2's kind is held by GGUF's "
            "SentencePiece tokenizer (BPE with byte fallback, spaces as U+2581, the text kept as it is)"
        )


def _ranks(model: dict[str, Any], added: set[str]) -> dict[str, int]:
    """Token -> place of its first merge; the merges of one token follow each other, and none is left out.

    Raises:
        ValueError: they are not a SentencePiece model's: scores alone could not say what they say.
    """
    ranks: dict[str, int] = {}
    cuts: dict[str, set[str]] = {}
    last = None
    for place, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        text = left + right
        if text in ranks and text != last:
            raise ValueError(f"the tokenizer cannot be written: its merges to {text!r} have others between them")
        ranks.setdefault(text, place)
        cuts.setdefault(text, set()).add(left)
        last = text
    parts = {text for text in model["vocab"] if text not in added and text not in BYTE_PIECES}
    for text, known in cuts.items():
        found = {text[:cut] for cut in range(1, len(text)) if text[:cut] in parts and text[cut:] in parts}
        if found != known:
            other = sorted(found ^ known)[0]
            raise ValueError(
                f"the tokenizer cannot be written: {text!r} is {'not ' if other in found else ''}joined of "
                f"{other!r} and {text[len(other) :]!r}, unlike in a SentencePiece model"
            )
    return ranks
