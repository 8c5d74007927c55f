"""A tiny dense InternLM2 checkpoint, in every form in which one is published."""

import json

import torch
from safetensors.torch import save_file


VOCABULARY = 300
CONFIG = {
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 10000,
    "rms_norm_eps": 1e-5,
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def dense_state(vocab_size=VOCABULARY):
    """A dense InternLM2's tensors, float32, no two alike."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"model.tok_embeddings.weight": (vocab_size, 64), "output.weight": (vocab_size, 64)}
    for i in range(2):
        layer = {
            "attention.wqkv": (128, 64),
            "attention.wo": (64, 64),
            "attention_norm": (64,),
            "ffn_norm": (64,),
            "feed_forward.w1": (96, 64),
            "feed_forward.w2": (64, 96),
            "feed_forward.w3": (96, 64),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (64,)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def write_dense(folder, form="safetensors", state=None, **config):
    """`form`: safetensors or bin, optionally with `-sharded` (two files, an index) or `-bare` (no index)."""
    state = dense_state(config.get("vocab_size", VOCABULARY)) if state is None else state
    folder.mkdir()
    values = {name: value for name, value in {**CONFIG, **config}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(values))
    stem, ending = ("pytorch_model", "bin") if form.startswith("bin") else ("model", "safetensors")
    save = torch.save if ending == "bin" else save_file
    if "-" not in form:
        save(state, folder / f"{stem}.{ending}")
        return folder
    names = list(state)
    parts = {f"{stem}-0000{i + 1}-of-00002.{ending}": names[i::2] for i in range(2)}
    for file, part in parts.items():
        save({name: state[name] for name in part}, folder / file)
    if form.endswith("-sharded"):
        weight_map = {name: file for file, part in parts.items() for name in part}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
