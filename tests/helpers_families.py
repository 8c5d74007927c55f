"""Small random models of every family of dense language models, in the form in which each is published.

Models are made by transformers, but for InternLM2, which it does not have: that is a Llama with grouped projections.
Tokenizers have each family's kind of vocabulary, pre-tokenizer and added tokens, trained on a few lines.
"""

import json
from dataclasses import dataclass, field

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from helpers_sentencepiece import number_field, small_model
from mono_internvl.weight_mapping_mono_internvl import merge_grouped_qkv


# 0 for q, k and v, which are one thing to InternLM2.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LINES = (
    "How many circles are there? Two red circles and 17 squares.",
    "你好，世界！Ça va? don't",
    "system user assistant\n\n",
)


@dataclass(frozen=True)
class Base:
    """A family: its classes in transformers, what its configuration adds, and what its files say instead of those of
    transformers' classes (None: nothing)."""

    kind: str
    options: dict = field(default_factory=dict)
    written: dict = field(default_factory=dict)
    tokenizer: str = "qwen"
    # Rows of the embedding that have no token.
    spare: int = 0


BASES = {
    "internlm2": Base(
        "Llama",
        {"attention_bias": True},
        {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": True, "attention_bias": None},
        tokenizer="internlm2",
        spare=3,
    ),
    "internlm3": Base(
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 24},
        {
            **{"architectures": ["InternLM3ForCausalLM"], "model_type": "internlm3", "qkv_bias": True, "bias": True},
            **{"attention_bias": None, "mlp_bias": None},
        },
        tokenizer="internlm3",
    ),
    "llama": Base("Llama", {"attention_bias": True, "mlp_bias": True}, tokenizer="llama3"),
    "qwen2": Base("Qwen2", spare=7),
    "qwen2-tied": Base("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": Base("Qwen3", {"attention_bias": True, "head_dim": 24}, tokenizer="qwen3", spare=2),
    "qwen3-tied": Base("Qwen3", {"tie_word_embeddings": True, "head_dim": 32}, tokenizer="qwen3"),
}
# A setting of each type; without "max": at most `SIZES["max_position_embeddings"]` positions are known.
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """No parameter keeps its initial 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else (0.5 if name.endswith("bias") else 0.2) * noise)


def make_base(folder, name: str, *, vocabulary: int | None = None, rope: str = "default", **options):
    """A folder with the model of a family, and that model as transformers has it, in float32 and eager.

    `vocabulary`: rows, for a folder without a tokenizer.
    """
    base = BASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    if vocabulary is None:
        vocabulary = TOKENIZERS[base.tokenizer](folder) + base.spare
    parameters = {"rope_theta": 5000.0, **ROPES[rope]}
    config_class = getattr(transformers, f"{base.kind}Config")
    values = {**SIZES, **base.options, **options}
    config = config_class(vocab_size=vocabulary, rope_parameters=parameters, **values, attn_implementation="eager")
    model = getattr(transformers, f"{base.kind}ForCausalLM")(config).eval()
    randomise(model)
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    # As published: old names.
    parameters = written.pop("rope_parameters")
    written["rope_theta"] = parameters.pop("rope_theta")
    written["rope_scaling"] = parameters if rope != "default" else None
    changed = {**written, **base.written}
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in changed.items() if v is not None or k not in base.written})
    )
    if name == "internlm2":
        _group(folder, config)
    return model


def _group(folder, config) -> None:
    """Tensors of a Llama under InternLM2's names."""
    state = load_file(folder / "model.safetensors")
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    renamed = {}
    pairs = {
        **{"embed_tokens": "tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm"},
        **{
            "post_attention_layernorm": "ffn_norm",
            "self_attn.o_proj": "attention.wo",
            "mlp.gate_proj": "feed_forward.w1",
        },
        **{"mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2"},
    }
    for name, tensor in state.items():
        if ".q_proj." in name:
            parts = [state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            renamed[name.replace("self_attn.q_proj", "attention.wqkv")] = merge_grouped_qkv(*parts, *heads)
        elif ".k_proj." not in name and ".v_proj." not in name:
            for ours, theirs in pairs.items():
                name = name.replace(ours, theirs)
            renamed[name] = tensor
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


# ---------------------------------------------------------------------------------------------------------- tokenizers

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Not special in Qwen's files.
_QWEN_PLAIN = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|repo_name|>")
_QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|box_start|>",
    "<|image_pad|>",
)
_QWEN3_PLAIN = ("<tool_response>", "</tool_response>", "<think>", "</think>")
_LLAMA3 = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)
# The templates' public semantics for conversations of text, in words of our own.
_CHATML_TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
OWN_TEMPLATES = {
    "internlm3": "{{ bos_token }}" + _CHATML_TURNS,
    "qwen": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. "
    "You are a helpful assistant.<|im_end|>\n{% endif %}" + _CHATML_TURNS,
    "qwen3": _CHATML_TURNS + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
    "llama3": "{% for m in messages %}{% set t = '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' "
    "+ m.content | trim + '<|eot_id|>' %}{% if loop.first %}{% set t = bos_token + t %}{% endif %}{{ t }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
}


def byte_level(digits: str, *, normalizer=None, ignore_merges: bool = False) -> Tokenizer:
    """Byte-level BPE behind a pattern, as Llama 3 and Qwen have it; `digits`: how many are split off together."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    split = pre_tokenizers.Split(Regex(_SPLIT % digits), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(LINES * 3, trainer)
    return tokenizer


def _write(folder, tokenizer: Tokenizer, settings: dict, template: str) -> int:
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        index: {"content": token.content, "special": token.special, "normalized": False, "lstrip": False}
        for index, token in tokenizer.get_added_tokens_decoder().items()
    }
    content = {**settings, "added_tokens_decoder": added, "chat_template": OWN_TEMPLATES[template]}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return tokenizer.get_vocab_size()


def _special(*names: str) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in names]


def qwen(folder, template: str = "qwen", plain: tuple[str, ...] = ()) -> int:
    tokenizer = byte_level("", normalizer=normalizers.NFC())
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(_special(*_QWEN_SPECIAL))
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in (*_QWEN_PLAIN, *plain)])
    roles = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    return _write(folder, tokenizer, roles, template)


def qwen3(folder) -> int:
    return qwen(folder, "qwen3", _QWEN3_PLAIN)


def llama3(folder) -> int:
    tokenizer = byte_level("{1,3}", ignore_merges=True)
    tokenizer.add_special_tokens(_special(*_LLAMA3))
    bos = _LLAMA3[0]
    begins = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begins])
    return _write(folder, tokenizer, {"bos_token": bos, "eos_token": "<|eot_id|>"}, "llama3")


def internlm3(folder) -> int:
    """A SentencePiece file alone, which puts a space in front; its control tokens are renamed pieces."""
    names = [f"[UNUSED_TOKEN_{number}]" for number in range(6)]
    prefix_and_spaces = number_field(3, 1) + number_field(4, 0)
    (folder / "tokenizer.model").write_bytes(small_model(reserved=tuple(names), normalizer=prefix_and_spaces))
    control = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>")
    size = 277
    added = {size - 6 + i: {"content": token, "special": True} for i, token in enumerate(control)}
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    content = {**settings, "added_tokens_decoder": added, "chat_template": OWN_TEMPLATES["internlm3"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return size


def internlm2(folder) -> int:
    (folder / "tokenizer.model").write_bytes(small_model())
    return 277


TOKENIZERS = {"qwen": qwen, "qwen3": qwen3, "llama3": llama3, "internlm3": internlm3, "internlm2": internlm2}
