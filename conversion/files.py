"""What lies beside the weights: configuration, generation defaults, remote code, model card."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_relative_import_files

from ..common.files import read_json, readable_bytes
from ..common.parameters import build_on_meta, count_by_part
from ..configuration_mono_internvl import AUTO_MAP, MonoInternVLConfig
from .manifest import MANIFEST
from .plan import Plan
from .source import Checkpoint, Origin
from .tokenizer import Extended
from .writer import write_json


logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parent.parent
TAGS = ["mono-internvl", "internvl", "monolithic", "mixture-of-experts", "vision-language"]


def save_generation_config(config: MonoInternVLConfig, extended: Extended, folder: Path) -> None:
    """Stop tokens, so that `generate` ends an answer without being told: those of the source's generation_config.json
    before those of its config.json, as transformers reads them, and the ends of a turn."""
    text, tokenizer = config.text_config, extended.tokenizer
    given = extended.ids["stops"]
    given = text.eos_token_id if given is None else given
    stops = given if isinstance(given, list) else [given]
    if tokenizer is not None:
        stops = [*stops, tokenizer.token_to_id(extended.roles["eos_token"]), *config.stop_token_ids]
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
(arXiv [2410.08202](https://arxiv.org/abs/2410.08202), [2507.12566](https://arxiv.org/abs/2507.12566)) over its base's
decoder.
"""
