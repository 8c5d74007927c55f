"""A dense model's tokenizer with Mono-InternVL's tokens, and the chat template that goes with it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from ..chat_template_mono_internvl import render
from ..common.files import read_json
from ..configuration_mono_internvl import MonoInternVLConfig
from ..image_processing_mono_internvl import MonoInternVLImageProcessor
from ..processing_mono_internvl import MonoInternVLProcessor
from ..tokenization import read_sentencepiece_model, tokenizer_of_model_file
from ..tokenization.added_tokens import (
    CONFIG,
    add_tokens,
    fill_with_reserved,
    read_added_tokens,
    read_object,
    read_roles,
)
from ..tokenization.internlm2 import ADDED_TOKENS
from ..vocabulary_mono_internvl import IMAGE_END, IMAGE_START, IMAGE_TOKEN, QUERY_TOKEN, absent_tokens, vocabulary_of
from .families import TEMPLATES, Family, Template


logger = logging.getLogger(__name__)

# Of a base that has none.
PAD_TOKEN = "<|pad|>"
_IMAGE_IDS = {"image_token_id": IMAGE_TOKEN, "image_start_token_id": IMAGE_START, "image_end_token_id": IMAGE_END}
# A conversation by which two templates are compared: no system prompt, and an answer in the middle.
_SAMPLE = [
    {"role": "user", "content": "A question?"},
    {"role": "assistant", "content": "An answer."},
    {"role": "user", "content": "Another?"},
]


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def warn_without_tokenizer(folder: Path) -> None:
    logger.warning("%s has no tokenizer: the result has weights and configuration, but no processor", folder)


@dataclass(frozen=True)
class Extended:
    """A dense model's tokenizer with Mono-InternVL's tokens.

    Attributes:
        tokenizer: None where there is none, or where it lacks the tokens of its family's chat templates.
        roles: `bos_token` and the like -> the token.
        new_rows: how many rows the vocabulary grows by.
        control_ids: the ids of `MonoInternVLConfig`: of pictures, of a learnable query where there are some, and
            `stop_token_ids`, empty without a tokenizer.
        ids: `bos_token_id`, `eos_token_id`, `pad_token_id` for the configuration, and `stops`.
        chat_template: its source.
    """

    tokenizer: Tokenizer | None
    roles: dict[str, str]
    new_rows: int
    control_ids: dict[str, Any]
    ids: dict[str, Any]
    chat_template: str = ""


def extended_tokenizer(
    folder: Path, family: Family, vocab_size: int, ids: dict[str, Any], *, queries: bool = False
) -> Extended:
    """The dense model's tokenizer with Mono-InternVL's nine tokens, and a pad token where the model has none.

    Tokens that it lacks get the ids from `vocab_size` on, those that it has keep theirs; ids below `vocab_size` without
    a token get reserved ones. Padding is never done with a token of the text: what the tokenizer calls its pad token is
    taken, what the configuration names and is a special token, or what the family pads with; else `<|pad|>` is added
    behind all others. No tokenizer, with a warning, where there is none or it lacks the tokens of the chat template.

    Args:
        ids: `bos_token_id`, `eos_token_id`, `pad_token_id` as the configuration has them, and `stops` of
            generation_config.json.
        queries: `<QUERY_CONTEXT>` is a tenth token of ours, behind the nine.

    Raises:
        ValueError: more tokens than rows, or a token of ours that the text uses; names the file.
    """
    inside = {role: _inside(token, vocab_size) for role, token in ids.items()}
    for role, token in ids.items():
        if token is not None and inside[role] != token:
            logger.warning("%s: %s=%s is left out: the vocabulary has %d ids", folder, role, token, vocab_size)
    ours = (*ADDED_TOKENS, QUERY_TOKEN) if queries else ADDED_TOKENS
    named = {**_IMAGE_IDS, "query_token_id": QUERY_TOKEN} if queries else _IMAGE_IDS
    # `<img>` and `</img>` stand where they follow from `<IMG_CONTEXT>`.
    counted = (name for name in ("image_token_id", "query_token_id") if name in named)
    new: dict[str, Any] = {name: vocab_size + ours.index(named[name]) for name in counted}
    without = Extended(None, {}, len(ours), {**new, "stop_token_ids": []}, inside)
    if not has_tokenizer(folder):
        warn_without_tokenizer(folder)
        return without
    tokenizer, file = _dense_tokenizer(folder, family.layout)
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for role, token in inside.items():
        # An id that the text uses: a default of another vocabulary, or nonsense.
        kept = _only(token, lambda index: index in special or _looks_special(tokenizer.id_to_token(index)))
        if kept != token:
            names = _names(tokenizer, token)
            logger.warning("%s: %s=%s is left out where it is a token of the text (%s)", folder, role, token, names)
            inside[role] = kept
    template = _choose_template(folder, family, tokenizer)
    if template is None:
        needed = dict.fromkeys(" and ".join(TEMPLATES[name].tokens.needed) for name in family.templates)
        logger.warning(
            "%s lacks %s, which the chat template needs: made without a processor", file, ", or ".join(needed)
        )
        return without
    _add_ours(tokenizer, vocab_size, file, ours)
    roles = _roles(folder, tokenizer, inside)
    if not template.bos:
        roles.pop("bos_token", None)
    # A chat stops there in any case, and what asks the tokenizer for its end gets one.
    roles.setdefault("eos_token", template.tokens.ends[0])
    pad = roles.get("pad_token", "")
    if tokenizer.token_to_id(pad) is not None and tokenizer.token_to_id(pad) not in special and not _looks_special(pad):
        logger.warning("%s: the pad token %r is a token of the text: another is added", folder, roles.pop("pad_token"))
    usual = (token for token in family.pad_tokens if tokenizer.token_to_id(token) in special)
    pad = roles.setdefault("pad_token", next(usual, PAD_TOKEN))
    if tokenizer.token_to_id(pad) is None:
        tokenizer.add_special_tokens([_special(pad)])
    inside["pad_token_id"] = tokenizer.token_to_id(pad)
    control: dict[str, Any] = {name: tokenizer.token_to_id(token) for name, token in named.items()}
    ends = (tokenizer.token_to_id(token) for token in template.tokens.ends)
    control["stop_token_ids"] = [token for token in ends if token is not None]
    source = template.source(_settings(folder, template, roles))
    _compare_templates(folder, template, source, roles)
    return Extended(tokenizer, roles, tokenizer.get_vocab_size() - vocab_size, control, inside, source)


def _add_ours(tokenizer: Tokenizer, vocab_size: int, file: Path, ours: tuple[str, ...]) -> None:
    """Give a tokenizer those of our tokens that it lacks, behind the ids that the model has.

    Raises:
        ValueError: it has other tokens there already.
    """
    tokens = tokenizer.get_vocab(with_added_tokens=True)
    if outside := [token for token, index in tokens.items() if index >= vocab_size and token not in ours]:
        raise ValueError(
            f"{file} has {len(tokens)} tokens, the model only {vocab_size} rows, and {outside[0]!r} is behind them"
        )
    fill_with_reserved(tokenizer, vocab_size)
    # Those that are there may not be known as tokens of their own yet.
    tokenizer.add_special_tokens([_special(name) for name in ours])


# ------------------------------------------------------------------------------------------------------- chat template


def _choose_template(folder: Path, family: Family, tokenizer: Tokenizer) -> Template | None:
    """The family's template that the tokenizer has the tokens for; of several, one that marks turns as the source's own
    template does."""
    able = [TEMPLATES[name] for name in family.templates]
    able = [template for template in able if not absent_tokens(tokenizer, template.tokens)]
    if len(able) > 1:
        able = [
            template for template in able if all(tokenizer.token_to_id(token) is not None for token in template.marks)
        ]
    own = _own_template(folder)
    alike = [template for template in able if own is not None and _writes(own, template)]
    return next(iter([*alike, *able]), None)


def _writes(source: str, template: Template) -> bool:
    """Whether a chat template marks turns as one of ours does."""
    return all(token in source for token in template.tokens.needed)


def _own_template(folder: Path) -> str | None:
    """The source of the chat template that lies beside a model; of several, of the one that is used by default."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for file in (folder / CONFIG, folder / "chat_template.json"):
        found = read_object(file).get("chat_template")
        if isinstance(found, list):
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None


