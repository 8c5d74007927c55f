"""Exporting as GGUF: the files are read back and run by an interpreter of their own (`helpers_gguf`). Checks with
llama.cpp itself are marked `llamacpp`."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys

import gguf
import jinja2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

import mono_internvl.export as export_module
from conftest import INTERNLM2_FILE, ROOT, SHARED_GOLDEN, noise, tiny_model
from helpers_cli import failure, run
from helpers_gguf import GgufFile, run_text, run_vision
from mono_internvl import MonoInternVLForCausalLM, MonoInternVLImageProcessor, MonoInternVLProcessor
from mono_internvl.conversion import convert_checkpoint, writer
from mono_internvl.export import GGUF_TYPES, export_gguf, gguf_files
from mono_internvl.export.gguf_template import MEDIA_MARK, gguf_template
from mono_internvl.export.gguf_tensors import MODALITY
from mono_internvl.export.gguf_vocabulary import gguf_vocabulary
from mono_internvl.image_processing_mono_internvl import unpatchify
from mono_internvl.serving import check_llamacpp


PLAIN = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
KINDS = {
    "released": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}},
    "biases, tied": {"attention_bias": True, "tie_word_embeddings": True},
    "wide heads": {"head_dim": 32},
    "odd width": {"hidden_size": 36, "head_dim": 16},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 3.0}},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6, **LLAMA3}},
    "yarn": {"rope_parameters": YARN},
    "qkv": {"rope_parameters": PLAIN, "visual_attention_experts": "qkv"},
    "qkvo": {"rope_parameters": {**PLAIN, "rope_type": "dynamic", "factor": 2.0}, "visual_attention_experts": "qkvo"},
}


def save(model: MonoInternVLForCausalLM, folder, **image_options):
    """A model with the nano's tokenizer, in a folder of its own."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False)
    image_token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    model.config.image_token_id = image_token
    model.save_pretrained(folder)
    images = MonoInternVLImageProcessor(**{"tile_size": 56, "max_tiles": 4, **image_options})
    MonoInternVLProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def make(tmp_path):
    """make(name, text options...) -> a folder with a random model of the nano's vocabulary."""

    def made(name="model", *, image_options=None, vision_config=None, **text):
        rows = len(AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False))
        model = tiny_model(text_config={"vocab_size": rows, **text}, vision_config=vision_config or {})
        return save(model, tmp_path / name, **(image_options or {}))

    return made


def files(folder) -> tuple[GgufFile, GgufFile]:
    return GgufFile(folder / "model.gguf"), GgufFile(folder / "mmproj.gguf")


def compare(source, exported, *, tile_size=56, atol=2e-4):
    """Logits of the files against the model's, of a prompt with two tiles between texts."""
    model = MonoInternVLForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    text, vision = files(exported)
    image_token, tokens = model.config.image_token_id, (tile_size // 28) ** 2
    patches = torch.randn(2, tokens, 3 * 28 * 28, generator=torch.Generator().manual_seed(2))
    ids = [1, 300, 301, 759, *[image_token] * (2 * tokens), 760, *range(310, 330)]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids]), pixel_values=patches).logits[0]
        given = run_text(text, ids, run_vision(vision, unpatchify(patches)), image_token)
    torch.testing.assert_close(given, expected, atol=atol, rtol=2e-4)
    assert expected.std() > 0.1


# ---- the files compute what the model does


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_compute_what_the_model_does(make, tmp_path, kind):
    source = make(**KINDS[kind])
    report = export_gguf(source, tmp_path / "out", "f32")
    assert report.architecture == ("cogvlm" if kind in ("qkv", "qkvo") else "llama")
    assert report.sizes == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    compare(source, tmp_path / "out")
    text, vision = files(tmp_path / "out")
    assert report.tensors == len(text.tensors) + len(vision.tensors)


def test_the_comparison_tells_experts_apart(make, tmp_path):
    """With another expert for visual tokens, or a state that does not say which they are, it must fail."""
    source = make()
    state = load_file(source / "model.safetensors")
    shutil.copytree(source, tmp_path / "other")
    swapped = {name: state[name.replace(".visual_mlp.", ".mlp.")] for name in state}
    save_file({name: value.clone() for name, value in swapped.items()}, tmp_path / "other" / "model.safetensors")
    export_gguf(tmp_path / "other", tmp_path / "out", "f32")
    with pytest.raises(AssertionError, match="not close"):
        compare(source, tmp_path / "out")


