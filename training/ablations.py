"""Which idea pays: the papers' ideas in miniature, on a small plate world of colours, places and shapes.

    python -m mono_internvl.training.ablations RESULTS --seeds 0,1,2       runs what RESULTS does not hold yet
    python -m mono_internvl.training.ablations RESULTS --only experts      one table's runs, or runs by name
    python -m mono_internvl.training.ablations RESULTS --table             prints the tables of what is there
    python -m mono_internvl.training.ablations RESULTS --curves OUT.png    draws right answers over samples seen

Five tables, each of runs by name (`VARIANTS` says what each starts from, what it has and what trains); docs/ideas.md
says what came of them:

    full-or-delta  full tuning without and with visual experts, delta tuning        (2410.08202, table 5)
    alignment      a second stage with the attention frozen, and training           (2410.08202, table 9)
    experts        none, FFN experts, and attention experts of q, k, v (and o)      (2410.08202; 2507.12566)
    queries        learnable queries, distillation, gates                           (2503.12446)
    data           v1's samples, and a third of them for the first stage            (2507.12566, EViP++)

All start from one dense language model (`base`, trained once on plates told in words). A run is one seed: of the new
weights, of the order and of the pictures. Vision is the share of right answers about pictures drawn by other code; text
is the perplexity of held-out answers in conversations without pictures, where lower is better. Several processes may
work side by side: a run that another one is at is passed over.
"""

import logging
import math
import random
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from filelock import FileLock, Timeout
from PIL import Image
from transformers import LlamaForCausalLM, TrainerCallback, set_seed

from ..common.files import read_json, write_json, written_whole
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
from .distillation import Distillation, Distiller
from .groups import train_only
from .loading import Batches, Conversations, UnitBatches, mixture
from .run import ROOT, dense_config, short_arguments, start_vision
from .sources import Source
from .teacher import make_teacher
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
BASE_STEPS = 500
# Of a first stage: in the older tables, in the newer ones, and a third of these (EViP++: 400 M samples for 1,180 M).
SHORT, LONG, THIRD, ALIGN = 500, 1000, 340, 250
VISUAL = ("visual_embedding", "visual_experts")
BY_EXPERTS = (*VISUAL, "visual_attention_experts")
BY_QUERIES = (*VISUAL, "learnable_queries")
QKV, QKVO = ({"visual_attention_experts": kind} for kind in ("qkv", "qkvo"))
# 16 fine queries for a grid of 4 x 4, then 4 coarse ones, beside the 16 tokens of the picture.
QUERIES: dict[str, Any] = {"num_learnable_queries": 20, "query_grids": [4, 2]}


@dataclass(frozen=True)
class Variant:
    """One setting.

    Args:
        trains: groups of parameters (`common.parameters`).
        start: "base", expanded with `expand`, or another variant, which it goes on from with the attention's pictures.
        steps: of BATCH samples each.
        expand: options of `expand_checkpoint`.
        shares: visual tokens go through the language model's own FFN.
        distils: weight of what the queries learn from the teacher (`training.teacher`); 0 without one.
        points: how often vision is measured on the way, the end included.
        pictures: to measure it with.
    """

    trains: tuple[str, ...]
    start: str = "base"
    steps: int = LONG
    expand: Mapping[str, Any] = field(default_factory=dict)
    shares: bool = False
    distils: float = 0.0
    points: int = 5
    pictures: int = 900


def _older(trains: tuple[str, ...], start: str = "base", **more: Any) -> Variant:
    """A run of the first two tables."""
    return Variant(trains, start, SHORT if start == "base" else ALIGN, points=1, pictures=450, **more)


ALL = (*VISUAL, "attention", "text")
VARIANTS: dict[str, Variant] = {
    "full-plain": _older(ALL, shares=True),
    "full-experts": _older(ALL),
    "delta": _older(VISUAL),
    "delta-qkv": _older(BY_EXPERTS, expand=QKV),
    "align-frozen": _older(VISUAL, "delta"),
    "align-attention": _older((*VISUAL, "attention"), "delta"),
    "no-experts": Variant(VISUAL, shares=True),
    "experts": Variant(VISUAL),
    "experts-qkv": Variant(BY_EXPERTS, expand=QKV),
    "experts-qkvo": Variant(BY_EXPERTS, expand=QKVO),
    "queries": Variant(BY_QUERIES, expand=QUERIES),
    "queries-distilled": Variant(BY_QUERIES, expand=QUERIES, distils=1.0),
    "queries-distilled-lightly": Variant(BY_QUERIES, expand=QUERIES, distils=0.1),
    "queries-distilled-gates": Variant(
        (*BY_QUERIES, "expert_gates"), expand={**QUERIES, "expert_gates": True}, distils=1.0
    ),
    "third": Variant(VISUAL, steps=THIRD, points=1),
    "third-qkv": Variant(BY_EXPERTS, steps=THIRD, expand=QKV, points=1),
    "v1": Variant((*VISUAL, "attention"), "experts", ALIGN, points=1),
    "v1-third": Variant((*VISUAL, "attention"), "third", ALIGN, points=1),
    "v1.5-third": Variant(BY_EXPERTS, "third-qkv", ALIGN, points=1),
}
TABLES = {
    "full-or-delta": ("full-plain", "full-experts", "delta", "delta-qkv"),
    "alignment": ("delta", "align-frozen", "align-attention"),
    "experts": ("no-experts", "experts", "experts-qkv", "experts-qkvo"),
    "queries": ("experts", "queries", "queries-distilled", "queries-distilled-lightly", "queries-distilled-gates"),
    "data": ("third", "third-qkv", "v1", "v1-third", "v1.5-third"),
}
ASKED = {"shape": 1.0, "color": 1.0, "position": 1.0}
TEST_TEXTS = 256