@dataclass
class _Named:
    """What `render` reads of a tokenizer."""

    special_tokens_map: dict[str, str] = field(default_factory=dict)


def _rendered(source: str, roles: dict[str, str]) -> str | None:
    """The sample conversation by a chat template; None where it refuses it."""
    try:
        return render(_Named(roles), _SAMPLE, source, {"add_generation_prompt": True})
    except Exception as error:  # a template may raise anything: of a type, a key, an attribute
        logger.info("the source's chat template refuses a plain conversation: %s", error)
        return None


def _settings(folder: Path, template: Template, roles: dict[str, str]) -> dict[str, Any]:
    """The system prompt that the source's own template writes where a conversation has none."""
    own = _own_template(folder)
    if own is None or "default_system" not in template.settings or not _writes(own, template):
        return {}
    rendered = _rendered(own, roles)
    if rendered is None:
        return {}
    found = re.search(r"<\|im_start\|>system\n(.*?)<\|im_end\|>.*<\|im_start\|>user\n", rendered, re.DOTALL)
    return {"default_system": found[1] if found else ""}


def _compare_templates(folder: Path, template: Template, source: str, roles: dict[str, str]) -> None:
    """Warn where the source's own template makes another prompt of a plain conversation."""
    own = _own_template(folder)
    if own is None or template.is_ours:
        return
    theirs, ours = _rendered(own, roles), _rendered(source, roles)
    if theirs is not None and theirs != ours:
        logger.warning("%s: its own chat template writes %r, the one of the result %r", folder, theirs, ours)


