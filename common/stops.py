"""What ends an answer, by the configuration alone: for engines and formats that are told it once."""

from ..configuration_mono_internvl import MonoInternVLConfig


def stop_token_ids(config: MonoInternVLConfig) -> list[int]:
    """The decoder's own end, `<|im_end|>` and `<|im_start|>`."""
    eos = config.text_config.eos_token_id
    ends = list(eos) if isinstance(eos, list) else [] if eos is None else [eos]
    return list(dict.fromkeys([*ends, *config.stop_token_ids]))