class SmallWorld(PlateWorld):
    """Square pictures of one to three shapes, no numbers; a caption or questions about shape, colour and place.

    Half of a run the patches are named as well (`PlateWorld`'s naming), but where a run goes on from another.
    """

    def __init__(self, length: int, *, naming: float, seed: int):
        super().__init__("alignment", length, naming=naming, tile_size=TILE_SIZE, max_tiles=1, seed=seed)
        self.sheets = 0.0

    def _plate(self, rng: random.Random, progress: float, tiled: bool) -> Plate:
        while True:
            plate = sample_plate(rng, max_shapes=1 if progress < 0.3 else 3, with_number=0.0, size=(112, 160))
            if plate.items and 0.8 < plate.width / plate.height < 1.25:
                return plate

    def _turns(self, plate: Plate, rng: random.Random) -> list[tuple[str, str]]:
        asked = choose_questions(questions(plate, rng), rng, ASKED, 3)
        return [(qa.question, qa.answer) for qa in asked] or [(CAPTION_PROMPT, caption_of(plate.items))]


def processor_of(folder: Path | None = None) -> MonoInternVLProcessor:
    """For pictures of one tile; of a model's folder, which knows its queries, or of the language model alone."""
    images = MonoInternVLImageProcessor(tile_size=TILE_SIZE, max_tiles=1, use_thumbnail=False)
    if folder is None:
        return MonoInternVLProcessor(images, MonoInternVLProcessor.from_pretrained(ROOT).tokenizer)
    processor = MonoInternVLProcessor.from_pretrained(folder)
    processor.image_processor = images
    return processor


