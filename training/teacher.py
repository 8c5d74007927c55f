"""A small vision tower for the nano's queries to learn from: SigLIP (arXiv 2303.15343) on plates and their captions.

    python -m mono_internvl.training.teacher runs/nano-breen/teacher

CLIP's weights belong to pictures of the world. The plate world is learnt in minutes: 12,288 plates of up to five shapes
and a number, each with a caption that tells what stands where, eight times over in batches of 128, by pairing a picture
with its own caption. The folder is one that transformers loads. Two measures stand in its `report.json`, each beside
the same of the tower before training: how often the caption of a new picture is found among 256, and how often a linear
probe reads shape and colour of the patch features that distillation teaches.
"""

import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import SiglipConfig, SiglipModel, Trainer, set_seed

from ..common.files import write_json
from ..conversion.writer import check_destination, publish_folder, temporary_folder
from ..plates.drawing import draw_plate
from ..plates.layout import sample_plate
from ..plates.words import COLORS, SHAPES, Plate, caption_of
from ..processing_mono_internvl import MonoInternVLProcessor
from .run import ROOT, short_arguments


SIZE, PATCH, CAPTION = 112, 14, 16
# Shapes of a plate. Of two, without their places: a caption is found only by whoever tells shapes as well as colours.
MOST = 2
MEAN = STD = (0.5, 0.5, 0.5)
TOWER: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 3}
PLATES, EPOCHS, BATCH, RATE = 24_576, 10, 128, 1e-3
# New plates to measure with: to find the caption among, and to fit and to try the probe.
FOUND_AMONG, PROBED, TRIED = 256, 3_000, 1_000


class CaptionedPlates(Dataset):
    """Plates as [3, SIZE, SIZE] uint8 and captions as CAPTION tokens, drawn once; `seed` and the index make each."""

    def __init__(self, length: int, processor: MonoInternVLProcessor, seed: int, most: int = MOST):
        self.plates: list[Plate] = []
        self.pixels = torch.empty((length, 3, SIZE, SIZE), dtype=torch.uint8)
        for i in range(length):
            rng = random.Random(f"teacher/{seed}/{i}")
            plate = sample_plate(rng, max_shapes=most, with_number=0.0)
            while not plate.items:
                plate = sample_plate(rng, max_shapes=most, with_number=0.0)
            # The whole picture squeezed into a square, as distillation shows it.
            picture = draw_plate(plate, rng).convert("RGB").resize((SIZE, SIZE))
            self.pixels[i] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            self.plates.append(plate)
        captions = [caption_of(plate.items) for plate in self.plates]
        # SigLIP reads a caption at its last place, so all are filled up to one length.
        self.tokens = processor.tokenizer(
            captions, padding="max_length", truncation=True, max_length=CAPTION, return_tensors="pt"
        )["input_ids"]

    def __len__(self) -> int:
        return len(self.plates)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pixels[index], self.tokens[index]


def collate(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    pictures, captions = zip(*pairs, strict=True)
    return {"pixel_values": normalised(torch.stack(pictures)), "input_ids": torch.stack(captions)}


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 3, SIZE, SIZE] -> float32, -1 to 1."""
    return (pixels.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def make_model(processor: MonoInternVLProcessor, seed: int) -> SiglipModel:
    set_seed(seed)
    tokenizer = processor.tokenizer
    vision = {**TOWER, "num_hidden_layers": 4, "image_size": SIZE, "patch_size": PATCH}
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**TOWER, **tokens, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "projection_size": 96}
    text["max_position_embeddings"] = CAPTION
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    # As the paper starts them (3.2): most pairs are no pairs, and the first steps need not learn that.
    with torch.no_grad():
        model.logit_scale.fill_(math.log(10.0))
        model.logit_bias.fill_(-10.0)
    return model


class SigmoidTrainer(Trainer):
    """SigLIP's loss (eq. 1), where every picture of a caption is a pair with it: few captions stand once in a batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        outputs = model(**inputs)
        same = (inputs["input_ids"][:, None] == inputs["input_ids"][None]).all(-1)
        loss = -F.logsigmoid(outputs.logits_per_text * torch.where(same, 1.0, -1.0)).sum(-1).mean()
        return (loss, outputs) if return_outputs else loss


