"""InternLM2's SentencePiece model -> the `tokenizer.json` that transformers loads without any code of ours.

The file says the same as the SentencePiece model, in the terms of the `tokenizers` library:

- BPE over all pieces; a merge for every way to cut a normal piece into two, in the order of the pieces' scores,
  because SentencePiece joins two neighbours whenever their concatenation is a piece;
- a space becomes U+2581 before, and again a space after; nothing is added in front of the text or stripped from it;
- what no piece covers becomes byte pieces;
- user-defined pieces are cut out of the text first, as added tokens that are not special.

Six reserved pieces are *renamed*, so that their old names (`[UNUSED_TOKEN_145]`) are ordinary text: a text that
holds them cannot forge a turn of the conversation.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .added_tokens import CONFIG, add_tokens, read_added_tokens, read_object, read_roles
from .files import write_json
from .sentencepiece_model import SPACE, Piece, PieceType, SentencePieceModel, read_sentencepiece_model


UNK_TOKEN, BOS_TOKEN, EOS_TOKEN = "<unk>", "<s>", "</s>"

# reserved piece -> its name in the InternLM2 chat models
RENAMED_PIECES: dict[str, str] = {
    "[UNUSED_TOKEN_141]": "<|plugin|>",
    "[UNUSED_TOKEN_142]": "<|interpreter|>",
    "[UNUSED_TOKEN_143]": "<|action_end|>",
    "[UNUSED_TOKEN_144]": "<|action_start|>",
    "[UNUSED_TOKEN_145]": "<|im_end|>",
    "[UNUSED_TOKEN_146]": "<|im_start|>",
}

# what Mono-InternVL adds behind the vocabulary, in the order of the ids
ADDED_TOKENS: tuple[str, ...] = (
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)

# (pieces done, pieces in all)
Progress = Callable[[int, int], None]
_PROGRESS_AFTER_SECONDS = 2.0


def build_tokenizer(
    model_file: str | os.PathLike[str],
    *,
    renamed: Mapping[str, str] | None = None,
    added: Sequence[str] | None = None,
    prefix_every_text: bool = True,
    progress: Progress | None = None,
) -> Tokenizer:
    """Builds the fast tokenizer of an InternLM2 SentencePiece model, or of Llama's and Mistral's.

    Args:
        model_file: the `tokenizer.model`.
        renamed: reserved piece -> special token that takes its id; default: `RENAMED_PIECES`, and nothing for a
            vocabulary that has none of them.
        prefix_every_text: of a model that puts a space before the text (Llama's): also before text behind a control
            token, as transformers' `legacy` tokenizers do; else only at the very beginning.
        added: special tokens that follow the vocabulary; default: `ADDED_TOKENS`. For a model of N pieces `<img>` is N.
        progress: called as `progress(done, total)` in pieces, once the work has lasted two seconds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a SentencePiece BPE model with byte fallback, it rewrites the text (a normaliser,
            whitespace stripping: not supported), a piece to rename is missing, or a name is taken.
    """
    model = read_sentencepiece_model(model_file)
    _check_text_is_kept(model, str(model_file))
    if renamed is None and not any(piece.text in RENAMED_PIECES for piece in model.pieces):
        renamed = {}
    prefix = "" if not model.add_dummy_prefix else "every text" if prefix_every_text else "beginning"
    try:
        return tokenizer_from_pieces(model.pieces, renamed=renamed, added=added, prefix=prefix, progress=progress)
    except ValueError as error:
        raise ValueError(f"{model_file}: {error}") from error


def tokenizer_from_pieces(
    pieces: Sequence[Piece],
    *,
    renamed: Mapping[str, str] | None = None,
    added: Sequence[str] | None = None,
    prefix: str = "",
    progress: Progress | None = None,
) -> Tokenizer:
    """Builds the tokenizer of a list of SentencePiece pieces; a piece's id is its place. Arguments as above.

    `prefix`: where a space is put before the text: `every text`, `beginning`, or nowhere.

    Raises:
        ValueError: a piece occurs twice, is of a type that is not supported, is missing, or a new name is taken.
    """
    renamed = RENAMED_PIECES if renamed is None else renamed
    added = ADDED_TOKENS if added is None else added
    ids = {piece.text: index for index, piece in enumerate(pieces)}
    if len(ids) != len(pieces):
        raise ValueError(f"{len(pieces) - len(ids)} pieces occur more than once")
    for text in (UNK_TOKEN, BOS_TOKEN, EOS_TOKEN):
        if text not in ids:
            raise ValueError(f"the piece {text} is missing")
    missing = [text for text in renamed if text not in ids]
    if missing:
        raise ValueError(
            f"the reserved pieces {', '.join(missing)} are missing; an InternLM2 vocabulary has {len(renamed)} pieces "
            f"that become {', '.join(renamed.values())}"
        )
    unused = [piece.text for piece in pieces if piece.type == PieceType.UNUSED]
    if unused:
        raise ValueError(f"pieces of the type UNUSED are not supported ({unused[0]!r})")
    new_names = [*renamed.values(), *added]
    taken = sorted({name for name in new_names if name in ids or new_names.count(name) > 1})
    if taken:
        raise ValueError(f"the token names {', '.join(taken)} occur more than once")

    vocabulary = {renamed.get(text, text): index for text, index in ids.items()}
    mergeable = [
        (index, piece)
        for index, piece in enumerate(pieces)
        if piece.type == PieceType.NORMAL and piece.text not in renamed
    ]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(mergeable, progress),
            unk_token=UNK_TOKEN,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if prefix == "every text":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    elif prefix == "beginning":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    decoding: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*decoding, decoders.Strip(" ", 1, 0)] if prefix else decoding)
    # special tokens are matched in the text as typed, user-defined pieces in the normalised text, as SentencePiece does
    control = [p.text for p in pieces if p.type == PieceType.CONTROL and p.text not in renamed]
    specials = dict.fromkeys([UNK_TOKEN, BOS_TOKEN, EOS_TOKEN, *control, *renamed.values(), *added])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    user_defined = [p.text for p in pieces if p.type == PieceType.USER_DEFINED and p.text not in renamed]
    # a prefix would become a part of them
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=not prefix) for text in user_defined])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", pair=f"{BOS_TOKEN} $A $B:1", special_tokens=[(BOS_TOKEN, ids[BOS_TOKEN])]
    )
    return tokenizer


def save_tokenizer(
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    *,
    model_max_length: int | None = None,
    roles: Mapping[str, str] | None = None,
) -> tuple[Path, Path]:
    """Writes `tokenizer.json` and `tokenizer_config.json`, so that `AutoTokenizer.from_pretrained(folder)` loads them.

    Args:
        tokenizer: as made by `build_tokenizer`.
        folder: made if it does not exist.
        model_max_length: the longest input in tokens, beyond which transformers warns; default: no limit.
        roles: `bos_token` and the like, where they are not InternLM2's (padding is done with `</s>`).

    Returns:
        The two paths.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(tokenizer.to_str())
    pairs = content["model"]["merges"]
    # "a b" halves the file; the format's two traps are a space inside a piece and its header line
    if not any(" " in left or " " in right or left.startswith("#version") for left, right in pairs):
        content["model"]["merges"] = [f"{left} {right}" for left, right in pairs]

    base = {
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "pad_token": EOS_TOKEN,
        "unk_token": UNK_TOKEN,
        **(roles or {}),
    }
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    config: dict[str, Any] = {
        "tokenizer_class": "TokenizersBackend",
        **base,
        "extra_special_tokens": [
            token.content for _, token in added if token.special and token.content not in base.values()
        ],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    if model_max_length is not None:
        config["model_max_length"] = model_max_length
    return (
        write_json(folder / "tokenizer.json", content, indent=0),
        write_json(folder / "tokenizer_config.json", config, indent=2),
    )


def tokenizer_of_model_file(
    model_file: str | os.PathLike[str], *, added: Sequence[str] | None = None, progress: Progress | None = None
) -> Tokenizer:
    """`build_tokenizer` with the tokens that the files beside it add (`added_tokens.json`, `added_tokens_decoder` of
    `tokenizer_config.json`, `tokenizer.json`): each at its id, those inside the vocabulary as the new names of pieces.

    `added` follow where they are not among them.
    """
    path = Path(model_file)
    pieces = read_sentencepiece_model(path).pieces
    beside = read_added_tokens(path.parent)
    reserved = RENAMED_PIECES if any(piece.text in RENAMED_PIECES for piece in pieces) else {}
    renamed = {**reserved, **{pieces[i].text: t.content for i, t in beside.items() if i < len(pieces)}}
    renamed = {old: new for old, new in renamed.items() if old != new}
    every = bool(read_object(path.parent / CONFIG).get("legacy", True))
    tokenizer = build_tokenizer(path, renamed=renamed, added=(), prefix_every_text=every, progress=progress)
    add_tokens(tokenizer, {i: token for i, token in beside.items() if i >= len(pieces)}, path.parent)
    wanted = ADDED_TOKENS if added is None else added
    known = {token.content for token in beside.values()}
    if taken := sorted({piece.text for piece in pieces}.intersection(wanted) - known):
        raise ValueError(f"{path}: the token names {', '.join(taken)} occur more than once")
    missing = [name for name in wanted if name not in known]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in missing])
    return tokenizer


