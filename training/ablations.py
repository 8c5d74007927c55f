"""The paper's ablations in miniature, on a small plate world: colours, places and shapes.

    python -m mono_internvl.training.ablations RESULTS --seeds 0,1,2       runs what RESULTS does not hold yet
    python -m mono_internvl.training.ablations RESULTS --table             prints the table

    full-plain       everything trains, visual tokens share the language model's FFN      (paper 2410.08202, table 5)
    full-experts     everything trains, visual tokens have their own FFN                   (table 5)
    delta            only the visual embedding and the visual experts train                (table 5)
    delta-qkv        as delta, with visual attention experts of equal data                 (Mono-InternVL-1.5)
    align-frozen     after delta, a second stage with the attention frozen                 (table 9)
    align-attention  after delta, the same second stage with the attention training        (table 9)

All start from one dense language model (`base`, trained once on plates told in words). A run is one seed: of the new
weights, of the order and of the pictures. Vision is the share of right answers about pictures drawn by other code; text
is the perplexity of held-out answers in conversations without pictures, where lower is better.
"""

import logging
import math
import random
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import LlamaForCausalLM, TrainingArguments, set_seed

from ..common.files import read_json, write_json
from ..conversion import expand_checkpoint
from ..evaluation.plates import evaluate
from ..image_processing_mono_internvl import MonoInternVLImageProcessor
from ..modeling_mono_internvl import MonoInternVLForCausalLM
from ..plates.evaluation_pictures import evaluation_set
from ..plates.layout import sample_plate
from ..plates.questions import questions
from ..plates.tasks import CAPTION_PROMPT, PlateWorld, choose_questions
from ..plates.words import Plate, caption_of
from ..processing_mono_internvl import MonoInternVLProcessor
from .data import Collator, encode_conversation
from .groups import train_only
from .loading import Batches, Conversations, UnitBatches, mixture
from .run import ROOT, dense_config, start_vision
from .sources import Source
from .trainer import EViPTrainer, weighted_loss_sum


logger = logging.getLogger(__name__)

DENSE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "initializer_range": 0.05,
}
TILE_SIZE = 112
BATCH = 32
BASE_STEPS, PRETRAIN_STEPS, ALIGN_STEPS = 500, 500, 250
VISUAL = ("visual_embedding", "visual_experts")
# name -> (what it starts from, what trains, attention experts)
VARIANTS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "full-plain": ("base", (*VISUAL, "attention", "text"), "none"),
    "full-experts": ("base", (*VISUAL, "attention", "text"), "none"),
    "delta": ("base", VISUAL, "none"),
    "delta-qkv": ("base", (*VISUAL, "visual_attention_experts"), "qkv"),
    "align-frozen": ("delta", VISUAL, "none"),
    "align-attention": ("delta", (*VISUAL, "attention"), "none"),
}
ASKED = {"shape": 1.0, "color": 1.0, "position": 1.0}
TEST_PICTURES, TEST_TEXTS = 450, 256


class SmallWorld(PlateWorld):
    """Square pictures of one to three shapes, no numbers; a caption or questions about shape, colour and place."""

    def _plate(self, rng: random.Random, progress: float, tiled: bool) -> Plate:
        while True:
            plate = sample_plate(rng, max_shapes=1 if progress < 0.3 else 3, with_number=0.0, size=(112, 160))
            if plate.items and 0.8 < plate.width / plate.height < 1.25:
                return plate

    def _turns(self, plate: Plate, rng: random.Random) -> list[tuple[str, str]]:
        asked = choose_questions(questions(plate, rng), rng, ASKED, 3)
        return [(qa.question, qa.answer) for qa in asked] or [(CAPTION_PROMPT, caption_of(plate.items))]


def processor_of() -> MonoInternVLProcessor:
    tokenizer = MonoInternVLProcessor.from_pretrained(ROOT).tokenizer
    return MonoInternVLProcessor(
        MonoInternVLImageProcessor(tile_size=TILE_SIZE, max_tiles=1, use_thumbnail=False), tokenizer
    )


def fit(
    model: Any, processor: MonoInternVLProcessor, world: PlateWorld, steps: int, rate: float, seed: int, work: Path
) -> None:
    """Train what has gradients, in place."""
    sources = [Source(world)]
    conversations = Conversations(sources, processor, max_tiles=1, max_length=1024)
    trainer = EViPTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(work),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,
            weight_decay=0.05,
            adam_beta2=0.98,
            save_strategy="no",
            logging_steps=50,
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to=[],
            seed=seed,
        ),
        conversations=conversations,
        batches=Batches(processor.tokenizer.pad_token_id, processor.tokens_per_tile, packing=False, weighting="token"),
        micro_batches=UnitBatches(lambda: ([key] for key in mixture(sources, seed)), steps, BATCH, 0, 1),
    )
    trainer.train()


@torch.no_grad()
def text_perplexity(model: Any, processor: MonoInternVLProcessor) -> float:
    """exp of the mean cross-entropy of held-out answers in conversations without pictures."""
    world = PlateWorld("text", TEST_TEXTS, seed=10_007)
    collate, total, count = Collator(processor.tokenizer.pad_token_id, "token"), 0.0, 0.0
    model.eval()
    for first in range(0, TEST_TEXTS, 32):
        examples = [encode_conversation(processor, world[i].messages) for i in range(first, first + 32)]
        batch = collate(examples)
        batch.pop("pixel_values")
        labels, weights = batch.pop("labels"), batch.pop("loss_weights")
        batch = {name: value.to(model.device) for name, value in batch.items()}
        logits = model(**batch).logits.cpu()
        total, count = total + float(weighted_loss_sum(logits, labels, weights)), count + float(weights.sum())
    return math.exp(total / count)


