"""The vLLM plugin: with this package installed, vLLM serves Mono-InternVL.

    python -m vllm.entrypoints.openai.api_server --model <folder or Hub id>

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). From then on

    vllm_input   reads the folder's configuration and tokenizer, renders chats and tiles pictures: what reaches the
                 engine are the ids and pixels that `MonoInternVLProcessor` gives to `generate`
    vllm_model   is the model: vLLM's attention and fused experts, one expert per token, chosen by the token's id

No remote code is run: `--trust-remote-code` is not needed. Other models are served as before.
"""

import logging
from pathlib import Path
from typing import Any

from .checkpoint import ARCHITECTURE


logger = logging.getLogger(__name__)

TOKENIZER_MODE = "mono_internvl"


def register() -> None:
    """Make the model known to vLLM; may be called more than once.

    Where this vLLM lacks a place to hook into, nothing is registered and a warning says so: an error would keep vLLM
    from serving other models.
    """
    try:
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
        from vllm.renderers.registry import RENDERER_REGISTRY
        from vllm.tokenizers.registry import TokenizerRegistry
        from vllm.transformers_utils import config as vllm_config
        from vllm.transformers_utils.config import _CONFIG_FORMAT_TO_CONFIG_PARSER as parsers

        from . import vllm_input
    except ImportError as error:
        logger.warning(
            "Mono-InternVL cannot be served: its plugin does not fit this vLLM (%s); it was made for 0.32 and 0.33, "
            "see serving/constraints.txt",
            error,
        )
        return

    # By name, so that a process that only reads the configuration does not import the model.
    ModelRegistry.register_model(ARCHITECTURE, "mono_internvl.serving.vllm_model:MonoInternVLForServing")
    MODELS_CONFIG_MAP[ARCHITECTURE] = vllm_input.EngineSettings
    TokenizerRegistry.tokenizers[TOKENIZER_MODE] = (vllm_input.__name__, vllm_input.ChatTokenizerLoader.__name__)
    RENDERER_REGISTRY.renderers[TOKENIZER_MODE] = (vllm_input.__name__, vllm_input.ChatRenderer.__name__)
    # Every Hugging Face folder is read by the parser "hf", vLLM's or another plugin's: it goes on reading all others.
    parsers["hf"] = vllm_input.with_own_folders(parsers["hf"])
    # vLLM looks for config.json before any parser is asked; a LoRA folder has none, and vLLM would not say why.
    found = getattr(vllm_config, "file_or_path_exists", None)
    if found is not None and not hasattr(found, "refuses_adapters"):
        vllm_config.file_or_path_exists = _refusing_adapters(found)


def _refusing_adapters(found: Any) -> Any:
    """vLLM's `file_or_path_exists(model, name, ..)`; logs what to do with a LoRA folder that is given as the model."""

    def look(model: Any, *args: Any, **kwargs: Any) -> Any:
        folder = Path(str(model))
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            logger.error(
                "%s is a LoRA adapter; adapters are merged before they are served: mono-internvl merge %s OUT, then "
                "serve OUT",
                model,
                model,
            )
        return found(model, *args, **kwargs)

    look.refuses_adapters = True  # type: ignore[attr-defined]
    return look
