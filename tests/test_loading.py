"""Checkpoints in both layouts, shards and pickles; what is refused; what is saved."""

import json
import logging
import pickle
import shutil

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from conftest import Bomb, golden, noise, tiny_config, tiny_model
from mono_internvl import MonoInternVLConfig, MonoInternVLForCausalLM, MonoInternVLProcessor
from mono_internvl.common.models import with_adapter


AUTO_CLASSES = [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM]
IDS = torch.tensor([[1, 5, 9, 30, 31, 44]])


def official_folder(tmp_path, **config):
    """The golden checkpoint in the official layout, copied so that it can be spoilt."""
    source = golden("variant_a", "model.safetensors").parent
    folder = tmp_path / "official"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        shutil.copy(source / name, folder / name)
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_official_layout_is_a_lossless_round_trip(tmp_path):
    folder = official_folder(tmp_path)
    model, info = MonoInternVLForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.image_token_id == 393  # the third of the nine new ids at the end of 400
    model.save_pretrained(tmp_path / "native")
    native = MonoInternVLForCausalLM.from_pretrained(tmp_path / "native")
    assert same_weights(model, native)
    native.save_pretrained(tmp_path / "again", save_original_format=True)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_native_is_the_default_on_saving(tmp_path):
    """`Trainer` resumes with a plain load_state_dict, which knows only our names."""
    model = MonoInternVLForCausalLM.from_pretrained(official_folder(tmp_path))
    model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())


@pytest.mark.parametrize("layout", ["official", "native"])
def test_shards_with_an_index(tmp_path, layout):
    model = tiny_model()
    model.save_pretrained(tmp_path / "m", max_shard_size="100KB", save_original_format=layout == "official")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    assert same_weights(model, MonoInternVLForCausalLM.from_pretrained(tmp_path / "m"))
    next(iter(sorted((tmp_path / "m").glob("*.safetensors")))).unlink()
    with pytest.raises((OSError, ValueError), match="safetensors"):
        MonoInternVLForCausalLM.from_pretrained(tmp_path / "m")


def test_pickled_checkpoints(tmp_path):
    folder = official_folder(tmp_path)
    expected = MonoInternVLForCausalLM.from_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert same_weights(expected, MonoInternVLForCausalLM.from_pretrained(folder))
    # The same in two shards.
    (folder / "pytorch_model.bin").unlink()
    names = sorted(state)
    halves = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, keys in halves.items():
        torch.save({key: state[key] for key in keys}, folder / file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in halves.items() for key in keys}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert same_weights(expected, MonoInternVLForCausalLM.from_pretrained(folder))


def test_a_pickle_never_runs_code(tmp_path):
    folder = official_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"x": Bomb(tmp_path / "exploded")}, folder / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        MonoInternVLForCausalLM.from_pretrained(folder)
    assert not (tmp_path / "exploded").exists()


