"""Dense models that get learnable queries and expert gates: weights, tokens, prompts, and what stays as it was."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers_cli import failure, run
from helpers_dense import write_dense
from helpers_families import make_base
from mono_internvl import MonoInternVLConfig, MonoInternVLForCausalLM, MonoInternVLProcessor
from mono_internvl.conversion import expand_checkpoint
from mono_internvl.conversion.plan import produce
from mono_internvl.conversion.source import Checkpoint
from mono_internvl.conversion.verify import NativeView, compare_expansion
from mono_internvl.queries_mono_internvl import check_same_queries
from mono_internvl.serving.checkpoint import serving_config
from mono_internvl.training.data import encode_conversation


SMALL = {"tile_size": 56, "vision_hidden_size": 16}
QUERIES = {"num_learnable_queries": 5, "query_grids": [2, 1]}
BOTH = {**QUERIES, "expert_gates": True}
RED, BLUE = (Image.new("RGB", size, colour) for size, colour in (((56, 56), "red"), ((112, 56), "blue")))
QUESTION = {"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "How many?"}]}
NAMES = ("internlm2", "qwen2", "llama", "qwen3-tied")


def load(folder, **options):
    return MonoInternVLForCausalLM.from_pretrained(folder, attn_implementation="eager", **options).eval()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(base, folder) of a family expanded with some options, made when it is first asked for."""
    kept = {}

    def get(name, **options):
        key = (name, json.dumps(options))
        if key not in kept:
            place = tmp_path_factory.mktemp(name)
            make_base(place / "base", name, max_position_embeddings=512)
            expand_checkpoint(place / "base", place / "out", **SMALL, **options)
            kept[key] = place / "base", place / "out"
        return kept[key]

    return get


# ----------------------------------------------------------------------------------------------------- the weights


@pytest.mark.parametrize("name", NAMES)
def test_queries_add_one_parameter_and_one_token_and_change_nothing_else(made, name):
    _, plain = made(name)
    _, grown = made(name, **QUERIES)
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, grown))
    assert set(after) - set(before) == {"model.learnable_queries.weight"} and not set(before) - set(after)
    config = MonoInternVLConfig.from_pretrained(grown)
    token = config.query_token_id
    for key, tensor in before.items():
        if key in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
            # Behind the nine; a pad token of ours moves by one.
            assert torch.equal(after[key][:token], tensor[:token]) and len(after[key]) == len(tensor) + 1
        else:
            assert torch.equal(after[key], tensor), key
    assert after["model.learnable_queries.weight"].shape == (5, 64)
    assert after["model.learnable_queries.weight"].std().item() == pytest.approx(0.02, rel=0.2)
    assert (config.num_learnable_queries, config.query_grids, config.query_placement) == (5, [2, 1], "image")
    assert token == config.image_token_id + 7 == MonoInternVLConfig.from_pretrained(plain).image_token_id + 7


def test_without_queries_nothing_speaks_of_them(made, tmp_path):
    base, plain = made("qwen2")
    expand_checkpoint(
        *(base, tmp_path / "same"), **SMALL, num_learnable_queries=0, query_placement="image", expert_gates=False
    )
    assert files(tmp_path / "same") == files(plain)
    for name in ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "conversion.json"):
        text = (plain / name).read_text()
        assert "num_learnable" not in text and "expert_gates" not in text and "QUERY" not in text, name


def test_what_is_drawn_depends_on_seed_and_name_alone(made, tmp_path):
    base, grown = made("qwen2", **BOTH)
    for options in ({"max_shard_size": 20_000, "seed": 0}, {"seed": 1}):
        expand_checkpoint(base, tmp_path / str(options["seed"]), **SMALL, **BOTH, **options, verify=False)
    same, other = (load(tmp_path / seed).state_dict() for seed in "01")
    drawn = load(grown).state_dict()
    for key, tensor in drawn.items():
        assert torch.equal(same[key], tensor), key
        is_new = "learnable_queries" in key or "output_gate" in key
        assert not is_new or not torch.equal(other[key], tensor), key


