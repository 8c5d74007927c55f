"""What engines and other formats are told of a configuration once, and what they have no place for."""

from ..configuration_mono_internvl import MonoInternVLConfig
from ..weight_mapping_mono_internvl import additions


def stop_token_ids(config: MonoInternVLConfig) -> list[int]:
    """What ends an answer: the decoder's own end, `<|im_end|>` and `<|im_start|>`."""
    eos = config.text_config.eos_token_id
    ends = list(eos) if isinstance(eos, list) else [] if eos is None else [eos]
    return list(dict.fromkeys([*ends, *config.stop_token_ids]))


def refuse_additions(config: MonoInternVLConfig, where: str) -> None:
    """
    Raises:
        ValueError: the model has parts that neither the released one nor 1.5 has; names them, and that `where` has no
            place for them.
    """
    if found := additions(config):
        raise ValueError(f"{where} has no place for {', '.join(found)}: run this model with transformers")
