"""Runs a stage: recipe -> model, data, `EViPTrainer` -> a folder that `from_pretrained` loads."""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed
from transformers.integrations import is_tensorboard_available

from ..common.files import read_json, write_json
from ..common.models import find_folder, resolve_model
from ..image_processing_mono_internvl import MonoInternVLImageProcessor
from ..modeling_mono_internvl import MonoInternVLForCausalLM
from ..plates.tasks import PlateWorld
from ..processing_mono_internvl import MonoInternVLProcessor
from ..queries_mono_internvl import check_same_queries
from ..tiling_mono_internvl import count_tiles
from ..training_mono_internvl import make_drop_path
from .backend import Backend, choose_backend
from .checkpoints import checkpoints
from .distillation import RECORD, Distiller, check_same_targets, find_teacher, read_distillation
from .groups import count_parameters, linear_modules, train_only
from .loading import Batches, Conversations, Key, UnitBatches, mixture, one_pass, packed
from .sources import Source, open_sources
from .stages import RECIPES, Stage, load_stage, read_group_rates
from .trainer import EViPTrainer, Progress


logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
# Of a checkpoint: the recipe, as its run had it.
RECIPE_RECORD = "recipe.json"
# By these it is known which samples a run has seen, and what is in its packs.
COUNTED, PACKED = ("data", "epochs", "batch_size", "packing", "seed"), ("max_length", "max_tiles")
# Keys of a recipe's `data` that draw instead of reading files.
PLATE_OPTIONS = (
    "plate_world",
    "naming",
    "questions",
    "category_weights",
    "closing",
    "odd_one",
    "size",
    "block",
    "tiled_every",
    "seed",
)