def convert_tokenizer(
    model_file: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    model_max_length: int | None = None,
    progress: Progress | None = None,
) -> Tokenizer:
    """`tokenizer_of_model_file`, then `save_tokenizer`; nothing is written if the model file is no good."""
    tokenizer = tokenizer_of_model_file(model_file, progress=progress)
    roles = {
        role: name
        for role, name in read_roles(Path(model_file).parent).items()
        if tokenizer.token_to_id(name) is not None
    }
    save_tokenizer(tokenizer, folder, model_max_length=model_max_length, roles=roles)
    return tokenizer


def _check_text_is_kept(model: SentencePieceModel, name: str) -> None:
    """Refuses a model that rewrites the text before it is split: InternLM2's does not."""
    rewrites = {
        "strips and joins spaces (remove_extra_whitespaces)": model.remove_extra_whitespaces,
        "rewrites characters (a normaliser other than identity)": not model.identity_normalizer,
        "puts spaces at the end of pieces (treat_whitespace_as_suffix)": model.whitespace_suffix,
    }
    found = [what for what, is_set in rewrites.items() if is_set]
    if found:
        raise ValueError(f"{name} {' and '.join(found)}; only models that keep the text as it is work")


def _merges(mergeable: list[tuple[int, Piece]], progress: Progress | None) -> list[tuple[str, str]]:
    """Every cut of a piece into two pieces, best score first; ties: the smaller id, then the longer left part."""
    texts = {piece.text for _, piece in mergeable}
    ranked = sorted(mergeable, key=lambda item: (-item[1].score, item[0]))
    start = time.monotonic()

    def cuts() -> Iterator[tuple[str, str]]:
        for done, (_, piece) in enumerate(ranked):
            text = piece.text
            for cut in range(len(text) - 1, 0, -1):
                if text[:cut] in texts and text[cut:] in texts:
                    yield text[:cut], text[cut:]
            if progress is not None and done % 1024 == 0 and time.monotonic() - start > _PROGRESS_AFTER_SECONDS:
                progress(done, len(ranked))

    return list(cuts())
