"""`export mlx`: what lies in the folder, and what is refused. What mlx-vlm makes of it is marked `mlx` and runs in its
environment, where `serving.check_mlx` holds its answers against `generate`."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_relative_import_files

from conftest import ROOT, tiny_model
from helpers_cli import failure, run
from mono_internvl.export import export_mlx, mlx
from mono_internvl.export.mlx import MODEL_FILE, PROCESSOR_CLASS, mlx_name
from mono_internvl.serving import check_mlx, check_vllm


CODE = ROOT / "export" / "mlx_model.py"


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(folder: Path, processor, *, official: bool = False, **overrides) -> Path:
    """A random model of the nano's vocabulary, with its tokenizer, in one of the layouts."""
    text = {"vocab_size": len(processor.tokenizer), **overrides.pop("text_config", {})}
    model = tiny_model(text_config=text, **overrides)
    ids = dict(
        zip(("image_token_id", "image_start_token_id", "image_end_token_id"), processor.image_token_ids, strict=True)
    )
    for name, value in ids.items():
        setattr(model.config, name, value)
    model.config.stop_token_ids = processor.stop_token_ids[1:]
    model.save_pretrained(folder, save_original_format=official)
    processor.save_pretrained(folder)
    if official:
        check_vllm.make_official(folder, model.config)
    return folder


# ---- the folder


def test_both_layouts_become_the_same_weights(tmp_path, nano_processor):
    native = write(tmp_path / "native", nano_processor)
    official = tmp_path / "official"
    assert run("convert", native, official, "--to", "official", "--no-verify").exit_code == 0
    assert any(name.endswith("wqkv.weight") for name in load_file(official / "model.safetensors"))
    made = [
        load_file(export_mlx(folder, tmp_path / f"{folder.name}-mlx").folder / "model.safetensors")
        for folder in (native, official)
    ]
    ours = load_file(native / "model.safetensors")
    used = {name: value for name, value in ours.items() if not name.endswith("class_embedding")}
    assert len(used) == len(ours) - 1
    for found in made:
        assert found.keys() == {mlx_name(name) for name in used}
        assert all(torch.equal(found[mlx_name(name)], value) for name, value in used.items())
    assert "language_model.model.layers.0.visual_mlp.up_proj.weight" in made[0]
    assert {name.split(".")[0] for name in made[0]} == {"language_model", "vision_embeddings", "multi_modal_projector"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_dtype_is_that_of_all_weights_in_several_files(tmp_path, nano_processor, dtype):
    source = write(tmp_path / "native", nano_processor)
    made = export_mlx(source, tmp_path / "out", dtype=dtype, max_shard_size="200KB")
    index = read(made.folder / "model.safetensors.index.json")["weight_map"]
    files = sorted(made.folder.glob("model-*.safetensors"))
    found = {name: value for file in files for name, value in load_file(file).items()}
    assert made.shards == len(files) > 1 and found.keys() == index.keys() and len(found) == made.tensors
    assert {value.dtype for value in found.values()} == {getattr(torch, dtype)}
    assert sum(value.nbytes for value in found.values()) == made.nbytes


def test_a_tied_head_is_not_written_even_where_the_checkpoint_has_one(tmp_path, nano_processor):
    source = write(tmp_path / "native", nano_processor, text_config={"tie_word_embeddings": True})
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    found = load_file(export_mlx(source, tmp_path / "out").folder / "model.safetensors")
    assert "language_model.lm_head.weight" not in found
    assert read(tmp_path / "out" / "config.json")["text_config"]["tie_word_embeddings"] is True


def test_config_has_what_mlx_vlm_reads(tmp_path, nano_processor):
    rope = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}
    source = write(
        tmp_path / "native", nano_processor, text_config={"rope_parameters": rope, "visual_attention_experts": "qkvo"}
    )
    folder = export_mlx(source, tmp_path / "out").folder
    config = read(folder / "config.json")
    assert config["model_file"] == MODEL_FILE and config["model_type"] == "mono_internvl"
    assert sorted(config["eos_token_id"]) == sorted(nano_processor.stop_token_ids)
    assert config["image_token_id"] == nano_processor.image_token_id
    assert config["text_config"]["rope_parameters"] == rope
    assert config["text_config"]["visual_attention_experts"] == "qkvo"
    # Each value that the code's dataclasses ask for, and no word of code for transformers.
    for name, part in (
        ("TextConfig", config["text_config"]),
        ("VisionConfig", config["vision_config"]),
        ("ModelConfig", config),
    ):
        (kind,) = (node for node in ast.parse(CODE.read_text()).body if getattr(node, "name", "") == name)
        fields = {node.target.id for node in kind.body if isinstance(node, ast.AnnAssign)}
        assert fields <= part.keys(), fields - part.keys()
    for file in folder.glob("*.json"):
        assert "auto_map" not in file.read_text(encoding="utf-8"), file
    assert read(folder / "processor_config.json")["processor_class"] == PROCESSOR_CLASS
    # mlx-vlm puts the generation file's word over the configuration's: both must end an answer at <|im_end|>.
    generation = read(source / "generation_config.json")
    assert generation["eos_token_id"] != config["eos_token_id"]
    assert read(folder / "generation_config.json") == {**generation, "eos_token_id": config["eos_token_id"]}


