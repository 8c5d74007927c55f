"""EViP's machinery: recipes, groups, sources, packing, loss, resuming, and several processes."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from conftest import ROOT, load_golden, tiny_model
from helpers_training import train_and_kill
from mono_internvl import MonoInternVLForCausalLM, MonoInternVLProcessor
from mono_internvl.common.compiling import compile_layers, uncompile_layers
from mono_internvl.common.parameters import GROUPS, group_of
from mono_internvl.common.record import picture_sizes
from mono_internvl.image_processing_mono_internvl import choose_grid
from mono_internvl.plates.drawing import draw_plate
from mono_internvl.plates.tasks import TASKS, PlateWorld, name_patches
from mono_internvl.plates.words import Item, Plate
from mono_internvl.training import curves
from mono_internvl.training.backend import choose_backend
from mono_internvl.training.checkpoints import WholeCheckpoints, checkpoints
from mono_internvl.training.data import Collator, PackCollator, encode_conversation, target_weights
from mono_internvl.training.groups import count_parameters, grouped_parameters, linear_modules
from mono_internvl.training.loading import (
    Batches,
    Conversations,
    Key,
    UnitBatches,
    mixture,
    one_pass,
    pack_first_fit_decreasing,
)
from mono_internvl.training.records import BadSample
from mono_internvl.training.run import run_stage
from mono_internvl.training.sources import FileRecords, Source, open_sources
from mono_internvl.training.stages import load_stage, recipe_names
from mono_internvl.training.trainer import EViPTrainer, learnt_places, weighted_loss_sum
from mono_internvl.training_mono_internvl import make_drop_path


@pytest.fixture(scope="module")
def processor(folder) -> MonoInternVLProcessor:
    return MonoInternVLProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """24 records: pictures of three sizes, two pictures, none."""
    root = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    rows = []
    for number in range(24):
        names = []
        for k in range((1, 1, 0, 2)[number % 4]):
            image = Image.new("RGB", rng.choice([(60, 60), (120, 60), (50, 170)]), "white")
            ImageDraw.Draw(image).ellipse((5, 5, 45, 45), fill=rng.choice(["red", "blue", "green"]))
            names.append(f"{number}-{k}.png")
            image.save(root / names[-1])
        turns = [
            {"from": "human", "value": "What color is the circle?" * rng.randint(1, 3)},
            {"from": "gpt", "value": rng.choice(["red", "blue", "a green circle and a star"])},
        ]
        row = {"id": number, "conversations": turns * rng.randint(1, 2)}
        if names:
            row["image"] = names if len(names) > 1 else names[0]
        rows.append(row)
    (root / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    (root / "train.json").write_text(json.dumps(rows))
    return root


def recipe(tmp_path: Path, folder: Path, records: Path, **changes) -> Path:
    content = {
        "model": str(folder),
        "data": [str(records / "train.jsonl")],
        "trains": ["visual_embedding", "visual_experts"],
        "max_tiles": 4,
        "max_length": 160,
        "steps": 4,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "bf16": False,
        "gradient_checkpointing": False,
        "workers": 0,
        "log_steps": 1,
        **changes,
    }
    path = tmp_path / "stage.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def losses(runs: Path, name: str = "stage") -> list[float]:
    return [entry["loss"] for entry in json.loads((runs / name / "log.json").read_text()) if "loss" in entry]


def error_of(call, *args, kind=ValueError, **kwargs) -> str:
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------- recipes


def test_every_recipe_loads_and_the_released_numbers_stand_in_them():
    stages = {name: load_stage(name) for name in recipe_names()}
    families = {"mono-internvl-2b", "mono-internvl-1.5-2b", "nano", "breen", "nano-breen"}
    assert {name.split("/")[0] for name in stages} == families
    rows = {
        # max tiles, length, rate, schedule, steps, warm-up, batch, accumulation (paper 2410.08202, table 8)
        "s1_1_concept": (4, 1425, 1e-4, "constant_with_warmup", 450_000, 100, 2048, 1),
        "s1_2_semantic": (6, 1925, 1e-4, "constant_with_warmup", 126_000, 100, 2048, 1),
        "s1_3_alignment": (12, 4096, 5e-5, "cosine", 70_000, 100, 2048, 1),
        "s2_instruction": (24, 8192, 2e-5, "cosine", 14_000, 420, 1024, 4),
    }
    for name, row in rows.items():
        s = stages[f"mono-internvl-2b/{name}"]
        assert row == (
            s.max_tiles,
            s.max_length,
            s.learning_rate,
            s.schedule,
            s.steps,
            s.warmup,
            s.batch_size,
            s.accumulation,
        )
        assert (s.weight_decay, s.drop_path, s.adam_beta2, s.bf16) == (0.01, 0.1, 0.999, True)
    assert stages["mono-internvl-2b/s1_1_concept"].trains == ("visual_embedding", "visual_experts")
    assert "attention" in stages["mono-internvl-2b/s1_3_alignment"].trains
    assert "attention" not in stages["mono-internvl-1.5-2b/s1_3_alignment"].trains
    others = {"visual_attention_experts", "expert_gates", "learnable_queries"}
    assert set(stages["mono-internvl-2b/s2_instruction"].trains) == set(GROUPS) - others


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"learning_rat": 1}, ("learning_rat", "did you mean learning_rate?")),
        ({"trains": "visual_expert"}, ("visual_expert", "did you mean visual_experts?")),
        ({"schedule": "cosin"}, ("schedule", "cosine")),
        ({"steps": "many"}, ("steps", "many", "int")),
        ({"steps": 0}, ("steps", "positive")),
        ({"max_tiles": "auto"}, ("max_tiles", '"auto" is for answers')),
        ({"max_tiles": "most"}, ("max_tiles", "most", "int")),
        ({"expand": {"max_tiles": "most"}}, ("expand: max_tiles", '"auto" or a whole number')),
        ({"learning_rate": "nan"}, ("learning_rate", "positive")),
        ({"log_steps": 0}, ("log_steps", "at least 1")),
        ({"workers": -1}, ("workers", "negative")),
        ({"max_bad_share": 5}, ("max_bad_share", "between 0 and 1")),
        ({"batch_size": 10, "accumulation": 4}, ("batch_size", "10", "4")),
        ({"data": "[]"}, ("data",)),
    ],
)
def test_a_recipe_with_a_mistake_says_which(overrides, words):
    message = error_of(load_stage, "nano/s1_1_concept", overrides)
    assert "nano/s1_1_concept" in message and all(word in message for word in words), message


def test_an_unknown_recipe_names_the_closest():
    assert "did you mean nano/text?" in error_of(load_stage, "nano/txt", kind=FileNotFoundError)


def test_overrides_are_read_as_yaml_and_lengths_replace_each_other():
    stage = load_stage("nano/text", {"learning-rate": "1e-4", "trains": "text,attention", "max_length": "512"})
    assert (stage.learning_rate, stage.trains, stage.max_length) == (1e-4, ("text", "attention"), 512)
    assert load_stage("nano/text", {"epochs": "2"}).steps is None


def test_a_base_is_a_file_beside_the_recipe_or_a_recipe_of_the_package(tmp_path, monkeypatch):
    (tmp_path / "first.yaml").write_text("base: nano/_base\nmodel: nano\ntrains: [text]\nsteps: 3\ndata: [a.jsonl]\n")
    (tmp_path / "second.yaml").write_text("base: first.yaml\nsteps: 4\n")
    monkeypatch.chdir("/")
    stage = load_stage(tmp_path / "second.yaml")
    assert (stage.steps, stage.data, stage.padding_free) == (4, ["a.jsonl"], True)
    (tmp_path / "second.yaml").write_text("base: third.yaml\n")
    assert f"no recipe {tmp_path / 'third.yaml'}" in error_of(
        load_stage, tmp_path / "second.yaml", kind=FileNotFoundError
    )
    (tmp_path / "third.yaml").write_text("base: second.yaml\n")
    assert "its base leads back to it" in error_of(load_stage, tmp_path / "second.yaml")


@pytest.mark.skipif(not (ROOT / "model.safetensors").exists(), reason="the nano is not in the repository")
def test_the_bundled_model_has_a_name(tmp_path, data):
    path = recipe(tmp_path, Path("nano"), data, steps=1, batch_size=2, max_length=1024, trains=["visual_embedding"])
    trained = MonoInternVLForCausalLM.from_pretrained(run_stage(path, runs=tmp_path / "runs"))
    bundled = MonoInternVLForCausalLM.from_pretrained(ROOT, dtype=torch.float32)
    assert torch.equal(trained.get_input_embeddings().weight, bundled.get_input_embeddings().weight)


# -------------------------------------------------------------------------------------------------------------- groups


def test_groups_cover_every_parameter_once():
    model = tiny_model(
        num_learnable_queries=4,
        query_token_id=118,
        text_config={"visual_attention_experts": "qkvo", "expert_gates": True},
    )
    groups = grouped_parameters(model)
    assert tuple(groups) == GROUPS
    found = [id(p) for parameters in groups.values() for p in parameters]
    assert len(found) == len(set(found)) == len(list(model.parameters()))
    assert group_of("model.language_model.layers.0.self_attn.visual_q_proj.weight") == "visual_attention_experts"
    assert group_of("model.language_model.layers.0.input_layernorm.weight") == "text"
    names = linear_modules(model, ["attention"])
    assert len(names) == 3 * 4 and all(name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")) for name in names)


def test_a_group_that_the_model_lacks_is_an_error(tmp_path, folder, data):
    path = recipe(tmp_path, folder, data, trains=["visual_attention_experts"])
    assert "no visual_attention_experts" in error_of(run_stage, path, runs=tmp_path / "runs")


# ------------------------------------------------------------------------------------------------------------- sources


def test_every_kind_of_file_gives_the_same_records(tmp_path, data):
    import datasets

    rows = json.loads((data / "train.json").read_text())
    images = [[row["image"]] if isinstance(row.get("image"), str) else row.get("image", []) for row in rows]
    table = datasets.Dataset.from_dict(
        {"id": [row["id"] for row in rows], "conversations": [r["conversations"] for r in rows], "image": images}
    )
    table.save_to_disk(tmp_path / "saved")
    roles = {"human": "user", "gpt": "assistant"}
    chats = [
        {
            "id": row["id"],
            "messages": [{"role": roles[t["from"]], "content": t["value"]} for t in row["conversations"]],
            "images": found,
        }
        for row, found in zip(rows, images, strict=True)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    meta = {"one": {"root": str(data), "annotation": str(data / "train.jsonl"), "repeat_time": 2, "length": 24}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    (from_meta,) = open_sources([tmp_path / "meta.json"])
    assert from_meta.repeat == 2
    kinds = [
        FileRecords(data / "train.jsonl"),
        FileRecords(data / "train.json"),
        FileRecords(tmp_path / "saved", root=data),
        FileRecords(tmp_path / "chats.jsonl", root=data),
        from_meta.records,
    ]
    for records in kinds:
        assert len(records) == 24
        assert [records[i].messages for i in range(24)] == [kinds[0][i].messages for i in range(24)], records.name
    assert kinds[0][3].where.endswith("line 4 (id 3)")
    parts = kinds[0][3].messages[0]["content"]
    assert [part.get("text") for part in parts[:3]] == ["Image-1: ", None, "\nImage-2: "]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", ("line 1", "not JSON")),
        ('{"id": 5}', ("line 1", "id 5", "no conversations")),
        ('{"conversations": [{"from": "robot", "value": "x"}]}', ("line 1", "robot", "human")),
        (
            '{"image": ["a.png"], "conversations": [{"from": "human", "value": "<image><image>?"}]}',
            ("line 1", "2 <image> marks", "1 pictures"),
        ),
        (
            '{"image": "gone.png", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a"}]}',
            ("line 1", "gone.png"),
        ),
        ('{"conversations": [{"from": "human", "value": "?"}]}', ("line 1", "no answer to learn")),
        (
            json.dumps({"conversations": [{"from": "human", "value": "a " * 90}, {"from": "gpt", "value": "b"}]}),
            ("line 1", "at most 80", "max_length"),
        ),
    ],
)
def test_a_bad_sample_is_an_error_that_names_it(tmp_path, processor, row, words):
    path = tmp_path / "bad.jsonl"
    path.write_text(row + "\n")
    conversations = Conversations(open_sources([path]), processor, max_tiles=4, max_length=80)
    message = error_of(conversations.__getitem__, Key(0, 0), kind=BadSample)
    assert str(path) in message and all(word in message for word in words), message


def test_a_truncated_picture_is_an_error_that_names_it(tmp_path, processor, data):
    (tmp_path / "cut.png").write_bytes((data / "0-0.png").read_bytes()[:60])
    row = {"image": "cut.png", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a"}]}
    (tmp_path / "cut.jsonl").write_text(json.dumps(row))
    conversations = Conversations(open_sources([tmp_path / "cut.jsonl"]), processor, max_tiles=4, max_length=80)
    message = error_of(conversations.__getitem__, Key(0, 0), kind=BadSample)
    assert "cut.jsonl, line 1" in message and "cut.png" in message


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"a": {"root": ".", "annotation": "gone.jsonl"}}, ("gone.jsonl",)),
        ({"a": {"annotation": "x.jsonl"}}, ("'a'", "root")),
        ({"a": {"root": "no-such-folder", "annotation": "x.jsonl"}}, ("no-such-folder",)),
        ({"a": {"root": ".", "annotation": "x.jsonl", "length": 7}}, ("declares 7", "1")),
        ({"a": {"root": ".", "annotation": "empty.jsonl"}}, ("empty.jsonl", "no record")),
        ({"a": {"root": ".", "annotation": ["x.jsonl"]}}, ("'a'", "annotation")),
        ({"a": {"root": ".", "annotation": "x.jsonl", "repeat_tme": 2}}, ("'a'", "repeat_tme", "repeat_time")),
        ({"a": {"root": ".", "annotation": "x.jsonl", "repeat_time": 0}}, ("'a'", "repeat_time must be positive")),
        ({"a": {"root": ".", "annotation": "x.jsonl", "max_dynamic_patch": "6"}}, ("max_dynamic_patch", "'6'")),
        ({"a": {"root": ".", "annotation": "x.jsonl", "data_augment": True}}, ("data_augment", "false")),
    ],
)
def test_a_meta_file_with_a_mistake_says_which(tmp_path, meta, words):
    (tmp_path / "x.jsonl").write_text('{"conversations": []}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    message = error_of(open_sources, [tmp_path / "meta.json"], kind=(ValueError, OSError))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight": "x"}, "weight must be positive, got 'x'"),
        ({"weight": float("nan")}, "weight must be positive, got nan"),
        ({"repeat": 0}, "repeat must be positive, got 0"),
        ({"max_tiles": 0}, "max_tiles must be a whole number of at least 1, got 0"),
        ({"max_tiles": "6"}, "max_tiles must be a whole number"),
        ({"ignore": {"a": 1}}, "ignore: a list of keys"),
        ({"max_tile": 6}, "a path is wanted, or a mapping with path that knows path, root, max_tiles"),
    ],
)
def test_a_source_with_a_mistake_says_which(data, options, words):
    assert words in error_of(open_sources, [{"path": data / "train.jsonl", **options}])
    assert "a path is wanted" in error_of(open_sources, [[data / "train.jsonl"]])


def test_a_meta_files_entries_share_what_is_said_of_it(tmp_path, data):
    entry = {"root": str(data), "annotation": str(data / "train.jsonl"), "data_augment": False}
    meta = {"a": entry, "b": {**entry, "repeat_time": 3, "max_dynamic_patch": 2}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    sources = open_sources([{"path": tmp_path / "meta.json", "weight": 2, "max_tiles": 4}])
    assert [(source.weight, source.repeat, source.records.max_tiles) for source in sources] == [
        (0.5, 1, 4),
        (1.5, 3, 2),
    ]
    message = error_of(open_sources, [{"path": tmp_path / "meta.json", "root": str(data)}])
    assert "root: each entry of a meta file names its own" in message


def test_mixtures_follow_weights_and_shuffle_each_pass(data):
    records = FileRecords(data / "train.jsonl")
    keys = mixture([Source(records, weight=3.0), Source(records, weight=1.0)], seed=0)
    drawn = [next(keys) for _ in range(960)]
    assert 0.7 < sum(key.source == 0 for key in drawn) / 960 < 0.8
    first = [key.record for key in drawn if key.source == 0]
    assert sorted(first[:24]) == sorted(first[24:48]) == list(range(24)) and first[:24] != first[24:48]
    again = mixture([Source(records, weight=3.0), Source(records, weight=1.0)], seed=0)
    assert [next(again) for _ in range(960)] == drawn
    counts = [0] * 24
    for key in one_pass([Source(records, repeat=1.5)], 2, seed=1):
        counts[key.record] += 1
    assert counts == [3] * 24
    assert "weight" in error_of(lambda: next(mixture([Source(records, weight=1.0), Source(records)], 0)))


# ------------------------------------------------------------------------------------------------------------- packing


def test_first_fit_decreasing():
    assert pack_first_fit_decreasing([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]
    rng = random.Random(0)
    lengths = [rng.randint(1, 100) for _ in range(300)]
    packs = pack_first_fit_decreasing(lengths, 100)
    assert sorted(i for pack in packs for i in pack) == list(range(300))
    assert max(sum(lengths[i] for i in pack) for pack in packs) <= 100
    # FFD is at most 11/9 of the best, and the best is at least the tokens over the size.
    assert len(packs) <= 11 / 9 * (sum(lengths) / 100) + 1


def test_lengths_are_known_without_pixels(processor, data, monkeypatch):
    conversations = Conversations(open_sources([data / "train.jsonl"]), processor, max_tiles=4, max_length=400)
    for index in range(24):
        assert conversations.length_of(Key(0, index)) == len(conversations[Key(0, index)][1]["input_ids"])
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("a picture was decoded"))
    assert picture_sizes(conversations.sources[0].records[0].messages)


def test_a_picture_turned_by_exif_has_the_length_it_is_seen_with(tmp_path, processor):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 60), "white").save(tmp_path / "turned.jpg", exif=exif)
    row = {"image": "turned.jpg", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a"}]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    conversations = Conversations(open_sources([tmp_path / "x.jsonl"]), processor, max_tiles=3, max_length=400)
    assert picture_sizes(conversations.sources[0].records[0].messages) == [(60, 300)]
    assert conversations.length_of(Key(0, 0)) == len(conversations[Key(0, 0)][1]["input_ids"])


def test_damaged_exif_hides_no_size(tmp_path):
    Image.new("RGB", (300, 60), "white").save(tmp_path / "damaged.png", exif=b"Exif\0\0XX")
    messages = [{"role": "user", "content": [{"type": "image", "image": str(tmp_path / "damaged.png")}]}]
    assert picture_sizes(messages) == [(300, 60)]


def test_a_size_that_no_header_tells_is_that_of_the_picture(tmp_path, monkeypatch):
    Image.new("RGB", (300, 60), "white").save(tmp_path / "large.png")
    (tmp_path / "no.png").write_text("<html></html>")
    messages = [{"role": "user", "content": [{"type": "image", "image": (tmp_path / "large.png").as_uri()}]}]
    assert picture_sizes(messages) == [(300, 60)]
    # Pillow's own limit, which the recipe's stands in for.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert picture_sizes(messages) == [(300, 60)]
    messages[0]["content"][0]["image"] = str(tmp_path / "large.png")
    assert picture_sizes(messages) == [(300, 60)]
    messages[0]["content"][0]["image"] = str(tmp_path / "no.png")
    with pytest.raises(ValueError, match=r"no\.png.*HTML"):
        picture_sizes(messages)


def both_ways(processor, data, weighting):
    """The same eight samples in two packs and padded."""
    conversations = Conversations(open_sources([data / "train.jsonl"]), processor, max_tiles=4, max_length=400)
    examples = [conversations[Key(0, index)][1] for index in range(8)]
    return PackCollator(2, weighting)([examples[:5], examples[5:]]), Collator(2, weighting)(examples)


def loss_of(model, batch):
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "loss_weights")}
    weights = batch["loss_weights"]
    return weighted_loss_sum(model(**inputs, use_cache=False).logits, batch["labels"], weights) / weights.sum()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("weighting", ["token", "sample", "square"])
def test_packed_loss_and_gradients_equal_unpacked(folder, processor, data, attention, weighting):
    results = []
    for batch in both_ways(processor, data, weighting):
        model = MonoInternVLForCausalLM.from_pretrained(folder, attn_implementation=attention).train()
        loss = loss_of(model, batch)
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (loss_a, grads_a), (loss_b, grads_b) = results
    torch.testing.assert_close(loss_a, loss_b, atol=1e-5, rtol=0)
    for name in grads_a:
        torch.testing.assert_close(grads_a[name], grads_b[name], atol=1e-5, rtol=1e-4, msg=name)


def test_flex_packs_have_the_loss_of_unpacked_samples(folder, processor, data):
    """Flex has no backward on a CPU."""
    packed, padded = both_ways(processor, data, "token")
    flex = MonoInternVLForCausalLM.from_pretrained(folder, attn_implementation="flex_attention").eval()
    plain = MonoInternVLForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(loss_of(flex, packed), loss_of(plain, padded), atol=1e-5, rtol=0)


def test_a_sample_does_not_see_its_pack(folder, processor, data):
    conversations = Conversations(open_sources([data / "train.jsonl"]), processor, max_tiles=4, max_length=400)
    first, second, other = (conversations[Key(0, index)][1] for index in (0, 1, 5))
    model = MonoInternVLForCausalLM.from_pretrained(folder).eval()

    def logits(pack):
        batch = PackCollator(2)([pack])
        for name in ("labels", "loss_weights"):
            batch.pop(name)
        with torch.no_grad():
            return model(**batch, use_cache=False).logits[0]

    length = len(second["input_ids"])
    a = logits([first, second])[-length:]
    b = logits([other, second])[-length:]
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_weights_of_targets():
    labels = torch.tensor([7, -100, 5, 6, 7, 8])
    assert target_weights(labels, "token").tolist() == [0, 0, 1, 1, 1, 1]
    assert target_weights(labels, "sample").tolist() == [0, 0, 0.25, 0.25, 0.25, 0.25]
    assert target_weights(labels, "square").tolist() == [0, 0, 0.5, 0.5, 0.5, 0.5]


def test_the_loss_is_the_golden_loss(variant_a):
    case = load_golden("variant_a", "case_train.safetensors")
    inputs = {name: case[name] for name in ("input_ids", "attention_mask", "position_ids")}
    # The dummy tile of the text-only row belongs to no placeholder.
    inputs["pixel_values"] = case["pixel_values"][case["image_flags"].bool()]
    with torch.no_grad():
        logits = variant_a(**inputs).logits
    weights = torch.stack([target_weights(row, "token") for row in case["labels"]])
    loss = weighted_loss_sum(logits, case["labels"], weights) / weights.sum()
    torch.testing.assert_close(loss, case["loss"][0], atol=1e-4, rtol=1e-4)


def test_logits_are_made_where_something_is_learnt(tmp_path, folder, processor, data):
    """And the loss, sum and mean, is that of all logits."""
    assert learnt_places(torch.tensor([[-100, -100, 4, -100], [-100, -100, 4, 5]])).tolist() == [1, 2]
    assert learnt_places(torch.full((1, 4), -100)).tolist() == [0]
    for batch in both_ways(processor, data, "square"):
        model = MonoInternVLForCausalLM.from_pretrained(folder)
        seen: list[int] = []
        model.lm_head.register_forward_hook(lambda module, inputs, logits, seen=seen: seen.append(logits.shape[1]))
        arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
        data_of = {"conversations": None, "batches": None, "micro_batches": None}
        loss = EViPTrainer(model=model, args=arguments, **data_of).compute_loss(model, batch)
        torch.testing.assert_close(loss, loss_of(model, batch), atol=1e-6, rtol=0)
        assert seen[0] == len(learnt_places(batch["labels"])) < seen[1]


# -------------------------------------------------------------------------------------------------------------- a stage


def test_a_stage_trains_only_what_it_names(tmp_path, folder, data):
    lines: list[str] = []
    out = run_stage(recipe(tmp_path, folder, data), runs=tmp_path / "runs", write=lines.append)
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {group_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"visual_embedding", "visual_experts"}
    assert any("text" in line and "frozen" in line for line in lines)
    assert any("4 steps of 4 packs, at most 640 tokens a step" in line for line in lines)
    (state,) = (tmp_path / "runs" / "stage").glob("checkpoint-4/optimizer.pt")
    trained = count_parameters(MonoInternVLForCausalLM.from_pretrained(out))
    moments = torch.load(state, weights_only=True)["state"].values()
    numbers = sum(entry["exp_avg"].numel() for entry in moments)
    assert numbers == trained["visual_embedding"][1] + trained["visual_experts"][1]
    # What is saved answers.
    model = MonoInternVLForCausalLM.from_pretrained(out)
    assert model.config.text_config.use_cache
    assert isinstance(model.chat(Image.new("RGB", (60, 60)), "Hi", max_new_tokens=3), str)
    assert MonoInternVLForCausalLM.from_pretrained(tmp_path / "runs" / "stage" / "checkpoint-4")


def test_text_logits_stay_bit_identical_while_text_is_frozen(tmp_path, folder, data):
    out = run_stage(recipe(tmp_path, folder, data), runs=tmp_path / "runs")
    ids = torch.randint(3, 700, (2, 40), generator=torch.Generator().manual_seed(0))
    a, b = (MonoInternVLForCausalLM.from_pretrained(path).eval() for path in (folder, out))
    with torch.no_grad():
        assert torch.equal(a(ids).logits, b(ids).logits)
    messages = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (60, 60), "red")}]}]
    processor = MonoInternVLProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        assert not torch.equal(a(**inputs).logits, b(**inputs).logits)


@pytest.mark.parametrize("stage", ["nano/s1_1_concept", "nano/s1_2_semantic", "nano/s1_3_alignment"])
def test_the_nano_keeps_its_text_to_the_bit_until_its_attention_trains(tmp_path, stage):
    """Of the nano's own stages, on the nano; in S1.3 of v1 attention trains, so text moves there."""
    changes = {"model": str(ROOT), "expand": None, "steps": 2, "batch_size": 4, "learning_rate": 0.01, "warmup": 0}
    out = run_stage(stage, changes, runs=tmp_path)
    before, after = (MonoInternVLForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (ROOT, out))
    ids = after.get_input_embeddings().weight.new_tensor(range(3, 403)).long().view(2, 200)
    with torch.no_grad():
        same = torch.equal(before(ids).logits, after(ids).logits)
    assert same == (stage != "nano/s1_3_alignment")
    visual = "model.language_model.layers.2.visual_mlp.up_proj.weight"
    assert not torch.equal(before.get_parameter(visual), after.get_parameter(visual))