@pytest.mark.parametrize("experts", ["none", "qkvo"])
@pytest.mark.parametrize("name", NAMES)
def test_gates_are_small_and_all_else_is_a_copy(made, name, experts):
    base, gated = made(name, expert_gates=True, visual_attention_experts=experts)
    _, plain = made(name, visual_attention_experts=experts)
    model, before = load(gated), load(plain)
    assert model.config.text_config.expert_gates and not before.config.text_config.expert_gates
    gates = {key: tensor for key, tensor in model.state_dict().items() if "output_gate" in key}
    assert len(gates) == 2 * 3 and len({tensor.sum().item() for tensor in gates.values()}) == 6
    assert torch.stack(list(gates.values())).std().item() == pytest.approx(0.02, rel=0.2)
    for key, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    # Gates that say sigmoid(0) halve each expert; so does halving its last projection, which is exact.
    with torch.no_grad():
        for layer, twin in zip(model.model.language_model.layers, before.model.language_model.layers, strict=True):
            for expert in ("mlp", "visual_mlp"):
                getattr(layer, expert).output_gate.weight.zero_()
                for parameter in getattr(twin, expert).down_proj.parameters():
                    parameter.mul_(0.5)
        ids = torch.arange(20, 60)[None]
        assert torch.equal(model(ids).logits, before(ids).logits)


def test_verification_lends_the_gates_and_still_sees_every_weight(made, tmp_path):
    """A fault in any expert's copy, or a gate that is not finite, is found; text as it was is not claimed."""
    base, gated = made("qwen2", **BOTH)
    report = json.loads((gated / "conversion.json").read_text())
    assert report["options"]["expert_gates"] is True and report["options"]["query_grids"] == [2, 1]
    config = MonoInternVLConfig.from_pretrained(gated)
    card = (gated / "README.md").read_text()
    assert "the learnable queries and the experts' gates are new" in card and "Text is **not what it was**" in card
    assert "Text is what it was" in (made("qwen2", **QUERIES)[1] / "README.md").read_text()

    def differences(spoil=None):
        model = load(gated)
        if spoil:
            with torch.no_grad():
                spoil(model.model.language_model.layers[1])
        model.save_pretrained(tmp_path / "spoilt")
        with Checkpoint(base) as dense, Checkpoint(tmp_path / "spoilt") as after:
            views = NativeView(dense, "llama", config), NativeView(after, "native", config)
            return compare_expansion(*views, dense.config["vocab_size"])

    assert differences().passed
    assert not differences(lambda layer: layer.mlp.down_proj.weight[0].add_(0.01)).passed
    assert not differences(lambda layer: layer.visual_mlp.up_proj.weight[3].add_(0.01)).passed
    assert not differences(lambda layer: layer.self_attn.q_proj.bias.add_(0.1)).passed
    # Each expert has its own gates: the dense model with the wrong ones is another.
    model = load(gated)
    with torch.no_grad():
        ids = torch.arange(20, 60)[None]
        as_text = model(ids).logits
        embeds = model.get_input_embeddings()(ids)
        as_visual = model(inputs_embeds=embeds, visual_token_mask=torch.ones_like(ids, dtype=torch.bool)).logits
        plain = load(made("qwen2")[1])(ids).logits
    assert not torch.equal(as_text, as_visual)
    assert (as_text[..., : plain.shape[-1]] - plain).abs().max() > 0.01


# ---------------------------------------------------------------------------------------------- interrupted and refused