def test_the_code_and_all_that_it_runs_lie_beside_the_weights(tmp_path):
    folder = export_mlx(ROOT, tmp_path / "out").folder
    assert (folder / MODEL_FILE).read_text() == CODE.read_text()
    module = ROOT / "processing_mono_internvl.py"
    needed = {module.name, *(Path(file).name for file in get_relative_import_files(str(module)))}
    assert len(needed) > 5 and needed <= {path.name for path in folder.iterdir()}
    assert all((folder / name).read_text() == (ROOT / name).read_text() for name in needed)
    tree = ast.parse(CODE.read_text())
    assert PROCESSOR_CLASS in {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    # The folder is enough: the code imports nothing of this package.
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(name.startswith("mono_internvl") for name in modules)
    assert {"chat_template.jinja", "tokenizer.json", "LICENSE", "NOTICE"} <= {path.name for path in folder.iterdir()}


# ---- refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu', and the MLX code has silu alone"),
        ({"dtype": torch.float16}, "is in float16, in which this model's activations overflow"),
        ({"expert_gates": True}, "the MLX code has no place for expert_gates"),
        ({"qk_norm": True, "mlp_bias": True}, "the MLX code has no place for mlp_bias, qk_norm"),
    ],
)
def test_what_the_code_cannot_run_is_refused(tmp_path, nano_processor, values, message):
    dtype = values.pop("dtype", None)
    source = write(tmp_path / "native", nano_processor, text_config=values)
    if dtype is not None:
        weights = {name: value.to(dtype) for name, value in load_file(source / "model.safetensors").items()}
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        export_mlx(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if dtype is not None:  # its values can be had in another
        assert export_mlx(source, tmp_path / "out", dtype="bfloat16").tensors


def test_other_folders_and_options_are_refused(tmp_path, nano_processor):
    source = write(tmp_path / "native", nano_processor)
    with pytest.raises(ValueError, match="dtype='int8' is not one of bfloat16, float32"):
        export_mlx(source, tmp_path / "out", dtype="int8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    with pytest.raises(FileExistsError, match="not empty"):
        export_mlx(source, tmp_path / "full")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    with pytest.raises(ValueError, match="has no tokenizer, without which mlx-vlm cannot use it"):
        export_mlx(source, tmp_path / "out")
    config = read(source / "config.json")
    (source / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ValueError, match="export takes a Mono-InternVL in the official layout or ours"):
        export_mlx(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_token_id": 300}, r"<IMG_CONTEXT>, <img> and </img> are \[300, .*native, but \[\d+, .*must match"),
        ({"stop_token_ids": []}, r"\d+ \(<\|im_end\|>\), \d+ \(<\|im_start\|>\) end an answer by the tokenizer of "),
    ],
)
def test_other_ids_than_the_tokenizers_are_refused(tmp_path, nano_processor, values, message):
    source = write(tmp_path / "native", nano_processor)
    (source / "config.json").write_text(json.dumps({**read(source / "config.json"), **values}))
    with pytest.raises(ValueError, match=message):
        export_mlx(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_learnable_queries_have_no_place(tmp_path, nano_processor):
    queries = {"num_learnable_queries": 4, "query_token_id": 300}
    source = write(tmp_path / "native", nano_processor)
    config = read(source / "config.json")
    (source / "config.json").write_text(json.dumps({**config, **queries}))
    with pytest.raises(ValueError, match="the MLX code has no place for 4 learnable queries"):
        export_mlx(source, tmp_path / "out")


def test_a_name_without_a_place_is_an_error():
    with pytest.raises(ValueError, match=r"model\.audio\.weight has no name in MLX's layout"):
        mlx_name("model.audio.weight")


def test_a_failed_run_leaves_no_folder_and_the_next_goes_on(tmp_path, monkeypatch):
    def fails(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(mlx, "write_shards", fails)
        with pytest.raises(OSError, match="No space left"):
            export_mlx(ROOT, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_mlx(ROOT, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- the command and the check


def test_the_command_says_what_it_made(tmp_path):
    result = run("export", "mlx", ROOT, tmp_path / "out", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'out'}: 96 tensors in 1 file, 21.57 MB\n"
    assert "is not empty" in failure("export", "mlx", ROOT, tmp_path / "out")
    assert "float16" in failure("export", "mlx", ROOT, tmp_path / "other", "--dtype", "float16")
    assert run("export", "mlx", ROOT, tmp_path / "other", "--dtype", "int8").exit_code == 2


def test_the_checks_models_are_more_than_one_kind(tmp_path):
    table = check_mlx.make_model("table", tmp_path / "table")
    sides = (
        read(table / "config.json")["vision_config"]["image_size"],
        read(table / "preprocessor_config.json")["tile_size"],
    )
    assert sides == (112, 168)
    assert (
        read(check_mlx.make_model("official", tmp_path / "official") / "config.json")["model_type"] == "internvl_chat"
    )


# ---- with mlx-vlm


def logits_of_both(folder: Path, out: Path, texts: int = 3, pictures: int = 2):
    """float32 logits [T, vocabulary] of a prompt with pictures, from transformers and from the exported folder."""
    import mlx.core as mx
    import numpy as np
    from mlx_vlm.utils import load_model

    from mono_internvl import MonoInternVLForCausalLM

    model = MonoInternVLForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config, generator = model.config, torch.Generator().manual_seed(0)
    place = [config.image_start_token_id, *[config.image_token_id] * 4, config.image_end_token_id]
    words = torch.randint(3, 700, (texts,), generator=generator).tolist()
    ids = torch.tensor([[1, *place * pictures, *words]])
    pixels = torch.randn(pictures, 4, 3 * 28 * 28, generator=generator)
    expected = model(input_ids=ids, pixel_values=pixels).logits[0].detach()
    ported = load_model(export_mlx(folder, out, dtype="float32").folder)
    found = torch.from_numpy(np.array(ported(mx.array(ids.numpy()), mx.array(pixels.numpy())).logits[0]))
    never = [config.image_token_id, config.image_start_token_id, config.image_end_token_id]
    assert torch.isinf(found[:, never]).all()
    found[:, never] = expected[:, never]
    return expected, found


ROPES = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {
        **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 128},
    },
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
]


@pytest.mark.mlx
@pytest.mark.parametrize(
    "text",
    [
        *({"rope_parameters": rope} for rope in ROPES),
        {"visual_attention_experts": "qkv", "attention_bias": True},
        {"visual_attention_experts": "qkvo"},
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
        {"head_dim": 32},
    ],
    ids=lambda text: "-".join(str(v["rope_type"] if isinstance(v, dict) else v) for v in text.values()),
)
def test_logits_are_those_of_transformers(tmp_path, nano_processor, text):
    folder = write(tmp_path / "native", nano_processor, text_config=text)
    expected, found = logits_of_both(folder, tmp_path / "out", texts=100)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert expected.std() > 0.1


@pytest.mark.mlx
def test_dynamic_ntk_ends_at_max_position_embeddings_by_name(tmp_path, nano_processor):
    import mlx.core as mx
    from mlx_vlm.models.cache import make_prompt_cache
    from mlx_vlm.utils import load_model

    text = {"rope_parameters": ROPES[1], "max_position_embeddings": 32}
    model = load_model(
        export_mlx(write(tmp_path / "native", nano_processor, text_config=text), tmp_path / "out").folder
    )
    cache = make_prompt_cache(model.language_model)
    model(mx.array([[5] * 31]), cache=cache)
    model.language_model(mx.array([[5]]), cache=cache)
    message = "33 tokens are more than max_position_embeddings=32: beyond it dynamic NTK"
    with pytest.raises(ValueError, match=message):
        model.language_model(mx.array([[5]]), cache=cache)
    with pytest.raises(ValueError, match=message):
        model(mx.array([[5] * 33]))


@pytest.mark.mlx
def test_placeholders_and_pictures_must_match(tmp_path, nano_processor):
    import mlx.core as mx
    from mlx_vlm.utils import load_model

    model = load_model(export_mlx(write(tmp_path / "native", nano_processor), tmp_path / "out").folder)
    ids = mx.array([[1, nano_processor.image_token_id, 5]])
    with pytest.raises(ValueError, match="1 placeholders for 0 visual tokens"):
        model(ids)
    with pytest.raises(ValueError, match="1 placeholders for 4 visual tokens"):
        model(ids, mx.zeros((1, 4, 3 * 28 * 28)))
    with pytest.raises(ValueError, match=r"\[1, 3, 2352\] do not fit"):
        model(ids, mx.zeros((1, 3, 3 * 28 * 28)))


@pytest.mark.mlx
def test_typed_text_stays_text_and_options_reach_the_pictures(tmp_path, nano_processor):
    from mlx_vlm import load
    from mlx_vlm.prompt_utils import apply_chat_template
    from mlx_vlm.utils import prepare_inputs

    model, processor = load(str(export_mlx(ROOT, tmp_path / "out").folder))
    wide = check_vllm.picture(1)
    typed = "<IMG_CONTEXT> and <|im_end|> typed"
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": typed}]}]
    chat = apply_chat_template(processor, model.config, messages, num_images=1)
    for options in ({}, {"max_tiles": 1}):
        found = prepare_inputs(processor, images=[wide], prompts=chat, **options)
        given = [{"role": "user", "content": [{"type": "image", "image": wide}, {"type": "text", "text": typed}]}]
        expected = nano_processor.apply_chat_template(
            given, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, **options
        )
        assert found["input_ids"].tolist() == expected["input_ids"].tolist()
        assert found["pixel_values"].shape == tuple(expected["pixel_values"].shape)
    text = apply_chat_template(processor, model.config, typed, num_images=0)
    ids = nano_processor.chat_token_ids([{"role": "user", "content": typed}], add_generation_prompt=True)
    assert prepare_inputs(processor, prompts=text, add_special_tokens=True)["input_ids"].tolist() == [ids]
    raw = nano_processor(text="<s>Hi")["input_ids"]  # one beginning, whether it is written or not
    for given in ("<s>Hi", "Hi"):
        assert prepare_inputs(processor, prompts=given, add_special_tokens=True)["input_ids"].tolist() == raw
    with pytest.raises(ValueError, match="1 places in the chats for 2 pictures"):
        prepare_inputs(processor, images=[wide, wide], prompts=chat)
    with pytest.raises(ValueError, match="enable_thinking"):
        apply_chat_template(processor, model.config, "Hi", enable_thinking=True)


@pytest.mark.mlx
@pytest.mark.slow
@pytest.mark.parametrize("name", check_mlx.MODELS)
def test_mlx_vlm_answers_as_generate_does(name):
    done = subprocess.run(
        [sys.executable, "-m", "mono_internvl.serving.check_mlx", name], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"ok      {name}:" in done.stdout