def test_accumulation_does_not_change_the_curve(tmp_path, folder, data):
    curves = []
    for accumulation in (1, 2):
        runs = tmp_path / f"runs{accumulation}"
        run_stage(recipe(tmp_path, folder, data, accumulation=accumulation), runs=runs)
        curves.append(torch.tensor(losses(runs)))
    torch.testing.assert_close(*curves, atol=1e-5, rtol=0)


def test_joining_samples_instead_of_padding_does_not_change_the_curve(tmp_path, folder, data):
    curves = []
    for padding_free in (False, True):
        runs = tmp_path / f"runs{padding_free}"
        run_stage(recipe(tmp_path, folder, data, packing=False, padding_free=padding_free, max_length=400), runs=runs)
        curves.append(torch.tensor(losses(runs)))
    torch.testing.assert_close(*curves, atol=1e-5, rtol=0)


def test_one_row_holds_a_whole_micro_batch(processor, data):
    conversations = Conversations(open_sources([data / "train.jsonl"]), processor, max_tiles=4, max_length=400)
    samples = [conversations[Key(0, index, pack=index)] for index in range(5)]
    batch = Batches(2, 4, packing=False, padding_free=True, weighting="token")(samples)
    lengths = [len(example["input_ids"]) for _, example in samples]
    assert batch["input_ids"].shape == (1, sum(lengths)) and "attention_mask" not in batch
    assert (batch["position_ids"] == 0).sum() == 5