def test_an_interrupted_expansion_goes_on_only_with_its_own_options(tmp_path, monkeypatch):
    dense, small = write_dense(tmp_path / "dense"), {**SMALL, "max_shard_size": 20_000}
    expand_checkpoint(dense, tmp_path / "whole", **small, **BOTH, verify=False)

    written = []

    def failing(output, plan, source):
        written.append(output.name)
        if output.name == "model.language_model.layers.1.mlp.up_proj.weight":
            raise OSError("pulled out")
        yield from produce(output, plan, source)

    choices = (BOTH, QUERIES, {"num_learnable_queries": 4}, {**QUERIES, "query_placement": "question"})
    choices = (*choices, {"num_learnable_queries": 5, "query_grids": [1] * 5}, {"expert_gates": True}, {})
    for number, options in enumerate(choices, start=1):
        monkeypatch.setattr("mono_internvl.conversion.writer.produce", failing)
        with pytest.raises(OSError, match="pulled out"):
            expand_checkpoint(dense, tmp_path / "out", **small, **options, verify=False)
        assert len(list(tmp_path.glob("out.*.partial"))) == number, options
    written.clear()
    monkeypatch.setattr(
        "mono_internvl.conversion.writer.produce", lambda *a: (written.append(a[0].name), produce(*a))[1]
    )
    expand_checkpoint(dense, tmp_path / "out", **small, **BOTH, verify=False)
    assert 0 < len(written) < len(load(tmp_path / "whole").state_dict())
    assert files(tmp_path / "out").keys() == files(tmp_path / "whole").keys()
    for name, content in files(tmp_path / "out").items():
        assert content == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_learnable_queries": -1}, "num_learnable_queries=-1 must be an integer that is not negative"),
        ({"num_learnable_queries": 5}, r"query_grids=\[2\] must be sides of squares of 5 queries"),
        ({"num_learnable_queries": 5, "query_grids": [2]}, r"query_grids=\[2\] must be sides of squares of 5 queries"),
        ({"query_grids": [2]}, r"query_grids=\[2\] need num_learnable_queries"),
        ({"query_placement": "question"}, "query_placement='question' needs num_learnable_queries"),
        ({**QUERIES, "query_placement": "end"}, "query_placement='end' must be one of image, question"),
        ({"expert_gates": "yes"}, "expert_gates='yes' must be True or False"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        expand_checkpoint(tmp_path / "nowhere", tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_base_that_has_the_token_keeps_its_id(tmp_path):
    make_base(tmp_path / "base", "qwen2")
    file = tmp_path / "base" / "tokenizer.json"
    text = file.read_text().replace("<|repo_name|>", "<QUERY_CONTEXT>")
    file.write_text(text)
    settings = tmp_path / "base" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("<|repo_name|>", "<QUERY_CONTEXT>"))
    there = next(entry["id"] for entry in json.loads(text)["added_tokens"] if entry["content"] == "<QUERY_CONTEXT>")
    expand_checkpoint(tmp_path / "base", tmp_path / "out", **SMALL, **QUERIES)
    config = MonoInternVLConfig.from_pretrained(tmp_path / "out")
    assert config.query_token_id == there == MonoInternVLProcessor.from_pretrained(tmp_path / "out").query_token_id
    rows = json.loads((tmp_path / "base" / "config.json").read_text())["vocab_size"]
    assert config.vocab_size == rows + 9


def test_without_a_tokenizer_there_are_queries_all_the_same(tmp_path, caplog):
    write_dense(tmp_path / "dense")
    expand_checkpoint(tmp_path / "dense", tmp_path / "out", **SMALL, **QUERIES)
    config = MonoInternVLConfig.from_pretrained(tmp_path / "out")
    assert (config.query_token_id, config.image_token_id, config.vocab_size) == (309, 302, 310)
    assert "has no tokenizer" in caplog.text and not (tmp_path / "out" / "processor_config.json").exists()


# --------------------------------------------------------------------------------------------------------------- a life


@pytest.mark.parametrize("placement", ["image", "question"])
@pytest.mark.parametrize("name", NAMES)
def test_prompts_chat_and_training_examples(made, name, placement):
    _, folder = made(name, **BOTH, query_placement=placement)
    model, processor = load(folder), MonoInternVLProcessor.from_pretrained(folder)
    check_same_queries(model.config, processor)
    assert processor.query_placement == placement and processor.num_learnable_queries == 5
    prompt = processor.apply_chat_template([QUESTION], add_generation_prompt=True)
    block = "<img><IMG_CONTEXT></img><QUERY_CONTEXT>\nHow many?"
    assert (block in prompt) == (placement == "image") and prompt.count("<QUERY_CONTEXT>") == 1
    assert prompt.count("How many?") == (1 if placement == "image" else 2)
    example = encode_conversation(processor, [QUESTION, {"role": "assistant", "content": "17"}])
    is_query = example["input_ids"] == model.config.query_token_id
    assert is_query.sum() == 5 and (example["labels"][is_query] == -100).all()
    _, history = model.chat(RED, "How many?", max_new_tokens=4, return_history=True)
    short = [(question, "17") for question, _ in history]
    assert isinstance(model.chat([RED, BLUE], "And <image>?", history=short, max_new_tokens=4, max_tiles=2), str)
    typed = processor.apply_chat_template([{"role": "user", "content": "<QUERY_CONTEXT>"}], tokenize=True)
    assert model.config.query_token_id not in typed[0]
    # A gradient for queries and gates, from an example as from text alone.
    model.train()
    inputs = {key: tensor[None] if key != "pixel_values" else tensor for key, tensor in example.items()}
    model(**inputs).loss.backward()
    assert model.model.learnable_queries.weight.grad.abs().sum() > 0
    for layer in model.model.language_model.layers:
        assert layer.mlp.output_gate.weight.grad.abs().sum() > 0
        assert layer.visual_mlp.output_gate.weight.grad is not None


ALONE = """
import json, sys
sys.modules["mono_internvl"] = None  # as if it were not installed
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = sys.argv[1]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
answer = model.chat(Image.new("RGB", (112, 56), "red"), "How many?", max_new_tokens=6)
model.save_pretrained(folder + "-again")
processor.save_pretrained(folder + "-again")
again = AutoModelForImageTextToText.from_pretrained(folder + "-again", trust_remote_code=True, dtype=torch.float32)
same = again.chat(Image.new("RGB", (112, 56), "red"), "How many?", max_new_tokens=6) == answer
found = {"answer": answer, "queries": model.config.num_learnable_queries, "processor": processor.num_learnable_queries}
print(json.dumps({**found, "placement": processor.query_placement, "same": same}))
"""


def test_the_folder_stands_alone(made, tmp_path):
    _, folder = made("qwen2", **BOTH, query_placement="question")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder)],
        **{"capture_output": True, "text": True, "env": environment, "cwd": tmp_path, "timeout": 300},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    expected = load(folder).chat(Image.new("RGB", (112, 56), "red"), "How many?", max_new_tokens=6)
    assert found == {"answer": expected, "queries": 5, "processor": 5, "placement": "question", "same": True}


