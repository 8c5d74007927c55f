"""A teacher's features reach the learnable queries in training, and nothing of it stays behind."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    TrainingArguments,
    ViTMAEConfig,
    ViTMAEModel,
)

from conftest import IMAGE, tiny_config, tiny_model
from mono_internvl.image_processing_mono_internvl import unpatchify
from mono_internvl.training.data import PackCollator
from mono_internvl.training.distillation import Distillation, Distiller, Teacher, find_blocks, read_distillation
from mono_internvl.training.stages import load_stage
from mono_internvl.training.trainer import EViPTrainer


QUERY = 118
QUERIES = {"num_learnable_queries": 5, "query_grids": [2, 1], "query_token_id": QUERY}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def write_teacher(folder, kind="clip"):
    torch.manual_seed(7)
    vision = {**SMALL, "image_size": 28, "patch_size": 7}
    if kind == "clip":
        text = {**SMALL, "vocab_size": 50, "max_position_embeddings": 8}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    elif kind == "siglip":
        model = SiglipVisionModel(SiglipVisionConfig(**vision))
    else:
        model = Dinov2Model(Dinov2Config(**{k: v for k, v in vision.items() if k != "intermediate_size"}))
    model.save_pretrained(folder)
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model.eval()


@pytest.fixture
def clip(tmp_path):
    write_teacher(tmp_path)
    return str(tmp_path)


def prompt(*tiles_of_pictures, answer=(9, 15, 4)):
    ids = [1, 7]
    for tiles in tiles_of_pictures:
        ids += [111, *[IMAGE] * 4 * tiles, 112, *[QUERY] * 5]
    return torch.tensor([*ids, *answer])


def patches(count, seed=0):
    return torch.randint(0, 256, (count, 4, 2352), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_a_teacher_sees_the_whole_picture_in_float32(tmp_path, kind):
    model = write_teacher(tmp_path, kind)
    teacher = Teacher(str(tmp_path), torch.device("cpu"))
    pictures = torch.rand(2, 3, 28, 28)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = teacher(pictures)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    tower = getattr(model, "vision_model", model)
    with torch.no_grad():
        tokens = tower(pixel_values=(pictures - mean) / std).last_hidden_state
    assert tokens.shape[1] == (16 if kind == "siglip" else 17)
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens[:, -16:], atol=1e-5, rtol=1e-5)
    assert features.dtype == torch.float32 and not any(p.requires_grad for p in teacher.tower.parameters())
    assert teacher(torch.rand(1, 3, 56, 56)).shape == (1, 32, 4, 4)


def test_blocks_and_the_tile_that_shows_their_picture_whole():
    config = tiny_config(**QUERIES)
    row = torch.cat([prompt(3, 1), prompt(), prompt(2)])
    other = torch.cat([prompt(1), torch.full((len(row) - len(prompt(1)),), 2)])
    found = [tuple(block) for block in find_blocks(torch.stack([row, other]), config)]
    first = (row == QUERY).nonzero().flatten()[[0, 5, 10]].tolist()
    assert found == [(0, first[0], 2), (0, first[1], 3), (0, first[2], 5), (1, 8, 6)]
    # A block behind two pictures stands for neither.
    two = torch.tensor([[111, *[IMAGE] * 4, 112, 111, *[IMAGE] * 4, 112, 9, *[QUERY] * 5, 9, 4]])
    assert list(find_blocks(two, config)) == []


def test_the_loss_is_one_minus_the_mean_cosine_of_each_grid(clip):
    config = tiny_config(**QUERIES)
    distiller = Distiller(Distillation(clip), config, torch.device("cpu"))
    ids, pixels = prompt(2)[None], patches(2)
    hidden = torch.randn(1, ids.shape[1], 64, requires_grad=True)
    loss = distiller.loss(hidden, ids, pixels)

    features = distiller.teacher(unpatchify(pixels[1:]).float() / 255)
    start = int((ids[0] == QUERY).nonzero()[0])
    expected = 0.0
    for side, offset in ((2, 0), (1, 4)):
        pooled = F.avg_pool2d(features, 4 // side).flatten(2).transpose(1, 2)[0]
        targets = F.layer_norm(pooled, (32,)) @ distiller.projection.linear.weight.T
        states = hidden[0, start - 1 + offset : start - 1 + offset + side * side]
        expected = expected + 1 - F.cosine_similarity(states, targets, dim=-1).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    touched = hidden.grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert touched == list(range(start - 1, start + 4))
    # The same from pixels that are normalised, and from another stretch of one batch.
    mean, std = (torch.tensor(x).view(3, 1) for x in (config.vision_config.image_mean, config.vision_config.image_std))
    floats = ((pixels.float() / 255).view(2, 4, 3, 784) - mean) / std
    torch.testing.assert_close(distiller.loss(hidden, ids, floats.view(2, 4, 2352)), loss, atol=1e-5, rtol=1e-5)
    assert distiller.loss(hidden, prompt()[None], pixels[:0]) == 0
    # Drawn from a seed: the next run of the same recipe has the same targets.
    again = Distiller(Distillation(clip), config, torch.device("cpu"))
    assert torch.equal(again.projection.linear.weight, distiller.projection.linear.weight)
    other = Distiller(Distillation(clip, seed=1), config, torch.device("cpu"))
    assert not torch.equal(other.projection.linear.weight, distiller.projection.linear.weight)


def trainer_of(model, distiller, tmp_path, **arguments):
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[], **arguments)
    data = {"conversations": None, "batches": None, "micro_batches": None}
    return EViPTrainer(model=model, args=arguments, distiller=distiller, **data)


def examples():
    made = []
    for seed, ids in enumerate((prompt(1), prompt(2, 1), prompt(1, answer=(5, 6, 7, 8, 9)))):
        labels = torch.full_like(ids, -100)
        labels[-3:] = ids[-3:]
        tiles = int((ids == IMAGE).sum()) // 4
        made.append({"input_ids": ids, "labels": labels, "pixel_values": patches(tiles, seed)})
    return made


def test_the_trainers_loss_does_not_depend_on_micro_batches(clip, tmp_path):
    model = tiny_model(**QUERIES).train()
    distiller = Distiller(Distillation(clip, weight=2.0), model.config, torch.device("cpu"))
    trainer = trainer_of(model, distiller, tmp_path)
    collate = PackCollator(2, "token")
    whole = collate([examples()])
    parts = [collate([[example]]) for example in examples()]

    def gradients(batches):
        model.zero_grad()
        items = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
        total = 0.0
        for batch in batches:
            loss = trainer.compute_loss(model, batch, num_items_in_batch=items)
            loss.backward()
            total += loss.item()
        return total, {n: p.grad.clone() for n, p in model.named_parameters()}

    (one, of_whole), (three, of_parts) = gradients([whole]), gradients(parts)
    assert one == pytest.approx(three, rel=1e-5)
    for name, gradient in of_whole.items():
        torch.testing.assert_close(gradient, of_parts[name], atol=1e-6, rtol=1e-4, msg=name)
    assert of_whole["model.learnable_queries.weight"].abs().sum() > 0

    plain = trainer_of(model, None, tmp_path)
    bare = plain.compute_loss(model, whole, num_items_in_batch=plain._get_num_items_in_batch([whole], "cpu")).item()
    with torch.no_grad():
        hidden = model.model(
            input_ids=whole["input_ids"], position_ids=whole["position_ids"], pixel_values=whole["pixel_values"]
        ).last_hidden_state
    distilled = distiller.loss(hidden, whole["input_ids"], whole["pixel_values"]).item() / 4
    assert one == pytest.approx(bare + 2.0 * distilled, rel=1e-4)


def test_a_trained_projection_is_optimised_and_kept_in_checkpoints_alone(clip, tmp_path):
    model = tiny_model(**QUERIES)
    distiller = Distiller(Distillation(clip, projection="trained"), model.config, torch.device("cpu"))
    trainer = trainer_of(model, distiller, tmp_path)
    optimizer = trainer.create_optimizer()
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in distiller.projection.parameters()} <= optimised
    trainer.save_model(str(tmp_path / "checkpoint"), _internal_call=True)
    trainer.save_model(str(tmp_path / "finished"))
    kept = load_file(tmp_path / "checkpoint" / "distillation.safetensors")
    assert set(kept) == {"norm.weight", "norm.bias", "linear.weight"}
    assert not (tmp_path / "finished" / "distillation.safetensors").exists()
    weights = load_file(tmp_path / "finished" / "model.safetensors")
    assert set(weights) == set(tiny_model(**QUERIES).state_dict()) - {"lm_head.none"}
    with torch.no_grad():
        distiller.projection.linear.weight.zero_()
    distiller.load(tmp_path / "checkpoint")
    assert torch.equal(distiller.projection.linear.weight, kept["linear.weight"])

    frozen = Distiller(Distillation(clip), model.config, torch.device("cpu"))
    assert frozen.parameters == []
    frozen.save(tmp_path)
    assert not (tmp_path / "distillation.safetensors").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "teacher is missing; it knows teacher, weight, projection, seed"),
        ({"teacher": "x", "weigth": 1}, "unknown weigth"),
        ({"teacher": "x", "weight": 0}, "weight=0 must be a positive number"),
        ({"teacher": "x", "projection": "frozen"}, "projection='frozen' must be one of random, trained"),
        ({"teacher": ""}, "teacher='' must be a folder or a Hub id"),
        ({"teacher": "x", "weight": "much"}, "weight='much' must be a positive number"),
        ({"teacher": "x", "seed": 1.5}, "seed=1.5 must be an integer that is not negative"),
    ],
)
def test_what_a_recipe_may_say(values, message):
    with pytest.raises(ValueError, match=message):
        read_distillation(values)
    with pytest.raises(ValueError, match=message):
        load_stage("nano/s2_instruction", {"distillation": values})


def test_a_weight_may_be_written_as_yaml_reads_no_number():
    assert read_distillation({"teacher": "x", "weight": "1e-1"}).weight == 0.1


def test_a_teacher_without_all_of_its_weights_teaches_nothing(clip, tmp_path):
    device = torch.device("cpu")
    file = Path(clip) / "model.safetensors"
    weights = load_file(file)
    # Of what the features do not depend on, some may be missing: here CLIP's text tower and its last norm.
    spared = {name: tensor for name, tensor in weights.items() if "text_model" not in name and "post" not in name}
    assert len(spared) < len(weights)
    save_file(spared, file, {"format": "pt"})
    Teacher(clip, device)
    save_file({name: tensor for name, tensor in spared.items() if "layers.1" not in name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"the teacher .* lacks 16 of its weights: .*layers\.1\."):
        Teacher(clip, device)
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="the teacher .* cannot be loaded"):
        Teacher(clip, device)


@pytest.mark.parametrize("mean", [None, 0.5, [0.5] * 4])
def test_a_teacher_says_how_colours_are_normalised(clip, mean):
    settings = {"image_processor_type": "CLIPImageProcessor", "image_mean": mean, "image_std": [0.5] * 3}
    (Path(clip) / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="the teacher .* does not say image_mean"):
        Teacher(clip, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["swin", "mae"])
def test_a_tower_whose_features_are_no_grid_of_its_patches_is_refused(tmp_path, kind):
    sizes = {"image_size": 32, "patch_size": 4}
    if kind == "swin":
        tower = SwinModel(SwinConfig(**sizes, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4))
    else:
        more = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        tower = ViTMAEModel(ViTMAEConfig(**sizes, **more))
    tower.save_pretrained(tmp_path)
    settings = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="the teacher .* gives no 8 x 8 patch features of a picture of 32 px"):
        Teacher(str(tmp_path), torch.device("cpu"))


def test_what_cannot_teach_is_refused_by_name(clip, tmp_path):
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="no learnable queries to learn from the teacher"):
        Distiller(Distillation(clip), tiny_config(), device)
    with pytest.raises(ValueError, match="the teacher's 4 x 4 patches are fewer than the 5 x 5 queries"):
        Distiller(Distillation(clip), tiny_config(num_learnable_queries=25, query_token_id=QUERY), device)
    with pytest.raises(ValueError, match="the teacher .*nowhere cannot be loaded: no such folder"):
        Teacher(str(tmp_path / "nowhere"), device)
    text = tmp_path / "text"
    tiny_model().save_pretrained(text)
    with pytest.raises(ValueError, match="the teacher .*text"):
        Teacher(str(text), device)
