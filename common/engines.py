"""What engines and other formats are told of a configuration once, and what they have no place for."""

from ..configuration_mono_internvl import MonoInternVLConfig
from ..processing_mono_internvl import MonoInternVLProcessor
from ..weight_mapping_mono_internvl import additions


def stop_token_ids(config: MonoInternVLConfig) -> list[int]:
    """What ends an answer: the decoder's own end, and those of turns (`<|im_end|>` and `<|im_start|>`, or Llama's)."""
    eos = config.text_config.eos_token_id
    ends = list(eos) if isinstance(eos, list) else [] if eos is None else [eos]
    return list(dict.fromkeys([*ends, *config.stop_token_ids]))


def check_tokens(config: MonoInternVLConfig, processor: MonoInternVLProcessor, model: str) -> None:
    """What an engine is told by the configuration is what its prompts are made with.

    Raises:
        ValueError: pictures have other ids in the tokenizer, or it has a token that ends an answer of which the
            configuration does not know; names `model`, the tokens and their ids.
    """
    if processor.image_token_ids != config.image_token_ids:
        raise ValueError(
            f"<IMG_CONTEXT>, <img> and </img> are {config.image_token_ids} in the configuration of {model}, "
            f"but {processor.image_token_ids} in its tokenizer; they must match"
        )
    known = stop_token_ids(config)
    if absent := [token for token in processor.stop_token_ids if token not in known]:
        words = processor.tokenizer.convert_ids_to_tokens(absent)
        named = ", ".join(f"{token} ({word})" for token, word in zip(absent, words, strict=True))
        raise ValueError(
            f"{named} end an answer by the tokenizer of {model}, but not by its configuration, which has {known}: set "
            "stop_token_ids in config.json"
        )


def refuse_additions(config: MonoInternVLConfig, where: str) -> None:
    """
    Raises:
        ValueError: the model has parts that neither the released one nor 1.5 has; names them, and that `where` has no
            place for them.
    """
    if found := additions(config):
        raise ValueError(f"{where} has no place for {', '.join(found)}: run this model with transformers")
