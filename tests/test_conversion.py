"""Expanding, converting, resuming and publishing, on tiny random models and the golden ones."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoProcessor, LlamaConfig, LlamaForCausalLM

from conftest import ROOT, Bomb, golden, load_golden, tiny_model
from helpers_dense import CONFIG, VOCABULARY, dense_state, write_dense
from helpers_sentencepiece import small_model
from mono_internvl import MonoInternVLForCausalLM, MonoInternVLImageProcessor, MonoInternVLProcessor
from mono_internvl.benchmarks.conversion import DENSE_2B, copy_folder, make_dense
from mono_internvl.conversion import (
    check_checkpoint,
    convert_checkpoint,
    expand_checkpoint,
    publish_checkpoint,
    writer,
)
from mono_internvl.conversion import plan as plan_module
from mono_internvl.conversion.convert import official_config
from mono_internvl.conversion.publish import HfApi, files_left_out, files_to_publish
from mono_internvl.conversion.source import Checkpoint
from mono_internvl.conversion.verify import NativeView, embed, last_hidden_states
from mono_internvl.tokenization import build_tokenizer, save_tokenizer, tokenizer_from_pieces
from mono_internvl.tokenization.internlm2 import ADDED_TOKENS
from mono_internvl.tokenization.sentencepiece_model import BYTE_PIECES, SPACE, Piece, PieceType


SMALL = {"tile_size": 56, "vision_hidden_size": 16}


@pytest.fixture
def dense(tmp_path):
    return write_dense(tmp_path / "dense")


def weights(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def load(folder):
    return MonoInternVLForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def dense_hidden_states(source, model, ids, layout="internlm2"):
    with Checkpoint(source) as checkpoint, torch.no_grad():
        view = NativeView(checkpoint, layout, model.config)
        return last_hidden_states(view, embed(view, ids), None)


# -------------------------------------------------------------------------------------------------------------- expand


def test_the_benchmark_s_model_in_small(tmp_path):
    small = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2}
    size = make_dense(tmp_path / "dense", {**DENSE_2B, **small}, shards=3)
    report = expand_checkpoint(tmp_path / "dense", tmp_path / "out", **SMALL)
    assert report.differences.passed and report.nbytes > size
    assert copy_folder(tmp_path / "out", tmp_path / "copy") > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "copy")


def test_golden_expansion(tmp_path):
    source = golden("internlm2_dense", "model.safetensors").parent
    expected = load_golden("internlm2_dense", "golden.safetensors")
    converted = load_golden("internlm2_dense", "golden_converted.safetensors")
    report = expand_checkpoint(source, tmp_path / "out", tile_size=56, vision_hidden_size=32)
    assert report.differences.identical and report.differences.logits <= 1e-5
    model = load(tmp_path / "out")
    assert model.config.text_config.vocab_size == 400 and model.config.image_token_id == 393
    rows = model.lm_head.weight[391:]
    torch.testing.assert_close(rows, converted["new_output_rows"], atol=1e-6, rtol=0)

    ids = expected["text.input_ids"]
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        visual = model.model(
            inputs_embeds=model.get_input_embeddings()(ids), visual_token_mask=torch.ones_like(ids, dtype=torch.bool)
        ).last_hidden_state
        batch = model(
            expected["batch.input_ids"],
            attention_mask=expected["batch.attention_mask"],
            position_ids=expected["batch.position_ids"],
        ).logits
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(output.logits, converted["text.logits_after_conversion"], **close)
    torch.testing.assert_close(output.logits[..., :391], expected["text.logits"], **close)
    torch.testing.assert_close(torch.stack(output.hidden_states), expected["text.hidden_states"], **close)
    kept = expected["batch.attention_mask"] == 1
    torch.testing.assert_close(batch[kept][:, :391], expected["batch.logits"][kept], **close)
    before = dense_hidden_states(source, model, ids)
    assert torch.equal(output.hidden_states[-1], before)
    assert torch.equal(visual, before)


@pytest.mark.parametrize("form", ["safetensors-sharded", "safetensors-bare", "bin", "bin-sharded", "bin-bare"])
def test_every_form_of_source_gives_the_same_weights(tmp_path, dense, form):
    expand_checkpoint(dense, tmp_path / "a", **SMALL, verify=False)
    expand_checkpoint(write_dense(tmp_path / "other", form), tmp_path / "b", **SMALL)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_weights_are_taken_in_the_order_of_transformers(tmp_path):
    """One file before an index, safetensors before pickles; what it does not read is not read."""
    expected, other = dense_state(), {name: torch.zeros_like(tensor) for name, tensor in dense_state().items()}
    source = write_dense(tmp_path / "many")
    save_file(other, source / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(other, "model-00001-of-00001.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("model.fp16.safetensors", "consolidated.safetensors"):
        save_file(other, source / name)
    torch.save(other, source / "pytorch_model.bin")

    def read(folder=source):
        with Checkpoint(folder) as checkpoint:
            return torch.equal(checkpoint.read("output.weight"), expected["output.weight"]), len(checkpoint.files)

    assert read() == (True, 1)
    save_file(expected, source / "model-00001-of-00001.safetensors")
    save_file(other, source / "model.safetensors")
    assert read() == (False, 1)
    (source / "model.safetensors").unlink()
    assert read() == (True, 1)
    (source / "model.safetensors.index.json").unlink()
    assert read() == (False, 1)  # the pickle: transformers reads no shards without an index
    save_file(expected, source / "named.safetensors")
    (source / "config.json").write_text(json.dumps({**CONFIG, "transformers_weights": "named.safetensors"}))
    assert read() == (True, 1)


def test_weights_that_nobody_would_read(tmp_path):
    source = write_dense(tmp_path / "dense")
    (source / "model.safetensors").rename(source / "model.fp16.safetensors")
    expect(FileNotFoundError, r"dense holds no weights: .*it has model.fp16.safetensors, which", source, tmp_path)
    (source / "model.safetensors").symlink_to(tmp_path / "gone")
    expect(FileNotFoundError, r"model.safetensors is a link to a file that does not exist", source, tmp_path)
    source = write_dense(tmp_path / "bare", "safetensors-bare")
    shutil.rmtree(tmp_path / "dense")
    (source / "model-00002-of-00002.safetensors").unlink()
    expect(FileNotFoundError, r"bare holds 1 of the 2 shards", source, tmp_path)


def test_old_pickles_are_read(tmp_path):
    state = dense_state()
    source = write_dense(tmp_path / "old")
    (source / "model.safetensors").unlink()
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    expand_checkpoint(source, tmp_path / "out", **SMALL)
    name = "model.language_model.norm.weight"
    assert torch.equal(weights(tmp_path / "out")[name], state["model.norm.weight"])


@pytest.mark.parametrize(("tied", "bias"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "InternLM3ForCausalLM"])
def test_llama_layout(tmp_path, architecture, tied, bias):
    torch.manual_seed(0)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = LlamaConfig(
        **{name: CONFIG[name] for name in names},
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        attn_implementation="eager",
    )
    llama = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.normal_(std=0.2)
    llama.save_pretrained(tmp_path / "llama")
    values = json.loads((tmp_path / "llama" / "config.json").read_text())
    values["architectures"] = [architecture]
    if architecture.startswith("InternLM3"):
        values |= {"model_type": "internlm3", "bias": bias, "qkv_bias": bias}
    (tmp_path / "llama" / "config.json").write_text(json.dumps(values))

    report = expand_checkpoint(tmp_path / "llama", tmp_path / "out", **SMALL)
    assert report.differences.passed
    model = load(tmp_path / "out")
    ids = torch.tensor([[1, 5, 9, 200, 299]])
    with torch.no_grad():
        after, before = model(ids).logits, llama(ids).logits
    torch.testing.assert_close(after[..., :VOCABULARY], before, atol=1e-4, rtol=1e-4)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    mean = llama.lm_head.weight.mean(0).expand(9, -1)
    torch.testing.assert_close(model.lm_head.weight[VOCABULARY:], mean, atol=1e-6, rtol=1e-5)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "linear": {"type": "linear", "factor": 4.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 64},
    "llama3, without its length": LLAMA3,
    "both names": {**LLAMA3, "type": "llama3"},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "nothing": {},
    "null": None,
}


def make_llama(folder, keep=lambda values: values, read_back=True, **options):
    """A random Llama saved by transformers, its configuration changed by `keep`; the model as transformers loads it."""
    torch.manual_seed(0)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = LlamaConfig(**{**{name: CONFIG[name] for name in names}, "num_key_value_heads": 2, **options})
    llama = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.normal_(std=0.2)
    llama.save_pretrained(folder)
    values = keep(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(values))
    if not read_back:
        return None
    return LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def check_parity(folder, llama, length=200):
    ids = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        after, before = load(folder)(ids, use_cache=False).logits, llama(ids, use_cache=False).logits
    torch.testing.assert_close(after[..., :VOCABULARY], before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rope", ROPES)
def test_rope_types_of_llama(tmp_path, rope):
    """The old form of the files, and what they become, against transformers' own model."""

    def old(values):
        values.pop("rope_parameters", None)
        return {**values, "rope_theta": 500.0, "rope_scaling": ROPES[rope], "max_position_embeddings": 256}

    llama = make_llama(tmp_path / "llama", old)
    expand_checkpoint(tmp_path / "llama", tmp_path / "out", **SMALL)
    check_parity(tmp_path / "out", llama)
    again = MonoInternVLForCausalLM.from_pretrained(tmp_path / "out")
    again.save_pretrained(tmp_path / "again")
    check_parity(tmp_path / "again", llama)
    if again.config.text_config.rope_parameters["rope_type"] in ("llama3", "yarn"):
        with pytest.raises(ValueError, match=r"knows no rope type (llama3|yarn) \(only default, linear, dynamic\)"):
            convert_checkpoint(tmp_path / "out", tmp_path / "official", "official")
    else:
        convert_checkpoint(tmp_path / "out", tmp_path / "official", "official")
        check_parity(tmp_path / "official", llama)