def test_packs_that_are_padding_free_too_are_refused(tmp_path, folder, data):
    message = error_of(load_stage, recipe(tmp_path, folder, data, packing=True, padding_free=True))
    assert "padding_free: packs hold no padding already; set packing: false, or leave this out" in message


def test_epochs_count_what_is_there(tmp_path, folder, data):
    path = recipe(tmp_path, folder, data, steps=None, epochs=1, packing=False, batch_size=5, max_length=400)
    run_stage(path, runs=tmp_path / "runs")
    assert len(losses(tmp_path / "runs")) == 24 // 5


def test_lora_trains_saves_and_merges(tmp_path, folder, data):
    peft = pytest.importorskip("peft")
    path = recipe(tmp_path, folder, data, trains=[], lora={"groups": ["attention", "text"], "r": 4}, learning_rate=0.01)
    out = run_stage(path, runs=tmp_path / "runs")
    base = MonoInternVLForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(3, 700, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, out).eval()
        logits = adapted(ids).logits
        assert not torch.allclose(logits, plain, atol=1e-3)
        torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, logits, atol=1e-5, rtol=1e-5)


def test_bad_samples_are_skipped_on_request_and_too_many_fail(tmp_path, folder, data, caplog):
    rows = (data / "train.jsonl").read_text().splitlines()
    broken = json.dumps({"id": "x", "image": "gone.png", "conversations": json.loads(rows[0])["conversations"]})
    (tmp_path / "mixed.jsonl").write_text("\n".join([*rows, broken]))
    for number in range(24):
        for picture in data.glob(f"{number}-*.png"):
            (tmp_path / picture.name).write_bytes(picture.read_bytes())
    common = {"data": [str(tmp_path / "mixed.jsonl")], "packing": False, "max_length": 400, "steps": 7}
    path = recipe(tmp_path, folder, data, **common)
    message = error_of(run_stage, path, runs=tmp_path / "a", kind=BadSample)
    assert "mixed.jsonl, line 25 (id x)" in message and "gone.png" in message
    path = recipe(tmp_path, folder, data, **common, on_bad_sample="skip", max_bad_share=0.05)
    lines: list[str] = []
    run_stage(path, runs=tmp_path / "b", write=lines.append)
    assert any("1 of 28 samples were left out" in line for line in lines)
    assert "line 25 (id x)" in caplog.text
    (tmp_path / "mixed.jsonl").write_text("\n".join([broken] * 3))
    assert "were bad" in error_of(run_stage, path, runs=tmp_path / "c")
    # Too few samples to say so while it runs.
    path = recipe(tmp_path, folder, data, **{**common, "steps": 1}, on_bad_sample="skip", max_bad_share=1.0)
    assert "4 of 4 samples were bad, nothing was learnt" in error_of(run_stage, path, runs=tmp_path / "d")
    assert not (tmp_path / "d").joinpath(path.stem, "model").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_length": 10}, ("max_length", "10")),
        ({"batch_size": 400, "steps": None, "epochs": 1}, ("no batch of 400",)),
        ({"model": "nano/text"}, ("nano/text", "has not been trained")),
        ({"model": "./gone"}, ("no such model folder: ./gone", "the bundled model is nano")),
        ({"tokenizer": "./gone"}, ("no such model folder: ./gone", "the bundled model is nano")),
        ({"data": ["gone.jsonl"]}, ("gone.jsonl",)),
        ({"data": [{"plate_world": "tex"}]}, ("'tex'", "noisy_captions")),
        ({"data": [{"plate_world": "captions", "questions": 2}]}, ("plate_world/captions", "instructions")),
        ({"data": [{"plate_world": "instructions", "questions": 0}]}, ("at least 1", "0")),
        ({"data": [{"plate_world": "alignment", "category_weights": {"boxes": 1}}]}, ("'boxes'", "caption, box")),
        ({"data": [{"plate_world": "alignment", "category_weights": {"box": 0}}]}, ("box", "positive")),
        ({"data": [{"plate_world": "captions", "size": [320, 96]}]}, ("plate_world/captions", "[320, 96]")),
        ({"data": [{"plate_world": "captions", "tiled_every": 0}]}, ("tiled_every", "at least 1")),
        ({"data": [{"plate_world": "captions", "odd_one": 1.5}]}, ("odd_one", "1.5")),
        ({"lora": {"groups": ["text"], "rank": 3}, "trains": []}, ("lora", "alpha")),
    ],
)
def test_a_stage_that_cannot_run_says_why(tmp_path, folder, data, changes, words):
    message = error_of(
        run_stage, recipe(tmp_path, folder, data, **changes), runs=tmp_path / "runs", kind=(ValueError, OSError)
    )
    assert all(word in message for word in words), message


