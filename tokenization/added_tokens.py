"""Tokens that lie beside a vocabulary: whichever file of a folder holds them, and which role they have.

In transformers' order: `added_tokens_decoder` of `tokenizer_config.json`, then `added_tokens.json`, then the added
tokens of `tokenizer.json`. What an earlier file says about an id or a token, a later one does not change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from .files import read_json


CONFIG, MAP, ADDED, FAST = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json"
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_object(path: Path) -> dict[str, Any]:
    """`read_json`; empty where there is no file."""
    return read_json(path) if path.is_file() else {}


def read_roles(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token`, `unk_token` and `pad_token`, as far as the folder's files name them."""
    settings = read_object(folder / CONFIG)
    if "added_tokens_decoder" not in settings:
        # As transformers has it: the map counts only beside a configuration without its own tokens.
        settings = {**settings, **read_object(folder / MAP)}
    named = {role: _content(settings.get(role)) for role in ROLES}
    return {role: token for role, token in named.items() if token}


def read_added_tokens(folder: Path) -> dict[int, AddedToken]:
    """Id -> token, of all files; ids inside the vocabulary are among them where a file names them.

    Raises:
        ValueError: an entry that is no token or no id; names the file.
    """
    settings, found = read_object(folder / CONFIG), {}
    decoder = settings.get("added_tokens_decoder") or {}
    special = set(read_roles(folder).values())
    for source in (settings, read_object(folder / MAP)):
        for name in ("additional_special_tokens", "extra_special_tokens"):
            listed = source.get(name) or []
            special |= {text for text in map(_content, listed) if text} if isinstance(listed, list) else set()
    entries = [(folder / CONFIG, number, entry) for number, entry in decoder.items()]
    entries += [(folder / ADDED, number, text) for text, number in read_object(folder / ADDED).items()]
    entries += [
        (folder / FAST, entry.get("id"), entry) for entry in read_object(folder / FAST).get("added_tokens") or []
    ]
    taken: set[str] = set()
    for file, number, entry in entries:
        text = _content(entry)
        try:
            index = int(number)
        except (TypeError, ValueError):
            index = -1
        if not text or index < 0:
            raise ValueError(f"{file}: {entry!r} with the id {number!r} is not an added token")
        if index in found or text in taken:
            continue
        options = entry if isinstance(entry, dict) else {}
        is_special = bool(options.get("special", text in special))
        flags = {name: bool(options.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
        found[index] = AddedToken(
            text, special=is_special, normalized=options.get("normalized", not is_special), **flags
        )
        taken.add(text)
    return found


def add_tokens(tokenizer: Tokenizer, tokens: dict[int, AddedToken], folder: Path) -> None:
    """Give a tokenizer the tokens behind its vocabulary, each at its id; ids that no file names get reserved ones.

    Raises:
        ValueError: a token has another id in the vocabulary already, or an id another token; names both.
    """
    for index, token in sorted(tokens.items()):
        size = tokenizer.get_vocab_size()
        there = tokenizer.token_to_id(token.content)
        if there is None and index >= size:
            fill_with_reserved(tokenizer, index)
        # Also of a token that is there, which may not be known as a token of its own yet.
        if there in (None, index):
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        got = tokenizer.token_to_id(token.content)
        if got != index:
            raise ValueError(
                f"{folder}: the token {token.content} should have the id {index}, which is "
                f"{tokenizer.id_to_token(index)!r} in the vocabulary; there it has {got}"
            )


def fill_with_reserved(tokenizer: Tokenizer, size: int) -> None:
    """Reserved tokens at the ids from the vocabulary's end up to `size`."""
    names = [f"<|reserved_{i}|>" for i in range(tokenizer.get_vocab_size(), size)]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])


def _content(entry: Any) -> str | None:
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None