OLD_KEYS = ("rope_parameters", "rope_theta", "rms_norm_eps", "max_position_embeddings", "head_dim", "hidden_act")
OLD_KEYS += ("attention_bias", "mlp_bias", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


@pytest.mark.parametrize(
    "change",
    [
        lambda values: {name: value for name, value in values.items() if name not in OLD_KEYS},
        lambda values: {**values, **dict.fromkeys(OLD_KEYS), "num_key_value_heads": None},
        lambda values: {**values, "architectures": None, "pad_token_id": -1, "num_key_value_heads": 4},
        lambda values: {**values, "rope_parameters": {"rope_type": "default"}, "num_key_value_heads": 4},
    ],
    ids=["keys absent", "keys null", "no architecture, pad -1", "rope without theta"],
)
def test_old_configurations_get_llama_s_defaults(tmp_path, change):
    kept = change({"num_key_value_heads": 4})

    def old(values):
        values = change(values)
        if "num_key_value_heads" not in kept or kept["num_key_value_heads"] is None:
            values.pop("num_key_value_heads", None)
        return values

    folder = tmp_path / "llama"
    make_llama(folder, num_key_value_heads=4, vocab_size=VOCABULARY)
    values = old(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(values))
    # transformers takes absence for its default, but stumbles over some nulls and a padding of -1.
    told = {name: value for name, value in values.items() if value is not None and value != -1}
    (tmp_path / "plain").mkdir()
    shutil.copy(folder / "model.safetensors", tmp_path / "plain")
    (tmp_path / "plain" / "config.json").write_text(json.dumps(told))
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "plain", attn_implementation="eager").eval()
    expand_checkpoint(folder, tmp_path / "out", **SMALL)
    check_parity(tmp_path / "out", llama)
    text = load(tmp_path / "out").config.text_config
    expected = llama.config
    assert text.pad_token_id is None and text.num_key_value_heads == 4
    assert text.rope_parameters["rope_theta"] == expected.rope_parameters["rope_theta"] == 10000.0
    for name in ("rms_norm_eps", "max_position_embeddings"):
        assert getattr(text, name) == getattr(expected, name)


@pytest.mark.parametrize("experts", ["qkv", "qkvo"])
def test_attention_experts_are_copies(tmp_path, dense, experts):
    report = expand_checkpoint(dense, tmp_path / "out", visual_attention_experts=experts, **SMALL)
    assert report.differences.passed
    model = load(tmp_path / "out")
    assert model.config.visual_attention_experts == experts
    layer = model.model.language_model.layers[1]
    for part in experts:
        copied = getattr(layer.self_attn, f"visual_{part}_proj").weight
        assert torch.equal(copied, getattr(layer.self_attn, f"{part}_proj").weight)
    assert torch.equal(layer.visual_mlp.down_proj.weight, layer.mlp.down_proj.weight)
    with pytest.raises(ValueError, match=rf"visual attention experts \({experts}\).*no place"):
        convert_checkpoint(tmp_path / "out", tmp_path / "official", "official")


def test_what_is_drawn_depends_on_the_seed_alone(tmp_path, dense):
    made = {}
    for name, options in {"a": {"seed": 1}, "b": {"seed": 1, "max_shard_size": "40KB"}, "c": {"seed": 2}}.items():
        expand_checkpoint(dense, tmp_path / name, **SMALL, **options, verify=False)
        made[name] = weights(tmp_path / name)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3
    assert all(torch.equal(made["a"][name], made["b"][name]) for name in made["a"])
    drawn = {name for name in made["a"] if not torch.equal(made["a"][name], made["c"][name])}
    assert drawn == {
        "model.vision_embeddings.patch_embedding.weight",
        "model.vision_embeddings.position_embedding",
        "model.multi_modal_projector.linear_1.weight",
        "model.multi_modal_projector.linear_2.weight",
        "model.language_model.embed_tokens.weight",
    }
    embedding = made["a"]["model.language_model.embed_tokens.weight"]
    assert torch.equal(embedding[:VOCABULARY], dense_state()["model.tok_embeddings.weight"])
    assert 0.01 < embedding[VOCABULARY:].std() < 0.03


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", torch.bfloat16])
def test_dtype(tmp_path, dense, dtype):
    report = expand_checkpoint(dense, tmp_path / "out", dtype=dtype, **SMALL)
    expected = torch.float32 if dtype == "auto" else torch.bfloat16
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {expected}
    assert load(tmp_path / "out").dtype == expected
    assert report.differences.passed


def test_float16_is_refused_with_the_way_out(tmp_path):
    source = write_dense(tmp_path / "half", state={name: tensor.half() for name, tensor in dense_state().items()})
    with pytest.raises(ValueError, match="float16.*overflow.*bfloat16, or float32"):
        expand_checkpoint(source, tmp_path / "out", **SMALL)
    expand_checkpoint(source, tmp_path / "out", dtype="float32", **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "out"]


def test_mixed_dtypes_stay_and_are_aligned(tmp_path):
    state = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in dense_state().items()}
    expand_checkpoint(write_dense(tmp_path / "mixed", state=state), tmp_path / "out", **SMALL, verify=False)
    made = weights(tmp_path / "out")
    assert made["model.language_model.layers.1.input_layernorm.weight"].dtype == torch.float32
    assert made["model.language_model.layers.1.visual_mlp.up_proj.weight"].dtype == torch.bfloat16
    whole = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    widths = {"F32": 4, "BF16": 2}
    entries = {name: entry for name, entry in json.loads(whole[8 : 8 + length]).items() if name != "__metadata__"}
    assert length % 8 == 0
    assert all(entry["data_offsets"][0] % widths[entry["dtype"]] == 0 for entry in entries.values())


# ----------------------------------------------------------------------------------------------------------- tokenizer