@pytest.mark.parametrize("kind", ["released", "qkvo"])
def test_the_official_layout_shards_and_pickles_give_the_same_files(make, tmp_path, kind):
    source = make(**KINDS[kind])
    export_gguf(source, tmp_path / "native", "f32", name="x")
    others = []
    if kind == "released":
        convert_checkpoint(source, tmp_path / "official", "official", verify=False, max_shard_size="200KB")
        assert len(list((tmp_path / "official").glob("*.safetensors"))) > 1
        others.append(tmp_path / "official")
    shutil.copytree(source, tmp_path / "pickled")
    torch.save(load_file(source / "model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    for other in [*others, tmp_path / "pickled"]:
        image_token = MonoInternVLForCausalLM.config_class.from_pretrained(source).image_token_id
        export_gguf(other, tmp_path / f"{other.name} out", "f32", name="x", image_token_id=image_token)
        for mine, theirs in zip(files(tmp_path / "native"), files(tmp_path / f"{other.name} out"), strict=True):
            assert mine.shapes == theirs.shapes
            assert all(np.array_equal(mine.raw[name], theirs.raw[name]) for name in mine.raw)


def test_tiles_of_another_size_than_the_position_table(make, tmp_path):
    source = make(image_options={"tile_size": 112}, vision_config={"image_size": 56})
    export_gguf(source, tmp_path / "out", "f32")
    compare(source, tmp_path / "out", tile_size=112)
    _, vision = files(tmp_path / "out")
    assert vision.shapes["v.position_embd.weight"][0] == 8 * 8 + 1 and vision["clip.vision.image_size"] == 112


def test_the_nano_answers_from_its_file(tmp_path):
    """A picture through processor and file to the first token of the answer."""
    export_gguf(ROOT, tmp_path / "out", "f32")
    text, vision = files(tmp_path / "out")
    processor = MonoInternVLProcessor.from_pretrained(ROOT)
    message = {"role": "user", "content": [{"type": "image", "image": ROOT / "examples" / "plate.png"}]}
    message["content"].append({"type": "text", "text": "How many circles are there?"})
    inputs = processor.apply_chat_template(
        [message], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    features = run_vision(vision, unpatchify(inputs["pixel_values"]))
    logits = run_text(text, inputs["input_ids"][0].tolist(), features, processor.image_token_id)
    assert processor.tokenizer.decode([int(logits[-1].argmax())]) == "2"


# ---- types


@pytest.mark.parametrize("kind", GGUF_TYPES[1:])
def test_every_type_is_what_the_library_makes_of_it(make, tmp_path, kind):
    source = make()
    export_gguf(source, tmp_path / "f32", "f32")
    report = export_gguf(source, tmp_path / "out", kind)
    exact, (text, vision) = files(tmp_path / "f32")[0], files(tmp_path / "out")
    assert report.type == kind
    few = kind in ("q4_0", "q4_1", "q5_0", "q5_1")
    for name, type_ in text.types.items():
        ends = few and name in ("token_embd.weight", "output.weight")
        vector = len(text.shapes[name]) == 1 or name.endswith("ffn_gate_inp.weight")
        assert type_ == ("F32" if vector else "Q8_0" if ends else kind.upper()), name
        want = gguf.quants.quantize(exact.tensors[name].numpy(), gguf.GGMLQuantizationType[type_])
        assert np.array_equal(text.raw[name].reshape(-1), want.reshape(-1).view(text.raw[name].dtype)), name
    assert set(vision.types.values()) == {"F32"}
    # What says the modality keeps its sign in every type.
    assert bool((text.tensors["token_embd.weight"][:, 64] > MODALITY / 2).all())
    number = gguf.LlamaFileType.ALL_F32 if kind == "f32" else gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]
    assert text["general.file_type"] == number and text["general.quantization_version"] == gguf.GGML_QUANT_VERSION


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "f32"), (torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_the_checkpoints_own_type_keeps_every_bit(make, tmp_path, dtype, kind):
    source = make()
    model = MonoInternVLForCausalLM.from_pretrained(source, dtype=torch.float32).to(dtype)
    model.save_pretrained(source)
    assert export_gguf(source, tmp_path / "out").type == kind
    text, _ = files(tmp_path / "out")
    state = model.state_dict()
    found = text.tensors["blk.1.ffn_up_exps.weight"]
    for expert, name in enumerate(("mlp", "visual_mlp")):
        want = state[f"model.language_model.layers.1.{name}.up_proj.weight"].float()
        assert torch.equal(found[expert, :, :64], want) and not found[expert, :, 64:].any()


def test_values_beyond_float16_are_refused(make, tmp_path):
    source = make()
    state = load_file(source / "model.safetensors")
    state["model.language_model.layers.2.mlp.down_proj.weight"][3, 4] = 7e4
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="blk.2.ffn_down_exps.weight holds values beyond float16, such as 7e.04: use bf"
    ):
        export_gguf(source, tmp_path / "out", "f16")
    assert not (tmp_path / "out").exists()
    export_gguf(source, tmp_path / "out", "bf16")


def test_float16_and_what_is_not_finite_are_warned_about(make, tmp_path, caplog):
    source = make()
    state = load_file(source / "model.safetensors")
    state["model.language_model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    export_gguf(source, tmp_path / "out", "f16")
    assert "which overflow in the released model" in caplog.text
    assert "1 tensors hold NaN or infinite values: blk.0.ffn_up_exps.weight" in caplog.text


# ---- what the files say


def test_the_keys_of_the_nano(tmp_path):
    export_gguf(ROOT, tmp_path / "out")
    text, vision = files(tmp_path / "out")
    config = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
    decoder = config["text_config"]
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "mono-internvl-nano",
        "general.license": "mit",
        "llama.context_length": decoder["max_position_embeddings"],
        "llama.block_count": decoder["num_hidden_layers"],
        "llama.embedding_length": 224,
        "llama.feed_forward_length": decoder["intermediate_size"],
        "llama.attention.head_count": decoder["num_attention_heads"],
        "llama.attention.head_count_kv": decoder["num_key_value_heads"],
        "llama.attention.key_length": decoder["head_dim"],
        "llama.rope.dimension_count": decoder["head_dim"],
        "llama.rope.freq_base": decoder["rope_parameters"]["rope_theta"],
        "llama.vocab_size": decoder["vocab_size"],
        "llama.expert_count": 2,
        "llama.expert_used_count": 1,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 757,
        "tokenizer.ggml.eom_token_id": 758,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.suppress_tokens": [761, 759, 760],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }
    assert {key: text[key] for key in expected} == expected
    assert text["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(decoder["rms_norm_eps"] * 192 / 224)
    processor = json.loads((ROOT / "preprocessor_config.json").read_text(encoding="utf-8"))
    seen = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.license": "mit",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "internvl",
        "clip.vision.image_size": processor["tile_size"],
        "clip.vision.patch_size": 14,
        "clip.vision.projector.scale_factor": 2,
        "clip.vision.projection_dim": 224,
        "clip.vision.preproc_min_tiles": processor["min_tiles"],
        "clip.vision.preproc_max_tiles": processor["max_tiles"],
    }
    assert {key: vision[key] for key in seen} == seen
    assert vision["clip.vision.image_mean"] == pytest.approx(processor["image_mean"])
    assert vision["clip.vision.image_std"] == pytest.approx(processor["image_std"])


def test_where_a_model_came_from_and_its_name(make, tmp_path):
    source = make()
    card = "---\nlicense: other\nlicense_name: internlm\nlicense_link: https://example.org/licence\n---\n"
    (source / "README.md").write_text(card, encoding="utf-8")
    export_gguf(source, tmp_path / "out", name="My model")
    for file in files(tmp_path / "out"):
        assert file["general.name"] == "My model" and file["general.license"] == "other"
        assert file["general.license.name"] == "internlm" and file["general.license.link"].endswith("/licence")


def test_the_most_tiles_can_be_chosen(make, tmp_path):
    source = make(image_options={"min_tiles": 3, "max_tiles": 6})
    for chosen, expected in ((None, (3, 6)), (4, (3, 4)), (2, (2, 2))):
        out = tmp_path / f"out {chosen}"
        export_gguf(source, out, max_tiles=chosen)
        _, vision = files(out)
        assert (vision["clip.vision.preproc_min_tiles"], vision["clip.vision.preproc_max_tiles"]) == expected


def test_tokens_and_their_types(nano_processor):
    tokenizer = nano_processor.tokenizer
    vocabulary = gguf_vocabulary(tokenizer, len(tokenizer) + 2)
    kinds = [gguf.TokenType(kind) for kind in vocabulary.types]
    assert len(vocabulary.tokens) == len(vocabulary.scores) == len(kinds) == len(tokenizer) + 2
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    assert kinds[0] == gguf.TokenType.UNKNOWN and kinds[-2:] == [gguf.TokenType.UNUSED] * 2
    assert vocabulary.tokens[-1] == f"[EMPTY_{len(tokenizer) + 1}]".encode()
    for i, token in added.items():
        if i:
            assert kinds[i] == (gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED)
            assert vocabulary.tokens[i] == token.content.replace("\u2581", " ").encode()
    for value in range(256):
        assert kinds[tokenizer.convert_tokens_to_ids(f"<0x{value:02X}>")] == gguf.TokenType.BYTE
    ids = [i for i, kind in enumerate(kinds) if kind == gguf.TokenType.NORMAL]
    assert len(ids) > 400 and all(vocabulary.tokens[i].decode() == tokenizer.convert_ids_to_tokens(i) for i in ids)


def sentencepiece_ids(vocabulary, text: str) -> list[int]:
    """llama.cpp's SentencePiece tokenizer, slowly: control tokens are not looked for."""
    ids = {token.decode(): i for i, token in enumerate(vocabulary.tokens)}
    user = [t for t, i in ids.items() if vocabulary.types[i] == gguf.TokenType.USER_DEFINED]
    pattern = "|".join(re.escape(token) for token in sorted(user, key=len, reverse=True)) or "(?!)"
    found = []
    for part in re.split(f"({pattern})", text):
        if part in user:
            found.append(ids[part])
            continue
        symbols = list(part.replace(" ", "\u2581"))
        while True:
            unions = [
                (-vocabulary.scores[ids[a + b]], place)
                for place, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False))
                if a + b in ids
            ]
            if not unions:
                break
            _, place = min(unions)
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        for symbol in symbols:
            spelt = [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
            found += [ids[symbol]] if symbol in ids else spelt
    return found


def test_scores_alone_give_our_ids(nano_processor):
    vocabulary = gguf_vocabulary(nano_processor.tokenizer, 768)
    texts = ["Describe the image.", "a red circle  and\nthe number 127", "中文, é 😀", "   ", "top left\t"]
    texts += check_llamacpp.random_texts(60)
    for text in texts:
        ours = nano_processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert sentencepiece_ids(vocabulary, text) == ours, text


def test_the_released_tokenizer(internlm2_folder):
    """Its ids on the golden texts; a NUL, where llama.cpp's tokens end, is spelt in bytes."""
    golden = SHARED_GOLDEN / "tokenizer" / "encodings.json"
    if not golden.exists():
        pytest.skip("needs golden/tokenizer/encodings.json, which is not part of this repository")
    tokenizer = AutoTokenizer.from_pretrained(internlm2_folder, trust_remote_code=False)
    vocabulary = gguf_vocabulary(tokenizer, 92553)
    assert sum(kind == gguf.TokenType.USER_DEFINED for kind in vocabulary.types) > 100
    cases = [case for case in json.loads(golden.read_text(encoding="utf-8")) if len(case["text"]) < 400]
    assert len(cases) > 15
    control = re.compile(
        "|".join(
            re.escape(token.decode())
            for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
            if kind in (gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN)
        )
    )
    compared = 0
    for case in cases:
        # The old name of `<|im_end|>` is plain text here.
        if control.search(case["text"]) or "\0" in case["text"] or "[UNUSED_TOKEN_14" in case["text"]:
            continue
        compared += 1
        assert sentencepiece_ids(vocabulary, case["text"]) == case["ids"][1:], case["text"]
    assert compared > 12


# ---- the template


def render(template: str, messages: list, **variables) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(template).render(
        messages=messages, bos_token="<s>", add_generation_prompt=True, **variables
    )


def test_the_template_renders_what_the_processor_renders(nano_processor):
    """llama.cpp's marks in a string where our parts have pictures, and the text behind them without a line between."""
    template = gguf_template(nano_processor.chat_template)
    mark, picture = "<__media_x7__>", {"type": "image", "image": noise(30, 30)}
    system = {"role": "system", "content": "Be brief."}

    def user(*parts):
        return {"role": "user", "content": list(parts)}

    def words(text):
        return {"type": "text", "text": text}

    conversations = [
        ([{"role": "user", "content": [picture, {"type": "text", "text": "What?"}]}], [f"{mark}What?"]),
        (
            [{"role": "user", "content": [picture, picture, {"type": "text", "text": "Compare."}]}],
            [f"{mark}{mark}Compare."],
        ),
        ([{"role": "user", "content": [picture, {"type": "text", "text": "\nWhat?"}]}], [f"{mark}\nWhat?"]),
        ([{"role": "user", "content": [{"type": "text", "text": "See "}, picture]}], [f"See {mark}"]),
        ([{"role": "user", "content": [picture]}], [mark]),
        ([{"role": "user", "content": "a __> b"}], ["a __> b"]),
        ([system, {"role": "user", "content": "Hi"}], ["Be brief.", "Hi"]),
        (
            [
                user(picture, words("What?")),
                {"role": "assistant", "content": "a star"},
                user(picture, words("And here?")),
            ],
            [f"{mark}What?", "a star", f"{mark}And here?"],
        ),
    ]
    for ours, contents in conversations:
        theirs = [{**message, "content": text} for message, text in zip(ours, contents, strict=True)]
        expected = nano_processor.apply_chat_template(ours, add_generation_prompt=True)
        assert render(template, theirs).replace(mark, "<img><IMG_CONTEXT></img>") == expected
        # Runtimes that pass parts get mtmd's default mark.
        parts = render(template, ours).replace(MEDIA_MARK, "<img><IMG_CONTEXT></img>")
        assert parts == expected
    tools = [{"type": "function", "function": {"name": "look"}}]
    messages = [{"role": "user", "content": "Hi"}]
    ours = nano_processor.apply_chat_template(messages, tools=tools, add_generation_prompt=True)
    assert render(template, messages, tools=tools) == ours
    assert "generation -%}" not in template


def test_other_templates(caplog):
    assert gguf_template("{{ messages[0].content }}") == "{{ messages[0].content }}"
    assert "the chat template is not the bundled one" in caplog.text
    with pytest.raises(ValueError, match="the chat template writes <IMG_CONTEXT> other than as"):
        gguf_template("{{ '<img>' ~ '<IMG_CONTEXT>' ~ '</img>' }}")


# ---- what cannot be held


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ({"hidden_act": "gelu"}, {}, "feed-forward is silu here, this model's hidden_act is gelu"),
        (
            {"intermediate_size": 100},
            {"type": "q8_0"},
            "q8_0 holds rows of a multiple of 32 values, and intermediate_size",
        ),
        ({"head_dim": 10}, {"type": "q4_0"}, r"num_attention_heads \* head_dim is 40"),
        (
            {**KINDS["qkvo"], "attention_bias": True},
            {},
            r"visual attention experts \(qkvo\), .* no place for the biases of attention",
        ),
        ({**KINDS["qkv"], "head_dim": 32}, {}, r"num_attention_heads \* head_dim is 4 \* 32, hidden_size 64"),
        (
            {"visual_attention_experts": "qkv", "rope_parameters": {**PLAIN, "rope_type": "linear", "factor": 2.0}},
            {},
            "knows no rope type linear",
        ),
        (
            {"visual_attention_experts": "qkv"},
            {},
            r"rotates with theta 10000 whatever the file says, this model with 1e\+06: .*--repaired-cogvlm",
        ),
    ],
)
def test_models_that_cannot_be_held(make, tmp_path, text, options, message):
    with pytest.raises(ValueError, match=message):
        export_gguf(make(**text), tmp_path / "out", **{"type": "f32", **options})
    assert not (tmp_path / "out").exists()