# ---------------------------------------------------------------------------------------------- attention and compiling


@pytest.fixture
def graphs(monkeypatch):
    """Counts graphs that `compile_layers` makes, whose backend is the eager one: no C++ compiler is waited for."""
    seen: list[int] = []

    def compiled(*models, **options):
        compile_layers(*models, **{**options, "backend": count})

    def count(graph, inputs):
        seen.append(len(inputs))
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    monkeypatch.setattr("mono_internvl.training.trainer.compile_layers", compiled)
    torch.compiler.reset()
    yield seen
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("missing", "changes", "attention", "compiles", "row_length", "words"),
    [
        # What a recipe says by default, on a GPU and on a CPU.
        (None, {}, "flex_attention", True, 160, "layers compiled"),
        ("no CUDA device", {}, None, False, None, "no CUDA device"),
        (None, {"packing": False}, None, False, None, "rows differ in length"),
        (None, {"packing": False, "padding_free": True}, None, False, None, "another shape"),
        (None, {"attn_implementation": "sdpa"}, "sdpa", False, None, "another shape"),
        (None, {"attn_implementation": "eager"}, "eager", False, None, "only under flex_attention"),
        # A word of the recipe's own is kept.
        (None, {"compile": False}, "flex_attention", False, 160, "by the recipe"),
        (None, {"compile": True, "packing": False}, None, True, None, "rows differ in length"),
        ("no CUDA device", {"compile": True}, None, True, 160, "another shape"),
        ("no CUDA device", {"attn_implementation": "flex_attention"}, "flex_attention", False, 160, "no CUDA device"),
    ],
)
def test_what_auto_means(tmp_path, folder, data, monkeypatch, missing, changes, attention, compiles, row_length, words):
    monkeypatch.setattr("mono_internvl.training.backend.reason_not_to_compile", lambda: missing)
    backend = choose_backend(load_stage(recipe(tmp_path, folder, data, **changes)))
    assert backend[:3] == (attention, compiles, row_length)
    assert words in str(backend)


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_leave_the_choice_to_the_machine(name):
    stage = load_stage(name)
    assert (stage.compile, stage.attn_implementation) == ("auto", "auto")