def small_tokenizer(added) -> Tokenizer:
    """InternLM2's structure with the six renamed pieces, and `added` behind them."""
    from mono_internvl.tokenization.internlm2 import RENAMED_PIECES

    kinds = [(("<unk>",), PieceType.UNKNOWN), (("<s>", "</s>"), PieceType.CONTROL), (BYTE_PIECES, PieceType.BYTE)]
    kinds += [((SPACE, "a", "b", f"{SPACE}a", "ab"), PieceType.NORMAL), (tuple(RENAMED_PIECES), PieceType.USER_DEFINED)]
    rows = [(text, kind) for texts, kind in kinds for text in texts]
    return tokenizer_from_pieces([Piece(text, -float(i), kind) for i, (text, kind) in enumerate(rows)], added=added)


def check_it_chats(folder, old_size):
    """Everything a user needs is there, and ids, config and processor agree."""
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert processor.image_token_id == model.config.image_token_id == old_size + 2
    assert len(processor.tokenizer) == model.config.text_config.vocab_size == old_size + 9
    assert model.generation_config.eos_token_id == processor.stop_token_ids
    assert model.config.image_token_ids == processor.image_token_ids
    assert set(model.config.stop_token_ids) == set(processor.stop_token_ids) - {processor.tokenizer.eos_token_id}
    assert processor.image_processor.tile_size == 56
    picture = torch.zeros(3, 60, 60, dtype=torch.uint8).numpy().transpose(1, 2, 0)
    assert isinstance(model.float().chat(picture, "ab a", max_new_tokens=2), str)


@pytest.mark.parametrize("has_them", [False, True], ids=["without the nine", "with the nine"])
def test_tokenizer_json_comes_along(tmp_path, has_them):
    tokenizer = small_tokenizer(ADDED_TOKENS if has_them else ())
    old_size = tokenizer.get_vocab_size() - (9 if has_them else 0)
    source = write_dense(tmp_path / "dense", vocab_size=old_size)
    save_tokenizer(tokenizer, source)
    expand_checkpoint(source, tmp_path / "out", **SMALL)
    check_it_chats(tmp_path / "out", old_size)
    after = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    assert after(" a ab<|im_end|>b")["input_ids"] == tokenizer.encode(" a ab<|im_end|>b").ids


def test_a_vocabulary_that_has_the_nine_does_not_grow(tmp_path):
    tokenizer = small_tokenizer(ADDED_TOKENS)
    source = write_dense(tmp_path / "dense", vocab_size=tokenizer.get_vocab_size())
    save_tokenizer(tokenizer, source)
    report = expand_checkpoint(source, tmp_path / "out", **SMALL)
    assert report.differences.passed
    check_it_chats(tmp_path / "out", tokenizer.get_vocab_size() - 9)
    before = dense_state(tokenizer.get_vocab_size())["output.weight"]
    assert torch.equal(weights(tmp_path / "out")["lm_head.weight"], before)


def test_a_sentencepiece_file_is_converted_and_gaps_are_filled(tmp_path):
    source = write_dense(tmp_path / "dense")  # 300 rows for 277 pieces
    (source / "tokenizer.model").write_bytes(small_model())
    expand_checkpoint(source, tmp_path / "out", **SMALL)
    check_it_chats(tmp_path / "out", VOCABULARY)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.token_to_id("<|im_start|>") == 276 and tokenizer.token_to_id("<|reserved_277|>") == 277