class Measured(TrainerCallback):
    """Measures vision at so many equal distances of a run, the end included."""

    def __init__(self, points: int, processor: MonoInternVLProcessor, pictures: int):
        self.points, self.processor, self.pictures = points, processor, pictures
        self.found: list[dict[str, Any]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        due = {round(state.max_steps * (i + 1) / self.points) for i in range(self.points)}
        if state.global_step in due:
            vision = vision_accuracy(model, self.processor, self.pictures)
            self.found.append({"samples": state.global_step * BATCH, "vision": vision})
            model.train()


def fit(
    model: Any,
    processor: MonoInternVLProcessor,
    world: PlateWorld,
    steps: int,
    rate: float,
    seed: int,
    work: Path,
    **more: Any,
) -> None:
    """Train what has gradients, in place; `more` goes to the trainer."""
    sources = [Source(world)]
    conversations = Conversations(sources, processor, max_tiles=1, max_length=1024)
    trainer = EViPTrainer(
        model=model,
        args=short_arguments(work, BATCH, rate, seed, max_steps=steps, warmup_steps=steps // 20),
        conversations=conversations,
        batches=Batches(processor.tokenizer.pad_token_id, processor.tokens_per_tile, packing=False, weighting="token"),
        micro_batches=UnitBatches(lambda: ([key] for key in mixture(sources, seed)), steps, BATCH, 0, 1),
        **more,
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


def vision_accuracy(
    model: MonoInternVLForCausalLM, processor: MonoInternVLProcessor, pictures: int
) -> dict[str, float]:
    """Share of right answers by category, over pictures drawn by other code."""
    scores = evaluate(model.eval(), processor, _examples(pictures), batch_size=32).scores
    return {name: right / total for name, (right, total) in scores.items()}


@lru_cache(1)
def _examples(pictures: int) -> list[tuple[Image.Image, str, str, str]]:
    return [e for e in evaluation_set(count=2 * pictures, seed=77) if e[1] in ASKED]


def make_base(folder: Path, processor: MonoInternVLProcessor) -> Path:
    """The dense language model that all runs share."""
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "config.json").exists():
            set_seed(0)
            model = LlamaForCausalLM(dense_config(DENSE, processor))
            fit(model, processor, PlateWorld("text", BASE_STEPS * BATCH), BASE_STEPS, 2e-3, 0, folder.with_name("work"))
            model.save_pretrained(folder)
            processor.tokenizer.save_pretrained(folder)
    return folder


def start(name: str, seed: int, work: Path) -> tuple[MonoInternVLForCausalLM, MonoInternVLProcessor]:
    """A variant's model, its groups ready to train, and its processor."""
    variant = VARIANTS[name]
    if variant.start != "base":
        folder = work / f"{variant.start}-{seed}"
        if not folder.is_dir():
            raise FileNotFoundError(f"{name} starts from {variant.start}, seed {seed}, whose weights {folder} lacks")
        model, processor = MonoInternVLForCausalLM.from_pretrained(folder), processor_of(folder)
    else:
        work.mkdir(parents=True, exist_ok=True)
        base, folder = make_base(work / "base", processor_of()), work / f"expanded-{name}-{seed}"
        if not folder.is_dir():
            expand_checkpoint(base, folder, vision_hidden_size=48, tile_size=TILE_SIZE, seed=seed, **variant.expand)
        model, processor = MonoInternVLForCausalLM.from_pretrained(folder), processor_of(folder)
        start_vision(model, patch=0.02, position=1.5)
    trains = variant.trains
    if variant.shares:
        # One FFN for all tokens: the experts are the same module.
        for layer in model.model.language_model.layers:
            layer.visual_mlp = layer.mlp
        trains = tuple(group for group in trains if group != "visual_experts")
    train_only(model, trains)
    return model, processor


def run(name: str, seed: int, results: Path, work: Path) -> dict[str, Any]:
    """One run; its record is written to `results/NAME-SEED.json`."""
    variant = VARIANTS[name]
    set_seed(seed)
    model, processor = start(name, seed, work)
    more: dict[str, Any] = {}
    if variant.distils:
        with FileLock(work / "teacher.lock"):
            if not (work / "teacher").is_dir():
                make_teacher(work / "teacher")
        distillation = Distillation(str(work / "teacher"), weight=variant.distils)
        more["distiller"] = Distiller(distillation, model.config, model.device)
    measured = Measured(variant.points, processor, variant.pictures)
    text_before = text_perplexity(model, processor)
    begin, cpu = time.monotonic(), time.process_time()
    goes_on = variant.start != "base"
    world = SmallWorld(variant.steps * BATCH, naming=0.0 if goes_on else 0.5, seed=1000 * goes_on + seed)
    rate = 1e-3 if goes_on else 2e-3
    fit(model, processor, world, variant.steps, rate, seed, work / "work", callbacks=[measured], **more)
    record = {
        "variant": name,
        "seed": seed,
        "steps": variant.steps,
        "batch": BATCH,
        "vision": measured.found[-1]["vision"],
        "on_the_way": measured.found[:-1],
        "text_perplexity_before": text_before,
        "text_perplexity_after": text_perplexity(model, processor),
        "seconds": round(time.monotonic() - begin, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "device": str(model.device),
    }
    if name in {variant.start for variant in VARIANTS.values()}:
        model.save_pretrained(work / f"{name}-{seed}")
        processor.save_pretrained(work / f"{name}-{seed}")
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / f"{name}-{seed}.json", record, indent=1)
    return record


# ------------------------------------------------------------------------------------------------- tables and curves


def records_of(name: str, results: Path) -> list[dict[str, Any]]:
    return [read_json(path) for path in sorted(results.glob(f"{name}-[0-9]*.json"))]


def mean_and_spread(values: list[float], digits: int = 1) -> str:
    """Mean and sample standard deviation; the mean alone of one value, or of values that print alike."""
    same = len({f"{value:.{digits}f}" for value in values}) == 1
    return f"{statistics.mean(values):.{digits}f}" + ("" if same else f" ± {statistics.stdev(values):.{digits}f}")


def table(results: Path, names: tuple[str, ...]) -> str:
    """Markdown: mean and sample standard deviation over the seeds of each variant."""
    lines = [
        "| variant | seeds | samples | shape | colour | place | all | text perplexity before | after |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        records = records_of(name, results)
        if not records:
            continue
        vision = [[100 * record["vision"][asked] for asked in ASKED] for record in records]
        columns = [mean_and_spread([row[i] for row in vision]) for i in range(len(ASKED))]
        columns.append(mean_and_spread([statistics.mean(row) for row in vision]))
        columns += [mean_and_spread([r[f"text_perplexity_{when}"] for r in records], 3) for when in ("before", "after")]
        lines.append(f"| {name} | {len(records)} | {samples_of(name):,} | {' | '.join(columns)} |")
    return "\n".join(lines)


def samples_of(name: str) -> int:
    """Pictures that a variant has seen at its end, those of the run that it goes on from included."""
    variant = VARIANTS[name]
    before = 0 if variant.start == "base" else samples_of(variant.start)
    return before + variant.steps * BATCH


def draw_curves(results: Path, picture: Path) -> None:
    """Write the picture: right answers over samples seen, mean and standard deviation over the seeds.

    Raises:
        FileNotFoundError: no run there was measured on the way.
    """
    from matplotlib.figure import Figure

    panels = {}
    for title in ("experts", "queries"):
        curves = {name: _curve(records_of(name, results)) for name in TABLES[title]}
        panels[title] = {name: curve for name, curve in curves.items() if curve}
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        raise FileNotFoundError(f"{results} holds no run that was measured on the way")
    figure = Figure(figsize=(5 * len(panels), 3.8), dpi=100, layout="constrained")
    (row,) = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axes, (title, curves) in zip(row, panels.items(), strict=True):
        for name, curve in curves.items():
            samples, means, spreads = zip(*curve, strict=True)
            (line,) = axes.plot(samples, means, marker="o", label=name)
            low, high = (
                [mean + sign * spread for mean, spread in zip(means, spreads, strict=True)] for sign in (-1, 1)
            )
            axes.fill_between(samples, low, high, color=line.get_color(), alpha=0.15)
        axes.set(title=title, xlabel="samples seen")
        axes.legend(fontsize="small", loc="lower right")
        axes.grid(alpha=0.3)
    row[0].set(ylabel="right answers, %")
    with written_whole(picture) as temporary:
        figure.savefig(temporary, format=picture.suffix.removeprefix(".") or "png")


def _curve(records: list[dict[str, Any]]) -> list[tuple[int, float, float]]:
    """(samples, mean, spread) at the places that all seeds were measured at."""
    rows = [
        [*record.get("on_the_way", []), {"samples": record["steps"] * BATCH, "vision": record["vision"]}]
        for record in records
    ]
    points = []
    for together in zip(*rows, strict=True):
        values = [100 * statistics.mean(point["vision"].values()) for point in together]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        points.append((together[0]["samples"], statistics.mean(values), spread))
    return points if len(points) > 1 else []


def _chosen(only: str | None) -> list[str]:
    """Variants by name or by table, each after the one that it goes on from."""
    wanted = only.split(",") if only else list(VARIANTS)
    unknown = [name for name in wanted if name not in VARIANTS and name not in TABLES]
    if unknown:
        known = f"tables {', '.join(TABLES)}; runs {', '.join(VARIANTS)}"
        raise typer.BadParameter(f"unknown variant {unknown[0]}; allowed are the {known}")
    names = {name for one in wanted for name in TABLES.get(one, (one,))}
    names |= {VARIANTS[name].start for name in names if VARIANTS[name].start != "base"}
    return [name for name in VARIANTS if name in names]


def main(
    results: Annotated[Path, typer.Argument(help="folder of one JSON a run")],
    seeds: Annotated[str, typer.Option(help="seeds, with commas")] = "0,1,2",
    only: Annotated[str | None, typer.Option(help="tables or runs, with commas  [default: all]")] = None,
    work: Annotated[Path, typer.Option(help="folder of weights that runs share")] = Path("runs/ablations"),
    show: Annotated[bool, typer.Option("--table", help="print the tables of what is there and stop")] = False,
    curves: Annotated[Path | None, typer.Option(help="draw what is there into this picture and stop")] = None,
) -> None:
    """Run what is not there yet, then print the tables."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    names = _chosen(only)
    if curves is not None:
        draw_curves(results, curves)
        return
    for seed in [] if show else [int(seed) for seed in seeds.split(",")]:
        for name in names:
            work.mkdir(parents=True, exist_ok=True)
            try:
                with ExitStack() as held:
                    # A run that this one goes on from may be at work elsewhere, too.
                    for one in {name, VARIANTS[name].start} - {"base"}:
                        held.enter_context(FileLock(work / f"{one}-{seed}.lock", timeout=0))
                    if not (results / f"{name}-{seed}.json").exists():
                        record = run(name, seed, results, work)
                        logger.info("%s, seed %d: %s", name, seed, record["vision"])
            except Timeout:
                logger.info("%s, seed %d: another process is at it", name, seed)
    for title, rows in TABLES.items():
        if set(rows) & set(names):
            typer.echo(f"{title}\n\n{table(results, rows)}\n")


if __name__ == "__main__":
    typer.run(main)