def run_stage(
    recipe: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    runs: str | Path = "runs",
    output: str | Path | None = None,
    resume: bool = False,
    write: Callable[[str], None] = logger.info,
) -> Path:
    """Train one stage.

    Args:
        recipe: name of a recipe of this package, or a YAML file.
        overrides: fields of `Stage` that replace the recipe's.
        runs: checkpoints and logs go to `runs/RECIPE/`; a recipe that starts from another finds it there.
        output: folder of the finished model; default `runs/RECIPE/model`.
        resume: go on from the newest whole checkpoint, if there is one.
        write: gets lines about what trains, and progress.

    Returns:
        The folder of the finished model.

    Raises:
        FileNotFoundError, ValueError: what is missing or does not fit, by name.
        BadSample: a sample that cannot be learnt from, by file and line.
    """
    stage = load_stage(recipe, overrides)
    name = Path(recipe).stem if Path(recipe).suffix else str(recipe)
    folder = Path(runs) / name
    output = Path(output) if output is not None else folder / "model"
    kept = checkpoints(folder)
    newest = kept[-1] if kept else None
    if newest is not None and not resume:
        raise ValueError(f"{folder} holds checkpoints of an earlier run: pass --resume to go on, or remove them")
    if stage.distillation is not None:
        find_teacher(read_distillation(stage.distillation).teacher)
    # Before anything is read or built: whatever starts at random starts the same.
    set_seed(stage.seed)
    state = PartialState(cpu=not torch.cuda.is_available())
    world_size, rank = state.num_processes, state.process_index
    # Text is told once, by the process that leads.
    tell = write if rank == 0 else (lambda line: None)

    backend = choose_backend(stage)
    processor, model = _start(stage, backend, Path(runs), folder, state)
    if isinstance(model, MonoInternVLForCausalLM):
        model.config.text_config.drop_path_rate = stage.drop_path
        _set_drop_path(model)
        _place_queries(model, processor, stage)
    _fit_tokens(model, processor, stage, tell)
    sources = _sources(stage, processor)
    units, steps = _units(stage, sources, processor)
    per_step = stage.batch_size // stage.accumulation
    if per_step % world_size:
        raise ValueError(
            f"batch_size / accumulation = {per_step} must be a multiple of the {world_size} processes that train"
        )
    train_only(model, stage.trains or (stage.lora or {})["groups"])
    trained: torch.nn.Module = model
    if stage.lora:
        trained = _with_lora(model, stage.lora)
    for line in describe(stage, name, trained, processor, steps):
        tell(line)
    tell(f"  {backend}")

    distiller = _distiller(stage, model, processor, newest, world_size)
    for line in describe_changes(stage, newest) if newest is not None else ():
        tell(line)
    records = {RECIPE_RECORD: asdict(stage), **({} if distiller is None else {RECORD: distiller.record})}
    trainer = make_trainer(
        stage,
        trained,
        backend,
        units.conversations,
        units,
        make_arguments(stage, folder, steps, per_step // world_size),
        pad_token_id=processor.tokenizer.pad_token_id,
        tokens_per_tile=processor.tokens_per_tile,
        processing_class=processor,
        callbacks=[Progress(tell)],
        distiller=distiller,
        group_rates=read_group_rates(stage),
        records=records,
    )
    trainer.train(resume_from_checkpoint=str(newest) if newest is not None else None)
    read, bad = trainer.count_samples()
    if bad:
        tell(f"{bad} of {read} samples were left out; the log names them")
        # While it runs a few are let pass, as at first their share means nothing; now it is known.
        if bad == read or bad > max(stage.max_bad_share * read, 1):
            limit = "nothing was learnt" if bad == read else f"more than {stage.max_bad_share:.1%}"
            raise ValueError(f"{bad} of {read} samples were bad, {limit}: no model is written")
    if rank == 0:
        # Beside the checkpoints: TensorBoard's files are for its own eyes.
        write_json(folder / "log.json", trainer.state.log_history, indent=1)
    _save(trainer, processor, stage, output)
    tell(f"finished: {output}")
    return output


def _distiller(
    stage: Stage, model: Any, processor: MonoInternVLProcessor, checkpoint: Path | None, processes: int
) -> Distiller | None:
    """What the stage's queries learn from, as it was in the checkpoint.

    Raises:
        ValueError: the checkpoint is of a run with other targets; or no tile shows a picture of several whole.
    """
    distiller = None
    if stage.distillation is not None:
        options = read_distillation(stage.distillation)
        if options.projection == "trained" and processes > 1:
            # It is no part of the model, whose gradients DDP, FSDP and ZeRO add up.
            raise ValueError(
                f"distillation: projection trained is for one process, not {processes}; random goes with all"
            )
        if stage.max_tiles > 1 and not processor.image_processor.use_thumbnail:
            raise ValueError(
                "distillation: the teacher sees the thumbnail, and the processor makes none (use_thumbnail): give "
                "max_tiles 1, or a processor that does"
            )
        if not isinstance(model, MonoInternVLForCausalLM):
            raise ValueError("distillation: a dense language model has no learnable queries")
        distiller = Distiller(options, model.config, PartialState().device)
    if checkpoint is not None:
        check_same_targets(distiller, checkpoint)
        if distiller is not None:
            distiller.load(checkpoint)
    return distiller


def make_trainer(
    stage: Stage,
    model: torch.nn.Module,
    backend: Backend,
    conversations: Any,
    units: Callable[[], Iterator[list[Key]]],
    arguments: TrainingArguments,
    *,
    pad_token_id: int,
    tokens_per_tile: int,
    **more: Any,
) -> EViPTrainer:
    """The trainer of a stage, of a run and of what measures one.

    Args:
        conversations: data set of (key, example), or (key, `BadSample`), by key, with `skip_bad`.
        units: makes the run's units, from the first.
        more: goes to `Trainer`.
    """
    world_size, per_rank = arguments.world_size, arguments.per_device_train_batch_size
    micro_steps = arguments.max_steps * arguments.gradient_accumulation_steps
    return EViPTrainer(
        model=model,
        args=arguments,
        conversations=conversations,
        batches=Batches(
            pad_token_id,
            tokens_per_tile,
            packing=stage.packing,
            padding_free=stage.padding_free,
            weighting=stage.loss_weighting,
            length=backend.row_length,
        ),
        micro_batches=UnitBatches(units, micro_steps, per_rank, arguments.process_index, world_size),
        max_bad_share=stage.max_bad_share,
        compiles=backend.compiles,
        **more,
    )


def describe(
    stage: Stage, name: str, model: torch.nn.Module, processor: MonoInternVLProcessor, steps: int
) -> Iterator[str]:
    """What trains and what is frozen, by group, and the tokens of a step, before it starts."""
    rates = read_group_rates(stage)
    yield f"{name}: {stage.description}"
    for group, (trains, total) in count_parameters(model).items():
        state = "trains" if trains == total else "frozen" if trains == 0 else f"adapters of {trains:,} train"
        state += f" at {rates[group]:.1e}" if group in rates else ""
        yield f"  {group:<26}{total:>16,}  {state}"
    limit = processor.tokens_per_tile * count_tiles(stage.max_tiles, 1, use_thumbnail=True)
    kind = "packs" if stage.packing else "samples"
    yield (
        f"  {steps:,} steps of {stage.batch_size:,} {kind}, "
        f"at most {stage.batch_size * stage.max_length:,} tokens a step "
        f"({stage.max_length:,} a {kind[:-1]}, {limit:,} of a picture)"
    )


def describe_changes(stage: Stage, checkpoint: Path) -> Iterator[str]:
    """What a run that goes on does otherwise than the one that wrote the checkpoint."""
    path = checkpoint / RECIPE_RECORD
    was = read_json(path) if path.is_file() else {}
    now = json.loads(json.dumps(asdict(stage)))
    changed = [key for key in now if key in was and was[key] != now[key]]
    for key in changed:
        yield f"  {key} was {was[key]} up to {checkpoint.name}; from there it is {now[key]}"
    counts = (*COUNTED, *PACKED) if stage.packing else COUNTED
    if counted := [key for key in counts if key in changed]:
        yield f"  with another {', '.join(counted)} the samples that it passes over are not those that it has seen"


# ------------------------------------------------------------------------------------------------------------ start


def _start(
    stage: Stage, backend: Backend, runs: Path, folder: Path, state: PartialState
) -> tuple[MonoInternVLProcessor, Any]:
    attention = {} if backend.attention is None else {"attn_implementation": backend.attention}
    if stage.dense is not None:
        processor = _processor(stage.tokenizer or str(ROOT))
        processor.image_processor.max_tiles = stage.max_tiles
        config = dense_config(stage.dense, processor)
        config._attn_implementation = backend.attention
        return processor, LlamaForCausalLM(config)
    assert stage.model is not None
    source = stage.model
    if (RECIPES / f"{source}.yaml").is_file():
        source = str(runs / source / "model")
        if not Path(source).is_dir():
            raise FileNotFoundError(f"{stage.model} has not been trained: {source} does not exist")
    source = resolve_model(source)
    if stage.expand is not None:
        source = str(_expanded(source, stage, folder, state))
    processor = _processor(stage.tokenizer or source)
    model = MonoInternVLForCausalLM.from_pretrained(source, dtype=torch.float32, **attention)
    return processor, model


def dense_config(dimensions: Mapping[str, Any], processor: MonoInternVLProcessor) -> LlamaConfig:
    """A dense language model with the processor's tokens, those of pictures left to the expansion."""
    tokenizer = processor.tokenizer
    tokens = {
        "vocab_size": processor.image_token_ids[1],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlamaConfig(**{**tokens, **dimensions})


def _processor(name: str) -> MonoInternVLProcessor:
    folder = str(find_folder(name) or name)
    try:
        return MonoInternVLProcessor.from_pretrained(folder)
    except OSError:
        # A dense model's folder has a tokenizer alone.
        return MonoInternVLProcessor(MonoInternVLImageProcessor(), AutoTokenizer.from_pretrained(folder))


def _expanded(source: str, stage: Stage, folder: Path, state: PartialState) -> Path:
    """The dense model expanded, once, beside the stage's checkpoints."""
    from ..conversion import expand_checkpoint

    target, unfinished, record = folder / "expanded", folder / "expanded.tmp", folder / "expanded.json"
    how = {"model": stage.model, "visual_attention_experts": stage.visual_attention_experts, **(stage.expand or {})}
    how = json.loads(json.dumps(how))
    # One that was made otherwise is of a run that saved nothing yet, or the recipe has changed since it did.
    other = target.is_dir() and record.is_file() and read_json(record) != how
    if other and checkpoints(folder):
        raise ValueError(
            f"{folder} holds checkpoints of a model that was expanded with {read_json(record)}, and the recipe says "
            f"{how}: go on with the recipe as it was, or remove the folder"
        )
    state.wait_for_everyone()
    if state.is_main_process and (other or not target.is_dir()):
        for old in (unfinished, target):
            shutil.rmtree(old, ignore_errors=True)
        options = dict(stage.expand or {})
        start, max_tiles = options.pop("start", None), options.pop("max_tiles", None)
        experts = stage.visual_attention_experts or "none"
        expand_checkpoint(source, unfinished, visual_attention_experts=experts, **options)
        if start:
            model = MonoInternVLForCausalLM.from_pretrained(unfinished)
            start_vision(model, **start)
            model.save_pretrained(unfinished)
        if max_tiles:
            processor = MonoInternVLProcessor.from_pretrained(unfinished)
            processor.image_processor.max_tiles = max_tiles
            processor.save_pretrained(unfinished)
        write_json(record, how)
        unfinished.rename(target)
    state.wait_for_everyone()
    return target


@torch.no_grad()
def start_vision(model: MonoInternVLForCausalLM, patch: float, position: float) -> None:
    """Scale the patch embedding to a standard deviation of `patch`, and write sines and cosines of row and column, of
    standard deviation `position`, into the position table, in place.

    A flat background makes the 588 weights of a patch add up. Where its embedding is much wider than the positions,
    these go unnoticed in a short run: left and right stay at chance for tens of thousands of pictures (above and below
    are told by the order of the tokens).
    """
    embeddings = model.model.vision_embeddings
    side, width = embeddings.side, embeddings.position_embedding.shape[-1]
    waves = torch.arange(width // 4) / (width // 4) * math.pi * 4 + math.pi / side
    angles = torch.arange(side)[:, None] / side * waves
    axis = torch.cat((angles.sin(), angles.cos()), dim=-1)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    table = torch.cat((rows, columns), dim=-1).reshape(side * side, width)
    embeddings.position_embedding[0, 1:] = position * (table - table.mean(0)) / table.std()
    weight = embeddings.patch_embedding.weight
    weight *= patch / weight.std()


def _fit_tokens(model: Any, processor: MonoInternVLProcessor, stage: Stage, tell: Callable[[str], None]) -> None:
    """Give the tokens that were added to the tokenizer their rows, or say why they cannot be learnt."""
    rows, tokenizer = model.get_input_embeddings().weight.shape[0], processor.tokenizer
    added = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if stage.dense is not None or not added:
        return
    names = f"the tokenizer has {len(added)} tokens that the model has no rows for ({', '.join(sorted(added)[:5])})"
    if stage.lora or "text" not in stage.trains:
        raise ValueError(
            f"{names}; their rows are learnt with the group text, not by "
            f"{'adapters: train without lora first' if stage.lora else 'what this stage trains'}"
        )
    model.resize_token_embeddings(max(added.values()) + 1)
    tell(f"{names}: rows added")


def _place_queries(model: MonoInternVLForCausalLM, processor: MonoInternVLProcessor, stage: Stage) -> None:
    """Learnable queries to where the stage wants them, in what is trained and in what is saved."""
    if stage.query_placement is not None:
        if not model.config.num_learnable_queries:
            raise ValueError("query_placement: the model has no learnable queries")
        model.config.query_placement = processor.query_placement = stage.query_placement
    check_same_queries(model.config, processor)


def _set_drop_path(model: MonoInternVLForCausalLM) -> None:
    for number, layer in enumerate(model.model.language_model.layers):
        layer.drop_path = make_drop_path(model.config.text_config, number)


def _with_lora(model: Any, options: Mapping[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    known = {"groups", "r", "alpha", "dropout"}
    if set(options) - known or "groups" not in options:
        raise ValueError(f"lora: needs groups, and knows {', '.join(sorted(known))}")
    lacking = [group for group in options["groups"] if not linear_modules(model, [group])]
    if lacking:
        raise ValueError(f"lora: the model has no linear layers of {', '.join(lacking)}")
    config = LoraConfig(
        # Where the base lies, also when the adapter's folder is moved or used from another one.
        base_model_name_or_path=_base_name(model),
        r=int(options.get("r", 16)),
        lora_alpha=int(options.get("alpha", 32)),
        lora_dropout=float(options.get("dropout", 0.0)),
        target_modules=linear_modules(model, options["groups"]),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _base_name(model: Any) -> str | None:
    name = getattr(model, "name_or_path", None)
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name or None


# ------------------------------------------------------------------------------------------------------------- data


def _sources(stage: Stage, processor: MonoInternVLProcessor) -> list[Source]:
    found: list[Source] = []
    for spec in stage.data or []:
        if not isinstance(spec, Mapping) or "plate_world" not in spec:
            found += open_sources([spec])
            continue
        unknown = [key for key in spec if key not in (*PLATE_OPTIONS, "weight")]
        if unknown:
            raise ValueError(f"data: unknown key {unknown[0]!r}; plate_world knows {', '.join(PLATE_OPTIONS)}, weight")
        if stage.steps is None:
            raise ValueError("data: plate_world has no end: give steps, not epochs")
        options = {
            "block": stage.batch_size,
            "tile_size": processor.image_processor.tile_size,
            "max_tiles": stage.max_tiles,
            **{key: spec[key] for key in PLATE_OPTIONS[1:] if key in spec},
        }
        length = stage.steps * stage.batch_size
        found.append(Source(PlateWorld(spec["plate_world"], length, **options), weight=spec.get("weight")))
    return found


class _Units:
    """Makes the run's units, from the first; picklable, and the same at every call."""

    def __init__(self, stage: Stage, sources: list[Source], conversations: Conversations):
        self.stage, self.sources, self.conversations = stage, sources, conversations

    def keys(self) -> Iterator[Key]:
        if self.stage.epochs is not None:
            return one_pass(self.sources, self.stage.epochs, self.stage.seed)
        return mixture(self.sources, self.stage.seed)

    def __call__(self) -> Iterator[list[Key]]:
        if not self.stage.packing:
            return ([key] for key in self.keys())
        return packed(self.keys(), self.conversations.length_of, self.stage.max_length, self.stage.seed)


def _units(stage: Stage, sources: list[Source], processor: MonoInternVLProcessor) -> tuple[_Units, int]:
    """The units and the number of steps."""
    tile = processor.tokens_per_tile
    if stage.max_length < tile + 16:
        raise ValueError(f"max_length: {stage.max_length} tokens do not hold a tile of {tile} and a question")
    conversations = Conversations(
        sources,
        processor,
        max_tiles=stage.max_tiles,
        max_length=stage.max_length,
        skip_bad=stage.on_bad_sample == "skip",
    )
    units = _Units(stage, sources, conversations)
    if stage.steps is not None:
        return units, stage.steps
    count = sum(1 for _ in units())
    if count < stage.batch_size:
        raise ValueError(f"data: {count} {'packs' if stage.packing else 'samples'} make no batch of {stage.batch_size}")
    steps = count // stage.batch_size
    if count % stage.batch_size:
        logger.warning("the last %d of %d units fill no batch and are left out", count % stage.batch_size, count)
    return units, steps


# --------------------------------------------------------------------------------------------------------- training


def make_arguments(
    stage: Stage, folder: Path, steps: int, per_rank: int, *, cuda: bool | None = None, **changes: Any
) -> TrainingArguments:
    """transformers' arguments for a stage.

    Args:
        per_rank: units of a micro-batch on one rank.
        cuda: train on a GPU; default: where there is one.
        changes: fields of `TrainingArguments` that replace the stage's.
    """
    cuda = torch.cuda.is_available() if cuda is None else cuda
    checkpointing: dict[str, Any] = {}
    if stage.gradient_checkpointing:
        # Newer transformers call it otherwise, and warn of the old name.
        known = TrainingArguments.__dataclass_fields__
        named = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        checkpointing = {named: True, f"{named}_kwargs": {"use_reentrant": False}}
    fields: dict[str, Any] = dict(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=per_rank,
        gradient_accumulation_steps=stage.accumulation,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.schedule,
        lr_scheduler_kwargs={"min_lr_rate": stage.min_lr_rate} if stage.schedule == "cosine_with_min_lr" else {},
        warmup_steps=round(stage.warmup * steps) if stage.warmup < 1 else int(stage.warmup),
        weight_decay=stage.weight_decay,
        adam_beta1=stage.adam_beta1,
        adam_beta2=stage.adam_beta2,
        adam_epsilon=stage.adam_epsilon,
        max_grad_norm=stage.max_grad_norm,
        bf16=stage.bf16 and cuda,
        tf32=True if cuda else None,
        **checkpointing,
        logging_steps=stage.log_steps,
        save_steps=stage.save_steps,
        save_total_limit=stage.keep_checkpoints,
        dataloader_num_workers=stage.workers,
        dataloader_prefetch_factor=4 if stage.workers else None,
        dataloader_pin_memory=cuda,
        # Said outright: without it the processes of a CPU run would each train a copy alone.
        use_cpu=not cuda,
        # Frozen parts have no gradient by design, and every trained part is in every graph (zero tiles).
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        # The trainer writes this into the config of the model it saves, and its own default is False.
        use_cache=True,
        disable_tqdm=True,
        report_to=["tensorboard"] if is_tensorboard_available() else [],
        seed=stage.seed,
    )
    return TrainingArguments(**{**fields, **changes})


def short_arguments(folder: str | Path, batch: int, rate: float, seed: int, **length: Any) -> TrainingArguments:
    """transformers' arguments for minutes of training, without checkpoints or reports; `length`: how much."""
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        weight_decay=0.05,
        adam_beta2=0.98,
        save_strategy="no",
        logging_steps=50,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        seed=seed,
        **length,
    )


def _save(trainer: EViPTrainer, processor: MonoInternVLProcessor, stage: Stage, output: Path) -> None:
    """Write the finished model to a temporary folder beside `output`, then rename it."""
    temporary = output.with_name(output.name + ".tmp")
    if trainer.is_world_process_zero():
        shutil.rmtree(temporary, ignore_errors=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, MonoInternVLForCausalLM):
        # A run's setting, not the model's.
        model.config.text_config.drop_path_rate = 0.0
        model.generation_config.eos_token_id = processor.stop_token_ids
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.to(getattr(torch, stage.save_dtype))
    trainer.save_model(str(temporary))
    if trainer.is_world_process_zero():
        # The limit that the model learnt with, unless the recipe says what its model keeps.
        if not (stage.expand or {}).get("max_tiles"):
            processor.image_processor.max_tiles = stage.max_tiles
        processor.save_pretrained(temporary)
        if output.exists():
            shutil.rmtree(output)
        temporary.rename(output)
    trainer.accelerator.wait_for_everyone()