def byte_level(special=("<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>")) -> Tokenizer:
    """Every id below 256 is a character of the text, as in Llama 3 and SmolLM."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return tokenizer


@pytest.mark.parametrize(
    ("config", "settings", "pad"),
    [
        ({}, {}, "<|pad|>"),
        ({"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}, {}, "<|pad|>"),  # tokens of the text
        ({"pad_token_id": 0, "bos_token_id": 256, "eos_token_id": [257, 259]}, {}, "<|pad|>"),
        ({"pad_token_id": -1}, {}, "<|pad|>"),
        ({"pad_token_id": 5000}, {"pad_token": None}, "<|pad|>"),
        ({}, {"pad_token": "#"}, "<|pad|>"),
        ({}, {"pad_token": "<|end|>"}, "<|end|>"),
        ({"pad_token_id": 257}, {}, "<|end|>"),
        ({"pad_token_id": 2}, {"pad_token": {"content": "<|mine|>"}}, "<|mine|>"),
    ],
)
def test_padding_is_never_done_with_a_token_of_the_text(tmp_path, config, settings, pad):
    tokenizer, text = byte_level(), '# "Title"!\n## Part #1'
    size = tokenizer.get_vocab_size()
    folder = tmp_path / "llama"
    plain = {"vocab_size": size, "read_back": False}
    make_llama(folder, lambda values: {**{k: v for k, v in values.items() if "token_id" not in k}, **config}, **plain)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    expand_checkpoint(folder, tmp_path / "out", **SMALL)
    processor, model = AutoProcessor.from_pretrained(tmp_path / "out"), load(tmp_path / "out")
    made, added = processor.tokenizer, pad not in ("<|end|>",)
    assert made.pad_token == pad and made.pad_token_id == (size + 9 if added else 257)
    assert model.config.text_config.vocab_size == len(made) == size + 9 + added
    assert processor.image_token_id == model.config.image_token_id == size + 2
    assert model.get_input_embeddings().padding_idx == model.config.text_config.pad_token_id == made.pad_token_id
    assert model.generation_config.pad_token_id == made.pad_token_id
    ids = made(text, add_special_tokens=False).input_ids
    assert ids == tokenizer.encode(text).ids and made.decode(ids, skip_special_tokens=True) == text
    model.train()(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert all(gradient[token].abs().sum() > 0 for token in set(ids[:-1]))
    # Llama's defaults, 1 and 2, are tokens of this text.
    named = [token for token in (257, 259) if token in np.ravel(config.get("eos_token_id", []))]
    assert model.generation_config.eos_token_id == [*named, *(t for t in (259, 258) if t not in named)]
    assert made.eos_token == ("<|end|>" if named else "<|im_end|>") and None not in processor.stop_token_ids
    assert isinstance(model.eval().chat(None, "hello", max_new_tokens=1), str)


def test_a_newer_tokenizer_json_and_gaps_between_ids(tmp_path):
    """Tokens that lie behind a gap keep their ids; those that only `tokenizer_config.json` knows come along."""
    tokenizer = byte_level()
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        if token["content"].startswith("<|im"):
            token["id"] += 5
    folder, size = tmp_path / "llama", tokenizer.get_vocab_size() + 6
    make_llama(folder, vocab_size=size)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    decoder = {"265": {"content": "<tool>", "special": False, "normalized": False}}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": decoder, "bos_token": "<|begin|>"})
    )
    generation = {"eos_token_id": [257, 264], "do_sample": False, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    expand_checkpoint(folder, tmp_path / "out", **SMALL)
    made = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    named = {"<|begin|>": 256, "<|end|>": 257, "<|reserved_258|>": 258, "<|im_start|>": 263, "<|im_end|>": 264}
    named |= {"<tool>": 265, "<img>": 266, "</box>": 274, "<|pad|>": 275}
    assert {name: made.convert_tokens_to_ids(name) for name in named} == named
    assert made("a<tool>", add_special_tokens=False).input_ids[-1] == 265 and made.bos_token == "<|begin|>"
    assert load(tmp_path / "out").generation_config.eos_token_id == [257, 264, 263]


def test_tokens_added_to_an_internlm2_come_along(tmp_path):
    """`tokenizer.model` splits the text, and what was added behind it stands in the newer `tokenizer.json`."""
    source = write_dense(tmp_path / "dense", vocab_size=279)
    (source / "tokenizer.model").write_bytes(small_model())
    tokenizer = build_tokenizer(source / "tokenizer.model", added=("<|tool|>", "<seg>"))
    save_tokenizer(tokenizer, source)
    (source / "tokenizer_config.json").unlink()
    expand_checkpoint(source, tmp_path / "out", **SMALL)
    made = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    assert made.convert_tokens_to_ids(["<|tool|>", "<seg>", "<img>"]) == [277, 278, 279]
    assert made.pad_token == "</s>" and made("a<seg>").input_ids == tokenizer.encode("a<seg>").ids
    # A vocabulary that was changed is another one: then `tokenizer.json` is what counts.
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"]["zz"] = content["model"]["vocab"].pop("abc")
    (source / "tokenizer.json").write_text(json.dumps({**content, "model": {**content["model"], "merges": []}}))
    expand_checkpoint(source, tmp_path / "other", **SMALL)
    assert AutoProcessor.from_pretrained(tmp_path / "other").tokenizer.convert_tokens_to_ids("zz") == 266


def test_llama_s_own_tokenizer_gives_a_warning_and_no_processor(tmp_path, caplog):
    folder = tmp_path / "llama"
    make_llama(folder)
    (folder / "tokenizer.model").write_bytes(small_model(reserved=(), normalizer=b""))
    with pytest.raises(ValueError, match=r"tokenizer.model strips and joins spaces \(remove_extra_whitespaces\)"):
        expand_checkpoint(folder, tmp_path / "out", **SMALL)
    (folder / "tokenizer.model").write_bytes(small_model(reserved=(), normalizer=b"\x20\x00"))
    expand_checkpoint(folder, tmp_path / "out", **SMALL)
    assert "<|eot_id|>, or <|im_start|> and <|im_end|>, which the chat template needs" in caplog.text
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    # With the tokens of a ChatML fine-tuning it is one of ours.
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 271, "<|im_end|>": 272}))
    expand_checkpoint(folder, tmp_path / "chat", **SMALL)
    made = AutoProcessor.from_pretrained(tmp_path / "chat").tokenizer
    assert made.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<img>"]) == [271, 272, VOCABULARY]
    # Not where InternLM2 has them: they are read from the tokenizer.
    assert AutoConfig.from_pretrained(tmp_path / "chat").stop_token_ids == [272, 271]
    assert AutoConfig.from_pretrained(tmp_path / "out").stop_token_ids == []
    assert (
        made.tokenize("ab") == [f"{SPACE}ab"] and made.decode(made("ab")["input_ids"], skip_special_tokens=True) == "ab"
    )


def test_without_a_tokenizer_there_is_one_warning(tmp_path, dense, caplog):
    expand_checkpoint(dense, tmp_path / "out", **SMALL)
    assert [record.message for record in caplog.records] == [
        f"{dense} has no tokenizer: the result has weights and configuration, but no processor"
    ]
    assert AutoModel.from_pretrained(tmp_path / "out").config.image_token_id == VOCABULARY + 2


def test_a_tokenizer_without_chat_tokens_is_left_out(tmp_path, dense, caplog):
    tokenizer = small_tokenizer(())
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"][:2] != "<|"]
    content["model"]["vocab"] = {name: i for name, i in content["model"]["vocab"].items() if name[:2] != "<|"}
    (dense / "tokenizer.json").write_text(json.dumps(content))
    expand_checkpoint(dense, tmp_path / "out", **SMALL)
    assert "lacks <|im_start|> and <|im_end|>" in caplog.text
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_tokenizers_that_do_not_fit(tmp_path):
    source = write_dense(tmp_path / "small", vocab_size=100)
    save_tokenizer(small_tokenizer(()), source)
    with pytest.raises(ValueError, match=r"tokenizer.json has 270 tokens, the model only 100 rows"):
        expand_checkpoint(source, tmp_path / "out", **SMALL)
    source = write_dense(tmp_path / "behind", vocab_size=270)
    save_tokenizer(small_tokenizer(("<img>", "<mine>")), source)
    with pytest.raises(ValueError, match=r"tokenizer.json has 272 tokens, the model only 270 rows, and '<mine>' is"):
        expand_checkpoint(source, tmp_path / "out", **SMALL)


def test_tokens_of_ours_that_a_tokenizer_has_keep_their_ids(tmp_path):
    source = write_dense(tmp_path / "some")
    save_tokenizer(small_tokenizer(("<box>", "</img>", "<img>")), source)
    expand_checkpoint(source, tmp_path / "out", **SMALL)
    model, processor = AutoModel.from_pretrained(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.convert_tokens_to_ids(["<box>", "</img>", "<img>"]) == [270, 271, 272]
    assert processor.image_token_ids == model.config.image_token_ids == [VOCABULARY, 272, 271]
    assert len(processor.tokenizer) == model.config.text_config.vocab_size == VOCABULARY + 6
    picture = np.zeros((60, 60, 3), dtype=np.uint8)
    assert isinstance(model.float().chat(picture, "ab a", max_new_tokens=2), str)


# ------------------------------------------------------------------------------------------------------------- convert


def same_tensors(a, b):
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def test_golden_round_trips(tmp_path):
    """official -> native -> official, and, from the second on, native -> official -> native."""
    source = golden("variant_a", "model.safetensors").parent
    convert_checkpoint(source, tmp_path / "native", "native")
    convert_checkpoint(tmp_path / "native", tmp_path / "official", "official", max_shard_size="200KB")
    convert_checkpoint(tmp_path / "official", tmp_path / "again", "native")
    (tmp_path / "source").mkdir()
    shutil.copy(source / "model.safetensors", tmp_path / "source")
    assert same_tensors(tmp_path / "source", tmp_path / "official")
    assert same_tensors(tmp_path / "native", tmp_path / "again")
    case = load_golden("variant_a", "case_image_1tile.safetensors")
    for folder in ("native", "official"):
        model = load(tmp_path / folder)
        assert model.config.image_token_id == 393
        with torch.no_grad():
            logits = model(case["input_ids"], pixel_values=case["pixel_values"]).logits
        torch.testing.assert_close(logits, case["logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def test_native_round_trip(tmp_path, options):
    model = tiny_model(text_config=options)
    with torch.no_grad():
        model.model.vision_embeddings.class_embedding.normal_()
    model.config.image_token_id = 120 - 7
    model.bfloat16().save_pretrained(tmp_path / "native")
    convert_checkpoint(tmp_path / "native", tmp_path / "official", "official")
    convert_checkpoint(tmp_path / "official", tmp_path / "again", "native")
    assert same_tensors(tmp_path / "native", tmp_path / "again")
    assert "vision_model.embeddings.class_embedding" in weights(tmp_path / "official")
    again = load(tmp_path / "again")
    assert again.config.text_config.to_dict() == load(tmp_path / "native").config.text_config.to_dict()


def test_the_official_layout_has_a_number_for_auto_and_that_is_said(caplog):
    values = official_config(tiny_model().config, MonoInternVLImageProcessor(56, max_tiles=5))
    assert values["max_dynamic_patch"] == 5 and not caplog.text
    values = official_config(tiny_model().config, MonoInternVLImageProcessor(56, max_tiles="auto"))
    assert values["max_dynamic_patch"] == 12 and 'max_tiles="auto" has no place' in caplog.text


def test_official_config_has_what_engines_read(tmp_path):
    tokenizer = small_tokenizer(ADDED_TOKENS)
    size = tokenizer.get_vocab_size()
    rope = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}
    model = tiny_model(text_config={"vocab_size": size, "rope_parameters": rope})
    model.config.image_token_id = size - 7
    model.save_pretrained(tmp_path / "native")
    save_tokenizer(tokenizer, tmp_path / "native")
    fast = AutoProcessor.from_pretrained(tmp_path / "native").tokenizer
    MonoInternVLProcessor(MonoInternVLImageProcessor(56, max_tiles=5), fast).save_pretrained(tmp_path / "native")

    convert_checkpoint(tmp_path / "native", tmp_path / "official", "official")
    values = json.loads((tmp_path / "official" / "config.json").read_text())
    expected = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 5,
        "use_thumbnail": True,
        "downsample_ratio": 0.5,
        "force_image_size": 56,
        "template": "internlm2-chat",
        "ps_version": "v2",
        "select_layer": -1,
    }
    assert expected.items() <= values.items()
    llm, vision = values["llm_config"], values["vision_config"]
    assert llm["architectures"] == ["InternLM2VEForCausalLM"] and llm["vocab_size"] == size
    assert llm["rope_scaling"] == {"type": "dynamic", "factor": 2.0} and llm["rope_theta"] == 1e6
    assert vision["model_type"] == "intern_vit_patch" and vision["hidden_size"] == 16
    tokens = json.loads((tmp_path / "official" / "tokenizer_config.json").read_text())
    assert tokens["tokenizer_class"] == "PreTrainedTokenizerFast" and "<img>" in tokens["additional_special_tokens"]

    convert_checkpoint(tmp_path / "official", tmp_path / "again", "native")
    processor = MonoInternVLProcessor.from_pretrained(tmp_path / "again")
    assert processor.image_processor.max_tiles == 5 and processor.image_token_id == size - 7
    assert processor.tokenizer.all_special_tokens == fast.all_special_tokens
    prompt = [{"role": "user", "content": "ab"}]
    assert processor.apply_chat_template(prompt, tokenize=True) == AutoProcessor.from_pretrained(
        tmp_path / "native"
    ).apply_chat_template(prompt, tokenize=True)


def test_what_convert_refuses(tmp_path, dense):
    tiny_model().save_pretrained(tmp_path / "native")
    with pytest.raises(ValueError, match="native is in the native layout already"):
        convert_checkpoint(tmp_path / "native", tmp_path / "out", "native")
    with pytest.raises(ValueError, match="to='ours' is not one of official, native"):
        convert_checkpoint(tmp_path / "native", tmp_path / "out", "ours")
    with pytest.raises(ValueError, match="InternLM2ForCausalLM; convert takes a Mono-InternVL"):
        convert_checkpoint(dense, tmp_path / "out", "official")
    tiny_model(text_config={"head_dim": 8}).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match="head_dim=8 is not hidden_size / num_attention_heads"):
        convert_checkpoint(tmp_path / "narrow", tmp_path / "out", "official")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "narrow", "native"]


# ----------------------------------------------------------------------------------------------------------- bad input


def expect(error, message, source, tmp_path):
    """The error names what is wrong; nothing is made."""
    with pytest.raises(error, match=message):
        expand_checkpoint(source, tmp_path / "out", **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name]


@pytest.mark.parametrize("form", ["safetensors-sharded", "bin-sharded"])
def test_a_shard_that_is_missing(tmp_path, form):
    source = write_dense(tmp_path / "dense", form)
    (shard,) = source.glob("*-00002-of-00002.*")
    shard.unlink()
    expect(
        FileNotFoundError, rf"{shard.name} is missing; .*index.json says that it holds output.weight", source, tmp_path
    )


def test_a_shard_that_the_index_does_not_list(tmp_path):
    source = write_dense(tmp_path / "dense", "bin-sharded")
    index = source / "pytorch_model.bin.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    kept = {name: file for name, file in placed.items() if "00001" in file}
    index.write_text(json.dumps({"weight_map": kept}))
    message = r"index.json lacks .*attention.*does not list pytorch_model-00002-of-00002.bin"
    expect(ValueError, message, source, tmp_path)


def test_an_index_that_promises_too_much(tmp_path):
    source = write_dense(tmp_path / "dense", "safetensors-sharded")
    index = source / "model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**placed, "extra": "model-00001-of-00002.safetensors"}}))
    expect(ValueError, "model-00001-of-00002.safetensors does not hold extra", source, tmp_path)
    index.write_text(json.dumps({"weight_map": {**placed, "extra": "../elsewhere.safetensors"}}))
    expect(ValueError, "extra is said to be in '../elsewhere.safetensors'", source, tmp_path)


@pytest.mark.parametrize("form", ["safetensors-sharded", "bin-sharded", "safetensors"])
@pytest.mark.parametrize("kept", [0.7, 0.0])
def test_a_truncated_shard(tmp_path, form, kept):
    source = write_dense(tmp_path / "dense", form)
    shard = next(path for path in sorted(source.iterdir(), reverse=True) if path.suffix in (".bin", ".safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: int(len(whole) * kept)])
    named = "" if form == "safetensors" and not kept else r".*it should hold (model\.|output)"
    expect(ValueError, rf"{shard.name} is damaged or truncated{named}", source, tmp_path)


def test_tensors_that_do_not_fit(tmp_path):
    name = "model.layers.1.attention.wqkv.weight"
    state = {**dense_state(), name: torch.zeros(120, 64), "left.over": torch.zeros(2)}
    del state["model.layers.0.ffn_norm.weight"]
    state["output.weight"] = torch.zeros(VOCABULARY, 64, dtype=torch.int8)
    source = write_dense(tmp_path / "dense", state=state)
    for message in (
        r"dense lacks model.layers.0.ffn_norm.weight",
        r"1 unexpected: left.over in .*model.safetensors",
        rf"1 mis-shaped: {name} in .*model.safetensors is \[120, 64\], not \[128, 64\]",
        r"output.weight in .*model.safetensors is torch.int8",
    ):
        expect(ValueError, message, source, tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"config.json: the architecture is GPT2LMHeadModel; expand takes"),
        ({"num_key_value_heads": "absent"}, r"attention.wqkv.weight in .* is \[128, 64\], not \[192, 64\]"),
        ({"num_key_value_heads": "2"}, r"config.json: num_key_value_heads must be given as whole numbers"),
        ({"hidden_size": "absent"}, r"config.json: hidden_size must be given"),
        ({"num_key_value_heads": 3}, r"config.json: .*num_key_value_heads=3"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
            r"config.json: .*'longrope' is not known; allowed",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, r"config.json: .*llama3 needs low_freq_factor as a"),
        ({"hidden_act": "gelu"}, r"config.json: hidden_act gelu is not supported"),
        (
            {"model_type": "intern_vit_6b", "architectures": ["InternVisionModel"]},
            r"dense is the vision tower \(intern_vit_6b\) of a modular InternVL; Mono-InternVL has no vision encoder",
        ),
        (
            {"model_type": "internvl_chat", "vision_config": {"model_type": "intern_vit_6b"}, "llm_config": CONFIG},
            r"dense is a modular InternVL with a vision tower \(intern_vit_6b\), not a Mono-InternVL",
        ),
        ({"model_type": "internvl_chat", "vision_config": {"model_type": "intern_vit_patch"}}, "Mono-InternVL already"),
    ],
)
def test_wrong_configurations(tmp_path, config, message):
    expect(ValueError, message, write_dense(tmp_path / "dense", **config), tmp_path)


def test_a_vision_tower_is_recognised_by_its_tensors_too(tmp_path):
    state = {"vision_model.encoder.layers.0.attn.qkv.weight": torch.zeros(6, 2)}
    source = write_dense(tmp_path / "dense", state=state)
    message = r"model.safetensors holds vision_model.encoder.*the vision tower of a modular InternVL"
    expect(ValueError, message, source, tmp_path)
    chat = {"model_type": "internvl_chat", "llm_config": CONFIG}
    for tower, message in (
        ("intern_vit_6b", "a modular InternVL with a vision tower"),
        ("intern_vit_patch", "encoder"),
    ):
        values = {**chat, "vision_config": {"model_type": tower, "hidden_size": 16, "image_size": 56}}
        (source / "config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(source, tmp_path / "out", "native")


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("module.", "DDP; save model.module"),
        ("_orig_mod.", "torch.compile; save model._orig_mod"),
        ("module._orig_mod.", "DDP"),
        ("base_model.model.", "PEFT's wrapper; merge the adapter first"),
    ],
)
def test_weights_saved_from_inside_a_wrapper(tmp_path, prefix, message):
    state = {f"{prefix}{name}": tensor for name, tensor in dense_state().items()}
    source = write_dense(tmp_path / "dense", state=state)
    expect(ValueError, rf"model.safetensors holds {prefix}\S+: saved from inside .*{message}", source, tmp_path)
    tiny_model().save_pretrained(tmp_path / "native")
    state = {f"{prefix}{name}": tensor for name, tensor in weights(tmp_path / "native").items()}
    save_file(state, tmp_path / "native" / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "native", tmp_path / "out", "official")


def test_unmerged_adapters_are_refused_with_the_way_out(tmp_path):
    name = "model.layers.1.feed_forward.w1"
    state = {n.replace(name, f"{name}.base_layer"): tensor for n, tensor in dense_state().items()}
    source = write_dense(tmp_path / "dense", state=state)
    expect(ValueError, r"w1.base_layer.weight: an unmerged PEFT model was saved; merge", source, tmp_path)
    # Beside a whole model too: transformers loads base and adapter.
    source = write_dense(tmp_path / "lora")
    (source / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/base"}))
    for job in (
        lambda: expand_checkpoint(source, tmp_path / "out"),
        lambda: convert_checkpoint(source, "out", "native"),
    ):
        with pytest.raises(ValueError, match=r"lora holds a LoRA adapter .* for someone/base.*merge_and_unload\(\)"):
            job()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_never_runs_code(tmp_path, zipped):
    source = write_dense(tmp_path / "dense")
    (source / "model.safetensors").unlink()
    content = {"x": Bomb(tmp_path / "exploded")}
    torch.save(content, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    expect(ValueError, r"pytorch_model.bin is refused: .*nothing in it was executed", source, tmp_path)


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"state": {"x": torch.zeros(2)}}])
def test_a_pickle_of_something_else(tmp_path, content):
    source = write_dense(tmp_path / "dense")
    (source / "model.safetensors").unlink()
    torch.save(content, source / "pytorch_model.bin")
    expect(ValueError, r"pytorch_model.bin.*(not list|'state' is not a tensor)", source, tmp_path)


def test_nan_weights_are_named(tmp_path, caplog):
    state = dense_state()
    state["model.layers.1.feed_forward.w2.weight"][3, 4] = float("nan")
    state["model.norm.weight"][0] = float("inf")
    save_tokenizer(small_tokenizer(()), source := write_dense(tmp_path / "dense", state=state))
    report = expand_checkpoint(source, tmp_path / "out", **SMALL)
    named = {"model.layers.1.feed_forward.w2.weight", "model.norm.weight"}
    assert set(report.not_finite) == named
    (record,) = caplog.records
    assert all(f"{name} in {source / 'model.safetensors'}" in record.message for name in named)
    assert report.differences.identical


def test_no_such_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such model folder: .*nowhere"):
        expand_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no config.json"):
        expand_checkpoint(tmp_path / "empty", tmp_path / "out")


def test_a_hub_id_is_downloaded(tmp_path, dense, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, repo, revision: ["a.bin", "a.safetensors"])
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **options: asked.append((repo, options)) or str(dense)
    )
    expand_checkpoint("someone/dense-2b@v1", tmp_path / "out", **SMALL, verify=False)
    ((repo, options),) = asked
    assert repo == "someone/dense-2b" and options["revision"] == "v1"
    assert "*.safetensors" in options["allow_patterns"] and "*.bin" not in options["allow_patterns"]
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["source"]["hub_id"] == "someone/dense-2b"
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model in ("someone/dense-2b", ["someone/dense-2b"])


def cached(hub, source, repo="models--someone--dense", revision="main"):
    """`source` as the Hub's client keeps it: blobs, and a snapshot of links to them."""
    commit = "c" * 40
    (hub / repo / "blobs").mkdir(parents=True)
    (hub / repo / "refs").mkdir()
    (hub / repo / "refs" / revision).write_text(commit)
    snapshot = hub / repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, hub / repo / "blobs" / str(i))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(i)))
    return snapshot


