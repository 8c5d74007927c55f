"""What engines and other formats are told of a configuration once, and what they have no place for."""

from ..configuration_mono_internvl import MonoInternVLConfig


def stop_token_ids(config: MonoInternVLConfig) -> list[int]:
    """What ends an answer: the decoder's own end, `<|im_end|>` and `<|im_start|>`."""
    eos = config.text_config.eos_token_id
    ends = list(eos) if isinstance(eos, list) else [] if eos is None else [eos]
    return list(dict.fromkeys([*ends, *config.stop_token_ids]))


def refuse_queries_and_gates(config: MonoInternVLConfig, where: str) -> None:
    """
    Raises:
        ValueError: the model has learnable queries or expert gates; `where` has neither.
    """
    queries, gates = config.num_learnable_queries, config.text_config.expert_gates
    if queries or gates:
        raise ValueError(f"{queries} learnable queries and expert_gates={gates}: {where} has no place for either")
