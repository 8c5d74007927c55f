"""The ablations in miniature: runs by name, what each has and trains, their records, tables and curves."""

import json
from dataclasses import replace

import pytest
import torch
import typer
from filelock import FileLock
from transformers import LlamaForCausalLM

from mono_internvl.plates.words import COLORS, SHAPES
from mono_internvl.training import ablations
from mono_internvl.training.ablations import TABLES, VARIANTS, SmallWorld, processor_of
from mono_internvl.training.data import encode_conversation
from mono_internvl.training.run import dense_config


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Two steps of four samples, few pictures, an untrained base and teacher."""
    for name, variant in VARIANTS.items():
        monkeypatch.setitem(VARIANTS, name, replace(variant, steps=2, pictures=6, points=min(variant.points, 2)))
    monkeypatch.setattr(ablations, "BATCH", 4)
    monkeypatch.setattr(ablations, "TEST_TEXTS", 8)
    work = tmp_path / "work"
    processor = processor_of()
    torch.manual_seed(0)
    LlamaForCausalLM(dense_config({**ablations.DENSE, "num_hidden_layers": 1}, processor)).save_pretrained(
        work / "base"
    )
    processor.tokenizer.save_pretrained(work / "base")

    def write_teacher(folder):
        from mono_internvl.training.teacher import MEAN, STD, make_model

        make_model(processor, 0).save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))

    monkeypatch.setattr(ablations, "make_teacher", write_teacher)
    return tmp_path / "results", work


def test_every_sample_of_the_small_world_is_encoded_and_its_patches_named():
    """Sheets, or a world that thinks of other tiles than the processor's, had made targets land elsewhere."""
    processor, world = processor_of(), SmallWorld(200, naming=1.0, seed=0)
    names = {processor.tokenizer.encode(word, add_special_tokens=False)[0] for word in SHAPES}
    for index in range(200):
        record = world[index]
        example = encode_conversation(processor, record.messages)
        record.finish(example, processor)
        visual = (example["input_ids"] == processor.image_token_id).nonzero().flatten()
        assert len(visual) == 16
        targets = [label for label in example["labels"][visual + 1].tolist() if label != -100]
        assert targets and set(targets) <= names


def test_patches_are_not_named_where_the_picture_is_cut_otherwise():
    processor, world = processor_of(), SmallWorld(10, naming=1.0, seed=0)
    world.grid_of = lambda width, height: (2, 1)
    record = world[0]
    example = encode_conversation(processor, record.messages)
    with pytest.raises(ValueError, match="16 visual tokens; in 2 x 1 tiles of 112 pixels it would have 48"):
        record.finish(example, processor)


def test_every_variant_starts_with_what_it_is_about_and_trains_it(quick):
    _, work = quick
    for name, variant in VARIANTS.items():
        if variant.start != "base":
            continue
        model, processor = ablations.start(name, 0, work)
        layer, config = model.model.language_model.layers[0], model.config
        assert (layer.visual_mlp is layer.mlp) == variant.shares
        assert config.visual_attention_experts == variant.expand.get("visual_attention_experts", "none")
        assert config.num_learnable_queries == processor.num_learnable_queries
        assert config.num_learnable_queries == variant.expand.get("num_learnable_queries", 0)
        assert config.text_config.expert_gates == variant.expand.get("expert_gates", False)
        assert processor.image_processor.tile_limit() == 1 and not processor.image_processor.use_thumbnail
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert any("learnable_queries" in n for n in trained) == ("queries" in name)
        assert any("output_gate" in n for n in trained) == ("gates" in name)
        assert any(".mlp.down_proj" in n for n in trained) == name.startswith("full")
        assert any(".q_proj" in n for n in trained) == name.startswith("full")


def test_runs_leave_records_go_on_from_each_other_and_are_not_repeated(quick, monkeypatch, capsys):
    results, work = quick
    ablations.main(results, seeds="0", only="queries-distilled-gates,v1", work=work)
    assert sorted(path.name for path in results.iterdir()) == [
        "experts-0.json",
        "queries-distilled-gates-0.json",
        "v1-0.json",
    ]
    record = json.loads((results / "experts-0.json").read_text())
    assert record["steps"] == 2 and [point["samples"] for point in record["on_the_way"]] == [4]
    assert set(record["vision"]) == {"shape", "color", "position"}
    assert record["text_perplexity_before"] == record["text_perplexity_after"]  # nothing of the text trains
    aligned = json.loads((results / "v1-0.json").read_text())
    assert aligned["text_perplexity_before"] != aligned["text_perplexity_after"]
    monkeypatch.setattr(ablations, "run", lambda *args: pytest.fail("was there already"))
    ablations.main(results, seeds="0", only="v1,queries-distilled-gates", work=work)
    assert "| v1 | 1 | 16 |" in capsys.readouterr().out  # its own 8 samples and those of the run before it


def test_a_run_of_another_process_is_passed_over(quick):
    results, work = quick
    with FileLock(work / "experts-0.lock"):
        ablations.main(results, seeds="0", only="no-experts,v1", work=work)
    assert [path.name for path in results.iterdir()] == ["no-experts-0.json"]


def test_names_that_no_run_has_are_refused(tmp_path):
    with pytest.raises(typer.BadParameter, match="unknown variant expert; allowed are the tables full-or-delta"):
        ablations.main(tmp_path, only="expert")


def test_tables_and_curves_are_means_and_spreads_of_the_records(tmp_path):
    def write(name, seed, on_the_way, last):
        def vision(share):
            return dict.fromkeys(("shape", "color", "position"), share)

        points = [{"samples": 10 * (i + 1), "vision": vision(share)} for i, share in enumerate(on_the_way)]
        record = {"steps": VARIANTS[name].steps, "vision": vision(last), "on_the_way": points}
        record |= {"text_perplexity_before": 1.5, "text_perplexity_after": 2.0}
        (tmp_path / f"{name}-{seed}.json").write_text(json.dumps(record))

    with pytest.raises(FileNotFoundError, match="measured on the way"):
        ablations.draw_curves(tmp_path, tmp_path / "curves.png")
    for seed, last in enumerate((0.5, 0.6, 0.7)):
        write("experts", seed, [0.3], last)
        write("experts-qkv", seed, [0.4], 0.8)
    lines = ablations.table(tmp_path, TABLES["experts"]).splitlines()
    cell = "60.0 ± 10.0"
    assert lines[2] == f"| experts | 3 | 32,000 | {cell} | {cell} | {cell} | {cell} | 1.500 | 2.000 |"
    assert lines[3].startswith("| experts-qkv | 3 |") and len(lines) == 4
    assert ablations._curve(ablations.records_of("experts", tmp_path))[0] == (10, pytest.approx(30), 0)
    ablations.draw_curves(tmp_path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_every_table_names_runs_and_every_new_run_stands_in_one():
    assert {name for rows in TABLES.values() for name in rows} == set(VARIANTS)
    assert len(COLORS) > len(SHAPES)  # chance of the tables' text: one in four shapes, one in seven colours
