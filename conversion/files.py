"""What lies beside the weights: tokenizer, processor, configuration, generation defaults, remote code, model card."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load
from tokenizers import AddedToken, Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_relative_import_files

from ..cli.inspect import build_on_meta, parameter_groups, readable_bytes
from ..configuration_mono_internvl import AUTO_MAP, MonoInternVLConfig
from ..image_processing_mono_internvl import MonoInternVLImageProcessor
from ..processing_mono_internvl import MonoInternVLProcessor
from ..tokenization import build_tokenizer
from ..tokenization.internlm2 import ADDED_TOKENS
from .plan import Plan
from .source import Checkpoint, Origin
from .writer import MANIFEST, write_json


logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parent.parent
_NEEDED_TOKENS = ("<|im_start|>", "<|im_end|>")
TAGS = ["mono-internvl", "internvl", "monolithic", "mixture-of-experts", "vision-language"]


# ----------------------------------------------------------------------------------------------------------- tokenizer


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def warn_without_tokenizer(folder: Path) -> None:
    logger.warning("%s has no tokenizer: the result has weights and configuration, but no processor", folder)


def extended_tokenizer(folder: Path, vocab_size: int) -> tuple[Tokenizer | None, int]:
    """The dense model's tokenizer with Mono-InternVL's nine tokens, and how many rows the vocabulary must grow by.

    The new ids start at `vocab_size`; ids below it without a token get reserved ones. A tokenizer whose last nine
    tokens are these and whose size is `vocab_size` already needs no growth. None, with a warning, where there is no
    tokenizer or it lacks the tokens of the chat template.

    Raises:
        ValueError: more tokens than rows, or the nine stand elsewhere; names the file.
    """
    grown = len(ADDED_TOKENS)
    if not has_tokenizer(folder):
        warn_without_tokenizer(folder)
        return None, grown
    # The SentencePiece file first: fast files of released InternLM2 checkpoints lose leading spaces.
    if (folder / "tokenizer.model").is_file():
        file = folder / "tokenizer.model"
        tokenizer = build_tokenizer(file, added=())
    else:
        file = folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ValueError(f"{file} is damaged: {error}") from error
    absent = [token for token in _NEEDED_TOKENS if tokenizer.token_to_id(token) is None]
    if absent:
        logger.warning(
            "%s lacks %s, which the chat template needs: made without a processor", file, " and ".join(absent)
        )
        return None, grown
    ids = [tokenizer.token_to_id(token) for token in ADDED_TOKENS]
    size = tokenizer.get_vocab_size()
    if ids == list(range(vocab_size - grown, vocab_size)):
        grown = 0
    elif any(token is not None for token in ids) and ids != list(range(vocab_size, vocab_size + grown)):
        raise ValueError(
            f"{file} has some of {', '.join(ADDED_TOKENS)}, but not as its last tokens: they have the ids {ids}, and "
            f"the model's vocabulary is {vocab_size}"
        )
    if size > vocab_size + (grown if ids[0] is not None else 0):
        raise ValueError(f"{file} has {size} tokens, the model only {vocab_size} rows")
    if ids[0] is None:
        names = [*(f"<|reserved_{i}|>" for i in range(size, vocab_size)), *ADDED_TOKENS]
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer, grown


def save_processor(tokenizer: Tokenizer, config: MonoInternVLConfig, folder: Path) -> None:
    """Tokenizer, chat template and image processor of a new model, as transformers saves them."""
    text = config.text_config
    names = {
        f"{role}_token": tokenizer.id_to_token(token[0] if isinstance(token, list) else token)
        for role, token in (("bos", text.bos_token_id), ("eos", text.eos_token_id), ("pad", text.pad_token_id))
        if token is not None
    }
    names.setdefault("pad_token", names.get("eos_token"))
    unknown = json.loads(tokenizer.to_str())["model"].get("unk_token")
    special = [
        token.content
        for _, token in sorted(tokenizer.get_added_tokens_decoder().items())
        if token.special and token.content not in (*names.values(), unknown)
    ]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **names,
        unk_token=unknown,
        extra_special_tokens=special,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=text.max_position_embeddings,
    )
    image_processor = MonoInternVLImageProcessor(tile_size=config.vision_config.image_size)
    MonoInternVLProcessor(image_processor, fast).save_pretrained(folder)


def save_generation_config(config: MonoInternVLConfig, tokenizer: Tokenizer | None, folder: Path) -> None:
    """Stop tokens, so that `generate` ends an answer without being told."""
    text = config.text_config
    stops = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    if tokenizer is not None:
        stops = [*stops, *(tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|im_start|>"))]
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
    content = json.loads(path.read_text(encoding="utf-8"))
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
    groups = parameter_groups(build_on_meta(config))
    width = plan.nbytes / max(sum(groups.values()), 1)
    rows = [f"| {name} | {count:,} | {readable_bytes(round(count * width))} |" for name, count in groups.items()]
    total = sum(groups.values())
    made_from = f"[{base}](https://huggingface.co/{base})" if base else f"`{origin.name}`"
    commit = f" (commit `{origin.commit}`)" if origin.commit else ""
    official = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == "internvl_chat"
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

`{manifest}` lists every input and output file with its sha256; `mono-internvl convert --check FOLDER` compares.

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