# ----------------------------------------------------------------------------------------------------------- tokenizer


def _dense_tokenizer(folder: Path, layout: str) -> tuple[Tokenizer, Path]:
    """The tokenizer with the tokens that any of the folder's files add, and the file that holds the vocabulary.

    `tokenizer.json` comes first, as in transformers, but for InternLM2: its fast files lose leading spaces. A newer
    `tokenizer.json`, with another vocabulary than `tokenizer.model`, counts there too.
    """
    model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
    loaded = None
    if fast.is_file():
        content = read_json(fast)
        try:
            # What lies behind the vocabulary is added below: the library would close gaps between ids.
            vocabulary, added = content["model"]["vocab"], content.get("added_tokens") or []
            content["added_tokens"] = [entry for entry in added if entry["content"] in vocabulary]
            loaded = Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ValueError(f"{fast} is damaged: {error}") from error
    if model.is_file() and (loaded is None or (layout == "internlm2" and _same_pieces(model, loaded))):
        return tokenizer_of_model_file(model, added=()), model
    assert loaded is not None
    add_tokens(loaded, read_added_tokens(folder), folder)
    return loaded, fast


def _same_pieces(model: Path, loaded: Tokenizer) -> bool:
    """Whether the fast file has the pieces at their ids, whatever it added behind them or renamed."""
    pieces = read_sentencepiece_model(model).pieces
    renamed = set(loaded.get_added_tokens_decoder())
    vocabulary = json.loads(loaded.to_str())["model"]["vocab"]
    return len(vocabulary) <= len(pieces) and all(
        vocabulary.get(piece.text, i if i in renamed else None) == i for i, piece in enumerate(pieces)
    )


def _roles(folder: Path, tokenizer: Tokenizer, ids: dict[str, Any]) -> dict[str, str]:
    """Tokens by role: the tokenizer's own names first, then those of the configuration's ids."""
    named, settings = read_roles(folder), read_object(folder / CONFIG)
    for role in ("bos_token", "eos_token", "pad_token"):
        token = ids[f"{role}_id"]
        token = token[0] if isinstance(token, list) else token
        # Qwen's configurations name a bos token, and its tokenizers say that there is none.
        if token is not None and not (role == "bos_token" and settings.get(role, "") is None):
            named.setdefault(role, tokenizer.id_to_token(token) or "")
    if unknown := json.loads(tokenizer.to_str())["model"].get("unk_token"):
        named.setdefault("unk_token", unknown)
    # A pad token that is not there yet will be added.
    return {
        role: token for role, token in named.items() if role == "pad_token" or tokenizer.token_to_id(token) is not None
    }


def _inside(token: Any, size: int) -> Any:
    return _only(token, lambda index: isinstance(index, int) and 0 <= index < size)


def _only(token: Any, accept: Callable[[Any], bool]) -> Any:
    """An id, or a list of ids, without those that are not accepted; None where nothing is left."""
    if isinstance(token, list):
        return [index for index in token if accept(index)] or None
    return token if token is not None and accept(token) else None


def _looks_special(token: str | None) -> bool:
    """`<s>`, `<|end|>`, `[PAD]`: a vocabulary may hold its control tokens without listing them as such."""
    return bool(token and re.fullmatch(r"<[^<>\s]+>|\[[A-Z_]+\]", token) and not token.startswith("<0x"))


def _names(tokenizer: Tokenizer, token: Any) -> str:
    return ", ".join(repr(tokenizer.id_to_token(index)) for index in (token if isinstance(token, list) else [token]))


def _special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)


def save_processor(extended: Extended, config: MonoInternVLConfig, folder: Path) -> None:
    """Tokenizer, chat template and image processor of a new model, as transformers saves them.

    Raises:
        ValueError: the letters of a control token make that token, so that nobody could type it as text; named.
    """
    tokenizer, names = extended.tokenizer, extended.roles
    assert tokenizer is not None
    special = [
        token.content
        for _, token in sorted(tokenizer.get_added_tokens_decoder().items())
        if token.special and token.content not in names.values()
    ]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **names,
        extra_special_tokens=special,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=config.text_config.max_position_embeddings,
    )
    vocabulary = vocabulary_of(fast, extended.chat_template)
    for token in vocabulary.fixed:
        vocabulary.encode(token)
    image_processor = MonoInternVLImageProcessor(tile_size=config.vision_config.image_size)
    MonoInternVLProcessor(
        image_processor,
        fast,
        extended.chat_template,
        num_learnable_queries=config.num_learnable_queries,
        query_placement=config.query_placement,
    ).save_pretrained(folder)
