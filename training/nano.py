"""Trains the nano, the small Mono-InternVL that the repository carries, on the plate world.

    python -m mono_internvl.training.nano OUT --steps 2264 --batch-size 256 --learning-rate 2e-3 --workers 15
    torchrun --nproc_per_node 2 -m mono_internvl.training.nano OUT

The first on a GPU, six minutes; the second on two cores, 75 minutes and a fifth of the pictures. Two processes of one
thread each are twice as fast on two cores as one process of two threads: the matrices are small.

First version: everything is trained from scratch on instructions, from one shape to full plates. Each picture comes
with several questions, as one conversation: reading the picture is what costs, and answers are what teaches.

Answers alone teach perception slowly: a word or two for 64 visual tokens. So for most of the run visual tokens have
targets too (`name_patches`): a patch that lies on a shape is to be continued by the shape's name, one on a digit by it.
"""

import logging
import os
import random
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.utils.data import Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

from ..configuration_mono_internvl import MonoInternVLConfig
from ..image_processing_mono_internvl import MonoInternVLImageProcessor
from ..modeling_mono_internvl import MonoInternVLForCausalLM
from ..processing_mono_internvl import MonoInternVLProcessor
from .data import Collator, encode_conversation
from .plate_tasks import GREETINGS, choose_questions, name_patches
from .plate_world import draw_plate, questions, sample_plate
from .run import start_vision
from .trainer import Progress


logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
# A tile of 224 px is 64 visual tokens. Pictures up to about 3:2 are one tile; longer ones are tiled, up to 256 tokens.
TILE_SIZE, MAX_TILES = 224, 3
# How strong the vision side starts: the patch weights' standard deviation, and the position table's (`start_vision`).
PATCH_STRENGTH, POSITION_STRENGTH = 0.02, 1.5
# Questions asked of a picture, and how often each category is chosen when it applies.
QUESTIONS = 4
WEIGHTS = {"shape": 3.0, "color": 2.0, "count": 2.5, "number": 3.0, "position": 2.0, "caption": 0.3, "box": 0.0}
# In the second half of the run patches are no longer named, and what relates several shapes is asked more often.
NAMING = 0.52
LATER_WEIGHTS = {**WEIGHTS, "shape": 2.0, "color": 2.5, "count": 3.5, "number": 1.0, "position": 3.0, "caption": 0.6}
# One batch in so many holds only pictures of several tiles; the others hold none, so that little is padded.
TILED_EVERY = 5


def nano_config(tokenizer: Any) -> MonoInternVLConfig:
    """4.8 M parameters: 6 layers of width 192, with a head size that engines take (32)."""
    return MonoInternVLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            # The usual 0.02 suits wide models; these keep a small one's signals and positions from starting too faint.
            "initializer_range": 0.05,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={"hidden_size": 96, "image_size": TILE_SIZE, "initializer_range": 0.2},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )


class PlateConversations(Dataset):
    """Conversation `i` is made from `(seed, i)` alone: any worker draws the same. Plates grow harder with `i`."""

    def __init__(self, processor: MonoInternVLProcessor, length: int, batch_size: int, seed: int):
        self.processor, self.length, self.batch_size, self.seed = processor, length, batch_size, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = random.Random(f"{self.seed}/{index}")
        progress = index / self.length
        if progress > 0.1 and rng.random() < 0.02:
            asked, answered = rng.choice(GREETINGS)
            return encode_conversation(self.processor, self.processor.conversation([(asked, answered)], []))
        most = 1 if progress < 0.12 else 3 if progress < 0.25 else 5
        numbers = 0.0 if progress < 0.25 else 0.2 if progress < NAMING else 0.1
        tiled = (index // self.batch_size) % TILED_EVERY == 0
        while True:
            plate = sample_plate(rng, max_shapes=most, with_number=numbers)
            one_tile = self.processor.image_processor.get_number_of_tiles(plate.height, plate.width) == 1
            if one_tile != tiled and (candidates := questions(plate, rng)):
                break
        weights = WEIGHTS if progress < NAMING else LATER_WEIGHTS
        turns = [(qa.question, qa.answer) for qa in choose_questions(candidates, rng, weights, QUESTIONS)]
        turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
        example = encode_conversation(self.processor, self.processor.conversation(turns, [draw_plate(plate, rng)]))
        if one_tile and progress < NAMING:
            name_patches(example, self.processor, plate, (1, 1))
        return example


class PlainOrder(Trainer):
    """The data set is the order: no shuffling, so that the curriculum stands."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def train(
    out: Annotated[Path, typer.Argument(help="folder of the finished model")],
    steps: Annotated[int, typer.Option(help="optimiser steps")] = 4000,
    batch_size: Annotated[int, typer.Option(help="conversations a step, over all processes")] = 32,
    learning_rate: Annotated[float, typer.Option(help="peak learning rate")] = 1.2e-3,
    workers: Annotated[int, typer.Option(help="processes that draw pictures, for each that trains")] = 0,
    seed: int = 0,
    tokenizer: Annotated[Path, typer.Option(help="folder with the nano's tokenizer")] = ROOT,
    runs: Annotated[Path, typer.Option(help="folder of checkpoints and logs")] = Path("runs/nano"),
    resume: Annotated[bool, typer.Option(help="go on from the last checkpoint in the runs folder")] = False,
) -> None:
    """Train the nano and write it to OUT in bfloat16, ready for `from_pretrained`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    set_seed(seed)
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if batch_size % world_size:
        raise typer.BadParameter(f"--batch-size {batch_size} must be a multiple of the {world_size} processes")
    processor = MonoInternVLProcessor(
        MonoInternVLImageProcessor(tile_size=TILE_SIZE, max_tiles=MAX_TILES),
        AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False),
    )
    model = MonoInternVLForCausalLM(nano_config(processor.tokenizer))
    start_vision(model, PATCH_STRENGTH, POSITION_STRENGTH)
    logger.info("%.2f M parameters", model.num_parameters() / 1e6)
    arguments = TrainingArguments(
        output_dir=str(runs),
        max_steps=steps,
        per_device_train_batch_size=batch_size // world_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.02},
        warmup_steps=200,
        weight_decay=0.05,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=25,
        save_steps=250,
        save_total_limit=2,
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=4 if workers else None,
        # Said outright: without it the processes of a CPU run would each train a copy alone.
        use_cpu=not torch.cuda.is_available(),
        tf32=True if torch.cuda.is_available() else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to=[],
        seed=seed,
    )
    trainer = PlainOrder(
        model=model,
        args=arguments,
        train_dataset=PlateConversations(processor, steps * batch_size, batch_size, seed),
        data_collator=Collator(processor.tokenizer.pad_token_id),
        callbacks=[Progress(logger.info)],
    )
    trainer.train(resume_from_checkpoint=resume)
    if rank == 0:
        save_nano(model, processor, out)


def save_nano(model: MonoInternVLForCausalLM, processor: MonoInternVLProcessor, out: Path) -> None:
    """Write model (bfloat16), processor and remote code to a temporary folder beside `out`, then rename it."""
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.generation_config.eos_token_id = processor.stop_token_ids
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.bfloat16().save_pretrained(temporary)
    processor.save_pretrained(temporary)
    if out.exists():
        shutil.rmtree(out)
    temporary.rename(out)


if __name__ == "__main__":
    typer.run(train)