def test_compile_is_a_word_or_a_truth_value():
    assert [load_stage("nano/text", {"compile": value}).compile for value in ("auto", "true", "false")] == [
        "auto",
        True,
        False,
    ]
    assert "compile: unknown value 'autos'; did you mean auto? Allowed: auto, true, false" in error_of(
        load_stage, "nano/text", {"compile": "autos"}
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("changes", [{"attn_implementation": "eager"}, {"packing": False, "max_length": 400}])
def test_compiled_layers_give_the_curve_of_layers_as_they_are(tmp_path, folder, data, graphs, checkpointing, changes):
    """Packs and padded rows, with and without activation checkpointing; the model saved has its names."""
    curves = {}
    for compiles in (False, True):
        runs = tmp_path / f"runs{compiles}"
        changes = {**changes, "compile": compiles, "gradient_checkpointing": checkpointing}
        out = run_stage(recipe(tmp_path, folder, data, trains=list(GROUPS[:2]), **changes), runs=runs)
        curves[compiles] = torch.tensor(losses(runs))
        assert bool(graphs) == compiles
    torch.testing.assert_close(curves[True], curves[False], atol=1e-5, rtol=0)
    assert set(load_file(out / "model.safetensors")) == set(load_file(folder / "model.safetensors"))


def enable_checkpointing(model) -> None:
    """Newer transformers call it otherwise."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})


def packs_of(processor, layouts: list[tuple[int, ...]], length: int) -> list[dict[str, torch.Tensor]]:
    """A batch of one pack for each layout, the tiles of its samples; padded to `length`."""
    collate, patches = PackCollator(2, length=length), processor.tokens_per_tile
    batches = []
    for tiles in layouts:
        pack = []
        for count in tiles:
            ids = torch.cat([torch.full((count * patches,), processor.image_token_id), torch.arange(5, 12 + count)])
            pixels = torch.randint(0, 256, (count, patches, 3 * 28 * 28), dtype=torch.uint8)
            pack.append({"input_ids": ids, "labels": ids.clone(), "pixel_values": pixels})
        batches.append(collate([pack]))
    return batches


@pytest.mark.parametrize("attention", ["flex_attention", "eager"])
def test_graphs_do_not_grow_with_the_numbers_of_tiles_and_samples(folder, processor, attention):
    """Three for all layers and packs: the first pack's, any other's, one's without a picture. As many with stochastic
    depth, whose rate differs from layer to layer, and one more for its first layer."""
    layouts = [(4, 1, 3), (2, 2), (1, 1, 1, 1, 1), (0, 0), (3,), (1, 4, 2, 0), (0,), (2, 0, 1, 3), (5, 2), (1, 2, 1)]
    batches = packs_of(processor, layouts, 160)
    # flex has no backward on a CPU.
    learns = attention != "flex_attention"
    for rate, most in ((0.0, 3), (0.4, 4)):
        model = MonoInternVLForCausalLM.from_pretrained(folder, attn_implementation=attention).train()
        model.config.text_config.drop_path_rate = rate
        for number, layer in enumerate(model.model.language_model.layers):
            layer.drop_path = make_drop_path(model.config.text_config, number)
        seen: list[int] = []
        torch.compiler.reset()

        def count(graph, inputs, seen=seen):
            seen.append(len(inputs))
            return graph

        compile_layers(model, backend=count, fullgraph=True)
        numbers = []
        for batch in batches:
            inputs = {name: batch[name] for name in ("input_ids", "position_ids", "pixel_values")}
            with torch.set_grad_enabled(learns):
                logits = model(**inputs, use_cache=False, logits_to_keep=torch.arange(9)).logits
            if learns:
                logits.sum().backward()
            numbers.append(len(seen))
        uncompile_layers(model)
        assert numbers[4:] == [numbers[4]] * 6 and 2 <= numbers[-1] <= most, numbers
        assert all("forward" not in layer.__dict__ for layer in model.model.language_model.layers)


def test_packs_are_filled_up_to_one_length_where_shapes_must_not_change(folder, processor):
    short, long = packs_of(processor, [(1,), (2, 2)], 100)
    for batch in (short, long):
        assert batch["input_ids"].shape == batch["loss_weights"].shape == (1, 100)
    model = MonoInternVLForCausalLM.from_pretrained(folder).eval()
    (unpadded,) = packs_of(processor, [(1,)], 0)
    unpadded["pixel_values"] = short["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model, short), loss_of(model, unpadded), atol=1e-6, rtol=0)


def test_flex_gets_one_dtype_under_autocast(folder, processor, monkeypatch):
    """Rotation leaves float32 queries and keys beside bfloat16 values, which no kernel of flex takes."""
    seen: list[set] = []
    flex = ALL_ATTENTION_FUNCTIONS["flex_attention"]

    def watched(module, query, key, value, *args, **kwargs):
        seen.append({query.dtype, key.dtype, value.dtype})
        return flex(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", watched)
    model = MonoInternVLForCausalLM.from_pretrained(folder, attn_implementation="flex_attention").train()
    (batch,) = packs_of(processor, [(1, 2)], 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss_of(model, batch)
    assert seen == [{torch.bfloat16}] * len(model.model.language_model.layers)


# ------------------------------------------------------------------------------------------------------------ resuming


def test_killed_and_resumed_gives_the_same_losses_and_weights(tmp_path, folder, data):
    path = recipe(
        tmp_path, folder, data, steps=12, save_steps=2, keep_checkpoints=3, batch_size=2, schedule="cosine", workers=1
    )
    whole = run_stage(path, runs=tmp_path / "whole")
    runs = train_and_kill(path, tmp_path / "killed", saved=2)
    # A kill in the middle of saving leaves this behind; it must not be taken for a checkpoint.
    (runs / "unfinished" / "checkpoint-99").mkdir(parents=True, exist_ok=True)
    resumed = run_stage(path, runs=tmp_path / "killed", resume=True)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    a, b = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "pass --resume" in error_of(run_stage, path, runs=tmp_path / "killed")


def test_a_resumed_run_says_what_it_does_otherwise(tmp_path, folder, data):
    """A rate or an order of the samples that changed on the way must not be a secret."""
    runs, lines = tmp_path / "runs", []

    def go_on(**changes):
        shutil.rmtree(runs / "stage" / "checkpoint-4", ignore_errors=True)
        path, lines[:] = recipe(tmp_path, folder, data, save_steps=2, **changes), []
        run_stage(path, runs=runs, resume=True, write=lines.append)
        return [line.strip() for line in lines if "checkpoint-2" in line or "passes over" in line]

    assert go_on() == go_on() == []
    assert go_on(learning_rate=5e-4) == ["learning_rate was 0.001 up to checkpoint-2; from there it is 0.0005"]
    told = go_on(batch_size=2, seed=1)
    assert told[:2] == [
        "batch_size was 4 up to checkpoint-2; from there it is 2",
        "seed was 0 up to checkpoint-2; from there it is 1",
    ]
    assert told[2].startswith("with another batch_size, seed the samples that it passes over are not those")
    # How long a sample may be decides what is in a pack, and nothing where each is a unit of its own.
    longer = "max_length was 160 up to checkpoint-2; from there it is 170"
    assert [line.partition(" the samples")[0] for line in go_on(max_length=170)] == [longer, "with another max_length"]
    alone = [*go_on(packing=False), *go_on(packing=False, max_length=170)]
    assert alone[1].startswith("with another packing the") and alone[-1].startswith("with another packing the")
    assert not (runs / "stage" / "model" / "recipe.json").exists()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, folder, data, monkeypatch):
    save, written = torch.save, []

    def full(content, file, *args, **kwargs):
        if Path(file).name == "rng_state.pth":
            written.append(file)
            if len(written) > 1:
                raise OSError(28, "No space left on device")
        save(content, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    path = recipe(tmp_path, folder, data, save_steps=2)
    with pytest.raises(OSError, match="No space left"):
        run_stage(path, runs=tmp_path / "runs")
    (kept,) = checkpoints(tmp_path / "runs" / "stage")
    assert kept.name == "checkpoint-2" and (kept / "optimizer.pt").exists()
    assert not (tmp_path / "runs" / "stage" / "unfinished").exists()


class _Watch(TrainerCallback):
    """What a callback sees when a checkpoint has been saved."""

    def __init__(self):
        self.seen: list[tuple] = []

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        told = json.loads((folder / "trainer_state.json").read_text())["best_model_checkpoint"]
        there = [path.name for path in checkpoints(Path(args.output_dir))]
        self.seen.append((state.global_step, told, state.best_model_checkpoint, there))


def test_callbacks_the_best_and_the_limit_see_a_checkpoint_by_its_last_name(tmp_path):
    """Losses of evaluation 3, 1, 2, 4: the second checkpoint is the best, and stays where the limit is two."""
    torch.manual_seed(0)
    rows = [{"x": torch.randn(3), "labels": torch.randn(1)} for _ in range(8)]
    found = iter((3.0, 1.0, 2.0, 4.0))

    class Module(torch.nn.Linear):
        def forward(self, x, labels):
            out = super().forward(x)
            return {"loss": (out - labels).square().mean(), "logits": out}

    watch = _Watch()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "runs"),
        max_steps=4,
        per_device_train_batch_size=2,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="told",
        greater_is_better=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = WholeCheckpoints(
        model=Module(3, 1),
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda prediction: {"told": next(found)},
        callbacks=[watch],
    )
    trainer.train()
    names = [f"checkpoint-{step}" for step in range(1, 5)]
    first, second = (str(tmp_path / "runs" / name) for name in names[:2])
    assert watch.seen == [
        (1, first, first, names[:1]),
        (2, second, second, names[:2]),
        (3, second, second, names[1:3]),
        (4, second, second, [names[1], names[3]]),
    ]
    assert arguments.output_dir == str(tmp_path / "runs") and arguments.save_total_limit == 2
    # The model at the end is the best one's.
    assert torch.equal(trainer.model.weight, load_file(Path(second) / "model.safetensors")["weight"])
    assert not torch.equal(trainer.model.weight, load_file(tmp_path / "runs/checkpoint-4/model.safetensors")["weight"])


# --------------------------------------------------------------------------------------------------- several processes

_FSDP = """
import gc, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from mono_internvl import MonoInternVLForCausalLM
from mono_internvl.common.compiling import compile_layers
from mono_internvl.training.groups import train_only
from mono_internvl.training.trainer import weighted_loss_sum
folder, batches, out, compiles = sys.argv[1:]
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
model = MonoInternVLForCausalLM.from_pretrained(folder).train()
train_only(model, ["visual_embedding", "visual_experts", "attention"])
for layer in model.model.language_model.layers:
    fully_shard(layer)
fully_shard(model)
assert all(isinstance(p, DTensor) for p in model.parameters())
graphs = []
if compiles:
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    compile_layers(model, backend=lambda graph, inputs: graphs.append(graph) or aot_eager(graph, inputs))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
losses = []
for step in torch.load(batches):
    total = sum(batch["loss_weights"].sum() for batch in step)
    batch = dict(step[rank])
    labels, weights = batch.pop("labels"), batch.pop("loss_weights")
    loss = weighted_loss_sum(model(**batch, use_cache=False).logits, labels, weights) / total
    (loss * world).backward()
    optimizer.step(); optimizer.zero_grad()
    loss = loss.detach(); dist.all_reduce(loss)
    losses.append(float(loss))
# First and later layers, with and without a picture, the first batch and any other.
assert bool(graphs) == bool(compiles) and len(graphs) <= 8, len(graphs)
if rank == 0:
    torch.save(losses, out)
# What FSDP hangs on the model holds the process group. Where that outlives the interpreter, its threads abort it
# (one time in ten, on a busy machine), so the model goes first.
del model, layer, optimizer, loss
gc.collect()
dist.destroy_process_group()
"""


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    return subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory, processor) -> Path:
    """A tiny dense language model with the nano's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=processor.image_token_ids[1],
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    folder = tmp_path_factory.mktemp("dense")
    LlamaForCausalLM(config).save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    return folder


def test_two_ddp_processes_give_the_curve_of_one(tmp_path, dense, data):
    """From a dense model, which one process expands; in some steps one rank sees only text."""
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    with_picture = [row for row in rows if isinstance(row.get("image"), str)]
    without = [row for row in rows if "image" not in row]
    for name, chosen in (("pictures", with_picture), ("text", without)):
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    changes = {"packing": False, "batch_size": 2, "steps": 6, "max_length": 400}
    start = {"patch": 0.02, "position": 1.0}
    changes["expand"] = {"vision_hidden_size": 16, "tile_size": 56, "max_tiles": "auto", "start": start}
    path = recipe(tmp_path, dense, data, data=[str(data / "text.jsonl"), str(data / "pictures.jsonl")], **changes)
    stage = load_stage(path)
    order = mixture(open_sources(stage.data), stage.seed)
    firsts = [next(order).source for _ in range(12)]
    assert any(a != b for a, b in zip(firsts[::2], firsts[1::2], strict=True)), "no step has a rank with text alone"
    trained = run_stage(path, runs=tmp_path / "one")
    assert MonoInternVLProcessor.from_pretrained(trained).image_processor.max_tiles == "auto"
    done = torchrun("-m", "mono_internvl", "train", str(path), "--runs", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "two")), torch.tensor(losses(tmp_path / "one")), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("compiles", ["", "compiled"])