def test_a_repaired_llamacpp_is_taken_at_its_word(make, tmp_path):
    source = make(visual_attention_experts="qkvo")
    export_gguf(source, tmp_path / "out", "f32", repaired_cogvlm=True)
    text, _ = files(tmp_path / "out")
    assert text["cogvlm.rope.freq_base"] == 1e6
    with pytest.raises(AssertionError, match="not close"):  # the graph as it is today
        compare(source, tmp_path / "out")


def test_pictures_that_cannot_be_cut_alike(make, tmp_path):
    with pytest.raises(ValueError, match=r"always adds a thumbnail .*use_thumbnail=False"):
        export_gguf(make("a", image_options={"use_thumbnail": False}), tmp_path / "out")
    export_gguf(make("b", image_options={"use_thumbnail": False, "max_tiles": 1}), tmp_path / "out")


def edit_tokenizer(folder, change) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def _other_order(content):
    """The first merge of a token behind those of others."""
    merges = content["model"]["merges"]
    joined = ["".join(merge if isinstance(merge, list) else merge.split(" ")) for merge in merges]
    place = next(i for i, text in enumerate(joined) if joined.count(text) > 1)
    merges.append(merges.pop(place))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(byte_fallback=False), r"does not spell .* in bytes \(byte_fallback\)"),
        (lambda c: c["model"].update(ignore_merges=True), r"skips merges for whole words"),
        (lambda c: c.update(normalizer=None), r"rewrites the text \(normalizer\)"),
        (
            lambda c: c.update(pre_tokenizer={"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"}),
            r"puts a space before it \(pre_tokenizer\)",
        ),
        (lambda c: c["model"]["merges"].pop(), "is not joined of .*, unlike in a SentencePiece model|merges to"),
        (_other_order, "have others between them"),
    ],
)
def test_tokenizers_that_cannot_be_held(make, tmp_path, change, message):
    source = make()
    edit_tokenizer(source, change)
    with pytest.raises(ValueError, match=f"the tokenizer cannot be written: .*({message})"):
        export_gguf(source, tmp_path / "out")