# ----------------------------------------------------------------------------------------------------- the command line


def test_the_command(made, tmp_path):
    base, folder = made("qwen2", **BOTH, query_placement="question")
    options = ("--tile-size", 56, "--vision-hidden-size", 16, "--num-learnable-queries", 5, "--query-grids", "2,1")
    result = run("expand", base, tmp_path / "out", *options, "--query-placement", "question", "--expert-gates")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1].startswith("verified: last hidden states bit-identical")
    assert "given the same expert gates" in result.stdout.splitlines()[2]
    assert files(tmp_path / "out") == files(folder)
    without = run("expand", base, tmp_path / "plain", *options[:4])
    assert without.exit_code == 0 and "gates" not in without.stdout
    error = failure("expand", base, tmp_path / "other", "--num-learnable-queries", 7)
    assert "query_grids=[2] must be sides of squares of 7 queries together" in error
    wrongs = {("--query-grids", "8x6"): "sides of squares", ("--query-placement", "end"): "image, question"}
    for wrong, message in wrongs.items():
        refused = run("expand", base, tmp_path / "other", *wrong)
        assert refused.exit_code == 2 and message in refused.stderr
    assert not (tmp_path / "other").exists()


def test_inspect_shows_queries_and_gates(made):
    _, folder = made("qwen2", **BOTH, query_placement="question")
    model = load(folder)
    facts = json.loads(run("inspect", folder, "--json").stdout)
    assert (facts["groups"]["learnable queries"], facts["groups"]["expert gates"]) == (5 * 64, 3 * 2 * 64)
    shown = facts["config"]
    assert (shown["num_learnable_queries"], shown["query_grids"], shown["query_placement"]) == (5, [2, 1], "question")
    assert shown["expert_gates"] is True and shown["query_token_id"] == model.config.query_token_id
    # What runs for text: its own gates, not those of the visual experts.
    text = {id(p): p.numel() for p in (*model.model.language_model.parameters(), *model.lm_head.parameters())}
    for layer in model.model.language_model.layers:
        for parameter in layer.visual_mlp.parameters():
            del text[id(parameter)]
    assert facts["text_path"] == sum(text.values())
    table = " ".join(run("inspect", folder).stdout.split())
    assert "5 (2 x 2 + 1 x 1) behind the question, which is repeated; visual experts compute them" in table
    assert f"<QUERY_CONTEXT> is {model.config.query_token_id}" in table and "scales the output of each text" in table
    plain = made("qwen2")[1]
    shown = json.loads(run("inspect", plain, "--json").stdout)["config"]
    assert (shown["num_learnable_queries"], shown["query_grids"], shown["query_placement"]) == (0, None, None)
    assert "learnable queries" not in run("inspect", plain).stdout and "gates" not in run("inspect", plain).stdout


# --------------------------------------------------------------------------------------------------- what has no place


@pytest.mark.parametrize(
    ("options", "words"), [(QUERIES, "5 learnable queries"), ({"expert_gates": True}, "expert_gates")]
)
def test_formats_and_engines_without_a_place_refuse_by_name(made, tmp_path, options, words):
    _, folder = made("internlm2", **options)
    refused = failure("convert", folder, tmp_path / "official", "--to", "official")
    assert f"has {words}: the official layout has no place for it" in refused
    with pytest.raises(ValueError, match=f"the official layout has no place for {words}"):
        load(folder).save_pretrained(tmp_path / "saved", save_original_format=True)
    if find_spec("gguf") is not None:
        assert f"llama.cpp has no place for {words}" in failure("export", "gguf", folder, tmp_path / "gguf")
    assert f"the MLX code has no place for {words}" in failure("export", "mlx", folder, tmp_path / "mlx")
    with pytest.raises(ValueError, match=f"the vLLM plugin has no place for {words}"):
        serving_config(json.loads((folder / "config.json").read_text()))
    assert "expand takes a dense language model" in failure("expand", folder, tmp_path / "again")
    assert not list(tmp_path.glob("[gmoa]*/*"))
