"""The nano's teacher: captioned plates, what a batch leaves out, and a folder that distillation loads."""

import json

import pytest
import torch

from mono_internvl.plates.words import caption_of
from mono_internvl.processing_mono_internvl import MonoInternVLProcessor
from mono_internvl.training import teacher
from mono_internvl.training.distillation import Teacher
from mono_internvl.training.run import ROOT


@pytest.fixture(scope="module")
def processor():
    return MonoInternVLProcessor.from_pretrained(ROOT)


def test_plates_are_made_of_seed_and_index_and_told_by_their_captions(processor):
    plates, again, other = (teacher.CaptionedPlates(6, processor, seed) for seed in (0, 0, 1))
    assert plates.pixels.equal(again.pixels) and not plates.pixels.equal(other.pixels)
    assert plates.pixels.shape == (6, 3, 112, 112) and plates.pixels.dtype == torch.uint8
    for plate, tokens in zip(plates.plates, plates.tokens, strict=True):
        assert processor.tokenizer.decode(tokens, skip_special_tokens=True).strip() == caption_of(plate.items)


def test_the_longest_captions_fit(processor):
    """What is cut off would make two captions one."""
    plates = teacher.CaptionedPlates(300, processor, 3)
    longest = max(len(processor.tokenizer(caption_of(plate.items))["input_ids"]) for plate in plates.plates)
    assert 7 < longest <= teacher.CAPTION


def test_every_picture_of_a_caption_is_a_pair_with_it():
    """Else two red circles of a batch would be pushed away from their own caption."""
    logits = torch.tensor([[4.0, -3.0, 2.0], [-1.0, 5.0, -2.0], [4.0, -3.0, 2.0]])
    batch = teacher.collate([(torch.zeros(3, 2, 2, dtype=torch.uint8), torch.tensor(ids)) for ids in ([1], [2], [1])])

    def model(input_ids, pixel_values):
        assert pixel_values.shape == (3, 3, 2, 2) and (pixel_values == -1).all()
        return type("Output", (), {"logits_per_text": logits})

    loss = teacher.SigmoidTrainer.compute_loss(None, model, batch)
    pairs = torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]])
    torch.testing.assert_close(loss, torch.log1p(torch.exp(-pairs * logits)).sum() / 3)


def test_the_probe_reads_what_the_features_hold(processor):
    """Features that are the colour of the patch's middle tell the colour, and not the shape."""
    plates = teacher.CaptionedPlates(teacher.PROBED + 200, processor, 4, most=1)
    model = teacher.make_model(processor, 0)

    class Middle(torch.nn.Module):
        def forward(self, pixel_values):
            pixels = (
                pixel_values.unflatten(2, (8, 14)).unflatten(4, (8, 14))[:, :, :, 7, :, 7].flatten(2).transpose(1, 2)
            )
            powers = torch.cat([pixels, pixels**2, pixels[..., :2] * pixels[..., 1:]], -1)
            return type("Output", (), {"last_hidden_state": torch.nn.functional.pad(powers, (0, 88))})

    model.vision_model = Middle()
    found = teacher.probe(model, plates)
    assert found["color"] > 0.7 and found["shape"] < 0.5


def test_a_teacher_is_made_whole_measured_and_loaded_for_distillation(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "FOUND_AMONG", 8)
    monkeypatch.setattr(teacher, "PROBED", 40)
    monkeypatch.setattr(teacher, "TRIED", 20)
    report = teacher.make_teacher(tmp_path / "made", plates=teacher.BATCH, epochs=1)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "report.json",
    ]
    assert json.loads((tmp_path / "made" / "report.json").read_text()) == report
    assert set(report["after"]) == set(report["before"]) == {"retrieval", "shape", "color"}
    tower = Teacher(str(tmp_path / "made"), torch.device("cpu"))
    assert tower(torch.rand(2, 3, 112, 112)).shape == (2, 96, 8, 8)
    with pytest.raises(FileExistsError, match="made"):
        teacher.make_teacher(tmp_path / "made", plates=teacher.BATCH, epochs=1)
