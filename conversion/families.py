"""The dense language models that can be expanded, as data: a family's names, what its code assumes, its prompts.

A family is what several releases have in common (Qwen2 is Qwen2 and Qwen2.5, Llama is Llama 1 to 3.3 and all that was
trained from it). Facts are those of transformers' configuration classes and, for InternLM2 and InternLM3, of the code
beside the released weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..vocabulary_mono_internvl import TURNS, Turns


_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Template:
    """A chat template that comes with this package.

    Attributes:
        turns: how it marks turns, a key of `TURNS`.
        files: its parts, by their paths in the package.
        settings: variables that the parts read; set in front of them.
        bos: whether a prompt begins with the tokenizer's bos token; without, the processor's tokenizer has none.
        marks: tokens by which it is told from others that mark turns alike.
        is_ours: it is Mono-InternVL's own, however the base was prompted.
    """

    turns: str
    files: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    bos: bool = True
    marks: tuple[str, ...] = ()
    is_ours: bool = False

    @property
    def tokens(self) -> Turns:
        return TURNS[self.turns]

    def source(self, settings: dict[str, Any]) -> str:
        """The whole template; `settings` replace those of the same names."""
        chosen = {**self.settings, **{name: value for name, value in settings.items() if name in self.settings}}
        lines = [f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n" for name, value in chosen.items()]
        return "".join([*lines, *((_PACKAGE / file).read_text(encoding="utf-8") for file in self.files)])


_CONTENT, _CHATML, _QWEN, _NO_THINKING, _LLAMA3 = (
    f"conversion/templates/{name}.jinja" for name in ("content", "chatml", "qwen", "no_thinking", "llama3")
)
TEMPLATES = {
    "internlm2": Template("chatml", ("chat_template.jinja",), marks=("<|plugin|>",), is_ours=True),
    "chatml": Template("chatml", (_CONTENT, _CHATML), {"default_system": ""}),
    "qwen2": Template(
        "chatml",
        (_CONTENT, _QWEN),
        {"default_system": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."},
        bos=False,
    ),
    "qwen3": Template(
        "chatml",
        (_CONTENT, _QWEN, _NO_THINKING),
        {"default_system": ""},
        bos=False,
    ),
    "llama3": Template("llama3", (_CONTENT, _LLAMA3)),
}


@dataclass(frozen=True)
class Family:
    """A kind of dense language model.

    Attributes:
        name: as people call it.
        model_type: of its `config.json`.
        architectures: what its `config.json` may name; the first also where the file says no type.
        layout: the names of its tensors, see `plan.py`.
        biases: `qkv`, `o` and `mlp` -> always, never, or the fields that say it, of which the first one there counts.
        qk_norm: whether it normalises queries and keys.
        assumed: what its code assumes where a file says nothing.
        templates: names of `TEMPLATES`; the first whose tokens the tokenizer has.
        pad_tokens: special tokens that it pads with where no file names one.
    """

    name: str
    model_type: str
    architectures: tuple[str, ...]
    layout: str
    biases: dict[str, bool | tuple[str, ...]]
    templates: tuple[str, ...]
    qk_norm: bool = False
    assumed: dict[str, Any] = field(default_factory=dict)
    pad_tokens: tuple[str, ...] = ()


_ASSUMED_BY_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = (
    Family(
        "InternLM2 and InternLM2.5",
        "internlm2",
        ("InternLM2ForCausalLM",),
        "internlm2",
        biases={"qkv": ("bias",), "o": ("bias",), "mlp": False},
        templates=("internlm2",),
        assumed={"pad_token_id": 2},
    ),
    Family(
        "InternLM3",
        "internlm3",
        # transformers runs it as a Llama, and saves it as one.
        ("InternLM3ForCausalLM", "LlamaForCausalLM"),
        "llama",
        biases={"qkv": ("qkv_bias", "attention_bias"), "o": ("bias", "attention_bias"), "mlp": ("bias", "mlp_bias")},
        templates=("chatml",),
        assumed={"max_position_embeddings": 32768},
    ),
    Family(
        "Llama",
        "llama",
        ("LlamaForCausalLM",),
        "llama",
        biases={"qkv": ("attention_bias",), "o": ("attention_bias",), "mlp": ("mlp_bias",)},
        templates=("llama3", "internlm2", "chatml"),
        pad_tokens=("<|finetune_right_pad_id|>",),
    ),
    Family(
        "Qwen2 and Qwen2.5",
        "qwen2",
        ("Qwen2ForCausalLM",),
        "llama",
        biases={"qkv": True, "o": False, "mlp": False},
        templates=("qwen2",),
        assumed=_ASSUMED_BY_QWEN,
        pad_tokens=("<|endoftext|>",),
    ),
    Family(
        "Qwen3",
        "qwen3",
        ("Qwen3ForCausalLM",),
        "llama",
        biases={"qkv": ("attention_bias",), "o": ("attention_bias",), "mlp": False},
        templates=("qwen3",),
        qk_norm=True,
        assumed={**_ASSUMED_BY_QWEN, "head_dim": 128},
        pad_tokens=("<|endoftext|>",),
    ),
)
# What all of them assume but for `Family.assumed`; a Mono-InternVL assumes the released InternLM2-1.8B instead.
ASSUMED: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def list_families() -> str:
    """The families and their architectures, for messages."""
    return ", ".join(f"{family.name} ({family.architectures[0]})" for family in FAMILIES)


def family_of(config: dict[str, Any]) -> Family | None:
    """The family that a `config.json` describes: by type and architecture, else by its architecture, else, where it
    names none, by its type; None for any other."""
    kind = config.get("model_type")
    name = (config.get("architectures") or [None])[0]
    matches = (
        lambda family: family.model_type == kind and name in family.architectures,
        lambda family: family.architectures[0] == name,
        lambda family: family.model_type == kind and name is None,
    )
    return next((family for match in matches for family in FAMILIES if match(family)), None)


def has_biases(family: Family, part: str, config: dict[str, Any], in_tensors: bool) -> bool:
    """Whether a part (`qkv`, `o`, `mlp`) has biases: as the family or the `config.json` says, or, where that says
    nothing, as the tensors do."""
    said = family.biases[part]
    if isinstance(said, bool):
        return said
    return bool(next((config[name] for name in said if config.get(name) is not None), in_tensors))