def test_two_fsdp2_processes_give_the_curve_of_one(tmp_path, folder, processor, data, compiles):
    """As they are; and with compiled layers under activation checkpointing, whose hooks stay outside the graphs."""
    conversations = Conversations(open_sources([data / "train.jsonl"]), processor, max_tiles=4, max_length=400)
    collate = Collator(2, "token")
    # Rank 0 has pictures; rank 1 only text (records 2, 6, ...).
    steps = [
        [collate([conversations[Key(0, 4 * k)][1]]), collate([conversations[Key(0, 4 * k + 2)][1]])] for k in range(4)
    ]
    assert all(step[1]["pixel_values"].shape[0] == 0 < step[0]["pixel_values"].shape[0] for step in steps)
    torch.save(steps, tmp_path / "steps.pt")
    (tmp_path / "fsdp.py").write_text(_FSDP)
    paths = (tmp_path / "fsdp.py", folder, tmp_path / "steps.pt", tmp_path / "losses.pt")
    done = torchrun(*map(str, paths), compiles)
    assert done.returncode == 0, done.stderr

    from mono_internvl.training.groups import train_only

    model = MonoInternVLForCausalLM.from_pretrained(folder).train()
    train_only(model, ["visual_embedding", "visual_experts", "attention"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    single = []
    for step in steps:
        total, loss = sum(batch["loss_weights"].sum() for batch in step), torch.zeros(())
        for batch in step:
            inputs = {n: v for n, v in batch.items() if n not in ("labels", "loss_weights")}
            loss = loss + weighted_loss_sum(model(**inputs).logits, batch["labels"], batch["loss_weights"]) / total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        single.append(float(loss.detach()))
    torch.testing.assert_close(
        torch.tensor(torch.load(tmp_path / "losses.pt")), torch.tensor(single), atol=1e-5, rtol=0
    )


# ---------------------------------------------------------------------------------------------------------------- CUDA


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.mark.gpu
@pytest.mark.parametrize("config", ["ddp", "fsdp2", "deepspeed"])
def test_cuda_configs_run_on_one_gpu(cuda, tmp_path, folder, data, config):
    """DDP and the files of training/configs, two steps of one process: what a recipe does by default, and activation
    checkpointing; the curve is that of a run without any of them."""
    if config == "deepspeed":
        pytest.importorskip("deepspeed")
    changes = {"steps": 2, "bf16": True, "gradient_checkpointing": True, "drop_path": 0.0, "trains": list(GROUPS[:2])}
    path = recipe(tmp_path, folder, data, **changes)
    run_stage(path, {"compile": False, "attn_implementation": "sdpa"}, runs=tmp_path / "plain")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    if config == "ddp":
        # One process is none to accelerate, unless told so.
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    else:
        launch += ["--config_file", str(ROOT / "training" / "configs" / f"{config}.yaml")]
    command = [*launch, "-m", "mono_internvl", "train", str(path), "--runs", str(tmp_path / config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "attention flex_attention, layers compiled" in done.stderr
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / config)), torch.tensor(losses(tmp_path / "plain")), atol=2e-2, rtol=0
    )
    saved = MonoInternVLForCausalLM.from_pretrained(tmp_path / config / "stage" / "model")
    assert all(parameter.isfinite().all() for parameter in saved.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_cuda_graphs_of_a_run_do_not_grow(cuda, folder, processor, checkpointing):
    """Forward and backward under autocast, as the Trainer calls them; gradients as those of eager attention."""
    layouts = [(4, 1, 3), (2, 2), (1, 1, 1, 1, 1), (0, 0), (3,), (1, 4, 2, 0), (0,), (2, 0, 1, 3)]
    batches = packs_of(processor, layouts, 256)
    gradients, numbers = [], []
    for attention in ("eager", "flex_attention"):
        model = MonoInternVLForCausalLM.from_pretrained(folder, attn_implementation=attention).to("cuda").train()
        model.config.text_config.drop_path_rate = 0.0
        if attention == "flex_attention":
            if checkpointing:
                enable_checkpointing(model)
            torch.compiler.reset()
            torch._dynamo.utils.counters.clear()
            compile_layers(model)
        for batch in batches:
            inputs = {name: batch[name].cuda() for name in ("input_ids", "position_ids", "pixel_values")}
            with torch.autocast("cuda", torch.bfloat16):
                logits = model(**inputs, use_cache=False, logits_to_keep=torch.arange(40, device="cuda")).logits
            logits.float().square().mean().backward()
            if attention == "flex_attention":
                numbers.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    uncompile_layers(model)
    # The mask is made by a graph of its own.
    assert numbers[4:] == [numbers[4]] * 4 and numbers[-1] <= 8, numbers
    for name, expected in gradients[0].items():
        error = (gradients[1][name] - expected).norm() / expected.norm().clamp(min=1e-12)
        assert error < 0.05, (name, float(error))


# --------------------------------------------------------------------------------------------------------- plate world


@pytest.mark.parametrize("task", TASKS)
def test_plate_tasks_are_the_same_for_any_worker_and_can_be_encoded(task):
    processor = MonoInternVLProcessor.from_pretrained(ROOT)
    world, again = PlateWorld(task, 100, naming=1.0, block=4), PlateWorld(task, 100, naming=1.0, block=4)
    for index in (0, 1, 30, 70, 99):
        a, b = world[index], again[index]
        example = encode_conversation(processor, a.messages)
        if a.finish:
            a.finish(example, processor)
        assert torch.equal(example["pixel_values"], encode_conversation(processor, b.messages)["pixel_values"])
        visual = example["input_ids"] == processor.image_token_id
        assert visual.any() == (task != "text" and example["pixel_values"].shape[0] > 0)
        if a.finish:
            named = example["labels"][1:][visual[:-1]] != -100
            assert named.any()


def test_category_weights_and_questions_choose_what_is_asked():
    def answers(**options):
        world = PlateWorld("instructions", 200, **options)
        turns = [m["content"][0]["text"] for i in range(200) for m in world[i].messages if m["role"] == "assistant"]
        return sum("<box>" in turn for turn in turns) / len(turns), len(turns)

    share, count = answers()
    weighed, one_each = answers(questions=1, category_weights={"box": 1e6})
    assert one_each < count
    assert share < 0.3 < 0.5 < weighed


def test_every_second_block_is_of_larger_pictures_cut_into_tiles():
    world = PlateWorld("captions", 32, size=(320, 640), block=4, tiled_every=2, max_tiles=1)
    with pytest.raises(ValueError, match="several tiles"):
        world[0]
    world = PlateWorld("captions", 32, size=(96, 640), block=4, tiled_every=2, max_tiles=4)
    sizes = [picture_sizes(world[i].messages)[0] for i in range(32)]
    cut = [choose_grid(*size, tile_size=224, max_tiles=4) != (1, 1) for size in sizes]
    assert cut == [i % 8 < 4 for i in range(32)]
    assert max(max(size) for size in sizes) > 320


def test_the_patches_on_a_shape_are_named_in_its_tile_and_in_the_thumbnail():
    processor = MonoInternVLProcessor.from_pretrained(ROOT)
    plate = Plate(600, 200, (255, 255, 255), (Item("circle", "red", (420, 40, 560, 180)),))
    turns = [("<image>\nDescribe the image.", "a red circle")]
    picture = draw_plate(plate, random.Random(0))
    example = encode_conversation(processor, processor.conversation(turns, [picture]), max_tiles=3)
    before = example["labels"].clone()
    name_patches(example, processor, plate, (3, 1))
    (circle,) = processor.tokenizer.encode("circle", add_special_tokens=False)
    changed = (example["labels"] != before).nonzero()[:, 0]
    assert set(example["labels"][changed].tolist()) == {circle}
    # 25 pixels a patch in the third tile, which starts at 400; 75 x 25 in the thumbnail. The lower 60 % begin at 96.
    expected = [2 * 64 + row * 8 + column for row in (4, 5, 6) for column in range(1, 6)]
    expected += [3 * 64 + row * 8 + 6 for row in (4, 5, 6)]
    first = int((example["input_ids"] == processor.image_token_id).nonzero()[0])
    assert (changed - 1 - first).tolist() == expected


def test_curves_of_finished_and_running_stages(tmp_path):
    pytest.importorskip("matplotlib")

    def log(count):
        return [{"step": 10 * i, "loss": str(3 / i)} for i in range(1, count + 1)] + [{"train_runtime": "1"}]

    with pytest.raises(FileNotFoundError, match="holds no run of text, s1_1_concept"):
        curves.draw(tmp_path, tmp_path / "curves.png")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "log.json").write_text(json.dumps(log(12)))
    running = tmp_path / "s1_1_concept" / "checkpoint-70"
    running.mkdir(parents=True)
    (running / "trainer_state.json").write_text(json.dumps({"log_history": log(7)}))
    categories = {"shape": {"correct": 3, "total": 4}}
    found = {"categories": categories, "median_iou": 0.5}
    (tmp_path / "s1_1_concept" / "scores.json").write_text(json.dumps(found))
    assert curves.losses(tmp_path / "text")[0] == (50, pytest.approx(3 * (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 5))
    assert [step for step, _ in curves.losses(tmp_path / "s1_1_concept")] == [50, 70]
    assert curves.scores(tmp_path / "s1_1_concept") == {"shape": 75.0, "IoU": 50.0}
    curves.draw(tmp_path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_units_are_shared_out_whatever_the_number_of_processes(data):
    sources = open_sources([data / "train.jsonl"])

    def units():
        return ([key] for key in mixture(sources, 0))

    one = [[k._replace(pack=0) for k in batch] for batch in UnitBatches(units, 3, 4, 0, 1)]
    two = [list(UnitBatches(units, 3, 2, rank, 2)) for rank in (0, 1)]
    joined = [[k._replace(pack=0) for k in [*a, *b]] for a, b in zip(*two, strict=True)]
    assert one == joined


def test_a_batch_of_bad_samples_still_takes_part():
    batches = Batches(2, 4, packing=True, weighting="token")
    batch = batches([(Key(0, 0), BadSample("x, line 1: gone"))])
    assert batch["bad"] == ["x, line 1: gone"] and batch["loss_weights"].sum() == 0
    assert batch["pixel_values"].shape == (0, 4, 3 * 28 * 28)