def vision_accuracy(model: MonoInternVLForCausalLM, processor: MonoInternVLProcessor) -> dict[str, float]:
    """Share of right answers by category, over pictures drawn by other code."""
    examples = [e for e in evaluation_set(count=2 * TEST_PICTURES, seed=77) if e[1] in ASKED]
    scores = evaluate(model.eval(), processor, examples, batch_size=32).scores
    return {name: right / total for name, (right, total) in scores.items()}


def make_base(folder: Path, processor: MonoInternVLProcessor) -> Path:
    """The dense language model that all runs share."""
    if not (folder / "config.json").exists():
        set_seed(0)
        model = LlamaForCausalLM(dense_config(DENSE, processor))
        fit(model, processor, PlateWorld("text", BASE_STEPS * BATCH), BASE_STEPS, 2e-3, 0, folder.with_name("work"))
        model.save_pretrained(folder)
        processor.tokenizer.save_pretrained(folder)
    return folder


def start(variant: str, seed: int, work: Path, processor: MonoInternVLProcessor) -> MonoInternVLForCausalLM:
    source, trains, experts = VARIANTS[variant]
    if source != "base":
        folder = work / f"{source}-{seed}"
        if not folder.is_dir():
            raise FileNotFoundError(f"{variant} starts from {source}, seed {seed}, whose weights {folder} lacks")
        model = MonoInternVLForCausalLM.from_pretrained(folder)
    else:
        folder = work / f"expanded-{experts}-{seed}"
        if not folder.is_dir():
            expand_checkpoint(
                make_base(work / "base", processor),
                folder,
                vision_hidden_size=48,
                tile_size=TILE_SIZE,
                visual_attention_experts=experts,
                seed=seed,
            )
        model = MonoInternVLForCausalLM.from_pretrained(folder)
        start_vision(model, patch=0.02, position=1.5)
    if variant == "full-plain":
        # One FFN for all tokens: the experts are the same module.
        for layer in model.model.language_model.layers:
            layer.visual_mlp = layer.mlp
        trains = tuple(group for group in trains if group != "visual_experts")
    train_only(model, trains)
    return model


def run(variant: str, seed: int, results: Path, work: Path) -> dict[str, Any]:
    """One run; its record is written to `results/VARIANT-SEED.json`."""
    processor = processor_of()
    set_seed(seed)
    model = start(variant, seed, work, processor)
    text_before = text_perplexity(model, processor)
    begin, cpu = time.monotonic(), time.process_time()
    aligned = VARIANTS[variant][0] != "base"
    steps = ALIGN_STEPS if aligned else PRETRAIN_STEPS
    world = SmallWorld("alignment", steps * BATCH, naming=0.0 if aligned else 0.5, seed=1000 * aligned + seed)
    fit(model, processor, world, steps, 1e-3 if aligned else 2e-3, seed, work / "work")
    record = {
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "batch": BATCH,
        "vision": vision_accuracy(model, processor),
        "text_perplexity_before": text_before,
        "text_perplexity_after": text_perplexity(model, processor),
        "seconds": round(time.monotonic() - begin, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "device": str(model.device),
    }
    if variant in {source for source, _, _ in VARIANTS.values()}:
        model.save_pretrained(work / f"{variant}-{seed}")
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / f"{variant}-{seed}.json", record, indent=1)
    return record


def table(results: Path) -> str:
    """Markdown: mean and sample standard deviation over the seeds of each variant."""
    lines = [
        "| variant | seeds | shape | colour | place | all | text perplexity before | after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        records = [read_json(path) for path in sorted(results.glob(f"{variant}-[0-9]*.json"))]
        if not records:
            continue

        def cell(values: list[float], digits: int = 1) -> str:
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            return f"{statistics.mean(values):.{digits}f}{spread}"

        vision = [[100 * record["vision"][name] for name in ASKED] for record in records]
        columns = [cell([row[i] for row in vision]) for i in range(len(ASKED))]
        columns.append(cell([statistics.mean(row) for row in vision]))
        columns += [cell([r[f"text_perplexity_{when}"] for r in records], 3) for when in ("before", "after")]
        lines.append(f"| {variant} | {len(records)} | {' | '.join(columns)} |")
    return "\n".join(lines)


def main(
    results: Annotated[Path, typer.Argument(help="folder of one JSON a run")],
    seeds: Annotated[str, typer.Option(help="seeds, with commas")] = "0,1,2",
    only: Annotated[str | None, typer.Option(help="variants, with commas  [default: all]")] = None,
    work: Annotated[Path, typer.Option(help="folder of weights that runs share")] = Path("runs/ablations"),
    show: Annotated[bool, typer.Option("--table", help="print the table of what is there and stop")] = False,
) -> None:
    """Run what is not there yet, then print the table."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    variants = only.split(",") if only else list(VARIANTS)
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        raise typer.BadParameter(f"unknown variant {unknown[0]}; allowed are {', '.join(VARIANTS)}")
    for seed in [] if show else [int(seed) for seed in seeds.split(",")]:
        for variant in variants:
            if not (results / f"{variant}-{seed}.json").exists():
                record = run(variant, seed, results, work)
                logger.info("%s, seed %d: %s", variant, seed, record["vision"])
    typer.echo(table(results))


if __name__ == "__main__":
    typer.run(main)
