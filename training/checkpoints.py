"""Checkpoints that are whole or not there: written under another name, then renamed."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints


UNFINISHED = "unfinished"


def checkpoints(runs: Path) -> list[Path]:
    """Whole checkpoints in the folder of a run, oldest first."""
    found = [path for path in runs.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


class WholeCheckpoints(Trainer):
    """A `Trainer` whose checkpoints are written into `OUTPUT_DIR/unfinished` and moved when they are complete.

    Whatever ends a run while it saves, a full disk or a kill, leaves the checkpoints before as they were. Nothing else
    sees the other name: `args.output_dir` stays, and callbacks, the state and the limit of checkpoints find the new
    one in its place. `Trainer` asks `_get_output_dir` where checkpoints go; there is no public way to tell it.
    """

    _unfinished: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        runs = Path(self._get_output_dir(trial))
        unfinished = runs / UNFINISHED
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        leads = self.is_world_process_zero()
        try:
            if leads:
                shutil.rmtree(unfinished, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._unfinished = unfinished
            super()._save_checkpoint(model, trial)
            self._unfinished = None
            self.accelerator.wait_for_everyone()
            self._name_best(runs, unfinished)
            if leads:
                if (unfinished / name / TRAINER_STATE_NAME).exists():
                    self.state.save_to_json(str(unfinished / name / TRAINER_STATE_NAME))
                shutil.rmtree(runs / name, ignore_errors=True)
                (unfinished / name).rename(runs / name)
                rotate_checkpoints(
                    output_dir=str(runs),
                    save_total_limit=self.args.save_total_limit,
                    best_model_checkpoint=self.state.best_model_checkpoint,
                )
            self.accelerator.wait_for_everyone()
        finally:
            self._unfinished = None
            if leads:
                shutil.rmtree(unfinished, ignore_errors=True)

    def _name_best(self, runs: Path, unfinished: Path) -> None:
        """The best checkpoint by the name that it gets, where it is the one being written."""
        state: TrainerState = self.state
        if state.best_model_checkpoint is not None and Path(state.best_model_checkpoint).parent == unfinished:
            state.best_model_checkpoint = str(runs / Path(state.best_model_checkpoint).name)