def test_stop_tokens_have_three_places(make, tmp_path):
    source = make()
    path = source / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 300]}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"places for 3 stop tokens, this model has 4: 2 \(</s>\).* 300 \("):
        export_gguf(source, tmp_path / "out")
    path.write_text(json.dumps({"eos_token_id": [757, 2]}), encoding="utf-8")
    export_gguf(source, tmp_path / "out")


def test_folders_that_are_refused(make, tmp_path):
    source = make()
    with pytest.raises(ValueError, match="type 'q3_k' is not one of auto, f32"):
        export_gguf(source, tmp_path / "out", "q3_k")
    with pytest.raises(FileExistsError, match="model is not empty"):
        export_gguf(source, source)
    bare = shutil.copytree(source, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    with pytest.raises(FileNotFoundError, match="bare has no tokenizer, which a GGUF file holds"):
        export_gguf(bare, tmp_path / "out")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps({**config, "image_token_id": 5}), encoding="utf-8")
    with pytest.raises(ValueError, match="<IMG_CONTEXT> is token 761 of its tokenizer, but the model looks for 5"):
        export_gguf(source, tmp_path / "out")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a LoRA adapter"):
        export_gguf(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["num_learnable_queries", "expert_gates"])
def test_what_llama_cpp_has_no_place_for_is_refused_by_name(make, tmp_path, name):
    source = make()
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if name == "expert_gates":
        config["text_config"][name] = True
    else:
        config |= {name: 4, "query_token_id": 5}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="llama.cpp has no place for (4 learnable queries|expert_gates)"):
        export_gguf(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- both files or neither


def test_progress_counts_every_byte(make, tmp_path):
    calls = []
    export_gguf(make(), tmp_path / "out", "q8_0", progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    sizes = sum(sum(array.nbytes for array in file.raw.values()) for file in files(tmp_path / "out"))
    assert done == sorted(done) and calls[-1] == (sizes, sizes)


def test_no_disk_for_it_is_said_before_the_work(make, tmp_path, monkeypatch):
    source = make()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"not enough disk for .*out: 0.07 GB needed, 0.00 GB free"):
        export_gguf(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


FULL = """
import resource, signal, sys
from mono_internvl.export import export_gguf
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), -1))
try:
    export_gguf(sys.argv[1], sys.argv[2], "f32")
except OSError as error:
    print(error.errno, error)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs limits of a process")
@pytest.mark.parametrize(("limit", "file"), [(5_000, "mmproj"), (30_000, "mmproj"), (200_000, "model")])
def test_a_full_disk_names_the_file_and_leaves_nothing(make, tmp_path, limit, file):
    source = make()
    command = [sys.executable, "-c", FULL, str(source), str(tmp_path / "out"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert re.match(rf"{errno.EFBIG} .*/{file}\.gguf: File too large$", done.stdout), done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_interrupted_run_leaves_no_file_under_its_name(make, tmp_path, monkeypatch):
    source = make()
    encoded = gguf_files.encoded

    def interrupted(values, kind, name):
        if name.startswith("blk.2"):
            raise KeyboardInterrupt
        return encoded(values, kind, name)

    monkeypatch.setattr(gguf_files, "encoded", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_gguf(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    monkeypatch.undo()
    export_gguf(source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mmproj.gguf", "model.gguf"]


def test_memory_is_bounded_by_pieces(make, tmp_path, monkeypatch):
    """No call converts more than its share of values, however large a tensor is."""
    monkeypatch.setattr(gguf_files, "VALUES_AT_ONCE", 1000)
    sizes, encoded = [], gguf_files.encoded

    def seen(values, kind, name):
        sizes.append(values.numel())
        return encoded(values, kind, name)

    monkeypatch.setattr(gguf_files, "encoded", seen)
    source = make()
    export_gguf(source, tmp_path / "out", "f32")
    assert max(sizes) <= 3 * 1000
    compare(source, tmp_path / "out")


# ---- the command


def test_the_command(make, tmp_path):
    source = make()
    done = run("export", "gguf", source, tmp_path / "out", "--type", "q8_0", "--name", "Tiny")
    assert done.exit_code == 0, done.output
    assert re.fullmatch(
        rf"{tmp_path}/out: model\.gguf [\d.]+ [kM]B, mmproj\.gguf [\d.]+ kB \(q8_0, \d+ tensors\)\n", done.stdout
    )
    assert "written in" in done.stderr
    text, _ = files(tmp_path / "out")
    assert text["general.name"] == "Tiny" and text["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert "out is not empty" in failure("export", "gguf", source, tmp_path / "out")
    assert "no such model folder" in failure("export", "gguf", tmp_path / "none", tmp_path / "new")
    for tiles in ("auto", "0"):  # a file has one number
        wrong = run("export", "gguf", source, tmp_path / "new", "--max-tiles", tiles)
        assert wrong.exit_code == 2 and "--max-tiles" in wrong.stderr and not (tmp_path / "new").exists()
    wrong = run("export", "gguf", source, tmp_path / "new", "--type", "q3_k")
    assert wrong.exit_code == 2 and "q3_k is not one of auto" in wrong.stderr
    assert sys.modules["mono_internvl_cli.export"].GGUF_TYPES == GGUF_TYPES


def test_without_the_library_it_says_what_to_install(make, tmp_path, monkeypatch):
    source = make()
    for name in [name for name in sys.modules if name.startswith("mono_internvl.export.gguf_")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(export_module, name.rpartition(".")[2], raising=False)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'mono-internvl\[gguf\]'"):
        export_gguf(source, tmp_path / "out")


# ---- the check, and llama.cpp itself


def test_the_documented_versions_are_the_constraints():
    constraints = dict(
        line.split("==")
        for line in (ROOT / "export" / "constraints.txt").read_text().splitlines()
        if "==" in line and line[0] != "#"
    )
    documented = (ROOT / "docs" / "local.md").read_text(encoding="utf-8")
    build = constraints["xllamacpp"].rpartition(".")[2]
    assert f"llama.cpp b{build} as xllamacpp {constraints['xllamacpp']}" in documented
    newest = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert all(f"{name}=={constraints[name]}\n" in newest for name in ("gguf", "torch", "transformers", "pillow"))


def test_the_checks_questions_need_no_control_tokens_and_have_pictures_on_their_grid():
    processor = MonoInternVLProcessor.from_pretrained(ROOT).image_processor
    requests = check_llamacpp.layout_requests(processor)
    shown = [picture for request in requests for picture in request.pictures]
    assert len(requests) >= 15 and len(shown) >= 12
    assert all(side % processor.tile_size == 0 for picture in shown for side in picture.size)
    assert len({picture.size for picture in shown}) >= 3
    for picture in shown:
        again = check_llamacpp.on_grid(picture, processor)
        assert again.size == picture.size


def test_an_unknown_check_is_wrong_usage():
    done = CliRunner().invoke(check_llamacpp.app, ["nothing"])
    assert done.exit_code == 2 and "nothing not known; allowed are" in done.stderr


@pytest.mark.llamacpp
@pytest.mark.parametrize("check", ["tiles", "conversations", "tokens", "layouts"])
def test_llamacpp_answers_as_chat_does(check):
    done = CliRunner().invoke(check_llamacpp.app, [check])
    assert done.exit_code == 0, done.output


@pytest.mark.llamacpp
@pytest.mark.skipif(not INTERNLM2_FILE.exists(), reason="needs InternLM2's tokenizer.model")
def test_llamacpp_reads_the_released_tokenizer():
    done = CliRunner().invoke(check_llamacpp.app, ["tokens", "--tokenizer", str(INTERNLM2_FILE)])
    assert done.exit_code == 0, done.output
