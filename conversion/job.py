"""What expanding and converting have in common: plan in hand, make the folder, verify it, sign it, rename it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..configuration_mono_internvl import MonoInternVLConfig
from .files import write_model_card
from .manifest import MANIFEST
from .plan import Plan
from .source import Checkpoint, Origin
from .verify import Differences
from .writer import (
    Progress,
    job_key,
    naming,
    parse_size,
    publish_folder,
    temporary_folder,
    write_json,
    write_shards,
)


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What was made.

    Attributes:
        folder: the destination.
        tensors, nbytes, shards: of its weights.
        differences: what verification found; None without it.
        not_finite: source tensors that hold NaN or infinite values.
        writing_seconds, verifying_seconds: wall time of the two long parts.
    """

    folder: Path
    tensors: int
    nbytes: int
    shards: int
    differences: Differences | None
    not_finite: tuple[str, ...]
    writing_seconds: float
    verifying_seconds: float


@dataclass(frozen=True)
class Job:
    """One checkpoint to make.

    Attributes:
        operation: expand or convert.
        how: how it was made, a sentence of the model card.
        options: as recorded.
        manifest: hash every weight file, of the source and of the result.
    """

    operation: str
    how: str
    options: dict[str, Any]
    origin: Origin
    source: Checkpoint
    config: MonoInternVLConfig
    plan: Plan
    base_model: str | None = None
    manifest: bool = False

    def run(
        self,
        destination: Path,
        write_files: Callable[[Path], None],
        verify: Callable[[Checkpoint], Differences] | None,
        max_shard_size: int | str,
        progress: Progress | None,
    ) -> Report:
        """Make `destination`; an interrupted run is gone on with.

        Raises:
            OSError: not enough disk, or another process is at the same work.
            ValueError: verification found a difference; nothing is left then.
        """
        options = {**self.options, "max_shard_size": parse_size(max_shard_size)}
        key = job_key(self.source, __version__, self.operation, options, self.plan, self.config.to_json_string())
        with temporary_folder(destination, key, self.plan.nbytes) as folder:
            with naming(folder, folder):
                write_files(folder)
            start = time.monotonic()
            inputs, outputs = write_shards(
                self.plan, self.source, folder, options["max_shard_size"], progress, self.manifest
            )
            written = time.monotonic()
            not_finite = self._warn_of_not_finite(outputs)
            found = None
            if verify is not None:
                with Checkpoint(folder) as made:
                    found = verify(made)
                if not found.passed:
                    for path in folder.glob("*.safetensors"):
                        path.unlink()
                    raise ValueError(
                        f"verification of {destination} failed: hidden states differ by up to "
                        f"{found.hidden_states:.3g}, logits by up to {found.logits:.3g}; the weights were removed"
                    )
            verified = time.monotonic()
            with naming(folder, folder):
                write_model_card(folder, self.source, self.origin, self.config, self.plan, self.how, self.base_model)
            write_json(folder / MANIFEST, self._manifest(options, inputs, outputs, not_finite))
            publish_folder(folder, destination)
        return Report(
            destination,
            len(self.plan.outputs),
            self.plan.nbytes,
            len(outputs),
            found,
            not_finite,
            written - start,
            verified - written,
        )

    def _warn_of_not_finite(self, outputs: dict[str, dict[str, Any]]) -> tuple[str, ...]:
        spoilt = {name for entry in outputs.values() for name in entry["not_finite"]}
        sources = {of: None for output in self.plan.outputs if output.name in spoilt for of in output.sources}
        if sources:
            places = [f"{name} in {self.source.tensors[name].file}" for name in sources]
            logger.warning("%d tensors hold NaN or infinite values: %s", len(places), ", ".join(places))
        return tuple(sources)

    def _manifest(
        self,
        options: dict[str, Any],
        inputs: dict[str, dict[str, Any]],
        outputs: dict[str, dict[str, Any]],
        not_finite: tuple[str, ...],
    ) -> dict[str, Any]:
        return {
            "tool": {"name": "mono-internvl", "version": __version__},
            "operation": self.operation,
            "source": {name: value for name, value in self.origin._asdict().items() if value is not None},
            "options": options,
            "inputs": inputs,
            "outputs": {
                file: {name: value for name, value in entry.items() if name != "not_finite"}
                for file, entry in outputs.items()
            },
            "not_finite": list(not_finite),
        }