OFFLINE = """
import sys
from mono_internvl.conversion import convert_checkpoint, expand_checkpoint
expand_checkpoint("someone/dense", sys.argv[1], tile_size=56, vision_hidden_size=16)
expand_checkpoint("someone/dense@main", sys.argv[1] + "-2", tile_size=56, vision_hidden_size=16)
convert_checkpoint("someone/native", sys.argv[1] + "-official", "official")
for missing in ("someone/other", "someone/dense@v2"):
    try:
        expand_checkpoint(missing, sys.argv[1] + "-3")
    except FileNotFoundError as error:
        print(error)
"""


def test_a_hub_id_in_the_cache_works_offline(tmp_path):
    cached(tmp_path / "hub", write_dense(tmp_path / "dense", "safetensors-sharded"))
    tiny_model().save_pretrained(tmp_path / "native")
    cached(tmp_path / "hub", tmp_path / "native", "models--someone--native")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    command = [sys.executable, "-c", OFFLINE, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = done.stdout.splitlines()
    assert first.startswith("someone/other is not in the Hub's cache") and "someone/dense@v2 is not" in second
    manifest = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert manifest["source"] == {"name": "someone/dense", "hub_id": "someone/dense", "commit": "c" * 40}
    expand_checkpoint(tmp_path / "dense", tmp_path / "direct", **SMALL)
    assert weights(tmp_path / "out").keys() == weights(tmp_path / "direct").keys()
    assert (tmp_path / "out-official" / "model.safetensors").is_file()


# --------------------------------------------------------------------------------------------- destination and resuming


def test_destinations_that_are_refused(tmp_path, dense, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="file is a file"):
        expand_checkpoint(dense, tmp_path / "file", **SMALL)
    with pytest.raises(FileExistsError, match="dense is not empty"):
        expand_checkpoint(dense, dense, **SMALL)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"not enough disk for .*out: 0.07 GB needed, 0.00 GB free"):
        expand_checkpoint(dense, tmp_path / "out", **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "file"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc, where nobody can write")
def test_a_read_only_destination(dense):
    with pytest.raises(OSError, match=r"/proc/self/out cannot be written"):
        expand_checkpoint(dense, "/proc/self/out", **SMALL)


def test_an_empty_destination_is_written_into_and_missing_parents_are_made(tmp_path, dense, monkeypatch):
    for name in ("empty", "behind", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "behind")
    inodes = {name: (tmp_path / name).stat().st_ino for name in ("empty", "behind", "here")}
    expand_checkpoint(dense, tmp_path / "empty", **SMALL, verify=False)
    expand_checkpoint(dense, tmp_path / "new" / "deep", **SMALL, verify=False)
    expand_checkpoint(dense, tmp_path / "link", **SMALL, verify=False)
    monkeypatch.chdir(tmp_path / "here")
    expand_checkpoint(dense, ".", **SMALL, verify=False)
    expand_checkpoint(dense, f"{dense}/inside/", **SMALL, verify=False)
    expected = contents(tmp_path / "new" / "deep")
    for folder in ("empty", "behind", "here", "dense/inside"):
        assert contents(tmp_path / folder) == expected, folder
    # A mount point, a shell's current folder: the folder itself stays.
    assert inodes == {name: (tmp_path / name).stat().st_ino for name in inodes}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["behind", "dense", "empty", "here", "link", "new"]


def test_destinations_in_the_way_are_refused_before_the_work(tmp_path, dense, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone" / "away")
    monkeypatch.setattr("mono_internvl.conversion.expand.find_source", lambda source: pytest.fail("work was done"))
    for name, error, message in (
        ("file/out", NotADirectoryError, "out cannot be written: .*file is a file"),
        ("dangling", FileNotFoundError, "dangling is a link to .*away, which does not exist"),
        ("n" * 300, OSError, "its name is longer than the file system allows"),
        (f"new/{'n' * 300}/out", OSError, "its name is longer than the file system allows"),
        ("", FileExistsError, r"is not empty \(it holds dangling and 2 more\)"),
    ):
        with pytest.raises(error, match=message):
            expand_checkpoint(dense, tmp_path / name, **SMALL)
    with pytest.raises(ValueError, match="no such home"):
        expand_checkpoint(dense, "~nobody-of-this-name/out", **SMALL)
    with pytest.raises(ValueError, match="is empty"):
        expand_checkpoint(dense, "", **SMALL)


def test_names_of_any_length_and_characters(tmp_path, dense):
    for name in ("n" * 250, "\u4f60" * 84, "a[1]*?", "sp ace"):
        expand_checkpoint(dense, tmp_path / name, **SMALL, verify=False)
        assert (tmp_path / name / "model.safetensors").is_file()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount")
def test_a_mount_point_is_written_into(tmp_path, dense):
    (tmp_path / "out").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", str(tmp_path / "out")], capture_output=True).returncode:
        pytest.skip("no mounts here")
    try:
        (tmp_path / "out" / "lost+found").mkdir()
        expand_checkpoint(dense, tmp_path / "out", **SMALL)
        assert (tmp_path / "out" / "config.json").is_file() and not list(tmp_path.glob("out/.*"))
    finally:
        subprocess.run(["umount", str(tmp_path / "out")], check=True)


FULL = """
import resource, signal, sys
from mono_internvl.conversion import expand_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), -1))
try:
    expand_checkpoint(sys.argv[1], sys.argv[2], tile_size=56, vision_hidden_size=16)
except OSError as error:
    print(error.errno, error)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs limits of a process")
@pytest.mark.parametrize(("limit", "file"), [(200_000, "model.safetensors.part"), (500, r"\w+\."), (4000, r"\w+\.")])
def test_a_full_disk_names_the_file_and_the_same_command_goes_on(tmp_path, dense, limit, file):
    save_tokenizer(small_tokenizer(()), dense)
    command = [sys.executable, "-c", FULL, str(dense), str(tmp_path / "out"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    (partial,) = tmp_path.glob("out.*.partial")
    message = rf"{errno.EFBIG} .*{partial}/{file}.*: File too large; what is finished stays in {partial}, and the same"
    assert re.match(message, done.stdout), done.stdout + done.stderr
    expand_checkpoint(dense, tmp_path / "out", **SMALL)
    assert not partial.exists()


@pytest.mark.parametrize("size", ["0", "-1GB", "2 apples", "1TB"])
def test_shard_sizes(tmp_path, dense, size):
    with pytest.raises(ValueError, match="max_shard_size"):
        expand_checkpoint(dense, tmp_path / "out", max_shard_size=size)
    assert writer.parse_size("1.5MB") == 1_500_000 and writer.parse_size(7) == 7


def test_progress_counts_every_byte(tmp_path, dense):
    calls = []
    report = expand_checkpoint(dense, tmp_path / "out", **SMALL, progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done) and calls[-1] == (report.nbytes, report.nbytes)


def test_verification_finds_a_wrong_byte(tmp_path, dense, monkeypatch):
    """One value of one V-expert, written wrongly."""
    produce = plan_module.produce

    def spoil(output, plan, source):
        for piece in produce(output, plan, source):
            if output.name.endswith("layers.1.visual_mlp.up_proj.weight"):
                piece = piece.clone()
                piece[5, 6] += 0.5
            yield piece

    monkeypatch.setattr(writer, "produce", spoil)
    with pytest.raises(ValueError, match="verification of .*out failed: hidden states differ by up to"):
        expand_checkpoint(dense, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial/*.safetensors"))
    expand_checkpoint(dense, tmp_path / "other", **SMALL, verify=False)
    monkeypatch.undo()
    expand_checkpoint(dense, tmp_path / "out", **SMALL)
    assert not list(tmp_path.glob("*.partial"))


def test_two_processes_do_not_write_the_same_folder(tmp_path, dense):
    tried = []

    def progress(done, total):
        if not tried:
            tried.append(done)
            with pytest.raises(OSError, match="another process is writing"):
                expand_checkpoint(dense, tmp_path / "out", **SMALL, verify=False)

    expand_checkpoint(dense, tmp_path / "out", **SMALL, verify=False, progress=progress)
    assert tried


KILLED = """
import json, os, signal, sys
from pathlib import Path
from mono_internvl.conversion import expand_checkpoint

source, work = sys.argv[1], Path(sys.argv[2])

def attempt(destination, kill_at_byte=None, kill_at_rename=None):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    renames = 0
    def watch(event, arguments):
        nonlocal renames
        if event == "os.rename":
            renames += 1
            if renames == kill_at_rename:
                os.kill(os.getpid(), signal.SIGKILL)
            (work / "renames").write_text(str(renames))
    sys.addaudithook(watch)
    def progress(done, total):
        if kill_at_byte is not None and done >= kill_at_byte * total:
            os.kill(os.getpid(), signal.SIGKILL)
    try:
        expand_checkpoint(source, destination, tile_size=56, vision_hidden_size=16, max_shard_size="60KB",
                          progress=progress)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)

def shards(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("model-*.safetensors")}

assert attempt(work / "undisturbed") == 0
last = int((work / "renames").read_text())
(work / "probe").mkdir()
assert attempt(work / "probe") == 0
moved = int((work / "renames").read_text())
points = [{"kill_at_byte": at} for at in (0.5, 1.0)]
points += [{"kill_at_rename": at} for at in (1, 6, last - 1, last)]
# Into a folder that is there: while the finished files move up.
points += [{"kill_at_rename": at, "into": True} for at in (6, moved - 8, moved - 1, moved)]
results = []
for i, point in enumerate(points):
    destination = work / f"killed{i}"
    if into := point.pop("into", False):
        destination.mkdir()
    status = attempt(destination, **point)
    (partial,) = destination.glob(".*.partial") if into else work.glob(f"killed{i}.*.partial")
    point["into"] = into
    kept, finished = shards(partial), []
    if (partial / "progress.json").exists():
        finished = list(json.loads((partial / "progress.json").read_text()))
    if point.get("kill_at_rename") == last - 1 and not into:  # all shards are finished
        (partial / finished[0]).write_bytes(b"spoilt")
        kept.pop(finished.pop(0))
    there = (destination / "config.json").exists()
    again = attempt(destination)
    after = shards(destination)
    results.append({"point": point, "killed": status == signal.SIGKILL, "there": there, "again": again,
                    "finished": len(finished),
                    "rewritten": [name for name in finished if name in kept and kept[name] != after[name]]})
print(json.dumps(results))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_point_and_started_again(tmp_path, dense):
    save_tokenizer(small_tokenizer(()), dense)
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(dense), str(work)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.strip().splitlines()[-1])
    expected = contents(work / "undisturbed")
    assert len([name for name in expected if name.endswith(".safetensors")]) > 4
    for i, result in enumerate(results):
        assert result["killed"] and not result["there"] and result["again"] == 0, result
        assert result["rewritten"] == [], result
        assert contents(work / f"killed{i}") == expected, result
    assert max(result["finished"] for result in results) > 4
    assert not list(work.glob("*.partial")) and not list(work.glob("*/.*"))


