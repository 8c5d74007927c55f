"""transformers' `Trainer`, extended where EViP needs it: units as batches, weighted loss, whole checkpoints."""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback

from ..common.compiling import compile_layers, uncompile_layers
from ..common.files import write_json
from ..modeling_mono_internvl import MonoInternVLModel
from .checkpoints import WholeCheckpoints
from .data import IGNORED
from .distillation import Distiller
from .groups import split_by_rate
from .loading import Batches, Conversations, UnitBatches
from .records import BadSample


logger = logging.getLogger(__name__)


def weighted_loss_sum(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over positions of weight * cross-entropy of the next token, float32 [].

    Args:
        logits: [B, T, vocabulary]; labels: int64 [B, T], -100 where nothing is learnt; weights: float32 [B, T].
    """
    return _cross_entropy_sum(logits[:, :-1], labels[:, 1:], weights[:, 1:])


def _cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """As `weighted_loss_sum`, with the targets already beside the logits that predict them."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return (losses * weights.flatten()).sum()


def learnt_places(labels: torch.Tensor) -> torch.Tensor:
    """int64 [K], at least one: the positions whose next token is learnt in some row of `labels` [B, T]."""
    places = (labels[:, 1:] != IGNORED).any(0).nonzero().flatten()
    return places if len(places) else places.new_zeros(1)


class EViPTrainer(WholeCheckpoints):
    """A `Trainer` for one stage.

    Batches come from `UnitBatches` as they are: each rank reads its own. Only parameters that train have gradients and
    optimiser state (`train_only` froze the others before). The loss is the weighted mean over the whole step, all
    micro-batches and ranks, so accumulation and the number of processes do not change it.

    Args:
        conversations, batches, micro_batches: data set, collator and sampler.
        max_bad_share: the run fails when more of the samples read were bad.
        compiles: compile each decoder layer for as long as it trains.
        distiller: what the learnable queries learn from, if they do.
        group_rates: group of parameters -> its learning rate instead of that of `args`.
        records: name of a file -> what each checkpoint keeps in it, as JSON.
    """

    def __init__(
        self,
        *,
        conversations: Conversations,
        batches: Batches,
        micro_batches: UnitBatches,
        max_bad_share: float = 0.01,
        compiles: bool = False,
        distiller: Distiller | None = None,
        group_rates: Mapping[str, float] | None = None,
        records: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.micro_batches, self.max_bad_share = micro_batches, max_bad_share
        self.samples_read, self.bad_samples, self.waited = 0, 0, 0.0
        self.distiller, self._blocks = distiller, 1
        self.group_rates, self.records = dict(group_rates or {}), dict(records or {})
        self._distilled, self._logged_step = torch.zeros(()), 0
        super().__init__(train_dataset=conversations, data_collator=batches, **kwargs)
        # Progress tells what is logged; this one prints it once more, to stdout.
        self.remove_callback(PrinterCallback)
        if compiles:
            self.add_callback(CompiledLayers)
        if distiller is not None:
            self.add_callback(Distilling(self))
            decoders = [module for module in kwargs["model"].modules() if isinstance(module, MonoInternVLModel)]
            decoders[0].register_forward_hook(self._keep_hidden)
        # The loss below divides by the step's weights itself.
        self.model_accepts_loss_kwargs = True
        # A dense language model, in the text stage, has no place for pixels.
        self._takes_pixels = hasattr(self.accelerator.unwrap_model(self.model).config, "vision_config")

    def get_train_dataloader(self) -> DataLoader:
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self.micro_batches,
            collate_fn=self.data_collator,
            num_workers=workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            pin_memory=self.args.dataloader_pin_memory,
            # Its own generator: starting the workers must not move the model's random state, or resuming would.
            generator=torch.Generator().manual_seed(self.args.seed),
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        start = time.perf_counter()
        samples, weights = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(samples) < num_batches:
            # The Trainer takes this for the end of the data and finishes, well or while other ranks wait.
            raise RuntimeError(f"the data ended {num_batches - len(samples)} batches before the run did")
        self.waited += time.perf_counter() - start
        for batch in samples:
            bad = batch.pop("bad", ())
            if bad and not self.train_dataset.skip_bad:  # type: ignore[union-attr]
                raise BadSample(bad[0])
            self.samples_read += int(batch.pop("samples"))
            self.bad_samples += len(bad)
            for message in bad:
                logger.warning("left out: %s", message)
        if self.bad_samples > self.max_bad_share * max(self.samples_read, 100):
            raise ValueError(
                f"{self.bad_samples} of {self.samples_read} samples were bad, more than {self.max_bad_share:.1%}; "
                "the log names them"
            )
        return samples, weights

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:  # type: ignore[override]
        """The weights of all targets of the step, over its micro-batches and ranks."""
        if not batch_samples:
            return None
        total = torch.stack([batch["loss_weights"].sum() for batch in batch_samples]).sum().to(device)
        if self.distiller is not None:
            blocks = torch.tensor(
                sum(self.distiller.count(batch["input_ids"]) for batch in batch_samples), device=device
            )
            self._blocks = max(int(self.accelerator.gather(blocks).sum()), 1)
        if self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return total.clamp(min=1e-6)

    def _keep_hidden(self, module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        self._hidden = outputs.last_hidden_state

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As in transformers; what has a rate of its own, and what the distiller trains, are groups of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.group_rates:
            model: Any = args[0] if args else kwargs.get("model")
            split_by_rate(optimizer, self.model if model is None else model, self.group_rates)  # type: ignore[arg-type]
        if self.distiller is not None and self.distiller.parameters:
            optimizer.add_param_group({"params": self.distiller.parameters, "weight_decay": 0.0})
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; a checkpoint, not a finished model, also holds records and what the distiller trains."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.is_world_process_zero():
            folder = Path(output_dir or self.args.output_dir or ".")
            for name, values in self.records.items():
                write_json(folder / name, values)
            if self.distiller is not None:
                self.distiller.save(folder)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        labels, weights = inputs.pop("labels"), inputs.pop("loss_weights")
        if not self._takes_pixels:
            pixels = inputs.pop("pixel_values", None)
            if pixels is not None and len(pixels):
                raise ValueError(
                    f"the records hold pictures ({len(pixels)} tiles in this batch); a dense language model sees none"
                )
        # Logits only where something is learnt: with a large vocabulary they are the largest tensors of a step.
        places = learnt_places(labels)
        outputs = model(**inputs, use_cache=False, logits_to_keep=places)
        loss = _cross_entropy_sum(outputs.logits, labels[:, places + 1], weights[:, places + 1])
        loss = loss / (weights.sum().clamp(min=1e-6) if num_items_in_batch is None else num_items_in_batch)
        if self.distiller is not None:
            distilled = self.distiller.loss(self._hidden, inputs["input_ids"], inputs["pixel_values"]) / self._blocks
            self._distilled = distilled.detach() + self._distilled.to(distilled.device)
            loss = loss + self.distiller.options.weight * distilled
        if num_items_in_batch is not None:
            # Gradients are averaged over the ranks, the total is of all of them.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs["data_wait_s"] = round(self.waited, 3)
            logs["bad_samples"] = self.count_samples()[1]
            self.waited = 0.0
            if self.distiller is not None:
                steps = max(self.state.global_step - self._logged_step, 1)
                logs["distillation_loss"] = round(self._distilled.item() / steps, 6)
                self._distilled, self._logged_step = torch.zeros(()), self.state.global_step
        super().log(logs, *args, **kwargs)

    def count_samples(self) -> tuple[int, int]:
        """Samples read so far and bad ones among them, of all ranks; every rank has to call it."""
        counts = torch.tensor([self.samples_read, self.bad_samples], device=self.args.device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts).reshape(-1, 2).sum(0)
        read, bad = counts.tolist()
        return read, bad


class Distilling(TrainerCallback):
    """What `Trainer` does for its model alone, for the distiller of an `EViPTrainer`."""

    def __init__(self, trainer: EViPTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        # A resumed run has logged its first steps already.
        self.trainer._logged_step = state.global_step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        # By a norm of its own: the model's gradients are clipped by then, and count as without a teacher.
        assert self.trainer.distiller is not None
        if args.max_grad_norm and self.trainer.distiller.parameters:
            torch.nn.utils.clip_grad_norm_(self.trainer.distiller.parameters, args.max_grad_norm)

    def on_optimizer_step(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        # `Trainer` lets go of the gradients of the model, not of all that the optimiser has.
        assert self.trainer.distiller is not None
        self.trainer.distiller.projection.zero_grad()


class CompiledLayers(TrainerCallback):
    """Decoder layers are compiled while training.

    It begins after DDP, FSDP or ZeRO have taken the model, as it has to: FSDP2 changes the class of each layer.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        compile_layers(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        uncompile_layers(model)


class Progress(TrainerCallback):
    """One log line now and then; `write` gets it on the main process."""

    def __init__(self, write: Callable[[str], None]):
        self.write, self.start = write, time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if state.is_world_process_zero and logs and "loss" in logs:
            self.write(
                f"step {state.global_step} of {state.max_steps}  loss {float(logs['loss']):.4f}  "
                f"lr {float(logs['learning_rate']):.2e}  {time.monotonic() - self.start:.0f} s"
            )
