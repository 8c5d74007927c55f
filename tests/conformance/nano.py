"""A copy of the bundled nano for the suites, so that whatever a test writes stays out of the repository."""

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import mono_internvl
from mono_internvl import MonoInternVLConfig


ROOT = Path(mono_internvl.__file__).resolve().parent
PICTURE = ROOT / "examples" / "plate.png"


@functools.cache
def nano_folder() -> str:
    """The nano as it is published, without its code: the classes of the package are used."""
    folder = Path(tempfile.mkdtemp(prefix="nano-"))
    for pattern in ("*.json", "*.jinja", "*.safetensors"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, folder)
    return str(folder)


def tiny_config(tokenizer: Any, **text: Any) -> MonoInternVLConfig:
    """Two layers over the nano's vocabulary; `text` changes its text configuration."""
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return MonoInternVLConfig(
        text_config={**sizes, **text},
        vision_config={"hidden_size": 16, "image_size": 56},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
