"""What lies beside the weights: tokenizer, processor, configuration, generation defaults, remote code, model card."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load
from tokenizers import AddedToken, Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_relative_import_files

from ..common.files import read_json, readable_bytes
from ..common.parameters import build_on_meta, count_by_part
from ..configuration_mono_internvl import AUTO_MAP, MonoInternVLConfig
from ..image_processing_mono_internvl import MonoInternVLImageProcessor
from ..processing_mono_internvl import MonoInternVLProcessor
from ..tokenization import read_sentencepiece_model, tokenizer_of_model_file
from ..tokenization.added_tokens import add_tokens, fill_with_reserved, read_added_tokens, read_roles
from ..tokenization.internlm2 import ADDED_TOKENS
from ..vocabulary_mono_internvl import IMAGE_TOKEN
from .manifest import MANIFEST
from .plan import Plan
from .source import Checkpoint, Origin
from .writer import write_json


logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parent.parent
# Of a base that has none.
PAD_TOKEN = "<|pad|>"
_NEEDED_TOKENS = ("<|im_start|>", "<|im_end|>")
TAGS = ["mono-internvl", "internvl", "monolithic", "mixture-of-experts", "vision-language"]


# ----------------------------------------------------------------------------------------------------------- tokenizer


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def warn_without_tokenizer(folder: Path) -> None:
    logger.warning("%s has no tokenizer: the result has weights and configuration, but no processor", folder)


@dataclass(frozen=True)
class Extended:
    """A dense model's tokenizer with Mono-InternVL's tokens.

    Attributes:
        tokenizer: None where there is none, or where it lacks the tokens of the chat template.
        roles: `bos_token` and the like -> the token.
        new_rows: how many rows the vocabulary grows by.
        image_token_id: of `<IMG_CONTEXT>`.
        stop_token_ids: of `<|im_end|>` and `<|im_start|>`; empty where no tokenizer has them.
        ids: `bos_token_id`, `eos_token_id`, `pad_token_id` for the configuration, and `stops`.
    """

    tokenizer: Tokenizer | None
    roles: dict[str, str]
    new_rows: int
    image_token_id: int
    stop_token_ids: list[int | None]
    ids: dict[str, Any]


def extended_tokenizer(folder: Path, layout: str, vocab_size: int, ids: dict[str, Any]) -> Extended:
    """The dense model's tokenizer with Mono-InternVL's nine tokens, and a pad token where the model has none.

    The nine ids start at `vocab_size`; ids below it without a token get reserved ones. A tokenizer whose last nine
    tokens are these and whose size is `vocab_size` already needs no growth for them. Padding is never done with a token
    of the text: what the tokenizer calls its pad token is taken, or what the configuration names and is a special
    token; else `<|pad|>` is added behind all others. No tokenizer, with a warning, where there is none or it lacks the
    tokens of the chat template.

    Args:
        layout: internlm2 or llama.
        ids: `bos_token_id`, `eos_token_id`, `pad_token_id` as the configuration has them, and `stops` of
            generation_config.json.

    Raises:
        ValueError: more tokens than rows, or the nine stand elsewhere; names the file.
    """
    grown, context = len(ADDED_TOKENS), ADDED_TOKENS.index(IMAGE_TOKEN)
    inside = {role: _inside(token, vocab_size) for role, token in ids.items()}
    for role, token in ids.items():
        if token is not None and inside[role] != token:
            logger.warning("%s: %s=%s is left out: the vocabulary has %d ids", folder, role, token, vocab_size)
    if not has_tokenizer(folder):
        warn_without_tokenizer(folder)
        return Extended(None, {}, grown, vocab_size + context, [], inside)
    tokenizer, file = _dense_tokenizer(folder, layout)
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for role, token in inside.items():
        # An id that the text uses: a default of another vocabulary, or nonsense.
        kept = _only(token, lambda index: index in special or _looks_special(tokenizer.id_to_token(index)))
        if kept != token:
            names = _names(tokenizer, token)
            logger.warning("%s: %s=%s is left out where it is a token of the text (%s)", folder, role, token, names)
            inside[role] = kept
    absent = [token for token in _NEEDED_TOKENS if tokenizer.token_to_id(token) is None]
    if absent:
        logger.warning(
            "%s lacks %s, which the chat template needs: made without a processor", file, " and ".join(absent)
        )
        return Extended(None, {}, grown, vocab_size + context, [], inside)
    found = [tokenizer.token_to_id(token) for token in ADDED_TOKENS]
    size = tokenizer.get_vocab_size()
    start = vocab_size
    if found == list(range(vocab_size - grown, vocab_size)):
        start, grown = vocab_size - grown, 0
    elif any(token is not None for token in found) and found != list(range(vocab_size, vocab_size + grown)):
        raise ValueError(
            f"{file} has some of {', '.join(ADDED_TOKENS)}, but not as its last tokens: they have the ids {found}, and "
            f"the model's vocabulary is {vocab_size}"
        )
    if size > vocab_size + (grown if found[0] is not None else 0):
        raise ValueError(f"{file} has {size} tokens, the model only {vocab_size} rows")
    if found[0] is None:
        fill_with_reserved(tokenizer, vocab_size)
        tokenizer.add_special_tokens([_special(name) for name in ADDED_TOKENS])
    roles = _roles(folder, tokenizer, inside)
    # A chat stops there in any case, and what asks the tokenizer for its end gets one.
    roles.setdefault("eos_token", "<|im_end|>")
    pad = roles.get("pad_token", "")
    if tokenizer.token_to_id(pad) is not None and tokenizer.token_to_id(pad) not in special and not _looks_special(pad):
        logger.warning("%s: the pad token %r is a token of the text: another is added", folder, roles.pop("pad_token"))
    pad = roles.setdefault("pad_token", PAD_TOKEN)
    if tokenizer.token_to_id(pad) is None:
        tokenizer.add_special_tokens([_special(pad)])
        grown += 1
    inside["pad_token_id"] = tokenizer.token_to_id(pad)
    stops = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|im_start|>")]
    return Extended(tokenizer, roles, grown, start + context, stops, inside)


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
    named = read_roles(folder)
    for role in ("bos_token", "eos_token", "pad_token"):
        token = ids[f"{role}_id"]
        token = token[0] if isinstance(token, list) else token
        if token is not None:
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
    """Tokenizer, chat template and image processor of a new model, as transformers saves them."""
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
    image_processor = MonoInternVLImageProcessor(tile_size=config.vision_config.image_size)
    MonoInternVLProcessor(image_processor, fast).save_pretrained(folder)


def save_generation_config(config: MonoInternVLConfig, extended: Extended, folder: Path) -> None:
    """Stop tokens, so that `generate` ends an answer without being told: those of the source's generation_config.json
    before those of its config.json, as transformers reads them, and the ends of a turn."""
    text, tokenizer = config.text_config, extended.tokenizer
    given = extended.ids["stops"]
    given = text.eos_token_id if given is None else given
    stops = given if isinstance(given, list) else [given]
    if tokenizer is not None:
        own = extended.roles.get("eos_token")
        ends = (*([own] if own else []), "<|im_end|>", "<|im_start|>")
        stops = [*stops, *(tokenizer.token_to_id(token) for token in ends)]
    stops = list(dict.fromkeys(token for token in stops if token is not None))
    GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=stops or None, pad_token_id=text.pad_token_id
    ).save_pretrained(folder)


# ------------------------------------------------------------------------------------------- configuration, code, text


def save_native_config(config: MonoInternVLConfig, folder: Path) -> None:
    """config.json and the remote code that it names."""
    config.architectures = ["MonoInternVLForCausalLM"]
    config.save_pretrained(folder)
    named = {_PACKAGE / f"{target.split('.')[0]}.py" for target in AUTO_MAP.values()}
    imported = {Path(file) for module in named for file in get_relative_import_files(str(module))}
    for module in named | imported:
        shutil.copyfile(module, folder / module.name)


def copy_licences(source: Path, folder: Path) -> None:
    for pattern in ("LICENSE*", "NOTICE*"):
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def make_tokenizer_config_portable(folder: Path) -> None:
    """Class and key names of transformers 4, which the engines that read the official layout use; 5 knows both."""
    path = folder / "tokenizer_config.json"
    content = read_json(path)
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "extra_special_tokens" in content:
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    write_json(path, content)


# ---------------------------------------------------------------------------------------------------------- model card


def _source_metadata(source: Checkpoint) -> dict[str, Any]:
    readme = source.folder / "README.md"
    return (metadata_load(readme) or {}) if readme.is_file() else {}


def write_model_card(
    folder: Path,
    source: Checkpoint,
    origin: Origin,
    config: MonoInternVLConfig,
    plan: Plan,
    how: str,
    base_model: str | None,
) -> None:
    """README.md: front matter for the Hub, how it was made, how to load it, sizes by group, licences."""
    inherited = _source_metadata(source)
    licence = inherited.get("license", "unknown")
    base = base_model or origin.hub_id
    data = ModelCardData(
        license=licence,
        license_name=inherited.get("license_name"),
        license_link=inherited.get("license_link"),
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=[base] if base else None,
        # The Hub knows adapter, merge, quantized and finetune.
        base_model_relation="finetune" if base else None,
        tags=TAGS,
    )
    groups = count_by_part(build_on_meta(config))
    width = plan.nbytes / max(sum(groups.values()), 1)
    rows = [f"| {name} | {count:,} | {readable_bytes(round(count * width))} |" for name, count in groups.items()]
    total = sum(groups.values())
    made_from = f"[{base}](https://huggingface.co/{base})" if base else f"`{origin.name}`"
    commit = f" (commit `{origin.commit}`)" if origin.commit else ""
    official = read_json(folder / "config.json").get("model_type") == "internvl_chat"
    loading = _LOAD_OFFICIAL if official else _LOAD_NATIVE
    licences = (
        f"The weights come from {made_from}, whose card says `license: {licence}`."
        if "license" in inherited
        else f"The weights come from {made_from}. It names no licence here: look it up before you share these weights."
    )
    text = _CARD.format(
        front_matter=data.to_yaml(),
        name="Mono-InternVL",
        how=how.format(source=made_from) + commit,
        manifest=MANIFEST,
        loading=loading,
        rows="\n".join(rows),
        total=f"{total:,}",
        size=readable_bytes(plan.nbytes),
        licences=licences,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


_LOAD_NATIVE = """```python
from transformers import AutoModel

model = AutoModel.from_pretrained("path/or/hub-id", trust_remote_code=True)
print(model.chat("picture.png", "Describe the image."))
```"""

_LOAD_OFFICIAL = """```python
from mono_internvl import MonoInternVLForCausalLM

model = MonoInternVLForCausalLM.from_pretrained("path/or/hub-id")
print(model.chat("picture.png", "Describe the image."))
```

Tensors, their names and `config.json` are as in OpenGVLab/Mono-InternVL-2B, for engines that read that layout."""

_CARD = """---
{front_matter}
---

# {name}

{how}.

`{manifest}` lists every input and output file; `mono-internvl convert --check FOLDER` compares.

## How to load it

{loading}

bfloat16 or float32 only: activations overflow in float16.

## Sizes

| group | parameters | bytes |
|---|---:|---:|
{rows}
| **total** | **{total}** | **{size}** |

## Licences

{licences} The code in this folder is MIT (mono-internvl); the architecture is that of Mono-InternVL
(arXiv [2410.08202](https://arxiv.org/abs/2410.08202), [2507.12566](https://arxiv.org/abs/2507.12566)) and InternLM2
(arXiv [2403.17297](https://arxiv.org/abs/2403.17297)).
"""