def test_another_source_or_other_options_start_anew(tmp_path, dense, caplog):
    class Stopped(Exception):
        pass

    def stop(done, total):
        raise Stopped

    with pytest.raises(Stopped):
        expand_checkpoint(dense, tmp_path / "out", **SMALL, progress=stop)
    (left,) = tmp_path.glob("out.*.partial")
    expand_checkpoint(dense, tmp_path / "out", **SMALL, seed=5, verify=False)
    assert left.is_dir() and f"{left} is left from an interrupted run" in caplog.text


MEMORY = """
import re, sys
from pathlib import Path
from mono_internvl.conversion import expand_checkpoint
peaks = []
for source, destination in (sys.argv[1:3], sys.argv[3:5]):
    report = expand_checkpoint(source, destination, tile_size=56, vision_hidden_size=16)
    # Not ru_maxrss, which a child takes over from its parent.
    peaks.append(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]))
print(report.nbytes, peaks[1] - peaks[0])
"""


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="resident memory is counted in other ways elsewhere")
def test_memory_does_not_grow_with_the_model(tmp_path, dense):
    """One file of some 250 MB into another, verified too; after a tiny one, which loads all modules."""
    size = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 50000}
    state = {}
    for name, tensor in dense_state(8).items():
        shape = [{8: 50000, 64: 512, 96: 2048, 128: 1024}[length] for length in tensor.shape]
        state[name] = torch.zeros(shape)
    source = write_dense(tmp_path / "large", "bin", state, **size)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folders = [dense, tmp_path / "tiny", source, tmp_path / "out"]
    command = [sys.executable, "-c", MEMORY, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    nbytes, grown = map(int, done.stdout.split())
    assert nbytes > 240e6
    assert grown < 200e6


# --------------------------------------------------------------------------------------------------- manifest and card


def flipped(path):
    """The last byte of a file, a value of its last tensor, is changed."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


@pytest.mark.parametrize("hashed", [True, False])
def test_manifest_and_check(tmp_path, dense, hashed):
    out = tmp_path / "out"
    expand_checkpoint(dense, out, **SMALL, max_shard_size="100KB", base_model="someone/base", manifest=hashed)
    manifest = json.loads((out / "conversion.json").read_text())
    assert manifest["operation"] == "expand" and manifest["source"] == {"name": "dense"}
    assert manifest["options"]["tile_size"] == 56 and manifest["options"]["base_model"] == "someone/base"
    assert manifest["tool"]["version"]
    for folder, entries in ((dense, manifest["inputs"]), (out, manifest["outputs"])):
        assert set(entries) == {path.name for path in folder.glob("*.safetensors")}
        for name, entry in entries.items():
            content = (folder / name).read_bytes()
            header = content[: 8 + int.from_bytes(content[:8], "little")]
            expected = {"bytes": len(content), "header_sha256": hashlib.sha256(header).hexdigest()}
            assert entry == expected | ({"sha256": hashlib.sha256(content).hexdigest()} if hashed else {})
    assert check_checkpoint(out) == (len(manifest["outputs"]), hashed) and len(manifest["outputs"]) > 3

    first, second, third, fourth = sorted(manifest["outputs"])[:4]
    flipped(out / first)
    if not hashed:
        # What only a manifest finds.
        assert check_checkpoint(out) == (len(manifest["outputs"]), False)
    (out / second).unlink()
    (out / third).write_bytes(b"short")
    (out / "more.safetensors").write_bytes(b"")
    whole = (out / fourth).read_bytes()
    (out / fourth).write_bytes(whole.replace(b'"dtype"', b'"DTYPE"', 1))
    message = (
        rf"{second} is missing; {third} has 5 bytes.*; {fourth} has another header; more.safetensors is not listed"
    )
    with pytest.raises(ValueError, match=f"{first} has another sha256; {message}" if hashed else f"says: {message}"):
        check_checkpoint(out)
    with pytest.raises(FileNotFoundError, match="dense has no conversion.json"):
        check_checkpoint(dense)
    (out / "conversion.json").write_text(json.dumps({"outputs": {first: {"bytes": 5}}}))
    with pytest.raises(ValueError, match="does not list the outputs with bytes and header_sha256 or sha256"):
        check_checkpoint(out)


@pytest.mark.parametrize(
    ("spoil", "hashed", "again"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), False, True),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"dtype"', b'"DTYPE"', 1)), False, True),
        (lambda path: path.write_bytes(b""), False, True),
        (flipped, False, False),
        (flipped, True, True),
        (lambda path: None, True, False),
    ],
    ids=["shorter", "header", "empty", "value", "value-manifest", "nothing"],
)
def test_what_of_a_finished_shard_is_looked_at_on_a_restart(tmp_path, dense, spoil, hashed, again):
    """Its size and its header; all of it where a manifest hashes it anyway."""

    class Stopped(Exception):
        pass

    calls = []

    def stop(done, total):
        calls.append(done)
        if done > 0.7 * total:
            raise Stopped

    options = {**SMALL, "max_shard_size": "100KB", "verify": False, "manifest": hashed}
    with pytest.raises(Stopped):
        expand_checkpoint(dense, tmp_path / "out", **options, progress=stop)
    (left,) = tmp_path.glob("out.*.partial")
    name = min(json.loads((left / "progress.json").read_text()))
    spoil(left / name)
    spoilt, time = (left / name).read_bytes(), (left / name).stat().st_mtime_ns
    expand_checkpoint(dense, tmp_path / "out", **options)
    made = tmp_path / "out" / name
    assert (made.stat().st_mtime_ns != time) == again
    if again:
        assert made.read_bytes() != spoilt
    if again or spoilt == made.read_bytes():
        expand_checkpoint(dense, tmp_path / "undisturbed", **options)
        assert (made.read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()) == (again or spoil is not flipped)


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, dense):
    def touch(done, total):
        os.utime(dense / "model.safetensors", (1, 1))

    with pytest.raises(OSError, match=r"model.safetensors in .*dense changed while it was read"):
        expand_checkpoint(dense, tmp_path / "out", **SMALL, progress=touch)
    assert not (tmp_path / "out").exists()


def test_model_card(tmp_path, dense):
    (dense / "README.md").write_text("---\nlicense: apache-2.0\n---\nA dense model.\n")
    (dense / "LICENSE").write_text("the licence")
    expand_checkpoint(dense, tmp_path / "out", **SMALL, base_model="someone/base", verify=False)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0" and data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-text-to-text" and data["base_model_relation"] == "finetune"
    assert data["base_model"] in ("someone/base", ["someone/base"]) and "mono-internvl" in data["tags"]
    total = sum(tensor.numel() for tensor in weights(tmp_path / "out").values())
    for part in ("someone/base", "AutoModel.from_pretrained", "visual FFN (V-experts)", f"{total:,}", "apache-2.0"):
        assert part in card.content
    assert (tmp_path / "out" / "LICENSE").read_text() == "the licence"


def test_publishing(tmp_path, dense, monkeypatch):
    """What is listed is what is sent."""
    out = tmp_path / "out"
    expand_checkpoint(dense, out, **SMALL, verify=False)
    left = (".cache/state", ".env", "optimizer.pt", "rng_state_0.pth", "training_args.bin", "runs/events", "x.part")
    left += ("checkpoint-5/model.safetensors", "deep/optimizer.bin")
    for name in (*left, "a[1].json", "a1.json.bak", "star*.txt", "deep/b?.json", "deep/bc.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("x")
    private, calls = True, []
    for name in ("create_repo", "create_branch", "upload_large_folder"):
        monkeypatch.setattr(HfApi, name, lambda self, *a, name=name, **k: calls.append((name, a, k)) or "https://x/y")
    monkeypatch.setattr(HfApi, "repo_info", lambda self, repo: SimpleNamespace(private=private))
    files = files_to_publish(out)
    assert {"README.md", "config.json", "model.safetensors", "modeling_mono_internvl.py", "a[1].json"} <= set(files)
    assert not set(left) & set(files) and set(left) == set(files_left_out(out))
    assert publish_checkpoint(out, "x/y", private=True, revision="v2") == "https://x/y"
    assert [call[0] for call in calls] == ["create_repo", "create_branch", "upload_large_folder"]
    assert calls[0][2] == {"private": True, "exist_ok": True} and calls[1][2]["branch"] == "v2"
    assert calls[2][1] == ("x/y", out) and calls[2][2]["revision"] == "v2"
    present = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
    assert set(filter_repo_objects(present, allow_patterns=calls[2][2]["allow_patterns"])) == set(files)

    calls.clear()
    private = False
    with pytest.raises(ValueError, match="x/y is there already and public"):
        publish_checkpoint(out, "x/y", private=True)
    for repo in ("y", "a/b/c", "a b/c", "/c"):
        with pytest.raises(ValueError, match=r"is not a repository \(owner/name\)"):
            publish_checkpoint(out, repo)
    with pytest.raises(ValueError, match="not a finished model folder"):
        publish_checkpoint(ROOT / "docs", "x/y")
    (out / "notes.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"notes.txt is a link to .*gone, which does not exist"):
        publish_checkpoint(out, "x/y")
    assert [call[0] for call in calls] == ["create_repo"]


def test_a_folder_that_lacks_a_shard_is_not_published(tmp_path, dense):
    expand_checkpoint(dense, tmp_path / "out", **SMALL, max_shard_size="100KB", verify=False)
    next(iter(tmp_path.glob("out/model-00002*"))).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-\d+.safetensors is missing"):
        files_to_publish(tmp_path / "out")