def test_keys_are_checked(tmp_path):
    folder = official_folder(tmp_path)
    state = load_file(folder / "model.safetensors")
    gone = "language_model.model.layers.1.feed_forward_ve.w2.weight"

    def write(changed):
        save_file(changed, folder / "model.safetensors", {"format": "pt"})

    write({name: tensor for name, tensor in state.items() if name != gone})
    with pytest.raises(ValueError, match=r"1 missing: model.language_model.layers.1.visual_mlp.down_proj.weight"):
        MonoInternVLForCausalLM.from_pretrained(folder)
    _, info = MonoInternVLForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {"model.language_model.layers.1.visual_mlp.down_proj.weight"}

    write({**state, "left.over": torch.zeros(1)})
    with pytest.raises(ValueError, match="1 unexpected: left.over"):
        MonoInternVLForCausalLM.from_pretrained(folder)

    write({**state, "mlp1.1.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"1 mis-shaped: .*linear_1.bias.*3.*64"):
        MonoInternVLForCausalLM.from_pretrained(folder)
    MonoInternVLForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)

    write({**state, gone.replace("feed_forward_ve.w2", "attention.wqkv"): torch.zeros(6, 64)})
    with pytest.raises(ValueError, match=r"3 mis-shaped: .*layers.1.self_attn.k_proj.weight.*6, 64"):
        MonoInternVLForCausalLM.from_pretrained(folder)


def test_corrupted_safetensors(tmp_path):
    folder = official_folder(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    for spoilt in (whole[: len(whole) // 2], b"", b"\0" * 100):
        (folder / "model.safetensors").write_bytes(spoilt)
        with pytest.raises(SafetensorError, match="deserializing header"):
            MonoInternVLForCausalLM.from_pretrained(folder)


def test_no_weights_at_all(tmp_path):
    folder = official_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="official"):
        MonoInternVLForCausalLM.from_pretrained(folder)


def test_float16_warns(tmp_path, caplog, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        model = MonoInternVLForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert "overflow to NaN" in caplog.text and model.dtype == torch.float16
    with pytest.raises(ValueError, match="float16"):
        model.chat(None, "hello")


def test_attention_experts_have_no_official_layout(tmp_path):
    model = tiny_model(visual_attention_experts="qkv")
    with pytest.raises(ValueError, match="no place for visual attention experts"):
        model.save_pretrained(tmp_path / "x", save_original_format=True)
    model.save_pretrained(tmp_path / "native")
    assert same_weights(model, MonoInternVLForCausalLM.from_pretrained(tmp_path / "native"))


@pytest.mark.parametrize("scaling", [None, {"type": "dynamic", "factor": 2.0}])
def test_rope_scaling_null_or_dynamic(tmp_path, scaling):
    folder = official_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["rope_scaling"] = scaling
    (folder / "config.json").write_text(json.dumps(config))
    model = MonoInternVLForCausalLM.from_pretrained(folder)
    rope = model.config.text_config.rope_parameters
    assert rope["rope_theta"] == 1_000_000
    assert rope["rope_type"] == ("default" if scaling is None else "dynamic")
    assert model.model.language_model.rotary_emb.dynamic is (scaling is not None)


def test_dynamic_ntk_keeps_no_state():
    """A long call must not change a later short one (upstream's does)."""
    model = tiny_model(
        text_config={"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}
    )
    with torch.no_grad():
        before = model(IDS).logits
        far = model(IDS, position_ids=torch.arange(6)[None] + 40).logits
        after = model(IDS).logits
    assert torch.equal(before, after)
    assert not torch.allclose(before, far, atol=1e-3)


def test_config_of_the_official_layout(tmp_path):
    config = MonoInternVLConfig.from_pretrained(official_folder(tmp_path, nonsense_key={"a": 1}))
    assert config.model_type == "mono_internvl"
    assert config.text_config.hidden_size == 64 and config.vision_config.image_size == 56
    assert not hasattr(config.text_config, "expert_dp_comm")
    assert config.auto_map["AutoModel"] == "modeling_mono_internvl.MonoInternVLForCausalLM"
    assert config.architectures is None
    config.save_pretrained(tmp_path / "c")
    again = AutoConfig.from_pretrained(tmp_path / "c")
    assert isinstance(again, MonoInternVLConfig)
    assert again.text_config.to_dict() == config.text_config.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual_attention_experts": "kv"}, "none, qkv, qkvo"),
        ({"text_config": {"num_key_value_heads": 3}}, "multiple of num_key_value_heads=3"),
        ({"text_config": {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}}, "longrope.*default, dynamic"),
        ({"text_config": {"drop_path_rate": 1.5}}, "drop_path_rate=1.5"),
        ({"vision_config": {"image_size": 100}}, "image_size=100 must be a positive multiple of 28"),
    ],
)
def test_bad_configuration_names_the_value(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_contradicting_attention_experts():
    with pytest.raises(ValueError, match="contradicts"):
        tiny_config(visual_attention_experts="qkv", text_config={"visual_attention_experts": "qkvo"})


def test_image_token_id_outside_the_vocabulary():
    config = tiny_config()
    config.image_token_id = 5000
    with pytest.raises(ValueError, match="image_token_id=5000 is outside the vocabulary of 120"):
        MonoInternVLForCausalLM(config)


def control_ids(config):
    return config.image_start_token_id, config.image_end_token_id, config.stop_token_ids


def test_the_keyword_overrides_the_file(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = MonoInternVLForCausalLM.from_pretrained(tmp_path, image_token_id=77).config
    assert config.image_token_id == 77 and control_ids(config) == (75, 76, [73, 74])


def test_control_ids_are_stored_and_follow_the_image_token(tmp_path):
    config = tiny_config()
    assert control_ids(config) == (111, 112, [109, 110])
    config.image_token_id = 50
    assert control_ids(config) == (48, 49, [46, 47])
    own = tiny_config(image_start_token_id=7, image_end_token_id=8, stop_token_ids=[9])
    own.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert [saved[name] for name in ("image_start_token_id", "image_end_token_id", "stop_token_ids")] == [7, 8, [9]]
    again = MonoInternVLConfig.from_pretrained(tmp_path)
    assert control_ids(again) == (7, 8, [9]) and sorted(again.image_token_ids) == [7, 8, 113]
    # Those of a file belong to the token that it names; what is given beside it counts.
    assert control_ids(MonoInternVLConfig.from_pretrained(tmp_path, image_token_id=60)) == (58, 59, [56, 57])
    assert control_ids(MonoInternVLConfig.from_pretrained(tmp_path, image_token_id=60, stop_token_ids=[5]))[2] == [5]
    assert control_ids(MonoInternVLConfig.from_pretrained(tmp_path, image_token_id=113)) == (7, 8, [9])


def test_control_ids_decide_what_is_never_generated():
    model = tiny_model(image_start_token_id=7, image_end_token_id=8)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[[7, 8, 113]] = 1e3 * model.lm_head.weight.new_ones(3, 1)
        model.model.language_model.norm.weight.fill_(1)
    ids = torch.randint(10, 100, (4, 6), generator=torch.Generator().manual_seed(0))
    made = model.generate(ids, max_new_tokens=5, do_sample=True)[:, 6:]
    assert not torch.isin(made, torch.tensor([7, 8, 113])).any()


def test_an_official_configuration_counts_from_the_end_of_the_vocabulary():
    config = MonoInternVLConfig(llm_config={"vocab_size": 400})
    assert config.image_token_id == 393 and control_ids(config) == (391, 392, [389, 390])


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_auto_classes_mean_the_model_that_chats(tmp_path, auto_class):
    tiny_model().save_pretrained(tmp_path)
    assert isinstance(auto_class.from_pretrained(tmp_path), MonoInternVLForCausalLM)


def test_tied_embeddings(tmp_path):
    model = tiny_model(text_config={"tie_word_embeddings": True})
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = MonoInternVLForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_released_size_on_the_meta_device():
    with torch.device("meta"):
        model = MonoInternVLForCausalLM(MonoInternVLConfig())
    vision = model.model.vision_embeddings
    total = sum(p.numel() for p in model.parameters()) + vision.class_embedding.numel()
    assert total == 3_111_355_392
    visual = sum(
        p.numel()
        for name, p in model.named_parameters()
        if "visual_mlp" in name or "vision_embeddings" in name or "multi_modal_projector" in name
    )
    assert sum(p.numel() for p in model.parameters()) - visual == 1_889_146_880


def test_drop_path_leaves_out_whole_rows_and_keeps_the_mean():
    model = tiny_model(text_config={"drop_path_rate": 0.4, "num_hidden_layers": 3})
    first, middle, last = (layer.drop_path for layer in model.model.language_model.layers)
    assert (first.rate, middle.rate, last.rate) == (0.0, 0.2, 0.4)
    x = torch.rand(4000, 2, 3) + 1
    assert torch.equal(last(x), x), "only while training"
    torch.manual_seed(0)
    out = last.train()(x)
    kept = (out != 0).all(dim=(1, 2))
    assert torch.equal(kept, (out != 0).any(dim=2).any(dim=1)) and 0.57 < kept.float().mean() < 0.63
    torch.testing.assert_close(out[kept], x[kept] / 0.6)
    assert torch.equal(first.train()(x), x)
    assert last(x.bfloat16()).dtype == torch.bfloat16
    assert isinstance(tiny_model().model.language_model.layers[2].drop_path, torch.nn.Identity)


def adapter_folder(base, folder):
    """An adapter over the model in `base`, as PEFT saves it; returns the adapted model."""
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=2, target_modules=["q_proj", "patch_embedding"], init_lora_weights=False)
    adapted = peft.get_peft_model(MonoInternVLForCausalLM.from_pretrained(base), options)
    adapted.save_pretrained(folder)
    return adapted.base_model.model.eval()


def tiles_of_a_chat(model) -> int:
    """How many tiles the model is given of a square picture; four and the thumbnail where its processor allows four."""
    seen: list[int] = []
    handle = model.model.vision_embeddings.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    model.chat(noise(112, 112), "What?", max_new_tokens=1)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("auto_class", [MonoInternVLForCausalLM, AutoModel])
def test_a_folder_of_adapters_is_loaded_over_its_base(tmp_path, auto_class):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny_model().save_pretrained(base)
    wanted = adapter_folder(base, folder)
    ids = torch.tensor([[5, 6, 7]])
    loaded = auto_class.from_pretrained(folder).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, wanted(input_ids=ids).logits)


@pytest.mark.parametrize("auto_class", [MonoInternVLForCausalLM, AutoModel])
def test_chat_takes_the_processor_of_the_adapters_folder_or_else_of_its_base(folder, tmp_path, auto_class):
    adapter = tmp_path / "adapter"
    adapter_folder(folder, adapter)
    assert tiles_of_a_chat(auto_class.from_pretrained(adapter)) == 5
    MonoInternVLProcessor.from_pretrained(folder, max_tiles=1).save_pretrained(adapter)
    assert tiles_of_a_chat(auto_class.from_pretrained(adapter)) == 1


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"target_modules": ["q_proj", "patch_embedding"], "use_dora": True}, 0),
        ({"target_modules": ["lm_head", "embed_tokens"]}, 0),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}, 0),
        ({"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector", "vision_embeddings"]}, 0),
        # Tokens added in fine-tuning: PEFT saves embedding and head with the adapters.
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, 8),
        ({"target_modules": ["q_proj"]}, 8),
    ],
)
def test_adapters_of_every_kind_are_loaded_whole(tmp_path, options, rows):
    peft = pytest.importorskip("peft")
    tiny_model().save_pretrained(tmp_path / "base")
    base = MonoInternVLForCausalLM.from_pretrained(tmp_path / "base")
    known = base.get_input_embeddings().weight.shape[0]
    if rows:
        base.resize_token_embeddings(known + rows, mean_resizing=False)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False, **options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    ids, pixels = torch.tensor([[5, 6, 7, known + rows - 1]]), torch.rand(1, 4, 3 * 28 * 28)
    loaded = MonoInternVLForCausalLM.from_pretrained(tmp_path / "adapter")
    wanted, adapted = adapted.base_model.model.eval(), None
    torch.testing.assert_close(loaded(input_ids=ids).logits, wanted(input_ids=ids).logits)
    found, right = (m.get_image_features(pixels).pooler_output for m in (loaded, wanted))
    torch.testing.assert_close(torch.cat(list(found)), torch.cat(list(right)))
    assert loaded.get_input_embeddings().weight.shape[0] == known + rows
    # The command line merges them.
    merged = with_adapter(MonoInternVLForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter"))
    torch.testing.assert_close(merged(input_ids=ids).logits, wanted(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_adapters_of_an_offloaded_base_lie_where_it_computes(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny_model().save_pretrained(base)
    wanted = adapter_folder(base, folder)
    places = {"device_map": {"model": "disk", "lm_head": "cpu"}, "offload_folder": tmp_path / "offload"}
    loaded = MonoInternVLForCausalLM.from_pretrained(folder, **places)
    ids, pixels = torch.tensor([[5, 6, 7]]), torch.rand(1, 4, 3 * 28 * 28)
    torch.testing.assert_close(loaded(input_ids=ids).logits, wanted(input_ids=ids).logits)
    found, right = (m.get_image_features(pixels).pooler_output for m in (loaded, wanted))
    torch.testing.assert_close(torch.cat(list(found)), torch.cat(list(right)))
    assert loaded.hf_device_map == places["device_map"]


def test_what_an_adapters_file_lacks_or_has_too_much_is_named(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny_model().save_pretrained(base)
    adapter_folder(base, folder)
    file = folder / "adapter_model.safetensors"
    weights = {name: value.clone() for name, value in load_file(file).items()}
    name = next(name for name in weights if "lora_A" in name)
    save_file({key: value for key, value in weights.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="adapter does not hold this model's weights; 1 missing: .*lora_A"):
        MonoInternVLForCausalLM.from_pretrained(folder)
    save_file(
        {**weights, "base_model.model.gone.lora_A.weight": weights[name].clone()}, file, metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match="1 unexpected: .*gone.*lora_A"):
        MonoInternVLForCausalLM.from_pretrained(folder)


def test_what_an_adapters_folder_lacks_is_named(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny_model().save_pretrained(base)
    adapter_folder(base, folder)
    # With its base beside it the folder may travel.
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "../base"}))
    MonoInternVLForCausalLM.from_pretrained(folder)
    weights = load_file(base / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 missing: lm_head.weight"):
        MonoInternVLForCausalLM.from_pretrained(folder)
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not name the model"):
        MonoInternVLForCausalLM.from_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="no adapter_model.safetensors"):
        MonoInternVLForCausalLM.from_pretrained(folder)


def test_the_released_codes_option_points_to_the_page(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for name in ("use_flash_attn", "load_in_8bit", "load_in_4bit"):
        with pytest.raises(TypeError, match=f"{name} .*legacy.md"):
            MonoInternVLForCausalLM.from_pretrained(tmp_path, **{name: True})


def test_chat_takes_the_processor_of_the_models_revision(folder, tmp_path):
    """Two revisions of one repository in a cache: the second was made with one tile a picture."""
    hub = tmp_path / "models--me--tiny"
    (hub / "refs").mkdir(parents=True)
    for name, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        shutil.copytree(folder, hub / "snapshots" / commit)
        (hub / "refs" / name).write_text(commit)
    for file in ("processor_config.json", "preprocessor_config.json"):
        path = hub / "snapshots" / ("b" * 40) / file
        settings = json.loads(path.read_text())
        (settings.get("image_processor") or settings)["max_tiles"] = 1
        path.write_text(json.dumps(settings))
    for revision, tiles in (("main", 5), ("v1", 1)):
        options = {"revision": revision, "cache_dir": str(tmp_path), "local_files_only": True}
        model = MonoInternVLForCausalLM.from_pretrained("me/tiny", **options)
        assert tiles_of_a_chat(model) == tiles


def test_label_smoothing_shifts_the_labels(tmp_path):
    from transformers import Trainer, TrainingArguments

    model, losses = tiny_model(), []
    ids = torch.randint(4, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    for factor in (0.0, 1e-6):
        options = {"label_smoothing_factor": factor, "report_to": [], "use_cpu": True, "remove_unused_columns": False}
        arguments = TrainingArguments(output_dir=str(tmp_path), **options)
        loss = Trainer(model=model, args=arguments).compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_weights_can_come_as_a_state_dict_alone():
    model = tiny_model()
    loaded = MonoInternVLForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())


def test_yarn_set_late_has_transformers_default_for_its_original_length():
    config = tiny_config()
    config.text_config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    model = MonoInternVLForCausalLM(config)
    assert model.config.text_config.rope_parameters["original_max_position_embeddings"] == 512


def test_outputs_hold_the_embedded_tiles():
    model = tiny_model()
    ids = torch.tensor([[5, *[model.config.image_token_id] * 4, 6]])
    output = model(ids, pixel_values=torch.randn(1, 4, 3 * 28 * 28))
    assert torch.equal(output.image_outputs.pooler_output.flatten(0, 1), output.image_hidden_states)
    assert model(ids[:, -1:]).image_outputs is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_token_id": "5"}, "image_token_id='5' must be an integer"),
        ({"image_end_token_id": -2}, "image_end_token_id=-2 must be an integer"),
        ({"stop_token_ids": [3, "4"]}, r"stop_token_ids=\[3, '4'\] must be integers"),
        ({"llm_config": 5}, "llm_config must be a dict"),
        ({"text_config": {"vocab_size": "x"}}, "vocab_size='x' must be a positive integer"),
        ({"text_config": {"num_attention_heads": 0}}, "num_attention_heads=0 must be a positive integer"),
        ({"text_config": {"rms_norm_eps": "1e-5"}}, "rms_norm_eps='1e-5' must be a positive number"),
        ({"text_config": {"head_dim": 3}}, "head_dim=3 must be even"),
        ({"text_config": {"rope_theta": -1}}, "rope_theta=-1 must be a positive number"),
        ({"text_config": {"rope_scaling": "dynamic"}}, "rope_scaling must be a dict"),
        ({"text_config": {"attention_dropout": 5}}, "attention_dropout=5"),
        ({"vision_config": {"patch_size": "14"}}, "patch_size='14' must be a positive integer"),
        ({"vision_config": {"image_std": [0, 0, 0]}}, "image_std"),
    ],
)
def test_a_value_that_makes_no_model_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        MonoInternVLConfig(**values)


def test_what_changes_nothing_in_a_configuration_is_said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        MonoInternVLConfig(text_config={"hidden_sise": 64}, hidden_size=64)
        MonoInternVLConfig(text_config={"pad_token_id": -1})
        said = caplog.text
        caplog.clear()
        MonoInternVLConfig.from_dict(tiny_config().to_dict())
    assert "hidden_sise is not known and changes nothing; did you mean hidden_size" in said
    assert "hidden_size changes nothing here; it belongs into text_config" in said
    assert "pad_token_id=-1 is no id" in said
    assert not caplog.text


def test_the_released_configurations_names_point_to_the_page():
    with pytest.raises(AttributeError, match="llm_config .*text_config, see docs/legacy.md"):
        _ = MonoInternVLConfig().llm_config
    assert not hasattr(MonoInternVLConfig(), "template")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_tile": 4}, TypeError, "unknown option 'max_tile'"),
        ({"max_tiles": 4}, TypeError, "option of the processor"),
        ({"num_frames": 4}, TypeError, "option of the processor"),
        ({"device": "cpu"}, TypeError, "did you mean 'device_map'"),
        ({"num_hidden_layers": 1}, TypeError, "value of text_config"),
        ({"visual_attention_experts": "qkv"}, ValueError, "missing: .*visual_q_proj"),
        ({"image_token_id": -1}, ValueError, "image_token_id=-1"),
        ({"config": {"a": 1}}, TypeError, "config must be"),
        ({"quantization_config": 8}, TypeError, "quantization_config must be"),
    ],
)
def test_an_option_of_loading_is_honoured_or_refused(folder, options, error, message):
    with pytest.raises(error, match=message):
        MonoInternVLForCausalLM.from_pretrained(folder, **options)


def test_a_configuration_may_ask_for_tuples():
    config = tiny_config()
    config.return_dict = False
    model = MonoInternVLForCausalLM(config).eval()
    with torch.no_grad():
        logits = model(IDS)[0]
        assert torch.equal(logits, model(IDS, return_dict=True).logits)
