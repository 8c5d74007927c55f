"""Stages with learnable queries: where they stand, at which rates groups learn, and what is saved and resumed."""

import inspect
import json
import shutil

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, TrainingArguments

from helpers_cli import run
from helpers_families import make_base
from helpers_training import train_and_kill
from mono_internvl import MonoInternVLConfig, MonoInternVLForCausalLM, MonoInternVLProcessor
from mono_internvl.common.models import ModelError, load_config, load_model
from mono_internvl.common.parameters import group_of
from mono_internvl.conversion import expand_checkpoint
from mono_internvl.queries_mono_internvl import check_same_queries
from mono_internvl.training.checkpoints import checkpoints
from mono_internvl.training.groups import train_only
from mono_internvl.training.run import run_stage
from mono_internvl.training.stages import EXPAND_OPTIONS, load_stage, read_group_rates, recipe_names
from mono_internvl.training.trainer import Distilling, EViPTrainer


SMALL = {"tile_size": 56, "vision_hidden_size": 16}
BOTH = {"num_learnable_queries": 5, "query_grids": [2, 1], "expert_gates": True}
KEPT = ("step", "loss", "grad_norm", "learning_rate", "distillation_loss")
EVERYTHING = ["visual_embedding", "visual_experts", "expert_gates", "learnable_queries", "attention", "text"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A dense Qwen2 with a chat template."""
    folder = tmp_path_factory.mktemp("base") / "qwen2"
    make_base(folder, "qwen2", max_position_embeddings=512)
    return folder


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """It with queries and gates."""
    out = tmp_path_factory.mktemp("expanded") / "model"
    expand_checkpoint(base, out, **SMALL, **BOTH)
    return out


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "clip"
    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision, text = (
        {**sizes, "image_size": 28, "patch_size": 7},
        {**sizes, "vocab_size": 50, "max_position_embeddings": 8},
    )
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(out)
    settings = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (out / "preprocessor_config.json").write_text(json.dumps(settings))
    return out


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Twelve: one picture, two pictures, none."""
    root = tmp_path_factory.mktemp("records")
    rows = []
    for number in range(12):
        names = [f"{number}-{k}.png" for k in range((1, 2, 0, 1)[number % 4])]
        for k, name in enumerate(names):
            Image.new("RGB", ((60, 60), (120, 60))[k], ("red", "blue", "green")[number % 3]).save(root / name)
        turns = [{"from": "human", "value": "<image>" * len(names) + "How many circles?"}]
        row = {
            "id": number,
            "conversations": [*turns, {"from": "gpt", "value": ("17", "Two", "red circles")[number % 3]}],
        }
        rows.append({**row, "image": names} if names else row)
    (root / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return root / "train.jsonl"


@pytest.fixture
def recipe(tmp_path, folder, records):
    def write(**changes):
        content = {
            **{"model": str(folder), "data": [str(records)], "trains": EVERYTHING, "max_tiles": 2, "max_length": 250},
            **{"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "bf16": False, "gradient_checkpointing": False},
            **{"workers": 0, "log_steps": 1, **changes},
        }
        path = tmp_path / "stage.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def logged(runs, key="loss"):
    return [entry[key] for entry in json.loads((runs / "stage" / "log.json").read_text()) if key in entry]


def ask(model, processor, text="How many?"):
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    return processor.apply_chat_template(talk, add_generation_prompt=True)


# ----------------------------------------------------------------------------------------------------- where they stand


@pytest.mark.parametrize("layout", [{"packing": True}, {"packing": False}, {"packing": False, "padding_free": True}])
@pytest.mark.parametrize("placement", [None, "image", "question"])
def test_a_stage_moves_the_queries_and_saves_where_they_are(tmp_path, recipe, teacher, placement, layout):
    path = recipe(query_placement=placement, distillation={"teacher": str(teacher)}, **layout)
    out = run_stage(path, runs=tmp_path / "runs")
    model, processor = load_model(str(out), device="cpu")
    wanted = placement or "image"
    assert model.config.query_placement == processor.query_placement == wanted
    check_same_queries(model.config, processor)
    assert ask(model, processor).count("How many?") == (2 if wanted == "question" else 1)
    # With either place blocks stand for single pictures; a question about two has none to learn from.
    assert any(value > 0 for value in logged(tmp_path / "runs", "distillation_loss"))
    assert isinstance(model.chat(Image.new("RGB", (56, 56), "red"), "How many?", max_new_tokens=3), str)
    assert json.loads((out / "config.json").read_text())["query_placement"] == wanted
    assert json.loads((out / "processor_config.json").read_text())["query_placement"] == wanted
    (kept,) = checkpoints(tmp_path / "runs" / "stage")
    assert MonoInternVLConfig.from_pretrained(kept).query_placement == wanted
    assert MonoInternVLProcessor.from_pretrained(kept).query_placement == wanted


def test_the_next_stage_goes_on_from_where_they_stood(tmp_path, recipe):
    first = run_stage(recipe(query_placement="question"), runs=tmp_path / "a")
    second = run_stage(recipe(model=str(first)), runs=tmp_path / "b")
    assert MonoInternVLProcessor.from_pretrained(second).query_placement == "question"
    third = run_stage(recipe(model=str(second), query_placement="image"), runs=tmp_path / "c")
    assert load_config(str(third)).query_placement == "image"


def test_an_expanding_stage(tmp_path, base, recipe, teacher):
    options = {"model": str(base), "expand": {**SMALL, **BOTH}, "distillation": {"teacher": str(teacher)}}
    lines = []
    out = run_stage(recipe(**options, query_placement="question"), runs=tmp_path / "runs", write=lines.append)
    assert load_config(str(out)).query_placement == "question"
    assert any("learnable_queries" in line and " 320 " in line for line in lines)
    # Made once, and again where the recipe says another thing before anything was trained.
    record = tmp_path / "runs" / "stage" / "expanded.json"
    assert json.loads(record.read_text())["num_learnable_queries"] == 5
    other = {**options, "expand": {**SMALL, "num_learnable_queries": 4}}
    other["trains"] = [group for group in EVERYTHING if group != "expert_gates"]
    with pytest.raises(ValueError, match=r"checkpoints of a model that was expanded with .*num_learnable_queries.: 5"):
        run_stage(recipe(**other), runs=tmp_path / "runs", resume=True)
    for path in checkpoints(tmp_path / "runs" / "stage"):
        path.rename(tmp_path / path.name)
    again = run_stage(recipe(**other), runs=tmp_path / "runs")
    assert load_config(str(again)).num_learnable_queries == 4


def test_a_tokenizer_of_another_model_is_refused(tmp_path, base, recipe):
    plain = tmp_path / "plain"
    expand_checkpoint(base, plain, **SMALL)
    with pytest.raises(ValueError, match="the model has .*5.* but the processor .*0"):
        run_stage(recipe(tokenizer=str(plain)), runs=tmp_path / "runs")
    with pytest.raises(ValueError, match="query_placement: the model has no learnable queries"):
        run_stage(
            recipe(model=str(plain), query_placement="image", trains=["visual_embedding"]), runs=tmp_path / "runs"
        )


def test_lora_with_queries_that_move(tmp_path, folder, recipe):
    peft = pytest.importorskip("peft")
    path = recipe(query_placement="question", trains=[], lora={"groups": ["attention", "text"], "r": 4})
    out = run_stage(path, runs=tmp_path / "runs")
    # The base stays as it is; the adapter's processor says where it learnt to have them.
    assert load_config(str(folder)).query_placement == "image" and load_config(str(out)).query_placement == "question"
    model, processor = load_model(str(out), device="cpu")
    assert model.config.query_placement == processor.query_placement == "question"
    direct = MonoInternVLForCausalLM.from_pretrained(out)
    picture = Image.new("RGB", (56, 56), "red")
    assert direct.config.query_placement == "question"
    assert direct.chat(picture, "How many?", max_new_tokens=4) == model.chat(
        picture, "How many?", max_new_tokens=4, processor=processor
    )
    assert run("merge", out, tmp_path / "merged").exit_code == 0
    merged, own = load_model(str(tmp_path / "merged"), device="cpu")
    assert merged.config.query_placement == own.query_placement == "question"
    # Who puts adapters over the base themselves is told that the two do not agree.
    wrapped = peft.PeftModel.from_pretrained(MonoInternVLForCausalLM.from_pretrained(folder), out).merge_and_unload()
    with pytest.raises(ValueError, match="'query_placement': 'image'.*'query_placement': 'question'"):
        wrapped.chat(picture, "How many?", processor=processor)
    (out / "processor_config.json").write_text(
        (out / "processor_config.json").read_text().replace('"num_learnable_queries": 5', '"num_learnable_queries": 4')
    )
    with pytest.raises(ModelError, match="the model has .*5.* but the processor .*4"):
        load_model(str(out), device="cpu")
    with pytest.raises(ValueError, match="the model has no linear layers of learnable_queries"):
        run_stage(recipe(trains=[], lora={"groups": ["learnable_queries"]}), runs=tmp_path / "other")


# ---------------------------------------------------------------------------------------------------- rates of groups


def trainer_of(model, tmp_path, rates, **arguments):
    arguments = TrainingArguments(
        **{"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "learning_rate": 1e-3, **arguments}
    )
    data = {"conversations": None, "batches": None, "micro_batches": None}
    return EViPTrainer(model=model, args=arguments, group_rates=rates, **data)


def test_groups_have_rates_of_their_own_in_every_step_of_a_schedule(tmp_path, folder):
    model = MonoInternVLForCausalLM.from_pretrained(folder)
    train_only(model, ["visual_embedding", "visual_experts", "expert_gates"])
    rates = {"visual_embedding": 1e-2, "expert_gates": 5e-4}
    trainer = trainer_of(model, tmp_path, rates, weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=2)
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(10)
    names = {id(p): name for name, p in model.named_parameters()}
    seen = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in seen
            seen[id(parameter)] = group["initial_lr"], group["weight_decay"]
    assert set(seen) == {id(p) for p in model.parameters() if p.requires_grad}
    for key, (rate, decay) in seen.items():
        name = names[key]
        expected = 5e-4 if "output_gate" in name else 1e-2 if "vision_" in name or "projector" in name else 1e-3
        assert rate == expected, name
        assert (decay == 0.0) == (name.endswith("bias") or "layer_norm" in name), name
    # What is logged is the recipe's rate, and all follow one schedule.
    assert optimizer.param_groups[0]["initial_lr"] == 1e-3
    optimizer.step()
    scheduler.step()
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(group["initial_lr"] * 0.5)
    plain = trainer_of(model, tmp_path, {}).create_optimizer()
    assert len(plain.param_groups) == 2


def test_a_rate_is_what_its_group_learns_with(tmp_path, recipe, folder):
    """The first step of AdamW moves every weight by the rate, whatever its gradient."""
    path = recipe(
        group_learning_rates={"visual_embedding": "4e-3", "learnable_queries": 1e-4},
        **{"steps": 1, "weight_decay": 0.0, "schedule": "constant_with_warmup"},
    )
    lines = []
    out = run_stage(path, runs=tmp_path / "runs", write=lines.append)
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")

    def moved(name):
        return (after[name] - before[name]).abs().max().item()

    assert moved("model.vision_embeddings.patch_embedding.weight") == pytest.approx(4e-3, rel=0.02)
    assert moved("model.learnable_queries.weight") == pytest.approx(1e-4, rel=0.02)
    assert moved("model.language_model.layers.0.mlp.up_proj.weight") == pytest.approx(1e-3, rel=0.02)
    assert any(line.split()[0] == "visual_embedding" and line.endswith("trains at 4.0e-03") for line in lines)
    assert any(line.split()[0] == "text" and line.endswith("trains") for line in lines)


@pytest.mark.parametrize("limit", [0, 1e-4])
def test_the_gradients_of_a_trained_projection_are_clipped_too(tmp_path, recipe, teacher, limit, monkeypatch):
    norms, end_step = [], Distilling.on_optimizer_step

    def note_norm(self, *args, **kwargs):
        gradients = [parameter.grad for parameter in self.trainer.distiller.parameters]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return end_step(self, *args, **kwargs)

    monkeypatch.setattr(Distilling, "on_optimizer_step", note_norm)
    distillation = {"teacher": str(teacher), "projection": "trained"}
    run_stage(recipe(steps=2, max_grad_norm=limit, distillation=distillation), runs=tmp_path)
    assert len(norms) == 2
    for norm in norms:
        assert norm == pytest.approx(limit, rel=0.02) if limit else norm > 1e-3


def test_killed_and_resumed_with_rates_and_a_teacher(tmp_path, recipe, teacher):
    path = recipe(
        **{"steps": 8, "save_steps": 2, "keep_checkpoints": 3, "query_placement": "question"},
        group_learning_rates={"visual_embedding": 4e-3, "expert_gates": 1e-4},
        distillation={"teacher": str(teacher), "projection": "trained"},
    )
    whole = run_stage(path, runs=tmp_path / "whole")
    train_and_kill(path, tmp_path / "killed", saved=1)
    resumed = run_stage(path, runs=tmp_path / "killed", resume=True)
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    a, b = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert load_config(str(resumed)).query_placement == "question"


def retrained_teacher(teacher, folder):
    """One of the same shapes; weights and nothing else are others."""
    shutil.copytree(teacher, folder)
    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor + 1e-3 if tensor.ndim == 2 else tensor for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_run_without_a_teacher_does_not_go_on_with_one(tmp_path, recipe, teacher):
    run_stage(recipe(steps=2, save_steps=1), runs=tmp_path)
    shutil.rmtree(tmp_path / "stage" / "checkpoint-2")
    with pytest.raises(ValueError, match="is of a run with no distillation: go on"):
        path = recipe(steps=2, save_steps=1, distillation={"teacher": str(teacher)})
        run_stage(path, runs=tmp_path, resume=True)


@pytest.mark.parametrize("projection", ["random", "trained"])
def test_resumed_in_the_middle_it_is_the_run_that_it_was(tmp_path, recipe, teacher, projection):
    runs = tmp_path / "runs"
    distillation = {"teacher": str(teacher), "projection": projection}
    path = recipe(steps=4, save_steps=2, distillation=distillation)

    def finished():
        newest = runs / "stage" / "checkpoint-4"
        files = (newest / "model.safetensors", newest / "distillation.safetensors")
        weights = [load_file(file) for file in files if file.exists()]
        log = json.loads((runs / "stage" / "log.json").read_text())
        shutil.rmtree(newest)
        return weights, [{key: entry[key] for key in KEPT} for entry in log if "loss" in entry]

    run_stage(path, runs=runs)
    whole, log = finished()
    assert len(log) == 4 and len(whole) == (1 if projection == "random" else 2)
    other = "random" if projection == "trained" else "trained"
    retrained = retrained_teacher(teacher, tmp_path / "retrained")
    for changed, message in (
        ({**distillation, "projection": other}, f"projection {projection}, not {other}: go on"),
        ({**distillation, "seed": 1}, "seed 0, not 1: go on"),
        (None, "is of a run with distillation from .*, and the recipe has none"),
        ({**distillation, "teacher": str(retrained)}, "another teacher: .* had other weights than .*retrained"),
    ):
        with pytest.raises(ValueError, match=message):
            run_stage(recipe(steps=4, save_steps=2, distillation=changed), runs=runs, resume=True)
    # The same teacher in another folder is the same.
    moved = {**distillation, "teacher": str(shutil.copytree(teacher, tmp_path / "moved"))}
    run_stage(recipe(steps=4, save_steps=2, distillation=moved), runs=runs, resume=True)
    assert finished()[1] == log
    run_stage(recipe(steps=4, save_steps=2, distillation=distillation), runs=runs, resume=True)
    again, log_again = finished()
    assert log_again == log
    for a, b in zip(whole, again, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_teacher_that_is_not_there_is_missed_before_anything_is_made(tmp_path, base, recipe):
    path = recipe(model=str(base), expand=dict(BOTH), distillation={"teacher": "runs/nano-breen/teacher"})
    with pytest.raises(ValueError, match="the teacher runs/nano-breen/teacher cannot be loaded: no such folder"):
        run_stage(path, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_teacher_sees_pictures_whole(tmp_path, folder, recipe, teacher):
    without = tmp_path / "without"
    shutil.copytree(folder, without)
    processor = MonoInternVLProcessor.from_pretrained(without)
    processor.image_processor.use_thumbnail = False
    processor.save_pretrained(without)
    options = {"model": str(without), "distillation": {"teacher": str(teacher)}, "steps": 1}
    with pytest.raises(ValueError, match="the teacher sees the thumbnail, and the processor makes none"):
        run_stage(recipe(**options), runs=tmp_path / "runs")
    assert run_stage(recipe(**options, max_tiles=1), runs=tmp_path / "runs").is_dir()


# -------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expand": {"tile_sise": 56}}, "expand: unknown option 'tile_sise'; did you mean tile_size"),
        ({"expand": {"visual_attention_experts": "qkv"}}, "it stands beside expand, not in it"),
        ({"expand": {"num_learnable_queries": 7}}, r"expand: query_grids=\[2\] must be sides of squares of 7 queries"),
        ({"expand": {"query_grids": [2]}}, "expand: query_grids=.* need num_learnable_queries"),
        ({"query_placement": "end"}, "query_placement: unknown value 'end' Allowed: image, question"),
        ({"query_placement": "image"}, "query_placement: the model gets no learnable queries"),
        ({"distillation": {"teacher": "x"}}, "distillation: the model gets no learnable queries"),
        ({"group_learning_rates": {"text": 1e-4}}, "text does not train; those that do: visual_embedding, visual_exp"),
        ({"group_learning_rates": {"visual_experts": 0}}, "visual_experts: 0.0 must be positive"),
        ({"group_learning_rates": {"visual_experts": "fast"}}, "visual_experts: 'fast' is not float"),
    ],
)
def test_a_recipe_with_a_mistake_says_which(changes, message):
    with pytest.raises(ValueError, match=message):
        load_stage("nano/s1_1_concept", changes)


def test_options_of_an_expansion_are_those_that_there_are():
    known = set(inspect.signature(expand_checkpoint).parameters)
    beside = {"source", "destination", "progress", "visual_attention_experts"}
    assert known - beside == set(EXPAND_OPTIONS) - {"start", "max_tiles"}


def test_a_dense_model_has_no_queries_to_place():
    with pytest.raises(ValueError, match="query_placement: not for a dense model"):
        load_stage("nano/text", {"query_placement": "image"})
    assert all(load_stage(name) for name in recipe_names())


def test_the_numbers_of_the_released_scripts_stand_in_the_recipes():
    first, second, third = (load_stage(f"breen/{name}") for name in ("s1_experts", "s2_pretraining", "s3_instruction"))
    for stage in (first, second, third):
        assert (stage.epochs, stage.schedule, stage.weight_decay, stage.max_length) == (1, "cosine", 0.0, 2048)
        assert stage.distillation == {
            **{"teacher": "openai/clip-vit-large-patch14-336", "weight": 1.0, "projection": "random"}
        }
    assert first.model == "Qwen/Qwen2.5-7B-Instruct" and first.expand["query_grids"] == [8, 6]
    assert first.trains == ("visual_embedding", "visual_experts", "expert_gates")
    assert set(second.trains) == set(third.trains) == set(EVERYTHING)
    rates = [(stage.learning_rate, stage.warmup, stage.batch_size) for stage in (first, second, third)]
    assert rates == [(4e-5, 0.03, 1024), (4e-5, 0.01, 1024), (2e-5, 0.01, 256)]
    assert read_group_rates(first) == {"visual_embedding": 4e-4}
    assert first.expand["query_placement"] == second.query_placement == "image" != third.query_placement == "question"


def test_the_nano_s_path(tmp_path, teacher, monkeypatch):
    """Each stage starts from what the one before wrote, one step each; what is frozen in S1 stays as it was."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "nano-breen").mkdir(parents=True)
    (tmp_path / "runs" / "nano-breen" / "teacher").symlink_to(teacher)
    small = {"steps": 1, "batch_size": 2}
    run_stage("nano/text", small)
    with pytest.raises(FileNotFoundError, match="nano-breen/s1_experts has not been trained"):
        run_stage("nano-breen/s2_pretraining", small)
    stages = {}
    for name in ("s1_experts", "s2_pretraining", "s3_instruction"):
        stages[name] = run_stage(f"nano-breen/{name}", small)
        model, processor = load_model(str(stages[name]), device="cpu")
        assert model.config.query_grids == [4, 2] and model.config.text_config.expert_gates
        assert processor.query_placement == ("question" if name == "s3_instruction" else "image")
    expanded, first = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "runs/nano-breen/s1_experts/expanded", stages["s1_experts"])
    )
    for key, tensor in expanded.items():
        trained = group_of(key) in ("visual_embedding", "visual_experts", "expert_gates")
        assert trained or torch.equal(tensor.to(torch.bfloat16), first[key]), key