@torch.no_grad()
def retrieval(model: SiglipModel, plates: CaptionedPlates) -> float:
    """Share of the pictures whose caption is the likeliest of all captions, equal ones counted as one."""
    batch = {"pixel_values": normalised(plates.pixels[:FOUND_AMONG]), "input_ids": plates.tokens[:FOUND_AMONG]}
    best = model.eval()(**batch).logits_per_image.argmax(1)
    return (plates.tokens[best] == plates.tokens[:FOUND_AMONG]).all(1).float().mean().item()


@torch.no_grad()
def probe(model: SiglipModel, plates: CaptionedPlates) -> dict[str, float]:
    """Share of shapes and colours that a ridge regression on the patch at the middle of a plate's one shape reads."""
    grid, features = SIZE // PATCH, []
    for pixels in plates.pixels.split(250):
        features.append(model.eval().vision_model(pixel_values=normalised(pixels)).last_hidden_state)
    centers = [
        (plate.items[0].center[0] / plate.width, plate.items[0].center[1] / plate.height) for plate in plates.plates
    ]
    places = torch.tensor([min(int(y * grid), grid - 1) * grid + min(int(x * grid), grid - 1) for x, y in centers])
    states = F.layer_norm(torch.cat(features)[torch.arange(len(plates)), places], (TOWER["hidden_size"],)).double()
    states = torch.cat([states, torch.ones(len(states), 1, dtype=torch.float64)], 1)
    found = {}
    for what, names in (("kind", SHAPES), ("color", COLORS)):
        right = torch.tensor([names.index(getattr(plate.items[0], what)) for plate in plates.plates])
        known = states[:PROBED]
        normal = known.T @ known + torch.eye(known.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(normal, known.T @ F.one_hot(right[:PROBED], len(names)).double())
        found[what] = ((states[PROBED:] @ weights).argmax(1) == right[PROBED:]).float().mean().item()
    return {"shape": found["kind"], "color": found["color"]}


def make_teacher(destination: Path, *, plates: int = PLATES, epochs: float = EPOCHS, seed: int = 0) -> dict[str, Any]:
    """Train a teacher and write its folder, whole or not at all.

    Returns:
        What `report.json` holds: counts, seconds, and the measures after training and before.

    Raises:
        FileExistsError: the destination is a file or a folder that is not empty.
    """
    check_destination(destination)
    begin, cpu = time.monotonic(), time.process_time()
    processor = MonoInternVLProcessor.from_pretrained(ROOT)
    model, drawn = make_model(processor, seed), CaptionedPlates(plates, processor, seed)
    new = CaptionedPlates(FOUND_AMONG, processor, 10_007)
    alone = CaptionedPlates(PROBED + TRIED, processor, 10_009, most=1)
    before = {"retrieval": retrieval(model, new), **probe(model, alone)}
    with temporary_folder(destination, f"teacher-{plates}-{epochs}-{seed}", 0) as folder:
        arguments = short_arguments(folder, BATCH, RATE, seed, num_train_epochs=epochs, warmup_steps=50)
        SigmoidTrainer(model=model, args=arguments, train_dataset=drawn, data_collator=collate).train()
        model.cpu().save_pretrained(folder)
        report = {
            "plates": plates,
            "epochs": epochs,
            "batch": BATCH,
            "seed": seed,
            "after": {"retrieval": retrieval(model, new), **probe(model, alone)},
            "before": before,
            "seconds": round(time.monotonic() - begin, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
        }
        settings = {"image_mean": MEAN, "image_std": STD, "size": {"height": SIZE, "width": SIZE}}
        write_json(folder / "preprocessor_config.json", {"image_processor_type": "SiglipImageProcessor", **settings})
        write_json(folder / "report.json", report, indent=1)
        publish_folder(folder, destination)
    return report


def main(
    destination: Annotated[Path, typer.Argument(help="folder to make")],
    plates: Annotated[int, typer.Option(min=BATCH, help="pictures to learn from")] = PLATES,
    epochs: Annotated[float, typer.Option(min=0.01, help="how many times each is seen")] = EPOCHS,
    seed: Annotated[int, typer.Option(help="of weights, plates and order")] = 0,
) -> None:
    """Train the nano's teacher; minutes on one core."""
    report = make_teacher(destination, plates=plates, epochs=epochs, seed=seed)
    for when in ("before", "after"):
        typer.echo(f"{when}: " + ", ".join(f"{what} {share:.1%}" for what, share in report[when].items()))
    typer.echo(f"{destination}: {report['seconds']:.0f} s")


if __name__ == "__main__":
    typer.run(main)
